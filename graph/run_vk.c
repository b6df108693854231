/* graph/run_vk.c - plans on a device: kernels, arena, recorded command buffers, replay.
 * Commands are cut into submissions of bounded work, so that a desktop stays alive and a cancel is
 * seen soon; barriers come from byte ranges, so that reuse of arena space is ordered too. */
#include "graph/internal.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { GUARD_BYTES = 1024, MAX_NODES_PER_CMD = 256, IN_FLIGHT = 2 };
static const uint32_t POISON = 0x7fc07fc0U; /* NaN as f32 and as a pair of f16 */

typedef struct piece {
    ipt_cmd *cmd;
    uint32_t segment, first, end; /* nodes [first, end) */
    ipt_block block;              /* weights that come in for them */
    uint64_t value;               /* of its last submit */
} piece;

typedef struct span {
    const ipt_buffer *buf;
    uint64_t off, end;
    bool write;
} span;

struct ipt_device_run {
    ipt_buffer **arena; /* [n_arena], each of what lies between two cuts */
    uint32_t n_arena;
    piece *piece;
    uint32_t n_piece;
    bool is_settled;   /* recorded, unless the plan is a dry one */
    ipt_plan_row *row; /* profile, one per node */
    size_t n_row;
};

/* --- operands the host packs ------------------------------------------------------------------ */
static ipt_shape panel_shape(const ipt_node *n, int operand)
{
    const ipt_op_def *def = ipt_op_table[n->op];
    return def->packs ? def->packs(n, operand) : (ipt_shape){.rank = 0};
}

/* Adapter factors that are only ever right operands are packed once, when they are written, instead
 * of at every run.  Factors with gradients have other readers and stay row-major. */
static ipt_status choose_panels(ipt_plan *p)
{
    uint8_t *refused = ipt_calloc(p->ctx, p->n_value, 1);
    if (!refused)
        return IPT_ERR_NOMEM;
    for (uint32_t i = 0; i < p->n_node; i++)
        for (int k = 0; k < p->node[i].n.n_in; k++) {
            uint32_t v = p->node[i].n.in[k];
            const ipt_value *value = &p->value[v];
            if (!v || value->node || value->role != IPT_PARAM || p->slot[p->place[v] - 1].is_state)
                continue;
            ipt_shape s = panel_shape(&p->node[i].n, k);
            if (s.rank == 0 || value->is_output ||
                (p->panel[v].rank && !ipt_shape_same(&s, &p->panel[v])))
                refused[v] = 1;
            p->panel[v] = s;
        }
    for (uint32_t v = 1; v < p->n_value; v++) {
        if (refused[v])
            p->panel[v].rank = 0;
        if (p->panel[v].rank)
            p->slot[p->place[v] - 1].bytes = ipt_panel_bytes(&p->panel[v], p->panel[v].dtype);
    }
    for (uint32_t i = 0; i < p->n_node; i++)
        for (int k = 0; k < p->node[i].n.n_in; k++)
            if (p->panel[p->node[i].n.in[k]].rank)
                p->node[i].n.in_is_panel[k] = true;
    ipt_free(refused);
    return IPT_OK;
}

static float get_f32(const void *data, size_t i) { return ((const float *)data)[i]; }

ipt_binding ipt_device_place(const ipt_plan *p, const ipt_slot *s)
{
    if (s->is_state)
        return (ipt_binding){s->buf, s->off, s->bytes};
    return (ipt_binding){p->dev->arena[s->off / p->arena_part], s->off % p->arena_part, s->bytes};
}

static ipt_binding place_of(const ipt_plan *p, uint32_t v)
{
    return ipt_device_place(p, &p->slot[p->place[v] - 1]);
}

static ipt_status write_panel(ipt_plan *p, uint32_t v, const void *src, ipt_binding at)
{
    const ipt_shape *s = &p->panel[v];
    size_t o = (size_t)s->dim[0], i = (size_t)s->dim[s->rank - 1],
           kw = s->rank == 4 ? (size_t)s->dim[2] : 1;
    uint64_t bytes = ipt_panel_bytes(s, s->dtype);
    void *packed = ipt_alloc(p->ctx, bytes);
    if (!packed)
        return IPT_ERR_NOMEM;
    ipt_panel_src from = {
        .data = src, .get = get_f32, .so = 1, .si = o, .sx = i * o, .sy = kw * i * o};
    ipt_panel_pack(s, &from, s->dtype, packed);
    ipt_status status = ipt_buffer_write(p->gpu, at.buf, at.off, packed, bytes);
    ipt_free(packed);
    return status;
}

