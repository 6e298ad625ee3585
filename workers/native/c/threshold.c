#include "threshold.h"

#include <string.h>

enum { DIGIT_BITS = 8, DIGITS = 1 << DIGIT_BITS };

// Map floats to unsigned numbers of the same order.
static uint32_t key_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

static float value_of(uint32_t key) {
    uint32_t bits = key >> 31 ? key & 0x7fffffffu : ~key;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// Find the key digit by digit, the highest first, with a histogram of the keys that share its digits.
float threshold(const float *values, const int64_t *weights, int64_t count, double target) {
    uint32_t found = 0, known = 0;  // highest digits of the key, and their mask
    int64_t above = 0;              // weight of all keys above the ones with equal digits
    for (int shift = 32 - DIGIT_BITS; shift >= 0; shift -= DIGIT_BITS) {
        int64_t sums[DIGITS] = {0};
        for (int64_t i = 0; i < count; i++) {
            uint32_t key = key_of(values[i]);
            if (((key ^ found) & known) == 0)
                sums[key >> shift & (DIGITS - 1)] += weights ? weights[i] : 1;
        }
        uint32_t digit = DIGITS - 1;
        for (; digit; digit--) {
            if (sums[digit] && (double)(above + sums[digit]) >= target) break;
            above += sums[digit];
        }
        found |= digit << shift;
        known |= (uint32_t)(DIGITS - 1) << shift;
    }
    return value_of(found);
}
