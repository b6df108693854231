/* engine/cache.c - deep features kept between evaluations: most of them run the UNet's outer layers
 * only, on what the inner ones said a few evaluations ago.  The features stay on the device.
 *
 * Source: Ma et al. 2023, DeepCache (arXiv 2312.00858), uniform intervals. */
#include "engine/run.h"

#include <stdlib.h>
#include <string.h>

/* --- what is asked for ------------------------------------------------------------------------ */
/* "N" or "N:LEVEL". */
ipt_status ipt_cache_read(ipt_run *u)
{
    const char *text = u->r->cache, *name = ipt_policy_method(u->policy)->name;
    ipt_ctx *ctx = u->e->ctx;
    char *end = NULL;
    int32_t most = ipt_unet_n_skip(&u->e->m->config.unet) - 1, own = ipt_policy_level(u->policy);
    u->cache.interval = 1;
    if (own >= 0 && text)
        return ipt_fail(ctx, IPT_ERR_ARG, "cache %.40s: compose method %s keeps features itself",
                        text, name);
    if (text && u->maps.tap > 0)
        return ipt_fail(ctx, IPT_ERR_ARG,
                        "cache %.40s: compose method %s reads attention in every evaluation", text,
                        name);
    if (own > most)
        return ipt_fail(ctx, IPT_ERR_ARG, "%s: level=%d, this model's unet has levels 0 to %d",
                        name, own, most);
    if (own >= 0) {
        u->cache.interval = 2; /* it says itself when */
        u->cache.deep = own + 1;
        u->cache.is_methods = true;
    }
    if (!text)
        return IPT_OK;
    long n = text[0] >= '0' && text[0] <= '9' ? strtol(text, &end, 10) : 0, level = 0;
    if (end && *end == ':' && end[1] >= '0' && end[1] <= '9')
        level = strtol(end + 1, &end, 10);
    if (!end || *end || n < 1 || n > 1000)
        return ipt_fail(
            ctx, IPT_ERR_ARG,
            "cache %.40s: expected N or N:LEVEL, one whole evaluation in N from 1 to 1000", text);
    if (level > most)
        return ipt_fail(ctx, IPT_ERR_ARG,
                        "cache %.40s: this model's unet has levels 0 to %d; 0 saves most", text,
                        most);
    u->cache.interval = (int32_t)n;
    u->cache.deep = (int32_t)level + 1;
    return IPT_OK;
}

/* --- on the device ---------------------------------------------------------------------------- */
ipt_status ipt_cache_prepare(ipt_run *u, const ipt_unet_key *whole)
{
    ipt_engine *e = u->e;
    ipt_cache *c = &u->cache;
    ipt_plan_key key = {.kind = IPT_PLAN_SHALLOW, .model = e->m->id, .unet = *whole};
    ipt_buffer *buf = NULL;
    uint64_t off = 0, bytes = 0;
    if (c->interval <= 1)
        return IPT_OK;
    key.unet.is_shallow = true;
    key.unet.tap = 0;
    IPT_TRY(ipt_plan_get(e, &key, 0, &c->shallow));
    IPT_TRY(ipt_plan_locate(u->unet, "deep", &buf, &off, &bytes));
    c->row_bytes = bytes / (uint64_t)whole->batch;
    c->row = ipt_arena_alloc(&u->arena, u->max_rows * sizeof *c->row);
    if (!c->row)
        return IPT_ERR_NOMEM;
    return c->kept ? IPT_OK /* of an earlier picture */
                   : ipt_buffer_create(e->gpu, u->max_rows * c->row_bytes, &c->kept);
}

void ipt_cache_finish(ipt_run *u)
{
    if (u->e->gpu)
        ipt_buffer_destroy(u->e->gpu, &u->cache.kept);
}

static ipt_status copy(ipt_gpu *gpu, const ipt_binding *from, const ipt_binding *to)
{
    ipt_cmd *cmd = NULL;
    IPT_TRY(ipt_cmd_create(gpu, &cmd));
    ipt_cmd_barrier(cmd);
    ipt_cmd_copy(cmd, from, to);
    ipt_cmd_barrier(cmd);
    ipt_status status = ipt_cmd_end(cmd);
    if (status == IPT_OK)
        status = ipt_cmd_submit(cmd, NULL);
    ipt_cmd_destroy(gpu, &cmd);
    return status;
}

/* Between the plan's rows [n] and their cache slots. */
static ipt_status move(ipt_run *u, ipt_plan *p, const ipt_row *row, size_t n, bool keep)
{
    const ipt_cache *c = &u->cache;
    ipt_buffer *buf = NULL;
    uint64_t off = 0, bytes = 0;
    IPT_TRY(ipt_plan_locate(p, "deep", &buf, &off, &bytes));
    for (size_t k = 0; k < (size_t)u->batch; k++) { /* the last row again, as its other inputs */
        const ipt_row *r = &row[k < n ? k : n - 1];
        const ipt_binding here = {buf, off + k * c->row_bytes, c->row_bytes},
                          slot = {c->kept, r->cache * c->row_bytes, c->row_bytes};
        if (keep && k >= n)
            break;
        IPT_TRY(copy(u->e->gpu, keep ? &here : &slot, keep ? &slot : &here));
    }
    return IPT_OK;
}

ipt_status ipt_cache_keep(ipt_run *u, const ipt_row *row, size_t n)
{
    return row->want & IPT_WANT_DEEP ? move(u, u->unet, row, n, true) : IPT_OK;
}

ipt_status ipt_cache_give(ipt_run *u, const ipt_row *row, size_t n)
{
    return move(u, u->cache.shallow, row, n, false);
}

/* --- when ------------------------------------------------------------------------------------- */
static bool same_slots(const ipt_row *a, const ipt_row *b)
{
    for (int s = 0; s < IPT_MAX_SLOT; s++)
        if (a->slot[s] < b->slot[s] || a->slot[s] > b->slot[s])
            return false;
    return true;
}

/* Other prompts or other adapters make other features. */
static bool same_rows(const ipt_cache *c, const ipt_rows *rows)
{
    bool same = c->n_row == rows->n;
    for (size_t i = 0; i < rows->n && same; i++)
        same = c->row[i].text == rows->row[i].text && same_slots(&c->row[i], &rows->row[i]);
    return same;
}

void ipt_cache_mark(ipt_run *u, int32_t eval)
{
    ipt_cache *c = &u->cache;
    ipt_rows *rows = &u->rows;
    if (c->interval <= 1 || c->is_methods)
        return;
    bool whole = eval == 0 || ++c->since >= c->interval || !same_rows(c, rows) ||
                 !ipt_regions_same(u, c->eval, eval);
    if (whole) {
        c->eval = eval;
        c->since = 0;
        c->n_row = rows->n;
        memcpy(c->row, rows->row, rows->n * sizeof *c->row);
    }
    for (size_t i = 0; i < rows->n; i++) {
        rows->row[i].cache = (uint16_t)i;
        rows->row[i].variant = whole ? IPT_UNET_FULL : IPT_UNET_SHALLOW;
        if (whole)
            rows->row[i].want |= IPT_WANT_DEEP;
    }
}
