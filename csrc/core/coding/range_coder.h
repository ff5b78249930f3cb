/* One stream of the range coder, with the algebra beside the code. Nothing here knows of logits, batches or
 * Python.
 *
 * A message is an interval [low, low + range) of numbers, which every symbol narrows to its share
 *     r = floor(range / total)
 *     low   := low + r * start
 *     range := r * freq, or what is left of range where the symbol is the last one (start + freq = total).
 * range lives in 64 bits and low has 64 bits below the bytes that are already written. When range falls below
 * 2^56 the top byte of low is written and both move up by 8 bits, so that always 2^56 <= range < 2^64 before
 * a symbol: total <= 2^51  =>  r >= 2^5, no symbol's share is empty; r * freq >= (range - total) * freq /
 * total: the loss is at most log2(1 + total / (range - total)) bits. low can run over 2^64 while the bytes
 * above it are written: then one is added to them (the carry). The encoder keeps all bytes of a stream in
 * memory, so the carry walks back over the 0xFF bytes and always finds a smaller one, for the whole message
 * is a number below 1.
 *
 * The decoder keeps code = (message - low), the distance of the message from the low end. The symbol is the
 * one whose share holds code: start <= floor(code / r) < start + freq, where a quotient of total or more,
 * which only the remainder of the last share gives, counts as total - 1. Bytes past the end of a stream read
 * as zero; the encoder therefore ends with the number of the final interval that has the most zero bytes at
 * its end, and leaves them out.
 */
#ifndef LLMCOMP_CORE_CODING_RANGE_CODER_H
#define LLMCOMP_CORE_CODING_RANGE_CODER_H

#include <stddef.h>
#include <stdint.h>

#include "core/base/ieee.h"
#include "llmcomp/intervals.h"
#include "llmcomp/coder.h"

#define LMC_RANGE_MIN ((uint64_t)1 << 56)

LMC_FN int lmc_interval_is_valid(uint64_t start, uint64_t freq, uint64_t total) {
    return freq > 0 && total <= LMC_TOTAL_MAX && start < total && freq <= total - start;
}

/* The share of range that belongs to an interval, in place. Returns r * start. */
LMC_FN uint64_t lmc_range_narrow(uint64_t *range, uint64_t start, uint64_t freq, uint64_t total) {
    uint64_t r = *range / total;
    uint64_t below = r * start;
    *range = start + freq == total ? *range - below : r * freq;
    return below;
}

/* Bytes that must be shifted out so that range >= 2^56 again; range > 0. */
LMC_FN unsigned lmc_range_spare_bytes(uint64_t range) {
#if defined(__CUDA_ARCH__)
    return (unsigned)__clzll((long long)range) >> 3;
#else
    return (unsigned)__builtin_clzll(range) >> 3;
#endif
}

LMC_FN void lmc_range_begin_encoder(lmc_encoder_t *encoder, uint8_t *bytes, size_t capacity_bytes) {
    encoder->low = 0;
    encoder->range = UINT64_MAX;
    encoder->bytes = bytes;
    encoder->n_bytes = 0;
    encoder->capacity_bytes = capacity_bytes;
}

LMC_FN void lmc_carry(uint8_t *bytes, size_t n_bytes) {
    while (++bytes[--n_bytes] == 0) {
    }
}

/* The caller has seen to room for LMC_STEP_BYTES_MAX bytes and to a valid interval. */
LMC_FN void lmc_range_put(lmc_encoder_t *encoder, uint64_t start, uint64_t freq, uint64_t total) {
    uint64_t below = lmc_range_narrow(&encoder->range, start, freq, total);
    encoder->low += below;
    if (encoder->low < below) lmc_carry(encoder->bytes, encoder->n_bytes);
    unsigned n_spare = lmc_range_spare_bytes(encoder->range);
    uint8_t *end = encoder->bytes + encoder->n_bytes;
#if defined(__CUDA_ARCH__)
    unsigned n_written = n_spare;
#else
    unsigned n_written =
        LMC_STEP_BYTES_MAX; /* one store; n_spare as a bound would be a branch nobody foresees */
#endif
    for (unsigned i = 0; i < n_written; i++)
        end[i] = (uint8_t)(encoder->low >> (56 - 8 * i));
    encoder->n_bytes += n_spare;
    encoder->low <<= 8 * n_spare;
    encoder->range <<= 8 * n_spare;
}

/* The number with the most zero bytes in [low, low + range). A multiple of 2^64 (low itself where it is 0, or
 * the one that a carry reaches) needs no byte more; else, since range >= 2^56, one byte makes a multiple of
 * 2^56 that lies inside, and it is not zero. Zero bytes at the end of what was written before go too. */
LMC_FN void lmc_range_end(lmc_encoder_t *encoder) {
    const uint64_t unit = LMC_RANGE_MIN, to_next = 0 - encoder->low; /* 2^64 - low, or 0 */
    if (to_next != 0 && to_next < encoder->range) {
        lmc_carry(encoder->bytes, encoder->n_bytes);
    } else if (to_next != 0) {
        encoder->bytes[encoder->n_bytes++] = (uint8_t)((encoder->low + (unit - 1)) >> 56);
    }
    while (encoder->n_bytes > 0 && encoder->bytes[encoder->n_bytes - 1] == 0)
        encoder->n_bytes--;
}

LMC_FN uint64_t lmc_range_next_byte(lmc_decoder_t *decoder) {
    return decoder->position < decoder->n_bytes ? decoder->bytes[decoder->position++] : 0;
}

LMC_FN void lmc_range_begin_decoder(lmc_decoder_t *decoder, const uint8_t *bytes, size_t n_bytes) {
    decoder->code = 0;
    decoder->range = UINT64_MAX;
    decoder->bytes = bytes;
    decoder->n_bytes = n_bytes;
    decoder->position = 0;
    for (int i = 0; i < 8; i++)
        decoder->code = decoder->code << 8 | lmc_range_next_byte(decoder);
}

/* The value in [0, total) whose interval is the next symbol. */
LMC_FN uint64_t lmc_range_value(const lmc_decoder_t *decoder, uint64_t total) {
    uint64_t value = decoder->code / (decoder->range / total);
    return value < total ? value : total - 1;
}

LMC_FN void lmc_range_take(lmc_decoder_t *decoder, uint64_t start, uint64_t freq, uint64_t total) {
    decoder->code -= lmc_range_narrow(&decoder->range, start, freq, total);
    unsigned n_spare = lmc_range_spare_bytes(decoder->range);
    for (unsigned i = 0; i < n_spare; i++)
        decoder->code = decoder->code << 8 | lmc_range_next_byte(decoder);
    decoder->range <<= 8 * n_spare;
}

#endif
