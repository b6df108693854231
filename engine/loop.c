/* engine/loop.c - one picture: noise or a given picture, the sampling loop, decoding; traces. */
#include "engine/run.h"

ipt_status ipt_loop_buffers(ipt_run *u)
{
    ipt_buffers *b = &u->buf;
    size_t bytes = u->set.n * sizeof(float);
    float **one[] = {&b->x, &b->in, &b->eps, &b->eps_u, &b->noise, &b->fresh, &b->keep, &b->x0};
    for (size_t i = 0; i < IPT_COUNT(one); i++)
        if (!(*one[i] = ipt_arena_alloc(&u->arena, bytes)))
            return IPT_ERR_NOMEM;
    b->row_eps = ipt_arena_alloc(&u->arena, u->max_rows * bytes);
    u->result = ipt_arena_alloc(&u->arena, u->max_rows * sizeof *u->result);
    u->pick = ipt_arena_alloc(&u->arena, u->max_rows * sizeof *u->pick);
    u->pick_eps = ipt_arena_alloc(&u->arena, u->max_rows * sizeof *u->pick_eps);
    u->pick_maps = ipt_arena_alloc(&u->arena, u->max_rows * sizeof *u->pick_maps);
    return b->row_eps && u->result && u->pick && u->pick_eps && u->pick_maps ? IPT_OK
                                                                             : IPT_ERR_NOMEM;
}

/* --- traces ----------------------------------------------------------------------------------- */
static ipt_status trace_latent(ipt_run *u, ipt_trace *t, const char *what, int32_t i,
                               const float *v)
{
    char name[64];
    const int64_t dim[4] = {1, u->set.channels, u->set.h, u->set.w};
    if (i >= 0)
        ipt_name(name, sizeof name, "%s%d", what, i);
    else
        ipt_name(name, sizeof name, "%s", what);
    return ipt_trace_f32(t, name, v, dim, 4);
}

ipt_status ipt_loop_trace_text(ipt_run *u, ipt_trace *t)
{
    static const char *const ids_name[2][2] = {{"ids", "ids_negative"},
                                               {"ids_2", "ids_2_negative"}};
    for (int which = 0; t && which < 2; which++) {
        const ipt_encoded *e = &u->text[u->trace_text[which]].enc;
        const int64_t text[3] = {1, e->tokens, e->width}, pooled[2] = {1, e->pooled_width},
                      six[2] = {1, 6};
        const float ids[6] = {(float)u->set.height, (float)u->set.width, 0, 0,
                              (float)u->set.height, (float)u->set.width};
        for (int k = 0; k < 2 && e->ids[k]; k++)
            IPT_TRY(ipt_trace_i32(t, ids_name[k][which], e->ids[k], e->tokens));
        IPT_TRY(ipt_trace_f32(t, which ? "text_negative" : "text", e->text, text, 3));
        if (e->pooled_width > 0) {
            IPT_TRY(ipt_trace_f32(t, which ? "pooled_negative" : "pooled", e->pooled, pooled, 2));
            if (which == 0)
                IPT_TRY(ipt_trace_f32(t, "time_ids", ids, six, 2));
        }
    }
    return IPT_OK;
}

static ipt_status trace_times(ipt_run *u, const ipt_sampler *s, ipt_trace *t)
{
    int64_t n = ipt_sampler_n_evals(s);
    float *v = t ? ipt_arena_alloc(&u->arena, (size_t)n * sizeof *v) : NULL;
    if (t && !v)
        return IPT_ERR_NOMEM;
    for (int32_t i = 0; t && i < n; i++)
        v[i] = (float)ipt_sampler_timestep(s, i);
    return ipt_trace_f32(t, "timesteps", v, &n, 1);
}

/* The maps of each world, [worlds, cells, tokens], the mean of its rows' where several have some.
 */
static void mean_maps(const ipt_run *u, float *out)
{
    size_t each = u->maps.n;
    for (size_t k = 0; k < u->rows.n; k++) {
        const ipt_row *r = &u->rows.row[k];
        size_t n = 0;
        for (size_t i = 0; i < u->rows.n; i++)
            n += u->rows.row[i].world == r->world && u->result[i].maps;
        for (size_t i = 0; u->result[k].maps && i < each; i++)
            out[r->world * each + i] += u->result[k].maps[i] / (float)n;
    }
}

static bool has_maps(const ipt_run *u)
{
    bool any = false;
    for (size_t k = 0; k < u->rows.n; k++)
        any = any || u->result[k].maps;
    return any;
}

