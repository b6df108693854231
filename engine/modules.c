/* engine/modules.c - see modules.h.  A graph is built without a device and asked for its weights,
 * so that there is no second list of names to keep in step with the models. */
#include "engine/modules.h"

#include <string.h>

#include "graph/graph.h"
#include "text_encoder/text_encoder.h"
#include "unet/unet.h"
#include "vae/vae.h"

static void build_text(ipt_graph *g, const ipt_text_config *c)
{
    ipt_text_key key = {.batch = 1,
                        .tokens = c->max_tokens,
                        .final_norm = true,
                        .pooled = c->has_projection,
                        .act = IPT_F32};
    ipt_text_build(g, c, &key);
}

/* The smallest picture that every level can halve: shapes of weights do not depend on it. */
static void build(ipt_graph *g, const ipt_model_config *c, int comp)
{
    if (comp == IPT_COMP_UNET) {
        int32_t side = 1 << c->unet.n_level;
        ipt_unet_key key = {.batch = 1, .h = side, .w = side, .tokens = 77, .act = IPT_F32};
        ipt_unet_build(g, &c->unet, &key);
    } else if (comp == IPT_COMP_VAE && c->vae.tiny) {
        ipt_vae_tiny_build(g, 1, 2, 2, "decoder.layers.", 0, IPT_F32);
    } else if (comp == IPT_COMP_VAE) {
        int32_t side = 2 * ipt_vae_factor(&c->vae);
        ipt_vae_encode_build(g, &c->vae, 1, side, side, IPT_F32);
        ipt_vae_decode_build(g, &c->vae, 1, 2, 2, IPT_F32);
    } else {
        build_text(g, comp == IPT_COMP_TEXT ? &c->text : &c->text2);
    }
}

ipt_status ipt_wants_create(ipt_ctx *ctx, const ipt_model_config *c, int comp, ipt_want_list *out)
{
    ipt_graph *g = NULL;
    ipt_want_list l = {0};
    ipt_status status = IPT_OK;
    ipt_arena_init(&l.arena, ctx);
    IPT_TRY_GOTO(ipt_graph_create(ctx, &g), fail);
    build(g, c, comp);
    IPT_TRY_GOTO(ipt_graph_status(g), fail);
    l.n = ipt_graph_n_weights(g);
    status = IPT_ERR_NOMEM;
    l.want = ipt_arena_alloc(&l.arena, l.n * sizeof *l.want);
    if (!l.want)
        goto fail;
    for (size_t i = 0; i < l.n; i++) {
        l.want[i].name = ipt_arena_strdup(&l.arena, ipt_graph_weight(g, i, &l.want[i].shape));
        if (!l.want[i].name)
            goto fail;
    }
    ipt_graph_destroy(&g);
    *out = l;
    return IPT_OK;
fail:
    ipt_arena_finish(&l.arena);
    ipt_graph_destroy(&g);
    return status;
}

void ipt_wants_finish(ipt_want_list *l)
{
    if (l && l->want) {
        ipt_arena_finish(&l->arena);
        memset(l, 0, sizeof *l);
    }
}

static bool ends_with(const char *name, const char *end)
{
    size_t n = strlen(name), k = strlen(end);
    return n > k && strcmp(name + n - k, end) == 0;
}

/* Length of the module's name when a weight belongs to a linear, a convolution or a norm, else 0:
 * embedding tables are no modules. */
static size_t module_length(const ipt_want *w)
{
    static const char end[] = ".weight";
    if (!ends_with(w->name, end) || ends_with(w->name, "token_embedding.weight") ||
        ends_with(w->name, "position_embedding.weight"))
        return 0;
    return strlen(w->name) - (sizeof end - 1);
}

/* Biases follow their weights. */
static bool has_bias(const ipt_want_list *wants, size_t i, size_t n)
{
    const char *name = wants->want[i].name;
    if (i + 1 == wants->n)
        return false;
    const char *next = wants->want[i + 1].name;
    return strncmp(next, name, n) == 0 && strcmp(next + n, ".bias") == 0;
}

static ipt_status add_modules(ipt_module_list *l, const ipt_want_list *wants, int comp)
{
    for (size_t i = 0; i < wants->n; i++) {
        const ipt_want *w = &wants->want[i];
        size_t n = module_length(w);
        if (n == 0)
            continue;
        char *name = ipt_arena_alloc(&l->arena, n + 1);
        if (!name)
            return IPT_ERR_NOMEM;
        memcpy(name, w->name, n);
        bool conv = w->shape.rank == 4;
        l->module[l->n++] = (ipt_module){.comp = comp,
                                         .name = name,
                                         .out = w->shape.dim[0],
                                         .in = conv ? w->shape.dim[3] : w->shape.dim[1],
                                         .kh = conv ? w->shape.dim[1] : 1,
                                         .kw = conv ? w->shape.dim[2] : 1,
                                         .is_norm = w->shape.rank == 1,
                                         .has_bias = has_bias(wants, i, n)};
    }
    return IPT_OK;
}

ipt_status ipt_modules_create(ipt_ctx *ctx, const ipt_model_config *c, ipt_module_list *out)
{
    static const int comps[] = {IPT_COMP_UNET, IPT_COMP_TEXT, IPT_COMP_TEXT2};
    ipt_want_list wants[IPT_COUNT(comps)] = {{0}};
    ipt_module_list l = {0};
    ipt_status status = IPT_OK;
    size_t total = 0;
    ipt_arena_init(&l.arena, ctx);
    for (size_t i = 0; i < IPT_COUNT(comps); i++)
        if (c->has[comps[i]]) {
            IPT_TRY_GOTO(ipt_wants_create(ctx, c, comps[i], &wants[i]), end);
            total += wants[i].n;
        }
    l.module = ipt_arena_alloc(&l.arena, total * sizeof *l.module);
    if (!l.module)
        status = IPT_ERR_NOMEM;
    for (size_t i = 0; status == IPT_OK && i < IPT_COUNT(comps); i++)
        status = add_modules(&l, &wants[i], comps[i]);
end:
    for (size_t i = 0; i < IPT_COUNT(comps); i++)
        ipt_wants_finish(&wants[i]);
    if (status == IPT_OK)
        *out = l;
    else
        ipt_arena_finish(&l.arena);
    return status;
}

void ipt_modules_finish(ipt_module_list *l)
{
    if (l && l->module) {
        ipt_arena_finish(&l->arena);
        memset(l, 0, sizeof *l);
    }
}
