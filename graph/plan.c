/* graph/plan.c - the public face of plans: creation, names, sizes; device and host runs are behind.
 */
#include "graph/internal.h"

#include <stdlib.h>
#include <string.h>

static ipt_status copy_values(ipt_plan *p, const ipt_graph *g)
{
    p->n_value = g->n_value;
    p->value = ipt_arena_alloc(&p->arena, g->n_value * sizeof *p->value);
    p->place = ipt_arena_alloc(&p->arena, g->n_value * sizeof *p->place);
    p->panel = ipt_arena_alloc(&p->arena, g->n_value * sizeof *p->panel);
    if (!p->value || !p->place || !p->panel)
        return IPT_ERR_NOMEM;
    memcpy(p->value, g->value, g->n_value * sizeof *p->value);
    for (uint32_t v = 1; v < p->n_value; v++)
        if (p->value[v].name) {
            p->value[v].name = ipt_arena_strdup(&p->arena, p->value[v].name);
            if (!p->value[v].name)
                return IPT_ERR_NOMEM;
        }
    return IPT_OK;
}

/* A weight that the state has is a parameter for this plan. */
static ipt_status find_state(ipt_plan *p)
{
    for (uint32_t v = 1; p->opts.state && v < p->n_value; v++) {
        ipt_value *value = &p->value[v];
        ipt_state_view view;
        if (value->node || value->role == IPT_INPUT ||
            !ipt_state_locate(p->opts.state, value->name, &view))
            continue;
        char want[64], have[64];
        ipt_shape_text(&value->shape, want, sizeof want);
        ipt_shape_text(&view.shape, have, sizeof have);
        if (!ipt_shape_same(&view.shape, &value->shape) ||
            (value->role == IPT_PARAM && view.shape.dtype != value->shape.dtype))
            return ipt_fail(p->ctx, IPT_ERR_SHAPE, "%s: the state has %s%s, the graph %s%s",
                            value->name, have, view.shape.dtype == IPT_F16 ? " f16" : "", want,
                            value->shape.dtype == IPT_F16 ? " f16" : "");
        value->role = IPT_PARAM;
        value->shape.dtype = view.shape.dtype;
        p->place[v] = ipt_planner_add_slot(p, ipt_shape_bytes(&view.shape), 0, UINT32_MAX, true);
        if (!p->place[v])
            return IPT_ERR_NOMEM;
        ipt_slot *s = &p->slot[p->place[v] - 1];
        s->is_state = true;
        s->off = view.off;
        s->buf = view.buf;
        s->host = view.host;
    }
    return IPT_OK;
}

/* The constant that ipt_graph_backward uses for a scalar seed. */
static ipt_status write_constants(ipt_plan *p)
{
    const float one = 1.0F;
    for (uint32_t v = 1; v < p->n_value; v++)
        if (p->place[v] && p->value[v].name && strcmp(p->value[v].name, "grad.one") == 0)
            return ipt_plan_write(p, "grad.one", &one, sizeof one);
    return IPT_OK;
}

ipt_status ipt_plan_create(ipt_graph *g, const ipt_plan_opts *o, ipt_plan **out)
{
    if (g->status != IPT_OK)
        return g->status;
    ipt_plan *p = ipt_alloc(g->ctx, sizeof *p);
    if (!p)
        return IPT_ERR_NOMEM;
    ipt_status status = IPT_OK;
    p->ctx = g->ctx;
    p->gpu = o->gpu;
    p->weights = o->weights;
    p->opts = *o;
    const char *env = getenv("IPT_PLAN_CHECK");
    p->opts.check = o->gpu && (o->check || (env && strcmp(env, "1") == 0));
    ipt_arena_init(&p->arena, g->ctx);
    IPT_TRY_GOTO(copy_values(p, g), fail);
    IPT_TRY_GOTO(find_state(p), fail);
    IPT_TRY_GOTO(ipt_planner_lifetimes(p, g), fail);
    if (p->gpu)
        IPT_TRY_GOTO(ipt_device_create(p), fail);
    else
        IPT_TRY_GOTO(ipt_host_create(p), fail);
    if (!p->opts.dry)
        IPT_TRY_GOTO(write_constants(p), fail);
    *out = p;
    return IPT_OK;
fail:
    ipt_plan_destroy(&p);
    return status;
}

