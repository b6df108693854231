/* model_io/adapter_names.c - how adapter files spell the modules of a model: every spelling is made
 * from the canonical name; underscores are never taken apart.
 *
 * Sources: kohya-ss/sd-scripts (lora_unet_, lora_te_), diffusers loaders (attn processors, 0.2x),
 * PEFT, ComfyUI's SaveLoRA (diffusion_model., text_encoders.), cloneofsimo/lora (ordinals), LyCORIS
 * (algorithms). */
#include "model_io/internal.h"

#include <string.h>

/* --- the model's structure, from the names of its modules ------------------------------------- */
/* Numbers of "PART.{i}.KIND.{j}." at the start of a name. */
static bool numbers(const char *name, const char *part, const char *kind, int32_t *i, int32_t *j)
{
    size_t n = strlen(part), k = strlen(kind);
    if (strncmp(name, part, n) != 0 || name[n] < '0' || name[n] > '7' || name[n + 1] != '.')
        return false;
    const char *p = name + n + 2;
    if (strncmp(p, kind, k) != 0 || p[k] < '0' || p[k] > '9')
        return false;
    *i = name[n] - '0';
    *j = p[k] - '0';
    if (p[k + 1] >= '0' && p[k + 1] <= '9')
        *j = *j * 10 + (p[k + 1] - '0');
    return true;
}

void ipt_key_frame_modules(const ipt_module *m, size_t n, ipt_key_frame *f)
{
    int32_t i = 0, j = 0;
    *f = (ipt_key_frame){0};
    for (size_t k = 0; k < n; k++) {
        if (m[k].comp != IPT_COMP_UNET)
            continue;
        if (numbers(m[k].name, "down_blocks.", "resnets.", &i, &j)) {
            f->n_level = i + 1 > f->n_level ? i + 1 : f->n_level;
            f->n_layer[i] = j + 1 > f->n_layer[i] ? j + 1 : f->n_layer[i];
        } else if (numbers(m[k].name, "up_blocks.", "attentions.", &i, &j)) {
            f->up_attn[i] = true;
        }
    }
}

/* --- spellings -------------------------------------------------------------------------------- */
typedef enum form {
    PLAIN,
    UNDERSCORES,
    LDM_PLAIN,
    LDM_UNDERSCORES,
    SHORT,
    SHORT_UNDERSCORES,
    ATTN,
    ATTN_SHORT
} form;
typedef struct spelling {
    int comp;
    const char *prefix;
    form form;
} spelling;

/* SHORT: without "text_model."; ATTN: the processor's names of old diffusers. */
static const spelling spellings[] = {
    {IPT_COMP_UNET, "lora_unet_", UNDERSCORES},
    {IPT_COMP_UNET, "lora_unet_", LDM_UNDERSCORES},
    {IPT_COMP_UNET, "lycoris_", UNDERSCORES},
    {IPT_COMP_UNET, "unet.", PLAIN},
    {IPT_COMP_UNET, "", PLAIN},
    {IPT_COMP_UNET, "base_model.model.", PLAIN},
    {IPT_COMP_UNET, "base_model.model.unet.", PLAIN},
    {IPT_COMP_UNET, "unet.base_model.model.", PLAIN},
    {IPT_COMP_UNET, "diffusion_model.", LDM_PLAIN},
    {IPT_COMP_UNET, "unet.", ATTN},
    {IPT_COMP_UNET, "", ATTN},
    {IPT_COMP_TEXT, "lora_te_", UNDERSCORES},
    {IPT_COMP_TEXT, "lora_te1_", UNDERSCORES},
    {IPT_COMP_TEXT, "lora_te_", SHORT_UNDERSCORES},
    {IPT_COMP_TEXT, "lora_te1_", SHORT_UNDERSCORES},
    {IPT_COMP_TEXT, "text_encoder.", PLAIN},
    {IPT_COMP_TEXT, "text_encoder.", SHORT},
    {IPT_COMP_TEXT, "", PLAIN},
    {IPT_COMP_TEXT, "base_model.model.", PLAIN},
    {IPT_COMP_TEXT, "base_model.model.", SHORT},
    {IPT_COMP_TEXT, "text_encoder.base_model.model.", PLAIN},
    {IPT_COMP_TEXT, "text_encoders.clip_l.transformer.", PLAIN},
    {IPT_COMP_TEXT, "text_encoders.clip_h.transformer.", PLAIN},
    {IPT_COMP_TEXT, "text_encoder.", ATTN},
    {IPT_COMP_TEXT, "text_encoder.", ATTN_SHORT},
    {IPT_COMP_TEXT2, "lora_te2_", UNDERSCORES},
    {IPT_COMP_TEXT2, "lora_te2_", SHORT_UNDERSCORES},
    {IPT_COMP_TEXT2, "text_encoder_2.", PLAIN},
    {IPT_COMP_TEXT2, "text_encoder_2.", SHORT},
    {IPT_COMP_TEXT2, "", PLAIN},
    {IPT_COMP_TEXT2, "base_model.model.", PLAIN},
    {IPT_COMP_TEXT2, "base_model.model.", SHORT},
    {IPT_COMP_TEXT2, "text_encoder_2.base_model.model.", PLAIN},
    {IPT_COMP_TEXT2, "text_encoders.clip_g.transformer.", PLAIN},
    {IPT_COMP_TEXT2, "text_encoder_2.", ATTN},
};

