/* The gradients of weight and gain, with output channels in the lanes. */
#pragma once

#include "cpu_layout.h"

static layout_t sum_layout(const problem_t *problem) {
    layout_t layout = layout_of(problem, 0); /* [plane][row][x][channel] */
    layout.phases = 1, layout.pitch = layout.padded[2];
    layout.row = layout.pitch * layout.channels;
    layout.plane = layout.padded[1] * layout.row;
    layout.group = layout.padded[0] * layout.plane;
    return layout;
}

/* Some channels of positions that have them last, side by side. */
static void copy_positions(const real *from, int64_t next, int64_t positions, int64_t channels, real *to) {
    if (next == channels)
        memcpy(to, from, positions * channels * sizeof(real));
    else
        for (int64_t i = 0; i < positions; i++) memcpy(to + i * channels, from + i * next, channels * sizeof(real));
}

static void transpose_rows(const layout_t *layout, const real *from, real *to) {
    const int64_t plane = product(layout->size), channels = layout->channels, next = layout->source.position;
    const int64_t width = most(0, least(layout->size[2], layout->pitch - layout->before[2]));
    const real *end = from + channels * plane; /* of a group whose channels come first */
    int same = 1; /* padding before can take the place of as many positions at the end that no tap sees */
    for (int axis = 0; axis < 3; axis++) same &= layout->before[axis] == 0 && layout->padded[axis] == layout->size[axis];
    if (same && is_last(&layout->source)) {
        copy_positions(from, next, plane, channels, to);
        return;
    }
    if (same) {
        transpose(from, plane, channels, plane, end, to, channels);
        return;
    }
    memset(to, 0, layout->group * sizeof(real));
    for (int64_t z = 0; z < layout->size[0]; z++)
        for (int64_t y = 0; y < layout->size[1]; y++) {
            int64_t target_z = z + layout->before[0], target_y = y + layout->before[1];
            if (target_z >= layout->padded[0] || target_y >= layout->padded[1]) continue;
            const real *row = from + (z * layout->size[1] + y) * layout->size[2] * next;
            real *target = to + target_z * layout->plane + target_y * layout->row + layout->before[2] * channels;
            if (is_last(&layout->source))
                copy_positions(row, next, width, channels, target);
            else
                transpose(row, plane, channels, width, end, target, channels);
        }
}

enum { ENOUGH_POSITIONS = 400 };

typedef struct {
    int64_t sample, positions, weights, rows; /* elements: of a sample's copies, output positions, weights, row offsets */
    int64_t needed;                           /* samples, so that what is done once for them is paid off */
} sum_sizes_t;

static sum_sizes_t sum_sizes(const problem_t *problem) {
    layout_t layout = sum_layout(problem);
    sum_sizes_t sizes;
    sizes.positions = product(problem->out_size);
    sizes.sample = problem->groups * (layout.group + padded_channels(problem->group_out) * sizes.positions);
    sizes.weights = problem->groups * padded_channels(problem->group_out) * problem->group_in * product(problem->kernel);
    sizes.needed = ceil_div(ENOUGH_POSITIONS, sizes.positions);
    sizes.rows = problem->out_size[0] * problem->out_size[1] * (sizeof(int64_t) / sizeof(real));
    return sizes;
}

static int64_t sum_workspace(const problem_t *problem) {
    sum_sizes_t sizes = sum_sizes(problem);
    int64_t gains = problem->groups * padded_channels(problem->group_out) * problem->blocks * product(problem->kernel);
    int64_t samples = samples_at_once(problem, sizes.sample, sizes.needed);
    return 2 * sizes.weights + sizes.rows + samples * (sizes.sample + 2 * gains);
}

/* What the gradients are summed from and in, all of it in the workspace: what is packed as
 * [group][panel][channel][tap][lane], what is held of samples as [sample][group][panel][position or tap][lane]. */
typedef struct {
    layout_t layout; /* of inputs */
    int64_t at_once, taps, panels, padded, per_lane, positions, group_weights, rows;
    int64_t *row; /* where a row of positions begins in a group's input */
    real *packed, *grad_packed, *inputs, *grads, *gains, *grad_gains;
} sums_t;

static sums_t sums_in(const problem_t *problem, real *workspace) {
    const sum_sizes_t sizes = sum_sizes(problem);
    sums_t sums;
    sums.layout = sum_layout(problem), sums.taps = product(problem->kernel), sums.positions = sizes.positions;
    sums.at_once = samples_at_once(problem, sizes.sample, sizes.needed);
    sums.panels = ceil_div(problem->group_out, PANEL), sums.padded = padded_channels(problem->group_out);
    sums.per_lane = problem->blocks * sums.taps, sums.group_weights = sums.padded * problem->group_in * sums.taps;
    sums.rows = problem->out_size[0] * problem->out_size[1];
    const int64_t groups = sums.at_once * problem->groups;
    sums.row = (int64_t *)workspace;
    sums.packed = workspace + sizes.rows, sums.grad_packed = sums.packed + sizes.weights;
    sums.inputs = sums.grad_packed + sizes.weights, sums.grads = sums.inputs + groups * sums.layout.group;
    sums.gains = sums.grads + groups * sums.padded * sums.positions;
    sums.grad_gains = sums.gains + groups * sums.padded * sums.per_lane;
    for (int64_t i = 0; i < sums.rows; i++)
        sums.row[i] = i / problem->out_size[1] * problem->stride[0] * sums.layout.plane +
                      i % problem->out_size[1] * problem->stride[1] * sums.layout.row;
    return sums;
}

