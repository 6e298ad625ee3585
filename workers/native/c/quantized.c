#include "quantized.h"

#include "codes.h"

// Maximum rows of a tile, number of output vectors of a tile, and chains of each.
enum { BLOCK_ROWS = LANES == 16 ? 6 : 2, VECTORS = 2, CHAINS = 2 };

// Prefetch distance in bytes, beyond the L2 cache. With it, codes are read at 0.92 to 1.0 times the
// rate of bfloat16 on Zen 5, with a memory bandwidth of 48 GB/s for two cores.
enum { AHEAD_BYTES = 8192 };

// ---- products -----------------------------------------------------------------------------------

// A chunk: consecutive blocks of a panel.
struct chunk {
    const struct layout *layout;
    const char *panel, *after;  // after: data that is read next
    const uint32_t *pairs;      // [units, PANEL] if decoded
    long first_unit, units;     // the last block may be shorter
    struct numbers numbers;
    const float *totals;        // totals of its blocks, see `find_totals`
    float unit, zero_unit;      // unit of values of `pair_at`; relative negative unit of zero points
};

// Position in a chunk: a group of a section, and the skipped part of the group.
struct place {
    const char *section;
    long group;
    size_t skipped;  // in bytes
};

ALWAYS struct place place_of(const struct chunk *chunk, const long in_word) {
    const struct layout *layout = chunk->layout;
    long group = chunk->first_unit / layout->group_units;
    long section = group / layout->section_groups;
    long skipped = chunk->first_unit - group * layout->group_units;
    return (struct place){
        .section = chunk->panel + (size_t)section * layout->section_bytes,
        .group = group - section * layout->section_groups,
        .skipped = (size_t)(skipped / in_word) * PANEL * WORD,
    };
}

ALWAYS const char *scales_at(const struct layout *layout, const struct place *place) {
    return place->section + (size_t)place->group * PANEL * layout->scale_bytes;
}

ALWAYS const int8_t *zeros_at(const struct layout *layout, const struct place *place) {
    size_t scales = (size_t)layout->section_groups * PANEL * layout->scale_bytes;
    return (const int8_t *)place->section + scales + (size_t)place->group * PANEL;
}

ALWAYS const char *codes_at(const struct layout *layout, const struct place *place) {
    size_t before = (size_t)place->group * layout->group_bytes + place->skipped;
    return place->section + layout->header_bytes + before;
}

ALWAYS void next_group(const struct layout *layout, struct place *place) {
    if (++place->group < layout->section_groups) return;
    place->group = 0;
    place->section += layout->section_bytes;
}

// Address to prefetch while a place of the panel is read; `after` follows the end of the panel.
ALWAYS const char *ahead_of(const struct chunk *chunk, const char *place) {
    const char *end = chunk->panel + chunk->layout->panel_bytes;
    return place + AHEAD_BYTES + (end - place > AHEAD_BYTES ? 0 : chunk->after - end);
}

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

// Add the products of pair j of each output's word with unit `unit` of `x`.
ALWAYS void add_outputs(const enum source source, enum dtype dtype, const int rows, const int j,
                        const int chain, const void *const *x, long unit, const veci *stored,
                        const struct numbers *numbers, vec sums[BLOCK_ROWS][VECTORS][CHAINS]) {
    UNROLL for (int v = 0; v < VECTORS; v++) {
        veci pair = pair_at(source, stored[v], j, numbers);
        UNROLL for (int r = 0; r < rows; r++)
            add_pair(dtype, &sums[r][v][chain], pair, x[r], unit);
    }
}

// Add the products of a word of each output, with `count` pairs of elements from `unit` on.
ALWAYS void add_word(const enum source source, enum dtype dtype, const int rows,
                     const int first_chain, const void *const *x, long unit, long count,
                     const uint32_t *words, const struct numbers *numbers,
                     vec sums[BLOCK_ROWS][VECTORS][CHAINS]) {
    veci stored[VECTORS];
    UNROLL for (int v = 0; v < VECTORS; v++) stored[v] = vi_load(words + v * LANES);
    UNROLL for (int j = 0; j < 4; j++)
        if (j < PAIRS_OF(source) && j < count)
            add_outputs(source, dtype, rows, j, (j + first_chain) % CHAINS, x, unit + j, stored,
                        numbers, sums);
}

