/* engine/text.c - prompts to embeddings: chunks through the text encoders, emphasis, textual
 * inversions, adapters in the text encoder as gates. */
#define _GNU_SOURCE /* strcasestr */
#include "engine/internal.h"

#include "text_encoder/text_encoder.h"

#include <dirent.h>
#include <string.h>

/* A textual inversion: one vector list per text encoder. */
typedef struct ipt_ti {
    const char *name;
    int32_t n, width[2];
    const float *vector[2]; /* [n,width] */
} ipt_ti;

enum { MAX_INVERSIONS = 64 };

static int n_encoders(const ipt_engine *e) { return e->m->config.has[IPT_COMP_TEXT2] ? 2 : 1; }

/* --- textual inversions ----------------------------------------------------------------------- */
/* Copies n vectors for one encoder when they fit it; false when out of memory. */
static bool keep_vectors(ipt_arena *arena, ipt_ti *ti, int encoder, const float *v, int32_t n,
                         int32_t width)
{
    float *copy = ipt_arena_alloc(arena, (size_t)n * (size_t)width * sizeof *copy);
    if (!copy)
        return false;
    memcpy(copy, v, (size_t)n * (size_t)width * sizeof *copy);
    ti->vector[encoder] = copy;
    ti->width[encoder] = width;
    ti->n = n;
    return true;
}

static int32_t width_of(const ipt_engine *e, int encoder)
{
    return encoder ? e->m->config.text2.width : e->m->config.text.width;
}

static ipt_status read_inversion(ipt_engine *e, ipt_prompts *p, const char *path)
{
    ipt_embedding_file f = {0};
    ipt_ti *ti = &p->embedding[p->n_embedding];
    IPT_TRY(ipt_embedding_open(e->ctx, path, &f));
    memset(ti, 0, sizeof *ti);
    ti->name = ipt_arena_strdup(&p->arena, f.name);
    ipt_status status = ti->name ? IPT_OK : IPT_ERR_NOMEM;
    for (int i = 0; status == IPT_OK && i < n_encoders(e); i++)
        if (f.vector[i] && f.width[i] == width_of(e, i) &&
            !keep_vectors(&p->arena, ti, i, f.vector[i], f.n_vector, f.width[i]))
            status = IPT_ERR_NOMEM;
    if (status == IPT_OK && !ti->vector[0] && !ti->vector[1])
        status = ipt_fail(e->ctx, IPT_ERR_SHAPE,
                          "%s: vectors of width %d, this model's text encoder has %d", path,
                          f.width[0] ? f.width[0] : f.width[1], width_of(e, 0));
    if (status == IPT_OK && ti->n > IPT_TOKEN_CONTENT)
        status = ipt_fail(e->ctx, IPT_ERR_SHAPE, "%s: %d vectors, expected at most %d", path, ti->n,
                          IPT_TOKEN_CONTENT);
    p->n_embedding += status == IPT_OK;
    ipt_embedding_close(&f);
    return status;
}

static bool is_mentioned(const ipt_request *r, const char *word)
{
    bool found = (r->prompt && strcasestr(r->prompt, word)) ||
                 (r->negative && strcasestr(r->negative, word));
    for (size_t i = 0; i < r->n_region && !found; i++) { /* behind the picture's name */
        const char *what = strchr(r->region[i], '@');
        found = what && strcasestr(what, word);
    }
    return found;
}

static ipt_status one_more(const ipt_engine *e, const ipt_prompts *p)
{
    return p->n_embedding < MAX_INVERSIONS
               ? IPT_OK
               : ipt_fail(e->ctx, IPT_ERR_ARG,
                          "the prompts name more than %d textual inversions; name fewer",
                          MAX_INVERSIONS);
}

bool ipt_word_fits(const ipt_st_tensor *t, int32_t width, int32_t n, int64_t *found)
{
    *found = t->rank == 2 ? t->dim[0] : 1;
    return (t->rank == 1 || t->rank == 2) && t->dim[t->rank - 1] == width && *found >= 1 &&
           *found <= IPT_TOKEN_CONTENT && (n == 0 || *found == n);
}