static ipt_status read_panel(ipt_plan *p, uint32_t v, float *dst, ipt_binding at)
{
    const ipt_shape *s = &p->panel[v];
    uint64_t bytes = ipt_panel_bytes(s, s->dtype);
    void *packed = ipt_alloc(p->ctx, bytes);
    if (!packed)
        return IPT_ERR_NOMEM;
    ipt_status status = ipt_buffer_read(p->gpu, at.buf, at.off, packed, bytes);
    if (status == IPT_OK)
        ipt_panel_unpack(s, s->dtype, packed, dst);
    ipt_free(packed);
    return status;
}

/* --- creation -------------------------------------------------------------------------------- */
/* Weights as gradients want them are a second copy.  On CPU devices, where turning them round in
 * every run takes longer than the product, it is taken while memory is plenty (the machine's: what
 * llvmpipe says of its heap is 2 GiB whatever there is). */
static bool has_room_for_back(const ipt_plan *p, const ipt_shape *w)
{
    return ipt_gpu_traits(p->gpu)->simd &&
           ipt_gpu_used_bytes(p->gpu) + ipt_panel_bytes(w, IPT_F32) <= ipt_host_bytes() / 2;
}

static ipt_status bind_back(ipt_plan *p, ipt_planned_node *pn, int k)
{
    const ipt_value *v = &p->value[pn->n.in[k]];
    const ipt_shape back = ipt_panel_back(&v->shape);
    if (!has_room_for_back(p, &back))
        return IPT_ERR_DEVICE_MEM;
    IPT_TRY(ipt_reads_bind(p, pn, k, IPT_USE_BACK));
    pn->n.in_is_back[k] = true;
    return IPT_OK;
}

static ipt_status bind_weights(ipt_plan *p, ipt_planned_node *pn)
{
    const ipt_op_def *def = ipt_op_table[pn->n.op];
    for (int k = 0; k < pn->n.n_in; k++) {
        uint32_t v = pn->n.in[k];
        if (!v || p->value[v].node || p->value[v].role != IPT_WEIGHT)
            continue;
        if (!p->weights)
            return ipt_fail(p->ctx, IPT_ERR_MISSING, "%s: the plan has no weights",
                            p->value[v].name);
        ipt_use use = def->panel >> k & 1   ? IPT_USE_PANEL
                      : def->table >> k & 1 ? IPT_USE_TABLE
                                            : IPT_USE_ROWS;
        ipt_status status = def->back >> k & 1 ? bind_back(p, pn, k) : IPT_ERR_DEVICE_MEM;
        if (status == IPT_ERR_DEVICE_MEM)
            status = ipt_reads_bind(p, pn, k, use);
        IPT_TRY(status);
        pn->n.in_shape[k].dtype = pn->weight[k].dtype;
    }
    return IPT_OK;
}

/* Bytes of the tensor behind a binding; 0: there is none. */
static uint64_t tensor_bytes(const ipt_plan *p, const ipt_planned_node *pn, const ipt_bind *b)
{
    if (b->src == IPT_SRC_SCRATCH)
        return b->index < pn->launch.n_scratch ? pn->launch.scratch[b->index] : 0;
    if (b->src == IPT_SRC_IN && pn->read[b->index])
        return pn->weight[b->index].bytes;
    uint32_t v = b->src == IPT_SRC_IN ? pn->n.in[b->index] : pn->n.out[b->index];
    if (!p->place[v])
        return 0;
    return p->panel[v].rank ? p->slot[p->place[v] - 1].bytes : ipt_shape_bytes(&p->value[v].shape);
}

/* What no operator may ask of this device: told before anything is recorded. */
static ipt_status check_limits(const ipt_plan *p, const ipt_planned_node *pn)
{
    const ipt_traits *dev = ipt_gpu_traits(p->gpu);
    for (size_t k = 0; k < pn->launch.n_d; k++) {
        const ipt_dispatch *d = &pn->launch.d[k];
        for (int i = 0; i < d->n_bind; i++) {
            const ipt_bind *b = &d->bind[i];
            uint64_t size = tensor_bytes(p, pn, b), bytes = b->bytes ? b->bytes : size - b->off;
            uint64_t limit = b->kind == IPT_BIND_SSBO            ? dev->max_range
                             : b->kind == IPT_BIND_TEXEL_RGBA16F ? dev->max_texels * 8
                                                                 : dev->max_texels * 16;
            if (bytes > limit)
                return IPT_ERR_TOO_LARGE;
        }
        for (int i = 0; i < 3; i++)
            if (d->groups[i] > dev->max_group_count)
                return IPT_ERR_TOO_LARGE;
    }
    return IPT_OK;
}

