/* core/status.c - statuses, messages, log of a context, stops. */
#include "core/core.h"

#include "core/ctx.h"

#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

ipt_status ipt_ctx_create(ipt_log_fn log, void *user, ipt_ctx **out)
{
    ipt_ctx *ctx = calloc(1, sizeof *ctx);
    if (!ctx)
        return IPT_ERR_NOMEM;
    ctx->log = log;
    ctx->user = user;
    *out = ctx;
    return IPT_OK;
}

void ipt_ctx_destroy(ipt_ctx **ctx)
{
    if (!ctx || !*ctx)
        return;
    free(*ctx);
    *ctx = NULL;
}

ipt_status ipt_fail(ipt_ctx *ctx, ipt_status s, const char *fmt, ...)
{
    if (!ctx)
        return s;
    char raw[sizeof ctx->message];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(raw, sizeof raw, fmt, ap);
    va_end(ap);
    ipt_printable(raw, ctx->message, sizeof ctx->message);
    return s;
}

const char *ipt_last_error(const ipt_ctx *ctx) { return ctx ? ctx->message : ""; }

const char *ipt_status_name(ipt_status s)
{
    static const char *const names[] = {"ok",
                                        "bad argument",
                                        "out of host memory",
                                        "out of device memory",
                                        "input/output error",
                                        "bad format",
                                        "bad shape",
                                        "missing",
                                        "unsupported",
                                        "device lost",
                                        "cancelled",
                                        "no device",
                                        "cannot write output",
                                        "too large for the device"};
    return (size_t)s < IPT_COUNT(names) ? names[s] : "unknown status";
}

void ipt_log(ipt_ctx *ctx, ipt_log_level level, const char *fmt, ...)
{
    if (!ctx || !ctx->log)
        return;
    char raw[1024], line[1024];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(raw, sizeof raw, fmt, ap);
    va_end(ap);
    ipt_printable(raw, line, sizeof line);
    ctx->log(ctx->user, level, line);
}

const char *ipt_name(char *buf, size_t n, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(buf, n, fmt, ap);
    va_end(ap);
    return buf;
}

void ipt_stop_ask(ipt_stop *s) { atomic_store(&s->asked, 1); }

bool ipt_stop_asked(const ipt_stop *s) { return s && atomic_load(&s->asked) != 0; }

void ipt_ctx_listen(ipt_ctx *ctx, ipt_listen which, const ipt_stop *s) { ctx->stop[which] = s; }

bool ipt_cancelled(const ipt_ctx *ctx)
{
    for (int i = 0; ctx && i < IPT_LISTEN_COUNT; i++)
        if (ipt_stop_asked(ctx->stop[i]))
            return true;
    return false;
}
