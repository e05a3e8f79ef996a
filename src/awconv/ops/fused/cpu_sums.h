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

static void transpose_rows(const layout_t *layout, const real *from, real *to) {
    int64_t plane = product(layout->size), channels = layout->channels;
    int64_t width = least(layout->size[2], layout->pitch - layout->before[2]);
    const real *end = from + channels * plane;
    int same = 1; /* padding before can take the place of as many positions at the end that no tap sees */
    for (int axis = 0; axis < 3; axis++) same &= layout->before[axis] == 0 && layout->padded[axis] == layout->size[axis];
    if (same) {
        transpose(from, plane, channels, plane, end, to, channels);
        return;
    }
    memset(to, 0, layout->group * sizeof(real));
    for (int64_t z = 0; z < layout->size[0]; z++)
        for (int64_t y = 0; y < layout->size[1]; y++) {
            int64_t target_z = z + layout->before[0], target_y = y + layout->before[1];
            if (target_z >= layout->padded[0] || target_y >= layout->padded[1]) continue;
            transpose(from + (z * layout->size[1] + y) * layout->size[2], plane, channels, width, end,
                      to + target_z * layout->plane + target_y * layout->row + layout->before[2] * channels, channels);
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

static void sum(const problem_t *problem, const real *grad_output, const real *input, const real *weight, const real *gain,
                real *grad_weight, real *grad_gain, real *workspace) {
    const layout_t layout = sum_layout(problem);
    const sum_sizes_t sizes = sum_sizes(problem);
    const int64_t taps = product(problem->kernel), groups = problem->groups, in = problem->group_in;
    const int64_t out = problem->group_out, panels = ceil_div(out, PANEL), padded = padded_channels(out);
    const int64_t per_lane = problem->blocks * taps, share = in / problem->blocks;
    const int64_t at_once = samples_at_once(problem, sizes.sample, sizes.needed), positions = sizes.positions;
    const int64_t group_weights = padded * in * taps, rows = problem->out_size[0] * problem->out_size[1];
    int64_t *row = (int64_t *)workspace;
    real *packed = workspace + sizes.rows, *grad_packed = packed + sizes.weights;
    real *inputs = grad_packed + sizes.weights, *grads = inputs + at_once * groups * layout.group;
    real *gains = grads + at_once * groups * padded * positions, *grad_gains = gains + at_once * groups * padded * per_lane;
    for (int64_t i = 0; i < rows; i++)
        row[i] = i / problem->out_size[1] * problem->stride[0] * layout.plane +
                 i % problem->out_size[1] * problem->stride[1] * layout.row;
#pragma omp parallel num_threads(problem->threads)
    {
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < groups * panels; i++) {
            const int64_t offset = i / panels * group_weights + i % panels * PANEL * in * taps;
            pack_panel(problem, 0, weight + i / panels * out * in * taps, i % panels, packed + offset);
            memset(grad_packed + offset, 0, vectors_of(out, i % panels) * LANES * in * taps * sizeof(real));
        }
        for (int64_t start = 0; start < problem->batch; start += at_once) {
            const int64_t samples = least(at_once, problem->batch - start);
#pragma omp for schedule(static) nowait
            for (int64_t i = 0; i < samples * groups; i++)
                transpose_rows(&layout, input + (start * groups + i) * in * product(layout.size), inputs + i * layout.group);
#pragma omp for schedule(static)
            for (int64_t i = 0; i < samples * groups * panels; i++) { /* [sample][group][panel][position or tap][lane] */
                const int64_t group = start * groups + i / panels, first = i % panels * PANEL;
                const int64_t lanes = vectors_of(out, i % panels) * LANES, channels = least(lanes, out - first);
                real *to = grads + (i / panels * padded + first) * positions;
                real *scales = gains + (i / panels * padded + first) * per_lane;
                if (channels < lanes) memset(to, 0, lanes * positions * sizeof(real));
                if (channels < lanes) memset(scales, 0, lanes * per_lane * sizeof(real));
                memset(grad_gains + (i / panels * padded + first) * per_lane, 0, lanes * per_lane * sizeof(real));
                transpose(grad_output + (group * out + first) * positions, positions, channels, positions,
                          grad_output + (group + 1) * out * positions, to, lanes);
                transpose(gain + (group * out + first) * per_lane, per_lane, channels, per_lane,
                          gain + (group + 1) * out * per_lane, scales, lanes);
            }
#pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < groups * panels * taps; i++) {
                const int64_t tap = i % taps, panel = i / taps % panels, group = i / taps / panels;
                const int64_t lanes = vectors_of(out, panel) * LANES, first = panel * PANEL;
                const int64_t k = tap % problem->kernel[2], j = tap / problem->kernel[2] % problem->kernel[1];
                const int64_t seen = tap / problem->kernel[2] / problem->kernel[1] * problem->dilation[0] * layout.plane +
                                     j * problem->dilation[1] * layout.row + k * problem->dilation[2] * in;
                sum_t shape = {rows, problem->out_size[2], row, problem->stride[2] * in, taps * lanes};
                for (int64_t channel = 0, width; channel < in; channel += width) {
                    const int64_t input_block = channel / share; /* a tile has one gain */
                    width = next_width((input_block + 1) * share - channel);
                    const int64_t weights = group * group_weights + first * in * taps + (channel * taps + tap) * lanes;
                    for (int64_t n = 0; n < samples; n++) {
                        const int64_t index = n * groups + group;
                        const int64_t at = (index * padded + first) * per_lane + (input_block * taps + tap) * lanes;
                        SUMS[lanes / LANES - 1][width - 1](&shape, grads + (index * padded + first) * positions,
                                                           inputs + index * layout.group + seen + channel, gains + at,
                                                           packed + weights, grad_packed + weights, grad_gains + at);
                    }
                }
            }
#pragma omp for schedule(static)
            for (int64_t i = 0; i < samples * groups * panels; i++) {
                const int64_t group = start * groups + i / panels, first = i % panels * PANEL;
                const int64_t lanes = vectors_of(out, i % panels) * LANES, channels = least(lanes, out - first);
                const real *from = grad_gains + (i / panels * padded + first) * per_lane;
                transpose(from, lanes, per_lane, channels, from + lanes * per_lane,
                          grad_gain + (group * out + first) * per_lane, per_lane);
            }
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < groups * panels; i++) {
            const int64_t first = i % panels * PANEL, lanes = vectors_of(out, i % panels) * LANES;
            const real *from = grad_packed + i / panels * group_weights + first * in * taps;
            transpose(from, lanes, in * taps, least(lanes, out - first), from + lanes * in * taps,
                      grad_weight + (i / panels * out + first) * in * taps, in * taps);
        }
    }
}
