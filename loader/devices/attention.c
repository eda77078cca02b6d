/* Attention over a cache of keys and values in place, at the speed of the memory.

   `loader/devices/native.py` compiles this file together with `product.c`. It first writes the keys and
   values of a step into the cache, and then computes what `loader/inference/attention.py` computes in
   plain JAX. Every score is capped before its exponential is taken, so there is no need to find the
   maximum and subtract it: one pass over the places is enough. Its blocks and their order depend only
   on a token's position, not on the length of the cache or the number of threads.

   One token is bound by memory: each piece of work is a run of places, for all heads, because the heads
   of a place lie side by side. Many tokens are bound by arithmetic: each piece is one head of some
   tokens; its keys and values are converted block by block, and all queries use the block. */

#include <string.h>

#include "pool.h"
#include "tiles.h"

enum {
    BLOCK = 64,       /* places whose scores are in memory at once */
    RUN = 256,        /* places in a piece for one token: 1 MiB of a cache of Grok-1's size */
    TOKENS = 32,      /* tokens in a piece for many */
    PLACES = 4,       /* keys whose products with a query are summed side by side */
#if defined(__AVX512F__)
    QUERIES = 6,      /* queries of a head that are computed together, with all sums in registers */
#else
    QUERIES = 2,
#endif
    MOST = 1 << 16,   /* scores up to which no other thread is woken */
    TINY = 0x38800000 /* bits of 2^-14 in float32, the smallest float16 that is not subnormal */
};

typedef int32_t integers __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t naturals __attribute__((vector_size(LANES * 4)));
typedef uint16_t halves __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

/* The type of the stored keys and values: float32, bfloat16 or float16. */
typedef enum { SINGLE, BRAIN, HALF } kind;

/* One step of attention. */
typedef struct {
    job job;
    const float *queries;     /* [rows, tokens, heads * group, size] */
    const void *keys, *values; /* [rows, places, heads, size], what is attended to */
    kind stored;
    const int32_t *positions; /* [rows, tokens], -1 for a token that does not count */
    const uint8_t *visible;   /* [rows, stride] */
    float *out;               /* of the shape of `queries` */
    float *partial;           /* [rows, runs, heads * group, size + 1] for one token, else null */
    int64_t rows, tokens, heads, group, size, places, stride;
    int64_t runs;             /* pieces that a row's places, or its tokens, are divided into */
    float scale, cap;
} attention;

static int64_t least(int64_t one, int64_t other) { return one < other ? one : other; }

/* Bytes in an element. */
INLINE int64_t width_of(kind stored) { return stored == SINGLE ? 4 : 2; }

/* LANES elements as floats. */
INLINE vector loaded(kind stored, const void *from, int64_t at) {
    if (stored == SINGLE) return *(const vector *)((const float *)from + at);
    halves given = *(const halves *)((const uint16_t *)from + at);
    naturals bits = __builtin_convertvector(given, naturals);
    if (stored == BRAIN) return (vector)(bits << 16);
#if defined(__AVX512F__)
    return (vector)_mm512_cvtph_ps((__m256i)given);
#endif
    naturals sign = (bits & 0x8000) << 16, moved = (bits & 0x7fff) << 13;
    /* Subnormal halves are computed as a difference of normal floats, because XLA's threads flush
       subnormal floats to zero. */
    naturals subnormal = (naturals)((vector)(moved + TINY) - (vector)((naturals){0} + TINY));
    naturals few = (naturals)(moved < 0x800000);
    return (vector)(sign | (few & subnormal) | (~few & (moved + (TINY - 0x800000))));
}

INLINE float element(kind stored, const void *from, int64_t at) {
    if (stored == SINGLE) return ((const float *)from)[at];
    uint32_t half = ((const uint16_t *)from)[at], bits = half << 16, moved = (half & 0x7fff) << 13;
    if (stored == HALF) bits = moved + TINY - (moved < 0x800000 ? 0 : 0x800000);
    float value;
    memcpy(&value, &bits, sizeof value);
    if (stored == BRAIN) return value;
    if (moved < 0x800000) value -= 0x1p-14f;
    return half & 0x8000 ? -value : value;
}

