/* The products of integers.h on a processor's matrix unit, AMX: one instruction takes 64 rows for 16
   tokens and 16 columns, where one of AVX-512 VNNI takes 2 rows for one token and 16 columns.

   The unit multiplies bytes. An activation of 16 bits is 256 times its signed high byte plus its
   unsigned low byte, and each byte is multiplied on its own. Sums are exact, so the total is the same,
   bit for bit, as with pairs of 16-bit integers. */

#ifndef GROKFETCH_MATRIX_UNIT_H
#define GROKFETCH_MATRIX_UNIT_H

#include <string.h>

#include "integers.h"

enum {
    SIDE = 16,             /* tokens, columns, or groups of four rows in a tile of the unit */
    DEEP = 64,             /* rows in a tile: bytes in one of its lines */
    UNIT_TILE = SIDE * DEEP /* bytes */
};

#if defined(__AMX_INT8__) && defined(__AVX512VBMI__) && defined(__linux__)

#include <stdatomic.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Whether this process may use the unit. Linux wants to be asked first, because a thread that uses it
   has more state to save. */
static int has_matrix_unit(void) {
    enum { ASK = 0x1023, TILES = 18 }; /* ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA */
    static atomic_int known;           /* 1 for no, 2 for yes */
    if (!atomic_load(&known)) atomic_store(&known, syscall(SYS_arch_prctl, ASK, TILES) ? 1 : 2);
    return atomic_load(&known) == 2;
}

/* A thread sets up the unit before its work, and releases it afterwards. */
static void begin_unit(void) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t lines[16];
    } shape = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) shape.bytes[tile] = DEEP, shape.lines[tile] = SIDE;
    _tile_loadconfig(&shape);
}

static void end_unit(void) { _tile_release(); }

/* Writes four rows of TILE columns, starting at column TILE * t, into a panel whose blocks have
   `block` rows. For each SIDE columns the panel holds one tile of rows after another; in the lines
   of a tile, the four bytes of a column lie side by side. */
INLINE void unit_lines(const int8_t *const rows[4], int8_t *panel, int64_t block, int64_t t,
                       int64_t four) {
    __m512i row[4], columns = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    columns = _mm512_mullo_epi32(columns, _mm512_set1_epi32(0x01010101));
    columns = _mm512_add_epi8(columns, _mm512_set1_epi32(0x40004000)); /* from a row, from the next */
    for (int r = 0; r < 4; r++) row[r] = _mm512_loadu_si512(rows[r]);
    int8_t *to = panel + t * TILE * block + four * DEEP;
    for (int side = 0; side < TILE; side += SIDE) {
        __m512i upper = _mm512_permutex2var_epi8(row[0], columns, row[1]);
        __m512i lower = _mm512_permutex2var_epi8(row[2], columns, row[3]);
        _mm512_store_si512(to + side * block, _mm512_mask_blend_epi16(0xaaaaaaaa, upper, lower));
        columns = _mm512_add_epi8(columns, _mm512_set1_epi8(SIDE));
    }
}

/* Adds the products of a block of `block` rows to sums[token][column], for up to SIDE tokens and TILE
   columns of a panel. `x` holds the planes of the tokens: for each tile the high bytes, then the low
   ones. */
INLINE void unit_tiles(int64_t tokens, const int16_t *x, const float *factors, const int8_t *panel,
                       int64_t block, float *sums, int64_t width) {
    const uint8_t *planes = (const uint8_t *)x;
    int32_t found[4][SIDE][SIDE] __attribute__((aligned(LINE)));
    for (int pair = 0; pair < TILE; pair += 2 * SIDE) {
        const int8_t *left = panel + pair * block, *right = left + SIDE * block;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t at = 0; at < SIDE * block; at += UNIT_TILE) {
            _tile_loadd(4, planes + 2 * at, DEEP);
            _tile_loadd(5, planes + 2 * at + UNIT_TILE, DEEP);
            _tile_loadd(6, left + at, DEEP);
            _tile_loadd(7, right + at, DEEP);
            _tile_dpbssd(0, 4, 6);
            _tile_dpbssd(1, 4, 7);
            _tile_dpbusd(2, 5, 6);
            _tile_dpbusd(3, 5, 7);
        }
        _tile_stored(0, found[0], DEEP);
        _tile_stored(1, found[1], DEEP);
        _tile_stored(2, found[2], DEEP);
        _tile_stored(3, found[3], DEEP);
        for (int64_t t = 0; t < tokens; t++)
            for (int side = 0; side < 2; side++) {
                integers high = *(integers *)found[side][t], low = *(integers *)found[2 + side][t];
                *(vector *)(sums + t * width + pair + side * SIDE) +=
                    factors[t] * __builtin_convertvector((high << 8) + low, vector);
            }
    }
}

#else

/* Without a matrix unit, the other functions are not called. */
static int has_matrix_unit(void) { return 0; }
static void begin_unit(void) {}
static void end_unit(void) {}
INLINE void unit_lines(const int8_t *const rows[4], int8_t *panel, int64_t block, int64_t t,
                       int64_t four) {
    (void)rows, (void)panel, (void)block, (void)t, (void)four;
}
INLINE void unit_tiles(int64_t tokens, const int16_t *x, const float *factors, const int8_t *panel,
                       int64_t block, float *sums, int64_t width) {
    (void)tokens, (void)x, (void)factors, (void)panel, (void)block, (void)sums, (void)width;
}
#endif

/* Writes a token's activations, as integers, to line `token` of the planes of a block. */
static void split(const int16_t *from, int64_t rows, int64_t token, int16_t *x) {
    for (int64_t row = 0; row < rows; row++) {
        uint8_t *plane = (uint8_t *)x + row / DEEP * 2 * UNIT_TILE + token * DEEP + row % DEEP;
        plane[0] = (uint8_t)(from[row] >> 8);
        plane[UNIT_TILE] = (uint8_t)from[row];
    }
}

#endif
