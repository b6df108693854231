/* tests/test_generate.c - whole requests through the engine: 20-step trajectories against
 * diffusers' goldens, img2img and inpainting, LoRAs as gates, batches, cancel, the default model.
 */
#include "tests/golden.h"

#include "engine/impasto.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char *const DATA = IPT_TEST_DATA;

typedef struct fixture {
    ipt_ctx *ctx;
    ipt_engine *engine;
    char trace[64];
} fixture;

static void print_line(void *user, ipt_log_level level, const char *line)
{
    (void)user;
    if (level == IPT_LOG_ERROR)
        print_message("%s\n", line);
}

static fixture open_engine(ipt_precision precision)
{
    fixture f = {0};
    assert_int_equal(ipt_ctx_create(print_line, NULL, &f.ctx), IPT_OK);
    f.engine = test_engine(&f.ctx, precision, 0);
    ipt_name(f.trace, sizeof f.trace, "/tmp/impasto-trace-%ld.safetensors", (long)getpid());
    return f;
}

static void close_engine(fixture *f)
{
    unlink(f->trace);
    test_engine_done(&f->engine, &f->ctx);
}

static const char *meta(const ipt_safetensors *st, const char *key, const char *dflt)
{
    const char *v = ipt_safetensors_meta(st, key);
    return v ? v : dflt;
}

/* A picture of the golden file ([1,H,W,3] or a mask [1,H,W], values 0..1). */
static ipt_image golden_picture(fixture *f, const ipt_safetensors *st, const char *name, int32_t w,
                                int32_t h)
{
    size_t n = 0, pixels = (size_t)w * (size_t)h;
    float *v = golden_f32(f->ctx, st, name, &n);
    ipt_image im = {w, h, ipt_alloc(f->ctx, pixels * 3)};
    assert_non_null(im.rgb);
    assert_true(n == pixels || n == pixels * 3);
    for (size_t i = 0; i < pixels * 3; i++)
        im.rgb[i] = (uint8_t)lrintf(v[n == pixels ? i / 3 : i] * 255.0F);
    ipt_free(v);
    return im;
}

typedef enum measure { MAX_DIFF, MAX_RELATIVE, NMSE, PICTURE, SHARE } measure;
typedef struct limit {
    const char *prefix;
    measure how;
    double f32, f16;
} limit;

static const limit LIMITS[] = {
    {"ids", MAX_DIFF, 0, 0},
    {"time", MAX_RELATIVE, 1e-6, 1e-6}, /* timesteps, time_ids: f32 rounds elsewhere */
    {"noise", MAX_DIFF, 2e-6, 2e-6},    /* logarithm and cosine of another library */
    {"text", MAX_RELATIVE, 1e-4, 1e-2},
    {"pooled", MAX_RELATIVE, 1e-4, 1e-2},
    {"eps_step", NMSE, 1e-8, 1e-3},        /* one evaluation is 1e-11 off, steps add up */
    {"latent", NMSE, 1e-6, 1e-3},          /* issue: 20-step latents */
    {"image", PICTURE, 1.0 / 255, 3.2e-5}, /* f16: mean square of a PSNR of 45 dB */
    {"map_step", NMSE, 1e-8, 1e-3},        /* the rest: CLoRA */
    {"mask_step", SHARE, 1e-3, 1e-2},      /* of cells that differ */
    {"loss", MAX_RELATIVE, 1e-4, 1e-2},
    {"grad", MAX_RELATIVE, 1e-3, 1e-1},
    {"moved_step", NMSE, 1e-6, 1e-3},
};
/* What a golden holds beside results: the request's pictures and the encoder's draw. */
static const char *const INPUTS[] = {"init", "mask", "vae_noise", "positions"};

static bool is_input(const char *key)
{
    for (size_t i = 0; i < IPT_COUNT(INPUTS); i++)
        if (strcmp(key, INPUTS[i]) == 0)
            return true;
    return strncmp(key, "region_mask", 11) == 0;
}

