/* compose/switch.c - Switch: one world with one adapter, changing every tau steps.
 * Source: Zhong et al. 2024 (arXiv 2402.16843), section 3; steps count from 0 here. */
#include "compose/policy.h"

typedef struct state {
    int32_t tau;
} state;

static void defaults(void *st) { ((state *)st)->tau = 5; }

/* Every adapter has its turn: fewer steps each where the request has too few. */
static ipt_status begin(void *st, const ipt_job *job)
{
    state *s = st;
    if (job->n_slot > 1 && s->tau * job->n_slot > job->n_step) {
        int32_t fit = job->n_step / job->n_slot > 0 ? job->n_step / job->n_slot : 1;
        ipt_log(job->ctx, IPT_LOG_WARN,
                "switch: %d adapters of %d steps do not fit into %d steps; taking tau=%d",
                job->n_slot, s->tau, job->n_step, fit);
        s->tau = fit;
    }
    return IPT_OK;
}

static ipt_status plan(const void *st, const ipt_job *job, int32_t eval, ipt_rows *rows)
{
    const state *s = st;
    float slot[IPT_MAX_SLOT] = {0};
    if (job->n_slot > 0)
        slot[job->step_of[eval] / s->tau % job->n_slot] = 1.0F;
    return ipt_rows_world(rows, job, eval, slot);
}

static const ipt_option option[] = {
    {"tau", "N", "steps before the next LoRA takes over, default 5", IPT_OPTION_INT,
     offsetof(state, tau), 1, 1000, NULL},
    {0},
};

const ipt_method ipt_method_switch = {
    .name = "switch",
    .brief = "one LoRA after the other",
    .option = option,
    .state_size = sizeof(state),
    .defaults = defaults,
    .begin = begin,
    .plan = plan,
};
