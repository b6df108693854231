/* engine/fold.c - adapters folded into the UNet's weights for requests whose mix never changes, and
 * out again before a request that needs the weights as they are (docs/adr/0008).
 *
 * Text encoders are never folded: they see some 77 tokens a text once a request, which cannot repay
 * rewriting their weights. */
#include "engine/run.h"

#include <math.h>
#include <string.h>

enum {
    /* A byte of a rewritten weight beside a multiply-add of a step, on the way in and out again:
     * measured with SD 1.5 on two cores (docs/SPEED.md), and on a card behind PCIe. */
    CPU_BYTE_MACS = 64,
    GPU_BYTE_MACS = 4096,
};

/* --- whether ---------------------------------------------------------------------------------- */
/* The gates [IPT_GATE_ROWS][n_slot] when all rows of all evaluations have the same; *n_rows: rows
 * of one picture.  *is_constant false: they change, depend on the place, or gradients are asked for
 * (weights as those want them are a copy that is never folded). */
static ipt_status constant_gates(ipt_run *u, float *gate, float *other, bool *is_constant,
                                 double *n_rows)
{
    size_t slots = ipt_bank_n_slot(ipt_engine_bank(u->e)), n = IPT_GATE_ROWS * slots;
    *is_constant = !u->regions.is_placed;
    *n_rows = 0;
    for (int32_t i = 0; i < u->n_eval; i++) {
        IPT_TRY(ipt_policy_plan(u->policy, i, &u->rows));
        for (size_t k = 0; k < u->rows.n; k++, *n_rows += 1) {
            const ipt_row *row = &u->rows.row[k];
            float *to = *n_rows > 0 ? other : gate;
            ipt_policy_gates(u->policy, row, u->job.step_of[i], to, slots);
            if (row->region != 0 || (row->want & IPT_WANT_GRAD) ||
                (*n_rows > 0 && memcmp(gate, other, n * sizeof *gate) != 0)) {
                *is_constant = false;
                return IPT_OK;
            }
        }
    }
    return IPT_OK;
}

/* Rows of one picture at a site: pixels of its level, tokens of the text, one for the time. */
static double rows_at(const void *user, const char *site)
{
    const ipt_run *u = user;
    const ipt_unet_config *c = &u->e->m->config.unet;
    double pixels = (double)u->set.h * u->set.w;
    int level = 0;
    if (strncmp(site, "down_blocks.", 12) == 0)
        level = site[12] - '0' + (strstr(site, ".downsamplers.") != NULL);
    else if (strncmp(site, "up_blocks.", 10) == 0)
        level = c->n_level - 1 - (site[10] - '0') - (strstr(site, ".upsamplers.") != NULL);
    else if (strncmp(site, "mid_block.", 10) == 0)
        level = c->n_level - 1;
    if (strstr(site, ".attn2.to_k") || strstr(site, ".attn2.to_v"))
        return u->text[0].enc.tokens;
    if (strstr(site, "time_emb") || strncmp(site, "add_embedding", 13) == 0)
        return 1;
    return ldexp(pixels, -2 * (level > 0 ? level : 0));
}

/* Depends on the request alone, not on what earlier ones left: it must repeat a picture. */
static bool is_cheaper(const ipt_run *u, double n_rows)
{
    const ipt_engine *e = u->e;
    const ipt_site_rows rows = {rows_at, u};
    ipt_fold_cost c = ipt_bank_cost(ipt_engine_bank(e), IPT_COMP_UNET, &rows, e->m->weight_type);
    double byte = ipt_gpu_traits(e->gpu)->simd ? CPU_BYTE_MACS : GPU_BYTE_MACS;
    return n_rows * c.step_macs > c.fold_macs + byte * c.bytes;
}

ipt_status ipt_fold_choose(ipt_run *u)
{
    ipt_engine *e = u->e;
    const char *how = u->r->fold ? u->r->fold : "auto";
    bool always = strcmp(how, "always") == 0, is_constant = false;
    double n_rows = 0;
    e->is_folded = false;
    if (strcmp(how, "never") != 0 && strcmp(how, "auto") != 0 && !always)
        return ipt_fail(e->ctx, IPT_ERR_ARG, "unknown fold '%.40s'; there are: auto always never",
                        how);
    if (u->r->explain && always)
        ipt_log(e->ctx, IPT_LOG_WARN,
                "fold always: what adapters do is measured by leaving them out, so that they stay "
                "beside the weights");
    if (e->m->weight_type == IPT_Q8 && always)
        ipt_log(e->ctx, IPT_LOG_WARN,
                "fold always: q8 weights are too coarse to take adapters in, so that the adapters "
                "stay beside them");
    if (strcmp(how, "never") == 0 || u->r->explain || e->m->weight_type == IPT_Q8 ||
        !ipt_bank_has(ipt_engine_bank(e), IPT_COMP_UNET))
        return IPT_OK;
    size_t n = (size_t)IPT_GATE_ROWS * IPT_MAX_SLOT;
    u->fold_gate = ipt_arena_alloc(&u->arena, n * sizeof *u->fold_gate);
    float *other = ipt_arena_alloc(&u->arena, n * sizeof *other);
    if (!u->fold_gate || !other)
        return IPT_ERR_NOMEM;
    IPT_TRY(constant_gates(u, u->fold_gate, other, &is_constant, &n_rows));
    e->is_folded = is_constant && (always || is_cheaper(u, n_rows));
    if (always && !is_constant)
        ipt_log(
            e->ctx, IPT_LOG_WARN,
            "fold always: the adapters' mix changes during the request (compose method %s, start "
            "or end, regions), so that they stay beside the weights",
            ipt_policy_method(u->policy)->name);
    return IPT_OK;
}

