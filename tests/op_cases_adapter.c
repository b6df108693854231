/* tests/op_cases_adapter.c - cases of graph/op_adapter.c and of the side path around it. */
#include "tests/op_cases.h"

static void gate(case_env *e, int t, int r)
{
    ipt_val h = case_in(e, "h", ipt_shape3(IPT_F32, 3, t, r));
    ipt_val gates = case_in_f32(e, "gates", ipt_shape3(IPT_F32, 2, 3, 4));
    ipt_val slot = case_ids(e, "slot", ipt_shape1(IPT_I32, r), -1, 3);
    case_out(e, "y", ipt_gate_mul(e->g, h, gates, slot, 1));
}
static void gate_small(case_env *e) { gate(e, 5, 8); }
static void gate_long(case_env *e) { gate(e, 90, 6); }
static void gate_one(case_env *e) { gate(e, 1, 1); }

static void side_linear(case_env *e) /* y = W x + b + (gate (x A)) B */
{
    ipt_adapter_site site = {.site = "m.lin", .n_rank = 8, .row = 0};
    ipt_graph_adapters(e->g, &site, 1, 1, 2, 3);
    ipt_val x = case_in(e, "x", ipt_shape3(IPT_F32, 2, 5, 12));
    case_in(e, "m.lin.lora_a", ipt_shape2(IPT_F32, 12, 8));
    case_in(e, "m.lin.lora_b", ipt_shape2(IPT_F32, 8, 20));
    case_ids(e, "m.lin.lora_slot", ipt_shape1(IPT_I32, 8), -1, 2);
    case_in_f32(e, "gates", ipt_shape3(IPT_F32, 1, 2, 3));
    case_out(e, "y", ipt_linear(e->g, x, "m.lin", 20, true));
}

static void side_blocks(case_env *e) /* beside a depth of whole q8 blocks */
{
    ipt_adapter_site site = {.site = "m.lin", .n_rank = 12, .row = 0};
    ipt_graph_adapters(e->g, &site, 1, 1, 2, 3);
    ipt_val x = case_in(e, "x", ipt_shape3(IPT_F32, 2, 21, 64));
    case_in(e, "m.lin.lora_a", ipt_shape2(IPT_F32, 64, 12));
    case_in(e, "m.lin.lora_b", ipt_shape2(IPT_F32, 12, 72));
    case_ids(e, "m.lin.lora_slot", ipt_shape1(IPT_I32, 12), -1, 2);
    case_in_f32(e, "gates", ipt_shape3(IPT_F32, 1, 2, 3));
    case_out(e, "y", ipt_linear(e->g, x, "m.lin", 72, true));
}

static void side_conv(case_env *e)
{
    ipt_adapter_site site = {.site = "c", .n_rank = 4, .row = 0};
    ipt_graph_adapters(e->g, &site, 1, 1, 2, 1);
    ipt_val x = case_in(e, "x", ipt_shape4(IPT_F32, 2, 5, 4, 6));
    case_in(e, "c.lora_a", ipt_shape2(IPT_F32, 9 * 6, 4));
    case_in(e, "c.lora_b", ipt_shape2(IPT_F32, 4, 8));
    case_ids(e, "c.lora_slot", ipt_shape1(IPT_I32, 4), 0, 0);
    case_in_f32(e, "gates", ipt_shape3(IPT_F32, 1, 2, 1));
    ipt_conv conv = {.kernel = 3, .stride = 2, .pad_lo = 1, .pad_hi = 1};
    case_out(e, "y", ipt_conv2d(e->g, x, "c", 8, conv));
}

