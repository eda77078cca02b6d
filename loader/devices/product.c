/* Products of float32 activations with an int8 matrix in memory, at the speed of that memory.

   `loader/devices/native.py` compiles this file on the machine where it is used, for its processor,
   and calls it from JAX. It computes what `loader/devices/kernels.py` computes in plain JAX. The order
   of its sums depends on the shapes and on the number of tokens without padding, never on the number
   of threads or on which of them was faster.

   A few tokens are bound by memory: each piece of work is a run of whole rows, read once from end to
   end, some rows side by side. Many tokens are bound by arithmetic: each piece is a strip of columns,
   which is converted in small panels that all tokens use: to floats, or, if `loader/devices/tuning.py`
   finds that faster, to the integers of `integers.h`, which `matrix_unit.h` multiplies if the
   processor has a matrix unit. */

#include <string.h>

#include "integers.h"
#include "matrix_unit.h"
#include "pool.h"
#include "tiles.h"

enum {
    FEW = 12,                  /* tokens up to which converting a panel does not pay */
    PANEL_ROWS = 64,           /* a converted tile has 16 KiB, half of a first-level cache */
    WIDEST = 512,              /* most columns in a strip whose tiles are converted together */
    AHEAD = 16,                /* most rows that are prefetched before they are converted */
    AHEAD_BYTES = 1 << 13,     /* about as many bytes of a strip in integers are prefetched */
    SUMS = 1 << 15,            /* sums in a piece of work: 128 KiB of a second-level cache */
    CACHE = 1 << 19,           /* bytes of that cache for the sums and the panel of integers */
    UNIT_CACHE = 1 << 20,      /* the same with a matrix unit: such a processor has 2 MiB */
    UNIT_WIDEST = 1024,        /* most columns in its strips: long runs, and still enough pieces */
    STRIPS = 8,                /* fewest pieces side by side for many tokens */
    PIECE = 1 << 22,           /* fewest bytes of the matrix in a piece for few tokens */
    MOST_PARTS = 16            /* most pieces that a group of rows is divided into */
};

/* One product. */
typedef struct {
    job job;
    const float *x;        /* [tokens, height] */
    const int8_t *matrix;  /* [height, width], rows `stride` apart */
    const float *scales;   /* [groups, width] */
    float *out;            /* [tokens, width] */
    float *partial;        /* [groups * parts, tokens, width] for few tokens, else null */
    int64_t tokens, height, width, stride, groups;
    int64_t parts;         /* runs of rows that a group is divided into */
    int64_t strip, strips; /* columns in a piece, and pieces side by side */
    int16_t *rounded;      /* [groups * blocks, tokens, block] for many tokens in integers, else
                              null; for a matrix unit, whole tiles of tokens in two planes of bytes */
    float *factors;        /* [groups * blocks, tokens], those of `rounded` */
    int64_t block, blocks; /* rows that share a factor, and the number of such blocks in a group */
    int in_unit;           /* whether a matrix unit multiplies */
    int64_t bytes;         /* in a weight of a panel of integers */
    atomic_long ready;     /* tokens that have been rounded, which are the first pieces of work */
} product;

/* The columns that do not fill a tile; only small models have any. */
static void narrow(int64_t tokens, const float *x, int64_t height, const int8_t *weights,
                   int64_t stride, int64_t rows, int64_t columns, float *sums, int64_t width) {
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t row = 0; row < rows; row++)
            for (int64_t column = 0; column < columns; column++)
                sums[t * width + column] +=
                    x[t * height + row] * (float)weights[row * stride + column];
}

static int64_t least(int64_t one, int64_t other) { return one < other ? one : other; }

/* One piece for at most FEW tokens: a run of rows of one group. Its scaled sums go to their own part of
   `partial`. */
