/* model_io/adapter_write.h - adapter files as other programs read them: names of a format, factors
 * and what goes with them, settings, hashes.
 *
 * Must not know: what is computed.
 * Threads: an ipt_adapter_out belongs to one thread at a time. */
#ifndef IPT_MODEL_IO_ADAPTER_WRITE_H
#define IPT_MODEL_IO_ADAPTER_WRITE_H
#include "model_io/model_io.h"

typedef enum ipt_adapter_format {
    IPT_FORMAT_KOHYA,     /* kohya, LyCORIS, A1111, ComfyUI: lora_unet_... + .alpha; every kind */
    IPT_FORMAT_PEFT,      /* a folder: adapter_model.safetensors, adapter_config.json; LoRA, DoRA */
    IPT_FORMAT_DIFFUSERS, /* unet. ... .lora_A.weight, settings in the metadata; LoRA, DoRA */
    IPT_FORMAT_KRONA,     /* DiffuseKronA: unet. ... .processor.to_q_lora.down.weight */
} ipt_adapter_format;

typedef struct ipt_adapter_out ipt_adapter_out;
typedef struct ipt_adapter_out_opts {
    ipt_adapter_format format;
    ipt_st_dtype dtype;       /* of all factors; IPT_ST_COUNT: as they come */
    const ipt_module *module; /* [n_module], the list that modules are numbered by; borrowed */
    size_t n_module;
} ipt_adapter_out_opts;
/* Errors: IPT_ERR_NOMEM. */
IPT_CHECKED ipt_status ipt_adapter_out_create(ipt_ctx *ctx, const ipt_adapter_out_opts *o,
                                              ipt_adapter_out **out);
void ipt_adapter_out_destroy(ipt_adapter_out **out); /* out and *out may be NULL */

/* Values on their way into a file: those of a tensor, bit for bit where its dtype stays, or doubles
 * of the given dtype and shape (which an output's dtype overrides).  Both are copied. */
typedef struct ipt_out_values {
    const ipt_st_tensor *same; /* NULL: doubles */
    const double *value;
    ipt_st_dtype dtype;
    uint8_t rank;
    int64_t dim[4]; /* also of `same`, where rank > 0 gives it another shape of as many values */
} ipt_out_values;

/* The low-rank factors of a module.  down [r,in] or [r,in,kh,kw], up [out,r] or [out,r,1,1]; mid
 * [r,r2,kh,kw] with down [r2,in,1,1] (kohya only), of no values: none; magnitude [out,1..] (DoRA).
 * alpha / r multiplies.  Errors: IPT_ERR_UNSUPPORTED (the format cannot say it: file, module, what
 * can), IPT_ERR_ARG (values that do not fit the dtype), IPT_ERR_IO, IPT_ERR_NOMEM. */
typedef struct ipt_out_lora {
    ipt_out_values down, up, mid, magnitude;
    int32_t rank;
    double alpha;
    bool by_input; /* the magnitude is one of inputs, [1,in..] */
} ipt_out_lora;
IPT_CHECKED ipt_status ipt_adapter_out_lora(ipt_adapter_out *w, size_t module,
                                            const ipt_out_lora *f);
/* Any other tensor of a module under its ending (".lokr_w1"): KOHYA, and KRONA's own two.  Errors:
 * as above. */
IPT_CHECKED ipt_status ipt_adapter_out_tensor(ipt_adapter_out *w, size_t module, const char *ending,
                                              const ipt_out_values *v);
/* A tensor under a key of its own (words inside a file): KOHYA. */
IPT_CHECKED ipt_status ipt_adapter_out_key(ipt_adapter_out *w, const char *key,
                                           const ipt_out_values *v);
/* Metadata (texts are copied; a key given again replaces the first).  Keys that describe what is
 * written (ss_network_*, sshs_*, format, lora_adapter_metadata) are this module's own and ignored.
 */
IPT_CHECKED ipt_status ipt_adapter_out_meta(ipt_adapter_out *w, const char *key, const char *value);
ipt_adapter_format ipt_adapter_out_format(const ipt_adapter_out *w);
size_t ipt_adapter_out_count(const ipt_adapter_out *w); /* tensors so far */
/* Writes the file (PEFT: the folder), whole or not at all.  Errors: IPT_ERR_OUTPUT, IPT_ERR_ARG
 * (nothing to write), IPT_ERR_NOMEM. */
IPT_CHECKED ipt_status ipt_adapter_out_write(ipt_adapter_out *w, const char *path);
/* The same file (KOHYA, no metadata) in memory.  Ownership: *data, caller, ipt_free.  Errors:
 * IPT_ERR_ARG (nothing to write), IPT_ERR_NOMEM. */
IPT_CHECKED ipt_status ipt_adapter_out_bytes(const ipt_adapter_out *w, void **data, size_t *size);
const char *ipt_adapter_format_name(ipt_adapter_format f); /* "kohya", ... */
#endif