static void side_conv_up(case_env *e)
{
    ipt_adapter_site site = {.site = "c", .n_rank = 4, .row = 0};
    ipt_graph_adapters(e->g, &site, 1, 1, 1, 1);
    ipt_val x = case_in(e, "x", ipt_shape4(IPT_F32, 1, 3, 4, 4));
    case_in(e, "c.lora_a", ipt_shape2(IPT_F32, 9 * 4, 4));
    case_in(e, "c.lora_b", ipt_shape2(IPT_F32, 4, 4));
    case_ids(e, "c.lora_slot", ipt_shape1(IPT_I32, 4), 0, 0);
    case_in_f32(e, "gates", ipt_shape3(IPT_F32, 1, 1, 1));
    ipt_conv conv = {.kernel = 3, .stride = 1, .pad_lo = 1, .pad_hi = 1, .up_h = 5, .up_w = 8};
    case_out(e, "y", ipt_conv2d(e->g, x, "c", 4, conv));
}

static void mix(case_env *e, int r, int i, int c, int o)
{
    ipt_val x = case_in(e, "x", ipt_shape3(IPT_F32, r, i, c)), none = {0};
    ipt_val p = case_in(e, "p", ipt_shape2(IPT_F32, i, o));
    case_out(e, "y", ipt_mix(e->g, x, p, none, none, 0));
}
static void mix_quads(case_env *e) { mix(e, 3, 5, 8, 7); }
static void mix_ragged(case_env *e) { mix(e, 77, 4, 5, 4); }
static void mix_one(case_env *e) { mix(e, 1, 1, 1, 1); }
static void mix_long(case_env *e) { mix(e, 2, 17, 68, 13); }
static void mix_whole(case_env *e) { mix(e, 32, 5, 8, 7); } /* 64 invocations: the known matrix */
static void mix_whole_one(case_env *e) { mix(e, 64, 3, 5, 2); }
static void mix_whole_wide(case_env *e) { mix(e, 16, 8, 16, 8); }
static void gated(case_env *e, int r, int c, int o)
{
    ipt_val x = case_in(e, "x", ipt_shape3(IPT_F32, r, 3, c));
    ipt_val p = case_in(e, "p", ipt_shape2(IPT_F32, 3, o));
    ipt_val gates = case_in_f32(e, "gates", ipt_shape3(IPT_F32, 2, 3, 4));
    ipt_val slot = case_ids(e, "slot", ipt_shape1(IPT_I32, 1), 2, 2);
    case_out(e, "y", ipt_mix(e->g, x, p, gates, slot, 1));
}
static void mix_gated(case_env *e) { gated(e, 15, 12, 9); }
static void mix_gated_whole(case_env *e) { gated(e, 48, 16, 8); }

/* x [r,i,k], p [i,o], q [k,c] and a summand; gated: two batch elements. */
static void kron(case_env *e, const int r[5], bool is_swapped, bool is_gated)
{
    ipt_kron_factors f = {.p = case_in(e, "p", ipt_shape2(IPT_F32, r[1], r[3])),
                          .q = case_in(e, "q", ipt_shape2(IPT_F32, r[2], r[4])),
                          .is_swapped = is_swapped};
    ipt_val x = case_in(e, "x", ipt_shape3(IPT_F32, r[0], r[1], r[2]));
    ipt_val add = case_in(e, "add",
                          is_swapped ? ipt_shape3(IPT_F32, r[0], r[4], r[3])
                                     : ipt_shape3(IPT_F32, r[0], r[3], r[4]));
    if (is_gated) {
        f.gates = case_in_f32(e, "gates", ipt_shape3(IPT_F32, 3, 2, 4));
        f.slot = case_ids(e, "slot", ipt_shape1(IPT_I32, 1), 3, 3);
        f.row = 2;
    }
    case_out(e, "y", ipt_kron(e->g, x, &f, add));
}
#define KRON_CASE(name, swapped, gated, ...)                                                       \
    static void name(case_env *e) { kron(e, (const int[5]){__VA_ARGS__}, swapped, gated); }
