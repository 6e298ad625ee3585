// Packed weights (see product.h) from rows, and back. A bijection but for the zeros that fill up
// the last panel.
#include <stdatomic.h>
#include <string.h>

#include "product.h"
#include "team.h"

enum { UNIT = 4 };        // bytes
enum { SQUARE = 8 };      // units and rows that are transposed in registers
enum { UNPACKED = 16 };   // units of a row that are moved together: a cache line

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

// 8 units of 8 rows (NULL: zeros) -> a line of 8 lanes for each unit, PANEL apart.
ALWAYS void transpose(uint32_t *to, const char *const *rows, long unit) {
    __m256 a[SQUARE], b[SQUARE];
    UNROLL for (int i = 0; i < SQUARE; i++)
        a[i] = rows[i] ? _mm256_loadu_ps((const float *)(rows[i] + unit * UNIT)) : _mm256_setzero_ps();
    UNROLL for (int i = 0; i < SQUARE; i += 2) {  // pairs of rows
        b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    }
    UNROLL for (int i = 0; i < SQUARE; i += 4)  // four rows
        UNROLL for (int j = 0; j < 2; j++) {
            a[i + 2 * j] = _mm256_shuffle_ps(b[i + j], b[i + j + 2], 0x44);
            a[i + 2 * j + 1] = _mm256_shuffle_ps(b[i + j], b[i + j + 2], 0xee);
        }
    UNROLL for (int i = 0; i < SQUARE / 2; i++) {
        __m256 low = _mm256_permute2f128_ps(a[i], a[i + 4], 0x20);
        __m256 high = _mm256_permute2f128_ps(a[i], a[i + 4], 0x31);
        _mm256_storeu_ps((float *)(to + i * PANEL), low);
        _mm256_storeu_ps((float *)(to + (i + 4) * PANEL), high);
    }
}

// rows [PANEL] of `units` units -> packed [units, PANEL].
static void pack_panel(uint32_t *packed, const char *const *rows, long units) {
    long unit = 0;
    for (; unit + SQUARE <= units; unit += SQUARE)
        UNROLL for (int lane = 0; lane < PANEL; lane += SQUARE)
            transpose(packed + unit * PANEL + lane, rows + lane, unit);
    for (; unit < units; unit++)
        for (int lane = 0; lane < PANEL; lane++) {
            uint32_t *to = packed + unit * PANEL + lane;
            *to = 0;
            if (rows[lane]) memcpy(to, rows[lane] + unit * UNIT, UNIT);
        }
}

struct job {
    uint32_t *packed;
    const char *rows;
    long num_rows, units, stride;
    int is_gated;
    _Atomic long next;  // panel
};

static void pack_some(void *argument, struct team *team, int thread, int count) {
    (void)team, (void)thread, (void)count;
    struct job *job = argument;
    const char *rows[PANEL];
    long panel, last = num_panels(job->num_rows, job->is_gated);
    while ((panel = atomic_fetch_add(&job->next, 1)) < last) {
        for (int lane = 0; lane < PANEL; lane++) {
            long row = row_of(panel, lane, job->num_rows, job->is_gated);
            rows[lane] = row < 0 ? NULL : job->rows + row * job->units * UNIT;
        }
        pack_panel(job->packed + panel * job->stride, rows, job->units);
    }
}

// rows [num_rows, units], which need no alignment, -> packed [panels, units, PANEL], panels `stride`
// words apart. A team that is NULL is the caller alone. Returns an `enum result`.
int panels_pack(struct team *team, uint32_t *packed, const char *rows, long num_rows, long units,
                long stride, int is_gated) {
    struct job job = {packed, rows, num_rows, units, stride, is_gated, 0};
    if (!team) {
        pack_some(&job, NULL, 0, 1);
        return OK;
    }
    if (!team_claim(team)) return BUSY;
    team_run(team, pack_some, &job, 0);
    team_release(team);
    return OK;
}

// packed [panels, units, PANEL], panels `stride` words apart -> rows [num_rows, units].
void panels_unpack(uint32_t *rows, const uint32_t *packed, long num_rows, long units,
                   long stride, int is_gated) {
    for (long panel = 0; panel < num_panels(num_rows, is_gated); panel++)
        for (long begin = 0; begin < units; begin += UNPACKED) {
            long end = begin + UNPACKED < units ? begin + UNPACKED : units;
            for (long lane = 0; lane < PANEL; lane++) {
                long row = row_of(panel, lane, num_rows, is_gated);
                const uint32_t *from = packed + panel * stride + lane;
                for (long u = begin; row >= 0 && u < end; u++)
                    rows[row * units + u] = from[u * PANEL];
            }
        }
}
