// Samples a token for each row of logits. Reference: `workers/sampling/draws.py`, which documents
// the method. If a limit keeps few tokens, only the largest logits are processed in full.
#include <math.h>

#include "team.h"
#include "threshold.h"
#include "weights.h"

enum {
    BRANCHES = 16,          // branches of a node in the walk down to the sampled token
    SPAN = 256,             // tokens with one stored sum: two levels of branches
    GROUP = 64,             // vectors that share one maximum for each lane
    CHAINS = 4,             // independent maxima of a group
    FIRST_CANDIDATES = 256,  // initial number for top_p without top_k
};
enum failure { NOT_FINITE = -1, NONE_ALLOWED = -2 };

// Sampling parameters of a row.
struct draw_row {
    uint64_t seed, choice, index;
    double top_p;   // 1 or more: no limit
    float scale;    // log2(e) / temperature; 0 selects the best token
    float floor;    // log2(min_p)
    int64_t top_k;  // 0: no limit
};

struct job {
    const char *logits;  // [num_rows, vocab_size]
    enum dtype dtype;
    int64_t vocab_size, num_rows;
    int is_masked;  // tokens with logit minus infinity must not be sampled
    const struct draw_row *rows;
    int64_t *tokens;
    char *memory;
};

// Logits of a row, and their candidates.
struct row {
    const void *logits;
    enum dtype dtype;
    int64_t size;
    float tail[LANES];  // the last vector if it is not full, padded with minus infinity
    float best;
    float scale, floor;  // a token weighs 2**t if t = (logit - best) * scale >= floor
    int64_t num_tokens;  // number of candidates; -1: all tokens
    float *maxima;       // [num_groups] by vector and lane, one for GROUP vectors each
    float *values;       // [size] t of each candidate, ordered by id
    int32_t *ids;        // [size]
    int64_t *weights;    // [size], also of candidates below the floor
    int64_t *sums;       // [num_spans + 1]: sum of all weights before a span
};

static int64_t num_spans(int64_t size) { return (size + SPAN - 1) / SPAN; }

static int64_t num_groups(int64_t size) {
    return (size + GROUP * LANES - 1) / (GROUP * LANES) * LANES;
}

// Place the arrays of a thread in `memory`; return their size, a multiple of 64 bytes.
static size_t place_arrays(struct row *row, char *memory, int64_t size) {
    size_t padded = (size_t)(size + LANES);  // a vector may be stored beyond the last candidate
    size_t bytes[] = {(size_t)num_groups(size) * sizeof(float), padded * sizeof(float),
                      padded * sizeof(int32_t), padded * sizeof(int64_t),
                      (size_t)(num_spans(size) + 1) * sizeof(int64_t)};
    void *places[5];
    size_t total = 0;
    for (int i = 0; i < 5; i++) {
        places[i] = memory + total;
        total += (bytes[i] + 63) / 64 * 64;
    }
    row->maxima = places[0];
    row->values = places[1];
    row->ids = places[2];
    row->weights = places[3];
    row->sums = places[4];
    return total;
}

ALWAYS vec row_load(const struct row *row, int64_t at, enum dtype dtype) {
    return at + LANES <= row->size ? load_at(row->logits, at, dtype) : v_load(row->tail);
}

ALWAYS vec row_t(const struct row *row, int64_t at, enum dtype dtype) {
    return v_mul(v_sub(row_load(row, at, dtype), v_set(row->best)), v_set(row->scale));
}

static int is_nan(vec x) {
    float lanes[LANES];
    v_store(lanes, x);
    for (int l = 0; l < LANES; l++)
        if (lanes[l] != lanes[l]) return 1;
    return 0;
}

static float largest_lane(vec x) {
    float lanes[LANES], most;
    v_store(lanes, x);
    most = lanes[0];
    for (int l = 1; l < LANES; l++) most = lanes[l] > most ? lanes[l] : most;
    return most;
}

