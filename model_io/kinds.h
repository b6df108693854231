/* model_io/kinds.h - a kind of adapter as a row of a table: its keys, how their shapes are read,
 * how it acts beside its module, what it changes.  adapter_kinds.c has the table and reads shapes,
 * adapter_delta.c computes. */
#ifndef IPT_MODEL_IO_KINDS_H
#define IPT_MODEL_IO_KINDS_H
#include "model_io/adapter.h"

enum { IPT_ON_WEIGHT = 1, IPT_ON_NORM = 2 }; /* modules a kind can sit on */
enum { IPT_MAX_FILE_RANK = 1 << 16 };
/* What a LoKr that was made from DiffuseKronA's factors also carries: those, for the way back.  No
 * reader needs them. */
#define IPT_KRONA_DOWN ".krona_down"
#define IPT_KRONA_UP ".krona_up"
enum { IPT_LOKR_KRONA_DOWN = 7, IPT_LOKR_KRONA_UP = 8 }; /* their numbers among LoKr's parts */

typedef struct ipt_kind ipt_kind;
struct ipt_kind {
    const char *name;
    ipt_adapter_family family;
    const char *key[IPT_ADAPTER_PARTS]; /* endings, in the order of part[] */
    uint8_t tells;                      /* bits of keys: one of them there, and the kind is meant */
    uint8_t on;
    bool attn_procs;  /* of names like attn1.processor.to_q_lora only */
    bool is_bias;     /* changes the module's bias */
    bool is_product;  /* one part of zeros, and nothing changes */
    bool is_relative; /* needs the model's own values */
    /* Whether the parts are this kind's, where keys alone do not tell; NULL: they do. */
    bool (*fits)(const ipt_module *m, const ipt_st_tensor *const part[]);
    /* Checks shapes; sets act, rank, n_col, kron.  Errors: IPT_ERR_SHAPE, IPT_ERR_FORMAT. */
    ipt_status (*read)(ipt_adapter_file *f, const ipt_module *m, ipt_adapter_module *a);
    /* LOW_RANK: down [n_col, fan], up [out, n_col] with the scale; fan = in*kh*kw, file order.  w:
     * the base in file order, [out, fan], where is_relative. */
    ipt_status (*factors)(ipt_ctx *ctx, const ipt_adapter_module *a, const double *w, double *down,
                          double *up);
    /* The change [out, fan] in file order, before a magnitude. */
    ipt_status (*delta)(ipt_ctx *ctx, const ipt_adapter_module *a, const double *w, double *dw);
    bool is_scaled; /* alpha / rank, and LyCORIS' scalar */
};
/* The table: rows until name is NULL; a module's first row that fits counts. */
extern const ipt_kind ipt_kinds[];
extern const ipt_kind ipt_kind_cloneofsimo; /* keys are ordinals: not in the table */

static inline size_t ipt_fan(const ipt_adapter_module *a)
{
    return (size_t)a->in * (size_t)a->kh * (size_t)a->kw;
}

/* --- adapter_delta.c: for the tools ----------------------------------------------------------- */
/* As ipt_adapter_delta, in file order: [out, fan]; base still in logical order. */
IPT_CHECKED ipt_status ipt_adapter_file_delta(ipt_ctx *ctx, const ipt_adapter_module *m,
                                              const double *base, double *delta);
/* LOW_RANK: down [n_col, fan], up [out, n_col] with the scale, file order.  base as above. */
IPT_CHECKED ipt_status ipt_adapter_factors(ipt_ctx *ctx, const ipt_adapter_module *m,
                                           const double *base, double *down, double *up);
/* KRON: p [o1,i1], q [o2, fan/i1] with the scale.  Ownership: caller, ipt_free. */
IPT_CHECKED ipt_status ipt_adapter_kron_pair(ipt_ctx *ctx, const ipt_adapter_module *m, double **p,
                                             double **q);
/* --- adapter_delta.c: members of the table ---------------------------------------------------- */
#define IPT_FACTORS(name)                                                                          \
    ipt_status name(ipt_ctx *ctx, const ipt_adapter_module *a, const double *w, double *down,      \
                    double *up)
#define IPT_DELTA(name)                                                                            \
    ipt_status name(ipt_ctx *ctx, const ipt_adapter_module *a, const double *w, double *dw)
IPT_CHECKED IPT_FACTORS(ipt_lora_factors);
IPT_CHECKED IPT_FACTORS(ipt_loha_factors);
IPT_CHECKED IPT_FACTORS(ipt_lokr_factors); /* of kernels whose taps are factored too */
IPT_CHECKED IPT_FACTORS(ipt_glora_factors);
IPT_CHECKED IPT_DELTA(ipt_low_rank_delta); /* up x down, of the row's factors */
IPT_CHECKED IPT_DELTA(ipt_loha_delta);
IPT_CHECKED IPT_DELTA(ipt_kron_delta);
IPT_CHECKED IPT_DELTA(ipt_glora_delta);
IPT_CHECKED IPT_DELTA(ipt_given_delta); /* the part itself */
IPT_CHECKED IPT_DELTA(ipt_set_delta);   /* the part instead of the base */
IPT_CHECKED IPT_DELTA(ipt_ia3_delta);
IPT_CHECKED IPT_DELTA(ipt_peft_ia3_delta);
IPT_CHECKED IPT_DELTA(ipt_oft_delta);
IPT_CHECKED IPT_DELTA(ipt_boft_delta);
#endif
