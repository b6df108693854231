/* compose/lego.c - LEGO: the ranks of all adapters clustered into one adapter, made when they are
 * loaded, which then acts as a single one does.
 * Source: model_io/lego.h. */
#include "compose/policy.h"

#include "model_io/adapter_tools.h"

typedef struct state {
    int32_t rank, norm, output, gauge;
} state;

static const ipt_option options[] = {
    {"rank", "K", "ranks of the result (default: the mean of the LoRAs' by weight)", IPT_OPTION_INT,
     offsetof(state, rank), 1, IPT_TOOL_MAX_RANK, NULL},
    {"norm", "2|inf|off", "norm of its members that a cluster's mean keeps (default 2)",
     IPT_OPTION_CHOICE, offsetof(state, norm), 0, 0, "2 inf off"},
    {"output", "on|off", "times the root of mean rank / K (default on)", IPT_OPTION_CHOICE,
     offsetof(state, output), 0, 0, "on off"},
    {"gauge", "on|off",
     "ranks compared by what they change (default on), else as they lie in the files",
     IPT_OPTION_CHOICE, offsetof(state, gauge), 0, 0, "on off"},
    {0},
};

static ipt_status combine(const void *of, ipt_tool *t, const ipt_merge_input *in, size_t n)
{
    const state *s = of;
    ipt_merge_opts o = {.method = IPT_MERGE_LEGO, .rank = s->rank, .density = 1};
    o.lego = (ipt_lego_opts){
        .norm = (ipt_lego_norm)s->norm, .want_output = s->output == 0, .want_gauge = s->gauge == 0};
    IPT_TRY(ipt_adapter_merge(t, in, n, &o));
    if (t->report.n_clamped > 0)
        ipt_log(t->ctx, IPT_LOG_WARN,
                "compose lego: the LoRAs have fewer than %d ranks together in %zu modules: all are "
                "kept there",
                s->rank, t->report.n_clamped);
    return IPT_OK;
}

const ipt_method ipt_method_lego = {
    .name = "lego",
    .brief = "one LoRA of the ranks of all, like ones joined (LoRA-LEGO); start, end, blocks, "
             "curve: one for "
             "all",
    .option = options,
    .state_size = sizeof(state),
    .combine = combine,
    .plan = ipt_plan_all,
};
