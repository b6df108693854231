/* engine/internal.h - the engine's own parts: kept model, stores, adapters, plans; stages of a
 * request. */
#ifndef IPT_ENGINE_INTERNAL_H
#define IPT_ENGINE_INTERNAL_H
#include "engine/impasto.h"

#include "compose/compose.h"
#include "core/model_config.h"
#include "engine/modules.h"
#include "graph/graph.h"
#include "model_io/model_io.h"
#include "sampler/sampler.h"
#include "text_encoder/text_encoder.h"
#include "text_encoder/tokenizer.h"
#include "unet/unet.h"
#include "vk/vk.h"

enum {
    IPT_MAX_PATH = 4096,
    IPT_MAX_ROWS = 8
}; /* rows of one UNet evaluation, unless --batch says more */

/* --- what is kept between requests ------------------------------------------------------------ */
enum {
    IPT_KEEP_MODELS = 2,
    IPT_KEEP_PLANS = 4, /* of a kind: two sizes of two models */
};

/* Colours in -0.5..0.5 of a latent cell: value[c] for each channel, then a constant. */
enum { IPT_PREVIEW_CHANNELS = 32 };
typedef struct ipt_preview_map {
    int32_t channels; /* 0: not fitted yet */
    float value[(IPT_PREVIEW_CHANNELS + 1) * 3];
} ipt_preview_map;

/* What has been added to a model's UNet on the device; set NULL: nothing. */
typedef struct ipt_fold {
    struct ipt_adapter_set *set;
    float *gate;   /* [IPT_GATE_ROWS][slots of the set's bank] */
    size_t n_site; /* sites 0..n_site-1 of the set's bank are changed, the last maybe half */
    bool is_whole; /* all of them are */
} ipt_fold;

/* An open model and what is on the device of it. */
typedef struct ipt_loaded {
    uint32_t id;   /* never given twice */
    uint64_t used; /* by which request */
    char key[3 * IPT_MAX_PATH];
    uint64_t stamp[2]; /* of the model and its --vae */
    ipt_precision precision;
    ipt_dtype weight_type, act_type; /* once the device is open */
    ipt_model *model;
    ipt_model_config config;
    ipt_module_list modules;
    ipt_weights *store[IPT_COMP_COUNT];
    ipt_tokenizer *tokenizer[2];
    ipt_preview_map preview;
    ipt_fold fold;
} ipt_loaded;

/* Adapter files of a request, slot by slot, for one model. */
typedef struct ipt_adapter_set {
    int32_t refs; /* the engine's, and one for each plan that holds its factors */
    uint32_t model;
    size_t n_file;
    ipt_adapter_file *file[IPT_MAX_SLOT];
    char (*key)[IPT_MAX_PATH];    /* [n_file] paths */
    uint64_t stamp[IPT_MAX_SLOT]; /* a file that changed on disk is read again */
    char *how; /* method, options, weights that made one adapter of them; NULL: a slot each */
    ipt_adapter_file *one; /* it, in `bytes` */
    void *bytes;
    ipt_bank *bank;
} ipt_adapter_set;

typedef enum ipt_plan_kind {
    IPT_PLAN_UNET,
    IPT_PLAN_SHALLOW, /* its outer layers */
    IPT_PLAN_MAPS,    /* one row: its attention maps, and their gradient to the latent */
    IPT_PLAN_TEXT,
    IPT_PLAN_TEXT2,
    IPT_PLAN_DECODE,
    IPT_PLAN_ENCODE,
    IPT_PLAN_KINDS
} ipt_plan_kind;
typedef struct ipt_vae_key {
    int32_t h, w; /* of the latent */
    ipt_dtype act;
    bool tiny;
} ipt_vae_key;
/* What a plan is recorded for; the adapters' layout is the third part of it. */
typedef struct ipt_plan_key {
    ipt_plan_kind kind;
    uint32_t model; /* ipt_loaded.id, or that of the VAE alone */
    union {
        ipt_unet_key unet;
        ipt_text_key text;
        ipt_vae_key vae;
    };
} ipt_plan_key;
typedef struct ipt_kept_plan {
    ipt_plan_key key;
    int32_t asked; /* rows that were wanted, of which key.unet.batch fit */
    uint64_t used; /* by which request */
    ipt_plan *plan;
    bool is_settled;
    ipt_adapter_set *set; /* whose factors are in it; NULL: none */
} ipt_kept_plan;

