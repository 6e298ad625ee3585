// A unit of work is a few rows of one sequence and a few query heads of one key head, so that keys
// and values are read once for all its queries. The result of a query depends only on its row:
//
//   score   sum of a key's products with the query in 16 lanes, then lanes l and l + 8, l + 4,
//           l + 2, l + 1 are added; in an E4M3 cache, times the key's scale
//   weight  exp(score - best score); the sum of weights in 16 lanes, added in the same way
//   output  one chain of fused products in the order of the keys, divided by the sum; in an E4M3
//           cache, weights are multiplied by the values' scales first
//
// So the bits of a row are the same in a decode and in a chunk of any size, in any unit, on any
// instruction set and with any number of threads.
#include "attention.h"

#include <math.h>
#include <stdatomic.h>

#include "fp8.h"

enum {
    KEYS = 4,               // keys that are scored at a time
    MAX_QUERIES = 8,        // queries of a unit
    QUERIES = 4,            // queries summed at a time
    COLUMNS = LANES == 16 ? 4 : 2,  // minimum of output vectors that are summed at a time
    CHAINS = 8,             // concurrent sums, which hide the latency of each step
    DIRECT = 1,             // number of queries for which keys are not converted to a buffer
};

struct unit {
    const struct chunk *chunk;
    int kv_head;
    int first_row, num_rows;    // index within the chunk
    int first_head, num_heads;  // index within the heads of the key head
    int begin, end;             // positions that any of the rows attends to
    const struct unit *next;    // likely next unit of the thread, or NULL
};

// Position of a thread in the list of units.
struct cursor {
    int chunk, before;  // before: number of units in the earlier chunks
};

struct scratch {
    float *queries;  // [MAX_QUERIES, width], scaled, 0 beyond head_dim
    float *outputs;  // [MAX_QUERIES, width]
    float *weights;  // [MAX_QUERIES, stride], positions from the unit's `begin` on
    int width, stride;
};

static int divide_up(int x, int by) { return (x + by - 1) / by; }
static int round_up(int x, int to) { return divide_up(x, to) * to; }
static int min_int(int a, int b) { return a < b ? a : b; }
static int max_int(int a, int b) { return a > b ? a : b; }

// Sum the WIDE lanes of each of KEYS keys.
ALWAYS __m128 sum_lanes(vec lanes[KEYS][PARTS]) {
    __m128 quarter[KEYS];
    UNROLL
    for (int j = 0; j < KEYS; j++) {
#ifdef __AVX512F__
        __m256 low = _mm512_castps512_ps256(lanes[j][0]);
        __m256 high = _mm512_extractf32x8_ps(lanes[j][0], 1);
#else
        __m256 low = lanes[j][0], high = lanes[j][1];
#endif
        __m256 half = _mm256_add_ps(low, high);
        quarter[j] = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    }
    __m128 a = quarter[0], b = quarter[1], c = quarter[2], d = quarter[3];
    __m128 ab = _mm_add_ps(_mm_unpacklo_ps(a, b), _mm_unpackhi_ps(a, b));
    __m128 cd = _mm_add_ps(_mm_unpacklo_ps(c, d), _mm_unpackhi_ps(c, d));
    return _mm_add_ps(_mm_movelh_ps(ab, cd), _mm_movehl_ps(cd, ab));
}

// Number of elements of a key or value in the cache.
ALWAYS int64_t row_elements(const struct attention *a, enum dtype dtype) {
    return dtype == E4M3 ? fp8_row_bytes(a->head_dim) : a->head_dim;
}

// Index of a position's key (half 0) or value (half 1) in the cache.
ALWAYS int64_t place(const struct attention *a, const struct unit *unit, int half, int position,
                     enum dtype dtype) {
    int64_t block = unit->chunk->table[position / a->block_size];
    int64_t head = a->is_latent ? 0 : (int64_t)half * a->num_kv_heads + unit->kv_head;
    return ((head * a->num_blocks + block) * a->block_size + position % a->block_size) *
           row_elements(a, dtype);
}