static void few(product *p, int64_t piece) {
    int64_t part = piece / p->strips, first = piece % p->strips * p->strip;
    int64_t columns = least(p->strip, p->width - first);
    int64_t group = part / p->parts, rows = p->height / p->groups;
    int64_t start = group * rows + part % p->parts * rows / p->parts;
    int64_t end = group * rows + (part % p->parts + 1) * rows / p->parts;
    int64_t runs = (p->tokens + AT_ONCE - 1) / AT_ONCE;
    float *sums = p->partial + part * p->tokens * p->width + first;
    for (int64_t t = 0; t < p->tokens; t++) memset(sums + t * p->width, 0, columns * sizeof(float));
    for (int64_t row = start; row < end; row += ROWS) {
        int64_t count = least(ROWS, end - row), column = 0;
        const int8_t *weights = p->matrix + row * p->stride + first;
        for (; column + TILE <= columns; column += TILE)
            for (int64_t run = 0; run < runs; run++) {
                int64_t token = run * p->tokens / runs, next = (run + 1) * p->tokens / runs;
                tiles(next - token, p->x + token * p->height + row, p->height, weights + column,
                      NULL, p->stride, count, sums + token * p->width + column, p->width);
            }
        if (column < columns)
            narrow(p->tokens, p->x + row, p->height, weights + column, p->stride, count,
                   columns - column, sums + column, p->width);
    }
    for (int64_t t = 0; t < p->tokens; t++)
        for (int64_t column = 0; column < columns; column++)
            sums[t * p->width + column] *= p->scales[group * p->width + first + column];
}

/* Converts some rows of a strip to floats, tile after tile. The strip is read along its rows, because
   lines one above the other would evict each other from the cache. */
static void convert(const int8_t *weights, int64_t stride, int64_t rows, int64_t tiles_wide,
                    float *panel) {
    for (int64_t row = 0; row < rows; row++)
        for (int64_t t = 0; t < tiles_wide; t++) {
            const int8_t *from = weights + row * stride + t * TILE;
            float *to = panel + (t * PANEL_ROWS + row) * TILE;
            __builtin_prefetch(from + AHEAD * stride, 0, 2);
            for (int v = 0; v < VECTORS; v++) *(vector *)(to + v * LANES) = widened(from + v * LANES);
        }
}

/* Adds the products of some rows of a strip to the sums of all tokens, in float32. */
static void add(product *p, int64_t row, int64_t rows, int64_t first, int64_t tiles_wide,
                float *panel, float *sums, int64_t columns) {
    int64_t runs = (p->tokens + AT_ONCE - 1) / AT_ONCE;
    convert(p->matrix + row * p->stride + first, p->stride, rows, tiles_wide, panel);
    for (int64_t t = 0; t < tiles_wide; t++)
        /* Runs have nearly equal lengths, because short ones keep the arithmetic waiting. */
        for (int64_t run = 0; run < runs; run++) {
            int64_t token = run * p->tokens / runs, end = (run + 1) * p->tokens / runs;
            tiles(end - token, p->x + token * p->height + row, p->height, NULL,
                  panel + t * PANEL_ROWS * TILE, 0, rows, sums + token * columns + t * TILE,
                  columns);
        }
}

/* Scales the sums of a group of rows, for some tokens and `count` columns from `at` on, adds them to
   those of the groups before, and sets them to zero. For the last group the result is written; its
   rows are too far apart to add to them for every group. */
static void scale(const product *p, int64_t group, int64_t token, int64_t tokens, int64_t first,
                  int64_t at, int64_t count, int64_t columns, float *sums, float *totals) {
    const float *scales = p->scales + group * p->width + first + at;
    for (int64_t t = token; t < token + tokens; t++) {
        float *sum = sums + t * columns + at, *total = totals + t * columns + at;
        float *to = group + 1 < p->groups ? total : p->out + t * p->width + first + at;
        int64_t column = 0;
        for (; column + LANES <= count; column += LANES) {
            *(vector *)(to + column) = *(vector *)(total + column) +
                                       *(vector *)(sum + column) * *(const vector *)(scales + column);
            *(vector *)(sum + column) = (vector){0};
        }
        for (; column < count; column++) {
            to[column] = total[column] + sum[column] * scales[column];
            sum[column] = 0;
        }
    }
}

/* Memory for the sums of a piece and for their scaled totals, all zeros, followed by a panel. If there
   is none, the result is null and the work has failed. */
