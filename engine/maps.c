/* engine/maps.c - what rows' words look at, and how the latent would have to change for the method
 * to like it better: maps of all rows first, the method's loss, then some rows after the others
 * back to the latent.  The device holds the activations of a few rows, however many there are. */
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

/* Small latents leave a device idle row by row: a few at once, but never more with more concepts.
 */
static int32_t rows_at_once(const ipt_run *u)
{
    enum { SMALL = 32 * 32, MOST = 4 };
    const ipt_rows *r = &u->rows;
    size_t n = 0;
    for (size_t i = 0; i < r->n; i++)
        n += (r->row[i].want & IPT_WANT_GRAD) != 0;
    size_t chunks = (n + MOST - 1) / MOST;
    return u->set.h * u->set.w > SMALL || chunks == 0 ? 1 : (int32_t)((n + chunks - 1) / chunks);
}

ipt_status ipt_maps_plan(ipt_run *u)
{
    ipt_maps *m = &u->maps;
    if (m->batch == 0)
        return IPT_OK;
    ipt_status status = ipt_plan_get(u->e, &m->key, 0, &m->plan);
    return ipt_too_large(status)
               ? ipt_fit_advise(u->e, status, &m->key, u->set.width, u->set.height, size_fits)
               : status;
}

ipt_status ipt_maps_prepare(ipt_run *u)
{
    ipt_maps *m = &u->maps;
    bool asks = false;
    if (m->tap == 0)
        return IPT_OK;
    const ipt_grid *g = &u->job.grid[m->tap - 1];
    m->n = (size_t)g->h * (size_t)g->w * (size_t)u->job.tokens;
    IPT_TRY(asks_gradient(u, &asks));
    if (asks) {
        m->batch = rows_at_once(u);
        m->key = (ipt_plan_key){.kind = IPT_PLAN_MAPS, .model = u->e->m->id, .unet = u->key};
        m->key.unet.batch = m->batch;
        m->key.unet.deep = 0;
        m->key.unet.is_grad = true;
    }
    size_t rows = u->max_rows, b = (size_t)m->batch, each = (size_t)u->key.batch,
           x = (size_t)u->set.h * (size_t)u->set.w * (size_t)u->e->m->config.unet.in_channels;
    const struct {
        float **at;
        size_t n;
    } room[] = {{&m->row, rows * m->n},     {&m->d_row, rows * m->n}, {&m->chunk, (b + 1) * m->n},
                {&m->d_x, (b + 1) * x},     {&m->d_latent, u->set.n}, {&m->first, u->set.n},
                {&u->out_maps, each * m->n}};
    for (size_t i = 0; i < IPT_COUNT(room); i++)
        if (!(*room[i].at = ipt_arena_alloc(&u->arena, room[i].n * sizeof(float))))
            return IPT_ERR_NOMEM;
    m->d_maps = ipt_arena_alloc(&u->arena, rows * sizeof *m->d_maps);
    m->order = ipt_arena_alloc(&u->arena, rows * sizeof *m->order);
    return m->d_maps && m->order ? IPT_OK : IPT_ERR_NOMEM;
}

/* --- forward and back ------------------------------------------------------------------------- */
/* Rows order[first..] of the evaluation, as many as run at once. */
static size_t in_chunk(const ipt_maps *m, size_t first)
{
    size_t left = m->n_order - first;
    return left < (size_t)m->batch ? left : (size_t)m->batch;
}

static ipt_status run_forward(ipt_run *u, double t, int32_t step, size_t first)
{
    const ipt_maps *m = &u->maps;
    size_t n = in_chunk(m, first);
    if (ipt_cancelled(u->e->ctx))
        return ipt_fail(u->e->ctx, IPT_ERR_CANCELLED, "cancelled");
    for (size_t k = 0; k < n; k++)
        u->pick[k] = u->rows.row[m->order[first + k]];
    IPT_TRY(ipt_unet_inputs(u, m->plan, u->buf.in, t, step, u->pick, n, (size_t)m->batch));
    IPT_TRY(ipt_plan_run(m->plan, 0));
    u->rep->rows_maps += n;
    return IPT_OK;
}

