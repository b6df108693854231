/* engine/engine.c - the device, the model and the adapters that an engine keeps between requests.
 */
#include "engine/hash.h"
#include "engine/internal.h"

#include "vae/vae.h"

#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

ipt_status ipt_engine_create(ipt_ctx *ctx, const ipt_engine_opts *o, ipt_engine **out)
{
    ipt_engine *e = ipt_alloc(ctx, sizeof *e);
    if (!e)
        return IPT_ERR_NOMEM;
    e->ctx = ctx;
    e->opts = *o;
    if (o->device) {
        ipt_name(e->device_opt, sizeof e->device_opt, "%s", o->device);
        e->opts.device = e->device_opt;
    }
    ipt_arena_init(&e->report_arena, ctx);
    *out = e;
    return IPT_OK;
}

ipt_status ipt_engine_open_device(ipt_engine *e)
{
    if (e->gpu)
        return IPT_OK;
    ipt_gpu_opts o = {
        .device = e->opts.device, .validate = e->opts.validate, .memory_limit = e->opts.vram_limit};
    IPT_TRY(ipt_gpu_create(e->ctx, &o, &e->gpu));
    const ipt_traits *t = ipt_gpu_traits(e->gpu);
    bool f32 = e->opts.precision == IPT_PRECISION_F32;
    e->weight_type = f32 ? IPT_F32 : IPT_F16;
    e->act_type = !f32 && !t->simd && t->f16_storage ? IPT_F16 : IPT_F32;
    return IPT_OK;
}

const char *ipt_engine_device_name(const ipt_engine *e)
{
    return e->gpu ? ipt_gpu_get_info(e->gpu)->name : "";
}
ipt_gpu *ipt_engine_gpu(ipt_engine *e) { return e->gpu; }

/* --- default model ---------------------------------------------------------------------------- */
static bool try_model(char *buf, size_t n, const char *root, const char *rest)
{
    char index[IPT_MAX_PATH];
    ipt_name(buf, n, "%s/%s", root, rest);
    ipt_name(index, sizeof index, "%s/model_index.json", buf);
    return ipt_is_file(index);
}

ipt_status ipt_default_model(ipt_ctx *ctx, char *buf, size_t n)
{
    const char *env = getenv("IMPASTO_MODEL");
    if (env && *env) {
        ipt_name(buf, n, "%s", env);
        return IPT_OK;
    }
    char exe[IPT_MAX_PATH];
    ssize_t len = readlink("/proc/self/exe", exe, sizeof exe - 1);
    for (int up = 0; len > 0 && up < 3; up++) { /* beside the program, or up to two folders above */
        exe[len] = 0;
        char *slash = strrchr(exe, '/');
        if (!slash || slash == exe)
            break;
        *slash = 0;
        len = slash - exe;
        if (try_model(buf, n, exe, "models/default") ||
            try_model(buf, n, exe, "share/impasto/models/default"))
            return IPT_OK;
    }
    if (try_model(buf, n, IPT_INSTALL_SHARE, "models/default") ||
        try_model(buf, n, IPT_SOURCE_ROOT, "models/default"))
        return IPT_OK;
    return ipt_fail(
        ctx, IPT_ERR_MISSING,
        "the default model was not found; give a model with -m or set IMPASTO_MODEL to its folder");
}

/* --- dropping --------------------------------------------------------------------------------- */
void ipt_engine_drop_plans(ipt_engine *e)
{
    ipt_plan_destroy(&e->unet.plan);
    ipt_plan_destroy(&e->text[0].plan);
    ipt_plan_destroy(&e->text[1].plan);
    ipt_plan_destroy(&e->decode.plan);
    ipt_plan_destroy(&e->encode.plan);
}

static void drop_adapters(ipt_engine *e)
{
    ipt_plan_destroy(&e->unet.plan); /* they may have sites of the bank */
    ipt_plan_destroy(&e->text[0].plan);
    ipt_plan_destroy(&e->text[1].plan);
    ipt_bank_destroy(&e->bank);
    for (size_t i = 0; i < e->n_file; i++)
        ipt_adapter_close(&e->file[i]);
    e->n_file = 0;
}

static void drop_taesd(ipt_engine *e)
{
    ipt_plan_destroy(&e->decode.plan);
    ipt_weights_destroy(&e->taesd_store);
    ipt_model_close(&e->taesd);
    e->taesd_key[0] = 0;
    e->taesd_stamp = 0;
}

static void drop_model(ipt_engine *e)
{
    ipt_engine_drop_plans(e);
    drop_taesd(e);
    drop_adapters(e);
    for (int c = 0; c < IPT_COMP_COUNT; c++)
        ipt_weights_destroy(&e->store[c]);
    for (int i = 0; i < 2; i++)
        ipt_tokenizer_destroy(&e->tokenizer[i]);
    ipt_modules_finish(&e->modules);
    ipt_model_close(&e->model);
    e->model_key[0] = 0;
}

void ipt_engine_drop_device(ipt_engine *e)
{
    drop_model(e);
    ipt_gpu_destroy(&e->gpu);
}

