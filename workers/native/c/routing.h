// Choice of experts from the logits of rows: the best experts and their weights.
#ifndef ROUTING_H
#define ROUTING_H

#include <stdint.h>

// SIGMOID and FLOAT32_SOFTMAX have float32 weights, and only they may choose from groups of experts.
enum scoring { SOFTMAX = 0, SOFTMAX_OF_BEST = 1, SIGMOID = 2, FLOAT32_SOFTMAX = 3 };

struct routing {
    int32_t num_experts, top_k;
    int32_t scoring;     // enum scoring
    int32_t is_normed;   // scale the weights of chosen experts to sum 1
    int32_t float32_product;  // logits are float32, not in the model's dtype
    int32_t num_groups, top_groups;  // groups of consecutive experts, and how many of them are used
    float scale;         // multiplies float32 weights
    float least_sum;     // lower limit of the sum in the scaling of softmax weights to sum 1
    const float *correction;  // [num_experts], added to scores for the choice; or NULL; not for
                              // SOFTMAX_OF_BEST
};

static inline int routing_is_float32(const struct routing *routing) {
    return routing->scoring == SIGMOID || routing->scoring == FLOAT32_SOFTMAX;
}

// Scratch memory of a row in floats.
enum { ROUTING_SCRATCH = 3 };  // times num_experts

// Convert logits [num_experts], which are overwritten, to ids and weights [top_k], the best first;
// among equal experts the lowest number wins. The ids are distinct and valid for any logits.
void routing_choose(const struct routing *routing, float *logits, int64_t *ids, float *weights,
            float *scratch);

#endif
