// Codes of quantized weights to pairs of bfloat16, and their scales to numbers.
#ifndef CODES_H
#define CODES_H

#include "fp8.h"

// How a tile finds pairs of bfloat16: in words of codes, or as they are.
enum source { FROM_INT8, FROM_FLOAT8, FROM_4_BITS, DECODED };

// bfloat16 of each code of 4 bits: -8 to 7 in two's complement, and E2M1.
static const uint16_t NUMBERS[2][16] = {
    {0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
     0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80},
    {0x0000, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0,
     0x8000, 0xbf00, 0xbf80, 0xbfc0, 0xc000, 0xc040, 0xc080, 0xc0c0},
};

// ---- codes to numbers ---------------------------------------------------------------------------

// The 16 numbers of codes of 4 bits, as `pair_of_4_bits` looks them up.
struct numbers {
#ifdef __AVX512F__
    veci all;  // twice
#else
    veci low, high;  // their bytes, in each half
#endif
};

ALWAYS struct numbers load_numbers(const uint16_t *table) {
    struct numbers numbers;
#ifdef __AVX512F__
    numbers.all = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)table));
#else
    uint8_t low[16], high[16];
    for (int i = 0; i < 16; i++) low[i] = (uint8_t)table[i], high[i] = (uint8_t)(table[i] >> 8);
    numbers.low = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)low));
    numbers.high = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)high));
#endif
    return numbers;
}

// Pair j of each lane's eight elements.
ALWAYS veci pair_of_4_bits(veci words, const int j, const struct numbers *numbers) {
#ifdef __AVX512F__
    // Of an index the lower 5 bits count; the table repeats itself.
    return _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4 * j), numbers->all);
#else
    veci codes = _mm256_and_si256(_mm256_srli_epi16(words, 4 * j), _mm256_set1_epi16(15));
    veci low = _mm256_shuffle_epi8(numbers->low, codes);
    veci high = _mm256_shuffle_epi8(numbers->high, codes);
    low = _mm256_and_si256(low, _mm256_set1_epi16(255));  // of the zeros above each code too
    return _mm256_or_si256(low, _mm256_slli_epi16(high, 8));
#endif
}

// Bytes of each lane moved within it: byte i of the result is byte `order >> 8 * i & 255` of the
// lane, or 0 where that is NONE.
enum { NONE = 0x80 };
#define ORDER(A, B, C, D) ((int)((unsigned)(D) << 24 | (C) << 16 | (B) << 8 | (A)))

ALWAYS veci move_bytes(veci words, const int order) {
#ifdef __AVX512F__
    veci lanes = _mm512_broadcast_i32x4(_mm_set_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0));
    return _mm512_shuffle_epi8(words, _mm512_or_si512(lanes, vi_set(order)));
#else
    veci lanes = _mm256_broadcastsi128_si256(_mm_set_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0));
    return _mm256_shuffle_epi8(words, _mm256_or_si256(lanes, vi_set(order)));
#endif
}

ALWAYS vec float_of_ints(veci x) {
#ifdef __AVX512F__
    return _mm512_cvtepi32_ps(x);
#else
    return _mm256_cvtepi32_ps(x);
#endif
}

// Numbers that are exact in bfloat16, of two elements of each lane -> pairs.
ALWAYS veci to_pairs(vec even, vec odd) {
    veci low = vi_right(vi_bits(even), 16), high = vi_and(vi_bits(odd), vi_set((int)0xffff0000));
    return vi_add(low, high);
}

// Pair j of each lane's four signed bytes, times 2**24.
ALWAYS veci pair_of_int8(veci words, const int j) {
    if (j == 0)
        return to_pairs(float_of_ints(vi_left(words, 24)),
                        float_of_ints(move_bytes(words, ORDER(NONE, NONE, NONE, 1))));
    return to_pairs(float_of_ints(move_bytes(words, ORDER(NONE, NONE, NONE, 2))),
                    float_of_ints(vi_and(words, vi_set((int)0xff000000))));
}

// Pair j of each lane's four bytes in e4m3, divided by FLOAT8_UNIT. None is not a number.
#ifdef __AVX512BF16__
#define FLOAT8_UNIT 256.0f  // as float16, whose exponents are 8 larger
ALWAYS veci pair_of_float8(veci words, const int j) {
    veci upper = move_bytes(words, j ? ORDER(NONE, 2, NONE, 3) : ORDER(NONE, 0, NONE, 1));
    // The sign stands twice; what is left of the first one is a zero.
    veci halves = vi_and(_mm512_srai_epi16(upper, 1), _mm512_set1_epi16((short)0xbf80));
    vec low = _mm512_cvtph_ps(_mm512_castsi512_si256(halves));
    vec high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1));
    return (veci)_mm512_cvtne2ps_pbh(high, low);
}
#else
#define FLOAT8_UNIT 1.0f
ALWAYS vec float_of_e4m3(veci upper) {  // in the upper byte of each lane
#ifdef __AVX512F__
    veci wide = _mm512_srai_epi32(upper, 4);
#else
    veci wide = _mm256_srai_epi32(upper, 4);
#endif
    return v_mul(v_bits(vi_and(wide, vi_set((int)0x87f00000))), v_set(0x1p120f));
}
ALWAYS veci pair_of_float8(veci words, const int j) {
    if (j == 0)
        return to_pairs(float_of_e4m3(vi_left(words, 24)),
                        float_of_e4m3(move_bytes(words, ORDER(NONE, NONE, NONE, 1))));
    return to_pairs(float_of_e4m3(move_bytes(words, ORDER(NONE, NONE, NONE, 2))),
                    float_of_e4m3(words));
}
#endif

// Pairs in a word.
#define PAIRS_OF(SOURCE) ((SOURCE) == DECODED ? 1 : (SOURCE) == FROM_4_BITS ? 4 : 2)

ALWAYS veci pair_at(const enum source source, veci words, const int j,
                    const struct numbers *numbers) {
    if (source == FROM_INT8) return pair_of_int8(words, j);
    if (source == FROM_FLOAT8) return pair_of_float8(words, j);
    if (source == FROM_4_BITS) return pair_of_4_bits(words, j, numbers);
    return words;
}

// ---- scales -------------------------------------------------------------------------------------

// LANES signed bytes.
ALWAYS vec load_int8(const int8_t *x) {
#ifdef __AVX512F__
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)x)));
#else
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)x)));
#endif
}

// LANES powers of two: 2**(code - 127), and what is not a number for 255.
ALWAYS vec load_e8m0(const uint8_t *x) {
#ifdef __AVX512F__
    veci codes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)x));
#else
    veci codes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)x));
#endif
    // The code is the exponent of a float, but for 0: a subnormal number, which all others exceed.
    vec found = v_max(v_bits(vi_left(codes, 23)), v_bits(vi_set(0x00400000)));
    return v_add(found, v_mul(found, v_set(0.0f)));  // infinity becomes not a number
}

// LANES scales from place `at` on.
ALWAYS vec load_scales(const char *scales, enum scales type, long at) {
    if (type == SCALES_FLOAT32) return v_load((const float *)scales + at);
    if (type == SCALES_BFLOAT16) return v_load_bf16((const uint16_t *)scales + at);
    if (type == SCALES_FLOAT16) return v_load_fp16((const uint16_t *)scales + at);
    return load_e8m0((const uint8_t *)scales + at);
}

#endif