static ipt_status describe(ipt_plan *p, uint32_t i)
{
    ipt_planned_node *pn = &p->node[i];
    const ipt_op_def *def = ipt_op_table[pn->n.op];
    if (def->view)
        return IPT_OK;
    IPT_TRY(bind_weights(p, pn));
    pn->launch.dev = ipt_gpu_traits(p->gpu);
    pn->launch.arena = &p->arena;
    ipt_status s = def->kernel(&pn->n, &pn->launch);
    if (s == IPT_OK)
        s = pn->launch.status;
    if (s == IPT_OK)
        s = check_limits(p, pn);
    if (s == IPT_ERR_TOO_LARGE) {
        char shape[64];
        ipt_shape_text(&pn->n.in_shape[0], shape, sizeof shape);
        return ipt_fail(p->ctx, s,
                        "%s: %s of %s passes what %s takes at once: a binding holds %" PRIu64
                        " bytes",
                        pn->n.name, def->name, shape, ipt_gpu_get_info(p->gpu)->name,
                        ipt_gpu_traits(p->gpu)->max_range);
    }
    if (s == IPT_ERR_UNSUPPORTED)
        return ipt_fail(p->ctx, s, "%s: %s cannot run on %s with these shapes", pn->n.name,
                        def->name, ipt_gpu_get_info(p->gpu)->name);
    if (s != IPT_OK)
        return s;
    for (int k = 0; k < pn->launch.n_scratch; k++) {
        pn->scratch_slot[k] = ipt_planner_add_slot(p, pn->launch.scratch[k], i, i, false);
        if (!pn->scratch_slot[k])
            return IPT_ERR_NOMEM;
    }
    return IPT_OK;
}

/* Buffer range of one binding. */
static ipt_status resolve(const ipt_plan *p, const ipt_planned_node *pn, const ipt_bind *b,
                          ipt_binding *out)
{
    uint32_t slot = 0;
    if (b->src == IPT_SRC_IN && pn->read[b->index]) {
        const ipt_weight_view *w = &pn->weight[b->index];
        *out = (ipt_binding){w->buf, w->off + b->off, b->bytes ? b->bytes : w->bytes - b->off};
        return IPT_OK;
    }
    const uint64_t size = tensor_bytes(p, pn, b);
    if (b->src == IPT_SRC_SCRATCH)
        slot = pn->scratch_slot[b->index];
    else
        slot = p->place[b->src == IPT_SRC_IN ? pn->n.in[b->index] : pn->n.out[b->index]];
    if (!slot || b->off >= size || b->off + b->bytes > size)
        return ipt_fail(p->ctx, IPT_ERR_ARG, "%s: binding %d out of range", pn->n.name, b->index);
    uint64_t unit = b->kind == IPT_BIND_SSBO ? 4 : 16;
    uint64_t bytes = b->bytes ? b->bytes : size - b->off;
    *out = ipt_device_place(p, &p->slot[slot - 1]);
    out->off += b->off;
    out->bytes = (bytes + unit - 1) / unit * unit;
    return IPT_OK;
}

/* True when the dispatch must wait for what is pending. */
static bool hazard(const span *pending, size_t n, const span *s)
{
    for (size_t i = 0; i < n; i++)
        if ((pending[i].write || s->write) && pending[i].buf == s->buf && pending[i].off < s->end &&
            s->off < pending[i].end)
            return true;
    return false;
}

typedef struct recorder {
    ipt_plan *p;
    ipt_cmd *cmd;
    span pending[512]; /* since the last barrier */
    size_t n_pending;
    size_t n_before; /* of them, those of nodes before this one */
} recorder;

static ipt_status record_dispatch(recorder *r, const ipt_planned_node *pn, const ipt_dispatch *d)
{
    ipt_plan *p = r->p;
    ipt_binding b[IPT_MAX_BIND] = {{NULL, 0, 0}};
    span spans[IPT_MAX_BIND] = {0};
    size_t n_span = 0;
    ipt_kernel *kernel = NULL;
    bool wait = false;
    IPT_TRY(ipt_kernel_get(p->gpu, &d->k, &kernel));
    for (int i = 0; i < d->n_bind; i++) {
        IPT_TRY(resolve(p, pn, &d->bind[i], &b[i]));
        if (d->bind[i].src == IPT_SRC_IN && pn->read[d->bind[i].index])
            continue; /* a weight: no commands write it */
        span s = {b[i].buf, b[i].off, b[i].off + b[i].bytes, d->bind[i].write};
        wait = wait || hazard(r->pending, d->no_wait ? r->n_before : r->n_pending, &s);
        spans[n_span++] = s;
    }
    if (wait || r->n_pending + n_span > IPT_COUNT(r->pending)) {
        ipt_cmd_barrier(r->cmd);
        r->n_pending = r->n_before = 0;
    }
    memcpy(r->pending + r->n_pending, spans, n_span * sizeof *spans);
    r->n_pending += n_span;
    return ipt_cmd_dispatch(r->cmd, kernel, b, d->push, d->groups);
}

