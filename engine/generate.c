/* engine/generate.c - one request from prompt to pictures: embeddings, the sampling loop over
 * worlds and rows, guidance, decoding.  Latents are [C,h,w] on the host (the order in which the
 * reference draws noise); the UNet's inputs are channels last. */
#include "engine/hash.h"
#include "engine/internal.h"

#include <math.h>
#include <string.h>

/* Everything a request needs while it runs. */
typedef struct run {
    ipt_engine *e;
    const ipt_request *r;
    ipt_report *rep;
    ipt_adapter_report *adapter; /* rep's, [e->n_file] */
    ipt_arena arena;
    ipt_settings set;
    /* embeddings: one pair for each distinct vector of text gates */
    ipt_prompts prompts;
    size_t n_text;
    float text_gate[IPT_MAX_SLOT + 1][IPT_MAX_SLOT];
    ipt_encoded text[IPT_MAX_SLOT + 1][2];
    /* composition */
    ipt_policy *policy;
    ipt_slot_use slot[IPT_MAX_SLOT];
    /* the UNet's plan and its inputs, [batch, ...] */
    ipt_plan *unet;
    int32_t batch;
    float *in_x, *in_text, *in_add, *in_gates, *eps;
    ipt_start start; /* img2img and inpainting */
    ipt_paste paste;
    /* progress */
    double t_start, step_ms, vae_ms; /* the last two: 0, not known yet */
    double step_macs;                /* of all replays of an evaluation */
    int32_t n_eval, done_eval;
} run;

void ipt_request_init(ipt_request *r)
{
    memset(r, 0, sizeof *r);
    r->cfg = (double)NAN;
    r->strength = (double)NAN;
}

static void progress(run *u, const char *stage, int32_t done, int32_t total, int32_t image)
{
    if (!u->r->progress)
        return;
    ipt_progress p = {.stage = stage,
                      .done = done,
                      .total = total,
                      .image = image,
                      .n_image = u->set.count,
                      .eta_ms = -1,
                      .step_ms = u->step_ms};
    if (u->step_ms > 0) {
        int32_t left = u->n_eval * u->set.count - u->done_eval;
        double vae = u->vae_ms; /* before the first: as much slower as it is more work */
        if (vae <= 0 && u->step_macs > 0)
            vae = u->step_ms / u->step_macs * ipt_decode_macs(u->e, u->set.h, u->set.w);
        p.eta_ms = left * u->step_ms + (u->set.count - image) * vae;
    }
    u->r->progress(u->r->user, &p);
}

/* --- adapters and embeddings ------------------------------------------------------------------ */
/* Says what a prompt holds that does not act. */
static void warn_of_syntax(ipt_ctx *ctx, const char *which, const char *text)
{
    static const struct {
        unsigned bit;
        const char *what;
    } syntax[] = {
        {IPT_PROMPT_EDITS, "[from:to:when] (prompt editing)"},
        {IPT_PROMPT_ALTERNATES, "[a|b] (alternating words)"},
        {IPT_PROMPT_AND, "AND (several prompts in one)"},
    };
    unsigned found = text ? ipt_prompt_not_built(text, strlen(text)) : 0;
    for (size_t i = 0; i < IPT_COUNT(syntax); i++)
        if (found & syntax[i].bit)
            ipt_log(ctx, IPT_LOG_WARN, "%s: %s is not built in and taken literally", which,
                    syntax[i].what);
}

/* <lora:...> tags of the prompt (the negative's are ignored, as in A1111). */
static ipt_status read_tags(run *u, ipt_prompt **out)
{
    const char *text = u->r->prompt ? u->r->prompt : "";
    ipt_ctx *ctx = u->e->ctx;
    IPT_TRY(ipt_prompt_create(ctx, u->e->tokenizer[0], text, strlen(text), NULL, out));
    warn_of_syntax(ctx, "prompt", u->r->prompt);
    warn_of_syntax(ctx, "negative prompt", u->r->negative);
    for (size_t i = 0; i < (*out)->n_ignored; i++)
        ipt_log(ctx, IPT_LOG_WARN, "prompt: %.100s has no meaning here and is left out",
                (*out)->ignored[i]);
    return IPT_OK;
}

