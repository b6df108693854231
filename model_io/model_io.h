/* model_io/model_io.h - files of weights: safetensors, whole models (single files and diffusers
 * folders), weight stores for plans, adapter files.
 *
 * Must not know: what a UNet computes, how adapters are applied.
 * Names are canonical (today's diffusers / transformers) everywhere outside this folder.  Foreign
 * names are generated from canonical ones and looked up; they are never parsed.
 * Every file is untrusted: a failure's message has file, key, found and expected in one line.
 * Threads: each object belongs to one thread at a time. */
#ifndef IPT_MODEL_IO_MODEL_IO_H
#define IPT_MODEL_IO_MODEL_IO_H
#include "core/core.h"
#include "core/model_config.h"
#include "graph/graph.h"

struct json_t;

/* --- safetensors ------------------------------------------------------------------------------ */
typedef enum ipt_st_dtype {
    IPT_ST_F64,
    IPT_ST_F32,
    IPT_ST_F16,
    IPT_ST_BF16,
    IPT_ST_F8_E4M3,
    IPT_ST_F8_E5M2,
    IPT_ST_I64,
    IPT_ST_I32,
    IPT_ST_I16,
    IPT_ST_I8,
    IPT_ST_U8,
    IPT_ST_BOOL,
    IPT_ST_COUNT
} ipt_st_dtype;
enum { IPT_ST_MAX_RANK = 8 };
typedef struct ipt_st_tensor {
    const char *name;
    ipt_st_dtype dtype;
    uint8_t rank; /* 0: one element */
    int64_t dim[IPT_ST_MAX_RANK];
    const uint8_t *data; /* little endian, any alignment; NULL when empty or not read (yet) */
    size_t count, bytes;
    uint64_t place;             /* of its first byte in the file */
    struct ipt_safetensors *of; /* reads `data`; NULL: it is there */
} ipt_st_tensor;
typedef struct ipt_safetensors ipt_safetensors;

/* Opens a file, reads its header and checks its whole header: length within the file and <= 100 MB,
 * JSON, known dtypes, rank <= 8, dims >= 0, offsets inside, equal to shape x size and without
 * overlap, unique names. Errors: IPT_ERR_IO (cannot open, a folder), IPT_ERR_FORMAT (also: pickle,
 * zip, GGUF, text, picture, empty, truncated: the message says which), IPT_ERR_NOMEM. */
IPT_CHECKED ipt_status ipt_safetensors_open(ipt_ctx *ctx, const char *path, ipt_safetensors **out);
/* The same for bytes in memory, which must outlive the object; `name` is used in messages. */
IPT_CHECKED ipt_status ipt_safetensors_open_memory(ipt_ctx *ctx, const char *name, const void *data,
                                                   size_t size, ipt_safetensors **out);
void ipt_safetensors_close(ipt_safetensors **st); /* st and *st may be NULL */
const char *ipt_safetensors_path(const ipt_safetensors *st);
size_t ipt_safetensors_count(const ipt_safetensors *st);
/* i-th tensor, ordered by place in the file. */
const ipt_st_tensor *ipt_safetensors_at(const ipt_safetensors *st, size_t i);
const ipt_st_tensor *ipt_safetensors_find(const ipt_safetensors *st,
                                          const char *name); /* or NULL */
/* Value of "__metadata__", NULL when absent. */
const char *ipt_safetensors_meta(const ipt_safetensors *st, const char *key);
/* The metadata object (strings only), NULL when absent; borrowed. */
const struct json_t *ipt_safetensors_metadata(const ipt_safetensors *st);
/* Bytes of the file and where its data part begins. */
void ipt_safetensors_size(const ipt_safetensors *st, uint64_t *size, uint64_t *data_start);
/* Bytes at .. at + n - 1 of the file, for hashes.  Errors: IPT_ERR_IO, also when the file became
 * shorter. */
IPT_CHECKED ipt_status ipt_safetensors_read(const ipt_safetensors *st, uint64_t at, size_t n,
                                            void *buf);
