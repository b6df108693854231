/* graph/graph.c - building: values, leaves, names, signatures, outputs, cuts.
 * Must not know: what any operator computes, Vulkan, files. */
#include "graph/graph.h"

#include "graph/internal.h"

#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#define IPT_OP(id, def) extern const ipt_op_def def;
#include "graph/ops.def"
#undef IPT_OP
const ipt_op_def *const ipt_op_table[IPT_OP_COUNT] = {
#define IPT_OP(id, def) &def,
#include "graph/ops.def"
#undef IPT_OP
};

/* --- shapes ---------------------------------------------------------------------------------- */
size_t ipt_shape_count(const ipt_shape *s)
{
    size_t n = 1;
    for (int i = 0; i < s->rank; i++)
        n *= (size_t)s->dim[i];
    return n;
}

size_t ipt_dtype_bytes(ipt_dtype t)
{
    static const size_t bytes[] = {[IPT_F32] = 4, [IPT_F16] = 2, [IPT_I32] = 4, [IPT_Q8] = 1};
    return bytes[t];
}

size_t ipt_shape_bytes(const ipt_shape *s)
{
    return ipt_shape_count(s) * ipt_dtype_bytes(s->dtype);
}

bool ipt_shape_same(const ipt_shape *a, const ipt_shape *b)
{
    if (a->rank != b->rank)
        return false;
    for (int i = 0; i < a->rank; i++)
        if (a->dim[i] != b->dim[i])
            return false;
    return true;
}

void ipt_shape_text(const ipt_shape *s, char *buf, size_t n)
{
    size_t at = 0;
    int w = snprintf(buf, n, "[");
    for (int i = 0; i < s->rank && w >= 0 && at + (size_t)w < n; i++) {
        at += (size_t)w;
        w = snprintf(buf + at, n - at, i ? ",%d" : "%d", s->dim[i]);
    }
    if (w >= 0 && at + (size_t)w < n) {
        at += (size_t)w;
        snprintf(buf + at, n - at, "]");
    }
}

/* Every dim positive and the byte size far from overflow: limits for everything built on shapes. */
/* IPT_OK, IPT_ERR_SHAPE, or IPT_ERR_TOO_LARGE: kernels count elements in 32 bits. */
static ipt_status shape_status(const ipt_shape *s)
{
    if (s->rank < 1 || s->rank > 4)
        return IPT_ERR_SHAPE;
    uint64_t n = 1;
    for (int i = 0; i < s->rank; i++) {
        if (s->dim[i] < 1)
            return IPT_ERR_SHAPE;
        n *= (uint64_t)s->dim[i]; /* below 2^32 * 2^31: no overflow */
        if (n > UINT32_MAX)
            return IPT_ERR_TOO_LARGE;
    }
    return IPT_OK;
}

/* --- graph ------------------------------------------------------------------------------------ */
ipt_status ipt_graph_create(ipt_ctx *ctx, ipt_graph **out)
{
    ipt_graph *g = ipt_alloc(ctx, sizeof *g);
    if (!g)
        return IPT_ERR_NOMEM;
    g->ctx = ctx;
    g->prefix = "";
    ipt_arena_init(&g->arena, ctx);
    g->n_value = 1; /* id 0 = none */
    if (!ipt_graph_grow(g, (void **)&g->value, &g->cap_value, g->n_value, sizeof *g->value)) {
        ipt_graph_destroy(&g);
        return IPT_ERR_NOMEM;
    }
    *out = g;
    return IPT_OK;
}

void ipt_graph_destroy(ipt_graph **gp)
{
    if (!gp || !*gp)
        return;
    ipt_graph *g = *gp;
    ipt_free(g->value);
    ipt_free(g->node);
    ipt_free(g->cut);
    ipt_free(g->early);
    ipt_free(g->recompute);
    ipt_free(g->name_slot);
    ipt_free(g->weight);
    ipt_arena_finish(&g->arena);
    ipt_free(g);
    *gp = NULL;
}

ipt_status ipt_graph_status(const ipt_graph *g) { return g->status; }

void ipt_poison(ipt_graph *g, ipt_status s, const char *fmt, ...)
{
    if (g->status != IPT_OK)
        return;
    char text[512];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    g->status = ipt_fail(g->ctx, s, "%s", text);
}

bool ipt_graph_grow(ipt_graph *g, void **items, uint32_t *cap, uint32_t n, size_t size)
{
    if (n < *cap)
        return true;
    uint32_t next = *cap ? *cap * 2 : 64;
    void *p = ipt_regrow(g->ctx, *items, *cap * size, next * size);
    if (!p) {
        if (g->status == IPT_OK)
            g->status = IPT_ERR_NOMEM;
        return false;
    }
    *items = p;
    *cap = next;
    return true;
}