// Compute the sums of one block, pairs of elements [unit, end), while prefetching other words.
ALWAYS void add_block(const enum source source, enum dtype dtype, const int rows,
                      const void *const *x, long unit, long end, const uint32_t *words,
                      const char *ahead, const struct numbers *numbers,
                      vec sums[BLOCK_ROWS][VECTORS][CHAINS]) {
    // With one pair in a word, use two words so that the chains alternate.
    const int pairs = PAIRS_OF(source), lines = pairs == 1 ? CHAINS : 1, step = lines * pairs;
    // The compiler must not unroll this loop: processors predict the reads of an instruction from its
    // earlier reads, and an unrolled function of 6 KB read weights at 0.8 times the rate.
    for (; unit + step <= end; unit += step) {
        if (source != DECODED)
            UNROLL for (int at = 0; at < VECTORS * LANES * WORD; at += CACHE_LINE_BYTES)
                _mm_prefetch(ahead + at, _MM_HINT_NTA);
        add_word(source, dtype, rows, 0, x, unit, pairs, words, numbers, sums);
        if (lines == 2)
            add_word(source, dtype, rows, 1, x, unit + 1, pairs, words + PANEL, numbers, sums);
        words += lines * PANEL;
        ahead += lines * PANEL * WORD;
    }
    // The last word of a row, if it is not full.
    if (unit < end) add_word(source, dtype, rows, 0, x, unit, end - unit, words, numbers, sums);
}

// out += a chunk of `rows` rows x a part of a panel.
ALWAYS void add_tile(const enum source source, enum dtype dtype, const int rows,
                     const void *const *x, const struct chunk *chunk, long part, float *out,
                     long out_stride) {
    const struct layout *layout = chunk->layout;
    const enum scales type = (enum scales)layout->form.scales;
    const long first = part * VECTORS * LANES, in_word = PAIRS_OF(source);
    const int has_zeros = layout->form.has_zeros != 0;
    struct numbers numbers = chunk->numbers;
    vec outputs[BLOCK_ROWS][VECTORS];
    out += first;
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < VECTORS; v++)
            outputs[r][v] = v_load(out + r * out_stride + v * LANES);
    long unit = chunk->first_unit, last = unit + chunk->units, count = 0, end;
    struct place place = place_of(chunk, in_word);
    for (; unit < last; unit = end, next_group(layout, &place), count++) {
        const char *codes = codes_at(layout, &place);
        const char *ahead = ahead_of(chunk, codes) + first * WORD;
        const uint32_t *words = (const uint32_t *)codes + first;
        if (source == DECODED) words = chunk->pairs + (unit - chunk->first_unit) * PANEL + first;
        else if (codes == place.section + layout->header_bytes)
            for (size_t at = 0; at < layout->header_bytes; at += CACHE_LINE_BYTES)
                _mm_prefetch(place.section + AHEAD_BYTES + at, _MM_HINT_NTA);
        vec sums[BLOCK_ROWS][VECTORS][CHAINS];
        UNROLL for (int v = 0; v < VECTORS; v++) {
            vec zero = v_set(0.0f);
            if (has_zeros)
                zero = v_mul(load_int8(zeros_at(layout, &place) + first + v * LANES),
                             v_set(chunk->zero_unit));
            UNROLL for (int r = 0; r < rows; r++) {
                float total = has_zeros ? chunk->totals[r * layout->num_totals + count] : 0.0f;
                sums[r][v][0] = has_zeros ? v_mul(zero, v_set(total)) : zero;
                UNROLL for (int c = 1; c < CHAINS; c++) sums[r][v][c] = v_set(0.0f);
            }
        }
        end = last - unit < layout->block_units ? last : unit + layout->block_units;
        add_block(source, dtype, rows, x, unit, end, words, ahead, &numbers, sums);
        UNROLL for (int v = 0; v < VECTORS; v++) {
            vec scale = load_scales(scales_at(layout, &place), type, first + v * LANES);
            if (source == FROM_INT8 || source == DECODED)
                scale = v_mul(scale, v_set(chunk->unit));
            UNROLL for (int r = 0; r < rows; r++) {
                vec sum = v_add(sums[r][v][0], sums[r][v][1]);
                outputs[r][v] = v_fma(scale, sum, outputs[r][v]);
            }
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < VECTORS; v++)
            v_store(out + r * out_stride + v * LANES, outputs[r][v]);
}

