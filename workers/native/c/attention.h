// Attention of the rows of a batch to the paged keys and values of their sequences.
#ifndef ATTENTION_H
#define ATTENTION_H

#include "product.h"

// Neighbouring rows of one sequence, at neighbouring positions.
struct chunk {
    int64_t first_row, num_rows;
    int64_t first_position;  // of the first row in its sequence
    const int32_t *table;    // block table of the sequence
};

struct attention {
    int num_heads, num_kv_heads;  // query heads of one key head are side by side
    int head_dim;   // of queries and keys
    int value_dim;  // head_dim; in a latent cache the first elements of a key, which are its value
    int is_latent;
    float scale;    // of scores
    const float *sinks;  // [num_heads]: a score of nothing, which takes its weight; NULL for none
    int window;   // positions that a row attends to, its own included; INT_MAX for all
    enum dtype dtype;  // of queries; outputs are rounded to it
    enum dtype cache_dtype;  // the same, or E4M3: rows of fp8.h
    const void *queries;  // [rows, num_heads, head_dim]
    const void *cache;    // [2 * num_kv_heads, num_blocks, block_size, head_dim], keys first, or
                          // [1, ..] if it is latent; E4M3: head_dim + 1 bytes
    int64_t num_blocks;
    int block_size;
    void *out;  // [rows, num_heads * value_dim]
    enum dtype out_dtype;
    const struct chunk *chunks;
    int num_chunks;
    int max_length;  // keys of the longest sequence, those of its last row included
};

// Bytes of scratch memory that each thread needs.
size_t attention_scratch(const struct attention *attention);

// Compute units of work until none is left. Threads share the counter `next`, which starts at 0.
void attention_work(const struct attention *attention, _Atomic int *next, void *scratch);

#endif
