#include "routing.h"

#include <math.h>

#include "numbers.h"

// Find the best `count` of `scores` that are not in `is_taken`, and add them to it. A NaN counts as the
// best or the worst score, depending on the order of the scores.
static void best(const float *scores, int32_t size, int32_t count, float *is_taken, int64_t *ids) {
    for (int32_t place = 0; place < count; place++) {
        int32_t found = -1;
        for (int32_t i = 0; i < size; i++)
            if (!is_taken[i] && (found < 0 || scores[i] > scores[found])) found = i;
        is_taken[found] = 1.0f;
        ids[place] = found;
    }
}

// Mark all experts as taken except in the groups with the best experts, by the sum of the best two
// (SIGMOID) or by the best one.
static void close_groups(const struct routing *routing, const float *scores, float *is_taken,
                         float *scratch) {
    int32_t groups = routing->num_groups, size = routing->num_experts / groups;
    float *sums = scratch;  // a group has at least two experts, so both arrays fit
    float *is_open = scratch + groups;
    for (int32_t g = 0; g < groups; g++) {
        float first = -INFINITY, second = -INFINITY;
        for (int32_t i = g * size; i < (g + 1) * size; i++) {
            float x = scores[i];
            second = x > first ? first : x > second ? x : second;
            first = x > first ? x : first;
        }
        sums[g] = routing->scoring == SIGMOID ? first + second : first;
        is_open[g] = 0.0f;
    }
    for (int32_t place = 0; place < routing->top_groups; place++) {
        int32_t found = -1;
        for (int32_t g = 0; g < groups; g++)
            if (is_open[g] == 0.0f && (found < 0 || sums[g] > sums[found])) found = g;
        is_open[found] = 1.0f;
    }
    for (int32_t i = 0; i < routing->num_experts; i++) is_taken[i] = 1.0f - is_open[i / size];
}

// scores = sigmoid(logits).
static void sigmoid(float *scores, const float *logits, int32_t size) {
    vec one = v_set(1.0f);
    for (int32_t i = 0; i < size; i += LANES) {
        vec x = load_some(logits, i, size - i, FLOAT32);
        x = v_div(one, v_add(one, v_exp(v_sub(v_set(0.0f), x))));
        store_some(scores, i, x, size - i, FLOAT32);
    }
}

// Choose the best experts by `choice`, among the permitted ones.
static void choose(const struct routing *routing, const float *choice, int64_t *ids,
                   float *scratch) {
    float *is_taken = scratch;
    memset(is_taken, 0, (size_t)routing->num_experts * sizeof *is_taken);
    if (routing->top_groups < routing->num_groups)
        close_groups(routing, choice, is_taken, scratch + routing->num_experts);
    best(choice, routing->num_experts, routing->top_k, is_taken, ids);
}

void routing_choose(const struct routing *routing, float *logits, int64_t *ids, float *weights,
            float *scratch) {
    int32_t size = routing->num_experts, top_k = routing->top_k;
    float *scores = scratch, *rest = scratch + size;
    float total = 1.0f;  // divisor of the weights
    if (routing->scoring == SIGMOID) {
        sigmoid(scores, logits, size);
        for (int32_t i = 0; i < size; i++)
            logits[i] = scores[i] + (routing->correction ? routing->correction[i] : 0.0f);
        choose(routing, logits, ids, rest);
        for (int32_t j = 0; j < top_k; j++) weights[j] = scores[ids[j]];
    } else if (routing->scoring != SOFTMAX_OF_BEST) {
        if (!routing->correction) choose(routing, logits, ids, rest);
        total = numbers_softmax(logits, size);
        if (routing->correction) {
            for (int32_t i = 0; i < size; i++)
                scores[i] = logits[i] / total + routing->correction[i];
            choose(routing, scores, ids, rest);
        }
        for (int32_t j = 0; j < top_k; j++) weights[j] = logits[ids[j]];
    } else {
        choose(routing, logits, ids, rest);
        for (int32_t j = 0; j < top_k; j++) weights[j] = logits[ids[j]];
        total = numbers_softmax(weights, top_k);
    }
    for (int32_t j = 0; j < top_k; j++) weights[j] /= total;
    if (routing->is_normed) {
        total = routing->scoring == SIGMOID ? 1e-20f : 0.0f;  // sigmoids may all be 0
        for (int32_t j = 0; j < top_k; j++) total += weights[j];
        if (routing->scoring != SIGMOID && total < routing->least_sum) total = routing->least_sum;
        for (int32_t j = 0; j < top_k; j++) weights[j] /= total;
    }
    if (routing_is_float32(routing))
        for (int32_t j = 0; j < top_k; j++) weights[j] *= routing->scale;
}
