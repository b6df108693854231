/* engine/job.c - what a request needs before its first step: adapters, prompts, the composing
 * method, every text encoded. */
#include "engine/profile.h"
#include "engine/run.h"

#include <math.h>
#include <string.h>

/* --- adapters --------------------------------------------------------------------------------- */
/* Prompt and negative prompt without tags.  A negative one's do nothing, as in A1111. */
static ipt_status read_tags(ipt_run *u, ipt_prompt *out[2])
{
    const char *text[2] = {u->r->prompt ? u->r->prompt : "", u->r->negative ? u->r->negative : ""};
    ipt_ctx *ctx = u->e->ctx;
    for (int i = 0; i < 2; i++)
        IPT_TRY(
            ipt_prompt_create(ctx, u->e->m->tokenizer[0], text[i], strlen(text[i]), NULL, &out[i]));
    for (size_t i = 0; i < out[0]->n_ignored; i++)
        ipt_log(ctx, IPT_LOG_WARN, "prompt: %.100s has no meaning here and is left out",
                out[0]->ignored[i]);
    if (out[1]->n_lora > 0)
        ipt_log(ctx, IPT_LOG_WARN, "negative prompt: <lora:%.100s> has no effect there",
                out[1]->loras[0].name);
    return IPT_OK;
}

/* Only methods that order adapters ask. */
static void read_profile(ipt_run *u, size_t slot)
{
    const ipt_method *m = ipt_method_find(u->r->compose);
    double high = 0;
    if (m && m->wants_profile)
        ipt_profile_find(u->e->ctx, u->e->set->key[slot], &u->slot[slot].has_profile, &high);
    u->slot[slot].high = (float)high;
}

static bool same(float a, float b) { return a >= b && a <= b; }

static bool same_blocks(const ipt_slot_use *a, const ipt_slot_use *b)
{
    bool all = true;
    for (int r = 0; r < IPT_GATE_ROWS; r++)
        all = all && same(a->block[r], b->block[r]);
    return all;
}

static bool same_curve(const ipt_curve *a, const ipt_curve *b)
{
    bool all = !a == !b && (!a || a->n == b->n);
    for (int32_t i = 0; all && a && i < a->n; i++)
        all = same(a->point[i].at, b->point[i].at) && same(a->point[i].value, b->point[i].value);
    return all;
}

/* Of adapters that have become one, the one slot: their weights are in it, and when and where it
 * acts must be the same for all of them. */
static ipt_status join_slots(ipt_run *u)
{
    const ipt_slot_use *a = &u->slot[0];
    const ipt_adapter_set *s = u->e->set;
    if (!s || !s->one)
        return IPT_OK;
    for (int32_t i = 1; i < u->job.n_slot; i++) {
        const ipt_slot_use *b = &u->slot[i];
        if (!same(a->start, b->start) || !same(a->end, b->end) || !same_blocks(a, b) ||
            !same_curve(a->curve, b->curve))
            return ipt_fail(
                u->e->ctx, IPT_ERR_ARG,
                "%.200s and %.200s act in other steps or blocks; compose method %s makes "
                "one adapter of them, which has one start, end, curve and block weights",
                s->key[0], s->key[i], u->r->compose);
    }
    u->slot[0].weight = u->slot[0].te_weight = 1;
    u->slot[0].word = NULL;
    u->slot[0].file = u->r->compose; /* what regions call it: none of the files is it alone */
    u->job.n_slot = 1;
    return IPT_OK;
}

static ipt_status fill_slots(ipt_run *u, const ipt_prompt *tags)
{
    const ipt_request *r = u->r;
    size_t n = 0;
    for (size_t i = 0; i < r->n_lora; i++, n++) {
        u->slot[n] = (ipt_slot_use){.file = u->e->set->key[n],
                                    .weight = r->lora[i].weight,
                                    .te_weight = r->lora[i].te_weight,
                                    .start = r->lora[i].start,
                                    .end = r->lora[i].end,
                                    .word = r->lora[i].word};
        IPT_TRY(ipt_block_weights(u->e->ctx, r->lora[i].blocks, u->slot[n].block));
        read_profile(u, n);
        if (r->lora[i].curve) {
            ipt_curve *curve = ipt_arena_alloc(&u->arena, sizeof *curve);
            if (!curve)
                return IPT_ERR_NOMEM;
            IPT_TRY(ipt_curve_parse(u->e->ctx, r->lora[i].curve, curve));
            u->slot[n].curve = curve;
        }
        if (!isfinite(r->lora[i].weight) || !isfinite(r->lora[i].te_weight) ||
            !(r->lora[i].start <= r->lora[i].end))
            return ipt_fail(u->e->ctx, IPT_ERR_ARG, "%s: weight or time range is not usable",
                            r->lora[i].path);
    }
    for (size_t i = 0; i < tags->n_lora; i++, n++) {
        u->slot[n] = (ipt_slot_use){.file = u->e->set->key[n],
                                    .weight = (float)tags->loras[i].weight,
                                    .te_weight = (float)tags->loras[i].te_weight,
                                    .start = 0,
                                    .end = 1};
        IPT_TRY(ipt_block_weights(u->e->ctx, NULL, u->slot[n].block));
        read_profile(u, n);
    }
    u->job.n_slot = (int32_t)n;
    u->job.slot = u->slot;
    return join_slots(u);
}