static double measured(const limit *l, bool f16, const float *want, const float *got, size_t n)
{
    if (l->how == NMSE)
        return golden_nmse(want, got, n);
    if (l->how == MAX_RELATIVE)
        return golden_max_rel(want, got, n);
    double sum = 0;
    for (size_t k = 0; l->how == SHARE && k < n; k++)
        sum += fabsf(want[k] - got[k]) > 0.5F;
    if (l->how == SHARE)
        return sum / (double)n;
    if (l->how == MAX_DIFF || !f16)
        return golden_max_diff(want, got, n);
    for (size_t k = 0; k < n; k++)
        sum += (double)((want[k] - got[k]) * (want[k] - got[k]));
    return sum / (double)n;
}

/* What a golden of CLoRA has otherwise than a trace: maps of the first tokens alone; masks of the
 * world without concepts; texts of all worlds. */
static void match_shapes(const ipt_st_tensor *want, const ipt_st_tensor *got, float *a, size_t *n,
                         float *b, size_t *m)
{
    if (strncmp(want->name, "map_step", 8) == 0) {
        const size_t few = (size_t)want->dim[2], all = (size_t)got->dim[2],
                     more = (size_t)(want->dim[0] - got->dim[0]) * (size_t)want->dim[1] * few;
        memmove(a, a + more, (*n - more) * sizeof *a); /* full masks leave world 0 out */
        *n -= more;
        for (size_t i = 0; i < *n; i++)
            b[i] = b[i / few * all + i % few];
        *m = *m / all * few;
    } else if (strncmp(want->name, "mask_step", 9) == 0) {
        const size_t first = (size_t)(want->dim[1] * want->dim[2]);
        memmove(a, a + first, (*n - first) * sizeof *a);
        *n -= first;
    } else if (*n > *m && (strcmp(want->name, "ids") == 0 || strcmp(want->name, "text") == 0)) {
        *n = *m;
    } else if (strcmp(want->name, "loss") == 0) {
        *m = 1;
    }
}

/* The name in a trace: a golden's gradient and loss are those of the first step. */
static const char *traced(const char *key)
{
    return strcmp(key, "grad") == 0 ? "grad_step0" : strcmp(key, "loss") == 0 ? "loss_step0" : key;
}

static void compare_one(fixture *f, const char *name, const ipt_safetensors *want,
                        const ipt_safetensors *got, const char *key, bool f16)
{
    size_t n = 0, m = 0, which = 0;
    while (which < IPT_COUNT(LIMITS) &&
           strncmp(key, LIMITS[which].prefix, strlen(LIMITS[which].prefix)) != 0)
        which++;
    if (which == IPT_COUNT(LIMITS))
        fail_msg("%s: no limit is known for %s", name, key);
    if (!golden_has(got, traced(key)))
        fail_msg("%s: %s is missing in the trace", name, key);
    float *a = golden_f32(f->ctx, want, key, &n), *b = golden_f32(f->ctx, got, traced(key), &m);
    match_shapes(ipt_safetensors_find(want, key), ipt_safetensors_find(got, traced(key)), a, &n, b,
                 &m);
    assert_int_equal(n, m);
    /* a moved latent is off by what its gradient is: tiny SD 2 makes 1.3e-8 of it */
    const double slack = strstr(name, "_clora") ? 4 : 1;
    golden_at_most(measured(&LIMITS[which], f16, a, b, n),
                   slack * (f16 ? LIMITS[which].f16 : LIMITS[which].f32), "%s: %s", name, key);
    ipt_free(a);
    ipt_free(b);
}

/* Every result of the golden; a key that the trace lacks is a failure. */
static void compare_traces(fixture *f, const char *name, const ipt_safetensors *want, bool f16)
{
    ipt_safetensors *got = NULL;
    assert_ok(f->ctx, ipt_safetensors_open(f->ctx, f->trace, &got));
    assert_true(golden_has(want, "eps_step0") && golden_has(want, "latent_step0"));
    for (size_t i = 0; i < ipt_safetensors_count(want); i++)
        if (!is_input(ipt_safetensors_at(want, i)->name))
            compare_one(f, name, want, got, ipt_safetensors_at(want, i)->name, f16);
    ipt_safetensors_close(&got);
}

