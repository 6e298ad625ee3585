// Routed experts of one layer. Reference: `workers/experts/kernels_cpu.py`.
#ifndef EXPERTS_H
#define EXPERTS_H

#include <stdint.h>

#include "layout.h"
#include "team.h"

enum inputs { BY_ROW = 0, BY_PLACE = 1, BY_PAIR = 2 };

enum activation {
    SILU = 0,           // silu(gate) * up
    CLAMPED_SWIGLU = 1  // gate * sigmoid(alpha * gate) * (up + 1), within limits
};

// Fields of `CallFields` in experts.py. A place is an element of `slots`; a pair is a place with a
// slot. Pairs are numbered in the order of places.
struct experts_call {
    int64_t dtype, is_gated, in_width, inner_width, out_width, num_slots;
    struct form form;                          // format of both matrices
    const void *const *first, *const *second;  // [num_slots] packed; NULL if empty; second: if gated
    // [num_slots] biases of each matrix, as packed rows of one float; NULL for none
    const float *const *first_bias, *const *second_bias;
    int64_t activation;       // enum activation
    double alpha, limit;      // parameters of CLAMPED_SWIGLU
    const void *inputs;                        // [num_inputs, in_width]
    int64_t num_inputs, inputs_by;             // enum inputs
    const int64_t *input_of;                   // [places]: input of each; NULL: by inputs_by
    const int64_t *slots;                      // [num_rows, top_k], rows slots_stride apart
    const int64_t *slot_of;                    // slot of each value in `slots`; NULL: the value
    int64_t num_rows, top_k, slots_stride;
    const float *weights;  // [num_rows, top_k], rows weights_stride apart; NULL: no sums
    int64_t weights_stride;
    int64_t rounds_products, sums_dtype;  // round weight and product to `dtype`
    const void *others;  // [num_rows, out_width], added to the rounded sums; NULL for none
    int64_t adds;        // add the rounded results to the contents of `out`
    void *out;  // sums [num_rows, out_width], or [pairs, out_width] in `dtype`
};

// Compute a call; return an `enum result`. After an error `out` is incomplete.
int experts_compute(struct team *team, const struct experts_call *call);

// `experts_compute` for a caller that has claimed the team.
int experts_claimed(struct team *team, const struct experts_call *call);

#endif
