// CPU kernels of training in float32: a block's products (GELU in them), norms and attention, with their gradients.
//
// wav/model/native_training.py compiles this at first use and checks it against torch's gradients before anything
// relies on it. All memory is the caller's, contiguous where no stride is named. Every sum has one fixed order, so the
// number of threads changes no bit.
#include "../inference/native.h"

#define DEEP 256   // rows summed at a time in a weight's gradient: what they are packed to stays in the core's cache
#define TILES 86   // tiles of TALL rows of a weight's gradient in a work item, at most
#define BROAD 256  // and its columns
#define SLICE (DEEP * TALL + LANES)  // a packed tile; an odd number of cache lines, so that tiles share no cache sets

// Calls ``function(..., vectors)`` with a constant, so that its sums stay in registers.
#define WITH_VECTORS(vectors, function, ...)                             \
    do {                                                                 \
        if ((vectors) == WIDE) function(__VA_ARGS__, WIDE);              \
        else if ((vectors) == 3) function(__VA_ARGS__, 3 < WIDE ? 3 : WIDE); \
        else if ((vectors) == 2) function(__VA_ARGS__, 2);               \
        else function(__VA_ARGS__, 1);                                   \
    } while (0)

INLINE int64_t panel_width(int64_t columns, int64_t column) { return least(WIDE * LANES, lanes(columns - column)); }

// --- GELU-tanh: x s(x) with s = 1 / (1 + e^(-2u)), u = sqrt(2 / pi) (x + 0.044715 x^3) -------------------------------

INLINE vec squash(vec x) {
    vec power = x * (all(-2.3022082f) + all(-0.10294324f) * x * x);  // -2u log2(e)
    const ints low = power < all(-120.0f), high = power > all(120.0f);
    power = (vec)(((ints)power & ~(low | high)) | ((ints)all(-120.0f) & low) | ((ints)all(120.0f) & high));
    return all(1.0f) / (all(1.0f) + power_of_two(power));
}

INLINE vec gelu_slope(vec x) {
    const vec s = squash(x);
    return s + x * s * (all(1.0f) - s) * (all(1.5957691f) + all(0.21406533f) * x * x);  // 2 du/dx
}

// --- Products --------------------------------------------------------------------------------------------------------

// out (rows, outs) = a (rows, inner) b (inner, outs) + bias + residual; ``turned``: b is (outs, inner).
typedef struct {
    const float *a, *b, *bias;
    const float *residual, *slope;  // (rows, outs) each, or NULL; the result is multiplied by GELU'(slope)
    int64_t rows, inner, outs, turned, gelu;  // gelu: GELU(a) stands for a
    float *panels, *out;  // panels: inner * lanes(outs) floats, b in panels of WIDE * LANES columns
} product;

static void pack_panel(const void *job, int64_t index, float *scratch) {
    const product *p = job;
    const int64_t column = index * WIDE * LANES, wide = panel_width(p->outs, column);
    const int64_t count = least(wide, p->outs - column);
    float *to = p->panels + column * p->inner;
    (void)scratch;
    if (count < wide) memset(to, 0, sizeof(float) * wide * p->inner);
    if (p->turned)  // some rows of the panel at a time, which stay in the cache while all columns are written
        for (int64_t k = 0; k < p->inner; k += LANES)
            turn(p->b + column * p->inner + k, p->inner, count, least(LANES, p->inner - k), 1.0f, to + k * wide, wide);
    else
        for (int64_t k = 0; k < p->inner; k++)
            memcpy(to + k * wide, p->b + k * p->outs + column, sizeof(float) * count);
}

