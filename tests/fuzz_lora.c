/* libFuzzer target: adapter files from memory against a small list of modules, and on: settings and
 * patterns, what fits, two of them stacked in a bank, the bank in a plan that runs on the host, the
 * words inside looked up in a prompt, converted, resized, merged and written.
 *   fuzz_lora -max_total_time=60
 * Seeds of every family are built in (LLVMFuzzerCustomMutator). */
#include "compose/compose.h"
#include "engine/internal.h"
#include "model_io/adapter_tools.h"
#include "model_io/model_io.h"

#include "tests/fuzz_seed.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define REQUIRE(cond)                                                                              \
    do {                                                                                           \
        if (!(cond))                                                                               \
            abort();                                                                               \
    } while (0)
#define ONE(name, shape, b, e)                                                                     \
    "\"" name "\":{\"dtype\":\"U8\",\"shape\":" shape ",\"data_offsets\":[" #b "," #e "]}"
#define BLOCK "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
#define KOHYA "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
#define CONV "lora_unet_down_blocks_0_resnets_0_conv1"
#define TEXT "text_model.encoder.layers.0.self_attn"

static const ipt_module modules[] = {
    {IPT_COMP_UNET, "down_blocks.0.resnets.0.conv1", 3, 2, 3, 3, false, true},
    {IPT_COMP_UNET, BLOCK ".to_q", 4, 4, 1, 1, false, true},
    {IPT_COMP_UNET, BLOCK ".to_k", 4, 4, 1, 1, false, true},
    {IPT_COMP_UNET, BLOCK ".to_v", 4, 4, 1, 1, false, true},
    {IPT_COMP_UNET, BLOCK ".to_out.0", 4, 4, 1, 1, false, true},
    {IPT_COMP_TEXT, TEXT ".k_proj", 4, 4, 1, 1, false, true},
    {IPT_COMP_TEXT2, "text_projection", 5, 4, 1, 1, false, true},
    {IPT_COMP_UNET, BLOCK ".norm", 4, 1, 1, 1, true, true},
};
static const char *const headers[] = {
    "{\"__metadata__\":{\"ss_tag_frequency\":\"{\\\"1_a b\\\":{\\\"x\\\":3}}\"}," ONE(
        KOHYA ".lora_down.weight", "[2,4]", 0, 8) "," ONE(KOHYA ".lora_up.weight", "[4,2]", 8,
                                                          16) "," ONE(KOHYA ".alpha", "[]", 16,
                                                                      17) "}",
    "{" ONE(CONV ".lora_down.weight", "[2,2,1,1]", 0,
            4) "," ONE(CONV ".lora_mid.weight", "[2,2,3,3]", 4,
                       40) "," ONE(CONV ".lora_up.weight", "[3,2,1,1]", 40, 46) "}",
    "{" ONE("lora_unet_input_blocks_1_0_in_layers_2.lora_down.weight", "[2,2,3,3]", 0, 36) "," ONE(
        "lora_unet_input_blocks_1_0_in_layers_2.lora_up.weight", "[3,2]", 36, 42) "}",
    "{" ONE("unet." BLOCK ".processor.to_out_lora.down.weight", "[1,4]", 0,
            4) "," ONE("unet." BLOCK ".processor.to_out_lora.up.weight", "[4,1]", 4, 8) "}",
    "{" ONE("unet." BLOCK ".to_v.lora.down.weight", "[1,4]", 0, 4) "," ONE(
        "unet." BLOCK ".to_v.lora.up.weight", "[4,1]", 4,
        8) "," ONE("text_encoder." TEXT ".k_proj.lora_linear_layer.down.weight", "[1,4]", 8,
                   12) "," ONE("text_encoder." TEXT ".k_proj.lora_linear_layer.up.weight", "[4,1]",
                               12, 16) "}",
    "{\"__metadata__\":{\"lora_adapter_metadata\":\"{\\\"unet.lora_alpha\\\":3,\\\"unet.use_"
    "rslora\\\":true,\\\"unet.alpha_pattern\\\":{\\\"to_k\\\":2}}\"}," ONE(
        "unet." BLOCK ".to_k.lora_A.weight", "[4,4]", 0,
        16) "," ONE("unet." BLOCK ".to_k.lora_B.weight", "[4,4]", 16, 32) "}",
    "{\"__metadata__\":{\"unet\":\"[\\\"GEGLU\\\"]\"}," ONE("unet:0:down", "[1,4]", 0, 4) "," ONE(
        "unet:0:up", "[4,1]", 4, 8) "," ONE("text_encoder:0:down", "[1,4]", 8,
                                            12) "," ONE("text_encoder:0:up", "[4,1]", 12,
                                                        16) "," ONE("<s1>", "[4]", 16, 20) "}",
};

