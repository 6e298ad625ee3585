// Weights in codes of 8 or 4 bits: of each group of neighbours in a row, a scale and perhaps a zero
// point. `workers/quantization/matrix.py` is the reference.
//
// A panel is read from its begin to its end, in sections: the scales of as many groups as fill cache
// lines, one or two, [groups, PANEL]; their zero points, [groups, PANEL] signed bytes; and their
// codes, four bytes of a row for each output: [words, PANEL]. Only the last section may have fewer
// codes. In words with codes of 4 bits the even elements come first, then the odd ones, so that two
// of them, which the products take at a time, are equally far in the halves of the word.
//
// An output is the sum, block after block, of scale x (sum of code x element, less zero point x sum
// of elements), in float. A block is a group, or BLOCK_UNITS of a longer one, and its sum is that of
// two chains: pairs of elements alternate, and the zero point begins the first one. So its bits do
// not depend on the number of rows.
#ifndef QUANTIZED_H
#define QUANTIZED_H

#include "product.h"

enum { WORD = 4 };  // bytes

// See panel_product.
void quantized_product(const struct layout *layout, long num_rows, const void *const *x,
                       const float *totals, const char *weights, long num_panels, float *out,
                       long out_stride, const char *next);

// Words of codes whose elements follow each other -> the order of panels, or back.
void quantized_to_halves(uint32_t *words, long num_words);
void quantized_from_halves(uint32_t *words, long num_words);

#endif
