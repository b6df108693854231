/* engine/loaded.c - models between requests: opened, checked, kept a few at a time; the tiny VAE of
 * --taesd. */
#include "engine/internal.h"

#include "vae/vae.h"

#include <string.h>

/* --- opening ---------------------------------------------------------------------------------- */
ipt_status ipt_open_tokenizer(ipt_ctx *ctx, const ipt_model *m, int comp, ipt_tokenizer **out)
{
    const char *folder = ipt_model_tokenizer(m, comp);
    char path[IPT_MAX_PATH + 32], model[IPT_MAX_PATH];
    if (folder)
        return ipt_tokenizer_load_folder(ctx, folder, out);
    bool open_clip = comp == IPT_COMP_TEXT2 || ipt_model_get_config(m)->arch == IPT_ARCH_SD2;
    IPT_TRY(ipt_default_model(ctx, model, sizeof model));
    ipt_name(path, sizeof path, "%s/../clip/merges.txt", model);
    if (!ipt_is_file(path))
        ipt_name(path, sizeof path, "%s/models/clip/merges.txt", IPT_SOURCE_ROOT);
    return ipt_tokenizer_load_merges(ctx, path, open_clip ? "!" : NULL, out);
}

/* Every weight the graphs ask for is there with its shape: told before anything is uploaded. */
static ipt_status check_component(ipt_ctx *ctx, ipt_loaded *m, int comp)
{
    ipt_want_list want = {0};
    ipt_check check = {0};
    IPT_TRY(ipt_wants_create(ctx, &m->config, comp, &want));
    ipt_status status = ipt_model_check(m->model, comp, want.want, want.n, &check);
    if (status == IPT_OK) {
        status = ipt_check_status(m->model, comp, &check);
        if (status == IPT_OK && check.n_unclaimed > 0)
            ipt_log(ctx, IPT_LOG_WARN, "%s: %zu tensors are not used (first: %s)",
                    ipt_comp_name(comp), check.n_unclaimed, check.unclaimed[0]);
        ipt_check_finish(&check);
    }
    ipt_wants_finish(&want);
    return status;
}

static ipt_status open_model(ipt_ctx *ctx, ipt_loaded *m, const ipt_request *r, const char *path)
{
    ipt_model_opts o = {.config_dir = r->config_dir};
    IPT_TRY(ipt_model_open(ctx, path, &o, &m->model));
    if (r->vae)
        IPT_TRY(ipt_model_set_vae(m->model, r->vae));
    m->config = *ipt_model_get_config(m->model);
    static const int need[] = {IPT_COMP_UNET, IPT_COMP_TEXT, IPT_COMP_VAE};
    for (size_t i = 0; i < IPT_COUNT(need); i++)
        if (!m->config.has[need[i]])
            return ipt_fail(ctx, IPT_ERR_MISSING, "%s: has no %s%s", path, ipt_comp_name(need[i]),
                            need[i] == IPT_COMP_VAE ? "; give one with --vae" : "");
    if (m->config.arch == IPT_ARCH_SDXL && !m->config.has[IPT_COMP_TEXT2])
        return ipt_fail(ctx, IPT_ERR_MISSING, "%s: has no text_encoder_2", path);
    for (int c = 0; c < IPT_COMP_COUNT; c++)
        if (m->config.has[c])
            IPT_TRY(check_component(ctx, m, c));
    IPT_TRY(ipt_modules_create(ctx, &m->config, &m->modules));
    IPT_TRY(ipt_open_tokenizer(ctx, m->model, IPT_COMP_TEXT, &m->tokenizer[0]));
    if (m->config.has[IPT_COMP_TEXT2])
        IPT_TRY(ipt_open_tokenizer(ctx, m->model, IPT_COMP_TEXT2, &m->tokenizer[1]));
    return IPT_OK;
}

ipt_status ipt_engine_store(ipt_engine *e, int comp, ipt_weights **out)
{
    ipt_loaded *m = e->m;
    if (!m->store[comp]) {
        bool vae = comp == IPT_COMP_VAE && m->config.vae.force_upcast;
        ipt_dtype type = vae && m->weight_type == IPT_F32 ? IPT_F32 : m->weight_type;
        IPT_TRY(ipt_model_weights(m->model, comp, e->gpu, type, NULL, &m->store[comp]));
    }
    *out = m->store[comp];
    return IPT_OK;
}

/* --- keeping ---------------------------------------------------------------------------------- */
static void forget_fold(ipt_loaded *m)
{
    ipt_adapter_set_release(&m->fold.set);
    ipt_free(m->fold.gate);
    m->fold = (ipt_fold){0};
}

