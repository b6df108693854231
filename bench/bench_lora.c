/* bench/bench_lora.c - adapters of a kind with random factors, as files in memory: what the loader
 * and the bank make of them is what runs. */
#include "bench/bench_lora.h"

#include "core/core.h"

#include <math.h>
#include <string.h>

/* A file that grows: header and data of safetensors. */
typedef struct maker {
    bench *b;
    json_t *header;
    float *data;
    size_t n, cap;
    uint64_t state;
} maker;

static ipt_status add_tensor(maker *k, const char *stem, const char *key, int32_t rows,
                             int32_t cols)
{
    char name[640];
    size_t count = (size_t)rows * (size_t)cols;
    ipt_name(name, sizeof name, "%s%s", stem, key);
    if (k->n + count > k->cap) {
        size_t cap = 2 * (k->n + count);
        float *more = ipt_calloc(k->b->ctx, cap, sizeof *more);
        if (!more)
            return IPT_ERR_NOMEM;
        if (k->data)
            memcpy(more, k->data, k->n * sizeof *more);
        ipt_free(k->data);
        k->data = more;
        k->cap = cap;
    }
    json_object_set_new(k->header, name,
                        json_pack("{s:s, s:[i,i], s:[I,I]}", "dtype", "F32", "shape", (int)rows,
                                  (int)cols, "data_offsets", (json_int_t)k->n * 4,
                                  (json_int_t)(k->n + count) * 4));
    for (size_t i = 0; i < count; i++)
        k->data[k->n++] = 0.1F * ipt_rng_normal(&k->state);
    return IPT_OK;
}

/* The divisor of n that is nearest to want. */
static int32_t divisor(int32_t n, double want)
{
    int32_t best = 1;
    for (int32_t d = 2; d <= n; d++)
        if (n % d == 0 && fabs(d - want) < fabs(best - want))
            best = d;
    return best;
}

/* P [f,f] and Q [out/f,in/f] with about as many values as factors of the rank have. */
static int32_t kron_factor(const ipt_module *m, int32_t rank)
{
    int32_t common = m->out, b = m->in;
    while (b) {
        int32_t t = common % b;
        common = b;
        b = t;
    }
    return divisor(common, sqrt((double)m->in * m->out / ((double)rank * (m->in + m->out))));
}

/* DiffuseKronA is written in the names of old diffusers, and has attention's products only. */
static ipt_status add_krona(maker *k, const ipt_module *m, int32_t f)
{
    char stem[320];
    const char *leaf = strstr(m->name, ".to_");
    if (!leaf)
        return IPT_OK;
    ipt_name(stem, sizeof stem, "unet.%.*s.processor.to_%.*s_lora", (int)(leaf - m->name), m->name,
             (int)strcspn(leaf + 4, "."), leaf + 4);
    IPT_TRY(add_tensor(k, stem, ".down.weight", f, f));
    return add_tensor(k, stem, ".up.weight", m->out / f, m->in / f);
}

static ipt_status add_module(maker *k, const ipt_module *m, const char *kind, int32_t rank)
{
    char stem[320] = "lora_unet_";
    size_t at = strlen(stem);
    int32_t f = kron_factor(m, rank);
    ipt_name(stem + at, sizeof stem - at, "%s", m->name);
    for (char *p = stem + at; *p; p++)
        *p = *p == '.' ? '_' : *p;
    if (strcmp(kind, "krona") == 0)
        return add_krona(k, m, f);
    if (strcmp(kind, "lokr") == 0) {
        IPT_TRY(add_tensor(k, stem, ".lokr_w1", f, f));
        return add_tensor(k, stem, ".lokr_w2", m->out / f, m->in / f);
    }
    IPT_TRY(add_tensor(k, stem, ".lora_down.weight", rank, m->in));
    return add_tensor(k, stem, ".lora_up.weight", m->out, rank);
}

static ipt_status finish(maker *k, uint8_t **out, size_t *size)
{
    char *text = json_dumps(k->header, JSON_COMPACT);
    size_t len = text ? strlen(text) : 0, pad = (8 - len % 8) % 8, bytes = k->n * sizeof *k->data;
    uint64_t n = len + pad;
    uint8_t *p = text ? ipt_alloc(k->b->ctx, 8 + n + bytes) : NULL;
    json_free_t release;
    json_get_alloc_funcs(NULL, &release);
    if (p) {
        for (int i = 0; i < 8; i++)
            p[i] = (uint8_t)(n >> (8 * i));
        memcpy(p + 8, text, len);
        memset(p + 8 + len, ' ', pad);
        memcpy(p + 8 + n, k->data, bytes);
        *out = p;
        *size = 8 + n + bytes;
    }
    if (text)
        release(text);
    return p ? IPT_OK : IPT_ERR_NOMEM;
}

ipt_status bench_lora_open(bench *b, const ipt_module_list *modules, int32_t seed,
                           bench_lora_file *out)
{
    maker k = {.b = b, .header = json_object(), .state = (uint64_t)seed + 11};
    ipt_status status = IPT_OK;
    /* the modules that trainers adapt: everything inside the transformers */
    for (size_t i = 0; status == IPT_OK && i < modules->n; i++)
        if (strstr(modules->module[i].name, "attentions.") && !modules->module[i].is_norm &&
            modules->module[i].kh == 1)
            status = add_module(&k, &modules->module[i], b->o->lora_kind, b->o->lora_rank);
    *out = (bench_lora_file){NULL, NULL};
    size_t size = 0;
    if (status == IPT_OK)
        status = finish(&k, &out->bytes, &size);
    if (status == IPT_OK)
        status = ipt_adapter_open_memory(b->ctx, "bench", out->bytes, size, modules->module,
                                         modules->n, &out->file);
    json_decref(k.header);
    ipt_free(k.data);
    if (status != IPT_OK)
        bench_lora_close(out);
    return status;
}

void bench_lora_close(bench_lora_file *f)
{
    ipt_adapter_close(&f->file);
    ipt_free(f->bytes);
    f->bytes = NULL;
}
