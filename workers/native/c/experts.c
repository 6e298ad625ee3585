// Routed experts of one layer.
//
// Rows are grouped by slot, so that a step reads a slot's weights once for CHUNK_ROWS rows. An expert
// is `second(activation(gate, up))`, where gate and up are halves of `first`, or only `first`; each
// matrix may have a bias. The inputs of the second matrix and the outputs of a slot are rounded to
// the rows' dtype.
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

#include "experts.h"
#include "numbers.h"
#include "product.h"

enum { CHUNK_ROWS = 8 * MAX_TILE_ROWS };  // maximum rows of a slot that are computed together
enum { GROUP = 4 };               // panels in a thread's piece of work
enum { COPIED_ALONE = 1 << 15 };  // up to this size, one thread copies faster than all threads
enum { MAX_PAIRS = 8192 };        // maximum pairs of a pass, to limit the scratch memory
enum { ALONE_ELEMENTS = 1 << 16 };  // up to this number of weights, one thread is faster than all
enum { HALF = PANEL / 2 };        // outputs of gate in a panel, followed by those of up
enum { ALIGNMENT = 64 };

struct chunk {
    int32_t slot, first, count;  // sorted pairs from `first` on
};

// A pass over some rows of a call.
struct job {
    const struct experts_call *call;
    enum dtype dtype;
    int copies_inputs;
    struct layout first, second;
    long first_panels, second_panels;
    const char *inputs;  // in the layout of the products
    size_t input_stride, hidden_stride, output_stride;  // size of a row in bytes
    char *hidden;        // [pairs], sorted: results between the matrices
    char *outputs;       // [pairs]
    int64_t first_row, num_rows, num_pairs, num_chunks;
    int32_t *begins;        // [num_slots + 1]
    int32_t *row_begins;    // [num_rows + 1] first pair of each row
    int32_t *sorted_pair;   // [pairs]
    int32_t *sorted_input;  // [pairs]
    int32_t *pair_slot;     // [pairs]
    int32_t *pair_input;    // [pairs]
    float *factors;         // [pairs]: weights, rounded for the product
    struct chunk *chunks;
    _Atomic long next_copy, next_first, next_second, next_row;
};

ALWAYS long divide_up(long a, long b) { return (a + b - 1) / b; }

// ---- loads and stores of rows -------------------------------------------------------------------

// Store a vector to a row that a product reads.
ALWAYS void store_for_product(enum dtype dtype, char *row, long column, vec x) {
    if (dtype == FLOAT32) v_store((float *)row + column, x);
    else if (ROWS_ARE_BF16) vi_store16((uint16_t *)row + column, v_to_bf16(x));
    else v_store((float *)row + column, v_round_bf16(x));
}

// Store the first `count` lanes of a vector to a row.
ALWAYS void store_lanes(enum dtype dtype, char *row, long column, long count, vec x) {
    if (count >= LANES) {
        if (dtype == FLOAT32) v_store((float *)row + column, x);
        else vi_store16((uint16_t *)row + column, v_to_bf16(x));
    } else if (count > 0 && dtype == FLOAT32) {
        float lanes[LANES];
        v_store(lanes, x);
        memcpy((float *)row + column, lanes, (size_t)count * sizeof *lanes);
    } else if (count > 0) {
        uint16_t lanes[LANES];
        vi_store16(lanes, v_to_bf16(x));
        memcpy((uint16_t *)row + column, lanes, (size_t)count * sizeof *lanes);
    }
}

// Copy inputs to the layout of the products: bfloat16 as float, or with a zero after an odd row.
static void copy_inputs(struct job *job) {
    const uint16_t *source = job->call->inputs;
    long width = job->call->in_width;
    for (long i; (i = atomic_fetch_add(&job->next_copy, 1)) < job->call->num_inputs;) {
        const uint16_t *from = source + i * width;
        char *to = (char *)job->inputs + (size_t)i * job->input_stride;
        if (ROWS_ARE_BF16) {
            memcpy(to, from, (size_t)width * sizeof *from);
            memset(to + width * 2, 0, job->input_stride - (size_t)width * 2);
            continue;
        }
        long column = 0;
        for (; column + LANES <= width; column += LANES)
            v_store((float *)to + column, v_load_bf16(from + column));
        for (; column < job->first.units * 2; column++) {
            uint32_t bits = column < width ? (uint32_t)from[column] << 16 : 0;
            memcpy((float *)to + column, &bits, sizeof bits);
        }
    }
}

// ---- products -----------------------------------------------------------------------------------

ALWAYS vec activated(const struct experts_call *call, vec gate, vec up) {
    if (call->activation == SILU) return v_mul(v_silu(gate), up);
    vec limit = v_set((float)call->limit), least = v_set(-(float)call->limit);
    gate = v_min(limit, gate);  // NaN in the second operand is kept
    up = v_min(limit, v_max(least, up));
    vec scaled = v_silu(v_mul(gate, v_set((float)call->alpha)));
    return v_mul(v_div(scaled, v_set((float)call->alpha)), v_add(up, v_set(1.0f)));
}

