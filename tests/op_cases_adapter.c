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

const op_case op_cases_adapter[] = {
    {"gate_mul/small", gate_small, true, 0, 0, 0},
    {"gate_mul/long", gate_long, true, 0, 0, 0},
    {"gate_mul/one", gate_one, true, 0, 0, 0},
    {"side_path/linear", side_linear, true, 0, 0, 0},
    {"side_path/conv", side_conv, true, 0, 0, 0},
    {"side_path/conv_up", side_conv_up, true, 0, 0, 0},
    /* without gradients the factors are packed when written */
    {"side_path/linear_packed", side_linear, false, 0, 0, 0},
    {"side_path/conv_packed", side_conv, false, 0, 0, 0},
    {"side_path/conv_up_packed", side_conv_up, false, 0, 0, 0},
    {NULL, NULL, false, 0, 0, 0},
};