// Writes a tile's sums; ``whole``: all columns exist.
INLINE void product_finish(const product *p, vec (*sum)[WIDE], int64_t row, int64_t column, int rows, int vectors,
                           int whole) {
    for (int q = 0; q < rows; q++)
        for (int v = 0; v < vectors; v++) {
            const int64_t at = (row + q) * p->outs + column + v * LANES;
            const int64_t left = whole ? LANES : p->outs - column - v * LANES;
            if (p->slope) sum[q][v] *= gelu_slope(load_some(p->slope + at, left));
            if (p->residual) sum[q][v] += load_some(p->residual + at, left);
        }
    for (int q = 0; q < rows; q++)
        for (int v = 0; v < vectors; v++) {
            const int64_t at = (row + q) * p->outs + column + v * LANES;
            store_some(p->out + at, sum[q][v], whole ? LANES : p->outs - column - v * LANES);
        }
}

// Asks for what the next tile multiplies and for what this one writes (and multiplies by) at its end.
INLINE void product_fetch(const product *p, const float *a, int64_t row, int64_t column, int vectors) {
    for (int q = 0; q < TALL; q++)
        for (int v = 0; v < vectors; v++) {
            const int64_t at = (row + q) * p->outs + column + v * LANES;
            __builtin_prefetch(p->out + at, 1);
            if (p->slope) __builtin_prefetch(p->slope + at);
            if (p->residual) __builtin_prefetch(p->residual + at);
        }
    if (column == 0 && !p->gelu)
        for (int64_t k = 0; k < TALL * p->inner; k += LANES) __builtin_prefetch(a + TALL * p->inner + k);
}

// ``a``: what is multiplied of the rows from ``row`` on.
INLINE void product_tile(const product *p, const float *a, int64_t row, int64_t column, int rows, int vectors) {
    const float *from[TALL], *panel = p->panels + column * p->inner;
    vec sum[TALL][WIDE];
    for (int q = 0; q < TALL; q++) from[q] = a + (q < rows ? q : 0) * p->inner;
    for (int v = 0; v < vectors; v++) {
        const vec bias = p->bias ? load_some(p->bias + column + v * LANES, p->outs - column - v * LANES) : (vec){0};
        for (int q = 0; q < TALL; q++) sum[q][v] = bias;
    }
    product_fetch(p, a, row, column, vectors);
    multiply_add(from, 1, panel, vectors * LANES, p->inner, vectors, sum);
    if (rows == TALL && p->outs - column >= vectors * LANES) product_finish(p, sum, row, column, TALL, vectors, 1);
    else product_finish(p, sum, row, column, rows, vectors, 0);
}

static void product_rows(const void *job, int64_t index, float *scratch) {
    const product *p = job;
    const int64_t begin = index * ROWS, end = least(p->rows, begin + ROWS), count = (end - begin) * p->inner;
    const float *a = p->a + begin * p->inner;
    for (int64_t i = 0; p->gelu && i < count; i += LANES) {
        const vec x = load_some(a + i, count - i);
        store_some(scratch + i, x * squash(x), count - i);
    }
    if (p->gelu) a = scratch;
    for (int64_t column = 0; column < p->outs; column += WIDE * LANES) {
        const int64_t vectors = panel_width(p->outs, column) / LANES;
        for (int64_t row = begin; row < end; row += TALL)
            WITH_VECTORS(vectors, product_tile, p, a + (row - begin) * p->inner, row, column,
                         (int)least(TALL, end - row));
    }
}

int wav_product(const product *p, int threads) {
    return spread(pack_panel, p, (p->outs + WIDE * LANES - 1) / (WIDE * LANES), 0, threads) ||
           spread(product_rows, p, (p->rows + ROWS - 1) / ROWS, p->gelu ? ROWS * p->inner : 0, threads);
}

// weight (outs, inner) = grad^T x and bias (outs) = sum of grad (rows, outs), or NULL; x (rows, inner).
typedef struct {
    const float *grad, *x;
    int64_t rows, outs, inner, gelu, tiles;  // gelu: GELU(x) stands for x; tiles: of a work item, change no bit
    float *weight, *bias;
} gradient;

