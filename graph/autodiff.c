/* graph/autodiff.c - reverse mode by table: each operator's grad() appends nodes; what leads to no
 * wanted leaf is never built; marked blocks are recomputed. */
#include "graph/internal.h"

#include <string.h>

typedef struct sweep {
    ipt_graph *g;
    uint32_t n_fwd_value, n_fwd_node;
    uint32_t *grad;  /* value id -> id of its gradient */
    uint32_t *clone; /* value id -> id of its recomputed copy */
    uint8_t *needs;  /* value id -> depends on a wrt */
} sweep;

/* One step of dL/dv += d. */
static void accumulate(sweep *s, uint32_t v, ipt_val d)
{
    if (!d.id)
        return;
    if (!s->grad[v])
        s->grad[v] = d.id;
    else
        s->grad[v] = ipt_add(s->g, (ipt_val){s->grad[v]}, d).id;
}

/* Appends copies of the nodes of a block, reading the copies of each other. */
static void clone_block(sweep *s, ipt_range r)
{
    for (uint32_t i = r.first; i < r.end && s->g->status == IPT_OK; i++) {
        ipt_node n = s->g->node[i]; /* by value: the array grows */
        ipt_val in[IPT_MAX_IN], out[IPT_MAX_OUT];
        const char *prefix = s->g->prefix;
        for (int k = 0; k < n.n_in; k++)
            in[k].id = s->clone[n.in[k]] ? s->clone[n.in[k]] : n.in[k];
        s->g->prefix = ""; /* n.name has its prefix already */
        ipt_emit(s->g, n.op, n.name, in, n.n_in, &n.attr, out);
        s->g->prefix = prefix;
        if (s->g->status == IPT_OK)
            for (int k = 0; k < n.n_out; k++)
                s->clone[n.out[k]] = out[k].id;
    }
}

static void mark_needs(sweep *s, const ipt_val *wrt, size_t n_wrt)
{
    ipt_graph *g = s->g;
    for (size_t i = 0; i < n_wrt; i++)
        if (wrt[i].id && wrt[i].id < s->n_fwd_value)
            s->needs[wrt[i].id] = 1;
    for (uint32_t i = 0; i < s->n_fwd_node; i++) {
        const ipt_node *n = &g->node[i];
        bool any = false;
        for (int k = 0; k < n->n_in; k++)
            any = any || (n->in[k] && s->needs[n->in[k]]);
        for (int k = 0; any && k < n->n_out; k++)
            s->needs[n->out[k]] = 1;
    }
}

static void sweep_node(sweep *s, uint32_t i)
{
    ipt_graph *g = s->g;
    ipt_node n = g->node[i];
    ipt_val dy[IPT_MAX_OUT] = {{0}}, dx[IPT_MAX_IN] = {{0}};
    uint32_t want = 0;
    bool any = false;
    for (int k = 0; k < n.n_out; k++) {
        dy[k].id = s->grad[n.out[k]];
        any = any || dy[k].id;
    }
    for (int k = 0; k < n.n_in; k++)
        if (n.in[k] && s->needs[n.in[k]])
            want |= 1u << k;
    if (!any || !want)
        return;
    const ipt_op_def *def = ipt_op_table[n.op];
    if (!def->grad) {
        ipt_poison(g, IPT_ERR_UNSUPPORTED, "%s: %s has no gradient", n.name, def->name);
        return;
    }
    ipt_node seen = n; /* with recomputed values where the block was cloned */
    for (int k = 0; k < n.n_in; k++)
        if (s->clone[n.in[k]])
            seen.in[k] = s->clone[n.in[k]];
    for (int k = 0; k < n.n_out; k++)
        if (s->clone[n.out[k]])
            seen.out[k] = s->clone[n.out[k]];
    const char *prefix = g->prefix;
    g->prefix = "";
    def->grad(g, &seen, dy, want, dx);
    g->prefix = prefix;
    for (int k = 0; k < n.n_in; k++)
        if (want >> k & 1)
            accumulate(s, n.in[k], dx[k]);
}

static const ipt_range *block_ending_at(const ipt_graph *g, uint32_t node)
{
    for (uint32_t i = 0; i < g->n_recompute; i++)
        if (g->recompute[i].end == node + 1 && g->recompute[i].first <= node)
            return &g->recompute[i];
    return NULL;
}

/* A block is worth recomputing when a gradient flows into it. */
static bool block_has_grad(const sweep *s, ipt_range r)
{
    for (uint32_t i = r.first; i < r.end; i++)
        for (int k = 0; k < s->g->node[i].n_out; k++)
            if (s->grad[s->g->node[i].out[k]] && s->needs[s->g->node[i].out[k]])
                return true;
    return false;
}

static bool set_seeds(sweep *s, const ipt_seed *seed, size_t n_seed)
{
    ipt_graph *g = s->g;
    for (size_t i = 0; i < n_seed; i++) {
        ipt_shape of = ipt_shape_of(g, seed[i].of);
        ipt_val d = seed[i].grad;
        if (!d.id && ipt_shape_count(&of) == 1)
            d = ipt_leaf(g, IPT_PARAM, "grad.one", of);
        ipt_shape ds = ipt_shape_of(g, d);
        if (!seed[i].of.id || !d.id || !ipt_shape_same(&of, &ds)) {
            ipt_poison(g, IPT_ERR_SHAPE, "backward: seed %zu does not have the shape of its value",
                       i);
            return false;
        }
        accumulate(s, seed[i].of.id, d);
    }
    return true;
}

ipt_status ipt_graph_backward(ipt_graph *g, const ipt_seed *seed, size_t n_seed, const ipt_val *wrt,
                              size_t n_wrt, ipt_val *d_wrt)
{
    if (g->status != IPT_OK)
        return g->status;
    sweep s = {.g = g, .n_fwd_value = g->n_value, .n_fwd_node = g->n_node};
    s.grad = ipt_calloc(g->ctx, g->n_value, sizeof *s.grad);
    s.clone = ipt_calloc(g->ctx, g->n_value, sizeof *s.clone);
    s.needs = ipt_calloc(g->ctx, g->n_value, 1);
    if (!s.grad || !s.clone || !s.needs) {
        g->status = IPT_ERR_NOMEM;
    } else if (set_seeds(&s, seed, n_seed)) {
        mark_needs(&s, wrt, n_wrt);
        for (uint32_t i = s.n_fwd_node; i-- > 0 && g->status == IPT_OK;) {
            const ipt_range *block = block_ending_at(g, i);
            if (block && block_has_grad(&s, *block))
                clone_block(&s, *block);
            sweep_node(&s, i);
        }
        for (size_t i = 0; i < n_wrt; i++)
            d_wrt[i].id = wrt[i].id < s.n_fwd_value ? s.grad[wrt[i].id] : 0;
    }
    ipt_free(s.grad);
    ipt_free(s.clone);
    ipt_free(s.needs);
    return g->status;
}
