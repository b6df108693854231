/* bench/bench_generate.c - whole requests with a real model: the first of a process and a second
 * one that finds everything in place. */
#include "bench/bench.h"

#include <string.h>

#include "engine/impasto.h"

static ipt_status drop_picture(void *user, int32_t i, const ipt_image *im, const char *text,
                               const char *json)
{
    (void)user;
    (void)i;
    (void)im;
    (void)text;
    (void)json;
    return IPT_OK;
}

static json_t *request_row(const char *name, const ipt_report *p)
{
    json_t *o = json_pack("{s:s, s:f, s:f, s:f, s:f, s:f, s:f}", "name", name, "load_ms",
                          p->ms_load, "text_ms", p->ms_text, "first_step_ms", p->ms_first_step,
                          "ms_per_step", p->ms_per_step, "vae_ms", p->ms_vae, "ms", p->ms_total);
    json_object_set_new(o, "plans_recorded", json_integer((json_int_t)p->n_plans_recorded));
    json_object_set_new(o, "bytes_uploaded", json_integer((json_int_t)p->bytes_uploaded));
    json_object_set_new(o, "peak_host_mib", json_real((double)p->peak_host_bytes / 1048576.0));
    json_object_set_new(o, "peak_device_mib", json_real((double)p->peak_device_bytes / 1048576.0));
    return o;
}

ipt_status bench_generate(ipt_ctx *ctx, const ipt_bench_opts *o, json_t *result)
{
    ipt_engine *e = NULL;
    ipt_engine_opts eo = {.device = o->device,
                          .precision = o->weights == IPT_F32  ? IPT_PRECISION_F32
                                       : o->weights == IPT_Q8 ? IPT_PRECISION_Q8
                                                              : IPT_PRECISION_AUTO};
    ipt_request q;
    ipt_report p = {0};
    json_t *rows = json_object_get(result, "rows");
    ipt_status status = ipt_engine_create(ctx, &eo, &e);
    ipt_request_init(&q);
    q.model = o->model;
    q.prompt = "a red apple, noto style, on a blue background";
    q.width = o->width;
    q.height = o->height;
    q.steps = o->steps;
    q.seed = 1;
    for (int i = 0; status == IPT_OK && i < 2; i++) {
        status = ipt_generate(e, &q, drop_picture, NULL, &p);
        if (status != IPT_OK)
            break;
        json_t *row = request_row(i == 0 ? "cold" : "warm", &p);
        if (o->row)
            o->row(o->user, row);
        json_array_append_new(rows, row);
        json_object_set_new(result, "device", json_string(p.device ? p.device : ""));
        json_object_set_new(result, "model", json_string(p.model ? p.model : ""));
        json_object_set_new(result, "width", json_integer(p.width));
        json_object_set_new(result, "height", json_integer(p.height));
        json_object_set_new(result, "steps", json_integer(p.steps));
    }
    ipt_engine_destroy(&e);
    return status;
}