/* Adapters: "name:weight:text weight ..." or "name:weight:text weight@WORD;..." of tests/data,
 * tests/data/kinds or models/loras. */
enum { MAX_KINDS = 3 };
typedef struct kinds {
    char path[MAX_KINDS][512];
    ipt_lora lora[MAX_KINDS];
    size_t n;
    char list[256]; /* what words point into */
} kinds;

static void add_kind(kinds *k, const char *name, float weight, float te_weight)
{
    const char *folder = strncmp(name, "golden_", 7) == 0 ? "" : "/kinds";
    assert_true(k->n < MAX_KINDS);
    ipt_name(k->path[k->n], sizeof k->path[0], "%s%s/%s.safetensors", DATA, folder, name);
    if (!ipt_is_file(k->path[k->n]))
        ipt_name(k->path[k->n], sizeof k->path[0], "%s/models/loras/%s.safetensors", IPT_SOURCE_DIR,
                 name);
    k->lora[k->n] = (ipt_lora){k->path[k->n], weight, te_weight, NULL, 0, 1, NULL, NULL};
    k->n++;
}

static void read_kinds(kinds *k, const char *text)
{
    const char *between = strchr(text, ';') ? ";" : " ";
    char name[64], *next = NULL;
    ipt_name(k->list, sizeof k->list, "%s", text);
    for (char *item = strtok_r(k->list, between, &next); item;
         item = strtok_r(NULL, between, &next)) {
        char *w = strchr(item, ':'), *te = w ? strchr(w + 1, ':') : NULL, *at = strchr(item, '@');
        assert_true(w && te);
        ipt_name(name, sizeof name, "%.*s", (int)(w - item), item);
        add_kind(k, name, strtof(w + 1, NULL), strtof(te + 1, NULL));
        k->lora[k->n - 1].word = at ? at + 1 : NULL;
    }
}

/* Regions: "WHAT;WHAT" with the masks "region_mask<k>", which become files. */
enum { MAX_REGIONS = 5 };
typedef struct regions {
    char file[MAX_REGIONS][64], spec[MAX_REGIONS][160];
    const char *given[MAX_REGIONS];
    size_t n;
} regions;

static void write_regions(fixture *f, const ipt_safetensors *st, int32_t w, int32_t h, regions *r)
{
    char list[512], name[32], *next = NULL;
    ipt_name(list, sizeof list, "%s", meta(st, "regions", ""));
    for (char *what = strtok_r(list, ";", &next); what; what = strtok_r(NULL, ";", &next)) {
        assert_true(r->n < MAX_REGIONS);
        ipt_image im =
            golden_picture(f, st, ipt_name(name, sizeof name, "region_mask%zu", r->n), w, h);
        ipt_name(r->file[r->n], sizeof r->file[0], "/tmp/impasto-mask-%ld-%zu.png", (long)getpid(),
                 r->n);
        assert_ok(f->ctx, ipt_image_save(f->ctx, r->file[r->n], &im, NULL, NULL));
        ipt_image_finish(&im);
        ipt_name(r->spec[r->n], sizeof r->spec[0], "%s@%s", r->file[r->n], what);
        r->given[r->n] = r->spec[r->n];
        r->n++;
    }
}

