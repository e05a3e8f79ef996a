/* Adaptive average pooling and its gradient, in one pass. Compiled at first use by build.py, for REAL float or double.
 *
 * Bin i of an axis covers the positions floor(i * size / bins) to ceil((i + 1) * size / bins); bins may overlap.
 */
#include <string.h>

#include "real.h"

enum { MAX_BINS = 64 }; /* along an axis */

/* The bins of an axis: bin i covers the positions start[i] to stop[i]. */
typedef struct {
    int64_t bins, size;
    int64_t start[MAX_BINS], stop[MAX_BINS];
} axis_t;

static void bin(int64_t size, int64_t bins, axis_t *axis) {
    axis->bins = bins, axis->size = size;
    for (int64_t i = 0; i < bins; i++) axis->start[i] = i * size / bins, axis->stop[i] = ((i + 1) * size + bins - 1) / bins;
}

/* What the sum over a bin is multiplied with: one over the number of positions that it covers. */
static real share_of(const axis_t *axes, int64_t a, int64_t b, int64_t c) {
    const int64_t depth = axes[0].stop[a] - axes[0].start[a], height = axes[1].stop[b] - axes[1].start[b];
    return (real)1 / (real)(depth * height * (axes[2].stop[c] - axes[2].start[c]));
}

/* Small planes: a product with a matrix, results by positions, of which a vector holds a part of a row. */
enum { SMALL = 256, LANES = 16, TOGETHER = 4 };
typedef real vec __attribute__((vector_size(LANES * sizeof(real)), aligned(sizeof(real)), may_alias));

static int64_t padded(int64_t number) { return (number + LANES - 1) / LANES * LANES; }

/* matrix[i][j], zero beyond: the share of position i in result j, or of position j in result i. */
static void fill(const int64_t *size, const int64_t *bins, int positions_first, real *matrix) {
    const int64_t positions = size[0] * size[1] * size[2], results = bins[0] * bins[1] * bins[2];
    const int64_t stride = padded(positions_first ? results : positions);
    axis_t axes[3];
    for (int axis = 0; axis < 3; axis++) bin(size[axis], bins[axis], &axes[axis]);
    for (int64_t i = 0; i < (positions_first ? positions : results) * stride; i++) matrix[i] = 0;
    for (int64_t result = 0; result < results; result++) {
        const int64_t a = result / bins[2] / bins[1], b = result / bins[2] % bins[1], c = result % bins[2];
        const real share = share_of(axes, a, b, c);
        for (int64_t z = axes[0].start[a]; z < axes[0].stop[a]; z++)
            for (int64_t y = axes[1].start[b]; y < axes[1].stop[b]; y++)
                for (int64_t x = axes[2].start[c]; x < axes[2].stop[c]; x++) {
                    const int64_t position = (z * size[1] + y) * size[2] + x;
                    matrix[positions_first ? position * stride + result : result * stride + position] = share;
                }
    }
}

/* to[plane][j] = sum over i of  from[plane][i] matrix[i][j], some planes at a time so that sums do not wait. */
static void multiply(int64_t planes, int64_t inner, int64_t outer, int64_t threads, const real *from, const real *matrix,
                     real *to) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t tile = 0; tile < (planes + TOGETHER - 1) / TOGETHER; tile++) {
        const int64_t first = tile * TOGETHER, count = planes - first < TOGETHER ? planes - first : TOGETHER;
        const real *rows[TOGETHER];
        for (int64_t k = 0; k < TOGETHER; k++) rows[k] = from + (first + (k < count ? k : 0)) * inner;
        for (int64_t j = 0; j < outer; j += LANES) {
            vec sums[TOGETHER] = {{0}};
            for (int64_t i = 0; i < inner; i++) {
                const vec shares = *(const vec *)(matrix + i * padded(outer) + j);
                for (int k = 0; k < TOGETHER; k++) sums[k] += shares * rows[k][i];
            }
            for (int64_t k = 0; k < count; k++) {
                real *target = to + (first + k) * outer + j;
                if (outer - j >= LANES)
                    *(vec *)target = sums[k];
                else
                    for (int64_t x = 0; x < outer - j; x++) target[x] = sums[k][x];
            }
        }
    }
}