/* A panel's share of the output's gradient and of the gains of a sample; its gradient of the gains is set to zero. */
static void copy_panel(const problem_t *problem, const sums_t *sums, int64_t index, int64_t held, int64_t panel,
                       const real *grad_output, const real *gain) {
    const int64_t out = problem->group_out, first = panel * PANEL, lanes = vectors_of(out, panel) * LANES;
    const int64_t channels = least(lanes, out - first), positions = sums->positions, per_lane = sums->per_lane;
    real *to = sums->grads + (held * sums->padded + first) * positions;
    real *scales = sums->gains + (held * sums->padded + first) * per_lane;
    if (channels < lanes) memset(to, 0, lanes * positions * sizeof(real));
    if (channels < lanes) memset(scales, 0, lanes * per_lane * sizeof(real));
    memset(sums->grad_gains + (held * sums->padded + first) * per_lane, 0, lanes * per_lane * sizeof(real));
    const image_t image = image_of(problem, 1);
    const real *from = grad_output + begin_of(problem, &image, index) + first * image.channel;
    if (is_last(&image))
        for (int64_t i = 0; i < positions; i++) memcpy(to + i * lanes, from + i * image.position, channels * sizeof(real));
    else
        transpose(from, positions, channels, positions, grad_output + (index + 1) * out * positions, to, lanes);
    transpose(gain + (index * out + first) * per_lane, per_lane, channels, per_lane, gain + (index + 1) * out * per_lane,
              scales, lanes);
}

/* Adds what the samples at hand give to one tap of one panel of a group. */
static void sum_panel(const problem_t *problem, const sums_t *sums, int64_t samples, int64_t group, int64_t panel,
                      int64_t tap) {
    const int64_t groups = problem->groups, in = problem->group_in, share = in / problem->blocks, taps = sums->taps;
    const int64_t lanes = vectors_of(problem->group_out, panel) * LANES, first = panel * PANEL;
    const int64_t k = tap % problem->kernel[2], j = tap / problem->kernel[2] % problem->kernel[1];
    const int64_t seen = tap / problem->kernel[2] / problem->kernel[1] * problem->dilation[0] * sums->layout.plane +
                         j * problem->dilation[1] * sums->layout.row + k * problem->dilation[2] * in;
    const sum_t shape = {sums->rows, problem->out_size[2], sums->row, problem->stride[2] * in, taps * lanes};
    for (int64_t channel = 0, width; channel < in; channel += width) {
        const int64_t block = channel / share; /* a tile has one gain */
        width = next_width((block + 1) * share - channel);
        const int64_t weights = group * sums->group_weights + first * in * taps + (channel * taps + tap) * lanes;
        for (int64_t n = 0; n < samples; n++) {
            const int64_t held = n * groups + group, of_panel = held * sums->padded + first;
            const int64_t at = of_panel * sums->per_lane + (block * taps + tap) * lanes;
            SUMS[lanes / LANES - 1][width - 1](&shape, sums->grads + of_panel * sums->positions,
                                               sums->inputs + held * sums->layout.group + seen + channel,
                                               sums->gains + at, sums->packed + weights, sums->grad_packed + weights,
                                               sums->grad_gains + at);
        }
    }
}

static void sum(const problem_t *problem, const real *grad_output, const real *input, const real *weight, const real *gain,
                real *grad_weight, real *grad_gain, real *workspace) {
    const sums_t sums = sums_in(problem, workspace);
    const int64_t groups = problem->groups, in = problem->group_in, out = problem->group_out, taps = sums.taps;
    const int64_t panels = sums.panels, per_lane = sums.per_lane;
#pragma omp parallel num_threads(problem->threads)
    {
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < groups * panels; i++) {
            const int64_t offset = i / panels * sums.group_weights + i % panels * PANEL * in * taps;
            pack_panel(problem, 0, weight + i / panels * out * in * taps, i % panels, sums.packed + offset);
            memset(sums.grad_packed + offset, 0, vectors_of(out, i % panels) * LANES * in * taps * sizeof(real));
        }
        for (int64_t start = 0; start < problem->batch; start += sums.at_once) {
            const int64_t samples = least(sums.at_once, problem->batch - start), index = start * groups;
#pragma omp for schedule(static) nowait
            for (int64_t i = 0; i < samples * groups; i++)
                transpose_rows(&sums.layout, input + begin_of(problem, &sums.layout.source, index + i),
                               sums.inputs + i * sums.layout.group);
#pragma omp for schedule(static)
            for (int64_t i = 0; i < samples * groups * panels; i++)
                copy_panel(problem, &sums, index + i / panels, i / panels, i % panels, grad_output, gain);
#pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < groups * panels * taps; i++)
                sum_panel(problem, &sums, samples, i / taps / panels, i / taps % panels, i % taps);
#pragma omp for schedule(static)
            for (int64_t i = 0; i < samples * groups * panels; i++) {
                const int64_t first = i % panels * PANEL, lanes = vectors_of(out, i % panels) * LANES;
                const real *from = sums.grad_gains + (i / panels * sums.padded + first) * per_lane;
                transpose(from, lanes, per_lane, least(lanes, out - first), from + lanes * per_lane,
                          grad_gain + ((index + i / panels) * out + first) * per_lane, per_lane);
            }
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < groups * panels; i++) {
            const int64_t first = i % panels * PANEL, lanes = vectors_of(out, i % panels) * LANES;
            const real *from = sums.grad_packed + i / panels * sums.group_weights + first * in * taps;
            transpose(from, lanes, in * taps, least(lanes, out - first), from + lanes * in * taps,
                      grad_weight + (i / panels * out + first) * in * taps, in * taps);
        }
    }
}