/* The vectors [n,width] or [width] of a word inside an adapter file, for one encoder. */
static ipt_status read_adapter_vectors(ipt_engine *e, ipt_prompts *p, const char *file,
                                       const ipt_st_tensor *t, int encoder, ipt_ti *ti)
{
    const ipt_text_config *c = encoder ? &e->m->config.text2 : &e->m->config.text;
    int64_t n = 0;
    char found[128];
    size_t bad = 0;
    ipt_st_shape_text(t, found, sizeof found);
    if (!ipt_word_fits(t, c->width, ti->n, &n))
        return ipt_fail(e->ctx, IPT_ERR_SHAPE,
                        "%s: key '%s': found shape %s, expected [1..%d,%d] for this model's %s",
                        file, t->name, found, ti->n > 0 ? ti->n : IPT_TOKEN_CONTENT, c->width,
                        ipt_comp_name(encoder ? IPT_COMP_TEXT2 : IPT_COMP_TEXT));
    IPT_TRY(ipt_st_load(t));
    if (!ipt_st_finite(t, &bad))
        return ipt_fail(e->ctx, IPT_ERR_FORMAT,
                        "%s: key '%s': element %zu is not finite, expected finite numbers", file,
                        t->name, bad);
    float *v = ipt_calloc(e->ctx, t->count, sizeof *v);
    if (!v)
        return IPT_ERR_NOMEM;
    ipt_st_to_f32(t, 0, t->count, v);
    bool kept = keep_vectors(&p->arena, ti, encoder, v, (int32_t)n, c->width);
    ipt_free(v);
    return kept ? IPT_OK : IPT_ERR_NOMEM;
}

/* A word inside an adapter file that a prompt names; vectors for an encoder that this model lacks
 * do not matter when there are some for the other. */
static ipt_status read_adapter_word(ipt_engine *e, ipt_prompts *p, const char *file,
                                    const ipt_adapter_embedding *a)
{
    ipt_ti *ti = &p->embedding[p->n_embedding];
    IPT_TRY(one_more(e, p));
    *ti = (ipt_ti){.name = a->word};
    for (int i = 0; i < n_encoders(e); i++)
        if (a->vector[i])
            IPT_TRY(read_adapter_vectors(e, p, file, a->vector[i], i, ti));
    if (ti->n == 0)
        return ipt_fail(e->ctx, IPT_ERR_SHAPE,
                        "%s: the word '%s' has vectors for a second text encoder only; this model "
                        "has one",
                        file, a->word);
    if (n_encoders(e) == 2 && !(ti->vector[0] && ti->vector[1]))
        ipt_log(
            e->ctx, IPT_LOG_WARN,
            "%s: the word '%s' has vectors for text encoder %d only; the other reads it as plain "
            "text",
            file, a->word, ti->vector[0] ? 1 : 2);
    p->n_embedding++;
    return IPT_OK;
}

/* Files that may be embeddings and are not read, named once a folder. */
typedef struct pickles {
    char names[256];
    size_t n;
} pickles;

static void note_pickle(pickles *k, const char *name, const char *ending)
{
    static const char *const endings[] = {".pt", ".bin", ".pth", ".ckpt"};
    for (size_t i = 0; i < IPT_COUNT(endings); i++)
        if (strcasecmp(ending, endings[i]) == 0) {
            size_t at = strlen(k->names);
            if (at + strlen(name) + 3 < sizeof k->names)
                ipt_name(k->names + at, sizeof k->names - at, "%s%s", k->n ? ", " : "", name);
            k->n++;
        }
}

