/* compose/composite.c - Composite: a world for each adapter alone, their predictions averaged on
 * both sides of the guidance.  Source: Zhong et al. 2024 (arXiv 2402.16843), section 3. */
#include "compose/policy.h"

static ipt_status plan(const void *state, const ipt_job *job, int32_t eval, ipt_rows *rows)
{
    (void)state;
    for (int32_t s = 0; s < job->n_slot || s == 0; s++) {
        float slot[IPT_MAX_SLOT] = {0};
        if (job->n_slot > 0)
            slot[s] = 1.0F;
        IPT_TRY(ipt_rows_world(rows, job, eval, slot));
    }
    return IPT_OK;
}

const ipt_method ipt_method_composite = {
    .name = "composite",
    .brief = "every LoRA guides alone and the guidances are averaged",
    .plan = plan,
};
