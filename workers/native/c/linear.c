// A product of its own: x @ weight.T + bias.
#include "matrix.h"
#include "numbers.h"
#include "team.h"

struct job {
    const struct matrix *matrix;
    const void *x;
    void *out;
    int64_t num_rows;
    char *rows;   // [num_rows] in the form of a product
    float *sums;  // [num_rows, padded outputs]
};

static void task(void *argument, struct team *team, int thread, int count) {
    struct job *job = argument;
    const struct matrix *m = job->matrix;
    enum dtype dtype = (enum dtype)m->dtype;
    int64_t first = job->num_rows * thread / count, last = job->num_rows * (thread + 1) / count;
    for (int64_t row = first; row < last; row++) {
        const char *x = (const char *)job->x + (size_t)(row * m->inputs) * dtype_bytes(dtype);
        matrix_fill_row(m, job->rows + (size_t)row * row_bytes(m), x, dtype);
    }
    team_barrier(team, count);
    matrix_work(m, job->rows, job->num_rows, job->sums, thread, count);
    team_barrier(team, count);
    for (int64_t row = first; row < last; row++) {
        const float *sums = job->sums + row * padded_outputs(m);
        char *out = (char *)job->out + (size_t)(row * m->outputs) * dtype_bytes(dtype);
        for (int64_t i = 0; i < m->outputs; i += LANES)
            store_some(out, i, with_bias(m, sums, i), m->outputs - i, dtype);
    }
}

static int run(struct team *team, const struct matrix *m, const void *x, int64_t num_rows,
               void *out) {
    size_t row_total = ((size_t)num_rows * row_bytes(m) + 63) / 64 * 64;
    size_t sum_total = (size_t)(num_rows * padded_outputs(m)) * sizeof(float);
    char *memory = team_scratch(team, row_total + sum_total);
    if (!memory) return NO_MEMORY;
    struct job job = {m, x, out, num_rows, memory, (float *)(memory + row_total)};
    team_run(team, task, &job, 0);
    return OK;
}

// x [num_rows, inputs] -> out [num_rows, outputs], in the matrix's type. Returns an `enum result`.
int linear_run(struct team *team, const struct matrix *m, const void *x, int64_t num_rows,
               void *out) {
    if (!team_claim(team)) return BUSY;
    int result = run(team, m, x, num_rows, out);
    team_release(team);
    return result;
}
