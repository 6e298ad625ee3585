// Quantization of groups of numbers to 4-bit codes with zero points, with the same bits as the
// reference, `workers/quantization/rounding.py`. Lanes are groups. Products and sums are not fused,
// as in torch.
#include <stdatomic.h>

#include "product.h"
#include "team.h"

enum { MAX_GROUP = 32, CHAINS = 4, LEAST = -8, MOST = 7, REFINEMENTS = 2 };
enum { BLOCK = 64 };  // vectors of groups in a thread's piece of work

// Candidates for the number of steps in the range of a group; at equal errors the first one wins.
static const float STEPS[] = {15, 14, 13, 12, 11, 10, 9, 8};
enum { NUM_STEPS = sizeof STEPS / sizeof *STEPS };

// Parameters of LANES groups. A number is scale * (code - zero).
struct grid {
    vec scale, zero;
};

ALWAYS vec clamped(vec x, float least, float most) {
    return v_min(v_max(x, v_set(least)), v_set(most));  // NaN becomes `least`
}

ALWAYS vec code_of(vec place) {
    return clamped(v_nearest(place), LEAST, MOST);
}

// Zero points in sixteenths, as stored.
ALWAYS vec stored_zero(vec zero) {
    return v_mul(clamped(v_nearest(v_mul(zero, v_set(16.0f))), -128, 127), v_set(0.0625f));
}

ALWAYS vec sum_of_chains(const vec *sums) {
    return v_add(v_add(sums[0], sums[1]), v_add(sums[2], sums[3]));
}

// Squared error of codes.
ALWAYS vec error_of(const vec *x, const int group, struct grid grid) {
    vec inverse = v_div(v_set(1.0f), grid.scale), sums[CHAINS];
    UNROLL for (int c = 0; c < CHAINS; c++) sums[c] = v_set(0.0f);
    for (int e = 0; e < group; e += CHAINS)
        UNROLL for (int c = 0; c < CHAINS; c++) {
            vec place = v_add(v_mul(x[e + c], inverse), grid.zero);
            vec off = v_sub(code_of(place), place);
            sums[c] = v_add(sums[c], v_mul(off, off));
        }
    return v_mul(sum_of_chains(sums), v_mul(grid.scale, grid.scale));
}

ALWAYS void take_if_better(const vec *x, const int group, struct grid other, struct grid *grid,
                           vec *error) {
    vec found = error_of(x, group, other);
    grid->scale = v_if_less(found, *error, other.scale, grid->scale);
    grid->zero = v_if_less(found, *error, other.zero, grid->zero);
    *error = v_if_less(found, *error, found, *error);
}

// Fit scale and zero point to the codes by least squares.
ALWAYS struct grid fitted(const vec *x, const int group, struct grid grid, vec total) {
    vec inverse = v_div(v_set(1.0f), grid.scale), sums[CHAINS], squares[CHAINS], products[CHAINS];
    UNROLL for (int c = 0; c < CHAINS; c++) sums[c] = squares[c] = products[c] = v_set(0.0f);
    for (int e = 0; e < group; e += CHAINS)
        UNROLL for (int c = 0; c < CHAINS; c++) {
            vec code = code_of(v_add(v_mul(x[e + c], inverse), grid.zero));
            sums[c] = v_add(sums[c], code);
            squares[c] = v_add(squares[c], v_mul(code, code));
            products[c] = v_add(products[c], v_mul(code, x[e + c]));
        }
    vec part = v_set(1.0f / (float)group), sum = sum_of_chains(sums), mean = v_mul(sum, part);
    vec with = v_sub(sum_of_chains(products), v_mul(mean, total));
    vec spread = v_sub(sum_of_chains(squares), v_mul(mean, sum));
    vec scale = v_round_bf16(v_div(with, spread));
    return (struct grid){scale, stored_zero(v_sub(mean, v_div(v_mul(total, part), scale)))};
}

