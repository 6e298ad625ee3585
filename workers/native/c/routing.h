// The choice of experts: logits of rows to the best experts and their weights.
#ifndef ROUTING_H
#define ROUTING_H

#include <stdint.h>

// The weights of SIGMOID and FLOAT32_SOFTMAX are float32, and may come from groups of experts.
enum scoring { SOFTMAX = 0, SOFTMAX_OF_BEST = 1, SIGMOID = 2, FLOAT32_SOFTMAX = 3 };

struct routing {
    int32_t num_experts, top_k;
    int32_t scoring;     // enum scoring
    int32_t is_normed;   // weights of the chosen are scaled to sum 1
    int32_t float32_product;  // logits are float32, not of the model's type
    int32_t num_groups, top_groups;  // groups of neighbours, and those that may be chosen from
    float scale;         // multiplies float32 weights
    float least_sum;     // of softmax's weights that are scaled to sum 1: a smaller one counts as it
    const float *correction;  // [num_experts], added to scores for the choice; or NULL; not of
                              // SOFTMAX_OF_BEST
};

static inline int routing_is_float32(const struct routing *routing) {
    return routing->scoring == SIGMOID || routing->scoring == FLOAT32_SOFTMAX;
}

// Floats of scratch memory that a row needs.
enum { ROUTING_SCRATCH = 3 };  // times num_experts

// logits [num_experts], which are overwritten, to ids and weights [top_k], the best first; of equal
// experts the lowest number wins. The ids are distinct and valid whatever the logits are.
void routing_choose(const struct routing *routing, float *logits, int64_t *ids, float *weights,
            float *scratch);

#endif
