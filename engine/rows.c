/* engine/rows.c - the guided prediction of one evaluation: the method's rows through the UNet,
 * their blend, guidance. */
#include "engine/run.h"

#include <math.h>

/* What methods may ask for and this engine does not give. */
ipt_status ipt_rows_possible(ipt_ctx *ctx, const ipt_method *m, const ipt_row *row)
{
    const struct {
        bool asked;
        const char *what;
    } missing[] = {
        {m->map_grad || m->latent || (row->want & IPT_WANT_GRAD), "gradients of the latent"},
        {row->want & IPT_WANT_MAPS, "attention maps"},
        {row->region != 0, "regions"},
    };
    for (size_t i = 0; i < IPT_COUNT(missing); i++)
        if (missing[i].asked)
            return ipt_fail(ctx, IPT_ERR_UNSUPPORTED,
                            "compose method %s asks for %s, which is not in this version", m->name,
                            missing[i].what);
    return IPT_OK;
}

/* The rows of one variant, in batches. */
static ipt_status evaluate(ipt_run *u, double t, int32_t step, ipt_variant variant)
{
    ipt_row *row = u->pick;
    float **out = u->pick_eps;
    size_t n = 0;
    for (size_t i = 0; i < u->rows.n; i++) {
        if (u->rows.row[i].variant == variant) {
            row[n] = u->rows.row[i];
            out[n++] = u->buf.row_eps + i * u->set.n;
        }
        if (n > 0 && (n == (size_t)u->batch || i + 1 == u->rows.n)) {
            IPT_TRY(ipt_unet_rows(u, u->buf.in, t, step, row, n, out));
            n = 0;
        }
    }
    return IPT_OK;
}

ipt_status ipt_rows_predict(ipt_run *u, double t, int32_t eval)
{
    ipt_rows *rows = &u->rows;
    const ipt_buffers *b = &u->buf;
    int32_t step = u->job.step_of[eval];
    IPT_TRY(ipt_policy_step(u->policy, eval, 0, rows));
    ipt_cache_mark(u, eval);
    if (rows->n > u->max_rows)
        return ipt_fail(u->e->ctx, IPT_ERR_ARG, "compose method %s: %zu rows, planned were %zu",
                        ipt_policy_method(u->policy)->name, rows->n, u->max_rows);
    for (size_t i = 0; i < rows->n; i++)
        u->result[i] = (ipt_result){.eps = b->row_eps + i * u->set.n};
    IPT_TRY(evaluate(u, t, step, IPT_UNET_FULL));
    IPT_TRY(evaluate(u, t, step, IPT_UNET_SHALLOW));
    ipt_policy_blend(u->policy, eval, rows, u->result, b->eps_u, b->eps);
    if (u->set.two_rows)
        ipt_cfg(b->eps_u, b->eps, u->set.n, u->set.cfg, u->r->cfg_rescale, b->eps);
    for (size_t i = 0; i < u->set.n; i++)
        if (!isfinite(b->eps[i]))
            return ipt_fail(u->e->ctx, IPT_ERR_FORMAT,
                            "the unet's prediction at step %d is not finite: broken weights, an "
                            "adapter that is too strong, "
                            "or f16 overflow (try --precision f32)",
                            step + 1);
    return IPT_OK;
}