#define META(text) "{\"__metadata__\":{\"lora_adapter_metadata\":\"" text "\"},"
#define TO_K                                                                                       \
    ONE("unet." BLOCK ".to_k.lora.down.weight", "[4,4]", 0, 16)                                    \
    "," ONE("unet." BLOCK ".to_k.lora.up.weight", "[4,4]", 16, 32)
static const char *const more_headers[] = {
    META("{\\\"unet.r\\\":4,\\\"unet.alpha_pattern\\\":{\\\"^down_blocks.0\\\":1,\\\"(to_q|to_k)"
         "\\\":2,"
         "\\\".*[a-z_]+\\\\\\\\d{1,2}\\\":3}}") TO_K "}",
    META("{\\\"lora_alpha\\\":4,\\\"use_rslora\\\":true,\\\"alpha_pattern\\\":{\\\"(a*)*b\\\":1,"
         "\\\"(?:x)?\\\":2,"
         "\\\"^" BLOCK ".to_k\\\":5},\\\"rank_pattern\\\":{\\\"^to_q\\\":2}}") TO_K "}",
    META("{\\\"unet.peft_type\\\":\\\"LORA\\\",\\\"unet.lora_alpha\\\":1e300}") TO_K "}",
    "{" ONE("lora_te2_text_projection.lora_down.weight", "[1,4]", 0, 4) "," ONE(
        "lora_te2_text_projection.lora_up.weight", "[5,1]", 4,
        9) "," ONE("bundle_emb.dog.string_to_param.*", "[2,4]", 9,
                   17) "," ONE("bundle_emb.cat.clip_l", "[1,4]", 17,
                               21) "," ONE("bundle_emb.cat.clip_g", "[1,5]", 21,
                                           26) "," ONE("<s1>", "[4]", 26, 30) "," ONE("<s2>", "[4]",
                                                                                      30, 34) "}",
    "{\"__metadata__\":{\"modelspec.architecture\":\"stable-diffusion-v1/lora\","
    "\"modelspec.trigger_phrase\":\"dog\",\"ss_tag_frequency\":\"{\\\"a\\\":[],\\\"b\\\":{"
    "\\\"x\\\":1e9}}\"}," ONE(KOHYA ".lora_down.weight", "[2,4]", 0, 8) "," ONE(
        KOHYA ".lora_up.weight", "[4,2]", 8,
        16) "," ONE("lora_unet_double_blocks_0_x.lora_down.weight", "[2,4]", 16,
                    24) "," ONE("lora_unet_double_blocks_0_x.lora_up.weight", "[4,2]", 24,
                                32) "," ONE("lora_te_gone.alpha", "[]", 32, 33) "}",
    "{" ONE("base_model.model." TEXT ".k_proj.lora_A.weight", "[1,4]", 0,
            4) "," ONE("base_model.model." TEXT ".k_proj.lora_B.weight", "[4,1]", 4, 8) "}",
    /* the other kinds */
    "{" ONE(KOHYA ".lokr_w1_a", "[2,1]", 0, 2) "," ONE(KOHYA ".lokr_w1_b", "[1,2]", 2, 4) "," ONE(
        KOHYA ".lokr_w2", "[2,2]", 4, 8) "," ONE(KOHYA ".alpha", "[]", 8,
                                                 9) "," ONE(KOHYA ".dora_scale", "[4,1]", 9,
                                                            13) "," ONE(KOHYA ".scalar", "[]", 13,
                                                                        14) "}",
    "{" ONE(CONV ".lokr_w1", "[1,1]", 0, 1) "," ONE(CONV ".lokr_t2", "[1,1,3,3]", 1, 10) "," ONE(
        CONV ".lokr_w2_a", "[1,3]", 10, 13) "," ONE(CONV ".lokr_w2_b", "[1,2]", 13, 15) "}",
    "{" ONE(KOHYA ".hada_w1_a", "[4,1]", 0, 4) "," ONE(KOHYA ".hada_w1_b", "[1,4]", 4, 8) "," ONE(
        KOHYA ".hada_w2_a", "[4,1]", 8, 12) "," ONE(KOHYA ".hada_w2_b", "[1,4]", 12, 16) "}",
    "{" ONE(CONV ".hada_w1_a", "[1,3]", 0, 3) "," ONE(CONV ".hada_w1_b", "[1,2]", 3, 5) "," ONE(
        CONV ".hada_w2_a", "[1,3]", 5, 8) "," ONE(CONV ".hada_w2_b", "[1,2]", 8,
                                                  10) "," ONE(CONV ".hada_t1", "[1,1,3,3]", 10,
                                                              19) "," ONE(CONV ".hada_t2",
                                                                          "[1,1,3,3]", 19, 28) "}",
    "{" ONE("unet." BLOCK ".processor.to_q_lora.down.weight", "[2,2]", 0,
            4) "," ONE("unet." BLOCK ".processor.to_q_lora.up.weight", "[2,2]", 4, 8) "}",
    "{" ONE(KOHYA ".oft_blocks", "[2,2,2]", 0,
            8) "," ONE(KOHYA ".rescale", "[4,1]", 8, 12) "," ONE(KOHYA ".alpha", "[]", 12, 13) "}",
    "{" ONE(KOHYA ".oft_blocks", "[2,2,2,2]", 0, 16) "," ONE(CONV ".oft_diag", "[3,1,1]", 16,
                                                             19) "}",
    "{" ONE(KOHYA ".weight", "[4]", 0, 4) "," ONE(KOHYA ".on_input", "[]", 4, 5) "," ONE(
        "unet." BLOCK ".to_k.ia3_l", "[4,1]", 5, 9) "}",
    "{" ONE(KOHYA ".a1.weight", "[4,1]", 0, 4) "," ONE(KOHYA ".a2.weight", "[1,4]", 4, 8) "," ONE(
        KOHYA ".b1.weight", "[4,1]", 8, 12) "," ONE(KOHYA ".b2.weight", "[1,4]", 12, 16) "}",
    "{" ONE(KOHYA ".diff", "[4,4]", 0, 16) "," ONE(KOHYA ".diff_b", "[4]", 16, 20) "," ONE(
        CONV ".set_weight", "[3,2,3,3]", 20, 74) "}",
    "{" ONE(
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_norm.w_norm", "[4]", 0,
        4) "," ONE("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_norm.b_norm",
                   "[4]", 4, 8) "}",
};

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned int seed)
{
    const char *all[IPT_COUNT(headers) + IPT_COUNT(more_headers)];
    for (size_t i = 0; i < IPT_COUNT(all); i++)
        all[i] = i < IPT_COUNT(headers) ? headers[i] : more_headers[i - IPT_COUNT(headers)];
    return seed_mutate(data, size, max_size, seed, all, IPT_COUNT(all));
}

