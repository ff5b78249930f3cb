/* Memory of megabytes that is read in no order, or all over again: in pages of 4 KiB the processor spends
 * more time on where they lie than on what they hold. */
#ifndef LLMCOMP_PYTHON_LARGE_PAGES_H
#define LLMCOMP_PYTHON_LARGE_PAGES_H

#include "python/limited_api.h"

#if defined(__linux__)
#include <stdint.h>
#include <sys/mman.h>
#endif

#define LMC_LARGE_BYTES_MIN ((size_t)4 << 20)

/* Asks for large pages, before `memory` is first used; nothing changes but the time. */
static inline void lmc_py_want_large_pages(void *memory, size_t n_bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    uintptr_t page = 4096, first = ((uintptr_t)memory + page - 1) / page * page;
    if (memory == NULL || n_bytes < LMC_LARGE_BYTES_MIN) return;
    madvise((void *)first, ((uintptr_t)memory + n_bytes - first) / page * page, MADV_HUGEPAGE);
#else
    (void)memory, (void)n_bytes;
#endif
}

#endif
