/* graph/planner.c - which nodes live, how long each value lives, where it lies in the arena.
 * Lifetimes in, offsets out: greedy by size, lowest free gap among overlapping lifetimes. */
#include "graph/internal.h"

#include <stdlib.h>
#include <string.h>

enum { ALIGN = 256 };

uint32_t ipt_planner_add_slot(ipt_plan *p, uint64_t bytes, uint32_t first, uint32_t last,
                              bool pinned)
{
    if (p->n_slot == p->cap_slot) {
        uint32_t cap = p->cap_slot ? p->cap_slot * 2 : 256;
        ipt_slot *s = ipt_regrow(p->ctx, p->slot, p->cap_slot * sizeof *s, cap * sizeof *s);
        if (!s)
            return 0;
        p->slot = s;
        p->cap_slot = cap;
    }
    p->slot[p->n_slot++] =
        (ipt_slot){.bytes = bytes, .first = first, .last = last, .pinned = pinned};
    return p->n_slot;
}

/* A node lives when an output of the graph needs it, or when it changes something in place. */
static void mark_live(const ipt_graph *g, uint8_t *live)
{
    for (uint32_t i = g->n_node; i-- > 0;) {
        const ipt_node *n = &g->node[i];
        live[i] = ipt_op_table[n->op]->writes != 0;
        for (int k = 0; k < n->n_out; k++)
            live[i] |= (uint8_t)(g->value[n->out[k]].is_output || live[g->n_node + n->out[k]]);
        for (int k = 0; live[i] && k < n->n_in; k++)
            live[g->n_node + n->in[k]] = 1;
    }
}

static ipt_status copy_node(ipt_plan *p, const ipt_node *from, uint32_t segment)
{
    ipt_planned_node *n = &p->node[p->n_node++];
    n->n = *from;
    n->segment = segment;
    for (int k = 0; k < from->n_in; k++) /* what is in the state is no weight here */
        if (from->in[k] && p->place[from->in[k]]) {
            n->n.in_is_panel[k] = false;
            n->n.in_shape[k].dtype = p->value[from->in[k]].shape.dtype;
        }
    n->n.name = ipt_arena_strdup(&p->arena, from->name);
    return n->n.name ? IPT_OK : IPT_ERR_NOMEM;
}

/* Nodes of ipt_early in front, in their order; none depends on what is behind them. */
static ipt_status copy_early(ipt_plan *p, const ipt_graph *g, uint8_t *live)
{
    for (uint32_t r = 0; r < g->n_early; r++)
        for (uint32_t i = g->early[r].first; i < g->early[r].end; i++) {
            const ipt_node *n = &g->node[i];
            for (int k = 0; live[i] && k < n->n_in; k++) {
                uint32_t made = g->value[n->in[k]].node;
                if (n->in[k] && made && live[made - 1])
                    return ipt_fail(p->ctx, IPT_ERR_ARG,
                                    "%s: is to run early, but depends on what comes later",
                                    n->name);
            }
            if (live[i])
                IPT_TRY(copy_node(p, n, 0));
            live[i] = 0; /* done */
        }
    p->n_early = p->n_node;
    return IPT_OK;
}

/* live [nodes]: emptied. */
static ipt_status copy_nodes(ipt_plan *p, const ipt_graph *g, uint8_t *live)
{
    const uint32_t first = g->n_early > 0;
    uint32_t segment = 0, n_live = 0;
    for (uint32_t i = 0; i < g->n_node; i++)
        n_live += live[i];
    p->node = ipt_arena_alloc(&p->arena, (n_live ? n_live : 1) * sizeof *p->node);
    if (!p->node)
        return IPT_ERR_NOMEM;
    IPT_TRY(copy_early(p, g, live));
    for (uint32_t i = 0; i < g->n_node; i++) {
        while (segment < g->n_cut && g->cut[segment] <= i)
            segment++;
        if (live[i])
            IPT_TRY(copy_node(p, &g->node[i], first + segment));
        live[i] = 0;
    }
    p->n_segment = first + g->n_cut + 1;
    return IPT_OK;
}