static ipt_status read_folder(ipt_engine *e, const ipt_request *r, const char *folder,
                              ipt_prompts *p)
{
    ipt_status status = IPT_OK;
    pickles skipped = {.n = 0};
    DIR *dir = opendir(folder);
    if (!dir)
        return ipt_fail(e->ctx, IPT_ERR_IO, "%s: cannot open the embeddings folder", folder);
    for (struct dirent *entry; status == IPT_OK && (entry = readdir(dir)) != NULL;) {
        char name[256], path[IPT_MAX_PATH];
        ipt_name(name, sizeof name, "%s", entry->d_name);
        char *dot = strrchr(name, '.');
        if (!dot || dot == name)
            continue;
        note_pickle(&skipped, name, dot);
        if (strcmp(dot, ".safetensors") != 0)
            continue;
        *dot = 0;
        if (!is_mentioned(r, name))
            continue;
        ipt_name(path, sizeof path, "%s/%s", folder, entry->d_name);
        status = one_more(e, p);
        if (status == IPT_OK)
            status = ipt_trace_spares(e->ctx, r->trace, path);
        if (status == IPT_OK)
            status = read_inversion(e, p, path);
    }
    closedir(dir);
    if (skipped.n > 0)
        ipt_log(e->ctx, IPT_LOG_WARN,
                "%s: %zu files are pickles, which are not read (%s%s); convert embeddings to "
                ".safetensors",
                folder, skipped.n, skipped.names, strlen(skipped.names) > 200 ? ", ..." : "");
    return status;
}

/* Inversions that a prompt names: inside adapter files, then files of the embeddings folders. */
static ipt_status find_inversions(ipt_engine *e, const ipt_request *r, ipt_prompts *p)
{
    p->embedding = ipt_arena_alloc(&p->arena, (MAX_INVERSIONS + 1) * sizeof *p->embedding);
    if (!p->embedding)
        return IPT_ERR_NOMEM;
    for (size_t f = 0; f < ipt_engine_n_file(e); f++)
        for (size_t i = 0; i < e->set->file[f]->n_embedding; i++)
            if (is_mentioned(r, e->set->file[f]->embedding[i].word))
                IPT_TRY(read_adapter_word(e, p, e->set->key[f], &e->set->file[f]->embedding[i]));
    for (size_t d = 0; d < r->n_embedding_dirs; d++)
        IPT_TRY(read_folder(e, r, r->embedding_dirs[d], p));
    return IPT_OK;
}

/* --- prompts ---------------------------------------------------------------------------------- */
/* What a text is for the encoders: one that is not given is empty. */
static const char *given(const char *text) { return text ? text : ""; }

static ipt_status read_texts(ipt_engine *e, const ipt_prompt_attr *attr, ipt_prompts *out)
{
    const ipt_texts *t = out->texts;
    for (size_t i = 0; i < t->n; i++)
        for (int k = 0; k < n_encoders(e); k++) {
            const char *text = given(t->text[i]);
            IPT_TRY(ipt_prompt_create(e->ctx, e->m->tokenizer[k], text, strlen(text), attr,
                                      &out->prompt[i][k]));
            if (out->prompt[i][k]->n_chunk > out->n_chunk)
                out->n_chunk = out->prompt[i][k]->n_chunk;
        }
    for (size_t i = 0; i < t->n; i++)
        for (int k = 0; k < n_encoders(e); k++)
            IPT_TRY(ipt_prompt_extend(e->ctx, e->m->tokenizer[k], out->prompt[i][k], out->n_chunk));
    return IPT_OK;
}

static ipt_status read_prompts(ipt_engine *e, const ipt_request *r, ipt_prompts *out)
{
    IPT_TRY(find_inversions(e, r, out));
    out->prompt = ipt_arena_alloc(&out->arena, (out->texts->n + 1) * sizeof *out->prompt);
    ipt_prompt_embedding *names =
        ipt_arena_alloc(&out->arena, (out->n_embedding + 1) * sizeof *names);
    if (!names || !out->prompt)
        return IPT_ERR_NOMEM;
    for (size_t i = 0; i < out->n_embedding; i++)
        names[i] = (ipt_prompt_embedding){out->embedding[i].name, out->embedding[i].n};
    const ipt_prompt_attr attr = {
        .embeddings = names, .n_embeddings = (int32_t)out->n_embedding, .has_no_tags = true};
    return read_texts(e, &attr, out);
}

ipt_status ipt_prompts_read(ipt_engine *e, const ipt_request *r, const ipt_texts *texts,
                            ipt_prompts *out)
{
    ipt_prompts p = {.texts = texts};
    ipt_arena_init(&p.arena, e->ctx);
    ipt_status status = read_prompts(e, r, &p);
    if (status == IPT_OK)
        *out = p;
    else
        ipt_prompts_finish(&p);
    return status;
}

