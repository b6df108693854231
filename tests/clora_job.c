/* tests/clora_job.c - see clora_job.h. */
#include "tests/clora_job.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

float uniform(uint64_t *seed) { return (float)(ipt_rng_next(seed) >> 40) / 16777216.0F; }

void near_to(double got, double want, double limit, const char *what)
{
    if (!(fabs(got - want) <= limit * (1 + fabs(want))))
        fail_msg("%s: %.12g, expected %.12g", what, got, want);
}

static void keep_line(void *user, ipt_log_level level, const char *line)
{
    fixture *f = user;
    (void)level;
    ipt_name(f->said, sizeof f->said, "%s", line);
}

/* --- a tokenizer that behaves as CLIP's ------------------------------------------------------- */
/* Words of letters in pieces of three from their end, as "s" "cat"; digits and runs of other
 * characters apart. */
typedef struct piece {
    const char *at;
    size_t n;
    bool begins, ends; /* a word */
} piece;

static int kind_of(char c)
{
    return c == ' ' || c == 0                                 ? 0
           : (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ? 1
           : c >= '0' && c <= '9'                             ? 2
                                                              : 3;
}

static size_t cut_up(const char *text, piece *out, size_t most)
{
    size_t n = 0;
    for (const char *p = text; *p;) {
        size_t len = 1, at = 0;
        int kind = kind_of(*p);
        while (kind && kind != 2 && kind_of(p[len]) == kind)
            len++;
        while (kind && at < len) {
            size_t each = at == 0 && len % 3 ? len % 3 : 3;
            assert_true(n < most);
            out[n++] = (piece){p + at, each > len ? len : each, at == 0, at + each >= len};
            at += each;
        }
        p += len;
    }
    return n;
}

static bool same_piece(const piece *a, const piece *b)
{
    bool same = a->n == b->n && a->ends == b->ends && a->begins == b->begins;
    for (size_t i = 0; same && i < a->n; i++)
        same = (a->at[i] | 32) == (b->at[i] | 32);
    return same;
}

static ipt_status find(void *user, uint16_t text, const char *word, int32_t nth, ipt_places *out)
{
    fixture *f = user;
    static piece in[4096], want[4096];
    size_t n = cut_up(f->texts.text[text], in, IPT_COUNT(in)),
           m = cut_up(word, want, IPT_COUNT(want)), same = 0;
    out->n = 0;
    if (m > IPT_MAX_PLACE)
        return ipt_fail(f->ctx, IPT_ERR_ARG, "%zu pieces", m);
    for (size_t i = 0; m && i + m <= n; i++) {
        for (same = 0; same < m && same_piece(&in[i + same], &want[same]);)
            same++;
        if (same == m && nth-- == 0)
            for (size_t k = 0; k < m; k++)
                out->at[out->n++] = (uint16_t)(1 + i + k);
    }
    return IPT_OK;
}

/* --- a job ------------------------------------------------------------------------------------ */
void set_steps(fixture *f, int32_t n_step, int32_t each, int32_t first)
{
    f->job.n_step = n_step;
    f->job.n_eval = (n_step - first) * each;
    assert_true(f->job.n_eval <= MOST_EVALS);
    for (int32_t i = 0; i < f->job.n_eval; i++)
        f->step_of[i] = first + i / each;
}

int clora_set_up(void **state)
{
    fixture *f = calloc(1, sizeof *f);
    if (!f || ipt_ctx_create(keep_line, f, &f->ctx) != IPT_OK)
        return -1;
    *state = f;
    ipt_arena_init(&f->arena, f->ctx);
    f->texts.arena = &f->arena;
    f->rows.ctx = f->ctx;
    f->part[0] = (ipt_part){1, f->text};
    f->part[1] = (ipt_part){1, f->text};
    f->job = (ipt_job){.ctx = f->ctx,
                       .step_of = f->step_of,
                       .slot = f->slot,
                       .texts = &f->texts,
                       .part = f->part,
                       .n_part = 1,
                       .negative = f->negative,
                       .channels = CHANNELS,
                       .h = SIDE,
                       .w = SIDE,
                       .n_latent = VALUES,
                       .n_grid = 2,
                       .grid = {{SIDE, SIDE, false}, {GRID, GRID, true}},
                       .tokens = TOKENS,
                       .find = find,
                       .find_user = f,
                       .opt = f->opt};
    set_steps(f, 10, 1, 0);
    return 0;
}

int clora_tear_down(void **state)
{
    fixture *f = *state;
    ipt_rows_finish(&f->rows);
    ipt_arena_finish(&f->arena);
    ipt_ctx_destroy(&f->ctx);
    free(f);
    return 0;
}

void give_words(fixture *f, const char *list)
{
    char *copy = ipt_arena_strdup(&f->arena, list), *next = NULL, name[32];
    f->job.n_slot = 0;
    for (char *w = strtok_r(copy, ";", &next); w; w = strtok_r(NULL, ";", &next)) {
        ipt_slot_use *s = &f->slot[f->job.n_slot++];
        ipt_name(name, sizeof name, "%d.safetensors", f->job.n_slot);
        *s = (ipt_slot_use){.weight = 1, .te_weight = 1, .end = 1};
        s->file = ipt_arena_strdup(&f->arena, name);
        s->word = strcmp(w, "-") == 0 ? NULL : w;
    }
}

void give_prompt(fixture *f, const char *text)
{
    uint16_t k = 0, none = 0;
    f->texts = (ipt_texts){.arena = &f->arena};
    assert_ok(f->ctx, ipt_texts_add(&f->texts, text, &k));
    assert_ok(f->ctx, ipt_texts_add(&f->texts, "bad", &none));
    for (int32_t i = 0; i < MOST_EVALS; i++) {
        f->text[i] = k;
        f->negative[i] = none;
    }
}
