// Gated DeltaNet without its projections, row by row. Reference: `workers/model/delta_net.py`.
#ifndef DELTA_NET_H
#define DELTA_NET_H

#include "numbers.h"
#include "team.h"

// Weights of one layer.
struct delta_net {
    int64_t dtype;  // dtype of rows and outputs
    int64_t num_key_heads, num_value_heads;  // value heads of one key head are contiguous
    int64_t key_dim, value_dim;
    int64_t kernel;  // size of the convolution
    float eps;  // epsilon of the output's norm
    const float *conv;  // [kernel, channels], the oldest position first
    const float *rate, *bias;  // [num_value_heads]
    const void *norm;  // [value_dim], in dtype
};

// Consecutive rows of one sequence, between two of its states.
struct state_run {
    int64_t first, last;
    int64_t read, write;  // slots
};

struct delta_rows {
    const void *projected;  // [rows, channels + num_value_heads * (value_dim + 2)]
    void *out;  // [rows, num_value_heads * value_dim]
    float *states;  // [slots, (kernel - 1) * channels + num_value_heads * key_dim * value_dim]
    const struct state_run *runs;
    const int64_t *chains;  // [num_chains + 1]: the first run of each sequence
    int64_t num_chains;
};

// The bits of a row depend only on its sequence, not on other sequences, on threads, or on the
// division into runs.
int delta_net_run(struct team *team, const struct delta_net *net, const struct delta_rows *rows);

#endif
