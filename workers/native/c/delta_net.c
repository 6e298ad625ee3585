#include "delta_net.h"

#include <math.h>
#include <stdatomic.h>

#include "norm.h"

enum {
    ROWS = 32,  // rows prepared at a time; a part of a state stays in the L1 cache while all of
                // them update it
    COLUMNS = 4,  // column vectors of such a part
};
#define NORM_EPS 1e-6f

struct job {
    const struct delta_net *net;
    const struct delta_rows *rows;
    float *scratch;  // [threads, unit_floats]
    _Atomic int64_t next;  // key head of a sequence
};

// Rows of one key head and its value heads, in float32.
struct unit {
    int64_t head, share;  // share: value heads
    float *queries, *keys;  // [ROWS, key_dim]
    float *values, *outputs;  // [ROWS, share * value_dim]
    float *decays, *strengths;  // [ROWS, share]
};

ALWAYS int64_t channels(const struct delta_net *net) {
    return 2 * net->num_key_heads * net->key_dim + net->num_value_heads * net->value_dim;
}

ALWAYS int64_t row_width(const struct delta_net *net) {
    return channels(net) + net->num_value_heads * (net->value_dim + 2);
}

ALWAYS int64_t share_of(const struct delta_net *net) {
    return net->num_value_heads / net->num_key_heads;
}

ALWAYS int64_t unit_floats(const struct delta_net *net) {
    int64_t share = share_of(net);
    return ROWS * (2 * net->key_dim + 2 * share * net->value_dim + 2 * share);
}

ALWAYS float *state_of(const struct job *job, int64_t slot) {
    const struct delta_net *net = job->net;
    int64_t matrices = net->num_value_heads * net->key_dim * net->value_dim;
    return job->rows->states + slot * ((net->kernel - 1) * channels(net) + matrices);
}

static float exp_of(float x) {
    float lanes[LANES];
    v_store(lanes, v_exp(v_set(x)));
    return lanes[0];
}

// log(1 + exp(x)), by the series of the inverse hyperbolic tangent, whose argument is at most 1/3.
static float softplus(float x) {
    if (x > 20.0f) return x;
    double y = exp_of(-fabsf(x)), z = y / (2.0 + y), square = z * z, sum = 0.0;
    for (int n = 21; n > 0; n -= 2) sum = sum * square + 1.0 / n;
    return (x > 0.0f ? x : 0.0f) + (float)(2.0 * z * sum);
}

static float round_one(float x, enum dtype dtype) {
    float lanes[LANES];
    v_store(lanes, v_round(v_set(x), dtype));
    return lanes[0];
}

// Compute silu of the convolution over `count` channels from `channel` on, for row `row` of a run.
// `earlier`: inputs before the run.
static void convolve(const struct job *job, const struct state_run *run, const float *earlier,
                     int64_t row, int64_t channel, int64_t count, float *to) {
    const struct delta_net *net = job->net;
    enum dtype dtype = (enum dtype)net->dtype;
    int64_t all = channels(net), width = row_width(net), taps = net->kernel;
    for (int64_t i = 0; i < count; i += LANES) {
        vec sum = v_set(0.0f);
        for (int64_t tap = 0; tap < taps; tap++) {
            int64_t place = row - (taps - 1) + tap, at = channel + i;
            vec x = place < 0
                        ? load_some(earlier, (place + taps - 1) * all + at, count - i, FLOAT32)
                        : load_some(job->rows->projected, (run->first + place) * width + at,
                                    count - i, dtype);
            vec weight = load_some(net->conv, tap * all + at, count - i, FLOAT32);
            sum = tap ? v_fma(x, weight, sum) : v_mul(x, weight);
        }
        vec y = v_round(v_silu(v_round(sum, dtype)), dtype);
        store_some(to, i, y, count - i, FLOAT32);
    }
}

// Normalize a head to length `factor`.
static void normalise(float *head, int64_t size, float factor) {
    vec squares[PARTS];
    for (int part = 0; part < PARTS; part++) squares[part] = v_set(0.0f);
    for (int64_t i = 0; i < size; i += WIDE)
        for (int part = 0; part < PARTS; part++) {
            int64_t at = i + part * LANES;
            if (at >= size) continue;
            vec value = load_some(head, at, size - at, FLOAT32);
            squares[part] = v_fma(value, value, squares[part]);
        }
    vec scale = v_set(1.0f / sqrtf(wide_sum(squares) + NORM_EPS)), after = v_set(factor);
    for (int64_t i = 0; i < size; i += LANES) {
        vec value = v_mul(load_some(head, i, size - i, FLOAT32), scale);
        store_some(head, i, v_mul(value, after), size - i, FLOAT32);
    }
}