/* --- evaluations and prompts ------------------------------------------------------------------ */
/* How many evaluations there are, and which step each belongs to. */
static ipt_status count_evaluations(ipt_run *u)
{
    ipt_sampler *s = NULL;
    IPT_TRY(ipt_settings_sampler(u->e->ctx, &u->set, &s));
    u->n_eval = u->rep->n_eval = u->job.n_eval = ipt_sampler_n_evals(s);
    int32_t *step = ipt_arena_alloc(&u->arena, (size_t)u->n_eval * sizeof *step);
    for (int32_t i = 0; step && i < u->n_eval; i++)
        step[i] = u->set.skip + ipt_sampler_step_of(s, i);
    u->job.step_of = step;
    u->job.n_step = u->set.steps;
    ipt_sampler_destroy(&s);
    return step ? IPT_OK : IPT_ERR_NOMEM;
}

/* A1111 counts the calls of the model where a step of the sampler makes two of them. */
static int32_t calls_of_a_step(ipt_sampler_kind kind)
{
    bool two = kind == IPT_SAMPLER_HEUN || kind == IPT_SAMPLER_DPM_2 ||
               kind == IPT_SAMPLER_DPM_2_A || kind == IPT_SAMPLER_DPMPP_SDE;
    return two ? 2 : 1;
}

ipt_status ipt_job_edits(ipt_run *u, const char *text, size_t n, const uint16_t **out)
{
    ipt_ctx *ctx = u->e->ctx;
    ipt_prompt_edits *p = NULL;
    uint16_t *at = ipt_arena_alloc(&u->arena, (size_t)u->n_eval * sizeof *at);
    char *buf = ipt_alloc(ctx, n + 1);
    ipt_status status = at && buf ? IPT_OK : IPT_ERR_NOMEM;
    if (status == IPT_OK)
        status =
            ipt_prompt_edits_create(ctx, text, n, u->set.steps * calls_of_a_step(u->set.kind), &p);
    for (int32_t i = 0, before = -1; status == IPT_OK && i < u->n_eval; i++) {
        int32_t end = ipt_prompt_edits_end(p, i);
        if (end == before) {
            at[i] = at[i - 1];
            continue;
        }
        before = end;
        ipt_prompt_edits_text(p, end, buf);
        status = ipt_texts_add(&u->texts, buf, &at[i]);
    }
    ipt_prompt_edits_destroy(&p);
    ipt_free(buf);
    *out = at;
    return status;
}

/* The negative prompt; not given is not the same as empty. */
static ipt_status read_negative(ipt_run *u, const char *text, const uint16_t **out)
{
    uint16_t index = 0, *at = ipt_arena_alloc(&u->arena, (size_t)u->n_eval * sizeof *at);
    if (u->r->negative)
        return ipt_job_edits(u, text, strlen(text), out);
    if (!at)
        return IPT_ERR_NOMEM;
    IPT_TRY(ipt_texts_add(&u->texts, NULL, &index));
    for (int32_t i = 0; i < u->n_eval; i++)
        at[i] = index;
    *out = at;
    return IPT_OK;
}

