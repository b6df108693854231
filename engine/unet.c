/* engine/unet.c - the UNet of a request: its plan, and rows through it.  Latents are [C,h,w] on the
 * host (the order in which the reference draws noise); the UNet's inputs are channels last. */
#include "engine/run.h"

#include <string.h>

/* Texts that cross-attention looks at for one row. */
static size_t texts_of(const ipt_run *u)
{
    return u->regions.n_text > 1 ? (size_t)u->regions.n_text : 1;
}

/* --- plans ------------------------------------------------------------------------------------ */
static void drop_plans(ipt_run *u)
{
    u->unet = u->cache.shallow = u->maps.plan = NULL;
    ipt_cache_finish(u);
    u->e->holds_unet = false;
    ipt_plans_drop_idle(u->e);
}

/* Everything that an evaluation runs on; what is left of the device's memory goes to weights then.
 */
static ipt_status get_plans(ipt_run *u)
{
    ipt_engine *e = u->e;
    ipt_unet_key key = u->key;
    e->holds_unet = true;
    IPT_TRY(ipt_unet_plan(e, &key, &u->unet));
    if (e->is_folded && ipt_plan_is_streamed(u->unet)) {
        ipt_fold_refuse(u);
        drop_plans(u);
        e->holds_unet = true;
        key = u->key;
        IPT_TRY(ipt_unet_plan(e, &key, &u->unet));
    }
    u->batch = key.batch;
    IPT_TRY(ipt_fold_apply(u));
    IPT_TRY(ipt_cache_prepare(u, &key));
    IPT_TRY(ipt_maps_plan(u));
    IPT_TRY(ipt_preview_plan(u));
    IPT_TRY(ipt_plans_settle(e, IPT_COMP_UNET));
    for (size_t i = 0; i < IPT_COUNT(u->regions.seen); i++)
        u->regions.seen[i].is_valid = false;
    IPT_TRY(ipt_regions_write(u, u->unet));
    return ipt_regions_write(u, u->cache.shallow);
}

void ipt_unet_rest(ipt_run *u)
{
    if (u->e->opts.vram_limit > 0)
        u->e->holds_unet = false;
}

ipt_status ipt_unet_wake(ipt_run *u)
{
    ipt_engine *e = u->e;
    if (e->holds_unet)
        return IPT_OK;
    u->unet = NULL;
    ipt_status status = get_plans(u);
    if (status == IPT_ERR_DEVICE_MEM && e->opts.vram_limit > 0 && u->unet) {
        drop_plans(u); /* the UNet itself left no room for what goes beside it */
        e->is_tight = true;
        status = get_plans(u);
    }
    if (status == IPT_OK) {
        const ipt_plan_memory m = ipt_plan_get_memory(u->unet);
        u->rep->unet_weight_bytes = m.weights;
        u->rep->unet_streamed_bytes = m.streamed;
        u->rep->unet_working_bytes = m.working;
        u->rep->unet_blocks = m.n_block;
    }
    return status;
}

ipt_status ipt_unet_prepare(ipt_run *u)
{
    ipt_engine *e = u->e;
    const ipt_unet_config *c = &e->m->config.unet;
    size_t rows = u->max_rows, chunks = (rows + IPT_MAX_ROWS - 1) / IPT_MAX_ROWS;
    int32_t limit = u->r->batch > 0 ? u->r->batch : (int32_t)((rows + chunks - 1) / chunks);
    u->key = (ipt_unet_key){.batch = limit < (int32_t)rows ? limit : (int32_t)rows,
                            .h = u->set.h,
                            .w = u->set.w,
                            .tokens = u->text[0].enc.tokens,
                            .act = e->m->act_type,
                            .tap = ipt_policy_tap(u->policy) + 1,
                            .n_text = u->regions.n_text > 1 ? u->regions.n_text : 0,
                            .is_placed = u->regions.is_placed};
    u->maps.tap = u->key.tap;
    IPT_TRY(ipt_cache_read(u));
    u->key.deep = u->cache.interval > 1 ? u->cache.deep : 0;
    IPT_TRY(ipt_fold_choose(u));
    IPT_TRY(ipt_maps_prepare(u));
    IPT_TRY(ipt_unet_wake(u));
    size_t replays = (rows + (size_t)u->batch - 1) / (size_t)u->batch;
    double whole = ipt_plan_macs(u->unet), shallow = whole;
    if (u->cache.shallow)
        shallow = ipt_plan_macs(u->cache.shallow);
    u->step_macs =
        (whole + shallow * (u->cache.interval - 1)) / u->cache.interval * (double)replays;
    size_t b = (size_t)(u->key.batch > u->maps.batch ? u->key.batch : u->maps.batch),
           hw = (size_t)u->set.h * (size_t)u->set.w;
    const struct {
        float **at;
        size_t n;
    } in[] = {
        {&u->in_x, hw * (size_t)c->in_channels},
        {&u->in_text, texts_of(u) * (size_t)u->key.tokens * (size_t)c->cross_dim[0]},
        {&u->in_add, (size_t)(c->add_in_dim > 0 ? c->add_in_dim : 1)},
        {&u->in_gates, (texts_of(u) + 1) * IPT_GATE_ROWS * IPT_MAX_SLOT},
        {&u->in_time, (size_t)(c->channels[0] + c->time_cond_dim)},
        {&u->out_eps, u->set.n},
    };
    for (size_t i = 0; i < IPT_COUNT(in); i++)
        if (!(*in[i].at = ipt_arena_alloc(&u->arena, b * in[i].n * sizeof(float))))
            return IPT_ERR_NOMEM;
    return IPT_OK;
}

