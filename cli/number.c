/* cli/number.c - numbers as options hold them. */
#include "cli/cli.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

bool cli_read_int(const char *text, int64_t min, int64_t max, int64_t *out)
{
    char *end = NULL;
    bool digits =
        (text[0] >= '0' && text[0] <= '9') || (text[0] == '-' && text[1] >= '0' && text[1] <= '9');
    if (!digits)
        return false;
    errno = 0;
    long long v = strtoll(text, &end, 10);
    if (errno != 0 || *end != 0 || v < min || v > max)
        return false;
    *out = v;
    return true;
}

bool cli_read_number(const char *text, double min, double max, double *out)
{
    char *end = NULL;
    if (strspn(text, "+-.0123456789eE") != strlen(text) || text[0] == 0)
        return false; /* strtod would also take "inf", "nan", hexadecimal and blanks */
    double v = strtod(text, &end);
    if (*end != 0 || !isfinite(v) || v < min || v > max)
        return false;
    *out = v;
    return true;
}
