// All layers of a step, with embedding, final norm and head, in one call.
#define _GNU_SOURCE
#include <string.h>

#include "clock.h"
#include "exchange.h"
#include "attention_sublayer.h"
#include "linear.h"
#include "norm.h"

// Each struct here has a `...Fields` class in layers.py. An `experts_call` here has no rows yet.
struct layer {
    struct sublayer sublayer;
    void *cache;
    int64_t bank;             // bank of its routed experts; -1 for none
    struct experts_call mlp;  // the MLP, as a single expert; num_slots 0 for none
};

// All layers of a model, with embedding, final norm and head.
struct stack {
    const void *embedding;  // [vocab_size, hidden_size]; NULL: callers look embeddings up
    int64_t vocab_size;
    const struct layer *layers;
    int64_t num_layers;
    const void *norm;  // [hidden_size]
    double eps;
    struct matrix head;
};

// End times (`now_ns`) of the parts of a layer with routed experts. Experts on this rank are
// computed by their dispatch.
struct layer_ends {
    int64_t attention, dispatch, mlp, combine;
};

// A micro-batch, and its progress through the layers.
struct flow {
    const struct sublayer_batch *batch;
    const int64_t *tokens;  // [num_rows]: to be embedded in `hidden`; NULL if embedded already
    void *hidden;         // [num_rows, hidden_size]: the residual stream, normalized at the end
    uint8_t *is_finite;   // [num_rows]: whether all numbers of the normalized row are finite
    void *logits;         // [num_rows, outputs of the head]; NULL if not needed
    void *normed;         // [num_rows, hidden_size]
    void *others;         // [num_rows, hidden_size]: MLP outputs in a layer with routed experts
    int64_t *topk_ids;    // [banks, num_rows, top_k]
    float *topk_weights;  // [num_rows, top_k] of the last layer
    void *routed;         // [num_rows, hidden_size]: outputs of experts on other ranks
    const struct experts_call *experts;  // [banks]: experts on this rank
    struct exchange_attention *const *exchanges;  // [banks]: exchanges with other ranks; NULL: uses `experts`
    struct layer_ends *ends;             // [banks]
    int64_t next;        // next layer to begin
    int64_t is_waiting;  // the outputs of the previous layer must be received
    int64_t is_done;     // the rows are normalized, and the logits computed
};

// Compute outputs of experts, or with `weights` their sums, and add them to the residual stream.
static int run_experts(struct team *team, struct experts_call call, const struct flow *flow,
                       const float *weights) {
    call.inputs = flow->normed;
    call.num_inputs = call.num_rows = flow->batch->num_rows;
    call.inputs_by = BY_ROW;
    call.weights = weights;
    call.sums_dtype = call.dtype;
    call.adds = 1;
    call.out = weights ? flow->hidden : flow->others;
    return experts_claimed(team, &call);
}

// Run the MLP of a layer with or without routed experts. All rows use the same slot and weight.
static int run_mlp(struct team *team, const struct layer *layer, const struct flow *flow) {
    static const int64_t slot = 0;
    static const float weight = 1.0f;
    struct experts_call call = layer->mlp;
    call.slots = &slot;
    call.top_k = 1;
    return run_experts(team, call, flow, layer->bank < 0 ? &weight : NULL);
}

// Send rows to experts on other ranks, and compute the MLP while they work. After UNSENT, the MLP is
// computed, and the outputs must still be received.
static int send_rows(struct team *team, const struct layer *layer, struct flow *flow,
                const int64_t *topk_ids) {
    struct exchange_attention *side = flow->exchanges[layer->bank];
    side->num_rows = flow->batch->num_rows;
    side->ids = topk_ids;
    side->weights = flow->topk_weights;
    side->weights_dtype = FLOAT32;
    side->inputs = flow->normed;
    side->out = flow->routed;
    int sent = exchange_dispatch(side);
    if (sent != OK && sent != UNSENT) return sent;
    flow->is_waiting = 1;
    flow->ends[layer->bank].dispatch = now_ns();
    int result = layer->mlp.num_slots ? run_mlp(team, layer, flow) : OK;
    flow->ends[layer->bank].mlp = now_ns();
    return result == OK ? sent : result;
}

// Receive the outputs of experts on other ranks for the rows of a layer, and sum them.
static int receive_outputs(const struct layer *layer, struct flow *flow) {
    int result = exchange_gather(flow->exchanges[layer->bank]);
    if (result != OK) return result;
    enum dtype dtype = (enum dtype)layer->sublayer.dtype;
    int64_t count = flow->batch->num_rows * layer->sublayer.hidden_size;
    for (int64_t i = 0; i < count; i += LANES) {
        vec x = load_some(flow->routed, i, count - i, dtype);
        if (layer->mlp.num_slots)
            x = v_round(v_add(x, load_some(flow->others, i, count - i, dtype)), dtype);
        x = v_add(load_some(flow->hidden, i, count - i, dtype), x);
        store_some(flow->hidden, i, x, count - i, dtype);
    }
    flow->is_waiting = 0;
    flow->ends[layer->bank].combine = now_ns();
    return OK;
}

