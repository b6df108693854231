/* engine/lora_tools.c - see lora_tools.h. */
#include "engine/lora_tools.h"

#include <jansson.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "engine/lora_fit.h"

const char ipt_lora_merge_methods[] =
    "cat svd linear ties dare dare_linear dare_ties magnitude_prune ties_svd dare_linear_svd "
    "dare_ties_svd magnitude_prune_svd lego lorahub";

/* One run of a tool. */
typedef struct work {
    const ipt_lora_job *job;
    const char *stage;
    ipt_lora_fit fit;
    ipt_adapter_file *more[IPT_TOOL_MAX_FILES]; /* behind the first, which is the fit's */
    size_t n_more;
    ipt_tool tool;
    double start_ms, told_ms;
} work;

static void tell(void *user, size_t done, size_t total)
{
    work *w = user;
    double now = ipt_now_ms(), passed = now - w->start_ms;
    if (!w->job->progress || passed < 1000 || now - w->told_ms < 100)
        return;
    ipt_progress p = {.stage = w->stage,
                      .done = (int32_t)done,
                      .total = (int32_t)total,
                      .n_image = 1,
                      .eta_ms = done > 0 ? passed / (double)done * (double)(total - done) : -1};
    w->told_ms = now;
    w->job->progress(w->job->user, &p);
}

static ipt_status find_dtype(ipt_ctx *ctx, const char *word, ipt_st_dtype *out)
{
    static const struct {
        const char *word;
        ipt_st_dtype dtype;
    } words[] = {
        {"same", IPT_ST_COUNT}, {"f32", IPT_ST_F32}, {"f16", IPT_ST_F16}, {"bf16", IPT_ST_BF16}};
    *out = IPT_ST_COUNT;
    for (size_t i = 0; word && i < IPT_COUNT(words); i++)
        if (strcmp(word, words[i].word) == 0) {
            *out = words[i].dtype;
            return IPT_OK;
        }
    return word ? ipt_fail(ctx, IPT_ERR_ARG, "--dtype is '%.40s'; expected same, f32, f16 or bf16",
                           word)
                : IPT_OK;
}

static ipt_status find_format(ipt_ctx *ctx, const char *word, ipt_adapter_format *out)
{
    for (ipt_adapter_format f = IPT_FORMAT_KOHYA; f <= IPT_FORMAT_DIFFUSERS; f++)
        if (strcmp(word, ipt_adapter_format_name(f)) == 0) {
            *out = f;
            return IPT_OK;
        }
    return ipt_fail(ctx, IPT_ERR_ARG, "--format is '%.40s'; expected kohya, peft or diffusers",
                    word);
}

/* Before the work: whether its result can go there. */
static ipt_status check_out(ipt_ctx *ctx, const char *path, bool is_folder)
{
    char tmp[IPT_DIR_MAX];
    size_t n = strlen(path);
    if (!is_folder)
        return ipt_file_check_write(ctx, path);
    if (n > 12 && strcmp(path + n - 12, ".safetensors") == 0)
        return ipt_fail(ctx, IPT_ERR_ARG,
                        "-o is '%.200s'; expected the name of a folder: this result has several "
                        "files",
                        path);
    IPT_TRY(ipt_dir_begin(ctx, path, tmp));
    ipt_dir_abort(tmp);
    return IPT_OK;
}

/* --- one run ---------------------------------------------------------------------------------- */
/* The first file, the modules and, where there is one, the model. */
static ipt_status begin(ipt_ctx *ctx, const ipt_lora_job *job, const char *stage, const char *lora,
                        work *w)
{
    *w = (work){.job = job, .stage = stage, .start_ms = ipt_now_ms()};
    IPT_TRY(ipt_lora_fit_open(ctx, lora, job->model, job->config_dir, &w->fit));
    IPT_TRY(ipt_adapter_check(w->fit.file, job->allow_partial));
    w->tool = (ipt_tool){.ctx = ctx,
                         .module = w->fit.modules.module,
                         .n_module = w->fit.modules.n,
                         .conv_projections = !w->fit.config->unet.linear_projection,
                         .dtype = IPT_ST_COUNT,
                         .step = tell,
                         .user = w};
    IPT_TRY(find_dtype(ctx, job->dtype, &w->tool.dtype));
    return ipt_tool_weights(w->fit.model, &w->tool);
}