KRON_CASE(kron_one, false, false, 1, 1, 1, 1, 1)
KRON_CASE(kron_quads, false, false, 16, 4, 12, 4, 36) /* r, i, k, o, c */
KRON_CASE(kron_gated, false, true, 38, 5, 20, 5, 40)  /* the last tile is not full */
KRON_CASE(kron_swapped, true, true, 10, 8, 8, 8, 44)
KRON_CASE(kron_swapped_ragged, true, true, 6, 3, 7, 5, 9)
KRON_CASE(kron_ragged, false, true, 14, 6, 5, 3, 35)
KRON_CASE(kron_ten, true, true, 6, 10, 8, 10, 12)
KRON_CASE(kron_wide, true, false, 3, 7, 12, 12, 8) /* no tile holds these: product and mix */
KRON_CASE(kron_row, false, true, 6, 1, 8, 16, 12)  /* too many results of a tile: the same */
KRON_CASE(kron_wide_gated, false, true, 64, 9, 8, 7, 8)
KRON_CASE(kron_whole_swapped, true, true, 64, 7, 8, 8, 8)
static void kron_alone(case_env *e) /* nothing to add to, no slot */
{
    ipt_kron_factors f = {.p = case_in(e, "p", ipt_shape2(IPT_F32, 2, 4)),
                          .q = case_in(e, "q", ipt_shape2(IPT_F32, 8, 12)),
                          .gates = case_in_f32(e, "gates", ipt_shape3(IPT_F32, 1, 1, 2)),
                          .slot = case_ids(e, "slot", ipt_shape1(IPT_I32, 1), -1, -1)};
    ipt_val x = case_in(e, "x", ipt_shape3(IPT_F32, 5, 2, 8));
    case_out(e, "y", ipt_kron(e->g, x, &f, (ipt_val){0}));
}

static void swap(case_env *e, int a, int b, int c, int d)
{
    case_out(e, "y", ipt_swap(e->g, case_in(e, "x", ipt_shape4(IPT_F32, a, b, c, d))));
}
static void swap_quads(case_env *e) { swap(e, 2, 3, 5, 8); }
static void swap_ragged(case_env *e) { swap(e, 3, 7, 4, 3); }
static void swap_plain(case_env *e) { swap(e, 77, 5, 6, 1); }

/* Everything that may act on one site, each in a slot of its own. */
static void other_params(case_env *e, const char *site, int in, int taps, int out, int n_kron)
{
    char name[64];
    const int per = in % 4 ? 1 : 4;
    for (int k = 0; k < n_kron; k++)
        case_ids(e, ipt_name(name, sizeof name, "%s.kron%d_slot", site, k), ipt_shape1(IPT_I32, 1),
                 k, k);
    case_in(e, ipt_name(name, sizeof name, "%s.dense0", site), ipt_shape2(IPT_F32, taps * in, out));
    case_ids(e, ipt_name(name, sizeof name, "%s.dense0_slot", site), ipt_shape1(IPT_I32, per), 2,
             2);
    case_in_f32(e, ipt_name(name, sizeof name, "%s.bias_delta", site), ipt_shape2(IPT_F32, 3, out));
}

static void kinds_linear(case_env *e) /* both orders of the products, plain and shuffled */
{
    static const ipt_adapter_kron kron[] = {{4, 5, 3, 4, false}, {4, 5, 3, 4, true}};
    ipt_adapter_site site = {
        .site = "m", .n_dense = 1, .n_kron = 2, .has_bias = true, .row = 1, .kron = kron};
    ipt_graph_adapters(e->g, &site, 1, 2, 2, 3);
    ipt_val x = case_in(e, "x", ipt_shape3(IPT_F32, 2, 5, 12));
    for (int k = 0; k < 2; k++) {
        case_in(e, k ? "m.kron1_p" : "m.kron0_p", ipt_shape2(IPT_F32, 3, 4));
        case_in(e, k ? "m.kron1_q" : "m.kron0_q", ipt_shape2(IPT_F32, 4, 5));
    }
    other_params(e, "m", 12, 1, 20, 2);
    case_in_f32(e, "gates", ipt_shape3(IPT_F32, 2, 2, 3));
    case_out(e, "y", ipt_linear(e->g, x, "m", 20, true));
}