static void run_trace(fixture *f, const char *name, const char *model, bool f16)
{
    ipt_safetensors *st = golden_open(f->ctx, DATA, name);
    ipt_request r;
    ipt_request_init(&r);
    char path[512], lora[512];
    ipt_lora l = {.path = lora, .weight = 0.8F, .te_weight = 0.5F, .start = 0, .end = 1};
    ipt_image init = {0}, mask = {0};
    ipt_name(path, sizeof path, "%s/models/%s", DATA, meta(st, "model", "sd1"));
    ipt_name(lora, sizeof lora, "%s/golden_lora_kohya.safetensors", DATA);
    r.model = model ? model : path;
    r.prompt = meta(st, "prompt", "");
    r.negative =
        strcmp(meta(st, "negative", ""), "(none given)") == 0 ? NULL : meta(st, "negative", "");
    r.steps = atoi(meta(st, "steps", "20"));
    r.cfg = atof(meta(st, "cfg", "7.5"));
    r.cfg_rescale = atof(meta(st, "guidance_rescale", "0"));
    r.seed = strtoull(meta(st, "seed", "0"), NULL, 10);
    r.width = atoi(meta(st, "width", "64"));
    r.height = atoi(meta(st, "height", "64"));
    r.sampler =
        strcmp(meta(st, "sampler", ""), "folder default") == 0 ? NULL : meta(st, "sampler", NULL);
    r.schedule = meta(st, "schedule", NULL);
    r.cache = meta(st, "cache", NULL);
    r.trace = f->trace;
    if (golden_has(st, "init")) {
        init = golden_picture(f, st, "init", r.width, r.height);
        r.init = &init;
        r.strength = atof(meta(st, "strength", "0.6"));
    }
    if (golden_has(st, "mask")) {
        mask = golden_picture(f, st, "mask", r.width, r.height);
        r.mask = &mask;
    }
    if (ipt_safetensors_meta(st, "lora")) {
        assert_string_equal(meta(st, "lora", ""), "golden_lora_kohya.safetensors:0.8:0.5");
        r.lora = &l;
        r.n_lora = 1;
    }
    kinds k = {.n = 0};
    if (ipt_safetensors_meta(st, "kinds")) {
        read_kinds(&k, meta(st, "kinds", ""));
        r.lora = k.lora;
        r.n_lora = k.n;
    }
    const char *options[12];
    char list[256], *next = NULL;
    if (ipt_safetensors_meta(st, "compose")) {
        read_kinds(&k, meta(st, "adapters", ""));
        r.lora = k.lora;
        r.n_lora = k.n;
        r.compose = meta(st, "compose", "");
        ipt_name(list, sizeof list, "%s", meta(st, "options", ""));
        for (char *item = strtok_r(list, " ", &next); item; item = strtok_r(NULL, " ", &next))
            options[r.n_compose_opt++] = item;
        r.compose_opt = options;
    }
    regions areas = {.n = 0};
    write_regions(f, st, r.width, r.height, &areas);
    r.region = areas.given;
    r.n_region = areas.n;
    static const char *const ways[] = {"never",
                                       "always"}; /* adapters beside the weights, in them */
    for (size_t i = 0; i < (r.n_lora && !r.compose ? IPT_COUNT(ways) : 1); i++) {
        ipt_report rep;
        r.fold = ways[i];
        assert_ok(f->ctx, ipt_generate(f->engine, &r, NULL, NULL, &rep));
        assert_int_equal(rep.is_folded, i > 0);
        compare_traces(f, name, st, f16);
    }
    for (size_t i = 0; i < areas.n; i++)
        unlink(areas.file[i]);
    ipt_image_finish(&init);
    ipt_image_finish(&mask);
    ipt_safetensors_close(&st);
}

static void traces(void **state)
{
    static const char *const names[] = {
        "golden_trace_sd1_ddim",    "golden_trace_sd1_pndm",    "golden_trace_sd1_rescale",
        "golden_trace_sd1_img2img", "golden_trace_sd1_inpaint", "golden_trace_sd1_lora",
        "golden_trace_sd2_ddim",    "golden_trace_sdxl_euler",  "golden_trace_sdxl_zeros",
        "golden_trace_lcm_lcm",     "golden_trace_lcm_ddim",    "golden_trace_sd1_cache",
        "golden_trace_sd2_cache",   "golden_trace_sdxl_cache"};
    (void)state;
    fixture f = open_engine(IPT_PRECISION_F32);
    for (size_t i = 0; i < IPT_COUNT(names); i++)
        run_trace(&f, names[i], NULL, false);
    close_engine(&f);
}

