#include "quantized.h"

#include "codes.h"

// Rows of a tile at most, and the vectors of outputs that it computes: each has two chains.
enum { BLOCK_ROWS = LANES == 16 ? 6 : 2, VECTORS = 2, CHAINS = 2 };

// Bytes from codes that are read to those that are fetched meanwhile. Fetched past the second cache, 4
// layers of OLMoE-1B-7B in int8 and int4 make 1.04 and 1.09 times the tokens a second on Zen 5.
enum { AHEAD_BYTES = 8192 };

// ---- products -----------------------------------------------------------------------------------

// Some blocks of a panel.
struct chunk {
    const uint32_t *words;  // of codes, or pairs: [.., PANEL]
    long first_unit, units, block_units;  // the last block may be shorter
    struct numbers numbers;
    const char *ahead;    // what is fetched meanwhile: as much as is read
    enum scales type;
    const char *scales;   // of the panel
    const int8_t *zeros;  // of the panel; NULL: there are none
    long first_at;        // place of the first block's scales among them
    const float *totals;  // sums of each row's elements by block, where there are zero points
    long totals_stride;
    float unit, inverse;  // of what `pair_at` finds, and 1 / unit
};

ALWAYS void add_pair(enum dtype dtype, vec *sum, veci pair, const void *x, long unit) {
#ifdef __AVX512BF16__
    if (dtype == BFLOAT16) {
        __m512bh value = (__m512bh)vi_set(((const int *)x)[unit]);
        *sum = _mm512_dpbf16_ps(*sum, (__m512bh)pair, value);
        return;
    }
#endif
    (void)dtype;
    const float *values = (const float *)x + 2 * unit;
    v_add_product(sum, v_bits(vi_left(pair, 16)), v_set(values[0]));
    v_add_product(sum, v_bits(vi_and(pair, vi_set((int)0xffff0000))), v_set(values[1]));
}

// Where a tile reads.
struct place {
    const uint32_t *words;
    const char *ahead;
    long unit;
};

// The sums of one block: `units` pairs of elements from `place` on, which moves behind them.
ALWAYS void add_block(const enum source source, enum dtype dtype, const int rows,
                      const void *const *x, long units, const struct numbers *numbers,
                      struct place *place, vec sums[BLOCK_ROWS][VECTORS][CHAINS]) {
    const int pairs = PAIRS_OF(source), width = VECTORS * LANES;
    const uint32_t *words = place->words;
    const char *ahead = place->ahead;
    long unit = place->unit, end = unit + units;
    // With one pair in a word, two words make the chains alternate.
    const int lines = pairs == 1 ? CHAINS : 1;
    for (; unit + lines * pairs <= end;)
        UNROLL for (int line = 0; line < lines; line++) {
            if (source != DECODED)
                UNROLL for (int at = 0; at < width * WORD; at += CACHE_LINE_BYTES)
                    _mm_prefetch(ahead + at, _MM_HINT_NTA);
            veci stored[VECTORS];
            UNROLL for (int v = 0; v < VECTORS; v++) stored[v] = vi_load(words + v * LANES);
            UNROLL for (int j = 0; j < pairs; j++, unit++)
                UNROLL for (int v = 0; v < VECTORS; v++) {
                    veci pair = pair_at(source, stored[v], j, numbers);
                    UNROLL for (int r = 0; r < rows; r++)
                        add_pair(dtype, &sums[r][v][(j + line) % CHAINS], pair, x[r], unit);
                }
            words += PANEL;
            ahead += PANEL * WORD;
        }
    // The last word of a row that does not fill it.
    if (unit < end) {
        UNROLL for (int j = 0; j < pairs; j++) {
            if (unit + j >= end) break;
            UNROLL for (int v = 0; v < VECTORS; v++) {
                veci pair = pair_at(source, vi_load(words + v * LANES), j, numbers);
                UNROLL for (int r = 0; r < rows; r++)
                    add_pair(dtype, &sums[r][v][j % CHAINS], pair, x[r], unit + j);
            }
        }
        words += PANEL;
    }
    *place = (struct place){words, ahead, end};
}

