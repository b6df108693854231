/* engine/plans.c - recorded plans, kept between requests: the one place that records them. */
#include "engine/internal.h"

#include "vae/vae.h"

#include <string.h>

static int comp_of(ipt_plan_kind kind)
{
    static const int comp[IPT_PLAN_KINDS + 1] = {IPT_COMP_UNET, IPT_COMP_UNET,  IPT_COMP_UNET,
                                                 IPT_COMP_TEXT, IPT_COMP_TEXT2, IPT_COMP_VAE,
                                                 IPT_COMP_VAE,  IPT_COMP_VAE};
    return comp[kind];
}

/* Adapters have no part in the VAE's plans, nor in the UNet's when they are in its weights. */
static const ipt_bank *bank_of(const ipt_engine *e, ipt_plan_kind kind)
{
    return comp_of(kind) == IPT_COMP_VAE    ? NULL
           : comp_of(kind) == IPT_COMP_UNET ? ipt_unet_bank(e)
                                            : ipt_engine_bank(e);
}

/* --- keys ------------------------------------------------------------------------------------- */
static bool same_shape(const ipt_plan_key *a, const ipt_plan_key *b)
{
    switch (a->kind) {
    case IPT_PLAN_UNET:
    case IPT_PLAN_SHALLOW:
    case IPT_PLAN_MAPS:
        return a->unet.deep == b->unet.deep && a->unet.tap == b->unet.tap &&
               a->unet.n_text == b->unet.n_text && a->unet.is_placed == b->unet.is_placed &&
               a->unet.batch == b->unet.batch && a->unet.h == b->unet.h && a->unet.w == b->unet.w &&
               a->unet.tokens == b->unet.tokens && a->unet.act == b->unet.act;
    case IPT_PLAN_TEXT:
    case IPT_PLAN_TEXT2:
        return a->text.batch == b->text.batch && a->text.tokens == b->text.tokens &&
               a->text.skip == b->text.skip && a->text.final_norm == b->text.final_norm &&
               a->text.pooled == b->text.pooled && a->text.injected == b->text.injected &&
               a->text.act == b->text.act;
    case IPT_PLAN_DECODE:
    case IPT_PLAN_ENCODE:
        return a->vae.h == b->vae.h && a->vae.w == b->vae.w && a->vae.act == b->vae.act &&
               a->vae.tiny == b->vae.tiny;
    case IPT_PLAN_KINDS:
        break;
    }
    return false;
}

static bool is_for(const ipt_engine *e, const ipt_kept_plan *k, const ipt_plan_key *key)
{
    return k->plan && k->key.kind == key->kind && k->key.model == key->model &&
           same_shape(&k->key, key) &&
           ipt_bank_same_layout(k->set ? k->set->bank : NULL, bank_of(e, key->kind),
                                comp_of(key->kind));
}

ipt_kept_plan *ipt_plan_find(ipt_engine *e, const ipt_plan_key *key, int32_t asked)
{
    for (int i = 0; i < IPT_KEEP_PLANS; i++) {
        ipt_kept_plan *k = &e->plan[key->kind][i];
        ipt_plan_key fitted = *key;
        if (is_for(e, k, key))
            return k;
        if (key->kind != IPT_PLAN_UNET || asked == 0 || k->asked != asked)
            continue;
        fitted.unet.batch = k->key.unet.batch;
        if (is_for(e, k, &fitted))
            return k;
    }
    return NULL;
}

/* --- recording -------------------------------------------------------------------------------- */
static ipt_status build(ipt_engine *e, const ipt_plan_key *key, ipt_graph *g)
{
    const ipt_model_config *c = &e->m->config;
    size_t n_site = 0;
    const ipt_bank *bank = bank_of(e, key->kind);
    const ipt_adapter_site *site = ipt_bank_sites(bank, comp_of(key->kind), &n_site);
    bool unet = comp_of(key->kind) == IPT_COMP_UNET;
    if (bank)
        ipt_graph_adapters(g, site, n_site, unet ? IPT_GATE_ROWS : 1, unet ? key->unet.batch : 1,
                           (int)ipt_bank_n_slot(bank));
    switch (key->kind) {
    case IPT_PLAN_UNET:
    case IPT_PLAN_SHALLOW:
    case IPT_PLAN_MAPS:
        ipt_unet_build(g, &c->unet, &key->unet);
        break;
    case IPT_PLAN_TEXT:
        ipt_text_build(g, &c->text, &key->text);
        break;
    case IPT_PLAN_TEXT2:
        ipt_text_build(g, &c->text2, &key->text);
        break;
    case IPT_PLAN_DECODE:
        if (key->vae.tiny)
            ipt_vae_tiny_build(g, 1, key->vae.h, key->vae.w, "decoder.layers.", 0, key->vae.act);
        else
            ipt_vae_decode_build(g, &c->vae, 1, key->vae.h, key->vae.w, key->vae.act);
        break;
    case IPT_PLAN_ENCODE: {
        int32_t f = ipt_vae_factor(&c->vae);
        ipt_vae_encode_build(g, &c->vae, 1, key->vae.h * f, key->vae.w * f, key->vae.act);
        break;
    }
    case IPT_PLAN_KINDS:
        break;
    }
    return ipt_graph_status(g);
}

