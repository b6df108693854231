/* engine/hub.c - see hub.h. */
#include "engine/hub.h"

#include <jansson.h>
#include <math.h>
#include <string.h>

#include "engine/hash.h"
#include "engine/lora_fit.h"
#include "engine/run.h"
#include "engine/search.h"

enum { PAIRS = 4, EVALUATIONS = 40, MAX_PAIRS = 100, MAX_EVALUATIONS = 100000 };
static const double BOX = 1.5, PENALTY = 0.05;
static const char METHOD[] = "lorahub";

/* A search: what stays the same in all its evaluations. */
typedef struct hub {
    ipt_engine *e;
    const ipt_request *r;
    const ipt_hub_opts *o;
    int32_t pairs, evaluations;
    ipt_lora lora[IPT_SEARCH_MAX];
    float *latent;   /* [n_picture][n_latent], made by the first evaluation */
    size_t n_latent; /* values of one */
    double loss;     /* of the evaluation that runs */
    double start_ms, last_ms;
    int32_t done; /* UNet evaluations */
} hub;

/* --- pictures --------------------------------------------------------------------------------- */
/* The middle of a picture in the shape of w x h, in place. */
static void crop(ipt_image *im, int32_t w, int32_t h)
{
    int32_t cw = im->w, ch = im->h;
    if ((int64_t)im->w * h > (int64_t)im->h * w)
        cw = (int32_t)((int64_t)im->h * w / h);
    else
        ch = (int32_t)((int64_t)im->w * h / w);
    cw = cw > 0 ? cw : 1;
    ch = ch > 0 ? ch : 1;
    size_t x = (size_t)(im->w - cw) / 2, y = (size_t)(im->h - ch) / 2;
    for (size_t row = 0; row < (size_t)ch; row++)
        memmove(im->rgb + row * (size_t)cw * 3, im->rgb + ((y + row) * (size_t)im->w + x) * 3,
                (size_t)cw * 3);
    im->w = cw;
    im->h = ch;
}

static ipt_status encode_one(hub *h, const ipt_run *u, const char *path, float *latent)
{
    const ipt_vae_config *v = &h->e->m->config.vae;
    size_t n = (size_t)u->set.width * (size_t)u->set.height * 3;
    ipt_image im = {0};
    IPT_TRY(ipt_image_load(h->e->ctx, path, &im));
    crop(&im, u->set.width, u->set.height);
    ipt_status s = IPT_OK;
    if (im.w != u->set.width || im.h != u->set.height)
        s = ipt_image_resize(h->e->ctx, &im, u->set.width, u->set.height);
    float *rgb = ipt_calloc(h->e->ctx, n, sizeof *rgb),
          *deviation = ipt_calloc(h->e->ctx, h->n_latent, sizeof *deviation);
    if (s == IPT_OK && !(rgb && deviation))
        s = IPT_ERR_NOMEM;
    for (size_t i = 0; s == IPT_OK && i < n; i++)
        rgb[i] = (float)im.rgb[i] / 127.5F - 1.0F;
    if (s == IPT_OK)
        s = ipt_encode_image(h->e, rgb, u->set.height, u->set.width, latent, deviation);
    for (size_t i = 0; s == IPT_OK && i < h->n_latent; i++) /* the middle of its distribution */
        latent[i] = (latent[i] - v->shift_factor) * v->scaling_factor;
    ipt_free(rgb);
    ipt_free(deviation);
    ipt_image_finish(&im);
    return s;
}

static ipt_status encode_pictures(hub *h, const ipt_run *u)
{
    if (h->latent)
        return IPT_OK;
    h->n_latent = u->set.n;
    h->latent = ipt_calloc(h->e->ctx, h->o->n_picture * h->n_latent, sizeof *h->latent);
    if (!h->latent)
        return IPT_ERR_NOMEM;
    for (size_t i = 0; i < h->o->n_picture; i++) {
        if (ipt_cancelled(h->e->ctx))
            return ipt_fail(h->e->ctx, IPT_ERR_CANCELLED, "cancelled");
        IPT_TRY(encode_one(h, u, h->o->picture[i], h->latent + i * h->n_latent));
    }
    return IPT_OK;
}

/* --- the loss --------------------------------------------------------------------------------- */
static void show(hub *h)
{
    double now = ipt_now_ms(), each = h->done > 0 ? (now - h->start_ms) / h->done : 0;
    int32_t total = h->evaluations * h->pairs * (int32_t)h->o->n_picture;
    ipt_progress p = {.stage = "search",
                      .done = h->done,
                      .total = total,
                      .n_image = 1,
                      .eta_ms = h->done > 0 ? each * (total - h->done) : -1,
                      .step_ms = each};
    if (h->r->progress)
        h->r->progress(h->r->user, &p);
}

