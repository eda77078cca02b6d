/* Products for many tokens in integers: activations of 16 bits with one factor for each token and
   block of rows, weights of 8 bits, and exact sums of 32 bits. Rounding changes an activation by at
   most 2^-16 of the largest one in its block.

   One instruction multiplies two 16-bit integers by two others and adds both products to a 32-bit
   sum, where an instruction for float32 does one. So two rows lie side by side. */

#ifndef GROKFETCH_INTEGERS_H
#define GROKFETCH_INTEGERS_H

#include <string.h>

#include "tiles.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

enum {
    BLOCK = 256,     /* rows that share a factor, a multiple of 64; up to 512, no sum of products of
                        2^15 * 2^7 overflows */
    LARGEST = 32767
};

typedef int32_t integers __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

/* LANES columns of two rows as pairs of 16-bit integers. */
INLINE integers paired(const int8_t *upper, const int8_t *lower) {
#if defined(__AVX512F__)
    integers one = (integers)_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)upper));
    integers two = (integers)_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)lower));
#elif defined(__AVX2__)
    integers one = (integers)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)upper));
    integers two = (integers)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)lower));
#else
    integers one, two;
    for (int lane = 0; lane < LANES; lane++) one[lane] = upper[lane], two[lane] = lower[lane];
#endif
    return (one & 0xffff) | two << 16;
}

/* Writes four rows of TILE columns, starting at column TILE * t, into a panel whose blocks have
   `block` rows. */
INLINE void pair_lines(const int8_t *const rows[4], int8_t *panel, int64_t block, int64_t t,
                       int64_t four) {
    int32_t *to = (int32_t *)panel + (t * block / 2 + 2 * four) * TILE;
    for (int pair = 0; pair < 2; pair++)
        for (int v = 0; v < VECTORS; v++)
            *(integers *)(to + pair * TILE + v * LANES) =
                paired(rows[2 * pair] + v * LANES, rows[2 * pair + 1] + v * LANES);
}

/* Adds to each sum the products of a pair of weights with a pair of activations. */
INLINE integers increased(integers sum, integers weights, integers pair) {
#if defined(__AVX512VNNI__)
    return (integers)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)weights, (__m512i)pair);
#elif defined(__AVX512BW__)
    return sum + (integers)_mm512_madd_epi16((__m512i)weights, (__m512i)pair);
#elif defined(__AVX512F__)
    return sum + (weights >> 16) * (pair >> 16) + (weights << 16 >> 16) * (pair << 16 >> 16);
#elif defined(__AVXVNNI__)
    return (integers)_mm256_dpwssd_avx_epi32((__m256i)sum, (__m256i)weights, (__m256i)pair);
#elif defined(__AVX2__)
    return sum + (integers)_mm256_madd_epi16((__m256i)weights, (__m256i)pair);
#elif defined(__SSE2__)
    return sum + (integers)_mm_madd_epi16((__m128i)weights, (__m128i)pair);
#else
    return sum + (weights >> 16) * (pair >> 16) + (weights << 16 >> 16) * (pair << 16 >> 16);
#endif
}

/* Writes the activations of a block as integers, and returns the factor to multiply them by. It is
   NaN or infinite if one of the activations is. */
static float rounded(const float *x, int64_t rows, int16_t *to) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer, in the low bits */
    int32_t most = 0;                /* Without their signs, floats and their bits have one order. */
    for (int64_t row = 0; row < rows; row++) {
        int32_t bits;
        memcpy(&bits, x + row, sizeof bits);
        bits &= 0x7fffffff;
        most = bits > most ? bits : most;
    }
    float largest;
    memcpy(&largest, &most, sizeof largest);
    float inverse = largest > 1e-30f ? LARGEST / largest : 0;
    for (int64_t row = 0; row < rows; row++) {
        float shifted = x[row] * inverse + magic;
        int32_t bits;
        memcpy(&bits, &shifted, sizeof bits);
        to[row] = (int16_t)bits;
    }
    if (rows % 2) to[rows] = 0;
    return largest / LARGEST;
}

/* Adds the products of `pairs` pairs of rows of a tile to sums[token][column]. */
INLINE void integer_tile(int tokens, const int16_t *x, int64_t height, const float *factors,
                         const int32_t *panel, int64_t pairs, float *sums, int64_t width) {
    integers sum[AT_ONCE][VECTORS];
    for (int t = 0; t < tokens; t++)
        for (int v = 0; v < VECTORS; v++) sum[t][v] = (integers){0};
    for (int64_t at = 0; at < pairs; at++) {
        integers weights[VECTORS];
        for (int v = 0; v < VECTORS; v++)
            weights[v] = *(const integers *)(panel + at * TILE + v * LANES);
        for (int t = 0; t < tokens; t++) {
            int32_t pair;
            memcpy(&pair, x + t * height + 2 * at, sizeof pair);
            for (int v = 0; v < VECTORS; v++)
                sum[t][v] = increased(sum[t][v], weights[v], (integers){0} + pair);
        }
    }
    for (int t = 0; t < tokens; t++)
        for (int v = 0; v < VECTORS; v++)
            *(vector *)(sums + t * width + v * LANES) +=
                factors[t] * __builtin_convertvector(sum[t][v], vector);
}

/* The same for any number of tokens up to AT_ONCE. */
INLINE void integer_tiles(int64_t tokens, const int16_t *x, int64_t height, const float *factors,
                          const int32_t *panel, int64_t pairs, float *sums, int64_t width) {
    switch (tokens) {
#define CASE(count)                                                            \
    case count:                                                                \
        integer_tile(count, x, height, factors, panel, pairs, sums, width);    \
        break;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#undef CASE
    }
}

#endif