static ipt_status record_piece(ipt_plan *p, piece *c)
{
    recorder *r = ipt_alloc(p->ctx, sizeof *r);
    if (!r)
        return IPT_ERR_NOMEM;
    ipt_status status = IPT_OK;
    r->p = p;
    IPT_TRY_GOTO(ipt_cmd_create(p->gpu, &c->cmd), done);
    r->cmd = c->cmd;
    ipt_cmd_barrier(r->cmd); /* after what earlier submissions wrote */
    if (p->opts.profile)
        IPT_TRY_GOTO(ipt_cmd_stamp(r->cmd, 0), done);
    for (uint32_t i = c->first; i < c->end; i++) {
        const ipt_planned_node *pn = &p->node[i];
        r->n_before = r->n_pending;
        for (size_t k = 0; k < pn->launch.n_d; k++)
            IPT_TRY_GOTO(record_dispatch(r, pn, &pn->launch.d[k]), done);
        if (p->opts.profile) {
            ipt_cmd_barrier(r->cmd);
            r->n_pending = 0;
            IPT_TRY_GOTO(ipt_cmd_stamp(r->cmd, i - c->first + 1), done);
        }
    }
    IPT_TRY_GOTO(ipt_cmd_end(r->cmd), done);
done:
    ipt_free(r);
    return status;
}

/* Cuts the nodes into pieces at segments and at a budget of work. */
static ipt_status make_pieces(ipt_plan *p)
{
    struct ipt_device_run *d = p->dev;
    const bool simd = ipt_gpu_traits(p->gpu)->simd;
    /* With weights on their way the next ones come in while a piece runs: not all at once. */
    double budget = simd ? 4e9 : p->opts.stream ? 4e10 : 4e11, macs = 0;
    uint64_t coming = 0;
    d->piece = ipt_arena_alloc(&p->arena, (p->n_node + 1) * sizeof *d->piece);
    if (!d->piece)
        return IPT_ERR_NOMEM;
    for (uint32_t i = 0; i < p->n_node; i++) {
        piece *c = d->n_piece ? &d->piece[d->n_piece - 1] : NULL;
        const uint64_t bytes = ipt_reads_bytes(p, i);
        double work = 0;
        for (size_t k = 0; k < p->node[i].launch.n_d; k++)
            work += p->node[i].launch.d[k].macs;
        if (!c || c->segment != p->node[i].segment || macs + work > budget ||
            (bytes > 0 && coming > 0 && coming + bytes > ipt_reads_block(p)) ||
            i - c->first >= MAX_NODES_PER_CMD || p->opts.check) {
            d->piece[d->n_piece++] = (piece){.segment = p->node[i].segment, .first = i, .end = i};
            c = &d->piece[d->n_piece - 1];
            macs = 0;
            coming = 0;
        }
        c->end = i + 1;
        macs += work;
        coming += bytes;
    }
    for (uint32_t i = 0; i < d->n_piece; i++)
        IPT_TRY(ipt_reads_place(p, i, d->piece[i].first, d->piece[i].end, &d->piece[i].block));
    for (uint32_t i = 0; i < d->n_piece; i++)
        IPT_TRY(record_piece(p, &d->piece[i]));
    return IPT_OK;
}

static void drop_pieces(ipt_plan *p)
{
    for (uint32_t i = 0; i < p->dev->n_piece; i++)
        ipt_cmd_destroy(p->gpu, &p->dev->piece[i].cmd);
    p->dev->n_piece = 0;
}

ipt_status ipt_device_settle(ipt_plan *p)
{
    struct ipt_device_run *d = p->dev;
    if (d->is_settled)
        return IPT_OK;
    if (p->opts.stream)
        IPT_TRY(ipt_reads_settle(p));
    ipt_status status = make_pieces(p);
    d->is_settled = status == IPT_OK;
    if (status != IPT_OK)
        drop_pieces(p);
    return status;
}

/* Below the device's limit, so that memory.c may add to it what it likes. */
static uint64_t arena_part(const ipt_plan *p)
{
    enum { SPARE = 4096 };
    const uint64_t most = ipt_gpu_traits(p->gpu)->max_buffer;
    return (most > 2 * SPARE ? most - SPARE : SPARE) / SPARE * SPARE;
}

