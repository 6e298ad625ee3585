// Numbers in the model's dtype, and sums in an order that is equal on all instruction sets.
#ifndef NUMBERS_H
#define NUMBERS_H

#include <string.h>

#include "product.h"

enum {
    WIDE = 16,             // number of lanes of a sum
    PARTS = WIDE / LANES,  // vectors with these lanes
};

// E4M3 elements are loaded divided by this, as float16, which has a larger exponent bias (by 8).
#define E4M3_UNIT 256.0f

ALWAYS size_t dtype_bytes(enum dtype dtype) {
    return dtype == E4M3 ? 1 : dtype == BFLOAT16 ? 2 : 4;
}

ALWAYS vec v_round(vec x, enum dtype dtype) { return dtype == BFLOAT16 ? v_round_bf16(x) : x; }

ALWAYS float load_one(const void *x, int64_t at, enum dtype dtype) {
    if (dtype == FLOAT32) return ((const float *)x)[at];
    uint32_t code = dtype == E4M3 ? ((const uint8_t *)x)[at] : 0;
    uint32_t bits = dtype == E4M3 ? (code & 0x80) << 24 | (code & 0x7f) << 20
                                  : (uint32_t)((const uint16_t *)x)[at] << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return dtype == E4M3 ? value * (0x1p120f / E4M3_UNIT) : value;
}

// Load LANES numbers.
ALWAYS vec load_at(const void *x, int64_t at, enum dtype dtype) {
    if (dtype == E4M3) return v_load_e4m3((const uint8_t *)x + at);
    return dtype == BFLOAT16 ? v_load_bf16((const uint16_t *)x + at) : v_load((const float *)x + at);
}

// Load the first `count` of LANES numbers, and zeros.
ALWAYS vec load_some(const void *x, int64_t at, int64_t count, enum dtype dtype) {
    if (count >= LANES) return load_at(x, at, dtype);
    float block[LANES] = {0};
    for (int64_t i = 0; i < count; i++) block[i] = load_one(x, at + i, dtype);
    return v_load(block);
}

// Store the first `count` of LANES numbers, rounded.
ALWAYS void store_some(void *to, int64_t at, vec x, int64_t count, enum dtype dtype) {
    if (dtype == BFLOAT16) {
        uint16_t block[LANES];
        vi_store16(count >= LANES ? (uint16_t *)to + at : block, v_to_bf16(x));
        if (count < LANES) memcpy((uint16_t *)to + at, block, (size_t)count * 2);
    } else {
        float block[LANES];
        v_store(count >= LANES ? (float *)to + at : block, x);
        if (count < LANES) memcpy((float *)to + at, block, (size_t)count * 4);
    }
}

// Copy `count` numbers from one dtype to another.
ALWAYS void convert(void *to, enum dtype to_dtype, const void *x, enum dtype dtype, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES)
        store_some(to, i, load_some(x, i, count - i, dtype), count - i, to_dtype);
}

// Sum 16 lanes: l and l + 8 are added, then l + 4, l + 2 and l + 1.
ALWAYS float wide_sum(const vec lanes[PARTS]) {
#ifdef __AVX512F__
    __m256 low = _mm512_castps512_ps256(lanes[0]), high = _mm512_extractf32x8_ps(lanes[0], 1);
#else
    __m256 low = lanes[0], high = lanes[1];
#endif
    __m256 half = _mm256_add_ps(low, high);
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}

// Replace `count` scores by exp(score - best); return their sum, computed in 16 lanes.
float numbers_softmax(float *scores, int64_t count);

#endif
