/* Products of float32 activations with an int8 matrix in memory, at the speed of that memory.

   `loader/devices/native.py` compiles this file where it is used, for the processor that is there, and calls
   it from JAX. It computes what `loader/devices/kernels.py` computes in plain JAX, and sums in an order that
   depends on shapes alone: never on how many threads there are, nor on which of them was faster.

   A few tokens are bound by memory: each piece of work is a run of whole rows, read once from end to
   end, some rows side by side. Many tokens are bound by arithmetic: each piece is a strip of columns,
   of which one small panel after another is converted and used by all tokens: as floats, or as the
   integers of `integers.h`, which are faster where `loader/devices/tuning.py` finds them to be. */

#include <string.h>

#include "integers.h"
#include "matrix_unit.h"
#include "pool.h"
#include "tiles.h"

enum {
    FEW = 12,                  /* tokens up to which a panel does not pay */
    PANEL_ROWS = 64,           /* a converted tile is 16 KiB, half of a first-level cache */
    WIDEST = 512,              /* columns of a strip whose tiles are converted at once */
    AHEAD = 16,                /* rows that are asked for before they are converted */
    SUMS = 1 << 15,            /* sums of a piece of work: 128 KiB of a second-level cache */
    STRIPS = 8,                /* pieces side by side for many tokens, at least */
    PIECE = 1 << 22,           /* bytes of the matrix in a piece for few tokens, at least */
    MOST_PARTS = 16            /* pieces that a group of rows is cut into, at most */
};

/* One product. */
typedef struct {
    job job;
    const float *x;        /* [tokens, height] */
    const int8_t *matrix;  /* [height, width], rows `stride` apart */
    const float *scales;   /* [groups, width] */
    float *out;            /* [tokens, width] */
    float *partial;        /* [groups * parts, tokens, width], for few tokens; else null */
    int64_t tokens, height, width, stride, groups;
    int64_t parts;         /* runs of rows that a group is cut into */
    int64_t strip, strips; /* columns of a piece, and pieces side by side */
    int16_t *rounded;      /* [groups * blocks, tokens, block], for many in integers; else null. For
                              a matrix unit the tokens of its tiles, in two planes of bytes */
    float *factors;        /* [groups * blocks, tokens], of what is rounded */
    int64_t block, blocks; /* rows that share a factor, and how many such blocks a group has */
    int in_unit;           /* whether a matrix unit multiplies */
    int64_t bytes;         /* of a weight in a panel for integers */
    atomic_long ready;     /* tokens that are rounded: the first pieces of the work */
} product;

/* Columns that do not fill a tile: only small models have them. */
static void narrow(int64_t tokens, const float *x, int64_t height, const int8_t *weights,
                   int64_t stride, int64_t rows, int64_t columns, float *sums, int64_t width) {
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t row = 0; row < rows; row++)
            for (int64_t column = 0; column < columns; column++)
                sums[t * width + column] +=
                    x[t * height + row] * (float)weights[row * stride + column];
}

static int64_t least(int64_t one, int64_t other) { return one < other ? one : other; }

/* A run of one group's rows, for at most FEW tokens: scaled sums into its own part of `partial`. */
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

/* Some rows of a strip as floats, tile after tile; read along the rows, since lines one above the
   other would drive each other out of the cache. */
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

/* Adds what some rows of a strip give to the sums of all tokens, in float32. */
static void add(product *p, int64_t row, int64_t rows, int64_t first, int64_t tiles_wide,
                float *panel, float *sums, int64_t columns) {
    int64_t runs = (p->tokens + AT_ONCE - 1) / AT_ONCE;
    convert(p->matrix + row * p->stride + first, p->stride, rows, tiles_wide, panel);
    for (int64_t t = 0; t < tiles_wide; t++)
        /* Runs of nearly equal length: short ones leave arithmetic waiting. */
        for (int64_t run = 0; run < runs; run++) {
            int64_t token = run * p->tokens / runs, end = (run + 1) * p->tokens / runs;
            tiles(end - token, p->x + token * p->height + row, p->height, NULL,
                  panel + t * PANEL_ROWS * TILE, 0, rows, sums + token * columns + t * TILE,
                  columns);
        }
}

