#include "product.h"

// One function for each number of rows: the compiler keeps all sums of a tile in registers.
#define ROWS(NAME, DTYPE, COUNT)                                                                  \
    static void NAME##_##COUNT(const void *const *x, const uint32_t *weights, long units,         \
                               long num_panels, float *out, long out_stride,                     \
                               const char *ahead) {                                               \
        tiles(DTYPE, COUNT, x, weights, units, num_panels, out, out_stride, ahead);               \
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

typedef void tile_rows(const void *const *x, const uint32_t *weights, long units, long num_panels,
                       float *out, long out_stride, const char *ahead);

static tile_rows *const TILE_ROWS[2][MAX_TILE_ROWS] = {TABLE(float32), TABLE(bf16)};

void panel_product(enum dtype dtype, long num_rows, const void *const *x, const uint32_t *weights,
                   long units, long num_panels, float *out, long out_stride, const void *next) {
    // More rows take the panels one by one: each stays in the cache for all of its tiles, the first
    // of which fetches the next one.
    int is_stream = num_rows <= STREAM_ROWS;
    long at_once = is_stream ? num_panels : 1;
    for (long panel = 0; panel < num_panels; panel += at_once) {
        const uint32_t *first = panel_at(weights, units, panel);
        const void *after = panel + 1 < num_panels ? panel_at(first, units, 1) : next;
        const char *ahead = is_stream ? (const char *)first + PREFETCH_BYTES : after;
        for (long row = 0; row < num_rows;) {
            long rows = num_rows - row < MAX_TILE_ROWS ? num_rows - row : MAX_TILE_ROWS;
            float *to = out + row * out_stride + panel * PANEL;
            TILE_ROWS[dtype][rows - 1](x + row, first, units, at_once, to, out_stride, ahead);
            row += rows;
            ahead = (const char *)first;  // in the cache: nothing to fetch
        }
    }
}
