// Packing of rows into panels (see product.h), and unpacking. A bijection except for the zeros that
// pad the last panel.
#include <stdatomic.h>
#include <string.h>

#include "product.h"
#include "team.h"

enum { UNIT = 4 };        // bytes
enum { SQUARE = 8 };      // units and rows that are transposed in registers
enum { UNPACKED = 16 };   // units of a row that are copied together: a cache line

// Row in a lane of a panel, or -1. A gated matrix has gate rows followed by up rows; its panels have
// 16 of each.
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

// Transpose 8 units of 8 rows (NULL: zeros) to a line of 8 lanes for each unit, PANEL apart.
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

// Placement of the lines of a panel, one for each unit: runs of `in_run` lines, separated by `gap`
// words.
struct lines {
    long in_run, gap;
};

ALWAYS long line_at(const struct lines *lines, long unit) {
    return unit * PANEL + unit / lines->in_run * lines->gap;
}

// Pack rows [PANEL] of `units` units into lines.
static void pack_panel(uint32_t *packed, const char *const *rows, long units,
                       const struct lines *lines) {
    uint32_t found[SQUARE * PANEL];
    for (long unit = 0; unit < units; unit += SQUARE) {
        long count = units - unit < SQUARE ? units - unit : SQUARE;
        if (count == SQUARE) {
            UNROLL for (int lane = 0; lane < PANEL; lane += SQUARE)
                transpose(found + lane, rows + lane, unit);
        } else {
            for (long i = 0; i < count; i++)
                for (int lane = 0; lane < PANEL; lane++) {
                    found[i * PANEL + lane] = 0;
                    if (rows[lane])
                        memcpy(found + i * PANEL + lane, rows[lane] + (unit + i) * UNIT, UNIT);
                }
        }
        for (long i = 0; i < count; i++)
            memcpy(packed + line_at(lines, unit + i), found + i * PANEL, PANEL * UNIT);
    }
}

struct job {
    uint32_t *packed;
    const char *rows;
    long num_rows, units, stride;
    struct lines lines;
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
        pack_panel(job->packed + panel * job->stride, rows, job->units, &job->lines);
    }
}

// Pack rows [num_rows, units], which need no alignment, into packed [panels, units, PANEL]; panels
// are `stride` words apart, with `gap` words between runs of `in_run` units. `team` NULL: only the
// caller computes. Returns an `enum result`.
int panels_pack(struct team *team, uint32_t *packed, const char *rows, long num_rows, long units,
                long stride, long in_run, long gap, int is_gated) {
    struct job job = {packed, rows, num_rows, units, stride, {in_run, gap}, is_gated, 0};
    if (!team) {
        pack_some(&job, NULL, 0, 1);
        return OK;
    }
    if (!team_claim(team)) return BUSY;
    team_run(team, pack_some, &job, 0);
    team_release(team);
    return OK;
}

// Inverse of `panels_pack`.
void panels_unpack(uint32_t *rows, const uint32_t *packed, long num_rows, long units,
                   long stride, long in_run, long gap, int is_gated) {
    struct lines lines = {in_run, gap};
    for (long panel = 0; panel < num_panels(num_rows, is_gated); panel++)
        for (long begin = 0; begin < units; begin += UNPACKED) {
            long end = begin + UNPACKED < units ? begin + UNPACKED : units, places[UNPACKED];
            for (long u = begin; u < end; u++) places[u - begin] = line_at(&lines, u);
            for (long lane = 0; lane < PANEL; lane++) {
                long row = row_of(panel, lane, num_rows, is_gated);
                const uint32_t *from = packed + panel * stride + lane;
                for (long u = begin; row >= 0 && u < end; u++)
                    rows[row * units + u] = from[places[u - begin]];
            }
        }
}
