#define _GNU_SOURCE
#include "exchange.h"

#include <string.h>

#include "clock.h"

enum { ALIGNMENT = 64 };

static int64_t element_bytes(const struct exchange *x) {
    return (int64_t)dtype_bytes((enum dtype)x->dtype);
}

// Size of a returned output in bytes.
static int64_t out_bytes(const struct exchange *x) {
    return x->out_width * (x->by_pair ? element_bytes(x) : (int64_t)sizeof(float));
}

// Number of int32 sent for a row: its slots, and its weights if the expert side sums the outputs.
static int64_t names_of(const struct exchange *x) { return x->by_pair ? x->top_k : 2 * x->top_k; }

// ---- attention ranks ----------------------------------------------------------------------------

// Find the slots of each row's experts on each rank, followed by the bits of its weights as float.
//
// slots [num_ranks, num_experts], -1 if not on that rank; ids [num_rows, top_k]; weights [num_rows,
// top_k] or NULL; sent [num_ranks, num_rows, top_k or 2 top_k]. Returns NO_EXPERT for an invalid id.
int exchange_slots(const int32_t *slots, long num_ranks, long num_experts, const int64_t *ids,
                   long num_rows, long top_k, const void *weights, int dtype, int32_t *sent) {
    for (long place = 0; place < num_rows * top_k; place++)
        if (ids[place] < 0 || ids[place] >= num_experts) return NO_EXPERT;
    for (long rank = 0; rank < num_ranks; rank++, slots += num_experts)
        for (long row = 0; row < num_rows; row++) {
            const int64_t *chosen = ids + row * top_k;
            for (long k = 0; k < top_k; k++) *sent++ = slots[chosen[k]];
            if (!weights) continue;
            for (long k = 0; k < top_k; k++, sent++) {
                float weight = load_one(weights, row * top_k + k, (enum dtype)dtype);
                memcpy(sent, &weight, sizeof weight);
            }
        }
    return OK;
}

int exchange_dispatch(struct exchange_attention *side) {
    struct exchange *x = &side->exchange;
    int result = exchange_slots(side->slots, (long)x->num_peers, (long)side->num_experts, side->ids,
                                (long)side->num_rows, (long)x->top_k,
                                x->by_pair ? NULL : side->weights, (int)side->weights_dtype,
                                side->sent);
    if (result != OK) return result;
    int64_t num_names = side->num_rows * names_of(x);
    for (int64_t p = 0; p < x->num_peers; p++) {
        struct frame *frame = &x->frames[p];
        frame->counts[0] = side->num_rows;
        frame->counts[1] = side->num_rows * x->num_inputs;
        frame->bytes[0] = num_names * (int64_t)sizeof(int32_t);
        frame->bytes[1] = side->num_rows * x->in_bytes;
        frame->parts[0] = (char *)(side->sent + p * num_names);
        frame->parts[1] = side->inputs;
    }
    return frames_send(x->frames, x->num_peers, ROWS, &x->place) ? OK : UNSENT;
}

// Add the sums of all ranks, in rank order, and round once.
static void add_sums(const struct exchange_attention *side) {
    const struct exchange *x = &side->exchange;
    enum dtype dtype = (enum dtype)x->dtype;
    int64_t count = side->num_rows * x->out_width;
    for (int64_t i = 0; i < count; i += LANES) {
        const float *sums = (const float *)side->received;
        vec total = load_some(sums, i, count - i, FLOAT32);
        for (int64_t p = 1; p < x->num_peers; p++) {
            sums += count;
            total = v_add(total, load_some(sums, i, count - i, FLOAT32));
        }
        store_some(side->out, i, total, count - i, dtype);
    }
}

// Sum weight x output over the pairs of a row, in the order of its slots.
static void weigh_row(const struct exchange_attention *side, int64_t row, const char *const *outputs) {
    const struct exchange *x = &side->exchange;
    enum dtype dtype = (enum dtype)x->dtype, weights_dtype = (enum dtype)side->weights_dtype;
    enum dtype product = side->rounds_products ? dtype : FLOAT32;
    char *out = (char *)side->out + row * x->out_width * element_bytes(x);
    vec factors[x->top_k];
    for (int64_t k = 0; k < x->top_k; k++) {
        float weight = load_one(side->weights, row * x->top_k + k, weights_dtype);
        factors[k] = v_round(v_set(weight), product);
    }
    for (int64_t i = 0; i < x->out_width; i += LANES) {
        int64_t left = x->out_width - i;
        vec sum = v_set(0.0f);
        for (int64_t k = 0; k < x->top_k; k++) {
            vec output = load_some(outputs[k], i, left, dtype);
            sum = v_add(sum, v_round(v_mul(output, factors[k]), product));
        }
        store_some(out, i, sum, left, dtype);
    }
}