void ipt_prompts_finish(ipt_prompts *p)
{
    for (size_t i = 0; p->prompt && i < p->texts->n; i++)
        for (int k = 0; k < 2; k++)
            ipt_prompt_destroy(&p->prompt[i][k]);
    ipt_arena_finish(&p->arena);
}

/* --- the encoder's plan ----------------------------------------------------------------------- */
static ipt_text_key text_key(const ipt_engine *e, const ipt_request *r, int encoder, bool injected)
{
    bool sdxl = n_encoders(e) == 2;
    int32_t extra = r->clip_skip > 1 ? r->clip_skip - 1 : 0;
    const ipt_text_config *c = encoder ? &e->m->config.text2 : &e->m->config.text;
    return (ipt_text_key){
        .batch = 1,
        .tokens = c->max_tokens,
        .skip = sdxl && extra < 1 ? 1 : extra, /* SDXL is trained on the layer before the last */
        .final_norm = !sdxl,
        .pooled = sdxl && encoder == 1,
        .injected = injected,
        .act = e->m->act_type};
}

static ipt_status get_plan(ipt_engine *e, const ipt_text_key *text, int encoder, ipt_plan **out)
{
    const ipt_text_config *c = encoder ? &e->m->config.text2 : &e->m->config.text;
    const ipt_plan_key key = {
        .kind = encoder ? IPT_PLAN_TEXT2 : IPT_PLAN_TEXT, .model = e->m->id, .text = *text};
    if (text->skip >= c->n_layer)
        return ipt_fail(e->ctx, IPT_ERR_ARG, "clip skip leaves no layer: the text encoder has %d",
                        c->n_layer);
    return ipt_plan_get(e, &key, 0, out);
}

/* Inputs "keep" and "extra" of one chunk. */
static ipt_status write_injected(ipt_engine *e, const ipt_prompts *p, const ipt_prompt *pr,
                                 int chunk, int encoder, int32_t width, ipt_plan *plan)
{
    size_t n = IPT_TOKEN_WINDOW, w = (size_t)width;
    float keep[IPT_TOKEN_WINDOW];
    float *extra = ipt_calloc(e->ctx, n * w, sizeof *extra);
    if (!extra)
        return IPT_ERR_NOMEM;
    for (size_t i = 0; i < n; i++)
        keep[i] = 1.0F;
    for (size_t s = 0; s < pr->n_span; s++) {
        const ipt_prompt_span *span = &pr->spans[s];
        const ipt_ti *ti = &p->embedding[span->index];
        if (span->chunk != chunk)
            continue;
        for (int32_t k = 0; k < span->n; k++) {
            keep[span->pos + k] = 0.0F;
            if (ti->vector[encoder] && ti->width[encoder] == width)
                memcpy(extra + (size_t)(span->pos + k) * w, ti->vector[encoder] + (size_t)k * w,
                       w * sizeof *extra);
        }
    }
    ipt_status status = ipt_plan_write(plan, "keep", keep, sizeof keep);
    if (status == IPT_OK)
        status = ipt_plan_write(plan, "extra", extra, n * w * sizeof *extra);
    ipt_free(extra);
    return status;
}