/* Mean squared error of a prediction beside what the model was trained to say. */
static double error_of(ipt_prediction kind, double sigma, const float *got, const float *x0,
                       const float *noise, size_t n)
{
    double a = isfinite(sigma) ? 1 / sqrt(1 + sigma * sigma) : 0, s = sqrt(1 - a * a), sum = 0;
    for (size_t i = 0; i < n; i++) {
        double want = kind == IPT_PRED_EPSILON ? (double)noise[i]
                      : kind == IPT_PRED_V     ? a * (double)noise[i] - s * (double)x0[i]
                                               : (double)x0[i];
        sum += ((double)got[i] - want) * ((double)got[i] - want);
    }
    return sum / (double)n;
}

/* Every picture at every other of twice as many noise levels: in the middle of each part. */
static ipt_status measure_all(hub *h, ipt_run *u, const ipt_sampler *s, float *room)
{
    size_t n = h->n_latent;
    float *noise = room, *x = room + n, *eps = room + 2 * n, *maps = NULL;
    ipt_noise source;
    ipt_noise_seed(&source, h->r->seed, u->set.philox);
    for (size_t k = 0; k < h->o->n_picture; k++)
        for (int32_t i = 0; i < 2 * h->pairs; i += 2) {
            const float *x0 = h->latent + k * n;
            if (ipt_cancelled(h->e->ctx))
                return ipt_fail(h->e->ctx, IPT_ERR_CANCELLED, "cancelled");
            show(h);
            ipt_noise_draw(&source, noise, n);
            ipt_sampler_add_noise(s, i, x0, noise, x);
            ipt_sampler_scale_input(s, i, x, x);
            IPT_TRY(ipt_policy_plan(u->policy, i, &u->rows));
            IPT_TRY(ipt_unet_rows(u, x, ipt_sampler_timestep(s, i), u->job.step_of[i], u->rows.row,
                                  1, &eps, &maps));
            h->loss +=
                error_of(u->set.config.prediction, ipt_sampler_sigma(s, i), eps, x0, noise, n);
            h->done++;
        }
    h->loss /= (double)h->pairs * (double)h->o->n_picture;
    return IPT_OK;
}

/* The body of one evaluation's run. */
static ipt_status measure(ipt_run *u, void *user)
{
    hub *h = user;
    ipt_sampler *s = NULL;
    IPT_TRY(ipt_job_prepare(u));
    if (u->job.n_part != 1 || u->job.negative || ipt_engine_n_file(u->e) != h->r->n_lora)
        return ipt_fail(u->e->ctx, IPT_ERR_ARG,
                        "the prompt joins prompts or names LoRAs; expected one that says what the "
                        "pictures show");
    IPT_TRY(ipt_job_encode(u));
    IPT_TRY(encode_pictures(h, u));
    IPT_TRY(ipt_unet_prepare(u));
    if (h->done == 0)
        h->start_ms = ipt_now_ms();
    IPT_TRY(ipt_settings_sampler(u->e->ctx, &u->set, &s));
    float *room = ipt_calloc(u->e->ctx, 3 * h->n_latent, sizeof *room);
    h->loss = 0;
    ipt_status status = room ? measure_all(h, u, s, room) : IPT_ERR_NOMEM;
    ipt_free(room);
    ipt_sampler_destroy(&s);
    ipt_hashes_stop(u->e->hashes); /* no picture is written that would name them */
    return status;
}

static ipt_status loss_at(hub *h, const double *weight, double *loss)
{
    ipt_request q = *h->r;
    for (size_t i = 0; weight && i < q.n_lora; i++)
        h->lora[i].weight = h->lora[i].te_weight = (float)weight[i];
    q.lora = h->lora;
    q.compose = q.compose ? q.compose : METHOD;
    q.negative = NULL;
    q.sampler = "ddim";
    q.schedule = NULL;
    q.steps = 2 * h->pairs;
    q.cfg = 1;
    q.count = 1;
    q.init = q.mask = NULL;
    q.init_file = q.mask_file = q.trace = q.cache = NULL;
    q.n_region = 0;
    q.fold = "never"; /* every evaluation would fold anew */
    q.progress = NULL;
    q.preview = NULL;
    q.latent = NULL;
    IPT_TRY(ipt_run_with(h->e, &q, measure, h, NULL));
    *loss = h->loss;
    return IPT_OK;
}

