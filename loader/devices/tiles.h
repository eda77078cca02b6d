/* Sums of products, kept in registers, for some tokens and some columns; for any processor. */

#ifndef GROKFETCH_TILES_H
#define GROKFETCH_TILES_H

#include <stdint.h>

#if defined(__AVX512F__)
#include <immintrin.h>
enum { LANES = 16, VECTORS = 4 };
#elif defined(__AVX2__)
#include <immintrin.h>
enum { LANES = 8, VECTORS = 2 };
#else
enum { LANES = 4, VECTORS = 4 };
#endif

enum {
    TILE = LANES * VECTORS, /* columns whose sums are in registers */
    AT_ONCE = 6,            /* tokens whose sums are in registers */
    ROWS = 8,               /* rows read side by side: as many as a cache set has lines */
    LINE = 64               /* bytes in a cache line */
};

typedef float vector __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline))

INLINE vector widened(const int8_t *from) {
#if defined(__AVX512F__)
    return (vector)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)from)));
#elif defined(__AVX2__)
    return (vector)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)from)));
#else
    vector to;
    for (int lane = 0; lane < LANES; lane++) to[lane] = (float)from[lane];
    return to;
#endif
}

/* Adds the products of `rows` rows of a tile to sums[token][column]. The weights are int8; if `weights`
   is null, they are floats in `panel`. */
INLINE void tile(int tokens, const float *x, int64_t height, const int8_t *weights,
                 const float *panel, int64_t stride, int64_t rows, float *sums, int64_t width) {
    vector sum[AT_ONCE][VECTORS];
    for (int t = 0; t < tokens; t++)
        for (int v = 0; v < VECTORS; v++) sum[t][v] = *(const vector *)(sums + t * width + v * LANES);
    for (int64_t row = 0; row < rows; row++) {
        vector values[VECTORS];
        if (weights) {
            const int8_t *from = weights + row * stride;
            /* To the second-level cache: in the first, lines so far apart evict each other. */
            __builtin_prefetch(from + ROWS * stride, 0, 2);
            for (int v = 0; v < VECTORS; v++) values[v] = widened(from + v * LANES);
        } else {
            for (int v = 0; v < VECTORS; v++)
                values[v] = *(const vector *)(panel + row * TILE + v * LANES);
        }
        for (int t = 0; t < tokens; t++) {
            float factor = x[t * height + row];
            for (int v = 0; v < VECTORS; v++) sum[t][v] += factor * values[v];
        }
    }
    for (int t = 0; t < tokens; t++)
        for (int v = 0; v < VECTORS; v++) *(vector *)(sums + t * width + v * LANES) = sum[t][v];
}

/* The same for any number of tokens up to AT_ONCE; each number has its own code, with its sums in
   registers. */
INLINE void tiles(int64_t tokens, const float *x, int64_t height, const int8_t *weights,
                  const float *panel, int64_t stride, int64_t rows, float *sums, int64_t width) {
    switch (tokens) {
#define CASE(count)                                                                   \
    case count:                                                                       \
        tile(count, x, height, weights, panel, stride, rows, sums, width);            \
        break;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#undef CASE
    }
}

#endif