/* The nearest bfloat16, ties to even; NaN stays NaN. */
static uint16_t rounded(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* The nearest float16, ties to even; the largest finite one for anything larger. */
static uint16_t halved(float value) {
    const float magic = 0x1p-1f; /* the last bit of its mantissa is the smallest float16 */
    float size = value < 0 ? -value : value;
    uint32_t bits, sign = value < 0 ? 0x8000 : 0;
    if (!(size < 65504.0f)) size = 65504.0f;
    if (size < 0x1p-14f) { /* subnormal */
        size += magic;
        memcpy(&bits, &size, sizeof bits);
        return (uint16_t)(sign | (bits - 0x3f000000));
    }
    memcpy(&bits, &size, sizeof bits);
    return (uint16_t)(sign | (bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13);
}

/* For each of four vectors, the sum over its lanes. */
INLINE void totals(const vector *of, float *to) {
#if defined(__AVX512F__)
    __m512 one = (__m512)of[0], two = (__m512)of[1], three = (__m512)of[2], four = (__m512)of[3];
    __m512 low = _mm512_add_ps(_mm512_shuffle_f32x4(one, two, 0x44), _mm512_shuffle_f32x4(one, two, 0xee));
    __m512 high = _mm512_add_ps(_mm512_shuffle_f32x4(three, four, 0x44),
                                _mm512_shuffle_f32x4(three, four, 0xee));
    __m512 sum = _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88),
                               _mm512_shuffle_f32x4(low, high, 0xdd));
    sum = _mm512_add_ps(sum, _mm512_permute_ps(sum, 0x4e));
    sum = _mm512_add_ps(sum, _mm512_permute_ps(sum, 0xb1));
    __m512i every_fourth = _mm512_setr_epi32(0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12);
    _mm_storeu_ps(to, _mm512_castps512_ps128(_mm512_permutexvar_ps(every_fourth, sum)));
#else
    for (int index = 0; index < PLACES; index++) {
        float sum = 0;
        for (int lane = 0; lane < LANES; lane++) sum += of[index][lane];
        to[index] = sum;
    }
#endif
}

/* e to the power of x, for x between -87 and 88; with the polynomial of expf in Cephes. */
INLINE vector exponential(vector x) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    vector shifted = x * 1.44269504f + magic;
    vector n = shifted - magic, rest_of = x - n * 0.693359375f + n * 2.12194440e-4f;
    vector sum = rest_of * 1.9875691500e-4f + 1.3981999507e-3f;
    sum = sum * rest_of + 8.3334519073e-3f;
    sum = sum * rest_of + 4.1665795894e-2f;
    sum = sum * rest_of + 1.6666665459e-1f;
    sum = sum * rest_of + 5.0000001201e-1f;
    sum = sum * rest_of * rest_of + rest_of + 1.0f;
    return (vector)((naturals)sum + ((naturals)shifted << 23));
}

/* Turns BLOCK scores of a query into the weights of the values, and returns their sum. `allowed` has
   all bits set at places that count, and none elsewhere; there the weight is 0. */
INLINE float weigh(float *scores, const int32_t *allowed, float scale, float cap) {
    const vector limit = (vector){0} + 10.0f; /* In float32 its hyperbolic tangent is 1. */
    float sums[LANES] = {0};
    vector sum = {0};
    for (int at = 0; at < BLOCK; at += LANES) {
        vector u = *(vector *)(scores + at) * (scale / cap);
        integers above = u > limit, below = u < -limit;
        u = (vector)((above & (integers)limit) | (below & (integers)-limit) |
                     (~(above | below) & (integers)u));
        vector tangent = 1.0f - 2.0f / (exponential(2.0f * u) + 1.0f);
        /* The mask is applied to the bits, since the score of a masked place may be NaN. */
        vector weights = (vector)((integers)exponential(cap * tangent) & *(const integers *)(allowed + at));
        *(vector *)(scores + at) = weights;
        sum += weights;
    }
    memcpy(sums, &sum, sizeof sums);
    float total = 0;
    for (int lane = 0; lane < LANES; lane++) total += sums[lane];
    return total;
}

/* Marks in `allowed` which places of a row, from `first` on, a token at `position` may attend to: the
   `visible` ones up to its own. A token that would see no place at all, as in a prompt of pad ids,
   sees itself. Returns how many places must be read. */
