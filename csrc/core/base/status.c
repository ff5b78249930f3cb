/* The phrases of lmc_status_t. */
#include "llmcomp/status.h"

const char *lmc_status_message(lmc_status_t status) {
    switch (status) {
    case LMC_OK:
        return "no error";
    case LMC_ERROR_NAN:
        return "a logit is NaN";
    case LMC_ERROR_POSITIVE_INFINITY:
        return "a logit is +inf";
    case LMC_ERROR_NO_SYMBOL:
        return "all logits are -inf";
    case LMC_ERROR_TOKEN:
        return "a token is outside the vocabulary";
    case LMC_ERROR_VOCAB_SIZE:
        return "the vocabulary size is 0 or above 2^21";
    case LMC_ERROR_INTERVAL:
        return "an interval is empty, or not inside a total of at most 2^51";
    case LMC_ERROR_CAPACITY:
        return "a buffer is too small";
    case LMC_ERROR_ARGUMENT:
        return "an argument is out of range";
    }
    return "unknown status";
}
