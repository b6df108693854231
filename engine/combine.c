/* engine/combine.c - adapters of which the composing method makes one, when they are loaded: what
 * `lora merge` writes into a file, in memory and in f32. */
#include <math.h>
#include <string.h>

#include "engine/internal.h"
#include "engine/lora_fit.h"

/* A set on its way to one adapter. */
typedef struct combining {
    ipt_engine *e;
    const ipt_request *r;
    double start_ms, told_ms;
} combining;

/* --- what is combined, and how ---------------------------------------------------------------- */
static const ipt_method *combiner(const ipt_request *r)
{
    const ipt_method *m = ipt_method_find(r->compose); /* an unknown one is refused later */
    return m && m->combine ? m : NULL;
}

static void weights_of(const ipt_request *r, const ipt_prompt_lora *extra, size_t i, float *weight,
                       float *te_weight)
{
    bool is_own = i < r->n_lora;
    *weight = is_own ? r->lora[i].weight : (float)extra[i - r->n_lora].weight;
    *te_weight = is_own ? r->lora[i].te_weight : (float)extra[i - r->n_lora].te_weight;
}

ipt_status ipt_combine_text(ipt_engine *e, const ipt_request *r, const ipt_prompt_lora *extra,
                            size_t n, char **out)
{
    enum { EACH = 64 };
    const ipt_method *m = combiner(r);
    size_t room = EACH * (n + 1), at = 0;
    *out = NULL;
    if (!m)
        return IPT_OK;
    for (size_t i = 0; i < r->n_compose_opt; i++)
        room += strlen(r->compose_opt[i]) + 2;
    char *text = ipt_alloc(e->ctx, room);
    if (!text)
        return IPT_ERR_NOMEM;
    at += (size_t)snprintf(text, room, "%s", m->name);
    for (size_t i = 0; i < r->n_compose_opt; i++)
        at += (size_t)snprintf(text + at, room - at, " %s", r->compose_opt[i]);
    for (size_t i = 0; i < n; i++) {
        float w = 0, te = 0;
        weights_of(r, extra, i, &w, &te);
        at += (size_t)snprintf(text + at, room - at, "|%.9g:%.9g", (double)w, (double)te);
    }
    *out = text;
    return IPT_OK;
}

/* --- making it -------------------------------------------------------------------------------- */
static void tell(void *user, size_t done, size_t total)
{
    combining *c = user;
    double now = ipt_now_ms(), passed = now - c->start_ms;
    if (!c->r->progress || passed < 1000 || now - c->told_ms < 100)
        return;
    ipt_progress p = {.stage = "combine",
                      .done = (int32_t)done,
                      .total = (int32_t)total,
                      .n_image = 1,
                      .eta_ms = -1};
    c->told_ms = now;
    c->r->progress(c->r->user, &p);
}

static ipt_status fill_inputs(const combining *c, const ipt_prompt_lora *extra,
                              const ipt_adapter_set *s, ipt_merge_input *in)
{
    for (size_t i = 0; i < s->n_file; i++) {
        float w = 0, te = 0;
        weights_of(c->r, extra, i, &w, &te);
        if (!isfinite(w) || !isfinite(te))
            return ipt_fail(c->e->ctx, IPT_ERR_ARG, "%s: found a weight that is not finite",
                            s->file[i]->path);
        in[i] = (ipt_merge_input){s->file[i], ipt_lora_decimal(w), ipt_lora_decimal(te)};
    }
    return IPT_OK;
}

static ipt_status make(combining *c, ipt_tool *t, const ipt_merge_input *in, ipt_adapter_set *s)
{
    ipt_ctx *ctx = c->e->ctx;
    const ipt_adapter_out_opts o = {.format = IPT_FORMAT_KOHYA,
                                    .dtype = IPT_ST_F32,
                                    .module = t->module,
                                    .n_module = t->n_module};
    size_t bytes = 0;
    IPT_TRY(ipt_adapter_out_create(ctx, &o, &t->out));
    IPT_TRY(ipt_tool_weights(c->e->m->model, t));
    IPT_TRY(ipt_method_combine(combiner(c->r), ctx, c->r->compose_opt, c->r->n_compose_opt, t, in,
                               s->n_file));
    IPT_TRY(ipt_adapter_out_bytes(t->out, &s->bytes, &bytes));
    return ipt_adapter_open_memory(ctx, s->file[0]->path, s->bytes, bytes, t->module, t->n_module,
                                   &s->one);
}

ipt_status ipt_combine_set(ipt_engine *e, const ipt_request *r, const ipt_prompt_lora *extra,
                           ipt_adapter_set *s)
{
    combining c = {.e = e, .r = r, .start_ms = ipt_now_ms()};
    ipt_merge_input in[IPT_MAX_SLOT];
    ipt_tool t = {.ctx = e->ctx,
                  .module = e->m->modules.module,
                  .n_module = e->m->modules.n,
                  .want_no_errors = true,
                  .conv_projections = !e->m->config.unet.linear_projection,
                  .dtype = IPT_ST_F32,
                  .step = tell,
                  .user = &c};
    ipt_status status = fill_inputs(&c, extra, s, in);
    if (status == IPT_OK)
        status = make(&c, &t, in, s);
    ipt_adapter_out_destroy(&t.out);
    ipt_tool_drop_weights(&t);
    return status;
}
