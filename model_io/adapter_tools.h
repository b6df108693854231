/* model_io/adapter_tools.h - what can be done to adapter files without a device: convert, resize,
 * merge, extract, and fold into a checkpoint.
 *
 * Must not know: engines, pictures, how the program prints.
 * Everything is computed in double; values are rounded once, when they are written.  The reported
 * error of low-rank factors has that rounding in it.
 * Threads: a tool belongs to the thread of its ctx.  ipt_cancelled is polled before every module:
 * IPT_ERR_CANCELLED, and nothing was written. */
#ifndef IPT_MODEL_IO_ADAPTER_TOOLS_H
#define IPT_MODEL_IO_ADAPTER_TOOLS_H
#include "model_io/adapter_write.h"
#include "model_io/lego.h"
#include "model_io/svd.h"

enum { IPT_TOOL_MAX_RANK = 8192, IPT_TOOL_MAX_FILES = 32 };

typedef void (*ipt_tool_step_fn)(void *user, size_t done, size_t total);
typedef struct ipt_tool_report {
    size_t n_module;            /* written */
    size_t n_exact;             /* of those: every tensor bit for bit, or a sum without loss */
    size_t n_empty;             /* left out: nothing changes in them */
    size_t n_left_out;          /* changes that the result cannot hold (biases, norms, words) */
    size_t n_clamped;           /* LEGO: modules of fewer units than the rank that was asked for */
    int32_t rank_min, rank_max; /* of low-rank factors written; 0: none */
    double error_worst;         /* |change - written| / |change| of one module ... */
    char worst[IPT_DIR_MAX / 16]; /* ... and which */
    double error_sum;             /* of all modules, for the mean */
    double total, lost;           /* squared norms of all changes and of what was lost */
} ipt_tool_report;
typedef struct ipt_tool {
    ipt_ctx *ctx;
    const ipt_module *module; /* [n_module] */
    size_t n_module;
    ipt_weights
        *weights[IPT_COMP_COUNT]; /* of the model, for kinds relative to it; NULL: not here */
    bool want_no_errors;          /* the report's: they take longer than some of the work */
    bool conv_projections; /* the UNet's proj_in and proj_out are kernels of one tap, not linear */
    ipt_adapter_out *out;
    ipt_st_dtype dtype;    /* of what is written; IPT_ST_COUNT: as it came */
    ipt_tool_step_fn step; /* may be NULL */
    void *user;
    ipt_tool_report report; /* zeroed by the caller, added to */
} ipt_tool;

/* --- convert ---------------------------------------------------------------------------------- */
typedef enum ipt_adapter_target {
    IPT_TO_SAME, /* the kinds stay, tensors bit for bit: names and settings change */
    IPT_TO_LORA,
    IPT_TO_LOKR,
    IPT_TO_KRONA,
} ipt_adapter_target;
typedef struct ipt_convert_opts {
    ipt_adapter_target to;
    int32_t rank;   /* LORA: of what has no low rank of its own; 0: none given */
    int32_t factor; /* LOKR: LyCORIS' factor; -1: the most square cut */
    int32_t a1, a2; /* KRONA: P is a1 x a2; 0: 4 x 64 or the next smaller that divide */
} ipt_convert_opts;
/* Writes every part of `file` into t->out.  LoRA of LoRA, LoKr of DiffuseKronA and back are exact.
 * Others: the nearest in the Frobenius norm (Eckart and Young; Van Loan and Pitsianis 1993).
 * Errors: IPT_ERR_UNSUPPORTED (the target cannot hold a part: names it), IPT_ERR_ARG (a rank is
 * needed, a cut does not divide), IPT_ERR_MISSING (the model's weights are needed), those of
 * ipt_adapter_out. */
IPT_CHECKED ipt_status ipt_adapter_convert(ipt_tool *t, const ipt_adapter_file *file,
                                           const ipt_convert_opts *o);
/* --- resize ----------------------------------------------------------------------------------- */
typedef struct ipt_resize_opts {
    int32_t rank;      /* at most; 0: no limit */
    int32_t conv_rank; /* of kernels of more than one tap; 0: as rank */
    double keep; /* share of each module's Frobenius norm (kohya's sv_fro); 0: by rank alone */
} ipt_resize_opts;
/* LoRA factors of lower rank; a module that has no more is written as it is.  Errors: as above. */
IPT_CHECKED ipt_status ipt_adapter_resize(ipt_tool *t, const ipt_adapter_file *file,
                                          const ipt_resize_opts *o);
