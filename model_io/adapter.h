/* model_io/adapter.h - what the files that read adapters share: adapter_file.c (modules and
 * factors), adapter_config.c (PEFT's settings), adapter_words.c (words inside a file),
 * adapter_fit.c (what fits nothing). */
#ifndef IPT_MODEL_IO_ADAPTER_H
#define IPT_MODEL_IO_ADAPTER_H
#include "model_io/internal.h"

/* PEFT's settings of one component, read at first use. */
typedef struct ipt_adapter_settings {
    bool is_read, is_there;
    double alpha, rank;
    bool rslora;
    size_t n_pattern;
    struct {
        ipt_pattern *pattern;
        const char *text;
        double alpha;
    } * pattern; /* in the file's order: the first that matches counts */
} ipt_adapter_settings;

struct ipt_adapter_impl {
    ipt_ctx *ctx;
    ipt_safetensors *st;
    ipt_arena arena;
    uint8_t *used;           /* tensors that a module (1) or a word (2) has claimed; 0: none */
    struct json_t *config;   /* adapter_config.json or diffusers' lora_adapter_metadata */
    const char *config_name; /* for messages */
    bool config_is_flat;     /* the latter: keys may begin with the component's name */
    ipt_adapter_settings settings[IPT_COMP_COUNT];
    uint64_t budget;        /* of patterns */
    const ipt_module *list; /* for the time of opening */
    size_t n_list;
};

/* --- adapter_config.c ------------------------------------------------------------------------- */
/* Takes the metadata's "lora_adapter_metadata" for the configuration when there is none yet.
 * Errors: IPT_ERR_FORMAT, IPT_ERR_NOMEM. */
IPT_CHECKED ipt_status ipt_adapter_read_metadata(ipt_adapter_file *f);
/* peft_type of a component, NULL: not said. */
const char *ipt_adapter_peft_type(const ipt_adapter_file *f, int comp);
/* Alpha of a module by the settings and what it is divided by (the rank, or its root; rank 0: that
 * of the settings); *found false: there are no settings for it.  Errors: IPT_ERR_FORMAT,
 * IPT_ERR_UNSUPPORTED (pattern), IPT_ERR_NOMEM. */
IPT_CHECKED ipt_status ipt_adapter_alpha(ipt_adapter_file *f, const ipt_module *m, int32_t rank,
                                         bool *found, double *alpha, double *divisor);

/* --- adapter_words.c -------------------------------------------------------------------------- */
/* Claims the vectors inside the file and lists their words; finds trigger words in the metadata.
 * Errors: IPT_ERR_NOMEM. */
IPT_CHECKED ipt_status ipt_adapter_find_words(ipt_adapter_file *f);

/* --- adapter_fit.c ---------------------------------------------------------------------------- */
/* What the keys and the metadata tell about the model that the file was made for. */
void ipt_adapter_guess(ipt_adapter_file *f);
/* Lists values that are not finite, and, when all modules and words are claimed, what is left.
 * Errors: IPT_ERR_MISSING (nothing fits), IPT_ERR_NOMEM. */
IPT_CHECKED ipt_status ipt_adapter_list(ipt_adapter_file *f);

/* --- adapter_file.c --------------------------------------------------------------------------- */
/* Marks a tensor (NULL: none) as used by a module, or by a word. */
void ipt_adapter_claim(ipt_adapter_file *f, const ipt_st_tensor *t, bool is_word);
/* Keys that could change nothing in any model: an alpha without factors, a product with a factor
 * that is zero. */
bool ipt_adapter_is_idle(const ipt_adapter_file *f, const char *key);
/* IPT_ERR_SHAPE with file, key, found and expected. */
ipt_status ipt_adapter_bad_shape(const ipt_adapter_file *f, const ipt_st_tensor *t,
                                 const char *expected);
#endif
