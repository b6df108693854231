/* engine/impasto.h - the library's face: one engine (device, model, adapters), requests in,
 * pictures out.
 *
 * Life: ipt_engine_create -> ipt_generate any number of times -> ipt_engine_destroy.  The engine
 * keeps the model, the adapters and the recorded plans of the last requests: the next request with
 *       the same model and size loads nothing.
 * Threads: an engine belongs to one thread at a time; a request's stop may be asked from anywhere.
 * Errors: every function that can fail returns a status; the text is ipt_last_error(ctx). */
#ifndef IPT_ENGINE_IMPASTO_H
#define IPT_ENGINE_IMPASTO_H
#include "core/core.h"

typedef struct ipt_engine ipt_engine;

typedef enum ipt_precision {
    IPT_PRECISION_AUTO, /* f16 weights; activations f16 on GPUs with 16-bit storage, f32 on CPU
                           devices */
    IPT_PRECISION_F16,  /* f16 weights, activations as AUTO */
    IPT_PRECISION_F32,  /* everything f32 */
    IPT_PRECISION_Q8,   /* q8 weights where they are matrices (f16 else), activations as AUTO */
} ipt_precision;

typedef struct ipt_engine_opts {
    const char *device; /* as ipt_gpu_opts.device */
    ipt_precision precision;
    uint64_t vram_limit; /* bytes; 0: none */
    bool validate;       /* Vulkan validation layer, for tests */
} ipt_engine_opts;
/* ctx outlives the engine.  The device is opened at the first request that needs it.
 * Errors: IPT_ERR_NOMEM. */
IPT_CHECKED ipt_status ipt_engine_create(ipt_ctx *ctx, const ipt_engine_opts *o, ipt_engine **out);
void ipt_engine_destroy(ipt_engine **e);
/* Opens the device now.  Errors: IPT_ERR_NO_DEVICE, IPT_ERR_UNSUPPORTED, IPT_ERR_MISSING. */
IPT_CHECKED ipt_status ipt_engine_open_device(ipt_engine *e);
const char *ipt_engine_device_name(const ipt_engine *e); /* "" before it is open */
struct ipt_gpu *ipt_engine_gpu(ipt_engine *e);           /* NULL before it is open */

/* Folder of the default model ("models/default"): beside the program, in the installation or the
 * source tree; env IMPASTO_MODEL overrides.  Errors: IPT_ERR_MISSING. */
IPT_CHECKED ipt_status ipt_default_model(ipt_ctx *ctx, char *buf, size_t n);
/* Folder NAME ("models/eval") that holds FILE, looked for in the same places.  Errors:
 * IPT_ERR_MISSING. */
IPT_CHECKED ipt_status ipt_shipped_folder(ipt_ctx *ctx, const char *name, const char *file,
                                          char *buf, size_t n);

/* --- pictures --------------------------------------------------------------------------------- */
typedef struct ipt_image {
    int32_t w, h;
    uint8_t *rgb; /* [h,w,3], freed with ipt_image_finish */
} ipt_image;
void ipt_image_finish(ipt_image *im); /* safe on zeroed */
/* PNG, JPEG, BMP, TGA, GIF (first frame), PNM (P5, P6); 8 bits of 16; alpha over white; EXIF
 * orientation of JPEG and PNG honoured. Limits: 64 megapixels, 256 MB.  Errors: IPT_ERR_IO,
 * IPT_ERR_FORMAT (not a picture: what it is), IPT_ERR_NOMEM. */
IPT_CHECKED ipt_status ipt_image_load(ipt_ctx *ctx, const char *path, ipt_image *out);
IPT_CHECKED ipt_status ipt_image_load_memory(ipt_ctx *ctx, const char *name, const void *data,
                                             size_t n, ipt_image *out);
/* By the ending of path: .png (tEXt "parameters" and iTXt "impasto" with the request as JSON) or
 * .jpg / .jpeg (the same text as EXIF UserComment, quality 95); a device or pipe of another name
 * gets a PNG.  Written as ipt_file_write does.  text, json may be NULL.
 * Errors: IPT_ERR_ARG (other ending), IPT_ERR_OUTPUT, IPT_ERR_NOMEM. */
IPT_CHECKED ipt_status ipt_image_save(ipt_ctx *ctx, const char *path, const ipt_image *im,
                                      const char *text, const char *json);
/* Pixels [h,w,channels], 1 (grey), 3 (RGB) or 4 (RGBA), as a PNG in memory, without texts.
 * Ownership of *out [n]: caller, ipt_free.  Errors: IPT_ERR_ARG, IPT_ERR_NOMEM. */
