/* engine/describe.c - what a model, an adapter file or a text is, as JSON, without a device. */
#include "engine/impasto.h"

#include <jansson.h>
#include <math.h>
#include <string.h>

#include "engine/internal.h"
#include "engine/lora_fit.h"
#include "model_io/adapter_tools.h"
#include "text_encoder/tokenizer.h"

/* Prints the object and takes it. */
static ipt_status print_json(ipt_ctx *ctx, json_t *o, char **json)
{
    char *text = o ? json_dumps(o, JSON_REAL_PRECISION(9)) : NULL;
    json_decref(o);
    *json = text ? ipt_strdup(ctx, text) : NULL;
    if (text) {
        json_free_t release;
        json_get_alloc_funcs(NULL, &release);
        release(text);
    }
    return *json ? IPT_OK : ipt_fail(ctx, IPT_ERR_NOMEM, "no memory for a description");
}

static const char *arch_name(ipt_arch a)
{
    static const char *const names[] = {"unknown", "sd1", "sd2", "sdxl"};
    return (size_t)a < IPT_COUNT(names) ? names[a] : "unknown";
}

static const char *prediction_name(ipt_prediction p)
{
    static const char *const names[] = {"epsilon", "v_prediction", "sample"};
    return (size_t)p < IPT_COUNT(names) ? names[p] : "unknown";
}

/* --- models
 * ------------------------------------------------------------------------------------------ */
static json_t *int_list(const int32_t *v, int32_t n)
{
    json_t *a = json_array();
    for (int32_t i = 0; i < n; i++)
        json_array_append_new(a, json_integer(v[i]));
    return a;
}

static json_t *unet_json(const ipt_unet_config *c)
{
    return json_pack("{s:i, s:i, s:o, s:o, s:o, s:o, s:o, s:i, s:b, s:i, s:i, s:i}", "in_channels",
                     (int)c->in_channels, "out_channels", (int)c->out_channels,
                     "block_out_channels", int_list(c->channels, c->n_level), "layers_per_block",
                     int_list(c->n_layer, c->n_level), "heads", int_list(c->heads, c->n_level),
                     "transformer_layers", int_list(c->depth, c->n_level), "cross_attention_dim",
                     int_list(c->cross_dim, c->n_level), "norm_groups", (int)c->norm_groups,
                     "linear_projection", c->linear_projection, "sample_size", (int)c->sample_size,
                     "time_cond_dim", (int)c->time_cond_dim, "add_in_dim", (int)c->add_in_dim);
}

static json_t *vae_json(const ipt_vae_config *c)
{
    return json_pack("{s:b, s:i, s:o, s:i, s:i, s:f, s:b}", "tiny", c->tiny, "latent_channels",
                     (int)c->latent_channels, "block_out_channels",
                     int_list(c->channels, c->n_level), "layers_per_block", (int)c->n_layer,
                     "norm_groups", (int)c->norm_groups, "scaling_factor",
                     (double)c->scaling_factor, "force_upcast", c->force_upcast);
}

static json_t *text_json(const ipt_text_config *c)
{
    static const char *const acts[] = {"silu", "gelu", "quick_gelu", "relu"};
    return json_pack("{s:i, s:i, s:i, s:i, s:i, s:s, s:i}", "vocab", (int)c->vocab, "width",
                     (int)c->width, "layers", (int)c->n_layer, "heads", (int)c->heads, "max_tokens",
                     (int)c->max_tokens, "act", acts[c->act & 3], "projection_dim",
                     c->has_projection ? (int)c->projection_dim : 0);
}

static json_t *component_config(const ipt_model_config *c, int comp)
{
    return comp == IPT_COMP_UNET   ? unet_json(&c->unet)
           : comp == IPT_COMP_VAE  ? vae_json(&c->vae)
           : comp == IPT_COMP_TEXT ? text_json(&c->text)
                                   : text_json(&c->text2);
}

static json_t *names_json(const char *const *names, size_t n)
{
    json_t *a = json_array();
    for (size_t i = 0; i < n; i++)
        json_array_append_new(a, ipt_json_text(names[i]));
    return a;
}

