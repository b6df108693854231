/* model_io/model_bake.c - a model's own files again, with adapters in their weights. */
#include <dirent.h>
#include <fcntl.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "model_io/adapter_tools.h"
#include "model_io/kinds.h"

/* One adapter's change of one tensor of the model. */
typedef struct touch {
    const ipt_st_tensor *tensor;
    ipt_key_part part;
    const ipt_adapter_module *a;
    double weight;
} touch;

typedef struct baking {
    ipt_tool *t;
    ipt_model *m;
    ipt_st_dtype dtype;
    touch *touch; /* [n], sorted by tensor */
    size_t n;
    const ipt_safetensors *st; /* the file at work */
    const ipt_st_write *write; /* its tensors as they will be */
    size_t done, total;        /* tensors of all files */
    json_t *note;              /* what was folded in */
} baking;

/* --- which tensors ---------------------------------------------------------------------------- */
static int by_tensor(const void *a, const void *b)
{
    const touch *x = a, *y = b;
    return x->tensor < y->tensor ? -1 : x->tensor > y->tensor;
}

static ipt_status find_touch(baking *b, const ipt_adapter_module *a, double weight)
{
    const ipt_module *m = &b->t->module[a->module];
    const ipt_source *src = ipt_model_source(b->m, m->comp);
    char name[IPT_KEY_MAX + 16];
    ipt_found f = {0};
    ipt_name(name, sizeof name, "%s.%s", m->name, a->act == IPT_ACTS_BIAS ? "bias" : "weight");
    if (!ipt_source_find(src, name, &f))
        return ipt_fail(b->t->ctx, IPT_ERR_MISSING, "%s: weight '%s' of %s is missing",
                        ipt_model_path(b->m), name, ipt_comp_name(m->comp));
    size_t n = (size_t)a->out * (ipt_tool_is_vector(a) ? 1 : ipt_fan(a)),
           have = f.tensor->count / (f.part.third ? 3 : 1);
    if (n != have)
        return ipt_fail(b->t->ctx, IPT_ERR_SHAPE, "%s: key '%s': found %zu values, expected %zu",
                        ipt_safetensors_path(f.file), f.tensor->name, have, n);
    ipt_st_dtype to = b->dtype == IPT_ST_COUNT ? f.tensor->dtype : b->dtype;
    if (!ipt_st_can_write(to) || f.tensor->dtype > IPT_ST_F8_E5M2)
        return ipt_fail(
            b->t->ctx, IPT_ERR_UNSUPPORTED,
            "%s: key '%s': found %s, expected f32, f16 or bf16: choose one with --dtype",
            ipt_safetensors_path(f.file), f.tensor->name, ipt_st_dtype_name(f.tensor->dtype));
    b->touch[b->n++] = (touch){f.tensor, f.part, a, weight};
    return IPT_OK;
}

static ipt_status find_all(baking *b, const ipt_merge_input *in, size_t n)
{
    size_t total = 0;
    for (size_t f = 0; f < n; f++)
        total += in[f].file->n_module;
    b->touch = ipt_calloc(b->t->ctx, total + 1, sizeof *b->touch);
    if (!b->touch)
        return IPT_ERR_NOMEM;
    for (size_t f = 0; f < n; f++)
        for (size_t i = 0; i < in[f].file->n_module; i++) {
            const ipt_adapter_module *a = &in[f].file->module[i];
            bool text = b->t->module[a->module].comp != IPT_COMP_UNET;
            IPT_TRY(find_touch(b, a, text ? in[f].te_weight : in[f].weight));
        }
    qsort(b->touch, b->n, sizeof *b->touch, by_tensor);
    return IPT_OK;
}

/* The touches of a tensor: *n of them. */
static const touch *touches(const baking *b, const ipt_st_tensor *t, size_t *n)
{
    size_t lo = 0, hi = b->n;
    while (lo < hi) {
        size_t mid = lo + (hi - lo) / 2;
        if (b->touch[mid].tensor < t)
            lo = mid + 1;
        else
            hi = mid;
    }
    for (*n = 0; lo + *n < b->n && b->touch[lo + *n].tensor == t;)
        ++*n;
    return b->touch + lo;
}

/* --- values ----------------------------------------------------------------------------------- */
static ipt_status add_touch(baking *b, const touch *x, double *v)
{
    const ipt_adapter_module *a = x->a;
    double *d = NULL, total = 0;
    IPT_TRY(ipt_tool_delta(b->t, a, &d));
    size_t out = (size_t)a->out, fan = ipt_tool_is_vector(a) ? 1 : ipt_fan(a), n = out * fan,
           first = x->part.third ? (size_t)(x->part.third - 1) * n : 0;
    for (size_t i = 0; i < n; i++) {
        v[x->part.transposed ? i % fan * out + i / fan : first + i] += x->weight * d[i];
        total += d[i] * d[i];
    }
    ipt_free(d);
    ipt_tool_note(b->t, a->module, total, 0, 0, false);
    return IPT_OK;
}