static int64_t allow(const attention *a, int64_t row, int64_t first, int64_t position,
                     int32_t *allowed, int64_t first_visible) {
    const uint8_t *visible = a->visible + row * a->stride;
    int64_t count = least(BLOCK, least(position + 1, a->places) - first);
    int alone = first_visible > position;
    for (int64_t at = 0; at < BLOCK; at++)
        allowed[at] = -(at < count && (alone ? first + at == position : visible[first + at] != 0));
    return count < 0 ? 0 : count;
}

static int64_t first_visible(const attention *a, int64_t row) {
    const uint8_t *visible = a->visible + row * a->stride;
    int64_t first = 0;
    while (first < a->places && !visible[first]) first++;
    return first;
}

/* Prefetches as many elements of the next block as one step of this block reads. Keys of one head are
   a whole place apart, too far for the processor to predict; and to prefetch a block all at once
   would stall the arithmetic. */
INLINE void ask(kind stored, const char **soon, int64_t elements) {
    int64_t bytes = elements * width_of(stored);
    for (int64_t at = 0; at < bytes; at += LINE) __builtin_prefetch(*soon + at, 0, 2);
    *soon += bytes;
}

/* Computes scores[query][place] for `count` queries of one head and the first `read` places of a block.
   Meanwhile the keys at `soon` are prefetched. */
INLINE void dots(int count, kind stored, const float *queries, const void *keys, int64_t stride,
                 int64_t read, int64_t size, float *scores, const char *soon) {
    int64_t even = size / LANES * LANES;
    for (int64_t place = 0; place < read; place += PLACES) {
        vector sum[QUERIES][PLACES] = {0};
        int64_t from[PLACES];
        /* Past the last place, its key is used again, for scores that are not used. */
        for (int p = 0; p < PLACES; p++) from[p] = least(place + p, read - 1) * stride;
        for (int64_t at = 0; at < even; at += LANES) {
            vector key[PLACES];
            ask(stored, &soon, PLACES * LANES);
            for (int p = 0; p < PLACES; p++) key[p] = loaded(stored, keys, from[p] + at);
            for (int q = 0; q < count; q++) {
                vector query = *(const vector *)(queries + q * size + at);
                for (int p = 0; p < PLACES; p++) sum[q][p] += query * key[p];
            }
        }
        for (int q = 0; q < count; q++) {
            float *to = scores + q * BLOCK + place;
            totals(sum[q], to);
            for (int64_t at = even; at < size; at++)
                for (int p = 0; p < PLACES; p++)
                    to[p] += queries[q * size + at] * element(stored, keys, from[p] + at);
        }
    }
}

/* Adds the values of `read` places, each multiplied by its weight in weights[query], to sums[query].
   Meanwhile the values at `soon` are prefetched. */
INLINE void add(int count, kind stored, const float *weights, const void *values, int64_t stride,
                int64_t read, int64_t size, float *sums, const char *soon) {
    int64_t at = 0;
    for (; at + TILE <= size; at += TILE) {
        vector sum[AT_ONCE][VECTORS];
        for (int q = 0; q < count; q++)
            for (int v = 0; v < VECTORS; v++)
                sum[q][v] = *(const vector *)(sums + q * (size + 1) + at + v * LANES);
        for (int64_t place = 0; place < read; place++) {
            vector value[VECTORS];
            ask(stored, &soon, TILE);
            for (int v = 0; v < VECTORS; v++)
                value[v] = loaded(stored, values, place * stride + at + v * LANES);
            for (int q = 0; q < count; q++)
                for (int v = 0; v < VECTORS; v++) sum[q][v] += weights[q * BLOCK + place] * value[v];
        }
        for (int q = 0; q < count; q++)
            for (int v = 0; v < VECTORS; v++)
                *(vector *)(sums + q * (size + 1) + at + v * LANES) = sum[q][v];
    }
    for (; at < size; at++)
        for (int q = 0; q < count; q++)
            for (int64_t place = 0; place < read; place++)
                sums[q * (size + 1) + at] +=
                    weights[q * BLOCK + place] * element(stored, values, place * stride + at);
}

/* Each number of queries has its own code, with its sums in registers. */
#define EACH(most, number, CALL)                                                                \
    switch (number) {                                                                           \
        case 1: CALL(1); break;                                                                 \
        case 2: CALL(2); break;                                                                 \
        case 3: if (most >= 3) { CALL(3); } break;                                              \
        case 4: if (most >= 4) { CALL(4); } break;                                              \
        case 5: if (most >= 5) { CALL(5); } break;                                              \
        case 6: if (most >= 6) { CALL(6); } break;                                              \
    }