static ipt_status begin_out(work *w, ipt_adapter_format format)
{
    ipt_adapter_out_opts o = {.format = format,
                              .dtype = w->tool.dtype,
                              .module = w->tool.module,
                              .n_module = w->tool.n_module};
    IPT_TRY(check_out(w->tool.ctx, w->job->out, format == IPT_FORMAT_PEFT));
    return ipt_adapter_out_create(w->tool.ctx, &o, &w->tool.out);
}

static ipt_status add_file(work *w, const char *path)
{
    ipt_adapter_file **f = &w->more[w->n_more];
    IPT_TRY(ipt_adapter_open(w->tool.ctx, path, w->tool.module, w->tool.n_module, f));
    w->n_more++;
    return ipt_adapter_check(*f, w->job->allow_partial);
}

static void end(work *w)
{
    ipt_adapter_out_destroy(&w->tool.out);
    ipt_tool_drop_weights(&w->tool);
    for (size_t i = 0; i < w->n_more; i++)
        ipt_adapter_close(&w->more[i]);
    ipt_lora_fit_finish(&w->fit);
}

/* cloneofsimo's notes on tensors that now have other names. */
static bool is_of_names(const char *key)
{
    return strchr(key, ':') || key[0] == '<' || strcmp(key, "unet") == 0 ||
           strcmp(key, "text_encoder") == 0;
}

/* What the source tells about itself goes on. */
static ipt_status copy_meta(work *w, const ipt_adapter_file *f)
{
    const char *key;
    json_t *v;
    json_object_foreach((json_t *)(uintptr_t)f->metadata, key, v) if (!is_of_names(key))
        IPT_TRY(ipt_adapter_out_meta(w->tool.out, key, json_string_value(v)));
    return IPT_OK;
}

static ipt_status note_origin(work *w, const char *how)
{
    char text[256];
    return ipt_adapter_out_meta(
        w->tool.out, "impasto_made_by",
        ipt_name(text, sizeof text, "impasto %s lora %s", IPT_VERSION, how));
}

/* --- reports ---------------------------------------------------------------------------------- */
static json_t *report_json(const work *w)
{
    const ipt_tool_report *r = &w->tool.report;
    double n = r->n_module ? (double)r->n_module : 1;
    json_t *o = json_object(), *e = json_object();
    json_object_set_new(o, "out", ipt_json_text(w->job->out));
    json_object_set_new(o, "model", ipt_json_text(w->fit.name ? w->fit.name : w->job->model));
    json_object_set_new(o, "modules", json_integer((json_int_t)r->n_module));
    json_object_set_new(o, "exact", json_integer((json_int_t)r->n_exact));
    json_object_set_new(o, "empty", json_integer((json_int_t)r->n_empty));
    json_object_set_new(o, "left_out", json_integer((json_int_t)r->n_left_out));
    json_object_set_new(o, "clamped", json_integer((json_int_t)r->n_clamped));
    json_object_set_new(o, "rank_min", json_integer(r->rank_min));
    json_object_set_new(o, "rank_max", json_integer(r->rank_max));
    json_object_set_new(e, "worst", json_real(r->error_worst));
    json_object_set_new(e, "worst_module", ipt_json_text(r->worst));
    json_object_set_new(e, "mean", json_real(r->error_sum / n));
    json_object_set_new(e, "total", json_real(r->total > 0 ? sqrt(r->lost / r->total) : 0));
    json_object_set_new(o, "error", e);
    json_object_set_new(o, "ms", json_real(ipt_now_ms() - w->start_ms));
    return o;
}

static ipt_status dump(ipt_ctx *ctx, json_t *o, char **json)
{
    char *text = json_dumps(o, JSON_REAL_PRECISION(9));
    json_decref(o);
    *json = text ? ipt_strdup(ctx, text) : NULL;
    json_free_t release;
    json_get_alloc_funcs(NULL, &release);
    if (text)
        release(text);
    return *json ? IPT_OK : ipt_fail(ctx, IPT_ERR_NOMEM, "no memory for a report");
}