// out += a chunk of `rows` rows x a part of a panel.
ALWAYS void add_tile(const enum source source, enum dtype dtype, const int rows,
                     const void *const *x, const struct chunk *chunk, long part, float *out,
                     long out_stride) {
    const int width = VECTORS * LANES;
    struct place place = {chunk->words + part * width, chunk->ahead + part * width * WORD,
                          chunk->first_unit};
    struct numbers numbers = chunk->numbers;
    vec outputs[BLOCK_ROWS][VECTORS];
    out += part * width;
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < VECTORS; v++)
            outputs[r][v] = v_load(out + r * out_stride + v * LANES);
    long end = chunk->first_unit + chunk->units, at = chunk->first_at + part * width;
    for (long block = 0; place.unit < end; block++, at += PANEL) {
        vec sums[BLOCK_ROWS][VECTORS][CHAINS];
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int v = 0; v < VECTORS; v++)
                UNROLL for (int c = 0; c < CHAINS; c++) sums[r][v][c] = v_set(0.0f);
        long left = end - place.unit;
        long units = left < chunk->block_units ? left : chunk->block_units;
        add_block(source, dtype, rows, x, units, &numbers, &place, sums);
        UNROLL for (int v = 0; v < VECTORS; v++) {
            vec scale = load_scales(chunk->scales, chunk->type, at + v * LANES);
            if (source == FROM_INT8 || source == DECODED)
                scale = v_mul(scale, v_set(chunk->unit));
            UNROLL for (int r = 0; r < rows; r++) {
                vec sum = v_add(sums[r][v][0], sums[r][v][1]);
                if (chunk->zeros) {
                    vec total = v_set(chunk->totals[r * chunk->totals_stride + block]);
                    vec zero = load_int8(chunk->zeros + at + v * LANES);
                    sum = v_sub(sum, v_mul(v_mul(zero, v_set(chunk->inverse)), total));
                }
                outputs[r][v] = v_fma(scale, sum, outputs[r][v]);
            }
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < VECTORS; v++)
            v_store(out + r * out_stride + v * LANES, outputs[r][v]);
}

typedef void add_rows(const void *const *x, const struct chunk *chunk, float *out, long out_stride);

// One function for each source, type and number of rows: all sums of a tile stay in registers.
#define ROWS(SOURCE, DTYPE, COUNT)                                                                \
    static void add_##SOURCE##_##DTYPE##_##COUNT(const void *const *x, const struct chunk *chunk, \
                                                  float *out, long out_stride) {                  \
        for (long part = 0; part < PANEL / (VECTORS * LANES); part++)                        \
            add_tile(SOURCE, DTYPE, COUNT, x, chunk, part, out, out_stride);                          \
    }
#ifdef __AVX512F__
#define ALL_ROWS(SOURCE, DTYPE)                                                                   \
    ROWS(SOURCE, DTYPE, 1) ROWS(SOURCE, DTYPE, 2) ROWS(SOURCE, DTYPE, 3)                          \
    ROWS(SOURCE, DTYPE, 4) ROWS(SOURCE, DTYPE, 5) ROWS(SOURCE, DTYPE, 6)
