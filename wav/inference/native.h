// What the CPU kernels of inference (native.c) and training (training.c) share: vectors, their functions, threads.
#pragma once
#include <math.h>
#include <pthread.h>
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
#define MAX_THREADS 64

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float four __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t four_ints __attribute__((vector_size(16), aligned(4), may_alias));
#define UNUSED __attribute__((unused))
#define INLINE static inline __attribute__((always_inline))

INLINE vec load(const float *p) { return *(const vec *)p; }
INLINE void store(float *p, vec x) { *(vec *)p = x; }
INLINE vec all(float x) { return x - (vec){0}; }
INLINE int64_t lanes(int64_t n) { return (n + LANES - 1) / LANES * LANES; }
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

// --- Work items on threads -------------------------------------------------------------------------------------------

typedef void (*item)(const void *job, int64_t index, float *scratch);
typedef struct {
    item run;
    const void *job;
    int64_t from, to;
    size_t scratch;
    int failed;
} share;

static void *work(void *arg) {
    share *s = arg;
    float *scratch = aligned_alloc(64, (s->scratch * sizeof(float) + 64) / 64 * 64);
    s->failed = !scratch;
    for (int64_t i = s->from; scratch && i < s->to; i++) s->run(s->job, i, scratch);
    free(scratch);
    return NULL;
}

// Runs ``items`` items, each with ``scratch`` floats of its thread's own; 0, or 1 where memory ran out.
UNUSED static int spread(item run, const void *job, int64_t items, size_t scratch, int threads) {
    threads = (int)least(least(threads, MAX_THREADS), items > 0 ? items : 1);
    share shares[MAX_THREADS];
    pthread_t ids[MAX_THREADS];
    int started[MAX_THREADS] = {0}, failed = 0;
    for (int t = 0; t < threads; t++) {
        shares[t] = (share){run, job, items * t / threads, items * (t + 1) / threads, scratch, 0};
        started[t] = t && !pthread_create(&ids[t], NULL, work, &shares[t]);
    }
    for (int t = 0; t < threads; t++)
        if (!started[t]) work(&shares[t]);
    for (int t = 0; t < threads; t++) {
        if (started[t]) pthread_join(ids[t], NULL);
        failed |= shares[t].failed;
    }
    return failed;
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

// out = neighbouring pairs of x, complex numbers, times those of rope, or their conjugates where ``direction`` is -1
// and not 1: the rotation's transpose. out may be x.
INLINE void rotate(const float *x, const float *rope, int64_t n, float direction, float *out) {
    vec sign;
    for (int i = 0; i < LANES; i++) sign[i] = i % 2 ? direction : -direction;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        const vec y = load(x + i), turn = load(rope + i);
        store(out + i, y * TAKE(turn, 0, 0, 2, 2) + TAKE(y, 1, 0, 3, 2) * (sign * TAKE(turn, 1, 1, 3, 3)));
    }
    for (; i < n; i += 2) {
        const float even = x[i], odd = x[i + 1];
        out[i] = even * rope[i] - odd * (direction * rope[i + 1]);
        out[i + 1] = odd * rope[i] + even * (direction * rope[i + 1]);
    }
}

// to[d][k] = scale * from[k][d].
UNUSED static void turn(const float *from, int64_t step, int64_t keys, int64_t size, float scale, float *to,
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

// sum[q] += from[q][k * step] * b[k], ``vectors`` vectors wide.
INLINE void multiply_add(const float *const *from, int64_t step, const float *b, int64_t wide, int64_t inner,
                         int vectors, vec (*sum)[WIDE]) {
    for (int64_t k = 0; k < inner; k++) {
        vec y[WIDE];
        for (int v = 0; v < vectors; v++) y[v] = load(b + k * wide + v * LANES);
        for (int q = 0; q < TALL; q++)
            for (int v = 0; v < vectors; v++) sum[q][v] += all(from[q][k * step]) * y[v];
    }
}