/* One buffer for each part that is used, as long as what lies in it. */
static ipt_status create_arena(ipt_plan *p)
{
    struct ipt_device_run *d = p->dev;
    const uint64_t part = p->arena_part, n = (p->arena_bytes + part - 1) / part;
    uint64_t *end = ipt_arena_alloc(&p->arena, n * sizeof *end);
    d->arena = ipt_arena_alloc(&p->arena, n * sizeof *d->arena);
    if (!end || !d->arena)
        return IPT_ERR_NOMEM;
    if (p->n_slot == 0)
        end[0] = p->arena_bytes;
    for (uint32_t i = 0; i < p->n_slot; i++) {
        const ipt_slot *s = &p->slot[i];
        const uint64_t at = s->off / part, to = s->off % part + s->bytes + GUARD_BYTES;
        if (s->is_state)
            continue;
        if (s->bytes > part - s->off % part)
            return ipt_fail(p->ctx, IPT_ERR_DEVICE_MEM,
                            "%s: one value needs %" PRIu64 " MiB, one buffer may hold %" PRIu64
                            " MiB; try a smaller picture",
                            ipt_gpu_get_info(p->gpu)->name, s->bytes >> 20, part >> 20);
        end[at] = to > end[at] ? to : end[at];
    }
    for (uint64_t i = 0; i < n; i++) { /* what lies at the end may be read a little beyond it */
        const uint64_t most = i + 1 < n ? part : p->arena_bytes - i * part;
        end[i] = end[i] == 0 ? 256 : end[i] < most ? end[i] : most;
        IPT_TRY(ipt_buffer_create(p->gpu, i + 1 < n ? end[i] : most, &d->arena[i]));
        d->n_arena++;
    }
    return IPT_OK;
}

/* Entries behind n_spec and n_bind are zero in both, as ipt_launch_add left them. */
static bool same_kernel(const ipt_kernel_desc *a, const ipt_kernel_desc *b)
{
    return a->shader == b->shader && a->n_spec == b->n_spec && a->n_bind == b->n_bind &&
           a->push_bytes == b->push_bytes && a->subgroup == b->subgroup &&
           memcmp(a->spec, b->spec, sizeof a->spec) == 0 &&
           memcmp(a->kind, b->kind, sizeof a->kind) == 0;
}

/* The kernels of the plan, each once, compiled before they run. */
static void warm_kernels(const ipt_plan *p)
{
    enum { MOST = 256 };
    ipt_kernel_desc *list = ipt_calloc(NULL, MOST, sizeof *list);
    size_t n = 0;
    if (!list)
        return;
    for (uint32_t i = 0; i < p->n_node; i++)
        for (size_t k = 0; k < p->node[i].launch.n_d && n < MOST; k++) {
            const ipt_kernel_desc *d = &p->node[i].launch.d[k].k;
            size_t at = 0;
            while (at < n && !same_kernel(&list[at], d))
                at++;
            if (at == n)
                list[n++] = *d;
        }
    ipt_gpu_warm(p->gpu, list, n);
    ipt_free(list);
}

ipt_status ipt_device_create(ipt_plan *p)
{
    p->dev = ipt_arena_alloc(&p->arena, sizeof *p->dev);
    if (!p->dev)
        return IPT_ERR_NOMEM;
    if (!p->opts.check) /* which reads operands back */
        IPT_TRY(choose_panels(p));
    for (uint32_t i = 0; i < p->n_node; i++) {
        if (ipt_cancelled(p->ctx)) /* loading weights takes seconds */
            return ipt_fail(p->ctx, IPT_ERR_CANCELLED, "cancelled");
        IPT_TRY(describe(p, i));
    }
    if (p->opts.guard)
        for (uint32_t s = 0; s < p->n_slot; s++) { /* nothing shares a place */
            p->slot[s].first = 0;
            p->slot[s].last = UINT32_MAX;
        }
    p->arena_part = arena_part(p);
    IPT_TRY(ipt_planner_offsets(p, p->opts.guard ? GUARD_BYTES : 0));
    if (p->opts.arena_limit && p->arena_bytes > p->opts.arena_limit)
        return ipt_fail(p->ctx, IPT_ERR_DEVICE_MEM,
                        "working memory: need %" PRIu64 " MiB, have %" PRIu64
                        " MiB; try a smaller picture, --vae-tile auto or a higher --vram-limit",
                        p->arena_bytes >> 20, p->opts.arena_limit >> 20);
    IPT_TRY(ipt_reads_fit(p));
    if (p->opts.dry && ipt_gpu_room(p->gpu) != UINT64_MAX)
        return IPT_OK;
    if (!p->opts.dry)
        warm_kernels(p);
    IPT_TRY(create_arena(p));
    IPT_TRY(p->opts.stream ? ipt_reads_ring(p) : ipt_reads_upload(p));
    return p->opts.dry || p->opts.stream ? IPT_OK : ipt_device_settle(p);
}

