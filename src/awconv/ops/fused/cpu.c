/* AW-convolution on a CPU: direct convolutions whose weights are scaled, a panel of channels at a time, for each sample.
 *
 * Compiled at first use by cpu.py, once for REAL=float and once for REAL=double. Everything is a convolution over three
 * spatial axes (one or two are leading axes of size 1), with groups. With gain[n, p, b, t] = 1 + a,
 *
 *   output[n, p, y]     = sum over c, t of  gain[n, p, b(c), t] weight[p, c, t] input[n, c, stride y + dilation t - padding]
 *   u[n, p, c, t]       = sum over y of  grad_output[n, p, y] input[n, c, stride y + dilation t - padding]
 *   grad_weight[p,c,t]  = sum over n of  gain[n, p, b(c), t] u[n, p, c, t]
 *   grad_gain[n,p,b,t]  = sum over c of b, of  weight[p, c, t] u[n, p, c, t]
 *
 * The output and the gradient of the input are the same loop (correlate): lanes of a vector are output channels, what it
 * reads is copied into rows with the padding made explicit and positions of one phase of the stride side by side, and a
 * tile of LANES x positions stays in registers over all taps and channels. The scaled weights of a panel fit in
 * the second-level cache and exist for one sample at a time. u is never stored: a tile of it is used for both gradients
 * as soon as it is summed. Where a group has few channels, positions take the lanes instead (lines); in depthwise
 * convolutions, channels do again, after a transposition (lanes). No sum is split between threads, so that results do not
 * depend on their number.
 */
#include "cpu_correlate.h"
#include "cpu_lanes.h"
#include "cpu_sums.h"

typedef void correlate_function(const problem_t *, int, const real *, const real *, const real *, real *, real *);

static correlate_function *correlation(const problem_t *problem, int transposed) {
    if (in_lanes(problem, transposed)) return correlate_lanes;
    return in_lines(transposed ? problem->group_in : problem->group_out) ? correlate_lines : correlate;
}

static int64_t any_workspace(const problem_t *problem, int transposed) {
    correlate_function *chosen = correlation(problem, transposed);
    return chosen == correlate_lanes   ? lanes_workspace(problem, transposed)
           : chosen == correlate_lines ? problem->threads * line_scratch(problem, transposed)
                                       : correlate_workspace(problem, transposed);
}

int64_t workspace_elements(const problem_t *problem, int backward) {
    const int64_t threads = problem->threads;
    if (!backward) return any_workspace(problem, 0);
    return most(any_workspace(problem, 1),
                in_lines(problem->group_out) ? threads * sum_line_scratch(problem) : sum_workspace(problem));
}

/* Whether channels last are no slower than a copy that has them first: not where a group's few channels, far from each
 * other, go by lines. */
int takes_last(const problem_t *problem, int backward) {
    if (problem->groups == 1) return 1;
    if (!backward) return correlation(problem, 0) != correlate_lines;
    return !in_lines(problem->group_in) && !in_lines(problem->group_out);
}

void forward(const problem_t *problem, const real *input, const real *weight, const real *gain, real *output,
             real *workspace) {
    correlation(problem, 0)(problem, 0, input, weight, gain, output, workspace);
}

/* Gradients that are not wanted are null; those of weight and gain come together. */
void backward(const problem_t *problem, const real *grad_output, const real *input, const real *weight, const real *gain,
              real *grad_input, real *grad_weight, real *grad_gain, real *workspace) {
    if (grad_input) correlation(problem, 1)(problem, 1, grad_output, weight, gain, grad_input, workspace);
    if (grad_weight)
        (in_lines(problem->group_out) ? sum_lines : sum)(problem, grad_output, input, weight, gain, grad_weight, grad_gain,
                                                         workspace);
}