/* The scaled sums of a group of rows into the result, or added to what it holds of earlier groups. */
static void scale(const product *p, int64_t group, int64_t first, int64_t columns, const float *sums) {
    for (int64_t t = 0; t < p->tokens; t++) {
        float *out = p->out + t * p->width + first;
        const float *scales = p->scales + group * p->width + first;
        for (int64_t column = 0; column < columns; column++) {
            float scaled = sums[t * columns + column] * scales[column];
            out[column] = group ? out[column] + scaled : scaled;
        }
    }
}

/* Memory for a piece's sums and, behind them, its panels; null, and the work has failed, if there is
   none. */
static float *sums_and(product *p, int64_t columns, int64_t panel_bytes, void **panels) {
    size_t of_sums = (p->tokens * columns * sizeof(float) + LINE - 1) / LINE * LINE;
    float *sums = aligned_alloc(LINE, (of_sums + panel_bytes + LINE - 1) / LINE * LINE);
    if (!sums) atomic_store(&p->job.failed, 1);
    *panels = (char *)sums + of_sums;
    return sums;
}

/* A strip of columns for any number of tokens, into the result, in float32. */
static void many(product *p, int64_t piece) {
    int64_t first = piece * p->strip, columns = least(p->strip, p->width - first);
    int64_t rows = p->height / p->groups, tiles_wide = columns / TILE, even = tiles_wide * TILE;
    void *panel;
    float *sums = sums_and(p, columns, PANEL_ROWS * even * sizeof(float), &panel);
    for (int64_t group = 0; sums && group < p->groups; group++) {
        memset(sums, 0, p->tokens * columns * sizeof(float));
        for (int64_t done = 0; done < rows; done += PANEL_ROWS) {
            int64_t row = group * rows + done, count = least(PANEL_ROWS, rows - done);
            add(p, row, count, first, tiles_wide, panel, sums, columns);
            if (even < columns)
                narrow(p->tokens, p->x + row, p->height, p->matrix + row * p->stride + first + even,
                       p->stride, count, columns - even, sums + even, columns);
        }
        scale(p, group, first, columns, sums);
    }
    free(sums);
}

/* Rows that share factors: block `number` of all groups'. */
typedef struct {
    int64_t group, row, rows;
} block;

static block block_of(const product *p, int64_t number) {
    int64_t rows = p->height / p->groups, done = number % p->blocks * p->block;
    int64_t group = number / p->blocks;
    return (block){group, group * rows + done, least(p->block, rows - done)};
}

/* Fills some fours of a block's rows into the panel of a strip. */
static void fill(const product *p, block of, int64_t from, int64_t to, int64_t first,
                 int64_t tiles_wide, int8_t *panel) {
    static const int8_t none[TILE];
    for (int64_t four = from; four < to; four++)
        for (int64_t t = 0; t < tiles_wide; t++) {
            const int8_t *start = p->matrix + (of.row + 4 * four) * p->stride + first + t * TILE;
            const int8_t *rows[4];
            for (int r = 0; r < 4; r++) {
                rows[r] = 4 * four + r < of.rows ? start + r * p->stride : none;
                __builtin_prefetch(start + (AHEAD + r) * p->stride, 0, 2);
            }
            if (p->in_unit) unit_lines(rows, panel, p->block, t, four);
            else pair_lines(rows, panel, p->block, t, four);
        }
}

/* The same in integers. While a block is multiplied, the next one's rows are read and filled into
   another panel, a few after each of its tiles, so that neither memory nor arithmetic waits. */
