/* compose/merge.c - Merge: one world in which all adapters act at their weights.
 * Source: Zhong et al. 2024 (arXiv 2402.16843), section 3. */
#include "compose/policy.h"

ipt_status ipt_plan_all(const void *state, const ipt_job *job, int32_t eval, ipt_rows *rows)
{
    float slot[IPT_MAX_SLOT] = {0};
    (void)state;
    for (int32_t s = 0; s < job->n_slot; s++)
        slot[s] = 1.0F;
    return ipt_rows_world(rows, job, eval, slot);
}

const ipt_method ipt_method_merge = {
    .name = "merge",
    .brief = "all LoRAs at once",
    .plan = ipt_plan_all,
};