// Copy the outputs of all pairs, ordered by rank and pair, to their rows.
static void place_pairs(const struct exchange_attention *side) {
    const struct exchange *x = &side->exchange;
    int64_t bytes = out_bytes(x), num_places = side->num_rows * x->top_k;
    const char *next[x->num_peers], *outputs[x->top_k];
    for (int64_t p = 0; p < x->num_peers; p++) next[p] = x->frames[p].parts[0];
    for (int64_t row = 0; row < side->num_rows; row++) {
        for (int64_t k = 0; k < x->top_k; k++) {
            int64_t place = row * x->top_k + k, p = 0;
            while (side->sent[p * num_places + place] < 0) p++;
            outputs[k] = next[p];
            next[p] += bytes;
            if (!side->is_weighted) memcpy((char *)side->out + place * bytes, outputs[k], (size_t)bytes);
        }
        if (side->is_weighted) weigh_row(side, row, outputs);
    }
}

int exchange_gather(struct exchange_attention *side) {
    struct exchange *x = &side->exchange;
    int64_t num_places = side->num_rows * x->top_k, num_pairs = 0, bytes = out_bytes(x);
    char *to = side->received;
    for (int64_t p = 0; p < x->num_peers; p++) {
        struct frame *frame = &x->frames[p];
        int64_t count = side->num_rows;
        if (x->by_pair) {
            count = 0;
            for (int64_t i = 0; i < num_places; i++) count += side->sent[p * num_places + i] >= 0;
            num_pairs += count;
        }
        frame->counts[0] = count;
        frame->bytes[0] = count * bytes;
        frame->parts[0] = to;
        frame->counts[1] = frame->bytes[1] = 0;
        to += count * bytes;
    }
    if (x->by_pair && num_pairs != num_places) return NO_EXPERT;
    if (!frames_receive(x->frames, x->num_peers, OUTPUTS, &x->place, x->waiting)) return UNEXPECTED;
    if (x->by_pair) place_pairs(side);
    else add_sums(side);
    return OK;
}

// ---- expert ranks -------------------------------------------------------------------------------