static int begin_layer(struct team *team, const struct layer *layer, struct flow *flow) {
    int64_t num_rows = flow->batch->num_rows, top_k = layer->sublayer.router.routing.top_k;
    struct sublayer_rows sublayer_rows = {
        .hidden = flow->hidden,
        .cache = layer->cache,
        .normed = flow->normed,
        .topk_ids = layer->bank < 0 ? NULL : flow->topk_ids + layer->bank * num_rows * top_k,
        .topk_weights = flow->topk_weights,
    };
    int stages = ENTER | ATTEND | LEAVE, has_mlp = layer->mlp.num_slots > 0;
    int result = sublayer_claimed(team, &layer->sublayer, flow->batch, &sublayer_rows, stages);
    if (result != OK) return result;
    if (layer->bank < 0) return has_mlp ? run_mlp(team, layer, flow) : OK;
    struct layer_ends *ends = &flow->ends[layer->bank];
    ends->attention = now_ns();
    if (flow->exchanges) return send_rows(team, layer, flow, sublayer_rows.topk_ids);
    if (has_mlp) result = run_mlp(team, layer, flow);
    if (result != OK) return result;
    struct experts_call call = flow->experts[layer->bank];
    call.slots = sublayer_rows.topk_ids;
    call.top_k = call.slots_stride = call.weights_stride = top_k;
    if (has_mlp) call.others = flow->others;
    result = run_experts(team, call, flow, flow->topk_weights);
    ends->dispatch = ends->mlp = ends->combine = now_ns();
    return result;
}

// Look up the embeddings of a flow's tokens.
static int embed(const struct stack *stack, struct flow *flow) {
    const struct sublayer *sublayer = &stack->layers[0].sublayer;
    size_t bytes = (size_t)sublayer->hidden_size * dtype_bytes((enum dtype)sublayer->dtype);
    for (int64_t row = 0; row < flow->batch->num_rows; row++) {
        int64_t token = flow->tokens[row];
        if (token < 0 || token >= stack->vocab_size) return NO_INPUT;
        const char *from = (const char *)stack->embedding + (size_t)token * bytes;
        memcpy((char *)flow->hidden + (size_t)row * bytes, from, bytes);
    }
    return OK;
}

// Final norm and head, after the last layer.
static int finish(struct team *team, const struct stack *stack, struct flow *flow) {
    const struct sublayer *sublayer = &stack->layers[0].sublayer;
    int64_t num_rows = flow->batch->num_rows;
    norm_rows(flow->hidden, stack->norm, num_rows, sublayer->hidden_size, stack->eps, (int)sublayer->dtype,
              flow->is_finite);
    int result = OK;
    if (flow->logits)
        result = linear_claimed(team, &stack->head, flow->hidden, num_rows, flow->logits);
    flow->is_done = result == OK;
    return result;
}

// Run one flow to its next exchange with other ranks, or to the end, without waiting for other flows.
// The order of messages is then the same if Python has to continue.
static int advance(struct team *team, const struct stack *stack, struct flow *flow) {
    const struct layer *layers = stack->layers;
    int result = OK, has_bank = 0;
    if (flow->is_waiting) result = receive_outputs(&layers[flow->next - 1], flow);
    while (result == OK && !has_bank && flow->next < stack->num_layers) {
        const struct layer *layer = &layers[flow->next++];
        has_bank = layer->bank >= 0;
        result = begin_layer(team, layer, flow);
    }
    if (result == OK && flow->next == stack->num_layers && !flow->is_waiting && !flow->is_done)
        result = finish(team, stack, flow);
    return result;
}

// Run all layers of the flows alternately, with embedding, final norm and head, until they are done
// or `limit_s` has elapsed. Returns the `enum result` of the last flow. `*turn`: the flow to continue.
int layers_run(struct team *team, const struct stack *stack, struct flow *flows, int64_t num_flows,
               double limit_s, int64_t *turn) {
    if (!team_claim(team)) return BUSY;
    int64_t end_ns = now_ns() + (int64_t)(limit_s * 1e9), num_ended = 0;
    int result = OK;
    for (int64_t i = 0; i < num_flows && result == OK; i++)  // before any flow may stop
        if (flows[i].tokens && !flows[i].next) result = embed(stack, &flows[i]);
    while (result == OK && num_ended < num_flows) {
        struct flow *flow = &flows[*turn];
        result = advance(team, stack, flow);
        if (result != UNEXPECTED) *turn = (*turn + 1) % num_flows;  // otherwise it receives again
        num_ended = flow->is_done ? num_ended + 1 : 0;
        if (now_ns() >= end_ns) break;
    }
    team_release(team);
    return result;
}