/* Writes the adapter, reads it back, reports. */
static ipt_status finish(work *w, const char *extra, const char *value, char **json)
{
    ipt_ctx *ctx = w->tool.ctx;
    ipt_adapter_file *f = NULL;
    ipt_adapter_format format = ipt_adapter_out_format(w->tool.out);
    IPT_TRY(ipt_adapter_out_write(w->tool.out, w->job->out));
    json_t *o = report_json(w);
    json_object_set_new(o, "format", json_string(ipt_adapter_format_name(format)));
    if (extra)
        json_object_set_new(o, extra, json_string(value));
    if (ipt_file_is_direct(w->job->out)) /* a pipe cannot be read again */
        return dump(ctx, o, json);
    ipt_status s = ipt_adapter_open(ctx, w->job->out, w->tool.module, w->tool.n_module, &f);
    if (s == IPT_OK)
        s = ipt_adapter_check(f, false);
    if (s != IPT_OK) {
        ipt_adapter_close(&f);
        json_decref(o);
        return s;
    }
    ipt_adapter_hash(f);
    json_object_set_new(o, "sha256", ipt_json_text(f->sha256));
    json_object_set_new(o, "autov2", ipt_json_text(f->autov2));
    json_object_set_new(o, "autov3", ipt_json_text(f->autov3));
    ipt_adapter_close(&f);
    return dump(ctx, o, json);
}

/* --- convert, resize -------------------------------------------------------------------------- */
static ipt_status read_kron(ipt_ctx *ctx, const char *text, ipt_convert_opts *c)
{
    char *end = NULL;
    long a1 = text ? strtol(text, &end, 10) : 0, a2 = 0;
    bool ok = !text || (end > text && *end == 'x');
    if (text && ok) {
        const char *second = end + 1;
        a2 = strtol(second, &end, 10);
        ok = end > second && *end == 0 && a1 >= 1 && a2 >= 1 && a1 <= 65536 && a2 <= 65536;
    }
    if (!ok)
        return ipt_fail(ctx, IPT_ERR_ARG, "--kron is '%.40s'; expected A1xA2, for example 4x64",
                        text);
    c->a1 = (int32_t)a1;
    c->a2 = (int32_t)a2;
    return IPT_OK;
}

/* What --to and --format mean together. */
static ipt_status choose_target(ipt_ctx *ctx, const char *to, const char *format,
                                ipt_convert_opts *c, ipt_adapter_format *f)
{
    static const char *const kinds[] = {"lora", "lokr", "krona"};
    *f = IPT_FORMAT_KOHYA;
    if (format)
        IPT_TRY(find_format(ctx, format, f));
    c->to = IPT_TO_SAME;
    for (size_t i = 0; i < IPT_COUNT(kinds); i++)
        if (strcmp(to, kinds[i]) == 0)
            c->to = (ipt_adapter_target)(IPT_TO_LORA + (int)i);
    if (c->to == IPT_TO_SAME) {
        ipt_adapter_format named = IPT_FORMAT_KOHYA;
        IPT_TRY(find_format(ctx, to, &named));
        if (format && named != *f)
            return ipt_fail(ctx, IPT_ERR_ARG, "--to %.40s and --format %.40s contradict each other",
                            to, format);
        *f = named;
    }
    if (c->to == IPT_TO_KRONA && format)
        return ipt_fail(ctx, IPT_ERR_ARG,
                        "--format %.40s: expected none with --to krona, which has names of its own",
                        format);
    if (c->to == IPT_TO_LOKR && *f != IPT_FORMAT_KOHYA)
        return ipt_fail(ctx, IPT_ERR_ARG,
                        "--format %.40s: expected kohya with --to lokr, the names LyCORIS reads",
                        format);
    if (c->to == IPT_TO_KRONA)
        *f = IPT_FORMAT_KRONA;
    return IPT_OK;
}