/* One encoder over all chunks: its columns of out->text. */
static ipt_status encode_with(ipt_engine *e, const ipt_request *r, const ipt_prompts *p,
                              size_t which, int encoder, const float *gates, int32_t column,
                              ipt_encoded *out)
{
    const ipt_prompt *pr = p->prompt[which][encoder];
    const ipt_text_config *c = encoder ? &e->m->config.text2 : &e->m->config.text;
    ipt_text_key key = text_key(e, r, encoder, pr->n_span > 0);
    ipt_plan *plan = NULL;
    if (c->max_tokens != IPT_TOKEN_WINDOW)
        return ipt_fail(e->ctx, IPT_ERR_UNSUPPORTED, "text encoder with %d positions, expected %d",
                        c->max_tokens, IPT_TOKEN_WINDOW);
    IPT_TRY(get_plan(e, &key, encoder, &plan));
    size_t w = (size_t)c->width, n = IPT_TOKEN_WINDOW;
    float *z = ipt_calloc(e->ctx, n * w, sizeof *z);
    if (!z)
        return IPT_ERR_NOMEM;
    ipt_status status = IPT_OK;
    if (ipt_plan_has(plan, "gates")) /* not when every adapted layer is skipped */
        IPT_TRY_GOTO(ipt_plan_write(plan, "gates", gates,
                                    ipt_bank_n_slot(ipt_engine_bank(e)) * sizeof *gates),
                     done);
    for (int chunk = 0; chunk < pr->n_chunk; chunk++) {
        const int32_t *ids = pr->ids + (size_t)chunk * n;
        int32_t eos = ipt_text_eos(c, ids, (int32_t)n);
        for (size_t i = 0; i < n; i++)
            if (ids[i] >= c->vocab) {
                status = ipt_fail(
                    e->ctx, IPT_ERR_SHAPE,
                    "%s: the tokenizer gives id %d, the text encoder has %d words; --config-dir "
                    "names a folder with the right tokenizer",
                    ipt_model_path(e->m->model), ids[i], c->vocab);
                goto done;
            }
        IPT_TRY_GOTO(ipt_plan_write(plan, "ids", ids, n * sizeof *ids), done);
        if (key.pooled)
            IPT_TRY_GOTO(ipt_plan_write(plan, "eos", &eos, sizeof eos), done);
        if (key.injected)
            IPT_TRY_GOTO(write_injected(e, p, pr, chunk, encoder, c->width, plan), done);
        IPT_TRY_GOTO(ipt_plan_run(plan, 0), done);
        IPT_TRY_GOTO(ipt_plan_read(plan, "text", z, n * w * sizeof *z), done);
        bool weighted = false;
        for (size_t i = 0; i < n; i++)
            weighted = weighted || pr->weights[(size_t)chunk * n + i] < 1.0F ||
                       pr->weights[(size_t)chunk * n + i] > 1.0F;
        if (weighted)
            ipt_prompt_apply_weights(z, pr->weights + (size_t)chunk * n, n, w);
        for (size_t i = 0; i < n; i++)
            memcpy(out->text + ((size_t)chunk * n + i) * (size_t)out->width + column, z + i * w,
                   w * sizeof *z);
        if (key.pooled && chunk == 0)
            IPT_TRY_GOTO(ipt_plan_read(plan, "pooled", out->pooled,
                                       (size_t)out->pooled_width * sizeof(float)),
                         done);
    }
done:
    ipt_free(z);
    return status;
}

ipt_status ipt_encode(ipt_engine *e, const ipt_request *r, const ipt_prompts *p, size_t which,
                      const float *gates, ipt_arena *arena, ipt_encoded *out)
{
    const ipt_model_config *c = &e->m->config;
    memset(out, 0, sizeof *out);
    out->tokens = p->n_chunk * IPT_TOKEN_WINDOW;
    out->width = c->text.width + (n_encoders(e) == 2 ? c->text2.width : 0);
    out->pooled_width = n_encoders(e) == 2
                            ? (c->text2.has_projection ? c->text2.projection_dim : c->text2.width)
                            : 0;
    out->text = ipt_arena_alloc(arena, (size_t)out->tokens * (size_t)out->width * sizeof(float));
    out->pooled = ipt_arena_alloc(arena, (size_t)(out->pooled_width + 1) * sizeof(float));
    if (!out->text || !out->pooled)
        return IPT_ERR_NOMEM;
    for (int k = 0; k < n_encoders(e); k++) {
        out->ids[k] = ipt_arena_alloc(arena, (size_t)out->tokens * sizeof(int32_t));
        if (!out->ids[k])
            return IPT_ERR_NOMEM;
        memcpy(out->ids[k], p->prompt[which][k]->ids, (size_t)out->tokens * sizeof(int32_t));
    }
    if (out->width != c->unet.cross_dim[0])
        return ipt_fail(e->ctx, IPT_ERR_SHAPE,
                        "the text encoder gives %d values per token, the unet takes %d", out->width,
                        c->unet.cross_dim[0]);
    if (!p->texts->text[which] && c->zero_empty_negative)
        return IPT_OK; /* zeros, as the pipeline was trained */
    IPT_TRY(encode_with(e, r, p, which, 0, gates, 0, out));
    return n_encoders(e) == 2 ? encode_with(e, r, p, which, 1, gates, c->text.width, out) : IPT_OK;
}
