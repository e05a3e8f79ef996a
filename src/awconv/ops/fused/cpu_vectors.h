/* The problem, vectors, and the transposition of what they are loaded from. */
#pragma once

#include <string.h>

#include "../real.h"

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
#define PANEL (2 * LANES) /* channels of a tile: two vectors, one where no more are left */
#define MAX_TAPS 512
#define INLINE static inline __attribute__((always_inline))

typedef real vec __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(real)), may_alias));
typedef __typeof__((vec){0} < (vec){0}) mask; /* of integers: all bits of a lane are set, or none */

typedef struct {
    int64_t batch, groups, group_out, group_in, blocks; /* blocks of input channels of a group that share a gain */
    int64_t size[3], out_size[3], kernel[3], stride[3], dilation[3], padding[3];
    int64_t threads;
    int64_t last[2]; /* channels of all groups of the input, of the output, if they lie last; zero if they come first */
} problem_t;

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t product(const int64_t *sizes) { return sizes[0] * sizes[1] * sizes[2]; }
static int64_t ceil_div(int64_t a, int64_t b) { return a > 0 ? (a + b - 1) / b : -(-a / b); }
static int64_t floor_div(int64_t a, int64_t b) { return -ceil_div(-a, b); }

/* Halves (quarters, ...) of two vectors change places. The lanes are literals: from those of a loop, GCC makes no constants,
 * and a transposition takes three times as long. */
#if REAL_BYTES == 4
typedef int32_t indices __attribute__((vector_size(VECTOR_BYTES)));
#else
typedef int64_t indices __attribute__((vector_size(VECTOR_BYTES)));
#endif
#define LOW(half, lane) (lane & half ? LANES + lane - half : lane)
#define HIGH(half, lane) (lane & half ? LANES + lane : lane + half)
#define OF_2(function, half) function(half, 0), function(half, 1)
#define OF_4(function, half) OF_2(function, half), function(half, 2), function(half, 3)
#define OF_8(function, half) \
    OF_4(function, half), function(half, 4), function(half, 5), function(half, 6), function(half, 7)
#define OF_16(function, half)                                                                                        \
    OF_8(function, half), function(half, 8), function(half, 9), function(half, 10), function(half, 11),              \
        function(half, 12), function(half, 13), function(half, 14), function(half, 15)
#if VECTOR_BYTES == 16 * REAL_BYTES
#define OF_ALL OF_16
#define HALVES(round) round(8) round(4) round(2) round(1)
#elif VECTOR_BYTES == 8 * REAL_BYTES
#define OF_ALL OF_8
#define HALVES(round) round(4) round(2) round(1)
#elif VECTOR_BYTES == 4 * REAL_BYTES
#define OF_ALL OF_4
#define HALVES(round) round(2) round(1)
#else
#define OF_ALL OF_2
#define HALVES(round) round(1)
#endif
#ifdef __clang__
#define SHUFFLE(first, second, lanes, half) __builtin_shufflevector(first, second, OF_ALL(lanes, half))
#else
#define SHUFFLE(first, second, lanes, half) __builtin_shuffle(first, second, (indices){OF_ALL(lanes, half)})
#endif
#define EXCHANGE(half)                                                  \
    _Pragma("GCC unroll 16") for (int row = 0; row < LANES; row++)      \
        if (!(row & half)) {                                            \
            const vec first = rows[row], second = rows[row + half];     \
            rows[row] = SHUFFLE(first, second, LOW, half);              \
            rows[row + half] = SHUFFLE(first, second, HIGH, half);      \
        }

/* The transpose of a square of LANES vectors, in registers. */
INLINE void transpose_square(vec *rows) { HALVES(EXCHANGE) }

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