static float *sums_and(product *p, int64_t columns, int64_t of_panel, float **totals, void **panel) {
    size_t bytes = (p->tokens * columns * sizeof(float) + LINE - 1) / LINE * LINE;
    char *sums = aligned_alloc(LINE, 2 * bytes + (of_panel + LINE - 1) / LINE * LINE);
    if (!sums) {
        atomic_store(&p->job.failed, 1);
        return NULL;
    }
    memset(sums, 0, 2 * bytes);
    *totals = (float *)(sums + bytes);
    *panel = sums + 2 * bytes;
    return (float *)sums;
}

/* One piece for many tokens: a strip of columns, in float32, written to the result. */
static void many(product *p, int64_t piece) {
    int64_t first = piece * p->strip, columns = least(p->strip, p->width - first);
    int64_t rows = p->height / p->groups, tiles_wide = columns / TILE, even = tiles_wide * TILE;
    void *panel;
    float *totals, *sums = sums_and(p, columns, PANEL_ROWS * even * sizeof(float), &totals, &panel);
    for (int64_t group = 0; sums && group < p->groups; group++) {
        for (int64_t done = 0; done < rows; done += PANEL_ROWS) {
            int64_t row = group * rows + done, count = least(PANEL_ROWS, rows - done);
            add(p, row, count, first, tiles_wide, panel, sums, columns);
            if (even < columns)
                narrow(p->tokens, p->x + row, p->height, p->matrix + row * p->stride + first + even,
                       p->stride, count, columns - even, sums + even, columns);
        }
        scale(p, group, 0, p->tokens, first, 0, columns, columns, sums, totals);
    }
    free(sums);
}

/* Rows that share factors. Blocks are numbered through all groups. */
typedef struct {
    int64_t group, row, rows;
} block;

static block block_of(const product *p, int64_t number) {
    int64_t rows = p->height / p->groups, done = number % p->blocks * p->block;
    int64_t group = number / p->blocks;
    return (block){group, group * rows + done, least(p->block, rows - done)};
}

/* Fills the panel of a strip with the rows of a block. */
static void fill(const product *p, block of, int64_t first, int64_t tiles_wide, int8_t *panel) {
    static const int8_t none[TILE];
    int64_t ahead = least(AHEAD, AHEAD_BYTES / (tiles_wide * TILE + 1) + 1);
    for (int64_t four = 0; 4 * four < p->block; four++)
        for (int64_t t = 0; t < tiles_wide; t++) {
            const int8_t *start = p->matrix + (of.row + 4 * four) * p->stride + first + t * TILE;
            const int8_t *rows[4];
            for (int r = 0; r < 4; r++) {
                rows[r] = 4 * four + r < of.rows ? start + r * p->stride : none;
                __builtin_prefetch(start + (ahead + r) * p->stride, 0, 2);
            }
            if (p->in_unit) unit_lines(rows, panel, p->block, t, four);
            else pair_lines(rows, panel, p->block, t, four);
        }
}

