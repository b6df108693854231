/* bench/bench_unet.c - one UNet evaluation at a published configuration, plain and with LoRAs as
 * gates; one VAE decoding. */
#include "bench/bench_lora.h"

#include <string.h>

#include "compose/compose.h"
#include "unet/blocks.h"
#include "unet/unet.h"
#include "vae/vae.h"

enum { MAX_LORAS = 8 };

/* The LoRAs of one plan, stacked as the engine does it. */
typedef struct lora_set {
    ipt_module_list modules;
    bench_lora_file file[MAX_LORAS];
    ipt_adapter_file *open[MAX_LORAS];
    int32_t count;
    ipt_bank *bank;
} lora_set;

static ipt_status pick_config(bench *b, ipt_unet_config *c)
{
    const char *name = b->o->config;
    if (strcmp(name, "sd15") == 0)
        *c = ipt_unet_config_sd15();
    else if (strcmp(name, "sd21") == 0)
        *c = ipt_unet_config_sd21();
    else if (strcmp(name, "sdxl") == 0)
        *c = ipt_unet_config_sdxl();
    else
        return ipt_fail(b->ctx, IPT_ERR_ARG, "config '%s' is unknown; one of: sd15 sd21 sdxl",
                        name);
    return IPT_OK;
}

static ipt_status make_loras(bench *b, const ipt_unet_config *c, lora_set *l)
{
    ipt_model_config *mc = ipt_calloc(b->ctx, 1, sizeof *mc);
    if (!mc)
        return IPT_ERR_NOMEM;
    mc->unet = *c;
    mc->has[IPT_COMP_UNET] = true;
    ipt_status status = ipt_modules_create(b->ctx, mc, &l->modules);
    ipt_free(mc);
    IPT_TRY(status);
    if (b->o->lora_count > MAX_LORAS)
        return ipt_fail(b->ctx, IPT_ERR_ARG, "%d LoRAs, at most %d", (int)b->o->lora_count,
                        MAX_LORAS);
    for (; l->count < b->o->lora_count; l->count++) {
        IPT_TRY(bench_lora_open(b, &l->modules, l->count, &l->file[l->count]));
        l->open[l->count] = l->file[l->count].file;
    }
    return ipt_bank_create(b->ctx, l->modules.module, l->modules.n, l->open, (size_t)l->count,
                           &l->bank);
}

static void drop_loras(lora_set *l)
{
    ipt_bank_destroy(&l->bank);
    for (int32_t i = 0; i < l->count; i++)
        bench_lora_close(&l->file[i]);
    ipt_modules_finish(&l->modules);
}

/* One-hot gates: batch element i sees LoRA (first + i) mod count. */
static ipt_status write_gates(const bench *b, const lora_set *l, ipt_plan *p, int32_t batch,
                              int32_t first)
{
    size_t n = IPT_GATE_ROWS * (size_t)batch * (size_t)l->count;
    float *gate = ipt_calloc(b->ctx, n, sizeof *gate);
    if (!gate)
        return IPT_ERR_NOMEM;
    for (int32_t i = 0; i < IPT_GATE_ROWS * batch; i++)
        gate[i * l->count + (first + i % batch) % l->count] = 1;
    ipt_status s = ipt_plan_write(p, "gates", gate, n * sizeof *gate);
    ipt_free(gate);
    return s;
}

static ipt_status fill_inputs(bench *b, ipt_graph *g, ipt_plan *p)
{
    static const char *const inputs[] = {"x", "t_emb", "text", "add", "w_emb"};
    for (size_t i = 0; i < IPT_COUNT(inputs); i++) {
        ipt_val v = ipt_find(g, inputs[i]);
        if (v.id == 0)
            continue;
        ipt_shape s = ipt_shape_of(g, v);
        IPT_TRY(bench_fill(b, p, inputs[i], ipt_shape_count(&s), 1));
    }
    return IPT_OK;
}