static ipt_status fill(void *user, size_t i, void *buf, size_t bytes)
{
    baking *b = user;
    const ipt_st_tensor *t = ipt_safetensors_at(b->st, i);
    size_t n = 0;
    const touch *x = touches(b, t, &n);
    IPT_TRY(ipt_tool_step(b->t, b->done++, b->total));
    IPT_TRY(ipt_st_load(t));
    if (n == 0 && b->write[i].dtype == t->dtype) {
        memcpy(buf, t->data, bytes);
        ipt_st_release(t);
        return IPT_OK;
    }
    double *v = ipt_calloc(b->t->ctx, t->count, sizeof *v);
    ipt_status s = v ? IPT_OK : IPT_ERR_NOMEM;
    for (size_t k = 0; s == IPT_OK && k < t->count; k++)
        v[k] = (double)ipt_st_get(t, k);
    for (size_t k = 0; s == IPT_OK && k < n; k++)
        s = add_touch(b, &x[k], v);
    if (s == IPT_OK && !ipt_st_from_f64(b->write[i].dtype, v, t->count, buf))
        s = ipt_fail(b->t->ctx, IPT_ERR_ARG,
                     "%s: key '%s': found a value that does not fit %s, expected smaller ones: "
                     "choose another --dtype",
                     ipt_safetensors_path(b->st), t->name, ipt_st_dtype_name(b->write[i].dtype));
    ipt_free(v);
    ipt_st_release(t);
    return s;
}

/* --- one file --------------------------------------------------------------------------------- */
static ipt_status bake_file(baking *b, const ipt_safetensors *st, const char *path)
{
    size_t n = ipt_safetensors_count(st), n_meta = 0;
    const json_t *old = ipt_safetensors_metadata(st);
    const char *key;
    json_t *v;
    ipt_st_write *w = ipt_calloc(b->t->ctx, n + 1, sizeof *w);
    ipt_st_meta *meta = ipt_calloc(b->t->ctx, json_object_size(old) + 1, sizeof *meta);
    ipt_status s = w && meta ? IPT_OK : IPT_ERR_NOMEM;
    for (size_t i = 0; s == IPT_OK && i < n; i++) {
        const ipt_st_tensor *t = ipt_safetensors_at(st, i);
        bool is_float = t->dtype <= IPT_ST_F8_E5M2;
        w[i] = (ipt_st_write){.name = t->name,
                              .dtype = b->dtype != IPT_ST_COUNT && is_float ? b->dtype : t->dtype,
                              .rank = t->rank};
        memcpy(w[i].dim, t->dim, sizeof w[i].dim);
    }
    if (s == IPT_OK) {
        json_object_foreach((json_t *)(uintptr_t)old, key, v) if (strcmp(key, "impasto_baked") != 0)
            meta[n_meta++] = (ipt_st_meta){key, json_string_value(v)};
        meta[n_meta++] = (ipt_st_meta){"impasto_baked", json_string_value(b->note)};
        b->st = st;
        b->write = w;
        s = ipt_safetensors_write_each(b->t->ctx, path, w, n, meta, n_meta, fill, b);
    }
    ipt_free(w);
    ipt_free(meta);
    return s;
}

/* --- a folder --------------------------------------------------------------------------------- */
static ipt_status copy_file(ipt_ctx *ctx, const char *from, const char *to)
{
    enum { BLOCK = 1 << 20 };
    int fd = -1;
    uint64_t size = 0;
    ipt_file_out *f = NULL;
    IPT_TRY(ipt_file_open(ctx, from, "a model's file", &fd, &size));
    char *block = ipt_alloc(ctx, BLOCK);
    ipt_status s = block ? ipt_file_create(ctx, to, &f) : IPT_ERR_NOMEM, closed;
    for (uint64_t at = 0; s == IPT_OK && at < size; at += BLOCK) {
        size_t n = size - at < BLOCK ? (size_t)(size - at) : BLOCK;
        s = ipt_cancelled(ctx) ? ipt_fail(ctx, IPT_ERR_CANCELLED, "cancelled")
                               : ipt_file_read_at(ctx, fd, from, at, n, block);
        if (s == IPT_OK)
            s = ipt_file_append(f, block, n);
    }
    if (f) {
        closed = ipt_file_close(&f, s == IPT_OK);
        s = s != IPT_OK ? s : closed;
    }
    ipt_free(block);
    close(fd);
    return s;
}

static bool has_ending(const char *s, const char *end)
{
    size_t n = strlen(s), k = strlen(end);
    return n > k && strcmp(s + n - k, end) == 0;
}

/* Weights in a form or variant that was not read; the lists of shards go with their shards. */
static bool is_other_weights(const char *name, bool sharded)
{
    static const char *const endings[] = {".safetensors", ".bin",  ".pt", ".ckpt", ".pth",
                                          ".msgpack",     ".onnx", ".pb", ".h5"};
    for (size_t i = 0; i < IPT_COUNT(endings); i++)
        if (has_ending(name, endings[i]))
            return true;
    return strstr(name, ".bin.index.") || (!sharded && strstr(name, ".safetensors.index."));
}