/* Reads a tensor's values into memory, where they stay until released or the file is closed;
 * nothing when they are there.  Errors: IPT_ERR_IO (also: the file became shorter), IPT_ERR_NOMEM.
 */
IPT_CHECKED ipt_status ipt_st_load(const ipt_st_tensor *t);
/* Gives the memory of the values back; they are read again at the next use. */
void ipt_st_release(const ipt_st_tensor *t);

size_t ipt_st_dtype_bytes(ipt_st_dtype t);
const char *ipt_st_dtype_name(ipt_st_dtype t);                       /* "F16" */
void ipt_st_shape_text(const ipt_st_tensor *t, char *buf, size_t n); /* "[320,4,3,3]" */
/* Elements first .. first + n - 1 as f32.  This and the next two load what is not loaded; values
 * that cannot be read are NaN: call ipt_st_load before, for its message. */
void ipt_st_to_f32(const ipt_st_tensor *t, size_t first, size_t n, float *dst);
float ipt_st_get(const ipt_st_tensor *t, size_t i);
/* True when no element is NaN or infinite; else *bad (may be NULL) is the first such element. */
bool ipt_st_finite(const ipt_st_tensor *t, size_t *bad);

typedef struct ipt_st_write {
    const char *name;
    ipt_st_dtype dtype;
    uint8_t rank;
    int64_t dim[IPT_ST_MAX_RANK];
    const void *data; /* count x size bytes */
} ipt_st_write;
typedef struct ipt_st_meta {
    const char *key, *value;
} ipt_st_meta;
/* Writes a file beside `path` and renames it over: either whole or nothing.  Tensors keep their
 * order.  Errors: IPT_ERR_ARG (name twice, bad shape), IPT_ERR_OUTPUT, IPT_ERR_NOMEM. */
IPT_CHECKED ipt_status ipt_safetensors_write(ipt_ctx *ctx, const char *path, const ipt_st_write *t,
                                             size_t n, const ipt_st_meta *meta, size_t n_meta);

/* The bytes of such a file, for ipt_adapter_open_memory.  Ownership: *data, caller, ipt_free. */
IPT_CHECKED ipt_status ipt_safetensors_bytes(ipt_ctx *ctx, const ipt_st_write *t, size_t n,
                                             void **data, size_t *size);
/* The same where tensors without data are made one after the other: fill writes tensor i's bytes.
 * Errors: also those of fill, after which no file is left. */
typedef ipt_status (*ipt_st_fill_fn)(void *user, size_t i, void *buf, size_t bytes);
IPT_CHECKED ipt_status ipt_safetensors_write_each(ipt_ctx *ctx, const char *path,
                                                  const ipt_st_write *t, size_t n,
                                                  const ipt_st_meta *meta, size_t n_meta,
                                                  ipt_st_fill_fn fill, void *user);
/* F64, F32, F16 and BF16: what values can be rounded to. */
bool ipt_st_can_write(ipt_st_dtype t);
/* Rounds n values (through f32, as torch does) to one of them; false when one does not fit or is
 * not finite. */
bool ipt_st_from_f64(ipt_st_dtype t, const double *v, size_t n, void *dst);

/* --- models ----------------------------------------------------------------------------------- */
typedef struct ipt_model ipt_model;
typedef struct ipt_model_opts {
    const char
        *config_dir; /* diffusers folder whose configs replace what a single file's tensors cannot
                        tell (heads, norm groups, scheduler); NULL: those of the published models */
} ipt_model_opts;
/* Opens a single file (CompVis / sgm layout; architecture found by looking for names, not by file
 * name) or a diffusers folder (model_index.json, or unet/ vae/ text_encoder/ with config.json;
 * variants such as .fp16.safetensors and sharded .index.json are read).  opts may be NULL.
 * Errors: IPT_ERR_IO, IPT_ERR_FORMAT, IPT_ERR_MISSING (no UNet), IPT_ERR_UNSUPPORTED (refiner, a
 * config value this program cannot honour: named), IPT_ERR_SHAPE, IPT_ERR_NOMEM. */
