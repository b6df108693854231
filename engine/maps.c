/* engine/maps.c - what rows' words look at, and how the latent would have to change for the method
 * to like it better: maps of all rows first, the method's loss, then one row after the other back
 * to the latent.  However many rows there are, the device holds the activations of one. */
#include "engine/run.h"

#include "vae/vae.h"

#include <math.h>
#include <string.h>

static bool wants(const ipt_run *u, size_t row, unsigned what)
{
    return (u->rows.row[row].want & what) != 0;
}

/* Whether rows of an evaluation may want gradients. */
static ipt_status asks_gradient(ipt_run *u, bool *asks)
{
    *asks = false;
    for (int32_t i = 0; i < u->n_eval && !*asks; i++) {
        IPT_TRY(ipt_policy_plan(u->policy, i, &u->rows));
        for (size_t k = 0; k < u->rows.n; k++)
            *asks = *asks || wants(u, k, IPT_WANT_GRAD);
    }
    return IPT_OK;
}

/* One row of the key that failed in another size. */
static ipt_status size_fits(ipt_engine *e, const ipt_plan_key *failed, int32_t width,
                            int32_t height)
{
    const int32_t f = ipt_vae_factor(&e->m->config.vae);
    ipt_plan_key key = *failed;
    key.unet.h = height / f;
    key.unet.w = width / f;
    return ipt_plan_dry(e, &key);
}

static ipt_status get_plan(ipt_run *u, const ipt_unet_key *whole)
{
    ipt_plan_key key = {.kind = IPT_PLAN_MAPS, .model = u->e->m->id, .unet = *whole};
    bool asks = false;
    IPT_TRY(asks_gradient(u, &asks));
    if (!asks)
        return IPT_OK;
    key.unet.batch = 1;
    key.unet.deep = 0;
    key.unet.is_grad = true;
    ipt_status status = ipt_plan_get(u->e, &key, 0, &u->maps.plan);
    return ipt_too_large(status)
               ? ipt_fit_advise(u->e, status, &key, u->set.width, u->set.height, size_fits)
               : status;
}

ipt_status ipt_maps_prepare(ipt_run *u, const ipt_unet_key *whole)
{
    ipt_maps *m = &u->maps;
    size_t rows = u->max_rows, b = (size_t)u->batch,
           x = (size_t)u->set.h * (size_t)u->set.w *
               (size_t)u->e->m->config.unet.in_channels;
    if (m->tap == 0)
        return IPT_OK;
    const ipt_grid *g = &u->job.grid[m->tap - 1];
    m->n = (size_t)g->h * (size_t)g->w * (size_t)u->job.tokens;
    IPT_TRY(get_plan(u, whole));
    m->row = ipt_arena_alloc(&u->arena, rows * m->n * sizeof *m->row);
    m->d_row = ipt_arena_alloc(&u->arena, rows * m->n * sizeof *m->d_row);
    m->d_maps = ipt_arena_alloc(&u->arena, rows * sizeof *m->d_maps);
    m->d_x = ipt_arena_alloc(&u->arena, x * sizeof *m->d_x);
    m->d_latent = ipt_arena_alloc(&u->arena, u->set.n * sizeof *m->d_latent);
    m->first = ipt_arena_alloc(&u->arena, u->set.n * sizeof *m->first);
    u->out_maps = ipt_arena_alloc(&u->arena, b * m->n * sizeof *u->out_maps);
    return m->row && m->d_row && m->d_maps && m->d_x && m->d_latent && m->first && u->out_maps
               ? IPT_OK
               : IPT_ERR_NOMEM;
}

/* --- forward and back ------------------------------------------------------------------------- */
static ipt_status run_forward(ipt_run *u, double t, int32_t step, size_t row)
{
    if (ipt_cancelled(u->e->ctx))
        return ipt_fail(u->e->ctx, IPT_ERR_CANCELLED, "cancelled");
    IPT_TRY(ipt_unet_input(u, u->maps.plan, u->buf.in, t, step, &u->rows.row[row]));
    IPT_TRY(ipt_plan_run(u->maps.plan, 0));
    u->rep->rows_maps++;
    return IPT_OK;
}

/* The power of 2 that brings the largest value near 1: 16-bit gradients have few digits below
 * 6e-5. */
static float loss_scale(const float *v, size_t n)
{
    float most = 0;
    int e = 0;
    for (size_t i = 0; i < n; i++)
        most = fabsf(v[i]) > most ? fabsf(v[i]) : most;
    if (!(most > 0) || !isfinite(most))
        return 1;
    (void)frexpf(most, &e);
    return ldexpf(1, -e);
}

/* Adds dL/d(latent) of the row whose forward part ran last. */
static ipt_status run_back(ipt_run *u, size_t row)
{
    const ipt_maps *m = &u->maps;
    size_t hw = (size_t)u->set.h * (size_t)u->set.w, c = (size_t)u->set.channels,
           in = (size_t)u->e->m->config.unet.in_channels;
    float *d = m->d_maps[row], scale = loss_scale(d, m->n);
    for (size_t i = 0; i < m->n; i++)
        d[i] *= scale;
    IPT_TRY(ipt_plan_write(m->plan, "d_maps", d, m->n * sizeof *d));
    IPT_TRY(ipt_plan_run(m->plan, 1));
    IPT_TRY(ipt_plan_read(m->plan, "d_x", m->d_x, hw * in * sizeof *m->d_x));
    for (size_t i = 0; i < hw; i++)
        for (size_t k = 0; k < c; k++)
            m->d_latent[k * hw + i] += m->d_x[i * in + k] / scale;
    u->rep->rows_backward++;
    return IPT_OK;
}

ipt_status ipt_maps_update(ipt_run *u, double t, int32_t eval, int32_t round, bool *again)
{
    ipt_maps *m = &u->maps;
    int32_t step = u->job.step_of[eval];
    size_t last = u->rows.n;
    double loss = 0;
    memset(m->d_row, 0, u->rows.n * m->n * sizeof *m->d_row);
    memset(m->d_latent, 0, u->set.n * sizeof *m->d_latent);
    for (size_t k = 0; k < u->rows.n; k++) {
        m->d_maps[k] = m->d_row + k * m->n;
        if (!wants(u, k, IPT_WANT_GRAD))
            continue;
        IPT_TRY(run_forward(u, t, step, k));
        IPT_TRY(ipt_plan_read(m->plan, "maps", m->row + k * m->n, m->n * sizeof *m->row));
        u->result[k].maps = m->row + k * m->n;
        last = k;
    }
    IPT_TRY(ipt_policy_map_grad(u->policy, eval, &u->rows, u->result, m->d_maps, &loss));
    for (size_t k = last + 1; k-- > 0;) { /* from the one whose activations are still there */
        if (!wants(u, k, IPT_WANT_GRAD))
            continue;
        if (k != last)
            IPT_TRY(run_forward(u, t, step, k));
        IPT_TRY(run_back(u, k));
    }
    m->is_moved = true;
    if (round == 0)
        memcpy(m->first, m->d_latent, u->set.n * sizeof *m->first);
    if (round < IPT_KEEP_LOSS)
        m->loss[round] = (float)loss;
    m->n_round = round + 1 < IPT_KEEP_LOSS ? round + 1 : IPT_KEEP_LOSS;
    return ipt_policy_latent(u->policy, eval, round, m->d_latent, u->buf.in, again);
}