static void prepare(const struct job *job, const struct state_run *run, const float *earlier,
                    int64_t row, int64_t place, const struct unit *unit) {
    const struct delta_net *net = job->net;
    enum dtype dtype = (enum dtype)net->dtype;
    int64_t key = net->key_dim, width = unit->share * net->value_dim;
    int64_t first_key = net->num_key_heads * key, first_value = 2 * first_key;
    float *queries = unit->queries + place * key, *keys = unit->keys + place * key;
    convolve(job, run, earlier, row, unit->head * key, key, queries);
    convolve(job, run, earlier, row, first_key + unit->head * key, key, keys);
    convolve(job, run, earlier, row, first_value + unit->head * width, width,
             unit->values + place * width);
    normalise(queries, key, 1.0f / sqrtf((float)key));
    normalise(keys, key, 1.0f);
    int64_t at = (run->first + row) * row_width(net) + channels(net) +
                 net->num_value_heads * net->value_dim;
    for (int64_t i = 0; i < unit->share; i++) {
        int64_t head = unit->head * unit->share + i;
        float strength = load_one(job->rows->projected, at + head, dtype);
        float decay = load_one(job->rows->projected, at + net->num_value_heads + head, dtype);
        float both = net->rate[head] * softplus(decay + net->bias[head]);
        unit->strengths[place * unit->share + i] =
            round_one(1.0f / (1.0f + exp_of(-strength)), dtype);
        unit->decays[place * unit->share + i] = exp_of(both);
    }
}

// Update `vectors` column vectors of a state by one row, and read them. The last vector has at most
// `left` columns. Even and odd lines have separate sums, as two chains are faster than one.
ALWAYS void change(const int vectors, const float *from, float *to, const float *keys,
                   const float *queries, const float *values, float *out, float decay,
                   float strength, int64_t lines, int64_t stride, int64_t left) {
    const int is_whole = vectors * LANES <= left;
    vec known[2][COLUMNS], sum[2][COLUMNS], step[COLUMNS];
    UNROLL for (int v = 0; v < vectors; v++)
        known[0][v] = known[1][v] = sum[0][v] = sum[1][v] = v_set(0.0f);
#define LINE(MEMORY, V)                                                            \
    (is_whole ? v_load((MEMORY) + i * stride + (V) * LANES)                        \
              : load_some(MEMORY, i * stride + (V) * LANES, left - (V) * LANES, FLOAT32))
    for (int64_t i = 0; i < lines; i++) {
        vec k = v_set(keys[i]);
        if (i % 2) {
            UNROLL for (int v = 0; v < vectors; v++)
                known[1][v] = v_fma(LINE(from, v), k, known[1][v]);
        } else {
            UNROLL for (int v = 0; v < vectors; v++)
                known[0][v] = v_fma(LINE(from, v), k, known[0][v]);
        }
    }
    UNROLL for (int v = 0; v < vectors; v++) {
        vec value = load_some(values, v * LANES, left - v * LANES, FLOAT32);
        vec before = v_mul(v_add(known[0][v], known[1][v]), v_set(decay));
        step[v] = v_mul(v_sub(value, before), v_set(strength));
    }
    for (int64_t i = 0; i < lines; i++) {
        vec k = v_set(keys[i]), q = v_set(queries[i]), d = v_set(decay);
        UNROLL for (int v = 0; v < vectors; v++) {
            vec changed = v_fma(k, step[v], v_mul(LINE(from, v), d));
            if (is_whole) v_store(to + i * stride + v * LANES, changed);
            else store_some(to, i * stride + v * LANES, changed, left - v * LANES, FLOAT32);
            if (i % 2) sum[1][v] = v_fma(changed, q, sum[1][v]);
            else sum[0][v] = v_fma(changed, q, sum[0][v]);
        }
    }
#undef LINE
    UNROLL for (int v = 0; v < vectors; v++)
        store_some(out, v * LANES, v_add(sum[0][v], sum[1][v]), left - v * LANES, FLOAT32);
}

// Update a value head's state [key_dim, value_dim] by `count` prepared rows, part by part.
static void change_head(const struct delta_net *net, const struct unit *unit, int64_t i,
                        int64_t count, const float *from, float *to) {
    int64_t key = net->key_dim, width = net->value_dim;
    for (int64_t column = 0; column < width;) {
        const int is_wide = column + COLUMNS * LANES <= width;
        for (int64_t row = 0; row < count; row++) {
            const float *source = (row ? to : from) + column;
            const float *keys = unit->keys + row * key, *queries = unit->queries + row * key;
            int64_t at = (row * unit->share + i) * width + column;
            float decay = unit->decays[row * unit->share + i];
            float strength = unit->strengths[row * unit->share + i];
            if (is_wide)
                change(COLUMNS, source, to + column, keys, queries, unit->values + at,
                       unit->outputs + at, decay, strength, key, width, width - column);
            else
                change(1, source, to + column, keys, queries, unit->values + at,
                       unit->outputs + at, decay, strength, key, width, width - column);
        }
        column += (is_wide ? COLUMNS : 1) * LANES;
    }
}