static json_t *misshaped_json(const ipt_check *k)
{
    json_t *a = json_array();
    for (size_t i = 0; i < k->n_misshaped; i++) {
        const ipt_misshaped *m = &k->misshaped[i];
        json_t *o = json_object();
        json_object_set_new(o, "name", ipt_json_text(m->name));
        json_object_set_new(o, "key", ipt_json_text(m->key));
        json_object_set_new(o, "file", ipt_json_text(m->file));
        json_object_set_new(o, "found", ipt_json_text(m->found));
        json_object_set_new(o, "expected", ipt_json_text(m->expected));
        json_array_append_new(a, o);
    }
    return a;
}

static ipt_status component_json(ipt_ctx *ctx, const ipt_model *m, int comp, json_t **out)
{
    const ipt_model_config *c = ipt_model_get_config(m);
    ipt_want_list wants = {0};
    ipt_check check = {0};
    uint64_t values = 0;
    IPT_TRY(ipt_wants_create(ctx, c, comp, &wants));
    for (size_t i = 0; i < wants.n; i++)
        values += ipt_shape_count(&wants.want[i].shape);
    ipt_status s = ipt_model_check(m, comp, wants.want, wants.n, &check);
    ipt_wants_finish(&wants);
    IPT_TRY(s);
    json_t *o = json_object(), *files = json_array();
    for (size_t i = 0; i < ipt_model_n_files(m, comp); i++)
        json_array_append_new(files, ipt_json_text(ipt_model_file(m, comp, i)));
    json_object_set_new(o, "files", files);
    json_object_set_new(o, "dtype", ipt_json_text(ipt_model_dtype(m, comp)));
    json_object_set_new(o, "parameters", json_integer((json_int_t)values));
    json_object_set_new(o, "bound", json_integer((json_int_t)check.n_bound));
    json_object_set_new(o, "missing", names_json(check.missing, check.n_missing));
    json_object_set_new(o, "unclaimed", names_json(check.unclaimed, check.n_unclaimed));
    json_object_set_new(o, "misshaped", misshaped_json(&check));
    json_object_set_new(o, "config", component_config(c, comp));
    ipt_check_finish(&check);
    *out = o;
    return IPT_OK;
}

ipt_status ipt_model_describe(ipt_ctx *ctx, const char *model, const char *config_dir, char **json)
{
    ipt_model *m = NULL;
    ipt_status status = IPT_OK;
    IPT_TRY(ipt_open_model(ctx, model, config_dir, &m));
    const ipt_model_config *c = ipt_model_get_config(m);
    int32_t factor = 1 << ((c->has[IPT_COMP_VAE] && c->vae.n_level > 0 ? c->vae.n_level : 4) - 1);
    json_t *o = json_object(), *parts = json_object();
    json_object_set_new(o, "path", ipt_json_text(ipt_model_path(m)));
    json_object_set_new(o, "layout", ipt_json_text(ipt_model_layout(m)));
    json_object_set_new(o, "architecture", json_string(arch_name(c->arch)));
    json_object_set_new(o, "prediction", json_string(prediction_name(c->prediction)));
    json_object_set_new(o, "prediction_assumed", json_boolean(c->prediction_assumed));
    json_object_set_new(o, "inpainting", json_boolean(c->unet.in_channels == 9));
    json_object_set_new(o, "zero_snr", json_boolean(c->zero_snr));
    json_object_set_new(o, "width", json_integer(c->unet.sample_size * factor));
    json_object_set_new(o, "height", json_integer(c->unet.sample_size * factor));
    for (int comp = 0; comp < IPT_COMP_COUNT; comp++) {
        json_t *part = NULL;
        if (!c->has[comp])
            continue;
        IPT_TRY_GOTO(component_json(ctx, m, comp, &part), fail);
        json_object_set_new(parts, ipt_comp_name(comp), part);
    }
    json_object_set(o, "components", parts);
    if (ipt_model_scheduler(m))
        json_object_set_new(o, "scheduler", json_deep_copy(ipt_model_scheduler(m)));
    json_decref(parts);
    ipt_model_close(&m);
    return print_json(ctx, o, json);
fail:
    json_decref(parts);
    json_decref(o);
    ipt_model_close(&m);
    return status;
}