// Find the best logit and the maxima of the groups; return whether all logits are finite.
ALWAYS int survey_as(struct row *row, enum dtype dtype) {
    int64_t full = row->size / LANES * LANES;
    vec zeros[CHAINS], most[CHAINS], best = v_set(-INFINITY);
    float *maxima = row->maxima;
    int is_finite = 1;
    for (int64_t i = 0; i < LANES; i++) {
        row->tail[i] = full + i < row->size ? load_one(row->logits, full + i, dtype) : -INFINITY;
        if (full + i < row->size && !isfinite(row->tail[i])) is_finite = 0;
    }
    for (int c = 0; c < CHAINS; c++) zeros[c] = v_set(0.0f);
    for (int64_t first = 0; first < row->size; first += GROUP * LANES, maxima += LANES) {
        int64_t last = first + GROUP * LANES < full ? first + GROUP * LANES : full;
        UNROLL for (int c = 0; c < CHAINS; c++) most[c] = v_set(-INFINITY);
        if (first + GROUP * LANES > full) most[0] = v_load(row->tail);
        for (int64_t i = first; i < last; i += CHAINS * LANES)
            UNROLL for (int c = 0; c < CHAINS; c++) {
                if (i + c * LANES >= last) break;
                vec x = load_at(row->logits, i + c * LANES, dtype);
                most[c] = v_max(x, most[c]);
                zeros[c] = v_fma(x, v_set(0.0f), zeros[c]);  // NaN if x is not finite
            }
        UNROLL for (int c = 1; c < CHAINS; c++) most[0] = v_max(most[c], most[0]);
        v_store(maxima, most[0]);
        best = v_max(most[0], best);
    }
    row->best = largest_lane(best);
    UNROLL for (int c = 0; c < CHAINS; c++) is_finite &= !is_nan(zeros[c]);
    return is_finite;
}

static int survey(struct row *row) {
    return row->dtype == BFLOAT16 ? survey_as(row, BFLOAT16) : survey_as(row, FLOAT32);
}

// Append the tokens with logits of at least `least`; return their number.
ALWAYS int64_t gather_as(struct row *row, float least, enum dtype dtype) {
    int64_t count = 0;
    for (int64_t i = 0; i < row->size; i += LANES) {
        uint32_t chosen = v_at_least(row_load(row, i, dtype), v_set(least));
        if (i + LANES > row->size) chosen &= (1u << (row->size - i)) - 1;
        for (; chosen; chosen &= chosen - 1, count++) {
            int64_t id = i + __builtin_ctz(chosen);
            row->ids[count] = (int32_t)id;
            row->values[count] = load_one(row->logits, id, dtype);
        }
    }
    return count;
}

// Set the candidates to the tokens with logits of at least `least`.
static void gather(struct row *row, float least) {
    enum dtype dtype = row->dtype;
    int64_t count = dtype == BFLOAT16 ? gather_as(row, least, BFLOAT16)
                                      : gather_as(row, least, FLOAT32);
    for (int64_t i = 0; i < count; i += LANES) {
        vec t = v_mul(v_sub(v_load(row->values + i), v_set(row->best)), v_set(row->scale));
        veci low, high;
        v_to_int64(v_weight(t), &low, &high);
        v_store(row->values + i, t);
        vi_store(row->weights + i, low);
        vi_store(row->weights + i + LANES / 2, high);
    }
    row->num_tokens = count;
}

// Total weight of the candidates from `floor` on.
static int64_t weight_from(const struct row *row, float floor) {
    int64_t sum = 0;
    for (int64_t i = 0; i < row->num_tokens; i++)
        sum += row->values[i] >= floor ? row->weights[i] : 0;
    return sum;
}

