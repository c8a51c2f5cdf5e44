// Attention of training in float32, with its gradients: heads of short sequences, whose operands stay in the cache.
//
// Part of the library that training.c describes. Queries, keys and values are (rows, heads, length, size) with any
// strides but the last, which is 1; results are (rows, length, heads, size).
//
// Queries run along the lanes, keys along the rows: largest logits and sums of weights are then a lane's own, and of
// all products only those of logits and of the weights' gradients need an operand turned, that of the queries' side.
// A block of queries meets a tile of keys: all that the two make of each other stays in the innermost cache.
#include "../inference/native.h"

#define LOG2E 1.44269504f
#define PAIR 2                // vectors of a tile's width
#define BLOCK (PAIR * LANES)  // queries of a block
#if LANES == 16
#define TILE 8                // rows of a tile: with PAIR, enough sums in flight to hide the latency of a multiply-add
#else
#define TILE 4
#endif

typedef struct {
    const float *at;
    int64_t row, head, step;  // strides
} operand;

typedef struct {
    operand query, key, value;
    const float *bias;  // (rows, keys), added to the logits; or NULL
    int64_t rows, heads, queries, keys, size;
    float scale;               // of logits, as powers of two
    float *statistics, *out;   // statistics (rows, heads, 2, queries): largest logits, inverses of the sums of weights
    const float *grad;         // of out; the rest is NULL in the forward pass
    float *grad_query, *grad_key, *grad_value;
} attention;

// A head's rows, padded with zeros to whole vectors and tiles.
typedef struct {
    int64_t wide, tall, queries;                // padded size, keys and queries
    float *keys, *values, *bias;                // (tall, wide); (tall), as powers of two
    float *largest, *inverse, *mean;            // (queries): statistics, and the weights' gradients' mean
    float *query, *query_turned;                // of a block: (BLOCK, wide), and (size, BLOCK) times the logits' scale
    float *grad, *grad_turned;                  // the same of the result's gradients
    float *weights, *shares;                    // (tall, BLOCK); a tile of weights in the backward pass
    float *grad_keys, *grad_values, *tile;      // (tall, wide); (TILE, wide)
} head;

INLINE const float *start(const operand *o, int64_t row, int64_t index) {
    return o->at + row * o->row + index * o->head;
}

INLINE int64_t tiles(int64_t n) { return (n + TILE - 1) / TILE * TILE; }
INLINE int64_t blocks(int64_t n) { return (n + BLOCK - 1) / BLOCK * BLOCK; }

// A row; sizes that fill no vector go in fours, as a copy of unknown length costs a call.
INLINE void copy_row(const float *from, int64_t size, float *to) {
    int64_t d = 0;
    for (; d + LANES <= size; d += LANES) store(to + d, load(from + d));
    for (; d + 4 <= size; d += 4) *(four *)(to + d) = *(const four *)(from + d);
    for (; d < size; d++) to[d] = from[d];
}

static void gather(const float *from, int64_t step, int64_t count, int64_t size, float *to, int64_t wide,
                   int64_t tall) {
    for (int64_t k = 0; k < count; k++) {
        if (wide > size) store(to + (k + 1) * wide - LANES, (vec){0});
        copy_row(from + k * step, size, to + k * wide);
    }
    memset(to + count * wide, 0, sizeof(float) * (tall - count) * wide);
}

static void scatter(const float *from, int64_t wide, int64_t count, int64_t size, float *to, int64_t step) {
    for (int64_t k = 0; k < count; k++) copy_row(from + k * wide, size, to + k * step);
}

static size_t room(const attention *a) {
    const int64_t wide = lanes(a->size), tall = tiles(a->keys), queries = blocks(a->queries);
    const int64_t sides = (a->grad ? 4 : 2) * tall * wide, sheets = 4 * BLOCK * wide + (tall + TILE) * BLOCK;
    return sides + sheets + TILE * wide + 3 * queries + tall;
}

