/* compose/lorahub.c - LoraHub: the product of the adapters' summed factors, (sum w B) (sum w A), as
 * one adapter, made when they are loaded.  Quadratic in the weights, which `impasto lora hub` finds
 * for some pictures.
 * Source: Huang et al. 2023 (arXiv 2307.13269). */
#include "compose/policy.h"

#include "model_io/adapter_tools.h"

static ipt_status combine(const void *state, ipt_tool *t, const ipt_merge_input *in, size_t n)
{
    const ipt_merge_opts o = {.method = IPT_MERGE_LORAHUB, .density = 1};
    (void)state;
    return ipt_adapter_merge(t, in, n, &o);
}

const ipt_method ipt_method_lorahub = {
    .name = "lorahub",
    .brief =
        "one LoRA of the summed factors, quadratic in the weights (LoraHub; see impasto lora hub); "
        "times as lego",
    .combine = combine,
    .plan = ipt_plan_all,
};
