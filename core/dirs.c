/* core/dirs.c - the user's folders after the XDG base directory specification. */
#include "core/core.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

/* $env/impasto, or $HOME/rest/impasto; relative paths are not valid there. */
static bool user_dir(const char *env, const char *rest, char *buf, size_t n)
{
    char under[64];
    const char *base = getenv(env), *home = getenv("HOME");
    if (base && *base == '/')
        return ipt_path_join(buf, n, base, "impasto");
    ipt_name(under, sizeof under, "%s/impasto", rest);
    return home && *home == '/' && ipt_path_join(buf, n, home, under);
}

bool ipt_cache_dir(char *buf, size_t n) { return user_dir("XDG_CACHE_HOME", ".cache", buf, n); }

bool ipt_data_dir(char *buf, size_t n) { return user_dir("XDG_DATA_HOME", ".local/share", buf, n); }

bool ipt_make_dirs(char *path)
{
    for (char *p = path + 1; *p; p++) {
        if (*p != '/')
            continue;
        *p = 0;
        bool ok = mkdir(path, 0700) == 0 || errno == EEXIST;
        *p = '/';
        if (!ok)
            return false;
    }
    return mkdir(path, 0700) == 0 || errno == EEXIST;
}
