// Weights quantized to codes of 8 or 4 bits. Each group of consecutive elements in a row has a scale
// and optionally a zero point. Reference: `workers/quantization/matrix.py`.
//
// A panel is read sequentially, in sections: the scales of one or two groups, which fill cache lines,
// [groups, PANEL]; their zero points, [groups, PANEL] signed bytes; and their codes, four bytes of a
// row for each output, [words, PANEL]. Only the last section may have fewer codes. In a word with
// 4-bit codes the even elements are first, then the odd ones, so that the two elements of a pair,
// which a product uses together, have the same position in the halves of the word.
//
// An output is the sum over blocks of scale x (sum of code x element, less zero point x sum of
// elements), in float. A block is a group, or BLOCK_UNITS of a longer one. It is summed in two
// chains: pairs of elements alternate, and the zero point starts the first chain. So the bits do not
// depend on the number of rows.
#ifndef QUANTIZED_H
#define QUANTIZED_H

#include "product.h"

enum { WORD = 4 };  // size in bytes

// See panel_product.
void quantized_product(const struct layout *layout, long num_rows, const void *const *x,
                       const float *totals, const char *weights, long num_panels, float *out,
                       long out_stride, const char *next);

// Reorder words of consecutive codes to the order of panels; the other function is the inverse.
void quantized_to_halves(uint32_t *words, long num_words);
void quantized_from_halves(uint32_t *words, long num_words);

#endif