static ipt_status make_policy(run *u, const ipt_prompt *tags)
{
    const ipt_request *r = u->r;
    size_t n = 0;
    for (size_t i = 0; i < r->n_lora; i++, n++) {
        u->slot[n] = (ipt_slot_use){.weight = r->lora[i].weight,
                                    .te_weight = r->lora[i].te_weight,
                                    .start = r->lora[i].start,
                                    .end = r->lora[i].end};
        IPT_TRY(ipt_block_weights(u->e->ctx, r->lora[i].blocks, u->slot[n].block));
        if (!isfinite(r->lora[i].weight) || !isfinite(r->lora[i].te_weight) ||
            !(r->lora[i].start <= r->lora[i].end))
            return ipt_fail(u->e->ctx, IPT_ERR_ARG, "%s: weight or time range is not usable",
                            r->lora[i].path);
    }
    for (size_t i = 0; i < tags->n_lora; i++, n++) {
        u->slot[n] = (ipt_slot_use){.weight = (float)tags->loras[i].weight,
                                    .te_weight = (float)tags->loras[i].te_weight,
                                    .start = 0,
                                    .end = 1};
        IPT_TRY(ipt_block_weights(u->e->ctx, NULL, u->slot[n].block));
    }
    ipt_job job = {.ctx = u->e->ctx,
                   .n_step = u->set.steps,
                   .n_slot = (int32_t)n,
                   .slot = u->slot,
                   .n_latent = u->set.n,
                   .opt = r->compose_opt,
                   .n_opt = r->n_compose_opt};
    return ipt_policy_create(r->compose ? r->compose : "merge", &job, &u->policy);
}

static bool same_gates(const float *a, const float *b)
{
    for (int s = 0; s < IPT_MAX_SLOT; s++)
        if (a[s] < b[s] || a[s] > b[s])
            return false;
    return true;
}

/* Index of the pair of embeddings for a world, encoded at first use. */
static ipt_status text_of(run *u, const ipt_world *world, size_t *index)
{
    float gate[IPT_MAX_SLOT] = {0};
    ipt_bank *bank = u->e->bank;
    if (ipt_bank_has(bank, IPT_COMP_TEXT) || ipt_bank_has(bank, IPT_COMP_TEXT2))
        ipt_policy_text_gates(u->policy, world, gate);
    for (size_t i = 0; i < u->n_text; i++)
        if (same_gates(u->text_gate[i], gate)) {
            *index = i;
            return IPT_OK;
        }
    if (u->n_text >= IPT_COUNT(u->text))
        return ipt_fail(u->e->ctx, IPT_ERR_UNSUPPORTED,
                        "too many different text encodings in one request");
    size_t i = u->n_text;
    memcpy(u->text_gate[i], gate, sizeof gate);
    for (int which = 0; which < (u->set.two_rows || u->r->trace ? 2 : 1); which++)
        IPT_TRY(ipt_encode(u->e, u->r, &u->prompts, which, gate, &u->arena, &u->text[i][which]));
    u->n_text++;
    *index = i;
    return IPT_OK;
}

/* All embeddings the steps will need, before the first step. */
static ipt_status encode_all(run *u, size_t *max_worlds)
{
    double t = ipt_now_ms();
    progress(u, "text", 0, 1, 0);
    IPT_TRY(ipt_prompts_read(u->e, u->r, &u->prompts));
    if (u->prompts.prompt[1][0]->n_lora > 0)
        ipt_log(u->e->ctx, IPT_LOG_WARN, "negative prompt: <lora:%.100s> has no effect there",
                u->prompts.prompt[1][0]->loras[0].name);
    for (int32_t i = 0; i < u->set.steps; i++) {
        size_t n = 0, index = 0;
        const ipt_world *w = ipt_policy_step(u->policy, i, &n);
        *max_worlds = n > *max_worlds ? n : *max_worlds;
        for (size_t k = 0; k < n; k++)
            IPT_TRY(text_of(u, &w[k], &index));
    }
    u->rep->ms_text = ipt_now_ms() - t;
    return IPT_OK;
}