/* Four steps with another kind in each, and with three kinds mixed. */
static void kind_traces(void **state)
{
    static const char *const names[] = {"kinds/golden_trace_mix", "kinds/golden_trace_kron",
                                        "kinds/golden_trace_dense", "kinds/golden_trace_vectors"};
    (void)state;
    fixture f = open_engine(IPT_PRECISION_F32);
    for (size_t i = 0; i < IPT_COUNT(names); i++)
        run_trace(&f, names[i], NULL, false);
    close_engine(&f);
}

/* From a picture: the reference's draws in their order, masks by luma and hidden by pixel. */
static void starts(void **state)
{
    static const char *const names[] = {
        "golden_start_sd1_img2img_sa",           "golden_start_sd1_inpaint_sa_karras",
        "golden_start_sd1_inpaint_dpmpp_2m_sde", "golden_start_sd1_inpaint_euler_a",
        "golden_start_sdxl_inpaint_dpm_2_a",     "golden_start_inpaint_ddim",
        "golden_start_inpaint_euler_a",          "golden_start_sd1_img2img_heun",
        "golden_start_inpaint_dpmpp_2m_sde"};
    (void)state;
    fixture f = open_engine(IPT_PRECISION_F32);
    for (size_t i = 0; i < IPT_COUNT(names); i++)
        run_trace(&f, names[i], NULL, false);
    close_engine(&f);
}

/* Methods beside tools/reference. */
static void composed(void **state)
{
    static const char *const names[] = {
        "golden_compose_sd1_cmlora",       "golden_compose_sd1_cmlora_all",
        "golden_compose_sd1_cmlora_two",   "golden_compose_sd2_cmlora",
        "golden_compose_sdxl_cmlora",      "golden_compose_default_cmlora",
        "golden_compose_sd1_clora",        "golden_compose_sd1_clora_style",
        "golden_compose_sd1_clora_off",    "golden_compose_sd1_clora_heun",
        "golden_compose_sd1_clora_full",   "golden_compose_sd1_clora_inpaint",
        "golden_compose_sd2_clora",        "golden_compose_sdxl_clora",
        "golden_compose_default_clora",    "combine/golden_trace_lego",
        "combine/golden_trace_lego_plain", "combine/golden_trace_lorahub"};
    (void)state;
    fixture f = open_engine(IPT_PRECISION_F32);
    for (size_t i = 0; i < IPT_COUNT(names); i++)
        run_trace(&f, names[i],
                  strstr(names[i], "default") ? IPT_SOURCE_DIR "/models/default" : NULL, false);
    close_engine(&f);
}

/* Regions beside tools/reference: prompts, low-rank adapters, both; all ways in which adapters act.
 */
static void in_regions(void **state)
{
    static const char *const names[] = {
        "golden_compose_sd1_regions",      "golden_compose_sd1_regions_adapters",
        "golden_compose_sd1_regions_both", "golden_compose_sd1_regions_shared",
        "golden_compose_sd2_regions",      "golden_compose_sd2_regions_conv",
        "golden_compose_sdxl_regions",     "kinds/golden_trace_regions"};
    (void)state;
    fixture f = open_engine(IPT_PRECISION_F32);
    for (size_t i = 0; i < IPT_COUNT(names); i++)
        run_trace(&f, names[i], NULL, false);
    close_engine(&f);
}

static void traces_f16(void **state)
{
    (void)state;
    fixture f = open_engine(IPT_PRECISION_F16);
    run_trace(&f, "golden_trace_sd1_ddim", NULL, true);
    run_trace(&f, "golden_trace_sdxl_euler", NULL, true);
    close_engine(&f);
}

static void default_model(void **state)
{
    char model[512];
    (void)state;
    fixture f = open_engine(IPT_PRECISION_F32);
    ipt_name(model, sizeof model, "%s/models/default", IPT_SOURCE_DIR);
    run_trace(&f, "default_model_golden", model, false);
    close_engine(&f);
}

/* diffusers loads a folder in f32, transformers in the type that the configuration names: another
 * one than f32 stops `DiffusionPipeline.from_pretrained(folder)` at its first product. */
