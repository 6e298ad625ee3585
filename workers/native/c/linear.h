// A single product: x @ weight.T + bias.
#ifndef LINEAR_H
#define LINEAR_H

#include "matrix.h"
#include "team.h"

// x [num_rows, inputs] -> out [num_rows, outputs], in the matrix's dtype. Returns an `enum result`.
int linear_run(struct team *team, const struct matrix *m, const void *x, int64_t num_rows,
               void *out);

// `linear_run` for a caller that has claimed the team.
int linear_claimed(struct team *team, const struct matrix *m, const void *x, int64_t num_rows,
                   void *out);

#endif
