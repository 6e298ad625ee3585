// Exchanges between attention ranks and expert ranks, in steps in which all ranks send every row.
#ifndef EXCHANGE_H
#define EXCHANGE_H

#include "experts.h"
#include "frames.h"
#include "numbers.h"

// Parameters of an exchange on both sides. Each struct here has a `...Fields` class in exchange.py.
struct exchange {
    struct place place;
    const struct waiting *waiting;
    struct frame *frames;  // [num_peers], in the order of their ranks
    int64_t num_peers;
    int64_t dtype;     // enum dtype of the model
    int64_t top_k;
    int64_t num_inputs;  // inputs of a row: 1, or top_k
    int64_t in_bytes;  // size of all inputs of a row
    int64_t out_width;
    int64_t by_pair;   // experts return each pair's output in the model's dtype; 0: a float sum a row
};

// Attention side, with the rows of one micro-batch.
struct exchange_attention {
    struct exchange exchange;
    int64_t num_experts;
    const int32_t *slots;  // [num_peers, num_experts]; -1 if not on that rank
    int64_t is_weighted, rounds_products;  // round weight and product to `dtype`
    int64_t num_rows;
    const int64_t *ids;   // [num_rows, top_k]
    const void *weights;  // [num_rows, top_k]
    int64_t weights_dtype;
    char *inputs;
    int32_t *sent;   // [num_peers, num_rows, top_k], or 2 top_k with the bits of weights as float
    char *received;  // outputs of all peers
    void *out;  // [num_rows, out_width], or [num_rows, top_k, out_width], in `dtype`
};

// Expert side.
struct exchange_server {
    struct exchange exchange;
    struct team *team;
    struct experts_call experts;  // with slots and parameters of sums
    const uint8_t *filled;  // [num_filled]: whether the slot has an expert in this epoch
    int64_t num_filled;
    const int64_t *rows;  // [num_peers]: rows that each peer sends
    int64_t *counts;      // [num_filled]: pairs that each slot has computed
    int64_t *progress;    // counter of this rank, which every exchange increments
    char *memory;         // buffer of `exchange_memory` bytes
    // Results of the last call; `num_rows_here` counts rows with an expert here; monotonic times.
    int64_t num_rows, num_rows_here, num_pairs;
    int64_t received_bytes, sent_bytes;
    int64_t received_ns, computed_ns, sent_ns;
};

// Send the rows to all ranks. Returns OK, NO_EXPERT for an invalid id, or UNSENT.
int exchange_dispatch(struct exchange_attention *side);

// Receive the outputs of dispatched rows, and sum them. Returns OK, NO_EXPERT if a pair has no slot
// on any rank, or UNEXPECTED.
int exchange_gather(struct exchange_attention *side);

#endif