static const char *without_model(const char *name)
{
    return strncmp(name, "text_model.", 11) == 0 ? name + 11 : name;
}

/* "a.b.to_q" -> "a.b.processor.to_q_lora"; text: "a.self_attn.q_proj" -> "a.self_attn.to_q_lora".
 */
static bool attn_name(int comp, const char *name, char *buf, size_t n)
{
    static const struct {
        const char *leaf, *old;
        bool text;
    } leaves[] = {
        {".to_q", ".processor.to_q_lora", false}, {".to_k", ".processor.to_k_lora", false},
        {".to_v", ".processor.to_v_lora", false}, {".to_out.0", ".processor.to_out_lora", false},
        {".q_proj", ".to_q_lora", true},          {".k_proj", ".to_k_lora", true},
        {".v_proj", ".to_v_lora", true},          {".out_proj", ".to_out_lora", true},
    };
    size_t len = strlen(name);
    for (size_t i = 0; i < IPT_COUNT(leaves); i++) {
        size_t k = strlen(leaves[i].leaf);
        if (leaves[i].text != (comp != IPT_COMP_UNET) || len <= k ||
            strcmp(name + len - k, leaves[i].leaf) != 0)
            continue;
        int at = snprintf(buf, n, "%.*s%s", (int)(len - k), name, leaves[i].old);
        return at > 0 && (size_t)at < n;
    }
    return false;
}

static bool ldm_name(const ipt_key_frame *f, const char *name, char *buf, size_t n)
{
    char key[IPT_KEY_MAX];
    ipt_key_part part;
    int len = snprintf(key, sizeof key, "%s.weight", name);
    if (f->n_level == 0 || len < 0 || (size_t)len >= sizeof key ||
        !ipt_keymap_emit(IPT_LAYOUT_LDM_UNET, f, key, 0, buf, n, &part))
        return false;
    size_t end = strlen(buf);
    if (end > 7)
        buf[end - 7] = '\0';
    return true;
}