// Return the sum of a span's weights from the row's floor on, and store each in `weights` if given.
ALWAYS int64_t span_as(const struct row *row, int64_t first, int64_t *weights, enum dtype dtype,
                       int has_floor) {
    int64_t last = first + SPAN < row->size ? first + SPAN : row->size, lanes[LANES], sum = 0;
    veci total[2] = {vi_set(0), vi_set(0)};
    for (int64_t i = first; i < last; i += LANES) {
        vec t = row_t(row, i, dtype), weight = v_weight(t);
        veci low, high;
        if (has_floor) weight = v_keep(weight, t, v_set(row->floor));
        v_to_int64(weight, &low, &high);
        total[0] = vi_add64(total[0], low);
        total[1] = vi_add64(total[1], high);
        if (weights) {
            vi_store(weights + i - first, low);
            vi_store(weights + i - first + LANES / 2, high);
        }
    }
    vi_store(lanes, total[0]);
    vi_store(lanes + LANES / 2, total[1]);
    for (int l = 0; l < LANES; l++) sum += lanes[l];
    return sum;
}

// Fill `sums` if every token is a candidate.
ALWAYS void sum_all_as(struct row *row, enum dtype dtype, int has_floor) {
    int64_t sum = 0, count = num_spans(row->size);
    for (int64_t span = 0; span < count; span++) {
        row->sums[span] = sum;
        sum += span_as(row, span * SPAN, NULL, dtype, has_floor);
    }
    row->sums[count] = sum;
}

static void sum_all(struct row *row) {
    int has_floor = row->floor > -INFINITY;
    if (row->dtype == BFLOAT16 && has_floor) sum_all_as(row, BFLOAT16, 1);
    else if (row->dtype == BFLOAT16) sum_all_as(row, BFLOAT16, 0);
    else sum_all_as(row, FLOAT32, 1);
}

// Fill `sums` with weights from the floor on.
static void sum_spans(struct row *row) {
    int64_t count = num_spans(row->size), sum = 0;
    if (row->num_tokens < 0) {
        sum_all(row);
        return;
    }
    memset(row->sums, 0, (size_t)(count + 1) * sizeof *row->sums);
    for (int64_t i = 0; i < row->num_tokens; i++)
        if (row->values[i] >= row->floor) row->sums[row->ids[i] / SPAN] += row->weights[i];
    for (int64_t span = 0; span <= count; span++) {
        int64_t own = row->sums[span];
        row->sums[span] = sum;
        sum += own;
    }
}

// Weights [SPAN] of the tokens from `first` on; 0 beyond the last one.
static void span_weights(const struct row *row, int64_t first, int64_t *weights) {
    memset(weights, 0, SPAN * sizeof *weights);
    if (row->num_tokens < 0) {
        if (row->dtype == BFLOAT16) span_as(row, first, weights, BFLOAT16, 1);
        else span_as(row, first, weights, FLOAT32, 1);
        return;
    }
    for (int64_t i = 0; i < row->num_tokens && row->ids[i] < first + SPAN; i++)
        if (row->ids[i] >= first && row->values[i] >= row->floor)
            weights[row->ids[i] - first] = row->weights[i];
}

// Raise the floor to the limit of top_k, then of top_p. The candidates include all kept tokens.
static void limit(struct row *row, int64_t top_k, double top_p) {
    int64_t groups = num_groups(row->size), wanted = top_k ? top_k : FIRST_CANDIDATES;
    int has_few = 2 * wanted <= groups;  // each group has at least one such token
    float floor = row->floor;
    row->floor = -INFINITY;
    int64_t mass = 0;
    if (!top_k) {
        sum_spans(row);
        mass = row->sums[num_spans(row->size)];
    }
    gather(row, has_few ? threshold(row->maxima, NULL, groups, (double)wanted) : -INFINITY);
    if (top_k) {
        row->floor = threshold(row->values, NULL, row->num_tokens, (double)top_k);
        mass = weight_from(row, row->floor);
    }
    if (top_p < 1.0) {
        double target = top_p * (double)mass;
        if ((double)weight_from(row, -INFINITY) < target) gather(row, -INFINITY);
        row->floor = threshold(row->values, row->weights, row->num_tokens, target);
    }
    row->floor = row->floor > floor ? row->floor : floor;
}

