/* compose/methods.c - the table of composing methods. */
#include "compose/policy.h"

#include <string.h>

static const ipt_method *const table[] = {
    &ipt_method_merge, &ipt_method_switch, &ipt_method_composite, &ipt_method_cmlora,
    &ipt_method_clora, &ipt_method_lego,   &ipt_method_lorahub};

const ipt_method *const *ipt_methods(size_t *n)
{
    *n = IPT_COUNT(table);
    return table;
}

const ipt_method *ipt_method_find(const char *name)
{
    for (size_t i = 0; i < IPT_COUNT(table); i++)
        if (!name || strcmp(table[i]->name, name) == 0)
            return table[i];
    return NULL;
}

const char *ipt_method_names(char *buf, size_t n)
{
    size_t at = 0;
    buf[0] = 0;
    for (size_t i = 0; i < IPT_COUNT(table) && at < n; i++)
        at += (size_t)snprintf(buf + at, n - at, "%s%s", i ? " " : "", table[i]->name);
    return buf;
}
