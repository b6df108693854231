/* graph/stream.c - the weights that a plan reads.  Without a memory limit they are uploaded when
 * they are bound.  Under one they are measured first; when they do not fit, as many as do stay on
 * the device and the rest comes in through a ring buffer in every run: while the device computes
 * one block, the host packs the next beside it.
 *
 * The order is known, so that places in the ring, and what has to be done before a place may be
 * written again, are settled when the plan is.  Must not know: dispatches, files. */
#include "graph/internal.h"

#include <stdlib.h>
#include <string.h>

enum { ALIGN = 256 };

/* A weight under one use. */
typedef struct read_weight {
    uint32_t v; /* its leaf */
    ipt_use use;
    ipt_weight_view view; /* buf NULL: not on the device */
    double macs;          /* of the products that it is in */
    bool is_known;        /* it came in before */
    uint32_t block;       /* + 1, that it was placed for last, and where */
    uint64_t off;
} read_weight;

/* One weight on its way into the ring. */
typedef struct arrival {
    uint32_t read, block;
    uint64_t off, end;
} arrival;

struct ipt_reads {
    read_weight *w;
    uint32_t n, cap;
    arrival *in;
    uint32_t n_in, cap_in;
    uint32_t n_block;
    ipt_buffer *ring;
    uint64_t ring_bytes, at; /* at: where the next node's weights begin */
};

static uint64_t padded(uint64_t bytes) { return (bytes + ALIGN - 1) / ALIGN * ALIGN; }

static bool is_limited(const ipt_plan *p) { return ipt_gpu_room(p->gpu) != UINT64_MAX; }

/* --- binding ---------------------------------------------------------------------------------- */
static ipt_status find(ipt_plan *p, read_weight *w)
{
    const ipt_value *v = &p->value[w->v];
    return p->weights->find(p->weights, v->name, &v->shape, w->use, &w->view);
}

static ipt_status add_read(ipt_plan *p, const read_weight *w, uint32_t *at)
{
    struct ipt_reads *r = p->reads;
    if (r->n == r->cap) {
        uint32_t cap = r->cap ? 2 * r->cap : 256;
        read_weight *grown = ipt_regrow(p->ctx, r->w, r->n * sizeof *grown, cap * sizeof *grown);
        if (!grown)
            return IPT_ERR_NOMEM;
        r->w = grown;
        r->cap = cap;
    }
    *at = r->n;
    r->w[r->n++] = *w;
    return IPT_OK;
}

ipt_status ipt_reads_bind(ipt_plan *p, ipt_planned_node *pn, int k, ipt_use use)
{
    read_weight w = {.v = pn->n.in[k], .use = use};
    const ipt_value *v = &p->value[w.v];
    uint32_t at = 0;
    if (!p->reads && !(p->reads = ipt_arena_alloc(&p->arena, sizeof *p->reads)))
        return IPT_ERR_NOMEM;
    while (at < p->reads->n && (p->reads->w[at].v != w.v || p->reads->w[at].use != use))
        at++;
    if (at == p->reads->n) {
        IPT_TRY(is_limited(p) ? p->weights->size(p->weights, v->name, &v->shape, use, &w.view)
                              : find(p, &w));
        IPT_TRY(add_read(p, &w, &at));
    }
    pn->weight[k] = p->reads->w[at].view;
    pn->read[k] = at + 1;
    return IPT_OK;
}

/* --- what it takes ---------------------------------------------------------------------------- */
/* The weights of a node that are not on the device, one behind the other. */
uint64_t ipt_reads_bytes(const ipt_plan *p, uint32_t node)
{
    const ipt_planned_node *pn = &p->node[node];
    uint64_t sum = 0;
    for (int k = 0; k < pn->n.n_in; k++) {
        const read_weight *w = pn->read[k] ? &p->reads->w[pn->read[k] - 1] : NULL;
        sum += w && !w->view.buf ? padded(w->view.bytes) : 0;
    }
    return sum;
}

uint64_t ipt_reads_block(const ipt_plan *p) { return p->reads ? p->reads->ring_bytes / 2 : 0; }

static uint64_t missing(const ipt_plan *p)
{
    uint64_t sum = 0;
    for (uint32_t i = 0; p->reads && i < p->reads->n; i++)
        sum += p->reads->w[i].view.buf ? 0 : padded(p->reads->w[i].view.bytes);
    return sum;
}

