/* compose/bank.c - the loaded adapters of a request, stacked per module: columns of all adapters
 * side by side, a slot number for each column, padded to a multiple of four. */
#include "compose/compose.h"

#include <stdlib.h>
#include <string.h>

enum { RANK_ALIGN = 4 };

typedef struct bank_site {
    size_t module; /* index into the module list */
    uint16_t rank; /* padded */
} bank_site;

struct ipt_bank {
    ipt_ctx *ctx;
    ipt_arena arena;
    const ipt_module *modules;
    ipt_adapter_file *const *file;
    size_t n_file;
    ipt_adapter_site *site[IPT_COMP_COUNT];
    bank_site *from[IPT_COMP_COUNT];
    size_t n_site[IPT_COMP_COUNT];
};

/* Gate row of a UNet module: which block it sits in. */
static uint16_t row_of(const char *name)
{
    int level = -1;
    if (strncmp(name, "down_blocks.", 12) == 0)
        level = name[12] - '0';
    else if (strncmp(name, "up_blocks.", 10) == 0)
        level = 9 + name[10] - '0';
    else if (strncmp(name, "mid_block.", 10) == 0)
        level = 8;
    return (uint16_t)(level + 1);
}

static ipt_status stack(ipt_bank *b, size_t n_modules, uint32_t *rank)
{
    for (size_t f = 0; f < b->n_file; f++)
        for (size_t m = 0; m < b->file[f]->n_module; m++)
            rank[b->file[f]->module[m].module] += (uint32_t)b->file[f]->module[m].rank;
    for (size_t m = 0; m < n_modules; m++)
        b->n_site[b->modules[m].comp] += rank[m] > 0;
    for (int c = 0; c < IPT_COMP_COUNT; c++) {
        b->site[c] = ipt_arena_alloc(&b->arena, (b->n_site[c] + 1) * sizeof *b->site[c]);
        b->from[c] = ipt_arena_alloc(&b->arena, (b->n_site[c] + 1) * sizeof *b->from[c]);
        if (!b->site[c] || !b->from[c])
            return IPT_ERR_NOMEM;
        b->n_site[c] = 0;
    }
    for (size_t m = 0; m < n_modules; m++) {
        int c = b->modules[m].comp;
        uint32_t padded = (rank[m] + RANK_ALIGN - 1) / RANK_ALIGN * RANK_ALIGN;
        if (!rank[m])
            continue;
        if (padded > UINT16_MAX)
            return ipt_fail(b->ctx, IPT_ERR_ARG,
                            "%s: the adapters' ranks add up to %u, at most 65532",
                            b->modules[m].name, padded);
        size_t k = b->n_site[c]++;
        b->from[c][k] = (bank_site){m, (uint16_t)padded};
        b->site[c][k] =
            (ipt_adapter_site){b->modules[m].name, (uint16_t)padded,
                               c == IPT_COMP_UNET ? row_of(b->modules[m].name) : (uint16_t)0};
    }
    return IPT_OK;
}

ipt_status ipt_bank_create(ipt_ctx *ctx, const ipt_module *modules, size_t n_modules,
                           ipt_adapter_file *const *file, size_t n_file, ipt_bank **out)
{
    if (n_file > IPT_MAX_SLOT)
        return ipt_fail(ctx, IPT_ERR_ARG, "%zu adapters given, at most %d at once", n_file,
                        IPT_MAX_SLOT);
    ipt_bank *b = ipt_alloc(ctx, sizeof *b);
    uint32_t *rank = ipt_calloc(ctx, n_modules + 1, sizeof *rank);
    ipt_status status = b && rank ? IPT_OK : IPT_ERR_NOMEM;
    if (status == IPT_OK) {
        b->ctx = ctx;
        b->modules = modules;
        b->file = file;
        b->n_file = n_file;
        ipt_arena_init(&b->arena, ctx);
        status = stack(b, n_modules, rank);
    }
    ipt_free(rank);
    if (status != IPT_OK) {
        ipt_bank_destroy(&b);
        return status;
    }
    *out = b;
    return IPT_OK;
}

void ipt_bank_destroy(ipt_bank **bp)
{
    if (!bp || !*bp)
        return;
    ipt_arena_finish(&(*bp)->arena);
    ipt_free(*bp);
    *bp = NULL;
}

size_t ipt_bank_n_slot(const ipt_bank *b) { return b ? b->n_file : 0; }

const ipt_adapter_site *ipt_bank_sites(const ipt_bank *b, int comp, size_t *n)
{
    *n = b ? b->n_site[comp] : 0;
    return b ? b->site[comp] : NULL;
}

bool ipt_bank_has(const ipt_bank *b, int comp) { return b && b->n_site[comp] > 0; }