/* An input of n equal values, where the graph has it. */
static ipt_status fill_even(const bench *b, ipt_plan *p, const char *name, size_t n, float value)
{
    if (!ipt_plan_has(p, name))
        return IPT_OK;
    float *v = ipt_calloc(b->ctx, n, sizeof *v);
    if (!v)
        return IPT_ERR_NOMEM;
    for (size_t i = 0; i < n; i++)
        v[i] = value;
    ipt_status s = ipt_plan_write(p, name, v, n * sizeof *v);
    ipt_free(v);
    return s;
}

/* Every text has the same share of every place, every adapter half of it. */
static ipt_status fill_regions(bench *b, const ipt_unet_config *c, const ipt_unet_key *key,
                               int32_t slots, ipt_plan *p)
{
    const size_t rows = (size_t)key->batch, gates = IPT_GATE_ROWS * rows * (size_t)slots;
    char name[48];
    for (int32_t i = 0; i <= c->n_level; i++) {
        int32_t h = key->h, w = key->w;
        (void)ipt_unet_grid(c, i, &h, &w);
        size_t cells = i < c->n_level ? (size_t)h * (size_t)w : 1; /* the time */
        ipt_name(name, sizeof name, "place%zu", cells);
        IPT_TRY(fill_even(b, p, name, rows * cells * (size_t)slots, 0.5F));
        for (int32_t k = 0; k < key->n_text; k++) {
            ipt_name(name, sizeof name, "share%d_%zu", k, cells);
            IPT_TRY(fill_even(b, p, name, cells, 1.0F / (float)key->n_text));
        }
    }
    for (int32_t k = 0; k < key->n_text; k++) {
        ipt_name(name, sizeof name, "text%d", k);
        if (k == 0)
            ipt_name(name, sizeof name, "text");
        IPT_TRY(bench_fill(b, p, name, rows * (size_t)key->tokens * (size_t)c->cross_dim[0], 1));
        ipt_name(name, sizeof name, "gates_%d", k);
        IPT_TRY(fill_even(b, p, name, gates, k > 0 ? 1.0F : 0));
    }
    return IPT_OK;
}

/* lora NULL: the plain UNet.  n_text > 1: so many texts are seen by place, the LoRAs bound too. */
static ipt_status make_plan(bench *b, const ipt_unet_config *c, const lora_set *lora, int32_t batch,
                            int32_t n_text, ipt_plan **out)
{
    int32_t w = (b->o->width ? b->o->width : 512) / 8, h = (b->o->height ? b->o->height : 512) / 8;
    ipt_unet_key key = {.batch = batch,
                        .h = h,
                        .w = w,
                        .tokens = 77,
                        .act = b->act,
                        .n_text = n_text,
                        .is_placed = n_text > 1 && lora};
    ipt_plan_opts po = {.gpu = b->gpu, .weights = b->weights, .profile = true};
    ipt_graph *g = NULL;
    ipt_plan *p = NULL;
    ipt_status status;
    IPT_TRY(ipt_graph_create(b->ctx, &g));
    size_t n_site = 0;
    uint64_t uploaded = 0;
    const ipt_adapter_site *site = ipt_bank_sites(lora ? lora->bank : NULL, IPT_COMP_UNET, &n_site);
    if (lora)
        ipt_graph_adapters(g, site, n_site, IPT_GATE_ROWS, batch, lora->count);
    ipt_unet_build(g, c, &key);
    IPT_TRY_GOTO(ipt_plan_create(g, &po, &p), fail);
    IPT_TRY_GOTO(fill_inputs(b, g, p), fail);
    if (lora) {
        IPT_TRY_GOTO(ipt_bank_write(lora->bank, IPT_COMP_UNET, p, &uploaded), fail);
        IPT_TRY_GOTO(write_gates(b, lora, p, batch, 0), fail);
    }
    if (n_text > 1) {
        IPT_TRY_GOTO(fill_regions(b, c, &key, lora ? lora->count : 0, p), fail);
        IPT_TRY_GOTO(ipt_plan_run(p, 0), fail); /* keys and values: once */
    }
    ipt_graph_destroy(&g);
    *out = p;
    return IPT_OK;
fail:
    ipt_plan_destroy(&p);
    ipt_graph_destroy(&g);
    return status;
}