/* How a plan is made: recorded, only looked at, or with weights that come in while it runs. */
typedef enum { PLAN_WHOLE, PLAN_DRY, PLAN_STREAMED } plan_form;

static ipt_status record(ipt_engine *e, const ipt_plan_key *key, plan_form form, ipt_plan **out)
{
    ipt_graph *g = NULL;
    ipt_weights *store = e->taesd_store;
    if (!e->taesd || key->model != e->taesd_id)
        IPT_TRY(ipt_engine_store(e, comp_of(key->kind), &store));
    IPT_TRY(ipt_graph_create(e->ctx, &g));
    ipt_status status = build(e, key, g);
    const ipt_plan_opts o = {.gpu = e->gpu,
                             .weights = store,
                             .dry = form == PLAN_DRY,
                             .stream = form == PLAN_STREAMED ||
                                       (form == PLAN_DRY && e->opts.vram_limit > 0)};
    if (status == IPT_OK)
        status = ipt_plan_create(g, &o, out);
    ipt_graph_destroy(&g);
    return status;
}

ipt_status ipt_plan_dry(ipt_engine *e, const ipt_plan_key *key)
{
    ipt_plan *none = NULL;
    ipt_status status = record(e, key, PLAN_DRY, &none);
    ipt_plan_destroy(&none);
    return status;
}

/* --- keeping ---------------------------------------------------------------------------------- */
static void drop(ipt_kept_plan *k)
{
    ipt_plan_destroy(&k->plan);
    ipt_adapter_set_release(&k->set);
    memset(k, 0, sizeof *k);
}

void ipt_plans_drop(ipt_engine *e, uint32_t model)
{
    for (int kind = 0; kind < IPT_PLAN_KINDS; kind++)
        for (int i = 0; i < IPT_KEEP_PLANS; i++)
            if (model == 0 || e->plan[kind][i].key.model == model)
                drop(&e->plan[kind][i]);
}

/* The plan that was used longest ago, of a kind or (IPT_PLAN_KINDS) of any; NULL: all are in use.
 */
static ipt_kept_plan *oldest(ipt_engine *e, ipt_plan_kind kind)
{
    ipt_kept_plan *found = NULL;
    for (int k = 0; k < IPT_PLAN_KINDS; k++)
        for (int i = 0; i < IPT_KEEP_PLANS; i++) {
            ipt_kept_plan *p = &e->plan[k][i];
            if ((kind == IPT_PLAN_KINDS || (int)kind == k) && p->plan && p->used != e->request &&
                (!found || p->used < found->used))
                found = p;
        }
    return found;
}

/* A free place among those of the kind. */
static ipt_kept_plan *free_place(ipt_engine *e, ipt_plan_kind kind)
{
    ipt_kept_plan *old = NULL;
    while (ipt_engine_is_crowded(e, 2) && (old = oldest(e, IPT_PLAN_KINDS)))
        drop(old);
    for (int i = 0; i < IPT_KEEP_PLANS; i++)
        if (!e->plan[kind][i].plan)
            return &e->plan[kind][i];
    old = oldest(e, kind);
    if (!old) { /* one request in more sizes than are kept: tiles of a decoder */
        old = &e->plan[kind][0];
        for (int i = 1; i < IPT_KEEP_PLANS; i++)
            if (e->plan[kind][i].asked == 0 && old->asked != 0)
                old = &e->plan[kind][i];
    }
    drop(old);
    return old;
}

/* The factors of this request's adapters into a plan that has others, or none yet. */
static ipt_status write_factors(ipt_engine *e, ipt_kept_plan *k)
{
    const ipt_bank *bank = bank_of(e, k->key.kind);
    if (!bank || k->set == e->set)
        return IPT_OK;
    ipt_adapter_set_release(&k->set);
    ipt_status status = ipt_bank_write(bank, comp_of(k->key.kind), k->plan, &e->bytes_uploaded);
    if (status != IPT_OK) {
        drop(k);
        return status;
    }
    k->set = e->set;
    k->set->refs++;
    return IPT_OK;
}

/* --- when memory is short --------------------------------------------------------------------- */
/* What earlier requests left; false: nothing was there. */
static bool drop_older(ipt_engine *e)
{
    ipt_kept_plan *old = NULL;
    bool dropped = false;
    for (; (old = oldest(e, IPT_PLAN_KINDS)); dropped = true)
        drop(old);
    while (ipt_loaded_drop_one(e))
        dropped = true;
    return dropped;
}

