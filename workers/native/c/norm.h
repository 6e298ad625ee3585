// Norms by the root mean square; `rms_norm` in `workers/model/layers.py` is the reference.
#ifndef NORM_H
#define NORM_H

#include "numbers.h"

// x = x / rms(x), rounded, times weight, rounded: floats with the values of the type `dtype`.
void rms_norm(float *x, const void *weight, int64_t size, float eps, enum dtype dtype);

// Rows x [num_rows, size], normalised in place. is_finite [num_rows]: whether all numbers of a row
// are, afterwards; NULL: nobody asks.
void norm_rows(void *x, const void *weight, long num_rows, long size, double eps, int dtype,
               uint8_t *is_finite);

#endif