typedef void add_rows(const void *const *x, const struct chunk *chunk, float *out, long out_stride);

// One function for each source, dtype and number of rows, to keep all sums of a tile in registers.
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
// Rows of bfloat16 are converted to float before.
static add_rows *const ADD_ROWS[2][4][BLOCK_ROWS] = {ALL_NAMES(FLOAT32), ALL_NAMES(FLOAT32)};
#endif

// ---- panels -------------------------------------------------------------------------------------

static enum source source_of(int64_t codes) {
    return codes == INT8 ? FROM_INT8 : codes == FLOAT8 ? FROM_FLOAT8 : FROM_4_BITS;
}

// Decode the pairs of a chunk: pairs [units, PANEL].
ALWAYS void decode(const enum source source, const struct chunk *chunk, uint32_t *pairs) {
    const int in_word = PAIRS_OF(source);
    struct numbers numbers = chunk->numbers;
    struct place place = place_of(chunk, in_word);
    for (long left = chunk->units; left > 0; next_group(chunk->layout, &place)) {
        const char *codes = codes_at(chunk->layout, &place), *ahead = ahead_of(chunk, codes);
        const uint32_t *words = (const uint32_t *)codes;
        long units = left < chunk->layout->block_units ? left : chunk->layout->block_units;
        left -= units;
        for (; units > 0; units -= in_word, words += PANEL, ahead += PANEL * WORD) {
            UNROLL for (int at = 0; at < PANEL * WORD; at += CACHE_LINE_BYTES)
                _mm_prefetch(ahead + at, _MM_HINT_T1);
            UNROLL for (int j = 0; j < in_word; j++, pairs += PANEL)  // with padding after the last pair
                UNROLL for (int v = 0; v < PANEL; v += LANES)
                    vi_store(pairs + v, pair_at(source, vi_load(words + v), j, &numbers));
        }
    }
}

static void decode_chunk(enum source source, const struct chunk *chunk, uint32_t *pairs) {
    if (source == FROM_INT8) decode(FROM_INT8, chunk, pairs);
    else if (source == FROM_FLOAT8) decode(FROM_FLOAT8, chunk, pairs);
    else decode(FROM_4_BITS, chunk, pairs);
}

// Sum some elements of a row in 16 lanes, or in the 8 lanes after l and l + 8 are added.
ALWAYS vec lanes_of(const void *x, enum dtype stored, long first, long units) {
#ifdef __AVX512BF16__
    if (stored == BFLOAT16) {
        vec found = v_set(0.0f);
        for (long u = 0; u < units; u += LANES) {
            uint32_t is_unit = units - u < LANES ? (1u << (units - u)) - 1 : 0xffff;
            veci pairs = _mm512_maskz_loadu_epi32((__mmask16)is_unit, (const int *)x + first + u);
            found = _mm512_dpbf16_ps(found, (__m512bh)pairs, (__m512bh)vi_set(0x3f803f80));
        }
        return found;
    }
#endif
    vec lanes[PARTS];
    UNROLL for (int i = 0; i < PARTS; i++) lanes[i] = v_set(0.0f);
    for (long e = 0; e < 2 * units; e += WIDE)
        UNROLL for (int i = 0; i < PARTS; i++) {
            long left = 2 * units - e - i * LANES;
            if (left > 0)
                lanes[i] = v_add(lanes[i], load_some(x, 2 * (first + units) - left, left, stored));
        }
    return PARTS == 1 ? lanes[0] : v_add(lanes[0], lanes[PARTS - 1]);
}