IPT_CHECKED ipt_status ipt_png_encode(ipt_ctx *ctx, const uint8_t *px, int32_t w, int32_t h,
                                      int32_t channels, uint8_t **out, size_t *n);
/* Lanczos-3 to w x h (antialiased when shrinking), in place. */
IPT_CHECKED ipt_status ipt_image_resize(ipt_ctx *ctx, ipt_image *im, int32_t w, int32_t h);

/* --- requests --------------------------------------------------------------------------------- */
typedef struct ipt_lora {
    const char *path;        /* file, or a name searched in lora_dirs */
    float weight, te_weight; /* UNet and text encoder */
    const char *word;        /* prompt word(s) it is bound to, NULL: none */
    float start, end;        /* active while start <= progress < end, 0..1; 0,1: always */
    const char *blocks;      /* "down:1/mid:0/up:0.5", NULL: all 1 */
    const char *curve;       /* "0@0,1@0.3,0@0.9": multiplies weight over the steps, NULL: 1 */
} ipt_lora;

typedef struct ipt_progress {
    const char *stage;   /* "load", "combine", "encode", "text", "unfold", "fold", "sample", "vae",
                            "hash",   "save" */
    int32_t done, total; /* units of the stage: UNet evaluations, ... */
    int32_t image, n_image;
    double eta_ms;  /* for the whole request; < 0: not known yet */
    double step_ms; /* of the last unit */
} ipt_progress;
typedef void (*ipt_progress_fn)(void *user, const ipt_progress *p);

/* What a picture looks like so far: the clean picture that the last evaluation predicts, in full
 * size through a tiny VAE (taesd, or the model's own), else one pixel for each cell of the latent.
 */
typedef struct ipt_preview {
    int32_t image, step, n_step; /* steps done, of all that run */
    const ipt_image *im;         /* borrowed for the call */
} ipt_preview;
/* A failure ends the request. */
typedef ipt_status (*ipt_preview_fn)(void *user, const ipt_preview *p);

/* The latent x [c,h,w] before the first evaluation (step 0) and after each; borrowed for the call.
 */
typedef struct ipt_latent {
    int32_t image, step, n_step; /* evaluations done, of all */
    int32_t c, h, w;
    const float *x;
} ipt_latent;
/* A failure ends the request. */
typedef ipt_status (*ipt_latent_fn)(void *user, const ipt_latent *l);

/* Where a picture's adapters were let in by the method at the last evaluation; borrowed for the
 * call, as all that it points to. */
typedef struct ipt_mask {
    const char *name, *word; /* of the adapter: its file's, and the prompt's as given or NULL */
    const float *v;          /* [h,w] 0..1 */
} ipt_mask;
typedef struct ipt_masks {
    int32_t image, h, w; /* cells of the latent; a cell is im->h / h pixels high */
    const ipt_image *im; /* the picture */
    const ipt_mask *mask;
    size_t n; /* adapters that have one */
} ipt_masks;
/* A failure ends the request. */
typedef ipt_status (*ipt_masks_fn)(void *user, const ipt_masks *m);

/* What an adapter did to a picture.  Its contribution to a step is the guided prediction [C,h,w] of
 * the step's first evaluation less what it is when every row of the UNet in which the adapter acts
 * is evaluated without it, in the UNet and in the text encoder (compose option te=merged: in the
 * UNet alone), all else the same.  Rows that ran on kept features are evaluated whole for it. */
enum { IPT_BANDS = 8 };
typedef struct ipt_effect {
    const char *name, *file, *word; /* word: as ipt_mask's; file NULL: an adapter that the method,
                                       by which it is called, made of all */
    const float *energy;   /* [h,w] mean over channels and steps of the contribution's square */
    const float *when;     /* [n_step] mean over channels and cells of it */
    const float *share;    /* [n_step] the same over that of the whole prediction */
    float band[IPT_BANDS]; /* its amplitude at frequencies of radius k/8..(k+1)/8 of the largest:
                              mean over the ring and steps of the root of the mean over channels of
                              |F|^2, F its unitary Fourier transform */
    float high;            /* share of its energy at radii from 0.2 of the largest on, 0..1 */
    int32_t words_h, words_w;
    const float *words; /* [words_h,words_w] attention that its words drew in its own rows, mean of
                           heads, layers, tokens and steps; NULL: the method reads no attention, or
                           there is no word */
    const float *mask;  /* [h,w] as ipt_mask's; NULL: it has none */
} ipt_effect;
typedef struct ipt_explanation {
    int32_t image, h, w;
    int32_t n_step;
    const int32_t *step; /* [n_step] of the request's steps, from 0; img2img begins late */
    const float *power;  /* [n_step] mean square of the guided prediction */
    const ipt_image *im; /* the picture */
    const ipt_effect *effect;
    size_t n; /* adapters */
} ipt_explanation;
/* A failure ends the request. */
typedef ipt_status (*ipt_explain_fn)(void *user, const ipt_explanation *x);