ALWAYS struct grid grid_of(const vec *x, const int group) {
    vec low = v_set(0.0f), high = low, sums[CHAINS];
    UNROLL for (int c = 0; c < CHAINS; c++) sums[c] = v_set(0.0f);
    for (int e = 0; e < group; e += CHAINS)
        UNROLL for (int c = 0; c < CHAINS; c++) {
            low = v_min(x[e + c], low), high = v_max(x[e + c], high);
            sums[c] = v_add(sums[c], x[e + c]);
        }
    vec total = sum_of_chains(sums);
    vec range = v_add(v_sub(high, low), v_mul(total, v_set(0.0f)));  // keeps NaN
    struct grid found;
    vec error;
    for (int i = 0; i < NUM_STEPS; i++) {
        struct grid grid = {.scale = v_round_bf16(v_mul(range, v_set(1.0f / STEPS[i])))};
        grid.zero = stored_zero(v_sub(v_set(LEAST), v_div(low, grid.scale)));
        if (i) take_if_better(x, group, grid, &found, &error);
        else found = grid, error = error_of(x, group, grid);
    }
    for (int i = 0; i < REFINEMENTS; i++)
        take_if_better(x, group, fitted(x, group, found, total), &found, &error);
    return found;
}

struct job {
    const float *x;
    long num_groups;
    int group;         // numbers of a group: 24 or 32
    uint32_t *codes;   // [groups, group / 8]
    uint16_t *scales;  // [groups] bfloat16
    int8_t *zeros;     // [groups]
    _Atomic long next;
};

// Quantize LANES groups, or the `count` that are left.
ALWAYS void round_lanes(const struct job *job, const int group, long first, long count) {
    const int num_words = group / 8;
    vec x[MAX_GROUP];
    float *lanes = (float *)x;
    for (long l = 0; l < LANES; l++)
        for (int e = 0; e < group; e++)
            lanes[e * LANES + l] = l < count ? job->x[(first + l) * group + e] : 0.0f;
    struct grid grid = grid_of(x, group);
    vec inverse = v_div(v_set(1.0f), grid.scale);
    uint32_t words[MAX_GROUP / 8][LANES];
    for (int w = 0; w < num_words; w++) {
        veci word = vi_set(0);
        UNROLL for (int e = 0; e < 8; e++) {
            veci code = vi_of(code_of(v_add(v_mul(x[8 * w + e], inverse), grid.zero)));
            word = vi_add(word, vi_left(vi_and(code, vi_set(15)), 4 * e));
        }
        vi_store(words[w], word);
    }
    uint16_t scales[LANES];
    int32_t zeros[LANES];
    vi_store16(scales, v_to_bf16(grid.scale));
    vi_store(zeros, vi_of(v_mul(grid.zero, v_set(16.0f))));
    for (long l = 0; l < count; l++) {
        for (int w = 0; w < num_words; w++)
            job->codes[(first + l) * num_words + w] = words[w][l];
        job->scales[first + l] = scales[l];
        job->zeros[first + l] = (int8_t)zeros[l];
    }
}

static void round_24(const struct job *job, long first, long count) {
    round_lanes(job, 24, first, count);
}

static void round_32(const struct job *job, long first, long count) {
    round_lanes(job, 32, first, count);
}

static void round_some(void *argument, struct team *team, int thread, int count) {
    (void)team, (void)thread, (void)count;
    struct job *job = argument;
    void (*round)(const struct job *, long, long) = job->group == 24 ? round_24 : round_32;
    for (long first; (first = atomic_fetch_add(&job->next, BLOCK * LANES)) < job->num_groups;)
        for (long at = first; at < first + BLOCK * LANES && at < job->num_groups; at += LANES)
            round(job, at, job->num_groups - at < LANES ? job->num_groups - at : LANES);
}

// Quantize x [groups, group] to codes [groups, group / 2] bytes, the lower half of a byte first,
// scales and zero points [groups]; `group` is 24 or 32. `team` NULL: only the caller computes.
// Returns an `enum result`.
int rounding_groups(struct team *team, const float *x, long num_groups, long group, uint32_t *codes,
                    uint16_t *scales, int8_t *zeros) {
    struct job job = {x, num_groups, (int)group, codes, scales, zeros, 0};
    if (!team) {
        round_some(&job, NULL, 0, 1);
        return OK;
    }
    if (!team_claim(team)) return BUSY;
    team_run(team, round_some, &job, 0);
    team_release(team);
    return OK;
}
