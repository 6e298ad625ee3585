#include "product.h"

// One function for each number of rows: the compiler keeps all sums of a tile in registers.
#define ROWS(NAME, DTYPE, COUNT)                                                                  \
    static void NAME##_##COUNT(const void *const *x, const uint32_t *panel, long units,           \
                               float *out, long out_stride, const struct fetched *fetched) {      \
        tiles(DTYPE, COUNT, x, panel, units, out, out_stride, fetched);                           \
    }
#define FEW_ROWS(NAME, DTYPE)                                                                     \
    ROWS(NAME, DTYPE, 1) ROWS(NAME, DTYPE, 2) ROWS(NAME, DTYPE, 3)                                \
    ROWS(NAME, DTYPE, 4) ROWS(NAME, DTYPE, 5) ROWS(NAME, DTYPE, 6)
#define FEW(NAME) NAME##_1, NAME##_2, NAME##_3, NAME##_4, NAME##_5, NAME##_6
#ifdef __AVX512F__
#define ALL_ROWS(NAME, DTYPE)                                                                     \
    FEW_ROWS(NAME, DTYPE)                                                                         \
    ROWS(NAME, DTYPE, 7) ROWS(NAME, DTYPE, 8) ROWS(NAME, DTYPE, 9)                                \
    ROWS(NAME, DTYPE, 10) ROWS(NAME, DTYPE, 11) ROWS(NAME, DTYPE, 12)
#define TABLE(NAME) {FEW(NAME), NAME##_7, NAME##_8, NAME##_9, NAME##_10, NAME##_11, NAME##_12}
#else
#define ALL_ROWS FEW_ROWS
#define TABLE(NAME) {FEW(NAME)}
#endif
ALL_ROWS(float32, FLOAT32)
ALL_ROWS(bf16, BFLOAT16)

typedef void tile_rows(const void *const *x, const uint32_t *panel, long units, float *out,
                       long out_stride, const struct fetched *fetched);

static tile_rows *const TILE_ROWS[2][MAX_TILE_ROWS] = {TABLE(float32), TABLE(bf16)};

void panel_product(enum dtype dtype, long num_rows, const void *const *x, const uint32_t *weights,
                   long units, long num_panels, float *out, long out_stride, const void *next) {
    // More rows than a stream's: the panel stays in the cache for all of its tiles, the first of
    // which fetches the next panel.
    int is_stream = num_rows <= STREAM_ROWS;
    long turn = is_stream ? units - PREFETCH_BYTES / (PANEL * (long)sizeof *weights) : units;
    for (long p = 0; p < num_panels; p++) {
        const uint32_t *panel = panel_at(weights, units, p);
        const char *after = p + 1 < num_panels ? (const char *)panel_at(panel, units, 1) : next;
        struct fetched fetched = {
            .now = is_stream && turn > 0 ? (const char *)panel + PREFETCH_BYTES : after,
            .then = after,
            .turn = turn,
        };
        for (long row = 0; row < num_rows;) {
            long rows = num_rows - row < MAX_TILE_ROWS ? num_rows - row : MAX_TILE_ROWS;
            float *to = out + row * out_stride + p * PANEL;
            TILE_ROWS[dtype][rows - 1](x + row, panel, units, to, out_stride, &fetched);
            row += rows;
            fetched = (struct fetched){(const char *)panel, NULL, units};  // in the cache
        }
    }
}
