// Products of rows with packed weights.
//
// Packed weights are panels of 32 outputs; quantized.h describes those with codes. Others have a
// line of 128 bytes for each unit of the row: one float of every output, or two bfloat16 that follow
// each other in the row, the order of vdpbf16ps. So a panel is read once from its first byte to its
// last.
//
// Every output is a single chain of fused sums in the order of the row, in a lane of its own.
// Its bits depend on its row and its weights alone: not on other rows, tiles or threads.
#ifndef PRODUCT_H
#define PRODUCT_H

#include "layout.h"

// Elements of rows as the products read them: bfloat16 where the processor multiplies them.
#ifdef __AVX512BF16__
enum { ROWS_ARE_BF16 = 1 };
#else
enum { ROWS_ARE_BF16 = 0 };
#endif

// Rows of a tile at most: a row takes two registers for its sums, of 32 with AVX-512 and of 16
// without.
enum { MAX_TILE_ROWS = LANES == 16 ? 12 : 6 };

// Rows at most that are multiplied faster than memory gives the weights, so that their tile reads
// whole lines, one after the other.
enum { STREAM_ROWS = LANES == 16 ? MAX_TILE_ROWS : 2 };

// Vectors of outputs that a tile of so many rows computes: a panel, or half of one where a panel's
// sums take too many registers.
#define TILE_VECTORS(ROWS) (LANES == 8 && (ROWS) <= STREAM_ROWS ? 4 : 2)

// Bytes from a line that such a tile reads to the one that it fetches meanwhile. The processor's own
// prefetching ends with each page.
enum { PREFETCH_BYTES = 4096, CACHE_LINE_BYTES = 64 };

// What a tile fetches while it reads a panel: what is from `now` on, and from unit `turn` of the
// panel on what is from `then` on.
struct fetched {
    const char *now, *then;
    long turn;
};

// Bytes of an element of rows that are multiplied with weights of a type.
ALWAYS size_t row_element_bytes(enum dtype dtype) {
    return dtype == BFLOAT16 && ROWS_ARE_BF16 ? 2 : 4;
}

// Fetch a line of weights. For one row, which waits for the memory alone, into the second cache: it
// has more reads under way than the first one (27 in place of 24 GB/s on one core of an AMD EPYC,
// Zen 4; from two rows on the products lose more by it). So too for many rows, whose next panel
// would drive this one out of the first cache.
ALWAYS void fetch(const int rows, const char *line) {
    if (rows == 1 || rows > STREAM_ROWS) _mm_prefetch(line, _MM_HINT_T1);
    else _mm_prefetch(line, _MM_HINT_T0);
}

// Add the products with one element of each row: sums[r][v] += weights[v] * values[r]. What is
// outside is held in registers: the weights, or the elements of few rows.
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

// One tile: `rows` x `vectors` * LANES outputs, a part of a panel. Of what it fetches it takes the
// same part.
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

// All tiles of `rows` rows with a panel, the number a constant.
ALWAYS void tiles(enum dtype dtype, const int rows, const void *const *x, const uint32_t *panel,
                  long units, float *out, long out_stride, const struct fetched *fetched) {
    const int vectors = TILE_VECTORS(rows);
    for (int part = 0; part < PANEL / (vectors * LANES); part++)
        tile(dtype, rows, vectors, x, panel, part, units, out, out_stride, fetched);
}

// out [num_rows, num_panels * PANEL] (rows `out_stride` apart) = rows x panels.
//
// x: pointers to rows in the form of row_element_bytes. totals: those of `find_totals`. weights:
// first panel. next: what the caller is likely to read afterwards, fetched while the last panel is
// computed.
void panel_product(const struct layout *layout, long num_rows, const void *const *x,
                   const float *totals, const char *weights, long num_panels, float *out,
                   long out_stride, const char *next);

// The sums of the elements of rows by block, where weights have zero points: totals [num_rows,
// num_totals]. It takes a tenth of the time of a product with four panels, so callers keep them.
void find_totals(const struct layout *layout, long num_rows, const void *const *x, float *totals);

#endif
