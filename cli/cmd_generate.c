/* cli/cmd_generate.c - impasto generate: options to a request, pictures to files, report. */
#include "cli/beside.h"
#include "cli/cli.h"
#include "compose/policy.h"
#include "sampler/sampler.h"

#include <jansson.h>
#include <limits.h>
#include <math.h>
#include <string.h>
#include <strings.h>

/* --- options
 * --------------------------------------------------------------------------------------- */
typedef struct gen_args {
    ipt_request q; /* of --request, then of the options */
    cli_list lora, compose_opt, region, lora_dirs, embedding_dirs; /* as given: replace q's */
    const char *request, *output, *sheet, *preview, *masks, *explain, *device, *trace;
    int32_t vram_limit, preview_every;
} gen_args;

/* Fields of the request as options: their types, and where they go. */
#define TYPE_TEXT CLI_TEXT
#define TYPE_PROMPT CLI_PROMPT
#define TYPE_INT CLI_INT
#define TYPE_NUMBER CLI_NUMBER
#define TYPE_SEED CLI_SEED
#define TYPE_CHOICE CLI_CHOICE
#define TYPE_FLAG CLI_FLAG
#define TYPE_OFF CLI_FLAG
#define TYPE_TILE CLI_TILE
#define TYPE_TEXTS CLI_REPEAT
#define TYPE_LORAS CLI_REPEAT
#define AT(member) offsetof(gen_args, member)
#define AT_TEXT(m) AT(q.m)
#define AT_PROMPT(m) AT(q.m)
#define AT_INT(m) AT(q.m)
#define AT_NUMBER(m) AT(q.m)
#define AT_SEED(m) AT(q.m)
#define AT_CHOICE(m) AT(q.m)
#define AT_FLAG(m) AT(q.m)
#define AT_OFF(m) AT(q.m)
#define AT_TILE(m) AT(q.m)
#define AT_TEXTS(m) AT(m)
#define AT_LORAS(m) AT(m)
static const cli_option options[] = {
#define IPT_FIELD(type, member, name, option, letter, value, help, min, max, choices, needs, say)  \
    {option, letter, TYPE_##type, value, help, AT_##type(member), min, max, choices},
#include "engine/request.def"
#undef IPT_FIELD
    {"request", 'r', CLI_TEXT, "FILE",
     "a request as JSON, or the PNG that holds it; options change it", AT(request), 0, 0, NULL},
    {"output", 'o', CLI_TEXT, "FILE", ".png, .jpg or .jpeg (default: impasto-SEED.png); overwrites",
     AT(output), 0, 0, NULL},
    {"sheet", 0, CLI_TEXT, "FILE", "also write all pictures of the request as one", AT(sheet), 0, 0,
     NULL},
    {"preview", 0, CLI_TEXT, "FILE", "what the picture looks like so far, written again and again",
     AT(preview), 0, 0, NULL},
    {"preview-every", 0, CLI_INT, "N", "steps from one preview to the next, default 1",
     AT(preview_every), 1, 1000, NULL},
    {"masks", 0, CLI_TEXT, "DIR", "write each adapter's mask as a grey PNG, see below", AT(masks),
     0, 0, NULL},
    {"explain", 0, CLI_TEXT, "DIR",
     "write where, when and at which frequencies each LoRA acted, see below", AT(explain), 0, 0,
     NULL},
    {"device", 0, CLI_TEXT, "DEVICE", "index, \"cpu\" or part of a name; see impasto devices",
     AT(device), 0, 0, NULL},
    {"vram-limit", 0, CLI_INT, "MIB",
     "device memory to take at most; weights that do not fit come from the file in every step",
     AT(vram_limit), 64, 1 << 24, NULL},
    {"trace", 0, CLI_TEXT, "FILE", "write every intermediate as .safetensors", AT(trace), 0, 0,
     NULL},
    {0},
};
#undef AT

/* stable-diffusion.cpp's words, A1111's and diffusers' */
static const cli_alias aliases[] = {
    {"negative-prompt", "negative"},
    {"cfg-scale", "cfg"},
    {"guidance-scale", "cfg"},
    {"guidance-rescale", "cfg-rescale"},
    {"num-inference-steps", "steps"},
    {"sampling-method", "sampler"},
    {"scheduler", "schedule"},
    {"batch-count", "count"},
    {"init-img", "init"},
    {"denoising-strength", "strength"},
    {"lora-model-dir", "lora-dir"},
    {"embd-dir", "embedding-dir"},
    {0},
};

static void compose_option_help(const ipt_option *o)
{
    for (; o && o->key; o++)
        cli_own_text("               --compose-opt %s=%s: %s\n", o->key, o->value, o->help);
}

/* The table of methods: each with its options, then those of all. */
static void compose_help(void)
{
    size_t n = 0;
    const ipt_method *const *m = ipt_methods(&n);
    for (size_t i = 0; i < n; i++) {
        cli_own_text("%-12s %s: %s%s\n", i ? "" : "--compose", m[i]->name, m[i]->brief,
                     i ? "" : " (default)");
        compose_option_help(m[i]->option);
    }
    cli_own_text("%-12s all:\n", "");
    compose_option_help(ipt_policy_options());
}

static void more_help(void)
{
    cli_own_text("\nSamplers:  %s\nSchedules: %s\n", ipt_sampler_names(), ipt_schedule_names());
    for (int i = 0; i < IPT_SAMPLER_COUNT; i++)
        if (ipt_sampler_note((ipt_sampler_kind)i))
            cli_own_text("  %-12s %s\n", ipt_sampler_name((ipt_sampler_kind)i),
                         ipt_sampler_note((ipt_sampler_kind)i));
    cli_own_text("Names of A1111, ComfyUI, stable-diffusion.cpp and diffusers are understood: "
                 "\"DPM++ 2M Karras\",\n\"Euler a\", euler_ancestral, dpm++2m, "
                 "DDIMScheduler.\n");
    cli_own_text(
        "\n--lora FILE[:W[:TE_W]][@WORD]\n"
        "  W, TE_W    weight in the UNet and in the text encoder (default 1; TE_W = W); -100..100\n"
        "  WORD       the prompt's word for the concept, which clora keeps apart from the "
        "others'; WORD#2:\n"
        "             its second; WORD=PHRASE: PHRASE in its place where only this LoRA acts\n"
        "  FILE:W,start=0.0,end=0.5,blocks=down:1/mid:0/up:0.5  acts only in that part of the "
        "steps and with\n"
        "             those weights of the UNet's blocks; also down.1:0.5 for one level\n"
        "  FILE:0@0,1@0.3,0@0.9[:TE_W]  the weight over the steps: 0 at first, 1 when 0.3 of them "
        "are "
        "done,\n"
        "             straight lines between (TE_W: 1)\n");
    compose_help();
    cli_own_text(
        "--count N    NAME.png becomes NAME-1.png .. NAME-N.png when N > 1\n"
        "-o FILE      a device or a pipe takes PNGs one after the other, and its name is not "
        "printed\n"
        "--mask IMG   white is repainted; black keeps the picture's own pixels, up to a soft edge "
        "of half a\n"
        "             latent pixel (4 pixels) around the white; --no-paste gives the raw result\n"
        "--region IMG@PROMPT, IMG@lora:NAME  (regions)\n"
        "             where IMG is white, of the picture's size, grey is less of it: what PROMPT "
        "says "
        "stands there\n"
        "             in place of -p, which keeps the rest; the adapter NAME (its file without "
        "folder and ending)\n"
        "             acts there only.  Overlaps are shared.  Two halves of one picture:\n"
        "               -p \"a street\" --region left.png@\"a red house\" --region right.png@\"a "
        "tree\"\n"
        "             two characters, each with its words and its LoRA:\n"
        "               -p \"two friends in a park\" --lora ann.safetensors:0.9 --lora "
        "bob.safetensors:0.9 \\\n"
        "               --region l.png@\"ann, red coat\" --region l.png@lora:ann \\\n"
        "               --region r.png@\"bob, blue hat\" --region r.png@lora:bob\n"
        "             The same mask for words and LoRA costs least; 32 combinations at most\n"
        "--cache N    deep features of the UNet are kept for N - 1 evaluations, which run its "
        "outer "
        "layers only:\n"
        "             2 to 5 are usual, 3 is about twice as fast; N:LEVEL also runs LEVEL more "
        "layers "
        "each way\n"
        "--masks DIR  of methods that make some (clora): NAME-WORD.png for -o NAME.png and each "
        "--lora FILE@WORD,\n"
        "             in the picture's size, white where that LoRA was let in at the last step; to "
        "look at, or to\n"
        "             edit and give back as --region MASK.png@lora:NAME.  DIR is made\n"
        "--explain DIR  for -o NAME.png: NAME-LORA-where.png, a heat map of what that LoRA "
        "changed, "
        "on the picture\n"
        "             (with clora also of what its words looked at); NAME-when.png, over the steps "
        "and "
        "frequencies;\n"
        "             NAME.json, all numbers; NAME.ora, everything as layers for GIMP or Krita.  "
        "The "
        "UNet is\n"
        "             evaluated once more without each LoRA in every step: merge of N takes N "
        "times "
        "longer in\n"
        "             addition, composite a second world, clora often nothing.  The picture is "
        "that "
        "of --fold never,\n"
        "             to the bit\n"
        "-W, -H       with --init and neither: the model's number of pixels in the picture's "
        "aspect, or its\n"
        "             own size where the model could have made it; one: the other from the "
        "aspect\n"
        "--request    the fields of a request are the options above, in JSON with '_' for '-'; a "
        "PNG made here\n"
        "             holds its own.  What stands in the options counts\n"
        "Prompts follow A1111: (word:1.2), [word], BREAK, <lora:name:0.8>; [from:to:0.5], [to:10], "
        "[from::0.5]\n"
        "and [a|b] change over the steps, \"a AND b :0.6\" joins prompts.  In <lora:name:a:b> a "
        "is "
        "the text\n"
        "encoder's weight and b the UNet's, the other way round than in --lora FILE:W:TE_W.  Names "
        "are looked\n"
        "up in --lora-dir, then in $XDG_DATA_HOME/impasto/loras (default "
        "~/.local/share/impasto/loras).\n"
        "A prompt has at most 64 chunks of 75 tokens (see impasto tokenize).\n");
}

/* --- output names
 * ------------------------------------------------------------------------------------- */
typedef struct gen_run {
    cli *c;
    const gen_args *a;
    char (*file)[PATH_MAX]; /* [count] */
    int32_t count;
    size_t n_done;
    ipt_image *kept;         /* [count] copies for the sheet, NULL without one */
    ipt_arena *arena;        /* of the names in: */
    cli_list masks, explain; /* written */
    ipt_lora *lora;          /* [a->lora.n] */
    char **lora_text;
    char lora_home[PATH_MAX]; /* the user's own LoRA folder */
    cli_progress progress;
} gen_run;

static bool is_picture_name(const char *path)
{
    const char *dot = strrchr(path, '.');
    return dot && dot != path &&
           (strcasecmp(dot, ".png") == 0 || strcasecmp(dot, ".jpg") == 0 ||
            strcasecmp(dot, ".jpeg") == 0);
}

/* A device or pipe takes all pictures, one after the other. */
static bool output_name(const gen_args *a, int32_t i, int32_t count, bool direct, char *buf,
                        size_t n)
{
    char base[64];
    const char *name = a->output;
    if (!name)
        name = ipt_name(base, sizeof base, "impasto-%" PRIu64 ".png", a->q.seed);
    const char *dot = strrchr(name, '.');
    int len = count == 1 || direct || !dot
                  ? snprintf(buf, n, "%s", name)
                  : snprintf(buf, n, "%.*s-%d%s", (int)(dot - name), name, i + 1, dot);
    return len > 0 && (size_t)len < n;
}

/* What files beside picture i begin with: its name without folder and ending. */
static void stem_of(const gen_run *r, int32_t i, char buf[PATH_MAX])
{
    const char *name = strrchr(r->file[i], '/'), *dot = NULL;
    name = name ? name + 1 : r->file[i];
    dot = strrchr(name, '.');
    if (ipt_file_is_direct(r->file[i])) /* one name for all pictures */
        ipt_name(buf, PATH_MAX, "impasto-%" PRIu64, r->a->q.seed + (uint64_t)i);
    else
        ipt_name(buf, PATH_MAX, "%.*s", dot ? (int)(dot - name) : (int)strlen(name), name);
}

/* Two results in one file: the second would replace the first. */
static int check_distinct(const gen_run *r)
{
    const gen_args *a = r->a;
    static const char *const names[] = {"sheet", "trace", "preview"};
    const char *other[] = {a->sheet, a->trace, a->preview};
    for (size_t k = 0; k < IPT_COUNT(other); k++) {
        if (!other[k] || ipt_file_is_direct(other[k]))
            continue;
        for (int32_t i = 0; i < r->count; i++)
            if (strcmp(other[k], r->file[i]) == 0)
                return cli_usage_error(r->c, "--%s %s would replace a picture of that name",
                                       names[k], other[k]);
        for (size_t j = 0; j < k; j++)
            if (other[j] && strcmp(other[j], other[k]) == 0)
                return cli_usage_error(r->c, "--%s and --%s are the same file: %s", names[j],
                                       names[k], other[k]);
    }
    return CLI_GO_ON;
}

/* All names, and that they can be written, before anything is computed. */
static int prepare_output(gen_run *r)
{
    cli *c = r->c;
    const gen_args *a = r->a;
    static const char *const names[] = {"output", "sheet", "preview"};
    const char *pictures[] = {a->output, a->sheet, a->preview};
    ipt_status s = IPT_OK;
    for (size_t i = 0; i < IPT_COUNT(pictures); i++)
        if (pictures[i] && !is_picture_name(pictures[i]) && !ipt_file_is_direct(pictures[i]))
            return cli_usage_error(c, "--%s %s: the name must end in .png, .jpg or .jpeg", names[i],
                                   pictures[i]);
    bool direct = a->output && ipt_file_is_direct(a->output);
    r->file = ipt_calloc(c->ctx, (size_t)r->count, sizeof *r->file);
    if (!r->file)
        return cli_fail_status(c, IPT_ERR_NOMEM);
    for (int32_t i = 0; i < r->count; i++)
        if (!output_name(a, i, r->count, direct, r->file[i], sizeof r->file[i]))
            return cli_fail(c, IPT_ERR_OUTPUT, "%.100s...: cannot write: path too long", a->output);
    for (int32_t i = 0; i < r->count && s == IPT_OK; i++)
        s = ipt_file_check_write(c->ctx, r->file[i]);
    const char *other[] = {a->sheet, a->trace, a->preview};
    for (size_t i = 0; i < IPT_COUNT(other) && s == IPT_OK; i++)
        if (other[i])
            s = ipt_file_check_write(c->ctx, other[i]);
    const char *folder[] = {a->masks, a->explain};
    for (int32_t i = 0; i < 2 * r->count && s == IPT_OK; i++) {
        char stem[PATH_MAX];
        stem_of(r, i / 2, stem);
        if (folder[i % 2])
            s = cli_beside_check(c->ctx, folder[i % 2], stem);
    }
    return s == IPT_OK ? check_distinct(r) : cli_fail_status(c, s);
}

/* --- the request
 * ---------------------------------------------------------------------------------------- */
/* A sampler's or schedule's name that is not one of `names`. */
static int name_error(const cli *c, const char *what, const char *name, ipt_name_is found,
                      const char *names)
{
    char near[64], plain[64];
    if (found == IPT_NAME_ELSEWHERE)
        return cli_usage_error(c, "--%s '%.80s' is not built in here; one of: %s", what, name,
                               names);
    const char *hint =
        cli_nearest(ipt_plain_name(name, plain, sizeof plain), names, near, sizeof near);
    return cli_usage_error(c, "--%s '%.80s' is unknown; %s%s%sone of: %s", what, name,
                           hint ? "did you mean " : "", hint ? hint : "", hint ? "? " : "", names);
}

static int check_names(const cli *c, const gen_args *a)
{
    char near[64], compose_methods[256];
    ipt_sampler_kind kind;
    ipt_schedule schedule = IPT_SCHEDULE_DEFAULT, of_sampler = IPT_SCHEDULE_DEFAULT;
    const ipt_request *q = &a->q;
    const char *method = q->compose ? q->compose : ipt_method_find(NULL)->name, *hint = NULL;
    ipt_method_names(compose_methods, sizeof compose_methods);
    if (!cli_has_word(method, compose_methods)) {
        hint = cli_nearest(method, compose_methods, near, sizeof near);
        return cli_usage_error(c, "--compose '%s' is unknown; %s%s%sone of: %s", method,
                               hint ? "did you mean " : "", hint ? hint : "", hint ? "? " : "",
                               compose_methods);
    }
    if (q->sampler && strcmp(q->sampler, "default") != 0) {
        ipt_name_is found = ipt_sampler_read(q->sampler, &kind, &of_sampler);
        if (found != IPT_NAME_KNOWN)
            return name_error(c, "sampler", q->sampler, found, ipt_sampler_names());
    }
    if (q->schedule) {
        ipt_name_is found = ipt_schedule_read(q->schedule, &schedule);
        if (found != IPT_NAME_KNOWN)
            return name_error(c, "schedule", q->schedule, found, ipt_schedule_names());
    }
    if (of_sampler != IPT_SCHEDULE_DEFAULT && schedule != IPT_SCHEDULE_DEFAULT &&
        of_sampler != schedule)
        return cli_usage_error(c, "--sampler '%.80s' names the schedule %s, --schedule %s another",
                               q->sampler, ipt_schedule_name(of_sampler),
                               ipt_schedule_name(schedule));
    for (size_t i = 0; i < q->n_compose_opt; i++)
        if (!strchr(q->compose_opt[i], '=') || q->compose_opt[i][0] == '=')
            return cli_usage_error(
                c, "--compose-opt '%s' is not KEY=VALUE; see impasto generate --help",
                q->compose_opt[i]);
    return CLI_GO_ON;
}

static int check_args(const cli *c, const gen_args *a)
{
    const ipt_request *q = &a->q;
    if (!q->prompt)
        return cli_usage_error(c, "generate needs a prompt: -p TEXT; see impasto generate --help");
    if (q->mask_file && !q->init_file)
        return cli_usage_error(c, "--mask needs --init IMG, the picture to repaint");
    if (q->no_paste && !q->mask_file)
        return cli_usage_error(c, "--no-paste needs --mask IMG, whose protected part it gives up");
    for (size_t i = 0; i < q->n_region; i++)
        if (!strchr(q->region[i], '@') || q->region[i][0] == '@')
            return cli_usage_error(c, "--region '%.80s' is not IMG@PROMPT or IMG@lora:NAME",
                                   q->region[i]);
    if (!q->init_file && !isnan(q->strength))
        return cli_usage_error(c, "--strength needs --init IMG, the picture to start from");
    return check_names(c, a);
}

/* Lists that were given take the place of the request's. */
static int take_lists(gen_run *r, gen_args *a)
{
    const cli_list *l = &a->lora;
    const struct {
        const cli_list *given;
        const char *const **item;
        size_t *n;
    } lists[] = {{&a->compose_opt, &a->q.compose_opt, &a->q.n_compose_opt},
                 {&a->region, &a->q.region, &a->q.n_region},
                 {&a->lora_dirs, &a->q.lora_dirs, &a->q.n_lora_dirs},
                 {&a->embedding_dirs, &a->q.embedding_dirs, &a->q.n_embedding_dirs}};
    for (size_t i = 0; i < IPT_COUNT(lists); i++)
        if (lists[i].given->n > 0) {
            *lists[i].item = (const char *const *)lists[i].given->item;
            *lists[i].n = lists[i].given->n;
        }
    r->lora = ipt_calloc(r->c->ctx, l->n, sizeof *r->lora);
    r->lora_text = ipt_calloc(r->c->ctx, l->n, sizeof *r->lora_text);
    if (!r->lora || !r->lora_text)
        return cli_fail_status(r->c, IPT_ERR_NOMEM);
    for (size_t i = 0; i < l->n; i++) {
        ipt_status s = cli_lora_parse(r->c->ctx, l->item[i], &r->lora[i], &r->lora_text[i]);
        if (s != IPT_OK)
            return cli_fail_status(r->c, s);
    }
    if (l->n > 0) {
        a->q.lora = r->lora;
        a->q.n_lora = l->n;
    }
    return CLI_GO_ON;
}

/* The user's own LoRA folder, behind those of --lora-dir. */
static void add_lora_home(gen_run *r, gen_args *a)
{
    char data[PATH_MAX];
    if (ipt_data_dir(data, sizeof data) &&
        ipt_path_join(r->lora_home, sizeof r->lora_home, data, "loras"))
        a->q.lora_home = r->lora_home;
}

static ipt_status copy_image(ipt_ctx *ctx, const ipt_image *from, ipt_image *to)
{
    size_t n = (size_t)from->w * (size_t)from->h * 3;
    uint8_t *rgb = ipt_alloc(ctx, n);
    if (!rgb)
        return IPT_ERR_NOMEM;
    memcpy(rgb, from->rgb, n);
    *to = (ipt_image){from->w, from->h, rgb};
    return IPT_OK;
}

static ipt_status save_picture(void *user, int32_t i, const ipt_image *im, const char *text,
                               const char *json)
{
    gen_run *r = user;
    if (i < 0 || i >= r->count)
        return ipt_fail(r->c->ctx, IPT_ERR_ARG, "picture %d of %d", i + 1, r->count);
    IPT_TRY(ipt_image_save(r->c->ctx, r->file[i], im, text, json));
    r->n_done = (size_t)i + 1;
    if (r->kept)
        IPT_TRY(copy_image(r->c->ctx, im, &r->kept[i]));
    if (!r->c->json && !ipt_file_is_direct(r->file[i])) { /* which may be standard output */
        cli_progress_end(&r->progress);
        cli_path_line(r->file[i]);
    }
    return IPT_OK;
}

/* Names of files beside picture i, from the first-th on. */
static void show_files(gen_run *r, int32_t i, const cli_list *l, size_t first)
{
    bool silent = r->c->json || ipt_file_is_direct(r->file[i]); /* which may be standard output */
    for (size_t k = first; !silent && k < l->n; k++) {
        cli_progress_end(&r->progress);
        cli_path_line(l->item[k]);
    }
}

static ipt_status save_masks(void *user, const ipt_masks *m)
{
    gen_run *r = user;
    char stem[PATH_MAX];
    size_t before = r->masks.n;
    stem_of(r, m->image, stem);
    IPT_TRY(cli_masks_save(r->arena, r->a->masks, stem, m, &r->masks));
    show_files(r, m->image, &r->masks, before);
    return IPT_OK;
}

static ipt_status save_explanation(void *user, const ipt_explanation *x)
{
    gen_run *r = user;
    char stem[PATH_MAX];
    size_t before = r->explain.n;
    stem_of(r, x->image, stem);
    IPT_TRY(cli_explain_save(r->arena, r->a->explain, stem, r->file[x->image], x, &r->explain));
    show_files(r, x->image, &r->explain, before);
    return IPT_OK;
}

static void show_progress(void *user, const ipt_progress *p)
{
    gen_run *r = user;
    cli_progress_show(&r->progress, p);
}

static ipt_status save_preview(void *user, const ipt_preview *p)
{
    const gen_run *r = user;
    return ipt_image_save(r->c->ctx, r->a->preview, p->im, NULL, NULL);
}

/* --- the report
 * ------------------------------------------------------------------------------------------ */
static json_t *adapters_json(const ipt_report *p)
{
    json_t *list = json_array();
    for (size_t i = 0; i < p->n_adapter; i++) {
        const ipt_adapter_report *a = &p->adapter[i];
        json_t *o = json_object(), *unmatched = json_array();
        for (size_t k = 0; k < a->n_unmatched; k++)
            json_array_append_new(unmatched, ipt_json_text(a->unmatched[k]));
        json_object_set_new(o, "file", ipt_json_text(a->file));
        json_object_set_new(o, "name", ipt_json_text(a->name));
        json_object_set_new(o, "family", ipt_json_text(a->family));
        json_object_set_new(o, "algo", ipt_json_text(a->algo));
        json_object_set_new(o, "rank", json_integer(a->rank_max));
        json_object_set_new(o, "rank_min", json_integer(a->rank_min));
        json_object_set_new(o, "rank_max", json_integer(a->rank_max));
        json_object_set_new(o, "modules", json_integer((json_int_t)a->modules));
        json_object_set_new(o, "matched", json_integer((json_int_t)a->matched));
        json_object_set_new(o, "unmatched", unmatched);
        json_object_set_new(o, "sha256", ipt_json_text(a->sha256));
        json_object_set_new(o, "autov2", ipt_json_text(a->autov2));
        json_object_set_new(o, "autov3", ipt_json_text(a->autov3));
        json_object_set_new(o, "a1111_hash", ipt_json_text(a->a1111_hash));
        json_array_append_new(list, o);
    }
    return list;
}

static json_t *files_json(const cli_list *l)
{
    json_t *list = json_array();
    for (size_t i = 0; i < l->n; i++)
        json_array_append_new(list, ipt_json_text(l->item[i]));
    return list;
}

static json_t *report_json(const gen_run *r, const ipt_report *p)
{
    json_t *o = json_object(), *files = json_array(), *opts = json_array();
    for (size_t i = 0; i < r->n_done; i++)
        json_array_append_new(files, ipt_json_text(r->file[i]));
    for (size_t i = 0; i < r->a->q.n_compose_opt; i++)
        json_array_append_new(opts, ipt_json_text(r->a->q.compose_opt[i]));
    json_object_set_new(o, "model", ipt_json_text(p->model));
    json_object_set_new(o, "architecture", ipt_json_text(p->model_arch));
    json_object_set_new(o, "model_sha256", ipt_json_text(p->model_sha256));
    json_object_set_new(o, "seed", ipt_json_uint(p->seed));
    json_object_set_new(o, "files", files);
    json_object_set_new(o, "sheet", ipt_json_text(r->a->sheet));
    if (r->a->masks)
        json_object_set_new(o, "masks", files_json(&r->masks));
    if (r->a->explain)
        json_object_set_new(o, "explain", files_json(&r->explain));
    json_object_set_new(o, "width", json_integer(p->width));
    json_object_set_new(o, "height", json_integer(p->height));
    json_object_set_new(o, "steps", json_integer(p->steps));
    json_object_set_new(o, "sampler", ipt_json_text(p->sampler));
    json_object_set_new(o, "schedule", ipt_json_text(p->schedule));
    json_object_set_new(o, "rng", ipt_json_text(p->rng));
    json_object_set_new(o, "device", ipt_json_text(p->device));
    json_object_set_new(o, "precision", ipt_json_text(p->precision));
    json_object_set_new(o, "ms",
                        json_pack("{s:f, s:f, s:f, s:f, s:f, s:f}", "load", p->ms_load, "text",
                                  p->ms_text, "fold", p->ms_fold, "sample", p->ms_sample, "vae",
                                  p->ms_vae, "total", p->ms_total));
    json_object_set_new(o, "ms_per_step", json_real(p->ms_per_step));
    json_object_set_new(o, "ms_first_step", json_real(p->ms_first_step));
    json_object_set_new(o, "unet_evaluations", json_integer(p->n_eval));
    json_object_set_new(
        o, "unet_rows",
        json_pack("{s:I, s:I, s:I, s:I, s:I}", "full", (json_int_t)p->rows_full, "shallow",
                  (json_int_t)p->rows_shallow, "maps", (json_int_t)p->rows_maps, "backward",
                  (json_int_t)p->rows_backward, "explain", (json_int_t)p->rows_explain));
    json_object_set_new(o, "peak_device_mib", json_real((double)p->peak_device_bytes / 1048576.0));
    json_object_set_new(o, "peak_host_mib", json_real((double)p->peak_host_bytes / 1048576.0));
    json_object_set_new(
        o, "unet_memory",
        json_pack("{s:f, s:f, s:f, s:i}", "weights_mib", (double)p->unet_weight_bytes / 1048576.0,
                  "streamed_mib", (double)p->unet_streamed_bytes / 1048576.0, "working_mib",
                  (double)p->unet_working_bytes / 1048576.0, "blocks", (int)p->unet_blocks));
    json_object_set_new(o, "plans_recorded", json_integer((json_int_t)p->n_plans_recorded));
    json_object_set_new(o, "bytes_uploaded", json_integer((json_int_t)p->bytes_uploaded));
    json_object_set_new(o, "adapters", adapters_json(p));
    json_object_set_new(o, "folded", json_boolean(p->is_folded));
    json_object_set_new(
        o, "compose",
        json_pack("{s:o, s:o}", "method", ipt_json_text(p->compose), "options", opts));
    json_object_set_new(o, "parameters", ipt_json_text(p->infotext));
    return o;
}

static void print_summary(const gen_run *r, const ipt_report *p)
{
    if (r->c->quiet)
        return;
    cli_line(stderr,
             "%d picture%s %d x %d, seed %" PRIu64
             ", %d steps of %s: %.1f s (%.0f ms a step) on %s",
             p->n_image, p->n_image == 1 ? "" : "s", p->width, p->height, p->seed, p->steps,
             p->sampler ? p->sampler : "?", p->ms_total / 1000, p->ms_per_step,
             p->device ? p->device : "?");
    for (size_t i = 0; i < p->n_adapter; i++)
        if (p->adapter[i].n_unmatched)
            cli_line(stderr, "impasto: warning: %s: %zu keys fit no module of this model",
                     p->adapter[i].file, p->adapter[i].n_unmatched);
    if (r->c->verbose)
        cli_line(stderr,
                 "load %.0f ms, text %.0f ms, sampling %.0f ms, vae %.0f ms; device %.0f MiB, host "
                 "%.0f MiB",
                 p->ms_load, p->ms_text, p->ms_sample, p->ms_vae,
                 (double)p->peak_device_bytes / 1048576.0, (double)p->peak_host_bytes / 1048576.0);
}

/* --- run -------------------------------------------------------------------------------------- */
static ipt_status save_sheet(const gen_run *r, const ipt_report *p)
{
    ipt_image sheet = {0};
    if (!r->a->sheet || r->n_done == 0)
        return IPT_OK;
    IPT_TRY(cli_sheet(r->c->ctx, r->kept, r->n_done, &sheet));
    ipt_status s = ipt_image_save(r->c->ctx, r->a->sheet, &sheet, p->infotext, NULL);
    ipt_image_finish(&sheet);
    if (s == IPT_OK && !r->c->json && !ipt_file_is_direct(r->a->sheet))
        cli_path_line(r->a->sheet);
    return s;
}

static int make_pictures(gen_run *r, const ipt_request *q)
{
    cli *c = r->c;
    ipt_engine *e = NULL;
    ipt_report p = {0};
    ipt_engine_opts o = {.device = r->a->device, .vram_limit = (uint64_t)r->a->vram_limit << 20};
    ipt_status s = ipt_engine_create(c->ctx, &o, &e);
    if (s == IPT_OK)
        s = ipt_generate(e, q, save_picture, r, &p);
    cli_progress_end(&r->progress);
    if (s == IPT_OK)
        s = save_sheet(r, &p);
    int rc = CLI_OK;
    if (s != IPT_OK) {
        rc = cli_fail_status(c, s);
    } else {
        print_summary(r, &p);
        if (c->json)
            rc = cli_print_json(c, report_json(r, &p));
    }
    ipt_engine_destroy(&e);
    return rc;
}

static int generate(cli *c, gen_args *a, gen_run *r)
{
    int rc = take_lists(r, a);
    if (rc == CLI_GO_ON)
        rc = check_args(c, a);
    if (rc == CLI_GO_ON)
        rc = prepare_output(r);
    if (rc != CLI_GO_ON)
        return rc;
    add_lora_home(r, a);
    if (a->sheet) {
        r->kept = ipt_calloc(c->ctx, (size_t)r->count, sizeof *r->kept);
        if (!r->kept)
            return cli_fail_status(c, IPT_ERR_NOMEM);
    }
    cli_progress_init(&r->progress, c->quiet);
    a->q.trace = a->trace;
    a->q.progress = show_progress;
    a->q.preview = a->preview ? save_preview : NULL;
    a->q.preview_every = a->preview_every;
    a->q.masks = a->masks ? save_masks : NULL;
    a->q.explain = a->explain ? save_explanation : NULL;
    a->q.masks_user = a->q.explain_user = r;
    a->q.user = r;
    return make_pictures(r, &a->q);
}

static void finish_lists(gen_args *a)
{
    cli_list *list[] = {&a->lora, &a->compose_opt, &a->region, &a->lora_dirs, &a->embedding_dirs};
    for (size_t i = 0; i < IPT_COUNT(list); i++)
        cli_list_finish(list[i]);
}

/* The options; with --request they are read once more, over what that says. */
static int read_options(cli *c, const cli_command *cmd, int argc, char **argv, ipt_arena *arena,
                        gen_args *a)
{
    uint64_t seed = 0;
    ipt_status s = cli_random_seed(c->ctx, &seed); /* --seed overwrites it */
    if (s != IPT_OK)
        return cli_fail_status(c, s);
    ipt_request_init(&a->q);
    a->q.seed = seed;
    int rc = cli_parse(c, cmd, argc, argv, a, NULL);
    if (rc != CLI_GO_ON || !a->request)
        return rc;
    const char *file = a->request;
    finish_lists(a);
    memset(a, 0, sizeof *a);
    ipt_request_init(&a->q);
    a->q.seed = seed;
    s = ipt_request_load(arena, file, &a->q);
    return s == IPT_OK ? cli_parse(c, cmd, argc, argv, a, NULL) : cli_fail_status(c, s);
}

static int run(cli *c, const cli_command *cmd, int argc, char **argv)
{
    gen_args a = {.request = NULL};
    ipt_arena arena;
    gen_run r = {.c = c, .a = &a, .arena = &arena};
    ipt_arena_init(&arena, c->ctx);
    int rc = read_options(c, cmd, argc, argv, &arena, &a);
    r.count = a.q.count > 0 ? a.q.count : 1;
    if (rc == CLI_GO_ON)
        rc = generate(c, &a, &r);
    for (int32_t i = 0; r.kept && i < r.count; i++)
        ipt_image_finish(&r.kept[i]);
    for (size_t i = 0; r.lora_text && i < a.lora.n; i++)
        ipt_free(r.lora_text[i]);
    ipt_free(r.kept);
    ipt_free(r.lora_text);
    ipt_free(r.lora);
    ipt_free(r.file);
    cli_list_finish(&r.masks);
    cli_list_finish(&r.explain);
    finish_lists(&a);
    ipt_arena_finish(&arena);
    return rc;
}

const cli_command cli_cmd_generate = {
    .name = "generate",
    .brief = "make pictures from a prompt",
    .usage = "-p PROMPT [-m MODEL] [-n NEGATIVE] [-o OUT.png|.jpg] [OPTION...]",
    .about = "MODEL is a .safetensors checkpoint of Stable Diffusion 1.x, 2.x or XL, or a folder "
             "in diffusers\n"
             "layout.  The name of each picture is printed on standard output, progress on "
             "standard error.\n",
    .option = options,
    .alias = aliases,
    .example =
        "  impasto generate -p \"a red apple, noto style, on a blue background\" -o apple.png\n"
        "  impasto generate -m sd15.safetensors -p \"a lighthouse at dawn\" -n blurry --steps 25 "
        "--seed 7 -o l.png\n"
        "  impasto generate -m sd15.safetensors -p \"a cat\" --lora ink.safetensors:0.8 --lora "
        "cat.safetensors@cat \\\n"
        "      --compose switch -o cat.png\n"
        "  impasto generate -m sd15.safetensors -p \"a cat and a dog\" --lora cat.safetensors@cat "
        "--lora dog.safetensors@dog \\\n"
        "      --compose clora --masks parts --explain parts -o pets.png\n"
        "  impasto generate -m sdxl/ -p \"a fox\" --init sketch.png --strength 0.6 -W 1024 -H 1024 "
        "-o fox.jpg\n"
        "  impasto generate -p \"a green pear\" --count 9 --sheet pears.png -o pear.png --json\n"
        "  impasto generate --request pear-3.png --steps 40 -o pear-3b.png\n",
    .more = more_help,
    .run = run,
};
