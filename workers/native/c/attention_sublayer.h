// Attention sublayer of a layer. Reference: `workers/model/attention_sublayer.py`.
#ifndef ATTENTION_SUBLAYER_H
#define ATTENTION_SUBLAYER_H

#include "attention.h"
#include "matrix.h"
#include "routing.h"
#include "team.h"

enum qk_norm { NO_NORM = 0, NORM_HEADS = 1, NORM_WIDTH = 2 };

// A router; matrix.panels is NULL for none.
struct router {
    struct matrix matrix;
    struct routing routing;
};

struct sublayer {
    int64_t dtype;  // enum dtype of the model
    int64_t hidden_size, num_heads, num_kv_heads, head_dim;
    int64_t window;   // number of positions that a row attends to; a large number for all
    int64_t qk_norm;  // enum qk_norm
    int64_t latent_rank;  // if not 0, the cache is latent, see attention.h; the elements of queries
                          // and keys after these are rotated
    double eps;
    double scale;  // factor of scores
    double clip;  // limit of queries, keys and values; infinity for none
    const float *sinks;  // [num_heads]: see attention.h; NULL for none
    const void *norm1, *norm2;    // [hidden_size]
    const void *qk_norm_weights;  // [num_heads + num_kv_heads, head_dim]
    struct matrix qkv, output;    // panels are NULL if projections are routed
    struct router query_router;   // router of routed projections
    struct router router;
};

// Rows of a micro-batch, for all layers.
struct sublayer_batch {
    int64_t num_rows;
    const void *cos, *sin;      // [.., rotated elements of a head] model dtype, sines of the first
                                // half negated
    int64_t wave_stride;        // stride of cos and sin in elements
    int64_t waves_by_position;  // cos and sin have an entry for each position; 0: for each row
    const struct chunk *chunks;
    int64_t num_chunks;
    int64_t max_length;
    int64_t num_blocks, block_size;  // shape of each layer's cache
    int64_t cache_dtype;  // enum dtype: equal to the model's, or E4M3
};

// Inputs and outputs of a layer. Logits, ids and weights are from the query router, if there is one.
struct sublayer_rows {
    void *hidden;            // [num_rows, hidden_size]: residual stream before, then after attention
    void *cache;
    void *normed;            // [num_rows, hidden_size]: after the first or second norm
    const void *projected;   // queries, keys and values [num_rows, ...] of routed projections
    void *queries;           // [num_rows, num_heads, head_dim] rotated; NULL if not needed
    void *attended;          // [num_rows, num_heads * value_dim] of routed projections
    const void *mixed;       // [num_rows, hidden_size]: projected outputs of attention
    void *logits;            // [num_rows, num_experts], float for sigmoid; NULL if not needed
    int64_t *topk_ids;       // [num_rows, top_k]
    float *topk_weights;     // [num_rows, top_k], rounded to the dtype of the logits
};

// Stages of the sublayer. A call runs all of them, or, around exchanges of routed projections, one.
enum stage { ENTER = 1, ATTEND = 2, LEAVE = 4 };

// Compute the given stages. Returns an `enum result`.
int sublayer_run(struct team *team, const struct sublayer *sublayer, const struct sublayer_batch *batch,
             const struct sublayer_rows *rows, int stages);

// `sublayer_run` for a caller that has claimed the team.
int sublayer_claimed(struct team *team, const struct sublayer *sublayer, const struct sublayer_batch *batch,
                 const struct sublayer_rows *rows, int stages);

#endif
