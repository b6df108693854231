/* engine/adapters.c - the adapter files of a request, kept while one of their plans is. */
#include "engine/internal.h"

#include <string.h>

/* The folders where names are looked up, the user's own last. */
static const char *lora_dir(const ipt_request *r, size_t i)
{
    return i < r->n_lora_dirs ? r->lora_dirs[i] : r->lora_home;
}

/* A path as given, or a name (with or without ending) in one of the LoRA folders. */
static ipt_status find_lora(ipt_engine *e, const ipt_request *r, const char *name, char *buf,
                            size_t n)
{
    static const char *const endings[] = {"", ".safetensors"};
    if (ipt_file_stamp(name) != 0) { /* also what is no file: opening it says what it is */
        ipt_name(buf, n, "%s", name);
        return IPT_OK;
    }
    size_t n_dir = r->n_lora_dirs + (r->lora_home != NULL);
    for (size_t d = 0; d < n_dir && !strstr(name, ".."); d++)
        for (size_t i = 0; i < IPT_COUNT(endings); i++) {
            ipt_name(buf, n, "%s/%s%s", lora_dir(r, d), name, endings[i]);
            if (ipt_is_file(buf))
                return IPT_OK;
        }
    char dirs[512] = "";
    for (size_t d = 0, at = 0; d < n_dir && at < sizeof dirs; d++)
        at += (size_t)snprintf(dirs + at, sizeof dirs - at, "%s%s", d ? ", " : "", lora_dir(r, d));
    return ipt_fail(e->ctx, IPT_ERR_IO,
                    "%.200s: no such LoRA file%s%s; --lora-dir DIR names a folder", name,
                    dirs[0] ? ", nor one of that name in " : "", dirs);
}

static ipt_status check_adapters(ipt_ctx *ctx, const ipt_adapter_set *s, const ipt_request *r)
{
    for (size_t i = 0; i < s->n_file; i++) {
        const ipt_adapter_file *f = s->file[i];
        IPT_TRY(ipt_adapter_check(f, r->allow_partial));
        if (f->n_unmatched > 0)
            ipt_log(ctx, IPT_LOG_WARN, "%s: %zu of %zu keys fit nothing in this model (first: %s)",
                    f->path, f->n_unmatched, f->n_key, f->unmatched[0]);
    }
    return IPT_OK;
}

/* --- sets ------------------------------------------------------------------------------------- */
void ipt_adapter_set_release(ipt_adapter_set **sp)
{
    ipt_adapter_set *s = *sp;
    *sp = NULL;
    if (!s || --s->refs > 0)
        return;
    ipt_bank_destroy(&s->bank);
    ipt_adapter_close(&s->one);
    ipt_free(s->bytes);
    ipt_free(s->how);
    for (size_t i = 0; i < s->n_file; i++)
        ipt_adapter_close(&s->file[i]);
    ipt_free(s->key);
    ipt_free(s);
}

const ipt_bank *ipt_engine_bank(const ipt_engine *e) { return e->set ? e->set->bank : NULL; }
const ipt_bank *ipt_unet_bank(const ipt_engine *e)
{
    return e->is_folded ? NULL : ipt_engine_bank(e);
}
size_t ipt_engine_n_file(const ipt_engine *e) { return e->set ? e->set->n_file : 0; }

/* Adapters that a request asks for, on their way into a set. */
typedef struct wanted {
    const ipt_prompt_lora *extra; /* of the prompt's tags, behind the request's own */
    size_t n;
    char (*key)[IPT_MAX_PATH]; /* [n] paths */
    char *how;
} wanted;

static void wanted_finish(wanted *w)
{
    ipt_free(w->key);
    ipt_free(w->how);
    w->key = NULL;
    w->how = NULL;
}

