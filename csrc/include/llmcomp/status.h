/* What every function of the core that can fail returns. No other type or function belongs here. */
#ifndef LLMCOMP_STATUS_H
#define LLMCOMP_STATUS_H

#ifdef __cplusplus
extern "C" {
#endif

typedef enum lmc_status {
    LMC_OK = 0,
    LMC_ERROR_NAN,               /* a logit is NaN */
    LMC_ERROR_POSITIVE_INFINITY, /* a logit is +inf */
    LMC_ERROR_NO_SYMBOL,         /* every logit of a row is -inf */
    LMC_ERROR_TOKEN,             /* a token is outside [0, vocab_size) */
    LMC_ERROR_VOCAB_SIZE,        /* vocab_size is 0 or above LMC_VOCAB_SIZE_MAX */
    LMC_ERROR_INTERVAL,          /* not 0 < freq, start + freq <= total <= LMC_TOTAL_MAX */
    LMC_ERROR_CAPACITY,          /* a buffer of the caller is smaller than its _bound function says */
    LMC_ERROR_ARGUMENT           /* any other argument outside its documented range */
} lmc_status_t;

/* One English phrase without a full stop, never NULL. */
const char *lmc_status_message(lmc_status_t status);

#ifdef __cplusplus
}
#endif

#endif
