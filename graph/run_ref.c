/* graph/run_ref.c - plans without a device: every reference on the host, in double. */
#include "graph/internal.h"

#include <math.h>
#include <string.h>

struct ipt_host_run {
    double **value; /* by value id; views and weights have their own arrays */
    bool have_weights;
};

static size_t count_of(const ipt_plan *p, uint32_t v)
{
    return ipt_shape_count(&p->value[v].shape);
}

static bool in_state(const ipt_plan *p, uint32_t v)
{
    return p->place[v] && p->slot[p->place[v] - 1].is_state;
}

ipt_status ipt_host_create(ipt_plan *p)
{
    p->host = ipt_arena_alloc(&p->arena, sizeof *p->host);
    if (!p->host)
        return IPT_ERR_NOMEM;
    p->host->value = ipt_arena_alloc(&p->arena, p->n_value * sizeof(double *));
    if (!p->host->value)
        return IPT_ERR_NOMEM;
    for (uint32_t v = 1; v < p->n_value; v++) {
        if (!p->place[v] && !(!p->value[v].node && p->value[v].role == IPT_WEIGHT))
            continue;
        p->host->value[v] = in_state(p, v) ? p->slot[p->place[v] - 1].host
                                           : ipt_calloc(p->ctx, count_of(p, v), sizeof(double));
        if (!p->host->value[v])
            return IPT_ERR_NOMEM;
        if (!p->value[v].node && p->value[v].role == IPT_WEIGHT) {
            if (!p->weights)
                return ipt_fail(p->ctx, IPT_ERR_MISSING, "%s: the plan has no weights",
                                p->value[v].name);
            IPT_TRY(p->weights->read(p->weights, p->value[v].name, &p->value[v].shape,
                                     p->host->value[v]));
        }
    }
    return IPT_OK;
}

void ipt_host_destroy(ipt_plan *p)
{
    if (!p->host || !p->host->value)
        return;
    for (uint32_t v = 1; v < p->n_value; v++)
        if (!in_state(p, v))
            ipt_free(p->host->value[v]);
    p->host = NULL;
}

ipt_status ipt_host_write(ipt_plan *p, uint32_t v, const void *src)
{
    size_t n = count_of(p, v);
    double *dst = p->host->value[v];
    if (p->value[v].shape.dtype == IPT_I32) {
        const int32_t *s = src;
        for (size_t i = 0; i < n; i++)
            dst[i] = s[i];
        return IPT_OK;
    }
    const float *s = src;
    for (size_t i = 0; i < n; i++) /* an f16 leaf holds what the device would hold */
        dst[i] = p->value[v].shape.dtype == IPT_F16 ? (double)ipt_f16_to_f32(ipt_f32_to_f16(s[i]))
                                                    : (double)s[i];
    return IPT_OK;
}

ipt_status ipt_host_read(ipt_plan *p, uint32_t v, void *dst)
{
    size_t n = count_of(p, v);
    const double *src = p->host->value[v];
    if (p->value[v].shape.dtype == IPT_I32) {
        int32_t *d = dst;
        for (size_t i = 0; i < n; i++)
            d[i] = (int32_t)src[i];
        return IPT_OK;
    }
    float *d = dst;
    for (size_t i = 0; i < n; i++)
        d[i] = (float)src[i];
    return IPT_OK;
}

ipt_status ipt_host_exec(ipt_plan *p, uint32_t segment)
{
    for (uint32_t i = 0; i < p->n_node; i++) {
        const ipt_node *n = &p->node[i].n;
        const ipt_op_def *def = ipt_op_table[n->op];
        if (p->node[i].segment != segment)
            continue;
        if (ipt_cancelled(p->ctx))
            return ipt_fail(p->ctx, IPT_ERR_CANCELLED, "cancelled");
        const double *in[IPT_MAX_IN] = {0};
        double *out[IPT_MAX_OUT] = {0};
        for (int k = 0; k < n->n_in; k++)
            in[k] = n->in[k] ? p->host->value[n->in[k]] : NULL;
        for (int k = 0; k < n->n_out; k++)
            out[k] = p->host->value[n->out[k]];
        for (int k = 0, o = 0; k < n->n_in; k++)
            if (def->writes >> k & 1)
                out[o++] = p->host->value[n->in[k]];
        if (def->view && in[0] && out[0])
            memcpy(out[0], in[0], count_of(p, n->out[0]) * sizeof(double));
        else if (!def->view)
            def->ref(n, in, out);
    }
    return IPT_OK;
}

double *ipt_host_values(ipt_plan *p, const char *name, size_t *n)
{
    for (uint32_t v = 1; v < p->n_value; v++)
        if (p->value[v].name && strcmp(p->value[v].name, name) == 0) {
            *n = count_of(p, v);
            return p->host->value[v];
        }
    return NULL;
}
