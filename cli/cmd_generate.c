/* cli/cmd_generate.c - impasto generate: options to a request, pictures to files, report. */
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
    const char *model, *prompt, *negative, *output, *sheet, *compose, *sampler, *schedule, *rng,
        *init, *mask;
    const char *vae, *taesd, *vae_tile, *device, *precision, *trace, *config_dir, *prediction;
    cli_list lora, compose_opt, lora_dir, embedding_dir;
    int32_t steps, count, width, height, clip_skip, vram_limit, batch;
    double cfg, cfg_rescale, strength;
    uint64_t seed;
    bool allow_partial, no_paste;
} gen_args;

static const char compose_later[] = "cmlora clora lego lorahub";

#define AT(field) offsetof(gen_args, field)
static const cli_option options[] = {
    {"model", 'm', CLI_TEXT, "MODEL",
     "checkpoint or diffusers folder (default: $IMPASTO_MODEL, else the built-in model)", AT(model),
     0, 0, NULL},
    {"prompt", 'p', CLI_PROMPT, "TEXT", "what the picture shows", AT(prompt), 0, 0, NULL},
    {"negative", 'n', CLI_PROMPT, "TEXT", "what it should not show", AT(negative), 0, 0, NULL},
    {"output", 'o', CLI_TEXT, "FILE", ".png, .jpg or .jpeg (default: impasto-SEED.png); overwrites",
     AT(output), 0, 0, NULL},
    {"sheet", 0, CLI_TEXT, "FILE", "also write all pictures of the request as one", AT(sheet), 0, 0,
     NULL},
    {"lora", 0, CLI_REPEAT, "SPEC", "FILE[:W[:TE_W]][@WORD], see below; repeatable", AT(lora), 0, 0,
     NULL},
    {"compose", 0, CLI_TEXT, "METHOD", "how LoRAs join, see below", AT(compose), 0, 0, NULL},
    {"compose-opt", 0, CLI_REPEAT, "KEY=VALUE", "option of the method, see below; repeatable",
     AT(compose_opt), 0, 0, NULL},
    {"steps", 0, CLI_INT, "N", "sampler steps, default 20 (4 for lcm, tcd)", AT(steps), 1, 1000,
     NULL},
    {"cfg", 0, CLI_NUMBER, "G", "guidance, default 7 (1.5 for lcm, tcd)", AT(cfg), 0, 100, NULL},
    {"cfg-rescale", 0, CLI_NUMBER, "PHI", "guidance rescale", AT(cfg_rescale), 0, 1, NULL},
    {"seed", 's', CLI_SEED, "S", "noise seed (default: -1, a random one, reported)", AT(seed), 0, 0,
     NULL},
    {"count", 'b', CLI_INT, "N", "pictures; picture k has seed S + k", AT(count), 1, 10000, NULL},
    {"width", 'W', CLI_INT, "W", "pixels (default: the model's)", AT(width), 8, 16384, NULL},
    {"height", 'H', CLI_INT, "H", "pixels (default: the model's)", AT(height), 8, 16384, NULL},
    {"clip-skip", 0, CLI_INT, "N", "2: text of the layer before the last", AT(clip_skip), 0, 32,
     NULL},
    {"sampler", 0, CLI_TEXT, "NAME",
     "sampler, also with its schedule; below (default: the model's)", AT(sampler), 0, 0, NULL},
    {"schedule", 0, CLI_TEXT, "NAME", "noise schedule, see below", AT(schedule), 0, 0, NULL},
    {"rng", 0, CLI_CHOICE, "NAME", "noise as torch-cpu (default) or philox (CUDA)", AT(rng), 0, 0,
     "torch-cpu philox"},
    {"init", 'i', CLI_TEXT, "IMG", "start from this picture", AT(init), 0, 0, NULL},
    {"strength", 0, CLI_NUMBER, "X", "how much of it to change, default 0.75 (1 with --mask)",
     AT(strength), 0, 1, NULL},
    {"mask", 0, CLI_TEXT, "IMG", "repaint only where this is white (with --init)", AT(mask), 0, 0,
     NULL},
    {"no-paste", 0, CLI_FLAG, NULL, "the raw result also where the mask is black", AT(no_paste), 0,
     0, NULL},
    {"vae", 0, CLI_TEXT, "FILE", "another VAE", AT(vae), 0, 0, NULL},
    {"taesd", 0, CLI_TEXT, "FILE", "decode with this tiny autoencoder", AT(taesd), 0, 0, NULL},
    {"vae-tile", 0, CLI_TEXT, "auto|never|N", "decode in tiles of N pixels, default auto",
     AT(vae_tile), 0, 0, NULL},
    {"device", 0, CLI_TEXT, "DEVICE", "index, \"cpu\" or part of a name; see impasto devices",
     AT(device), 0, 0, NULL},
    {"precision", 0, CLI_CHOICE, "f16|f32|auto", "storage of weights and activations",
     AT(precision), 0, 0, "auto f16 f32"},
    {"vram-limit", 0, CLI_INT, "MIB", "device memory to take at most", AT(vram_limit), 64, 1 << 24,
     NULL},
    {"batch", 0, CLI_INT, "N", "UNet rows evaluated at once at most, 0: auto", AT(batch), 0, 256,
     NULL},
    {"lora-dir", 0, CLI_REPEAT, "DIR", "where <lora:name:w> is looked up first; repeatable",
     AT(lora_dir), 0, 0, NULL},
    {"embedding-dir", 0, CLI_REPEAT, "DIR", "textual inversions by file name; repeatable",
     AT(embedding_dir), 0, 0, NULL},
    {"config-dir", 0, CLI_TEXT, "DIR", "diffusers folder whose configs a single file follows",
     AT(config_dir), 0, 0, NULL},
    {"prediction", 0, CLI_CHOICE, "KIND", "epsilon or v_prediction, where the files do not say",
     AT(prediction), 0, 0, "epsilon v_prediction"},
    {"allow-partial", 0, CLI_FLAG, NULL, "take a LoRA of which some modules do not fit",
     AT(allow_partial), 0, 0, NULL},
    {"trace", 0, CLI_TEXT, "FILE", "write every intermediate as .safetensors", AT(trace), 0, 0,
     NULL},
    {"region", 0, CLI_LATER, "SPEC", "", 0, 0, 0, NULL},
    {"masks", 0, CLI_LATER, "DIR", "", 0, 0, 0, NULL},
    {"explain", 0, CLI_LATER, NULL, "", 0, 0, 0, NULL},
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
        "  WORD       word of the prompt that the concept belongs to: kept with the picture, no "
        "method uses it yet\n"
        "  FILE:W,start=0.0,end=0.5,blocks=down:1/mid:0/up:0.5  acts only in that part of the "
        "steps and with\n"
        "             those weights of the UNet's blocks; also down.1:0.5 for one level\n");
    compose_help();
    cli_own_text(
        "--count N    NAME.png becomes NAME-1.png .. NAME-N.png when N > 1\n"
        "-o FILE      a device or a pipe takes PNGs one after the other, and its name is not "
        "printed\n"
        "--mask IMG   white is repainted; black keeps the picture's own pixels, up to a soft edge "
        "of half a\n"
        "             latent pixel (4 pixels) around the white; --no-paste gives the raw result\n"
        "-W, -H       with --init and neither: the model's number of pixels in the picture's "
        "aspect, or its\n"
        "             own size where the model could have made it; one: the other from the "
        "aspect\n"
        "Prompts follow A1111: (word:1.2), [word], BREAK, <lora:name:0.8>.  In <lora:name:a:b> a "
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
    ipt_image *kept; /* [count] copies for the sheet, NULL without one */
    ipt_lora *lora;  /* [a->lora.n] */
    char **lora_text;
    ipt_image init, mask;
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
        name = ipt_name(base, sizeof base, "impasto-%" PRIu64 ".png", a->seed);
    const char *dot = strrchr(name, '.');
    int len = count == 1 || direct || !dot
                  ? snprintf(buf, n, "%s", name)
                  : snprintf(buf, n, "%.*s-%d%s", (int)(dot - name), name, i + 1, dot);
    return len > 0 && (size_t)len < n;
}

