/* AW-convolution on a CPU: direct convolutions whose weights are scaled, a block at a time, for each sample.
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
 * tile of LANES x positions stays in registers over all taps and channels. The scaled weights of a block of lanes fit in
 * the second-level cache and exist for one sample at a time. u is never stored: a tile of it is used for both gradients
 * as soon as it is summed. Where a group has few channels, as in depthwise convolutions, positions take the lanes instead
 * (lines). No sum is split between threads, so that results do not depend on their number.
 */
#include <stdint.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#define thread_number() omp_get_thread_num()
#else
#define thread_number() 0
#endif

#ifndef REAL
#define REAL float
#endif
typedef REAL real;

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#define WIDEST 14 /* positions of a tile of two vectors: 28 accumulators of 32 registers */
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#define WIDEST 6
#elif defined(__aarch64__)
#define VECTOR_BYTES 16
#define WIDEST 14
#else
#define VECTOR_BYTES 16
#define WIDEST 6
#endif
#define LANES ((int)(VECTOR_BYTES / sizeof(real)))
#define BLOCK (2 * LANES) /* channels of a tile: two vectors, one where no more are left */
#define MAX_TAPS 512
#define INLINE static inline __attribute__((always_inline))

typedef real vec __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(real)), may_alias));
typedef __typeof__((vec){0} < (vec){0}) mask; /* of integers: all bits of a lane are set, or none */

/* What the copies of the samples at hand may hold, so that they stay in the cache (1 MiB in single precision). */
enum { CACHED_ELEMENTS = 1 << 18 };

typedef struct {
    int64_t batch, groups, group_out, group_in, blocks; /* blocks of input channels of a group that share a gain */
    int64_t size[3], out_size[3], kernel[3], stride[3], dilation[3], padding[3];
    int64_t threads;
} problem_t;

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t product(const int64_t *sizes) { return sizes[0] * sizes[1] * sizes[2]; }
static int64_t ceil_div(int64_t a, int64_t b) { return a > 0 ? (a + b - 1) / b : -(-a / b); }
static int64_t floor_div(int64_t a, int64_t b) { return -ceil_div(-a, b); }

/* ---- transposition ------------------------------------------------------------------------------------------- */

/* The transpose of a square of LANES vectors, in registers: at each step, halves (quarters, ...) change places. */
INLINE void transpose_square(vec *rows) {
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC unroll 4
    for (int half = LANES / 2; half > 0; half /= 2) {
        mask low, high;
#pragma GCC unroll 16
        for (int lane = 0; lane < LANES; lane++) {
            low[lane] = lane & half ? LANES + lane - half : lane;
            high[lane] = lane & half ? LANES + lane : lane + half;
        }
#pragma GCC unroll 16
        for (int row = 0; row < LANES; row++)
            if (!(row & half)) {
                vec first = rows[row], second = rows[row + half];
                rows[row] = __builtin_shuffle(first, second, low);
                rows[row + half] = __builtin_shuffle(first, second, high);
            }
    }
#else
    for (int row = 0; row < LANES; row++)
        for (int lane = 0; lane < row; lane++) {
            real kept = rows[row][lane];
            rows[row][lane] = rows[lane][row];
            rows[lane][row] = kept;
        }
#endif
}

/* to[j * to_stride + i] = from[i * from_stride + j] for i < rows, j < columns. Vectors are read beyond the last column,
 * but not beyond the end of what may be read. */
static void transpose(const real *from, int64_t from_stride, int64_t rows, int64_t columns, const real *end, real *to,
                      int64_t to_stride) {
    for (int64_t row = 0; row < rows; row += LANES)
        for (int64_t column = 0; column < columns; column += LANES) {
            const int64_t height = least(LANES, rows - row), width = least(LANES, columns - column);
            const real *corner = from + row * from_stride + column;
            real *target = to + column * to_stride + row;
            if (height < LANES || corner + (LANES - 1) * from_stride + LANES > end) {
                for (int64_t j = 0; j < width; j++)
                    for (int64_t i = 0; i < height; i++) target[j * to_stride + i] = corner[i * from_stride + j];
                continue;
            }
            vec square[LANES];
            for (int i = 0; i < LANES; i++) square[i] = *(const vec *)(corner + i * from_stride);
            transpose_square(square);
            for (int64_t j = 0; j < width; j++) *(vec *)(target + j * to_stride) = square[j];
        }
}

