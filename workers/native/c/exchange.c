// What an attention worker sends to the experts beside its rows.
#include <stdint.h>
#include <string.h>

#include "numbers.h"
#include "team.h"

// The slots of each row's experts on each rank, and behind them the bits of its weights as float.
//
// slots [num_ranks, num_experts], -1: not there; ids [num_rows, top_k]; weights [num_rows, top_k]
// or NULL -> sent [num_ranks, num_rows, top_k or 2 top_k]. NO_EXPERT for an id that is none.
int exchange_slots(const int32_t *slots, long num_ranks, long num_experts, const int64_t *ids,
                   long num_rows, long top_k, const void *weights, int dtype, int32_t *sent) {
    for (long place = 0; place < num_rows * top_k; place++)
        if (ids[place] < 0 || ids[place] >= num_experts) return NO_EXPERT;
    for (long rank = 0; rank < num_ranks; rank++, slots += num_experts)
        for (long row = 0; row < num_rows; row++) {
            const int64_t *chosen = ids + row * top_k;
            for (long k = 0; k < top_k; k++) *sent++ = slots[chosen[k]];
            if (!weights) continue;
            for (long k = 0; k < top_k; k++, sent++) {
                float weight = load_one(weights, row * top_k + k, (enum dtype)dtype);
                memcpy(sent, &weight, sizeof weight);
            }
        }
    return OK;
}