IPT_CHECKED ipt_status ipt_model_open(ipt_ctx *ctx, const char *path, const ipt_model_opts *opts,
                                      ipt_model **out);
/* Replaces the VAE: CompVis VAE file, diffusers VAE file or folder, or another whole model.
 * Errors: as ipt_model_open; the model is unchanged then. */
IPT_CHECKED ipt_status ipt_model_set_vae(ipt_model *m, const char *path);
/* A VAE alone (previews: TAESD files too): a model that has only IPT_COMP_VAE.
 * Errors: as ipt_model_open. */
IPT_CHECKED ipt_status ipt_model_open_vae(ipt_ctx *ctx, const char *path, ipt_model **out);
void ipt_model_close(ipt_model **m); /* stores made from it must be destroyed before */
const ipt_model_config *ipt_model_get_config(const ipt_model *m);
const char *ipt_model_path(const ipt_model *m);
const char *
ipt_model_layout(const ipt_model *m); /* "diffusers", "compvis" (SD 1, 2), "sgm" (SDXL) */
/* scheduler_config.json, NULL when there is none; borrowed. */
const struct json_t *ipt_model_scheduler(const ipt_model *m);
/* model_index.json, NULL when there is none; borrowed. */
const struct json_t *ipt_model_index(const ipt_model *m);
/* Folder of tokenizer files for IPT_COMP_TEXT or IPT_COMP_TEXT2; NULL when the model has none. */
const char *ipt_model_tokenizer(const ipt_model *m, int comp);
const char *ipt_comp_name(int comp); /* "unet", "vae", "text_encoder", "text_encoder_2" */
/* Files a component's weights come from; dtype of most of its values ("F16"). */
size_t ipt_model_n_files(const ipt_model *m, int comp);
const char *ipt_model_file(const ipt_model *m, int comp, size_t i);
const char *ipt_model_dtype(const ipt_model *m, int comp);

/* What a component needs against what the files have. */
typedef struct ipt_want {
    const char *name; /* canonical, without component prefix */
    ipt_shape shape;  /* logical: [O,KH,KW,I], [O,I], [C] */
} ipt_want;
typedef struct ipt_misshaped {
    const char *name, *key, *file; /* key: as the file spells it */
    char found[96], expected[96];
} ipt_misshaped;
typedef struct ipt_check {
    size_t n_bound, n_missing, n_unclaimed, n_misshaped;
    const char **missing;   /* canonical names */
    const char **unclaimed; /* file keys of this component that nothing asks for */
    ipt_misshaped *misshaped;
    ipt_arena arena; /* owns all of the above */
} ipt_check;
/* Fills the lists; harmless leftovers (position_ids, model_ema.*, ...) are not reported.
 * Ownership: caller, ipt_check_finish.  Errors: IPT_ERR_NOMEM. */
IPT_CHECKED ipt_status ipt_model_check(const ipt_model *m, int comp, const ipt_want *want, size_t n,
                                       ipt_check *out);
/* IPT_OK, or the failure that the lists mean (IPT_ERR_MISSING, IPT_ERR_SHAPE): first item and
 * count. */
IPT_CHECKED ipt_status ipt_check_status(const ipt_model *m, int comp, const ipt_check *c);
void ipt_check_finish(ipt_check *c);

/* --- weight stores: implement struct ipt_weights of graph.h ------------------------------------
 */
/* Store of one component.  gpu NULL: host reference runs only (find fails).  precision: IPT_F16 or
 * IPT_F32 for panels and tables; IPT_Q8 for panels, as ipt_panel_dtype says, with tables in f16
 * and panels for gradients f16 of what q8 holds; norms and biases are always f32.  prefix (may be
 * NULL) is taken off the names asked for.  Values are converted straight into device memory and the
 * file's pages released; a NaN or infinity is IPT_ERR_FORMAT naming file and key. The model and gpu
 * outlive the store.  Errors: IPT_ERR_MISSING (component not in the model). */