void ipt_loaded_drop_store(ipt_engine *e, int comp)
{
    if (comp == IPT_COMP_UNET) /* the next store has the files' weights */
        forget_fold(e->m);
    ipt_weights_destroy(&e->m->store[comp]);
}

void ipt_loaded_drop(ipt_engine *e, ipt_loaded **mp)
{
    ipt_loaded *m = *mp;
    if (!m)
        return;
    ipt_plans_drop(e, m->id);
    if (e->set && e->set->model == m->id)
        ipt_adapter_set_release(&e->set);
    forget_fold(m);
    for (int c = 0; c < IPT_COMP_COUNT; c++)
        ipt_weights_destroy(&m->store[c]);
    for (int i = 0; i < 2; i++)
        ipt_tokenizer_destroy(&m->tokenizer[i]);
    ipt_modules_finish(&m->modules);
    ipt_model_close(&m->model);
    if (e->m == m)
        e->m = NULL;
    ipt_free(m);
    *mp = NULL;
}

bool ipt_loaded_drop_one(ipt_engine *e)
{
    ipt_loaded **oldest = NULL;
    for (int i = 0; i < IPT_KEEP_MODELS; i++)
        if (e->model[i] && e->model[i]->used != e->request &&
            (!oldest || e->model[i]->used < (*oldest)->used))
            oldest = &e->model[i];
    if (oldest)
        ipt_loaded_drop(e, oldest);
    return oldest != NULL;
}

/* A free place, after dropping what is too much to keep beside another model. */
static ipt_loaded **free_place(ipt_engine *e)
{
    while (ipt_engine_is_crowded(e, 4) && ipt_loaded_drop_one(e))
        ;
    for (int round = 0; round < 2; round++) {
        for (int i = 0; i < IPT_KEEP_MODELS; i++)
            if (!e->model[i])
                return &e->model[i];
        (void)ipt_loaded_drop_one(e);
    }
    return NULL;
}

/* The kept model of a key; one whose files changed is dropped. */
static ipt_loaded *find_kept(ipt_engine *e, const char *key, const uint64_t stamp[2])
{
    for (int i = 0; i < IPT_KEEP_MODELS; i++) {
        if (!e->model[i] || strcmp(key, e->model[i]->key) != 0)
            continue;
        if (memcmp(stamp, e->model[i]->stamp, sizeof e->model[i]->stamp) == 0)
            return e->model[i];
        ipt_loaded_drop(e, &e->model[i]);
    }
    return NULL;
}

static ipt_status read_precision(ipt_ctx *ctx, const char *text, ipt_precision *out)
{
    static const char *const names[] = {
        [IPT_PRECISION_AUTO] = "auto",
        [IPT_PRECISION_F16] = "f16",
        [IPT_PRECISION_F32] = "f32",
        [IPT_PRECISION_Q8] = "q8",
    };
    for (size_t i = 0; text && i < IPT_COUNT(names); i++)
        if (strcmp(text, names[i]) == 0) {
            *out = (ipt_precision)i;
            return IPT_OK;
        }
    return text ? ipt_fail(ctx, IPT_ERR_ARG,
                           "unknown precision '%.80s'; there are: auto f16 f32 q8", text)
                : IPT_OK;
}

static ipt_dtype weight_type_of(ipt_precision p)
{
    return p == IPT_PRECISION_F32 ? IPT_F32 : p == IPT_PRECISION_Q8 ? IPT_Q8 : IPT_F16;
}

ipt_status ipt_load_model(ipt_engine *e, const ipt_request *r)
{
    char path[IPT_MAX_PATH], key[3 * IPT_MAX_PATH];
    if (r->model)
        ipt_name(path, sizeof path, "%s", r->model);
    else
        IPT_TRY(ipt_default_model(e->ctx, path, sizeof path));
    ipt_precision precision = e->opts.precision;
    IPT_TRY(read_precision(e->ctx, r->precision, &precision));
    ipt_name(key, sizeof key, "%d|%s|%s|%s", (int)weight_type_of(precision), path,
             r->vae ? r->vae : "", r->config_dir ? r->config_dir : "");
    const uint64_t stamp[2] = {ipt_file_stamp(path), ipt_file_stamp(r->vae)};
    e->m = find_kept(e, key, stamp);
    if (!e->m) {
        ipt_loaded *m = ipt_alloc(e->ctx, sizeof *m), **place = free_place(e);
        if (!m || !place)
            return IPT_ERR_NOMEM;
        *place = m;
        m->id = ++e->last_id;
        m->precision = precision;
        ipt_status status = open_model(e->ctx, m, r, path);
        if (status != IPT_OK) {
            ipt_loaded_drop(e, place);
            return status;
        }
        ipt_name(m->key, sizeof m->key, "%s", key);
        memcpy(m->stamp, stamp, sizeof stamp);
        e->m = m;
    }
    e->m->used = e->request;
    return IPT_OK;
}