struct ipt_engine {
    ipt_ctx *ctx;
    ipt_engine_opts opts;
    char device_opt[256];
    ipt_gpu *gpu;

    ipt_loaded *m;                      /* of the request that runs: one of these */
    ipt_loaded *model[IPT_KEEP_MODELS]; /* NULL: free */
    uint32_t last_id;                   /* of models and VAEs */
    ipt_model *taesd;                   /* --taesd: a VAE alone */
    ipt_weights *taesd_store;
    char taesd_key[IPT_MAX_PATH];
    uint64_t taesd_stamp;
    ipt_dtype taesd_type;
    uint32_t taesd_id;
    ipt_adapter_set *set; /* of the request that runs, or of the last one; NULL: no adapters */

    ipt_kept_plan plan[IPT_PLAN_KINDS][IPT_KEEP_PLANS];
    struct ipt_hashes *hashes; /* of the files of the last request */

    /* of the request that runs */
    uint64_t request; /* its number */
    uint64_t n_plans, bytes_uploaded;
    bool is_folded;  /* its adapters act in the UNet's weights: its plan has none */
    bool holds_unet; /* it goes on with the UNet's plans that it got */
    bool is_tight;   /* these stream weights: with all of them even one row at a time did not fit */
    ipt_arena report_arena;
};

/* --- engine.c --------------------------------------------------------------------------------- */
void ipt_engine_drop_device(ipt_engine *e); /* and all that lives on it */
/* The device memory in use is more than a part of what there is (half of that on CPU devices, whose
 * memory is everyone's): time to drop what earlier requests left. */
bool ipt_engine_is_crowded(const ipt_engine *e, uint64_t part);

/* --- loaded.c: models ------------------------------------------------------------------------- */
/* e->m becomes the request's model: a kept one where nothing changed. */
IPT_CHECKED ipt_status ipt_load_model(ipt_engine *e, const ipt_request *r);
/* Opens the device, settles the model's types; e->taesd becomes the request's tiny VAE. */
IPT_CHECKED ipt_status ipt_load_device(ipt_engine *e, const ipt_request *r);
void ipt_loaded_drop(ipt_engine *e, ipt_loaded **m); /* with its plans */
void ipt_loaded_drop_taesd(ipt_engine *e);
/* Drops models of earlier requests, oldest first; false: there is none. */
bool ipt_loaded_drop_one(ipt_engine *e);
/* The model's own tokenizer for IPT_COMP_TEXT or IPT_COMP_TEXT2; single files carry none: CLIP's,
 * padded with "!" as OpenCLIP does in SD 2.x and SDXL's second.  Ownership: caller.  Errors: those
 * of the files. */
IPT_CHECKED ipt_status ipt_open_tokenizer(ipt_ctx *ctx, const ipt_model *m, int comp,
                                          ipt_tokenizer **out);
/* The weight store of a component, made at first use. */
IPT_CHECKED ipt_status ipt_engine_store(ipt_engine *e, int comp, ipt_weights **out);
void ipt_loaded_drop_store(ipt_engine *e, int comp); /* no plan reads it */

/* --- adapters.c ------------------------------------------------------------------------------- */
/* e->set becomes the request's adapters and those of its prompt's tags, for e->m. */
IPT_CHECKED ipt_status ipt_load_adapters(ipt_engine *e, const ipt_request *r,
                                         const ipt_prompt_lora *extra, size_t n_extra);
void ipt_adapter_set_release(ipt_adapter_set **s);
const ipt_bank *ipt_engine_bank(const ipt_engine *e); /* NULL: no adapters */
const ipt_bank *ipt_unet_bank(const ipt_engine *e);   /* NULL also when they are folded */
size_t ipt_engine_n_file(const ipt_engine *e);

/* --- combine.c: methods that make one adapter of all ------------------------------------------ */
/* What the request's combined adapter depends on beside its n files; NULL where its method makes
 * none.  Ownership: *out, caller, ipt_free.  Errors: IPT_ERR_NOMEM. */
IPT_CHECKED ipt_status ipt_combine_text(ipt_engine *e, const ipt_request *r,
                                        const ipt_prompt_lora *extra, size_t n, char **out);
