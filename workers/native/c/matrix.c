#include "matrix.h"

#include "team.h"

enum { POINTERS = 8 * MAX_TILE_ROWS };  // maximum rows in one call of panel_product

// Multiply rows [first, last) with panels [begin, end).
static void multiply(const struct matrix *m, const void *rows, int64_t first, int64_t last,
                     int64_t begin, int64_t end, float *out) {
    struct layout layout = layout_of_matrix(m);
    size_t bytes = row_bytes(m);
    int64_t stride = padded_outputs(m);
    const void *pointers[POINTERS];
    float totals[layout.num_totals ? (last - first) * layout.num_totals : 1];
    if (begin == end) return;
    for (int64_t row = first; row < last && layout.num_totals; row++) {
        *pointers = (const char *)rows + (size_t)row * bytes;
        find_totals(&layout, 1, pointers, totals + (row - first) * layout.num_totals);
    }
    // For many rows use one panel at a time, so that it stays in the cache for all of them.
    int64_t at_once = last - first > POINTERS ? 1 : end - begin;
    for (int64_t panel = begin; panel < end; panel += at_once)
        for (int64_t row = first; row < last; row += POINTERS) {
            int64_t left = last - row < POINTERS ? last - row : POINTERS;
            for (int64_t i = 0; i < left; i++)
                pointers[i] = (const char *)rows + (size_t)(row + i) * bytes;
            panel_product(&layout, (long)left, pointers, totals + (row - first) * layout.num_totals,
                          panel_at(m->panels, &layout, (long)panel), (long)at_once,
                          out + row * stride + panel * PANEL, (long)stride,
                          panel_at(m->panels, &layout, (long)(panel + at_once)));
        }
}

void matrix_work(const struct matrix *m, const void *rows, int64_t num_rows, float *out, int thread,
                 int count) {
    int64_t panels = padded_outputs(m) / PANEL;
    // Each thread has its own panels, unless there are few panels and many rows.
    if (panels < 4 * count && num_rows >= MAX_TILE_ROWS * count) {
        int64_t tiles = (num_rows + MAX_TILE_ROWS - 1) / MAX_TILE_ROWS;
        int64_t first = tiles * thread / count * MAX_TILE_ROWS;
        int64_t last = tiles * (thread + 1) / count * MAX_TILE_ROWS;
        multiply(m, rows, first, last < num_rows ? last : num_rows, 0, panels, out);
    } else {
        multiply(m, rows, 0, num_rows, panels * thread / count, panels * (thread + 1) / count, out);
    }
}

// Copy a row into the layout of a product.
void matrix_fill_row(const struct matrix *m, void *row, const void *x, enum dtype dtype) {
    size_t used = (size_t)m->inputs * dtype_bytes(row_dtype(m));
    convert(row, row_dtype(m), x, dtype, m->inputs);
    memset((char *)row + used, 0, row_bytes(m) - used);
}
