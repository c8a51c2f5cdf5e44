// Attention of training in float32, with its gradients: heads of short sequences, whose weights stay in the cache.
//
// Part of the library that training.c describes. Queries, keys and values are (rows, heads, length, size) with any
// strides but the last, which is 1; results are (rows, length, heads, size).
#include "native.h"

#define LOG2E 1.44269504f

typedef struct {
    const float *at;
    int64_t row, head, step;  // strides
} operand;

typedef struct {
    operand query, key, value;
    const float *bias;  // (rows, keys), added to the logits; or NULL
    int64_t rows, heads, queries, keys, size;
    float scale;               // of logits, as powers of two
    float *statistics, *out;   // statistics (rows, heads, queries, 2): largest logit, inverse of the sum of weights
    const float *grad;         // of out; the rest is NULL in the forward pass
    float *grad_query, *grad_key, *grad_value;
} attention;

// A head's operands in the orders its products read them, padded with zeros to whole vectors and tiles.
typedef struct {
    int64_t many, pitch, wide, tall;    // padded keys, their rows' distance, size and queries
    float *queries, *grads;             // (tall, wide)
    float *keys, *keys_turned;          // (keys, wide), and (size, many) times the logits' scale
    float *values, *values_turned;      // (keys, wide), (size, many)
    float *weights, *shares;            // (tall, pitch): attention's weights, and the logits' gradients
    float *bias;                        // (many), as powers of two; far below every logit past the last key
} head;

INLINE const float *start(const operand *o, int64_t row, int64_t index) {
    return o->at + row * o->row + index * o->head;
}

static void gather(const float *from, int64_t step, int64_t count, int64_t size, float *to, int64_t wide) {
    for (int64_t k = 0; k < count; k++)
        for (int64_t d = 0; d < wide; d += LANES) store(to + k * wide + d, load_some(from + k * step + d, size - d));
}

static size_t room(const attention *a) {
    const int64_t many = lanes(a->keys), wide = lanes(a->size), tall = (a->queries + TALL - 1) / TALL * TALL;
    const int64_t side = a->keys * wide + a->size * many, sheet = tall * (many + LANES + wide);
    return (a->grad ? 2 : 1) * (side + sheet) + side + many + TALL * wide + 2 * LANES;
}

static head prepare(const attention *a, int64_t row, int64_t index, float *scratch) {
    head h = {.many = lanes(a->keys), .pitch = lanes(a->keys) + LANES, .wide = lanes(a->size), .tall = (a->queries + TALL - 1) / TALL * TALL};
    h.queries = scratch, scratch += h.tall * h.wide;
    h.keys = scratch, scratch += a->keys * h.wide;
    h.values = scratch, scratch += a->keys * h.wide;
    h.keys_turned = scratch, scratch += a->size * h.many;
    h.weights = scratch, scratch += h.tall * h.pitch;
    h.bias = scratch, scratch += h.many;
    const float *key = start(&a->key, row, index), *value = start(&a->value, row, index);
    memset(h.queries + a->queries * h.wide, 0, sizeof(float) * (h.tall - a->queries) * h.wide);
    gather(start(&a->query, row, index), a->query.step, a->queries, a->size, h.queries, h.wide);
    gather(value, a->value.step, a->keys, a->size, h.values, h.wide);
    memset(h.keys_turned, 0, sizeof(float) * a->size * h.many);
    turn(key, a->key.step, a->keys, a->size, a->scale, h.keys_turned, h.many);
    for (int64_t k = 0; k < h.many; k++)
        h.bias[k] = k >= a->keys ? -1e30f : a->bias ? a->bias[row * a->keys + k] * LOG2E : 0.0f;
    if (!a->grad) return h;
    h.grads = scratch, scratch += h.tall * h.wide;
    h.values_turned = scratch, scratch += a->size * h.many;
    h.shares = scratch, scratch += h.tall * h.pitch;
    memset(h.grads + a->queries * h.wide, 0, sizeof(float) * (h.tall - a->queries) * h.wide);
    const int64_t width = a->heads * a->size;
    gather(a->grad + row * a->queries * width + index * a->size, width, a->queries, a->size, h.grads, h.wide);
    gather(key, a->key.step, a->keys, a->size, h.keys, h.wide);
    memset(h.values_turned, 0, sizeof(float) * a->size * h.many);
    turn(value, a->value.step, a->keys, a->size, 1.0f, h.values_turned, h.many);
    return h;
}

// out[q] = sum over k of from[k * step + q * apart] * b[k], TALL rows and ``vectors`` vectors.
INLINE void multiply(const float *from, int64_t apart, int64_t step, const float *b, int64_t wide, int64_t inner,
                     float *out, int64_t out_step, int vectors) {
    const float *rows[TALL];
    vec sum[TALL][WIDE];
    for (int q = 0; q < TALL; q++) rows[q] = from + q * apart;
    for (int q = 0; q < TALL; q++)
        for (int v = 0; v < vectors; v++) sum[q][v] = (vec){0};
    multiply_add(rows, step, b, wide, inner, vectors, sum);
    for (int q = 0; q < TALL; q++)
        for (int v = 0; v < vectors; v++) store(out + q * out_step + v * LANES, sum[q][v]);
}

// The same for any width that is whole vectors.
static void rows_times(const float *from, int64_t apart, int64_t step, const float *b, int64_t wide, int64_t inner,
                       float *out, int64_t out_step) {
    int64_t d = 0;
    for (; d + WIDE * LANES <= wide; d += WIDE * LANES)
        multiply(from, apart, step, b + d, wide, inner, out + d, out_step, WIDE);
    for (; d + 2 * LANES <= wide; d += 2 * LANES) multiply(from, apart, step, b + d, wide, inner, out + d, out_step, 2);
    for (; d < wide; d += LANES) multiply(from, apart, step, b + d, wide, inner, out + d, out_step, 1);
}

