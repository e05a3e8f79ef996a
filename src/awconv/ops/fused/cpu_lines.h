/* Few channels in a group: positions in the lanes. */
#pragma once

#include "cpu_layout.h"

enum { COPIED_ELEMENTS = 1 << 12 };
enum { TOGETHER = 4 }; /* channels of the result, or taps of a sum, that share what is read */

static int in_lines(int64_t channels) { return 2 * channels <= LANES; }

/* A row of some channels of the result, from weights [reduced channel][tap][channel]. Rows come in order, so that a
 * vector may run over into the next row, unless that is beyond what may be written. */
INLINE void line(const int channels, const tile_t *shape, const real *source, const real *weights, int64_t columns,
                 int64_t writable, real *result) {
    for (int64_t x = 0; x < columns; x += LANES) {
        const real *at = source + x, *weight = weights;
        vec sums[TOGETHER];
#pragma GCC unroll 4
        for (int c = 0; c < channels; c++) sums[c] = (vec){0};
        for (int64_t r = 0; r < shape->reduced; r++, at += shape->pitch)
            for (int64_t tap = 0; tap < shape->taps; tap++, weight += channels) {
                const vec seen = *(const vec *)(at + shape->offset[tap]);
#pragma GCC unroll 4
                for (int c = 0; c < channels; c++) sums[c] += seen * weight[c];
            }
        const int64_t count = least(LANES, columns - x);
#pragma GCC unroll 4
        for (int c = 0; c < channels; c++) {
            real *target = result + c * shape->plane + x * shape->position_stride;
            if (shape->position_stride == 1 && writable - x >= LANES)
                *(vec *)target = sums[c];
            else
                for (int64_t i = 0; i < count; i++) target[i * shape->position_stride] = sums[c][i];
        }
    }
}

/* Small groups are copied several at a time: a vector that is read soon after its parts were written has to wait. */
static int64_t groups_at_once(const layout_t *layout) { return most(1, least(16, COPIED_ELEMENTS / layout->group)); }

static int64_t line_scratch(const problem_t *problem, int transposed) {
    layout_t layout = layout_of(problem, transposed);
    return groups_at_once(&layout) * layout.group + LANES + TOGETHER * layout.channels * product(problem->kernel);
}

static void correlate_lines(const problem_t *problem, int transposed, const real *source, const real *weight,
                            const real *gain, real *result, real *workspace) {
    const layout_t layout = layout_of(problem, transposed);
    const int64_t taps = product(problem->kernel), groups = problem->groups, blocks = problem->blocks;
    const int64_t all = transposed ? problem->group_in : problem->group_out, share = problem->group_in / blocks;
    const int64_t phases = phases_of(problem, transposed);
    const image_t image = image_of(problem, !transposed);
    const int64_t planes = problem->batch * groups, at_once = groups_at_once(&layout);
#pragma omp parallel num_threads(problem->threads)
    {
        real *rows = workspace + thread_number() * line_scratch(problem, transposed);
        real *weights = rows + at_once * layout.group + LANES;
        memset(rows + at_once * layout.group, 0, LANES * sizeof(real)); /* a vector may run over the last row */
        axis_t axes[3];
        tile_t shape;
        for (int64_t phase = 0; phase < phases; phase++) {
            start_phase(problem, transposed, &layout, phase, axes, &shape);
#pragma omp for schedule(static) nowait
            for (int64_t start = 0; start < planes; start += at_once) {
                const int64_t stop = least(start + at_once, planes);
                for (int64_t i = start; i < stop; i++)
                    copy_rows(&layout, source + begin_of(problem, &layout.source, i), rows + (i - start) * layout.group);
                for (int64_t i = start; i < stop; i++) {
                    const real *group_weight = weight + i % groups * problem->group_out * problem->group_in * taps;
                    const real *group_gain = gain + i * problem->group_out * blocks * taps;
                    for (int64_t first = 0, channels; first < all; first += channels) {
                        real *to = result + begin_of(problem, &image, i) + first * image.channel;
                        channels = least(TOGETHER, all - first);
                        for (int64_t r = 0; r < layout.channels; r++)
                            for (int64_t k = 0; k < shape.taps; k++)
                                for (int64_t c = 0; c < channels; c++) {
                                    int64_t out = transposed ? r : first + c, in = transposed ? first + c : r;
                                    weights[(r * shape.taps + k) * channels + c] =
                                        group_weight[(out * problem->group_in + in) * taps + shape.tap[k]] *
                                        group_gain[(out * blocks + in / share) * taps + shape.tap[k]];
                                }
                        for (int64_t z = 0; z < axes[0].count; z++)
                            for (int64_t y = 0; y < axes[1].count; y++) {
                                const real *from = source_row(&layout, axes, rows + (i - start) * layout.group, z, y);
                                real *target = result_row(&image, axes, to, z, y);
                                const int64_t columns = axes[2].count;
                                const int64_t writable = phases == 1 ? to + shape.plane - target : 0;
                                switch (channels) {
                                    case 1: line(1, &shape, from, weights, columns, writable, target); break;
                                    case 2: line(2, &shape, from, weights, columns, writable, target); break;
                                    case 3: line(3, &shape, from, weights, columns, writable, target); break;
                                    default: line(4, &shape, from, weights, columns, writable, target);
                                }
                            }
                    }
                }
            }
        }
    }
}