/* The same as `many`, in integers. */
static void many_in_integers(product *p, int64_t piece) {
    int64_t first = piece * p->strip, columns = least(p->strip, p->width - first);
    int64_t tiles_wide = columns / TILE, even = tiles_wide * TILE;
    int64_t side = p->in_unit ? SIDE : AT_ONCE, runs = (p->tokens + side - 1) / side;
    void *panel;
    float *totals, *sums = sums_and(p, columns, p->block * even * p->bytes, &totals, &panel);
    if (!sums) return;
    if (p->in_unit) begin_unit();
    for (int64_t number = 0; number < p->groups * p->blocks; number++) {
        block of = block_of(p, number);
        int last = (number + 1) % p->blocks == 0;
        fill(p, of, first, tiles_wide, panel);
        for (int64_t t = 0; t < tiles_wide; t++)
            for (int64_t run = 0; run < runs; run++) {
                /* As in `add`, runs have nearly equal lengths, except those for the matrix unit. */
                int64_t token = p->in_unit ? run * side : run * p->tokens / runs;
                int64_t end = p->in_unit ? least(token + side, p->tokens) : (run + 1) * p->tokens / runs;
                const float *factors = p->factors + number * p->tokens + token;
                const int8_t *of_tile = (int8_t *)panel + t * p->block * TILE * p->bytes;
                float *to = sums + token * columns + t * TILE;
                if (p->in_unit)
                    unit_tiles(end - token, p->rounded + (number * runs + run) * side * p->block,
                               factors, of_tile, p->block, to, columns);
                else
                    integer_tiles(end - token, p->rounded + (number * p->tokens + token) * p->block,
                                  p->block, factors, (const int32_t *)of_tile, (of.rows + 1) / 2, to,
                                  columns);
                if (last)
                    scale(p, of.group, token, end - token, first, t * TILE, TILE, columns, sums, totals);
            }
        if (even == columns) continue;
        narrow(p->tokens, p->x + of.row, p->height, p->matrix + of.row * p->stride + first + even,
               p->stride, of.rows, columns - even, sums + even, columns);
        if (last) scale(p, of.group, 0, p->tokens, first, even, columns - even, columns, sums, totals);
    }
    if (p->in_unit) end_unit();
    free(sums);
}

/* Converts the activations of a token to integers. */
static void round_token(product *p, int64_t token) {
    int64_t runs = (p->tokens + SIDE - 1) / SIDE;
    for (int64_t number = 0; number < p->groups * p->blocks; number++) {
        block of = block_of(p, number);
        int16_t *to = p->rounded + (number * p->tokens + token) * p->block, line[BLOCK];
        float factor = rounded(p->x + token * p->height + of.row, of.rows, p->in_unit ? line : to);
        p->factors[number * p->tokens + token] = factor;
        if (p->in_unit)
            split(line, of.rows, token % SIDE,
                  p->rounded + (number * runs + token / SIDE) * SIDE * p->block);
    }
    atomic_fetch_add(&p->ready, 1);
}

static void piece_of(job *j, int64_t piece) {
    product *p = (product *)j;
    if (p->partial) few(p, piece);
    else if (!p->rounded) many(p, piece);
    else if (piece < p->tokens) round_token(p, piece);
    else { /* Other threads may still be rounding tokens that they took before. */
        for (int64_t times = 0; atomic_load(&p->ready) < p->tokens; times++) rest(times);
        many_in_integers(p, piece - p->tokens);
    }
}

/* Computes a product in the caller's thread and those of XLA's pool. */
static int compute(product *p, XLA_FFI_CallFrame *frame, int in_integers) {
    int64_t bytes = p->height * p->width;
    if (p->tokens <= FEW) {
        p->strips = (p->tokens * p->width + SUMS - 1) / SUMS;
        p->strip = ((p->width + p->strips - 1) / p->strips + TILE - 1) / TILE * TILE;
        p->strips = (p->width + p->strip - 1) / p->strip;
        p->parts = least(least(MOST_PARTS, bytes / p->groups / p->strips / PIECE + 1),
                         p->height / p->groups);
        p->job.pieces = p->groups * p->parts * p->strips;
        p->partial = p->groups * p->parts == 1
                         ? p->out
                         : malloc(p->groups * p->parts * p->tokens * p->width * sizeof(float));
        if (!p->partial) return 0;
    } else {
        int64_t widest = least(SUMS / p->tokens, WIDEST);
        if (in_integers) {
            int64_t rows = p->height / p->groups, tokens = (p->tokens + SIDE - 1) / SIDE * SIDE;
            p->in_unit = has_matrix_unit();
            p->bytes = p->in_unit ? 1 : 2;
            int64_t multiple = p->in_unit ? DEEP : 4;
            p->block = least(BLOCK, (rows + multiple - 1) / multiple * multiple);
            p->blocks = (rows + p->block - 1) / p->block;
            int64_t a_column = 2 * p->tokens * sizeof(float) + p->block * p->bytes;
            widest = p->in_unit ? least(UNIT_CACHE / a_column, UNIT_WIDEST)
                                : least(CACHE / a_column, WIDEST);
            int64_t count = p->groups * p->blocks * tokens;
            p->rounded = aligned_alloc(LINE, (count * p->block * sizeof(int16_t) + LINE - 1) / LINE * LINE);
            p->factors = malloc(count * sizeof(float));
            if (!p->rounded || !p->factors) return 0;
            p->job.pieces = p->tokens;
        }
        p->strip = least(widest, p->width / STRIPS) / TILE * TILE;
        if (p->strip < TILE) p->strip = TILE;
        p->job.pieces += (p->width + p->strip - 1) / p->strip;
    }
    /* For work of some microseconds no other thread is woken. */
    int sound = completed(&p->job, frame, bytes * p->tokens < PIECE / 16);
    if (p->partial && p->partial != p->out) {
        int64_t count = p->tokens * p->width;
        memcpy(p->out, p->partial, count * sizeof(float));
        for (int64_t part = 1; part < p->groups * p->parts; part++)
            for (int64_t i = 0; i < count; i++) p->out[i] += p->partial[part * count + i];
        free(p->partial);
    }
    return sound;
}

