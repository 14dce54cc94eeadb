/* Forward and backward passes of the quantizers, each in one pass over memory.

   Compiled twice by itself, for float and for double. The formulas are those of quant/grid.py and quant/quantizers/,
   operation for operation: division by the step, rounding half to even, comparisons that let NaN through, and products
   with 0 or 1, so that every element equals the one of the eager operations to the last bit. No contraction into fused
   multiply-adds (-ffp-contract=off).

   A tensor is seen as (outer, channels, inner), channel c having its own level. Sums are taken in a fixed order whatever
   the number of threads or the width of the vector unit: LANES partial sums within a block, the blocks in double. */

#ifndef T

#include <math.h>
#include <stdint.h>
#include <stdlib.h>

enum { BLOCK = 4096, LANES = 16, SUMS = 3 };
enum { CLIP, PACT, OFFSET }; /* what the level gradient is made of */
enum { RESIDUAL, UNDER, OVER };

#define T float
#define ROUND rintf
#define NAME(name) name##_float
#include "quantize.c"
#undef T
#undef ROUND
#undef NAME
#define T double
#define ROUND rint
#define NAME(name) name##_double
#include "quantize.c"

#else

typedef struct {
    T step, lowest, highest; /* the step, and the ends of the grid in steps */
    T low, high;             /* the ends of the range */
} NAME(range);

static NAME(range) NAME(range_of)(T level, double lowest, double highest) {
    T bound = level < 0 ? -level : level;
    bound = bound < (T)1e-12 ? (T)1e-12 : bound;
    return (NAME(range)){bound / (T)highest, (T)lowest, (T)highest, bound * (T)(lowest / highest), bound};
}

static NAME(range) NAME(range_with_offset)(T step, T offset, double top) {
    T lowest = ROUND(offset / step);
    lowest = lowest < (T)-top ? (T)-top : lowest > 0 ? 0 : lowest;
    T highest = lowest + (T)top;
    return (NAME(range)){step, lowest, highest, step * lowest, step * highest};
}

static inline T NAME(clamp)(T x, T lowest, T highest) {
    x = x < lowest ? lowest : x;
    return x > highest ? highest : x;
}

static inline T NAME(quantized)(T x, NAME(range) r, int stride) {
    T scaled = x / r.step;
    if (stride == 1) return NAME(clamp)(ROUND(scaled), r.lowest, r.highest) * r.step;
    return (NAME(clamp)(ROUND((scaled + r.highest) / 2), 0, r.highest) * 2 - r.highest) * r.step;
}

static inline __attribute__((always_inline)) void NAME(forward_block)(
    const T *restrict x, T *restrict out, int64_t n, NAME(range) r, int stride) {
    for (int64_t i = 0; i < n; i++) out[i] = NAME(quantized)(x[i], r, stride);
}

/* LANES elements or fewer: the gradient of each, and its terms of the sums. */
static inline __attribute__((always_inline)) void NAME(backward_lanes)(
    const T *restrict grad, const T *restrict x, T *restrict grad_x, int64_t n, NAME(range) r, int stride, int kind,
    T sums[SUMS][LANES]) {
    for (int64_t j = 0; j < n; j++) {
        T inside = (x[j] <= r.high ? (T)1 : 0) * (x[j] >= r.low ? (T)1 : 0);
        T under = x[j] < r.low ? (T)1 : 0;
        T over = (kind == PACT ? x[j] >= r.high : x[j] > r.high) ? (T)1 : 0;
        T passed = grad[j] * inside;
        grad_x[j] = passed;
        if (kind == CLIP) sums[RESIDUAL][j] += (NAME(quantized)(x[j], r, stride) - x[j] * inside) * grad[j];
        if (kind == OFFSET) sums[RESIDUAL][j] += passed * (NAME(quantized)(x[j], r, stride) - x[j]);
        if (kind != CLIP) {
            sums[UNDER][j] += grad[j] * under;
            sums[OVER][j] += grad[j] * over;
        }
    }
}

