// Exchanges between attention ranks and expert ranks in steps whose ranks all send every row.
#ifndef EXCHANGE_H
#define EXCHANGE_H

#include "experts.h"
#include "frames.h"
#include "numbers.h"

// What both sides know of an exchange: `ExchangeFields` in exchange.py; all below have theirs.
struct exchange {
    struct place place;
    const struct waiting *waiting;
    struct frame *frames;  // [num_peers], in the order of their ranks
    int64_t num_peers;
    int64_t dtype;     // enum dtype: of the model
    int64_t top_k;
    int64_t num_inputs;  // of a row: 1, or top_k
    int64_t in_bytes;  // of all inputs of a row
    int64_t out_width;
    int64_t by_pair;   // an output of each pair in the model's type returns; else a float sum a row
};

// The side of an attention rank, with the rows of one micro-batch.
struct exchange_home {
    struct exchange exchange;
    int64_t num_experts;
    const int32_t *slots;  // [num_peers, num_experts]; -1: not there
    int64_t is_weighted, rounds_products;  // weight and product are rounded to `dtype`
    int64_t num_rows;
    const int64_t *ids;   // [num_rows, top_k]
    const void *weights;  // [num_rows, top_k]
    int64_t weights_dtype;
    char *inputs;
    int32_t *sent;   // [num_peers, num_rows, top_k], or with the bits of weights as float behind
    char *received;  // outputs of all peers
    void *out;  // [num_rows, out_width], or [num_rows, top_k, out_width], of `dtype`
};

// The side of an expert rank.
struct exchange_server {
    struct exchange exchange;
    struct team *team;
    struct experts_call experts;  // with its slots, and how it sums
    const uint8_t *filled;  // [num_filled]: the slot has an expert in this epoch
    int64_t num_filled;
    const int64_t *rows;  // [num_peers]: that each peer sends
    int64_t *counts;      // [num_filled]: pairs that each slot has computed
    int64_t *progress;    // of this rank, which every exchange advances by 1
    char *memory;         // of `exchange_memory` bytes
    // Of the last call. Rows with an expert here; monotonic times.
    int64_t num_rows, num_rows_here, num_pairs;
    int64_t received_bytes, sent_bytes;
    int64_t received_ns, computed_ns, sent_ns;
};

// Send the rows to all ranks. NO_EXPERT for an id that is none, UNSENT.
int exchange_dispatch(struct exchange_home *home);

// Receive the outputs of rows that were dispatched, and add them up. NO_EXPERT where a pair has no
// slot on any rank, UNEXPECTED.
int exchange_gather(struct exchange_home *home);

#endif