static bool has_plans(const ipt_engine *e, uint32_t model, int comp)
{
    for (int kind = 0; kind < IPT_PLAN_KINDS; kind++)
        for (int i = 0; i < IPT_KEEP_PLANS; i++) {
            const ipt_kept_plan *k = &e->plan[kind][i];
            if (k->plan && k->key.model == model && comp_of((ipt_plan_kind)kind) == comp)
                return true;
        }
    return false;
}

/* Text encoders, UNet and VAE work one after the other. */
void ipt_plans_drop_idle(ipt_engine *e)
{
    for (int kind = 0; kind < IPT_PLAN_KINDS; kind++)
        for (int i = 0; i < IPT_KEEP_PLANS; i++)
            if (!(e->holds_unet && comp_of((ipt_plan_kind)kind) == IPT_COMP_UNET))
                drop(&e->plan[kind][i]);
    for (int c = 0; c < IPT_COMP_COUNT; c++)
        if (!has_plans(e, e->m->id, c))
            ipt_loaded_drop_store(e, c);
}

/* A plan that did not fit beside all that there is. */
static ipt_status record_tight(ipt_engine *e, const ipt_plan_key *key, plan_form form,
                               ipt_status status, ipt_plan **out)
{
    if (drop_older(e))
        status = record(e, key, form, out);
    if (status != IPT_ERR_DEVICE_MEM || e->opts.vram_limit == 0)
        return status;
    ipt_plans_drop_idle(e);
    status = record(e, key, form, out);
    if (status != IPT_ERR_DEVICE_MEM || comp_of(key->kind) == IPT_COMP_UNET)
        return status;      /* its rows are cut into smaller batches first: fit.c */
    ipt_plans_drop_idle(e); /* what the failure has loaded of it */
    return record(e, key, PLAN_STREAMED, out);
}

ipt_status ipt_plan_get(ipt_engine *e, const ipt_plan_key *key, int32_t asked, ipt_plan **out)
{
    ipt_kept_plan *k = ipt_plan_find(e, key, asked);
    if (!k) {
        ipt_plan *plan = NULL;
        const bool is_tight = e->is_tight && comp_of(key->kind) == IPT_COMP_UNET;
        const plan_form form = is_tight ? PLAN_STREAMED : PLAN_WHOLE;
        k = free_place(e, key->kind);
        ipt_status status = record(e, key, form, &plan);
        if (ipt_too_large(status))
            status = record_tight(e, key, form, status, &plan);
        IPT_TRY(status);
        *k = (ipt_kept_plan){.key = *key, .asked = asked, .plan = plan};
        e->n_plans++;
    }
    k->used = e->request;
    IPT_TRY(write_factors(e, k));
    if (comp_of(key->kind) != IPT_COMP_UNET) /* those of the UNet are settled when all are there */
        IPT_TRY(ipt_plans_settle(e, comp_of(key->kind)));
    *out = k->plan;
    return IPT_OK;
}

/* What a plan takes, before it runs for the first time. */
static void say_memory(const ipt_engine *e, const ipt_kept_plan *k)
{
    const double mib = 1024.0 * 1024.0;
    const ipt_plan_memory m = ipt_plan_get_memory(k->plan);
    const char *name = ipt_comp_name(comp_of(k->key.kind));
    if (m.streamed == 0)
        ipt_log(e->ctx, IPT_LOG_INFO, "%s: weights %.1f MiB, working memory %.1f MiB", name,
                (double)m.weights / mib, (double)m.working / mib);
    else
        ipt_log(e->ctx, IPT_LOG_INFO,
                "%s: weights %.1f MiB, of which %.1f MiB stay on the device and %.1f MiB come in "
                "anew in every run, in %u blocks by way of %.1f MiB; working memory %.1f MiB",
                name, (double)m.weights / mib, (double)(m.weights - m.streamed) / mib,
                (double)m.streamed / mib, m.n_block, (double)m.ring / mib, (double)m.working / mib);
}

ipt_status ipt_plans_settle(ipt_engine *e, int comp)
{
    for (int kind = 0; kind < IPT_PLAN_KINDS; kind++)
        for (int i = 0; i < IPT_KEEP_PLANS; i++) {
            ipt_kept_plan *k = &e->plan[kind][i];
            if (!k->plan || k->used != e->request || comp_of((ipt_plan_kind)kind) != comp ||
                k->is_settled)
                continue;
            IPT_TRY(ipt_plan_settle(k->plan));
            k->is_settled = true;
            say_memory(e, k);
        }
    return IPT_OK;
}

const ipt_plan_key *ipt_plan_latest(const ipt_engine *e, ipt_plan_kind kind)
{
    const ipt_kept_plan *found = NULL;
    for (int i = 0; i < IPT_KEEP_PLANS; i++) {
        const ipt_kept_plan *k = &e->plan[kind][i];
        if (k->plan && (!found || k->used > found->used))
            found = k;
    }
    return found ? &found->key : NULL;
}
