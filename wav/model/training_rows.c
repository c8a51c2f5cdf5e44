// Row-wise kernels of training in float32: AdaLN, its gate, and the norms of queries and keys with their rotation.
//
// Part of the library that training.c describes.
#include "../inference/native.h"

#define BLOCK 64  // rows of a work item

INLINE float dot(const float *x, const float *y, int64_t n) {
    vec sum[2] = {{0}};
    int64_t i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES)
        for (int j = 0; j < 2; j++) sum[j] += load(x + i + j * LANES) * load(y + i + j * LANES);
    for (; i < n; i += LANES) sum[0] += load_some(x + i, n - i) * load_some(y + i, n - i);
    return total(sum[0] + sum[1]);
}

// --- AdaLN: RMS(x) * (1 + scale) + shift; ``cells`` rows that follow each other share shift, scale and gate ----------

typedef struct {
    const float *x, *shift, *scale;  // x (groups * cells, width); groups of shift and scale ``step`` apart
    int64_t groups, cells, width, step;
    float eps;
    float *inverse, *out;  // inverse (groups * cells): of the root mean square
    const float *grad;     // of out; the rest is NULL in the forward pass
    float *grad_x, *grad_shift, *grad_scale;  // (groups, width) each
} modulation;

static void modulate_group(const void *job, int64_t group, float *scratch) {
    const modulation *m = job;
    const int64_t n = m->width;
    const float *restrict shift = m->shift + group * m->step, *restrict scale = m->scale + group * m->step;
    (void)scratch;
    for (int64_t row = group * m->cells; row < (group + 1) * m->cells; row++) {
        const float *x = m->x + row * n, inverse = inverse_rms(x, n, m->eps);
        float *restrict out = m->out + row * n;
        m->inverse[row] = inverse;
        for (int64_t i = 0; i < n; i++) out[i] = shift[i] + x[i] * inverse * (1.0f + scale[i]);
    }
}

static void modulate_group_backward(const void *job, int64_t group, float *scratch) {
    const modulation *m = job;
    const int64_t n = m->width;
    const float *restrict scale = m->scale + group * m->step;
    float *restrict shifts = m->grad_shift + group * n, *restrict scales = m->grad_scale + group * n;
    float *restrict normed = scratch;  // gradient of the normed row
    memset(shifts, 0, sizeof(float) * n);
    memset(scales, 0, sizeof(float) * n);
    for (int64_t row = group * m->cells; row < (group + 1) * m->cells; row++) {
        const float *restrict x = m->x + row * n, *restrict grad = m->grad + row * n;
        const float inverse = m->inverse[row];
        float *restrict out = m->grad_x + row * n;
        for (int64_t i = 0; i < n; i++) {
            shifts[i] += grad[i];
            scales[i] += grad[i] * (x[i] * inverse);
            normed[i] = grad[i] * (1.0f + scale[i]);
        }
        const float share = dot(normed, x, n) * inverse * inverse / n;
        for (int64_t i = 0; i < n; i++) out[i] = inverse * (normed[i] - x[i] * share);
    }
}

int wav_modulate(const modulation *m, int threads) {
    return spread(m->grad ? modulate_group_backward : modulate_group, m, m->groups, m->width, threads);
}

typedef struct {
    const float *residual, *x, *gate;  // residual and x (groups * cells, width); groups of gate ``step`` apart
    int64_t groups, cells, width, step;
    float *out;         // residual + x * gate
    const float *grad;  // of out; the rest is NULL in the forward pass
    float *grad_x, *grad_gate;
} gating;

static void gate_group(const void *job, int64_t group, float *scratch) {
    const gating *g = job;
    const int64_t n = g->width;
    const float *restrict gate = g->gate + group * g->step;
    (void)scratch;
    if (g->grad) memset(g->grad_gate + group * n, 0, sizeof(float) * n);
    for (int64_t row = group * g->cells; row < (group + 1) * g->cells; row++) {
        const float *restrict x = g->x + row * n;
        if (g->grad) {
            const float *restrict grad = g->grad + row * n;
            float *restrict out = g->grad_x + row * n, *restrict gates = g->grad_gate + group * n;
            for (int64_t i = 0; i < n; i++) {
                out[i] = grad[i] * gate[i];
                gates[i] += grad[i] * x[i];
            }
        } else {
            const float *restrict residual = g->residual + row * n;
            float *restrict out = g->out + row * n;
            for (int64_t i = 0; i < n; i++) out[i] = residual[i] + x[i] * gate[i];
        }
    }
}

int wav_gate(const gating *g, int threads) { return spread(gate_group, g, g->groups, 0, threads); }

// --- RMS norm with a weight, then the rotation of neighbouring pairs -------------------------------------------------

typedef struct {
    const float *x, *weight, *rope;  // x (rows, width); rope (length, width): row r turns by row r % length; or NULL
    int64_t rows, width, length;
    float eps;
    float *inverse, *out;
    const float *grad;             // of out; the rest is NULL in the forward pass
    float *grad_x, *grad_weight;   // grad_weight (width)
    float *partial;                // (ceil(rows / BLOCK), width): the blocks' shares of grad_weight
} norm;

static void norm_rows(const void *job, int64_t index, float *scratch) {
    const norm *m = job;
    const int64_t n = m->width;
    const float *restrict weight = m->weight;
    (void)scratch;
    for (int64_t row = index * BLOCK; row < least(m->rows, (index + 1) * BLOCK); row++) {
        const float *x = m->x + row * n, inverse = inverse_rms(x, n, m->eps);
        float *restrict out = m->out + row * n;
        m->inverse[row] = inverse;
        for (int64_t i = 0; i < n; i++) out[i] = x[i] * inverse * weight[i];
        if (m->rope) rotate(out, m->rope + row % m->length * n, n, 1.0f, out);
    }
}

static void norm_rows_backward(const void *job, int64_t index, float *scratch) {
    const norm *m = job;
    const int64_t n = m->width;
    const float *restrict weight = m->weight;
    float *restrict sums = m->partial + index * n, *restrict turned = scratch, *restrict normed = scratch + n;
    memset(sums, 0, sizeof(float) * n);
    for (int64_t row = index * BLOCK; row < least(m->rows, (index + 1) * BLOCK); row++) {
        const float *restrict x = m->x + row * n, *restrict grad = m->grad + row * n;
        const float inverse = m->inverse[row];
        float *restrict out = m->grad_x + row * n;
        if (m->rope) rotate(grad, m->rope + row % m->length * n, n, -1.0f, turned);
        else memcpy(turned, grad, sizeof(float) * n);
        for (int64_t i = 0; i < n; i++) {
            sums[i] += turned[i] * (x[i] * inverse);
            normed[i] = turned[i] * weight[i];
        }
        const float share = dot(normed, x, n) * inverse * inverse / n;
        for (int64_t i = 0; i < n; i++) out[i] = inverse * (normed[i] - x[i] * share);
    }
}

int wav_norm(const norm *m, int threads) {
    const int64_t blocks = (m->rows + BLOCK - 1) / BLOCK, n = m->width;
    if (!m->grad) return spread(norm_rows, m, blocks, 0, threads);
    if (spread(norm_rows_backward, m, blocks, 2 * n, threads)) return 1;
    memset(m->grad_weight, 0, sizeof(float) * n);
    for (int64_t block = 0; block < blocks; block++)
        for (int64_t i = 0; i < n; i++) m->grad_weight[i] += m->partial[block * n + i];
    return 0;
}
