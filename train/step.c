/* train/step.c - see step.h. */
#include "train/step.h"

#include <math.h>
#include <string.h>

/* --- groups ----------------------------------------------------------------------------------- */
ipt_status ipt_train_groups(ipt_state *s, const ipt_state_item *item, size_t n, ipt_dtype act)
{
    const bool half = act == IPT_F16;
    if (half)
        IPT_TRY(ipt_state_add(s, &(ipt_state_group){IPT_TRAIN_COPY, "", IPT_F16, item, n}));
    const ipt_state_group group[] = {
        {IPT_TRAIN_VALUES, half ? "master/" : "", IPT_F32, item, n},
        {IPT_TRAIN_GRADS, "grad/", IPT_F32, item, n},
        {IPT_TRAIN_MEAN, "mean/", IPT_F32, item, n},
        {IPT_TRAIN_SQUARE, "square/", IPT_F32, item, n},
    };
    for (size_t i = 0; i < IPT_COUNT(group); i++)
        IPT_TRY(ipt_state_add(s, &group[i]));
    return IPT_OK;
}

/* The name of a tensor's values in f32. */
static const char *master(const ipt_state *s, const char *name, char *buf, size_t size)
{
    ipt_state_view v;
    ipt_name(buf, size, "master/%s", name);
    return ipt_state_locate(s, buf, &v) ? buf : name;
}

ipt_status ipt_train_set(ipt_state *s, const char *name, const float *v, size_t bytes)
{
    char buf[512];
    const char *values = master(s, name, buf, sizeof buf);
    if (values != name)
        IPT_TRY(ipt_state_write(s, name, v, bytes));
    return ipt_state_write(s, values, v, bytes);
}

ipt_status ipt_train_get(const ipt_state *s, const char *name, float *v, size_t bytes)
{
    char buf[512];
    return ipt_state_read(s, master(s, name, buf, sizeof buf), v, bytes);
}

/* --- gradients -------------------------------------------------------------------------------- */
/* sum weight (y - target)^2, and its part of each row. */
static ipt_val add_loss(ipt_graph *g, ipt_val y)
{
    const ipt_shape s = ipt_shape_of(g, y);
    ipt_shape one = s, row = s;
    one.dim[3] = 1;
    row.dim[1] = row.dim[2] = row.dim[3] = 1;
    ipt_val d = ipt_add_scaled(g, y, 1, ipt_leaf(g, IPT_INPUT, "target", s), -1);
    ipt_val wd = ipt_mul(g, d, ipt_leaf(g, IPT_INPUT, "weight", one));
    ipt_val rows = ipt_sum_to(g, ipt_mul(g, wd, d), row);
    ipt_output(g, "losses", ipt_reshape(g, rows, ipt_shape1(IPT_F32, s.dim[0])));
    ipt_val loss = ipt_dot(g, wd, d);
    ipt_output(g, "loss", loss);
    return loss;
}

/* What is trained as leaves, and the sums of their gradients. */
static ipt_status add_gradients(ipt_ctx *ctx, ipt_graph *g, const ipt_train_opts *o, ipt_val loss)
{
    ipt_val *wrt = ipt_calloc(ctx, 2 * o->n + 1, sizeof *wrt), *d = wrt + o->n;
    ipt_status status = wrt ? IPT_OK : IPT_ERR_NOMEM;
    for (size_t i = 0; i < o->n && status == IPT_OK; i++) {
        wrt[i] = ipt_find(g, o->item[i].name);
        if (!wrt[i].id)
            status = ipt_fail(ctx, IPT_ERR_MISSING,
                              "%s: is to be trained, but no part of the model", o->item[i].name);
    }
    const ipt_val scale = ipt_leaf(g, IPT_INPUT, "scale", ipt_shape1(IPT_F32, 1));
    if (status == IPT_OK)
        status = ipt_graph_backward(g, &(ipt_seed){loss, scale}, 1, wrt, o->n, d);
    for (size_t i = 0; i < o->n && status == IPT_OK; i++) {
        char name[512];
        if (!d[i].id) {
            status = ipt_fail(ctx, IPT_ERR_MISSING, "%s: the loss does not depend on it",
                              o->item[i].name);
            break;
        }
        ipt_name(name, sizeof name, "grad/%s", o->item[i].name);
        ipt_shape s = o->item[i].shape;
        s.dtype = IPT_F32;
        ipt_accumulate(g, ipt_leaf(g, IPT_PARAM, name, s), d[i]);
        status = ipt_graph_status(g);
    }
    ipt_free(wrt);
    return status;
}

ipt_status ipt_train_gradients(ipt_ctx *ctx, const ipt_unet_config *c, const ipt_unet_key *key,
                               const ipt_train_opts *o, ipt_plan **out)
{
    ipt_graph *g = NULL;
    IPT_TRY(ipt_graph_create(ctx, &g));
    if (o->n_site)
        ipt_graph_adapters(g, o->site, o->n_site, o->n_gate, key->batch, 1);
    ipt_val loss = add_loss(g, ipt_unet_build(g, c, key));
    ipt_status status = ipt_graph_status(g);
    if (status == IPT_OK)
        status = add_gradients(ctx, g, o, loss);
    if (status == IPT_OK)
        status = ipt_plan_create(
            g, &(ipt_plan_opts){.gpu = o->gpu, .weights = o->weights, .state = o->state}, out);
    ipt_graph_destroy(&g);
    return status;
}

/* --- update ----------------------------------------------------------------------------------- */
static ipt_val whole(ipt_graph *g, const ipt_state *s, const char *name)
{
    ipt_state_view v;
    if (!ipt_state_locate(s, name, &v))
        return (ipt_val){0};
    return ipt_leaf(g, IPT_PARAM, name, v.shape);
}

ipt_status ipt_train_update(ipt_ctx *ctx, const ipt_train_opts *o, ipt_plan **out)
{
    ipt_graph *g = NULL;
    IPT_TRY(ipt_graph_create(ctx, &g));
    ipt_val w = whole(g, o->state, IPT_TRAIN_VALUES), d = whole(g, o->state, IPT_TRAIN_GRADS),
            m = whole(g, o->state, IPT_TRAIN_MEAN), v = whole(g, o->state, IPT_TRAIN_SQUARE),
            copy = whole(g, o->state, IPT_TRAIN_COPY);
    ipt_output(g, "norm2", ipt_dot(g, d, d));
    ipt_cut(g);
    ipt_adamw(g, w, d, m, v, ipt_leaf(g, IPT_INPUT, "hyper", ipt_shape1(IPT_F32, 8)));
    if (copy.id)
        ipt_put(g, copy, w);
    ipt_cut(g);
    ipt_put(g, d, (ipt_val){0});
    ipt_status status = ipt_graph_status(g);
    if (status == IPT_OK)
        status = ipt_plan_create(g, &(ipt_plan_opts){.gpu = o->gpu, .state = o->state}, out);
    ipt_graph_destroy(&g);
    return status;
}

void ipt_adamw_hyper(const ipt_adamw_opts *o, int64_t t, double factor, float hyper[8])
{
    const double v[8] = {o->rate,
                         o->b1,
                         o->b2,
                         o->eps,
                         o->decay,
                         1 / (1 - pow(o->b1, (double)t)),
                         1 / sqrt(1 - pow(o->b2, (double)t)),
                         factor};
    for (int i = 0; i < 8; i++)
        hyper[i] = (float)v[i];
}
