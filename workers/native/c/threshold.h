// Lowest value that a limit keeps: of top_k, or of top_p, which keeps a share of the total weight.
#ifndef THRESHOLD_H
#define THRESHOLD_H

#include <stdint.h>

// Return the largest of `count` values such that it and the larger ones weigh at least `target`; the
// total weight must be at least that. Every value weighs 1 if `weights` is NULL. No NaN.
float threshold(const float *values, const int64_t *weights, int64_t count, double target);

#endif