// Biases of a slot from a panel on, or zeros.
static const float *biases_at(const float *const *biases, int32_t slot, long panel) {
    static const float zeros[GROUP * PANEL];
    return biases ? biases[slot] + panel * PANEL : zeros;
}

static void store_hidden(const struct job *job, const struct chunk *chunk, long panel,
                         long num_panels, const float *sums) {
    const float *biases = biases_at(job->call->first_bias, chunk->slot, panel);
    for (long i = 0; i < chunk->count; i++) {
        char *row = job->hidden + (size_t)(chunk->first + i) * job->hidden_stride;
        for (long p = 0; p < num_panels; p++, sums += PANEL)
            for (long c = 0; c < HALF; c += LANES) {
                const float *own = biases + p * PANEL + c;
                vec gate = v_add(v_load(sums + c), v_load(own));
                vec up = v_add(v_load(sums + HALF + c), v_load(own + HALF));
                vec value = activated(job->call, gate, up);
                store_for_product(job->dtype, row, (panel + p) * HALF + c, value);
            }
    }
}

static void store_outputs(const struct job *job, const struct chunk *chunk, long panel,
                          long num_panels, const float *sums) {
    long width = job->call->out_width;
    const struct experts_call *call = job->call;
    const float *const *own = call->is_gated ? call->second_bias : call->first_bias;
    const float *biases = biases_at(own, chunk->slot, panel);
    for (long i = 0; i < chunk->count; i++) {
        char *row = job->outputs + (size_t)job->sorted_pair[chunk->first + i] * job->output_stride;
        for (long c = 0; c < num_panels * PANEL; c += LANES, sums += LANES) {
            long column = panel * PANEL + c;
            store_lanes(job->dtype, row, column, width - column, v_add(v_load(sums), v_load(biases + c)));
        }
    }
}

// First panel of piece `piece`, or of the last piece if that does not exist.
static const char *item_panels(const struct job *job, int is_second, long item) {
    long num_groups = divide_up(is_second ? job->second_panels : job->first_panels, GROUP);
    long last = job->num_chunks * num_groups - 1;
    if (item > last) item = last;
    int32_t slot = job->chunks[item / num_groups].slot;
    const void *weights = is_second ? job->call->second[slot] : job->call->first[slot];
    const struct layout *layout = is_second ? &job->second : &job->first;
    return panel_at(weights, layout, item % num_groups * GROUP);
}

// Compute the products of all chunks with one matrix, divided among the threads.
static void products(struct job *job, int is_second) {
    float sums[CHUNK_ROWS * GROUP * PANEL] __attribute__((aligned(ALIGNMENT)));
    const void *rows[CHUNK_ROWS];
    long num_panels = is_second ? job->second_panels : job->first_panels;
    const struct layout *layout = is_second ? &job->second : &job->first;
    long num_groups = divide_up(num_panels, GROUP);
    float totals[layout->num_totals ? CHUNK_ROWS * layout->num_totals : 1];
    const struct chunk *known = NULL;  // chunk of the current totals
    _Atomic long *next = is_second ? &job->next_second : &job->next_first;
    for (long item; (item = atomic_fetch_add(next, 1)) < job->num_chunks * num_groups;) {
        const struct chunk *chunk = &job->chunks[item / num_groups];
        long panel = item % num_groups * GROUP;
        long count = num_panels - panel < GROUP ? num_panels - panel : GROUP;
        for (long i = chunk->first; i < chunk->first + chunk->count; i++)
            rows[i - chunk->first] = is_second
                ? job->hidden + (size_t)i * job->hidden_stride
                : job->inputs + (size_t)job->sorted_input[i] * job->input_stride;
        // Likely next piece of this thread.
        const char *after = item_panels(job, is_second, atomic_load(next));
        if (chunk != known) find_totals(layout, chunk->count, rows, totals);
        known = chunk;
        panel_product(layout, chunk->count, rows, totals, item_panels(job, is_second, item), count, sums,
                      count * PANEL, after);
        if (job->call->is_gated && !is_second) store_hidden(job, chunk, panel, count, sums);
        else store_outputs(job, chunk, panel, count, sums);
    }
}