/* ---- what a convolution reads: rows with explicit padding ------------------------------------------------------ */

typedef struct {
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
    const int64_t source_plane = product(layout->size), width = layout->size[2], channels = layout->channels;
    const int64_t phases = layout->phases, pitch = layout->pitch;
    for (int64_t phase = 0; phase < phases; phase++, to += channels * pitch) {
        /* the first and the last position of this phase that are not padding */
        const int64_t start = least(pitch, most(0, ceil_div(layout->before[2] - phase, phases)));
        const int64_t stop = least(pitch, most(0, ceil_div(layout->before[2] + width - phase, phases)));
        const real *first = from + start * phases + phase - layout->before[2];
        for (int64_t z = 0; z < layout->padded[0]; z++)
            for (int64_t y = 0; y < layout->padded[1]; y++) {
                int64_t source_z = z - layout->before[0], source_y = y - layout->before[1];
                real *target = to + z * layout->plane + y * layout->row;
                if (source_z < 0 || source_z >= layout->size[0] || source_y < 0 || source_y >= layout->size[1]) {
                    memset(target, 0, channels * pitch * sizeof(real));
                    continue;
                }
                const real *line = first + (source_z * layout->size[1] + source_y) * width;
                for (int64_t channel = 0; channel < channels; channel++, line += source_plane, target += pitch) {
                    for (int64_t x = 0; x < start; x++) target[x] = 0;
                    if (phases == 1)
                        for (int64_t x = start; x < stop; x++) target[x] = line[x - start];
                    else
                        for (int64_t x = start; x < stop; x++) target[x] = line[(x - start) * phases];
                    for (int64_t x = stop; x < pitch; x++) target[x] = 0;
                }
            }
    }
}

/* ---- one tile of an output ------------------------------------------------------------------------------------ */

typedef struct {
    int64_t reduced, pitch; /* channels that are summed over, elements from one to the next */
    int64_t taps;
    int64_t offset[MAX_TAPS]; /* what a tap reads, from what the tile begins at */
    int64_t tap[MAX_TAPS];    /* which tap of the kernel it is */
    int64_t plane, step;      /* of the result: elements from a channel to the next, from a position to the next */
} tile_t;

/* Lanes x width of the result, from weights [reduced channel][tap][lane]. */
INLINE void tile(const int vectors, const int width, const tile_t *shape, const real *source, const real *weights,
                 real *result, int64_t channels) {
    vec sums[2][16];
#pragma GCC unroll 2
    for (int v = 0; v < vectors; v++)
#pragma GCC unroll 16
        for (int x = 0; x < width; x++) sums[v][x] = (vec){0};
    const int64_t reduced = shape->reduced, pitch = shape->pitch, taps = shape->taps;
    for (int64_t channel = 0; channel < reduced; channel++) {
        for (int64_t tap = 0; tap < taps; tap++) {
            const real *at = source + shape->offset[tap];
            vec first = *(const vec *)weights, second = first;
            if (vectors > 1) second = *(const vec *)(weights + LANES);
#pragma GCC unroll 16
            for (int x = 0; x < width; x++) {
                sums[0][x] += first * at[x];
                if (vectors > 1) sums[1][x] += second * at[x];
            }
            weights += vectors * LANES;
        }
        source += pitch;
    }
#pragma GCC unroll 2
    for (int v = 0; v < vectors; v++) {
        const int64_t lanes = least(LANES, channels - v * LANES);
#pragma GCC unroll 4
        for (int start = 0; start < width; start += LANES) {
            const int count = width - start < LANES ? width - start : LANES;
            vec square[LANES];
#pragma GCC unroll 16
            for (int x = 0; x < LANES; x++) square[x] = start + x < width ? sums[v][(start + x) % 16] : (vec){0};
            transpose_square(square);
            for (int64_t lane = 0; lane < lanes; lane++) {
                real *target = result + (v * LANES + lane) * shape->plane + start * shape->step;
                if (shape->step == 1)
                    memcpy(target, &square[lane], count * sizeof(real));
                else
                    for (int x = 0; x < count; x++) target[x * shape->step] = ((real *)&square[lane])[x];
            }
        }
    }
}