void ipt_engine_destroy(ipt_engine **ep)
{
    if (!ep || !*ep)
        return;
    ipt_engine *e = *ep;
    ipt_engine_drop_device(e);
    ipt_hashes_destroy(&e->hashes);
    ipt_arena_finish(&e->report_arena);
    ipt_free(e);
    *ep = NULL;
}

/* --- model ------------------------------------------------------------------------------------ */
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
static ipt_status check_component(ipt_engine *e, int comp)
{
    ipt_want_list want = {0};
    ipt_check check = {0};
    IPT_TRY(ipt_wants_create(e->ctx, &e->config, comp, &want));
    ipt_status status = ipt_model_check(e->model, comp, want.want, want.n, &check);
    if (status == IPT_OK) {
        status = ipt_check_status(e->model, comp, &check);
        if (status == IPT_OK && check.n_unclaimed > 0)
            ipt_log(e->ctx, IPT_LOG_WARN, "%s: %zu tensors are not used (first: %s)",
                    ipt_comp_name(comp), check.n_unclaimed, check.unclaimed[0]);
        ipt_check_finish(&check);
    }
    ipt_wants_finish(&want);
    return status;
}

static ipt_status open_model(ipt_engine *e, const ipt_request *r, const char *path)
{
    ipt_model_opts o = {.config_dir = r->config_dir};
    IPT_TRY(ipt_model_open(e->ctx, path, &o, &e->model));
    if (r->vae)
        IPT_TRY(ipt_model_set_vae(e->model, r->vae));
    e->config = *ipt_model_get_config(e->model);
    static const int need[] = {IPT_COMP_UNET, IPT_COMP_TEXT, IPT_COMP_VAE};
    for (size_t i = 0; i < IPT_COUNT(need); i++)
        if (!e->config.has[need[i]])
            return ipt_fail(e->ctx, IPT_ERR_MISSING, "%s: has no %s%s", path,
                            ipt_comp_name(need[i]),
                            need[i] == IPT_COMP_VAE ? "; give one with --vae" : "");
    if (e->config.arch == IPT_ARCH_SDXL && !e->config.has[IPT_COMP_TEXT2])
        return ipt_fail(e->ctx, IPT_ERR_MISSING, "%s: has no text_encoder_2", path);
    for (int c = 0; c < IPT_COMP_COUNT; c++)
        if (e->config.has[c])
            IPT_TRY(check_component(e, c));
    IPT_TRY(ipt_modules_create(e->ctx, &e->config, &e->modules));
    IPT_TRY(ipt_open_tokenizer(e->ctx, e->model, IPT_COMP_TEXT, &e->tokenizer[0]));
    if (e->config.has[IPT_COMP_TEXT2])
        IPT_TRY(ipt_open_tokenizer(e->ctx, e->model, IPT_COMP_TEXT2, &e->tokenizer[1]));
    return IPT_OK;
}

ipt_status ipt_engine_store(ipt_engine *e, int comp, ipt_weights **out)
{
    if (!e->store[comp]) {
        bool vae = comp == IPT_COMP_VAE && e->config.vae.force_upcast;
        ipt_dtype type = vae && e->opts.precision == IPT_PRECISION_F32 ? IPT_F32 : e->weight_type;
        IPT_TRY(ipt_model_weights(e->model, comp, e->gpu, type, NULL, &e->store[comp]));
    }
    *out = e->store[comp];
    return IPT_OK;
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
        status = ipt_model_weights(m, IPT_COMP_VAE, e->gpu, e->weight_type, NULL, store);
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
    if (strcmp(e->taesd_key, path ? path : "") == 0 && e->taesd_stamp == stamp)
        return IPT_OK;
    if (path)
        IPT_TRY(open_taesd(e, path, &model, &store));
    drop_taesd(e);
    e->taesd = model;
    e->taesd_store = store;
    e->taesd_stamp = stamp;
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
    const ipt_vae_config *tiny = &ipt_model_get_config(e->taesd)->vae, *own = &e->config.vae;
    if (ipt_vae_factor(tiny) != ipt_vae_factor(own))
        return ipt_fail(e->ctx, IPT_ERR_SHAPE,
                        "%s: this TAESD enlarges a latent by %d, the model's VAE by %d; leave out "
                        "--taesd with this model",
                        ipt_model_path(e->taesd), ipt_vae_factor(tiny), ipt_vae_factor(own));
    if (tiny->latent_channels != e->config.unet.out_channels)
        return ipt_fail(e->ctx, IPT_ERR_SHAPE,
                        "%s: this TAESD decodes %d latent channels, the model's unet gives %d; "
                        "leave out --taesd with this model",
                        ipt_model_path(e->taesd), tiny->latent_channels,
                        e->config.unet.out_channels);
    return IPT_OK;
}