bool ipt_adapter_name(const ipt_key_frame *f, const ipt_module *m, int i, ipt_adapter_stem *out)
{
    size_t k = 0;
    for (; k < IPT_COUNT(spellings); k++) {
        if (spellings[k].comp == m->comp && i-- == 0)
            break;
    }
    if (k == IPT_COUNT(spellings))
        return false;
    const spelling *s = &spellings[k];
    char name[IPT_KEY_MAX] = "";
    bool ok = true,
         is_short = s->form == SHORT || s->form == SHORT_UNDERSCORES || s->form == ATTN_SHORT;
    const char *base = is_short ? without_model(m->name) : m->name;
    out->attn_procs = s->form == ATTN || s->form == ATTN_SHORT;
    out->any_encoder = m->comp != IPT_COMP_UNET &&
                       (s->prefix[0] == '\0' || strcmp(s->prefix, "base_model.model.") == 0);
    if (out->attn_procs)
        ok = attn_name(m->comp, base, name, sizeof name);
    else if (s->form == LDM_PLAIN || s->form == LDM_UNDERSCORES)
        ok = ldm_name(f, base, name, sizeof name);
    else
        ok = strlen(base) < sizeof name && snprintf(name, sizeof name, "%s", base) >= 0;
    if (s->form == UNDERSCORES || s->form == LDM_UNDERSCORES || s->form == SHORT_UNDERSCORES) {
        for (char *p = name; *p; p++)
            *p = *p == '.' ? '_' : *p;
    }
    size_t n = strlen(s->prefix), len = strlen(name);
    out->text[0] = '\0';
    if (ok && n + len < sizeof out->text) {
        memcpy(out->text, s->prefix, n);
        memcpy(out->text + n, name, len + 1);
    }
    return true;
}

/* --- ordinals --------------------------------------------------------------------------------- */
static size_t find_module(const ipt_module *m, size_t n, int comp, const char *name)
{
    for (size_t i = 0; i < n; i++) {
        if (m[i].comp == comp && strcmp(m[i].name, name) == 0)
            return i;
    }
    return n;
}

/* Old diffusers walked its modules in the order of assignment: down, up, middle. */
static size_t unet_ordinal(const ipt_module *m, size_t n, bool has_geglu, int32_t index)
{
    static const char *const parts[] = {"down_blocks.", "up_blocks.", "mid_block."};
    static const char *const all[] = {"attn1.to_q",     "attn1.to_k",    "attn1.to_v",
                                      "attn1.to_out.0", "ff.net.0.proj", "attn2.to_q",
                                      "attn2.to_k",     "attn2.to_v",    "attn2.to_out.0"};
    int32_t per = has_geglu ? 9 : 8, block = index / per, k = index % per, seen = 0;
    char name[IPT_KEY_MAX];
    if (!has_geglu && k >= 4)
        k++;
    for (size_t p = 0; p < IPT_COUNT(parts); p++) {
        for (size_t i = 0; i < n; i++) {
            size_t len = strlen(m[i].name);
            if (m[i].comp != IPT_COMP_UNET || strncmp(m[i].name, parts[p], strlen(parts[p])) != 0 ||
                len < 11 || strcmp(m[i].name + len - 11, ".attn1.to_q") != 0 || seen++ != block)
                continue;
            int at = snprintf(name, sizeof name, "%.*s%s", (int)(len - 10), m[i].name, all[k]);
            return at > 0 && (size_t)at < sizeof name ? find_module(m, n, IPT_COMP_UNET, name) : n;
        }
    }
    return n;
}

size_t ipt_adapter_ordinal(const ipt_module *m, size_t n, int comp, bool has_geglu, int32_t index)
{
    static const char *const proj[] = {"k_proj", "v_proj", "q_proj", "out_proj"};
    char name[IPT_KEY_MAX];
    if (index < 0)
        return n;
    if (comp == IPT_COMP_UNET)
        return unet_ordinal(m, n, has_geglu, index);
    snprintf(name, sizeof name, "text_model.encoder.layers.%d.self_attn.%s", (int)(index / 4),
             proj[index % 4]);
    return find_module(m, n, comp, name);
}

/* --- what is not read ------------------------------------------------------------------------- */
const char *ipt_adapter_unsupported(const char *key)
{
    static const struct {
        const char *part, *what;
    } kinds[] = {
        {".oft_R.", "PEFT's OFT adapter"},
        {".oft_r", "PEFT's OFT adapter"},
        {".boft_R", "PEFT's BOFT adapter"},
        {".boft_s", "PEFT's BOFT adapter"},
        {".lora_embedding_", "adapter of the token embedding"},
        {".vera_lambda", "VeRA adapter"},
    };
    for (size_t i = 0; i < IPT_COUNT(kinds); i++)
        if (strstr(key, kinds[i].part))
            return kinds[i].what;
    return NULL;
}