// Prefetch the block that a thread will read PREFETCH_BYTES after a position: keys, then values,
// then the next unit. The rows of a block are contiguous, but the processor cannot predict the next
// block. The L2 cache permits more concurrent reads than L1: 160 positions of 32 sequences with 8
// heads of 64, on one core of an AMD EPYC (Zen 4), are read at 17 GB/s with prefetch into L2, 9 GB/s
// with prefetch into L1, and 11 GB/s without prefetch.
ALWAYS void fetch_ahead(const struct attention *a, const struct unit *unit, int half, int position,
                        enum dtype dtype) {
    int row_bytes = (int)row_elements(a, dtype) * (int)dtype_bytes(dtype), size = a->block_size;
    int block = position / size + divide_up(PREFETCH_BYTES, row_bytes * size);
    while (block * size >= unit->end) {
        block -= divide_up(unit->end, size);
        if (half) unit = unit->next;
        if (!unit) return;
        half = !half;
        block += unit->begin / size;
    }
    int count = min_int(unit->end - block * size, size);
    int64_t at = place(a, unit, half, block * size, dtype) * (int64_t)dtype_bytes(dtype);
    const char *first = (const char *)a->cache + at;
    for (int i = 0; i < count * row_bytes; i += 64) _mm_prefetch(first + i, _MM_HINT_T1);
}

// End (last position + 1) of the block of a position.
static int block_end(const struct attention *a, int position) {
    return position - position % a->block_size + a->block_size;
}

static int num_queries(const struct unit *unit) { return unit->num_rows * unit->num_heads; }

// First position that the row of a query attends to, then the end of its positions.
static int query_begin(const struct attention *a, const struct unit *unit, int query) {
    int length = (int)unit->chunk->first_position + unit->first_row + query / unit->num_heads + 1;
    return max_int(length - a->window, 0);
}
static int query_end(const struct unit *unit, int query) {
    return (int)unit->chunk->first_position + unit->first_row + query / unit->num_heads + 1;
}

// Compute the scores of all queries of a unit with some keys, from position `p` on.
ALWAYS void score_keys(const struct unit *unit, const struct scratch *s, int p,
                       const void *const keys[KEYS], enum dtype dtype, __m128 scales) {
    for (int query = 0; query < num_queries(unit); query++) {
        const float *q = s->queries + (int64_t)query * s->width;
        vec lanes[KEYS][PARTS];
        UNROLL
        for (int j = 0; j < KEYS; j++)
            UNROLL
            for (int part = 0; part < PARTS; part++) lanes[j][part] = v_set(0.0f);
        for (int d = 0; d < s->width; d += WIDE) {
            UNROLL
            for (int part = 0; part < PARTS; part++) {
                int at = d + part * LANES;
                vec x = v_load(q + at);
                UNROLL
                for (int j = 0; j < KEYS; j++)
                    lanes[j][part] = v_fma(x, load_at(keys[j], at, dtype), lanes[j][part]);
            }
        }
        float *to = s->weights + (int64_t)query * s->stride + (p - unit->begin);
        _mm_storeu_ps(to, _mm_mul_ps(sum_lanes(lanes), scales));
    }
}

