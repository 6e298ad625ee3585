// RMS norm. Reference: `rms_norm` in `workers/model/layers.py`.
#ifndef NORM_H
#define NORM_H

#include "numbers.h"

// x = x / rms(x), rounded, times weight, rounded: floats that are exact in `dtype`.
void rms_norm(float *x, const void *weight, int64_t size, float eps, enum dtype dtype);

// Normalize rows x [num_rows, size] in place. is_finite [num_rows]: whether all numbers of a
// normalized row are finite; NULL if not needed.
void norm_rows(void *x, const void *weight, long num_rows, long size, double eps, int dtype,
               uint8_t *is_finite);

#endif
