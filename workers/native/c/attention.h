// Attention of the rows of a batch to the paged keys and values of their sequences.
#ifndef ATTENTION_H
#define ATTENTION_H

#include "product.h"

// Rows of one sequence at consecutive positions.
struct chunk {
    int64_t first_row, num_rows;
    int64_t first_position;  // position of the first row in its sequence
    const int32_t *table;    // block table of the sequence
};

struct attention {
    int num_heads, num_kv_heads;  // query heads of one key head are contiguous
    int head_dim;   // size of queries and keys
    int value_dim;  // head_dim, or less in a latent cache, whose keys begin with their values
    int is_latent;
    float scale;    // factor of scores
    const float *sinks;  // [num_heads] attention sinks: extra scores without a value; NULL for none
    int window;   // number of positions that a row attends to, with its own; INT_MAX for all
    enum dtype dtype;  // dtype of queries; outputs are rounded to it
    enum dtype cache_dtype;  // equal to dtype, or E4M3: rows of fp8.h
    const void *queries;  // [rows, num_heads, head_dim]
    const void *cache;    // [2 * num_kv_heads, num_blocks, block_size, head_dim], keys first, or
                          // [1, ..] if latent; E4M3: head_dim + 1 bytes
    int64_t num_blocks;
    int block_size;
    void *out;  // [rows, num_heads * value_dim]
    enum dtype out_dtype;
    const struct chunk *chunks;
    int num_chunks;
    int max_length;  // keys of the longest sequence, including its last row
};

// Scratch memory that each thread needs, in bytes.
size_t attention_scratch(const struct attention *attention);

// Compute units of work until none is left. Threads share the counter `next`, which starts at 0.
void attention_work(const struct attention *attention, _Atomic int *next, void *scratch);

#endif