static double mib(uint64_t bytes) { return (double)bytes / (1024.0 * 1024.0); }

ipt_status ipt_reads_fit(ipt_plan *p)
{
    const uint64_t room = ipt_gpu_room(p->gpu), arena = p->arena_bytes;
    uint64_t need = missing(p), ring = 0;
    if (room == UINT64_MAX)
        return IPT_OK;
    for (uint32_t i = 0; i < p->n_node; i++) {
        uint64_t bytes = ipt_reads_bytes(p, i);
        ring = bytes > ring ? bytes : ring;
    }
    if (p->opts.stream) {
        need = ring;
        if (p->reads)
            p->reads->ring_bytes = ring;
    }
    if ((arena <= room && need <= room - arena) || (need == 0 && !p->opts.dry))
        return IPT_OK; /* an arena alone may also find its place in what is allocated already */
    const uint64_t limit = ipt_gpu_used_bytes(p->gpu) + room;
    return ipt_fail(p->ctx, IPT_ERR_DEVICE_MEM,
                    "needs %.1f MiB of device memory (%.1f working memory, %.1f %s, %.1f in use), "
                    "the limit is %.1f MiB: try a higher --vram-limit or a smaller picture",
                    mib(limit - room + arena + need), mib(arena), mib(need),
                    p->opts.stream ? "for the largest layer's weights" : "weights",
                    mib(limit - room), mib(limit));
}

ipt_plan_memory ipt_plan_get_memory(const ipt_plan *p)
{
    ipt_plan_memory m = {.working = p->gpu ? p->arena_bytes : 0};
    const struct ipt_reads *r = p->reads;
    if (!r)
        return m;
    for (uint32_t i = 0; i < r->n; i++) {
        m.weights += r->w[i].view.bytes;
        m.streamed += r->w[i].block ? r->w[i].view.bytes : 0;
    }
    m.ring = r->ring ? r->ring_bytes : 0;
    m.n_block = r->n_block;
    return m;
}

/* --- onto the device -------------------------------------------------------------------------- */
static ipt_status cancelled(const ipt_plan *p) /* loading weights takes seconds */
{
    return ipt_cancelled(p->ctx) ? ipt_fail(p->ctx, IPT_ERR_CANCELLED, "cancelled") : IPT_OK;
}

ipt_status ipt_reads_upload(ipt_plan *p)
{
    for (uint32_t i = 0; p->reads && i < p->reads->n; i++) {
        IPT_TRY(cancelled(p));
        if (!p->reads->w[i].view.buf)
            IPT_TRY(find(p, &p->reads->w[i]));
    }
    return IPT_OK;
}

ipt_status ipt_reads_ring(ipt_plan *p)
{
    return p->reads && p->reads->ring_bytes > 0
               ? ipt_buffer_create(p->gpu, p->reads->ring_bytes, &p->reads->ring)
               : IPT_OK;
}

static void count_macs(ipt_plan *p)
{
    for (uint32_t i = 0; i < p->n_node; i++) {
        const ipt_planned_node *pn = &p->node[i];
        double macs = 0;
        for (size_t k = 0; k < pn->launch.n_d; k++)
            macs += pn->launch.d[k].macs;
        for (int k = 0; k < pn->n.n_in; k++)
            if (pn->read[k] && p->reads->w[pn->read[k] - 1].use != IPT_USE_ROWS)
                p->reads->w[pn->read[k] - 1].macs += macs;
    }
}

/* What computes least a byte first: it would hide least of its own way onto the device. */
static int by_worth(const void *a, const void *b)
{
    const read_weight *x = *(read_weight *const *)a, *y = *(read_weight *const *)b;
    double wx = x->macs * (double)y->view.bytes, wy = y->macs * (double)x->view.bytes;
    if (wx < wy || wx > wy)
        return wx < wy ? -1 : 1;
    return x < y ? -1 : x > y;
}