bool ipt_bank_same_layout(const ipt_bank *a, const ipt_bank *b, int comp)
{
    size_t na = 0, nb = 0;
    const ipt_adapter_site *sa = ipt_bank_sites(a, comp, &na), *sb = ipt_bank_sites(b, comp, &nb);
    if (na != nb || (na > 0 && ipt_bank_n_slot(a) != ipt_bank_n_slot(b)))
        return false;
    for (size_t i = 0; i < na; i++)
        if (strcmp(sa[i].site, sb[i].site) != 0 || sa[i].n_rank != sb[i].n_rank ||
            sa[i].row != sb[i].row)
            return false;
    return true;
}

/* The stacked factors of one site. */
static ipt_status write_site(const ipt_bank *b, const bank_site *s, ipt_plan *p, uint64_t *uploaded)
{
    const ipt_module *m = &b->modules[s->module];
    size_t k = (size_t)m->in * (size_t)m->kh * (size_t)m->kw, o = (size_t)m->out, r = s->rank,
           col = 0;
    float *fa = ipt_calloc(b->ctx, k * r, sizeof *fa), *fb = ipt_calloc(b->ctx, r * o, sizeof *fb);
    int32_t *slot = ipt_calloc(b->ctx, r, sizeof *slot);
    ipt_status status = fa && fb && slot ? IPT_OK : IPT_ERR_NOMEM;
    char name[320];
    for (size_t i = 0; slot && i < r; i++)
        slot[i] = -1;
    for (size_t f = 0; status == IPT_OK && f < b->n_file; f++)
        for (size_t i = 0; i < b->file[f]->n_module; i++) {
            const ipt_adapter_module *am = &b->file[f]->module[i];
            if (am->module != s->module)
                continue;
            ipt_adapter_pack(am, fa, fb, r, col);
            for (int32_t c = 0; c < am->rank; c++)
                slot[col++] = (int32_t)f;
        }
    if (status == IPT_OK)
        status =
            ipt_plan_write(p, ipt_name(name, sizeof name, "%s.lora_a", m->name), fa, k * r * 4);
    if (status == IPT_OK)
        status =
            ipt_plan_write(p, ipt_name(name, sizeof name, "%s.lora_b", m->name), fb, r * o * 4);
    if (status == IPT_OK)
        status =
            ipt_plan_write(p, ipt_name(name, sizeof name, "%s.lora_slot", m->name), slot, r * 4);
    *uploaded += (k * r + r * o + r) * 4;
    ipt_free(fa);
    ipt_free(fb);
    ipt_free(slot);
    return status;
}

ipt_status ipt_bank_write(const ipt_bank *b, int comp, ipt_plan *p, uint64_t *uploaded)
{
    char name[320];
    for (size_t i = 0; b && i < b->n_site[comp]; i++) {
        /* A text encoder's plan lacks the layers after the one that clip skip asks for and, without
         * a pooled output, the projection; a UNet's plan has every module. */
        ipt_name(name, sizeof name, "%s.lora_slot", b->site[comp][i].site);
        if (comp != IPT_COMP_UNET && !ipt_plan_has(p, name))
            continue;
        IPT_TRY(write_site(b, &b->from[comp][i], p, uploaded));
    }
    return IPT_OK;
}

/* --- block weights ---------------------------------------------------------------------------- */
ipt_status ipt_block_weights(ipt_ctx *ctx, const char *text, float row[IPT_GATE_ROWS])
{
    for (int i = 0; i < IPT_GATE_ROWS; i++)
        row[i] = 1.0F;
    const char *p = text ? text : "";
    while (*p) {
        int first, n;
        if (strncmp(p, "down", 4) == 0)
            first = 1, n = 8, p += 4;
        else if (strncmp(p, "mid", 3) == 0)
            first = 9, n = 1, p += 3;
        else if (strncmp(p, "up", 2) == 0)
            first = 10, n = 8, p += 2;
        else
            break;
        if (n > 1 && p[0] == '.' && p[1] >= '0' && p[1] <= '7') {
            first += p[1] - '0';
            n = 1;
            p += 2;
        }
        char *end = NULL;
        double w = *p == ':' ? strtod(p + 1, &end) : 0;
        if (!end || end == p + 1 || !(w >= -100 && w <= 100) || (*end && *end != '/'))
            break;
        for (int i = 0; i < n; i++)
            row[first + i] = (float)w;
        p = *end ? end + 1 : end;
        if (!*end)
            return IPT_OK;
    }
    if (!text || !*text)
        return IPT_OK;
    return ipt_fail(
        ctx, IPT_ERR_ARG,
        "blocks=%s: expected parts like down:1, down.2:0.5, mid:0, up:0.5 joined by '/'", text);
}