/* --- the UNet --------------------------------------------------------------------------------- */
/* A plan for all rows at once, or for fewer at a time when they do not fit in device memory. */
static ipt_status unet_plan(run *u, size_t rows)
{
    ipt_engine *e = u->e;
    size_t chunks = (rows + IPT_MAX_ROWS - 1) / IPT_MAX_ROWS;
    int32_t limit = u->r->batch > 0 ? u->r->batch : (int32_t)((rows + chunks - 1) / chunks);
    const ipt_unet_config *c = &e->config.unet;
    ipt_unet_key key = {limit < (int32_t)rows ? limit : (int32_t)rows, u->set.h, u->set.w,
                        u->text[0][0].tokens, e->act_type};
    IPT_TRY(ipt_unet_plan(e, &key));
    u->batch = key.batch;
    u->unet = e->unet.plan;
    size_t replays = (rows + (size_t)key.batch - 1) / (size_t)key.batch;
    u->step_macs = ipt_plan_macs(u->unet) * (double)replays;
    size_t b = (size_t)u->batch, hw = (size_t)u->set.h * (size_t)u->set.w;
    u->in_x = ipt_arena_alloc(&u->arena, b * hw * (size_t)c->in_channels * 4);
    u->in_text = ipt_arena_alloc(&u->arena, b * (size_t)key.tokens * (size_t)c->cross_dim[0] * 4);
    u->in_add = ipt_arena_alloc(&u->arena, b * (size_t)(c->add_in_dim > 0 ? c->add_in_dim : 1) * 4);
    u->in_gates = ipt_arena_alloc(&u->arena, b * IPT_GATE_ROWS * IPT_MAX_SLOT * 4);
    u->eps = ipt_arena_alloc(&u->arena, b * u->set.n * 4);
    return u->in_x && u->in_text && u->in_add && u->in_gates && u->eps ? IPT_OK : IPT_ERR_NOMEM;
}

/* SDXL's added conditions: pooled text, then the embedded sizes (original, crop, target). */
static ipt_status fill_add(run *u, const ipt_encoded *text, float *add)
{
    const ipt_unet_config *c = &u->e->config.unet;
    const double ids[6] = {u->set.height, u->set.width, 0, 0, u->set.height, u->set.width};
    if (c->add_time_dim < 1 || text->pooled_width + 6 * c->add_time_dim != c->add_in_dim)
        return ipt_fail(u->e->ctx, IPT_ERR_SHAPE,
                        "added conditions: %d pooled + 6 x %d values, the unet takes %d",
                        text->pooled_width, c->add_time_dim, c->add_in_dim);
    memcpy(add, text->pooled, (size_t)text->pooled_width * sizeof *add);
    for (int i = 0; i < 6; i++)
        ipt_timestep_embedding(ids[i], c->add_time_dim, c->flip_sin_to_cos, (double)c->freq_shift,
                               add + text->pooled_width + (ptrdiff_t)i * c->add_time_dim);
    return IPT_OK;
}

typedef struct row {
    const ipt_encoded *text;
    const ipt_world *world;
    float *eps; /* where the prediction goes, [C,h,w] */
} row;

/* Channels last, with mask and masked picture for inpainting models. */
static void fill_x(const run *u, const float *x, float *out)
{
    size_t hw = (size_t)u->set.h * (size_t)u->set.w, c = (size_t)u->set.channels,
           in = (size_t)u->e->config.unet.in_channels;
    for (size_t i = 0; i < hw; i++) {
        for (size_t k = 0; k < c; k++)
            out[i * in + k] = x[k * hw + i];
        if (in > c) {
            out[i * in + c] = u->start.mask[i];
            for (size_t k = 0; k < c; k++)
                out[i * in + c + 1 + k] = u->start.masked.latent[k * hw + i];
        }
    }
}