/* --- adapters
 * ----------------------------------------------------------------------------------------- */
static json_t *modules_json(const ipt_lora_fit *f, double *alpha_min, double *alpha_max,
                            size_t *by_comp)
{
    json_t *a = json_array();
    for (size_t i = 0; i < f->file->n_module; i++) {
        const ipt_adapter_module *m = &f->file->module[i];
        const ipt_module *t = &f->modules.module[m->module];
        double alpha = (double)m->alpha;
        if (i == 0 || alpha < *alpha_min)
            *alpha_min = alpha;
        if (i == 0 || alpha > *alpha_max)
            *alpha_max = alpha;
        by_comp[t->comp]++;
        json_array_append_new(a, json_pack("{s:s, s:s, s:s, s:i, s:f, s:f, s:i, s:i}", "component",
                                           ipt_comp_name(t->comp), "name", t->name, "kind",
                                           t->is_norm               ? "norm"
                                           : m->kh > 1 || m->kw > 1 ? "conv"
                                                                    : "linear",
                                           "rank", (int)m->rank, "alpha", alpha, "scale", m->scale,
                                           "out", (int)m->out, "in", (int)m->in));
    }
    return a;
}

/* Keys that fit nothing, counted by how they begin. */
static json_t *groups_json(const ipt_adapter_file *a)
{
    json_t *list = json_array();
    for (size_t i = 0; i < a->n_group; i++) {
        json_t *o = json_object();
        json_object_set_new(o, "name", ipt_json_text(a->group[i].name));
        json_object_set_new(o, "first", ipt_json_text(a->group[i].first));
        json_object_set_new(o, "keys", json_integer((json_int_t)a->group[i].n));
        json_array_append_new(list, o);
    }
    return list;
}

/* A word and how many vectors it has for which text encoder; whether the model can use them. */
static json_t *embedding_json(const ipt_adapter_embedding *e, const int32_t *width)
{
    static const char *const names[] = {"text_encoder", "text_encoder_2"};
    json_t *o = json_object();
    bool is_usable = false, fits = true;
    int64_t n = 0;
    json_object_set_new(o, "word", ipt_json_text(e->word));
    for (size_t i = 0; i < IPT_COUNT(names); i++) {
        const ipt_st_tensor *t = e->vector[i];
        if (t)
            json_object_set_new(o, names[i],
                                json_integer((json_int_t)(t->rank == 2 ? t->dim[0] : 1)));
        if (!t || width[i] == 0)
            continue;
        is_usable = true;
        fits = fits && ipt_word_fits(t, width[i], (int32_t)n, &n) && ipt_st_load(t) == IPT_OK &&
               ipt_st_finite(t, NULL);
    }
    json_object_set_new(o, "usable", json_boolean(is_usable && fits));
    return o;
}

/* The kind of its modules, "mixed" where they differ. */
static const char *algorithm(const ipt_adapter_file *a)
{
    const char *name = a->n_module ? ipt_adapter_kind_name(&a->module[0]) : "none";
    for (size_t i = 1; i < a->n_module; i++)
        if (strcmp(name, ipt_adapter_kind_name(&a->module[i])) != 0)
            return "mixed";
    return strcmp(name, "lora") == 0 && a->has_conv ? "locon" : name;
}

static const double FREE_ENERGY = 2e9; /* multiply-adds, a second or two */

/* The parts of the change's squared norm in the blocks of a component, in the order of the model.
 * null where it cannot be known (values that are no numbers, kinds that need the model) or is not
 * asked for and would take long. */
