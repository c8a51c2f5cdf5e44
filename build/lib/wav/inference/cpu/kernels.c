// CPU kernels of inference in float32: matrix products with the norms around them, and attention without the maximum.
//
// kernels.py compiles this at first use and checks it against torch before anything relies on it. All memory but scratch
// is the caller's. A row's result depends on that row alone, not on its place or the other rows, and a call runs on its
// caller's thread.
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#define WIDE 4  // vectors of a tile's width; its sums stay in registers
#elif defined(__AVX2__)
#define LANES 8
#define WIDE 2
#else
#define LANES 4
#define WIDE 2
#endif
#define TALL 6    // rows of a tile, queries at a time: enough sums in flight to hide the latency of a multiply-add
#define ROWS 48   // rows of a work item; what they pass through stays in the core's cache

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float four __attribute__((vector_size(16), aligned(4), may_alias));
#define INLINE static inline __attribute__((always_inline))

INLINE vec load(const float *p) { return *(const vec *)p; }
INLINE void store(float *p, vec x) { *(vec *)p = x; }
INLINE vec all(float x) { return x - (vec){0}; }
INLINE int64_t padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE vec load_some(const float *p, int64_t n) {
    if (n >= LANES) return load(p);
    vec x = {0};
    memcpy(&x, p, sizeof(float) * n);
    return x;
}

INLINE void store_some(float *p, vec x, int64_t n) {
    if (n >= LANES) store(p, x);
    else memcpy(p, &x, sizeof(float) * n);
}

INLINE float total(vec x) {
    four part[LANES / 4], sum;
    memcpy(part, &x, sizeof x);
    sum = part[0];
    for (int i = 1; i < LANES / 4; i++) sum += part[i];
    sum += __builtin_shufflevector(sum, sum, 2, 3, 0, 1);
    return sum[0] + sum[1];
}

// 2^x for |x| < 126, to about one unit in the last place.
INLINE vec power_of_two(vec x) {
    const vec shift = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
    const vec rounded = x + shift, f = x - (rounded - shift);
    vec y = all(1.5403530e-4f);
    y = y * f + all(1.3333558e-3f);
    y = y * f + all(9.6181291e-3f);
    y = y * f + all(5.5504109e-2f);
    y = y * f + all(2.4022651e-1f);
    y = y * f + all(6.9314718e-1f);
    y = y * f + all(1.0f);
    return (vec)((ints)y + ((ints)rounded << 23));
}

// GELU-tanh: x / (1 + e^(-2u)), u = sqrt(2 / pi) (x + 0.044715 x^3).
INLINE vec gelu(vec x) {
    vec power = x * (all(-2.3022082f) + all(-0.10294324f) * x * x);  // -2u log2(e)
    const ints low = power < all(-120.0f), high = power > all(120.0f);
    power = (vec)(((ints)power & ~(low | high)) | ((ints)all(-120.0f) & low) | ((ints)all(120.0f) & high));
    return x / (all(1.0f) + power_of_two(power));
}

// --- Work items ------------------------------------------------------------------------------------------------------

typedef void (*item)(const void *job, int64_t index, float *scratch);

// Runs ``items`` items with ``scratch`` floats; 0, or 1 where memory ran out.
static int run(item call, const void *job, int64_t items, size_t scratch) {
    float *memory = aligned_alloc(64, (scratch * sizeof(float) + 64) / 64 * 64);
    for (int64_t i = 0; memory && i < items; i++) call(job, i, memory);
    free(memory);
    return !memory;
}

// --- Rows ------------------------------------------------------------------------------------------------------------

INLINE float inverse_rms(const float *x, int64_t n, float eps) {
    vec sum[4] = {{0}};
    int64_t i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES)
        for (int j = 0; j < 4; j++) sum[j] += load(x + i + j * LANES) * load(x + i + j * LANES);
    for (; i + LANES <= n; i += LANES) sum[0] += load(x + i) * load(x + i);
    float squares = total((sum[0] + sum[1]) + (sum[2] + sum[3]));
    for (; i < n; i++) squares += x[i] * x[i];
    return 1.0f / sqrtf(squares / n + eps);
}