/* Two vectors of u over width input channels: sums over positions, and what both gradients take of it. */
typedef struct {
    int64_t rows, columns;  /* positions; rows are the planes' too */
    const int64_t *row;     /* where a row of positions begins in the input */
    int64_t step, channels; /* elements from a position to the next in the input; elements from a lane's tap to the
                               next input channel's in the packed weights */
} sum_t;

INLINE void sum_tile(const int vectors, const int width, const sum_t *shape, const real *grad_output, const real *input,
                     const real *gain, const real *weight, real *grad_weight, real *grad_gain) {
    vec sums[2][16];
#pragma GCC unroll 2
    for (int v = 0; v < vectors; v++)
#pragma GCC unroll 16
        for (int c = 0; c < width; c++) sums[v][c] = (vec){0};
    const int64_t columns = shape->columns, step = shape->step;
    for (int64_t row = 0; row < shape->rows; row++) {
        const real *at = input + shape->row[row];
        for (int64_t x = 0; x < columns; x++) {
            vec first = *(const vec *)grad_output, second = first;
            if (vectors > 1) second = *(const vec *)(grad_output + LANES);
#pragma GCC unroll 16
            for (int c = 0; c < width; c++) {
                sums[0][c] += first * at[c];
                if (vectors > 1) sums[1][c] += second * at[c];
            }
            at += step;
            grad_output += vectors * LANES;
        }
    }
#pragma GCC unroll 2
    for (int v = 0; v < vectors; v++) {
        vec scale = *(const vec *)(gain + v * LANES), inner = *(const vec *)(grad_gain + v * LANES);
#pragma GCC unroll 16
        for (int c = 0; c < width; c++) {
            vec *target = (vec *)(grad_weight + c * shape->channels + v * LANES);
            inner += *(const vec *)(weight + c * shape->channels + v * LANES) * sums[v][c];
            *target += scale * sums[v][c];
        }
        *(vec *)(grad_gain + v * LANES) = inner;
    }
}

typedef void tile_function(const tile_t *, const real *, const real *, real *, int64_t);
typedef void sum_function(const sum_t *, const real *, const real *, const real *, const real *, real *, real *);
#define FUNCTIONS(VECTORS, WIDTH)                                                                                      \
    static void tile_##VECTORS##_##WIDTH(const tile_t *s, const real *a, const real *w, real *r, int64_t c) {          \
        tile(VECTORS, WIDTH, s, a, w, r, c);                                                                           \
    }                                                                                                                  \
    static void sum_##VECTORS##_##WIDTH(const sum_t *s, const real *g, const real *a, const real *e, const real *w,    \
                                        real *gw, real *ge) {                                                          \
        sum_tile(VECTORS, WIDTH, s, g, a, e, w, gw, ge);                                                               \
    }
#define BOTH(WIDTH) FUNCTIONS(1, WIDTH) FUNCTIONS(2, WIDTH)
#define NAMES_6(NAME) NAME##1, NAME##2, NAME##3, NAME##4, NAME##5, NAME##6
BOTH(1) BOTH(2) BOTH(3) BOTH(4) BOTH(5) BOTH(6)
#if WIDEST > 6
BOTH(7) BOTH(8) BOTH(9) BOTH(10) BOTH(11) BOTH(12) BOTH(13) BOTH(14)
#define NAMES(NAME) NAMES_6(NAME), NAME##7, NAME##8, NAME##9, NAME##10, NAME##11, NAME##12, NAME##13, NAME##14
#else
#define NAMES(NAME) NAMES_6(NAME)
#endif
static tile_function *const TILES[2][WIDEST] = {{NAMES(tile_1_)}, {NAMES(tile_2_)}};
static sum_function *const SUMS[2][WIDEST] = {{NAMES(sum_1_)}, {NAMES(sum_2_)}};

/* The width of the next tile, when what is left is divided as evenly as tiles allow. */
static int64_t next_width(int64_t left) { return ceil_div(left, ceil_div(left, WIDEST)); }

