// Rows are computed in blocks of BLOCK_ROWS, so that the data between two products stays in the
// cache. The work is divided into sections, with a barrier between two sections. Within a section
// the threads take pieces (rows, panels or heads) from a counter, so that a thread that waits for a
// core does not delay the rest. If there are few rows, the last thread that reaches a barrier does
// the work between two products alone, which saves another barrier.
#include "attention_sublayer.h"

#include <limits.h>
#include <math.h>
#include <stdatomic.h>

#include "fp8.h"
#include "norm.h"
#include "team.h"

enum { BLOCK_ROWS = 256, ALIGNMENT = 64 };
enum { FEW_ROWS = 2 };    // up to this number of rows, one thread is faster than another barrier
enum { GROUP = 4 };       // panels in a piece of a large product
enum { PIECES = 4 };      // pieces for each thread in a small product

struct job {
    const struct sublayer *sublayer;
    const struct sublayer_batch *batch;
    const struct sublayer_rows *rows;
    int stages;
    _Atomic int next[2];      // pieces of this section and of the next one, alternating
    _Atomic int num_arrived;  // threads at sections of few rows
    struct attention attention;
    char *form;      // [BLOCK_ROWS] rows in the layout of a product
    float *sums;     // [BLOCK_ROWS, widest padded outputs]
    void *queries;   // [num_rows, num_heads, head_dim]
    char *attended;  // [num_rows] rows in the layout of the output product
    char *threads;   // scratch memory of the threads
    size_t thread_bytes;
};

// A thread and its position in the work.
struct member {
    struct job *job;
    struct team *team;
    int thread, count;
    int section;     // index of the current section; -1 before the first one
    const struct chunk *chunk;  // chunk of the last row that it placed
    float *scratch;             // memory of this thread
};

// Begin a section after all threads have ended the last one.
static void begin_section(struct member *m) {
    if (m->section++ >= 0) team_barrier(m->team, m->count);
    if (m->thread == 0) m->job->next[(m->section + 1) % 2] = 0;
}

static _Atomic int *next_piece(struct member *m) { return &m->job->next[m->section % 2]; }

static int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

ALWAYS const void *row_of(const void *x, int64_t row, int64_t width, enum dtype dtype) {
    return (const char *)x + (size_t)(row * width) * dtype_bytes(dtype);
}

// Normalize floats x [hidden_size] in place; copy them to `out` and to a row in a product's layout.
static void norm_row(const struct job *job, float *x, const void *weight, void *out,
                     const struct matrix *next, char *form) {
    const struct sublayer *sublayer = job->sublayer;
    enum dtype dtype = (enum dtype)sublayer->dtype;
    rms_norm(x, weight, sublayer->hidden_size, (float)sublayer->eps, dtype);
    if (out) convert(out, dtype, x, FLOAT32, sublayer->hidden_size);
    if (next->panels) matrix_fill_row(next, form, x, FLOAT32);
}

// The first product.
static const struct matrix *entry_of(const struct sublayer *sublayer) {
    return sublayer->qkv.panels ? &sublayer->qkv : &sublayer->query_router.matrix;
}

// Number of heads of a row: queries, keys and values.
ALWAYS int64_t row_heads(const struct sublayer *sublayer) {
    return sublayer->num_heads + (sublayer->latent_rank ? 1 : 2 * sublayer->num_kv_heads);
}

// `first`: first row of the block; buffers of a block start with this row.
typedef void row_work(struct member *m, int64_t first, int64_t row);

