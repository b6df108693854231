/* engine/lora_fit.h - an adapter file among the modules of a model: of the one named, or of the
 * likeliest.
 *
 * Must not know: devices, pictures.
 * Threads: everything belongs to the thread of its ctx. */
#ifndef IPT_ENGINE_LORA_FIT_H
#define IPT_ENGINE_LORA_FIT_H
#include "engine/modules.h"
#include "model_io/adapter_tools.h"

typedef struct ipt_lora_fit {
    ipt_ctx *ctx;
    ipt_model *model;         /* NULL: a published configuration, without weights */
    ipt_model_config *config; /* of either */
    ipt_module_list modules;
    ipt_adapter_file *file;
    const char *name; /* "sd1", "default model" or the caller's `model` */
} ipt_lora_fit;
/* Opens `lora` for the model named, or (NULL) for the published configuration or default model that
 * takes most of its keys.  Ownership: caller, ipt_lora_fit_finish.  Errors: those of both files. */
IPT_CHECKED ipt_status ipt_lora_fit_open(ipt_ctx *ctx, const char *lora, const char *model,
                                         const char *config_dir, ipt_lora_fit *out);
void ipt_lora_fit_finish(ipt_lora_fit *f); /* safe on zeroed */
/* path NULL: the default model. */
IPT_CHECKED ipt_status ipt_open_model(ipt_ctx *ctx, const char *path, const char *config_dir,
                                      ipt_model **out);
/* The block a module is in, as block weights call it: "down.1", "mid.0", "up.2", "other"; a text
 * model is one block, "text". */
void ipt_lora_block(const ipt_module *m, char *buf, size_t n);
/* A weight as it was written: 0.8 is no float, but floats keep six digits. */
double ipt_lora_decimal(float w);
/* t->weights from a model's files (m NULL: none), without a device.  Errors: IPT_ERR_NOMEM. */
IPT_CHECKED ipt_status ipt_tool_weights(ipt_model *m, ipt_tool *t);
void ipt_tool_drop_weights(ipt_tool *t);
#endif