static ipt_status energy_json(const ipt_lora_fit *f, bool at_any_cost, json_t **out)
{
    double cost = 0;
    for (size_t i = 0; i < f->file->n_module; i++)
        cost += ipt_tool_norm2_cost(&f->file->module[i]);
    if (cost > FREE_ENERGY && !at_any_cost) {
        *out = json_null();
        return IPT_OK;
    }
    ipt_tool t = {.ctx = f->ctx, .module = f->modules.module, .n_module = f->modules.n};
    json_t *o = json_object();
    double total = 0;
    ipt_status s = ipt_tool_weights(f->model, &t);
    for (size_t i = 0; s == IPT_OK && f->file->n_bad == 0 && i < f->file->n_module; i++) {
        const ipt_adapter_module *a = &f->file->module[i];
        const ipt_module *m = &f->modules.module[a->module];
        double norm2 = 0;
        char block[64];
        s = ipt_cancelled(f->ctx) ? ipt_fail(f->ctx, IPT_ERR_CANCELLED, "cancelled")
                                  : ipt_tool_norm2(&t, a, &norm2);
        json_t *part = json_object_get(o, ipt_comp_name(m->comp));
        if (!part) {
            part = json_object();
            json_object_set_new(o, ipt_comp_name(m->comp), part);
        }
        ipt_lora_block(m, block, sizeof block);
        json_object_set_new(part, block, json_real(ipt_json_num(part, block, 0) + norm2));
        total += norm2;
    }
    ipt_tool_drop_weights(&t);
    if (s == IPT_ERR_MISSING || f->file->n_bad > 0) { /* no model, no energy */
        json_decref(o);
        *out = json_null();
        return IPT_OK;
    }
    json_object_set_new(o, "total", json_real(total));
    *out = o;
    return s;
}

static ipt_status lora_json(const ipt_lora_fit *f, bool at_any_cost, json_t **out)
{
    const ipt_adapter_file *a = f->file;
    double lo = 0, hi = 0;
    size_t by_comp[IPT_COMP_COUNT] = {0};
    const ipt_model_config *c = f->config;
    const int32_t width[2] = {c->has[IPT_COMP_TEXT] ? c->text.width : 0,
                              c->has[IPT_COMP_TEXT2] ? c->text2.width : 0};
    json_t *o = json_object(), *parts = json_object(), *words = names_json(a->word, a->n_word),
           *emb = json_array();
    json_t *modules = modules_json(f, &lo, &hi, by_comp);
    ipt_adapter_hash(f->file);
    for (size_t i = 0; i < a->n_embedding; i++)
        json_array_append_new(emb, embedding_json(&a->embedding[i], width));
    for (int comp = 0; comp < IPT_COMP_COUNT; comp++)
        if (by_comp[comp])
            json_object_set_new(parts, ipt_comp_name(comp),
                                json_integer((json_int_t)by_comp[comp]));
    json_object_set_new(o, "path", ipt_json_text(a->path));
    json_object_set_new(o, "name", ipt_json_text(a->name));
    json_object_set_new(o, "family", ipt_json_text(ipt_adapter_family_name(a->family)));
    json_object_set_new(o, "algorithm", json_string(algorithm(a)));
    json_object_set_new(o, "tucker", json_boolean(a->has_tucker));
    json_object_set_new(o, "model", ipt_json_text(f->name));
    json_object_set_new(o, "rank_min", json_integer(a->rank_min));
    json_object_set_new(o, "rank_max", json_integer(a->rank_max));
    json_object_set_new(o, "alpha_min", json_real(lo));
    json_object_set_new(o, "alpha_max", json_real(hi));
    json_object_set_new(o, "model_modules", json_integer((json_int_t)f->modules.n));
    json_object_set_new(o, "matched", json_integer((json_int_t)a->n_module));
    json_object_set_new(o, "unmatched", names_json(a->unmatched, a->n_unmatched));
    json_object_set_new(o, "harmless", json_integer((json_int_t)a->n_harmless));
    json_object_set_new(o, "keys", json_integer((json_int_t)a->n_key));
    json_object_set_new(o, "keys_applied",
                        json_integer((json_int_t)(a->n_key - a->n_unmatched - a->n_harmless)));
    json_object_set_new(o, "groups", groups_json(a));
    json_object_set_new(o, "made_for", ipt_json_text(a->made_for));
    json_object_set_new(o, "claims", ipt_json_text(a->claims));
    json_object_set_new(o, "nan", names_json(a->bad, a->n_bad)); /* keys of such tensors */
    json_object_set_new(o, "nan_values", json_integer((json_int_t)a->bad_values));
    json_object_set_new(o, "components", parts);
    json_object_set_new(o, "modules", modules);
    json_object_set_new(o, "embeddings", emb);
    json_object_set_new(o, "trigger_words", words);
    json_object_set_new(o, "sha256", ipt_json_text(a->sha256));
    json_object_set_new(o, "autov2", ipt_json_text(a->autov2));
    json_object_set_new(o, "autov3", ipt_json_text(a->autov3));
    json_object_set_new(o, "data_sha256", ipt_json_text(a->data_sha256));
    json_object_set_new(o, "metadata", a->metadata ? json_deep_copy(a->metadata) : json_object());
    json_t *energy = NULL;
    ipt_status s = energy_json(f, at_any_cost, &energy);
    json_object_set_new(o, "energy", energy);
    if (s == IPT_OK)
        *out = o;
    else
        json_decref(o);
    return s;
}

