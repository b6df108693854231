/* model_io/internal.h - what the files of this folder share. */
#ifndef IPT_MODEL_IO_INTERNAL_H
#define IPT_MODEL_IO_INTERNAL_H
#include "model_io/model_io.h"

/* --- names -> indices ------------------------------------------------------------------------- */
/* Open addressing; keys are borrowed. */
typedef struct ipt_index {
    ipt_ctx *ctx;
    const char **key;
    uint32_t *value;
    size_t n_slot, n_used;
} ipt_index;
IPT_CHECKED ipt_status ipt_index_init(ipt_index *x, ipt_ctx *ctx, size_t expected);
void ipt_index_finish(ipt_index *x);
bool ipt_index_get(const ipt_index *x, const char *key, uint32_t *value);
/* *added false: the key was there already (value unchanged).  Errors: IPT_ERR_NOMEM. */
IPT_CHECKED ipt_status ipt_index_put(ipt_index *x, const char *key, uint32_t value, bool *added);
uint64_t ipt_hash_name(const char *s); /* FNV-1a */

/* What a file that is no safetensors file seems to be; NULL: nothing known. */
const char *ipt_sniff(const uint8_t *p, size_t n);

/* --- foreign names (keymap.c expands, keymap_sd.c holds the tables) ------------------------------
 */
enum { IPT_KEY_MAX = 256 };
typedef enum ipt_layout {
    IPT_LAYOUT_CANONICAL, /* diffusers, transformers */
    IPT_LAYOUT_LDM_UNET,  /* CompVis and sgm */
    IPT_LAYOUT_LDM_VAE,
    IPT_LAYOUT_OPEN_CLIP, /* fused attention, transposed projection */
    IPT_LAYOUT_TAESD,     /* madebyollin/taesd: a bare sequence */
    IPT_LAYOUT_COUNT
} ipt_layout;
/* Numbering of a UNet's (or VAE's) foreign names follows from its structure. */
typedef struct ipt_key_frame {
    int32_t n_level;
    int32_t
        n_layer[IPT_MAX_LEVEL]; /* resnets of down block i; up block i: n_layer[n_level-1-i] + 1 */
    bool up_attn[IPT_MAX_LEVEL];
} ipt_key_frame;
void ipt_key_frame_unet(const ipt_unet_config *c, ipt_key_frame *f);
void ipt_key_frame_vae(const ipt_vae_config *c, ipt_key_frame *f);
/* How the named tensor is used. */
typedef struct ipt_key_part {
    uint8_t third;   /* 1, 2, 3: that third of the rows; 0: all */
    bool transposed; /* file has [I,O] */
} ipt_key_part;
/* The alt-th (0, 1, ...) spelling of a canonical name; false when there is none (any more). */
bool ipt_keymap_emit(ipt_layout layout, const ipt_key_frame *f, const char *canonical, int alt,
                     char *buf, size_t n, ipt_key_part *part);

/* --- sources of weights --------------------------------------------------------------------------
 */
enum { IPT_MAX_PREFIX = 64 };
/* One component: files, and how they spell its names. */
typedef struct ipt_source {
    const ipt_safetensors **file; /* borrowed from the model */
    size_t n_file;
    ipt_layout layout;
    char prefix[IPT_MAX_PREFIX]; /* "model.diffusion_model." */
    bool shared_file;            /* the file also holds other components */
    ipt_key_frame frame;
} ipt_source;
typedef struct ipt_found {
    const ipt_safetensors *file;
    const ipt_st_tensor *tensor;
    ipt_key_part part;
} ipt_found;
/* Of a component that the model has. */
const ipt_source *ipt_model_source(const ipt_model *m, int comp);
bool ipt_source_find(const ipt_source *s, const char *canonical, ipt_found *out);
/* Dims of the file's tensor as a logical weight of the wanted shape; false when they do not fit. */
bool ipt_found_fits(const ipt_found *f, const ipt_shape *want);
/* "[320,4,3,3]" of what a logical shape looks like in a file. */
void ipt_file_shape_text(const ipt_shape *s, char *buf, size_t n);
IPT_CHECKED ipt_status ipt_store_create(ipt_ctx *ctx, const ipt_source *src, struct ipt_gpu *gpu,
                                        ipt_dtype precision, const char *prefix, ipt_weights **out);

