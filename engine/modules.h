/* engine/modules.h - what a configuration is made of: the weights each component asks for and the
 * modules an adapter can sit on, both read off the graphs themselves.
 *
 * Must not know: files, devices.
 * Threads: everything belongs to the thread of its ctx. */
#ifndef IPT_ENGINE_MODULES_H
#define IPT_ENGINE_MODULES_H
#include "core/core.h"
#include "core/model_config.h"
#include "model_io/model_io.h"

typedef struct ipt_want_list {
    ipt_want *want;
    size_t n;
    ipt_arena arena; /* owns all of it */
} ipt_want_list;
/* Every weight that component `comp` (IPT_COMP_...) of `c` asks for, in order of first use; the VAE
 * with its encoder (a tiny one: decoder only).  Ownership: caller, ipt_wants_finish.
 * Errors: those of the graph (IPT_ERR_SHAPE, IPT_ERR_UNSUPPORTED), IPT_ERR_NOMEM. */
IPT_CHECKED ipt_status ipt_wants_create(ipt_ctx *ctx, const ipt_model_config *c, int comp,
                                        ipt_want_list *out);
void ipt_wants_finish(ipt_want_list *l); /* safe on zeroed */

typedef struct ipt_module_list {
    ipt_module *module;
    size_t n;
    ipt_arena arena; /* owns all of it */
} ipt_module_list;
/* The linear, convolution and norm modules of the UNet and the text encoders that `c` has,
 * component after component, in the order of building: what ipt_adapter_open() wants. Ownership:
 * caller, ipt_modules_finish.  Errors: as ipt_wants_create. */
IPT_CHECKED ipt_status ipt_modules_create(ipt_ctx *ctx, const ipt_model_config *c,
                                          ipt_module_list *out);
void ipt_modules_finish(ipt_module_list *l); /* safe on zeroed */
#endif
