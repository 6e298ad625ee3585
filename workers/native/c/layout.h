// Layout of the weights of a matrix in its panels, see product.h and quantized.h.
#ifndef LAYOUT_H
#define LAYOUT_H

#include <stddef.h>
#include <stdint.h>

#include "vector.h"

enum { PANEL = 32 };  // outputs of a panel
enum { BLOCK_UNITS = 128 };  // maximum pairs of elements in a block, see quantized.h

enum dtype { FLOAT32 = 0, BFLOAT16 = 1, E4M3 = 2 };  // E4M3: only KV caches, see fp8.h

enum codes { PLAIN = 0, INT8 = 1, FLOAT8 = 2, INT4 = 3, FLOAT4 = 4 };  // PLAIN: not quantized

enum scales { SCALES_FLOAT32 = 0, SCALES_BFLOAT16 = 1, SCALES_FLOAT16 = 2, SCALES_E8M0 = 3 };

// Fields of `FormFields` in quantized.py. All 0: weights have the dtype of the rows.
struct form {
    int64_t codes, scales, has_zeros;
    int64_t zero_bits;  // fractional bits of a zero point
    int64_t group;      // elements of a row with one scale; a multiple of 8, or the entire row
};

struct layout {
    enum dtype dtype;  // dtype of rows, and of weights if they are PLAIN
    struct form form;
    long units;  // units of a row: floats; pairs of bfloat16, or of codes
    size_t panel_bytes;
    // Groups, and sections of a panel, of quantized weights, see quantized.h.
    long num_groups, group_units;
    long block_units, num_totals;  // units of a block; totals of a row (see `find_totals`) or 0
    int section_groups;  // 1 or 2
    size_t scale_bytes, header_bytes, group_bytes, section_bytes;
};

// Units of a row of `width` elements; an odd bfloat16 row has a zero at its end.
ALWAYS long row_units(enum dtype dtype, long width) {
    return dtype == BFLOAT16 ? (width + 1) / 2 : width;
}

ALWAYS size_t scale_bytes(struct form form) {
    return form.scales == SCALES_FLOAT32 ? 4 : form.scales == SCALES_E8M0 ? 1 : 2;
}

// Layout of a matrix with `width` inputs; `width` is even for quantized weights, and 0 without a
// matrix.
ALWAYS struct layout layout_of(enum dtype dtype, struct form form, long width) {
    struct layout layout = {.dtype = dtype, .form = form, .units = row_units(dtype, width)};
    if (form.codes == PLAIN || width == 0) {
        layout.panel_bytes = (size_t)layout.units * PANEL * 4;
        return layout;
    }
    enum { WORD_LINE = PANEL * 4, CACHE_LINE = 64, TOTALS = 16 };
    long in_word = form.codes == INT8 || form.codes == FLOAT8 ? 4 : 8;
    long group = form.group < width ? (long)form.group : width;
    long num_groups = (width + group - 1) / group;
    size_t num_words = (size_t)((width + in_word - 1) / in_word);
    layout.units = width / 2;
    layout.num_groups = num_groups;
    layout.group_units = group / 2;
    layout.block_units = layout.group_units < BLOCK_UNITS ? layout.group_units : BLOCK_UNITS;
    long num_blocks = num_groups * ((layout.group_units + BLOCK_UNITS - 1) / BLOCK_UNITS);
    layout.num_totals = form.has_zeros ? (num_blocks + TOTALS - 1) / TOTALS * TOTALS : 0;
    layout.group_bytes = (size_t)((group + in_word - 1) / in_word) * WORD_LINE;
    layout.scale_bytes = scale_bytes(form);
    layout.header_bytes = PANEL * (layout.scale_bytes + (form.has_zeros ? 1 : 0));
    layout.section_groups = layout.header_bytes % CACHE_LINE ? 2 : 1;
    layout.header_bytes *= (size_t)layout.section_groups;
    layout.section_bytes = layout.header_bytes + (size_t)layout.section_groups * layout.group_bytes;
    long num_sections = (num_groups + layout.section_groups - 1) / layout.section_groups;
    layout.panel_bytes = (size_t)num_sections * layout.header_bytes + num_words * WORD_LINE;
    return layout;
}

ALWAYS const char *panel_at(const void *packed, const struct layout *layout, long panel) {
    return (const char *)packed + (size_t)panel * layout->panel_bytes;
}

#endif