static ipt_status read_maps(ipt_run *u, size_t first)
{
    const ipt_maps *m = &u->maps;
    IPT_TRY(ipt_plan_read(m->plan, "maps", m->chunk, (size_t)m->batch * m->n * sizeof(float)));
    for (size_t k = 0; k < in_chunk(m, first); k++) {
        size_t row = m->order[first + k];
        memcpy(m->row + row * m->n, m->chunk + k * m->n, m->n * sizeof(float));
        u->result[row].maps = m->row + row * m->n;
    }
    return IPT_OK;
}

/* The power of 2 that brings the largest value near 1: 16-bit gradients have few digits below
 * 6e-5.  It stays finite: a loss that is all but 0 has gradients of 1e-40. */
static float loss_scale(const float *v, size_t n)
{
    enum { MOST = 96 };
    float most = 0;
    int e = 0;
    for (size_t i = 0; i < n; i++)
        most = fabsf(v[i]) > most ? fabsf(v[i]) : most;
    if (!(most > 0) || !isfinite(most))
        return 1;
    (void)frexpf(most, &e);
    return ldexpf(1, e < -MOST ? MOST : e > MOST ? -MOST : -e);
}

/* Adds dL/d(latent) of the rows whose forward part ran last. */
static ipt_status run_back(ipt_run *u, size_t first)
{
    const ipt_maps *m = &u->maps;
    size_t hw = (size_t)u->set.h * (size_t)u->set.w, c = (size_t)u->set.channels,
           in = (size_t)u->e->m->config.unet.in_channels, n = in_chunk(m, first),
           b = (size_t)m->batch;
    memset(m->chunk, 0, b * m->n * sizeof(float));
    for (size_t k = 0; k < n; k++)
        memcpy(m->chunk + k * m->n, m->d_maps[m->order[first + k]], m->n * sizeof(float));
    float scale = loss_scale(m->chunk, n * m->n);
    for (size_t i = 0; i < n * m->n; i++)
        m->chunk[i] *= scale;
    IPT_TRY(ipt_plan_write(m->plan, "d_maps", m->chunk, b * m->n * sizeof(float)));
    IPT_TRY(ipt_plan_run(m->plan, 1));
    IPT_TRY(ipt_plan_read(m->plan, "d_x", m->d_x, b * hw * in * sizeof(float)));
    for (size_t i = 0; i < n * hw; i++)
        for (size_t k = 0; k < c; k++)
            m->d_latent[k * hw + i % hw] += m->d_x[i * in + k] / scale;
    u->rep->rows_backward += n;
    u->rep->unet_macs += ipt_plan_macs(m->plan) / (double)b * (double)n; /* both ways */
    return IPT_OK;
}

ipt_status ipt_maps_update(ipt_run *u, double t, int32_t eval, int32_t round, bool *again)
{
    ipt_maps *m = &u->maps;
    int32_t step = u->job.step_of[eval];
    size_t last = 0, b = (size_t)m->batch;
    double loss = 0;
    m->n_order = 0;
    memset(m->d_row, 0, u->rows.n * m->n * sizeof *m->d_row);
    memset(m->d_latent, 0, u->set.n * sizeof *m->d_latent);
    for (size_t k = 0; k < u->rows.n; k++) {
        m->d_maps[k] = m->d_row + k * m->n;
        if (wants(u, k, IPT_WANT_GRAD))
            m->order[m->n_order++] = k;
    }
    for (size_t k = 0; k < m->n_order; k += b) {
        IPT_TRY(run_forward(u, t, step, k));
        IPT_TRY(read_maps(u, k));
        last = k;
    }
    IPT_TRY(ipt_policy_map_grad(u->policy, eval, &u->rows, u->result, m->d_maps, &loss));
    IPT_TRY(run_back(u, last)); /* whose activations are still there */
    for (size_t k = 0; k < last; k += b) {
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