// Compute the scores of all queries of a unit with all positions of the unit.
ALWAYS void make_scores(const struct attention *a, const struct unit *unit,
                        const struct scratch *s, enum dtype dtype) {
    int dim = a->head_dim;
    int is_direct = dim % WIDE == 0 && (dtype == FLOAT32 || num_queries(unit) <= DIRECT);
    float buffer[KEYS][s->width];
    const void *keys[KEYS], *const converted[KEYS] = {buffer[0], buffer[1], buffer[2], buffer[3]};
    float scales[KEYS] = {1.0f, 1.0f, 1.0f, 1.0f};  // scales of the keys in an E4M3 cache
    if (!is_direct) memset(buffer, 0, sizeof buffer);
    int64_t at = 0;
    int left = 0;  // positions left in the block
    for (int p = unit->begin; p < unit->end; p += KEYS) {
        for (int j = 0; j < KEYS; j++) {
            if (p + j < unit->end) {  // otherwise the last key is repeated
                if (left) {
                    at += row_elements(a, dtype);
                } else {
                    at = place(a, unit, 0, p + j, dtype);
                    left = block_end(a, p + j) - (p + j);
                    fetch_ahead(a, unit, 0, p + j, dtype);
                }
                left--;
            }
            const char *key = (const char *)a->cache + at * (int64_t)dtype_bytes(dtype);
            if (dtype == E4M3) scales[j] = fp8_scale((const uint8_t *)key, dim);
            if (!is_direct) convert(buffer[j], FLOAT32, key, dtype, dim);
            keys[j] = key;
        }
        if (is_direct)
            score_keys(unit, s, p, keys, dtype, _mm_loadu_ps(scales));
        else
            score_keys(unit, s, p, converted, FLOAT32, _mm_loadu_ps(scales));
    }
}

// Add the weighted values of positions first .. last - 1 to the outputs of `count` queries from
// `query` on, in some columns.
ALWAYS void add_columns(const struct attention *a, const struct unit *unit, const struct scratch *s,
                        int first, int last, int query, int column, int count, int columns,
                        enum dtype dtype) {
    float *outputs = s->outputs + (int64_t)query * s->width + column;
    const float *weights = s->weights + (int64_t)query * s->stride - unit->begin;
    vec sums[QUERIES][CHAINS];
    UNROLL
    for (int q = 0; q < count; q++)
        UNROLL
        for (int c = 0; c < columns; c++)
            sums[q][c] = v_load(outputs + (int64_t)q * s->width + c * LANES);
    for (int p = first; p < last;) {
        int64_t at = place(a, unit, 1, p, dtype) + column;
        int stop = min_int(last, block_end(a, p));
        for (; p < stop; p++, at += row_elements(a, dtype)) {
            UNROLL
            for (int c = 0; c < columns; c++) {
                vec values = load_at(a->cache, at + c * LANES, dtype);
                UNROLL
                for (int q = 0; q < count; q++) {
                    vec weight = v_set(weights[(int64_t)q * s->stride + p]);
                    sums[q][c] = v_fma(weight, values, sums[q][c]);
                }
            }
        }
    }
    UNROLL
    for (int q = 0; q < count; q++)
        UNROLL
        for (int c = 0; c < columns; c++)
            v_store(outputs + (int64_t)q * s->width + c * LANES, sums[q][c]);
}

ALWAYS void add_queries(const struct attention *a, const struct unit *unit, const struct scratch *s,
                        int first, int last, int query, int count, enum dtype dtype) {
    int column = 0;
    const int many = CHAINS / count > COLUMNS ? CHAINS / count : COLUMNS;
    for (; column + many * LANES <= a->value_dim; column += many * LANES)
        add_columns(a, unit, s, first, last, query, column, count, many, dtype);
    for (; column + COLUMNS * LANES <= a->value_dim; column += COLUMNS * LANES)
        add_columns(a, unit, s, first, last, query, column, count, COLUMNS, dtype);
    for (; column + LANES <= a->value_dim; column += LANES)
        add_columns(a, unit, s, first, last, query, column, count, 1, dtype);
    for (; column < a->value_dim; column++)
        for (int q = query; q < query + count; q++) {
            float *sum = s->outputs + (int64_t)q * s->width + column;
            const float *weights = s->weights + (int64_t)q * s->stride - unit->begin;
            for (int p = first; p < last; p++) {
                float value = load_one(a->cache, place(a, unit, 1, p, dtype) + column, dtype);
                *sum = fmaf(weights[p], value, *sum);
            }
        }
}