static ipt_status describe_lora(ipt_ctx *ctx, const char *lora, const char *model,
                                const char *config_dir, bool at_any_cost, char **json)
{
    ipt_lora_fit f = {0};
    json_t *o = NULL;
    IPT_TRY(ipt_lora_fit_open(ctx, lora, model, config_dir, &f));
    ipt_status s = lora_json(&f, at_any_cost, &o);
    if (s == IPT_OK)
        s = print_json(ctx, o, json);
    ipt_lora_fit_finish(&f);
    return s;
}

ipt_status ipt_lora_describe(ipt_ctx *ctx, const char *lora, const char *model,
                             const char *config_dir, char **json)
{
    return describe_lora(ctx, lora, model, config_dir, false, json);
}

ipt_status ipt_lora_describe_all(ipt_ctx *ctx, const char *lora, const char *model,
                                 const char *config_dir, char **json)
{
    return describe_lora(ctx, lora, model, config_dir, true, json);
}

/* --- texts ------------------------------------------------------------------------------------ */
static ipt_status line_json(ipt_ctx *ctx, const ipt_tokenizer *t, const char *text, json_t **out)
{
    ipt_token *token = NULL;
    size_t n = 0;
    IPT_TRY(ipt_tokenize(ctx, t, text, strlen(text), &token, &n));
    json_t *ids = json_array(), *pieces = json_array();
    for (size_t i = 0; i < n + 2; i++) {
        int32_t id = i == 0       ? ipt_tokenizer_bos(t)
                     : i == n + 1 ? ipt_tokenizer_eos(t)
                                  : token[i - 1].id;
        json_t *piece = json_string(ipt_tokenizer_piece(t, id));
        json_array_append_new(ids, json_integer(id));
        json_array_append_new(pieces, piece ? piece : json_string(""));
    }
    ipt_free(token);
    *out = json_pack("{s:o, s:o, s:I}", "ids", ids, "pieces", pieces, "count", (json_int_t)n + 2);
    return IPT_OK;
}

ipt_status ipt_tokenize_describe(ipt_ctx *ctx, const char *model, const char *const *text, size_t n,
                                 char **json)
{
    ipt_model *m = NULL;
    ipt_tokenizer *t = NULL;
    json_t *lines = json_array();
    ipt_status status = ipt_open_model(ctx, model, NULL, &m);
    if (status == IPT_OK)
        status = ipt_open_tokenizer(ctx, m, IPT_COMP_TEXT, &t);
    for (size_t i = 0; status == IPT_OK && i < n; i++) {
        json_t *line = NULL;
        status = line_json(ctx, t, text[i], &line);
        if (line)
            json_array_append_new(lines, line);
    }
    if (status == IPT_OK)
        status = print_json(ctx, json_pack("{s:O}", "lines", lines), json);
    json_decref(lines);
    ipt_tokenizer_destroy(&t);
    ipt_model_close(&m);
    return status;
}