/* --- configs ---------------------------------------------------------------------------------- */
/* Of a whole UNet; the largest published one (SDXL) has 17 and 70.  unet/ keeps 128 skips. */
enum { IPT_MAX_RESNET = 240, IPT_MAX_TRANSFORMER = 1024 };
/* Resnets and transformer layers of all blocks together: what the time to build a graph grows with.
 */
void ipt_unet_count(const ipt_unet_config *c, int32_t *resnets, int32_t *transformers);
IPT_CHECKED ipt_status ipt_config_unet(ipt_ctx *ctx, const char *path, struct json_t *o,
                                       ipt_unet_config *out);
IPT_CHECKED ipt_status ipt_config_vae(ipt_ctx *ctx, const char *path, struct json_t *o,
                                      ipt_vae_config *out);
IPT_CHECKED ipt_status ipt_config_text(ipt_ctx *ctx, const char *path, struct json_t *o,
                                       ipt_text_config *out);

/* --- adapter files (adapter_names.c) ---------------------------------------------------------- */
/* The foreign numbering of the UNet that a list of modules describes; n_level 0: none in the list.
 */
void ipt_key_frame_modules(const ipt_module *m, size_t n, ipt_key_frame *f);
/* The i-th (0, 1, ...) way adapter files begin the keys of a module; false after the last.  Entries
 * with too long a name are "". */
typedef struct ipt_adapter_stem {
    char text[IPT_KEY_MAX];
    bool attn_procs;  /* takes the suffixes .down.weight and .up.weight only */
    bool any_encoder; /* PEFT's names of one text model: either encoder's, the shapes tell whose */
} ipt_adapter_stem;
bool ipt_adapter_name(const ipt_key_frame *f, const ipt_module *m, int i, ipt_adapter_stem *out);
/* Canonical name of cloneofsimo's index-th module of a component, from the caller's list (the
 * list's number, or n when there is none). */
size_t ipt_adapter_ordinal(const ipt_module *m, size_t n, int comp, bool has_geglu, int32_t index);
/* What an adapter key asks for that this program does not do ("LoKr adapter"); NULL: nothing. */
const char *ipt_adapter_unsupported(const char *key);

/* --- PEFT's patterns (pattern.c) -------------------------------------------------------------- */
/* Steps that matching all patterns of a file may cost: a second or two. */
#define IPT_PATTERN_BUDGET ((uint64_t)1 << 24)
typedef struct ipt_pattern ipt_pattern;
/* Compiles a key of alpha_pattern, an expression of Python's re.  Its memory comes off *budget.
 * Ownership: arena.  Errors: IPT_ERR_UNSUPPORTED with the reason in *why ("missing closing
 * parenthesis", too many), IPT_ERR_NOMEM. */
IPT_CHECKED ipt_status ipt_pattern_create(ipt_arena *arena, const char *text, uint64_t *budget,
                                          ipt_pattern **out, const char **why);
/* Whether PEFT takes the pattern for a module: for the whole name, or for what follows one of its
 * dots.  Steps come off *budget; what is answered when none are left is worthless.  Not for two
 * threads at once.  Source: peft get_pattern_key. */
bool ipt_pattern_match(const ipt_pattern *p, const char *name, uint64_t *budget);

/* --- single files: what the tensors tell (probe.c) -------------------------------------------- */
/* Fills config, and layout and prefix of src[IPT_COMP_COUNT] (file and n_file are the caller's). */
IPT_CHECKED ipt_status ipt_probe_checkpoint(ipt_ctx *ctx, const ipt_safetensors *st,
                                            ipt_model_config *cfg, ipt_source *src);
/* A file that holds a VAE, alone or among others; false when it does not. */
bool ipt_probe_vae(const ipt_safetensors *st, ipt_vae_config *cfg, ipt_source *src);
#endif
