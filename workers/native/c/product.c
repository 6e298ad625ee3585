#include "quantized.h"

// One function for each number of rows, so that the compiler keeps all sums of a tile in registers.
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

void panel_product(const struct layout *layout, long num_rows, const void *const *x,
                   const float *totals, const char *weights, long num_panels, float *out,
                   long out_stride, const char *next) {
    if (layout->form.codes != PLAIN) {
        quantized_product(layout, num_rows, x, totals, weights, num_panels, out, out_stride, next);
        return;
    }
    // With more rows than in a stream, the panel stays in the cache for all of its tiles, and the
    // first tile fetches the next panel.
    int is_stream = num_rows <= STREAM_ROWS;
    long units = layout->units, turn = is_stream ? units - PREFETCH_BYTES / (PANEL * 4) : units;
    for (long p = 0; p < num_panels; p++) {
        const char *panel = panel_at(weights, layout, p);
        const char *after = p + 1 < num_panels ? panel_at(panel, layout, 1) : next;
        struct fetched fetched = {
            .now = is_stream && turn > 0 ? panel + PREFETCH_BYTES : after,
            .then = after,
            .turn = turn,
        };
        for (long row = 0; row < num_rows;) {
            long rows = num_rows - row < MAX_TILE_ROWS ? num_rows - row : MAX_TILE_ROWS;
            float *to = out + row * out_stride + p * PANEL;
            const uint32_t *lines = (const uint32_t *)panel;
            TILE_ROWS[layout->dtype][rows - 1](x + row, lines, units, to, out_stride, &fetched);
            row += rows;
            fetched = (struct fetched){panel, NULL, units};  // it is in the cache
        }
    }
}