/* --- rows ------------------------------------------------------------------------------------- */
/* SDXL's added conditions: pooled text, then the embedded sizes (original, crop, target). */
static ipt_status fill_add(ipt_run *u, const ipt_encoded *text, float *add)
{
    const ipt_unet_config *c = &u->e->m->config.unet;
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

/* Channels last, with mask and masked picture for inpainting models. */
static void fill_x(const ipt_run *u, const float *x, float *out)
{
    size_t hw = (size_t)u->set.h * (size_t)u->set.w, c = (size_t)u->set.channels,
           in = (size_t)u->e->m->config.unet.in_channels;
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

/* The inputs of batch element k of b. */
static ipt_status fill_row(ipt_run *u, const float *x, double t, int32_t step, const ipt_row *row,
                           size_t k, size_t b)
{
    const ipt_unet_config *c = &u->e->m->config.unet;
    size_t slots = ipt_bank_n_slot(ipt_unet_bank(u->e)), text = 0,
           hw = (size_t)u->set.h * (size_t)u->set.w, gates = b * slots * IPT_GATE_ROWS;
    float *w_emb = u->in_time + b * (size_t)c->channels[0];
    for (size_t i = 0; i < texts_of(u); i++) {
        const ipt_row seen = ipt_regions_row(u, row, (int32_t)i);
        IPT_TRY(ipt_job_text(u, &seen, &text));
        const ipt_encoded *of = &u->text[text].enc;
        size_t n = (size_t)of->tokens * (size_t)c->cross_dim[0];
        memcpy(u->in_text + (i * b + k) * n, of->text, n * sizeof(float));
        if (slots > 0 && u->regions.is_placed)
            ipt_policy_gates(u->policy, &seen, step, u->in_gates + (i + 1) * gates + k * slots,
                             b * slots);
    }
    IPT_TRY(ipt_job_text(u, row, &text));
    const ipt_encoded *enc = &u->text[text].enc;
    fill_x(u, x, u->in_x + k * hw * (size_t)c->in_channels);
    ipt_timestep_embedding(t, c->channels[0], c->flip_sin_to_cos, (double)c->freq_shift,
                           u->in_time + k * (size_t)c->channels[0]);
    if (c->time_cond_dim > 0)
        ipt_guidance_embedding(u->set.cfg - 1.0, c->time_cond_dim,
                               w_emb + k * (size_t)c->time_cond_dim);
    if (c->text_time)
        IPT_TRY(fill_add(u, enc, u->in_add + k * (size_t)c->add_in_dim));
    if (slots > 0)
        ipt_policy_gates(u->policy, row, step, u->in_gates + k * slots, b * slots);
    return IPT_OK;
}

static size_t text_values(const ipt_run *u, size_t b)
{
    return b * (size_t)u->text[0].enc.tokens * (size_t)u->e->m->config.unet.cross_dim[0];
}

static size_t gate_values(const ipt_run *u, size_t b)
{
    return b * IPT_GATE_ROWS * ipt_bank_n_slot(ipt_unet_bank(u->e));
}

/* Whether the plan has keys and values of just these texts under these gates. */
static bool is_seen(const ipt_run *u, const ipt_seen *s, size_t b)
{
    const size_t text = texts_of(u) * text_values(u, b), gates = gate_values(u, b);
    return s->is_valid && memcmp(s->text, u->in_text, text * sizeof(float)) == 0 &&
           memcmp(s->gates, u->in_gates + gates, texts_of(u) * gates * sizeof(float)) == 0;
}

/* Segment 0 of a plan with several texts, and what it has been run with. */
static ipt_status see_texts(ipt_run *u, ipt_plan *plan, ipt_seen *s, size_t b)
{
    const size_t text = texts_of(u) * text_values(u, b), gates = gate_values(u, b);
    s->is_valid = false;
    IPT_TRY(ipt_plan_run(plan, 0));
    if (!s->text)
        s->text = ipt_arena_alloc(&u->arena, text * sizeof *s->text);
    if (!s->gates)
        s->gates = ipt_arena_alloc(&u->arena, (texts_of(u) * gates + 1) * sizeof *s->gates);
    if (!s->text || !s->gates)
        return IPT_ERR_NOMEM;
    memcpy(s->text, u->in_text, text * sizeof *s->text);
    memcpy(s->gates, u->in_gates + gates, texts_of(u) * gates * sizeof *s->gates);
    s->is_valid = true;
    return IPT_OK;
}

/* The regions' texts, and the gates under which each is seen. */
static ipt_status write_regions(ipt_run *u, ipt_plan *plan, size_t b)
{
    const size_t text = text_values(u, b), gates = gate_values(u, b);
    ipt_seen *seen = &u->regions.seen[plan == u->cache.shallow];
    char name[32];
    if (texts_of(u) > 1 && is_seen(u, seen, b))
        return IPT_OK;
    for (size_t i = 0; i < texts_of(u); i++) {
        ipt_name(name, sizeof name, "text%zu", i);
        if (i > 0)
            IPT_TRY(ipt_plan_write(plan, name, u->in_text + i * text, text * sizeof(float)));
        ipt_name(name, sizeof name, "gates_%zu", i);
        if (u->regions.is_placed && gates > 0 && ipt_plan_has(plan, name))
            IPT_TRY(
                ipt_plan_write(plan, name, u->in_gates + (i + 1) * gates, gates * sizeof(float)));
    }
    return texts_of(u) > 1 ? see_texts(u, plan, seen, b) : IPT_OK;
}

static ipt_status write_inputs(ipt_run *u, ipt_plan *plan, size_t b)
{
    const ipt_unet_config *c = &u->e->m->config.unet;
    size_t hw = (size_t)u->set.h * (size_t)u->set.w;
    const struct {
        const char *name;
        const float *v;
        size_t n;
        bool has;
    } in[] = {
        {"x", u->in_x, hw * (size_t)c->in_channels, true},
        {"t_emb", u->in_time, (size_t)c->channels[0], true},
        {"text", u->in_text, (size_t)u->text[0].enc.tokens * (size_t)c->cross_dim[0], true},
        {"add", u->in_add, (size_t)c->add_in_dim, c->text_time},
        {"w_emb", u->in_time + b * (size_t)c->channels[0], (size_t)c->time_cond_dim,
         c->time_cond_dim > 0},
        {"gates", u->in_gates, IPT_GATE_ROWS * ipt_bank_n_slot(ipt_unet_bank(u->e)),
         ipt_bank_has(ipt_unet_bank(u->e), IPT_COMP_UNET) && ipt_plan_has(plan, "gates")},
    };
    for (size_t i = 0; i < IPT_COUNT(in); i++)
        if (in[i].has)
            IPT_TRY(ipt_plan_write(plan, in[i].name, in[i].v, b * in[i].n * sizeof(float)));
    return write_regions(u, plan, b);
}

ipt_status ipt_unet_inputs(ipt_run *u, ipt_plan *plan, const float *x, double t, int32_t step,
                           const ipt_row *row, size_t n, size_t b)
{
    for (size_t k = 0; k < b; k++)
        IPT_TRY(fill_row(u, x, t, step, &row[k < n ? k : n - 1], k, b));
    return write_inputs(u, plan, b);
}

static ipt_status read_maps(ipt_run *u, const ipt_row *row, size_t n, float *const *maps)
{
    size_t b = (size_t)u->batch;
    bool is_wanted = false;
    for (size_t k = 0; k < n; k++)
        is_wanted = is_wanted || (row[k].want & IPT_WANT_MAPS);
    if (!is_wanted)
        return IPT_OK;
    IPT_TRY(ipt_plan_read(u->unet, "maps", u->out_maps, b * u->maps.n * sizeof(float)));
    for (size_t k = 0; k < n; k++)
        if (row[k].want & IPT_WANT_MAPS)
            memcpy(maps[k], u->out_maps + k * u->maps.n, u->maps.n * sizeof(float));
    return IPT_OK;
}

ipt_status ipt_unet_rows(ipt_run *u, const float *x, double t, int32_t step, const ipt_row *row,
                         size_t n, float *const *eps, float *const *maps)
{
    size_t b = (size_t)u->batch, hw = (size_t)u->set.h * (size_t)u->set.w,
           channels = (size_t)u->set.channels;
    bool is_shallow = row->variant == IPT_UNET_SHALLOW;
    ipt_plan *plan = is_shallow ? u->cache.shallow : u->unet;
    IPT_TRY(ipt_unet_inputs(u, plan, x, t, step, row, n, b));
    if (is_shallow)
        IPT_TRY(ipt_cache_give(u, row, n));
    IPT_TRY(ipt_plan_run(plan, texts_of(u) > 1)); /* segment 0 is that of the texts */
    if (!is_shallow)
        IPT_TRY(ipt_cache_keep(u, row, n));
    if (!is_shallow)
        IPT_TRY(read_maps(u, row, n, maps));
    IPT_TRY(ipt_plan_read(plan, "eps", u->out_eps, b * u->set.n * sizeof(float)));
    for (size_t k = 0; k < n; k++)
        for (size_t c = 0; c < channels; c++)
            for (size_t i = 0; i < hw; i++)
                eps[k][c * hw + i] = u->out_eps[(k * hw + i) * channels + c];
    *(is_shallow ? &u->rep->rows_shallow : &u->rep->rows_full) += n;
    u->rep->unet_macs += ipt_plan_macs(plan) / (double)b * (double)n;
    return IPT_OK;
}