static void default_model_names_f32(void **state)
{
    char path[512], *text = NULL;
    size_t n = 0;
    ipt_ctx *ctx = NULL;
    (void)state;
    assert_int_equal(ipt_ctx_create(print_line, NULL, &ctx), IPT_OK);
    ipt_name(path, sizeof path, "%s/models/default/text_encoder/config.json", IPT_SOURCE_DIR);
    assert_ok(ctx, ipt_file_read(ctx, path, 1 << 16, &text, &n));
    assert_non_null(strstr(text, "\"dtype\": \"float32\""));
    ipt_free(text);
    ipt_ctx_destroy(&ctx);
}

/* --- pictures kept for comparison ------------------------------------------------------------- */
typedef struct gallery {
    uint8_t *rgb[4];
    int32_t n;
    size_t bytes;
} gallery;

static ipt_status keep(void *user, int32_t index, const ipt_image *im, const char *text,
                       const char *json)
{
    gallery *g = user;
    assert_true(index < 4 && text && json);
    g->bytes = (size_t)im->w * (size_t)im->h * 3;
    g->rgb[index] = malloc(g->bytes);
    assert_non_null(g->rgb[index]);
    memcpy(g->rgb[index], im->rgb, g->bytes);
    g->n = index + 1;
    return IPT_OK;
}

static void drop(gallery *g)
{
    for (int i = 0; i < 4; i++)
        free(g->rgb[i]);
    memset(g, 0, sizeof *g);
}

static void small_request(ipt_request *r, char path[512])
{
    ipt_request_init(r);
    ipt_name(path, 512, "%s/models/sd1", DATA);
    r->model = path;
    r->prompt = "a photo of a (cat:1.2)";
    r->steps = 3;
    r->seed = 41;
    r->sampler = "euler_a";
}

static void batch_equals_singles(void **state)
{
    char path[512];
    gallery all = {0}, one = {0};
    ipt_request r;
    (void)state;
    fixture f = open_engine(IPT_PRECISION_F32);
    small_request(&r, path);
    r.count = 3;
    assert_ok(f.ctx, ipt_generate(f.engine, &r, keep, &all, NULL));
    assert_int_equal(all.n, 3);
    r.count = 1;
    r.seed += 2;
    assert_ok(f.ctx, ipt_generate(f.engine, &r, keep, &one, NULL));
    assert_memory_equal(all.rgb[2], one.rgb[0], one.bytes);
    assert_memory_not_equal(all.rgb[0], one.rgb[0], one.bytes);
    drop(&all);
    drop(&one);
    close_engine(&f);
}

/* One adapter: merge, switch and composite are the same numbers in the gates; another weight
 * records and uploads nothing. */
