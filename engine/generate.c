/* engine/generate.c - one request from prompt to pictures: its stages in order. */
#include "engine/hash.h"
#include "engine/run.h"

#include <math.h>
#include <string.h>

/* The request of picture k with nothing left open: what repeats it. */
static ipt_request settled(const ipt_run *u, int32_t k)
{
    ipt_request q = *u->r;
    const ipt_report *rep = u->rep;
    q.model = rep->model;
    q.prompt = q.prompt ? q.prompt : "";
    q.width = rep->width;
    q.height = rep->height;
    q.steps = rep->steps;
    q.cfg = u->set.cfg;
    q.seed += (uint64_t)k;
    q.count = 0;
    q.sampler = u->set.is_unnamed ? "default" : rep->sampler;
    q.schedule = rep->schedule;
    q.rng = rep->rng;
    q.precision = u->e->m->weight_type == IPT_F32  ? "f32"
                  : u->e->m->weight_type == IPT_Q8 ? "q8"
                                                   : "f16";
    q.compose = rep->compose;
    if (ipt_bank_has(ipt_engine_bank(u->e), IPT_COMP_UNET))
        q.fold = rep->is_folded ? "always" : "never";
    if (q.init)
        q.strength = u->set.strength;
    return q;
}

static ipt_status emit_picture(ipt_run *u, const float *rgb, int32_t k, ipt_image_fn image,
                               void *user)
{
    size_t n = (size_t)u->set.width * (size_t)u->set.height * 3;
    ipt_image im = {u->set.width, u->set.height, ipt_alloc(u->e->ctx, n)};
    if (!im.rgb)
        return IPT_ERR_NOMEM;
    for (size_t i = 0; i < n; i++)
        im.rgb[i] = (uint8_t)lrintf(rgb[i] * 255.0F);
    ipt_paste_apply(&u->paste, n / 3, im.rgb);
    if (k == 0) {
        if (!ipt_hashes_ready(u->e->hashes))
            ipt_run_progress(u, "hash", 0, 1, 0);
        ipt_status hashed = ipt_infotext_hashes(u->e, u->r, u->rep, u->adapter);
        if (hashed != IPT_OK) {
            ipt_image_finish(&im);
            return hashed;
        }
    }
    u->rep->ms_total = ipt_now_ms() - u->t_start;
    const ipt_request q = settled(u, k);
    char *text = ipt_infotext(u->e, &q, u->rep, &u->e->report_arena);
    char *json = ipt_request_write(&q, &u->e->report_arena);
    ipt_status status = text && json ? IPT_OK : IPT_ERR_NOMEM;
    if (k == 0)
        u->rep->infotext = text;
    if (status == IPT_OK && image)
        status = image(user, k, &im, text, json);
    if (status == IPT_OK)
        status = ipt_explain_give(u, k, &im);
    ipt_image_finish(&im);
    return status;
}

static ipt_status make_pictures(ipt_run *u, ipt_trace *trace, ipt_image_fn image, void *user)
{
    float *rgb =
        ipt_calloc(u->e->ctx, (size_t)u->set.width * (size_t)u->set.height * 3, sizeof *rgb);
    ipt_status status = rgb ? IPT_OK : IPT_ERR_NOMEM;
    if (status == IPT_OK)
        status = ipt_loop_trace_text(u, trace);
    for (int32_t k = 0; k < u->set.count && status == IPT_OK; k++) {
        status = ipt_loop_picture(u, k, k == 0 ? trace : NULL, rgb);
        if (status == IPT_OK && k == 0 && trace)
            status = ipt_trace_write(trace, u->r->trace);
        if (status == IPT_OK)
            status = emit_picture(u, rgb, k, image, user);
        u->rep->n_image += status == IPT_OK;
    }
    ipt_free(rgb);
    return status;
}

/* Pictures that the request names as files. */
static ipt_status read_pictures(ipt_run *u)
{
    ipt_request *r = &u->request;
    if (!r->init && r->init_file) {
        IPT_TRY(ipt_image_load(u->e->ctx, r->init_file, &u->init));
        r->init = &u->init;
    }
    if (!r->mask && r->mask_file) {
        IPT_TRY(ipt_image_load(u->e->ctx, r->mask_file, &u->mask));
        r->mask = &u->mask;
    }
    return IPT_OK;
}