static head prepare(const attention *a, int64_t index, float *scratch) {
    const int64_t row = index / a->heads, n = index % a->heads;
    head h = {.wide = lanes(a->size), .tall = tiles(a->keys), .queries = blocks(a->queries)};
    float **parts[] = {&h.query, &h.query_turned, &h.grad, &h.grad_turned};
    for (int i = 0; i < 4; i++) *parts[i] = scratch, scratch += BLOCK * h.wide;
    h.weights = scratch, scratch += TILE * BLOCK;
    h.shares = scratch, scratch += h.tall * BLOCK;
    h.tile = scratch, scratch += TILE * h.wide;
    h.keys = scratch, scratch += h.tall * h.wide;
    h.values = scratch, scratch += h.tall * h.wide;
    if (a->grad) {
        h.grad_keys = scratch, scratch += h.tall * h.wide;
        h.grad_values = scratch, scratch += h.tall * h.wide;
    }
    h.largest = scratch, scratch += h.queries;
    h.inverse = scratch, scratch += h.queries;
    h.mean = scratch, scratch += h.queries;
    h.bias = scratch;
    gather(start(&a->key, row, n), a->key.step, a->keys, a->size, h.keys, h.wide, h.tall);
    gather(start(&a->value, row, n), a->value.step, a->keys, a->size, h.values, h.wide, h.tall);
    for (int64_t k = 0; k < h.tall; k++) h.bias[k] = a->bias && k < a->keys ? a->bias[row * a->keys + k] * LOG2E : 0.0f;
    return h;
}

// Asks for rows that are needed soon: a head's lie too far apart for the processor to guess, and memory is slower than
// what is computed on them. Of ``count`` rows the share of tile ``at``, so that few requests wait at a time.
INLINE void ask(const float *rows, int64_t step, int64_t count, int64_t size, int64_t at, int64_t tiles) {
    const int64_t each = (count + tiles - 1) / tiles, last = least(count, (at + 1) * each);
    for (int64_t k = at * each; k < last; k++)
        for (int64_t d = 0; d < size; d += 16) __builtin_prefetch(rows + k * step + d, 0, 2);
}

// The operands of the head after this one, and the results of this one.
INLINE void ask_ahead(const attention *a, int64_t index, int64_t at, int64_t tiles) {
    const int64_t next = index + 1 < a->rows * a->heads ? index + 1 : index, step = a->heads * a->size;
    const int64_t row = next / a->heads, n = next % a->heads;
    ask(start(&a->query, row, n), a->query.step, a->queries, a->size, at, tiles);
    ask(start(&a->key, row, n), a->key.step, a->keys, a->size, at, tiles);
    ask(start(&a->value, row, n), a->value.step, a->keys, a->size, at, tiles);
    if (!a->grad) {
        const int64_t queries = index / a->heads * a->queries * step + index % a->heads * a->size;
        ask(a->out + queries, step, a->queries, a->size, at, tiles);
        return;
    }
    const int64_t queries = row * a->queries * step + n * a->size;
    ask(a->grad + queries, step, a->queries, a->size, at, tiles);
    ask(a->out + queries, step, a->queries, a->size, at, tiles);
    const int64_t keys = index / a->heads * a->keys * step + index % a->heads * a->size;
    ask(a->grad_key + keys, step, a->keys, a->size, at, tiles);
    ask(a->grad_value + keys, step, a->keys, a->size, at, tiles);
}

// sum[q] = sum over k of from[q * apart + k * step] * b[k * wide], TILE rows and ``vectors`` vectors.
INLINE void product(const float *from, int64_t apart, int64_t step, const float *b, int64_t wide, int64_t inner,
                    int vectors, vec (*sum)[PAIR]) {
    for (int64_t k = 0; k < inner; k++) {
        vec y[PAIR];
        for (int v = 0; v < vectors; v++) y[v] = load(b + k * wide + v * LANES);
        for (int q = 0; q < TILE; q++)
            for (int v = 0; v < vectors; v++) sum[q][v] += all(from[q * apart + k * step]) * y[v];
    }
}

// The same into memory, for any width that is whole vectors; on top of what is there where ``more``.
INLINE void multiply(const float *from, int64_t apart, int64_t step, const float *b, int64_t wide, int64_t inner,
                     float *out, int more, int vectors) {
    vec sum[TILE][PAIR];
    for (int q = 0; q < TILE; q++)
        for (int v = 0; v < vectors; v++) sum[q][v] = more ? load(out + q * wide + v * LANES) : (vec){0};
    product(from, apart, step, b, wide, inner, vectors, sum);
    for (int q = 0; q < TILE; q++)
        for (int v = 0; v < vectors; v++) store(out + q * wide + v * LANES, sum[q][v]);
}