// Sum weight x output over the pairs of each row, in the order of slots, in float.
static void add_up(struct job *job) {
    const struct experts_call *call = job->call;
    int rounds = call->rounds_products && job->dtype == BFLOAT16;
    enum dtype dtype = (enum dtype)call->sums_dtype;
    size_t out_bytes = (size_t)call->out_width * (call->sums_dtype == FLOAT32 ? 4 : 2);
    for (long row; (row = atomic_fetch_add(&job->next_row, 1)) < job->num_rows;) {
        size_t at = (size_t)(job->first_row + row) * out_bytes;
        char *out = (char *)call->out + at;
        const char *others = call->others ? (const char *)call->others + at : NULL;
        for (long column = 0; column < call->out_width; column += LANES) {
            vec sum = v_set(0.0f);
            for (long pair = job->row_begins[row]; pair < job->row_begins[row + 1]; pair++) {
                const char *from = job->outputs + (size_t)pair * job->output_stride;
                vec value = job->dtype == FLOAT32 ? v_load((const float *)from + column)
                                                  : v_load_bf16((const uint16_t *)from + column);
                value = v_mul(value, v_set(job->factors[pair]));
                sum = v_add(sum, rounds ? v_round_bf16(value) : value);
            }
            int64_t left = call->out_width - column;
            if (others) sum = v_add(v_round(sum, dtype), load_some(others, column, left, dtype));
            if (call->adds) sum = v_add(v_round(sum, dtype), load_some(out, column, left, dtype));
            store_lanes(dtype, out, column, left, sum);
        }
    }
}

// Whether all threads copy inputs; otherwise only the first thread does.
static int copies_together(const struct job *job) {
    return job->copies_inputs && job->first_row == 0 &&
           job->call->num_inputs * job->call->in_width > COPIED_ALONE;
}

static void run(void *argument, struct team *team, int thread, int count) {
    struct job *job = argument;
    (void)thread;
    if (copies_together(job)) {
        copy_inputs(job);
        team_barrier(team, count);
    }
    products(job, 0);
    if (job->call->is_gated) {
        team_barrier(team, count);
        products(job, 1);
    }
    if (job->call->weights) {
        team_barrier(team, count);
        add_up(job);
    }
}

// ---- pairs --------------------------------------------------------------------------------------

static float factor(const struct job *job, int64_t row, int64_t k) {
    float weight = job->call->weights[row * job->call->weights_stride + k];
    if (!job->call->rounds_products || job->dtype == FLOAT32) return weight;
    float lanes[LANES];
    v_store(lanes, v_round_bf16(v_set(weight)));
    return lanes[0];
}

// Whether a slot has all its matrices and biases.
static int is_filled(const struct experts_call *call, int64_t slot) {
    return call->first[slot] && (!call->is_gated || call->second[slot]) &&
           (!call->first_bias || call->first_bias[slot]) &&
           (!call->second_bias || call->second_bias[slot]);
}

// Find the pairs of a pass. `num_before`: number of pairs in earlier passes of the call.
static enum result find_pairs(struct job *job, int64_t num_before) {
    const struct experts_call *call = job->call;
    int32_t pair = 0;
    for (int64_t row = 0; row < job->num_rows; row++) {
        int64_t at = job->first_row + row;
        job->row_begins[row] = pair;
        for (int64_t k = 0; k < call->top_k; k++) {
            int64_t slot = call->slots[at * call->slots_stride + k], place = at * call->top_k + k;
            if (slot == -1) continue;
            if (call->slot_of) slot = call->slot_of[slot];
            if (slot < 0 || slot >= call->num_slots || !is_filled(call, slot)) return NO_EXPERT;
            int64_t input = call->input_of               ? call->input_of[place]
                            : call->inputs_by == BY_ROW   ? at
                            : call->inputs_by == BY_PLACE ? place
                                                          : num_before + pair;
            if (input < 0 || input >= call->num_inputs) return NO_INPUT;
            job->pair_slot[pair] = (int32_t)slot;
            job->pair_input[pair] = (int32_t)input;
            if (call->weights) job->factors[pair] = factor(job, at, k);
            pair++;
        }
    }
    job->row_begins[job->num_rows] = pair;
    job->num_pairs = pair;
    return OK;
}

// Sort the pairs by slot, stably, and divide each slot's pairs into chunks.
static void sort_pairs(struct job *job) {
    int64_t num_slots = job->call->num_slots;
    int32_t *begins = job->begins;
    memset(begins, 0, (size_t)(num_slots + 1) * sizeof *begins);
    for (int64_t p = 0; p < job->num_pairs; p++) begins[job->pair_slot[p] + 1]++;
    for (int64_t slot = 0; slot < num_slots; slot++) begins[slot + 1] += begins[slot];
    job->num_chunks = 0;
    for (int32_t slot = 0; slot < num_slots; slot++)
        for (int32_t first = begins[slot]; first < begins[slot + 1]; first += CHUNK_ROWS) {
            int32_t left = begins[slot + 1] - first;
            struct chunk chunk = {slot, first, left < CHUNK_ROWS ? left : CHUNK_ROWS};
            job->chunks[job->num_chunks++] = chunk;
        }
    for (int32_t p = 0; p < job->num_pairs; p++) {
        int32_t to = begins[job->pair_slot[p]]++;
        job->sorted_pair[to] = p;
        job->sorted_input[to] = job->pair_input[p];
    }
}