/* Two results in one file: the second would replace the first. */
static int check_distinct(const gen_run *r)
{
    const gen_args *a = r->a;
    const char *other[] = {a->sheet, a->trace};
    for (size_t k = 0; k < IPT_COUNT(other); k++) {
        if (!other[k] || ipt_file_is_direct(other[k]))
            continue;
        for (int32_t i = 0; i < r->count; i++)
            if (strcmp(other[k], r->file[i]) == 0)
                return cli_usage_error(r->c, "--%s %s would replace a picture of that name",
                                       k ? "trace" : "sheet", other[k]);
        if (k && other[0] && strcmp(other[0], other[k]) == 0)
            return cli_usage_error(r->c, "--sheet and --trace are the same file: %s", other[k]);
    }
    return CLI_GO_ON;
}

/* All names, and that they can be written, before anything is computed. */
static int prepare_output(gen_run *r)
{
    cli *c = r->c;
    const gen_args *a = r->a;
    const char *pictures[] = {a->output, a->sheet};
    ipt_status s = IPT_OK;
    for (size_t i = 0; i < IPT_COUNT(pictures); i++)
        if (pictures[i] && !is_picture_name(pictures[i]) && !ipt_file_is_direct(pictures[i]))
            return cli_usage_error(c, "--%s %s: the name must end in .png, .jpg or .jpeg",
                                   i ? "sheet" : "output", pictures[i]);
    bool direct = a->output && ipt_file_is_direct(a->output);
    r->file = ipt_calloc(c->ctx, (size_t)r->count, sizeof *r->file);
    if (!r->file)
        return cli_fail_status(c, IPT_ERR_NOMEM);
    for (int32_t i = 0; i < r->count; i++)
        if (!output_name(a, i, r->count, direct, r->file[i], sizeof r->file[i]))
            return cli_fail(c, IPT_ERR_OUTPUT, "%.100s...: cannot write: path too long", a->output);
    for (int32_t i = 0; i < r->count && s == IPT_OK; i++)
        s = ipt_file_check_write(c->ctx, r->file[i]);
    if (s == IPT_OK && a->sheet)
        s = ipt_file_check_write(c->ctx, a->sheet);
    if (s == IPT_OK && a->trace)
        s = ipt_file_check_write(c->ctx, a->trace);
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
    const char *method = a->compose ? a->compose : "merge", *hint = NULL;
    ipt_method_names(compose_methods, sizeof compose_methods);
    if (cli_has_word(method, compose_later))
        return cli_usage_error(c, "--compose %s is not in this version; one of: %s", method,
                               compose_methods);
    if (!cli_has_word(method, compose_methods)) {
        hint = cli_nearest(method, compose_methods, near, sizeof near);
        return cli_usage_error(c, "--compose '%s' is unknown; %s%s%sone of: %s", method,
                               hint ? "did you mean " : "", hint ? hint : "", hint ? "? " : "",
                               compose_methods);
    }
    if (a->sampler) {
        ipt_name_is found = ipt_sampler_read(a->sampler, &kind, &of_sampler);
        if (found != IPT_NAME_KNOWN)
            return name_error(c, "sampler", a->sampler, found, ipt_sampler_names());
    }
    if (a->schedule) {
        ipt_name_is found = ipt_schedule_read(a->schedule, &schedule);
        if (found != IPT_NAME_KNOWN)
            return name_error(c, "schedule", a->schedule, found, ipt_schedule_names());
    }
    if (of_sampler != IPT_SCHEDULE_DEFAULT && schedule != IPT_SCHEDULE_DEFAULT &&
        of_sampler != schedule)
        return cli_usage_error(c, "--sampler '%.80s' names the schedule %s, --schedule %s another",
                               a->sampler, ipt_schedule_name(of_sampler),
                               ipt_schedule_name(schedule));
    for (size_t i = 0; i < a->compose_opt.n; i++)
        if (!strchr(a->compose_opt.item[i], '=') || a->compose_opt.item[i][0] == '=')
            return cli_usage_error(
                c, "--compose-opt '%s' is not KEY=VALUE; see impasto generate --help",
                a->compose_opt.item[i]);
    return CLI_GO_ON;
}

