#include "norm.h"

#include <math.h>

// 1 / root mean square of floats.
static float inverse_rms(const float *x, int64_t size, float eps) {
    vec squares[PARTS];
    for (int part = 0; part < PARTS; part++) squares[part] = v_set(0.0f);
    for (int64_t i = 0; i < size; i += WIDE)
        for (int part = 0; part < PARTS; part++) {
            int64_t at = i + part * LANES;
            if (at >= size) continue;
            vec value = load_some(x, at, size - at, FLOAT32);
            squares[part] = v_fma(value, value, squares[part]);
        }
    return 1.0f / sqrtf(wide_sum(squares) / (float)size + eps);
}

void rms_norm(float *x, const void *weight, int64_t size, float eps, enum dtype dtype) {
    vec scale = v_set(inverse_rms(x, size, eps));
    for (int64_t i = 0; i < size; i += LANES) {
        vec normed = v_round(v_mul(load_some(x, i, size - i, FLOAT32), scale), dtype);
        vec y = v_round(v_mul(normed, load_some(weight, i, size - i, dtype)), dtype);
        store_some(x, i, y, size - i, FLOAT32);
    }
}

// Whether all floats are finite: products with 0 are 0, except for infinity and NaN.
static int all_finite(const float *x, int64_t size) {
    vec zeros[PARTS] = {v_set(0.0f)};
    for (int part = 1; part < PARTS; part++) zeros[part] = zeros[0];
    for (int64_t i = 0; i < size; i += LANES)
        zeros[0] = v_fma(load_some(x, i, size - i, FLOAT32), v_set(0.0f), zeros[0]);
    return wide_sum(zeros) == 0.0f;
}

void norm_rows(void *x, const void *weight, long num_rows, long size, double eps, int dtype,
               uint8_t *is_finite) {
    float row[size];
    for (long i = 0; i < num_rows; i++) {
        char *at = (char *)x + (size_t)(i * size) * dtype_bytes((enum dtype)dtype);
        convert(row, FLOAT32, at, (enum dtype)dtype, size);
        rms_norm(row, weight, size, (float)eps, (enum dtype)dtype);
        convert(at, (enum dtype)dtype, row, FLOAT32, size);
        if (is_finite) is_finite[i] = (uint8_t)all_finite(row, size);
    }
}
