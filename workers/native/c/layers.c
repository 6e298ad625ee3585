// Layers one after the other, for callers that look at nothing between them.
#define _POSIX_C_SOURCE 199309L
#include <time.h>

#include "exchange.h"
#include "half.h"

// Mirrored by `LayerFields` in layers.py. Calls are complete but for rows.
struct layer {
    struct half half;
    void *cache;
    int64_t bank;                 // of its routed experts; -1: none
    struct experts_call experts;
    struct experts_call mlp;      // as a single expert; num_slots 0: none
    struct exchange_home *home;   // of routed experts on other ranks; NULL: they are `experts`
};

// Memory that all layers share, and what they choose.
struct layers_rows {
    void *hidden;         // [num_rows, hidden_size]: the residual stream, before and after
    void *normed;         // [num_rows, hidden_size]
    void *others;         // [num_rows, hidden_size]: outputs of the MLP beside routed experts
    int64_t *topk_ids;    // [banks, num_rows, top_k]
    float *topk_weights;  // [num_rows, top_k]
    void *routed;         // [num_rows, hidden_size]: outputs of experts on other ranks
};

static double now_s(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

// Outputs of experts, or with `weights` their sums, which are added to the residual stream.
static int run_experts(struct team *team, struct experts_call call, int64_t num_rows,
                       const struct layers_rows *rows, const float *weights) {
    call.inputs = rows->normed;
    call.num_inputs = call.num_rows = num_rows;
    call.inputs_by = BY_ROW;
    call.weights = weights;
    call.sums_dtype = call.dtype;
    call.adds = 1;
    call.out = weights ? rows->hidden : rows->others;
    return experts_claimed(team, &call);
}

// An MLP alone, or beside routed experts. All rows read the same slot and weight.
static int run_mlp(struct team *team, const struct layer *layer, int64_t num_rows,
                   const struct layers_rows *rows) {
    static const int64_t slot = 0;
    static const float weight = 1.0f;
    struct experts_call call = layer->mlp;
    call.slots = &slot;
    call.top_k = 1;
    return run_experts(team, call, num_rows, rows, layer->bank < 0 ? &weight : NULL);
}

// Experts on other ranks, which compute beside the MLP. UNSENT and UNEXPECTED after the MLP, with the
// outputs still to be gathered.
static int run_remote(struct team *team, const struct layer *layer, const struct half_rows *half,
                      int64_t num_rows, const struct layers_rows *rows) {
    struct exchange_home *home = layer->home;
    enum dtype dtype = (enum dtype)layer->half.dtype;
    int has_mlp = layer->mlp.num_slots > 0;
    home->num_rows = num_rows;
    home->ids = half->topk_ids;
    home->weights = half->topk_weights;
    home->weights_dtype = FLOAT32;
    home->inputs = half->normed;
    home->out = rows->routed;
    int sent = exchange_dispatch(home);
    if (sent != OK && sent != UNSENT) return sent;
    int result = has_mlp ? run_mlp(team, layer, num_rows, rows) : OK;
    if (result == OK) result = sent;
    if (result == OK) result = exchange_gather(home);
    if (result != OK) return result;
    int64_t count = num_rows * layer->half.hidden_size;
    for (int64_t i = 0; i < count; i += LANES) {
        vec x = load_some(rows->routed, i, count - i, dtype);
        if (has_mlp) x = v_round(v_add(x, load_some(rows->others, i, count - i, dtype)), dtype);
        x = v_add(load_some(rows->hidden, i, count - i, dtype), x);
        store_some(rows->hidden, i, x, count - i, dtype);
    }
    return OK;
}

static int run_layer(struct team *team, const struct layer *layer, const struct half_batch *batch,
                     const struct layers_rows *rows) {
    int64_t num_rows = batch->num_rows, top_k = layer->half.router.routing.top_k;
    struct half_rows half_rows = {
        .hidden = rows->hidden,
        .cache = layer->cache,
        .normed = rows->normed,
        .topk_ids = layer->bank < 0 ? NULL : rows->topk_ids + layer->bank * num_rows * top_k,
        .topk_weights = rows->topk_weights,
    };
    int result = half_claimed(team, &layer->half, batch, &half_rows, ENTER | ATTEND | LEAVE);
    if (result == OK && layer->bank >= 0 && layer->home)
        return run_remote(team, layer, &half_rows, num_rows, rows);
    if (result == OK && layer->mlp.num_slots) result = run_mlp(team, layer, num_rows, rows);
    if (result != OK || layer->bank < 0) return result;
    struct experts_call call = layer->experts;
    call.slots = half_rows.topk_ids;
    call.top_k = call.slots_stride = call.weights_stride = top_k;
    if (layer->mlp.num_slots) call.others = rows->others;
    return run_experts(team, call, num_rows, rows, rows->topk_weights);
}

// Run layers from `*next` on, which is advanced, until all are done or `limit_s` is over. Returns
// an `enum result`, that of the last layer.
int layers_run(struct team *team, const struct layer *layers, int64_t num_layers,
               const struct half_batch *batch, const struct layers_rows *rows, double limit_s,
               int64_t *next) {
    if (!team_claim(team)) return BUSY;
    double end_s = now_s() + limit_s;
    int result;
    do result = run_layer(team, &layers[(*next)++], batch, rows);
    while (result == OK && *next < num_layers && now_s() < end_s);
    team_release(team);
    return result;
}