static void use_module(ipt_ctx *ctx, const ipt_adapter_module *m)
{
    size_t fan = (size_t)m->in * (size_t)m->kh * (size_t)m->kw, cols = (size_t)m->n_col,
           out = (size_t)m->out;
    REQUIRE(m->module < IPT_COUNT(modules) && m->rank >= 0 && isfinite(m->scale));
    REQUIRE(m->act != IPT_ACTS_LOW_RANK || m->n_col > 0);
    double *w = calloc(fan * out, sizeof *w), *d = calloc(fan * out, sizeof *d);
    float *a = malloc(fan * (cols + 2) * sizeof *a), *b = malloc(out * (cols + 2) * sizeof *b);
    REQUIRE(w && d && a && b);
    for (size_t i = 0; i < fan * out; i++)
        w[i] = 1;
    REQUIRE(ipt_adapter_delta(ctx, m, w, d) == IPT_OK);
    if (m->act == IPT_ACTS_LOW_RANK)
        REQUIRE(ipt_adapter_pack(ctx, m, w, a, b, cols + 2, 1) == IPT_OK);
    free(w);
    free(d);
    free(a);
    free(b);
}

static void check_lists(const ipt_adapter_file *f)
{
    size_t n = 0;
    for (size_t i = 0; i < f->n_word; i++)
        REQUIRE(f->word[i][0] != '\0');
    for (size_t i = 0; i < f->n_group; i++) {
        REQUIRE(f->group[i].name && f->group[i].first && f->group[i].n > 0);
        n += f->group[i].n;
    }
    REQUIRE(n == f->n_unmatched);
    REQUIRE(f->n_unmatched + f->n_harmless <= f->n_key && f->n_bad <= f->n_key);
    REQUIRE((f->n_bad == 0) == (f->bad_values == 0));
    for (size_t i = 0; i < f->n_embedding; i++)
        REQUIRE(f->embedding[i].word[0] &&
                (f->embedding[i].vector[0] || f->embedding[i].vector[1]));
}