void ipt_graph_prefix(ipt_graph *g, const char *prefix)
{
    char *p = ipt_arena_strdup(&g->arena, prefix);
    if (p)
        g->prefix = p;
    else if (g->status == IPT_OK)
        g->status = IPT_ERR_NOMEM;
}

static uint32_t new_value(ipt_graph *g, const ipt_shape *s, uint32_t node, int out_index)
{
    if (!ipt_graph_grow(g, (void **)&g->value, &g->cap_value, g->n_value, sizeof *g->value))
        return 0;
    uint32_t id = g->n_value++;
    g->value[id] = (ipt_value){.shape = *s, .node = node, .out_index = (uint8_t)out_index};
    return id;
}

/* --- names ------------------------------------------------------------------------------------ */
static uint64_t hash_name(const char *s)
{
    uint64_t h = 1469598103934665603u;
    for (; *s; s++)
        h = (h ^ (unsigned char)*s) * 1099511628211u;
    return h;
}

static uint32_t *name_entry(const ipt_graph *g, const char *name)
{
    uint32_t mask = g->cap_name - 1, i = (uint32_t)hash_name(name) & mask;
    while (g->name_slot[i] && strcmp(g->value[g->name_slot[i]].name, name) != 0)
        i = (i + 1) & mask;
    return &g->name_slot[i];
}

static bool name_add(ipt_graph *g, uint32_t id)
{
    if (2 * (g->n_name + 1) > g->cap_name) {
        uint32_t *old = g->name_slot, old_cap = g->cap_name, cap = old_cap ? old_cap * 2 : 128;
        uint32_t *slots = ipt_calloc(g->ctx, cap, sizeof *slots);
        if (!slots) {
            g->status = IPT_ERR_NOMEM;
            return false;
        }
        g->name_slot = slots;
        g->cap_name = cap;
        for (uint32_t i = 0; i < old_cap; i++)
            if (old[i])
                *name_entry(g, g->value[old[i]].name) = old[i];
        ipt_free(old);
    }
    *name_entry(g, g->value[id].name) = id;
    g->n_name++;
    return true;
}

ipt_val ipt_find(const ipt_graph *g, const char *name)
{
    return (ipt_val){g->cap_name ? *name_entry(g, name) : 0};
}

ipt_shape ipt_shape_of(const ipt_graph *g, ipt_val v)
{
    static const ipt_shape none = {{1, 1, 1, 1}, 0, IPT_F32};
    return v.id && v.id < g->n_value ? g->value[v.id].shape : none;
}

ipt_val ipt_leaf(ipt_graph *g, ipt_role role, const char *name, ipt_shape s)
{
    if (g->status != IPT_OK)
        return (ipt_val){0};
    for (int i = s.rank; i < 4; i++)
        s.dim[i] = 1;
    ipt_val have = ipt_find(g, name);
    char a[64], b[64];
    ipt_shape_text(&s, a, sizeof a);
    if (have.id) {
        const ipt_value *v = &g->value[have.id];
        ipt_shape_text(&v->shape, b, sizeof b);
        bool other = (v->role == IPT_WEIGHT) != (role == IPT_WEIGHT);
        if (v->node || other || !ipt_shape_same(&v->shape, &s))
            ipt_poison(g, IPT_ERR_SHAPE, "%s: used as %s and as %s", name, b, a);
        return have;
    }
    ipt_status usable = shape_status(&s);
    if (usable != IPT_OK) { /* a weight that large is a wrong configuration, not a large picture */
        ipt_poison(g, role == IPT_WEIGHT ? IPT_ERR_SHAPE : usable, "%s: shape %s is not usable",
                   name, a);
        return (ipt_val){0};
    }
    uint32_t id = new_value(g, &s, 0, 0);
    char *copy = id ? ipt_arena_strdup(&g->arena, name) : NULL;
    if (!copy) {
        g->status = IPT_ERR_NOMEM;
        return (ipt_val){0};
    }
    g->value[id].name = copy;
    g->value[id].role = role;
    if (!name_add(g, id))
        return (ipt_val){0};
    if (role == IPT_WEIGHT) {
        if (!ipt_graph_grow(g, (void **)&g->weight, &g->cap_weight, g->n_weight, sizeof *g->weight))
            return (ipt_val){0};
        g->weight[g->n_weight++] = id;
    }
    return (ipt_val){id};
}

ipt_val ipt_weight_leaf(ipt_graph *g, const char *site, const char *leaf, ipt_shape s)
{
    char name[256];
    int n = leaf[0] ? snprintf(name, sizeof name, "%s%s.%s", g->prefix, site, leaf)
                    : snprintf(name, sizeof name, "%s%s", g->prefix, site);
    if (n < 0 || (size_t)n >= sizeof name) {
        ipt_poison(g, IPT_ERR_ARG, "%s: name too long", site);
        return (ipt_val){0};
    }
    return ipt_leaf(g, IPT_WEIGHT, name, s);
}