static inline __attribute__((always_inline)) void NAME(backward_block)(
    const T *restrict grad, const T *restrict x, T *restrict grad_x, int64_t n, NAME(range) r, int stride, int kind,
    double totals[SUMS]) {
    T sums[SUMS][LANES] = {{0}};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        NAME(backward_lanes)(grad + i, x + i, grad_x + i, LANES, r, stride, kind, sums);
    NAME(backward_lanes)(grad + i, x + i, grad_x + i, n - i, r, stride, kind, sums);
    for (int s = 0; s < SUMS; s++)
        for (int j = 0; j < LANES; j++) totals[s] += sums[s][j];
}

static NAME(range) NAME(range_at)(const T *level, const T *offset, int64_t channel, double lowest, double highest) {
    return offset ? NAME(range_with_offset)(level[channel], offset[channel], highest)
                  : NAME(range_of)(level[channel], lowest, highest);
}

/* With an offset, ``level`` is the step and ``highest`` the highest code counted from the lowest. */
void NAME(forward)(const T *x, T *out, const T *level, const T *offset, int64_t outer, int64_t channels, int64_t inner,
                   double lowest, double highest, int stride, int threads) {
    int64_t blocks = (inner + BLOCK - 1) / BLOCK, tasks = outer * channels * blocks;
#pragma omp parallel for num_threads(threads) if (outer * channels * inner > 8 * BLOCK)
    for (int64_t task = 0; task < tasks; task++) {
        int64_t row = task / blocks, start = task % blocks * BLOCK;
        int64_t n = inner - start < BLOCK ? inner - start : BLOCK;
        NAME(range) r = NAME(range_at)(level, offset, row % channels, lowest, highest);
        const T *from = x + row * inner + start;
        T *to = out + row * inner + start;
        if (stride == 1) NAME(forward_block)(from, to, n, r, 1);
        else NAME(forward_block)(from, to, n, r, 2);
    }
}

/* ``sums`` is (SUMS, channels); its first row is the gradient of the level if ``kind`` is CLIP. Returns 0, or 1 if memory is
   exhausted. */
int NAME(backward)(const T *grad, const T *x, T *grad_x, const T *level, const T *offset, T *sums, int64_t outer,
                   int64_t channels, int64_t inner, double lowest, double highest, int stride, int kind, int threads) {
    int64_t blocks = (inner + BLOCK - 1) / BLOCK, tasks = outer * channels * blocks;
    double *totals = calloc(tasks ? tasks : 1, SUMS * sizeof(double));
    if (!totals) return 1;
#pragma omp parallel for num_threads(threads) if (outer * channels * inner > 8 * BLOCK)
    for (int64_t task = 0; task < tasks; task++) {
        int64_t row = task / blocks, start = task % blocks * BLOCK;
        int64_t n = inner - start < BLOCK ? inner - start : BLOCK, at = row * inner + start;
        NAME(range) r = NAME(range_at)(level, offset, row % channels, lowest, highest);
        double *total = totals + task * SUMS;
        if (kind == PACT) NAME(backward_block)(grad + at, x + at, grad_x + at, n, r, 1, PACT, total);
        else if (kind == OFFSET) NAME(backward_block)(grad + at, x + at, grad_x + at, n, r, 1, OFFSET, total);
        else if (stride == 1) NAME(backward_block)(grad + at, x + at, grad_x + at, n, r, 1, CLIP, total);
        else NAME(backward_block)(grad + at, x + at, grad_x + at, n, r, 2, CLIP, total);
    }
    for (int64_t channel = 0; channel < channels; channel++)
        for (int s = 0; s < SUMS; s++) {
            double sum = 0;
            for (int64_t o = 0; o < outer; o++)
                for (int64_t b = 0; b < blocks; b++) sum += totals[((o * channels + channel) * blocks + b) * SUMS + s];
            sums[s * channels + channel] = (T)sum;
        }
    for (int64_t channel = 0; channel < channels && kind == CLIP; channel++)
        sums[channel] = sums[channel] / NAME(range_of)(level[channel], lowest, highest).high * (level[channel] < 0 ? -1 : 1);
    free(totals);
    return 0;
}

#endif
