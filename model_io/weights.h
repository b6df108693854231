/* model_io/weights.h - the weight store, as weights.c (loading) and weights_change.c (changing what
 * is on the device) share it. */
#ifndef IPT_MODEL_IO_WEIGHTS_H
#define IPT_MODEL_IO_WEIGHTS_H
#include "model_io/internal.h"

#include "vk/vk.h"

enum { IPT_STORE_JOBS = 4 }; /* products on their way to the device at once */

typedef struct ipt_store_entry {
    ipt_buffer *buf;
    ipt_weight_view view;
    ipt_shape shape; /* asked for */
} ipt_store_entry;

typedef struct ipt_store {
    ipt_weights base; /* first: a pointer to it is a pointer to the store */
    ipt_ctx *ctx;
    ipt_gpu *gpu;
    ipt_dtype precision;
    char *prefix;
    bool is_random;
    uint64_t seed;
    ipt_source src;
    ipt_arena arena;
    ipt_index index; /* "P:name" -> entry */
    ipt_store_entry *entries;
    size_t n_entry, cap_entry;
    uint64_t device_bytes;
    struct {
        ipt_cmd *cmd;
        ipt_buffer *a, *b;
    } job[IPT_STORE_JOBS];
    uint32_t n_job; /* so far; job n is job[n % IPT_STORE_JOBS] */
} ipt_store;

/* The entry of a name and use, NULL: it is not on the device. */
ipt_store_entry *ipt_store_entry_of(ipt_store *s, const char *name, ipt_use use);
/* The values of the files (or the random ones) for an entry into its view on the device, which
 * nothing there reads or writes.  is_known: they were taken before, and are not looked through
 * again.  Errors: those of ipt_weights.find. */
IPT_CHECKED ipt_status ipt_store_write(ipt_store *s, const char *name, ipt_use use,
                                       const ipt_store_entry *e, bool is_known);
/* IPT_ERR_UNSUPPORTED: a value that f16, or q8, does not hold. */
ipt_status ipt_store_too_large(const ipt_store *s, const char *file, const char *key, float value,
                               ipt_dtype type);
#endif