static void kinds_wide(case_env *e) /* cheaper with Q first */
{
    static const ipt_adapter_kron kron[] = {{6, 2, 2, 9, false}, {6, 2, 2, 9, true}};
    ipt_adapter_site site = {.site = "m", .n_kron = 2, .kron = kron};
    ipt_graph_adapters(e->g, &site, 1, 1, 3, 2);
    ipt_val x = case_in(e, "x", ipt_shape2(IPT_F32, 3, 18));
    for (int k = 0; k < 2; k++) {
        case_in(e, k ? "m.kron1_p" : "m.kron0_p", ipt_shape2(IPT_F32, 2, 6));
        case_in(e, k ? "m.kron1_q" : "m.kron0_q", ipt_shape2(IPT_F32, 9, 2));
        case_ids(e, k ? "m.kron1_slot" : "m.kron0_slot", ipt_shape1(IPT_I32, 1), k, k);
    }
    case_in_f32(e, "gates", ipt_shape3(IPT_F32, 1, 3, 2));
    case_out(e, "y", ipt_linear(e->g, x, "m", 12, false));
}

/* P first: the products with Q are groups of the linear's own side path. */
static void groups(case_env *e, int tokens, const ipt_adapter_kron *kron)
{
    ipt_adapter_site site = {.site = "m", .n_kron = 1, .kron = kron};
    ipt_graph_adapters(e->g, &site, 1, 1, 2, 2);
    ipt_val x = case_in(e, "x", ipt_shape3(IPT_F32, 2, tokens, kron->i1 * kron->i2));
    case_in(e, "m.kron0_p", ipt_shape2(IPT_F32, kron->i1, kron->o1));
    case_in(e, "m.kron0_q", ipt_shape2(IPT_F32, kron->i2, kron->o2));
    case_ids(e, "m.kron0_slot", ipt_shape1(IPT_I32, 1), 1, 1);
    case_in_f32(e, "gates", ipt_shape3(IPT_F32, 1, 2, 2));
    case_out(e, "y", ipt_linear(e->g, x, "m", kron->o1 * kron->o2, true));
}
/* o1, o2, i1, i2: groups that meet inside a tile, that fill tiles, many in a tile, one */
static void groups_meet(case_env *e) { groups(e, 9, &(ipt_adapter_kron){3, 20, 3, 4, false}); }
static void groups_fill(case_env *e) { groups(e, 35, &(ipt_adapter_kron){2, 64, 4, 8, false}); }
static void groups_many(case_env *e) { groups(e, 4, &(ipt_adapter_kron){10, 8, 10, 4, false}); }
static void groups_one(case_env *e) { groups(e, 5, &(ipt_adapter_kron){1, 36, 3, 12, false}); }

static void kinds_conv(case_env *e)
{
    static const ipt_adapter_kron kron = {2, 3, 4, 2, false};
    ipt_adapter_site site = {
        .site = "c", .n_dense = 1, .n_kron = 1, .has_bias = true, .kron = &kron};
    ipt_graph_adapters(e->g, &site, 1, 1, 2, 3);
    ipt_val x = case_in(e, "x", ipt_shape4(IPT_F32, 2, 5, 4, 8));
    case_in(e, "c.kron0_p", ipt_shape2(IPT_F32, 4, 2));
    case_in(e, "c.kron0_q", ipt_shape2(IPT_F32, 9 * 2, 3));
    other_params(e, "c", 8, 9, 6, 1);
    case_in_f32(e, "gates", ipt_shape3(IPT_F32, 1, 2, 3));
    ipt_conv conv = {.kernel = 3, .stride = 2, .pad_lo = 1, .pad_hi = 1};
    case_out(e, "y", ipt_conv2d(e->g, x, "c", 6, conv));
}

