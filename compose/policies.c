/* compose/policies.c - Merge, Switch and Composite: which worlds at a step, and how they are
 * blended. Source: Zhong et al. 2024 (arXiv 2402.16843), section 3; steps count from 0 here. */
#include "compose/compose.h"

#include <stdlib.h>
#include <string.h>

typedef enum { POLICY_MERGE, POLICY_SWITCH, POLICY_COMPOSITE, POLICY_COUNT } policy_kind;
typedef enum { TE_ACTIVE, TE_MERGED, TE_NONE } te_mode;
static const char *const names[POLICY_COUNT] = {"merge", "switch", "composite"};

struct ipt_policy {
    policy_kind kind;
    te_mode te;
    int32_t tau;
    ipt_job job;
    ipt_slot_use slot[IPT_MAX_SLOT];
    ipt_world world[IPT_MAX_SLOT];
};

const char *ipt_policy_names(void) { return "merge switch composite"; }

const char *ipt_policy_option_help(void)
{
    return "  te=active|merged|none   adapters in the text encoder: of the row's world, all, none "
           "[active]\n"
           "  tau=N                   switch: steps before the next adapter takes over [5]\n";
}

static ipt_status read_option(ipt_policy *p, ipt_ctx *ctx, const char *opt)
{
    const char *eq = strchr(opt, '=');
    size_t n = eq ? (size_t)(eq - opt) : 0;
    if (n == 2 && strncmp(opt, "te", n) == 0) {
        static const char *const modes[] = {"active", "merged", "none"};
        for (int i = 0; i < 3; i++)
            if (strcmp(eq + 1, modes[i]) == 0) {
                p->te = (te_mode)i;
                return IPT_OK;
            }
        return ipt_fail(ctx, IPT_ERR_ARG, "compose option te=%s: expected active, merged or none",
                        eq + 1);
    }
    if (n == 3 && strncmp(opt, "tau", n) == 0 && p->kind == POLICY_SWITCH) {
        char *end = NULL;
        long tau = strtol(eq + 1, &end, 10);
        if (end == eq + 1 || *end || tau < 1 || tau > 1000)
            return ipt_fail(ctx, IPT_ERR_ARG, "compose option tau=%s: expected 1..1000", eq + 1);
        p->tau = (int32_t)tau;
        return IPT_OK;
    }
    return ipt_fail(ctx, IPT_ERR_ARG, "unknown option '%s' for compose method %s", opt,
                    names[p->kind]);
}

ipt_status ipt_policy_create(const char *name, const ipt_job *job, ipt_policy **out)
{
    int kind = -1;
    for (int i = 0; i < POLICY_COUNT; i++)
        if (strcmp(name, names[i]) == 0)
            kind = i;
    if (kind < 0)
        return ipt_fail(job->ctx, IPT_ERR_ARG, "unknown compose method '%s'; there are: %s", name,
                        ipt_policy_names());
    if (job->n_slot > IPT_MAX_SLOT)
        return ipt_fail(job->ctx, IPT_ERR_ARG, "%d adapters given, at most %d at once", job->n_slot,
                        IPT_MAX_SLOT);
    ipt_policy *p = ipt_alloc(job->ctx, sizeof *p);
    if (!p)
        return IPT_ERR_NOMEM;
    p->kind = (policy_kind)kind;
    p->tau = 5;
    p->job = *job;
    if (job->n_slot > 0)
        memcpy(p->slot, job->slot, (size_t)job->n_slot * sizeof *p->slot);
    p->job.slot = p->slot;
    for (size_t i = 0; i < job->n_opt; i++) {
        ipt_status status = read_option(p, job->ctx, job->opt[i]);
        if (status != IPT_OK) {
            ipt_policy_destroy(&p);
            return status;
        }
    }
    if (p->kind == POLICY_SWITCH && p->job.n_slot > 1 && p->tau * p->job.n_slot > p->job.n_step) {
        int32_t fit = p->job.n_step / p->job.n_slot;
        ipt_log(job->ctx, IPT_LOG_WARN,
                "switch: %d adapters of %d steps do not fit into %d steps; taking tau=%d",
                p->job.n_slot, p->tau, p->job.n_step, fit > 0 ? fit : 1);
        p->tau = fit > 0 ? fit : 1;
    }
    *out = p;
    return IPT_OK;
}

void ipt_policy_destroy(ipt_policy **pp)
{
    if (!pp || !*pp)
        return;
    ipt_free(*pp);
    *pp = NULL;
}

const ipt_world *ipt_policy_step(ipt_policy *p, int32_t i, size_t *n)
{
    int32_t slots = p->job.n_slot;
    memset(p->world, 0, sizeof p->world);
    *n = 1;
    switch (p->kind) {
    case POLICY_SWITCH:
        if (slots > 0)
            p->world[0].slot[i / p->tau % slots] = 1.0F;
        break;
    case POLICY_COMPOSITE:
        for (int32_t s = 0; s < slots; s++)
            p->world[s].slot[s] = 1.0F;
        *n = slots > 0 ? (size_t)slots : 1;
        break;
    case POLICY_MERGE:
    case POLICY_COUNT:
        for (int32_t s = 0; s < slots; s++)
            p->world[0].slot[s] = 1.0F;
        break;
    }
    return p->world;
}

void ipt_policy_blend(const ipt_policy *p, const float *const *u, const float *const *c, size_t n,
                      float *eps_u, float *eps_c)
{
    float scale = 1.0F / (float)n; /* one world: times 1, exactly the plain prediction */
    for (size_t i = 0; i < p->job.n_latent; i++) {
        float su = 0, sc = 0;
        for (size_t k = 0; k < n; k++) {
            su += u ? u[k][i] : 0.0F;
            sc += c[k][i];
        }
        if (u)
            eps_u[i] = su * scale;
        eps_c[i] = sc * scale;
    }
}

void ipt_policy_gates(const ipt_policy *p, const ipt_world *w, int32_t i, float *out, size_t stride)
{
    float at = p->job.n_step > 0 ? (float)i / (float)p->job.n_step : 0.0F;
    for (int32_t s = 0; s < p->job.n_slot; s++) {
        const ipt_slot_use *u = &p->slot[s];
        bool on = at >= u->start && (at < u->end || u->end >= 1.0F);
        for (int r = 0; r < IPT_GATE_ROWS; r++)
            out[(size_t)r * stride + (size_t)s] = on ? w->slot[s] * u->weight * u->block[r] : 0.0F;
    }
}

void ipt_policy_text_gates(const ipt_policy *p, const ipt_world *w, float *out)
{
    for (int32_t s = 0; s < p->job.n_slot; s++) {
        float on = p->te == TE_NONE ? 0.0F : p->te == TE_MERGED ? 1.0F : w->slot[s];
        out[s] = on * p->slot[s].te_weight;
    }
}