typedef struct ipt_request {
    const char *model;             /* file or folder; NULL: default model */
    const char *vae, *taesd;       /* NULL: the model's own */
    const char *config_dir;        /* diffusers folder whose configs a single file follows; NULL */
    const char *prediction;        /* "epsilon" or "v_prediction"; NULL: what the files say */
    const char *prompt, *negative; /* A1111 syntax; NULL: "" */
    int32_t width, height;         /* pixels; 0: the model's size; with init: its aspect too */
    int32_t steps;                 /* 0: 20 */
    double cfg;                    /* guidance; <= 1: one row only.  NAN: 7 (LCM, TCD: 1.5) */
    double cfg_rescale;
    int32_t clip_skip; /* A1111's count: 0 or 1 none, 2 the layer before the last */
    uint64_t seed;
    int32_t count; /* pictures; picture k has seed + k; 0: 1 */
    const char *sampler, *schedule,
        *rng; /* NULL or "default": the model's own scheduler; NULL: "default"; "torch-cpu" */
    const ipt_image *init, *mask;      /* img2img; white = repaint.  Borrowed for the call */
    const char *init_file, *mask_file; /* files of them: read where the pictures are NULL */
    double strength;                   /* 0..1; NAN: 0.75 (1.0 with a mask) */
    bool no_paste; /* keep the raw result where the mask protects; else init's own pixels */
    const ipt_lora *lora;
    size_t n_lora;
    const char *cache;   /* "N" or "N:LEVEL": one whole UNet evaluation in N, the others on its deep
                            features; NULL: all whole */
    const char *fold;    /* adapters into the UNet's weights where their mix stays the same: "auto"
                            (NULL;    where that is less work), "always", "never" */
    const char *compose; /* NULL "merge"; a method of compose/methods.c: "switch", "lego", ... */
    const char *const *compose_opt; /* "key=value" */
    size_t n_compose_opt;
    const char *const *region; /* "IMG@PROMPT", "IMG@lora:NAME": where IMG is white */
    size_t n_region;
    const char *const *lora_dirs,
        *const *embedding_dirs; /* searched for <lora:name> and names in prompts */
    size_t n_lora_dirs, n_embedding_dirs;
    const char *lora_home; /* a folder behind lora_dirs that is the user's own, not the request's */
    const char *precision; /* "f16", "f32", "q8", "auto"; NULL: the engine's */
    int32_t vae_tile;      /* 0 auto, -1 never, else tile size in pixels */
    int32_t batch;         /* UNet rows evaluated at once at most; 0: auto */
    bool allow_partial;    /* take a LoRA of which some modules do not fit */
    const ipt_stop *stop;  /* asked: this request ends, and no other; NULL: none of its own */
    const char *trace;     /* safetensors file of every intermediate of picture 0, or NULL */
    ipt_progress_fn progress;
    ipt_preview_fn preview; /* every preview_every steps (0: every step); changes no picture */
    int32_t preview_every;
    void *user;
    ipt_latent_fn latent;
    void *latent_user;
    ipt_masks_fn masks; /* after each picture; IPT_ERR_ARG where the method makes none */
    void *masks_user;
    ipt_explain_fn explain; /* after each picture, which stays the same to the bit; adapters stay
                               beside the weights (fold "never"); costs rows_explain rows */
    void *explain_user;
} ipt_request;
void ipt_request_init(ipt_request *r); /* the defaults above */

/* Requests as JSON objects with the fields of request.def; what is not there stays as it is in *r,
 * which is untouched after a failure.  Texts live in arena; what names the text in messages.
 * Errors: IPT_ERR_FORMAT: no JSON, an unknown field, or a field with what was found and what is
 * expected; IPT_ERR_NOMEM. */
IPT_CHECKED ipt_status ipt_request_parse(ipt_arena *arena, const char *what, const char *text,
                                         size_t n, ipt_request *r);
