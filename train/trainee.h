/* train/trainee.h - the adapter that is trained beside a UNet: which modules it sits on, its
 * tensors and their first values, what a plan has to be told, and the file it becomes.
 *
 * Must not know: pictures, optimisers, how long.
 * Threads: everything belongs to the thread of its ctx. */
#ifndef IPT_TRAIN_TRAINEE_H
#define IPT_TRAIN_TRAINEE_H
#include "graph/graph.h"
#include "model_io/adapter_write.h"

typedef enum ipt_trainee_kind {
    IPT_TRAINEE_LORA, /* with conv_rank > 0: LoCon */
    IPT_TRAINEE_LOKR, /* both factors whole */
    IPT_TRAINEE_KRONA /* LoKr of a given first factor, A [a1,a2] */
} ipt_trainee_kind;
typedef enum ipt_reach {
    IPT_REACH_ATTENTION,   /* to_q, to_k, to_v, to_out.0: diffusers' scripts, DiffuseKronA */
    IPT_REACH_TRANSFORMER, /* every product of a transformer block: kohya */
} ipt_reach;
typedef struct ipt_trainee_opts {
    ipt_trainee_kind kind;
    ipt_reach reach;
    int32_t rank, conv_rank;  /* LORA; conv_rank 0: no kernels of more than one tap */
    double alpha, conv_alpha; /* the change is alpha / rank times the product */
    int32_t factor;           /* LOKR: as in ipt_kron_factorise */
    int32_t a1, a2; /* KRONA; a side that it does not divide takes the largest part below */
    uint64_t seed;  /* of the first values */
} ipt_trainee_opts;

typedef struct ipt_trainee {
    ipt_ctx *ctx;
    ipt_arena arena; /* owns all that follows */
    ipt_trainee_opts opts;
    const ipt_module *module; /* borrowed, the list that was given */
    size_t n_module;
    ipt_adapter_site *site; /* [n_site]; row 0 of the gates is of products, row 1 of kernels */
    size_t *from;           /* [n_site] its module */
    size_t n_site;
    ipt_state_item *item; /* [2 n_site]: the two factors of each site */
    size_t n_item;
} ipt_trainee;
enum { IPT_TRAINEE_GATES = 2 }; /* rows of "gates" */

/* modules: of the model, as ipt_adapter_open wants them; they outlive the trainee.  act: the type
 * of activations.  Errors: IPT_ERR_ARG (a rank or factor that cannot be), IPT_ERR_MISSING (no
 * module is within reach), IPT_ERR_NOMEM. */
IPT_CHECKED ipt_status ipt_trainee_create(ipt_ctx *ctx, const ipt_module *modules, size_t n,
                                          const ipt_trainee_opts *o, ipt_dtype act,
                                          ipt_trainee **out);
void ipt_trainee_destroy(ipt_trainee **t);
/* First values into a state that has ipt_train_groups of its items: the adapter changes nothing
 * yet. LoRA: a uniform in +-1 / sqrt(inputs) (PEFT), b zero; Kronecker: the first factor normal
 * with deviation 1 / a1 (DiffuseKronA) or uniform as LoRA's (LyCORIS), the second zero. */
IPT_CHECKED ipt_status ipt_trainee_begin(const ipt_trainee *t, ipt_state *s);
/* What a plan of ipt_train_gradients for `batch` rows has to be told once: slots and gates. */
IPT_CHECKED ipt_status ipt_trainee_prepare(const ipt_trainee *t, ipt_plan *p, int32_t batch);
/* The values as an adapter file's tensors.  Errors: those of ipt_adapter_out. */
IPT_CHECKED ipt_status ipt_trainee_write(const ipt_trainee *t, const ipt_state *s,
                                         ipt_adapter_out *out);
#endif