static void add_row(bench *b, const char *name, int32_t batch, const bench_time *t,
                    const ipt_plan *p, double plain_ms)
{
    json_t *row = json_pack("{s:s, s:i, s:f, s:f, s:f}", "name", name, "batch", (int)batch,
                            "first_ms", t->first_ms, "ms", t->wall_ms, "device_ms", t->device_ms);
    bench_add_shares(b, row, t->wall_ms, &t->work);
    json_object_set_new(row, "arena_mib", json_real((double)ipt_plan_arena_bytes(p) / 1048576.0));
    json_object_set_new(row, "dispatches", json_integer((json_int_t)ipt_plan_n_dispatch(p)));
    if (plain_ms > 0)
        json_object_set_new(row, "ratio", json_real(t->wall_ms / plain_ms));
    bench_row(b, row);
}

/* What is compared, run in turns: interference then meets all of them alike. */
typedef enum turn { PLAIN, KEPT, SWITCHED, BOUND, N_TURN } turn;

/* One run of each a round: without LoRAs, with the gates as they are, with gates written before (as
 * a policy does that switches every step), with the LoRAs bound to places (NULL: not asked for). */
static ipt_status run_round(bench *b, const lora_set *l, ipt_plan *const plan[N_TURN],
                            int32_t round, double ms[N_TURN])
{
    for (turn k = 0; k < N_TURN; k++) {
        double start = ipt_now_ms();
        if (k == SWITCHED)
            IPT_TRY(write_gates(b, l, plan[k], b->o->batch, round));
        if (plan[k])
            IPT_TRY(ipt_plan_run(plan[k], k == BOUND));
        ms[k] = ipt_now_ms() - start;
        if (ipt_cancelled(b->ctx))
            return ipt_fail(b->ctx, IPT_ERR_CANCELLED, "interrupted");
    }
    return IPT_OK;
}

/* Medians over rounds of ms of each, and of their ratios to plain, those of switched and bound to
 * kept: runs of one round are neighbours in time. */
static ipt_status measure_loras(bench *b, const lora_set *l, ipt_plan *const plan[N_TURN],
                                double ms[N_TURN], double ratio[N_TURN])
{
    enum { ROUNDS = 9, ENOUGH_MS = 60000 }; /* unless --repeat asks for more */
    double *v[2 * N_TURN], sum = 0;
    const size_t room = (size_t)(b->o->repeat > ROUNDS ? b->o->repeat : ROUNDS);
    double *all = ipt_calloc(b->ctx, room * IPT_COUNT(v), sizeof *all);
    ipt_status status = all ? IPT_OK : IPT_ERR_NOMEM;
    size_t n = 0;
    for (size_t k = 0; k < IPT_COUNT(v); k++)
        v[k] = all + k * room;
    while (status == IPT_OK && n < room && (n < (size_t)b->o->repeat || sum < ENOUGH_MS)) {
        double one[N_TURN] = {0};
        status = run_round(b, l, plan, (int32_t)n, one);
        if (status != IPT_OK)
            break;
        for (turn k = 0; k < N_TURN; k++) {
            v[k][n] = one[k];
            v[N_TURN + k][n] = one[k] / one[k > KEPT ? KEPT : PLAIN];
            sum += one[k];
        }
        n++;
    }
    for (turn k = 0; k < N_TURN && status == IPT_OK; k++) {
        ms[k] = bench_median(v[k], n);
        ratio[k] = bench_median(v[N_TURN + k], n);
    }
    ipt_free(all);
    return status;
}

