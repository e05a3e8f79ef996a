/* What a convolution reads: rows with explicit padding, and where each tap and each phase of the stride finds its own. */
#pragma once

#include "cpu_tiles.h"

/* The input or the output: its size, and elements from a channel to the next, from a position, a group, a sample. */
typedef struct {
    const int64_t *size;
    int64_t channel, position, group, sample;
} image_t;

static image_t image_of(const problem_t *problem, int is_output) {
    const int64_t channels = is_output ? problem->group_out : problem->group_in, last = problem->last[is_output];
    const int64_t *size = is_output ? problem->out_size : problem->size, plane = product(size);
    if (last) return (image_t){size, 1, last, channels, last * plane};
    return (image_t){size, plane, 1, channels * plane, problem->groups * channels * plane};
}

/* Whether channels lie side by side: they do in planes of one position, too. */
static int is_last(const image_t *image) { return image->channel == 1; }

/* Where group number i begins, counted over all samples. */
static int64_t begin_of(const problem_t *problem, const image_t *image, int64_t i) {
    return i / problem->groups * image->sample + i % problem->groups * image->group;
}

typedef struct {
    image_t source;
    int64_t channels;               /* of a group */
    int64_t size[3];                /* of the source */
    int64_t before[3], padded[3];   /* zeros before, size with zeros on both sides */
    int64_t phases, pitch;          /* positions x, x + phases, x + 2 phases, ... lie side by side, pitch of them */
    int64_t row, plane, group;      /* elements from a row to the next, from a plane, of a whole group */
} layout_t;

/* A position as an offset in the layout [plane][row][phase][channel][x]. */
static int64_t place(const layout_t *layout, int64_t z, int64_t y, int64_t x) {
    int64_t phase = x % layout->phases;
    return z * layout->plane + y * layout->row + phase * layout->channels * layout->pitch + x / layout->phases;
}

static void copy_rows(const layout_t *layout, const real *from, real *to) {
    const int64_t width = layout->size[2], channels = layout->channels;
    const int64_t position = layout->source.position, next = layout->phases * position;
    const real *end = from + (product(layout->size) - 1) * position + channels;
    const int64_t phases = layout->phases, pitch = layout->pitch;
    for (int64_t phase = 0; phase < phases; phase++, to += channels * pitch) {
        /* the first and the last position of this phase that are not padding */
        const int64_t start = least(pitch, most(0, ceil_div(layout->before[2] - phase, phases)));
        const int64_t stop = least(pitch, most(0, ceil_div(layout->before[2] + width - phase, phases)));
        const real *first = from + (start * phases + phase - layout->before[2]) * position;
        for (int64_t z = 0; z < layout->padded[0]; z++)
            for (int64_t y = 0; y < layout->padded[1]; y++) {
                int64_t source_z = z - layout->before[0], source_y = y - layout->before[1];
                real *target = to + z * layout->plane + y * layout->row;
                if (source_z < 0 || source_z >= layout->size[0] || source_y < 0 || source_y >= layout->size[1]) {
                    memset(target, 0, channels * pitch * sizeof(real));
                    continue;
                }
                const real *line = first + (source_z * layout->size[1] + source_y) * width * position;
                for (int64_t channel = 0; channel < channels; channel++) {
                    for (int64_t x = 0; x < start; x++) target[channel * pitch + x] = 0;
                    for (int64_t x = stop; x < pitch; x++) target[channel * pitch + x] = 0;
                }
                if (is_last(&layout->source)) {
                    transpose(line, next, stop - start, channels, end, target + start, pitch);
                    continue;
                }
                for (int64_t channel = 0; channel < channels; channel++, line += layout->source.channel, target += pitch)
                    if (phases == 1)
                        for (int64_t x = start; x < stop; x++) target[x] = line[x - start];
                    else
                        for (int64_t x = start; x < stop; x++) target[x] = line[(x - start) * phases];
            }
    }
}

/* One axis of a convolution, or of one phase of a transposed one: positions of the result and what they read. */
typedef struct {
    int64_t count, result_start, result_stride; /* positions of the result */
    int64_t source_start, source_stride;        /* what the first one reads by a tap of delta 0, and the distance */
    int64_t taps, tap[MAX_TAPS], delta[MAX_TAPS];
} axis_t;

static void forward_axis(const problem_t *problem, int axis, axis_t *result) {
    result->count = problem->out_size[axis], result->result_start = 0, result->result_stride = 1;
    result->source_start = 0, result->source_stride = problem->stride[axis], result->taps = problem->kernel[axis];
    for (int64_t tap = 0; tap < result->taps; tap++)
        result->tap[tap] = tap, result->delta[tap] = tap * problem->dilation[axis];
}

static int64_t kernel_extent(const problem_t *problem, int axis) {
    return (problem->kernel[axis] - 1) * problem->dilation[axis] + 1;
}

/* Zeros before the output gradient, so that no position of the transposed convolution reads before them. */
static int64_t zeros_before(const problem_t *problem, int axis) {
    int64_t zeros = ceil_div(kernel_extent(problem, axis) - 1 - problem->padding[axis], problem->stride[axis]);
    return zeros > 0 ? zeros : 0;
}

