// Keys and values of a KV cache in 8 bits. Reference: `workers/model/fp8.py`.
//
// A row is the vector of one head and token: `dim` codes in e4m3 (1 bit sign, 4 bits exponent,
// 3 bits mantissa, no infinity), then one byte with their scale, a power of two, stored as the
// exponent bits of a float. It is the smallest scale with which no element exceeds 448, the largest
// number of e4m3. A vector with NaN or infinity is read as NaN.
//
// Source: "FP8 formats for deep learning" (Micikevicius et al., 2022) for the elements; "OCP
// Microscaling Formats (MX) Specification v1.0" for scales of 8 bits. There a scale belongs to
// 32 elements, and an element between 448 and 512 times the scale becomes 448.
#ifndef FP8_H
#define FP8_H

#include <math.h>

#include "numbers.h"

enum { FP8_NAN = 0x7f, FP8_NAN_SCALE = 0xff };

ALWAYS int64_t fp8_row_bytes(int64_t dim) { return dim + 1; }

ALWAYS uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

ALWAYS float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

// Round a number of at most 448 to the nearest code, ties to even.
ALWAYS uint8_t fp8_code(float x) {
    uint32_t bits = bits_of(x), size = bits & 0x7fffffff;
    uint32_t normal = ((size + 0x7ffff + (size >> 20 & 1)) >> 20) - (120 << 3);
    // Codes below 2**-6 are multiples of 2**-9: the unit in the last place of 2**14.
    uint32_t small = bits_of(float_of(size) + 16384.0f) - bits_of(16384.0f);
    return (uint8_t)((size < bits_of(0x1p-6f) ? small : normal) | (bits >> 24 & 0x80));
}

// Write a vector of `dim` numbers as a row.
static inline void fp8_write(uint8_t *row, const float *x, int64_t dim) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < dim; i++) {
        uint32_t size = bits_of(x[i]) & 0x7fffffff;
        largest = size > largest ? size : largest;
    }
    if (largest >= bits_of(INFINITY)) {
        memset(row, FP8_NAN, (size_t)dim);
        row[dim] = FP8_NAN_SCALE;
        return;
    }
    // 448 is 1.75 * 2**8: above a mantissa of 1.75 the next exponent is used.
    int32_t scale = (int32_t)((largest + 0x1fffff) >> 23) - 8;
    scale = scale < 1 ? 1 : scale;
    float inverse = float_of((uint32_t)(254 - scale) << 23);
    for (int64_t i = 0; i < dim; i++) row[i] = fp8_code(x[i] * inverse);
    row[dim] = (uint8_t)scale;
}

// Factor for the elements of a row that were loaded as E4M3.
ALWAYS float fp8_scale(const uint8_t *row, int64_t dim) {
    float scale = float_of((uint32_t)row[dim] << 23) * E4M3_UNIT;
    return scale + scale * 0.0f;  // infinity becomes NaN
}

#endif
