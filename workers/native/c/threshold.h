// The lowest value that a limit keeps: of the k best, or of those with a share of all weight.
#ifndef THRESHOLD_H
#define THRESHOLD_H

#include <stdint.h>

// The largest of `count` values such that it and the larger ones weigh `target` or more together;
// all weigh as much. Every value weighs 1 where `weights` is NULL. No NaN.
float threshold(const float *values, const int64_t *weights, int64_t count, double target);

#endif