/* Leaves the host writes are pinned; weights live in the store. */
static ipt_status place_leaves(ipt_plan *p, const uint8_t *used)
{
    for (uint32_t v = 1; v < p->n_value; v++) {
        const ipt_value *value = &p->value[v];
        if (value->node || value->role == IPT_WEIGHT || !(used[v] || value->is_output) ||
            p->place[v])
            continue;
        p->place[v] = ipt_planner_add_slot(p, ipt_shape_bytes(&value->shape), 0, UINT32_MAX, true);
        if (!p->place[v])
            return IPT_ERR_NOMEM;
    }
    return IPT_OK;
}

/* The input whose storage out[0] may take over at node i, or 0. */
static uint32_t reuse_slot(const ipt_plan *p, const ipt_planned_node *pn, uint32_t i,
                           const uint32_t *last_use)
{
    const ipt_op_def *def = ipt_op_table[pn->n.op];
    const ipt_shape *out = &pn->n.out_shape[0];
    for (int k = 0; k < pn->n.n_in; k++) {
        uint32_t v = pn->n.in[k];
        if (!v || !(def->alias >> k & 1) || !p->place[v])
            continue;
        const ipt_slot *s = &p->slot[p->place[v] - 1];
        bool same = pn->n.in_shape[k].dtype == out->dtype && s->bytes == ipt_shape_bytes(out);
        bool twice = false; /* another operand in the same storage */
        for (int o = 0; o < pn->n.n_in; o++)
            twice = twice || (o != k && pn->n.in[o] && p->place[pn->n.in[o]] == p->place[v]);
        if (same && !twice && !s->pinned && last_use[p->place[v]] == i)
            return p->place[v];
    }
    return 0;
}

/* What early nodes made for others stands through every later run of those. */
static void keep_early(const ipt_plan *p, const uint32_t *root, uint32_t *last)
{
    for (uint32_t i = 0; i < p->n_early; i++)
        for (int k = 0; k < p->node[i].n.n_out; k++) {
            uint32_t *end = &last[root[p->node[i].n.out[k]]];
            if (*end >= p->n_early)
                *end = UINT32_MAX;
        }
}

/* Last node that reads each slot; views share the slot of what they view. */
static ipt_status place_results(ipt_plan *p)
{
    uint32_t *root = ipt_calloc(p->ctx, p->n_value, sizeof *root);
    uint32_t *last = ipt_calloc(p->ctx, p->n_value, sizeof *last); /* by root value */
    uint32_t *slot_last = ipt_calloc(p->ctx, (size_t)p->n_value + 1, sizeof *slot_last);
    ipt_status status = root && last && slot_last ? IPT_OK : IPT_ERR_NOMEM;
    for (uint32_t v = 0; status == IPT_OK && v < p->n_value; v++)
        root[v] = v;
    for (uint32_t i = 0; status == IPT_OK && i < p->n_node; i++) {
        const ipt_node *n = &p->node[i].n;
        if (ipt_op_table[n->op]->view)
            root[n->out[0]] = root[n->in[0]];
        for (int k = 0; k < n->n_in; k++)
            if (n->in[k])
                last[root[n->in[k]]] = i;
        for (int k = 0; k < n->n_out; k++) {
            uint32_t r = root[n->out[k]];
            if (last[r] < i)
                last[r] = i;
        }
    }
    for (uint32_t v = 1; status == IPT_OK && v < p->n_value; v++)
        if (p->value[v].is_output) /* whatever reads it later; a view keeps what it views */
            last[root[v]] = UINT32_MAX;
    if (status == IPT_OK)
        keep_early(p, root, last);
    for (uint32_t v = 1; status == IPT_OK && v < p->n_value; v++)
        if (p->place[v])
            slot_last[p->place[v]] = UINT32_MAX;
    for (uint32_t i = 0; status == IPT_OK && i < p->n_node; i++) {
        ipt_planned_node *pn = &p->node[i];
        for (int k = 0; k < pn->n.n_out; k++) {
            uint32_t v = pn->n.out[k], r = root[v];
            if (r != v) { /* a view */
                p->place[v] = p->place[r];
                continue;
            }
            uint32_t s = k == 0 && !p->opts.guard ? reuse_slot(p, pn, i, slot_last) : 0;
            if (s)
                p->slot[s - 1].last = last[v];
            else
                s = ipt_planner_add_slot(p, ipt_shape_bytes(&p->value[v].shape), i, last[v], false);
            if (!s) {
                status = IPT_ERR_NOMEM;
                break;
            }
            p->place[v] = s;
            slot_last[s] = last[v];
        }
    }
    ipt_free(root);
    ipt_free(last);
    ipt_free(slot_last);
    return status;
}

