/* engine/lora_tools.h - adapter files as the program works on them: which model they belong to,
 * what is written where, what is reported.
 *
 * Must not know: devices; how anything is printed.
 * Threads: everything belongs to the thread of its ctx.
 * Every function writes its output whole or not at all, reads an adapter back after writing it, and
 * returns a JSON object (the caller's, ipt_free) with "out", "modules", "exact", "empty",
 * "left_out", "rank_min", "rank_max", "error" {"worst", "worst_module", "mean", "total"}, "ms" and
 * what is said below.  Errors: IPT_ERR_ARG (a setting: names option, found, expected), those of the
 * files, IPT_ERR_OUTPUT, IPT_ERR_CANCELLED, IPT_ERR_NOMEM. */
#ifndef IPT_ENGINE_LORA_TOOLS_H
#define IPT_ENGINE_LORA_TOOLS_H
#include "engine/impasto.h"

typedef struct ipt_lora_job {
    const char *model, *config_dir; /* whose modules they are; NULL: found by the keys */
    const char *out;                /* file; PEFT: a new folder */
    const char *format;             /* "kohya", "peft", "diffusers"; NULL: by the kind */
    const char *dtype;              /* "f32", "f16", "bf16"; NULL or "same": as it came */
    bool allow_partial;             /* take files of which some keys fit nothing */
    ipt_progress_fn progress;       /* may be NULL; called when it takes longer than a second */
    void *user;
} ipt_lora_job;

/* to: a format's name (the kinds stay), or "lora", "lokr", "krona".  rank 0: none given.  kron:
 * "4x64", NULL: chosen.  factor: LyCORIS', -1: the most square. */
typedef struct ipt_lora_convert_opts {
    const char *to, *kron;
    int32_t rank, factor;
} ipt_lora_convert_opts;
IPT_CHECKED ipt_status ipt_lora_convert(ipt_ctx *ctx, const ipt_lora_job *job, const char *lora,
                                        const ipt_lora_convert_opts *o, char **json);
/* rank, conv_rank 0: no limit; keep 0: by rank alone. */
typedef struct ipt_lora_resize_opts {
    int32_t rank, conv_rank;
    double keep;
} ipt_lora_resize_opts;
IPT_CHECKED ipt_status ipt_lora_resize(ipt_ctx *ctx, const ipt_lora_job *job, const char *lora,
                                       const ipt_lora_resize_opts *o, char **json);
/* method: PEFT's combination types, "dare" for dare_linear, "lego", "lorahub".  JSON: also "method"
 * and "clamped", modules with fewer ranks than `rank` (lego). */
typedef struct ipt_lora_merge_opts {
    const char *method, *majority; /* NULL: "cat"; "total" or "frequency" */
    int32_t rank;
    double density;
    uint64_t seed;
    const char *lego_norm;                /* "2" (NULL), "inf", "off" */
    const char *lego_output, *lego_gauge; /* "on" (NULL), "off" */
} ipt_lora_merge_opts;
IPT_CHECKED ipt_status ipt_lora_merge(ipt_ctx *ctx, const ipt_lora_job *job, const ipt_lora *lora,
                                      size_t n, const ipt_lora_merge_opts *o, char **json);
extern const char ipt_lora_merge_methods[]; /* their names, space separated */
/* tuned - job->model (needed) as a LoRA. */
typedef struct ipt_lora_extract_opts {
    int32_t rank, conv_rank;
    double keep;
} ipt_lora_extract_opts;
IPT_CHECKED ipt_status ipt_lora_extract(ipt_ctx *ctx, const ipt_lora_job *job, const char *tuned,
                                        const ipt_lora_extract_opts *o, char **json);
/* job->model (needed) with the adapters in its weights, in its own layout; job->format is not used.
 */
IPT_CHECKED ipt_status ipt_model_bake_loras(ipt_ctx *ctx, const ipt_lora_job *job,
                                            const ipt_lora *lora, size_t n, char **json);
#endif
