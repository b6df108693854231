/* engine/engine.c - life of an engine, its device, the default model. */
#include "engine/hash.h"
#include "engine/internal.h"

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
    return ipt_gpu_create(e->ctx, &o, &e->gpu);
}

const char *ipt_engine_device_name(const ipt_engine *e)
{
    return e->gpu ? ipt_gpu_get_info(e->gpu)->name : "";
}
ipt_gpu *ipt_engine_gpu(ipt_engine *e) { return e->gpu; }

/* --- shipped folders -------------------------------------------------------------------------- */
static bool try_folder(char *buf, size_t n, const char *root, const char *rest, const char *file)
{
    char path[IPT_MAX_PATH];
    ipt_name(buf, n, "%s/%s", root, rest);
    ipt_name(path, sizeof path, "%s/%s", buf, file);
    return ipt_is_file(path);
}

ipt_status ipt_shipped_folder(ipt_ctx *ctx, const char *name, const char *file, char *buf, size_t n)
{
    char exe[IPT_MAX_PATH], share[IPT_MAX_PATH];
    ipt_name(share, sizeof share, "share/impasto/%s", name);
    ssize_t len = readlink("/proc/self/exe", exe, sizeof exe - 1);
    for (int up = 0; len > 0 && up < 3; up++) { /* beside the program, or up to two folders above */
        exe[len] = 0;
        char *slash = strrchr(exe, '/');
        if (!slash || slash == exe)
            break;
        *slash = 0;
        len = slash - exe;
        if (try_folder(buf, n, exe, name, file) || try_folder(buf, n, exe, share, file))
            return IPT_OK;
    }
    if (try_folder(buf, n, IPT_INSTALL_SHARE, name, file) ||
        try_folder(buf, n, IPT_SOURCE_ROOT, name, file))
        return IPT_OK;
    return ipt_fail(ctx, IPT_ERR_MISSING, "%s: this folder was not found beside the program", name);
}

ipt_status ipt_default_model(ipt_ctx *ctx, char *buf, size_t n)
{
    const char *env = getenv("IMPASTO_MODEL");
    if (env && *env) {
        ipt_name(buf, n, "%s", env);
        return IPT_OK;
    }
    if (ipt_shipped_folder(ctx, "models/default", "model_index.json", buf, n) == IPT_OK)
        return IPT_OK;
    return ipt_fail(
        ctx, IPT_ERR_MISSING,
        "the default model was not found; give a model with -m or set IMPASTO_MODEL to its folder");
}

bool ipt_engine_is_crowded(const ipt_engine *e, uint64_t part)
{
    if (!e->gpu)
        return false;
    const ipt_gpu_info *info = ipt_gpu_get_info(e->gpu);
    uint64_t room = info->budget_bytes ? info->budget_bytes : info->heap_bytes;
    if (e->opts.vram_limit && e->opts.vram_limit < room)
        room = e->opts.vram_limit;
    else if (info->traits.simd)
        room /= 2;
    return ipt_gpu_used_bytes(e->gpu) > room / part;
}

void ipt_engine_drop_device(ipt_engine *e)
{
    ipt_loaded_drop_taesd(e);
    for (int i = 0; i < IPT_KEEP_MODELS; i++)
        ipt_loaded_drop(e, &e->model[i]);
    ipt_adapter_set_release(&e->set);
    ipt_plans_drop(e, 0);
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
