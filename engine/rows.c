/* engine/rows.c - the guided prediction of one evaluation: the method's rows through the UNet,
 * their blend, guidance. */
#include "engine/run.h"

#include <math.h>

/* What methods may ask for and this engine does not give. */
ipt_status ipt_rows_possible(ipt_ctx *ctx, const ipt_method *m, const ipt_row *row)
{
    return row->region == 0 ? IPT_OK
                            : ipt_fail(ctx, IPT_ERR_UNSUPPORTED,
                                       "compose method %s asks for regions, which are not in this "
                                       "version",
                                       m->name);
}

/* The rows of one variant, in batches. */
static ipt_status evaluate(ipt_run *u, double t, int32_t step, ipt_variant variant)
{
    ipt_row *row = u->pick;
    float **out = u->pick_eps, **maps = u->pick_maps;
    size_t n = 0;
    for (size_t i = 0; i < u->rows.n; i++) {
        if (u->rows.row[i].variant == variant && (u->rows.row[i].want & IPT_WANT_EPS)) {
            row[n] = u->rows.row[i];
            maps[n] = u->maps.row ? u->maps.row + i * u->maps.n : NULL;
            out[n++] = u->buf.row_eps + i * u->set.n;
        }
        if (n > 0 && (n == (size_t)u->batch || i + 1 == u->rows.n)) {
            IPT_TRY(ipt_unet_rows(u, u->buf.in, t, step, row, n, out, maps));
            n = 0;
        }
    }
    return IPT_OK;
}

/* One round of an evaluation: its rows, and the latent's update where they want one. */
static ipt_status run_round(ipt_run *u, double t, int32_t eval, int32_t round, bool *again)
{
    ipt_rows *rows = &u->rows;
    int32_t step = u->job.step_of[eval];
    bool is_update = false;
    *again = false;
    IPT_TRY(ipt_policy_step(u->policy, eval, round, rows));
    ipt_cache_mark(u, eval);
    ipt_explain_input(u); /* a round's update may move the latent behind it */
    if (rows->n > u->max_rows)
        return ipt_fail(u->e->ctx, IPT_ERR_ARG, "compose method %s: %zu rows, planned were %zu",
                        ipt_policy_method(u->policy)->name, rows->n, u->max_rows);
    for (size_t i = 0; i < rows->n; i++) {
        const ipt_row *r = &rows->row[i];
        u->result[i] = (ipt_result){0};
        if (r->want & IPT_WANT_EPS)
            u->result[i].eps = u->buf.row_eps + i * u->set.n;
        if (r->want & IPT_WANT_MAPS)
            u->result[i].maps = u->maps.row + i * u->maps.n;
        is_update = is_update || (r->want & IPT_WANT_GRAD);
    }
    IPT_TRY(evaluate(u, t, step, IPT_UNET_FULL));
    IPT_TRY(evaluate(u, t, step, IPT_UNET_SHALLOW));
    return is_update ? ipt_maps_update(u, t, eval, round, again) : IPT_OK;
}

void ipt_rows_guide(ipt_run *u, int32_t eval, const ipt_result *res, float *eps_u, float *eps)
{
    ipt_policy_blend(u->policy, eval, &u->rows, res, eps_u, eps);
    if (u->set.two_rows)
        ipt_cfg(eps_u, eps, u->set.n, u->set.cfg, u->r->cfg_rescale, eps);
}

ipt_status ipt_rows_predict(ipt_run *u, double t, int32_t eval)
{
    const ipt_buffers *b = &u->buf;
    bool again = true;
    u->eval = eval;
    u->maps.is_moved = false;
    u->maps.n_round = 0;
    for (int32_t round = 0; again; round++)
        IPT_TRY(run_round(u, t, eval, round, &again));
    IPT_TRY(ipt_explain_step(u, t, eval));
    ipt_rows_guide(u, eval, u->result, b->eps_u, b->eps);
    for (size_t i = 0; i < u->set.n; i++)
        if (!isfinite(b->eps[i]))
            return ipt_fail(u->e->ctx, IPT_ERR_FORMAT,
                            "the unet's prediction at step %d is not finite: broken weights, an "
                            "adapter that is too strong, "
                            "or f16 overflow (try --precision f32)",
                            u->job.step_of[eval] + 1);
    return IPT_OK;
}