/* Output gradients of a channel in rows of whole vectors, and what the input's rows are copied to. */
static int64_t sum_line_scratch(const problem_t *problem) {
    int64_t rows = problem->out_size[0] * problem->out_size[1];
    return layout_of(problem, 0).group + LANES + rows * padded_channels(problem->out_size[2]);
}

/* Sums over all positions, for some taps from the first on. The last vector of a row runs over into what belongs
 * to the next row or channel: there, the gradient is zero, and what is seen is taken for zero by the mask of the row's
 * end, since zero times infinity is no zero. */
INLINE void sum_line(const int taps, const layout_t *layout, const axis_t *axes, const int64_t *offset,
                     const real *grad_output, const real *input, int64_t pitch, mask row_end, real *sums) {
    vec partial[TOGETHER];
#pragma GCC unroll 4
    for (int tap = 0; tap < taps; tap++) partial[tap] = (vec){0};
    for (int64_t z = 0; z < axes[0].count; z++)
        for (int64_t y = 0; y < axes[1].count; y++) {
            const real *from = source_row(layout, axes, input, z, y);
            int64_t x = 0;
            for (; x < pitch - LANES; x += LANES, grad_output += LANES) {
                const vec grad = *(const vec *)grad_output;
#pragma GCC unroll 4
                for (int tap = 0; tap < taps; tap++) partial[tap] += grad * *(const vec *)(from + offset[tap] + x);
            }
            const vec grad = *(const vec *)grad_output;
#pragma GCC unroll 4
            for (int tap = 0; tap < taps; tap++) {
                const vec seen = *(const vec *)(from + offset[tap] + x);
                partial[tap] += grad * (vec)((mask)seen & row_end);
            }
            grad_output += LANES;
        }
#pragma GCC unroll 4
    for (int tap = 0; tap < taps; tap++) {
        sums[tap] = 0;
        for (int lane = 0; lane < LANES; lane++) sums[tap] += partial[tap][lane];
    }
}

static void sum_lines(const problem_t *problem, const real *grad_output, const real *input, const real *weight,
                      const real *gain, real *grad_weight, real *grad_gain, real *workspace) {
    const layout_t layout = layout_of(problem, 0);
    const int64_t taps = product(problem->kernel), groups = problem->groups, blocks = problem->blocks;
    const int64_t in = problem->group_in, out = problem->group_out, share = in / blocks;
    const int64_t width = problem->out_size[2], pitch = padded_channels(width);
    const int64_t rows = problem->out_size[0] * problem->out_size[1];
    const image_t image = image_of(problem, 1);
#pragma omp parallel num_threads(problem->threads)
    {
        real *inputs = workspace + thread_number() * sum_line_scratch(problem), *grads = inputs + layout.group + LANES;
        memset(grads, 0, rows * pitch * sizeof(real));
        memset(inputs + layout.group, 0, LANES * sizeof(real));
        axis_t axes[3];
        tile_t shape;
        start_phase(problem, 0, &layout, 0, axes, &shape);
        mask row_end;
        for (int lane = 0; lane < LANES; lane++) row_end[lane] = pitch - LANES + lane < width ? -1 : 0;
#pragma omp for schedule(static)
        for (int64_t group = 0; group < groups; group++) {
            memset(grad_weight + group * out * in * taps, 0, out * in * taps * sizeof(real));
            for (int64_t n = 0; n < problem->batch; n++) {
                const int64_t index = n * groups + group;
                memset(grad_gain + index * out * blocks * taps, 0, out * blocks * taps * sizeof(real));
                copy_rows(&layout, input + begin_of(problem, &layout.source, index), inputs);
                for (int64_t p = 0; p < out; p++) {
                    const real *grad = grad_output + begin_of(problem, &image, index) + p * image.channel;
                    for (int64_t row = 0; row < rows; row++, grad += width * image.position)
                        if (image.position == 1)
                            memcpy(grads + row * pitch, grad, width * sizeof(real));
                        else
                            for (int64_t x = 0; x < width; x++) grads[row * pitch + x] = grad[x * image.position];
                    for (int64_t c = 0; c < in; c++)
                        for (int64_t tap = 0, together; tap < taps; tap += together) {
                            const real *from = inputs + c * layout.pitch;
                            const int64_t *offset = shape.offset + tap;
                            real sums[TOGETHER];
                            together = least(TOGETHER, taps - tap);
                            switch (together) {
                                case 1: sum_line(1, &layout, axes, offset, grads, from, pitch, row_end, sums); break;
                                case 2: sum_line(2, &layout, axes, offset, grads, from, pitch, row_end, sums); break;
                                case 3: sum_line(3, &layout, axes, offset, grads, from, pitch, row_end, sums); break;
                                default: sum_line(4, &layout, axes, offset, grads, from, pitch, row_end, sums);
                            }
                            for (int64_t k = 0; k < together; k++) {
                                const int64_t at = ((group * out + p) * in + c) * taps + tap + k;
                                const int64_t scale = ((index * out + p) * blocks + c / share) * taps + tap + k;
                                grad_gain[scale] += weight[at] * sums[k];
                                grad_weight[at] += gain[scale] * sums[k];
                            }
                        }
                }
            }
        }
    }
}
