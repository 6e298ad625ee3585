// Gated DeltaNet between its projections, row by row; `workers/model/delta_net.py` is the
// reference.
#ifndef DELTA_NET_H
#define DELTA_NET_H

#include "numbers.h"
#include "team.h"

// The weights of one layer.
struct delta_net {
    int64_t dtype;  // of rows and outputs
    int64_t num_key_heads, num_value_heads;  // value heads of one key head are side by side
    int64_t key_dim, value_dim;
    int64_t kernel;  // positions under the convolution
    float eps;  // of the output's norm
    const float *conv;  // [kernel, channels], the oldest position first
    const float *rate, *bias;  // [num_value_heads]
    const void *norm;  // [value_dim], of type dtype
};

// Neighbouring rows of one sequence, between two of its states.
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

// The bits of a row depend on its sequence alone: not on other sequences, threads, or where its
// rows are cut into runs.
int delta_net_run(struct team *team, const struct delta_net *net, const struct delta_rows *rows);

#endif
