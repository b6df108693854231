/* core/mem.c - the only allocator: zeroed, counted, able to fail on demand. */
#include "core/core.h"

#include "core/ctx.h"

#include <stdlib.h>
#include <string.h>

/* AddressSanitizer sees an arena's block as one piece: what lies between its allocations and behind
 * them is poisoned by hand, so that a step over an end is found there too. */
#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define IPT_ASAN 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__) && !defined(IPT_ASAN)
#define IPT_ASAN 1
#endif
#ifdef IPT_ASAN
#include <sanitizer/asan_interface.h>
#define POISON(p, n) ASAN_POISON_MEMORY_REGION(p, n)
#define UNPOISON(p, n) ASAN_UNPOISON_MEMORY_REGION(p, n)
enum { RED_ZONE = 16 };
#else
#define POISON(p, n) ((void)(p), (void)(n))
#define UNPOISON(p, n) ((void)(p), (void)(n))
enum { RED_ZONE = 0 };
#endif

enum { ALIGN = 64, ARENA_BLOCK = 64 * 1024 };

bool ipt_mul_size(size_t a, size_t b, size_t *out)
{
    if (a != 0 && b > SIZE_MAX / a)
        return false;
    *out = a * b;
    return true;
}

bool ipt_add_size(size_t a, size_t b, size_t *out)
{
    if (b > SIZE_MAX - a)
        return false;
    *out = a + b;
    return true;
}

void *ipt_alloc(ipt_ctx *ctx, size_t n)
{
    size_t padded = 0;
    void *p = NULL;
    bool refuse = false;
    if (ctx) {
        ctx->n_alloc++;
        refuse = ctx->fail_alloc != 0 && ctx->n_alloc >= ctx->fail_alloc;
    }
    if (!refuse && ipt_add_size(n ? n : 1, ALIGN - 1, &padded)) {
        padded -= padded % ALIGN;
        p = aligned_alloc(ALIGN, padded);
    }
    if (!p) {
        ipt_fail(ctx, IPT_ERR_NOMEM, "out of memory: %zu bytes could not be allocated", n);
        return NULL;
    }
    memset(p, 0, padded);
    return p;
}

void *ipt_calloc(ipt_ctx *ctx, size_t count, size_t size)
{
    size_t n = 0;
    if (!ipt_mul_size(count, size, &n)) {
        ipt_fail(ctx, IPT_ERR_NOMEM, "out of memory: %zu x %zu bytes overflow", count, size);
        return NULL;
    }
    return ipt_alloc(ctx, n);
}

void *ipt_regrow(ipt_ctx *ctx, void *p, size_t old_n, size_t n)
{
    void *q = ipt_alloc(ctx, n);
    if (!q)
        return NULL;
    if (p)
        memcpy(q, p, old_n < n ? old_n : n);
    ipt_free(p);
    return q;
}

void ipt_free(void *p) { free(p); }

char *ipt_strdup(ipt_ctx *ctx, const char *s)
{
    size_t n = strlen(s) + 1;
    char *p = ipt_alloc(ctx, n);
    if (p)
        memcpy(p, s, n);
    return p;
}

void ipt_alloc_fail_after(ipt_ctx *ctx, uint64_t n) { ctx->fail_alloc = n ? ctx->n_alloc + n : 0; }

uint64_t ipt_alloc_count(const ipt_ctx *ctx) { return ctx->n_alloc; }

struct ipt_arena_block {
    struct ipt_arena_block *next;
    size_t used, size;
    /* payload follows, 64-byte aligned */
};
enum { BLOCK_HEAD = 64 };

void ipt_arena_init(ipt_arena *a, ipt_ctx *ctx)
{
    a->ctx = ctx;
    a->head = NULL;
}

void *ipt_arena_alloc(ipt_arena *a, size_t n)
{
    size_t need = 0;
    if (!ipt_add_size(n, 15 + RED_ZONE, &need)) {
        ipt_fail(a->ctx, IPT_ERR_NOMEM, "out of memory: %zu bytes", n);
        return NULL;
    }
    need &= ~(size_t)15;
    if (!a->head || a->head->size - a->head->used < need) {
        size_t size = need > ARENA_BLOCK ? need : ARENA_BLOCK, total = 0;
        if (!ipt_add_size(size, BLOCK_HEAD, &total)) {
            ipt_fail(a->ctx, IPT_ERR_NOMEM, "out of memory: %zu bytes", n);
            return NULL;
        }
        struct ipt_arena_block *b = ipt_alloc(a->ctx, total);
        if (!b)
            return NULL;
        b->size = size;
        b->next = a->head;
        a->head = b;
        POISON((char *)b + BLOCK_HEAD, size);
    }
    void *p = (char *)a->head + BLOCK_HEAD + a->head->used;
    a->head->used += need;
    UNPOISON(p, n);
    return p;
}

char *ipt_arena_strdup(ipt_arena *a, const char *s)
{
    size_t n = strlen(s) + 1;
    char *p = ipt_arena_alloc(a, n);
    if (p)
        memcpy(p, s, n);
    return p;
}

void ipt_arena_finish(ipt_arena *a)
{
    while (a->head) {
        struct ipt_arena_block *b = a->head;
        a->head = b->next;
        UNPOISON((char *)b + BLOCK_HEAD, b->size);
        ipt_free(b);
    }
}
