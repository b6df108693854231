/* compose/curve.c - adapter strength over the steps: "0@0,1@0.3,0@0.9". */
#include "compose/policy.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_VALUE = 100 };

/* A number at *p, moved behind it; false: there is none, or it is not finite. */
static bool take(const char **p, double *out)
{
    char *end = NULL;
    if (!(**p == '-' || **p == '+' || **p == '.' || (**p >= '0' && **p <= '9')))
        return false;
    *out = strtod(*p, &end);
    bool good = end != *p && isfinite(*out) && strspn(*p, "0123456789.+-eE") >= (size_t)(end - *p);
    *p = end;
    return good;
}

ipt_status ipt_curve_parse(ipt_ctx *ctx, const char *text, ipt_curve *out)
{
    ipt_curve c = {.n = 0};
    double value = 0, at = 0;
    const char *p = text;
    for (bool more = true; more; p += more) {
        if (c.n == IPT_MAX_POINT)
            return ipt_fail(ctx, IPT_ERR_ARG, "curve %.100s: more than %d points", text,
                            IPT_MAX_POINT);
        bool good = take(&p, &value) && *p == '@' && (p++, take(&p, &at));
        if (!good || !(fabs(value) <= MAX_VALUE) || !(at >= 0 && at <= 1) ||
            (c.n > 0 && !((float)at > c.point[c.n - 1].at)) || (*p && *p != ','))
            return ipt_fail(ctx, IPT_ERR_ARG,
                            "curve %.100s: expected points like 0@0,1@0.3,0@0.9: strengths from "
                            "-%d to %d at rising shares of the steps from 0 to 1",
                            text, MAX_VALUE, MAX_VALUE);
        c.point[c.n].at = (float)at;
        c.point[c.n++].value = (float)value;
        more = *p == ',';
    }
    *out = c;
    return IPT_OK;
}

float ipt_curve_at(const ipt_curve *c, float at)
{
    int32_t k = 0;
    while (k < c->n && c->point[k].at <= at)
        k++;
    if (k == 0 || k == c->n)
        return c->point[k == 0 ? 0 : c->n - 1].value;
    float v0 = c->point[k - 1].value, v1 = c->point[k].value, t0 = c->point[k - 1].at,
          t1 = c->point[k].at;
    return v0 + (v1 - v0) * ((at - t0) / (t1 - t0));
}
