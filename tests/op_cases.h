/* tests/op_cases.h - how an operator's test cases are written: a function that builds a small
 * graph. test_ops.c runs each case: double reference against the device in f32 and f16 storage
 * (guard bands, NaN poison), gradients against finite differences of the reference, gradient nodes
 * on the device. Every row of ops.def must appear in some case's graph. */
#ifndef IPT_TESTS_OP_CASES_H
#define IPT_TESTS_OP_CASES_H
#include "graph/op.h"

typedef struct case_env {
    ipt_graph *g;
    ipt_dtype act; /* element type of activations in this run */
    struct test_run *run;
} case_env;
/* A random normal INPUT leaf of the activation type (dtype of s is replaced), or exactly `s`. */
ipt_val case_in(case_env *e, const char *name, ipt_shape s);
ipt_val case_in_f32(case_env *e, const char *name, ipt_shape s);
/* An i32 INPUT leaf with values in lo..hi. */
ipt_val case_ids(case_env *e, const char *name, ipt_shape s, int lo, int hi);
/* Marks a result: compared, and part of the scalar that gradients are taken of. */
void case_out(case_env *e, const char *name, ipt_val v);
/* Marks a result that is compared only (statistics, and whatever has no gradient). */
void case_out_nograd(case_env *e, const char *name, ipt_val v);

typedef struct op_case {
    const char *name; /* "linear/ragged" */
    void (*build)(case_env *e);
    bool grad; /* finite-difference check with respect to all float leaves and weights */
    double nmse_f32,
        nmse_f16;  /* 0: the defaults 1e-9 and 1e-6; others with the reason beside them */
    int simd_tile; /* 0: both kernel shapes are tried; 1 simd only; 2 tile only */
} op_case;
/* Each array ends with a NULL name. */
extern const op_case op_cases_gemm[], op_cases_attention[], op_cases_norm[], op_cases_pointwise[],
    op_cases_shape[], op_cases_adapter[], op_cases_state[];
#endif