// Sum the lanes of each vector, in the order of `wide_sum`.
ALWAYS vec sums_of_lanes(vec *x) {
#define HALVE(COUNT, PICK, FIRST, SECOND)                                                         \
    UNROLL for (int i = 0; i < COUNT; i++) {                                                      \
        vec a = x[2 * i], b = x[2 * i + 1];                                                       \
        x[i] = v_add(PICK(a, b, FIRST), PICK(a, b, SECOND));                                      \
    }
#ifdef __AVX512F__
    HALVE(8, _mm512_shuffle_f32x4, 0x44, 0xee)
    HALVE(4, _mm512_shuffle_f32x4, 0x88, 0xdd)
    HALVE(2, _mm512_shuffle_ps, 0x44, 0xee)
    HALVE(1, _mm512_shuffle_ps, 0x88, 0xdd)
    // Vector i is in lane i / 4 of the 4 lanes of number i % 4.
    veci order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    return _mm512_permutexvar_ps(order, x[0]);
#else
    HALVE(4, _mm256_permute2f128_ps, 0x20, 0x31)
    HALVE(2, _mm256_shuffle_ps, 0x44, 0xee)
    HALVE(1, _mm256_shuffle_ps, 0x88, 0xdd)
    return _mm256_permutevar8x32_ps(x[0], _mm256_set_epi32(7, 3, 6, 2, 5, 1, 4, 0));
#endif
#undef HALVE
}

// Number of units of the block that begins with unit `first` of a row.
ALWAYS long block_units(const struct layout *layout, long first) {
    long left = layout->units - first, in_group = left;
    if (layout->block_units < layout->group_units)
        in_group = layout->group_units - first % layout->group_units;
    if (in_group < left) left = in_group;
    return left < layout->block_units ? left : layout->block_units;
}

ALWAYS void totals_of_row(const struct layout *layout, const void *x, float *totals) {
    enum dtype stored = layout->dtype == BFLOAT16 && ROWS_ARE_BF16 ? BFLOAT16 : FLOAT32;
    vec found[LANES];
    long first = 0, units;
    for (long t = 0; t < layout->num_totals; t += LANES) {
        UNROLL for (int i = 0; i < LANES; i++, first += units) {
            units = block_units(layout, first);
            found[i] = lanes_of(x, stored, first, units);
        }
        v_store(totals + t, sums_of_lanes(found));
    }
}

void find_totals(const struct layout *layout, long num_rows, const void *const *x, float *totals) {
    for (long r = 0; r < num_rows; r++) totals_of_row(layout, x[r], totals + r * layout->num_totals);
}

// Number of units of the chunk that begins with unit `first` of a row: the blocks that are decoded
// together, or without decoding one block within a group.
static long chunk_units(const struct layout *layout, int is_decoded, long first) {
    long most = is_decoded ? BLOCK_UNITS / layout->block_units * layout->block_units : layout->units;
    if (layout->group_units > BLOCK_UNITS) most = block_units(layout, first);
    return layout->units - first < most ? layout->units - first : most;
}

void quantized_product(const struct layout *layout, long num_rows, const void *const *x,
                       const float *totals, const char *weights, long num_panels, float *out,
                       long out_stride, const char *next) {
    enum source source = source_of(layout->form.codes);
    enum source of_tile = num_rows > BLOCK_ROWS ? DECODED : source;
    uint32_t pairs[(BLOCK_UNITS + 4) * PANEL] __attribute__((aligned(64)));
    float unit = source == FROM_INT8 ? INT8_UNIT : 1.0f;
    struct chunk chunk = {.layout = layout,
                          .pairs = pairs,
                          .numbers = load_numbers(layout->form.codes),
                          .unit = unit,
                          .zero_unit = -1.0f / (unit * (float)(1 << layout->form.zero_bits))};
    for (long p = 0; p < num_panels; p++, out += PANEL) {
        chunk.panel = panel_at(weights, layout, p);
        chunk.after = p + 1 < num_panels ? panel_at(weights, layout, p + 1) : next;
        for (long r = 0; r < num_rows; r++) memset(out + r * out_stride, 0, PANEL * sizeof *out);
        long block = 0;
        for (long first = 0; first < layout->units; first += chunk.units) {
            chunk.first_unit = first;
            chunk.units = chunk_units(layout, of_tile == DECODED, first);
            if (of_tile == DECODED) decode_chunk(source, &chunk, pairs);
            for (long row = 0; row < num_rows; row += BLOCK_ROWS) {
                long rows = num_rows - row < BLOCK_ROWS ? num_rows - row : BLOCK_ROWS;
                chunk.totals = totals + row * layout->num_totals + block;
                ADD_ROWS[layout->dtype][of_tile][rows - 1](x + row, &chunk, out + row * out_stride,
                                                          out_stride);
            }
            block += (chunk.units + layout->block_units - 1) / layout->block_units;
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