#define NAMES(SOURCE, DTYPE)                                                                      \
    {add_##SOURCE##_##DTYPE##_1, add_##SOURCE##_##DTYPE##_2, add_##SOURCE##_##DTYPE##_3,       \
     add_##SOURCE##_##DTYPE##_4, add_##SOURCE##_##DTYPE##_5, add_##SOURCE##_##DTYPE##_6}
#else
#define ALL_ROWS(SOURCE, DTYPE) ROWS(SOURCE, DTYPE, 1) ROWS(SOURCE, DTYPE, 2)
#define NAMES(SOURCE, DTYPE) {add_##SOURCE##_##DTYPE##_1, add_##SOURCE##_##DTYPE##_2}
#endif
#define ALL_SOURCES(DTYPE)                                                                        \
    ALL_ROWS(FROM_INT8, DTYPE) ALL_ROWS(FROM_FLOAT8, DTYPE)                                       \
    ALL_ROWS(FROM_4_BITS, DTYPE) ALL_ROWS(DECODED, DTYPE)
#define ALL_NAMES(DTYPE)                                                                          \
    {NAMES(FROM_INT8, DTYPE), NAMES(FROM_FLOAT8, DTYPE), NAMES(FROM_4_BITS, DTYPE),               \
     NAMES(DECODED, DTYPE)}
ALL_SOURCES(FLOAT32)
#ifdef __AVX512BF16__
ALL_SOURCES(BFLOAT16)
static add_rows *const ADD_ROWS[2][4][BLOCK_ROWS] = {ALL_NAMES(FLOAT32), ALL_NAMES(BFLOAT16)};
#else
// Rows of bfloat16 come as float.
static add_rows *const ADD_ROWS[2][4][BLOCK_ROWS] = {ALL_NAMES(FLOAT32), ALL_NAMES(FLOAT32)};
#endif

// ---- panels -------------------------------------------------------------------------------------

static enum source source_of(int64_t codes) {
    return codes == INT8 ? FROM_INT8 : codes == FLOAT8 ? FROM_FLOAT8 : FROM_4_BITS;
}

// The pairs of a chunk: pairs [units, PANEL].
ALWAYS void decode(const enum source source, const struct chunk *chunk, uint32_t *pairs) {
    const int in_word = PAIRS_OF(source);
    struct numbers numbers = chunk->numbers;
    const uint32_t *words = chunk->words;
    const char *ahead = chunk->ahead;
    for (long unit = 0; unit < chunk->units; words += PANEL, ahead += PANEL * WORD) {
        UNROLL for (int at = 0; at < PANEL * WORD; at += CACHE_LINE_BYTES)
            _mm_prefetch(ahead + at, _MM_HINT_T1);
        UNROLL for (int j = 0; j < in_word; j++, unit++)  // some behind the last one: see `pairs`
            UNROLL for (int v = 0; v < PANEL; v += LANES)
                vi_store(pairs + unit * PANEL + v,
                         pair_at(source, vi_load(words + v), j, &numbers));
    }
}

static void decode_chunk(enum source source, const struct chunk *chunk, uint32_t *pairs) {
    if (source == FROM_INT8) decode(FROM_INT8, chunk, pairs);
    else if (source == FROM_FLOAT8) decode(FROM_FLOAT8, chunk, pairs);
    else decode(FROM_4_BITS, chunk, pairs);
}

// How rows are cut: chunks of blocks, or parts of a group that are blocks and chunks.
struct cut {
    long group_units, block_units, chunk_units, num_blocks;
};

static struct cut cut_of(const struct layout *layout, int is_decoded) {
    long group = layout->form.group < 2 * layout->units ? (long)layout->form.group / 2
                                                        : layout->units;
    struct cut cut = {.group_units = group, .block_units = group, .chunk_units = group};
    if (group > BLOCK_UNITS) cut.block_units = cut.chunk_units = BLOCK_UNITS;
    else cut.chunk_units = is_decoded ? BLOCK_UNITS / group * group : layout->units;
    long in_group = (group + cut.block_units - 1) / cut.block_units;
    cut.num_blocks = in_group * layout->num_groups;
    return cut;
}

// The sums of a row's elements by block.
static void find_totals(const struct layout *layout, const struct cut *cut, const void *x,
                        float *totals) {
    enum dtype stored = layout->dtype == BFLOAT16 && ROWS_ARE_BF16 ? BFLOAT16 : FLOAT32;
    for (long first = 0, units; first < layout->units; first += units) {
        units = cut->group_units - first % cut->group_units;
        if (units > cut->block_units) units = cut->block_units;
        if (units > layout->units - first) units = layout->units - first;
        vec lanes[PARTS];
        UNROLL for (int i = 0; i < PARTS; i++) lanes[i] = v_set(0.0f);
        for (long e = 0; e < 2 * units; e += WIDE)
            UNROLL for (int i = 0; i < PARTS; i++) {
                long left = 2 * units - e - i * LANES;
                if (left > 0)
                    lanes[i] = v_add(lanes[i], load_some(x, 2 * (first + units) - left, left, stored));
            }
        *totals++ = wide_sum(lanes);
    }
}

// The chunk of a panel from unit `first` on, and what is fetched while it is read.
static void find_chunk(const struct layout *layout, const struct cut *cut, const char *panel,
                       const char *after, long first, long in_word, struct chunk *chunk) {
    long group = first / cut->group_units, left = layout->units - first;
    if (cut->block_units < cut->group_units) {
        long in_group = cut->group_units - first % cut->group_units;
        if (in_group < left) left = in_group;
    }
    chunk->first_unit = first;
    if (left > cut->chunk_units) left = cut->chunk_units;
    chunk->words = (const uint32_t *)(panel + layout->header_bytes) + first / in_word * PANEL;
    chunk->scales = panel;
    chunk->first_at = group * PANEL;
    size_t header = layout->header_bytes, size = layout->panel_bytes - header;
    size_t at = (size_t)((const char *)chunk->words - panel) - header, to = at + AHEAD_BYTES;
    chunk->ahead = to < size ? panel + header + to : after + header + (to - size);
    if (to < size) {  // up to where the next panel is fetched
        long blocks = (long)(size - to) * in_word / (PANEL * WORD) / cut->block_units + 1;
        if (left > blocks * cut->block_units) left = blocks * cut->block_units;
    }
    chunk->units = left;
    // Of the next panel's scales the same part.
    size_t own = (size_t)left * PANEL * WORD / (size_t)in_word;
    for (size_t i = at * header / size; i < (at + own) * header / size; i += CACHE_LINE_BYTES)
        _mm_prefetch(after + i, _MM_HINT_T1);
}

void quantized_product(const struct layout *layout, long num_rows, const void *const *x,
                       const char *weights, long num_panels, float *out, long out_stride,
                       const char *next) {
    enum source source = source_of(layout->form.codes);
    enum source of_tile = num_rows > BLOCK_ROWS ? DECODED : source;
    struct cut cut = cut_of(layout, of_tile == DECODED);
    uint32_t pairs[(BLOCK_UNITS + 4) * PANEL] __attribute__((aligned(64)));
    float totals[layout->form.has_zeros ? num_rows * cut.num_blocks : 1];
    float unit = source == FROM_INT8 ? INT8_UNIT : 1.0f;
    struct chunk chunk = {.numbers = load_numbers(layout->form.codes),
                          .block_units = cut.block_units,
                          .type = (enum scales)layout->form.scales,
                          .totals_stride = cut.num_blocks,
                          .unit = unit,
                          .inverse = 1.0f / unit};
    size_t zeros_at = (size_t)layout->num_groups * PANEL * scale_bytes(layout->form);
    for (long r = 0; r < num_rows && layout->form.has_zeros; r++)
        find_totals(layout, &cut, x[r], totals + r * cut.num_blocks);
    for (long p = 0; p < num_panels; p++, out += PANEL) {
        const char *panel = panel_at(weights, layout, p);
        const char *after = p + 1 < num_panels ? panel_at(panel, layout, 1) : next;
        if (layout->form.has_zeros) chunk.zeros = (const int8_t *)panel + zeros_at;
        for (long r = 0; r < num_rows; r++) memset(out + r * out_stride, 0, PANEL * sizeof *out);
        long block = 0;
        for (long first = 0; first < layout->units; first += chunk.units) {
            find_chunk(layout, &cut, panel, after, first, PAIRS_OF(source), &chunk);
            if (of_tile == DECODED) {
                decode_chunk(source, &chunk, pairs);
                chunk.words = pairs;
            }
            for (long row = 0; row < num_rows; row += BLOCK_ROWS) {
                long rows = num_rows - row < BLOCK_ROWS ? num_rows - row : BLOCK_ROWS;
                chunk.totals = totals + row * cut.num_blocks + block;
                ADD_ROWS[layout->dtype][of_tile][rows - 1](x + row, &chunk, out + row * out_stride,
                                                          out_stride);
            }
            block += (chunk.units + cut.block_units - 1) / cut.block_units;
        }
    }
}

// ---- orders of codes ----------------------------------------------------------------------------

void quantized_to_halves(uint32_t *words, long num_words) {
    for (long i = 0; i < num_words; i++) {
        uint32_t from = words[i], to = 0;
        for (int e = 0; e < 8; e++)
            to |= (from >> 4 * e & 15) << (e % 2 * 16 + e / 2 * 4);
        words[i] = to;
    }
}

void quantized_from_halves(uint32_t *words, long num_words) {
    for (long i = 0; i < num_words; i++) {
        uint32_t from = words[i], to = 0;
        for (int e = 0; e < 8; e++)
            to |= (from >> (e % 2 * 16 + e / 2 * 4) & 15) << 4 * e;
        words[i] = to;
    }
}