/* What the request reads must outlive its trace. */
static ipt_status trace_spares_inputs(const ipt_run *u)
{
    const ipt_engine *e = u->e;
    const ipt_model *const models[] = {e->m->model, e->taesd};
    for (size_t k = 0; u->r->trace && k < IPT_COUNT(models); k++)
        for (int comp = 0; models[k] && comp < IPT_COMP_COUNT; comp++)
            for (size_t i = 0; i < ipt_model_n_files(models[k], comp); i++)
                IPT_TRY(ipt_trace_spares(e->ctx, u->r->trace, ipt_model_file(models[k], comp, i)));
    for (size_t i = 0; u->r->trace && i < ipt_engine_n_file(e); i++)
        IPT_TRY(ipt_trace_spares(e->ctx, u->r->trace, e->set->key[i]));
    return IPT_OK;
}

/* Who gets the pictures. */
typedef struct receiver {
    ipt_image_fn image;
    void *user;
} receiver;

static ipt_status run_request(ipt_run *u, void *to)
{
    const receiver *who = to;
    ipt_engine *e = u->e;
    ipt_trace *trace = NULL;
    ipt_run_progress(u, "load", 0, 1, 0);
    IPT_TRY(read_pictures(u));
    IPT_TRY(ipt_job_prepare(u));
    IPT_TRY(trace_spares_inputs(u));
    u->rep->ms_load = ipt_now_ms() - u->t_start;
    IPT_TRY(ipt_job_encode(u));
    double t0 = ipt_now_ms();
    if (u->r->init)
        ipt_run_progress(u, "encode", 0, 1, 0);
    IPT_TRY(ipt_start_prepare(e, u->r, &u->set, &u->arena, &u->start));
    IPT_TRY(ipt_paste_prepare(e, u->r, &u->set, u->start.repaint, &u->arena, &u->paste));
    IPT_TRY(ipt_preview_fit(u));
    IPT_TRY(ipt_unet_prepare(u));
    u->rep->ms_load += ipt_now_ms() - t0;
    IPT_TRY(ipt_run_report(u));
    IPT_TRY(ipt_loop_buffers(u));
    IPT_TRY(ipt_explain_prepare(u));
    if (u->r->trace)
        IPT_TRY(ipt_trace_create(e->ctx, &trace));
    ipt_status status = make_pictures(u, trace, who->image, who->user);
    ipt_trace_destroy(&trace);
    return status;
}

ipt_status ipt_generate(ipt_engine *e, const ipt_request *r, ipt_image_fn image, void *user,
                        ipt_report *report)
{
    receiver who = {image, user};
    return ipt_run_with(e, r, run_request, &who, report);
}

ipt_status ipt_run_with(ipt_engine *e, const ipt_request *r, ipt_run_fn body, void *user,
                        ipt_report *report)
{
    ipt_run *u = ipt_alloc(e->ctx, sizeof *u);
    ipt_report local;
    if (!u)
        return IPT_ERR_NOMEM;
    memset(&local, 0, sizeof local);
    u->e = e;
    u->request = *r;
    u->r = &u->request;
    u->rep = &local;
    u->t_start = ipt_now_ms();
    e->request++;
    e->n_plans = e->bytes_uploaded = 0;
    e->is_folded = e->holds_unet = e->is_tight = false;
    ipt_arena_finish(&e->report_arena);
    ipt_arena_init(&u->arena, e->ctx);
    u->rows.ctx = e->ctx;
    ipt_ctx_listen(e->ctx, IPT_LISTEN_REQUEST, r->stop);
    ipt_status status = body(u, user);
    ipt_ctx_listen(e->ctx, IPT_LISTEN_REQUEST, NULL);
    if (status != IPT_OK)
        ipt_hashes_stop(e->hashes);
    if (e->gpu) {
        local.peak_device_bytes = ipt_gpu_peak_bytes(e->gpu);
        local.ms_per_step = u->done_eval > 0 ? local.ms_sample / u->done_eval : 0;
    }
    local.peak_host_bytes = ipt_peak_host_bytes();
    local.ms_total = ipt_now_ms() - u->t_start;
    local.n_plans_recorded = e->n_plans;
    local.bytes_uploaded = e->bytes_uploaded;
    if (report)
        *report = local;
    ipt_job_finish(u);
    ipt_image_finish(&u->init);
    ipt_image_finish(&u->mask);
    ipt_arena_finish(&u->arena);
    ipt_free(u);
    if (status == IPT_ERR_DEVICE_LOST) /* the next request opens the device anew */
        ipt_engine_drop_device(e);
    return status;
}
