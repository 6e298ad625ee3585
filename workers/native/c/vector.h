// Vectors of float on AVX2 (8 lanes) and AVX-512 (16 lanes). Each operation is exact IEEE 754, so
// both give the same bits; exp is a polynomial of these operations.
#ifndef VECTOR_H
#define VECTOR_H

#include <immintrin.h>
#include <stdint.h>

#define ALWAYS static inline __attribute__((always_inline))
#ifdef __clang__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

#ifdef __AVX512F__

enum { LANES = 16 };
typedef __m512 vec;
typedef __m512i veci;

ALWAYS vec v_load(const float *x) { return _mm512_loadu_ps(x); }
ALWAYS void v_store(float *to, vec x) { _mm512_storeu_ps(to, x); }
ALWAYS vec v_set(float x) { return _mm512_set1_ps(x); }
ALWAYS vec v_add(vec a, vec b) { return _mm512_add_ps(a, b); }
ALWAYS vec v_sub(vec a, vec b) { return _mm512_sub_ps(a, b); }
ALWAYS vec v_mul(vec a, vec b) { return _mm512_mul_ps(a, b); }
ALWAYS vec v_div(vec a, vec b) { return _mm512_div_ps(a, b); }
// Returns the second operand if the first is NaN.
ALWAYS vec v_min(vec a, vec b) { return _mm512_min_ps(a, b); }
ALWAYS vec v_max(vec a, vec b) { return _mm512_max_ps(a, b); }
ALWAYS vec v_fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
ALWAYS void v_add_product(vec *sum, vec a, vec b) { *sum = v_fma(a, b, *sum); }
ALWAYS veci vi_load(const void *x) { return _mm512_loadu_si512(x); }
ALWAYS void vi_store(void *to, veci x) { _mm512_storeu_si512(to, x); }
ALWAYS veci vi_set(int x) { return _mm512_set1_epi32(x); }
ALWAYS veci vi_add(veci a, veci b) { return _mm512_add_epi32(a, b); }
ALWAYS veci vi_and(veci a, veci b) { return _mm512_and_si512(a, b); }
ALWAYS veci vi_left(veci x, int bits) { return _mm512_slli_epi32(x, (unsigned)bits); }
ALWAYS veci vi_right(veci x, int bits) { return _mm512_srli_epi32(x, (unsigned)bits); }
ALWAYS vec v_bits(veci x) { return _mm512_castsi512_ps(x); }
ALWAYS veci vi_bits(vec x) { return _mm512_castps_si512(x); }
// `chosen` in lanes in which x is NaN, else y.
ALWAYS veci vi_if_nan(vec x, veci chosen, veci y) {
    return _mm512_mask_mov_epi32(y, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), chosen);
}
// x in lanes in which a < b, else y.
ALWAYS vec v_if_less(vec a, vec b, vec x, vec y) {
    return _mm512_mask_mov_ps(y, _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), x);
}
// Nearest integers, ties to even; then conversions of integers.
ALWAYS vec v_nearest(vec x) { return _mm512_roundscale_ps(x, 0x8); }
ALWAYS veci vi_of(vec x) { return _mm512_cvtps_epi32(x); }
// Load and store 16 unsigned bits of each lane.
ALWAYS veci vi_load16(const uint16_t *x) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)x));
}
ALWAYS void vi_store16(uint16_t *to, veci x) {
    _mm256_storeu_si256((__m256i *)to, _mm512_cvtepi32_epi16(x));
}
// Load float16 numbers.
ALWAYS vec v_load_fp16(const uint16_t *x) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)x));
}
// Load e4m3 numbers, divided by 256: shifted by 7 bits, with a zero after the sign, they are
// float16, also if they are subnormal.
ALWAYS vec v_load_e4m3(const uint8_t *x) {
    __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)x));
    wide = _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16((short)0xbfff));
    return _mm512_cvtph_ps(wide);
}

#else

enum { LANES = 8 };
typedef __m256 vec;
typedef __m256i veci;

