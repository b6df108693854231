/* tests/golden.h - what the tests of whole models share: golden files, measures of difference, and
 * a bench on which graphs run (host references, or a device with one of the kernel shapes).
 *
 * Everything here fails the running cmocka test on an error and never returns one. */
#ifndef IPT_TESTS_GOLDEN_H
#define IPT_TESTS_GOLDEN_H
#include "model_io/model_io.h"
#include "tests/support.h"

/* Path of a file in tests/data; name is a string literal. */
#define GOLDEN(name) IPT_TEST_DATA "/" name

/* --- golden files ------------------------------------------------------------------------------
 */
/* dir/name.safetensors.  Ownership: caller, ipt_safetensors_close. */
ipt_safetensors *golden_open(ipt_ctx *ctx, const char *dir, const char *name);
/* Values as f32 in the order of the file; n (may be NULL): count.  Ownership: caller, ipt_free. */
float *golden_f32(ipt_ctx *ctx, const ipt_safetensors *st, const char *name, size_t *n);
int32_t *golden_i32(ipt_ctx *ctx, const ipt_safetensors *st, const char *name, size_t *n);
/* A tensor [N,C,H,W] as [N,H,W,C]; dims of rank 2 stay as they are.  dim (may be NULL): N,C,H,W. */
float *golden_nhwc(ipt_ctx *ctx, const ipt_safetensors *st, const char *name, int32_t dim[4]);
void golden_to_nhwc(const float *nchw, const int32_t dim[4], float *nhwc); /* dim: N,C,H,W */
void golden_to_nchw(const float *nhwc, const int32_t dim[4], float *nchw);
bool golden_has(const ipt_safetensors *st, const char *name);

/* --- measures: got against ref; NaN gives NaN or infinity, which no limit passes
 * ------------------ */
double golden_nmse(const float *ref, const float *got, size_t n);     /* |d|^2 / |ref|^2 */
double golden_max_diff(const float *ref, const float *got, size_t n); /* max |d| */
double golden_max_rel(const float *ref, const float *got, size_t n);  /* max |d| / max |ref| */
/* Fails the test, naming both values, when value > limit or value is NaN. */
void golden_at_most(double value, double limit, const char *what, ...) IPT_PRINTF(3, 4);

/* --- bench --------------------------------------------------------------------------------------
 */
typedef struct bench {
    ipt_ctx *ctx;
    ipt_gpu *gpu; /* NULL: host references in double */
    const char *name;
    int n_line;             /* log lines so far; the first few are printed */
    ipt_status gpu_status;  /* why there is no device: bench_ready skips or fails the test */
    ipt_dtype weights, act; /* element types to use now; F32 unless a test sets them */
} bench;
/* Runs `tests` (an array) on the host and on a device with both kernel shapes; *state is the bench.
 * Returns the number of failed tests, and of benches on which the validation layer said anything.
 */
#define bench_run_all(tests) bench_run(tests, IPT_COUNT(tests))
int bench_run(const struct CMUnitTest *tests, size_t n);
/* The bench; skips the test when there is no device, fails it when the device or the validation
 * layer cannot be had. */
bench *bench_ready(void **state);
/* The same for tests of what only devices do (f16: with 16-bit storage); on the host, or on a
 * device that cannot, the test is skipped and says why. */
bench *bench_device(void **state, bool f16);

ipt_model *bench_model(bench *b, const char *path, const char *config_dir);
ipt_weights *bench_weights(bench *b, ipt_model *m, int comp);
/* Creates the plan and destroys the graph. */
ipt_plan *bench_plan(bench *b, ipt_graph **g, ipt_weights *w);

/* --- whole parts ---------------------------------------------------------------------------------
 */
enum { GOLDEN_MAX_BATCH = 4 };
typedef struct unet_call {
    int32_t n, h, w, tokens, channels;
    double t[GOLDEN_MAX_BATCH]; /* time step of every row */
    const float *x;             /* [N,h,w,channels] */
    const float *text;          /* [N,tokens,cross_dim] */
    const float *pooled;        /* [N,p]: SDXL, else NULL */
    const float *time_ids;      /* [N,6]: SDXL, else NULL */
    const float *w_emb;         /* [N,time_cond_dim]: LCM, else NULL */
} unet_call;
/* Writes the inputs of `c` that the configuration asks for. */
void unet_write(bench *b, ipt_plan *p, const ipt_unet_config *u, const unet_call *c);
/* Builds, runs once and reads eps [N,h,w,4] (channels last). */
void unet_eval(bench *b, ipt_model *m, ipt_weights *w, const unet_call *c, float *eps);
/* The call that a golden file holds: keys "sample<suffix>", "timestep<suffix>", context_key, ...;
 * everything that unet_call points to is owned by `own` (unet_case_free). */
typedef struct unet_case {
    unet_call call;
    float *own[5];
    int32_t dim[4]; /* of the sample: N,C,H,W */
    size_t count;
} unet_case;
void unet_case_load(bench *b, const ipt_safetensors *st, const ipt_unet_config *u,
                    const char *suffix, const char *context_key, unet_case *out);
void unet_case_free(unet_case *c);
#endif