/* --- weights of zeros ------------------------------------------------------------------------- */
static ipt_status find_none(ipt_weights *w, const char *name, const ipt_shape *shape, ipt_use use,
                            ipt_weight_view *out)
{
    (void)w, (void)name, (void)shape, (void)use, (void)out;
    return IPT_ERR_UNSUPPORTED;
}

static ipt_status read_zeros(ipt_weights *w, const char *name, const ipt_shape *shape, double *out)
{
    (void)w, (void)name;
    memset(out, 0, ipt_shape_count(shape) * sizeof *out);
    return IPT_OK;
}

/* Linear modules of a component, each on an input of ones, with the bank's adapters beside them. */
static void run_bank(ipt_ctx *ctx, const ipt_bank *bank, int comp)
{
    ipt_weights weights = {.find = find_none, .read = read_zeros};
    ipt_plan_opts o = {.weights = &weights};
    ipt_graph *g = NULL;
    ipt_plan *p = NULL;
    size_t n_site = 0, n_slot = ipt_bank_n_slot(bank), left_out = comp == IPT_COMP_TEXT;
    uint64_t bytes = 0;
    char name[32];
    float gates[IPT_GATE_ROWS * 2], x[8], y[8];
    const ipt_adapter_site *site = ipt_bank_sites(bank, comp, &n_site);
    if (n_site == 0 || ipt_graph_create(ctx, &g) != IPT_OK)
        return;
    for (size_t i = 0; i < IPT_COUNT(gates); i++)
        gates[i] = 1;
    for (size_t i = 0; i < IPT_COUNT(x); i++)
        x[i] = 1;
    ipt_graph_adapters(g, site, n_site, IPT_GATE_ROWS, 1, (int)n_slot);
    for (size_t i = 0; i < IPT_COUNT(modules); i++) {
        const ipt_module *m = &modules[i];
        if (m->comp != comp || m->kh > 1 || m->is_norm ||
            left_out) /* a text layer that clip skip leaves out */
            continue;
        ipt_val in = ipt_leaf(g, IPT_INPUT, ipt_name(name, sizeof name, "x%zu", i),
                              ipt_shape3(IPT_F32, 1, 1, m->in));
        ipt_output(g, ipt_name(name, sizeof name, "y%zu", i),
                   ipt_linear(g, in, m->name, m->out, false));
    }
    if (ipt_graph_status(g) == IPT_OK && ipt_plan_create(g, &o, &p) == IPT_OK) {
        /* a convolution's site is missing in this graph: that is an error, not a crash */
        ipt_status s = ipt_bank_write(bank, comp, p, &bytes);
        REQUIRE(s == IPT_OK || comp == IPT_COMP_UNET);
        for (size_t i = 0; i < IPT_COUNT(modules); i++)
            if (ipt_plan_has(p, ipt_name(name, sizeof name, "x%zu", i)))
                REQUIRE(ipt_plan_write(p, name, x, (size_t)modules[i].in * 4) == IPT_OK);
        if (ipt_plan_has(p, "gates"))
            REQUIRE(ipt_plan_write(p, "gates", gates, IPT_GATE_ROWS * n_slot * 4) == IPT_OK);
        if (s == IPT_OK)
            REQUIRE(ipt_plan_run(p, 0) == IPT_OK);
        if (s == IPT_OK)
            for (size_t i = 0; i < IPT_COUNT(modules); i++)
                if (ipt_plan_has(p, ipt_name(name, sizeof name, "x%zu", i)))
                    REQUIRE(ipt_plan_read(p, ipt_name(name, sizeof name, "y%zu", i), y,
                                          (size_t)modules[i].out * 4) == IPT_OK);
    }
    ipt_plan_destroy(&p);
    ipt_graph_destroy(&g);
}