static uint64_t splitmix64(uint64_t state) {
    uint64_t z = state + 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

// Walk down to a token, with a random number for each level.
static int64_t descend(const struct row *row, const struct draw_row *how) {
    uint64_t state = splitmix64(splitmix64(splitmix64(how->seed) ^ how->choice) ^ how->index);
    int64_t weights[SPAN], before[SPAN + 1], first = 0, width = 1;
    while (width * BRANCHES < row->size) width *= BRANCHES;
    for (uint64_t level = 0; width; level++, width /= BRANCHES) {
        int64_t below[BRANCHES + 1];  // weight of all tokens before each branch
        if (width < SPAN && (width == SPAN / BRANCHES || !level)) {  // the span of the token
            span_weights(row, first, weights);
            before[0] = row->sums[first / SPAN];
            for (int i = 0; i < SPAN; i++) before[i + 1] = before[i] + weights[i];
        }
        for (int64_t j = 0; j <= BRANCHES; j++) {
            int64_t edge = first + j * width < row->size ? first + j * width : row->size;
            int64_t start = first / SPAN * SPAN;
            below[j] = width < SPAN ? before[edge - start] : row->sums[num_spans(edge)];
        }
        double uniform = (double)(splitmix64(state ^ level) >> 11) * 0x1p-53;
        int64_t all = below[BRANCHES] - below[0], part = (int64_t)(uniform * (double)all);
        int64_t target = below[0] + (part < all ? part : all - 1), branch = 0;
        while (below[branch + 1] <= target) branch++;
        first += branch * width;
    }
    return first;
}

static int64_t first_best(const struct row *row) {
    int64_t groups = num_groups(row->size), i = 0;
    for (int64_t group = 0; group < groups && row->maxima[group] != row->best; group++)
        i = (group + 1) / LANES * GROUP * LANES;
    for (; load_one(row->logits, i, row->dtype) != row->best;) i++;
    return i;
}

static int64_t draw(struct row *row, const struct draw_row *how, int is_masked) {
    if (!survey(row) && !is_masked) return NOT_FINITE;
    if (!isfinite(row->best)) return NONE_ALLOWED;
    if (how->scale == 0.0f) return first_best(row);
    int64_t top_k = how->top_k < row->size ? how->top_k : 0;
    row->scale = how->scale;
    row->floor = how->floor;
    row->num_tokens = -1;
    if (top_k || how->top_p < 1.0) limit(row, top_k, how->top_p);
    sum_spans(row);
    return descend(row, how);
}

static void task(void *argument, struct team *team, int thread, int count) {
    (void)team;
    struct job *job = argument;
    struct row row = {.dtype = job->dtype, .size = job->vocab_size};
    place_arrays(&row, job->memory + place_arrays(&row, NULL, row.size) * (size_t)thread, row.size);
    int64_t first = job->num_rows * thread / count, last = job->num_rows * (thread + 1) / count;
    for (int64_t i = first; i < last; i++) {
        row.logits = job->logits + (size_t)(i * row.size) * dtype_bytes(row.dtype);
        job->tokens[i] = draw(&row, &job->rows[i], job->is_masked);
    }
}

// Sample tokens [num_rows] from contiguous logits [num_rows, vocab_size]; a failed row gets an
// `enum failure`. Returns an `enum result`.
int draw_rows(struct team *team, const void *logits, int dtype, long vocab_size, long num_rows,
              int is_masked, const struct draw_row *rows, int64_t *tokens) {
    struct row row;
    size_t num_bytes = place_arrays(&row, NULL, vocab_size) * (size_t)team_size(team);
    if (!team_claim(team)) return BUSY;
    struct job job = {logits, (enum dtype)dtype, vocab_size, num_rows, is_masked, rows, tokens,
                      team_scratch(team, num_bytes)};
    if (job.memory) team_run(team, task, &job, num_rows == 1 ? 1 : 0);
    team_release(team);
    return job.memory ? OK : NO_MEMORY;
}