ipt_status ipt_planner_lifetimes(ipt_plan *p, const ipt_graph *g)
{
    uint8_t *live = ipt_calloc(p->ctx, (size_t)g->n_node + g->n_value, 1);
    if (!live)
        return IPT_ERR_NOMEM;
    mark_live(g, live);
    ipt_status status = copy_nodes(p, g, live);
    if (status == IPT_OK)
        status = place_leaves(p, live + g->n_node);
    ipt_free(live);
    if (status == IPT_OK)
        status = place_results(p);
    return status;
}

static int by_size(const void *a, const void *b)
{
    const ipt_slot *x = *(ipt_slot *const *)a, *y = *(ipt_slot *const *)b;
    if (x->bytes != y->bytes)
        return x->bytes < y->bytes ? 1 : -1;
    return x < y ? -1 : x > y;
}

static int by_offset(const void *a, const void *b)
{
    const ipt_slot *x = *(ipt_slot *const *)a, *y = *(ipt_slot *const *)b;
    if (x->off != y->off)
        return x->off < y->off ? -1 : 1;
    return x < y ? -1 : x > y;
}

/* The first place from `at` on where `need` bytes do not lie across a cut. */
static uint64_t uncut(const ipt_plan *p, uint64_t at, uint64_t need)
{
    const uint64_t part = p->arena_part;
    if (part == 0 || at / part == (at + need - 1) / part)
        return at;
    return (at + part - 1) / part * part;
}

ipt_status ipt_planner_offsets(ipt_plan *p, uint64_t pad)
{
    uint32_t n_order = 0;
    ipt_slot **order = ipt_calloc(p->ctx, p->n_slot + 1, sizeof(ipt_slot *));
    ipt_slot **near = ipt_calloc(p->ctx, p->n_slot + 1, sizeof(ipt_slot *));
    if (!order || !near) {
        ipt_free(order);
        ipt_free(near);
        return IPT_ERR_NOMEM;
    }
    for (uint32_t i = 0; i < p->n_slot; i++)
        if (!p->slot[i].is_state)
            order[n_order++] = &p->slot[i];
    qsort(order, n_order, sizeof(ipt_slot *), by_size);
    uint64_t top = 0;
    for (uint32_t i = 0; i < n_order; i++) {
        ipt_slot *s = order[i];
        uint32_t n = 0;
        for (uint32_t k = 0; k < i; k++)
            if (order[k]->pinned || s->pinned ||
                (order[k]->first <= s->last && s->first <= order[k]->last))
                near[n++] = order[k];
        qsort(near, n, sizeof(ipt_slot *), by_offset);
        const uint64_t need = (s->bytes + pad + ALIGN - 1) / ALIGN * ALIGN;
        uint64_t at = uncut(p, 0, pad + need) + pad;
        for (uint32_t k = 0; k < n; k++) {
            if (at + need <= near[k]->off - pad)
                break;
            uint64_t end = near[k]->off + (near[k]->bytes + pad + ALIGN - 1) / ALIGN * ALIGN;
            end = uncut(p, end, pad + need) + pad;
            at = end > at ? end : at;
        }
        s->off = at;
        top = at + need > top ? at + need : top;
    }
    p->arena_bytes = top ? top : ALIGN;
    ipt_free(order);
    ipt_free(near);
    return IPT_OK;
}