/* The same from a .json file, or from a PNG that ipt_image_save wrote.  Errors: also IPT_ERR_IO. */
IPT_CHECKED ipt_status ipt_request_load(ipt_arena *arena, const char *path, ipt_request *r);
/* The other way: fields that differ from ipt_request_init.  Reading it gives the same request, but
 * for pictures that have no file.  Memory from arena; NULL when it ran out. */
char *ipt_request_write(const ipt_request *r, ipt_arena *arena);
/* The request [*n_text] inside the PNG [n].  Errors: IPT_ERR_FORMAT: there is none. */
IPT_CHECKED ipt_status ipt_image_find_request(ipt_ctx *ctx, const char *path, const char *png,
                                              size_t n, const char **text, size_t *n_text);

typedef struct ipt_adapter_report {
    const char *file, *name, *family, *algo; /* algo "lora" or "locon" */
    const char *sha256, *autov2;     /* of the file, its first 10 digits (Civitai); NULL: unknown */
    const char *autov3, *a1111_hash; /* 12 digits: of the tensors; as A1111 names the file */
    int32_t rank_min, rank_max;
    size_t modules, matched, n_unmatched;
    const char *const *unmatched;
} ipt_adapter_report;

/* What one ipt_generate did; strings live until the next request or destroy. */
typedef struct ipt_report {
    const char *model, *model_arch, *sampler, *schedule, *rng, *compose, *device, *precision;
    const char *schedule_label;            /* A1111's name of what was used, NULL: none */
    const char *model_sha256, *vae_sha256; /* of single files; NULL: a folder, or unknown */
    const char *infotext;                  /* A1111 parameters of picture 0 */
    int32_t width, height, steps, n_eval, n_image;
    double mask_blur; /* of the edge around what was repainted, pixels; 0: nothing was pasted */
    uint64_t seed;
    double ms_load, ms_text, ms_sample, ms_vae, ms_total, ms_per_step, ms_first_step;
    /* UNet rows evaluated: whole, outer layers on kept features, up to the last tapped layer, from
     * there back to the latent */
    uint64_t rows_full, rows_shallow, rows_maps, rows_backward;
    uint64_t rows_explain; /* evaluated whole for ipt_request.explain, beside those */
    uint64_t peak_device_bytes, peak_host_bytes;
    /* The UNet on the device: its weights, those of them that come in anew at every evaluation, in
     * how many blocks, and activations with adapters. */
    uint64_t unet_weight_bytes, unet_streamed_bytes, unet_working_bytes;
    uint32_t unet_blocks;
    bool is_folded; /* the adapters were in the UNet's weights */
    double ms_fold; /* of bringing them in, and what an earlier request left out */
    uint64_t n_plans_recorded, bytes_uploaded; /* by this request: 0 when everything was kept */
    const ipt_adapter_report *adapter;
    size_t n_adapter;
    double unet_macs; /* multiply-adds of all UNet rows */
} ipt_report;

/* Called for each picture as it is done, in order; text = its A1111 parameters, json = the request.
 */
typedef ipt_status (*ipt_image_fn)(void *user, int32_t index, const ipt_image *im, const char *text,
                                   const char *json);
/* Runs the request.  Errors: IPT_ERR_ARG (a value out of range: names it and the range), those of
 * files, devices and `image`; IPT_ERR_CANCELLED within a step. */
IPT_CHECKED ipt_status ipt_generate(ipt_engine *e, const ipt_request *r, ipt_image_fn image,
                                    void *user, ipt_report *report);

/* --- looking at files ------------------------------------------------------------------------- */
/* JSON descriptions (one object, caller frees with ipt_free) used by `model inspect`, `lora
 * inspect` and `tokenize`.  Errors: those of the files. */
IPT_CHECKED ipt_status ipt_model_describe(ipt_ctx *ctx, const char *model, const char *config_dir,
                                          char **json);
IPT_CHECKED ipt_status ipt_lora_describe(ipt_ctx *ctx, const char *lora, const char *model,
                                         const char *config_dir, char **json);
/* The same with "energy" even where it takes longer than a second or two (null there otherwise). */
IPT_CHECKED ipt_status ipt_lora_describe_all(ipt_ctx *ctx, const char *lora, const char *model,
                                             const char *config_dir, char **json);
/* One object {"lines":[{"ids":[...],"pieces":[...],"count":n}]}; model NULL: default model. */
IPT_CHECKED ipt_status ipt_tokenize_describe(ipt_ctx *ctx, const char *model,
                                             const char *const *text, size_t n, char **json);
#endif
