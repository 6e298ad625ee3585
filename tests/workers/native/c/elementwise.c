// The functions of one number in vector.h, for test_elementwise.py.
#include <string.h>

#include "vector.h"

// silu(x) for `count` numbers.
void silu_of(float *out, const float *x, long count) {
    for (long i = 0; i < count; i += LANES) {
        float block[LANES] = {0};
        size_t num_bytes = (size_t)(count - i < LANES ? count - i : LANES) * sizeof *x;
        memcpy(block, x + i, num_bytes);
        v_store(block, v_silu(v_load(block)));
        memcpy(out + i, block, num_bytes);
    }
}

// The nearest bfloat16 of `count` numbers.
void bf16_of(uint16_t *out, const float *x, long count) {
    for (long i = 0; i < count; i += LANES) {
        float block[LANES] = {0};
        uint16_t rounded[LANES];
        long width = count - i < LANES ? count - i : LANES;
        memcpy(block, x + i, (size_t)width * sizeof *x);
        vi_store16(rounded, v_to_bf16(v_load(block)));
        memcpy(out + i, rounded, (size_t)width * sizeof *out);
    }
}