ipt_status ipt_lora_convert(ipt_ctx *ctx, const ipt_lora_job *job, const char *lora,
                            const ipt_lora_convert_opts *o, char **json)
{
    work w;
    ipt_convert_opts c = {.rank = o->rank, .factor = o->factor};
    ipt_adapter_format format = IPT_FORMAT_KOHYA;
    IPT_TRY(choose_target(ctx, o->to, job->format, &c, &format));
    IPT_TRY(read_kron(ctx, o->kron, &c));
    ipt_status s = begin(ctx, job, "convert", lora, &w);
    if (s == IPT_OK)
        s = begin_out(&w, format);
    if (s == IPT_OK)
        s = ipt_adapter_convert(&w.tool, w.fit.file, &c);
    if (s == IPT_OK)
        s = copy_meta(&w, w.fit.file);
    if (s == IPT_OK)
        s = note_origin(&w, "convert");
    if (s == IPT_OK)
        s = finish(&w, "to", o->to, json);
    end(&w);
    return s;
}

static ipt_status check_keep(ipt_ctx *ctx, double keep)
{
    return keep >= 0 && keep <= 1
               ? IPT_OK
               : ipt_fail(ctx, IPT_ERR_ARG, "--keep is %g; expected a share from 0 to 1", keep);
}

ipt_status ipt_lora_resize(ipt_ctx *ctx, const ipt_lora_job *job, const char *lora,
                           const ipt_lora_resize_opts *o, char **json)
{
    work w;
    ipt_resize_opts r = {.rank = o->rank, .conv_rank = o->conv_rank, .keep = o->keep};
    ipt_adapter_format format = IPT_FORMAT_KOHYA;
    IPT_TRY(check_keep(ctx, o->keep));
    if (o->rank == 0 && o->keep <= 0)
        return ipt_fail(ctx, IPT_ERR_ARG, "expected --rank R or --keep SHARE, or both");
    if (job->format)
        IPT_TRY(find_format(ctx, job->format, &format));
    ipt_status s = begin(ctx, job, "resize", lora, &w);
    if (s == IPT_OK)
        s = begin_out(&w, format);
    if (s == IPT_OK)
        s = ipt_adapter_resize(&w.tool, w.fit.file, &r);
    if (s == IPT_OK)
        s = copy_meta(&w, w.fit.file);
    if (s == IPT_OK)
        s = note_origin(&w, "resize");
    if (s == IPT_OK)
        s = finish(&w, NULL, NULL, json);
    end(&w);
    return s;
}

/* --- merge ------------------------------------------------------------------------------------ */
static ipt_status on_or_off(ipt_ctx *ctx, const char *option, const char *word, bool *out)
{
    *out = !word || strcmp(word, "on") == 0;
    return *out || strcmp(word, "off") == 0
               ? IPT_OK
               : ipt_fail(ctx, IPT_ERR_ARG, "%s is '%.40s'; expected on or off", option, word);
}

static ipt_status find_lego(ipt_ctx *ctx, const ipt_lora_merge_opts *o, ipt_lego_opts *l)
{
    static const char *const norms[] = {"2", "inf", "off"};
    const char *name = o->lego_norm ? o->lego_norm : norms[0];
    size_t i = 0;
    while (i < IPT_COUNT(norms) && strcmp(name, norms[i]) != 0)
        i++;
    if (i == IPT_COUNT(norms))
        return ipt_fail(ctx, IPT_ERR_ARG, "--lego-norm is '%.40s'; expected 2, inf or off", name);
    l->norm = (ipt_lego_norm)i;
    IPT_TRY(on_or_off(ctx, "--lego-output", o->lego_output, &l->want_output));
    return on_or_off(ctx, "--lego-gauge", o->lego_gauge, &l->want_gauge);
}

