#include "numbers.h"

#include <math.h>

float numbers_softmax(float *scores, int64_t count) {
    float most = scores[0];
    vec best = v_set(most);
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) best = v_max(v_load(scores + i), best);
    float block[WIDE];
    v_store(block, best);
    for (int l = 0; l < LANES; l++) most = block[l] > most ? block[l] : most;
    for (; i < count; i++) most = scores[i] > most ? scores[i] : most;
    vec total[PARTS];
    for (int part = 0; part < PARTS; part++) total[part] = v_set(0.0f);
    for (i = 0; i + WIDE <= count; i += WIDE)
        for (int part = 0; part < PARTS; part++) {
            float *at = scores + i + part * LANES;
            vec x = v_exp(v_sub(v_load(at), v_set(most)));
            v_store(at, x);
            total[part] = v_add(total[part], x);
        }
    memset(block, 0, sizeof block);
    for (int64_t l = i; l < count; l += LANES) {
        vec x = v_exp(v_sub(load_some(scores, l, count - l, FLOAT32), v_set(most)));
        store_some(block, l - i, x, count - l, FLOAT32);  // keeps zeros after the last score
    }
    memcpy(scores + i, block, (size_t)(count - i) * sizeof *block);
    for (int part = 0; part < PARTS; part++)
        total[part] = v_add(total[part], v_load(block + part * LANES));
    return wide_sum(total);
}