static int check_args(const cli *c, const gen_args *a, int32_t *tile)
{
    int64_t n = 0;
    *tile = 0;
    if (!a->prompt)
        return cli_usage_error(c, "generate needs a prompt: -p TEXT; see impasto generate --help");
    if (a->mask && !a->init)
        return cli_usage_error(c, "--mask needs --init IMG, the picture to repaint");
    if (a->no_paste && !a->mask)
        return cli_usage_error(c, "--no-paste needs --mask IMG, whose protected part it gives up");
    if (!a->init && !isnan(a->strength))
        return cli_usage_error(c, "--strength needs --init IMG, the picture to start from");
    if (a->vae_tile && strcmp(a->vae_tile, "never") == 0) {
        *tile = -1;
    } else if (a->vae_tile && strcmp(a->vae_tile, "auto") != 0) {
        if (!cli_read_int(a->vae_tile, 64, 8192, &n))
            return cli_usage_error(
                c, "--vae-tile is '%s'; expected auto, never or a whole number from 64 to 8192",
                a->vae_tile);
        *tile = (int32_t)n;
    }
    return check_names(c, a);
}

static int read_loras(gen_run *r)
{
    const cli_list *l = &r->a->lora;
    r->lora = ipt_calloc(r->c->ctx, l->n, sizeof *r->lora);
    r->lora_text = ipt_calloc(r->c->ctx, l->n, sizeof *r->lora_text);
    if (!r->lora || !r->lora_text)
        return cli_fail_status(r->c, IPT_ERR_NOMEM);
    for (size_t i = 0; i < l->n; i++) {
        ipt_status s = cli_lora_parse(r->c->ctx, l->item[i], &r->lora[i], &r->lora_text[i]);
        if (s != IPT_OK)
            return cli_fail_status(r->c, s);
    }
    return CLI_GO_ON;
}