/* A plane bin by bin: the rows of a bin are added up first, a vector of columns at a time. */
static void forward_plane(const axis_t *axes, const real *from, real *to, real *row) {
    const int64_t height = axes[1].size, width = axes[2].size;
    for (int64_t a = 0; a < axes[0].bins; a++)
        for (int64_t b = 0; b < axes[1].bins; b++) {
            for (int64_t x = 0; x < width; x++) row[x] = 0;
            for (int64_t z = axes[0].start[a]; z < axes[0].stop[a]; z++)
                for (int64_t y = axes[1].start[b]; y < axes[1].stop[b]; y++) {
                    const real *line = from + (z * height + y) * width;
                    for (int64_t x = 0; x < width; x++) row[x] += line[x];
                }
            for (int64_t c = 0; c < axes[2].bins; c++) {
                real sum = 0;
                for (int64_t x = axes[2].start[c]; x < axes[2].stop[c]; x++) sum += row[x];
                *to++ = sum * share_of(axes, a, b, c);
            }
        }
}

static void backward_plane(const axis_t *axes, const real *from, real *to, real *rows) {
    const int64_t height = axes[1].size, width = axes[2].size;
    real *row = rows;
    for (int64_t a = 0; a < axes[0].bins; a++)
        for (int64_t b = 0; b < axes[1].bins; b++, row += width) {
            for (int64_t x = 0; x < width; x++) row[x] = 0;
            for (int64_t c = 0; c < axes[2].bins; c++) {
                const real share = *from++ * share_of(axes, a, b, c);
                for (int64_t x = axes[2].start[c]; x < axes[2].stop[c]; x++) row[x] += share;
            }
        }
    for (int64_t i = 0; i < axes[0].size * height * width; i++) to[i] = 0;
    row = rows;
    for (int64_t a = 0; a < axes[0].bins; a++)
        for (int64_t b = 0; b < axes[1].bins; b++, row += width)
            for (int64_t z = axes[0].start[a]; z < axes[0].stop[a]; z++)
                for (int64_t y = axes[1].start[b]; y < axes[1].stop[b]; y++) {
                    real *line = to + (z * height + y) * width;
                    for (int64_t x = 0; x < width; x++) line[x] += row[x];
                }
}

static int all_finite(const real *numbers, int64_t count) {
    int finite = 1; /* not a number minus itself, nor infinity minus itself, is zero */
    for (int64_t i = 0; i < count; i++) finite &= numbers[i] - numbers[i] == 0;
    return finite;
}

typedef void plane_function(const axis_t *, const real *, real *, real *);

/* Planes one by one: all, or those whose result by a matrix is not finite. A share of zero times infinity is not zero, so
 * that one such number spoils a whole product, and not only the bins that cover it. */
static void by_planes(plane_function *run, int only_spoilt, int64_t planes, const int64_t *size, const int64_t *bins,
                      int64_t threads, int64_t source_plane, const real *source, int64_t result_plane, real *result,
                      int64_t thread_elements, real *workspace) {
#pragma omp parallel num_threads(threads)
    {
        axis_t axes[3];
        for (int axis = 0; axis < 3; axis++) bin(size[axis], bins[axis], &axes[axis]);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < planes; i++)
            if (!only_spoilt || !all_finite(result + i * result_plane, result_plane))
                run(axes, source + i * source_plane, result + i * result_plane,
                    workspace + thread_number() * thread_elements);
    }
}

static int64_t product(const int64_t *sizes) { return sizes[0] * sizes[1] * sizes[2]; }
static int is_small(const int64_t *size) { return product(size) <= SMALL; }
static int64_t matrix_elements(const int64_t *size, const int64_t *bins) {
    return is_small(size) ? padded(product(size)) * padded(product(bins)) : 0;
}

/* Workspace of a thread: rows of columns. */
static int64_t rows_elements(const int64_t *size, const int64_t *bins) { return bins[0] * bins[1] * size[2]; }

