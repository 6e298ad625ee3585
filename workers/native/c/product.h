// Products of rows with packed weights.
//
// Packed weights are panels of 32 outputs. A panel has a line of 128 bytes for each unit of the
// row: one float of every output, or two bfloat16 that follow each other in the row, the order of
// vdpbf16ps. So a panel is read once from its first byte to its last.
//
// Every output is a single chain of fused sums in the order of the row, in a lane of its own.
// Its bits depend on its row and its weights alone: not on other rows, tiles or threads.
#ifndef PRODUCT_H
#define PRODUCT_H

#include <stddef.h>

#include "vector.h"

enum { PANEL = 32 };        // outputs
enum { BLOCK = 2 * LANES };  // outputs that a tile computes together: a panel, or half of one

enum dtype { FLOAT32 = 0, BFLOAT16 = 1, E4M3 = 2 };  // E4M3: KV caches alone, see fp8.h

// Elements of rows as the products read them: bfloat16 where the processor multiplies them.
#ifdef __AVX512BF16__
enum { ROWS_ARE_BF16 = 1 };
#else
enum { ROWS_ARE_BF16 = 0 };
#endif

// Rows of a tile: its sums are in two registers a row, of 32 with AVX-512 and of 16 without.
enum { MAX_TILE_ROWS = LANES == 16 ? 12 : 4 };

// Bytes ahead of which weights are fetched. The processor's own prefetching ends with each page.
enum { PREFETCH_BYTES = 4096 };

// Bytes of an element of rows that are multiplied with weights of a type.
ALWAYS size_t row_element_bytes(enum dtype dtype) {
    return dtype == BFLOAT16 && ROWS_ARE_BF16 ? 2 : 4;
}

// Units of a packed row of `width` elements; an odd bfloat16 row has a zero at its end.
ALWAYS long row_units(enum dtype dtype, long width) {
    return dtype == BFLOAT16 ? (width + 1) / 2 : width;
}

ALWAYS const uint32_t *panel_at(const void *packed, long units, long panel) {
    return (const uint32_t *)packed + panel * units * PANEL;
}

// One tile: `rows` x `blocks` * BLOCK outputs. `weights` is the first block's first line.
ALWAYS void tile(enum dtype dtype, const int rows, const int blocks, const void *const *x,
                 const uint32_t *weights, long block_of_panel, long units, float *out,
                 long out_stride) {
    vec sums[MAX_TILE_ROWS][4][2];
    const uint32_t *lines[4];
    UNROLL for (int b = 0; b < blocks; b++) {
        long block = block_of_panel + b;  // from the panel of `weights` on
        lines[b] = weights + block * BLOCK / PANEL * units * PANEL + block * BLOCK % PANEL;
        UNROLL for (int r = 0; r < rows; r++) sums[r][b][0] = sums[r][b][1] = v_set(0.0f);
    }
    for (long u = 0; u < units; u++) {
        UNROLL for (int b = 0; b < blocks; b++) {
            const uint32_t *line = lines[b] + u * PANEL;
            UNROLL for (int at = 0; at < (int)(BLOCK * sizeof *line); at += 64)
                _mm_prefetch((const char *)line + PREFETCH_BYTES + at, _MM_HINT_T0);
            veci w0 = vi_load(line), w1 = vi_load(line + LANES);
            if (dtype == FLOAT32) {
                UNROLL for (int r = 0; r < rows; r++) {
                    vec value = v_set(((const float *)x[r])[u]);
                    sums[r][b][0] = v_fma(v_bits(w0), value, sums[r][b][0]);
                    sums[r][b][1] = v_fma(v_bits(w1), value, sums[r][b][1]);
                }
                continue;
            }
#ifdef __AVX512BF16__
            UNROLL for (int r = 0; r < rows; r++) {
                __m512bh value = (__m512bh)vi_set(((const int *)x[r])[u]);
                sums[r][b][0] = _mm512_dpbf16_ps(sums[r][b][0], (__m512bh)w0, value);
                sums[r][b][1] = _mm512_dpbf16_ps(sums[r][b][1], (__m512bh)w1, value);
            }
#else
            vec even0 = v_bits(vi_left(w0, 16)), even1 = v_bits(vi_left(w1, 16));
            UNROLL for (int r = 0; r < rows; r++) {
                vec value = v_set(((const float *)x[r])[2 * u]);
                sums[r][b][0] = v_fma(even0, value, sums[r][b][0]);
                sums[r][b][1] = v_fma(even1, value, sums[r][b][1]);
            }
            veci upper = vi_set((int)0xffff0000);
            vec odd0 = v_bits(vi_and(w0, upper)), odd1 = v_bits(vi_and(w1, upper));
            UNROLL for (int r = 0; r < rows; r++) {
                vec value = v_set(((const float *)x[r])[2 * u + 1]);
                sums[r][b][0] = v_fma(odd0, value, sums[r][b][0]);
                sums[r][b][1] = v_fma(odd1, value, sums[r][b][1]);
            }
#endif
        }
    }
    UNROLL for (int r = 0; r < rows; r++) {
        UNROLL for (int b = 0; b < blocks; b++) {
            v_store(out + r * out_stride + b * BLOCK, sums[r][b][0]);
            v_store(out + r * out_stride + b * BLOCK + LANES, sums[r][b][1]);
        }
    }
}

// All tiles of `rows` rows, the number a constant. Few rows take more blocks at a time: a chain
// waits for its last sum, and 8 chains keep the processor busy.
ALWAYS void tiles(enum dtype dtype, const int rows, const void *const *x, const uint32_t *weights,
                  long units, long num_panels, float *out, long out_stride) {
    const int blocks = rows <= MAX_TILE_ROWS / 4 ? 4 : rows <= MAX_TILE_ROWS / 2 ? 2 : 1;
    long num_blocks = num_panels * (PANEL / BLOCK), block = 0;
    for (; block + blocks <= num_blocks; block += blocks)
        tile(dtype, rows, blocks, x, weights, block, units, out + block * BLOCK, out_stride);
    if (blocks > 1)
        for (; block < num_blocks; block++)
            tile(dtype, rows, 1, x, weights, block, units, out + block * BLOCK, out_stride);
}

// out [num_rows, num_panels * PANEL] (rows `out_stride` apart) = rows x panels.
//
// x: pointers to rows of `units` units in the form of row_element_bytes. weights: first panel.
void panel_product(enum dtype dtype, long num_rows, const void *const *x, const uint32_t *weights,
                   long units, long num_panels, float *out, long out_stride);

#endif
