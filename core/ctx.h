/* core/ctx.h - inside of ipt_ctx, for core/ only. */
#ifndef IPT_CORE_CTX_H
#define IPT_CORE_CTX_H
#include "core/core.h"

struct ipt_ctx {
    ipt_log_fn log;
    void *user;
    const ipt_stop *stop[IPT_LISTEN_COUNT];
    uint64_t n_alloc;    /* allocations so far                        */
    uint64_t fail_alloc; /* allocations from this number on fail; 0 = off */
    char message[1024];
};
#endif