// Columns ``first`` to ``last`` of ``rows`` rows of grad, TALL at a time: slices of [row][TALL].
static void pack_slices(const float *grad, int64_t outs, int64_t rows, int64_t first, int64_t last, float *to) {
    for (int64_t r = 0; r < rows; r++) {
        const float *from = grad + r * outs;
        float *slice = to + r * TALL;
        int64_t i = first;
        for (; i + 8 <= last; i += TALL, slice += SLICE) memcpy(slice, from + i, 8 * sizeof(float));  // 2 too many
        for (; i < last; i += TALL, slice += SLICE)
            for (int q = 0; q < TALL; q++) slice[q] = i + q < last ? from[i + q] : 0.0f;
    }
}

INLINE void gradient_tile(const gradient *g, const float *slice, const float *panel, int64_t deep, int64_t row,
                          int64_t column, int rows, int more, int vectors) {
    const float *from[TALL];
    vec sum[TALL][WIDE];
    for (int q = 0; q < TALL; q++) from[q] = slice + q;
    for (int q = 0; q < TALL; q++)
        for (int v = 0; v < vectors; v++) sum[q][v] = (vec){0};
    multiply_add(from, TALL, panel, vectors * LANES, deep, vectors, sum);
    for (int q = 0; q < rows; q++)
        for (int v = 0; v < vectors; v++) {
            const int64_t at = column + v * LANES, left = g->inner - at;
            float *to = g->weight + (row + q) * g->inner + at;
            store_some(to, more ? sum[q][v] + load_some(to, left) : sum[q][v] + (vec){0}, left);
        }
}

// One block of TILES * TALL rows and BROAD columns of the weight's gradient.
static void gradient_block(const void *job, int64_t index, float *scratch) {
    const gradient *g = job;
    const int64_t across = (g->inner + BROAD - 1) / BROAD, left = index % across * BROAD;
    const int64_t right = least(g->inner, left + BROAD), first = index / across * g->tiles * TALL;
    const int64_t last = least(g->outs, first + g->tiles * TALL);
    float *slices = scratch, *panels = scratch + g->tiles * SLICE + 8, *restrict bias = g->bias;
    const int sums = g->bias && left == 0;
    if (sums) memset(g->bias + first, 0, sizeof(float) * (last - first));
    for (int64_t start = 0; start < g->rows; start += DEEP) {
        const int64_t deep = least(DEEP, g->rows - start);
        const float *grad = g->grad + start * g->outs, *x = g->x + start * g->inner;
        pack_slices(grad, g->outs, deep, first, last, slices);
        for (int64_t r = 0; sums && r < deep; r++)
            for (int64_t i = first; i < last; i++) bias[i] += grad[r * g->outs + i];
        for (int64_t column = left; column < right; column += WIDE * LANES) {
            const int64_t wide = panel_width(right, column), count = least(wide, right - column);
            for (int64_t r = 0; r < deep; r++)
                for (int64_t v = 0; v < wide; v += LANES) {
                    __builtin_prefetch(x + (r + 8) * g->inner + column + v);
                    vec y = load_some(x + r * g->inner + column + v, count - v);
                    if (g->gelu) y *= squash(y);
                    store(panels + r * wide + v, y);
                }
            for (int64_t row = first; row < last; row += TALL)
                WITH_VECTORS(wide / LANES, gradient_tile, g, slices + (row - first) / TALL * SLICE, panels, deep, row,
                             column, (int)least(TALL, last - row), start > 0);
        }
    }
}

int wav_gradient(gradient *g, int threads) {
    const int64_t tiles = (g->outs + TALL - 1) / TALL, across = (g->inner + BROAD - 1) / BROAD;
    const int64_t shares = least(threads, tiles);
    g->tiles = least(TILES, (tiles + shares - 1) / shares);
    const int64_t down = (tiles + g->tiles - 1) / g->tiles;
    return spread(gradient_block, g, down * across, g->tiles * SLICE + 8 + DEEP * WIDE * LANES, threads);
}

int wav_training_lanes(void) { return LANES; }
