/* SHA-1 of several pieces, and SHA-256 of several blocks, at once: one in each 32-bit lane of the
   vector registers. Each step of one hash waits for the step before; several hashes do not wait for
   each other.

   Source: FIPS 180-4. */

#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

#if defined(__AVX512F__) && defined(__AVX512BW__)
#include <immintrin.h>
#define LANES 16
#define SUPPORTED (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw"))
#define AS(x) ((__m512i)(x))
#define OP(name) _mm512_##name
/* One vector with 16 bytes from each of four lanes, or from each of two. */
#define JOIN(a, b, c, d)                                                                       \
    _mm512_inserti32x4(                                                                        \
        _mm512_inserti32x4(_mm512_inserti32x4(_mm512_castsi128_si512(a), b, 1), c, 2), d, 3)
#define REVERSE _mm512_set4_epi32(0x0c0d0e0f, 0x08090a0b, 0x04050607, 0x00010203)
#elif defined(__AVX2__)
#include <immintrin.h>
#define LANES 8
#define SUPPORTED __builtin_cpu_supports("avx2")
#define AS(x) ((__m256i)(x))
#define OP(name) _mm256_##name
#define JOIN(a, b, c, d) _mm256_inserti128_si256(_mm256_castsi128_si256(a), b, 1)
#define REVERSE                                                                                \
    _mm256_broadcastsi128_si256(_mm_set_epi32(0x0c0d0e0f, 0x08090a0b, 0x04050607, 0x00010203))
#else
#define LANES 0
#endif

#if LANES

enum { BLOCK = 64 }; /* Bytes in a block of either hash. */

typedef uint32_t vector __attribute__((vector_size(4 * LANES)));

#define INLINE static inline __attribute__((always_inline))
#define LEFT(x, n) (((x) << (n)) | ((x) >> (32 - (n))))
#define RIGHT(x, n) LEFT(x, 32 - (n))
#define CHOICE(x, y, z) (((x) & (y)) | (~(x) & (z)))
#define MAJORITY(x, y, z) (((x) & (y)) | ((z) & ((x) | (y))))

static const uint32_t SHA1[5] = {0x67452301, 0xefcdab89, 0x98badcfe, 0x10325476, 0xc3d2e1f0};
static const uint32_t SHA256[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                   0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
static const uint32_t K[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

/* Loads the 16 big-endian words of a block in each lane: vector i holds word i of all lanes. */
INLINE void load(vector w[16], const uint8_t *data, int64_t stride) {
#pragma GCC unroll 4
    for (int part = 0; part < 4; part++) {
        vector row[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
#define QUARTER(lane) _mm_loadu_si128((const __m128i *)(data + (lane) * stride + 16 * part))
            row[i] = (vector)JOIN(QUARTER(i), QUARTER(i + 4), QUARTER(i + 8), QUARTER(i + 12));
        }
        vector a = (vector)OP(unpacklo_epi32)(AS(row[0]), AS(row[1]));
        vector b = (vector)OP(unpackhi_epi32)(AS(row[0]), AS(row[1]));
        vector c = (vector)OP(unpacklo_epi32)(AS(row[2]), AS(row[3]));
        vector d = (vector)OP(unpackhi_epi32)(AS(row[2]), AS(row[3]));
#define WORDS(kind, x, y) (vector)OP(shuffle_epi8)(OP(kind)(AS(x), AS(y)), REVERSE)
        w[4 * part] = WORDS(unpacklo_epi64, a, c);
        w[4 * part + 1] = WORDS(unpackhi_epi64, a, c);
        w[4 * part + 2] = WORDS(unpacklo_epi64, b, d);
        w[4 * part + 3] = WORDS(unpackhi_epi64, b, d);
    }
}

INLINE void sha1_block(vector *h, vector w[16]) {
    vector a = h[0], b = h[1], c = h[2], d = h[3], e = h[4];
#define ROUNDS(first, f, constant)                                                             \
    _Pragma("GCC unroll 20") for (int i = first; i < first + 20; i++) {                        \
        if (i >= 16) {                                                                         \
            vector x = w[(i - 3) & 15] ^ w[(i - 8) & 15] ^ w[(i - 14) & 15] ^ w[i & 15];       \
            w[i & 15] = LEFT(x, 1);                                                            \
        }                                                                                      \
        vector next = LEFT(a, 5) + (f) + e + (w[i & 15] + constant);                           \
        e = d, d = c, c = LEFT(b, 30), b = a, a = next;                                        \
    }
    ROUNDS(0, CHOICE(b, c, d), 0x5a827999u)
    ROUNDS(20, b ^ c ^ d, 0x6ed9eba1u)
    ROUNDS(40, MAJORITY(b, c, d), 0x8f1bbcdcu)
    ROUNDS(60, b ^ c ^ d, 0xca62c1d6u)
    h[0] += a, h[1] += b, h[2] += c, h[3] += d, h[4] += e;
}

INLINE void sha256_block(vector *h, vector w[16]) {
    vector a = h[0], b = h[1], c = h[2], d = h[3], e = h[4], f = h[5], g = h[6], last = h[7];
#pragma GCC unroll 64
    for (int i = 0; i < 64; i++) {
        if (i >= 16) {
            vector x = w[(i - 15) & 15], y = w[(i - 2) & 15];
            w[i & 15] += (RIGHT(x, 7) ^ RIGHT(x, 18) ^ (x >> 3)) + w[(i - 7) & 15] +
                         (RIGHT(y, 17) ^ RIGHT(y, 19) ^ (y >> 10));
        }
        vector one = last + (RIGHT(e, 6) ^ RIGHT(e, 11) ^ RIGHT(e, 25)) + CHOICE(e, f, g) +
                     (w[i & 15] + K[i]);
        vector two = (RIGHT(a, 2) ^ RIGHT(a, 13) ^ RIGHT(a, 22)) + MAJORITY(a, b, c);
        last = g, g = f, f = e, e = d + one, d = c, c = b, b = a, a = one + two;
    }
    h[0] += a, h[1] += b, h[2] += c, h[3] += d, h[4] += e, h[5] += f, h[6] += g, h[7] += last;
}

/* Defines the functions of a hash, for inputs of equal length, from the number of words in its state,
   their initial values, and the function that hashes a block. */
#define HASH(name, words, initial, block)                                                      \
    static void name##_start(vector *h) {                                                      \
        for (int i = 0; i < words; i++) h[i] = (vector){0} + initial[i];                       \
    }                                                                                          \
    static void name##_blocks(vector *h, const uint8_t *data, int64_t stride, int64_t blocks) { \
        vector state[words];                                                                   \
        memcpy(state, h, sizeof state);                                                        \
        for (int64_t n = 0; n < blocks; n++) {                                                 \
            vector w[16];                                                                      \
            load(w, data + n * BLOCK, stride);                                                 \
            block(state, w);                                                                   \
        }                                                                                      \
        memcpy(h, state, sizeof state);                                                        \
    }                                                                                          \
    /* Hashes and pads the last bytes, fewer than a block; digests lie one after another. */   \
    static void name##_end(vector *h, const uint8_t *data, int64_t stride, int64_t length,     \
                           uint8_t *digests) {                                                 \
        uint8_t ends[LANES][2 * BLOCK];                                                        \
        int64_t rest = length % BLOCK, blocks = rest < BLOCK - 8 ? 1 : 2;                      \
        memset(ends, 0, sizeof ends);                                                          \
        for (int lane = 0; lane < LANES; lane++) {                                             \
            memcpy(ends[lane], data + lane * stride, rest);                                    \
            ends[lane][rest] = 0x80;                                                           \
            for (int i = 0; i < 8; i++)                                                        \
                ends[lane][blocks * BLOCK - 1 - i] = (uint64_t)length * 8 >> 8 * i;            \
        }                                                                                      \
        name##_blocks(h, ends[0], 2 * BLOCK, blocks);                                          \
        for (int lane = 0; lane < LANES; lane++)                                               \
            for (int i = 0; i < 4 * words; i++)                                                \
                digests[lane * 4 * words + i] = h[i / 4][lane] >> (24 - 8 * (i % 4));          \
    }