/* The user's own LoRA folder, behind those of --lora-dir. */
static int add_lora_home(gen_run *r, gen_args *a)
{
    char data[PATH_MAX];
    if (!ipt_data_dir(data, sizeof data) ||
        !ipt_path_join(r->lora_home, sizeof r->lora_home, data, "loras"))
        return CLI_GO_ON;
    return cli_list_add(r->c->ctx, &a->lora_dir, r->lora_home)
               ? CLI_GO_ON
               : cli_fail_status(r->c, IPT_ERR_NOMEM);
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

static void fill_request(const gen_run *r, int32_t tile, ipt_request *q)
{
    const gen_args *a = r->a;
    ipt_request_init(q);
    q->model = a->model;
    q->vae = a->vae;
    q->taesd = a->taesd;
    q->config_dir = a->config_dir;
    q->prediction = a->prediction;
    q->prompt = a->prompt;
    q->negative = a->negative;
    q->width = a->width;
    q->height = a->height;
    q->steps = a->steps;
    q->cfg = a->cfg;
    q->cfg_rescale = a->cfg_rescale;
    q->clip_skip = a->clip_skip;
    q->seed = a->seed;
    q->count = r->count;
    q->sampler = a->sampler;
    q->schedule = a->schedule;
    q->rng = a->rng;
    q->init = a->init ? &r->init : NULL;
    q->mask = a->mask ? &r->mask : NULL;
    q->strength = a->strength;
    q->no_paste = a->no_paste;
    q->lora = r->lora;
    q->n_lora = a->lora.n;
    q->compose = a->compose;
    q->compose_opt = (const char *const *)a->compose_opt.item;
    q->n_compose_opt = a->compose_opt.n;
    q->lora_dirs = (const char *const *)a->lora_dir.item;
    q->n_lora_dirs = a->lora_dir.n;
    q->embedding_dirs = (const char *const *)a->embedding_dir.item;
    q->n_embedding_dirs = a->embedding_dir.n;
    q->vae_tile = tile;
    q->batch = a->batch;
    q->allow_partial = a->allow_partial;
    q->trace = a->trace;
    q->progress = cli_progress_show;
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

static json_t *report_json(const gen_run *r, const ipt_report *p)
{
    json_t *o = json_object(), *files = json_array(), *opts = json_array();
    for (size_t i = 0; i < r->n_done; i++)
        json_array_append_new(files, ipt_json_text(r->file[i]));
    for (size_t i = 0; i < r->a->compose_opt.n; i++)
        json_array_append_new(opts, ipt_json_text(r->a->compose_opt.item[i]));
    json_object_set_new(o, "model", ipt_json_text(p->model));
    json_object_set_new(o, "architecture", ipt_json_text(p->model_arch));
    json_object_set_new(o, "model_sha256", ipt_json_text(p->model_sha256));
    json_object_set_new(o, "seed", ipt_json_uint(p->seed));
    json_object_set_new(o, "files", files);
    json_object_set_new(o, "sheet", ipt_json_text(r->a->sheet));
    json_object_set_new(o, "width", json_integer(p->width));
    json_object_set_new(o, "height", json_integer(p->height));
    json_object_set_new(o, "steps", json_integer(p->steps));
    json_object_set_new(o, "sampler", ipt_json_text(p->sampler));
    json_object_set_new(o, "schedule", ipt_json_text(p->schedule));
    json_object_set_new(o, "rng", ipt_json_text(p->rng));
    json_object_set_new(o, "device", ipt_json_text(p->device));
    json_object_set_new(o, "precision", ipt_json_text(p->precision));
    json_object_set_new(o, "ms",
                        json_pack("{s:f, s:f, s:f, s:f, s:f}", "load", p->ms_load, "text",
                                  p->ms_text, "sample", p->ms_sample, "vae", p->ms_vae, "total",
                                  p->ms_total));
    json_object_set_new(o, "ms_per_step", json_real(p->ms_per_step));
    json_object_set_new(o, "ms_first_step", json_real(p->ms_first_step));
    json_object_set_new(o, "unet_evaluations", json_integer(p->n_eval));
    json_object_set_new(o, "unet_rows",
                        json_pack("{s:I, s:I, s:I}", "full", (json_int_t)p->rows_full, "shallow",
                                  (json_int_t)p->rows_shallow, "backward",
                                  (json_int_t)p->rows_backward));
    json_object_set_new(o, "peak_device_mib", json_real((double)p->peak_device_bytes / 1048576.0));
    json_object_set_new(o, "peak_host_mib", json_real((double)p->peak_host_bytes / 1048576.0));
    json_object_set_new(o, "plans_recorded", json_integer((json_int_t)p->n_plans_recorded));
    json_object_set_new(o, "bytes_uploaded", json_integer((json_int_t)p->bytes_uploaded));
    json_object_set_new(o, "adapters", adapters_json(p));
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
    if (r->a->precision && strcmp(r->a->precision, "f16") == 0)
        o.precision = IPT_PRECISION_F16;
    if (r->a->precision && strcmp(r->a->precision, "f32") == 0)
        o.precision = IPT_PRECISION_F32;
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
    ipt_request q;
    int32_t tile = 0;
    ipt_status s = IPT_OK;
    int rc = check_args(c, a, &tile);
    if (rc == CLI_GO_ON)
        rc = read_loras(r);
    if (rc == CLI_GO_ON)
        rc = add_lora_home(r, a);
    if (rc == CLI_GO_ON)
        rc = prepare_output(r);
    if (rc != CLI_GO_ON)
        return rc;
    if (a->sheet) {
        r->kept = ipt_calloc(c->ctx, (size_t)r->count, sizeof *r->kept);
        s = r->kept ? IPT_OK : IPT_ERR_NOMEM;
    }
    if (s == IPT_OK && a->init)
        s = ipt_image_load(c->ctx, a->init, &r->init);
    if (s == IPT_OK && a->mask)
        s = ipt_image_load(c->ctx, a->mask, &r->mask);
    if (s != IPT_OK)
        return cli_fail_status(c, s);
    cli_progress_init(&r->progress, c->quiet);
    fill_request(r, tile, &q);
    q.user = &r->progress;
    return make_pictures(r, &q);
}

static int run(cli *c, const cli_command *cmd, int argc, char **argv)
{
    gen_args a = {.cfg = (double)NAN, .strength = (double)NAN};
    gen_run r = {.c = c, .a = &a};
    ipt_status s = cli_random_seed(c->ctx, &a.seed); /* --seed overwrites it */
    int rc = s == IPT_OK ? cli_parse(c, cmd, argc, argv, &a, NULL) : cli_fail_status(c, s);
    r.count = a.count > 0 ? a.count : 1;
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
    ipt_image_finish(&r.init);
    ipt_image_finish(&r.mask);
    cli_list_finish(&a.lora);
    cli_list_finish(&a.compose_opt);
    cli_list_finish(&a.lora_dir);
    cli_list_finish(&a.embedding_dir);
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
        "  impasto generate -m sdxl/ -p \"a fox\" --init sketch.png --strength 0.6 -W 1024 -H 1024 "
        "-o fox.jpg\n"
        "  impasto generate -p \"a green pear\" --count 9 --sheet pears.png -o pear.png --json\n",
    .more = more_help,
    .run = run,
};