IPT_CHECKED ipt_status ipt_model_weights(ipt_model *m, int comp, struct ipt_gpu *gpu,
                                         ipt_dtype precision, const char *prefix,
                                         ipt_weights **out);
/* Store without files, for benches: values depend on name and seed only; weights are nearly normal
 * with deviation 1/sqrt(fan in), norm weights near 1, biases small. */
IPT_CHECKED ipt_status ipt_weights_random(ipt_ctx *ctx, struct ipt_gpu *gpu, ipt_dtype precision,
                                          uint64_t seed, ipt_weights **out);
/* Store over a file in canonical names (tests, trained weights); the file outlives the store. */
IPT_CHECKED ipt_status ipt_weights_file(ipt_ctx *ctx, const ipt_safetensors *st,
                                        struct ipt_gpu *gpu, ipt_dtype precision,
                                        const char *prefix, ipt_weights **out);
void ipt_weights_destroy(ipt_weights **w);               /* of all three kinds */
uint64_t ipt_weights_device_bytes(const ipt_weights *w); /* uploaded so far */

/* --- weights that change on the device, under every use that they were asked for; names that were
 * never asked for are left alone.  What `read` gives stays the file's.  A failure may leave one
 * weight half changed: restore it. ------------------------------------------------------------- */
/* W += (a b)^T: a [K, rank], b [rank, O] as ipt_adapter_pack makes them, rank a multiple of 4.  The
 * sum is f32 on the device, rounded once to the store's type; a value beyond f16 becomes infinite.
 * Returns when the work is queued: what is submitted afterwards sees the result.  The name must
 * have been asked for as IPT_USE_PANEL.  Errors: IPT_ERR_UNSUPPORTED (q8
 * panels), IPT_ERR_MISSING, IPT_ERR_TOO_LARGE, IPT_ERR_DEVICE_MEM, IPT_ERR_DEVICE_LOST,
 * IPT_ERR_NOMEM. */
IPT_CHECKED ipt_status ipt_weights_add(ipt_weights *w, const char *name, const float *a,
                                       const float *b, size_t rank);
/* Compiles what _add needs, which it would do at its first call.  Errors: those of ipt_kernel_get.
 */
IPT_CHECKED ipt_status ipt_weights_ready(ipt_weights *w);
/* W = v, in the order of `read`.  Errors: IPT_ERR_UNSUPPORTED (beyond f16, q8),
 * IPT_ERR_DEVICE_LOST, IPT_ERR_NOMEM. */
IPT_CHECKED ipt_status ipt_weights_replace(ipt_weights *w, const char *name, const double *v);
/* The file's values again, bit for bit what a new store would hold.  Errors: those of find. */
IPT_CHECKED ipt_status ipt_weights_restore(ipt_weights *w, const char *name);

/* --- adapter files ---------------------------------------------------------------------------- */
typedef struct ipt_module {
    int comp;                /* IPT_COMP_UNET, IPT_COMP_TEXT, IPT_COMP_TEXT2 */
    const char *name;        /* canonical, without ".weight" and component prefix */
    int32_t out, in, kh, kw; /* linear: kh = kw = 1; norm: [out], the rest 1 */
    bool is_norm, has_bias;
} ipt_module;

