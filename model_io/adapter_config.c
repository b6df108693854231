/* model_io/adapter_config.c - the settings that PEFT and diffusers write beside the factors: alpha,
 * rank-stabilised scaling, patterns of names with an alpha of their own.
 *
 * The rank of a module is its factors' shape, so rank_pattern is not needed; r only where LoKr has
 * no factors but two whole matrices, which PEFT scales all the same. Sources: peft LoraConfig,
 * LoraModel._create_and_replace; diffusers lora_base.py (lora_adapter_metadata). */
#include "model_io/adapter.h"

#include <jansson.h>
#include <limits.h>
#include <math.h>
#include <string.h>

enum { PEFT_ALPHA = 8 }; /* the default of LoraConfig, LoHaConfig and LoKrConfig, and their r */

ipt_status ipt_adapter_read_metadata(ipt_adapter_file *f)
{
    const char *text = ipt_safetensors_meta(f->impl->st, "lora_adapter_metadata");
    char what[PATH_MAX + 64];
    if (f->impl->config || !text)
        return IPT_OK;
    f->impl->config_is_flat = true;
    f->impl->config_name = "metadata 'lora_adapter_metadata'";
    snprintf(what, sizeof what, "%s: %s", f->path, f->impl->config_name);
    return ipt_json_parse(f->impl->ctx, what, text, strlen(text), &f->impl->config);
}

/* Begins with a component's name and a dot; comp < 0: any component's. */
static bool has_prefix(const char *key, int comp)
{
    for (int c = 0; c < IPT_COMP_COUNT; c++) {
        size_t n = strlen(ipt_comp_name(c));
        if ((comp < 0 || comp == c) && strncmp(key, ipt_comp_name(c), n) == 0 && key[n] == '.')
            return true;
    }
    return false;
}

/* A pipeline's metadata names the component in front of every key; that of a single model
 * (save_lora_adapter) and adapter_config.json do not. */
static bool names_components(const ipt_adapter_file *f)
{
    const char *key;
    json_t *v;
    if (!f->impl->config_is_flat)
        return false;
    json_object_foreach(f->impl->config, key, v) if (has_prefix(key, -1)) return true;
    return false;
}

static json_t *setting(const ipt_adapter_file *f, int comp, bool prefixed, const char *key)
{
    char full[128];
    ipt_name(full, sizeof full, "%s%s%s", prefixed ? ipt_comp_name(comp) : "", prefixed ? "." : "",
             key);
    return json_object_get(f->impl->config, full);
}

const char *ipt_adapter_peft_type(const ipt_adapter_file *f, int comp)
{
    return json_string_value(setting(f, comp, names_components(f), "peft_type"));
}

static ipt_status bad_setting(const ipt_adapter_file *f, const char *key, const json_t *found,
                              const char *expected)
{
    char *text = json_dumps(found, JSON_ENCODE_ANY);
    ipt_status s =
        ipt_fail(f->impl->ctx, IPT_ERR_FORMAT, "%s: %s: '%.100s' is %.100s, expected %s", f->path,
                 f->impl->config_name, key, text ? text : "something else", expected);
    json_free_t release;
    json_get_alloc_funcs(NULL, &release);
    if (text)
        release(text);
    return s;
}

static ipt_status read_patterns(ipt_adapter_file *f, json_t *patterns, ipt_adapter_settings *s)
{
    const char *text, *why = NULL;
    json_t *v;
    if (patterns && !json_is_null(patterns) && !json_is_object(patterns))
        return bad_setting(f, "alpha_pattern", patterns, "an object of numbers by name");
    s->pattern =
        ipt_arena_alloc(&f->impl->arena, (json_object_size(patterns) + 1) * sizeof *s->pattern);
    if (!s->pattern)
        return IPT_ERR_NOMEM;
    json_object_foreach(patterns, text, v)
    {
        size_t i = s->n_pattern++;
        if (!json_is_number(v))
            return bad_setting(f, text, v, "a number");
        s->pattern[i].text = text;
        s->pattern[i].alpha = json_number_value(v);
        ipt_status status = ipt_pattern_create(&f->impl->arena, text, &f->impl->budget,
                                               &s->pattern[i].pattern, &why);
        if (status == IPT_ERR_UNSUPPORTED)
            return ipt_fail(f->impl->ctx, status,
                            "%s: %s: alpha_pattern '%.100s' is no name or expression that can be "
                            "read: %s",
                            f->path, f->impl->config_name, text, why);
        IPT_TRY(status);
    }
    return IPT_OK;
}

