// Matrix products with terms in fp16, for processors that calculate in it (AVX512-FP16): y = x W^T, x and y in fp32.
//
// An fp16 unit does twice as many operations as an fp32 one. Two things keep its sums good enough to train with: TERMS
// products are summed in fp16, and these sums are added up in fp32; and each row of x is scaled so that its largest
// value is LARGEST, each W so that its largest is 1, so nothing overflows. Closer to fp32 than bf16 is.
//
// Written with the compiler's vector types: on other processors the same code is correct and slow, for the tests.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

typedef _Float16 half;
typedef half Halves __attribute__((vector_size(64)));
typedef uint32_t Pairs __attribute__((vector_size(64)));

constexpr long ROWS = 8, WIDE = 32, COLUMNS = 96, VECTORS = COLUMNS / WIDE;  // a tile: 24 of 32 registers are sums
constexpr long TERMS = 96;      // products that are summed in fp16
constexpr long BLOCK = 96;      // rows of x that are converted at once: they stay in the core's own cache
constexpr float LARGEST = 32;   // 96 terms of at most 32 x 1 stay far below 65504

inline long least(long a, long b) { return a < b ? a : b; }

// 16 numbers at a time; written out because compilers convert fp16 one by one.
inline void to_floats(const half* from, float* to) {
#ifdef __AVX512F__
    _mm512_storeu_ps(to, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#else
    for (long i = 0; i < 16; i++) to[i] = (float)from[i];
#endif
}

inline void to_halves(const float* from, float by, half* to) {
#ifdef __AVX512F__
    const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(from), _mm512_set1_ps(by));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(scaled, _MM_FROUND_TO_NEAREST_INT));
#else
    for (long i = 0; i < 16; i++) to[i] = (half)(from[i] * by);
#endif
}

// (ROWS, TERMS) of x, each number twice in 32 bits, times (TERMS, COLUMNS) of W; sums are added to y, times `scale`.
void tile(const uint32_t* x, const half* w, long terms, const float* scale, bool first, float* y, long ldy, long rows,
          long columns) {
    Halves sum[ROWS][VECTORS] = {};
    for (long k = 0; k < terms; k++) {
        Halves b[VECTORS];
#pragma GCC unroll 3
        for (long j = 0; j < VECTORS; j++) std::memcpy(&b[j], w + k * COLUMNS + j * WIDE, sizeof(Halves));
#pragma GCC unroll 8
        for (long i = 0; i < ROWS; i++) {
            const Halves a = (Halves)(Pairs{} + x[k * ROWS + i]);
#pragma GCC unroll 3
            for (long j = 0; j < VECTORS; j++) sum[i][j] += a * b[j];
        }
    }
    for (long i = 0; i < rows; i++) {
        half halves[COLUMNS];
        float row[COLUMNS], *out = y + i * ldy;
        std::memcpy(halves, sum[i], sizeof halves);
        for (long c = 0; c < COLUMNS; c += 16) to_floats(halves + c, row + c);
#pragma omp simd
        for (long c = 0; c < columns; c++) out[c] = row[c] * scale[i] + (first ? 0.f : out[c]);
    }
}

// Up to ROWS rows of x -> (width, ROWS) of fp16 twice in 32 bits; scale: what the sums have to be multiplied with.
void convert(const float* x, long ldx, long rows, long width, float largest_weight, uint32_t* to, float* scale) {
    for (long i = 0; i < ROWS; i++) {
        float top = 0, odd = 0;  // odd: not a number where x has one, or infinity
        if (i < rows)
#pragma omp simd reduction(max : top) reduction(+ : odd)
            for (long k = 0; k < width; k++) {
                const float number = x[i * ldx + k];
                top = std::fabs(number) > top ? std::fabs(number) : top;
                odd += number * 0.f;
            }
        top += odd;
        const float by = top == 0 ? 0 : LARGEST / top;
        scale[i] = top / LARGEST * largest_weight;
        for (long k = 0; k < width; k += 16) {
            float numbers[16] = {};
            uint16_t bits[16];
            const long count = least(width - k, 16);
            if (i < rows) std::memcpy(numbers, x + i * ldx + k, count * sizeof(float));
            half halves[16];
            to_halves(numbers, by, halves);
            std::memcpy(bits, halves, sizeof bits);
            for (long e = 0; e < count; e++) to[(k + e) * ROWS + i] = bits[e] * 0x10001u;
        }
    }
}

}  // namespace

extern "C" {

// W, whose number (o, k) is at w[o * stride_out + k * stride_in], divided by `largest`: panels of COLUMNS outputs.
void pack(const float* w, long stride_out, long stride_in, long out, long in, float largest, uint16_t* packed) {
#pragma omp parallel for schedule(static)
    for (long first = 0; first < out; first += COLUMNS)
        for (long k = 0; k < in; k++)
            for (long c = 0; c < COLUMNS; c++) {
                const half value = first + c < out ? (half)(w[(first + c) * stride_out + k * stride_in] / largest) : (half)0;
                std::memcpy(packed + first * in + k * COLUMNS + c, &value, 2);
            }
}

// y (rows, out) = x (rows, in) W^T, of a packed W.
void product(const float* x, long ldx, const uint16_t* packed, float largest, float* y, long ldy, long rows, long in,
             long out) {
#pragma omp parallel
    {
        uint32_t* converted = static_cast<uint32_t*>(std::aligned_alloc(64, BLOCK * in * sizeof(uint32_t)));
        float scale[BLOCK];
#pragma omp for schedule(dynamic, 1)
        for (long start = 0; start < rows; start += BLOCK) {
            const long height = least(rows - start, BLOCK);
            for (long r = 0; r < height; r += ROWS)
                convert(x + (start + r) * ldx, ldx, height - r, in, largest, converted + r * in, scale + r);
            for (long first = 0; first < out; first += COLUMNS)
                for (long k = 0; k < in; k += TERMS)
                    for (long r = 0; r < height; r += ROWS)
                        tile(converted + r * in + k * ROWS, reinterpret_cast<const half*>(packed) + first * in + k * COLUMNS,
                             least(in - k, TERMS), scale + r, k == 0, y + (start + r) * ldy + first, ldy,
                             least(height - r, ROWS), least(out - first, COLUMNS));
        }
        std::free(converted);
    }
}

}  // extern "C"
