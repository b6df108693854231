/* engine/hash.h - SHA-256 of model and adapter files, for the texts inside pictures: read in a
 * thread beside the work, kept in the cache folder by path, size and times.
 *
 * Threads: one thread calls all of these; the reading thread touches nothing else. */
#ifndef IPT_ENGINE_HASH_H
#define IPT_ENGINE_HASH_H
#include "core/core.h"

typedef struct ipt_hashes ipt_hashes;
typedef struct ipt_file_hash {
    char sha256[65]; /* of the whole file */
    char data[65];   /* of what follows a safetensors header; "" where not wanted */
} ipt_file_hash;

/* Errors: IPT_ERR_NOMEM. */
IPT_CHECKED ipt_status ipt_hashes_create(ipt_ctx *ctx, ipt_hashes **out);
void ipt_hashes_destroy(ipt_hashes **h); /* stops a thread that runs */
/* Forgets the files of the last request and takes these: paths [n], has_data [n] tells where the
 * second hash is wanted.  What is known (from before, or from the cache) is not read again; a
 * thread begins with the rest.  What cannot be read has no hash; nothing fails but memory. */
IPT_CHECKED ipt_status ipt_hashes_want(ipt_hashes *h, const char *const *path, const bool *has_data,
                                       size_t n);
bool ipt_hashes_ready(const ipt_hashes *h); /* a wait would return at once */
/* Stops the thread: a request that ends early does not go on reading.  h may be NULL. */
void ipt_hashes_stop(ipt_hashes *h);
/* Waits for the thread, not longer than the request is wanted, and keeps what it found in the
 * cache. */
void ipt_hashes_wait(ipt_hashes *h);
/* After the wait: the i-th file's, NULL when it could not be read, changed meanwhile, or was
 * cancelled. */
const ipt_file_hash *ipt_hashes_get(const ipt_hashes *h, size_t i);
#endif