ALWAYS vec v_load(const float *x) { return _mm256_loadu_ps(x); }
ALWAYS void v_store(float *to, vec x) { _mm256_storeu_ps(to, x); }
ALWAYS vec v_set(float x) { return _mm256_set1_ps(x); }
ALWAYS vec v_add(vec a, vec b) { return _mm256_add_ps(a, b); }
ALWAYS vec v_sub(vec a, vec b) { return _mm256_sub_ps(a, b); }
ALWAYS vec v_mul(vec a, vec b) { return _mm256_mul_ps(a, b); }
ALWAYS vec v_div(vec a, vec b) { return _mm256_div_ps(a, b); }
ALWAYS vec v_min(vec a, vec b) { return _mm256_min_ps(a, b); }
ALWAYS vec v_max(vec a, vec b) { return _mm256_max_ps(a, b); }
ALWAYS vec v_fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
// sum += a * b, fused. With 16 registers, compilers that may choose another register for the sum
// spill sums to the stack.
ALWAYS void v_add_product(vec *sum, vec a, vec b) {
    __asm__("vfmadd231ps %2, %1, %0" : "+x"(*sum) : "x"(a), "x"(b));
}
ALWAYS veci vi_load(const void *x) { return _mm256_loadu_si256(x); }
ALWAYS void vi_store(void *to, veci x) { _mm256_storeu_si256((__m256i *)to, x); }
ALWAYS veci vi_set(int x) { return _mm256_set1_epi32(x); }
ALWAYS veci vi_add(veci a, veci b) { return _mm256_add_epi32(a, b); }
ALWAYS veci vi_and(veci a, veci b) { return _mm256_and_si256(a, b); }
ALWAYS veci vi_left(veci x, int bits) { return _mm256_slli_epi32(x, bits); }
ALWAYS veci vi_right(veci x, int bits) { return _mm256_srli_epi32(x, bits); }
ALWAYS vec v_bits(veci x) { return _mm256_castsi256_ps(x); }
ALWAYS veci vi_bits(vec x) { return _mm256_castps_si256(x); }
ALWAYS veci vi_if_nan(vec x, veci chosen, veci y) {
    vec is_nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
    return vi_bits(_mm256_blendv_ps(v_bits(y), v_bits(chosen), is_nan));
}
ALWAYS vec v_if_less(vec a, vec b, vec x, vec y) {
    return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
ALWAYS vec v_nearest(vec x) { return _mm256_round_ps(x, 0x8); }
ALWAYS veci vi_of(vec x) { return _mm256_cvtps_epi32(x); }
ALWAYS veci vi_load16(const uint16_t *x) {
    return _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)x));
}
ALWAYS void vi_store16(uint16_t *to, veci x) {
    __m128i low = _mm256_castsi256_si128(x), high = _mm256_extracti128_si256(x, 1);
    _mm_storeu_si128((__m128i *)to, _mm_packus_epi32(low, high));
}
ALWAYS vec v_load_fp16(const uint16_t *x) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)x));
}
ALWAYS vec v_load_e4m3(const uint8_t *x) {
    __m128i wide = _mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i *)x));
    wide = _mm_and_si128(_mm_slli_epi16(wide, 7), _mm_set1_epi16((short)0xbfff));
    return _mm256_cvtph_ps(wide);
}

#endif

// x rounded to the nearest bfloat16, ties to even: the upper 16 bits, as unsigned numbers.
// NaN becomes 0x7fc0.
ALWAYS veci v_to_bf16(vec x) {
    veci bits = vi_bits(x);
    veci odd = vi_and(vi_right(bits, 16), vi_set(1));
    veci rounded = vi_add(bits, vi_add(vi_set(0x7fff), odd));
    return vi_right(vi_if_nan(x, vi_set(0x7fc00000), rounded), 16);
}

ALWAYS vec v_from_bf16(veci x) { return v_bits(vi_left(x, 16)); }

ALWAYS vec v_round_bf16(vec x) { return v_from_bf16(v_to_bf16(x)); }

ALWAYS vec v_load_bf16(const uint16_t *x) { return v_from_bf16(vi_load16(x)); }

// exp(x) within 2 units in the last place for x in [-87, 88]; x is clamped to this range.
// Source: the reduction and coefficients of Cephes' expf (Stephen L. Moshier, netlib); every
// product is fused with its sum here.
ALWAYS vec v_exp(vec x) {
    x = v_min(v_set(88.0f), v_max(v_set(-87.0f), x));  // keeps NaN
    // Adding 1.5 * 2**23 rounds to an integer n, which is in the lower bits of the sum.
    vec magic = v_set(12582912.0f);
    vec shifted = v_fma(x, v_set(1.44269504088896341f), magic);
    vec n = v_sub(shifted, magic);
    vec r = v_fma(n, v_set(-0.693359375f), x);  // x - n * log(2), in two parts
    r = v_fma(n, v_set(2.12194440e-4f), r);
    vec p = v_set(1.9875691500e-4f);
    p = v_fma(p, r, v_set(1.3981999507e-3f));
    p = v_fma(p, r, v_set(8.3334519073e-3f));
    p = v_fma(p, r, v_set(4.1665795894e-2f));
    p = v_fma(p, r, v_set(1.6666665459e-1f));
    p = v_fma(p, r, v_set(5.0000001201e-1f));
    p = v_add(v_fma(v_mul(r, r), p, r), v_set(1.0f));
    veci power = vi_left(vi_add(vi_bits(shifted), vi_set(127)), 23);  // 2**n
    return v_mul(p, v_bits(power));
}

// x * sigmoid(x).
ALWAYS vec v_silu(vec x) {
    vec one = v_set(1.0f);
    return v_div(x, v_add(one, v_exp(v_sub(v_set(0.0f), x))));
}

#endif
