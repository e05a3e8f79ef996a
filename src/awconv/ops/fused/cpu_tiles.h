/* What stays in registers: a tile of an output, a tile of sums, and the panels of weights that they read. */
#pragma once

#include "cpu_vectors.h"

typedef struct {
    int64_t reduced, pitch; /* channels that are summed over, elements from one to the next */
    int64_t taps;
    int64_t offset[MAX_TAPS];       /* what a tap reads, from what the tile begins at */
    int64_t tap[MAX_TAPS];          /* which tap of the kernel it is */
    int64_t plane, position_stride; /* of the result: elements from a channel to the next, from a position to the next */
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
        if (shape->plane == 1) { /* channels last */
#pragma GCC unroll 16
            for (int x = 0; x < width; x++) {
                real *target = result + v * LANES + x * shape->position_stride;
                if (lanes == LANES)
                    *(vec *)target = sums[v][x];
                else
                    for (int64_t lane = 0; lane < lanes; lane++) target[lane] = sums[v][x][lane];
            }
            continue;
        }
#pragma GCC unroll 4
        for (int start = 0; start < width; start += LANES) {
            const int count = width - start < LANES ? width - start : LANES;
            vec square[LANES];
#pragma GCC unroll 16
            for (int x = 0; x < LANES; x++) square[x] = start + x < width ? sums[v][(start + x) % 16] : (vec){0};
            transpose_square(square);
            for (int64_t lane = 0; lane < lanes; lane++) {
                real *target = result + (v * LANES + lane) * shape->plane + start * shape->position_stride;
                if (shape->position_stride == 1)
                    memcpy(target, &square[lane], count * sizeof(real));
                else
                    for (int x = 0; x < count; x++) target[x * shape->position_stride] = ((real *)&square[lane])[x];
            }
        }
    }
}

/* Two vectors of u over width input channels: sums over positions, and what both gradients take of it. */
typedef struct {
    int64_t rows, columns;   /* positions; rows are the planes' too */
    const int64_t *row;      /* where a row of positions begins in the input */
    int64_t position_stride; /* of the input, in elements */
    int64_t channels;        /* elements from a lane's tap to the next input channel's in the packed weights */
} sum_t;

INLINE void sum_tile(const int vectors, const int width, const sum_t *shape, const real *grad_output, const real *input,
                     const real *gain, const real *weight, real *grad_weight, real *grad_gain) {
    vec sums[2][16];
#pragma GCC unroll 2
    for (int v = 0; v < vectors; v++)
#pragma GCC unroll 16
        for (int c = 0; c < width; c++) sums[v][c] = (vec){0};
    const int64_t columns = shape->columns, position_stride = shape->position_stride;
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
            at += position_stride;
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

/* Channels are taken in panels of two vectors; the last one has one where that is enough. */
static int64_t vectors_of(int64_t channels, int64_t panel) { return channels - panel * PANEL > LANES ? 2 : 1; }
static int64_t padded_channels(int64_t channels) { return ceil_div(channels, LANES) * LANES; }

/* A panel of weight[p][c][tap] as [reduced channel][tap][lane]: lanes are p, or c in the transposed convolution. */
static void pack_panel(const problem_t *problem, int transposed, const real *weight, int64_t panel, real *packed) {
    int64_t taps = product(problem->kernel), first = panel * PANEL;
    const real *end = weight + problem->group_out * problem->group_in * taps;
    int64_t all = transposed ? problem->group_in : problem->group_out;
    int64_t lanes = vectors_of(all, panel) * LANES, channels = least(lanes, all - first);
    int64_t reduced = transposed ? problem->group_out : problem->group_in;
    if (channels < lanes) memset(packed, 0, reduced * taps * lanes * sizeof(real));
    if (transposed)
        for (int64_t r = 0; r < reduced; r++)
            transpose(weight + (r * all + first) * taps, taps, channels, taps, end, packed + r * taps * lanes, lanes);
    else
        transpose(weight + first * reduced * taps, reduced * taps, channels, reduced * taps, end, packed, lanes);
}