/* ---- blocks of channels ---------------------------------------------------------------------------------------- */

/* Channels are taken in blocks of two vectors; the last block has one where that is enough. */
static int64_t vectors_of(int64_t channels, int64_t block) { return channels - block * BLOCK > LANES ? 2 : 1; }
static int64_t padded_channels(int64_t channels) { return ceil_div(channels, LANES) * LANES; }

/* A block of weight[p][c][tap] as [reduced channel][tap][lane]: lanes are p, or c in the transposed convolution. */
static void pack_block(const problem_t *problem, int transposed, const real *weight, int64_t block, real *packed) {
    int64_t taps = product(problem->kernel), first = block * BLOCK;
    const real *end = weight + problem->group_out * problem->group_in * taps;
    int64_t all = transposed ? problem->group_in : problem->group_out;
    int64_t lanes = vectors_of(all, block) * LANES, channels = least(lanes, all - first);
    int64_t reduced = transposed ? problem->group_out : problem->group_in;
    if (channels < lanes) memset(packed, 0, reduced * taps * lanes * sizeof(real));
    if (transposed)
        for (int64_t r = 0; r < reduced; r++)
            transpose(weight + (r * all + first) * taps, taps, channels, taps, end, packed + r * taps * lanes, lanes);
    else
        transpose(weight + first * reduced * taps, reduced * taps, channels, reduced * taps, end, packed, lanes);
}

/* ---- the convolution and its transpose ------------------------------------------------------------------------- */

/* One axis of a convolution, or of one phase of a transposed one: positions of the result and what they read. */
typedef struct {
    int64_t count, result_start, result_step; /* positions of the result */
    int64_t source_start, source_step;        /* what the first one reads by a tap of delta 0, and the distance */
    int64_t taps, tap[MAX_TAPS], delta[MAX_TAPS];
} axis_t;

static void forward_axis(const problem_t *problem, int axis, axis_t *result) {
    result->count = problem->out_size[axis], result->result_start = 0, result->result_step = 1;
    result->source_start = 0, result->source_step = problem->stride[axis], result->taps = problem->kernel[axis];
    for (int64_t tap = 0; tap < result->taps; tap++)
        result->tap[tap] = tap, result->delta[tap] = tap * problem->dilation[axis];
}

/* Zeros before the output gradient, so that no position of the transposed convolution reads before them. */
static int64_t zeros_before(const problem_t *problem, int axis) {
    int64_t reach = (problem->kernel[axis] - 1) * problem->dilation[axis];
    int64_t zeros = ceil_div(reach - problem->padding[axis], problem->stride[axis]);
    return zeros > 0 ? zeros : 0;
}

/* Positions of the input that are phase modulo the stride, counted from the first zero of the padding. */
static void transposed_axis(const problem_t *problem, int axis, int64_t phase, axis_t *result) {
    int64_t stride = problem->stride[axis], padding = problem->padding[axis];
    int64_t first = ceil_div(padding - phase, stride), last = floor_div(padding + problem->size[axis] - 1 - phase, stride);
    result->count = last - first + 1, result->result_start = stride * first + phase - padding;
    result->result_step = stride, result->source_start = first + zeros_before(problem, axis), result->source_step = 1;
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
        int64_t stride = problem->stride[axis], reach = (problem->kernel[axis] - 1) * problem->dilation[axis];
        if (transposed) {
            layout.size[axis] = problem->out_size[axis];
            layout.before[axis] = zeros_before(problem, axis);
            int64_t furthest = floor_div(problem->padding[axis] + problem->size[axis] - 1, stride);
            layout.padded[axis] = layout.before[axis] + furthest + 1;
        } else {
            layout.size[axis] = problem->size[axis];
            layout.before[axis] = problem->padding[axis];
            layout.padded[axis] = (problem->out_size[axis] - 1) * stride + reach + 1;
        }
    }
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
    shape->reduced = layout->channels, shape->pitch = layout->pitch, shape->step = axes[2].result_step;
    shape->plane = product(transposed ? problem->size : problem->out_size);
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
    return source + z * axes[0].source_step * layout->plane + y * axes[1].source_step * layout->row;
}
static real *result_row(const int64_t *size, const axis_t *axes, real *result, int64_t z, int64_t y) {
    z = axes[0].result_start + z * axes[0].result_step, y = axes[1].result_start + y * axes[1].result_step;
    return result + (z * size[1] + y) * size[2] + axes[2].result_start;
}