static ipt_status find_method(ipt_ctx *ctx, const ipt_lora_merge_opts *o, ipt_merge_opts *m)
{
    const char *name = !o->method                       ? "cat"
                       : strcmp(o->method, "dare") == 0 ? "dare_linear"
                                                        : o->method;
    const char *majority = o->majority ? o->majority : "total";
    m->method = IPT_MERGE_COUNT;
    for (int i = 0; i < IPT_MERGE_COUNT; i++)
        if (strcmp(name, ipt_merge_name((ipt_merge_method)i)) == 0)
            m->method = (ipt_merge_method)i;
    if (m->method == IPT_MERGE_COUNT)
        return ipt_fail(ctx, IPT_ERR_ARG, "--method is '%.40s'; expected one of %s", name,
                        ipt_lora_merge_methods);
    m->by_frequency = strcmp(majority, "frequency") == 0;
    if (!m->by_frequency && strcmp(majority, "total") != 0)
        return ipt_fail(ctx, IPT_ERR_ARG, "--majority is '%.40s'; expected total or frequency",
                        majority);
    if (!(o->density > 0 && o->density <= 1))
        return ipt_fail(ctx, IPT_ERR_ARG, "--density is %g; expected a share above 0, 1 at most",
                        o->density);
    m->rank = o->rank;
    m->density = o->density;
    m->seed = o->seed;
    return find_lego(ctx, o, &m->lego);
}

/* The first file is open; the others, and all weights. */
static ipt_status open_inputs(work *w, const ipt_lora *lora, size_t n, ipt_merge_input *in)
{
    for (size_t i = 0; i < n; i++) {
        if (i > 0)
            IPT_TRY(add_file(w, lora[i].path));
        in[i] = (ipt_merge_input){i > 0 ? w->more[i - 1] : w->fit.file,
                                  ipt_lora_decimal(lora[i].weight),
                                  ipt_lora_decimal(lora[i].te_weight)};
    }
    return IPT_OK;
}

static ipt_status check_inputs(ipt_ctx *ctx, size_t n)
{
    return n >= 1 && n <= IPT_TOOL_MAX_FILES
               ? IPT_OK
               : ipt_fail(ctx, IPT_ERR_ARG, "found %zu adapters, expected 1 to %d", n,
                          IPT_TOOL_MAX_FILES);
}

static ipt_status note_inputs(work *w, const ipt_merge_input *in, size_t n, const char *method)
{
    static const char *const common[] = {"ss_base_model_version", "modelspec.architecture"};
    char how[256];
    int at = snprintf(how, sizeof how, "merge --method %s", method);
    for (size_t i = 0; i < n && at > 0 && (size_t)at < sizeof how; i++)
        at += snprintf(how + at, sizeof how - (size_t)at, " %.60s:%g", in[i].file->name,
                       in[i].weight);
    for (size_t k = 0; k < IPT_COUNT(common); k++) {
        const char *v = ipt_json_str(w->fit.file->metadata, common[k], NULL);
        if (v)
            IPT_TRY(ipt_adapter_out_meta(w->tool.out, common[k], v));
    }
    return note_origin(w, how);
}

ipt_status ipt_lora_merge(ipt_ctx *ctx, const ipt_lora_job *job, const ipt_lora *lora, size_t n,
                          const ipt_lora_merge_opts *o, char **json)
{
    work w;
    ipt_merge_input in[IPT_TOOL_MAX_FILES];
    ipt_merge_opts m = {0};
    ipt_adapter_format format = IPT_FORMAT_KOHYA;
    IPT_TRY(check_inputs(ctx, n));
    IPT_TRY(find_method(ctx, o, &m));
    if (job->format)
        IPT_TRY(find_format(ctx, job->format, &format));
    ipt_status s = begin(ctx, job, "merge", lora[0].path, &w);
    if (s == IPT_OK)
        s = open_inputs(&w, lora, n, in);
    if (s == IPT_OK)
        s = begin_out(&w, format);
    if (s == IPT_OK)
        s = ipt_adapter_merge(&w.tool, in, n, &m);
    if (s == IPT_OK)
        s = note_inputs(&w, in, n, ipt_merge_name(m.method));
    if (s == IPT_OK)
        s = finish(&w, "method", ipt_merge_name(m.method), json);
    end(&w);
    return s;
}