static ipt_status bench_loras(bench *b, const ipt_unet_config *c, ipt_plan **plain)
{
    lora_set l = {0};
    ipt_plan *p = NULL, *bound = NULL, *plan[N_TURN] = {*plain};
    bench_time t, all;
    double ms[N_TURN], ratio[N_TURN];
    json_t *ops = NULL;
    ipt_status status = make_loras(b, c, &l);
    if (status != IPT_OK)
        goto end;
    IPT_TRY_GOTO(make_plan(b, c, &l, b->o->batch, 0, &p), end);
    IPT_TRY_GOTO(bench_measure(b, p, &t), end);
    if (b->o->regions > 1) {
        IPT_TRY_GOTO(make_plan(b, c, &l, b->o->batch, b->o->regions, &bound), end);
        /* bytes 0: what keys and values took, once, cannot be told apart */
        all = (bench_time){.work.macs = ipt_plan_macs(bound) - ipt_plan_early_macs(bound)};
    }
    plan[KEPT] = plan[SWITCHED] = p;
    plan[BOUND] = bound;
    IPT_TRY_GOTO(measure_loras(b, &l, plan, ms, ratio), end);
    ipt_plan_destroy(plain);
    t.wall_ms = ms[KEPT];
    add_row(b, "lora, one-hot gates", b->o->batch, &t, p, ms[KEPT] / ratio[KEPT]);
    if (bound) {
        all.wall_ms = ms[BOUND];
        add_row(b, "lora, bound to regions", b->o->batch, &all, bound, ms[BOUND] / ratio[BOUND]);
    }
    if (bound && b->o->profile) {
        IPT_TRY_GOTO(bench_profile_json(b, bound, &ops), end);
        json_object_set_new(b->result, "regions_profile", ops);
    }
    if (b->o->profile) {
        IPT_TRY_GOTO(bench_profile_json(b, p, &ops), end);
        json_object_set_new(b->result, "lora_profile", ops);
    }
    bench_row(b, json_pack("{s:s, s:i, s:f, s:f}", "name", "lora, switched every run", "batch",
                           (int)b->o->batch, "ms", ms[SWITCHED], "ratio", ratio[SWITCHED]));
    if (b->o->composite && b->o->batch == 1) {
        ipt_plan_destroy(&p);
        IPT_TRY_GOTO(make_plan(b, c, &l, l.count, 0, &p), end);
        IPT_TRY_GOTO(bench_measure(b, p, &all), end);
        add_row(b, "lora, composite in one batch", l.count, &all, p, t.wall_ms * l.count);
    }
end:
    ipt_plan_destroy(&p);
    ipt_plan_destroy(&bound);
    drop_loras(&l);
    return status;
}

/* --- attention maps and their gradient -------------------------------------------------------- */
/* Medians of the forward segment and of the one back to the latent. */
static ipt_status measure_segments(bench *b, ipt_plan *p, double ms[2])
{
    double v[2][BENCH_MAX_RUNS], sum = 0;
    int32_t n = 0;
    for (bool first = true; first || (n < BENCH_MAX_RUNS && bench_more(b->o->repeat, n, sum));
         first = false)
        for (uint32_t k = 0; k < 2; k++) {
            double start = ipt_now_ms();
            IPT_TRY(ipt_plan_run(p, k));
            if (ipt_cancelled(b->ctx))
                return ipt_fail(b->ctx, IPT_ERR_CANCELLED, "interrupted");
            v[k][n] = ipt_now_ms() - start;
            sum += first ? 0 : v[k][n];
            n += !first && k == 1;
        }
    for (int k = 0; k < 2; k++)
        ms[k] = bench_median(v[k], (size_t)n);
    return IPT_OK;
}

