/* Depthwise convolutions along one or two axes: channels in the lanes.
 *
 * LANES channels are transposed, LANES positions at a time, into a ring of rows, which holds as many as a row of the result
 * reads, and those that are ahead of it in the same vectors. The sums are staged, and transposed back.
 */
#pragma once

#include "cpu_lines.h"

enum { BLOCK = 8 }; /* positions whose sums are kept in registers */

typedef struct {
    const problem_t *problem;
    layout_t layout;
    image_t image; /* of the result */
    axis_t axes[3];
    tile_t shape;
    int64_t first, last, ring; /* rows that row 0 of the result reads, with padding; rows in the ring */
    int64_t rows, columns;     /* of the source, without those that nothing reads */
    int64_t chunks, bands;     /* of channels, and of rows: a task is one of each for a sample */
    const real *source, *weight, *gain, *end; /* the end of the source, beyond which nothing may be read */
    real *result;
} lanes_t;

/* The rows that are there, and what comes next. */
typedef struct {
    const real *source;
    real *ring;
    int64_t row, x; /* of what comes next, with padding; without */
} cursor_t;

static lanes_t lanes_of(const problem_t *problem, int transposed) {
    lanes_t plan = {.problem = problem, .layout = layout_of(problem, transposed), .image = image_of(problem, !transposed)};
    layout_t *layout = &plan.layout;
    layout->phases = 1, layout->pitch = layout->padded[2];
    start_phase(problem, transposed, layout, 0, plan.axes, &plan.shape);
    const axis_t *axis = &plan.axes[1];
    const int64_t begin = axis->source_start + axis->delta[0], end = axis->source_start + axis->delta[axis->taps - 1];
    plan.first = least(begin, end), plan.last = most(begin, end);
    plan.rows = least(layout->size[1], layout->padded[1] - layout->before[1]);
    plan.columns = least(layout->size[2], layout->padded[2] - layout->before[2]);
    const int64_t ahead = (layout->size[2] + LANES - 2) / layout->size[2];
    plan.ring = least(layout->padded[1], plan.last - plan.first + 1 + ahead);
    plan.chunks = problem->groups / LANES;
    const int64_t enough = ceil_div(2 * problem->threads - 1, problem->batch * plan.chunks);
    plan.bands = most(1, least(plan.axes[1].count, enough));
    return plan;
}

static int64_t ring_elements(const lanes_t *plan) { return plan->ring * plan->layout.pitch * LANES; }

static int64_t lane_scratch(const lanes_t *plan) {
    const int64_t staged = (plan->axes[2].count + 2 * LANES) * LANES;
    return LANES + ring_elements(plan) + staged + product(plan->problem->kernel) * LANES;
}

/* Transposes the source up to a row, and what follows that in the same vectors. */
static void advance(const lanes_t *plan, cursor_t *cursor, int64_t until) {
    const layout_t *layout = &plan->layout;
    const int64_t width = layout->size[2], plane = product(layout->size), pitch = layout->pitch * LANES;
    const int64_t position = layout->source.position;
    while (cursor->row <= until) {
        const int64_t row = cursor->row - layout->before[1], at = row * width + cursor->x;
        real *slot = cursor->ring + cursor->row % plan->ring * pitch;
        if (row < 0 || row >= plan->rows) {
            memset(slot, 0, pitch * sizeof(real));
            cursor->row++;
            continue;
        }
        const int64_t count = least(LANES, plan->rows * width - at);
        const real *from = cursor->source + at * position;
        vec square[LANES];
        if (is_last(&layout->source))
            for (int64_t i = 0; i < count; i++) square[i] = *(const vec *)(from + i * position);
        else if (from + (LANES - 1) * plane + LANES <= plan->end)
            for (int lane = 0; lane < LANES; lane++) square[lane] = *(const vec *)(from + lane * plane);
        else
            for (int lane = 0; lane < LANES; lane++)
                for (int x = 0; x < LANES; x++) square[lane][x] = x < count ? from[lane * plane + x] : 0;
        if (!is_last(&layout->source)) transpose_square(square);
        real *to = slot + (layout->before[2] + cursor->x) * LANES;
        for (int64_t i = 0; i < count; i++, to += LANES) {
            if (cursor->x < plan->columns) *(vec *)to = square[i];
            if (++cursor->x == width) {
                cursor->x = 0, cursor->row++;
                to = cursor->ring + cursor->row % plan->ring * pitch + (layout->before[2] - 1) * LANES;
            }
        }
    }
}