static ipt_status read_settings(ipt_adapter_file *f, int comp, ipt_adapter_settings *s)
{
    static const char *const signs[] = {"lora_alpha", "alpha_pattern", "r", "peft_type"};
    const char *type = json_string_value(setting(f, comp, names_components(f), "peft_type"));
    bool is_lora = !type || strcmp(type, "LORA") == 0; /* LOHA and LOKR name it without "lora_" */
    const char *name = is_lora ? "lora_alpha" : "alpha";
    bool prefixed = names_components(f);
    s->is_read = true;
    for (size_t i = 0; i < IPT_COUNT(signs); i++)
        s->is_there = s->is_there || setting(f, comp, prefixed, signs[i]);
    if (!s->is_there)
        return IPT_OK;
    json_t *alpha = setting(f, comp, prefixed, name), *rank = setting(f, comp, prefixed, "r");
    json_t *rslora = setting(f, comp, prefixed, "use_rslora");
    if (alpha && !json_is_number(alpha))
        return bad_setting(f, name, alpha, "a number");
    if (rank && !json_is_number(rank))
        return bad_setting(f, "r", rank, "a number");
    if (rslora && !json_is_null(rslora) && !json_is_boolean(rslora))
        return bad_setting(f, "use_rslora", rslora, "true or false");
    s->alpha = alpha ? json_number_value(alpha) : PEFT_ALPHA;
    s->rank = is_lora ? 0 : json_is_number(rank) ? json_number_value(rank) : PEFT_ALPHA;
    s->rslora = json_is_true(rslora);
    return read_patterns(f, setting(f, comp, prefixed, "alpha_pattern"), s);
}

/* PEFT's names are those of the model that it was given: transformers 5 has dropped
 * "text_model.". */
static bool pattern_takes(ipt_adapter_file *f, const ipt_pattern *p, const ipt_module *m)
{
    static const char old[] = "text_model.";
    size_t n = m->comp == IPT_COMP_UNET ? 0 : sizeof old - 1;
    if (ipt_pattern_match(p, m->name, &f->impl->budget))
        return true;
    return n > 0 && strncmp(m->name, old, n) == 0 &&
           ipt_pattern_match(p, m->name + n, &f->impl->budget);
}

ipt_status ipt_adapter_alpha(ipt_adapter_file *f, const ipt_module *m, int32_t rank, bool *found,
                             double *alpha, double *divisor)
{
    ipt_adapter_settings *s = &f->impl->settings[m->comp];
    if (!s->is_read)
        IPT_TRY(read_settings(f, m->comp, s));
    *found = s->is_there;
    if (!s->is_there)
        return IPT_OK;
    *alpha = s->alpha;
    *divisor = rank == 0 ? s->rank : s->rslora ? sqrt((double)rank) : (double)rank;
    for (size_t i = 0; i < s->n_pattern; i++)
        if (pattern_takes(f, s->pattern[i].pattern, m)) {
            *alpha = s->pattern[i].alpha;
            break;
        }
    if (f->impl->budget == 0)
        return ipt_fail(f->impl->ctx, IPT_ERR_UNSUPPORTED,
                        "%s: %s: alpha_pattern is too costly: %zu expressions for %zu modules",
                        f->path, f->impl->config_name, s->n_pattern, f->impl->n_list);
    return IPT_OK;
}