// Add the weighted values of positions that queries `begin` .. `end` - 1 all attend to.
ALWAYS void add_values(const struct attention *a, const struct unit *unit, const struct scratch *s,
                       int first, int last, int begin, int end, enum dtype dtype) {
    int query = begin;
    for (; query + QUERIES <= end; query += QUERIES)
        add_queries(a, unit, s, first, last, query, QUERIES, dtype);
    if (query + 2 <= end) {
        add_queries(a, unit, s, first, last, query, 2, dtype);
        query += 2;
    }
    if (query < end) add_queries(a, unit, s, first, last, query, 1, dtype);
}

// Multiply the weights of queries `begin` .. `end` - 1 with the scales of the values.
static void scale_weights(const struct attention *a, const struct unit *unit,
                          const struct scratch *s, int first, int last, int begin, int end) {
    float *weights = s->weights - unit->begin;
    const uint8_t *value = (const uint8_t *)a->cache + place(a, unit, 1, first, E4M3);
    for (int p = first; p < last; p++, value += fp8_row_bytes(a->head_dim)) {
        float scale = fp8_scale(value, a->head_dim);
        for (int query = begin; query < end; query++)
            weights[(int64_t)query * s->stride + p] *= scale;
    }
}

// The first and the last attended position ascend with the rows of a unit, so the rows that attend
// to a position are contiguous.
ALWAYS void make_outputs(const struct attention *a, const struct unit *unit,
                         const struct scratch *s, enum dtype dtype) {
    int count = num_queries(unit), begin = 0, end = 0;
    for (int first = unit->begin; first < unit->end;) {
        while (end < count && query_begin(a, unit, end) <= first) end++;
        while (begin < end && query_end(unit, begin) <= first) begin++;
        int last = begin < end ? query_end(unit, begin) : unit->end;
        if (end < count) last = min_int(last, query_begin(a, unit, end));
        if (dtype == E4M3 || count <= QUERIES) {  // with more, sums take longer than memory reads
            last = min_int(last, block_end(a, first));
            if (first == unit->begin || first % a->block_size == 0)
                fetch_ahead(a, unit, 1, first, dtype);
        }
        if (dtype == E4M3) scale_weights(a, unit, s, first, last, begin, end);
        add_values(a, unit, s, first, last, begin, end, dtype);
        first = last;
    }
}

static int query_head(const struct attention *a, const struct unit *unit, int query) {
    int group = a->num_heads / a->num_kv_heads;
    return unit->kv_head * group + unit->first_head + query % unit->num_heads;
}

// Index of a query among the queries of all rows.
static int64_t query_number(const struct attention *a, const struct unit *unit, int query) {
    int64_t row = unit->chunk->first_row + unit->first_row + query / unit->num_heads;
    return row * a->num_heads + query_head(a, unit, query);
}

static void scale_queries(const struct attention *a, const struct unit *unit,
                          const struct scratch *s) {
    int dim = a->head_dim;
    for (int query = 0; query < num_queries(unit); query++) {
        float *q = s->queries + (int64_t)query * s->width;
        int64_t at = query_number(a, unit, query) * dim * (int64_t)dtype_bytes(a->dtype);
        convert(q, FLOAT32, (const char *)a->queries + at, a->dtype, dim);
        for (int d = 0; d < dim; d++) q[d] *= a->scale;
        memset(q + dim, 0, (size_t)(s->width - dim) * sizeof *q);
    }
}

// Divide outputs by the sums of their weights.
static void store_outputs(const struct attention *a, const struct unit *unit,
                          const struct scratch *s, const float *totals) {
    int dim = a->value_dim;
    for (int query = 0; query < num_queries(unit); query++) {
        float *output = s->outputs + (int64_t)query * s->width;
        int64_t at = query_number(a, unit, query) * dim;
        for (int d = 0; d < dim; d += LANES) {
            vec x = v_round(v_div(v_load(output + d), v_set(totals[query])), a->dtype);
            store_some(a->out, at + d, x, dim - d, a->out_dtype);
        }
    }
}