HASH(sha1, 5, SHA1, sha1_block)
HASH(sha256, 8, SHA256, sha256_block)

/* SHA-256 of consecutive blocks in `data`, each of `length` bytes, one for each lane. */
void grokfetch_sha256(const uint8_t *data, int64_t length, uint8_t *digests) {
    vector h[8];
    sha256_start(h);
    sha256_blocks(h, data, length, length / BLOCK);
    sha256_end(h, data + length / BLOCK * BLOCK, length, length, digests);
}

/* Fills the buffer from a file; returns whether all bytes could be read. */
static int filled(int file, uint8_t *buffer, int64_t bytes, int64_t offset) {
    for (int64_t have = 0; have < bytes;) {
        ssize_t count = pread(file, buffer + have, bytes - have, offset + have);
        if (count == 0 || (count < 0 && errno != EINTR)) return 0;
        if (count > 0) have += count;
    }
    return 1;
}

/* In each lane, SHA-1 of `length` bytes of a file from an offset on. They are read through a buffer of
   `room` bytes, at least a block for each lane. A negative number in `files` is an empty lane; the
   file of a lane that cannot be read in full becomes -1. */
void grokfetch_sha1(int *files, const int64_t *offsets, int64_t length, uint8_t *buffer, int64_t room,
                    uint8_t *digests) {
    vector h[5];
    int64_t stride = room / LANES / BLOCK * BLOCK, part = 0;
    sha1_start(h);
    for (int64_t done = 0; done < length; done += part) {
        part = length - done < stride ? length - done : stride;
        for (int lane = 0; lane < LANES; lane++)
            if (files[lane] >= 0 && !filled(files[lane], buffer + lane * stride, part, offsets[lane] + done))
                files[lane] = -1;
        sha1_blocks(h, buffer, stride, part / BLOCK);
    }
    sha1_end(h, buffer + part / BLOCK * BLOCK, stride, length, digests);
}

/* The number of lanes on this processor; 0 if it cannot run the other functions. */
int grokfetch_lanes(void) { return SUPPORTED ? LANES : 0; }

/* Whether SHA-256 is faster in lanes: the processor's own instructions for it match eight lanes. */
int grokfetch_sha256_pays(void) {
#if LANES < 16 && defined(__SHA__)
    return 0;
#else
    return 1;
#endif
}

#else

int grokfetch_lanes(void) { return 0; }

#endif