static void kinds_norm(case_env *e, bool group)
{
    ipt_adapter_site site = {.site = "n", .has_bias = true, .has_norm = true};
    ipt_graph_adapters(e->g, &site, 1, 1, 2, 2);
    ipt_val x =
        case_in(e, "x", group ? ipt_shape4(IPT_F32, 2, 3, 2, 8) : ipt_shape3(IPT_F32, 2, 5, 12));
    int c = group ? 8 : 12;
    case_in_f32(e, "n.norm_one", ipt_shape1(IPT_F32, c));
    case_in_f32(e, "n.norm_zero", ipt_shape1(IPT_F32, c));
    case_in_f32(e, "n.norm_delta", ipt_shape2(IPT_F32, 2, c));
    case_in_f32(e, "n.bias_delta", ipt_shape2(IPT_F32, 2, c));
    case_in_f32(e, "gates", ipt_shape3(IPT_F32, 1, 2, 2));
    case_out(e, "y",
             group ? ipt_group_norm(e->g, x, "n", 2, 1e-5F, true)
                   : ipt_layer_norm(e->g, x, "n", 1e-5F));
}
static void kinds_group_norm(case_env *e) { kinds_norm(e, true); }
static void kinds_layer_norm(case_env *e) { kinds_norm(e, false); }

/* The same where adapters have places: t pixels or tokens of n batch elements, for each slot. */
static void place(case_env *e, int t, int n, int slots)
{
    char name[32];
    ipt_graph_gates(e->g, NULL, true);
    case_in_f32(e, ipt_name(name, sizeof name, "place%d", t), ipt_shape3(IPT_F32, 1, n * t, slots));
}
static void placed_linear(case_env *e)
{
    place(e, 5, 2, 3);
    side_linear(e);
}
static void placed_conv(case_env *e) /* low rank: where the result lies */
{
    place(e, 3 * 2, 2, 1);
    side_conv(e);
}
static void placed_conv_up(case_env *e)
{
    place(e, 5 * 8, 1, 1);
    side_conv_up(e);
}
static void placed_kinds_linear(case_env *e)
{
    place(e, 5, 2, 3);
    kinds_linear(e);
}
static void placed_kinds_wide(case_env *e) /* as what acts on the time */
{
    place(e, 1, 3, 2);
    kinds_wide(e);
}
static void
placed_kinds_conv(case_env *e) /* matrices: where the input lies; the bias: the result */
{
    place(e, 5 * 4, 2, 3);
    place(e, 3 * 2, 2, 3);
    kinds_conv(e);
}
static void placed_group_norm(case_env *e)
{
    place(e, 3 * 2, 2, 2);
    kinds_norm(e, true);
}
static void placed_layer_norm(case_env *e)
{
    place(e, 5, 2, 2);
    kinds_norm(e, false);
}

static void share(case_env *e, int n, int t, int c, bool more)
{
    ipt_val b = case_in(e, "b", ipt_shape3(IPT_F32, n, t, c)), none = {0};
    ipt_val s = case_in_f32(e, "share", ipt_shape1(IPT_F32, t));
    ipt_val a = more ? case_in(e, "a", ipt_shape3(IPT_F32, n, t, c)) : none;
    case_out(e, "y", ipt_share(e->g, b, s, a));
}
static void share_quads(case_env *e) { share(e, 2, 5, 12, true); }
static void share_ragged(case_env *e) { share(e, 3, 7, 5, true); }
static void share_alone(case_env *e) { share(e, 2, 77, 8, false); }
static void share_one(case_env *e) { share(e, 1, 1, 1, false); }

