/* engine/explain.c - what is told beside a picture: the masks by which its method let adapters in.
 */
#include "engine/run.h"

/* --- masks ------------------------------------------------------------------------------------ */
static size_t find_masks(const ipt_run *u, const float **v, int32_t slot[IPT_MAX_SLOT])
{
    return ipt_policy_masks(u->policy, v, slot);
}

static ipt_status give_masks(ipt_run *u, int32_t k, const ipt_image *im)
{
    const float *v = NULL;
    int32_t slot[IPT_MAX_SLOT];
    ipt_mask list[IPT_MAX_SLOT];
    size_t hw = (size_t)u->set.h * (size_t)u->set.w, n = find_masks(u, &v, slot);
    for (size_t i = 0; i < n; i++)
        list[i] = (ipt_mask){u->rep->adapter[slot[i]].name, u->slot[slot[i]].word, v + i * hw};
    const ipt_masks m = {k, u->set.h, u->set.w, im, list, n};
    return u->r->masks(u->r->masks_user, &m);
}

/* --- a request -------------------------------------------------------------------------------- */
/* The methods that make masks, as their names. */
static void name_methods(char *buf, size_t n)
{
    size_t count = 0, at = 0;
    const ipt_method *const *m = ipt_methods(&count);
    buf[0] = 0;
    for (size_t i = 0; i < count; i++)
        if (m[i]->masks && at < n)
            at += (size_t)snprintf(buf + at, n - at, "%s%s", at ? " " : "", m[i]->name);
}

ipt_status ipt_explain_check(const ipt_run *u)
{
    const float *v = NULL;
    int32_t slot[IPT_MAX_SLOT];
    char names[256];
    if (!u->r->masks || find_masks(u, &v, slot) > 0)
        return IPT_OK;
    name_methods(names, sizeof names);
    return ipt_fail(u->e->ctx, IPT_ERR_ARG,
                    "compose method %s makes no masks; methods that do: %s (with --lora FILE@WORD)",
                    ipt_policy_method(u->policy)->name, names);
}

ipt_status ipt_explain_give(ipt_run *u, int32_t k, const ipt_image *im)
{
    return u->r->masks ? give_masks(u, k, im) : IPT_OK;
}
