// Decoding of quantized weights (codes) to pairs of bfloat16, and of their scales to float.
#ifndef CODES_H
#define CODES_H

#include "fp8.h"

// Source of a tile's pairs of bfloat16: words of codes, or decoded pairs.
enum source { FROM_INT8, FROM_FLOAT8, FROM_4_BITS, DECODED };

// Bytes A, B, C and D of a word.
#define ORDER(A, B, C, D) ((int)((unsigned)(D) << 24 | (C) << 16 | (B) << 8 | (A)))

// bfloat16 value of each 4-bit code: -8 to 7 in two's complement, and E2M1.
static const uint16_t NUMBERS[2][16] = {
    {0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
     0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80},
    {0x0000, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0,
     0x8000, 0xbf00, 0xbf80, 0xbfc0, 0xc000, 0xc040, 0xc080, 0xc0c0},
};

#ifdef __AVX512BF16__
#define LOG2(N) ((N) < 2 ? 0 : (N) < 4 ? 1 : (N) < 8 ? 2 : (N) < 16 ? 3 : (N) < 32 ? 4 \
                 : (N) < 64 ? 5 : (N) < 128 ? 6 : 7)
// bfloat16 value of N * 2**E, for N from 1 to 128.
#define NUMBER(N, E) ((127 + (E) + LOG2(N)) << 7 | ((N) << (7 - LOG2(N)) & 0x7f))
#define OF_INT8(N) NUMBER((N) ? (N) : 128, 0)
#define OF_E4M3(N) ((N) == 127 ? 0x7fc0 : (N) == 0 ? 0 : (N) < 8 ? NUMBER(N, -9)           \
                    : NUMBER(8 + ((N) & 7), (((N) >> 3) - 10)))
#define LOW(F, N) (uint8_t)(F(N) & 255)
#define HIGH(F, N) (uint8_t)(F(N) >> 8)
#define EACH_OF_8(P, F, N) P(F, N), P(F, N + 1), P(F, N + 2), P(F, N + 3), P(F, N + 4),      \
                           P(F, N + 5), P(F, N + 6), P(F, N + 7)
#define EACH_OF_64(P, F, N) EACH_OF_8(P, F, N), EACH_OF_8(P, F, N + 8),                      \
                            EACH_OF_8(P, F, N + 16), EACH_OF_8(P, F, N + 24),                \
                            EACH_OF_8(P, F, N + 32), EACH_OF_8(P, F, N + 40),                \
                            EACH_OF_8(P, F, N + 48), EACH_OF_8(P, F, N + 56)
#define BYTES_OF(F) {{EACH_OF_64(LOW, F, 0)}, {EACH_OF_64(LOW, F, 64)},                      \
                     {EACH_OF_64(HIGH, F, 0)}, {EACH_OF_64(HIGH, F, 64)}}
// Tables from 7 bits to the absolute value in bfloat16, for the magnitude of int8 (0 represents 128)
// and the code of e4m3: two halves of the lower bytes, then two halves of the upper bytes.
static const uint8_t BYTES[2][4][64] __attribute__((aligned(64))) = {
    BYTES_OF(OF_INT8), BYTES_OF(OF_E4M3)};
#endif

// ---- codes to values ----------------------------------------------------------------------------

// Lookup tables of the values of codes.
struct numbers {
#ifdef __AVX512F__
    veci all;  // the 16 values of 4-bit codes, twice
#else
    veci low, high;  // bytes of the 16 values, in each half
#endif
#ifdef __AVX512BF16__
    veci bytes[4];  // tables for 8-bit codes, from BYTES
#endif
};

ALWAYS struct numbers load_numbers(int64_t codes) {
    const uint16_t *table = NUMBERS[codes == FLOAT4];
    struct numbers numbers;
#ifdef __AVX512F__
    numbers.all = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)table));
#else
    uint8_t low[16], high[16];
    for (int i = 0; i < 16; i++) low[i] = (uint8_t)table[i], high[i] = (uint8_t)(table[i] >> 8);
    numbers.low = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)low));
    numbers.high = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)high));
#endif
#ifdef __AVX512BF16__
    for (int i = 0; i < 4; i++)
        numbers.bytes[i] = _mm512_load_si512(BYTES[codes == FLOAT8][i]);
#endif
    return numbers;
}

// Pair j of each lane's eight elements.
ALWAYS veci pair_of_4_bits(veci words, const int j, const struct numbers *numbers) {
#ifdef __AVX512F__
    // Only the lower 5 bits of an index are used, so the table is stored twice.
    return _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4 * j), numbers->all);
#else
    veci codes = _mm256_and_si256(_mm256_srli_epi16(words, 4 * j), _mm256_set1_epi16(15));
    veci low = _mm256_shuffle_epi8(numbers->low, codes);
    veci high = _mm256_shuffle_epi8(numbers->high, codes);
    low = _mm256_and_si256(low, _mm256_set1_epi16(255));  // includes the zeros above each code
    return _mm256_or_si256(low, _mm256_slli_epi16(high, 8));
#endif
}

#ifdef __AVX512BF16__
#define INT8_UNIT 1.0f