/* Evaluates up to `batch` rows; the rest of the batch repeats the last row. */
static ipt_status evaluate_batch(run *u, const float *x, double t, int32_t step, const row *rows,
                                 size_t n)
{
    const ipt_unet_config *c = &u->e->config.unet;
    size_t b = (size_t)u->batch, hw = (size_t)u->set.h * (size_t)u->set.w,
           slots = ipt_bank_n_slot(u->e->bank);
    size_t x_row = hw * (size_t)c->in_channels,
           text_row = (size_t)rows[0].text->tokens * (size_t)c->cross_dim[0];
    float *t_emb =
        ipt_calloc(u->e->ctx, b * (size_t)(c->channels[0] + c->time_cond_dim + 1), sizeof *t_emb);
    if (!t_emb)
        return IPT_ERR_NOMEM;
    float *w_emb = t_emb + b * (size_t)c->channels[0];
    ipt_status status = IPT_OK;
    for (size_t k = 0; k < b; k++) {
        const row *r = &rows[k < n ? k : n - 1];
        fill_x(u, x, u->in_x + k * x_row);
        ipt_timestep_embedding(t, c->channels[0], c->flip_sin_to_cos, (double)c->freq_shift,
                               t_emb + k * (size_t)c->channels[0]);
        if (c->time_cond_dim > 0)
            ipt_guidance_embedding(u->set.cfg - 1.0, c->time_cond_dim,
                                   w_emb + k * (size_t)c->time_cond_dim);
        memcpy(u->in_text + k * text_row, r->text->text, text_row * sizeof(float));
        if (c->text_time)
            IPT_TRY_GOTO(fill_add(u, r->text, u->in_add + k * (size_t)c->add_in_dim), done);
        if (slots > 0)
            ipt_policy_gates(u->policy, r->world, step, u->in_gates + k * slots, b * slots);
    }
    IPT_TRY_GOTO(ipt_plan_write(u->unet, "x", u->in_x, b * x_row * 4), done);
    IPT_TRY_GOTO(ipt_plan_write(u->unet, "t_emb", t_emb, b * (size_t)c->channels[0] * 4), done);
    IPT_TRY_GOTO(ipt_plan_write(u->unet, "text", u->in_text, b * text_row * 4), done);
    if (c->text_time)
        IPT_TRY_GOTO(ipt_plan_write(u->unet, "add", u->in_add, b * (size_t)c->add_in_dim * 4),
                     done);
    if (c->time_cond_dim > 0)
        IPT_TRY_GOTO(ipt_plan_write(u->unet, "w_emb", w_emb, b * (size_t)c->time_cond_dim * 4),
                     done);
    if (ipt_bank_has(u->e->bank, IPT_COMP_UNET))
        IPT_TRY_GOTO(ipt_plan_write(u->unet, "gates", u->in_gates, IPT_GATE_ROWS * b * slots * 4),
                     done);
    IPT_TRY_GOTO(ipt_plan_run(u->unet, 0), done);
    IPT_TRY_GOTO(ipt_plan_read(u->unet, "eps", u->eps, b * u->set.n * 4), done);
    for (size_t k = 0; k < n; k++)
        for (size_t ch = 0; ch < (size_t)u->set.channels; ch++)
            for (size_t i = 0; i < hw; i++)
                rows[k].eps[ch * hw + i] = u->eps[(k * hw + i) * (size_t)u->set.channels + ch];
    u->rep->rows_full += n;
done:
    ipt_free(t_emb);
    return status;
}