INLINE void lane_block(const int width, int64_t taps, const real *const *from, int64_t offset, int64_t step,
                       const real *weights, real *to, int64_t next) {
    vec sums[BLOCK];
#pragma GCC unroll 8
    for (int x = 0; x < width; x++) sums[x] = (vec){0};
    for (int64_t tap = 0; tap < taps; tap++) {
        const vec weight = *(const vec *)(weights + tap * LANES);
        const real *at = from[tap] + offset;
#pragma GCC unroll 8
        for (int x = 0; x < width; x++) sums[x] += weight * *(const vec *)(at + x * step);
    }
#pragma GCC unroll 8
    for (int x = 0; x < width; x++) *(vec *)(to + x * next) = sums[x];
}

/* Sums of some positions in a row, blocks of which may overlap, next elements from each other. */
static void lane_row(int64_t count, int64_t taps, const real *const *from, int64_t step, const real *weights, real *to,
                     int64_t next) {
    int64_t x = 0;
    if (count >= BLOCK) {
        for (; x <= count - BLOCK; x += BLOCK) lane_block(BLOCK, taps, from, x * step, step, weights, to + x * next, next);
        if (x < count) x = count - BLOCK, lane_block(BLOCK, taps, from, x * step, step, weights, to + x * next, next);
        return;
    }
    for (; x <= count - BLOCK / 2; x += BLOCK / 2)
        lane_block(BLOCK / 2, taps, from, x * step, step, weights, to + x * next, next);
    for (; x < count; x++) lane_block(1, taps, from, x * step, step, weights, to + x * next, next);
}

/* Sums of LANES positions or fewer, to a plane for each channel. */
static void write_back(const real *staged, int64_t count, int64_t plane, real *result) {
    vec square[LANES];
    for (int i = 0; i < LANES; i++) square[i] = *(const vec *)(staged + i * LANES);
    transpose_square(square);
    for (int lane = 0; lane < LANES; lane++)
        if (count == LANES)
            *(vec *)(result + lane * plane) = square[lane];
        else
            memcpy(result + lane * plane, &square[lane], count * sizeof(real));
}

/* What a task is of: a sample, LANES channels from the first on, some rows of the result. */
typedef struct {
    int64_t sample, channel, begin, stop;
} share_t;

static share_t share_of_lanes(const lanes_t *plan, int64_t task) {
    const int64_t band = task % plan->bands, rows = plan->axes[1].count;
    return (share_t){task / plan->bands / plan->chunks, task / plan->bands % plan->chunks * LANES,
                     rows * band / plan->bands, rows * (band + 1) / plan->bands};
}

static void scale_lanes(const lanes_t *plan, const real *weight, const real *gain, real *scaled) {
    const int64_t taps = plan->shape.taps;
    for (int64_t lane = 0; lane < LANES; lane++)
        for (int64_t k = 0; k < taps; k++) {
            const int64_t tap = lane * taps + plan->shape.tap[k];
            scaled[k * LANES + lane] = weight[tap] * gain[tap];
        }
}

