// What stands between a Llama layer's matrix products, forward and backward: one pass over memory each.
//
// All numbers are fp32. Tokens are flat, (tokens, width), with a row stride `ld` where a buffer is wider.
// Attention's buffers are (rows, groups, length * per, d): `per` query heads share a group's keys and values,
// and a position's heads stand together. `place` and `owner` are those of tokens.py.
// qlora/cpu/plain.py says the same in torch; tests/core/cpu compares them.
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

// e^x by 2^i times a polynomial of degree 6 (Cephes expf): error below 2e-7, and compilers vectorize it.
inline float exponential(float x) {
    x = x > 88.f ? 88.f : x;  // two steps: as one expression gcc makes branches of them
    x = x < -87.f ? -87.f : x;
    const float i = __builtin_floorf(x * 1.4426950408889634f + 0.5f);
    const float f = (x - i * 0.693359375f) + i * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * f * f + f + 1.f;
    const int32_t bits = (static_cast<int32_t>(i) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, 4);
    return p * power;
}

inline float sigmoid(float x) { return 1.f / (1.f + exponential(-x)); }

// (a, b) turned by an angle, half a head apart, as Llama's rotary embedding does; `back` turns the other way.
inline void turn(const float* from, float* to, const float* cosine, const float* sine, long half, float back) {
#pragma omp simd
    for (long e = 0; e < half; e++) {
        const float a = from[e], b = from[e + half], s = sine[e] * back;
        to[e] = a * cosine[e] - b * s;
        to[e + half] = b * cosine[e] + a * s;
    }
}

}  // namespace