void ipt_output(ipt_graph *g, const char *name, ipt_val v)
{
    if (g->status != IPT_OK)
        return;
    if (!v.id || v.id >= g->n_value) {
        ipt_poison(g, IPT_ERR_ARG, "output %s: no such value", name);
        return;
    }
    ipt_value *value = &g->value[v.id];
    if (value->name) { /* a leaf or already an output: give the new name its own value */
        v = ipt_add_scaled(g, v, 1.0F, v, 0.0F);
        if (!v.id)
            return;
        value = &g->value[v.id];
    }
    if (ipt_find(g, name).id) {
        ipt_poison(g, IPT_ERR_ARG, "output %s: the name is taken", name);
        return;
    }
    value->name = ipt_arena_strdup(&g->arena, name);
    if (!value->name) {
        g->status = IPT_ERR_NOMEM;
        return;
    }
    value->is_output = true;
    name_add(g, v.id);
}

void ipt_cut(ipt_graph *g)
{
    if (g->status == IPT_OK &&
        ipt_graph_grow(g, (void **)&g->cut, &g->cap_cut, g->n_cut, sizeof *g->cut))
        g->cut[g->n_cut++] = g->n_node;
}

void ipt_early(ipt_graph *g, bool begin)
{
    if (g->status != IPT_OK)
        return;
    if (begin == g->in_early) {
        ipt_poison(g, IPT_ERR_ARG, "ipt_early: begin and end do not pair");
        return;
    }
    g->in_early = begin;
    if (!begin)
        g->early[g->n_early - 1].end = g->n_node;
    else if (ipt_graph_grow(g, (void **)&g->early, &g->cap_early, g->n_early, sizeof *g->early))
        g->early[g->n_early++] = (ipt_range){g->n_node, g->n_node};
}

void ipt_recompute(ipt_graph *g, bool begin)
{
    if (g->status != IPT_OK)
        return;
    if (begin == g->in_recompute) {
        ipt_poison(g, IPT_ERR_ARG, "ipt_recompute: begin and end do not pair");
        return;
    }
    g->in_recompute = begin;
    if (begin) {
        if (ipt_graph_grow(g, (void **)&g->recompute, &g->cap_recompute, g->n_recompute,
                           sizeof *g->recompute))
            g->recompute[g->n_recompute++] = (ipt_range){g->n_node, g->n_node};
    } else {
        g->recompute[g->n_recompute - 1].end = g->n_node;
    }
}

size_t ipt_graph_n_weights(const ipt_graph *g) { return g->n_weight; }

const char *ipt_graph_weight(const ipt_graph *g, size_t i, ipt_shape *s)
{
    if (i >= g->n_weight)
        return NULL;
    const ipt_value *v = &g->value[g->weight[i]];
    *s = v->shape;
    return v->name;
}

/* --- signatures ------------------------------------------------------------------------------- */
typedef struct sig_env {
    int32_t letter[26]; /* 0 = not bound */
    int32_t star[4];
    int n_star;          /* -1 = not bound */
    const char *problem; /* first operand that does not fit */
} sig_env;

static bool bind_dim(sig_env *e, char c, int32_t size)
{
    if (c >= '0' && c <= '9')
        return size == c - '0';
    int32_t *l = &e->letter[(c - 'a') & 31];
    if (*l == 0)
        *l = size;
    return *l == size;
}

/* Matches one operand's dims ("n*c") against a shape. */
static bool match_operand(sig_env *e, const char *dims, size_t len, const ipt_shape *s)
{
    size_t star_at = len;
    if (len == 0)
        return true; /* infer looks at it */
    for (size_t i = 0; i < len; i++)
        if (dims[i] == '*')
            star_at = i;
    int n_star = star_at < len ? (int)s->rank - (int)(len - 1) : 0;
    if (n_star < 0 || (star_at == len && s->rank != len))
        return false;
    if (star_at < len) {
        if (e->n_star >= 0 && e->n_star != n_star)
            return false;
        for (int i = 0; i < n_star; i++) {
            int32_t d = s->dim[star_at + (size_t)i];
            if (e->n_star >= 0 && e->star[i] != d)
                return false;
            e->star[i] = d;
        }
        e->n_star = n_star;
    }
    for (size_t i = 0; i < len; i++) {
        size_t at = i < star_at ? i : i + (size_t)n_star - 1;
        if (i != star_at && !bind_dim(e, dims[i], s->dim[at]))
            return false;
    }
    return true;
}