static void use_bank(ipt_ctx *ctx, ipt_adapter_file *f)
{
    ipt_adapter_file *two[2] = {f, f};
    ipt_bank *bank = NULL;
    size_t rank = 0;
    for (size_t i = 0; i < f->n_module; i++)
        rank += (size_t)f->module[i].n_col;
    if (rank > 4096) /* slow, and nothing new */
        return;
    if (ipt_bank_create(ctx, modules, IPT_COUNT(modules), two, 2, &bank) == IPT_OK) {
        for (int comp = 0; comp < IPT_COMP_COUNT; comp++) {
            REQUIRE(ipt_bank_same_layout(bank, bank, comp));
            run_bank(ctx, bank, comp);
        }
        ipt_bank_destroy(&bank);
    }
}

/* The words inside, written side by side in a prompt of a model with one or two text encoders. */
static void use_words(ipt_ctx *ctx, ipt_adapter_file *f)
{
    static const char merges[] = "#version: 0.2\nd o\ndo g</w>\nc a\nca t</w>\n";
    ipt_tokenizer *tok = NULL;
    char text[4096] = "a ";
    if (f->n_embedding == 0 ||
        ipt_tokenizer_create_from_merges(ctx, merges, sizeof merges - 1, NULL, &tok) != IPT_OK)
        return;
    for (size_t i = 0; i < f->n_embedding && i < 70; i++) {
        size_t at = strlen(text);
        ipt_name(text + at, sizeof text - at, "%s%s", f->embedding[i].word, i % 3 ? "" : ", ");
    }
    for (int encoders = 1; encoders <= 2; encoders++) {
        ipt_engine *e = calloc(1, sizeof *e);
        ipt_loaded *m = calloc(1, sizeof *m);
        ipt_adapter_set set = {.n_file = 1, .file = {f}};
        char key[1][IPT_MAX_PATH] = {"f"};
        const char *prompt[1] = {text};
        const ipt_texts texts = {.text = prompt, .n = 1};
        ipt_prompts p;
        ipt_request r;
        REQUIRE(e && m);
        ipt_request_init(&r);
        r.prompt = text;
        e->ctx = ctx;
        e->m = m;
        e->set = &set;
        set.key = key;
        m->config.text.width = 4;
        m->config.text2.width = 5;
        m->config.has[IPT_COMP_TEXT2] = encoders == 2;
        m->tokenizer[0] = m->tokenizer[1] = tok;
        if (ipt_prompts_read(e, &r, &texts, &p) == IPT_OK)
            ipt_prompts_finish(&p);
        free(m);
        free(e);
    }
    ipt_tokenizer_destroy(&tok);
}