#if LANES == 16
#define TAKE(x, a, b, c, d) \
    __builtin_shufflevector(x, x, a, b, c, d, a + 4, b + 4, c + 4, d + 4, a + 8, b + 8, c + 8, d + 8, a + 12, b + 12, \
                            c + 12, d + 12)
#elif LANES == 8
#define TAKE(x, a, b, c, d) __builtin_shufflevector(x, x, a, b, c, d, a + 4, b + 4, c + 4, d + 4)
#else
#define TAKE(x, a, b, c, d) __builtin_shufflevector(x, x, a, b, c, d)
#endif

// Rotates neighbouring pairs of x by rope's pairs (cosine, sine).
INLINE void rotate(float *x, const float *rope, int64_t n) {
    vec sign;
    for (int i = 0; i < LANES; i++) sign[i] = i % 2 ? 1.0f : -1.0f;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        const vec y = load(x + i), angle = load(rope + i);
        store(x + i, y * TAKE(angle, 0, 0, 2, 2) + TAKE(y, 1, 0, 3, 2) * (sign * TAKE(angle, 1, 1, 3, 3)));
    }
    for (; i < n; i += 2) {
        const float even = x[i], odd = x[i + 1];
        x[i] = even * rope[i] - odd * rope[i + 1];
        x[i + 1] = odd * rope[i] + even * rope[i + 1];
    }
}

// to[d][k] = scale * from[k][d].
static void transpose(const float *from, int64_t step, int64_t keys, int64_t size, float scale, float *to,
                        int64_t wide) {
    int64_t k = 0, d;
    for (; k + 4 <= keys; k += 4) {
        const float *x = from + k * step;
        for (d = 0; d + 4 <= size; d += 4) {
            const four p = *(const four *)(x + d) * scale, q = *(const four *)(x + step + d) * scale;
            const four r = *(const four *)(x + 2 * step + d) * scale, s = *(const four *)(x + 3 * step + d) * scale;
            const four pq = __builtin_shufflevector(p, q, 0, 4, 1, 5), rs = __builtin_shufflevector(r, s, 0, 4, 1, 5);
            const four qp = __builtin_shufflevector(p, q, 2, 6, 3, 7), sr = __builtin_shufflevector(r, s, 2, 6, 3, 7);
            float *y = to + d * wide + k;
            *(four *)y = __builtin_shufflevector(pq, rs, 0, 1, 4, 5);
            *(four *)(y + wide) = __builtin_shufflevector(pq, rs, 2, 3, 6, 7);
            *(four *)(y + 2 * wide) = __builtin_shufflevector(qp, sr, 0, 1, 4, 5);
            *(four *)(y + 3 * wide) = __builtin_shufflevector(qp, sr, 2, 3, 6, 7);
        }
        for (; d < size; d++)
            for (int i = 0; i < 4; i++) to[d * wide + k + i] = x[i * step + d] * scale;
    }
    for (; k < keys; k++)
        for (d = 0; d < size; d++) to[d * wide + k] = from[k * step + d] * scale;
}

// --- Products --------------------------------------------------------------------------------------------------------

// Weights stand in panels of WIDE * LANES columns, each panel (in, columns); the last may be narrower.
typedef struct {
    const float *weight, *bias;  // bias: padded to whole vectors
    int64_t in, outs;
} product;

// out = residual + gate * (RMS(x) * scale + shift) W1 ... W2; what is NULL is left out.
typedef struct {
    const float *x;
    int64_t rows;                 // x: (rows, in)
    const float *scale, *shift;   // (groups, in) each; row r is of group r / cells % groups
    int64_t groups, cells;
    product first, second;        // second.weight NULL: one product; otherwise GELU between
    const float *norms, *rope;    // (parts, width): RMS norm of the result's first parts; rope (length, width) on them
    int64_t parts, width, length;
    const float *residual, *gate;  // (rows, outs) and (groups, outs)
    float eps, norm_eps;
    float *out;                    // (rows, outs)
} linear;

typedef struct {
    const float *residual, *gate;
    int64_t row, groups, cells;  // row: of the first row in the whole
    int gelu;
} after;