void ipt_device_destroy(ipt_plan *p)
{
    if (!p->dev)
        return;
    drop_pieces(p);
    ipt_free(p->dev->row);
    for (uint32_t i = 0; i < p->dev->n_arena; i++)
        ipt_buffer_destroy(p->gpu, &p->dev->arena[i]);
    ipt_reads_destroy(p);
    p->dev = NULL;
}

/* --- host access ------------------------------------------------------------------------------ */
ipt_status ipt_device_write(ipt_plan *p, uint32_t v, const void *src)
{
    const ipt_shape *s = &p->value[v].shape;
    const ipt_binding at = place_of(p, v);
    size_t n = ipt_shape_count(s);
    if (p->panel[v].rank)
        return write_panel(p, v, src, at);
    if (s->dtype != IPT_F16)
        return ipt_buffer_write(p->gpu, at.buf, at.off, src, n * 4);
    uint16_t *half = ipt_calloc(p->ctx, n, 2);
    if (!half)
        return IPT_ERR_NOMEM;
    const float *f = src;
    for (size_t i = 0; i < n; i++)
        half[i] = ipt_f32_to_f16(f[i]);
    ipt_status status = ipt_buffer_write(p->gpu, at.buf, at.off, half, n * 2);
    ipt_free(half);
    return status;
}

ipt_status ipt_device_read(ipt_plan *p, uint32_t v, void *dst)
{
    const ipt_shape *s = &p->value[v].shape;
    const ipt_binding at = place_of(p, v);
    size_t n = ipt_shape_count(s);
    if (p->panel[v].rank)
        return read_panel(p, v, dst, at);
    if (s->dtype != IPT_F16)
        return ipt_buffer_read(p->gpu, at.buf, at.off, dst, n * 4);
    uint16_t *half = ipt_calloc(p->ctx, n, 2);
    if (!half)
        return IPT_ERR_NOMEM;
    ipt_status status = ipt_buffer_read(p->gpu, at.buf, at.off, half, n * 2);
    float *f = dst;
    for (size_t i = 0; status == IPT_OK && i < n; i++)
        f[i] = ipt_f16_to_f32(half[i]);
    ipt_free(half);
    return status;
}

ipt_status ipt_device_read_double(ipt_plan *p, uint32_t v, double *dst)
{
    const ipt_shape *s = &p->value[v].shape;
    size_t n = ipt_shape_count(s);
    if (!p->value[v].node && p->value[v].role == IPT_WEIGHT)
        return p->weights->read(p->weights, p->value[v].name, s, dst);
    float *f = ipt_calloc(p->ctx, n, sizeof *f);
    if (!f)
        return IPT_ERR_NOMEM;
    ipt_status status = ipt_device_read(p, v, f);
    for (size_t i = 0; status == IPT_OK && i < n; i++) {
        int32_t word;
        memcpy(&word, &f[i], sizeof word);
        dst[i] = s->dtype == IPT_I32 ? (double)word : (double)f[i];
    }
    ipt_free(f);
    return status;
}

/* --- guard bands ------------------------------------------------------------------------------ */
/* Bytes at `shift` from where slot s begins. */
static ipt_status fill(ipt_plan *p, const ipt_slot *s, int64_t shift, uint64_t bytes)
{
    const ipt_binding at = ipt_device_place(p, s);
    const uint64_t off = (uint64_t)((int64_t)at.off + shift);
    uint32_t words[256];
    for (size_t i = 0; i < IPT_COUNT(words); i++)
        words[i] = POISON;
    for (uint64_t done = 0; done < bytes; done += sizeof words) {
        uint64_t n = bytes - done < sizeof words ? bytes - done : sizeof words;
        IPT_TRY(ipt_buffer_write(p->gpu, at.buf, off + done, words, n));
    }
    return IPT_OK;
}

static ipt_status poison_arena(ipt_plan *p)
{
    for (uint32_t i = 0; i < p->n_slot; i++) {
        const ipt_slot *s = &p->slot[i];
        if (s->is_state)
            continue;
        IPT_TRY(fill(p, s, -GUARD_BYTES, GUARD_BYTES));
        if (!s->pinned)
            IPT_TRY(fill(p, s, 0, s->bytes));
        IPT_TRY(fill(p, s, (int64_t)s->bytes, GUARD_BYTES));
    }
    return IPT_OK;
}

static ipt_status check_band(ipt_plan *p, const ipt_slot *s, int64_t shift)
{
    const ipt_binding at = ipt_device_place(p, s);
    const uint64_t off = (uint64_t)((int64_t)at.off + shift);
    uint8_t got[GUARD_BYTES], want[4];
    memcpy(want, &POISON, sizeof want);
    IPT_TRY(ipt_buffer_read(p->gpu, at.buf, off, got, sizeof got));
    for (size_t i = 0; i < sizeof got; i++)
        if (got[i] != want[i % 4])
            return ipt_fail(p->ctx, IPT_ERR_SHAPE,
                            "guard band at arena offset %" PRIu64 " was written", off + i);
    return IPT_OK;
}