typedef enum ipt_adapter_family {
    IPT_ADAPTER_KOHYA,       /* lora_unet_..., also LyCORIS LoCon and sgm names */
    IPT_ADAPTER_ATTN_PROCS,  /* diffusers up to 0.19: attn1.processor.to_q_lora */
    IPT_ADAPTER_DIFFUSERS,   /* diffusers 0.2x: to_q.lora.down */
    IPT_ADAPTER_PEFT,        /* lora_A, lora_B */
    IPT_ADAPTER_CLONEOFSIMO, /* unet:0:down */
    IPT_ADAPTER_LYCORIS,     /* lokr_w1, hada_w1_a, diff, ... */
    IPT_ADAPTER_KRONA,       /* DiffuseKronA: attn-processor names with Kronecker factors */
} ipt_adapter_family;
/* How a part of an adapter acts beside its module, at gate g. */
typedef enum ipt_adapter_act {
    IPT_ACTS_LOW_RANK, /* y += g B (A x): ipt_adapter_pack */
    IPT_ACTS_KRON,     /* y += g (P kron Q) x: ipt_adapter_kron_factors */
    IPT_ACTS_DENSE,    /* y += g D x: ipt_adapter_delta */
    IPT_ACTS_BIAS,     /* y += g d */
    IPT_ACTS_NORM,     /* y += g d norm(x), before the norm's own weight and bias */
} ipt_adapter_act;
enum { IPT_ADAPTER_PARTS = 9 };
struct ipt_kind; /* a row of the table in adapter_kinds.c */
/* What one file has for the weight or the bias of one module. */
typedef struct ipt_adapter_module {
    size_t module; /* index in the caller's list */
    const struct ipt_kind *kind;
    ipt_adapter_act act;
    int32_t rank;  /* as the file means it; 0: the kind has none */
    int32_t n_col; /* columns of the low-rank factors, where there are such */
    int32_t out, in, kh, kw;
    ipt_adapter_kron kron;                        /* KRON */
    float alpha;                                  /* as given or derived */
    double scale;                                 /* multiplies the product of the factors */
    const ipt_st_tensor *part[IPT_ADAPTER_PARTS]; /* by the kind's keys; NULL: not in the file */
    const ipt_st_tensor *magnitude;               /* DoRA, NULL: none */
    bool is_by_input;                             /* it has one magnitude an input, not an output */
} ipt_adapter_module;
typedef struct ipt_adapter_embedding { /* textual inversion inside the file */
    const char *word;
    const ipt_st_tensor *vector[2]; /* [n,width] or [width] for text encoder 1 and 2; NULL: none */
} ipt_adapter_embedding;
typedef struct ipt_adapter_group { /* keys that fit nothing and begin alike */
    const char *name, *first;      /* "lora_unet_double_blocks_", the first key */
    size_t n;
} ipt_adapter_group;
typedef struct ipt_adapter_file {
    const char *path, *name; /* name: base name without ending */
    ipt_adapter_family family;
    bool has_conv, has_tucker;
    size_t n_module, n_unmatched, n_embedding, n_word;
    ipt_adapter_module *module;
    const char **unmatched;   /* keys that fit no module of the model and would matter */
    size_t n_key, n_harmless; /* all keys; those that fit nothing but could change nothing */
    ipt_adapter_group *group; /* [n_group] of the unmatched */
    size_t n_group;
    const char *made_for;     /* "Flux", ...: what the keys tell; NULL: nothing */
    const char *claims;       /* what the metadata says about it, NULL: nothing */
    size_t n_bad, bad_values; /* tensors with NaN or infinite values, and how many values */
    const char **bad;         /* [n_bad] their keys */
    const char *bad_module;   /* the first of them that a module uses, NULL: none */
    ipt_adapter_embedding *embedding;
    const char **word; /* trigger words found in the metadata */
    int32_t rank_min, rank_max;
    char sha256[65];      /* of the file; this and the next three: empty before ipt_adapter_hash */
    char autov2[11];      /* its first 10 digits */
    char data_sha256[65]; /* of the data part: kohya's sshs_model_hash */
    char autov3[13];      /* its first 12 digits: A1111's LoRA hash */
    const struct json_t *metadata; /* borrowed, may be NULL */
    struct ipt_adapter_impl *impl;
} ipt_adapter_file;
/* Opens an adapter file of any kind or a PEFT folder and finds the module of every key among
 * `modules` (the caller's canonical list, in the order of building: level after level).  Keys that
 * fit no module and values that are not finite are listed, not an error, unless nothing fits at
 * all: ipt_adapter_check. Ownership: caller, ipt_adapter_close; names and modules are only borrowed
 * for the call. Errors: IPT_ERR_IO, IPT_ERR_FORMAT (not safetensors, not an adapter, a whole model,
 * PEFT settings that cannot be read), IPT_ERR_SHAPE (file, key, found, expected),
 * IPT_ERR_UNSUPPORTED (VeRA, PEFT's OFT, ...: named), IPT_ERR_MISSING (fits no module: made for
 * another model), IPT_ERR_NOMEM. */