static void gates_are_data(void **state)
{
    static const char *const methods[] = {"merge", "switch", "composite", "cmlora"};
    char path[512], lora[512];
    gallery kept[4] = {{{0}, 0, 0}};
    ipt_request r;
    ipt_report rep;
    (void)state;
    fixture f = open_engine(IPT_PRECISION_F32);
    small_request(&r, path);
    ipt_name(lora, sizeof lora, "%s/golden_lora_kohya.safetensors", DATA);
    ipt_lora two[2] = {{lora, 0.8F, 0.8F, NULL, 0, 1, NULL, NULL},
                       {lora, 0.5F, 0.5F, NULL, 0, 1, "down:1/mid:0/up:0.5", NULL}};
    r.lora = two;
    r.n_lora = 1;
    r.fold = "never";
    for (int i = 0; i < 4; i++) {
        r.compose = methods[i];
        assert_ok(f.ctx, ipt_generate(f.engine, &r, keep, &kept[i], &rep));
        assert_memory_equal(kept[0].rgb[0], kept[i].rgb[0], kept[0].bytes);
        assert_int_equal(rep.n_adapter, 1);
    }
    for (int i = 0; i < 2; i++) { /* a curve of ones is no curve */
        two[0].curve = i ? "0@0,1@1" : "1@0,1@0.3,1@1";
        drop(&kept[1]);
        assert_ok(f.ctx, ipt_generate(f.engine, &r, keep, &kept[1], &rep));
        assert_true(rep.n_plans_recorded == 0 && rep.bytes_uploaded == 0);
        assert_int_equal(memcmp(kept[0].rgb[0], kept[1].rgb[0], kept[0].bytes) == 0, i == 0);
    }
    two[0].curve = NULL;
    drop(&kept[1]);
    two[0].weight = -1.5F;
    assert_ok(f.ctx, ipt_generate(f.engine, &r, keep, &kept[1], &rep));
    assert_int_equal(rep.n_plans_recorded, 0);
    assert_int_equal(rep.bytes_uploaded, 0);
    assert_memory_not_equal(kept[0].rgb[0], kept[1].rgb[0], kept[0].bytes);
    r.compose = "composite";
    r.n_lora = 2; /* four rows a step */
    drop(&kept[1]);
    assert_ok(f.ctx, ipt_generate(f.engine, &r, keep, &kept[1], &rep));
    assert_int_equal(rep.rows_full, 4 * rep.n_eval);
    static const char *const plain[] = {"interval=1", "refresh=all", "weights=equal"};
    for (int i = 0; i < 2;
         i++) { /* CMLoRA that is always fresh and fair is composite, to the bit */
        r.compose = "cmlora";
        r.compose_opt = plain;
        r.n_compose_opt = i ? 0 : IPT_COUNT(plain);
        drop(&kept[2]);
        assert_ok(f.ctx, ipt_generate(f.engine, &r, keep, &kept[2], &rep));
        assert_int_equal(memcmp(kept[1].rgb[0], kept[2].rgb[0], kept[1].bytes) == 0, i == 0);
        assert_int_equal(rep.rows_shallow > 0, i);
    }
    for (int i = 0; i < 4; i++)
        drop(&kept[i]);
    close_engine(&f);
}

/* One adapter of any kind is the same picture by all methods; three kinds are not. */
static void kinds_by_method(void **state)
{
    static const char *const methods[] = {"merge", "switch", "composite"};
    static const char *const names[] = {"lokr", "dora", "norm"};
    char path[512];
    ipt_request r;
    ipt_report rep;
    (void)state;
    fixture f = open_engine(IPT_PRECISION_F32);
    small_request(&r, path);
    for (size_t i = 0; i <= IPT_COUNT(names); i++) {
        const bool all = i == IPT_COUNT(names);
        gallery kept[3] = {{{0}, 0, 0}};
        kinds k = {.n = 0};
        for (size_t j = 0; j < IPT_COUNT(names); j++)
            if (all || i == j)
                add_kind(&k, names[j], 0.8F, 0.5F);
        r.lora = k.lora;
        r.n_lora = k.n;
        for (int m = 0; m < 3; m++) {
            r.compose = methods[m];
            assert_ok(f.ctx, ipt_generate(f.engine, &r, keep, &kept[m], &rep));
            if (!all)
                assert_memory_equal(kept[0].rgb[0], kept[m].rgb[0], kept[0].bytes);
            else if (m > 0)
                assert_memory_not_equal(kept[0].rgb[0], kept[m].rgb[0], kept[0].bytes);
            assert_int_equal(rep.rows_full, (all && m == 2 ? 6 : 2) * rep.n_eval);
        }
        for (int m = 0; m < 3; m++)
            drop(&kept[m]);
    }
    close_engine(&f);
}

static void copy_file(ipt_ctx *ctx, const char *from, const char *to)
{
    char *data = NULL;
    size_t n = 0;
    assert_ok(ctx, ipt_file_read(ctx, from, 1 << 24, &data, &n));
    assert_ok(ctx, ipt_file_write(ctx, to, data, n));
    ipt_free(data);
}