/* s->one of the open files.  Errors: those of the method (options, kinds, weights);
 * IPT_ERR_CANCELLED. */
IPT_CHECKED ipt_status ipt_combine_set(ipt_engine *e, const ipt_request *r,
                                       const ipt_prompt_lora *extra, ipt_adapter_set *s);

/* --- plans.c ---------------------------------------------------------------------------------- */
/* The plan of a key under the adapters of this request: a kept one, with their factors written when
 * it held others of the same layout, or one recorded now.  asked: as ipt_kept_plan's, 0 for the
 * other kinds.  Borrowed until the request ends.  Errors: those of ipt_plan_create. */
IPT_CHECKED ipt_status ipt_plan_get(ipt_engine *e, const ipt_plan_key *key, int32_t asked,
                                    ipt_plan **out);
/* Settles this request's plans of a component, says what they take, and records what is not yet. */
IPT_CHECKED ipt_status ipt_plans_settle(ipt_engine *e, int comp);
/* A kept plan of the key, or for fewer rows where `asked` were wanted before; NULL: none. */
ipt_kept_plan *ipt_plan_find(ipt_engine *e, const ipt_plan_key *key, int32_t asked);
/* Whether a plan could be made: IPT_OK, or why not.  Nothing is recorded. */
IPT_CHECKED ipt_status ipt_plan_dry(ipt_engine *e, const ipt_plan_key *key);
void ipt_plans_drop(ipt_engine *e, uint32_t model); /* those of a model; 0: all */
/* Plans and weights of this request's model that it does not go on with. */
void ipt_plans_drop_idle(ipt_engine *e);
const ipt_plan_key *ipt_plan_latest(const ipt_engine *e, ipt_plan_kind kind); /* NULL: none */

/* --- settings.c ------------------------------------------------------------------------------- */
/* A request with nothing left open. */
typedef struct ipt_settings {
    ipt_sampler_kind kind;
    ipt_schedule schedule;
    ipt_sampler_config config;
    bool is_unnamed;      /* the scheduler's name would mean other settings than the folder's own */
    bool philox;          /* source of noise; else torch's CPU generator */
    bool lcm_guidance;    /* the strength of guidance is an input of the UNet */
    bool two_rows;        /* a negative row beside each positive one */
    double cfg, strength; /* strength: with a picture to start from */
    int32_t width, height, h, w, channels; /* of the picture; of its latent */
    int32_t steps, skip, count;            /* skip: first steps left out by img2img */
    size_t n;                              /* values of one latent */
} ipt_settings;
/* Fills *s; betas of the scheduler's configuration come from arena.  Errors: IPT_ERR_ARG names the
 * option, what was found and what is expected; IPT_ERR_UNSUPPORTED, IPT_ERR_SHAPE the model's part;
 * IPT_ERR_NOMEM. */
IPT_CHECKED ipt_status ipt_settings_choose(const ipt_engine *e, const ipt_request *r,
                                           ipt_arena *arena, ipt_settings *s);
/* The sampler of these settings.  Ownership: caller.  Errors: those of ipt_sampler_create. */
IPT_CHECKED ipt_status ipt_settings_sampler(ipt_ctx *ctx, const ipt_settings *s, ipt_sampler **out);

/* --- size.c ----------------------------------------------------------------------------------- */
/* Sides of the picture, multiples of f (what the VAE enlarges by).  Both asked for: as asked.  With
 * a picture to start from: one asked for: the other from its aspect; none: the picture's own if the
 * model could have made it (on the grid of f, half to twice the model's area), else the model's
 * area in its aspect.  Else: the model's size.  Errors: IPT_ERR_ARG names a size that would do. */
IPT_CHECKED ipt_status ipt_size_choose(ipt_ctx *ctx, const ipt_model_config *c,
                                       const ipt_request *r, int32_t f, int32_t *width,
                                       int32_t *height);
/* The size on the grid of f at aspect = width / height with about `area` pixels, but not more. */
void ipt_size_within(double aspect, double area, int32_t f, int32_t *w, int32_t *h);

/* --- img2img.c: where a picture starts -------------------------------------------------------- */
/* Noise of one picture, in the order in which it is drawn. */
typedef struct ipt_noise {
    ipt_rng_torch torch;
    uint64_t seed;
    uint32_t calls;
    bool philox;
} ipt_noise;
void ipt_noise_seed(ipt_noise *s, uint64_t seed, bool philox);
void ipt_noise_draw(ipt_noise *s, float *out, size_t n);