IPT_CHECKED ipt_status ipt_adapter_open(ipt_ctx *ctx, const char *path, const ipt_module *modules,
                                        size_t n_modules, ipt_adapter_file **out);
/* The same for bytes in memory (tests, fuzzing); data outlives the object. */
IPT_CHECKED ipt_status ipt_adapter_open_memory(ipt_ctx *ctx, const char *name, const void *data,
                                               size_t size, const ipt_module *modules,
                                               size_t n_modules, ipt_adapter_file **out);
void ipt_adapter_close(ipt_adapter_file **f);
/* Whether pictures can be made with the file: IPT_ERR_MISSING when keys fit nothing (unless
 * is_partial allows it; the table of what fits goes to the log as errors), IPT_ERR_FORMAT when a
 * module has values that are not finite. */
IPT_CHECKED ipt_status ipt_adapter_check(const ipt_adapter_file *f, bool is_partial);
/* Computes the hashes (reads the whole file). */
void ipt_adapter_hash(ipt_adapter_file *f);
const char *ipt_adapter_family_name(ipt_adapter_family f);      /* "kohya", ... */
const char *ipt_adapter_kind_name(const ipt_adapter_module *m); /* "lora", "lokr", "dora", ... */
/* --- what a part does, in double.  base: the model's own weight (or bias, or norm weight) in
 * logical order, [O,KH,KW,I] or [C]; it may be NULL unless ipt_adapter_needs_base.  Errors:
 * IPT_ERR_IO, IPT_ERR_NOMEM. */
bool ipt_adapter_needs_base(const ipt_adapter_module *m);
/* The effective change at gate 1, in the order and size of base: W' = W + delta. */
IPT_CHECKED ipt_status ipt_adapter_delta(ipt_ctx *ctx, const ipt_adapter_module *m,
                                         const double *base, double *delta);
/* LOW_RANK: the factors as stacked operands of graph.h: a [K, n_rank] with K = kh*kw*in in the
 * order ky, kx, i; b [n_rank, out].  Columns col .. col + n_col - 1 of a and those rows of b are
 * written; b has the scale. */
IPT_CHECKED ipt_status ipt_adapter_pack(ipt_ctx *ctx, const ipt_adapter_module *m,
                                        const double *base, float *a, float *b, size_t n_rank,
                                        size_t col);
/* KRON: p [i1, o1], q [kh*kw*i2, o2] in the order ky, kx, i, with the scale. */
IPT_CHECKED ipt_status ipt_adapter_kron_factors(ipt_ctx *ctx, const ipt_adapter_module *m, float *p,
                                                float *q);

/* A dimension as small x large: factor > 0 that divides it, else the most square cut whose small
 * part is at most factor (-1: any).  Source: LyCORIS, factorization. */
void ipt_kron_factorise(int32_t dim, int32_t factor, int32_t *small, int32_t *large);

/* --- textual inversion files ---------------------------------------------------------------------
 */
typedef struct ipt_embedding_file {
    char *name;       /* base name without ending: the word to write in a prompt */
    int32_t n_vector; /* tokens the word stands for */
    int32_t width[2]; /* of the vectors for text encoder 1 and 2; 0: none */
    float *vector[2]; /* [n_vector, width] */
} ipt_embedding_file;
/* Reads a .safetensors embedding: "emb_params" (A1111), "clip_l" / "clip_g" (SDXL), or one tensor
 * named by its word (diffusers).  Ownership: caller, ipt_embedding_close. Errors: as
 * ipt_safetensors_open; IPT_ERR_FORMAT (no vectors, NaN), IPT_ERR_SHAPE. */
IPT_CHECKED ipt_status ipt_embedding_open(ipt_ctx *ctx, const char *path, ipt_embedding_file *out);
void ipt_embedding_close(ipt_embedding_file *e);
#endif