/* What an evaluation with maps looked at, what the method made of it, and the latent's updates. */
static ipt_status trace_maps(ipt_run *u, ipt_trace *t, int32_t i)
{
    char name[64];
    const float *mask = NULL;
    int32_t slot[IPT_MAX_SLOT];
    size_t n = ipt_policy_masks(u->policy, &mask, slot), worlds = ipt_rows_worlds(&u->rows),
           each = u->maps.n;
    const int64_t hw[3] = {(int64_t)n, u->set.h, u->set.w};
    if (!t)
        return IPT_OK;
    if (u->maps.is_moved) {
        const int64_t rounds = u->maps.n_round;
        ipt_name(name, sizeof name, "loss_step%d", i);
        IPT_TRY(ipt_trace_f32(t, name, u->maps.loss, &rounds, 1));
        IPT_TRY(trace_latent(u, t, "grad_step", i, u->maps.first));
        IPT_TRY(trace_latent(u, t, "moved_step", i, u->buf.x));
    }
    ipt_name(name, sizeof name, "mask_step%d", i);
    if (n > 0)
        IPT_TRY(ipt_trace_f32(t, name, mask, hw, 3));
    if (!has_maps(u))
        return IPT_OK;
    float *all = ipt_calloc(u->e->ctx, worlds * each, sizeof *all);
    if (!all)
        return IPT_ERR_NOMEM;
    mean_maps(u, all);
    ipt_name(name, sizeof name, "map_step%d", i);
    const int64_t dim[3] = {(int64_t)worlds, (int64_t)each / u->job.tokens, u->job.tokens};
    ipt_status status = ipt_trace_f32(t, name, all, dim, 3);
    ipt_free(all);
    return status;
}

/* Shows x after `done` evaluations to who asked for it. */
static ipt_status show_latent(const ipt_run *u, int32_t image, int32_t done, int32_t n)
{
    const ipt_latent l = {image, done, n, u->set.channels, u->set.h, u->set.w, u->buf.x};
    return u->r->latent ? u->r->latent(u->r->latent_user, &l) : IPT_OK;
}

/* --- the loop --------------------------------------------------------------------------------- */
static ipt_status sample_loop(ipt_run *u, ipt_sampler *s, ipt_noise *source, ipt_trace *trace,
                              int32_t image)
{
    const ipt_buffers *b = &u->buf;
    int32_t n = ipt_sampler_n_evals(s);
    IPT_TRY(show_latent(u, image, 0, n));
    for (int32_t i = 0; i < n; i++) {
        double t0 = ipt_now_ms();
        if (ipt_cancelled(u->e->ctx))
            return ipt_fail(u->e->ctx, IPT_ERR_CANCELLED, "cancelled");
        ipt_run_progress(u, "sample", i, n, image);
        ipt_sampler_scale_input(s, i, b->x, b->in);
        IPT_TRY(ipt_rows_predict(u, ipt_sampler_timestep(s, i), i));
        if (u->maps.is_moved)
            ipt_sampler_unscale_input(s, i, b->in, b->x);
        bool fresh = ipt_sampler_needs_noise(s, i);
        if (fresh)
            ipt_noise_draw(source, b->fresh, u->set.n);
        IPT_TRY(trace_latent(u, trace, "eps_step", i, b->eps));
        IPT_TRY(trace_maps(u, trace, i));
        IPT_TRY(ipt_preview_show(u, s, i, image));
        IPT_TRY(ipt_sampler_step(s, i, b->eps, b->x, fresh ? b->fresh : NULL));
        if (u->start.mask && !u->start.mask_channels)
            ipt_start_keep(&u->start, s, i + 1, &u->set, b->noise, b->keep, b->x);
        IPT_TRY(trace_latent(u, trace, "latent_step", i, b->x));
        IPT_TRY(show_latent(u, image, i + 1, n));
        double ms = ipt_now_ms() - t0;
        if (u->done_eval == 0)
            u->rep->ms_first_step = ms;
        u->done_eval++;
        u->step_ms = u->done_eval <= 2
                         ? ms
                         : 0.7 * u->step_ms + 0.3 * ms; /* the first one compiles shaders */
    }
    ipt_run_progress(u, "sample", n, n, image);
    return IPT_OK;
}

ipt_status ipt_loop_picture(ipt_run *u, int32_t k, ipt_trace *trace, float *rgb)
{
    const ipt_buffers *b = &u->buf;
    ipt_sampler *s = NULL;
    ipt_noise source;
    ipt_status status = IPT_OK;
    double t0 = 0;
    IPT_TRY(ipt_unet_wake(u));
    ipt_noise_seed(&source, u->r->seed + (uint64_t)k, u->set.philox);
    IPT_TRY(ipt_settings_sampler(u->e->ctx, &u->set, &s));
    ipt_start_draw(&u->start, u->e, s, &u->set, &source, b->fresh, b->noise, b->x);
    IPT_TRY_GOTO(trace_times(u, s, trace), done);
    IPT_TRY_GOTO(trace_latent(u, trace, "noise", -1, b->noise), done);
    IPT_TRY_GOTO(trace_latent(u, trace, "latent_start", -1, b->x), done);
    t0 = ipt_now_ms();
    IPT_TRY_GOTO(sample_loop(u, s, &source, trace, k), done);
    u->rep->ms_sample += ipt_now_ms() - t0;
    t0 = ipt_now_ms();
    ipt_unet_rest(u);
    ipt_run_progress(u, "vae", 0, 1, k);
    IPT_TRY_GOTO(ipt_decode(u->e, u->r, b->x, u->set.h, u->set.w, rgb), done);
    u->vae_ms = ipt_now_ms() - t0;
    u->rep->ms_vae += u->vae_ms;
    if (trace) {
        const int64_t dim[4] = {1, u->set.height, u->set.width, 3};
        IPT_TRY_GOTO(ipt_trace_f32(trace, "image", rgb, dim, 4), done);
    }
done:
    ipt_sampler_destroy(&s);
    return status;
}