const op_case op_cases_adapter[] = {
    {"gate_mul/small", gate_small, true, 0, 0, 0},
    {"gate_mul/long", gate_long, true, 0, 0, 0},
    {"gate_mul/one", gate_one, true, 0, 0, 0},
    {"side_path/linear", side_linear, true, 0, 0, 0},
    {"side_path/linear_blocks", side_blocks, true, 0, 0, 0},
    {"side_path/conv", side_conv, true, 0, 0, 0},
    {"side_path/conv_up", side_conv_up, true, 0, 0, 0},
    {"mix/quads", mix_quads, true, 0, 0, 0},
    {"mix/ragged", mix_ragged, true, 0, 0, 0},
    {"mix/one", mix_one, true, 0, 0, 0},
    {"mix/long", mix_long, true, 0, 0, 0},
    {"mix/whole", mix_whole, true, 0, 0, 0},
    {"mix/whole_one", mix_whole_one, true, 0, 0, 0},
    {"mix/whole_wide", mix_whole_wide, true, 0, 0, 0},
    {"mix/gated", mix_gated, true, 0, 0, 0},
    {"mix/gated_whole", mix_gated_whole, true, 0, 0, 0},
    {"kron/one", kron_one, true, 0, 0, 0},
    {"kron/quads", kron_quads, true, 0, 0, 0},
    {"kron/gated", kron_gated, true, 0, 0, 0},
    {"kron/swapped", kron_swapped, true, 0, 0, 0},
    {"kron/swapped_ragged", kron_swapped_ragged, true, 0, 0, 0},
    {"kron/ragged", kron_ragged, true, 0, 0, 0},
    {"kron/row", kron_row, true, 0, 0, 0},
    {"kron/ten", kron_ten, true, 0, 0, 0},
    {"kron/wide", kron_wide, true, 0, 0, 0},
    {"kron/wide_gated", kron_wide_gated, true, 0, 0, 0},
    {"kron/whole_swapped", kron_whole_swapped, true, 0, 0, 0},
    {"kron/alone", kron_alone, true, 0, 0, 0},
    {"kron/gated_packed", kron_gated, false, 0, 0, 0},
    {"kron/swapped_packed", kron_swapped, false, 0, 0, 0},
    {"swap/quads", swap_quads, true, 0, 0, 0},
    {"swap/ragged", swap_ragged, true, 0, 0, 0},
    {"swap/plain", swap_plain, true, 0, 0, 0},
    {"side_kinds/linear", kinds_linear, true, 0, 0, 0},
    {"side_kinds/wide", kinds_wide, true, 0, 0, 0},
    {"side_kinds/conv", kinds_conv, true, 0, 0, 0},
    {"side_kinds/group_norm", kinds_group_norm, true, 0, 0, 0},
    {"side_kinds/layer_norm", kinds_layer_norm, true, 0, 0, 0},
    {"placed/linear", placed_linear, true, 0, 0, 0},
    {"placed/conv", placed_conv, true, 0, 0, 0},
    /* f16: gradients go through two rounded factors, the gate and the place */
    {"placed/conv_up", placed_conv_up, true, 0, 3e-6, 0},
    {"placed/kinds_linear", placed_kinds_linear, true, 0, 0, 0},
    {"placed/kinds_wide", placed_kinds_wide, true, 0, 0, 0},
    {"placed/kinds_conv", placed_kinds_conv, true, 0, 0, 0},
    {"placed/group_norm", placed_group_norm, true, 0, 3e-6, 0},
    {"placed/layer_norm", placed_layer_norm, true, 0, 0, 0},
    {"side_groups/meet", groups_meet, true, 0, 0, 0},
    {"side_groups/fill", groups_fill, true, 0, 0, 0},
    {"side_groups/many", groups_many, true, 0, 0, 0},
    {"side_groups/one", groups_one, true, 0, 0, 0},
    {"side_groups/meet_packed", groups_meet, false, 0, 0, 0},
    {"side_groups/fill_packed", groups_fill, false, 0, 0, 0},
    {"share/quads", share_quads, true, 0, 0, 0},
    {"share/ragged", share_ragged, true, 0, 0, 0},
    {"share/alone", share_alone, true, 0, 0, 0},
    {"share/one", share_one, true, 0, 0, 0},
    {"side_kinds/linear_packed", kinds_linear, false, 0, 0, 0},
    {"side_kinds/conv_packed", kinds_conv, false, 0, 0, 0},
    /* without gradients the factors are packed when written */
    {"side_path/linear_packed", side_linear, false, 0, 0, 0},
    {"side_path/conv_packed", side_conv, false, 0, 0, 0},
    {"side_path/conv_up_packed", side_conv_up, false, 0, 0, 0},
    {NULL, NULL, false, 0, 0, 0},
};