extern "C" {

// sum = x + add (without `add`: sum is not written); y = weight * sum / rms(sum); scale = 1 / rms.
void rms_norm(const float* x, const float* add, long ldadd, const float* weight, float eps, float* sum, float* y,
              float* scale, long tokens, long width) {
#pragma omp parallel for schedule(static)
    for (long t = 0; t < tokens; t++) {
        const float* in = x + t * width;
        float* out = y + t * width;
        float squares = 0;
        if (add) {
            const float* more = add + t * ldadd;
            float* both = sum + t * width;
#pragma omp simd reduction(+ : squares)
            for (long j = 0; j < width; j++) {
                both[j] = in[j] + more[j];
                squares += both[j] * both[j];
            }
            in = both;
        } else {
#pragma omp simd reduction(+ : squares)
            for (long j = 0; j < width; j++) squares += in[j] * in[j];
        }
        const float k = scale[t] = 1.f / std::sqrt(squares / width + eps);
#pragma omp simd
        for (long j = 0; j < width; j++) out[j] = in[j] * k * weight[j];
    }
}

// out = residual + the norm's gradient to its input.
void rms_backward(const float* dy, const float* sum, const float* weight, const float* scale, const float* residual,
                  long ldres, float* out, long ldout, long tokens, long width) {
#pragma omp parallel for schedule(static)
    for (long t = 0; t < tokens; t++) {
        const float *d = dy + t * width, *x = sum + t * width, *r = residual + t * ldres;
        float* o = out + t * ldout;
        const float k = scale[t];
        float along = 0;
#pragma omp simd reduction(+ : along)
        for (long j = 0; j < width; j++) along += d[j] * weight[j] * x[j];
        const float c = along / width * k * k * k;
#pragma omp simd
        for (long j = 0; j < width; j++) o[j] = r[j] + d[j] * weight[j] * k - x[j] * c;
    }
}

// y = silu(gate) * up; a row of `both` is gate, then up.
void gate_up(const float* both, long ld, float* y, long tokens, long width) {
#pragma omp parallel for schedule(static)
    for (long t = 0; t < tokens; t++) {
        const float *gate = both + t * ld, *up = gate + width;
        float* out = y + t * width;
#pragma omp simd
        for (long j = 0; j < width; j++) {
            const float g = gate[j];
            out[j] = g * sigmoid(g) * up[j];
        }
    }
}

void gate_up_backward(const float* dy, const float* both, long ld, float* dboth, long ldd, long tokens, long width) {
#pragma omp parallel for schedule(static)
    for (long t = 0; t < tokens; t++) {
        const float *d = dy + t * width, *gate = both + t * ld, *up = gate + width;
        float *dgate = dboth + t * ldd, *dup = dgate + width;
#pragma omp simd
        for (long j = 0; j < width; j++) {
            const float g = gate[j], s = sigmoid(g);
            dgate[j] = d[j] * up[j] * s * (1.f + g * (1.f - s));
            dup[j] = d[j] * g * s;
        }
    }
}

// Flat q, k, v (tokens, heads * d + 2 * groups * d) -> attention's buffers, q and k turned by their position.
void rotate_in(const float* qkv, long ld, const int32_t* place, const float* cosine, const float* sine, float* q,
               float* k, float* v, long rows, long length, long groups, long per, long d) {
    const long half = d / 2, queries = groups * per * d;
#pragma omp parallel for collapse(2) schedule(static)
    for (long b = 0; b < rows; b++)
        for (long l = 0; l < length; l++) {
            const long t = place[b * length + l];
            const float *c = cosine + l * half, *s = sine + l * half;
            for (long g = 0; g < groups; g++) {
                const long at = (b * groups + g) * length + l;
                float *toq = q + at * per * d, *tok = k + at * d, *tov = v + at * d;
                if (t < 0) {
                    std::memset(toq, 0, per * d * sizeof(float));
                    std::memset(tok, 0, d * sizeof(float));
                    std::memset(tov, 0, d * sizeof(float));
                    continue;
                }
                const float* row = qkv + t * ld;
                for (long h = 0; h < per; h++) turn(row + (g * per + h) * d, toq + h * d, c, s, half, 1.f);
                turn(row + queries + g * d, tok, c, s, half, 1.f);
                std::memcpy(tov, row + queries + (groups + g) * d, d * sizeof(float));
            }
        }
}

// Its gradient. A token that several rows share gets the sum of its gradients as key and value.
void rotate_back(const float* dq, const float* dk, const float* dv, const int32_t* owner, const float* cosine,
                 const float* sine, float* dqkv, long ld, long tokens, long shared, long rows, long length,
                 long groups, long per, long d) {
    const long half = d / 2, queries = groups * per * d;
#pragma omp parallel for schedule(static)
    for (long t = 0; t < tokens; t++) {
        float* row = dqkv + t * ld;
        if (owner[t] < 0) {
            std::memset(row, 0, (queries + 2 * groups * d) * sizeof(float));
            continue;
        }
        const long own = owner[t] / length, l = owner[t] % length;
        const long first = t < shared ? 0 : own, last = t < shared ? rows : own + 1;
        const float *c = cosine + l * half, *s = sine + l * half;
        for (long g = 0; g < groups; g++) {
            const float* q = dq + ((own * groups + g) * length + l) * per * d;
            for (long h = 0; h < per; h++) turn(q + h * d, row + (g * per + h) * d, c, s, half, -1.f);
            float *tok = row + queries + g * d, *tov = tok + groups * d;
            std::memset(tok, 0, d * sizeof(float));
            std::memset(tov, 0, d * sizeof(float));
            for (long b = first; b < last; b++) {
                const long at = ((b * groups + g) * length + l) * d;
#pragma omp simd
                for (long e = 0; e < d; e++) {
                    tok[e] += dk[at + e];
                    tov[e] += dv[at + e];
                }
            }
            turn(tok, tok, c, s, half, -1.f);
        }
    }
}

// Attention's output (rows, groups, length * per, d) -> flat (tokens, heads * d).
void heads_to_flat(const float* heads, const int32_t* owner, float* flat, long tokens, long length, long groups,
                   long width) {
#pragma omp parallel for schedule(static)
    for (long t = 0; t < tokens; t++) {
        float* row = flat + t * groups * width;
        if (owner[t] < 0) {
            std::memset(row, 0, groups * width * sizeof(float));
            continue;
        }
        const long b = owner[t] / length, l = owner[t] % length;
        for (long g = 0; g < groups; g++)
            std::memcpy(row + g * width, heads + ((b * groups + g) * length + l) * width, width * sizeof(float));
    }
}

// Its gradient: zero at positions that are empty or another row's token.
void flat_to_heads(const float* flat, const int32_t* place, const int32_t* owner, float* heads, long rows,
                   long length, long groups, long width) {
#pragma omp parallel for collapse(2) schedule(static)
    for (long b = 0; b < rows; b++)
        for (long l = 0; l < length; l++) {
            const long t = place[b * length + l];
            const bool own = t >= 0 && owner[t] == b * length + l;
            for (long g = 0; g < groups; g++) {
                float* to = heads + ((b * groups + g) * length + l) * width;
                if (own)
                    std::memcpy(to, flat + t * groups * width + g * width, width * sizeof(float));
                else
                    std::memset(to, 0, width * sizeof(float));
            }
        }
}

// Scores (matrices, queries * per, keys) -> probabilities, in place; query i sees keys up to first + i.
// `logsum` keeps ln of the sum, from which attention_backward makes the probabilities again.
void softmax(float* scores, float scale, float* logsum, long ldlog, long matrices, long queries, long per,
             long keys, long first) {
    const long height = queries * per;
#pragma omp parallel for collapse(2) schedule(static)
    for (long m = 0; m < matrices; m++)
        for (long i = 0; i < height; i++) {
            float* row = scores + (m * height + i) * keys;
            const long seen = first + i / per + 1;
            float top = row[0], sum = 0;
#pragma omp simd reduction(max : top)
            for (long j = 0; j < seen; j++) top = row[j] > top ? row[j] : top;
#pragma omp simd reduction(+ : sum)
            for (long j = 0; j < seen; j++) {
                row[j] = exponential((row[j] - top) * scale);
                sum += row[j];
            }
            const float k = 1.f / sum;
#pragma omp simd
            for (long j = 0; j < seen; j++) row[j] *= k;
            std::memset(row + seen, 0, (keys - seen) * sizeof(float));
            logsum[m * ldlog + i] = top * scale + std::log(sum);
        }
}

// scores -> probabilities p, and dp -> gradient of the scores, both in place.
void softmax_backward(float* scores, float* dp, float scale, const float* logsum, long ldlog, long matrices,
                      long queries, long per, long keys, long first) {
    const long height = queries * per;
#pragma omp parallel for collapse(2) schedule(static)
    for (long m = 0; m < matrices; m++)
        for (long i = 0; i < height; i++) {
            float *p = scores + (m * height + i) * keys, *d = dp + (m * height + i) * keys;
            const long seen = first + i / per + 1;
            const float log = logsum[m * ldlog + i];
            float along = 0;
#pragma omp simd reduction(+ : along)
            for (long j = 0; j < seen; j++) {
                p[j] = exponential(p[j] * scale - log);
                along += p[j] * d[j];
            }
#pragma omp simd
            for (long j = 0; j < seen; j++) d[j] = p[j] * (d[j] - along) * scale;
            std::memset(p + seen, 0, (keys - seen) * sizeof(float));
            std::memset(d + seen, 0, (keys - seen) * sizeof(float));
        }
}

}  // extern "C"
