/* An attention branch whose norms are folded into its convolutions, up to its activation, in one call: pooling, a
 * product, ReLU, a product. Compiled at first use by build.py, for REAL float or double.
 *
 *   pooled[c, t] = mean of input[c] over bin t
 *   hidden[d, t] = max(0, bias1[d] + sum over c of  weight1[d, c] pooled[c, t])
 *   output[p, t] = bias2[p] + sum over d of  weight2[d, p] hidden[d, t]
 */
#include "average_pool.c"

enum { WIDTH = 64 }; /* output channels whose sums are kept in registers */

int64_t branch_workspace(int64_t samples, int64_t channels, int64_t hidden, const int64_t *size, const int64_t *bins,
                         int64_t threads) {
    const int64_t taps = product(bins);
    return samples * channels * taps + threads * taps * (channels + hidden) + workspace_elements(size, bins, threads);
}

static void sample_products(int64_t channels, int64_t hidden, int64_t columns, int64_t taps, const real *pooled,
                            const real *weight1, const real *bias1, const real *weight2, const real *bias2, real *output,
                            real *scratch) {
    real *by_tap = scratch, *values = scratch + taps * channels; /* values[t][d] */
    for (int64_t c = 0; c < channels; c++)
        for (int64_t t = 0; t < taps; t++) by_tap[t * channels + c] = pooled[c * taps + t];
    for (int64_t d = 0; d < hidden; d++) {
        const real *row = weight1 + d * channels;
        for (int64_t t = 0; t < taps; t++) {
            const real *column = by_tap + t * channels;
            real sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t c = 0; c < channels; c++) sum += row[c] * column[c];
            sum += bias1[d];
            values[t * hidden + d] = sum < 0 ? 0 : sum; /* and NaN stays NaN */
        }
    }
    for (int64_t first = 0; first < columns; first += WIDTH) {
        const int64_t count = columns - first < WIDTH ? columns - first : WIDTH;
        for (int64_t t = 0; t < taps; t++) {
            real sums[WIDTH] = {0};
            if (count == WIDTH)
                for (int64_t d = 0; d < hidden; d++)
#pragma omp simd
                    for (int64_t p = 0; p < WIDTH; p++) sums[p] += values[t * hidden + d] * weight2[d * columns + first + p];
            else
                for (int64_t d = 0; d < hidden; d++)
                    for (int64_t p = 0; p < count; p++) sums[p] += values[t * hidden + d] * weight2[d * columns + first + p];
            for (int64_t p = 0; p < count; p++) output[(first + p) * taps + t] = bias2[first + p] + sums[p];
        }
    }
}

void branch(int64_t samples, int64_t channels, int64_t hidden, int64_t columns, const int64_t *size, const int64_t *bins,
            int64_t threads, const real *input, const real *weight1, const real *bias1, const real *weight2,
            const real *bias2, real *output, real *workspace) {
    const int64_t taps = product(bins), each = taps * (channels + hidden);
    real *pooled = workspace, *scratch = pooled + samples * channels * taps;
    forward(samples * channels, size, bins, threads, input, pooled, scratch + threads * each);
    const int64_t used = samples < threads ? samples : threads;
#pragma omp parallel for num_threads(used) schedule(static) if (used > 1)
    for (int64_t n = 0; n < samples; n++)
        sample_products(channels, hidden, columns, taps, pooled + n * channels * taps, weight1, bias1, weight2, bias2,
                        output + n * columns * taps, scratch + thread_number() * each);
}