// Normalize each value head's output and multiply it by silu of its gate.
static void finish(const struct job *job, const struct unit *unit, int64_t row, int64_t place) {
    const struct delta_net *net = job->net;
    enum dtype dtype = (enum dtype)net->dtype;
    int64_t size = net->value_dim;
    for (int64_t i = 0; i < unit->share; i++) {
        float *head = unit->outputs + (place * unit->share + i) * size;
        int64_t at = (unit->head * unit->share + i) * size;
        int64_t gate = row * row_width(net) + channels(net) + at;
        int64_t to = row * net->num_value_heads * size + at;
        for (int64_t d = 0; d < size; d += LANES)
            store_some(head, d, v_round(load_some(head, d, size - d, FLOAT32), dtype), size - d,
                       FLOAT32);
        rms_norm(head, net->norm, size, net->eps, dtype);
        for (int64_t d = 0; d < size; d += LANES) {
            vec z = v_silu(load_some(job->rows->projected, gate + d, size - d, dtype));
            vec y = v_mul(load_some(head, d, size - d, FLOAT32), z);
            store_some(job->rows->out, to + d, y, size - d, dtype);
        }
    }
}

// Store the last inputs of the convolution, for the rows after the run.
static void keep_inputs(const struct job *job, const struct state_run *run, int64_t channel,
                        int64_t count) {
    const struct delta_net *net = job->net;
    const float *from = state_of(job, run->read);
    float *to = state_of(job, run->write);
    int64_t all = channels(net), num_rows = run->last - run->first, kept = net->kernel - 1;
    for (int64_t i = 0; i < kept; i++) {  // ascending, as both may be the same slot
        int64_t row = num_rows + i - kept;
        if (row >= 0)
            convert(to + i * all + channel, FLOAT32,
                    (const char *)job->rows->projected +
                        (size_t)((run->first + row) * row_width(net) + channel) *
                            dtype_bytes((enum dtype)net->dtype),
                    (enum dtype)net->dtype, count);
        else
            memmove(to + i * all + channel, from + (i + num_rows) * all + channel,
                    (size_t)count * 4);
    }
}

static void compute_run(const struct job *job, const struct state_run *run,
                        const struct unit *unit) {
    const struct delta_net *net = job->net;
    int64_t key = net->key_dim, size = key * net->value_dim, width = unit->share * net->value_dim;
    int64_t begin = (net->kernel - 1) * channels(net) + unit->head * unit->share * size;
    const float *earlier = state_of(job, run->read), *from = earlier + begin;
    float *to = state_of(job, run->write) + begin;
    for (int64_t row = 0; row < run->last - run->first; row += ROWS) {
        int64_t left = run->last - run->first - row, count = left < ROWS ? left : ROWS;
        for (int64_t i = 0; i < count; i++) prepare(job, run, earlier, row + i, i, unit);
        for (int64_t i = 0; i < unit->share; i++)
            change_head(net, unit, i, count, from + i * size, to + i * size);
        for (int64_t i = 0; i < count; i++) finish(job, unit, run->first + row + i, i);
        from = to;
    }
    int64_t first_key = net->num_key_heads * key;
    keep_inputs(job, run, unit->head * key, key);
    keep_inputs(job, run, first_key + unit->head * key, key);
    keep_inputs(job, run, 2 * first_key + unit->head * width, width);
}

static void task(void *argument, struct team *team, int thread, int count) {
    (void)team, (void)count;
    struct job *job = argument;
    const struct delta_net *net = job->net;
    int64_t key = net->key_dim, share = share_of(net), width = share * net->value_dim;
    float *memory = job->scratch + thread * unit_floats(net);
    struct unit unit = {
        .share = share,
        .queries = memory,
        .keys = memory + ROWS * key,
        .values = memory + ROWS * 2 * key,
        .outputs = memory + ROWS * (2 * key + width),
        .decays = memory + ROWS * (2 * key + 2 * width),
        .strengths = memory + ROWS * (2 * key + 2 * width + share),
    };
    int64_t all = job->rows->num_chains * net->num_key_heads;
    for (int64_t i; (i = atomic_fetch_add(&job->next, 1)) < all;) {
        const int64_t *chain = job->rows->chains + i / net->num_key_heads;
        unit.head = i % net->num_key_heads;
        for (int64_t run = chain[0]; run < chain[1]; run++)
            compute_run(job, job->rows->runs + run, &unit);
    }
}

int delta_net_run(struct team *team, const struct delta_net *net, const struct delta_rows *rows) {
    if (!team_claim(team)) return BUSY;
    struct job job = {.net = net, .rows = rows};
    job.scratch = team_scratch(team, (size_t)(team_size(team) * unit_floats(net)) * 4);
    int result = job.scratch ? OK : NO_MEMORY;
    if (job.scratch) team_run(team, task, &job, 0);
    team_release(team);
    return result;
}