/* Guided prediction of one evaluation: rows of all worlds, blended, guided. */
static ipt_status evaluate(run *u, const float *x, double t, int32_t step, float *scratch,
                           float *eps)
{
    size_t n = 0, n_row = 0, pair = u->set.two_rows ? 2 : 1;
    const ipt_world *world = ipt_policy_step(u->policy, step, &n);
    row rows[2 * IPT_MAX_SLOT];
    const float *pu[IPT_MAX_SLOT], *pc[IPT_MAX_SLOT];
    for (size_t k = 0; k < n; k++) {
        size_t text = 0;
        IPT_TRY(text_of(u, &world[k], &text));
        for (size_t which = 0; which < pair; which++) { /* the unconditional row first */
            size_t negative = pair == 2 && which == 0;
            rows[n_row] = (row){&u->text[text][negative], &world[k], scratch + n_row * u->set.n};
            *(negative ? &pu[k] : &pc[k]) = rows[n_row].eps;
            n_row++;
        }
    }
    for (size_t at = 0; at < n_row; at += (size_t)u->batch) {
        size_t take = n_row - at < (size_t)u->batch ? n_row - at : (size_t)u->batch;
        IPT_TRY(evaluate_batch(u, x, t, step, rows + at, take));
    }
    float *eps_u = scratch + n_row * u->set.n;
    ipt_policy_blend(u->policy, u->set.two_rows ? pu : NULL, pc, n, eps_u, eps);
    if (u->set.two_rows)
        ipt_cfg(eps_u, eps, u->set.n, u->set.cfg, u->r->cfg_rescale, eps);
    for (size_t i = 0; i < u->set.n; i++)
        if (!isfinite(eps[i]))
            return ipt_fail(u->e->ctx, IPT_ERR_FORMAT,
                            "the unet's prediction at step %d is not finite: broken weights, an "
                            "adapter that is too strong, "
                            "or f16 overflow (try --precision f32)",
                            step + 1);
    return IPT_OK;
}

/* --- one picture ------------------------------------------------------------------------------ */
typedef struct buffers {
    float *x, *in, *eps, *noise, *fresh, *scratch, *keep;
} buffers;

static ipt_status trace_latent(run *u, ipt_trace *t, const char *what, int32_t i, const float *v)
{
    char name[64];
    const int64_t dim[4] = {1, u->set.channels, u->set.h, u->set.w};
    if (i >= 0)
        ipt_name(name, sizeof name, "%s%d", what, i);
    else
        ipt_name(name, sizeof name, "%s", what);
    return ipt_trace_f32(t, name, v, dim, 4);
}

static ipt_status sample_loop(run *u, ipt_sampler *s, const buffers *b, ipt_noise *source,
                              ipt_trace *trace, int32_t image)
{
    int32_t n = ipt_sampler_n_evals(s);
    for (int32_t i = 0; i < n; i++) {
        double t0 = ipt_now_ms();
        if (ipt_cancelled(u->e->ctx))
            return ipt_fail(u->e->ctx, IPT_ERR_CANCELLED, "cancelled");
        progress(u, "sample", i, n, image);
        ipt_sampler_scale_input(s, i, b->x, b->in);
        IPT_TRY(evaluate(u, b->in, ipt_sampler_timestep(s, i),
                         u->set.skip + ipt_sampler_step_of(s, i), b->scratch, b->eps));
        bool fresh = ipt_sampler_needs_noise(s, i);
        if (fresh)
            ipt_noise_draw(source, b->fresh, u->set.n);
        IPT_TRY(trace_latent(u, trace, "eps_step", i, b->eps));
        IPT_TRY(ipt_sampler_step(s, i, b->eps, b->x, fresh ? b->fresh : NULL));
        if (u->start.mask && !u->start.mask_channels)
            ipt_start_keep(&u->start, s, i + 1, &u->set, b->noise, b->keep, b->x);
        IPT_TRY(trace_latent(u, trace, "latent_step", i, b->x));
        double ms = ipt_now_ms() - t0;
        if (u->done_eval == 0)
            u->rep->ms_first_step = ms;
        u->done_eval++;
        u->step_ms = u->done_eval <= 2
                         ? ms
                         : 0.7 * u->step_ms + 0.3 * ms; /* the first one compiles shaders */
    }
    progress(u, "sample", n, n, image);
    return IPT_OK;
}