/* scaled[reduced channel][tap][lane] = packed weights times the gain of a sample. */
static void scale_block(const problem_t *problem, int transposed, const real *packed, const real *gain, const tile_t *shape,
                        int64_t block, real *gains, real *scaled) {
    int64_t taps = product(problem->kernel), blocks = problem->blocks, share = problem->group_in / blocks;
    int64_t all = transposed ? problem->group_in : problem->group_out, first = block * BLOCK;
    int64_t lanes = vectors_of(all, block) * LANES, channels = least(lanes, all - first);
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

/* Some rows of one block of channels of one sample. */
static void correlate_block(const problem_t *problem, int transposed, const layout_t *layout, const real *source,
                            const real *packed, const real *gain, int64_t block, int64_t segment, int64_t segments,
                            real *scratch, real *result) {
    int64_t all = transposed ? problem->group_in : problem->group_out, first = block * BLOCK;
    int64_t vectors = vectors_of(all, block), taps = product(problem->kernel);
    const int64_t *result_size = transposed ? problem->size : problem->out_size;
    real *scaled = scratch + problem->blocks * taps * BLOCK;
    axis_t axes[3];
    tile_t shape;
    result += first * product(result_size);
    for (int64_t phase = 0; phase < phases_of(problem, transposed); phase++) {
        start_phase(problem, transposed, layout, phase, axes, &shape);
        scale_block(problem, transposed, packed, gain, &shape, block, scratch, scaled);
        int64_t rows = axes[0].count * axes[1].count;
        for (int64_t row = rows * segment / segments; row < rows * (segment + 1) / segments; row++) {
            const real *from = source_row(layout, axes, source, row / axes[1].count, row % axes[1].count);
            real *to = result_row(result_size, axes, result, row / axes[1].count, row % axes[1].count);
            for (int64_t x = 0, width; x < axes[2].count; x += width) {
                width = next_width(axes[2].count - x);
                TILES[vectors - 1][width - 1](&shape, from + x, scaled, to + x * shape.step, all - first);
            }
        }
    }
}

/* Samples whose copies are held at once: few enough to stay in the cache, but as many as are needed at least. */
static int64_t samples_at_once(const problem_t *problem, int64_t elements, int64_t needed) {
    return least(problem->batch, most(needed, CACHED_ELEMENTS / most(1, elements)));
}

/* Of a thread: a block of weights, its gains, and their product for a sample. */
static int64_t scratch_elements(const problem_t *problem, int transposed) {
    int64_t reduced = transposed ? problem->group_out : problem->group_in;
    return (2 * reduced + problem->blocks) * product(problem->kernel) * BLOCK;
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
    const int64_t all = transposed ? problem->group_in : problem->group_out, blocks = ceil_div(all, BLOCK);
    const int64_t source_group = layout.channels * product(layout.size);
    const int64_t result_group = all * product(transposed ? problem->size : problem->out_size);
    const int64_t gain_group = problem->group_out * problem->blocks * taps;
    const int64_t group_weights = problem->group_out * problem->group_in * taps;
    real *rows = workspace, *scratches = rows + at_once * groups * layout.group;
#pragma omp parallel num_threads(problem->threads)
    {
        real *packed = scratches + thread_number() * scratch_elements(problem, transposed);
        real *scratch = packed + layout.channels * taps * BLOCK;
        int64_t held = -1; /* the block that is packed: the tasks of a thread stay with one for as long as they can */
        for (int64_t start = 0; start < problem->batch; start += at_once) {
            const int64_t samples = least(at_once, problem->batch - start);
#pragma omp for schedule(static)
            for (int64_t i = 0; i < samples * groups; i++)
                copy_rows(&layout, source + (start * groups + i) * source_group, rows + i * layout.group);
            const int64_t tasks = groups * blocks * samples;
            const int64_t segments = ceil_div(2 * problem->threads - 1, tasks);
#pragma omp for schedule(static)
            for (int64_t i = 0; i < tasks * segments; i++) {
                const int64_t n = i / segments % samples, block = i / segments / samples % blocks;
                const int64_t group = i / segments / samples / blocks, index = (start + n) * groups + group;
                if (held != group * blocks + block) {
                    held = group * blocks + block;
                    pack_block(problem, transposed, weight + group * group_weights, block, packed);
                }
                correlate_block(problem, transposed, &layout, rows + (n * groups + group) * layout.group, packed,
                                gain + index * gain_group, block, i % segments, segments, scratch,
                                result + index * result_group);
            }
        }
    }
}

/* ---- the gradients of weight and gain -------------------------------------------------------------------------- */

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
    const int64_t out = problem->group_out, blocks = ceil_div(out, BLOCK), padded = padded_channels(out);
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
        for (int64_t i = 0; i < groups * blocks; i++) {
            const int64_t offset = i / blocks * group_weights + i % blocks * BLOCK * in * taps;
            pack_block(problem, 0, weight + i / blocks * out * in * taps, i % blocks, packed + offset);
            memset(grad_packed + offset, 0, vectors_of(out, i % blocks) * LANES * in * taps * sizeof(real));
        }
        for (int64_t start = 0; start < problem->batch; start += at_once) {
            const int64_t samples = least(at_once, problem->batch - start);
#pragma omp for schedule(static) nowait
            for (int64_t i = 0; i < samples * groups; i++)
                transpose_rows(&layout, input + (start * groups + i) * in * product(layout.size), inputs + i * layout.group);
#pragma omp for schedule(static)
            for (int64_t i = 0; i < samples * groups * blocks; i++) { /* [sample][group][block][position or tap][lane] */
                const int64_t group = start * groups + i / blocks, first = i % blocks * BLOCK;
                const int64_t lanes = vectors_of(out, i % blocks) * LANES, channels = least(lanes, out - first);
                real *to = grads + (i / blocks * padded + first) * positions;
                real *scales = gains + (i / blocks * padded + first) * per_lane;
                if (channels < lanes) memset(to, 0, lanes * positions * sizeof(real));
                if (channels < lanes) memset(scales, 0, lanes * per_lane * sizeof(real));
                memset(grad_gains + (i / blocks * padded + first) * per_lane, 0, lanes * per_lane * sizeof(real));
                transpose(grad_output + (group * out + first) * positions, positions, channels, positions,
                          grad_output + (group + 1) * out * positions, to, lanes);
                transpose(gain + (group * out + first) * per_lane, per_lane, channels, per_lane,
                          gain + (group + 1) * out * per_lane, scales, lanes);
            }
#pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < groups * blocks * taps; i++) {
                const int64_t tap = i % taps, block = i / taps % blocks, group = i / taps / blocks;
                const int64_t lanes = vectors_of(out, block) * LANES, first = block * BLOCK;
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
            for (int64_t i = 0; i < samples * groups * blocks; i++) {
                const int64_t group = start * groups + i / blocks, first = i % blocks * BLOCK;
                const int64_t lanes = vectors_of(out, i % blocks) * LANES, channels = least(lanes, out - first);
                const real *from = grad_gains + (i / blocks * padded + first) * per_lane;
                transpose(from, lanes, per_lane, channels, from + lanes * per_lane,
                          grad_gain + (group * out + first) * per_lane, per_lane);
            }
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < groups * blocks; i++) {
            const int64_t first = i % blocks * BLOCK, lanes = vectors_of(out, i % blocks) * LANES;
            const real *from = grad_packed + i / blocks * group_weights + first * in * taps;
            transpose(from, lanes, in * taps, least(lanes, out - first), from + lanes * in * taps,
                      grad_weight + (i / blocks * out + first) * in * taps, in * taps);
        }
    }
}