// ---- the call -----------------------------------------------------------------------------------

static void *take(char *base, size_t *used, size_t num_bytes) {
    void *at = (void *)((uintptr_t)base + *used);
    *used += (num_bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    return at;
}

// Place the arrays in scratch memory from `base` on; return its size. `max_rows`: rows of a pass.
static size_t divide_scratch(struct job *job, char *base, int64_t max_rows) {
    const struct experts_call *call = job->call;
    size_t used = 0, max_pairs = (size_t)(max_rows * call->top_k);
    size_t num_slots = (size_t)call->num_slots;
    if (job->copies_inputs)
        job->inputs = take(base, &used, (size_t)call->num_inputs * job->input_stride);
    if (call->is_gated) job->hidden = take(base, &used, max_pairs * job->hidden_stride);
    if (call->weights) job->outputs = take(base, &used, max_pairs * job->output_stride);
    job->begins = take(base, &used, (num_slots + 1) * sizeof *job->begins);
    job->row_begins = take(base, &used, ((size_t)max_rows + 1) * sizeof *job->row_begins);
    job->sorted_pair = take(base, &used, max_pairs * sizeof *job->sorted_pair);
    job->sorted_input = take(base, &used, max_pairs * sizeof *job->sorted_input);
    job->pair_slot = take(base, &used, max_pairs * sizeof *job->pair_slot);
    job->pair_input = take(base, &used, max_pairs * sizeof *job->pair_input);
    job->factors = take(base, &used, max_pairs * sizeof *job->factors);
    size_t max_chunks = max_pairs / CHUNK_ROWS + (num_slots < max_pairs ? num_slots : max_pairs);
    job->chunks = take(base, &used, max_chunks * sizeof *job->chunks);
    return used;
}

int experts_claimed(struct team *team, const struct experts_call *call) {
    enum dtype dtype = call->dtype == BFLOAT16 ? BFLOAT16 : FLOAT32;
    long first_out = call->is_gated ? call->inner_width : call->out_width;
    struct job job = {
        .call = call,
        .dtype = dtype,
        .copies_inputs = dtype == BFLOAT16 && (!ROWS_ARE_BF16 || call->in_width % 2),
        .inputs = call->inputs,
        .first = layout_of(dtype, call->form, call->in_width),
        .first_panels = divide_up(first_out, call->is_gated ? HALF : PANEL),
        .second = layout_of(dtype, call->form, call->inner_width),
        .second_panels = divide_up(call->out_width, PANEL),
    };
    size_t unit_elements = dtype == BFLOAT16 ? 2 : 1, row_bytes = row_element_bytes(dtype);
    size_t element = dtype == BFLOAT16 ? 2 : 4;
    job.input_stride = job.copies_inputs ? (size_t)row_units(dtype, call->in_width) * unit_elements * row_bytes
                                         : (size_t)call->in_width * element;
    job.hidden_stride = (size_t)job.first_panels * HALF * row_bytes;
    // Summed rows are read in full vectors.
    job.output_stride =
        element * (size_t)(call->weights ? job.second_panels * PANEL : call->out_width);
    int64_t max_rows = MAX_PAIRS / call->top_k > 0 ? MAX_PAIRS / call->top_k : 1;
    if (max_rows > call->num_rows) max_rows = call->num_rows;
    char *scratch = team_scratch(team, divide_scratch(&job, NULL, max_rows));
    if (!scratch) return NO_MEMORY;
    divide_scratch(&job, scratch, max_rows);
    if (job.copies_inputs && !copies_together(&job)) copy_inputs(&job);
    int64_t elements = job.first.units * job.first_panels * PANEL;
    if (call->is_gated) elements += job.second.units * job.second_panels * PANEL;
    int64_t num_before = 0;
    for (; job.first_row < call->num_rows; job.first_row += max_rows) {
        int64_t left = call->num_rows - job.first_row;
        job.num_rows = left < max_rows ? left : max_rows;
        enum result result = find_pairs(&job, num_before);
        if (result != OK) return result;
        sort_pairs(&job);
        if (!call->weights)
            job.outputs = (char *)call->out + (size_t)num_before * job.output_stride;
        job.next_first = job.next_second = job.next_row = 0;
        int is_little = elements * (job.num_chunks + job.num_pairs / 8) < ALONE_ELEMENTS;
        team_run(team, run, &job, is_little ? 1 : 0);
        num_before += job.num_pairs;
    }
    return OK;
}

int experts_compute(struct team *team, const struct experts_call *call) {
    if (!team_claim(team)) return BUSY;
    int result = experts_claimed(team, call);
    team_release(team);
    return result;
}
