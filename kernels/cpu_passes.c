/* The passes over a (rows, tokens) tile of logits on a CPU, each as one walk over memory: cpu_passes.py calls them.
 *
 * Loops run along a row, token by token, so that a compiler vectorises them for whatever the machine has. A row belongs
 * to one vocabulary entry.
 */

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __SSE__
#include <xmmintrin.h>
#endif

/* Sums over rows are formed of 32 at a time, then of a tile, then of the vocabulary: added one by one, 256 thousand
 * probabilities would lose three digits of fp32. */
enum { BLOCK_ROWS = 32, PANEL = 512 };

/* Squares of small probabilities are subnormal, for which many x86 processors take a hundred times as long: between
 * these two they are zeros. Other processors have no such cost. */
static inline unsigned begin_flushing(void)
{
#ifdef __SSE__
    const unsigned before = _mm_getcsr();
    _mm_setcsr(before | 0x8040);
    return before;
#else
    return 0;
#endif
}

static inline void end_flushing(const unsigned before)
{
#ifdef __SSE__
    _mm_setcsr(before);
#else
    (void)before;
#endif
}

/* eˣ = 2ⁿ · eʳ with n = round(x / ln 2) and |r| ≤ ln 2 / 2, where eʳ ≈ 1 + r + r² q(r); q is the polynomial of least
 * relative error, 3e-9, so that what remains is rounding. ln 2 is split in two, the first part with few enough bits
 * that n times it is exact. A sum with 1.5 · 2²³ rounds to an integer and has it in its last bits, from where it goes
 * into an exponent. Below 2^-126.5 the result is 0, above 2^127.5 infinite, whatever all this makes of such an x; NaN
 * stays NaN. */
static inline float exponential(const float x)
{
    const float round = 12582912.0f;
    const float rounded = fmaf(x, 1.44269504f, round), n = rounded - round;
    const float r = fmaf(n, -1.42860677e-6f, fmaf(n, -0.693145752f, x));
    float q = 1.38145988e-3f;
    q = fmaf(q, r, 8.36871658e-3f);
    q = fmaf(q, r, 4.16683890e-2f);
    q = fmaf(q, r, 1.66665211e-1f);
    q = fmaf(q, r, 4.99999970e-1f);
    uint32_t bits;
    memcpy(&bits, &rounded, sizeof bits);
    bits = (bits + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    const float e = (1.0f + fmaf(q, r * r, r)) * power;
    return x < -87.6831131f ? 0.0f : x > 88.3762589f ? INFINITY : e;
}

static inline void exp_and_sum(const int kinds, float *restrict logits, const int64_t rows, const int64_t tokens,
                               const float *restrict shift, float *restrict sums)
{
    for (int64_t first = 0; first < tokens; first += PANEL) {
        const int64_t width = tokens - first < PANEL ? tokens - first : PANEL;
        float tile[3][PANEL] = {{0}};
        for (int64_t start = 0; start < rows; start += BLOCK_ROWS) {
            const int64_t stop = rows - start < BLOCK_ROWS ? rows : start + BLOCK_ROWS;
            float block[3][PANEL] = {{0}};
            for (int64_t row = start; row < stop; row++) {
                float *restrict z = logits + row * tokens + first;
                for (int64_t t = 0; t < width; t++) {
                    const float x = z[t] - shift[first + t];
                    const float e = exponential(x);
                    z[t] = e;
                    block[0][t] += e;
                    if (kinds > 1)
                        block[1][t] += e * e;
                    if (kinds > 2)
                        block[2][t] += e > 0 ? x * e : 0; /* −∞ · 0 would be NaN */
                }
            }
            for (int k = 0; k < kinds; k++)
                for (int64_t t = 0; t < width; t++)
                    tile[k][t] += block[k][t];
        }
        for (int k = 0; k < kinds; k++)
            for (int64_t t = 0; t < width; t++)
                sums[k * tokens + first + t] += tile[k][t];
    }
}

/* logits ← e = exp(logits − shift); to the first ``kinds`` rows of sums (3, tokens) are added, over the tile's rows,
 * Σ e, Σ e² and Σ (logits − shift) e. */
void exp_sums(int64_t kinds, float *logits, int64_t rows, int64_t tokens, const float *shift, float *sums)
{
    const unsigned before = begin_flushing();
    if (kinds == 1)
        exp_and_sum(1, logits, rows, tokens, shift, sums);
    else if (kinds == 2)
        exp_and_sum(2, logits, rows, tokens, shift, sums);
    else
        exp_and_sum(3, logits, rows, tokens, shift, sums);
    end_flushing(before);
}

/* Of each group of tokens and each row: mass ← Σ average · e, square ← Σ weight · e², and where that exceeds the row's
 * threshold, the row's number and its values of e are appended to what the group keeps. */
void keep_columns(const float *restrict exp, int64_t rows, int64_t tokens, int64_t first_row,
                  int64_t groups, const int64_t *restrict bounds, /* (groups + 1), of tokens */
                  const float *restrict average, const float *restrict weight, /* (tokens) */
                  const float *restrict threshold, float *restrict mass, float *restrict square,
                  int64_t stride, /* of the three before: (groups, stride) */
                  int64_t *restrict counts, int64_t *restrict columns, /* (groups), (groups, capacity) */
                  float *restrict kept, int64_t capacity, int64_t width) /* (groups, capacity, width) */
{
    const unsigned before = begin_flushing();
    for (int64_t row = 0; row < rows; row++)
        for (int64_t g = 0; g < groups; g++) {
            const float *restrict e = exp + row * tokens;
            float averaged = 0, squared = 0;
#pragma omp simd reduction(+ : averaged, squared)
            for (int64_t t = bounds[g]; t < bounds[g + 1]; t++) {
                averaged += average[t] * e[t];
                squared += weight[t] * (e[t] * e[t]);
            }
            mass[g * stride + row] = averaged;
            square[g * stride + row] = squared;
            if (squared > threshold[g * stride + row]) {
                const int64_t slot = g * capacity + counts[g]++;
                columns[slot] = first_row + row;
                memcpy(kept + slot * width, e + bounds[g], (bounds[g + 1] - bounds[g]) * sizeof *e);
            }
        }
    end_flushing(before);
}