/* ---- few channels in a group: positions in the lanes ----------------------------------------------------------- */

enum { COPIED_ELEMENTS = 1 << 12 };
enum { TOGETHER = 4 }; /* channels of the result, or taps of a sum, that share what is read */

static int in_lines(int64_t channels) { return 2 * channels <= LANES; }

/* A row of some channels of the result, from weights [reduced channel][tap][channel]. Rows come in order, so that a
 * vector may reach into the next row, unless that is beyond what room there is. */
INLINE void line(const int channels, const tile_t *shape, const real *source, const real *weights, int64_t columns,
                 int64_t room, real *result) {
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
            real *target = result + c * shape->plane + x * shape->step;
            if (shape->step == 1 && room - x >= LANES)
                *(vec *)target = sums[c];
            else
                for (int64_t i = 0; i < count; i++) target[i * shape->step] = sums[c][i];
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
    const int64_t *result_size = transposed ? problem->size : problem->out_size, phases = phases_of(problem, transposed);
    const int64_t planes = problem->batch * groups, at_once = groups_at_once(&layout);
#pragma omp parallel num_threads(problem->threads)
    {
        real *rows = workspace + thread_number() * line_scratch(problem, transposed);
        real *weights = rows + at_once * layout.group + LANES;
        memset(rows + at_once * layout.group, 0, LANES * sizeof(real)); /* a vector may reach beyond the last row */
        axis_t axes[3];
        tile_t shape;
        for (int64_t phase = 0; phase < phases; phase++) {
            start_phase(problem, transposed, &layout, phase, axes, &shape);
#pragma omp for schedule(static) nowait
            for (int64_t start = 0; start < planes; start += at_once) {
                const int64_t stop = least(start + at_once, planes);
                for (int64_t i = start; i < stop; i++)
                    copy_rows(&layout, source + i * layout.channels * product(layout.size), rows + (i - start) * layout.group);
                for (int64_t i = start; i < stop; i++) {
                    const real *group_weight = weight + i % groups * problem->group_out * problem->group_in * taps;
                    const real *group_gain = gain + i * problem->group_out * blocks * taps;
                    for (int64_t first = 0, channels; first < all; first += channels) {
                        real *to = result + (i * all + first) * shape.plane;
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
                                real *target = result_row(result_size, axes, to, z, y);
                                const int64_t columns = axes[2].count, room = phases == 1 ? to + shape.plane - target : 0;
                                switch (channels) {
                                    case 1: line(1, &shape, from, weights, columns, room, target); break;
                                    case 2: line(2, &shape, from, weights, columns, room, target); break;
                                    case 3: line(3, &shape, from, weights, columns, room, target); break;
                                    default: line(4, &shape, from, weights, columns, room, target);
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

/* Sums over all positions, for some taps from the first on. The last vector of a row reaches beyond it, to what belongs
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
                copy_rows(&layout, input + index * in * product(layout.size), inputs);
                for (int64_t p = 0; p < out; p++) {
                    for (int64_t row = 0; row < rows; row++)
                        memcpy(grads + row * pitch, grad_output + ((index * out + p) * rows + row) * width, width * sizeof(real));
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

/* ---- what cpu.py calls ----------------------------------------------------------------------------------------- */

int64_t workspace_elements(const problem_t *problem, int backward) {
    const int64_t threads = problem->threads;
    if (!backward)
        return in_lines(problem->group_out) ? threads * line_scratch(problem, 0) : correlate_workspace(problem, 0);
    return most(in_lines(problem->group_in) ? threads * line_scratch(problem, 1) : correlate_workspace(problem, 1),
                in_lines(problem->group_out) ? threads * sum_line_scratch(problem) : sum_workspace(problem));
}

void forward(const problem_t *problem, const real *input, const real *weight, const real *gain, real *output,
             real *workspace) {
    (in_lines(problem->group_out) ? correlate_lines : correlate)(problem, 0, input, weight, gain, output, workspace);
}

/* Gradients that are not wanted are null; those of weight and gain come together. */
void backward(const problem_t *problem, const real *grad_output, const real *input, const real *weight, const real *gain,
              real *grad_input, real *grad_weight, real *grad_gain, real *workspace) {
    if (grad_input)
        (in_lines(problem->group_in) ? correlate_lines : correlate)(problem, 1, grad_output, weight, gain, grad_input,
                                                                    workspace);
    if (grad_weight)
        (in_lines(problem->group_out) ? sum_lines : sum)(problem, grad_output, input, weight, gain, grad_weight, grad_gain,
                                                         workspace);
}