static ipt_status trace_text(run *u, ipt_trace *t)
{
    static const char *const ids_name[2][2] = {{"ids", "ids_negative"},
                                               {"ids_2", "ids_2_negative"}};
    const ipt_encoded *e = u->text[0];
    for (int which = 0; t && which < 2; which++) {
        const int64_t text[3] = {1, e[which].tokens, e[which].width},
                      pooled[2] = {1, e[which].pooled_width}, six[2] = {1, 6};
        const float ids[6] = {(float)u->set.height, (float)u->set.width, 0, 0,
                              (float)u->set.height, (float)u->set.width};
        for (int k = 0; k < 2 && e[which].ids[k]; k++)
            IPT_TRY(ipt_trace_i32(t, ids_name[k][which], e[which].ids[k], e[which].tokens));
        IPT_TRY(ipt_trace_f32(t, which ? "text_negative" : "text", e[which].text, text, 3));
        if (e[which].pooled_width > 0) {
            IPT_TRY(
                ipt_trace_f32(t, which ? "pooled_negative" : "pooled", e[which].pooled, pooled, 2));
            if (which == 0)
                IPT_TRY(ipt_trace_f32(t, "time_ids", ids, six, 2));
        }
    }
    return IPT_OK;
}

static ipt_status trace_times(run *u, const ipt_sampler *s, ipt_trace *t)
{
    int64_t n = ipt_sampler_n_evals(s);
    float *v = t ? ipt_arena_alloc(&u->arena, (size_t)n * sizeof *v) : NULL;
    if (t && !v)
        return IPT_ERR_NOMEM;
    for (int32_t i = 0; t && i < n; i++)
        v[i] = (float)ipt_sampler_timestep(s, i);
    return ipt_trace_f32(t, "timesteps", v, &n, 1);
}