static void norm1(struct member *m, int64_t first, int64_t row) {
    const struct job *job = m->job;
    const struct sublayer *sublayer = job->sublayer;
    enum dtype dtype = (enum dtype)sublayer->dtype;
    const struct matrix *next = entry_of(sublayer);
    const void *hidden = row_of(job->rows->hidden, row, sublayer->hidden_size, dtype);
    convert(m->scratch, FLOAT32, hidden, dtype, sublayer->hidden_size);
    // Without routed projections only the product reads the rows.
    void *out = sublayer->qkv.panels
                    ? NULL
                    : (void *)row_of(job->rows->normed, row, sublayer->hidden_size, dtype);
    char *form = job->form + (size_t)(row - first) * row_bytes(next);
    norm_row(job, m->scratch, sublayer->norm1, out, next, form);
}

// Choose the experts of a row from the sums of a router's product.
static void route(struct member *m, const struct router *router, int64_t first, int64_t row) {
    const struct matrix *matrix = &router->matrix;
    const struct routing *routing = &router->routing;
    const struct sublayer_rows *rows = m->job->rows;
    enum dtype model = (enum dtype)m->job->sublayer->dtype;
    enum dtype dtype = routing->float32_product ? FLOAT32 : model;
    float *logits = m->job->sums + (row - first) * padded_outputs(matrix);
    for (int64_t i = 0; i < matrix->outputs; i += LANES) {
        vec x = v_round(with_bias(matrix, logits, i), dtype);
        store_some(logits, i, x, matrix->outputs - i, FLOAT32);
    }
    if (rows->logits) {
        void *kept = (void *)row_of(rows->logits, row, matrix->outputs, dtype);
        convert(kept, dtype, logits, FLOAT32, matrix->outputs);
    }
    int64_t top_k = routing->top_k;
    float *weights = rows->topk_weights + row * top_k;
    routing_choose(routing, logits, rows->topk_ids + row * top_k, weights, m->scratch);
    for (int64_t i = 0; i < top_k; i += LANES) {
        vec x = load_some(weights, i, top_k - i, FLOAT32);
        if (!routing_is_float32(routing)) x = v_round(x, model);
        store_some(weights, i, x, top_k - i, FLOAT32);
    }
}

static void route_queries(struct member *m, int64_t first, int64_t row) {
    route(m, &m->job->sublayer->query_router, first, row);
}

static void route_experts(struct member *m, int64_t first, int64_t row) {
    route(m, &m->job->sublayer->router, first, row);
}