ipt_status ipt_reads_settle(ipt_plan *p)
{
    struct ipt_reads *r = p->reads;
    ipt_status status = IPT_OK;
    if (!r)
        return IPT_OK;
    read_weight **order = ipt_calloc(p->ctx, r->n, sizeof(read_weight *));
    if (!order)
        return IPT_ERR_NOMEM;
    count_macs(p);
    r->n_in = r->n_block = 0;
    r->at = 0;
    for (uint32_t i = 0; i < r->n; i++) {
        r->w[i].block = 0;
        order[i] = &r->w[i];
    }
    qsort(order, r->n, sizeof(read_weight *), by_worth);
    for (uint32_t i = 0; i < r->n; i++) {
        if (order[i]->view.buf)
            continue;
        IPT_TRY_GOTO(cancelled(p), done);
        ipt_status found = find(p, order[i]);
        if (found != IPT_OK && found != IPT_ERR_DEVICE_MEM) { /* smaller ones may fit still */
            status = found;
            goto done;
        }
    }
done:
    ipt_free(order);
    return status;
}

/* --- the ring --------------------------------------------------------------------------------- */
/* The last block before this one that has some of [off, end), + 1. */
static uint32_t last_there(const struct ipt_reads *r, uint32_t block, uint64_t off, uint64_t end)
{
    for (uint32_t i = r->n_in; i-- > 0;)
        if (r->in[i].block != block && r->in[i].off < end && off < r->in[i].end)
            return r->in[i].block + 1;
    return 0;
}

static ipt_status add_arrival(ipt_plan *p, read_weight *w, uint32_t block, ipt_block *out)
{
    struct ipt_reads *r = p->reads;
    if (r->n_in == r->cap_in) {
        uint32_t cap = r->cap_in ? 2 * r->cap_in : 256;
        arrival *grown = ipt_regrow(p->ctx, r->in, r->n_in * sizeof *grown, cap * sizeof *grown);
        if (!grown)
            return IPT_ERR_NOMEM;
        r->in = grown;
        r->cap_in = cap;
    }
    arrival *a = &r->in[r->n_in];
    *a = (arrival){(uint32_t)(w - r->w), block, r->at, r->at + padded(w->view.bytes)};
    uint32_t after = last_there(r, block, a->off, a->end);
    out->after = after > out->after ? after : out->after;
    out->end = ++r->n_in;
    w->block = block + 1;
    w->off = a->off;
    r->at = a->end;
    return IPT_OK;
}

/* A node's weights lie side by side.  A block is one node, or takes half the ring at most: in
 * either case it cannot reach round to its own beginning. */
ipt_status ipt_reads_place(ipt_plan *p, uint32_t i, uint32_t first, uint32_t end, ipt_block *out)
{
    struct ipt_reads *r = p->reads;
    *out = (ipt_block){0};
    if (!r)
        return IPT_OK;
    out->first = out->end = r->n_in;
    for (uint32_t k = first; k < end; k++) {
        ipt_planned_node *pn = &p->node[k];
        if (r->at + ipt_reads_bytes(p, k) > r->ring_bytes)
            r->at = 0;
        for (int j = 0; j < pn->n.n_in; j++) {
            read_weight *w = pn->read[j] ? &r->w[pn->read[j] - 1] : NULL;
            if (!w)
                continue;
            pn->weight[j] = w->view;
            if (w->view.buf)
                continue;
            if (w->block != i + 1) /* else an earlier node of the block reads it too */
                IPT_TRY(add_arrival(p, w, i, out));
            pn->weight[j].buf = r->ring;
            pn->weight[j].off = w->off;
        }
    }
    r->n_block += out->end > out->first;
    return IPT_OK;
}

ipt_status ipt_reads_fill(ipt_plan *p, const ipt_block *b)
{
    struct ipt_reads *r = p->reads;
    for (uint32_t i = b->first; i < b->end; i++) {
        read_weight *w = &r->w[r->in[i].read];
        const ipt_value *v = &p->value[w->v];
        ipt_weight_view to = w->view;
        to.buf = r->ring;
        to.off = r->in[i].off;
        IPT_TRY(p->weights->put(p->weights, v->name, &v->shape, w->use, &to, w->is_known));
        w->is_known = true;
    }
    return IPT_OK;
}

void ipt_reads_destroy(ipt_plan *p)
{
    if (!p->reads)
        return;
    ipt_buffer_destroy(p->gpu, &p->reads->ring);
    ipt_free(p->reads->w);
    ipt_free(p->reads->in);
    p->reads = NULL;
}