/* The number of tokens up to the last one that is not all zeros. Those after it are padding, up to a
   length for which a program is compiled, and would cost as much as others. */
static int64_t without_padding(const float *x, int64_t tokens, int64_t height) {
    for (; tokens; tokens--)
        for (int64_t row = 0; row < height; row++)
            if (x[(tokens - 1) * height + row] != 0) return tokens;
    return 0;
}

/* Arguments: x float32 [tokens, height]; the bytes of the file, int8 [n]; place int32 [3]: where in
   them the first row begins, the first column, and the columns of a whole row; scales float32
   [groups, width].
   Result: float32 [tokens, width]. */
static XLA_FFI_Error *computed(XLA_FFI_CallFrame *frame, int in_integers) {
    if (introduced(frame)) return NULL;
    if (frame->args.size != 4 || frame->rets.size != 1)
        return complaint(frame->api, XLA_FFI_Error_Code_INVALID_ARGUMENT, "not our arguments");
    XLA_FFI_Buffer **args = (XLA_FFI_Buffer **)frame->args.args;
    XLA_FFI_Buffer *x = args[0], *bytes = args[1], *place = args[2], *scales = args[3];
    const int32_t *at = place->data;
    product *p = calloc(1, sizeof *p);
    if (!p) return complaint(frame->api, XLA_FFI_Error_Code_RESOURCE_EXHAUSTED, "out of memory");
    p->x = x->data;
    p->scales = scales->data;
    p->out = ((XLA_FFI_Buffer *)frame->rets.rets[0])->data;
    p->height = x->dims[1], p->tokens = without_padding(p->x, x->dims[0], p->height);
    p->groups = scales->dims[0], p->width = scales->dims[1];
    p->stride = at[2];
    int64_t first = (int64_t)at[0] + at[1];
    p->matrix = (const int8_t *)bytes->data + first;
    p->job.run = piece_of;
    atomic_store(&p->job.holders, 1);
    memset(p->out + p->tokens * p->width, 0, (x->dims[0] - p->tokens) * p->width * sizeof(float));
    XLA_FFI_Error *error = NULL;
    if (first < 0 || first + (p->height - 1) * p->stride + p->width > bytes->dims[0])
        error = complaint(frame->api, XLA_FFI_Error_Code_OUT_OF_RANGE,
                          "a matrix reaches beyond its file");
    else if (p->tokens && !compute(p, frame, in_integers))
        error = complaint(frame->api, XLA_FFI_Error_Code_RESOURCE_EXHAUSTED,
                          "no memory for the sums of a product");
    free(p->rounded);
    free(p->factors);
    release(&p->job);
    return error;
}

XLA_FFI_Error *grokfetch_product(XLA_FFI_CallFrame *frame) { return computed(frame, 0); }

/* The same, in integers for many tokens. */
XLA_FFI_Error *grokfetch_integer_product(XLA_FFI_CallFrame *frame) { return computed(frame, 1); }