/* The encoder's distribution for a picture, and a sample of it drawn for one seed; all [C,h,w]. */
typedef struct ipt_encoding {
    float *mean, *deviation, *latent;
} ipt_encoding;
/* A picture to start from and a mask; all NULL: neither is given. */
typedef struct ipt_start {
    bool mask_channels;   /* the UNet takes the mask and the masked picture's latent */
    bool *repaint;        /* [H,W] of the mask */
    float *mask;          /* [h,w], 1: repaint */
    ipt_encoding picture; /* NULL where nothing of it is needed */
    ipt_encoding masked;  /* with the part to repaint in mid grey; mask_channels only */
} ipt_start;
/* Encodes the request's picture and mask; memory from arena.  Errors: those of the VAE;
 * IPT_ERR_NOMEM. */
IPT_CHECKED ipt_status ipt_start_prepare(ipt_engine *e, const ipt_request *r,
                                         const ipt_settings *set, ipt_arena *arena, ipt_start *out);
/* Draws noise [C,h,w] and what else the start needs (fresh: scratch), and makes the first x. */
void ipt_start_draw(const ipt_start *start, const ipt_engine *e, const ipt_sampler *s,
                    const ipt_settings *set, ipt_noise *source, float *fresh, float *noise,
                    float *x);
/* Puts the picture back outside the mask, noised to the level of evaluation i (keep: scratch). */
void ipt_start_keep(const ipt_start *start, const ipt_sampler *s, int32_t i,
                    const ipt_settings *set, const float *noise, float *keep, float *x);

/* --- paste.c: what a mask protects ------------------------------------------------------------ */
typedef struct ipt_paste {
    const uint8_t *original; /* [H,W,3] the picture in the result's size; NULL: nothing is pasted */
    float *alpha;            /* [H,W] 1: the result, 0: the picture */
} ipt_paste;
/* Standard deviation of the soft edge in pixels: half a latent pixel, 4 for a factor of 8 (A1111's
 * mask blur). */
float ipt_paste_sigma(const ipt_settings *set);
/* alpha [h,w]: 1 where repaint is true, falling to 0 within 2.5 sigma outside of it. */
IPT_CHECKED ipt_status ipt_paste_edge(ipt_ctx *ctx, const bool *repaint, int32_t w, int32_t h,
                                      float sigma, float *alpha);
/* For a request with a mask that does not ask for the raw result; repaint [H,W] or NULL.  Warns of
 * a mask that repaints nothing.  Memory from arena.  Errors: IPT_ERR_NOMEM. */
IPT_CHECKED ipt_status ipt_paste_prepare(ipt_engine *e, const ipt_request *r,
                                         const ipt_settings *set, const bool *repaint,
                                         ipt_arena *arena, ipt_paste *out);
void ipt_paste_apply(const ipt_paste *p, size_t pixels, uint8_t *rgb);

/* --- text.c: prompts to embeddings ------------------------------------------------------------ */
typedef struct ipt_encoded {
    int32_t tokens, width, pooled_width;
    float *text;     /* [tokens, width] */
    float *pooled;   /* [pooled_width] or NULL */
    int32_t *ids[2]; /* [tokens] of each encoder; NULL: there is none */
} ipt_encoded;
typedef struct ipt_prompts {
    const ipt_texts *texts;
    ipt_prompt *(*prompt)[2]; /* [texts->n][encoder] */
    int32_t n_chunk;
    size_t n_embedding;
    struct ipt_ti *embedding; /* textual inversions found in the prompts */
    ipt_arena arena;
} ipt_prompts;
/* Tokens of all texts of a job, in chunks of one number; texts outlive *out. */
IPT_CHECKED ipt_status ipt_prompts_read(ipt_engine *e, const ipt_request *r, const ipt_texts *texts,
                                        ipt_prompts *out);
void ipt_prompts_finish(ipt_prompts *p);
/* Whether the vectors [n,width] or [width] of a word inside an adapter file are some that a text
 * encoder of that width takes; n > 0: they have to be so many, as those for the other encoder are.
 * *found: how many there are. */