INLINE void tile(const float *const *x, const float *w, const product *p, int64_t column, int vectors, int rows,
                 const after *a, float *out) {
    vec sum[TALL][WIDE];
    for (int q = 0; q < TALL; q++)
        for (int v = 0; v < vectors; v++) sum[q][v] = load(p->bias + column + v * LANES);
    for (int64_t k = 0; k < p->in; k++) {
        vec y[WIDE];
        for (int v = 0; v < vectors; v++) y[v] = load(w + (k * vectors + v) * LANES);
        for (int q = 0; q < TALL; q++)
            for (int v = 0; v < vectors; v++) sum[q][v] += all(x[q][k]) * y[v];
    }
    for (int q = 0; q < rows; q++)
        for (int v = 0; v < vectors; v++) {
            const int64_t at = column + v * LANES, left = p->outs - at, row = a->row + q;
            vec y = a->gelu ? gelu(sum[q][v]) : sum[q][v];
            if (a->gate) y *= load_some(a->gate + row / a->cells % a->groups * p->outs + at, left);
            if (a->residual) y += load_some(a->residual + row * p->outs + at, left);
            store_some(out + q * p->outs + at, y, left);
        }
}

// x (rows, in) times weights, to out (rows, outs).
static void multiply(const float *x, int64_t rows, const product *p, after a, float *out) {
    const int64_t begin = a.row;
    for (int64_t column = 0; column < p->outs; column += WIDE * LANES) {
        const float *w = p->weight + p->in * column;
        const int64_t vectors = least(WIDE, padded(p->outs - column) / LANES);
        for (int64_t row = 0; row < rows; row += TALL) {
            const int count = (int)least(TALL, rows - row);
            const float *from[TALL];
            for (int q = 0; q < TALL; q++) from[q] = x + (row + (q < count ? q : 0)) * p->in;
            float *to = out + row * p->outs;
            a.row = begin + row;
            if (vectors == WIDE) tile(from, w, p, column, WIDE, count, &a, to);
            else if (vectors == 3) tile(from, w, p, column, 3 < WIDE ? 3 : WIDE, count, &a, to);
            else if (vectors == 2) tile(from, w, p, column, 2, count, &a, to);
            else tile(from, w, p, column, 1, count, &a, to);
        }
    }
}

// RMS norm of the first parts of each row, then the rotation of neighbouring pairs.
static void finish(const linear *l, int64_t row, int64_t rows, int64_t outs, float *out) {
    const int64_t n = l->width;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t part = 0; part < l->parts; part++) {
            float *restrict x = out + r * outs + part * n;
            const float *norm = l->norms + part * n, inverse = inverse_rms(x, n, l->norm_eps);
            for (int64_t i = 0; i < n; i++) x[i] = x[i] * inverse * norm[i];
            if (l->rope) rotate(x, l->rope + (row + r) % l->length * n, n);
        }
}

static void linear_rows(const void *job, int64_t index, float *scratch) {
    const linear *l = job;
    const int64_t row = index * ROWS, rows = least(ROWS, l->rows - row), in = l->first.in;
    const float *x = l->x + row * in;
    if (l->scale) {
        for (int64_t r = 0; r < rows; r++) {
            const float *from = x + r * in, inverse = inverse_rms(from, in, l->eps);
            const int64_t group = (row + r) / l->cells % l->groups * in;
            for (int64_t i = 0; i < in; i++)
                scratch[r * in + i] = l->shift[group + i] + from[i] * inverse * l->scale[group + i];
        }
        x = scratch, scratch += ROWS * in;
    }
    after between = {NULL, NULL, row, l->groups, l->cells, l->second.weight != NULL}, end = between;
    end.residual = l->residual, end.gate = l->gate, end.gelu = 0;
    const product *last = &l->first;
    if (l->second.weight) {
        multiply(x, rows, &l->first, between, scratch);
        x = scratch, last = &l->second;
    }
    multiply(x, rows, last, end, l->out + row * last->outs);
    finish(l, row, rows, last->outs, l->out + row * last->outs);
}

int wav_linear(const linear *l) {
    const size_t scratch = ROWS * ((l->scale ? l->first.in : 0) + (l->second.weight ? l->first.outs : 0));
    return run(linear_rows, l, (l->rows + ROWS - 1) / ROWS, scratch);
}

// --- Attention -------------------------------------------------------------------------------------------------------