static ipt_status check_guards(ipt_plan *p)
{
    for (uint32_t i = 0; i < p->n_slot; i++) {
        if (p->slot[i].is_state)
            continue;
        IPT_TRY(check_band(p, &p->slot[i], -GUARD_BYTES));
        IPT_TRY(check_band(p, &p->slot[i], (int64_t)p->slot[i].bytes));
    }
    return IPT_OK;
}

/* --- run -------------------------------------------------------------------------------------- */
/* From the shapes, padding left out: the least that any kernel moves. */
static double node_bytes(const ipt_node *n)
{
    const ipt_op_def *def = ipt_op_table[n->op];
    const uint64_t y = ipt_shape_bytes(&n->out_shape[0]);
    uint64_t sum = 0;
    for (int k = 0; k < n->n_in && !def->view; k++) {
        bool again = n->in[k] == 0;
        for (int j = 0; j < k; j++)
            again = again || n->in[j] == n->in[k];
        const uint64_t x = again ? 0 : ipt_shape_bytes(&n->in_shape[k]);
        sum += def->picks >> k & 1 && x > y ? y : x;
    }
    for (int k = 0; k < n->n_out && !def->view; k++)
        sum += ipt_shape_bytes(&n->out_shape[k]);
    return (double)sum;
}

static ipt_plan_row row_of(const ipt_planned_node *pn, double ms)
{
    ipt_plan_row row = {.op = ipt_op_table[pn->n.op]->name,
                        .name = pn->n.name,
                        .ms = ms,
                        .bytes = node_bytes(&pn->n)};
    for (size_t i = 0; i < pn->launch.n_d; i++) {
        const ipt_dispatch *d = &pn->launch.d[i];
        row.macs += d->macs;
        row.matrix_macs += d->is_matrix ? d->macs : 0;
    }
    return row;
}

static ipt_status collect_profile(ipt_plan *p)
{
    struct ipt_device_run *d = p->dev;
    if (!d->row) {
        d->row = ipt_calloc(p->ctx, p->n_node + 1, sizeof *d->row);
        if (!d->row)
            return IPT_ERR_NOMEM;
        d->n_row = p->n_node;
    }
    for (uint32_t i = 0; i < d->n_piece; i++) {
        double ms[MAX_NODES_PER_CMD + 2] = {0};
        const piece *c = &d->piece[i];
        IPT_TRY(ipt_cmd_stamps(c->cmd, ms, c->end - c->first + 1));
        for (uint32_t k = c->first; k < c->end; k++)
            d->row[k] = row_of(&p->node[k], ms[k - c->first + 1] - ms[k - c->first]);
    }
    return IPT_OK;
}

ipt_status ipt_plan_profile(ipt_plan *p, const ipt_plan_row **rows, size_t *n)
{
    if (!p->gpu || !p->opts.profile)
        return ipt_fail(p->ctx, IPT_ERR_ARG, "the plan was not created with profile");
    IPT_TRY(collect_profile(p));
    *rows = p->dev->row;
    *n = p->dev->n_row;
    return IPT_OK;
}

static double nmse(const double *ref, const double *got, size_t n)
{
    double err = 0, sum = 0;
    for (size_t i = 0; i < n; i++) {
        double e = got[i] - ref[i];
        if (!(isfinite(got[i])) && isfinite(ref[i]))
            return (double)INFINITY;
        err += e * e;
        sum += ref[i] * ref[i];
    }
    return sum > 0 ? err / sum : err;
}

/* Value k of a node that it makes or changes in place; 0: no further one. */
static uint32_t result_of(const ipt_node *n, int k)
{
    const uint8_t writes = ipt_op_table[n->op]->writes;
    if (writes == 0)
        return k < n->n_out ? n->out[k] : 0;
    for (int i = 0; i < n->n_in; i++)
        if (writes >> i & 1 && k-- == 0)
            return n->in[i];
    return 0;
}

/* What lies on the device of a weight that is stored in q8; n: a multiple of 32. */
static void round_q8(double *v, size_t n)
{
    float block[32];
    for (size_t i = 0; i < n; i += IPT_COUNT(block)) {
        for (size_t k = 0; k < IPT_COUNT(block); k++)
            block[k] = (float)v[i + k];
        ipt_q8_round(block, IPT_COUNT(block));
        for (size_t k = 0; k < IPT_COUNT(block); k++)
            v[i + k] = (double)block[k];
    }
}