INLINE void rows_times(const float *from, int64_t apart, int64_t step, const float *b, int64_t wide, int64_t inner,
                       float *out, int more) {
    int64_t d = 0;
    for (; d + PAIR * LANES <= wide; d += PAIR * LANES)
        multiply(from, apart, step, b + d, wide, inner, out + d, more, PAIR);
    for (; d < wide; d += LANES) multiply(from, apart, step, b + d, wide, inner, out + d, more, 1);
}

// Turned rows of a block, zeros past the last.
static void turn_block(const float *from, int64_t step, int64_t count, int64_t size, float scale, float *to) {
    if (count < BLOCK) memset(to, 0, sizeof(float) * size * BLOCK);
    turn(from, step, count, size, scale, to, BLOCK);
}

INLINE vec larger(vec x, vec y) {
    const ints more = x > y;
    return (vec)(((ints)x & more) | ((ints)y & ~more));
}

INLINE vec weigh(vec power) { return (vec)((ints)power_of_two(power) & (power > all(-125.0f))); }

// Weights 2^(logit - largest) of a block of queries, (keys, BLOCK); and their statistics.
INLINE void weigh_block(const attention *a, const head *h, int64_t index, int64_t q, int vectors) {
    vec top[PAIR], sums[PAIR];
    for (int v = 0; v < vectors; v++) top[v] = all(-3e38f), sums[v] = (vec){0};
    for (int64_t k = 0; k < a->keys; k += TILE) {
        vec sum[TILE][PAIR];
        ask_ahead(a, index, (q / BLOCK * h->tall + k) / TILE, h->queries / BLOCK * h->tall / TILE);
        for (int i = 0; i < TILE; i++)
            for (int v = 0; v < vectors; v++) sum[i][v] = all(h->bias[k + i]);
        product(h->keys + k * h->wide, h->wide, 1, h->query_turned, BLOCK, a->size, vectors, sum);
        for (int i = 0; i < TILE; i++)
            for (int v = 0; v < vectors; v++) {
                store(h->shares + (k + i) * BLOCK + v * LANES, sum[i][v]);
                if (k + i < a->keys) top[v] = larger(sum[i][v], top[v]);
            }
    }
    for (int64_t k = 0; k < a->keys; k++)
        for (int v = 0; v < vectors; v++) {
            float *x = h->shares + k * BLOCK + v * LANES;
            const vec weight = weigh(load(x) - top[v]);
            store(x, weight);
            sums[v] += weight;
        }
    for (int v = 0; v < vectors; v++) {
        store(h->largest + q + v * LANES, top[v]);
        store(h->inverse + q + v * LANES, all(1.0f) / sums[v]);
    }
}

static void attend_head(const void *job, int64_t index, float *scratch) {
    const attention *a = job;
    const int64_t row = index / a->heads, n = index % a->heads, step = a->heads * a->size;
    const head h = prepare(a, index, scratch);
    const float *query = start(&a->query, row, n);
    float *statistics = a->statistics + index * a->queries * 2;
    float *out = a->out + row * a->queries * step + n * a->size;
    for (int64_t q = 0; q < a->queries; q += BLOCK) {
        const int64_t count = least(BLOCK, a->queries - q);
        turn_block(query + q * a->query.step, a->query.step, count, a->size, a->scale, h.query_turned);
        if (count > LANES) weigh_block(a, &h, index, q, PAIR);
        else weigh_block(a, &h, index, q, 1);
        for (int64_t i = 0; i < count; i += TILE) {
            rows_times(h.shares + i, 1, BLOCK, h.values, h.wide, a->keys, h.tile, 0);
            for (int64_t r = 0; r < TILE; r++)
                for (int64_t d = 0; d < h.wide; d += LANES) {
                    float *x = h.tile + r * h.wide + d;
                    store(x, load(x) * all(h.inverse[q + i + r]));
                }
            scatter(h.tile, h.wide, least(TILE, count - i), a->size, out + (q + i) * step, step);
        }
    }
    memcpy(statistics, h.largest, sizeof(float) * a->queries);
    memcpy(statistics + a->queries, h.inverse, sizeof(float) * a->queries);
}