/* Positions of the input that are phase modulo the stride, counted from the first zero of the padding. */
static void transposed_axis(const problem_t *problem, int axis, int64_t phase, axis_t *result) {
    int64_t stride = problem->stride[axis], padding = problem->padding[axis];
    int64_t first = ceil_div(padding - phase, stride), last = floor_div(padding + problem->size[axis] - 1 - phase, stride);
    result->count = last - first + 1, result->result_start = stride * first + phase - padding;
    result->result_stride = stride, result->source_start = first + zeros_before(problem, axis), result->source_stride = 1;
    result->taps = 0;
    for (int64_t tap = 0; tap < problem->kernel[axis]; tap++) {
        int64_t distance = phase - tap * problem->dilation[axis];
        if (distance % stride == 0) {
            result->tap[result->taps] = tap;
            result->delta[result->taps++] = distance / stride;
        }
    }
}

static layout_t layout_of(const problem_t *problem, int transposed) {
    layout_t layout;
    for (int axis = 0; axis < 3; axis++) {
        int64_t stride = problem->stride[axis];
        if (transposed) {
            layout.size[axis] = problem->out_size[axis];
            layout.before[axis] = zeros_before(problem, axis);
            int64_t furthest = floor_div(problem->padding[axis] + problem->size[axis] - 1, stride);
            layout.padded[axis] = layout.before[axis] + furthest + 1;
        } else {
            layout.size[axis] = problem->size[axis];
            layout.before[axis] = problem->padding[axis];
            layout.padded[axis] = (problem->out_size[axis] - 1) * stride + kernel_extent(problem, axis);
        }
    }
    layout.source = image_of(problem, transposed);
    layout.channels = transposed ? problem->group_out : problem->group_in;
    layout.phases = transposed ? 1 : least(problem->stride[2], layout.padded[2]);
    layout.pitch = ceil_div(layout.padded[2], layout.phases);
    layout.row = layout.phases * layout.channels * layout.pitch;
    layout.plane = layout.padded[1] * layout.row;
    layout.group = layout.padded[0] * layout.plane;
    return layout;
}

/* Phases of the stride along an axis that a position of the input has; the first positions have one each. */
static int64_t phases_along(const problem_t *problem, int axis) {
    return least(problem->stride[axis], problem->size[axis]);
}

/* A transposed convolution is one convolution for each phase of the stride. */
static int64_t phases_of(const problem_t *problem, int transposed) {
    return transposed ? phases_along(problem, 0) * phases_along(problem, 1) * phases_along(problem, 2) : 1;
}

/* The axes and the taps of a phase. */
static void start_phase(const problem_t *problem, int transposed, const layout_t *layout, int64_t phase, axis_t *axes,
                        tile_t *shape) {
    for (int axis = 0; axis < 3; axis++)
        if (transposed) {
            const int64_t position = phase % phases_along(problem, axis);
            phase /= phases_along(problem, axis);
            transposed_axis(problem, axis, (position + problem->padding[axis]) % problem->stride[axis], &axes[axis]);
        } else
            forward_axis(problem, axis, &axes[axis]);
    const image_t result = image_of(problem, !transposed);
    shape->reduced = layout->channels, shape->pitch = layout->pitch;
    shape->plane = result.channel, shape->position_stride = axes[2].result_stride * result.position;
    shape->taps = 0;
    for (int64_t i = 0; i < axes[0].taps; i++)
        for (int64_t j = 0; j < axes[1].taps; j++)
            for (int64_t k = 0; k < axes[2].taps; k++) {
                shape->tap[shape->taps] =
                    (axes[0].tap[i] * problem->kernel[1] + axes[1].tap[j]) * problem->kernel[2] + axes[2].tap[k];
                shape->offset[shape->taps++] =
                    place(layout, axes[0].source_start + axes[0].delta[i], axes[1].source_start + axes[1].delta[j],
                          axes[2].source_start + axes[2].delta[k]);
            }
}

/* Where a row of a phase's positions is read from and written to. */
static const real *source_row(const layout_t *layout, const axis_t *axes, const real *source, int64_t z, int64_t y) {
    return source + z * axes[0].source_stride * layout->plane + y * axes[1].source_stride * layout->row;
}
static real *result_row(const image_t *image, const axis_t *axes, real *result, int64_t z, int64_t y) {
    z = axes[0].result_start + z * axes[0].result_stride, y = axes[1].result_start + y * axes[1].result_stride;
    return result + ((z * image->size[1] + y) * image->size[2] + axes[2].result_start) * image->position;
}

/* What the copies of the samples at hand may hold, so that they stay in the cache (1 MiB in single precision). */
enum { CACHED_ELEMENTS = 1 << 18 };

/* Samples whose copies are held at once: few enough to stay in the cache, but as many as are needed at least. */
static int64_t samples_at_once(const problem_t *problem, int64_t elements, int64_t needed) {
    return least(problem->batch, most(needed, CACHED_ELEMENTS / most(1, elements)));
}