void ipt_fold_refuse(ipt_run *u)
{
    if (u->r->fold && strcmp(u->r->fold, "always") == 0)
        ipt_log(u->e->ctx, IPT_LOG_WARN,
                "fold always: weights come from the file in every evaluation under this "
                "--vram-limit, so that the adapters stay beside them");
    u->e->is_folded = false;
}

/* --- in and out ------------------------------------------------------------------------------- */
/* Sites one after the other, as work that is seen when it takes a while and that a cancel ends. */
static ipt_status next_site(ipt_run *u, const char *stage, double start, size_t done, size_t total)
{
    if (ipt_now_ms() - start > 300)
        ipt_run_progress(u, stage, (int32_t)done, (int32_t)total, 0);
    return ipt_cancelled(u->e->ctx) ? ipt_fail(u->e->ctx, IPT_ERR_CANCELLED, "cancelled") : IPT_OK;
}

static ipt_status unfold(ipt_run *u, ipt_weights *store)
{
    ipt_fold *f = &u->e->m->fold;
    size_t total = f->n_site;
    double start = ipt_now_ms();
    f->is_whole = false;
    for (; f->n_site > 0; f->n_site--) {
        IPT_TRY(next_site(u, "unfold", start, total - f->n_site, total));
        IPT_TRY(ipt_bank_unfold(f->set->bank, IPT_COMP_UNET, f->n_site - 1, store));
    }
    ipt_adapter_set_release(&f->set);
    ipt_free(f->gate);
    *f = (ipt_fold){0};
    return IPT_OK;
}

static ipt_status fold(ipt_run *u, ipt_weights *store)
{
    ipt_engine *e = u->e;
    ipt_fold *f = &e->m->fold;
    size_t slots = ipt_bank_n_slot(e->set->bank), total = 0;
    double start = ipt_now_ms();
    f->gate = ipt_calloc(e->ctx, IPT_GATE_ROWS * slots, sizeof *f->gate);
    if (!f->gate)
        return IPT_ERR_NOMEM;
    memcpy(f->gate, u->fold_gate, IPT_GATE_ROWS * slots * sizeof *f->gate);
    f->set = e->set;
    f->set->refs++;
    (void)ipt_bank_sites(f->set->bank, IPT_COMP_UNET, &total);
    for (size_t i = 0; i < total; i++) {
        IPT_TRY(next_site(u, "fold", start, i, total));
        f->n_site = i + 1; /* before: a failure may leave the site half done */
        IPT_TRY(ipt_bank_fold(f->set->bank, IPT_COMP_UNET, i, f->gate, store));
    }
    f->is_whole = true;
    return IPT_OK;
}

static bool is_done(const ipt_run *u)
{
    const ipt_engine *e = u->e;
    const ipt_fold *f = &e->m->fold;
    if (!e->is_folded)
        return f->set == NULL;
    size_t n = IPT_GATE_ROWS * ipt_bank_n_slot(e->set->bank);
    return f->is_whole && f->set == e->set &&
           memcmp(f->gate, u->fold_gate, n * sizeof *f->gate) == 0;
}

ipt_status ipt_fold_apply(ipt_run *u)
{
    ipt_engine *e = u->e;
    ipt_weights *store = NULL;
    u->rep->is_folded = e->is_folded;
    if (is_done(u))
        return IPT_OK;
    IPT_TRY(ipt_engine_store(e, IPT_COMP_UNET, &store));
    if (e->is_folded)
        IPT_TRY(ipt_weights_ready(store)); /* once for a process, as all other shaders */
    double t = ipt_now_ms();
    if (e->m->fold.set)
        IPT_TRY(unfold(u, store));
    if (e->is_folded)
        IPT_TRY(fold(u, store));
    u->rep->ms_fold = ipt_now_ms() - t;
    return IPT_OK;
}