INLINE float highest(vec x) {
    four part[LANES / 4], top;
    memcpy(part, &x, sizeof x);
    top = part[0];
    for (int i = 1; i < LANES / 4; i++) {
        const four_ints more = part[i] > top;
        top = (four)(((four_ints)part[i] & more) | ((four_ints)top & ~more));
    }
    float most = top[0];
    for (int i = 1; i < 4; i++) most = top[i] > most ? top[i] : most;
    return most;
}

// Weights 2^(logit - largest) of a row, in place.
INLINE float weigh(float *row, const float *bias, int64_t many, float *largest) {
    vec top = all(-3e38f), sum = {0};
    for (int64_t k = 0; k < many; k += LANES) {
        const vec logit = load(row + k) + load(bias + k);
        const ints more = logit > top;
        store(row + k, logit);
        top = (vec)(((ints)logit & more) | ((ints)top & ~more));
    }
    *largest = highest(top);
    for (int64_t k = 0; k < many; k += LANES) {
        const vec power = load(row + k) - all(*largest);
        const vec weight = (vec)((ints)power_of_two(power) & (power > all(-125.0f)));
        store(row + k, weight);
        sum += weight;
    }
    return 1.0f / total(sum);
}

static void scatter(const float *from, int64_t wide, int64_t count, int64_t size, float *to, int64_t step) {
    for (int64_t k = 0; k < count; k++)
        for (int64_t d = 0; d < size; d += LANES) store_some(to + k * step + d, load(from + k * wide + d), size - d);
}

static void attend_head(const void *job, int64_t index, float *scratch) {
    const attention *a = job;
    const int64_t row = index / a->heads, n = index % a->heads, step = a->heads * a->size;
    const head h = prepare(a, row, n, scratch);
    float *statistics = a->statistics + index * a->queries * 2;
    float *out = a->out + row * a->queries * step + n * a->size;
    for (int64_t q = 0; q < h.tall; q += TALL) {
        const int64_t count = least(TALL, a->queries - q);
        rows_times(h.queries + q * h.wide, h.wide, 1, h.keys_turned, h.many, a->size, h.weights, h.pitch);
        for (int64_t r = 0; r < count; r++) {
            float *s = statistics + (q + r) * 2;
            s[1] = weigh(h.weights + r * h.pitch, h.bias, h.many, s);
        }
        rows_times(h.weights, h.pitch, 1, h.values, h.wide, a->keys, h.queries + q * h.wide, h.wide);
        for (int64_t r = 0; r < count; r++)
            for (int64_t d = 0; d < h.wide; d += LANES) {
                float *x = h.queries + (q + r) * h.wide + d;
                store(x, load(x) * all(statistics[(q + r) * 2 + 1]));
            }
    }
    scatter(h.queries, h.wide, a->queries, a->size, out, step);
}

// From logits to weights, and from gradients of weights to those of unscaled logits, in place; one query.
INLINE void differentiate(float *weights, float *shares, const float *bias, int64_t many, const float *statistics,
                          float scale) {
    vec sum = {0};
    for (int64_t k = 0; k < many; k += LANES) {
        const vec power = load(weights + k) + load(bias + k) - all(statistics[0]);
        const vec weight = (vec)((ints)power_of_two(power) & (power > all(-125.0f))) * all(statistics[1]);
        store(weights + k, weight);
        sum += weight * load(shares + k);
    }
    const vec mean = all(total(sum));
    for (int64_t k = 0; k < many; k += LANES)
        store(shares + k, load(weights + k) * (load(shares + k) - mean) * all(scale));
}

static void attend_head_backward(const void *job, int64_t index, float *scratch) {
    const attention *a = job;
    const int64_t row = index / a->heads, n = index % a->heads, step = a->heads * a->size;
    const int64_t queries = row * a->queries * step + n * a->size, keys = row * a->keys * step + n * a->size;
    const float *statistics = a->statistics + index * a->queries * 2, scale = a->scale / LOG2E;
    float *tile = scratch;
    const head h = prepare(a, row, n, scratch + TALL * lanes(a->size));
    for (int64_t q = 0; q < h.tall; q += TALL) {
        const int64_t count = least(TALL, a->queries - q);
        float *weights = h.weights + q * h.pitch, *shares = h.shares + q * h.pitch;
        rows_times(h.queries + q * h.wide, h.wide, 1, h.keys_turned, h.many, a->size, weights, h.pitch);
        rows_times(h.grads + q * h.wide, h.wide, 1, h.values_turned, h.many, a->size, shares, h.pitch);
        for (int64_t r = 0; r < count; r++)
            differentiate(weights + r * h.pitch, shares + r * h.pitch, h.bias, h.many, statistics + (q + r) * 2, scale);
        rows_times(shares, h.pitch, 1, h.keys, h.wide, a->keys, tile, h.wide);
        scatter(tile, h.wide, count, a->size, a->grad_query + queries + q * step, step);
    }
    for (int64_t k = 0; k < a->keys; k += TALL) {
        const int64_t count = least(TALL, a->keys - k);
        rows_times(h.weights + k, 1, h.pitch, h.grads, h.wide, a->queries, tile, h.wide);
        scatter(tile, h.wide, count, a->size, a->grad_value + keys + k * step, step);
        rows_times(h.shares + k, 1, h.pitch, h.queries, h.wide, a->queries, tile, h.wide);
        scatter(tile, h.wide, count, a->size, a->grad_key + keys + k * step, step);
    }
}

int wav_attention(const attention *a, int threads) {
    return spread(a->grad ? attend_head_backward : attend_head, a, a->rows * a->heads, room(a), threads);
}