/* Workspace that both directions need. */
int64_t workspace_elements(const int64_t *size, const int64_t *bins, int64_t threads) {
    return matrix_elements(size, bins) + threads * rows_elements(size, bins);
}

/* From planes of the input to those of the output, or back. */
static void run(plane_function *plane, int64_t planes, const int64_t *size, const int64_t *bins, int64_t threads,
                const real *source, real *result, real *workspace) {
    const int forward = plane == forward_plane, small = is_small(size);
    const int64_t inner = product(forward ? size : bins), outer = product(forward ? bins : size);
    if (small) {
        fill(size, bins, forward, workspace);
        multiply(planes, inner, outer, threads, source, workspace, result);
    }
    by_planes(plane, small, planes, size, bins, threads, inner, source, outer, result, rows_elements(size, bins),
              workspace + matrix_elements(size, bins));
}

/* Input planes x size to output planes x bins. */
void forward(int64_t planes, const int64_t *size, const int64_t *bins, int64_t threads, const real *input, real *output,
             real *workspace) {
    run(forward_plane, planes, size, bins, threads, input, output, workspace);
}

/* The gradient of the input from that of the output. */
void backward(int64_t planes, const int64_t *size, const int64_t *bins, int64_t threads, const real *grad_output,
              real *grad_input, real *workspace) {
    run(backward_plane, planes, size, bins, threads, grad_output, grad_input, workspace);
}

/* Some channels of a bin: their sum over its positions, of an input whose channels lie last. */
static void sum_bin(const axis_t *axes, int64_t a, int64_t b, int64_t c, int64_t channels, const real *from, vec *sum) {
    vec sums[2] = {{0}};
    for (int64_t z = axes[0].start[a]; z < axes[0].stop[a]; z++)
        for (int64_t y = axes[1].start[b]; y < axes[1].stop[b]; y++) {
            const real *at = from + ((z * axes[1].size + y) * axes[2].size + axes[2].start[c]) * channels;
            int64_t left = axes[2].stop[c] - axes[2].start[c];
            for (; left > 1; left -= 2, at += 2 * channels)
                sums[0] += *(const vec *)at, sums[1] += *(const vec *)(at + channels);
            if (left) sums[0] += *(const vec *)at;
        }
    *sum = sums[0] + sums[1];
}

/* The same for fewer channels than a vector has. */
static void sum_rest(const axis_t *axes, int64_t a, int64_t b, int64_t c, int64_t channels, int64_t count, const real *from,
                     vec *sum) {
    *sum = (vec){0};
    for (int64_t z = axes[0].start[a]; z < axes[0].stop[a]; z++)
        for (int64_t y = axes[1].start[b]; y < axes[1].stop[b]; y++)
            for (int64_t x = axes[2].start[c]; x < axes[2].stop[c]; x++)
                for (int64_t k = 0; k < count; k++)
                    (*sum)[k] += from[((z * axes[1].size + y) * axes[2].size + x) * channels + k];
}

/* Channels last: samples x size x channels to samples x channels x bins. */
void forward_last(int64_t samples, int64_t channels, const int64_t *size, const int64_t *bins, int64_t threads,
                  const real *input, real *output, real *workspace) {
    (void)workspace;
    const int64_t chunks = padded(channels) / LANES;
#pragma omp parallel num_threads(threads)
    {
        axis_t axes[3];
        for (int axis = 0; axis < 3; axis++) bin(size[axis], bins[axis], &axes[axis]);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < samples * chunks; task++) {
            const int64_t n = task / chunks, first = task % chunks * LANES;
            const int64_t count = channels - first < LANES ? channels - first : LANES;
            const real *from = input + n * product(size) * channels + first;
            real *to = output + (n * channels + first) * product(bins);
            for (int64_t i = 0; i < product(bins); i++) {
                const int64_t a = i / bins[2] / bins[1], b = i / bins[2] % bins[1], c = i % bins[2];
                vec sum;
                if (count == LANES)
                    sum_bin(axes, a, b, c, channels, from, &sum);
                else
                    sum_rest(axes, a, b, c, channels, count, from, &sum);
                const real share = share_of(axes, a, b, c);
                for (int64_t k = 0; k < count; k++) to[k * product(bins) + i] = sum[k] * share;
            }
        }
    }
}