static ipt_status read_prompts(ipt_run *u, ipt_prompt *const tags[2])
{
    ipt_prompt_conjunct part[IPT_MAX_PART];
    const uint16_t *negative = NULL;
    const char *text = tags[0]->text;
    size_t n = 0;
    bool plain = true;
    u->texts.arena = &u->arena;
    u->job.texts = &u->texts;
    u->job.part = u->part;
    IPT_TRY(ipt_prompt_split(u->e->ctx, text, strlen(text), part, IPT_MAX_PART, &n));
    for (size_t k = 0; k < n; k++) {
        u->part[k].weight = (float)part[k].weight;
        plain = plain && n == 1 && !(part[k].weight < 1 || part[k].weight > 1);
        IPT_TRY(ipt_job_edits(u, part[k].text, part[k].len, &u->part[k].text));
    }
    u->job.n_part = (int32_t)n;
    if (!plain && u->set.lcm_guidance)
        return ipt_fail(u->e->ctx, IPT_ERR_UNSUPPORTED,
                        "prompts joined by AND, or with a weight at their end, need guidance by a "
                        "negative prompt; this model has guidance built in");
    u->set.two_rows = u->set.two_rows || !plain; /* u + sum of w (c - u) */
    IPT_TRY(read_negative(u, tags[1]->text, &negative));
    u->negative = negative[0];
    u->job.negative = u->set.two_rows ? negative : NULL;
    return IPT_OK;
}

static void list_grids(ipt_run *u)
{
    const ipt_unet_config *c = &u->e->m->config.unet;
    u->job.n_grid = c->n_level < IPT_MAX_GRID ? c->n_level : IPT_MAX_GRID;
    for (int32_t i = 0; i < u->job.n_grid; i++) {
        ipt_grid *g = &u->job.grid[i];
        *g = (ipt_grid){u->set.h, u->set.w, false};
        g->has_cross = ipt_unet_grid(c, i, &g->h, &g->w);
    }
}

static ipt_status make_policy(ipt_run *u)
{
    const ipt_request *r = u->r;
    char names[256];
    const ipt_method *m = ipt_method_find(r->compose);
    if (!m)
        return ipt_fail(u->e->ctx, IPT_ERR_ARG, "unknown compose method '%s'; there are: %s",
                        r->compose, ipt_method_names(names, sizeof names));
    u->job.ctx = u->e->ctx;
    u->job.channels = u->set.channels;
    u->job.outer_level = u->e->m->config.unet.n_layer[0];
    u->job.h = u->set.h;
    u->job.w = u->set.w;
    u->job.n_latent = u->set.n;
    list_grids(u);
    u->job.opt = r->compose_opt;
    u->job.n_opt = r->n_compose_opt;
    return ipt_policy_create(m, &u->job, &u->policy);
}

ipt_status ipt_job_prepare(ipt_run *u)
{
    ipt_engine *e = u->e;
    ipt_prompt *tags[2] = {NULL, NULL};
    ipt_status status = IPT_OK;
    IPT_TRY(ipt_load_model(e, u->r));
    IPT_TRY(ipt_settings_choose(u->e, u->r, &u->arena, &u->set));
    IPT_TRY_GOTO(read_tags(u, tags), done);
    IPT_TRY_GOTO(ipt_load_device(e, u->r), done);
    IPT_TRY_GOTO(ipt_load_adapters(e, u->r, tags[0]->loras, tags[0]->n_lora), done);
    IPT_TRY_GOTO(ipt_infotext_begin(e, u->r), done);
    IPT_TRY_GOTO(fill_slots(u, tags[0]), done);
    IPT_TRY_GOTO(count_evaluations(u), done);
    IPT_TRY_GOTO(read_prompts(u, tags), done);
    IPT_TRY_GOTO(make_policy(u), done);
    IPT_TRY_GOTO(ipt_regions_read(u), done);
    IPT_TRY_GOTO(ipt_explain_check(u), done);
done:
    for (int i = 0; i < 2; i++)
        ipt_prompt_destroy(&tags[i]);
    return status;
}

/* --- texts ------------------------------------------------------------------------------------ */
enum { MAX_TEXT_MIB = 1024 }; /* of a request's encoded texts */

static bool same_key(const ipt_encoding_key *a, const ipt_encoding_key *b)
{
    for (int s = 0; s < IPT_MAX_SLOT; s++)
        if (a->gate[s] < b->gate[s] || a->gate[s] > b->gate[s])
            return false;
    return a->text == b->text;
}

static ipt_status grow_texts(ipt_run *u)
{
    size_t cap = u->cap_text ? 2 * u->cap_text : 4;
    if (u->n_text < u->cap_text)
        return IPT_OK;
    ipt_run_text *v = ipt_regrow(u->e->ctx, u->text, u->cap_text * sizeof *v, cap * sizeof *v);
    if (!v)
        return IPT_ERR_NOMEM;
    u->text = v;
    u->cap_text = cap;
    return IPT_OK;
}

