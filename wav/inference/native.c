// CPU kernels of inference in float32: matrix products with the norms around them, and attention without the maximum.
//
// wav/inference/native.py compiles this at first use and checks it against torch before anything relies on it. All memory
// is the caller's. A row's result depends on that row alone: not on its place, the other rows, or the threads.
#include "native.h"

// --- Products --------------------------------------------------------------------------------------------------------

// Weights stand in panels of WIDE * LANES columns, each panel (in, columns); the last may be narrower.
typedef struct {
    const float *weight, *bias;  // bias: padded to whole vectors
    int64_t in, outs;
} product;

// out = residual + gate * (RMS(x) * scale + shift) W1 ... W2; what is NULL is left out.
typedef struct {
    const float *x;
    int64_t rows, step;           // x: (rows, in), rows ``step`` apart
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

// x (rows, in), rows ``step`` apart, times weights, to out (rows, outs).
static void multiply(const float *x, int64_t step, int64_t rows, const product *p, after a, float *out) {
    const int64_t begin = a.row;
    for (int64_t column = 0; column < p->outs; column += WIDE * LANES) {
        const float *w = p->weight + p->in * column;
        const int64_t vectors = least(WIDE, lanes(p->outs - column) / LANES);
        for (int64_t row = 0; row < rows; row += TALL) {
            const int count = (int)least(TALL, rows - row);
            const float *from[TALL];
            for (int q = 0; q < TALL; q++) from[q] = x + (row + (q < count ? q : 0)) * step;
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
            if (l->rope) rotate(x, l->rope + (row + r) % l->length * n, n, 1.0f, x);
        }
}

static void linear_rows(const void *job, int64_t index, float *scratch) {
    const linear *l = job;
    const int64_t row = index * ROWS, rows = least(ROWS, l->rows - row), in = l->first.in;
    const float *x = l->x + row * l->step;
    int64_t step = l->step;
    if (l->scale) {
        for (int64_t r = 0; r < rows; r++) {
            const float *from = x + r * step, inverse = inverse_rms(from, in, l->eps);
            const int64_t group = (row + r) / l->cells % l->groups * in;
            for (int64_t i = 0; i < in; i++)
                scratch[r * in + i] = l->shift[group + i] + from[i] * inverse * l->scale[group + i];
        }
        x = scratch, step = in, scratch += ROWS * in;
    }
    after plain = {NULL, NULL, row, l->groups, l->cells, l->second.weight != NULL}, end = plain;
    end.residual = l->residual, end.gate = l->gate, end.gelu = 0;
    const product *last = &l->first;
    if (l->second.weight) {
        multiply(x, step, rows, &l->first, plain, scratch);
        x = scratch, step = l->first.outs, last = &l->second;
    }
    multiply(x, step, rows, last, end, l->out + row * last->outs);
    finish(l, row, rows, last->outs, l->out + row * last->outs);
}

int wav_linear(const linear *l, int threads) {
    const size_t scratch = ROWS * ((l->scale ? l->first.in : 0) + (l->second.weight ? l->first.outs : 0));
    return spread(linear_rows, l, (l->rows + ROWS - 1) / ROWS, scratch, threads);
}

// --- Attention -------------------------------------------------------------------------------------------------------

typedef struct {
    const float *query, *key, *value;
    int64_t rows, heads, queries, keys, size;  // size: of a head, whose channels are adjacent
    int64_t query_row, query_step, key_row, key_step, value_row, value_step;  // strides of rows and tokens
    float scale;                               // of logits, as powers of two
    float *out;                                // (rows, queries, heads * size)
} attention;

// weights[TALL][many] = 2^(query . turned), 0 past ``keys``; inverse: of their sums.
INLINE void weigh(const float *const *query, const float *turned, int64_t size, int64_t keys, int64_t many,
                  float *weights, float *inverse) {
    ints lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    vec sums[TALL] = {{0}};
    for (int64_t k = 0; k < many; k += LANES) {
        vec logit[TALL] = {{0}};
        for (int64_t d = 0; d < size; d++) {
            const vec x = load(turned + d * many + k);
            for (int q = 0; q < TALL; q++) logit[q] += all(query[q][d]) * x;
        }
        const ints valid = lane < (int32_t)(keys - k);
        for (int q = 0; q < TALL; q++) {
            const vec weight = (vec)((ints)power_of_two(logit[q]) & valid);
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
    const int64_t many = lanes(keys), wide = lanes(size), step = a->heads * size;
    const float *query = a->query + row * a->query_row + head * size;
    const float *value = a->value + row * a->value_row + head * size;
    float *turned = scratch, *values = turned + size * many, *weights = values + keys * wide;
    memset(turned, 0, sizeof(float) * (size * many + keys * wide));
    turn(a->key + row * a->key_row + head * size, a->key_step, keys, size, a->scale, turned, many);
    for (int64_t k = 0; k < keys; k++) memcpy(values + k * wide, value + k * a->value_step, sizeof(float) * size);
    for (int64_t first = 0; first < a->queries; first += TALL) {
        const int count = (int)least(TALL, a->queries - first);
        const float *from[TALL];
        float inverse[TALL], *out = a->out + (row * a->queries + first) * step + head * size;
        for (int q = 0; q < TALL; q++) from[q] = query + (first + (q < count ? q : 0)) * a->query_step;
        weigh(from, turned, size, keys, many, weights, inverse);
        int64_t d = 0;
        for (; wide - d >= WIDE * LANES; d += WIDE * LANES)
            mix(weights, many, values + d, keys, wide, inverse, WIDE, count, out + d, step, size - d);
        for (; d < wide; d += LANES)
            mix(weights, many, values + d, keys, wide, inverse, 1, count, out + d, step, size - d);
    }
}

int wav_attend(const attention *a, int threads) {
    const size_t scratch = a->size * lanes(a->keys) + a->keys * lanes(a->size) + TALL * lanes(a->keys);
    return spread(attend_head, a, a->rows * a->heads, scratch, threads);
}

int wav_lanes(void) { return LANES; }
int wav_wide(void) { return WIDE; }