/* The beginning of the piece that this thread will probably take next; `here` if none is left. */
static int64_t upcoming(attention *a, int64_t here) {
    int64_t piece = atomic_load(&a->job.taken);
    if (piece >= a->job.pieces) return here;
    return (piece / a->runs * a->places + piece % a->runs * RUN) * a->heads * a->size;
}

/* One piece for one token, a run of its row's places: for each query the sum of the weighted values,
   and that of the weights. */
INLINE void one_of(attention *a, kind stored, int64_t piece) {
    int64_t row = piece / a->runs, start = piece % a->runs * RUN;
    int64_t all = a->heads * a->group, width = a->heads * a->size, size = a->size;
    int64_t position = a->positions[row], hidden = first_visible(a, row);
    float *sums = a->partial + piece * all * (size + 1);
    float scores[AT_ONCE * BLOCK] = {0};
    int32_t allowed[BLOCK];
    memset(sums, 0, all * (size + 1) * sizeof(float));
    int64_t end = least(least(start + RUN, position + 1), a->places);
    int64_t bytes = width_of(stored);
    for (int64_t first = start; first < end; first += BLOCK) {
        int64_t read = allow(a, row, first, position, allowed, hidden);
        int64_t from = (row * a->places + first) * width;
        int64_t next = first + BLOCK < end ? from + BLOCK * width : upcoming(a, from);
        const char *block_keys = (const char *)a->keys + from * bytes;
        const char *block_values = (const char *)a->values + from * bytes;
        const char *next_keys = (const char *)a->keys + next * bytes;
        const char *next_values = (const char *)a->values + next * bytes;
        for (int64_t head = 0; head < a->heads; head++) {
            const void *keys = block_keys + head * size * bytes;
            const void *values = block_values + head * size * bytes;
            const char *soon_keys = next_keys + head * BLOCK * size * bytes;
            const char *soon_values = next_values + head * BLOCK * size * bytes;
            for (int64_t query = head * a->group, count; query < (head + 1) * a->group; query += count) {
                count = least(AT_ONCE, (head + 1) * a->group - query);
                for (int64_t at = 0; at < count; at += QUERIES) {
                    const float *queries = a->queries + (row * all + query + at) * size;
#define CALL(number)                                                                            \
    dots(number, stored, queries, keys, width, read, size, scores + at * BLOCK, soon_keys)
                    EACH(QUERIES, least(QUERIES, count - at), CALL)
#undef CALL
                }
                for (int64_t q = 0; q < count; q++)
                    sums[(query + q) * (size + 1) + size] +=
                        weigh(scores + q * BLOCK, allowed, a->scale, a->cap);
#define CALL(number)                                                                            \
    add(number, stored, scores, values, width, read, size, sums + query * (size + 1), soon_values)
                EACH(AT_ONCE, count, CALL)
#undef CALL
            }
        }
    }
}

/* Converts a block of keys and values of a head to floats: the keys transposed, in tiles of places;
   the values in tiles of elements, padded with zeros. */
INLINE void convert(kind stored, const void *keys, const void *values, int64_t from, int64_t stride,
                    int64_t read, int64_t size, float *key_panel, float *value_panel) {
    for (int64_t place = 0; place < BLOCK; place++)
        for (int64_t at = 0; at < size; at++)
            key_panel[(place / TILE * size + at) * TILE + place % TILE] =
                place < read ? element(stored, keys, from + place * stride + at) : 0;
    for (int64_t tile_of = 0; tile_of * TILE < size; tile_of++)
        for (int64_t place = 0; place < read; place++)
            for (int64_t at = 0; at < TILE; at++) {
                int64_t column = tile_of * TILE + at;
                value_panel[(tile_of * BLOCK + place) * TILE + at] =
                    column < size ? element(stored, values, from + place * stride + column) : 0;
            }
}

