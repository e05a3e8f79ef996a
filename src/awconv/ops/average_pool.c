/* Adaptive average pooling and its gradient, in one pass. Compiled at first use by build.py, for REAL float or double.
 *
 * Bin i of an axis covers the positions floor(i * size / bins) to ceil((i + 1) * size / bins); bins may overlap. The rows
 * of a bin are added up first, which is done for a vector of columns at a time.
 */
#include <stdint.h>
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

static int64_t start_of(int64_t bin, int64_t bins, int64_t size) { return bin * size / bins; }
static int64_t stop_of(int64_t bin, int64_t bins, int64_t size) { return ((bin + 1) * size + bins - 1) / bins; }

/* Input planes x size to output planes x bins; the workspace holds a row for each thread. */
void forward(int64_t planes, const int64_t *size, const int64_t *bins, int64_t threads, const real *input, real *output,
             real *workspace) {
    const int64_t width = size[2], plane = size[0] * size[1] * width;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < planes; i++) {
        real *row = workspace + thread_number() * width, *to = output + i * bins[0] * bins[1] * bins[2];
        for (int64_t a = 0; a < bins[0]; a++)
            for (int64_t b = 0; b < bins[1]; b++) {
                const int64_t top = start_of(a, bins[0], size[0]), bottom = stop_of(a, bins[0], size[0]);
                const int64_t first = start_of(b, bins[1], size[1]), last = stop_of(b, bins[1], size[1]);
                for (int64_t x = 0; x < width; x++) row[x] = 0;
                for (int64_t z = top; z < bottom; z++)
                    for (int64_t y = first; y < last; y++) {
                        const real *from = input + i * plane + (z * size[1] + y) * width;
                        for (int64_t x = 0; x < width; x++) row[x] += from[x];
                    }
                for (int64_t c = 0; c < bins[2]; c++) {
                    const int64_t left = start_of(c, bins[2], width), right = stop_of(c, bins[2], width);
                    real sum = 0;
                    for (int64_t x = left; x < right; x++) sum += row[x];
                    *to++ = sum / (real)((bottom - top) * (last - first) * (right - left));
                }
            }
    }
}

/* The gradient of the input from that of the output; the workspace holds a row of every bin for each thread. */
void backward(int64_t planes, const int64_t *size, const int64_t *bins, int64_t threads, const real *grad_output,
              real *grad_input, real *workspace) {
    const int64_t width = size[2], plane = size[0] * size[1] * width;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < planes; i++) {
        real *rows = workspace + thread_number() * bins[0] * bins[1] * width;
        const real *from = grad_output + i * bins[0] * bins[1] * bins[2];
        for (int64_t k = 0; k < bins[0] * bins[1]; k++) {
            const int64_t a = k / bins[1], b = k % bins[1];
            const int64_t depth = stop_of(a, bins[0], size[0]) - start_of(a, bins[0], size[0]);
            const int64_t height = stop_of(b, bins[1], size[1]) - start_of(b, bins[1], size[1]);
            real *row = rows + k * width;
            for (int64_t x = 0; x < width; x++) row[x] = 0;
            for (int64_t c = 0; c < bins[2]; c++) {
                const int64_t left = start_of(c, bins[2], width), right = stop_of(c, bins[2], width);
                const real share = *from++ / (real)(depth * height * (right - left));
                for (int64_t x = left; x < right; x++) row[x] += share;
            }
        }
        real *to = grad_input + i * plane;
        for (int64_t j = 0; j < plane; j++) to[j] = 0;
        for (int64_t k = 0; k < bins[0] * bins[1]; k++) {
            const int64_t a = k / bins[1], b = k % bins[1];
            const real *row = rows + k * width;
            for (int64_t z = start_of(a, bins[0], size[0]); z < stop_of(a, bins[0], size[0]); z++)
                for (int64_t y = start_of(b, bins[1], size[1]); y < stop_of(b, bins[1], size[1]); y++)
                    for (int64_t x = 0; x < width; x++) to[(z * size[1] + y) * width + x] += row[x];
        }
    }
}