// Normalize, clip and rotate the queries, keys and values of a row in place, and write them to the
// queries and to the cache.
static void place_row(const struct job *job, float *qkv, int64_t row, const struct chunk *chunk) {
    const struct sublayer *sublayer = job->sublayer;
    const struct sublayer_batch *batch = job->batch;
    enum dtype dtype = (enum dtype)sublayer->dtype;
    int64_t dim = sublayer->head_dim, heads = sublayer->num_heads, kv_heads = sublayer->num_kv_heads;
    int64_t all_heads = row_heads(sublayer);
    float eps = (float)sublayer->eps;
    if (sublayer->qk_norm == NORM_WIDTH) {
        rms_norm(qkv, sublayer->qk_norm_weights, heads * dim, eps, dtype);
        const void *weight = row_of(sublayer->qk_norm_weights, heads, dim, dtype);
        rms_norm(qkv + heads * dim, weight, kv_heads * dim, eps, dtype);
    }
    if (sublayer->qk_norm == NORM_HEADS)
        for (int64_t h = 0; h < heads + kv_heads; h++) {
            const void *weight = row_of(sublayer->qk_norm_weights, h, dim, dtype);
            rms_norm(qkv + h * dim, weight, dim, eps, dtype);
        }
    if (isfinite(sublayer->clip)) {
        float clip = (float)sublayer->clip;
        // NaN stays NaN.
        for (int64_t i = 0; i < all_heads * dim; i++)
            qkv[i] = qkv[i] > clip ? clip : qkv[i] < -clip ? -clip : qkv[i];
    }
    int64_t position = chunk->first_position + row - chunk->first_row;
    int64_t wave = batch->waves_by_position ? position : row;
    const void *cos = row_of(batch->cos, wave, batch->wave_stride, dtype);
    const void *sin = row_of(batch->sin, wave, batch->wave_stride, dtype);
    int64_t block = chunk->table[position / batch->block_size];
    int64_t offset = position % batch->block_size;
    float exact[dim];  // values for an E4M3 cache before their rounding
    int64_t plain = sublayer->latent_rank, turned = (dim - plain) / 2;
    for (int64_t h = 0; h < all_heads; h++) {
        const float *x = qkv + h * dim;
        int64_t slot = ((h - heads) * batch->num_blocks + block) * batch->block_size + offset;
        int is_e4m3 = h >= heads && batch->cache_dtype == E4M3;
        void *out = h < heads ? (void *)row_of(job->queries, row * heads + h, dim, dtype)
                    : is_e4m3 ? (void *)exact
                              : (void *)row_of(job->rows->cache, slot, dim, dtype);
        enum dtype out_dtype = is_e4m3 ? FLOAT32 : dtype;
        convert(out, out_dtype, x, FLOAT32, h >= heads + kv_heads ? dim : plain);
        for (int64_t side = 0; side < 2 && h < heads + kv_heads; side++) {
            // Combine each element with the element that is half the rotated size away.
            int64_t from = side * turned, other = turned - from;
            for (int64_t i = 0; i < turned; i += LANES) {
                int64_t left = turned - i;
                vec c = load_some(cos, from + i, left, dtype);
                vec s = load_some(sin, from + i, left, dtype);
                vec a = v_mul(load_some(x, plain + from + i, left, FLOAT32), c);
                vec b = v_mul(load_some(x, plain + other + i, left, FLOAT32), s);
                vec sum = v_round(v_add(v_round(a, dtype), v_round(b, dtype)), dtype);
                store_some(out, plain + from + i, sum, left, out_dtype);
            }
        }
        if (!is_e4m3) continue;
        uint8_t *to = (uint8_t *)job->rows->cache + slot * fp8_row_bytes(dim);
        fp8_write(to, exact, dim);
    }
}

// Place queries, keys and values of a row, from the sums of their product or from `projected`.
static void place(struct member *m, int64_t first, int64_t row) {
    const struct job *job = m->job;
    const struct sublayer *sublayer = job->sublayer;
    const struct matrix *matrix = &sublayer->qkv;
    enum dtype dtype = (enum dtype)sublayer->dtype;
    int64_t width = row_heads(sublayer) * sublayer->head_dim;
    float *qkv = m->scratch;
    if (matrix->panels) {
        qkv = job->sums + (row - first) * padded_outputs(matrix);
        for (int64_t i = 0; i < width; i += LANES)
            store_some(qkv, i, v_round(with_bias(matrix, qkv, i), dtype), width - i, FLOAT32);
    } else {
        convert(qkv, FLOAT32, row_of(job->rows->projected, row, width, dtype), dtype, width);
    }
    while (row >= m->chunk->first_row + m->chunk->num_rows) m->chunk++;
    place_row(job, qkv, row, m->chunk);
}

// Compute the residual stream of a row after attention, and its norm.
static void norm2(struct member *m, int64_t first, int64_t row) {
    const struct job *job = m->job;
    const struct sublayer *sublayer = job->sublayer;
    const struct matrix *output = &sublayer->output, *next = &sublayer->router.matrix;
    enum dtype dtype = (enum dtype)sublayer->dtype;
    int64_t size = sublayer->hidden_size;
    void *hidden = (void *)row_of(job->rows->hidden, row, size, dtype);
    const float *sums = job->sums + (row - first) * (output->panels ? padded_outputs(output) : 0);
    const void *mixed = output->panels ? NULL : row_of(job->rows->mixed, row, size, dtype);
    for (int64_t i = 0; i < size; i += LANES) {
        vec y = mixed ? load_some(mixed, i, size - i, dtype) : with_bias(output, sums, i);
        y = v_add(load_some(hidden, i, size - i, dtype), v_round(y, dtype));
        store_some(m->scratch, i, v_round(y, dtype), size - i, FLOAT32);
    }
    convert(hidden, dtype, m->scratch, FLOAT32, size);
    void *normed = (void *)row_of(job->rows->normed, row, size, dtype);
    norm_row(job, m->scratch, sublayer->norm2, normed, next,
             job->form + (size_t)(row - first) * row_bytes(next));
}