static void lanes_task(const lanes_t *plan, int64_t task, real *scratch) {
    const layout_t *layout = &plan->layout;
    const axis_t *axes = plan->axes;
    const share_t share = share_of_lanes(plan, task);
    const int64_t taps = plan->shape.taps, columns = axes[2].count, plane = plan->shape.plane;
    const int64_t index = share.sample * plan->problem->groups + share.channel, next = plan->image.position;
    const int64_t pitch = layout->pitch * LANES, step = axes[2].source_stride * LANES;
    real *ring = scratch + (-(uintptr_t)scratch % VECTOR_BYTES) / sizeof(real); /* no vector in two lines of the cache */
    real *weights = ring + ring_elements(plan), *staged = weights + taps * LANES;
    scale_lanes(plan, plan->weight + share.channel * taps, plan->gain + index * taps, weights);
    memset(ring, 0, ring_elements(plan) * sizeof(real));
    const int64_t start = share.begin * axes[1].source_stride + plan->first;
    cursor_t cursor = {plan->source + begin_of(plan->problem, &layout->source, index), ring, start, 0};
    real *result = plan->result + begin_of(plan->problem, &plan->image, index) + share.begin * columns * next;
    int64_t waiting = 0; /* positions that are staged */
    for (int64_t y = share.begin; y < share.stop; y++) {
        const real *from[MAX_TAPS];
        advance(plan, &cursor, y * axes[1].source_stride + plan->last);
        for (int64_t j = 0, tap = 0; j < axes[1].taps; j++) {
            const int64_t row = y * axes[1].source_stride + axes[1].source_start + axes[1].delta[j];
            for (int64_t k = 0; k < axes[2].taps; k++, tap++)
                from[tap] = ring + row % plan->ring * pitch + (axes[2].source_start + axes[2].delta[k]) * LANES;
        }
        if (is_last(&plan->image)) {
            lane_row(columns, taps, from, step, weights, result, next);
            result += columns * next;
            continue;
        }
        lane_row(columns, taps, from, step, weights, staged + waiting * LANES, LANES);
        waiting += columns;
        const real *done = staged;
        for (; waiting >= LANES; waiting -= LANES, done += LANES * LANES, result += LANES)
            write_back(done, LANES, plane, result);
        if (done > staged) memmove(staged, done, waiting * LANES * sizeof(real));
    }
    if (waiting) write_back(staged, waiting, plane, result);
}

/* Whether channels go into the lanes: all but a few, which then go by lines. */
static int in_lanes(const problem_t *problem, int transposed) {
    if (problem->group_in > 1 || problem->group_out > 1 || problem->groups < LANES) return 0;
    if (problem->kernel[0] > 1 || problem->size[0] > 1 || problem->out_size[0] > 1) return 0;
    if (problem->batch < 1 || (transposed && product(problem->stride) > 1)) return 0;
    const lanes_t plan = lanes_of(problem, transposed);
    return ring_elements(&plan) <= CACHED_ELEMENTS;
}

/* The channels that fill no vector, of a sample. */
static problem_t rest_of(const problem_t *problem) {
    problem_t rest = *problem;
    rest.batch = 1, rest.groups = problem->groups % LANES;
    return rest;
}

static int64_t lanes_workspace(const problem_t *problem, int transposed) {
    const lanes_t plan = lanes_of(problem, transposed);
    return problem->threads * most(lane_scratch(&plan), line_scratch(problem, transposed));
}

static void correlate_lanes(const problem_t *problem, int transposed, const real *source, const real *weight,
                            const real *gain, real *result, real *workspace) {
    lanes_t plan = lanes_of(problem, transposed);
    const int64_t taps = plan.shape.taps, scratch = lane_scratch(&plan);
    plan.source = source, plan.weight = weight, plan.gain = gain, plan.result = result;
    plan.end = source + problem->batch * plan.layout.source.sample;
#pragma omp parallel for num_threads(problem->threads) schedule(static)
    for (int64_t task = 0; task < problem->batch * plan.chunks * plan.bands; task++)
        lanes_task(&plan, task, workspace + thread_number() * scratch);
    const problem_t rest = rest_of(problem);
    for (int64_t n = 0; n < problem->batch && rest.groups; n++) {
        const int64_t done = plan.chunks * LANES, index = n * problem->groups + done;
        correlate_lines(&rest, transposed, source + begin_of(problem, &plan.layout.source, index), weight + done * taps,
                        gain + index * taps, result + begin_of(problem, &plan.image, index), workspace);
    }
}
