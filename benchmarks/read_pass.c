/* The bandwidth limit of bench_coding.py: passes that only read, as fast as the compiler's vectors go.
 * Compiled by the benchmark with -O3 -march=native -ffast-math; nothing of it is part of the package. */
#include <stddef.h>
#include <stdint.h>

float read_float32(const float *values, size_t n_rows, size_t n_columns) {
    float largest = values[0];
    for (size_t i = 0; i < n_rows * n_columns; i++)
        largest = values[i] > largest ? values[i] : largest;
    return largest;
}

/* The bytes of float16 and bfloat16, for which maxima of integers read as fast. */
int16_t read_int16(const int16_t *values, size_t n_rows, size_t n_columns) {
    int16_t largest = values[0];
    for (size_t i = 0; i < n_rows * n_columns; i++)
        largest = values[i] > largest ? values[i] : largest;
    return largest;
}
