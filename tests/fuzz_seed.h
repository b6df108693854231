/* tests/fuzz_seed.h - safetensors inputs for the fuzzers: a file made from a header text, and a
 * mutator that keeps the length in front true most of the time, so that the text itself is reached.
 */
#ifndef IPT_TESTS_FUZZ_SEED_H
#define IPT_TESTS_FUZZ_SEED_H
#include <stdint.h>
#include <string.h>

size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t max_size);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned int seed);

static inline void seed_length(uint8_t *data, uint64_t n)
{
    for (int i = 0; i < 8; i++)
        data[i] = (uint8_t)(n >> (8 * i));
}

/* Header and n_data bytes 0, 1, 2 ...; 0 when it does not fit. */
static inline size_t seed_file(uint8_t *data, size_t max_size, const char *header, size_t n_data)
{
    size_t n = strlen(header);
    if (8 + n + n_data > max_size)
        return 0;
    seed_length(data, n);
    memcpy(data + 8, header, n);
    for (size_t i = 0; i < n_data; i++)
        data[8 + n + i] = (uint8_t)i;
    return 8 + n + n_data;
}

/* One mutation of `data`: of the header text, of the data, of all, or a fresh seed. */
static inline size_t seed_mutate(uint8_t *data, size_t size, size_t max_size, unsigned int seed,
                                 const char *const *headers, size_t n_header)
{
    uint64_t n = 0;
    if (size < 16 || seed % 101 == 0) { /* libFuzzer's own limit is 4096 bytes in all */
        const char *header = headers[seed / 101 % n_header];
        size_t made = seed_file(data, max_size, header, 4096);
        if (!made)
            made = seed_file(data, max_size, header, 256);
        if (made)
            return made;
    }
    for (int i = 7; i >= 0 && size >= 8; i--)
        n = n << 8 | data[i];
    if (size < 8 || n > size - 8 || seed % 11 == 0)
        return LLVMFuzzerMutate(data, size, max_size);
    size_t head = 8 + (size_t)n, rest = size - head;
    if (seed % 5 == 0 && rest > 0)
        return head + LLVMFuzzerMutate(data + head, rest, max_size - head);
    static uint8_t text[1 << 16];
    size_t room = max_size - 8 - rest;
    room = room < sizeof text ? room : sizeof text;
    if (n > room)
        return LLVMFuzzerMutate(data, size, max_size);
    memcpy(text, data + 8, (size_t)n);
    size_t m = LLVMFuzzerMutate(text, (size_t)n, room);
    memmove(data + 8 + m, data + head, rest);
    memcpy(data + 8, text, m);
    seed_length(data, m);
    return 8 + m + rest;
}
#endif