/* --- extract ---------------------------------------------------------------------------------- */
static ipt_status extract(work *w, const char *tuned, const ipt_lora_extract_opts *o, char **json)
{
    ipt_ctx *ctx = w->tool.ctx;
    ipt_adapter_format format = IPT_FORMAT_KOHYA;
    ipt_extract_opts e = {.rank = o->rank, .conv_rank = o->conv_rank, .keep = o->keep};
    ipt_tool other = {.ctx = ctx};
    ipt_model *m = NULL;
    if (w->job->format)
        IPT_TRY(find_format(ctx, w->job->format, &format));
    IPT_TRY(begin_out(w, format));
    const char *config = ipt_is_dir(tuned) ? NULL : w->job->config_dir; /* folders have their own */
    ipt_status s = ipt_open_model(ctx, tuned, config, &m);
    if (s == IPT_OK)
        s = ipt_tool_weights(m, &other);
    if (s == IPT_OK)
        s = ipt_adapter_extract(&w->tool, other.weights, &e);
    if (s == IPT_OK)
        s = note_origin(w, "extract");
    if (s == IPT_OK)
        s = finish(w, NULL, NULL, json);
    ipt_tool_drop_weights(&other);
    ipt_model_close(&m);
    return s;
}

/* A model without an adapter: its modules and weights. */
static ipt_status begin_model(ipt_ctx *ctx, const ipt_lora_job *job, const char *stage, work *w)
{
    ipt_lora_fit *f = &w->fit;
    *w = (work){.job = job, .stage = stage, .start_ms = ipt_now_ms()};
    f->name = job->model;
    IPT_TRY(ipt_open_model(ctx, job->model, job->config_dir, &f->model));
    const ipt_model_config *c = ipt_model_get_config(f->model);
    IPT_TRY(ipt_modules_create(ctx, c, &f->modules));
    w->tool = (ipt_tool){.ctx = ctx,
                         .module = f->modules.module,
                         .n_module = f->modules.n,
                         .conv_projections = !c->unet.linear_projection,
                         .dtype = IPT_ST_COUNT,
                         .step = tell,
                         .user = w};
    IPT_TRY(find_dtype(ctx, job->dtype, &w->tool.dtype));
    return ipt_tool_weights(f->model, &w->tool);
}

ipt_status ipt_lora_extract(ipt_ctx *ctx, const ipt_lora_job *job, const char *tuned,
                            const ipt_lora_extract_opts *o, char **json)
{
    work w;
    IPT_TRY(check_keep(ctx, o->keep));
    ipt_lora_job one = *job;
    one.config_dir = ipt_is_dir(job->model) ? NULL : job->config_dir;
    ipt_status s = begin_model(ctx, &one, "extract", &w);
    w.job = job;
    if (s == IPT_OK)
        s = extract(&w, tuned, o, json);
    end(&w);
    return s;
}

/* --- bake ------------------------------------------------------------------------------------- */
ipt_status ipt_model_bake_loras(ipt_ctx *ctx, const ipt_lora_job *job, const ipt_lora *lora,
                                size_t n, char **json)
{
    work w;
    ipt_merge_input in[IPT_TOOL_MAX_FILES];
    IPT_TRY(check_inputs(ctx, n));
    ipt_status s = begin_model(ctx, job, "bake", &w);
    for (size_t i = 0; s == IPT_OK && i < n; i++) {
        s = add_file(&w, lora[i].path);
        in[i] = (ipt_merge_input){s == IPT_OK ? w.more[i] : NULL, ipt_lora_decimal(lora[i].weight),
                                  ipt_lora_decimal(lora[i].te_weight)};
    }
    if (s == IPT_OK)
        s = check_out(ctx, job->out, ipt_is_dir(ipt_model_path(w.fit.model)));
    ipt_bake_opts o = {.dtype = w.tool.dtype};
    if (s == IPT_OK)
        s = ipt_model_bake(&w.tool, w.fit.model, in, n, &o, job->out);
    if (s == IPT_OK)
        s = dump(ctx, report_json(&w), json);
    end(&w);
    return s;
}
