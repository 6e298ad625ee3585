#include "linear.h"

#include <stdatomic.h>

enum { ROWS = 8 * MAX_TILE_ROWS, GROUP = 4 };  // maximum rows and panels of a piece of work

struct job {
    const struct matrix *matrix;
    struct layout layout;
    const char *x;
    char *out;
    int64_t num_rows, row_blocks, num_groups, group;  // group: its number of panels
    char *rows;  // [num_rows] in the layout of a product; NULL: x has it
    float *totals;  // [num_rows], see `find_totals`; NULL for none
    _Atomic int64_t next;  // piece of work
};

static void fill(const struct job *job, int thread, int count) {
    const struct matrix *m = job->matrix;
    enum dtype dtype = (enum dtype)m->dtype;
    int64_t first = job->num_rows * thread / count, last = job->num_rows * (thread + 1) / count;
    for (int64_t row = first; row < last; row++) {
        const void *x = job->x + (size_t)(row * m->inputs) * dtype_bytes(dtype);
        char *filled = job->rows ? job->rows + (size_t)row * row_bytes(m) : NULL;
        if (filled) matrix_fill_row(m, filled, x, dtype);
        if (filled) x = filled;
        if (job->totals)
            find_totals(&job->layout, 1, &x, job->totals + row * job->layout.num_totals);
    }
}

// First panel of piece `piece`, or of the last piece if that does not exist.
static int64_t panel_of(const struct job *job, int64_t piece) {
    int64_t group = piece / job->row_blocks;
    return (group < job->num_groups ? group : job->num_groups - 1) * job->group;
}

// Compute some outputs of some rows, with sums that stay in the cache until they are rounded. `next`:
// a panel that this thread is likely to read afterwards.
static void compute(const struct job *job, int64_t first_row, int64_t panel, int64_t next) {
    const struct matrix *m = job->matrix;
    enum dtype dtype = (enum dtype)m->dtype;
    float sums[ROWS * GROUP * PANEL] __attribute__((aligned(64)));
    const void *rows[ROWS];
    int64_t num_rows = job->num_rows - first_row < ROWS ? job->num_rows - first_row : ROWS;
    int64_t left = padded_outputs(m) / PANEL - panel, first = panel * PANEL;
    int64_t panels = left < job->group ? left : job->group, width = panels * PANEL;
    const char *from = job->rows ? job->rows : job->x;
    for (int64_t i = 0; i < num_rows; i++)
        rows[i] = from + (size_t)(first_row + i) * row_bytes(m);
    panel_product(&job->layout, (long)num_rows, rows,
                  job->totals ? job->totals + first_row * job->layout.num_totals : NULL,
                  panel_at(m->panels, &job->layout, (long)panel), (long)panels, sums, (long)width,
                  panel_at(m->panels, &job->layout, (long)next));
    for (int64_t i = 0; i < num_rows; i++) {
        char *out = job->out + (size_t)((first_row + i) * m->outputs) * dtype_bytes(dtype);
        const float *of_row = sums + i * width - first;
        for (int64_t o = first; o < first + width && o < m->outputs; o += LANES)
            store_some(out, o, with_bias(m, of_row, o), m->outputs - o, dtype);
    }
}

static void task(void *argument, struct team *team, int thread, int count) {
    struct job *job = argument;
    if (job->rows || job->totals) {
        fill(job, thread, count);
        team_barrier(team, count);
    }
    // Pieces with the same panels are consecutive.
    for (int64_t i; (i = atomic_fetch_add(&job->next, 1)) < job->row_blocks * job->num_groups;)
        compute(job, i % job->row_blocks * ROWS, panel_of(job, i),
                panel_of(job, atomic_load(&job->next)));
}

int linear_claimed(struct team *team, const struct matrix *m, const void *x, int64_t num_rows,
                   void *out) {
    int64_t panels = padded_outputs(m) / PANEL, share = panels / team_size(team);
    struct job job = {
        .matrix = m,
        .layout = layout_of_matrix(m),
        .x = x,
        .out = out,
        .num_rows = num_rows,
        .row_blocks = (num_rows + ROWS - 1) / ROWS,
        .group = share < 1 ? 1 : share < GROUP ? share : GROUP,
    };
    job.num_groups = (panels + job.group - 1) / job.group;
    size_t total_bytes = (size_t)(num_rows * job.layout.num_totals) * sizeof *job.totals, bytes = 0;
    if (row_bytes(m) != (size_t)m->inputs * dtype_bytes((enum dtype)m->dtype))
        bytes = (size_t)num_rows * row_bytes(m);
    if (total_bytes + bytes) {
        char *scratch = team_scratch(team, total_bytes + bytes);
        if (!scratch) return NO_MEMORY;
        if (total_bytes) job.totals = (float *)scratch;
        if (bytes) job.rows = scratch + total_bytes;
    }
    team_run(team, task, &job, 0);
    return OK;
}

int linear_run(struct team *team, const struct matrix *m, const void *x, int64_t num_rows,
               void *out) {
    if (!team_claim(team)) return BUSY;
    int result = linear_claimed(team, m, x, num_rows, out);
    team_release(team);
    return result;
}
