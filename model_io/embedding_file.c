/* model_io/embedding_file.c - textual inversion: vectors that stand for a word. */
#include "model_io/internal.h"

#include <math.h>
#include <string.h>

enum { MAX_VECTORS = 1024 };

static ipt_status take(ipt_ctx *ctx, const ipt_safetensors *st, const ipt_st_tensor *t, int which,
                       ipt_embedding_file *e)
{
    const char *path = ipt_safetensors_path(st);
    char found[128];
    size_t bad = 0;
    ipt_st_shape_text(t, found, sizeof found);
    bool flat = t->rank == 1;
    if (t->rank < 1 || t->rank > 2 || t->count == 0 || (!flat && t->dim[0] > MAX_VECTORS) ||
        t->dim[t->rank - 1] > 1 << 16)
        return ipt_fail(ctx, IPT_ERR_SHAPE,
                        "%s: key '%s': found shape %s, expected [vectors,width] of an embedding",
                        path, t->name, found);
    int32_t n = flat ? 1 : (int32_t)t->dim[0];
    if (e->n_vector != 0 && e->n_vector != n)
        return ipt_fail(ctx, IPT_ERR_SHAPE, "%s: key '%s': found shape %s, expected %d vectors",
                        path, t->name, found, (int)e->n_vector);
    IPT_TRY(ipt_st_load(t));
    if (!ipt_st_finite(t, &bad))
        return ipt_fail(ctx, IPT_ERR_FORMAT,
                        "%s: key '%s': element %zu is %s, expected finite numbers", path, t->name,
                        bad, isnan(ipt_st_get(t, bad)) ? "NaN" : "infinite");
    e->n_vector = n;
    e->width[which] = (int32_t)t->dim[t->rank - 1];
    e->vector[which] = ipt_calloc(ctx, t->count, sizeof(float));
    if (!e->vector[which])
        return IPT_ERR_NOMEM;
    ipt_st_to_f32(t, 0, t->count, e->vector[which]);
    return IPT_OK;
}

static ipt_status read_vectors(ipt_ctx *ctx, const ipt_safetensors *st, ipt_embedding_file *e)
{
    static const struct {
        const char *key;
        int which;
    } keys[] = {{"emb_params", 0}, {"clip_l", 0}, {"clip_g", 1}};
    for (size_t i = 0; i < IPT_COUNT(keys); i++) {
        const ipt_st_tensor *t = ipt_safetensors_find(st, keys[i].key);
        if (t && !e->vector[keys[i].which])
            IPT_TRY(take(ctx, st, t, keys[i].which, e));
    }
    if (e->n_vector == 0 && ipt_safetensors_count(st) == 1)
        IPT_TRY(take(ctx, st, ipt_safetensors_at(st, 0), 0, e));
    if (e->n_vector > 0)
        return IPT_OK;
    return ipt_fail(
        ctx, IPT_ERR_FORMAT,
        "%s: no embedding in this file: 'emb_params', 'clip_l' or a single tensor expected "
        "among %zu",
        ipt_safetensors_path(st), ipt_safetensors_count(st));
}

ipt_status ipt_embedding_open(ipt_ctx *ctx, const char *path, ipt_embedding_file *out)
{
    ipt_embedding_file e = {0};
    ipt_safetensors *st = NULL;
    const char *slash = strrchr(path, '/'), *base = slash ? slash + 1 : path;
    IPT_TRY(ipt_safetensors_open(ctx, path, &st));
    ipt_status status = read_vectors(ctx, st, &e);
    ipt_safetensors_close(&st);
    if (status == IPT_OK) {
        e.name = ipt_strdup(ctx, base);
        status = e.name ? IPT_OK : IPT_ERR_NOMEM;
    }
    if (status != IPT_OK) {
        ipt_embedding_close(&e);
        return status;
    }
    char *dot = strrchr(e.name, '.');
    if (dot && dot > e.name)
        *dot = '\0';
    *out = e;
    return IPT_OK;
}

void ipt_embedding_close(ipt_embedding_file *e)
{
    ipt_free(e->name);
    ipt_free(e->vector[0]);
    ipt_free(e->vector[1]);
    *e = (ipt_embedding_file){0};
}
