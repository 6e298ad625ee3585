// The routed experts of one layer; `workers/experts/kernels_cpu.py` is their reference.
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

// Fields of `CallFields` in experts.py. A place is an element of `slots`, a pair a place that has a
// slot; pairs are counted in the order of places.
struct experts_call {
    int64_t dtype, is_gated, in_width, inner_width, out_width, num_slots;
    struct form form;                          // of both matrices
    const void *const *first, *const *second;  // [num_slots] packed; NULL: empty, or not gated
    // [num_slots] of each matrix's outputs, as packed rows of one float; NULL: there are none
    const float *const *first_bias, *const *second_bias;
    int64_t activation;       // enum activation
    double alpha, limit;      // of CLAMPED_SWIGLU
    const void *inputs;                        // [num_inputs, in_width]
    int64_t num_inputs, inputs_by;             // enum inputs
    const int64_t *input_of;                   // [places]: input of each; NULL: as inputs_by says
    const int64_t *slots;                      // [num_rows, top_k], rows slots_stride apart
    const int64_t *slot_of;                    // slot of each number in `slots`; NULL: its own
    int64_t num_rows, top_k, slots_stride;
    const float *weights;  // [num_rows, top_k], rows weights_stride apart; NULL: no sums
    int64_t weights_stride;
    int64_t rounds_products, sums_dtype;  // weight and product are rounded to `dtype`
    const void *others;  // [num_rows, out_width], added to the sums, rounded; NULL: none
    int64_t adds;        // the results, rounded, are added to what is in `out`
    void *out;  // sums [num_rows, out_width], or [pairs, out_width] of `dtype`
};

// Compute a call; returns an `enum result`. After an error `out` is not complete.
int experts_compute(struct team *team, const struct experts_call *call);

// The same for a caller that has claimed the team.
int experts_claimed(struct team *team, const struct experts_call *call);

#endif
