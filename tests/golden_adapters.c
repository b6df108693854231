/* tests/golden_adapters.c - see golden_adapters.h. */
#include "tests/golden_adapters.h"

#include <string.h>

#include "unet/unet.h"

void adapters_open(adapters *k, bench *b, const char *model)
{
    *k = (adapters){.b = b, .m = bench_model(b, model, NULL)};
    assert_ok(b->ctx, ipt_modules_create(b->ctx, ipt_model_get_config(k->m), &k->modules));
}

void adapters_drop(adapters *k)
{
    for (size_t i = 0; i < k->n_file; i++)
        ipt_adapter_close(&k->file[i]);
    k->n_file = 0;
}

void adapters_close(adapters *k)
{
    adapters_drop(k);
    ipt_modules_finish(&k->modules);
    ipt_model_close(&k->m);
}

void adapters_add(adapters *k, const char *path)
{
    assert_true(k->n_file < GOLDEN_MAX_FILES);
    ipt_adapter_file **f = &k->file[k->n_file++];
    assert_ok(k->b->ctx, ipt_adapter_open(k->b->ctx, path, k->modules.module, k->modules.n, f));
    if ((*f)->n_unmatched)
        fail_msg("%s: %zu keys fit nothing, the first is %s", path, (*f)->n_unmatched,
                 (*f)->unmatched[0]);
}

/* A graph with the sites of one component; *bank is the caller's, ipt_bank_destroy. */
static ipt_graph *bank_graph(adapters *k, int comp, int rows, int batch, ipt_bank **bank)
{
    bench *b = k->b;
    ipt_graph *g = NULL;
    size_t n = 0;
    assert_ok(b->ctx,
              ipt_bank_create(b->ctx, k->modules.module, k->modules.n, k->file, k->n_file, bank));
    assert_true(ipt_bank_has(*bank, comp));
    assert_ok(b->ctx, ipt_graph_create(b->ctx, &g));
    const ipt_adapter_site *site = ipt_bank_sites(*bank, comp, &n);
    ipt_graph_adapters(g, site, n, rows, batch, (int)k->n_file);
    return g;
}

void adapters_unet(adapters *k, const unet_call *c, const float *gates, float *eps)
{
    bench *b = k->b;
    const ipt_unet_config *u = &ipt_model_get_config(k->m)->unet;
    ipt_unet_key key = {.batch = c->n, .h = c->h, .w = c->w, .tokens = c->tokens, .act = b->act};
    ipt_weights *w = bench_weights(b, k->m, IPT_COMP_UNET);
    ipt_bank *bank = NULL;
    ipt_graph *g = bank_graph(k, IPT_COMP_UNET, IPT_GATE_ROWS, c->n, &bank);
    size_t row = (size_t)c->n * k->n_file;
    uint64_t bytes = 0;
    float *all = ipt_calloc(b->ctx, IPT_GATE_ROWS * row, sizeof *all);
    assert_non_null(all);
    for (size_t i = 0; i < IPT_GATE_ROWS; i++)
        memcpy(all + i * row, gates, row * sizeof *all);
    ipt_unet_build(g, u, &key);
    ipt_plan *p = bench_plan(b, &g, w);
    unet_write(b, p, u, c);
    assert_ok(b->ctx, ipt_bank_write(bank, IPT_COMP_UNET, p, &bytes));
    assert_ok(b->ctx, ipt_plan_write(p, "gates", all, IPT_GATE_ROWS * row * sizeof *all));
    assert_ok(b->ctx, ipt_plan_run(p, 0));
    assert_ok(b->ctx, ipt_plan_read(p, "eps", eps,
                                    (size_t)(c->n * c->h * c->w * u->out_channels) * sizeof *eps));
    ipt_free(all);
    ipt_plan_destroy(&p);
    ipt_bank_destroy(&bank);
    ipt_weights_destroy(&w);
}

void adapters_text(adapters *k, int comp, const ipt_text_key *key, const float *gates,
                   const int32_t *ids, float *text, float *pooled)
{
    bench *b = k->b;
    const ipt_model_config *mc = ipt_model_get_config(k->m);
    const ipt_text_config *c = comp == IPT_COMP_TEXT ? &mc->text : &mc->text2;
    int32_t eos = ipt_text_eos(c, ids, 77);
    ipt_weights *w = bench_weights(b, k->m, comp);
    ipt_bank *bank = NULL;
    ipt_graph *g = bank_graph(k, comp, 1, 1, &bank);
    uint64_t bytes = 0;
    ipt_text_build(g, c, key);
    ipt_plan *p = bench_plan(b, &g, w);
    assert_ok(b->ctx, ipt_plan_write(p, "ids", ids, 77 * sizeof *ids));
    if (key->pooled)
        assert_ok(b->ctx, ipt_plan_write(p, "eos", &eos, sizeof eos));
    assert_ok(b->ctx, ipt_bank_write(bank, comp, p, &bytes));
    assert_ok(b->ctx, ipt_plan_write(p, "gates", gates, k->n_file * sizeof *gates));
    assert_ok(b->ctx, ipt_plan_run(p, 0));
    assert_ok(b->ctx, ipt_plan_read(p, "text", text, 77 * (size_t)c->width * sizeof *text));
    if (key->pooled)
        assert_ok(b->ctx,
                  ipt_plan_read(p, "pooled", pooled, (size_t)c->projection_dim * sizeof *pooled));
    ipt_plan_destroy(&p);
    ipt_bank_destroy(&bank);
    ipt_weights_destroy(&w);
}