/* The model's open file of that path, NULL: none. */
static const ipt_safetensors *file_at(const baking *b, const char *path, int comp)
{
    const ipt_source *src = ipt_model_source(b->m, comp);
    for (size_t i = 0; i < ipt_model_n_files(b->m, comp); i++)
        if (strcmp(ipt_safetensors_path(src->file[i]), path) == 0)
            return src->file[i];
    return NULL;
}

static ipt_status bake_entry(baking *b, const char *from, const char *to, const char *name,
                             int comp)
{
    const ipt_safetensors *st = comp >= 0 ? file_at(b, from, comp) : NULL;
    if (st)
        return bake_file(b, st, to);
    if (comp >= 0 && is_other_weights(name, ipt_model_n_files(b->m, comp) > 1))
        return IPT_OK;
    return copy_file(b->t->ctx, from, to);
}

static int component_of(const baking *b, const char *folder)
{
    for (int comp = 0; comp < IPT_COMP_COUNT; comp++)
        if (strcmp(folder, ipt_comp_name(comp)) == 0 && ipt_model_n_files(b->m, comp) > 0)
            return comp;
    return -1;
}

/* The regular files of a folder; its folders too where `below` is true.  Names with a dot in front
 * are other programs' business. */
static ipt_status bake_folder(baking *b, const char *from, const char *to, int comp, bool below)
{
    char src[IPT_DIR_MAX], dst[IPT_DIR_MAX];
    ipt_status s = IPT_OK;
    DIR *d = opendir(from);
    if (!d)
        return ipt_fail(b->t->ctx, IPT_ERR_IO, "%s: cannot read this folder", from);
    for (struct dirent *e = readdir(d); e && s == IPT_OK; e = readdir(d)) {
        if (e->d_name[0] == '.')
            continue;
        if (!ipt_path_join(src, sizeof src, from, e->d_name) ||
            !ipt_path_join(dst, sizeof dst, to, e->d_name))
            s = ipt_fail(b->t->ctx, IPT_ERR_OUTPUT, "%.200s: cannot write: path too long", from);
        else if (ipt_is_file(src))
            s = bake_entry(b, src, dst, e->d_name, comp);
        else if (below && ipt_is_dir(src) && mkdir(dst, 0777) == 0)
            s = bake_folder(b, src, dst, component_of(b, e->d_name), false);
        else if (below && ipt_is_dir(src))
            s = ipt_fail(b->t->ctx, IPT_ERR_OUTPUT, "%s: cannot write: no folder can be made", dst);
    }
    closedir(d);
    return s;
}

static ipt_status bake_model(baking *b, const char *path)
{
    const char *from = ipt_model_path(b->m);
    char tmp[IPT_DIR_MAX];
    if (!ipt_is_dir(from))
        return bake_file(b, ipt_model_source(b->m, IPT_COMP_UNET)->file[0], path);
    IPT_TRY(ipt_dir_begin(b->t->ctx, path, tmp));
    ipt_status s = bake_folder(b, from, tmp, -1, true);
    if (s == IPT_OK)
        s = ipt_dir_commit(b->t->ctx, tmp, path);
    if (s != IPT_OK)
        ipt_dir_abort(tmp);
    return s;
}

/* "style.safetensors:0.8, ..." */
static json_t *note_of(const ipt_merge_input *in, size_t n)
{
    char text[2048] = "";
    size_t at = 0;
    for (size_t f = 0; f < n && at < sizeof text; f++) {
        int len = snprintf(text + at, sizeof text - at, "%s%.100s:%g", f ? ", " : "",
                           in[f].file->name, in[f].weight);
        at += len > 0 ? (size_t)len : 0;
    }
    return ipt_json_text(text);
}

ipt_status ipt_model_bake(ipt_tool *t, ipt_model *m, const ipt_merge_input *in, size_t n,
                          const ipt_bake_opts *o, const char *path)
{
    baking b = {.t = t, .m = m, .dtype = o->dtype, .note = note_of(in, n)};
    ipt_status s = b.note ? IPT_OK : ipt_fail(t->ctx, IPT_ERR_NOMEM, "no memory for metadata");
    bool single = !ipt_is_dir(ipt_model_path(m));
    for (int comp = 0; comp < IPT_COMP_COUNT; comp++)
        for (size_t i = 0; i < ipt_model_n_files(m, comp) && (!single || comp == IPT_COMP_UNET);
             i++)
            b.total += ipt_safetensors_count(ipt_model_source(m, comp)->file[i]);
    if (s == IPT_OK)
        s = find_all(&b, in, n);
    if (s == IPT_OK)
        s = bake_model(&b, path);
    ipt_free(b.touch);
    json_decref(b.note);
    return s;
}