static ipt_status bench_maps(bench *b, const ipt_unet_config *c, double plain_ms)
{
    int32_t w = (b->o->width ? b->o->width : 512) / 8, h = (b->o->height ? b->o->height : 512) / 8;
    const ipt_unet_key key = {.batch = 1,
                              .h = h,
                              .w = w,
                              .tokens = 77,
                              .act = b->act,
                              .tap = b->o->maps,
                              .is_grad = true};
    const ipt_plan_opts po = {.gpu = b->gpu, .weights = b->weights, .profile = b->o->profile};
    static const char *const name[] = {"to the attention maps", "from there to the latent"};
    ipt_graph *g = NULL;
    ipt_plan *p = NULL;
    json_t *ops = NULL;
    double ms[2] = {0};
    ipt_status status;
    if (!ipt_unet_grid(c, b->o->maps - 1, &h, &w))
        return ipt_fail(b->ctx, IPT_ERR_ARG, "maps %d: no cross-attention lies on that level",
                        b->o->maps);
    IPT_TRY(ipt_graph_create(b->ctx, &g));
    ipt_unet_build(g, c, &key);
    IPT_TRY_GOTO(ipt_plan_create(g, &po, &p), end);
    IPT_TRY_GOTO(fill_inputs(b, g, p), end);
    IPT_TRY_GOTO(bench_fill(b, p, "d_maps", (size_t)h * (size_t)w * 77, 1), end);
    IPT_TRY_GOTO(measure_segments(b, p, ms), end);
    for (int k = 0; k < 2; k++) {
        json_t *row = json_pack("{s:s, s:i, s:f, s:f}", "name", name[k], "batch", 1, "ms", ms[k],
                                "ratio", ms[k] / plain_ms);
        json_object_set_new(row, "arena_mib",
                            json_real((double)ipt_plan_arena_bytes(p) / 1048576.0));
        bench_row(b, row);
    }
    if (b->o->profile) {
        IPT_TRY_GOTO(bench_profile_json(b, p, &ops), end);
        json_object_set_new(b->result, "maps_profile", ops);
    }
end:
    ipt_plan_destroy(&p);
    ipt_graph_destroy(&g);
    return status;
}

ipt_status bench_unet(bench *b)
{
    ipt_unet_config c = {0};
    ipt_plan *p = NULL;
    bench_time t;
    json_t *ops = NULL;
    ipt_status status;
    IPT_TRY(pick_config(b, &c));
    json_object_set_new(b->result, "config", json_string(b->o->config));
    json_object_set_new(b->result, "width", json_integer(b->o->width ? b->o->width : 512));
    json_object_set_new(b->result, "height", json_integer(b->o->height ? b->o->height : 512));
    IPT_TRY(make_plan(b, &c, NULL, b->o->batch, 0, &p));
    IPT_TRY_GOTO(bench_measure(b, p, &t), end);
    add_row(b, "plain", b->o->batch, &t, p, 0);
    if (b->o->profile) {
        IPT_TRY_GOTO(bench_profile_json(b, p, &ops), end);
        json_object_set_new(b->result, "profile", ops);
    }
    if (b->o->lora_rank > 0 && b->o->lora_count > 0)
        IPT_TRY_GOTO(bench_loras(b, &c, &p), end);
    if (b->o->maps > 0)
        status = bench_maps(b, &c, t.wall_ms);
end:
    ipt_plan_destroy(&p);
    return status;
}

ipt_status bench_vae(bench *b)
{
    ipt_vae_config c =
        strcmp(b->o->config, "sdxl") == 0 ? ipt_vae_config_sdxl() : ipt_vae_config_sd();
    int32_t w = (b->o->width ? b->o->width : 512) / 8, h = (b->o->height ? b->o->height : 512) / 8;
    ipt_plan_opts po = {.gpu = b->gpu, .weights = b->weights, .profile = true};
    ipt_graph *g = NULL;
    ipt_plan *p = NULL;
    json_t *ops = NULL;
    bench_time t;
    ipt_status status;
    IPT_TRY(ipt_graph_create(b->ctx, &g));
    ipt_vae_decode_build(g, &c, b->o->batch, h, w, c.force_upcast ? IPT_F32 : b->act);
    IPT_TRY_GOTO(ipt_plan_create(g, &po, &p), end);
    IPT_TRY_GOTO(bench_fill(b, p, "z", (size_t)b->o->batch * (size_t)h * (size_t)w * 4, 1), end);
    IPT_TRY_GOTO(bench_measure(b, p, &t), end);
    json_object_set_new(b->result, "width", json_integer(8 * w));
    json_object_set_new(b->result, "height", json_integer(8 * h));
    add_row(b, "decode", b->o->batch, &t, p, 0);
    if (b->o->profile) {
        IPT_TRY_GOTO(bench_profile_json(b, p, &ops), end);
        json_object_set_new(b->result, "profile", ops);
    }
end:
    ipt_plan_destroy(&p);
    ipt_graph_destroy(&g);
    return status;
}