/* The rank that kohya's resize_lora (index_sv_fro) would choose, but never less than all values
 * where all are needed: smallest r with sum s[0..r-1]^2 >= keep^2 total. */
size_t ipt_rank_for(const double *s, size_t n, double total, double keep);

/* --- merge ------------------------------------------------------------------------------------ */
typedef enum ipt_merge_method {
    IPT_MERGE_CAT, /* the exact weighted sum: ranks add up */
    IPT_MERGE_SVD, /* its best approximation of a rank */
    IPT_MERGE_LINEAR,
    IPT_MERGE_TIES,
    IPT_MERGE_DARE_LINEAR,
    IPT_MERGE_DARE_TIES,
    IPT_MERGE_MAGNITUDE_PRUNE, /* these five on the factors, which need one rank ... */
    IPT_MERGE_TIES_SVD,
    IPT_MERGE_DARE_LINEAR_SVD,
    IPT_MERGE_DARE_TIES_SVD,
    IPT_MERGE_MAGNITUDE_PRUNE_SVD, /* ... and these on the changes themselves, then a rank */
    IPT_MERGE_LEGO,                /* the ranks of all, clustered: lego.h */
    IPT_MERGE_LORAHUB,             /* (sum w B) (sum w A), quadratic in the weights */
    IPT_MERGE_COUNT
} ipt_merge_method;
const char *ipt_merge_name(ipt_merge_method m); /* as PEFT's combination_type: "ties_svd" */
typedef struct ipt_merge_opts {
    ipt_merge_method method;
    int32_t rank;       /* of SVD methods; 0: the largest of the files'.  LEGO: as in lego.h */
    double density;     /* share of values that TIES, DARE and pruning keep, 0 < density <= 1 */
    bool by_frequency;  /* majority sign by count instead of by sum */
    uint64_t seed;      /* of DARE: the same seed, the same file */
    ipt_lego_opts lego; /* its rank is not read */
} ipt_merge_opts;
typedef struct ipt_merge_input {
    const ipt_adapter_file *file;
    double weight, te_weight;
} ipt_merge_input;
/* What PEFT's add_weighted_adapter computes (same scalings, signs and divisors).  LEGO: units of
 * the weighted adapters, each counting by the size of its adapter's weight; kinds of low-rank
 * factors only, as LoraHub (Huang et al. 2023, arXiv 2307.13269), where an adapter of lower rank
 * has zeros for the rest and each side has the root of its scale.  Biases and norms are weighted
 * sums under every method.  Errors:
 * IPT_ERR_UNSUPPORTED (ranks or kinds differ under a method on factors: names the files and what
 * works), else as ipt_adapter_convert. */
IPT_CHECKED ipt_status ipt_adapter_merge(ipt_tool *t, const ipt_merge_input *in, size_t n,
                                         const ipt_merge_opts *o);

/* --- extract ---------------------------------------------------------------------------------- */
typedef struct ipt_extract_opts {
    int32_t rank;      /* of linear modules and kernels of one tap */
    int32_t conv_rank; /* of other kernels; 0: they are left out */
    double keep;       /* as in ipt_resize_opts, below these ranks; 0: off */
} ipt_extract_opts;
/* The difference of two models, t->weights being the one it is relative to, `tuned` the other, as
 * LoRA factors in t->dtype (IPT_ST_COUNT: F32).  Modules without a difference are left out;
 * kernels, biases and norms that differ and are not extracted count as left out, and as lost.
 * Errors: those of the weights. */
IPT_CHECKED ipt_status ipt_adapter_extract(ipt_tool *t, ipt_weights *const tuned[IPT_COMP_COUNT],
                                           const ipt_extract_opts *o);

/* --- bake ------------------------------------------------------------------------------------- */
typedef struct ipt_bake_opts {
    ipt_st_dtype dtype; /* of every float tensor; IPT_ST_COUNT: each keeps its own */
} ipt_bake_opts;
/* Writes the model again, in its own layout (a single file, or a new folder with all files of the
 * old one but weights that nobody reads), with the weighted changes of all adapters in its weights:
 * W' = W + sum w delta, in double, rounded once.  Untouched tensors keep their bits, metadata
 * stays. Errors: IPT_ERR_UNSUPPORTED (a touched tensor of a dtype that is not written: F8,
 * integers), IPT_ERR_ARG (a value does not fit the dtype), IPT_ERR_OUTPUT, IPT_ERR_CANCELLED. */