/* One piece for many tokens: one head for a run of a row's tokens, written to the result. */
INLINE void many_of(attention *a, kind stored, int64_t piece) {
    int64_t head = piece % a->heads, run = piece / a->heads % a->runs, row = piece / a->heads / a->runs;
    int64_t start = run * TOKENS, tokens = least(TOKENS, a->tokens - start);
    int64_t size = a->size, all = a->heads * a->group, width = a->heads * size;
    int64_t padded = (size + TILE - 1) / TILE * TILE, queries = tokens * a->group;
    const int32_t *positions = a->positions + row * a->tokens + start;
    int64_t last = -1, hidden = first_visible(a, row);
    for (int64_t t = 0; t < tokens; t++) last = positions[t] > last ? positions[t] : last;
    size_t count = queries * (size + BLOCK + padded + 1) + BLOCK * (size + padded + TOKENS);
    float *x = aligned_alloc(LINE, (count * sizeof(float) + LINE - 1) / LINE * LINE);
    if (!x) {
        atomic_store(&a->job.failed, 1);
        return;
    }
    float *key_panel = x, *value_panel = key_panel + BLOCK * size;
    float *sums = value_panel + BLOCK * padded, *scores = sums + queries * padded;
    float *totals_of = scores + queries * BLOCK, *own = totals_of + queries;
    int32_t *allowed = (int32_t *)(own + queries * size);
    memset(sums, 0, queries * padded * sizeof(float));
    memset(totals_of, 0, queries * sizeof(float));
    for (int64_t t = 0; t < tokens; t++)
        memcpy(own + t * a->group * size,
               a->queries + ((row * a->tokens + start + t) * all + head * a->group) * size,
               a->group * size * sizeof(float));
    for (int64_t first = 0; first < least(last + 1, a->places); first += BLOCK) {
        int64_t read = 0;
        for (int64_t t = 0; t < tokens; t++) {
            int64_t of_token = allow(a, row, first, positions[t], allowed + t * BLOCK, hidden);
            read = of_token > read ? of_token : read;
        }
        convert(stored, a->keys, a->values, (row * a->places + first) * width + head * size, width,
                read, size, key_panel, value_panel);
        memset(scores, 0, queries * BLOCK * sizeof(float));
        for (int64_t query = 0; query < queries; query += AT_ONCE) {
            int64_t some = least(AT_ONCE, queries - query);
            for (int64_t at = 0; at < BLOCK; at += TILE)
                tiles(some, own + query * size, size, NULL, key_panel + at * size, 0, size,
                      scores + query * BLOCK + at, BLOCK);
            for (int64_t q = query; q < query + some; q++)
                totals_of[q] += weigh(scores + q * BLOCK, allowed + q / a->group * BLOCK, a->scale, a->cap);
            for (int64_t at = 0; at < padded; at += TILE)
                tiles(some, scores + query * BLOCK, BLOCK, NULL, value_panel + at * BLOCK, 0, read,
                      sums + query * padded + at, padded);
        }
    }
    for (int64_t query = 0; query < queries; query++) {
        int64_t token = row * a->tokens + start + query / a->group;
        float *out = a->out + (token * all + head * a->group + query % a->group) * size;
        for (int64_t at = 0; at < size; at++)
            out[at] = totals_of[query] ? sums[query * padded + at] / totals_of[query] : 0;
    }
    free(x);
}

static void piece_of(job *j, int64_t piece) {
    attention *a = (attention *)j;
    if (a->partial && a->stored == BRAIN) one_of(a, BRAIN, piece);
    else if (a->partial && a->stored == HALF) one_of(a, HALF, piece);
    else if (a->partial) one_of(a, SINGLE, piece);
    else if (a->stored == BRAIN) many_of(a, BRAIN, piece);
    else if (a->stored == HALF) many_of(a, HALF, piece);
    else many_of(a, SINGLE, piece);
}

/* Adds up the runs of each row's one token in order, and divides by the sum of the weights. */
static void join(attention *a) {
    int64_t all = a->heads * a->group, width = a->size + 1;
    for (int64_t index = 0; index < a->rows * all; index++) {
        float *sums = a->partial + (index / all * a->runs * all + index % all) * width;
        for (int64_t run = 1; run < a->runs; run++)
            for (int64_t at = 0; at < width; at++) sums[at] += sums[run * all * width + at];
        for (int64_t at = 0; at < a->size; at++)
            a->out[index * a->size + at] = sums[a->size] ? sums[at] / sums[a->size] : 0;
    }
}