ALWAYS void compute_unit(const struct attention *a, const struct unit *unit,
                         const struct scratch *s, enum dtype cache_dtype) {
    int count = num_queries(unit);
    scale_queries(a, unit, s);
    make_scores(a, unit, s, cache_dtype);
    float totals[MAX_QUERIES];
    for (int query = 0; query < count; query++) {
        int begin = query_begin(a, unit, query), length = query_end(unit, query) - begin;
        float *scores = s->weights + (int64_t)query * s->stride + (begin - unit->begin);
        // Append the sink after the row's own scores; later entries belong to other rows.
        if (a->sinks) scores[length++] = a->sinks[query_head(a, unit, query)];
        totals[query] = numbers_softmax(scores, length);
    }
    memset(s->outputs, 0, (size_t)count * (size_t)s->width * sizeof *s->outputs);
    make_outputs(a, unit, s, cache_dtype);
    store_outputs(a, unit, s, totals);
}

// Number of rows of a unit, then number of units of a chunk.
static int unit_rows(const struct attention *a) {
    return max_int(1, MAX_QUERIES / (a->num_heads / a->num_kv_heads));
}
static int head_blocks(const struct attention *a) {
    return round_up(a->num_heads / a->num_kv_heads, MAX_QUERIES) / MAX_QUERIES;
}
static int num_units(const struct attention *a, const struct chunk *chunk) {
    int rows = unit_rows(a);
    return (int)((chunk->num_rows + rows - 1) / rows) * a->num_kv_heads * head_blocks(a);
}

// Find unit `number`, if it exists. Numbers must ascend.
static int find_unit(const struct attention *a, struct cursor *cursor, int number,
                     struct unit *unit) {
    for (; cursor->chunk < a->num_chunks; cursor->chunk++) {
        const struct chunk *chunk = &a->chunks[cursor->chunk];
        int count = num_units(a, chunk);
        if (number - cursor->before >= count) {
            cursor->before += count;
            continue;
        }
        int group = a->num_heads / a->num_kv_heads, rows = unit_rows(a), blocks = head_blocks(a);
        int rest = number - cursor->before;
        // Process the last rows first, as they take the longest.
        int row_block = (count - 1 - rest) / (a->num_kv_heads * blocks);
        unit->chunk = chunk;
        unit->kv_head = rest / blocks % a->num_kv_heads;
        unit->first_row = row_block * rows;
        unit->num_rows = min_int(rows, (int)chunk->num_rows - unit->first_row);
        unit->first_head = rest % blocks * MAX_QUERIES;
        unit->num_heads = min_int(MAX_QUERIES, group - unit->first_head);
        unit->begin = query_begin(a, unit, 0);
        unit->end = query_end(unit, num_queries(unit) - 1);
        return 1;
    }
    return 0;
}

static struct scratch divide(const struct attention *a, float *memory) {
    struct scratch s = {.width = round_up(a->head_dim, WIDE)};
    s.stride = round_up(a->max_length, WIDE) + WIDE;
    s.queries = memory;
    s.outputs = s.queries + MAX_QUERIES * s.width;
    s.weights = s.outputs + MAX_QUERIES * s.width;
    return s;
}

size_t attention_scratch(const struct attention *a) {
    struct scratch s = divide(a, NULL);
    size_t count = (size_t)MAX_QUERIES * (size_t)(2 * s.width + s.stride) + 2 * WIDE;
    return count * sizeof(float);
}

void attention_work(const struct attention *a, _Atomic int *next, void *memory) {
    struct scratch s = divide(a, memory);
    struct cursor cursor = {0, 0}, ahead;
    struct unit unit, following = {.next = NULL};
    while (find_unit(a, &cursor, atomic_fetch_add(next, 1), &unit)) {
        ahead = cursor;
        unit.next = find_unit(a, &ahead, atomic_load(next), &following) ? &following : NULL;
        if (a->cache_dtype == E4M3)
            compute_unit(a, &unit, &s, E4M3);
        else if (a->cache_dtype == BFLOAT16)
            compute_unit(a, &unit, &s, BFLOAT16);
        else
            compute_unit(a, &unit, &s, FLOAT32);
    }
}
