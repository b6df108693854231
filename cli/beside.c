/* cli/beside.c - see beside.h: names, and masks. */
#include "cli/beside.h"

#include <errno.h>
#include <limits.h>
#include <math.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>

/* --- names ------------------------------------------------------------------------------------ */
static bool is_safe(uint32_t c)
{
    return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '.' ||
           c == '-' || (c >= 0xa0 && c != 0xfffd && !ipt_is_control(c));
}

const char *cli_safe_name(const char *text, char buf[CLI_NAME])
{
    enum { LAST = CLI_NAME - 8 }; /* room for a number behind it */
    size_t n = 0;
    for (const char *from = text;; from = text) {
        uint32_t c = ipt_utf8_next(&text);
        size_t len = (size_t)(text - from);
        if (c == 0 || n + len > LAST)
            break;
        bool stays = is_safe(c) && (n > 0 || c != '.');
        if (stays)
            memcpy(buf + n, from, len);
        else if (n > 0 && buf[n - 1] != '_')
            buf[n] = '_', len = 1;
        else
            continue;
        n += len;
    }
    while (n > 0 && buf[n - 1] == '_')
        n--;
    buf[n] = 0;
    return buf;
}

/* Whether a is b, or b and the ending of a heat map. */
static bool clash(const char *a, const char *b)
{
    size_t n = strlen(b);
    return strcasecmp(a, b) == 0 ||
           (strncasecmp(a, b, n) == 0 && strcasecmp(a + n, CLI_WHERE) == 0);
}

static bool is_taken(const char *name, char (*taken)[CLI_NAME], size_t n)
{
    bool any = strcasecmp(name, &CLI_WHEN[1]) == 0;
    for (size_t i = 0; i < n; i++)
        any = any || clash(name, taken[i]) || clash(taken[i], name);
    return any;
}

void cli_adapter_name(const char *name, const char *word, char (*taken)[CLI_NAME], size_t n,
                      char out[CLI_NAME])
{
    char safe[CLI_NAME] = "", plain[4 * CLI_NAME];
    if (word)
        cli_safe_name(ipt_name(plain, sizeof plain, "%.*s", (int)strcspn(word, "#="), word), safe);
    if (!safe[0])
        cli_safe_name(name ? name : "", safe);
    if (!safe[0])
        ipt_name(safe, sizeof safe, "adapter");
    ipt_name(out, CLI_NAME, "%s", safe);
    for (int k = 2; is_taken(out, taken, n); k++)
        ipt_name(out, CLI_NAME, "%s-%d", safe, k);
}

/* --- files ------------------------------------------------------------------------------------ */
ipt_status cli_beside_check(ipt_ctx *ctx, const char *dir, const char *stem)
{
    enum { MORE = CLI_NAME + 16 }; /* behind the stem at most */
    char path[PATH_MAX];
    if (strlen(stem) + MORE > NAME_MAX || strlen(dir) + strlen(stem) + MORE + 1 >= PATH_MAX)
        return ipt_fail(ctx, IPT_ERR_OUTPUT, "%.200s/%.100s...: cannot write: name too long", dir,
                        stem);
    if (ipt_is_dir(dir))
        return ipt_file_check_write(ctx, ipt_name(path, sizeof path, "%s/%s.png", dir, stem));
    ipt_name(path, sizeof path, "%s", dir);
    for (size_t n = strlen(path); n > 1 && path[n - 1] == '/'; n--)
        path[n - 1] = 0;
    if (ipt_file_stamp(path) != 0)
        return ipt_fail(ctx, IPT_ERR_OUTPUT, "%s: cannot write: is no folder", dir);
    return ipt_file_check_write(ctx, path); /* a file there could be made: so can a folder */
}

ipt_status cli_beside_write(ipt_arena *arena, const char *dir, const char *stem, const char *rest,
                            const void *data, size_t n, cli_list *files)
{
    char path[PATH_MAX];
    if (mkdir(dir, 0777) != 0 && errno != EEXIST)
        return ipt_fail(arena->ctx, IPT_ERR_OUTPUT, "%s: cannot make the folder: %s", dir,
                        strerror(errno));
    ipt_name(path, sizeof path, "%s/%s%s", dir, stem, rest);
    IPT_TRY(ipt_file_write(arena->ctx, path, data, n));
    const char *kept = ipt_arena_strdup(arena, path);
    return kept && cli_list_add(arena->ctx, files, kept) ? IPT_OK : IPT_ERR_NOMEM;
}

/* --- masks ------------------------------------------------------------------------------------ */
void cli_mask_pixels(const float *mask, int32_t h, int32_t w, const ipt_image *im, uint8_t *grey)
{
    size_t W = (size_t)im->w, H = (size_t)im->h;
    for (size_t i = 0; i < W * H; i++) {
        size_t y = i / W * (size_t)h / H, x = i % W * (size_t)w / W;
        grey[i] = (uint8_t)lrintf(255.0F * mask[y * (size_t)w + x]);
    }
}

static ipt_status save_mask(ipt_arena *arena, const char *dir, const char *stem, const char *name,
                            const ipt_masks *m, size_t k, cli_list *files)
{
    size_t w = (size_t)m->im->w, h = (size_t)m->im->h, n = 0;
    uint8_t *grey = ipt_calloc(arena->ctx, h, w), *png = NULL;
    char rest[CLI_NAME + 8];
    if (!grey)
        return IPT_ERR_NOMEM;
    cli_mask_pixels(m->mask[k].v, m->h, m->w, m->im, grey);
    ipt_status status = ipt_png_encode(arena->ctx, grey, m->im->w, m->im->h, 1, &png, &n);
    if (status == IPT_OK)
        status = cli_beside_write(arena, dir, stem, ipt_name(rest, sizeof rest, "-%s.png", name),
                                  png, n, files);
    ipt_free(grey);
    ipt_free(png);
    return status;
}

ipt_status cli_masks_save(ipt_arena *arena, const char *dir, const char *stem, const ipt_masks *m,
                          cli_list *files)
{
    char(*name)[CLI_NAME] = ipt_calloc(arena->ctx, m->n, sizeof *name);
    ipt_status status = name ? IPT_OK : IPT_ERR_NOMEM;
    for (size_t k = 0; k < m->n && status == IPT_OK; k++) {
        cli_adapter_name(m->mask[k].name, m->mask[k].word, name, k, name[k]);
        status = save_mask(arena, dir, stem, name[k], m, k, files);
    }
    ipt_free(name);
    return status;
}
