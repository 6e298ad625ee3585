// Weights of tokens, which are 2**t as integers, so that sums are exact in any order; and comparisons
// of vectors for sampling. Reference: `workers/sampling/draws.py`.
#ifndef WEIGHTS_H
#define WEIGHTS_H

#include "numbers.h"

enum { WEIGHT_BITS = 40 };  // weight of the best token: 2**40, so that 2**23 tokens can be summed

#ifdef __AVX512F__

ALWAYS veci vi_add64(veci a, veci b) { return _mm512_add_epi64(a, b); }
// A bit for each lane in which a >= b.
ALWAYS uint32_t v_at_least(vec a, vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
// x in lanes in which t >= floor, else 0.
ALWAYS vec v_keep(vec x, vec t, vec floor) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(t, floor, _CMP_GE_OQ), x);
}
// Nearest integers, ties to even, of the lower and upper lanes of x; x below 2**51.
ALWAYS void v_to_int64(vec x, veci *low, veci *high) {
    *low = _mm512_cvtps_epi64(_mm512_castps512_ps256(x));
    *high = _mm512_cvtps_epi64(_mm512_extractf32x8_ps(x, 1));
}

#else

ALWAYS veci vi_add64(veci a, veci b) { return _mm256_add_epi64(a, b); }
ALWAYS uint32_t v_at_least(vec a, vec b) {
    return (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ));
}
ALWAYS vec v_keep(vec x, vec t, vec floor) {
    return _mm256_and_ps(_mm256_cmp_ps(t, floor, _CMP_GE_OQ), x);
}
// Adding 1.5 * 2**52 rounds to an integer, which is in the lower bits of the sum.
ALWAYS veci vd_to_int64(__m256d x) {
    __m256d magic = _mm256_set1_pd(6755399441055744.0);
    veci sum = _mm256_castpd_si256(_mm256_add_pd(x, magic));
    return _mm256_sub_epi64(sum, _mm256_castpd_si256(magic));
}
ALWAYS void v_to_int64(vec x, veci *low, veci *high) {
    *low = vd_to_int64(_mm256_cvtps_pd(_mm256_castps256_ps128(x)));
    *high = vd_to_int64(_mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)));
}

#endif

// 2**(t + 40), not yet rounded, for t up to 0; t is clamped to -42, for which it rounds to 0. Relative
// error below 2e-7. Products and sums are not fused, so that torch computes the same bits. The
// coefficients minimize the largest relative error on [-0.5, 0.5].
ALWAYS vec v_weight(vec t) {
    const float unit = (float)(1LL << WEIGHT_BITS);
    t = v_max(t, v_set(-2.0f - WEIGHT_BITS));
    // Adding 1.5 * 2**23 rounds to an integer n, which is in the lower bits of the sum.
    vec magic = v_set(12582912.0f);
    vec shifted = v_add(t, magic);
    vec f = v_sub(t, v_sub(shifted, magic));
    vec p = v_set(0.0013264723820611835f * unit);
    p = v_add(v_mul(p, f), v_set(0.009671512991189957f * unit));
    p = v_add(v_mul(p, f), v_set(0.05550733581185341f * unit));
    p = v_add(v_mul(p, f), v_set(0.24022242426872253f * unit));
    p = v_add(v_mul(p, f), v_set(0.6931470036506653f * unit));
    p = v_add(v_mul(p, f), v_set(unit));
    return v_bits(vi_add(vi_bits(p), vi_left(vi_bits(shifted), 23)));  // p * 2**n
}

#endif