static char *take(char *base, int64_t *used, int64_t num_bytes) {
    char *at = (char *)((uintptr_t)base + (uintptr_t)*used);
    *used += (num_bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    return at;
}

// Rows of all peers, concatenated, and their outputs.
struct batch {
    int64_t num_rows;
    int32_t *names;  // [num_rows, names_of]
    char *inputs;    // [num_rows] of in_bytes
    int64_t *slots;  // [num_rows, top_k]
    char *outputs;   // [num_rows, or pairs] of out_bytes
    int64_t num_bytes;
};

static struct batch divide(const struct exchange_server *server) {
    const struct exchange *x = &server->exchange;
    struct batch batch = {0};
    for (int64_t p = 0; p < x->num_peers; p++) batch.num_rows += server->rows[p];
    int64_t rows = batch.num_rows, outputs = x->by_pair ? rows * x->top_k : rows;
    char *base = server->memory;
    batch.names = (int32_t *)take(base, &batch.num_bytes, rows * names_of(x) * 4);
    batch.inputs = take(base, &batch.num_bytes, rows * x->in_bytes);
    batch.slots = (int64_t *)take(base, &batch.num_bytes, rows * x->top_k * 8);
    batch.outputs = take(base, &batch.num_bytes, outputs * out_bytes(x));
    return batch;
}

// Memory for the rows that the peers send, in bytes.
int64_t exchange_memory(const struct exchange_server *server) { return divide(server).num_bytes; }

static int receive_rows(struct exchange_server *server, const struct batch *batch) {
    struct exchange *x = &server->exchange;
    char *names = (char *)batch->names, *inputs = batch->inputs;
    for (int64_t p = 0; p < x->num_peers; p++) {
        struct frame *frame = &x->frames[p];
        frame->counts[0] = server->rows[p];
        frame->counts[1] = server->rows[p] * x->num_inputs;
        frame->bytes[0] = server->rows[p] * names_of(x) * (int64_t)sizeof(int32_t);
        frame->bytes[1] = server->rows[p] * x->in_bytes;
        frame->parts[0] = names;
        frame->parts[1] = inputs;
        names += frame->bytes[0];
        inputs += frame->bytes[1];
    }
    return frames_receive(x->frames, x->num_peers, ROWS, &x->place, x->waiting);
}

// Read the slots of all rows; return 0 if a slot has no expert.
static int read_slots(struct exchange_server *server, const struct batch *batch) {
    const struct exchange *x = &server->exchange;
    server->num_rows = batch->num_rows;
    server->num_rows_here = server->num_pairs = 0;
    for (int64_t row = 0; row < batch->num_rows; row++) {
        const int32_t *names = batch->names + row * names_of(x);
        int64_t num_before = server->num_pairs;
        for (int64_t k = 0; k < x->top_k; k++) {
            int32_t slot = names[k];
            batch->slots[row * x->top_k + k] = slot;
            if (slot == -1) continue;
            if (slot < 0 || slot >= server->num_filled || !server->filled[slot]) return 0;
            server->num_pairs++;
        }
        server->num_rows_here += server->num_pairs > num_before;
    }
    return 1;
}

static int compute(struct exchange_server *server, const struct batch *batch) {
    const struct exchange *x = &server->exchange;
    struct experts_call *call = &server->experts;
    call->inputs = batch->inputs;
    call->num_inputs = batch->num_rows * x->num_inputs;
    call->inputs_by = x->num_inputs > 1 ? BY_PLACE : BY_ROW;
    call->slots = batch->slots;
    call->num_rows = batch->num_rows;
    call->top_k = call->slots_stride = x->top_k;
    call->weights = x->by_pair ? NULL : (const float *)(batch->names + x->top_k);
    call->weights_stride = names_of(x);
    call->sums_dtype = FLOAT32;
    call->out = batch->outputs;
    int result = experts_compute(server->team, call);
    int64_t num_places = result == OK ? batch->num_rows * x->top_k : 0;
    for (int64_t i = 0; i < num_places; i++)
        if (batch->slots[i] >= 0) server->counts[batch->slots[i]]++;
    return result;
}

static int send_outputs(struct exchange_server *server, const struct batch *batch) {
    struct exchange *x = &server->exchange;
    const int64_t *slots = batch->slots;
    char *outputs = batch->outputs;
    server->sent_bytes = 0;
    for (int64_t p = 0; p < x->num_peers; p++) {
        struct frame *frame = &x->frames[p];
        int64_t count = server->rows[p], num_places = count * x->top_k;
        if (x->by_pair) {
            count = 0;
            for (int64_t i = 0; i < num_places; i++) count += slots[i] >= 0;
        }
        frame->counts[0] = count;
        frame->bytes[0] = count * out_bytes(x);
        frame->parts[0] = outputs;
        frame->counts[1] = frame->bytes[1] = 0;
        slots += num_places;
        outputs += frame->bytes[0];
        server->sent_bytes += frame->bytes[0];
    }
    return frames_send(x->frames, x->num_peers, OUTPUTS, &x->place);
}

// Receive the rows of all peers, compute their experts, and return the outputs.
static int serve(struct exchange_server *server) {
    const struct exchange *x = &server->exchange;
    struct batch batch = divide(server);
    if (!receive_rows(server, &batch)) return UNEXPECTED;
    server->received_ns = now_ns();
    if (!read_slots(server, &batch)) return UNEXPECTED;
    server->received_bytes = batch.num_rows * (names_of(x) * 4 + x->in_bytes);
    int result = compute(server, &batch);
    if (result != OK) return result;
    server->computed_ns = now_ns();
    int is_sent = send_outputs(server, &batch);
    server->sent_ns = now_ns();
    ++*server->progress;
    return is_sent ? OK : UNSENT;
}

// Serve exchanges in order; `num_served` counts them. Returns UNEXPECTED if the next one was not
// computed, UNSENT if the last one was not fully sent, or the result of `experts_compute`.
int exchange_serve(struct exchange_server *const *servers, int64_t count, int64_t *num_served) {
    int result = OK;
    for (*num_served = 0; *num_served < count && result == OK;) {
        result = serve(servers[*num_served]);
        *num_served += result == OK || result == UNSENT;
    }
    return result;
}