// ---- sections -----------------------------------------------------------------------------------

static void each_row(struct member *m, row_work *work, int64_t first, int64_t last) {
    if (m->section >= 0 && last - first <= FEW_ROWS) {
        int num_before = atomic_fetch_add(&m->job->num_arrived, 1);
        if (num_before % m->count < m->count - 1) return;
        for (int64_t row = first; row < last; row++) work(m, first, row);
        return;
    }
    begin_section(m);
    _Atomic int *next = next_piece(m);
    for (int64_t row; (row = first + atomic_fetch_add(next, 1)) < last;) work(m, first, row);
}

static void multiply(struct member *m, const struct matrix *matrix, const char *rows,
                     int64_t num_rows) {
    begin_section(m);
    _Atomic int *next = next_piece(m);
    int panels = (int)(padded_outputs(matrix) / PANEL);
    int pieces = panels >= 2 * GROUP * m->count ? panels / GROUP : PIECES * m->count;
    for (int piece; (piece = atomic_fetch_add(next, 1)) < pieces;)
        matrix_work(matrix, rows, num_rows, m->job->sums, piece, pieces);
}

static void enter(struct member *m, int64_t first, int64_t last) {
    const struct sublayer *sublayer = m->job->sublayer;
    each_row(m, norm1, first, last);
    multiply(m, entry_of(sublayer), m->job->form, last - first);
    if (!sublayer->qkv.panels) each_row(m, route_queries, first, last);
}

static void leave(struct member *m, int64_t first, int64_t last) {
    const struct sublayer *sublayer = m->job->sublayer;
    const struct matrix *router = &sublayer->router.matrix;
    if (sublayer->output.panels) {
        const char *rows = m->job->attended + (size_t)first * row_bytes(&sublayer->output);
        multiply(m, &sublayer->output, rows, last - first);
    }
    each_row(m, norm2, first, last);
    if (!router->panels) return;
    multiply(m, router, m->job->form, last - first);
    each_row(m, route_experts, first, last);
}

static void task(void *argument, struct team *team, int thread, int count) {
    struct job *job = argument;
    struct member m = {
        .job = job,
        .team = team,
        .thread = thread,
        .count = count,
        .section = -1,
        .scratch = (float *)(job->threads + (size_t)thread * job->thread_bytes),
        .chunk = job->batch->chunks,
    };
    int64_t num_rows = job->batch->num_rows, last;
    for (int64_t first = 0; first < num_rows; first = last) {
        last = min_of(first + BLOCK_ROWS, num_rows);
        if (job->stages & ENTER) enter(&m, first, last);
        if (job->stages & ATTEND) each_row(&m, place, first, last);
    }
    if (job->stages & ATTEND) {
        begin_section(&m);
        attention_work(&job->attention, next_piece(&m), m.scratch);
    }
    for (int64_t first = 0; first < num_rows && job->stages & LEAVE; first = last) {
        last = min_of(first + BLOCK_ROWS, num_rows);
        leave(&m, first, last);
    }
}