bool ipt_word_fits(const ipt_st_tensor *t, int32_t width, int32_t n, int64_t *found);
/* Encodes text `which` under the adapters' gates [n_slot]; memory from arena. */
IPT_CHECKED ipt_status ipt_encode(ipt_engine *e, const ipt_request *r, const ipt_prompts *p,
                                  size_t which, const float *gates, ipt_arena *arena,
                                  ipt_encoded *out);

/* --- fit.c: when a graph passes what the device holds ----------------------------------------- */
/* Less at once may do: device memory, or a limit on bindings, indices, work groups. */
bool ipt_too_large(ipt_status s);
/* Whether a plan like the one that failed can be made for a picture of that size: IPT_OK, or why
 * not. */
typedef ipt_status (*ipt_fit_fn)(ipt_engine *e, const ipt_plan_key *failed, int32_t width,
                                 int32_t height);
/* After a failure `s` of ipt_too_large: returns it with a message that names the largest picture of
 * this aspect that fits, found by asking `fits`; as it was when none does. */
ipt_status ipt_fit_advise(ipt_engine *e, ipt_status s, const ipt_plan_key *failed, int32_t width,
                          int32_t height, ipt_fit_fn fits);
/* A plan for key->batch rows, or for fewer where so many are too large: the batch is halved, *key
 * tells the result.  Errors: IPT_ERR_DEVICE_MEM and IPT_ERR_TOO_LARGE when one row
 * is too large: the message names a size that fits; those of the weights. */
IPT_CHECKED ipt_status ipt_unet_plan(ipt_engine *e, ipt_unet_key *key, ipt_plan **out);

/* --- latent.c: pictures to latents and back --------------------------------------------------- */
/* z [C,h,w] sampler latent -> rgb [3,8h,8w]... f32 in 0..1, stored [H,W,3]. */
IPT_CHECKED ipt_status ipt_decode(ipt_engine *e, const ipt_request *r, const float *latent,
                                  int32_t h, int32_t w, float *rgb);
/* Its plan beforehand. */
IPT_CHECKED ipt_status ipt_decode_plan(ipt_engine *e, const ipt_request *r, int32_t h, int32_t w);
/* Multiply-adds of ipt_decode, near enough to say how long it will take beside a UNet's. */
double ipt_decode_macs(const ipt_engine *e, int32_t h, int32_t w);
/* rgb [H,W,3] in -1..1 -> mean and standard deviation [C,h,w] of the unscaled latent. */
IPT_CHECKED ipt_status ipt_encode_image(ipt_engine *e, const float *rgb, int32_t H, int32_t W,
                                        float *mean, float *deviation);

/* --- trace.c ---------------------------------------------------------------------------------- */
typedef struct ipt_trace ipt_trace;
IPT_CHECKED ipt_status ipt_trace_create(ipt_ctx *ctx, ipt_trace **out);
void ipt_trace_destroy(ipt_trace **t);
/* Copies; t NULL: nothing happens. */
IPT_CHECKED ipt_status ipt_trace_f32(ipt_trace *t, const char *name, const float *v,
                                     const int64_t *dim, int rank);
IPT_CHECKED ipt_status ipt_trace_i32(ipt_trace *t, const char *name, const int32_t *v, int64_t n);
/* IPT_OK when writing the trace leaves the input as it is; else IPT_ERR_ARG naming both.  Either
 * may be NULL. */
IPT_CHECKED ipt_status ipt_trace_spares(ipt_ctx *ctx, const char *trace, const char *input);
IPT_CHECKED ipt_status ipt_trace_write(ipt_trace *t, const char *path);

/* --- infotext.c ------------------------------------------------------------------------------- */
/* Begins to hash the request's files, as soon as they are known.  Errors: IPT_ERR_NOMEM. */
IPT_CHECKED ipt_status ipt_infotext_begin(ipt_engine *e, const ipt_request *r);
/* Waits for the hashes and fills them into the report and its adapters a [ipt_engine_n_file].
 * Errors: IPT_ERR_CANCELLED. */
IPT_CHECKED ipt_status ipt_infotext_hashes(ipt_engine *e, const ipt_request *r, ipt_report *rep,
                                           ipt_adapter_report *a);
/* A1111's "parameters" of a request with nothing left open; memory from arena, NULL when it ran
 * out. */
char *ipt_infotext(ipt_engine *e, const ipt_request *r, const ipt_report *rep, ipt_arena *arena);
#endif