/* Opens the files at w->key, which it takes, as `how`. */
static ipt_status open_set(ipt_engine *e, const ipt_request *r, wanted *w, ipt_adapter_set **out)
{
    const ipt_module_list *modules = &e->m->modules;
    ipt_adapter_set *s = ipt_alloc(e->ctx, sizeof *s);
    ipt_status status = s ? IPT_OK : IPT_ERR_NOMEM;
    char(*key)[IPT_MAX_PATH] = w->key;
    size_t n = w->n;
    if (!s)
        return status;
    s->refs = 1;
    s->model = e->m->id;
    s->key = key;
    s->how = w->how;
    w->key = NULL;
    w->how = NULL;
    for (size_t i = 0; i < n && status == IPT_OK; i++) {
        s->stamp[i] = ipt_file_stamp(key[i]);
        status = ipt_adapter_open(e->ctx, key[i], modules->module, modules->n, &s->file[i]);
        s->n_file += status == IPT_OK;
    }
    if (status == IPT_OK)
        status = check_adapters(e->ctx, s, r);
    if (status == IPT_OK && s->how)
        status = ipt_combine_set(e, r, w->extra, s);
    if (status == IPT_OK)
        status = ipt_bank_create(e->ctx, modules->module, modules->n, s->one ? &s->one : s->file,
                                 s->one ? 1 : n, &s->bank);
    if (status == IPT_OK)
        *out = s;
    else
        ipt_adapter_set_release(&s);
    return status;
}

static bool is_same_set(const ipt_engine *e, const ipt_adapter_set *s, const wanted *w)
{
    bool same = s && s->model == e->m->id && s->n_file == w->n && !s->how == !w->how &&
                (!s->how || strcmp(s->how, w->how) == 0);
    for (size_t i = 0; i < w->n && same; i++)
        same = strcmp(w->key[i], s->key[i]) == 0 && ipt_file_stamp(w->key[i]) == s->stamp[i];
    return same;
}

/* A set of these files that is open already: the last request's, or that of a kept plan. */
static ipt_adapter_set *find_set(const ipt_engine *e, const wanted *w)
{
    if (is_same_set(e, e->set, w))
        return e->set;
    if (is_same_set(e, e->m->fold.set, w))
        return e->m->fold.set;
    for (int k = 0; k < IPT_PLAN_KINDS; k++)
        for (int i = 0; i < IPT_KEEP_PLANS; i++)
            if (is_same_set(e, e->plan[k][i].set, w))
                return e->plan[k][i].set;
    return NULL;
}

/* Where they lie, and whether they become one. */
static ipt_status want(ipt_engine *e, const ipt_request *r, wanted *w)
{
    w->key = ipt_calloc(e->ctx, w->n, IPT_MAX_PATH);
    if (!w->key)
        return IPT_ERR_NOMEM;
    for (size_t i = 0; i < w->n; i++) {
        const char *name = i < r->n_lora ? r->lora[i].path : w->extra[i - r->n_lora].name;
        IPT_TRY(find_lora(e, r, name, w->key[i], IPT_MAX_PATH));
    }
    return ipt_combine_text(e, r, w->extra, w->n, &w->how);
}

ipt_status ipt_load_adapters(ipt_engine *e, const ipt_request *r, const ipt_prompt_lora *extra,
                             size_t n_extra)
{
    wanted w = {.extra = extra, .n = r->n_lora + n_extra};
    if (w.n > IPT_MAX_SLOT)
        return ipt_fail(e->ctx, IPT_ERR_ARG, "%zu adapters given, at most %d at once", w.n,
                        IPT_MAX_SLOT);
    if (w.n == 0) {
        ipt_adapter_set_release(&e->set);
        return IPT_OK;
    }
    ipt_status status = want(e, r, &w);
    ipt_adapter_set *kept = status == IPT_OK ? find_set(e, &w) : NULL;
    if (kept)
        kept->refs++;
    ipt_adapter_set_release(&e->set);
    e->set = kept;
    if (status == IPT_OK)
        status = kept ? check_adapters(e->ctx, kept, r) : open_set(e, r, &w, &e->set);
    wanted_finish(&w);
    return status;
}
