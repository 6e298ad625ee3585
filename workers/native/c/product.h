// Products of rows with packed weights.
//
// Packed weights are panels of 32 outputs; quantized.h describes panels of quantized weights. Other
// panels have a line of 128 bytes for each unit of the row: one float of every output, or two
// consecutive bfloat16 of the row, the order of vdpbf16ps. So a panel is read sequentially, once.
//
// Every output is summed in its own lane by one chain of fused multiply-adds, in the order of the
// row. So its bits depend only on its row and its weights, not on other rows, tiles or threads.
#ifndef PRODUCT_H
#define PRODUCT_H

#include "layout.h"

// Elements of rows in the layout of the products: bfloat16 if the processor can multiply them.
#ifdef __AVX512BF16__
enum { ROWS_ARE_BF16 = 1 };
#else
enum { ROWS_ARE_BF16 = 0 };
#endif

// Maximum rows of a tile. Each row needs two registers for its sums; there are 32 registers with
// AVX-512 and 16 without.
enum { MAX_TILE_ROWS = LANES == 16 ? 12 : 6 };

// Up to this number of rows, reading the weights takes longer than multiplying, so a tile reads full
// lines sequentially.
enum { STREAM_ROWS = LANES == 16 ? MAX_TILE_ROWS : 2 };

// Number of output vectors of a tile of ROWS rows: a panel, or half a panel if a panel's sums need
// too many registers.
#define TILE_VECTORS(ROWS) (LANES == 8 && (ROWS) <= STREAM_ROWS ? 4 : 2)

// Distance in bytes from the line that such a tile reads to the one that it prefetches. The
// processor's own prefetching ends at each page.
enum { PREFETCH_BYTES = 4096, CACHE_LINE_BYTES = 64 };

// Data that a tile prefetches while it reads a panel: from `now` on, and after unit `turn` of the
// panel from `then` on.
struct fetched {
    const char *now, *then;
    long turn;
};

// Size of an element of rows that are multiplied with weights of `dtype`, in bytes.
ALWAYS size_t row_element_bytes(enum dtype dtype) {
    return dtype == BFLOAT16 && ROWS_ARE_BF16 ? 2 : 4;
}

// Prefetch a line of weights. With one row, the time is spent on memory reads: prefetch into L2, which
// permits more concurrent reads than L1 (27 instead of 24 GB/s on one core of an AMD EPYC, Zen 4).
// With a few rows, L1 is faster. With many rows, prefetch into L2, as in L1 the next panel would evict
// this one.
ALWAYS void fetch(const int rows, const char *line) {
    if (rows == 1 || rows > STREAM_ROWS) _mm_prefetch(line, _MM_HINT_T1);
    else _mm_prefetch(line, _MM_HINT_T0);
}

// Add the products with one element of each row: sums[r][v] += weights[v] * values[r]. The outer
// loop's operand stays in registers: the weights, or the elements of few rows.
#define ADD_PRODUCTS(WEIGHTS, VALUE)                                                              \
    if (rows <= vectors) {                                                                        \
        vec values[MAX_TILE_ROWS];                                                                \
        UNROLL for (int r = 0; r < rows; r++) values[r] = v_set(VALUE);                           \
        UNROLL for (int v = 0; v < vectors; v++) {                                                \
            vec w = WEIGHTS;                                                                      \
            UNROLL for (int r = 0; r < rows; r++)                                                 \
                v_add_product(&sums[r][v], w, values[r]);                                         \
        }                                                                                         \
    } else {                                                                                      \
        vec w[4];                                                                                 \
        UNROLL for (int v = 0; v < vectors; v++) w[v] = WEIGHTS;                                  \
        UNROLL for (int r = 0; r < rows; r++) {                                                   \
            vec value = v_set(VALUE);                                                             \
            UNROLL for (int v = 0; v < vectors; v++)                                              \
                v_add_product(&sums[r][v], w[v], value);                                          \
        }                                                                                         \
    }

// Compute one tile: `rows` x `vectors` * LANES outputs, a part of a panel. It prefetches the same
// part of the next data.
ALWAYS void tile(enum dtype dtype, const int rows, const int vectors, const void *const *x,
                 const uint32_t *panel, long part, long units, float *out, long out_stride,
                 const struct fetched *fetched) {
    const int width = vectors * LANES, bytes = width * (int)sizeof *panel;
    const char *ahead = fetched->now + part * units * bytes;
    vec sums[MAX_TILE_ROWS][4];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < vectors; v++) sums[r][v] = v_set(0.0f);
    panel += part * width;
    for (long u = 0; u < units; u++, panel += PANEL, ahead += bytes) {
        if (u == fetched->turn) ahead = fetched->then;
        UNROLL for (int at = 0; at < bytes; at += CACHE_LINE_BYTES) fetch(rows, ahead + at);
#define LINE(V) (panel + (V) * LANES)
        if (dtype == FLOAT32) {
            ADD_PRODUCTS(v_bits(vi_load(LINE(v))), ((const float *)x[r])[u])
            continue;
        }
#ifdef __AVX512BF16__
        UNROLL for (int r = 0; r < rows; r++) {
            __m512bh value = (__m512bh)vi_set(((const int *)x[r])[u]);
            UNROLL for (int v = 0; v < vectors; v++)
                sums[r][v] = _mm512_dpbf16_ps(sums[r][v], (__m512bh)vi_load(LINE(v)), value);
        }
#else
        ADD_PRODUCTS(v_bits(vi_left(vi_load(LINE(v)), 16)), ((const float *)x[r])[2 * u])
        veci upper = vi_set((int)0xffff0000);
        ADD_PRODUCTS(v_bits(vi_and(vi_load(LINE(v)), upper)), ((const float *)x[r])[2 * u + 1])
#endif
#undef LINE
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < vectors; v++)
            v_store(out + r * out_stride + part * width + v * LANES, sums[r][v]);
}

// Compute all tiles of `rows` rows (a constant) with a panel.
ALWAYS void tiles(enum dtype dtype, const int rows, const void *const *x, const uint32_t *panel,
                  long units, float *out, long out_stride, const struct fetched *fetched) {
    const int vectors = TILE_VECTORS(rows);
    for (int part = 0; part < PANEL / (vectors * LANES); part++)
        tile(dtype, rows, vectors, x, panel, part, units, out, out_stride, fetched);
}

// out [num_rows, num_panels * PANEL] (rows `out_stride` apart) = rows x panels.
//
// x: pointers to rows with elements of row_element_bytes. totals: results of `find_totals`. weights:
// first panel. next: data that the caller is likely to read afterwards, prefetched during the last
// panel.
void panel_product(const struct layout *layout, long num_rows, const void *const *x,
                   const float *totals, const char *weights, long num_panels, float *out,
                   long out_stride, const char *next);

// Sum the elements of rows by block, for weights with zero points: totals [num_rows, num_totals].
// It takes a tenth of the time of a product with four panels, so callers keep the result.
void find_totals(const struct layout *layout, long num_rows, const void *const *x, float *totals);

#endif