IPT_CHECKED ipt_status ipt_model_bake(ipt_tool *t, ipt_model *m, const ipt_merge_input *in,
                                      size_t n, const ipt_bake_opts *o, const char *path);

/* --- shared by the files above ---------------------------------------------------------------- */
/* The model's own values that a part is relative to, in logical order; NULL where it is not.
 * Ownership: caller, ipt_free.  Errors: IPT_ERR_MISSING (there is no model), those of the weights.
 */
IPT_CHECKED ipt_status ipt_tool_base(ipt_tool *t, const ipt_adapter_module *a, double **base);
/* The change of a weight in singular values, in file order.  rank as in svd.h. */
IPT_CHECKED ipt_status ipt_tool_svd(ipt_tool *t, const ipt_adapter_module *a, size_t rank,
                                    ipt_svd *out);
/* The change, [out, fan] in file order (bias, norm: [out]).  Ownership: caller, ipt_free. */
IPT_CHECKED ipt_status ipt_tool_delta(ipt_tool *t, const ipt_adapter_module *a, double **delta);
/* The squared Frobenius norm of a part's change, without making it where it has factors. */
IPT_CHECKED ipt_status ipt_tool_norm2(ipt_tool *t, const ipt_adapter_module *a, double *norm2);
double ipt_tool_norm2_cost(const ipt_adapter_module *a); /* its multiply-adds, roughly */
/* Writes what is kept of d as factors sqrt(s) v and sqrt(s) u with alpha = rank; axes: 2 or 4. Adds
 * to the report. */
IPT_CHECKED ipt_status ipt_tool_put_svd(ipt_tool *t, size_t module, const ipt_svd *d,
                                        ipt_st_dtype dtype, int axes);
/* Factors in double: down [rank, fan], up [out, rank]; alpha 1 a rank. */
IPT_CHECKED ipt_status ipt_tool_put_factors(ipt_tool *t, size_t module, const double *down,
                                            const double *up, size_t rank, ipt_st_dtype dtype,
                                            int axes);
/* A change of a bias or a norm, [out]. */
IPT_CHECKED ipt_status ipt_tool_put_vector(ipt_tool *t, size_t module, bool is_bias,
                                           const double *v, ipt_st_dtype dtype);
/* A plain LoRA's tensors as they are. */
IPT_CHECKED ipt_status ipt_tool_put_same(ipt_tool *t, const ipt_adapter_module *a);
/* A LoRA of three factors (Tucker) as two: the middle goes into down. */
IPT_CHECKED ipt_status ipt_tool_put_expanded(ipt_tool *t, const ipt_adapter_module *a);
bool ipt_tool_is_lora(const ipt_adapter_module *a); /* of two or three factors, no magnitude */
bool ipt_tool_is_vector(const ipt_adapter_module *a);
/* What a part's factors are written in: the tool's dtype, else their own where it can be written,
 * else F32.  Axes of a module's matrices, 2 or 4: a LoRA's own, else those of the module's kind. */
ipt_st_dtype ipt_tool_dtype(const ipt_tool *t, const ipt_adapter_module *a);
int ipt_tool_axes(const ipt_tool *t, const ipt_adapter_module *a);
int ipt_tool_module_axes(const ipt_tool *t, size_t module);
/* A module's own weight or bias from a store, in logical order.  Ownership: caller, ipt_free. */
IPT_CHECKED ipt_status ipt_tool_read(ipt_tool *t, ipt_weights *w, const ipt_module *m, bool is_bias,
                                     double **out);
/* Notes a module with its squared norm and what was lost of it; exact: nothing was computed. */
void ipt_tool_note(ipt_tool *t, size_t module, double total, double lost, int32_t rank, bool exact);
/* Before module `done`: tells the step function.  Errors: IPT_ERR_CANCELLED. */
IPT_CHECKED ipt_status ipt_tool_step(ipt_tool *t, size_t done, size_t total);
#endif
