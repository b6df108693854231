/* engine/lora_fit.c - see lora_fit.h. */
#include "engine/lora_fit.h"

#include <stdlib.h>
#include <string.h>

#include "engine/impasto.h"

enum { MAX_PATH = 4096, N_CANDIDATE = 4, OWN = 3 };
static const char *const candidates[N_CANDIDATE] = {"sd1", "sdxl", "sd2", "default model"};

ipt_status ipt_open_model(ipt_ctx *ctx, const char *path, const char *config_dir, ipt_model **out)
{
    char buf[MAX_PATH];
    ipt_model_opts o = {.config_dir = config_dir};
    if (!path) {
        IPT_TRY(ipt_default_model(ctx, buf, sizeof buf));
        path = buf;
    }
    return ipt_model_open(ctx, path, &o, out);
}

void ipt_lora_fit_finish(ipt_lora_fit *f)
{
    ipt_adapter_close(&f->file);
    ipt_modules_finish(&f->modules);
    ipt_model_close(&f->model);
    ipt_free(f->config);
    *f = (ipt_lora_fit){0};
}

/* f has its configuration: the modules and the file among them. */
static ipt_status fit_file(ipt_lora_fit *f, const char *lora)
{
    IPT_TRY(ipt_modules_create(f->ctx, f->config, &f->modules));
    return ipt_adapter_open(f->ctx, lora, f->modules.module, f->modules.n, &f->file);
}

static ipt_status fit_model(ipt_lora_fit *f, const char *lora, const char *model,
                            const char *config_dir)
{
    IPT_TRY(ipt_open_model(f->ctx, model, config_dir, &f->model));
    *f->config = *ipt_model_get_config(f->model);
    return fit_file(f, lora);
}

/* Configurations as published: enough to know every module. */
static void published(int which, ipt_model_config *c)
{
    c->has[IPT_COMP_UNET] = c->has[IPT_COMP_TEXT] = true;
    c->arch = which == 0 ? IPT_ARCH_SD1 : which == 1 ? IPT_ARCH_SDXL : IPT_ARCH_SD2;
    c->unet = which == 0   ? ipt_unet_config_sd15()
              : which == 1 ? ipt_unet_config_sdxl()
                           : ipt_unet_config_sd21();
    c->text = which == 2 ? ipt_text_config_clip_h() : ipt_text_config_clip_l();
    if (which == 1) {
        c->has[IPT_COMP_TEXT2] = true;
        c->text2 = ipt_text_config_clip_g();
    }
}

/* which < 0: the model named. */
static ipt_status try_fit(ipt_ctx *ctx, const char *lora, int which, const char *model,
                          const char *config_dir, ipt_lora_fit *out)
{
    ipt_lora_fit f = {.ctx = ctx,
                      .config = ipt_calloc(ctx, 1, sizeof *f.config),
                      .name = which < 0 ? model : candidates[which]};
    ipt_status s = f.config ? IPT_OK : IPT_ERR_NOMEM;
    if (s == IPT_OK && which >= 0 && which != OWN) {
        published(which, f.config);
        s = fit_file(&f, lora);
    } else if (s == IPT_OK) {
        s = fit_model(&f, lora, which < 0 ? model : NULL, config_dir);
    }
    if (s == IPT_OK)
        *out = f;
    else
        ipt_lora_fit_finish(&f);
    return s;
}

static ipt_status best_fit(ipt_ctx *ctx, const char *lora, ipt_lora_fit *best)
{
    ipt_status status = IPT_ERR_MISSING, last = IPT_OK;
    char why[1024] = "";
    for (int i = 0; i < N_CANDIDATE; i++) {
        ipt_lora_fit f = {0};
        last = try_fit(ctx, lora, i, NULL, NULL, &f);
        if (last == IPT_OK && (!best->file || f.file->n_unmatched < best->file->n_unmatched)) {
            ipt_lora_fit_finish(best);
            *best = f;
        } else if (last == IPT_OK) {
            ipt_lora_fit_finish(&f);
        } else if (!best->file && (i == 0 || last == IPT_ERR_SHAPE)) {
            ipt_name(why, sizeof why, "%s", ipt_last_error(ctx)); /* of the likeliest model */
            status = last;
        }
        if (last != IPT_OK && last != IPT_ERR_SHAPE && last != IPT_ERR_MISSING)
            break; /* the file itself is bad: every model would say so */
        if (best->file && best->file->n_unmatched == 0)
            break;
    }
    if (best->file)
        return IPT_OK;
    return status == IPT_ERR_NOMEM
               ? status
               : ipt_fail(ctx, status, "%s", why[0] ? why : ipt_last_error(ctx));
}

ipt_status ipt_lora_fit_open(ipt_ctx *ctx, const char *lora, const char *model,
                             const char *config_dir, ipt_lora_fit *out)
{
    *out = (ipt_lora_fit){0};
    return model ? try_fit(ctx, lora, -1, model, config_dir, out) : best_fit(ctx, lora, out);
}

void ipt_lora_block(const ipt_module *m, char *buf, size_t n)
{
    static const struct {
        const char *start, *name;
    } parts[] = {{"down_blocks.", "down"}, {"mid_block.", "mid"}, {"up_blocks.", "up"}};
    ipt_name(buf, n, "%s", m->comp == IPT_COMP_UNET ? "other" : "text");
    for (size_t i = 0; m->comp == IPT_COMP_UNET && i < IPT_COUNT(parts); i++) {
        size_t k = strlen(parts[i].start);
        if (strncmp(m->name, parts[i].start, k) != 0)
            continue;
        int digits = i == 1 ? 0 : (int)strcspn(m->name + k, ".");
        ipt_name(buf, n, "%s.%.*s", parts[i].name, i == 1 ? 1 : digits, i == 1 ? "0" : m->name + k);
    }
}

double ipt_lora_decimal(float w)
{
    char text[32];
    return strtod(ipt_name(text, sizeof text, "%.6g", (double)w), NULL);
}

ipt_status ipt_tool_weights(ipt_model *m, ipt_tool *t)
{
    for (int comp = 0; m && comp < IPT_COMP_COUNT; comp++)
        if (comp != IPT_COMP_VAE && ipt_model_get_config(m)->has[comp])
            IPT_TRY(ipt_model_weights(m, comp, NULL, IPT_F32, NULL, &t->weights[comp]));
    return IPT_OK;
}

void ipt_tool_drop_weights(ipt_tool *t)
{
    for (int comp = 0; comp < IPT_COMP_COUNT; comp++)
        ipt_weights_destroy(&t->weights[comp]);
}