/* One tool into one format, and what came of it into nothing. */
static void use_tool(ipt_ctx *ctx, const ipt_adapter_file *f, unsigned which,
                     ipt_adapter_format format)
{
    static const ipt_merge_method methods[] = {
        IPT_MERGE_CAT, IPT_MERGE_TIES, IPT_MERGE_DARE_TIES_SVD, IPT_MERGE_SVD, IPT_MERGE_LEGO};
    ipt_adapter_out_opts o = {format, IPT_ST_COUNT, modules, IPT_COUNT(modules)};
    ipt_tool t = {.ctx = ctx,
                  .module = modules,
                  .n_module = IPT_COUNT(modules),
                  .dtype = which % 2 ? IPT_ST_F16 : IPT_ST_COUNT};
    ipt_convert_opts c = {(ipt_adapter_target)(which % 4), 2, -1, 0, 0};
    ipt_merge_input in[2] = {{f, 0.5, 1}, {f, -1, 2}};
    ipt_merge_opts m = {.method = methods[which % IPT_COUNT(methods)],
                        .rank = 2,
                        .density = 0.5,
                        .lego = {0, IPT_LEGO_NORM_2, true, which % 2 == 0}};
    o.dtype = t.dtype;
    if (ipt_adapter_out_create(ctx, &o, &t.out) != IPT_OK)
        return;
    ipt_status s = which < 4    ? ipt_adapter_convert(&t, f, &c)
                   : which == 4 ? ipt_adapter_resize(&t, f, &(ipt_resize_opts){2, 1, 0.9})
                                : ipt_adapter_merge(&t, in, 2, &m);
    REQUIRE(s == IPT_OK || ipt_last_error(ctx)[0]);
    if (s == IPT_OK && format != IPT_FORMAT_PEFT && ipt_adapter_out_count(t.out) > 0)
        REQUIRE(ipt_adapter_out_write(t.out, "/dev/null") == IPT_OK || ipt_last_error(ctx)[0]);
    ipt_adapter_out_destroy(&t.out);
}

static void use_tools(ipt_ctx *ctx, const ipt_adapter_file *f)
{
    size_t rank = 0;
    for (size_t i = 0; i < f->n_module; i++)
        rank += (size_t)f->module[i].n_col;
    for (unsigned which = 0; rank <= 256 && which < 11; which++)
        use_tool(ctx, f, which,
                 which == IPT_TO_KRONA ? IPT_FORMAT_KRONA : (ipt_adapter_format)(which % 3));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    ipt_ctx *ctx = NULL;
    ipt_adapter_file *f = NULL;
    if (ipt_ctx_create(NULL, NULL, &ctx) != IPT_OK)
        return 0;
    if (ipt_adapter_open_memory(ctx, "fuzz", data, size, modules, IPT_COUNT(modules), &f) ==
        IPT_OK) {
        REQUIRE(f->n_module + f->n_embedding > 0);
        for (size_t i = 0; i < f->n_module; i++)
            use_module(ctx, &f->module[i]);
        check_lists(f);
        REQUIRE(ipt_adapter_check(f, true) == (f->bad_module ? IPT_ERR_FORMAT : IPT_OK));
        REQUIRE((ipt_adapter_check(f, false) == IPT_ERR_MISSING) == (f->n_unmatched > 0));
        use_bank(ctx, f);
        use_words(ctx, f);
        if (f->n_bad == 0) /* as ipt_adapter_check has it */
            use_tools(ctx, f);
        ipt_adapter_hash(f);
        ipt_adapter_close(&f);
    } else {
        REQUIRE(ipt_last_error(ctx)[0] != '\0');
    }
    ipt_ctx_destroy(&ctx);
    return 0;
}