// A tile of keys: their weights and the gradients of their unscaled logits for a block of queries.
INLINE void differentiate(const attention *a, const head *h, int64_t k, int64_t q, int vectors) {
    vec weights[TILE][PAIR], shares[TILE][PAIR];
    for (int i = 0; i < TILE; i++)
        for (int v = 0; v < vectors; v++) weights[i][v] = all(h->bias[k + i]);
    product(h->keys + k * h->wide, h->wide, 1, h->query_turned, BLOCK, a->size, vectors, weights);
    for (int i = 0; i < TILE; i++)
        for (int v = 0; v < vectors; v++)
            store(h->weights + i * BLOCK + v * LANES,
                  weigh(weights[i][v] - load(h->largest + q + v * LANES)) * load(h->inverse + q + v * LANES));
    for (int i = 0; i < TILE; i++)
        for (int v = 0; v < vectors; v++) shares[i][v] = (vec){0};
    product(h->values + k * h->wide, h->wide, 1, h->grad_turned, BLOCK, a->size, vectors, shares);
    for (int i = 0; i < TILE; i++)
        for (int v = 0; v < vectors; v++) {
            const vec scaled = load(h->weights + i * BLOCK + v * LANES) * all(a->scale / LOG2E);
            store(h->shares + (k + i) * BLOCK + v * LANES, (shares[i][v] - load(h->mean + q + v * LANES)) * scaled);
        }
}

// The mean, by weight, of the gradients of a query's weights is what a result and its gradient have in common. Added up
// in the order of the product it is taken from: where one key has all the weight, exactly nothing is left.
static void means(const attention *a, const head *h, const float *out, int64_t step, int64_t q, int64_t count) {
    vec sum[PAIR] = {{0}};
    turn_block(out, step, count, a->size, 1.0f, h->query_turned);
    for (int64_t d = 0; d < a->size; d++)
        for (int v = 0; v < PAIR; v++) {
            const int64_t at = d * BLOCK + v * LANES;
            sum[v] += load(h->query_turned + at) * load(h->grad_turned + at);
        }
    for (int v = 0; v < PAIR; v++) store(h->mean + q + v * LANES, sum[v]);
}

static void attend_head_backward(const void *job, int64_t index, float *scratch) {
    const attention *a = job;
    const int64_t row = index / a->heads, n = index % a->heads, step = a->heads * a->size;
    const int64_t queries = row * a->queries * step + n * a->size, keys = row * a->keys * step + n * a->size;
    const head h = prepare(a, index, scratch);
    const float *query = start(&a->query, row, n), *grad = a->grad + queries, *out = a->out + queries;
    const float *statistics = a->statistics + index * a->queries * 2;
    memset(h.largest, 0, sizeof(float) * 2 * h.queries);
    memcpy(h.largest, statistics, sizeof(float) * a->queries);
    memcpy(h.inverse, statistics + a->queries, sizeof(float) * a->queries);
    for (int64_t q = 0; q < a->queries; q += BLOCK) {
        const int64_t count = least(BLOCK, a->queries - q);
        gather(query + q * a->query.step, a->query.step, count, a->size, h.query, h.wide, count);
        gather(grad + q * step, step, count, a->size, h.grad, h.wide, count);
        turn_block(h.grad, h.wide, count, a->size, 1.0f, h.grad_turned);
        means(a, &h, out + q * step, step, q, count);
        turn_block(h.query, h.wide, count, a->size, a->scale, h.query_turned);
        for (int64_t k = 0; k < a->keys; k += TILE) {
            ask_ahead(a, index, (q / BLOCK * h.tall + k) / TILE, h.queries / BLOCK * h.tall / TILE);
            if (count > LANES) differentiate(a, &h, k, q, PAIR);
            else differentiate(a, &h, k, q, 1);
            rows_times(h.weights, BLOCK, 1, h.grad, h.wide, count, h.grad_values + k * h.wide, q > 0);
            rows_times(h.shares + k * BLOCK, BLOCK, 1, h.query, h.wide, count, h.grad_keys + k * h.wide, q > 0);
        }
        for (int64_t i = 0; i < count; i += TILE) {
            rows_times(h.shares + i, 1, BLOCK, h.keys, h.wide, a->keys, h.tile, 0);
            scatter(h.tile, h.wide, least(TILE, count - i), a->size, a->grad_query + queries + (q + i) * step, step);
        }
    }
    scatter(h.grad_keys, h.wide, a->keys, a->size, a->grad_key + keys, step);
    scatter(h.grad_values, h.wide, a->keys, a->size, a->grad_value + keys, step);
}

int wav_attention(const attention *a, int threads) {
    return spread(a->grad ? attend_head_backward : attend_head, a, a->rows * a->heads, room(a), threads);
}