// Reorder four lanes: the first two bytes of each, then the last two.
ALWAYS veci in_turn(veci words) {
    return _mm512_shuffle_epi8(words, _mm512_broadcast_i32x4(_mm_set_epi32(
        ORDER(10, 11, 14, 15), ORDER(2, 3, 6, 7), ORDER(8, 9, 12, 13), ORDER(0, 1, 4, 5))));
}

// Pair j of each lane's four bytes, ordered by `in_turn`: values of the lower 7 bits of `sizes`, with
// the upper bits of `signs` as signs; 0 where `is_number` is not set.
ALWAYS veci signed_pair(veci sizes, __mmask64 is_number, veci signs, const int j,
                        const veci *bytes) {
    veci low = _mm512_permutex2var_epi8(bytes[0], sizes, bytes[1]);
    veci high = _mm512_maskz_permutex2var_epi8(is_number, bytes[2], sizes, bytes[3]);
    high = _mm512_ternarylogic_epi32(high, signs, vi_set((int)0x80808080), 0xf8);  // a | (b & c)
    return j ? _mm512_unpackhi_epi8(low, high) : _mm512_unpacklo_epi8(low, high);
}

ALWAYS veci pair_of_int8(veci words, const int j, const struct numbers *numbers) {
    words = in_turn(words);
    return signed_pair(_mm512_abs_epi8(words), _mm512_test_epi8_mask(words, words), words, j,
                       numbers->bytes);
}

ALWAYS veci pair_of_float8(veci words, const int j, const struct numbers *numbers) {
    words = in_turn(words);
    return signed_pair(words, ~(__mmask64)0, words, j, numbers->bytes);
}
#else
#define INT8_UNIT 0x1p-24f

// Permute the bytes of each lane: byte i of the result is byte `order >> 8 * i & 255` of the lane,
// or 0 if that is NONE.
enum { NONE = 0x80 };
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

// Convert two elements of each lane, which are exact in bfloat16, to pairs.
ALWAYS veci to_pairs(vec even, vec odd) {
    veci low = vi_right(vi_bits(even), 16), high = vi_and(vi_bits(odd), vi_set((int)0xffff0000));
    return vi_add(low, high);
}

// Pair j of each lane's four signed bytes, divided by INT8_UNIT.
ALWAYS veci pair_of_int8(veci words, const int j, const struct numbers *numbers) {
    (void)numbers;
    if (j == 0)
        return to_pairs(float_of_ints(vi_left(words, 24)),
                        float_of_ints(move_bytes(words, ORDER(NONE, NONE, NONE, 1))));
    return to_pairs(float_of_ints(move_bytes(words, ORDER(NONE, NONE, NONE, 2))),
                    float_of_ints(vi_and(words, vi_set((int)0xff000000))));
}

// Convert the e4m3 value in the upper byte of each lane.
ALWAYS vec float_of_e4m3(veci upper) {
#ifdef __AVX512F__
    veci wide = _mm512_srai_epi32(upper, 4);
#else
    veci wide = _mm256_srai_epi32(upper, 4);
#endif
    return v_mul(v_bits(vi_and(wide, vi_set((int)0x87f00000))), v_set(0x1p120f));
}
// Pair j of each lane's four bytes in e4m3.
ALWAYS veci pair_of_float8(veci words, const int j, const struct numbers *numbers) {
    (void)numbers;
    if (j == 0)
        return to_pairs(float_of_e4m3(vi_left(words, 24)),
                        float_of_e4m3(move_bytes(words, ORDER(NONE, NONE, NONE, 1))));
    return to_pairs(float_of_e4m3(move_bytes(words, ORDER(NONE, NONE, NONE, 2))),
                    float_of_e4m3(words));
}
#endif

// Number of pairs in a word.
#define PAIRS_OF(SOURCE) ((SOURCE) == DECODED ? 1 : (SOURCE) == FROM_4_BITS ? 4 : 2)

ALWAYS veci pair_at(const enum source source, veci words, const int j,
                    const struct numbers *numbers) {
    if (source == FROM_INT8) return pair_of_int8(words, j, numbers);
    if (source == FROM_FLOAT8) return pair_of_float8(words, j, numbers);
    if (source == FROM_4_BITS) return pair_of_4_bits(words, j, numbers);
    return words;
}

// ---- scales -------------------------------------------------------------------------------------

// Load LANES signed bytes.
ALWAYS vec load_int8(const int8_t *x) {
#ifdef __AVX512F__
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)x)));
#else
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)x)));
#endif
}

// Load LANES powers of two: 2**(code - 127), and NaN for 255.
ALWAYS vec load_e8m0(const uint8_t *x) {
#ifdef __AVX512F__
    veci codes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)x));
#else
    veci codes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)x));
#endif
    // The code is the exponent of a float, except 0: a subnormal, smaller than all others.
    vec found = v_max(v_bits(vi_left(codes, 23)), v_bits(vi_set(0x00400000)));
    return v_add(found, v_mul(found, v_set(0.0f)));  // infinity becomes NaN
}

// Load LANES scales from index `at` on.
ALWAYS vec load_scales(const char *scales, enum scales type, long at) {
    if (type == SCALES_FLOAT32) return v_load((const float *)scales + at);
    if (type == SCALES_BFLOAT16) return v_load_bf16((const uint16_t *)scales + at);
    if (type == SCALES_FLOAT16) return v_load_fp16((const uint16_t *)scales + at);
    return load_e8m0((const uint8_t *)scales + at);
}

#endif