ipt_status ipt_job_text(ipt_run *u, const ipt_row *row, size_t *index)
{
    ipt_encoding_key key = {.text = row->text};
    const ipt_bank *bank = ipt_engine_bank(u->e);
    if (ipt_bank_has(bank, IPT_COMP_TEXT) || ipt_bank_has(bank, IPT_COMP_TEXT2))
        ipt_policy_text_gates(u->policy, row, key.gate);
    for (size_t i = 0; i < u->n_text; i++)
        if (same_key(&u->text[i].key, &key)) {
            *index = i;
            return IPT_OK;
        }
    IPT_TRY(grow_texts(u));
    ipt_run_text *t = &u->text[u->n_text];
    IPT_TRY(ipt_encode(u->e, u->r, &u->prompts, key.text, key.gate, &u->arena, &t->enc));
    t->key = key;
    u->text_bytes += (uint64_t)t->enc.tokens * (uint64_t)t->enc.width * sizeof(float);
    if (u->text_bytes > (uint64_t)MAX_TEXT_MIB << 20)
        return ipt_fail(u->e->ctx, IPT_ERR_ARG,
                        "the request's prompts take more than %d MiB encoded: fewer or shorter "
                        "ones, or fewer adapters that act in the text encoder",
                        MAX_TEXT_MIB);
    *index = u->n_text++;
    return IPT_OK;
}

/* What a trace shows: the first world's first part and negative of the first evaluation. */
static ipt_status trace_texts(ipt_run *u)
{
    ipt_row row = u->rows.row[u->job.negative ? 1 : 0];
    IPT_TRY(ipt_job_text(u, &row, &u->trace_text[0]));
    row.text = u->negative;
    return ipt_job_text(u, &row, &u->trace_text[1]);
}

/* Where a word stands among the tokens of a text; both encoders of SDXL have the same ones. */
static ipt_status find_word(void *user, uint16_t text, const char *word, int32_t nth,
                            ipt_places *out)
{
    const ipt_run *u = user;
    ipt_prompt_pos *pos = NULL;
    size_t n = 0, each = 0;
    out->n = 0;
    IPT_TRY(ipt_prompt_find(u->e->ctx, u->e->m->tokenizer[0], u->prompts.prompt[text][0], word,
                            strlen(word), &pos, &n, &each));
    if (each > IPT_MAX_PLACE) {
        ipt_free(pos);
        return ipt_fail(u->e->ctx, IPT_ERR_ARG, "'%.100s' are %zu tokens, expected %d at most",
                        word, each, IPT_MAX_PLACE);
    }
    for (size_t i = 0; (size_t)nth < n && i < each; i++) {
        const ipt_prompt_pos *p = &pos[(size_t)nth * each + i];
        out->at[out->n++] = (uint16_t)(p->chunk * IPT_TOKEN_WINDOW + p->pos);
    }
    ipt_free(pos);
    return IPT_OK;
}

ipt_status ipt_job_encode(ipt_run *u)
{
    double t = ipt_now_ms();
    size_t index = 0;
    ipt_run_progress(u, "text", 0, 1, 0);
    IPT_TRY(ipt_prompts_read(u->e, u->r, &u->texts, &u->prompts));
    u->job.tokens = u->prompts.n_chunk * IPT_TOKEN_WINDOW;
    u->job.find = find_word;
    u->job.find_user = u;
    IPT_TRY(ipt_policy_bind(u->policy));
    for (int32_t i = u->n_eval - 1; i >= 0; i--) { /* the first is what u->rows holds then */
        u->eval = i;
        IPT_TRY(ipt_policy_plan(u->policy, i, &u->rows));
        if (u->rows.n > u->max_rows)
            u->max_rows = u->rows.n;
        for (size_t k = 0; k < u->rows.n; k++) {
            IPT_TRY(ipt_rows_possible(u->e->ctx, ipt_policy_method(u->policy), &u->rows.row[k]));
            IPT_TRY(ipt_job_text(u, &u->rows.row[k], &index));
            for (int32_t j = 0; j < u->regions.n_text; j++) {
                const ipt_row seen = ipt_regions_row(u, &u->rows.row[k], j);
                IPT_TRY(ipt_job_text(u, &seen, &index));
            }
        }
        IPT_TRY(ipt_explain_plan(u));
    }
    if (u->r->trace)
        IPT_TRY(trace_texts(u));
    u->rep->ms_text = ipt_now_ms() - t;
    return IPT_OK;
}

void ipt_job_finish(ipt_run *u)
{
    ipt_cache_finish(u);
    ipt_policy_destroy(&u->policy);
    ipt_prompts_finish(&u->prompts);
    ipt_rows_finish(&u->rows);
    ipt_free(u->text);
}