typedef struct {
    const float *query, *key, *value, *mask;   // mask (rows, keys): 1 for keys that count, or NULL
    int64_t rows, heads, queries, keys, size;  // size: of a head, whose channels are adjacent
    int64_t query_row, query_step, key_row, key_step, value_row, value_step;  // strides of rows and tokens
    float scale;                               // of logits, as powers of two
    float *out;                                // (rows, queries, heads * size)
} attention;

// weights[TALL][many] = mask * 2^(query . transposed), 0 past ``keys``; inverse: of their sums.
INLINE void weigh(const float *const *query, const float *transposed, const float *mask, int64_t size, int64_t keys,
                  int64_t many, float *weights, float *inverse) {
    ints lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    vec sums[TALL] = {{0}};
    for (int64_t k = 0; k < many; k += LANES) {
        vec logit[TALL] = {{0}};
        for (int64_t d = 0; d < size; d++) {
            const vec x = load(transposed + d * many + k);
            for (int q = 0; q < TALL; q++) logit[q] += all(query[q][d]) * x;
        }
        const vec valid = (vec)((ints)all(1.0f) & (lane < (int32_t)(keys - k)));
        const vec counts = mask ? load_some(mask + k, keys - k) : valid;
        for (int q = 0; q < TALL; q++) {
            const vec weight = power_of_two(logit[q]) * counts;
            store(weights + q * many + k, weight);
            sums[q] += weight;
        }
    }
    for (int q = 0; q < TALL; q++) inverse[q] = 1.0f / total(sums[q]);
}

// out[q] = inverse[q] * sum over keys of weights[q][k] * values[k], ``vectors`` vectors wide.
INLINE void mix(const float *weights, int64_t many, const float *values, int64_t keys, int64_t wide,
                const float *inverse, int vectors, int count, float *out, int64_t step, int64_t left) {
    vec sum[TALL][WIDE];
    for (int q = 0; q < TALL; q++)
        for (int v = 0; v < vectors; v++) sum[q][v] = (vec){0};
    for (int64_t k = 0; k < keys; k++)
        for (int v = 0; v < vectors; v++) {
            const vec x = load(values + k * wide + v * LANES);
            for (int q = 0; q < TALL; q++) sum[q][v] += all(weights[q * many + k]) * x;
        }
    for (int q = 0; q < count; q++)
        for (int v = 0; v < vectors; v++)
            store_some(out + q * step + v * LANES, sum[q][v] * all(inverse[q]), left - v * LANES);
}

// One head of one row.
static void attend_head(const void *job, int64_t index, float *scratch) {
    const attention *a = job;
    const int64_t row = index / a->heads, head = index % a->heads, size = a->size, keys = a->keys;
    const int64_t many = padded(keys), wide = padded(size), step = a->heads * size;
    const float *query = a->query + row * a->query_row + head * size;
    const float *value = a->value + row * a->value_row + head * size, *mask = a->mask ? a->mask + row * keys : NULL;
    float *transposed = scratch, *values = transposed + size * many, *weights = values + keys * wide;
    memset(transposed, 0, sizeof(float) * (size * many + keys * wide));
    transpose(a->key + row * a->key_row + head * size, a->key_step, keys, size, a->scale, transposed, many);
    for (int64_t k = 0; k < keys; k++) memcpy(values + k * wide, value + k * a->value_step, sizeof(float) * size);
    for (int64_t first = 0; first < a->queries; first += TALL) {
        const int count = (int)least(TALL, a->queries - first);
        const float *from[TALL];
        float inverse[TALL], *out = a->out + (row * a->queries + first) * step + head * size;
        for (int q = 0; q < TALL; q++) from[q] = query + (first + (q < count ? q : 0)) * a->query_step;
        weigh(from, transposed, mask, size, keys, many, weights, inverse);
        int64_t d = 0;
        for (; wide - d >= WIDE * LANES; d += WIDE * LANES)
            mix(weights, many, values + d, keys, wide, inverse, WIDE, count, out + d, step, size - d);
        for (; d < wide; d += LANES)
            mix(weights, many, values + d, keys, wide, inverse, 1, count, out + d, step, size - d);
    }
}

int wav_attend(const attention *a) {
    const size_t scratch = a->size * padded(a->keys) + a->keys * padded(a->size) + TALL * padded(a->keys);
    return run(attend_head, a, a->rows * a->heads, scratch);
}

int wav_lanes(void) { return LANES; }
int wav_wide(void) { return WIDE; }