static size_t aligned(size_t bytes) { return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

static struct attention attention_of(const struct sublayer *sublayer, const struct sublayer_batch *batch,
                                     const struct sublayer_rows *rows) {
    int is_routed = !sublayer->qkv.panels;
    return (struct attention){
        .num_heads = (int)sublayer->num_heads,
        .num_kv_heads = (int)sublayer->num_kv_heads,
        .head_dim = (int)sublayer->head_dim,
        .value_dim = (int)(sublayer->latent_rank ? sublayer->latent_rank : sublayer->head_dim),
        .is_latent = sublayer->latent_rank != 0,
        .scale = (float)sublayer->scale,
        .sinks = sublayer->sinks,
        .window = (int)min_of(sublayer->window, INT_MAX / 2),
        .dtype = (enum dtype)sublayer->dtype,
        .cache_dtype = (enum dtype)batch->cache_dtype,
        .cache = rows->cache,
        .num_blocks = batch->num_blocks,
        .block_size = (int)batch->block_size,
        .out = rows->attended,
        .out_dtype = is_routed ? (enum dtype)sublayer->dtype : row_dtype(&sublayer->output),
        .chunks = batch->chunks,
        .num_chunks = (int)batch->num_chunks,
        .max_length = (int)batch->max_length,
    };
}

int sublayer_claimed(struct team *team, const struct sublayer *sublayer, const struct sublayer_batch *batch,
                 const struct sublayer_rows *rows, int stages) {
    struct job job = {.sublayer = sublayer, .batch = batch, .rows = rows, .stages = stages};
    job.attention = attention_of(sublayer, batch, rows);
    int64_t block = min_of(batch->num_rows, BLOCK_ROWS), outputs = 0, width = sublayer->hidden_size;
    size_t form = 0;
    const struct matrix *matrices[] = {&sublayer->qkv, &sublayer->output, &sublayer->query_router.matrix,
                                       &sublayer->router.matrix};
    for (size_t i = 0; i < sizeof matrices / sizeof *matrices; i++)
        if (matrices[i]->panels) {
            outputs = max_of(outputs, padded_outputs(matrices[i]));
            size_t bytes = row_bytes(matrices[i]);
            if (bytes > form && matrices[i] != &sublayer->output) form = bytes;
        }
    width = max_of(width, row_heads(sublayer) * sublayer->head_dim);
    width = max_of(width, ROUTING_SCRATCH * sublayer->router.routing.num_experts);
    width = max_of(width, ROUTING_SCRATCH * sublayer->query_router.routing.num_experts);
    size_t form_bytes = aligned((size_t)block * form);
    size_t sum_bytes = aligned((size_t)(block * outputs) * sizeof(float));
    size_t attended_bytes =
        sublayer->qkv.panels ? aligned((size_t)batch->num_rows * row_bytes(&sublayer->output)) : 0;
    size_t attention_bytes = attention_scratch(&job.attention);
    job.thread_bytes = aligned(max_of((int64_t)attention_bytes, width * (int64_t)sizeof(float)));
    size_t query_bytes = 0;
    if (stages & ATTEND && !rows->queries) {
        int64_t elements = batch->num_rows * sublayer->num_heads * sublayer->head_dim;
        query_bytes = aligned((size_t)elements * dtype_bytes((enum dtype)sublayer->dtype));
    }
    size_t total = form_bytes + sum_bytes + attended_bytes + query_bytes;
    job.form = team_scratch(team, total + job.thread_bytes * (size_t)team_size(team));
    if (!job.form) return NO_MEMORY;
    job.sums = (float *)(job.form + form_bytes);
    job.attended = (char *)job.sums + sum_bytes;
    char *queries = job.attended + attended_bytes;
    job.threads = queries + query_bytes;
    job.queries = rows->queries ? rows->queries : (void *)queries;
    job.attention.queries = job.queries;
    if (sublayer->qkv.panels) job.attention.out = job.attended;
    team_run(team, task, &job, 0);
    return OK;
}

int sublayer_run(struct team *team, const struct sublayer *sublayer, const struct sublayer_batch *batch,
             const struct sublayer_rows *rows, int stages) {
    if (!team_claim(team)) return BUSY;
    int result = sublayer_claimed(team, sublayer, batch, rows, stages);
    team_release(team);
    return result;
}