/* Output dims from the bound letters; unbound ones stay 0 for infer. */
static void expand_operand(const sig_env *e, const char *dims, size_t len, ipt_shape *s)
{
    s->rank = 0;
    for (size_t i = 0; i < len && s->rank < 4; i++) {
        if (dims[i] == '*') {
            for (int k = 0; k < e->n_star && s->rank < 4; k++)
                s->dim[s->rank++] = e->star[k];
        } else if (dims[i] >= '0' && dims[i] <= '9') {
            s->dim[s->rank++] = dims[i] - '0';
        } else {
            s->dim[s->rank++] = e->letter[(dims[i] - 'a') & 31];
        }
    }
}

/* Fills n->n_out and out_shape from the signature; poisons on a mismatch. */
static bool match_signature(ipt_graph *g, ipt_node *n, const ipt_op_def *def)
{
    sig_env env = {.n_star = -1};
    bool outputs = false;
    int in = 0, out = 0;
    const char *p = def->sig;
    while (*p) {
        size_t len = strcspn(p, " ");
        if (len == 2 && p[0] == '-' && p[1] == '>') {
            outputs = true;
        } else if (len > 0) {
            const char *colon = memchr(p, ':', len);
            size_t name_len = colon ? (size_t)(colon - p) : len;
            const char *dims = colon ? colon + 1 : p + len;
            size_t n_dims = (size_t)(p + len - dims);
            bool optional = name_len > 0 && p[name_len - 1] == '?';
            if (outputs) {
                expand_operand(&env, dims, n_dims, &n->out_shape[out++]);
            } else {
                const ipt_shape *s = &n->in_shape[in];
                bool given = in < n->n_in && n->in[in] != 0;
                char text[64] = "nothing";
                if (given)
                    ipt_shape_text(s, text, sizeof text);
                if ((!given && !optional) || (given && !match_operand(&env, dims, n_dims, s))) {
                    ipt_poison(g, IPT_ERR_SHAPE, "%s: %s: operand %.*s is %s, signature %s",
                               n->name, def->name, (int)name_len, p, text, def->sig);
                    return false;
                }
                in++;
            }
        }
        p += len;
        p += *p == ' ';
    }
    n->n_out = (uint8_t)out;
    return true;
}

ipt_val ipt_emit(ipt_graph *g, ipt_op op, const char *name, const ipt_val *in, int n_in,
                 const ipt_attr *attr, ipt_val *out)
{
    ipt_val none = {0};
    if (g->status != IPT_OK ||
        !ipt_graph_grow(g, (void **)&g->node, &g->cap_node, g->n_node, sizeof *g->node))
        return none;
    const ipt_op_def *def = ipt_op_table[op];
    ipt_node n = {.op = op, .n_in = (uint8_t)n_in};
    char full[256];
    ipt_name(full, sizeof full, "%s%s", g->prefix, name ? name : def->name);
    n.name = ipt_arena_strdup(&g->arena, full);
    if (!n.name) {
        g->status = IPT_ERR_NOMEM;
        return none;
    }
    if (attr)
        n.attr = *attr;
    for (int i = 0; i < n_in; i++) {
        if (in[i].id >= g->n_value) {
            ipt_poison(g, IPT_ERR_ARG, "%s: operand %d is not a value of this graph", n.name, i);
            return none;
        }
        n.in[i] = in[i].id;
        if (in[i].id) {
            const ipt_value *v = &g->value[in[i].id];
            n.in_shape[i] = v->shape;
            if (def->writes >> i & 1 && (v->node || v->role != IPT_PARAM)) {
                ipt_poison(g, IPT_ERR_ARG, "%s: %s changes a parameter in place, not operand %d",
                           n.name, def->name, i);
                return none;
            }
            n.in_is_panel[i] = (def->panel >> i & 1) && !v->node && v->role == IPT_WEIGHT;
        }
    }
    for (int o = 0; o < IPT_MAX_OUT; o++)
        n.out_shape[o] = (ipt_shape){{1, 1, 1, 1}, 0, n.in_shape[0].dtype};
    if (!match_signature(g, &n, def))
        return none;
    if (def->infer) {
        const char *problem = def->infer(&n, n.out_shape);
        if (problem) {
            ipt_poison(g, IPT_ERR_SHAPE, "%s: %s: %s", n.name, def->name, problem);
            return none;
        }
    }
    for (int o = 0; o < n.n_out; o++) {
        for (int i = n.out_shape[o].rank; i < 4; i++)
            n.out_shape[o].dim[i] = 1;
        ipt_status usable = shape_status(&n.out_shape[o]);
        if (usable != IPT_OK) {
            char text[64];
            ipt_shape_text(&n.out_shape[o], text, sizeof text);
            ipt_poison(g, usable, "%s: %s: result shape %s is not usable", n.name, def->name, text);
            return none;
        }
        uint32_t id = new_value(g, &n.out_shape[o], g->n_node + 1, o);
        if (!id)
            return none;
        n.out[o] = id;
        if (out)
            out[o] = (ipt_val){id};
    }
    g->node[g->n_node++] = n;
    return (ipt_val){n.out[0]};
}