/* A file that is replaced between two requests of one engine is the new file to the second. */
static void replaced_adapter_is_read_again(void **state)
{
    char path[512], from[512], lora[128];
    gallery with[3] = {{{0}, 0, 0}};
    ipt_request r;
    (void)state;
    fixture f = open_engine(IPT_PRECISION_F32);
    small_request(&r, path);
    ipt_name(lora, sizeof lora, "/tmp/impasto-lora-%ld.safetensors", (long)getpid());
    ipt_lora one = {lora, 0.8F, 0.8F, NULL, 0, 1, NULL, NULL};
    r.lora = &one;
    r.n_lora = 1;
    static const char *const names[] = {"golden_lora_kohya", "golden_lora_locon",
                                        "golden_lora_kohya"};
    for (int i = 0; i < 3; i++) {
        ipt_name(from, sizeof from, "%s/%s.safetensors", DATA, names[i]);
        copy_file(f.ctx, from, lora);
        assert_ok(f.ctx, ipt_generate(f.engine, &r, keep, &with[i], NULL));
    }
    assert_memory_not_equal(with[0].rgb[0], with[1].rgb[0], with[0].bytes);
    assert_memory_equal(with[0].rgb[0], with[2].rgb[0], with[0].bytes);
    for (int i = 0; i < 3; i++)
        drop(&with[i]);
    unlink(lora);
    close_engine(&f);
}

typedef struct stopper {
    ipt_stop stop;
    int pictures;
} stopper;

static void stop_at_two(void *user, const ipt_progress *p)
{
    stopper *s = user;
    if (strcmp(p->stage, "sample") == 0 && p->done == 2)
        ipt_stop_ask(&s->stop);
}

static ipt_status count_picture(void *user, int32_t index, const ipt_image *im, const char *text,
                                const char *json)
{
    (void)index, (void)im, (void)text, (void)json;
    ((stopper *)user)->pictures++;
    return IPT_OK;
}

static void cancel_within_a_step(void **state)
{
    char path[512];
    ipt_request r;
    (void)state;
    fixture f = open_engine(IPT_PRECISION_F32);
    stopper s = {{0}, 0};
    small_request(&r, path);
    r.steps = 20;
    r.progress = stop_at_two;
    r.user = &s;
    r.stop = &s.stop;
    assert_int_equal(ipt_generate(f.engine, &r, count_picture, &s, NULL), IPT_ERR_CANCELLED);
    assert_int_equal(s.pictures, 0);
    r.progress = NULL; /* the engine is usable at once */
    r.stop = NULL;
    r.steps = 1;
    assert_ok(f.ctx, ipt_generate(f.engine, &r, count_picture, &s, NULL));
    assert_int_equal(s.pictures, 1);
    close_engine(&f);
}

static void bad_values_are_named(void **state)
{
    char path[512];
    ipt_request r;
    (void)state;
    fixture f = open_engine(IPT_PRECISION_F32);
    small_request(&r, path);
    r.sampler = "eulr";
    assert_int_equal(ipt_generate(f.engine, &r, NULL, NULL, NULL), IPT_ERR_ARG);
    assert_non_null(strstr(ipt_last_error(f.ctx), "eulr"));
    assert_non_null(strstr(ipt_last_error(f.ctx), "dpmpp_2m"));
    small_request(&r, path);
    r.width = 33;
    assert_int_equal(ipt_generate(f.engine, &r, NULL, NULL, NULL), IPT_ERR_ARG);
    small_request(&r, path);
    r.compose = "blend";
    assert_int_equal(ipt_generate(f.engine, &r, NULL, NULL, NULL), IPT_ERR_ARG);
    close_engine(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(traces),
                                       cmocka_unit_test(starts),
                                       cmocka_unit_test(composed),
                                       cmocka_unit_test(in_regions),
                                       cmocka_unit_test(kind_traces),
                                       cmocka_unit_test(kinds_by_method),
                                       cmocka_unit_test(traces_f16),
                                       cmocka_unit_test(default_model),
                                       cmocka_unit_test(default_model_names_f32),
                                       cmocka_unit_test(batch_equals_singles),
                                       cmocka_unit_test(gates_are_data),
                                       cmocka_unit_test(replaced_adapter_is_read_again),
                                       cmocka_unit_test(cancel_within_a_step),
                                       cmocka_unit_test(bad_values_are_named)};
    cmocka_set_test_filter(getenv("IPT_TEST_ONLY"));
    return cmocka_run_group_tests_name("generate", tests, NULL, NULL);
}
