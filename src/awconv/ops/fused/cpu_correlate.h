/* The convolution and its transpose, with output channels in the lanes. */
#pragma once

#include "cpu_layout.h"

/* scaled[reduced channel][tap][lane] = packed weights times the gain of a sample. */
static void scale_panel(const problem_t *problem, int transposed, const real *packed, const real *gain, const tile_t *shape,
                        int64_t panel, real *gains, real *scaled) {
    int64_t taps = product(problem->kernel), blocks = problem->blocks, share = problem->group_in / blocks;
    int64_t all = transposed ? problem->group_in : problem->group_out, first = panel * PANEL;
    int64_t lanes = vectors_of(all, panel) * LANES, channels = least(lanes, all - first);
    if (!transposed) { /* gains[block of input channels][tap][lane] */
        memset(gains, 0, blocks * taps * lanes * sizeof(real));
        for (int64_t lane = 0; lane < channels; lane++)
            for (int64_t i = 0; i < blocks * taps; i++) gains[i * lanes + lane] = gain[(first + lane) * blocks * taps + i];
    }
    for (int64_t r = 0; r < shape->reduced; r++)
        for (int64_t k = 0; k < shape->taps; k++, scaled += lanes) {
            const real *from = packed + (r * taps + shape->tap[k]) * lanes;
            if (!transposed) {
                const real *scale = gains + (r / share * taps + shape->tap[k]) * lanes;
                for (int64_t lane = 0; lane < lanes; lane += LANES)
                    *(vec *)(scaled + lane) = *(const vec *)(from + lane) * *(const vec *)(scale + lane);
            } else if (blocks == 1) {
                real scale = gain[r * taps + shape->tap[k]];
                for (int64_t lane = 0; lane < lanes; lane += LANES)
                    *(vec *)(scaled + lane) = *(const vec *)(from + lane) * scale;
            } else
                for (int64_t lane = 0; lane < lanes; lane++) {
                    int64_t input_block = least(first + lane, all - 1) / share;
                    scaled[lane] = from[lane] * gain[(r * blocks + input_block) * taps + shape->tap[k]];
                }
        }
}

/* Some rows of one panel of channels of one sample. */
static void correlate_panel(const problem_t *problem, int transposed, const layout_t *layout, const real *source,
                            const real *packed, const real *gain, int64_t panel, int64_t segment, int64_t segments,
                            real *scratch, real *result) {
    int64_t all = transposed ? problem->group_in : problem->group_out, first = panel * PANEL;
    int64_t vectors = vectors_of(all, panel), taps = product(problem->kernel);
    real *scaled = scratch + problem->blocks * taps * PANEL;
    axis_t axes[3];
    tile_t shape;
    const image_t image = image_of(problem, !transposed);
    result += first * image.channel;
    for (int64_t phase = 0; phase < phases_of(problem, transposed); phase++) {
        start_phase(problem, transposed, layout, phase, axes, &shape);
        scale_panel(problem, transposed, packed, gain, &shape, panel, scratch, scaled);
        int64_t rows = axes[0].count * axes[1].count;
        for (int64_t row = rows * segment / segments; row < rows * (segment + 1) / segments; row++) {
            const real *from = source_row(layout, axes, source, row / axes[1].count, row % axes[1].count);
            real *to = result_row(&image, axes, result, row / axes[1].count, row % axes[1].count);
            for (int64_t x = 0, width; x < axes[2].count; x += width) {
                width = next_width(axes[2].count - x);
                TILES[vectors - 1][width - 1](&shape, from + x, scaled, to + x * shape.position_stride, all - first);
            }
        }
    }
}

/* Of a thread: a panel of weights, its gains, and their product for a sample. */
static int64_t scratch_elements(const problem_t *problem, int transposed) {
    int64_t reduced = transposed ? problem->group_out : problem->group_in;
    return (2 * reduced + problem->blocks) * product(problem->kernel) * PANEL;
}

static int64_t rows_at_once(const problem_t *problem, const layout_t *layout) {
    return samples_at_once(problem, problem->groups * layout->group / 4, problem->threads);
}

static int64_t correlate_workspace(const problem_t *problem, int transposed) {
    layout_t layout = layout_of(problem, transposed);
    return rows_at_once(problem, &layout) * problem->groups * layout.group +
           problem->threads * scratch_elements(problem, transposed);
}

static void correlate(const problem_t *problem, int transposed, const real *source, const real *weight, const real *gain,
                      real *result, real *workspace) {
    const layout_t layout = layout_of(problem, transposed);
    const int64_t taps = product(problem->kernel), groups = problem->groups, at_once = rows_at_once(problem, &layout);
    const int64_t all = transposed ? problem->group_in : problem->group_out, panels = ceil_div(all, PANEL);
    const image_t image = image_of(problem, !transposed);
    const int64_t gain_group = problem->group_out * problem->blocks * taps;
    const int64_t group_weights = problem->group_out * problem->group_in * taps;
    real *rows = workspace, *scratches = rows + at_once * groups * layout.group;
#pragma omp parallel num_threads(problem->threads)
    {
        real *packed = scratches + thread_number() * scratch_elements(problem, transposed);
        real *scratch = packed + layout.channels * taps * PANEL;
        int64_t held = -1; /* the panel that is packed: the tasks of a thread stay with one for as long as they can */
        for (int64_t start = 0; start < problem->batch; start += at_once) {
            const int64_t samples = least(at_once, problem->batch - start);
#pragma omp for schedule(static)
            for (int64_t i = 0; i < samples * groups; i++)
                copy_rows(&layout, source + begin_of(problem, &layout.source, start * groups + i), rows + i * layout.group);
            const int64_t tasks = groups * panels * samples;
            const int64_t segments = ceil_div(2 * problem->threads - 1, tasks);
#pragma omp for schedule(static)
            for (int64_t i = 0; i < tasks * segments; i++) {
                const int64_t n = i / segments % samples, panel = i / segments / samples % panels;
                const int64_t group = i / segments / samples / panels, index = (start + n) * groups + group;
                if (held != group * panels + panel) {
                    held = group * panels + panel;
                    pack_panel(problem, transposed, weight + group * group_weights, panel, packed);
                }
                correlate_panel(problem, transposed, &layout, rows + (n * groups + group) * layout.group, packed,
                                gain + index * gain_group, panel, i % segments, segments, scratch,
                                result + begin_of(problem, &image, index));
            }
        }
    }
}
