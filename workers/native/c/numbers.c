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
    for (i = 0; i < count; i += WIDE) {
        int64_t left = count - i < WIDE ? count - i : WIDE;
        memset(block, 0, sizeof block);
        memcpy(block, scores + i, (size_t)left * sizeof *block);
        for (int part = 0; part < PARTS; part++) {
            vec x = v_sub(v_load(block + part * LANES), v_set(most));
            v_store(block + part * LANES, v_exp(x));
        }
        for (int64_t l = left; l < WIDE; l++) block[l] = 0.0f;
        for (int part = 0; part < PARTS; part++)
            total[part] = v_add(total[part], v_load(block + part * LANES));
        memcpy(scores + i, block, (size_t)left * sizeof *block);
    }
    return wide_sum(total);
}