/* One node on both sides, from the device's own inputs. */
static ipt_status check_node(ipt_plan *p, const piece *c)
{
    const ipt_node *n = &p->node[c->first].n;
    const ipt_op_def *def = ipt_op_table[n->op];
    double *in[IPT_MAX_IN] = {0}, *out[IPT_MAX_OUT] = {0}, *got = NULL;
    ipt_status status = IPT_OK;
    uint64_t value = 0;
    for (int k = 0; k < n->n_in; k++) {
        if (!n->in[k])
            continue;
        in[k] = ipt_calloc(p->ctx, ipt_shape_count(&p->value[n->in[k]].shape), sizeof(double));
        if (!in[k]) {
            status = IPT_ERR_NOMEM;
            goto done;
        }
        IPT_TRY_GOTO(ipt_device_read_double(p, n->in[k], in[k]), done);
        if (p->node[c->first].weight[k].is_q8)
            round_q8(in[k], ipt_shape_count(&n->in_shape[k]));
    }
    for (int k = 0; k < IPT_MAX_OUT && result_of(n, k) && !def->view; k++) {
        const uint32_t v = result_of(n, k);
        out[k] = ipt_calloc(p->ctx, ipt_shape_count(&p->value[v].shape), sizeof(double));
        if (!out[k]) {
            status = IPT_ERR_NOMEM;
            goto done;
        }
        if (def->writes)
            IPT_TRY_GOTO(ipt_device_read_double(p, v, out[k]), done);
    }
    IPT_TRY_GOTO(ipt_cmd_submit(c->cmd, &value), done);
    IPT_TRY_GOTO(ipt_gpu_wait(p->gpu, value), done);
    if (def->view)
        goto done;
    def->ref(n, (const double *const *)in, out);
    for (int k = 0; k < IPT_MAX_OUT && result_of(n, k) && status == IPT_OK; k++) {
        const ipt_value *v = &p->value[result_of(n, k)];
        size_t count = ipt_shape_count(&v->shape);
        got = ipt_calloc(p->ctx, count, sizeof(double));
        status = got ? ipt_device_read_double(p, result_of(n, k), got) : IPT_ERR_NOMEM;
        double limit = v->shape.dtype == IPT_F16 ? 1e-4 : 1e-6;
        double e = status == IPT_OK ? nmse(out[k], got, count) : 0;
        if (!(e <= limit))
            status = ipt_fail(p->ctx, IPT_ERR_UNSUPPORTED,
                              "%s: %s: output %d differs from the reference: NMSE %.3g, limit %.3g",
                              n->name, def->name, k, e, limit);
        ipt_free(got);
        got = NULL;
    }
done:
    for (int k = 0; k < IPT_MAX_IN; k++)
        ipt_free(in[k]);
    for (int k = 0; k < IPT_MAX_OUT; k++)
        ipt_free(out[k]);
    return status;
}

/* The weights of a block, while earlier pieces run that do not read where they go. */
static ipt_status bring_in(ipt_plan *p, const ipt_block *b)
{
    if (b->after > 0)
        IPT_TRY(ipt_gpu_wait(p->gpu, p->dev->piece[b->after - 1].value));
    return ipt_reads_fill(p, b);
}

ipt_status ipt_device_exec(ipt_plan *p, uint32_t segment)
{
    struct ipt_device_run *d = p->dev;
    uint64_t flight[IN_FLIGHT] = {0}, n = 0;
    ipt_status status = IPT_OK;
    IPT_TRY(ipt_device_settle(p));
    if (p->opts.guard && segment == 0)
        IPT_TRY(poison_arena(p));
    for (uint32_t i = 0; i < d->n_piece && status == IPT_OK; i++) {
        if (d->piece[i].segment != segment)
            continue;
        if (ipt_cancelled(p->ctx)) {
            status = ipt_fail(p->ctx, IPT_ERR_CANCELLED, "cancelled");
            break;
        }
        status = bring_in(p, &d->piece[i].block);
        if (status != IPT_OK)
            break;
        if (p->opts.check) {
            status = check_node(p, &d->piece[i]);
            continue;
        }
        if (flight[n % IN_FLIGHT])
            IPT_TRY(ipt_gpu_wait(p->gpu, flight[n % IN_FLIGHT]));
        status = ipt_cmd_submit(d->piece[i].cmd, &d->piece[i].value);
        flight[n++ % IN_FLIGHT] = d->piece[i].value;
    }
    for (int k = 0; k < IN_FLIGHT; k++)
        if (flight[k]) {
            ipt_status s = ipt_gpu_wait(p->gpu, flight[k]);
            status = status == IPT_OK ? s : status;
        }
    if (status == IPT_OK && p->opts.guard)
        status = check_guards(p);
    return status;
}
