/* cli/progress.c - how far a request is, on standard error: a bar on a terminal, a line for every
 * tenth otherwise. */
#include "cli/cli.h"

#include <math.h>
#include <string.h>
#include <unistd.h>

void cli_progress_init(cli_progress *p, bool quiet)
{
    memset(p, 0, sizeof *p);
    p->quiet = quiet;
    p->terminal = isatty(STDERR_FILENO) == 1;
    p->tenth = -1;
}

static const char *duration(double ms, char *buf, size_t n)
{
    if (ms < 1000)
        return ipt_name(buf, n, "%.0f ms", ms);
    if (ms < 99500)
        return ipt_name(buf, n, "%.1f s", ms / 1000);
    long s = (long)(ms / 1000 + 0.5);
    if (s < 3600)
        return ipt_name(buf, n, "%ld:%02ld min", s / 60, s % 60);
    return ipt_name(buf, n, "%ld:%02ld h", s / 3600, s / 60 % 60);
}

static const char *stage_text(const char *stage)
{
    static const char *const names[][2] = {{"load", "loading"},
                                           {"combine", "joining adapters"},
                                           {"search", "searching"},
                                           {"text", "text"},
                                           {"sample", "sampling"},
                                           {"vae", "decoding"},
                                           {"encode", "encoding"},
                                           {"hash", "hashing the model"},
                                           {"fold", "adapters into the weights"},
                                           {"unfold", "adapters out of the weights"},
                                           {"save", "saving"},
                                           {"convert", "converting"},
                                           {"resize", "resizing"},
                                           {"merge", "merging"},
                                           {"bake", "baking"},
                                           {"extract", "extracting"},
                                           {"pictures", "pictures"},
                                           {"judge", "judging"}};
    for (size_t i = 0; i < IPT_COUNT(names); i++)
        if (strcmp(stage, names[i][0]) == 0)
            return names[i][1];
    return stage;
}

/* "sampling 4/20, picture 1/2, 2.3 s each, 37 s left" */
static void describe(const ipt_progress *p, char *buf, size_t n)
{
    char picture[48] = "", each[48] = "", left[48] = "", t[32];
    if (p->n_image > 1)
        ipt_name(picture, sizeof picture, ", picture %d/%d", p->image + 1, p->n_image);
    if (p->step_ms > 0)
        ipt_name(each, sizeof each, ", %s each", duration(p->step_ms, t, sizeof t));
    if (p->eta_ms >= 0)
        /* rounded up: 0 only when nothing is left */
        ipt_name(left, sizeof left, ", %s left", duration(ceil(p->eta_ms), t, sizeof t));
    if (p->total == 1)
        ipt_name(buf, n, "%s%s%s", stage_text(p->stage), picture, left);
    else
        ipt_name(buf, n, "%s %d/%d%s%s%s", stage_text(p->stage), p->done, p->total, picture, each,
                 left);
}

void cli_progress_show(void *user, const ipt_progress *p)
{
    cli_progress *c = user;
    char text[192];
    if (c->quiet || p->total <= 0)
        return;
    bool same = strncmp(c->stage, p->stage, sizeof c->stage - 1) == 0 && c->image == p->image;
    describe(p, text, sizeof text);
    if (c->terminal) {
        enum { WIDTH = 24 };
        int full = (int)((int64_t)p->done * WIDTH / p->total);
        full = full < 0 ? 0 : full > WIDTH ? WIDTH : full;
        fprintf(stderr, "\r[%.*s%.*s] %s\x1b[K", full, "########################", WIDTH - full,
                "                        ", text);
        fflush(stderr);
        c->open = true;
    } else {
        int32_t tenth = (int32_t)((int64_t)p->done * 10 / p->total);
        double now = ipt_now_ms();
        bool due = tenth != c->tenth || (p->step_ms > 5000 && now - c->last_ms > 5000);
        if (!same)
            due = p->done > 0; /* a request that fails at once says its one line only */
        if (due) {
            fprintf(stderr, "%s\n", text);
            c->last_ms = now;
        }
        c->tenth = tenth;
    }
    ipt_name(c->stage, sizeof c->stage, "%s", p->stage);
    c->image = p->image;
}

void cli_progress_end(cli_progress *p)
{
    if (p->open)
        fputs("\r\x1b[K", stderr);
    p->open = false;
}