/* --- adapters --------------------------------------------------------------------------------- */
/* A path as given, or a name (with or without ending) in one of the LoRA folders. */
static ipt_status find_lora(ipt_engine *e, const ipt_request *r, const char *name, char *buf,
                            size_t n)
{
    static const char *const endings[] = {"", ".safetensors"};
    if (ipt_file_stamp(name) != 0) { /* also what is no file: opening it says what it is */
        ipt_name(buf, n, "%s", name);
        return IPT_OK;
    }
    for (size_t d = 0; d < r->n_lora_dirs && !strstr(name, ".."); d++)
        for (size_t i = 0; i < IPT_COUNT(endings); i++) {
            ipt_name(buf, n, "%s/%s%s", r->lora_dirs[d], name, endings[i]);
            if (ipt_is_file(buf))
                return IPT_OK;
        }
    char dirs[512] = "";
    for (size_t d = 0, at = 0; d < r->n_lora_dirs && at < sizeof dirs; d++)
        at += (size_t)snprintf(dirs + at, sizeof dirs - at, "%s%s", d ? ", " : "", r->lora_dirs[d]);
    return ipt_fail(e->ctx, IPT_ERR_IO,
                    "%.200s: no such LoRA file%s%s; --lora-dir DIR names a folder", name,
                    dirs[0] ? ", nor one of that name in " : "", dirs);
}

static ipt_status check_adapters(const ipt_engine *e, const ipt_request *r)
{
    for (size_t i = 0; i < e->n_file; i++) {
        const ipt_adapter_file *f = e->file[i];
        IPT_TRY(ipt_adapter_check(f, r->allow_partial));
        if (f->n_unmatched > 0)
            ipt_log(e->ctx, IPT_LOG_WARN,
                    "%s: %zu of %zu keys fit nothing in this model (first: %s)", f->path,
                    f->n_unmatched, f->n_key, f->unmatched[0]);
    }
    return IPT_OK;
}

static ipt_status load_adapters(ipt_engine *e, const ipt_request *r, const ipt_prompt_lora *extra,
                                size_t n_extra)
{
    size_t n = r->n_lora + n_extra;
    if (n > IPT_MAX_SLOT)
        return ipt_fail(e->ctx, IPT_ERR_ARG, "%zu adapters given, at most %d at once", n,
                        IPT_MAX_SLOT);
    char(*key)[IPT_MAX_PATH] = ipt_calloc(e->ctx, IPT_MAX_SLOT, IPT_MAX_PATH);
    if (!key)
        return IPT_ERR_NOMEM;
    ipt_status status = IPT_OK;
    bool same = n == e->n_file;
    for (size_t i = 0; i < n && status == IPT_OK; i++) {
        const char *name = i < r->n_lora ? r->lora[i].path : extra[i - r->n_lora].name;
        status = find_lora(e, r, name, key[i], IPT_MAX_PATH);
        same = same && strcmp(key[i], e->file_key[i]) == 0 &&
               ipt_file_stamp(key[i]) == e->file_stamp[i];
    }
    if (status == IPT_OK && same)
        status = check_adapters(e, r);
    if (status == IPT_OK && !same) {
        drop_adapters(e);
        for (size_t i = 0; i < n && status == IPT_OK; i++) {
            e->file_stamp[i] = ipt_file_stamp(key[i]);
            status = ipt_adapter_open(e->ctx, key[i], e->modules.module, e->modules.n, &e->file[i]);
            if (status != IPT_OK)
                break;
            e->n_file = i + 1;
            ipt_name(e->file_key[i], IPT_MAX_PATH, "%s", key[i]);
        }
        if (status == IPT_OK)
            status = check_adapters(e, r);
        if (status == IPT_OK && n > 0)
            status = ipt_bank_create(e->ctx, e->modules.module, e->modules.n, e->file, n, &e->bank);
        if (status != IPT_OK)
            drop_adapters(e);
    }
    ipt_free(key);
    return status;
}

ipt_status ipt_engine_load(ipt_engine *e, const ipt_request *r, const ipt_prompt_lora *extra,
                           size_t n_extra)
{
    char path[IPT_MAX_PATH], key[3 * IPT_MAX_PATH];
    if (r->model)
        ipt_name(path, sizeof path, "%s", r->model);
    else
        IPT_TRY(ipt_default_model(e->ctx, path, sizeof path));
    ipt_name(key, sizeof key, "%s|%s|%s", path, r->vae ? r->vae : "",
             r->config_dir ? r->config_dir : "");
    const uint64_t stamp[2] = {ipt_file_stamp(path), ipt_file_stamp(r->vae)};
    if (!e->model || strcmp(key, e->model_key) != 0 ||
        memcmp(stamp, e->model_stamp, sizeof stamp) != 0) {
        drop_model(e);
        ipt_status status = open_model(e, r, path);
        if (status != IPT_OK) {
            drop_model(e);
            return status;
        }
        ipt_name(e->model_key, sizeof e->model_key, "%s", key);
        memcpy(e->model_stamp, stamp, sizeof stamp);
    }
    if (n_extra == SIZE_MAX) /* the model only: prompts are read next and may name more adapters */
        return IPT_OK;
    IPT_TRY(ipt_engine_open_device(e));
    IPT_TRY(load_taesd(e, r->taesd));
    IPT_TRY(check_taesd(e));
    return load_adapters(e, r, extra, n_extra);
}
