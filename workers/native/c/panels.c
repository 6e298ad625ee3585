// Packed weights (see product.h) from rows, and back. A bijection but for the zeros that fill up
// the last panel.
#include "product.h"

enum { TRANSPOSED = 16 };  // units of a row that are moved together: a cache line

// The row of a lane of a panel; -1: none. In a gated matrix, the gate's rows and then those of up,
// a panel has 16 of each.
static long row_of(long panel, long lane, long num_rows, int is_gated) {
    long half = PANEL / 2;
    if (!is_gated) return panel * PANEL + lane < num_rows ? panel * PANEL + lane : -1;
    long column = panel * half + lane % half;
    if (column >= num_rows / 2) return -1;
    return lane < half ? column : num_rows / 2 + column;
}

static long num_panels(long num_rows, int is_gated) {
    return ((is_gated ? num_rows / 2 : num_rows) + PANEL / (is_gated ? 2 : 1) - 1) /
           (PANEL / (is_gated ? 2 : 1));
}

// rows [num_rows, units] -> packed [panels, units, PANEL].
void panels_pack(uint32_t *packed, const uint32_t *rows, long num_rows, long units, int is_gated) {
    for (long panel = 0; panel < num_panels(num_rows, is_gated); panel++)
        for (long begin = 0; begin < units; begin += TRANSPOSED) {
            long end = begin + TRANSPOSED < units ? begin + TRANSPOSED : units;
            for (long lane = 0; lane < PANEL; lane++) {
                long row = row_of(panel, lane, num_rows, is_gated);
                uint32_t *to = packed + panel * units * PANEL + lane;
                for (long u = begin; u < end; u++)
                    to[u * PANEL] = row < 0 ? 0 : rows[row * units + u];
            }
        }
}

// packed [panels, units, PANEL] -> rows [num_rows, units].
void panels_unpack(uint32_t *rows, const uint32_t *packed, long num_rows, long units,
                   int is_gated) {
    for (long panel = 0; panel < num_panels(num_rows, is_gated); panel++)
        for (long begin = 0; begin < units; begin += TRANSPOSED) {
            long end = begin + TRANSPOSED < units ? begin + TRANSPOSED : units;
            for (long lane = 0; lane < PANEL; lane++) {
                long row = row_of(panel, lane, num_rows, is_gated);
                const uint32_t *from = packed + panel * units * PANEL + lane;
                for (long u = begin; row >= 0 && u < end; u++)
                    rows[row * units + u] = from[u * PANEL];
            }
        }
}