/* --- the search ------------------------------------------------------------------------------- */
static ipt_status begin(ipt_engine *e, const ipt_request *r, const ipt_hub_opts *o, hub *h)
{
    *h = (hub){.e = e,
               .r = r,
               .o = o,
               .pairs = o->pairs > 0 ? o->pairs : PAIRS,
               .evaluations = o->evaluations > 0 ? o->evaluations : EVALUATIONS};
    const struct {
        const char *what;
        double found, min, max;
    } rows[] = {{"adapters", (double)r->n_lora, 1, IPT_SEARCH_MAX},
                {"pictures", (double)o->n_picture, 1, IPT_HUB_MAX_PICTURES},
                {"noise levels", h->pairs, 1, MAX_PAIRS},
                {"evaluations", h->evaluations, 1, MAX_EVALUATIONS}};
    for (size_t i = 0; i < IPT_COUNT(rows); i++)
        if (rows[i].found < rows[i].min || rows[i].found > rows[i].max)
            return ipt_fail(e->ctx, IPT_ERR_ARG, "found %.0f %s, expected %.0f to %.0f",
                            rows[i].found, rows[i].what, rows[i].min, rows[i].max);
    for (size_t i = 0; i < r->n_lora; i++)
        h->lora[i] = (ipt_lora){.path = r->lora[i].path,
                                .weight = r->lora[i].weight,
                                .te_weight = r->lora[i].te_weight,
                                .end = 1};
    return IPT_OK;
}

ipt_status ipt_hub_loss(ipt_engine *e, const ipt_request *r, const ipt_hub_opts *o, double *loss)
{
    hub h;
    IPT_TRY(begin(e, r, o, &h));
    h.evaluations = 1;
    ipt_status s = loss_at(&h, NULL, loss);
    ipt_free(h.latent);
    return s;
}

/* The first point is 0: no adapter, whose loss is the unit of all others. */
static ipt_status search(hub *h, ipt_hub *out)
{
    ipt_search s;
    double penalty = h->o->penalty >= 0 ? h->o->penalty : PENALTY, loss = 0, started = ipt_now_ms();
    ipt_hub best = {.n = h->r->n_lora};
    ipt_search_begin(&s, best.n, BOX, h->r->seed);
    for (; best.evaluations < h->evaluations; best.evaluations++) {
        const double *x = ipt_search_ask(&s);
        double size = 0, before = s.least;
        for (size_t i = 0; i < best.n; i++)
            size += fabs(x[i]) / (double)best.n;
        IPT_TRY(loss_at(h, x, &loss));
        if (best.evaluations == 0)
            best.none = loss;
        if (!(best.none > 0 && isfinite(best.none)))
            return ipt_fail(h->e->ctx, IPT_ERR_FORMAT,
                            "the loss without adapters is %g: broken weights, or f16 overflow (try "
                            "--precision f32)",
                            best.none);
        ipt_search_tell(&s, loss / best.none + penalty * size);
        if (s.least < before)
            best.loss = loss;
    }
    memcpy(best.weight, s.best, best.n * sizeof *best.weight);
    best.ms = ipt_now_ms() - started;
    show(h);
    *out = best;
    return IPT_OK;
}

ipt_status ipt_hub_search(ipt_engine *e, const ipt_request *r, const ipt_hub_opts *o, ipt_hub *out)
{
    hub h;
    IPT_TRY(begin(e, r, o, &h));
    ipt_status s = search(&h, out);
    ipt_free(h.latent);
    return s;
}

/* Only what the search has found out: prompt, seed and size are the next request's own. */
char *ipt_hub_recipe(const ipt_request *r, const ipt_hub *h, ipt_arena *arena)
{
    json_t *o = json_object(), *list = json_array();
    for (size_t i = 0; i < h->n; i++) {
        double w = ipt_lora_decimal((float)h->weight[i]);
        json_array_append_new(list,
                              json_pack("{s:o, s:f, s:f}", "file", ipt_json_text(r->lora[i].path),
                                        "weight", w, "te_weight", w));
    }
    if (r->model)
        json_object_set_new(o, "model", ipt_json_text(r->model));
    if (r->config_dir)
        json_object_set_new(o, "config_dir", ipt_json_text(r->config_dir));
    json_object_set_new(o, "compose", ipt_json_text(r->compose ? r->compose : METHOD));
    json_object_set_new(o, "lora", list);
    json_object_set_new(o, "version", ipt_json_text("impasto " IPT_VERSION));
    char *text = json_dumps(o, JSON_INDENT(1) | JSON_REAL_PRECISION(9));
    char *copy = text ? ipt_arena_strdup(arena, text) : NULL;
    json_free_t release;
    json_get_alloc_funcs(NULL, &release);
    if (text)
        release(text);
    json_decref(o);
    return copy;
}
