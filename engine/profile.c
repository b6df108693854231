/* engine/profile.c - see profile.h. */
#include "engine/profile.h"

#include <jansson.h>
#include <math.h>
#include <string.h>
#include <sys/stat.h>

#include "engine/frequency.h"
#include "engine/internal.h"

enum { MAX_NOTE = 1 << 20, MAX_NAME = 4096, SEEDS = 3 };
static const double SHARE = 0.2; /* of the largest radius, from which frequencies are high */

/* --- the note --------------------------------------------------------------------------------- */
static void note_name(const char *file, char *buf, size_t n)
{
    static const char ending[] = ".safetensors";
    size_t len = strlen(file), k = sizeof ending - 1;
    if (len > k && strcmp(file + len - k, ending) == 0)
        len -= k;
    ipt_name(buf, n, "%.*s.profile.json", (int)len, file);
}

static long long size_of(const char *file)
{
    struct stat st;
    return stat(file, &st) == 0 ? (long long)st.st_size : -1;
}

static ipt_status write_note(ipt_ctx *ctx, const char *file, const ipt_request *r,
                             const ipt_profile_opts *o, const ipt_profile *p)
{
    char path[MAX_NAME];
    json_t *list = json_array(), *note = json_object();
    note_name(file, path, sizeof path);
    for (int32_t i = 0; i <= p->n_step; i++)
        json_array_append_new(list, json_real(p->h[i]));
    json_object_set_new(note, "impasto_profile", json_integer(1));
    json_object_set_new(note, "bytes", json_integer((json_int_t)size_of(file)));
    json_object_set_new(note, "high", json_real(p->high));
    json_object_set_new(note, "model", ipt_json_text(r->model ? r->model : "default"));
    json_object_set_new(note, "prompt", ipt_json_text(r->prompt ? r->prompt : ""));
    json_object_set_new(note, "steps", json_integer(p->n_step));
    json_object_set_new(note, "seeds", json_integer(o->seeds > 0 ? o->seeds : SEEDS));
    json_object_set_new(note, "high_frequencies", list);
    char *text = json_dumps(note, JSON_INDENT(1));
    json_decref(note);
    if (!text)
        return ipt_fail(ctx, IPT_ERR_NOMEM, "no memory for a profile");
    ipt_status s = ipt_file_write(ctx, path, text, strlen(text));
    json_free_t release;
    json_get_alloc_funcs(NULL, &release);
    release(text);
    return s;
}

void ipt_profile_find(ipt_ctx *ctx, const char *file, bool *found, double *high)
{
    char path[MAX_NAME], *text = NULL;
    size_t n = 0;
    json_t *o = NULL;
    *found = false;
    note_name(file, path, sizeof path);
    if (!ipt_is_file(path))
        return;
    if (ipt_file_read(ctx, path, MAX_NOTE, &text, &n) != IPT_OK ||
        ipt_json_parse(ctx, path, text, n, &o) != IPT_OK) {
        ipt_log(ctx, IPT_LOG_WARN, "%s; it is left out", ipt_last_error(ctx));
        ipt_free(text);
        return;
    }
    const json_t *v = json_object_get(o, "high");
    double x = json_number_value(v);
    if (!json_is_number(v) || !(x >= 0 && x <= 1e6))
        ipt_log(ctx, IPT_LOG_WARN, "%s: found no number 'high'; it is left out", path);
    else if (ipt_json_int(o, "bytes", -1) != size_of(file))
        ipt_log(ctx, IPT_LOG_WARN,
                "%s: was measured with another file of that name; it is left out (impasto lora "
                "profile measures anew)",
                path);
    else
        *found = true;
    *high = x;
    json_decref(o);
    ipt_free(text);
}

/* --- measuring -------------------------------------------------------------------------------- */
typedef struct measuring {
    ipt_ctx *ctx;
    ipt_profile *p;
    double before, moved; /* of the picture: h before this step, sum of its changes */
    int32_t n, seeds;
    const ipt_request *r;
    int32_t picture;
} measuring;

static ipt_status take(void *user, const ipt_latent *l)
{
    measuring *m = user;
    double h = 0;
    IPT_TRY(ipt_high_frequencies(m->ctx, l->x, l->c, l->h, l->w, SHARE, &h));
    if (!m->p->h) {
        m->p->n_step = l->n_step;
        m->p->h = ipt_calloc(m->ctx, (size_t)l->n_step + 1, sizeof *m->p->h);
        if (!m->p->h)
            return IPT_ERR_NOMEM;
    }
    m->p->h[l->step] += h / m->seeds;
    if (l->step > 0) {
        m->moved += fabs(h - m->before);
        m->n++;
    }
    m->before = h;
    return IPT_OK;
}

static void show(void *user, const ipt_progress *p)
{
    measuring *m = user;
    ipt_progress q = *p;
    q.image = m->picture;
    q.n_image = m->seeds;
    m->r->progress(m->r->user, &q);
}

ipt_status ipt_profile_measure(ipt_engine *e, const ipt_request *r, const ipt_profile_opts *o,
                               ipt_profile *out)
{
    ipt_profile p = {0};
    measuring m = {.ctx = e->ctx, .p = &p, .r = r};
    ipt_status s = IPT_OK;
    ipt_report rep;
    if (r->n_lora != 1)
        return ipt_fail(m.ctx, IPT_ERR_ARG, "%zu adapters given, expected one to measure",
                        r->n_lora);
    m.seeds = o->seeds > 0 ? o->seeds : SEEDS;
    for (m.picture = 0; m.picture < m.seeds && s == IPT_OK; m.picture++) {
        ipt_request q = *r;
        q.count = 1;
        q.seed = r->seed + (uint64_t)m.picture;
        q.latent = take;
        q.latent_user = &m;
        if (r->progress) {
            q.progress = show;
            q.user = &m;
        }
        s = ipt_generate(e, &q, NULL, NULL, &rep);
    }
    if (s == IPT_OK && m.n > 0)
        p.high = m.moved / m.n;
    if (s == IPT_OK && o->keep)
        s = write_note(m.ctx, rep.adapter[0].file, r, o, &p);
    if (s != IPT_OK)
        ipt_profile_finish(&p);
    *out = p;
    return s;
}

void ipt_profile_finish(ipt_profile *p)
{
    ipt_free(p->h);
    *p = (ipt_profile){0};
}
