// Packed matrices, and the part of a product that one thread of a team computes.
#ifndef MATRIX_H
#define MATRIX_H

#include "numbers.h"

struct matrix {
    const char *panels;
    const float *bias;  // [outputs], or NULL
    int64_t outputs, inputs;
    int64_t dtype;  // enum dtype of rows
    struct form form;
};

ALWAYS struct layout layout_of_matrix(const struct matrix *m) {
    return layout_of((enum dtype)m->dtype, m->form, (long)m->inputs);
}

// Number of outputs, padded to full panels.
ALWAYS int64_t padded_outputs(const struct matrix *m) {
    return (m->outputs + PANEL - 1) / PANEL * PANEL;
}

// Size of a row of inputs in the layout of a product, in bytes.
ALWAYS size_t row_bytes(const struct matrix *m) {
    size_t per_unit = m->dtype == BFLOAT16 ? 2 : 1;
    return (size_t)row_units((enum dtype)m->dtype, (long)m->inputs) * per_unit *
           row_element_bytes((enum dtype)m->dtype);
}

// Dtype of rows in the layout of a product.
ALWAYS enum dtype row_dtype(const struct matrix *m) {
    return m->dtype == BFLOAT16 && ROWS_ARE_BF16 ? BFLOAT16 : FLOAT32;
}

// Load LANES sums of a row from output i on, and add the bias.
ALWAYS vec with_bias(const struct matrix *m, const float *sums, int64_t i) {
    vec x = v_load(sums + i);
    return m->bias ? v_add(x, load_some(m->bias, i, m->outputs - i, FLOAT32)) : x;
}

// Copy `inputs` numbers to a row in the layout of a product.
void matrix_fill_row(const struct matrix *m, void *row, const void *x, enum dtype dtype);

// Compute this thread's part of out [num_rows, padded_outputs] = rows x matrix, without the bias.
// `rows`: num_rows consecutive rows of row_bytes.
void matrix_work(const struct matrix *m, const void *rows, int64_t num_rows, float *out, int thread,
                 int count);

#endif