void ipt_plan_destroy(ipt_plan **pp)
{
    if (!pp || !*pp)
        return;
    ipt_plan *p = *pp;
    ipt_device_destroy(p);
    ipt_host_destroy(p);
    ipt_free(p->slot);
    ipt_arena_finish(&p->arena);
    ipt_free(p);
    *pp = NULL;
}

/* Leaf (want_leaf) or output by name; 0: none. */
static uint32_t named(const ipt_plan *p, const char *name, bool want_leaf)
{
    for (uint32_t v = 1; v < p->n_value; v++) {
        const ipt_value *value = &p->value[v];
        if (value->name && strcmp(value->name, name) == 0 &&
            !(want_leaf && (value->node || value->role == IPT_WEIGHT)))
            return v;
    }
    return 0;
}

/* The same with a size check against the host's f32 / i32 view. */
static ipt_status find_value(const ipt_plan *p, const char *name, bool want_leaf, size_t n,
                             uint32_t *out)
{
    uint32_t v = named(p, name, want_leaf);
    if (v == 0)
        return ipt_fail(p->ctx, IPT_ERR_MISSING, "plan has no %s named %s",
                        want_leaf ? "input" : "output", name);
    size_t bytes = ipt_shape_count(&p->value[v].shape) * 4;
    if (bytes != n)
        return ipt_fail(p->ctx, IPT_ERR_ARG, "%s: %zu bytes given, expected %zu", name, n, bytes);
    *out = v;
    return IPT_OK;
}

ipt_status ipt_plan_settle(ipt_plan *p) { return p->gpu ? ipt_device_settle(p) : IPT_OK; }

bool ipt_plan_is_streamed(const ipt_plan *p) { return p->opts.stream; }

ipt_weights *ipt_plan_weights(const ipt_plan *p) { return p->weights; }

bool ipt_plan_has(const ipt_plan *p, const char *in) { return named(p, in, true) != 0; }

ipt_status ipt_plan_write(ipt_plan *p, const char *in, const void *src, size_t n)
{
    uint32_t v = 0;
    IPT_TRY(find_value(p, in, true, n, &v));
    if (!p->place[v])
        return IPT_OK; /* nothing reads it */
    return p->gpu ? ipt_device_write(p, v, src) : ipt_host_write(p, v, src);
}

ipt_status ipt_plan_read(ipt_plan *p, const char *out, void *dst, size_t n)
{
    uint32_t v = 0;
    IPT_TRY(find_value(p, out, false, n, &v));
    if (!p->place[v])
        return ipt_fail(p->ctx, IPT_ERR_ARG, "%s: not an output", out);
    return p->gpu ? ipt_device_read(p, v, dst) : ipt_host_read(p, v, dst);
}

ipt_status ipt_plan_locate(const ipt_plan *p, const char *name, struct ipt_buffer **buf,
                           uint64_t *off, uint64_t *bytes)
{
    uint32_t v = named(p, name, false);
    if (v == 0)
        return ipt_fail(p->ctx, IPT_ERR_MISSING, "plan has no value named %s", name);
    if (!p->gpu || !p->place[v])
        return ipt_fail(p->ctx, IPT_ERR_ARG, "%s: has no place on a device", name);
    const ipt_binding at = ipt_device_place(p, &p->slot[p->place[v] - 1]);
    *buf = at.buf;
    *off = at.off;
    *bytes = ipt_shape_bytes(&p->value[v].shape);
    return IPT_OK;
}

ipt_status ipt_plan_run(ipt_plan *p, uint32_t segment)
{
    if (segment >= p->n_segment)
        return ipt_fail(p->ctx, IPT_ERR_ARG, "plan has %u segments, asked for number %u",
                        p->n_segment, segment);
    return p->gpu ? ipt_device_exec(p, segment) : ipt_host_exec(p, segment);
}

uint64_t ipt_plan_arena_bytes(const ipt_plan *p) { return p->arena_bytes; }

static double macs_of(const ipt_plan *p, uint32_t n)
{
    double macs = 0;
    for (uint32_t i = 0; i < n; i++)
        for (uint32_t k = 0; k < p->node[i].launch.n_d; k++)
            macs += p->node[i].launch.d[k].macs;
    return macs;
}

double ipt_plan_macs(const ipt_plan *p) { return macs_of(p, p->n_node); }
double ipt_plan_early_macs(const ipt_plan *p) { return macs_of(p, p->n_early); }

size_t ipt_plan_n_dispatch(const ipt_plan *p)
{
    size_t n = 0;
    for (uint32_t i = 0; i < p->n_node; i++)
        n += p->node[i].launch.n_d;
    return n;
}