static void many_in_integers(product *p, int64_t piece) {
    int64_t first = piece * p->strip, columns = least(p->strip, p->width - first);
    int64_t tiles_wide = columns / TILE, even = tiles_wide * TILE, fours = p->block / 4;
    int64_t side = p->in_unit ? SIDE : AT_ONCE, runs = (p->tokens + side - 1) / side;
    int64_t blocks = p->groups * p->blocks, bytes = p->block * even * p->bytes;
    void *panels;
    float *sums = sums_and(p, columns, 2 * bytes, &panels);
    if (!sums) return;
    if (p->in_unit) begin_unit();
    fill(p, block_of(p, 0), 0, fours, first, tiles_wide, panels);
    for (int64_t number = 0; number < blocks; number++) {
        block now = block_of(p, number), next = block_of(p, number + 1);
        int8_t *panel = (int8_t *)panels + number % 2 * bytes;
        int8_t *other = (int8_t *)panels + (number + 1) % 2 * bytes;
        int64_t step = 0, steps = number + 1 < blocks ? tiles_wide * runs : 0;
        if (number % p->blocks == 0) memset(sums, 0, p->tokens * columns * sizeof(float));
        for (int64_t t = 0; t < tiles_wide; t++)
            for (int64_t run = 0; run < runs; run++) {
                /* Runs of nearly equal length where they may have any: short ones wait. */
                int64_t token = p->in_unit ? run * side : run * p->tokens / runs;
                int64_t end = p->in_unit ? least(token + side, p->tokens) : (run + 1) * p->tokens / runs;
                const float *factors = p->factors + number * p->tokens + token;
                const int8_t *of_tile = panel + t * p->block * TILE * p->bytes;
                float *to = sums + token * columns + t * TILE;
                if (p->in_unit)
                    unit_tiles(end - token, p->rounded + (number * runs + run) * side * p->block,
                               factors, of_tile, p->block, to, columns);
                else
                    integer_tiles(end - token, p->rounded + (number * p->tokens + token) * p->block,
                                  p->block, factors, (const int32_t *)of_tile, (now.rows + 1) / 2, to,
                                  columns);
                if (step < steps) {
                    fill(p, next, step * fours / steps, (step + 1) * fours / steps, first, tiles_wide,
                         other);
                    step++;
                }
            }
        if (even < columns)
            narrow(p->tokens, p->x + now.row, p->height,
                   p->matrix + now.row * p->stride + first + even, p->stride, now.rows, columns - even,
                   sums + even, columns);
        if ((number + 1) % p->blocks == 0) scale(p, now.group, first, columns, sums);
    }
    if (p->in_unit) end_unit();
    free(sums);
}

/* The activations of a token as integers. */
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
    else { /* Others may still be at tokens that they took before this piece. */
        for (int64_t times = 0; atomic_load(&p->ready) < p->tokens; times++) rest(times);
        many_in_integers(p, piece - p->tokens);
    }
}

/* Computes with the caller's thread and those of XLA's pool. */
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
        p->strip = least(least(SUMS / p->tokens, WIDEST), p->width / STRIPS) / TILE * TILE;
        if (p->strip < TILE) p->strip = TILE;
        p->job.pieces = (p->width + p->strip - 1) / p->strip;
        if (in_integers) {
            int64_t rows = p->height / p->groups;
            p->in_unit = has_matrix_unit();
            p->bytes = p->in_unit ? 1 : 2;
            int64_t multiple = p->in_unit ? DEEP : 4, tokens = (p->tokens + SIDE - 1) / SIDE * SIDE;
            p->block = least(BLOCK, (rows + multiple - 1) / multiple * multiple);
            p->blocks = (rows + p->block - 1) / p->block;
            int64_t count = p->groups * p->blocks * tokens, bytes = count * p->block * sizeof(int16_t);
            p->rounded = aligned_alloc(LINE, (bytes + LINE - 1) / LINE * LINE);
            p->factors = malloc(count * sizeof(float));
            if (!p->rounded || !p->factors) return 0;
            p->job.pieces += p->tokens;
        }
    }
    /* Work of some microseconds is not worth waking anyone. */
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

/* Tokens up to the last one that is not zero from end to end. Those behind it only fill a step up to
   a length for which there is a program, and would cost as much as others. */
static int64_t without_padding(const float *x, int64_t tokens, int64_t height) {
    for (; tokens; tokens--)
        for (int64_t row = 0; row < height; row++)
            if (x[(tokens - 1) * height + row] != 0) return tokens;
    return 0;
}

/* Arguments: x float32 [tokens, height], the bytes int8 [n], place int32 [3]: where in them the
   first row begins, the first column, columns of a whole row; scales float32 [groups, width].
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

/* The same in integers where there are many tokens. */
XLA_FFI_Error *grokfetch_integer_product(XLA_FFI_CallFrame *frame) { return computed(frame, 1); }