/* --- the tiny VAE ----------------------------------------------------------------------------- */
void ipt_loaded_drop_taesd(ipt_engine *e)
{
    if (e->taesd)
        ipt_plans_drop(e, e->taesd_id);
    ipt_weights_destroy(&e->taesd_store);
    ipt_model_close(&e->taesd);
    e->taesd_key[0] = 0;
    e->taesd_stamp = 0;
}

/* A tiny VAE with every weight that its graph asks for, and its store. */
static ipt_status open_taesd(ipt_engine *e, const char *path, ipt_model **model,
                             ipt_weights **store)
{
    ipt_model *m = NULL;
    ipt_want_list want = {0};
    ipt_check check = {0};
    IPT_TRY(ipt_model_open_vae(e->ctx, path, &m));
    const ipt_model_config *config = ipt_model_get_config(m);
    ipt_status status = IPT_OK;
    if (!config->vae.tiny)
        status = ipt_fail(e->ctx, IPT_ERR_FORMAT,
                          "%s: not a TAESD decoder (a whole VAE goes with --vae)", path);
    if (status == IPT_OK)
        status = ipt_wants_create(e->ctx, config, IPT_COMP_VAE, &want);
    if (status == IPT_OK)
        status = ipt_model_check(m, IPT_COMP_VAE, want.want, want.n, &check);
    if (status == IPT_OK)
        status = ipt_check_status(m, IPT_COMP_VAE, &check);
    if (status == IPT_OK)
        status = ipt_model_weights(m, IPT_COMP_VAE, e->gpu, e->m->weight_type, NULL, store);
    ipt_check_finish(&check);
    ipt_wants_finish(&want);
    if (status != IPT_OK) {
        ipt_model_close(&m);
        return status;
    }
    *model = m;
    return IPT_OK;
}

/* The VAE for quick decoding, checked like the model's own; one that is refused changes nothing. */
static ipt_status load_taesd(ipt_engine *e, const char *path)
{
    const uint64_t stamp = ipt_file_stamp(path);
    ipt_model *model = NULL;
    ipt_weights *store = NULL;
    if (strcmp(e->taesd_key, path ? path : "") == 0 && e->taesd_stamp == stamp &&
        (!path || e->taesd_type == e->m->weight_type))
        return IPT_OK;
    if (path)
        IPT_TRY(open_taesd(e, path, &model, &store));
    ipt_loaded_drop_taesd(e);
    e->taesd_id = ++e->last_id;
    e->taesd = model;
    e->taesd_store = store;
    e->taesd_stamp = stamp;
    e->taesd_type = e->m->weight_type;
    ipt_name(e->taesd_key, sizeof e->taesd_key, "%s", path ? path : "");
    return IPT_OK;
}

/* The caller's picture is sized by the model's VAE: a tiny decoder of another make writes another
 * number of pixels, or reads another latent.  Asked at every request: the model may have changed.
 */
static ipt_status check_taesd(const ipt_engine *e)
{
    if (!e->taesd)
        return IPT_OK;
    const ipt_vae_config *tiny = &ipt_model_get_config(e->taesd)->vae, *own = &e->m->config.vae;
    if (ipt_vae_factor(tiny) != ipt_vae_factor(own))
        return ipt_fail(e->ctx, IPT_ERR_SHAPE,
                        "%s: this TAESD enlarges a latent by %d, the model's VAE by %d; leave out "
                        "--taesd with this model",
                        ipt_model_path(e->taesd), ipt_vae_factor(tiny), ipt_vae_factor(own));
    if (tiny->latent_channels != e->m->config.unet.out_channels)
        return ipt_fail(e->ctx, IPT_ERR_SHAPE,
                        "%s: this TAESD decodes %d latent channels, the model's unet gives %d; "
                        "leave out --taesd with this model",
                        ipt_model_path(e->taesd), tiny->latent_channels,
                        e->m->config.unet.out_channels);
    return IPT_OK;
}

/* --- on the device ---------------------------------------------------------------------------- */
/* How the model is stored and computed. */
static void choose_types(const ipt_engine *e, ipt_loaded *m)
{
    const ipt_traits *t = ipt_gpu_traits(e->gpu);
    m->weight_type = weight_type_of(m->precision);
    m->act_type = m->weight_type != IPT_F32 && !t->simd && t->f16_storage ? IPT_F16 : IPT_F32;
}

ipt_status ipt_load_device(ipt_engine *e, const ipt_request *r)
{
    IPT_TRY(ipt_engine_open_device(e));
    choose_types(e, e->m);
    IPT_TRY(load_taesd(e, r->taesd));
    return check_taesd(e);
}