/* The first and the last bin that cover a position. */
typedef struct {
    int64_t first, last;
} range_t;

static void find_ranges(const axis_t *axis, range_t *ranges) {
    for (int64_t i = axis->bins - 1; i >= 0; i--)
        for (int64_t x = axis->start[i]; x < axis->stop[i]; x++) ranges[x].first = i;
    for (int64_t i = 0; i < axis->bins; i++)
        for (int64_t x = axis->start[i]; x < axis->stop[i]; x++) ranges[x].last = i;
}

static int same(range_t one, range_t other) { return one.first == other.first && one.last == other.last; }

/* Elements of the ranges of all axes. */
static int64_t range_elements(const int64_t *size) {
    return (size[0] + size[1] + size[2]) * (int64_t)(sizeof(range_t) / sizeof(real));
}

/* Workspace of a thread: the ranges, and the shares of all bins. */
static int64_t thread_elements(int64_t channels, const int64_t *size, const int64_t *bins) {
    return range_elements(size) + padded(product(bins) * channels);
}

int64_t workspace_elements_last(int64_t channels, const int64_t *size, const int64_t *bins, int64_t threads) {
    return threads * thread_elements(channels, size, bins);
}

/* The gradient of a sample. Positions that the same bins cover have the same, and so do rows. */
static void spread(const axis_t *axes, range_t *const *ranges, int64_t channels, const real *shares, real *to) {
    const int64_t rows = axes[0].size * axes[1].size, row = axes[2].size * channels;
    for (int64_t i = 0; i < rows; i++, to += row) {
        const int64_t z = i / axes[1].size, y = i % axes[1].size;
        if (y > 0 && same(ranges[1][y], ranges[1][y - 1])) {
            memcpy(to, to - row, row * sizeof(real));
            continue;
        }
        for (int64_t x = 0; x < axes[2].size; x++) {
            real *at = to + x * channels;
            if (x > 0 && same(ranges[2][x], ranges[2][x - 1])) {
                memcpy(at, at - channels, channels * sizeof(real));
                continue;
            }
            for (int64_t k = 0; k < channels; k++) at[k] = 0;
            for (int64_t a = ranges[0][z].first; a <= ranges[0][z].last; a++)
                for (int64_t b = ranges[1][y].first; b <= ranges[1][y].last; b++)
                    for (int64_t c = ranges[2][x].first; c <= ranges[2][x].last; c++) {
                        const real *share = shares + ((a * axes[1].bins + b) * axes[2].bins + c) * channels;
                        for (int64_t k = 0; k < channels; k++) at[k] += share[k];
                    }
        }
    }
}

/* Channels last: the gradient of the input from that of the output, samples x bins x channels both. */
void backward_last(int64_t samples, int64_t channels, const int64_t *size, const int64_t *bins, int64_t threads,
                   const real *grad_output, real *grad_input, real *workspace) {
    const int64_t results = product(bins);
#pragma omp parallel num_threads(threads)
    {
        real *own = workspace + thread_number() * thread_elements(channels, size, bins);
        real *shares = own + range_elements(size);
        range_t *ranges[3] = {(range_t *)own};
        ranges[1] = ranges[0] + size[0], ranges[2] = ranges[1] + size[1];
        axis_t axes[3];
        for (int axis = 0; axis < 3; axis++) {
            bin(size[axis], bins[axis], &axes[axis]);
            find_ranges(&axes[axis], ranges[axis]);
        }
#pragma omp for schedule(static)
        for (int64_t n = 0; n < samples; n++) {
            for (int64_t i = 0; i < results; i++) {
                const real share = share_of(axes, i / bins[2] / bins[1], i / bins[2] % bins[1], i % bins[2]);
                const real *from = grad_output + (n * results + i) * channels;
                for (int64_t k = 0; k < channels; k++) shares[i * channels + k] = from[k] * share;
            }
            spread(axes, ranges, channels, shares, grad_input + n * product(size) * channels);
        }
    }
}