static int compute(attention *a, XLA_FFI_CallFrame *frame) {
    int64_t all = a->heads * a->group, longest = 0;
    for (int64_t index = 0; index < a->rows * a->tokens; index++)
        longest = a->positions[index] + 1 > longest ? a->positions[index] + 1 : longest;
    longest = least(longest, a->places);
    if (a->tokens == 1) {
        a->runs = longest ? (longest + RUN - 1) / RUN : 1;
        a->partial = malloc(a->rows * a->runs * all * (a->size + 1) * sizeof(float));
        if (!a->partial) return 0;
        a->job.pieces = a->rows * a->runs;
    } else {
        a->runs = (a->tokens + TOKENS - 1) / TOKENS;
        a->job.pieces = a->rows * a->runs * a->heads;
    }
    int sound = completed(&a->job, frame, a->rows * a->tokens * all * longest < MOST);
    if (a->partial) {
        join(a);
        free(a->partial);
    }
    return sound;
}

/* Writes a step's keys or values, float32 [rows, tokens, width], to their places in the cache. */
static void store(const attention *a, const float *step, XLA_FFI_Buffer *cache) {
    int64_t width = a->heads * a->size, places = cache->dims[1];
    for (int64_t index = 0; index < a->rows * a->tokens; index++) {
        int64_t position = a->positions[index];
        if (position < 0 || position >= places) continue;
        int64_t at = (index / a->tokens * places + position) * width;
        const float *from = step + index * width;
        if (cache->dtype == XLA_FFI_DataType_F32)
            memcpy((float *)cache->data + at, from, width * sizeof(float));
        else
            for (int64_t i = 0; i < width; i++)
                ((uint16_t *)cache->data)[at + i] =
                    cache->dtype == XLA_FFI_DataType_F16 ? halved(from[i]) : rounded(from[i]);
    }
}

/* Arguments: queries float32 [rows, tokens, queries, size]; keys and values of the step, float32
   [rows, tokens, heads, size]; keys and values of the cache, float32, bfloat16 or float16
   [rows, places, heads, size]; positions int32 [rows, tokens], -1 for a token that does not count;
   visible bool [rows, at least places]; numbers float32 [3]: the factor of a score, its cap (at most
   80), and whether the cache was empty, in which case the step's own keys and values are used, before
   they are rounded.
   Results: float32 [rows, tokens, queries, size], and the keys and values of the cache, in place. */
XLA_FFI_Error *grokfetch_attention(XLA_FFI_CallFrame *frame) {
    if (introduced(frame)) return NULL;
    XLA_FFI_Buffer **args = (XLA_FFI_Buffer **)frame->args.args;
    XLA_FFI_Buffer **rets = (XLA_FFI_Buffer **)frame->rets.rets;
    if (frame->args.size != 8 || frame->rets.size != 3 || rets[1]->data != args[3]->data ||
        rets[2]->data != args[4]->data)
        return complaint(frame->api, XLA_FFI_Error_Code_INVALID_ARGUMENT, "not our arguments");
    attention *a = calloc(1, sizeof *a);
    if (!a) return complaint(frame->api, XLA_FFI_Error_Code_RESOURCE_EXHAUSTED, "out of memory");
    const float *numbers = args[7]->data;
    int fresh = numbers[2] != 0;
    a->queries = args[0]->data;
    a->keys = args[fresh ? 1 : 3]->data, a->values = args[fresh ? 2 : 4]->data;
    a->stored = fresh || args[3]->dtype == XLA_FFI_DataType_F32 ? SINGLE
                : args[3]->dtype == XLA_FFI_DataType_F16        ? HALF
                                                                : BRAIN;
    a->positions = args[5]->data, a->visible = args[6]->data;
    a->out = rets[0]->data;
    a->rows = args[0]->dims[0], a->tokens = args[0]->dims[1], a->size = args[0]->dims[3];
    a->heads = args[1]->dims[2], a->group = args[0]->dims[2] / a->heads;
    a->places = args[fresh ? 1 : 3]->dims[1], a->stride = args[6]->dims[1];
    a->scale = numbers[0], a->cap = numbers[1];
    a->job.run = piece_of;
    atomic_store(&a->job.holders, 1);
    store(a, args[1]->data, rets[1]);
    store(a, args[2]->data, rets[2]);
    XLA_FFI_Error *error = NULL;
    if (!compute(a, frame))
        error = complaint(frame->api, XLA_FFI_Error_Code_RESOURCE_EXHAUSTED,
                          "no memory for the sums of attention");
    release(&a->job);
    return error;
}