static ipt_status make_picture(run *u, const buffers *b, int32_t k, ipt_trace *trace, float *rgb)
{
    ipt_sampler *s = NULL;
    ipt_sampler_request q = {&u->set.config, u->set.kind, u->set.schedule,
                             u->set.steps,   u->set.skip, u->set.n};
    ipt_noise source;
    ipt_status status = IPT_OK;
    double t0 = 0;
    ipt_noise_seed(&source, u->r->seed + (uint64_t)k, u->set.philox);
    IPT_TRY(ipt_sampler_create(u->e->ctx, &q, &s));
    u->n_eval = ipt_sampler_n_evals(s);
    u->rep->n_eval = u->n_eval;
    ipt_start_draw(&u->start, u->e, s, &u->set, &source, b->fresh, b->noise, b->x);
    IPT_TRY_GOTO(trace_times(u, s, trace), done);
    IPT_TRY_GOTO(trace_latent(u, trace, "noise", -1, b->noise), done);
    IPT_TRY_GOTO(trace_latent(u, trace, "latent_start", -1, b->x), done);
    t0 = ipt_now_ms();
    IPT_TRY_GOTO(sample_loop(u, s, b, &source, trace, k), done);
    u->rep->ms_sample += ipt_now_ms() - t0;
    t0 = ipt_now_ms();
    progress(u, "vae", 0, 1, k);
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

static ipt_status emit_picture(run *u, const float *rgb, int32_t k, ipt_image_fn image, void *user)
{
    size_t n = (size_t)u->set.width * (size_t)u->set.height * 3;
    ipt_image im = {u->set.width, u->set.height, ipt_alloc(u->e->ctx, n)};
    uint64_t seed = u->r->seed + (uint64_t)k;
    if (!im.rgb)
        return IPT_ERR_NOMEM;
    for (size_t i = 0; i < n; i++)
        im.rgb[i] = (uint8_t)lrintf(rgb[i] * 255.0F);
    ipt_paste_apply(&u->paste, n / 3, im.rgb);
    if (k == 0) {
        if (!ipt_hashes_ready(u->e->hashes))
            progress(u, "hash", 0, 1, 0);
        ipt_status hashed = ipt_infotext_hashes(u->e, u->r, u->rep, u->adapter);
        if (hashed != IPT_OK) {
            ipt_image_finish(&im);
            return hashed;
        }
    }
    u->rep->ms_total = ipt_now_ms() - u->t_start;
    char *text = ipt_infotext(u->e, u->r, u->rep, seed, &u->e->report_arena);
    char *json = ipt_request_json(u->e, u->r, u->rep, seed, &u->e->report_arena);
    ipt_status status = text && json ? IPT_OK : IPT_ERR_NOMEM;
    if (k == 0)
        u->rep->infotext = text;
    if (status == IPT_OK && image)
        status = image(user, k, &im, text, json);
    ipt_image_finish(&im);
    return status;
}

/* --- report ----------------------------------------------------------------------------------- */
static ipt_status fill_report(run *u)
{
    ipt_engine *e = u->e;
    ipt_report *rep = u->rep;
    static const char *const arch[] = {"unknown", "sd1", "sd2", "sdxl"};
    rep->model = ipt_model_path(e->model);
    rep->model_arch = arch[e->config.arch];
    rep->sampler = ipt_sampler_name(u->set.kind);
    rep->schedule = ipt_schedule_name(u->set.schedule);
    rep->schedule_label = ipt_schedule_label(u->set.schedule, &u->set.config);
    rep->rng = u->set.philox ? "philox" : "torch-cpu";
    rep->compose = u->r->compose ? u->r->compose : "merge";
    rep->device = ipt_engine_device_name(e);
    rep->precision = e->weight_type == IPT_F32 ? "f32"
                     : e->act_type == IPT_F16  ? "f16"
                                               : "f16 weights, f32 activations";
    rep->width = u->set.width;
    rep->height = u->set.height;
    rep->steps = u->set.steps;
    rep->mask_blur = u->paste.original ? (double)ipt_paste_sigma(&u->set) : 0;
    rep->seed = u->r->seed;
    rep->n_adapter = e->n_file;
    ipt_adapter_report *a = ipt_arena_alloc(&e->report_arena, (e->n_file + 1) * sizeof *a);
    if (!a)
        return IPT_ERR_NOMEM;
    for (size_t i = 0; i < e->n_file; i++) {
        const ipt_adapter_file *f = e->file[i];
        a[i] = (ipt_adapter_report){.file = f->path,
                                    .name = f->name,
                                    .family = ipt_adapter_family_name(f->family),
                                    .algo = f->has_conv ? "locon" : "lora",
                                    .rank_min = f->rank_min,
                                    .rank_max = f->rank_max,
                                    .modules = f->n_module,
                                    .matched = f->n_module,
                                    .n_unmatched = f->n_unmatched,
                                    .unmatched = f->unmatched};
    }
    rep->adapter = u->adapter = a;
    return IPT_OK;
}

static ipt_status alloc_buffers(run *u, size_t worlds, buffers *b)
{
    size_t bytes = u->set.n * sizeof(float);
    float **one[] = {&b->x, &b->in, &b->eps, &b->noise, &b->fresh, &b->keep};
    for (size_t i = 0; i < IPT_COUNT(one); i++)
        if (!(*one[i] = ipt_arena_alloc(&u->arena, bytes)))
            return IPT_ERR_NOMEM;
    b->scratch = ipt_arena_alloc(&u->arena, (2 * worlds + 1) * bytes);
    return b->scratch ? IPT_OK : IPT_ERR_NOMEM;
}

static ipt_status run_request(run *u, ipt_image_fn image, void *user)
{
    ipt_engine *e = u->e;
    buffers b = {0};
    ipt_prompt *tags = NULL;
    ipt_trace *trace = NULL;
    size_t worlds = 1;
    float *rgb = NULL;
    double t0 = 0;
    ipt_status status = IPT_OK;
    progress(u, "load", 0, 1, 0);
    IPT_TRY_GOTO(ipt_engine_load(e, u->r, NULL, SIZE_MAX), done);
    IPT_TRY_GOTO(ipt_settings_choose(u->e, u->r, &u->arena, &u->set), done);
    IPT_TRY_GOTO(read_tags(u, &tags), done);
    IPT_TRY_GOTO(ipt_engine_load(e, u->r, tags->loras, tags->n_lora), done);
    IPT_TRY_GOTO(ipt_infotext_begin(e, u->r), done);
    IPT_TRY_GOTO(make_policy(u, tags), done);
    u->rep->ms_load = ipt_now_ms() - u->t_start;
    IPT_TRY_GOTO(encode_all(u, &worlds), done);
    t0 = ipt_now_ms();
    IPT_TRY_GOTO(unet_plan(u, worlds * (u->set.two_rows ? 2 : 1)), done);
    if (u->r->init)
        progress(u, "encode", 0, 1, 0);
    IPT_TRY_GOTO(ipt_start_prepare(e, u->r, &u->set, &u->arena, &u->start), done);
    IPT_TRY_GOTO(ipt_paste_prepare(e, u->r, &u->set, u->start.repaint, &u->arena, &u->paste), done);
    u->rep->ms_load += ipt_now_ms() - t0;
    IPT_TRY_GOTO(fill_report(u), done);
    IPT_TRY_GOTO(alloc_buffers(u, worlds, &b), done);
    rgb = ipt_calloc(e->ctx, (size_t)u->set.width * (size_t)u->set.height * 3, sizeof *rgb);
    status = rgb ? IPT_OK : IPT_ERR_NOMEM;
    if (status == IPT_OK && u->r->trace)
        status = ipt_trace_create(e->ctx, &trace);
    if (status == IPT_OK)
        status = trace_text(u, trace);
    for (int32_t k = 0; k < u->set.count && status == IPT_OK; k++) {
        status = make_picture(u, &b, k, k == 0 ? trace : NULL, rgb);
        if (status == IPT_OK && k == 0 && trace)
            status = ipt_trace_write(trace, u->r->trace);
        if (status == IPT_OK)
            status = emit_picture(u, rgb, k, image, user);
        u->rep->n_image += status == IPT_OK;
    }
done:
    ipt_free(rgb);
    ipt_trace_destroy(&trace);
    ipt_prompt_destroy(&tags);
    return status;
}

ipt_status ipt_generate(ipt_engine *e, const ipt_request *r, ipt_image_fn image, void *user,
                        ipt_report *report)
{
    run *u = ipt_alloc(e->ctx, sizeof *u);
    ipt_report local;
    if (!u)
        return IPT_ERR_NOMEM;
    memset(&local, 0, sizeof local);
    u->e = e;
    u->r = r;
    u->rep = &local;
    u->t_start = ipt_now_ms();
    e->n_plans = e->bytes_uploaded = 0;
    ipt_arena_finish(&e->report_arena);
    ipt_arena_init(&u->arena, e->ctx);
    ipt_status status = run_request(u, image, user);
    if (e->gpu) {
        local.peak_device_bytes = ipt_gpu_peak_bytes(e->gpu);
        local.ms_per_step = u->done_eval > 0 ? local.ms_sample / u->done_eval : 0;
    }
    local.peak_host_bytes = ipt_peak_host_bytes();
    local.ms_total = ipt_now_ms() - u->t_start;
    local.n_plans_recorded = e->n_plans;
    local.bytes_uploaded = e->bytes_uploaded;
    if (report)
        *report = local;
    ipt_policy_destroy(&u->policy);
    ipt_prompts_finish(&u->prompts);
    ipt_arena_finish(&u->arena);
    ipt_free(u);
    if (status == IPT_ERR_DEVICE_LOST) /* the next request opens the device anew */
        ipt_engine_drop_device(e);
    return status;
}
