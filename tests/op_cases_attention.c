/* tests/op_cases_attention.c - attention, tiled and materialised, over head widths, ragged lengths,
 * causal masks and batches. */
#include "tests/op_cases.h"

typedef struct attn_size {
    int n, t, s, heads, d;
    bool causal;
    float scale; /* 0: 1 / sqrt(d) */
} attn_size;

static void build(case_env *e, attn_size a, bool probs)
{
    int32_t c = a.heads * a.d;
    ipt_val q = case_in(e, "q", ipt_shape3(IPT_F32, a.n, a.t, c));
    ipt_val k = case_in(e, "k", ipt_shape3(IPT_F32, a.n, a.s, c));
    ipt_val v = case_in(e, "v", ipt_shape3(IPT_F32, a.n, a.s, c)), p = {0};
    ipt_attn attn = {a.heads, a.causal, a.scale};
    case_out(e, "o", ipt_attention(e->g, q, k, v, attn, probs ? &p : NULL));
    if (probs)
        case_out(e, "p", p);
}

/* The log-sum-exp is compared as well; it has no gradient of its own. */
static void build_lse(case_env *e, attn_size a)
{
    int32_t c = a.heads * a.d;
    ipt_val in[3] = {case_in(e, "q", ipt_shape3(IPT_F32, a.n, a.t, c)),
                     case_in(e, "k", ipt_shape3(IPT_F32, a.n, a.s, c)),
                     case_in(e, "v", ipt_shape3(IPT_F32, a.n, a.s, c))};
    ipt_attr attr = {.attn = {a.heads, a.causal, a.scale}};
    ipt_val out[2] = {{0}, {0}};
    ipt_emit(e->g, IPT_OP_ATTENTION, "attention", in, 3, &attr, out);
    case_out(e, "o", out[0]);
    case_out_nograd(e, "lse", out[1]);
}

#define TILED(id, ...)                                                                             \
    static void id(case_env *e) { build_lse(e, (attn_size){__VA_ARGS__}); }
#define PLAIN(id, ...)                                                                             \
    static void id(case_env *e) { build(e, (attn_size){__VA_ARGS__}, false); }
#define PROBS(id, ...)                                                                             \
    static void id(case_env *e) { build(e, (attn_size){__VA_ARGS__}, true); }
/*          n  t    s    h  d    causal scale */
TILED(one, 1, 1, 1, 1, 1, false, 1.0F)
TILED(d1_ragged, 2, 7, 5, 3, 1, false, 0.7F)
TILED(d3, 1, 13, 11, 2, 3, false, 0.5F)
TILED(d4, 1, 17, 9, 5, 4, false, 0.5F)
TILED(d8, 2, 31, 33, 4, 8, false, 0.35F)
TILED(d12_one_key, 1, 19, 1, 2, 12, false, 0.3F)
TILED(d8_big_scores, 1, 40, 67, 2, 8, false, 6.0F)
TILED(d10_causal, 1, 37, 37, 2, 10, true, 0.3F)
TILED(d40_tile_minus, 1, 63, 31, 2, 40, false, 0.158F)
TILED(d40_tile, 1, 64, 32, 2, 40, false, 0.158F)
TILED(d40_tile_plus, 1, 65, 33, 2, 40, false, 0.158F)
TILED(d64_text, 2, 77, 77, 3, 64, true, 0.125F)
TILED(d80_cross, 2, 50, 77, 2, 80, false, 0.112F)
TILED(d160_cross, 1, 36, 77, 2, 160, false, 0.079F)
TILED(d168, 1, 21, 18, 1, 168, false, 0.077F)
TILED(d162, 1, 9, 9, 1, 162, true, 0.077F)
TILED(d512, 2, 25, 25, 1, 512, false, 0.0442F)
TILED(d512_causal, 1, 33, 33, 1, 512, true, 0.0442F)
TILED(d40_long, 1, 257, 263, 8, 40, false, 0.158F)
TILED(d8_causal_small, 2, 11, 11, 2, 8, true, 0.35F)
PLAIN(heads8, 2, 9, 7, 8, 4, false, 0)
PLAIN(one_query, 1, 1, 20, 2, 40, false, 0)
PROBS(probs_small, 2, 6, 5, 2, 4, false, 0)
PROBS(probs_d3, 1, 7, 4, 3, 3, false, 0.4F)
PROBS(probs_causal, 1, 9, 9, 2, 8, true, 0)
PROBS(probs_text, 2, 64, 77, 8, 40, false, 0)
PROBS(probs_tiles, 1, 65, 129, 1, 20, false, 0)
PROBS(probs_batch, 4, 12, 16, 2, 8, false, 0)
PROBS(probs_one, 1, 1, 1, 1, 1, false, 1.0F)

const op_case op_cases_attention[] = {
    {.name = "attention/one", .build = one, .grad = true},
    {.name = "attention/d1_ragged", .build = d1_ragged, .grad = true},
    {.name = "attention/d3", .build = d3, .grad = true},
    {.name = "attention/d4", .build = d4, .grad = true},
    {.name = "attention/d8", .build = d8},
    {.name = "attention/d8_causal_small", .build = d8_causal_small, .grad = true},
    {.name = "attention/d12_one_key", .build = d12_one_key, .grad = true},
    /* Sharp rows: ds is a difference of near equals, and o came rounded to 11 bits. */
    {.name = "attention/d8_big_scores", .build = d8_big_scores, .nmse_f16 = 1e-5},
    {.name = "attention/d10_causal", .build = d10_causal},
    {.name = "attention/d40_tile_minus", .build = d40_tile_minus},
    {.name = "attention/d40_tile", .build = d40_tile},
    {.name = "attention/d40_tile_plus", .build = d40_tile_plus},
    {.name = "attention/d64_text", .build = d64_text},
    {.name = "attention/d80_cross", .build = d80_cross},
    {.name = "attention/d160_cross", .build = d160_cross},
    {.name = "attention/d168", .build = d168},
    {.name = "attention/d162", .build = d162},
    {.name = "attention/d512", .build = d512},
    {.name = "attention/d512_causal", .build = d512_causal},
    {.name = "attention/d40_long", .build = d40_long},
    {.name = "attention/heads8", .build = heads8, .grad = true},
    {.name = "attention/one_query", .build = one_query, .grad = true},
    {.name = "attention/probs_batch", .build = probs_batch, .grad = true},
    {.name = "attention/probs_small", .build = probs_small, .grad = true},
    {.name = "attention/probs_d3", .build = probs_d3, .grad = true},
    {.name = "attention/probs_causal", .build = probs_causal, .grad = true},
    {.name = "attention/probs_text", .build = probs_text},
    {.name = "attention/probs_tiles", .build = probs_tiles},
    {.name = "attention/probs_one", .build = probs_one, .grad = true},
    {.name = NULL},
};
