/* cli/cmd_hub.c - impasto lora hub: weights of several adapters for some pictures, as a request. */
#include "cli/cli.h"

#include <dirent.h>
#include <errno.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "engine/hub.h"

typedef struct hub_args {
    const char *images, *model, *prompt, *out, *device, *precision, *config_dir;
    int32_t evaluations, pairs, width, height;
    uint64_t seed;
    double penalty;
    bool allow_partial;
} hub_args;

/* --- pictures --------------------------------------------------------------------------------- */
typedef struct names {
    char *item[IPT_HUB_MAX_PICTURES + 1];
    size_t n;
} names;

static void names_finish(names *l)
{
    for (size_t i = 0; i < l->n; i++)
        ipt_free(l->item[i]);
}

static bool is_picture(const char *name)
{
    static const char *const endings[] = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".tga"};
    const char *dot = strrchr(name, '.');
    for (size_t i = 0; dot && name[0] != '.' && i < IPT_COUNT(endings); i++)
        if (strcasecmp(dot, endings[i]) == 0)
            return true;
    return false;
}

static int by_name(const void *a, const void *b)
{
    return strcmp(*(char *const *)a, *(char *const *)b);
}

/* The pictures of a folder by name; others than those that are read are passed over. */
static ipt_status list_pictures(ipt_ctx *ctx, const char *dir, names *out)
{
    char path[4096];
    DIR *d = opendir(dir);
    if (!d)
        return ipt_fail(ctx, IPT_ERR_IO, "--images %.200s: %s", dir, strerror(errno));
    ipt_status s = IPT_OK;
    for (struct dirent *e = readdir(d); e && s == IPT_OK; e = readdir(d)) {
        if (!is_picture(e->d_name) || !ipt_path_join(path, sizeof path, dir, e->d_name))
            continue;
        if (out->n == IPT_HUB_MAX_PICTURES)
            s = ipt_fail(ctx, IPT_ERR_ARG, "--images %.200s: found more than %d pictures", dir,
                         IPT_HUB_MAX_PICTURES);
        else if (!(out->item[out->n] = ipt_strdup(ctx, path)))
            s = IPT_ERR_NOMEM;
        else
            out->n++;
    }
    closedir(d);
    if (s == IPT_OK && out->n == 0)
        s = ipt_fail(ctx, IPT_ERR_MISSING,
                     "--images %.200s: found no .png, .jpg, .bmp, .gif, .ppm or .tga there", dir);
    qsort(out->item, out->n, sizeof *out->item, by_name);
    return s;
}

/* --- results ---------------------------------------------------------------------------------- */
static int print_result(const cli *c, const hub_args *a, const ipt_request *r, const ipt_hub *h)
{
    json_t *list = json_array();
    for (size_t i = 0; i < h->n; i++) {
        json_array_append_new(list, json_pack("{s:o, s:f}", "file", ipt_json_text(r->lora[i].path),
                                              "weight", h->weight[i]));
        if (!c->json)
            cli_line(stdout, "%-10.4f %s", h->weight[i], r->lora[i].path);
    }
    if (c->json)
        return cli_print_json(c, json_pack("{s:o, s:o, s:f, s:f, s:i, s:f}", "out",
                                           ipt_json_text(a->out), "adapters", list, "loss", h->loss,
                                           "loss_without", h->none, "evaluations",
                                           (int)h->evaluations, "ms", h->ms));
    json_decref(list);
    cli_line(stdout, "loss       %.6g, without them %.6g (%+.2f %%), %d evaluations in %.1f s",
             h->loss, h->none, 100 * (h->loss / h->none - 1), (int)h->evaluations, h->ms / 1000);
    cli_line(stdout, "written    %s", a->out);
    return CLI_OK;
}

/* --- run -------------------------------------------------------------------------------------- */
static ipt_status write_recipe(ipt_ctx *ctx, const char *path, const ipt_request *r,
                               const ipt_hub *h)
{
    ipt_arena arena;
    ipt_arena_init(&arena, ctx);
    char *text = ipt_hub_recipe(r, h, &arena);
    ipt_status s = text ? ipt_file_write(ctx, path, text, strlen(text)) : IPT_ERR_NOMEM;
    ipt_arena_finish(&arena);
    return s;
}

static ipt_status search(cli *c, const hub_args *a, const ipt_request *r, ipt_hub *h)
{
    names pictures = {.n = 0};
    ipt_engine *e = NULL;
    ipt_engine_opts eo = {.device = a->device};
    IPT_TRY(ipt_file_check_write(c->ctx, a->out));
    ipt_status s = list_pictures(c->ctx, a->images, &pictures);
    if (s == IPT_OK)
        s = ipt_engine_create(c->ctx, &eo, &e);
    if (s == IPT_OK) {
        ipt_hub_opts o = {.picture = (const char *const *)pictures.item,
                          .n_picture = pictures.n,
                          .pairs = a->pairs,
                          .evaluations = a->evaluations,
                          .penalty = a->penalty};
        s = ipt_hub_search(e, r, &o, h);
    }
    if (s == IPT_OK)
        s = write_recipe(c->ctx, a->out, r, h);
    ipt_engine_destroy(&e);
    names_finish(&pictures);
    return s;
}

static int with_request(cli *c, const hub_args *a, const cli_list *files)
{
    cli_progress p;
    ipt_request r;
    ipt_hub h;
    ipt_lora *lora = ipt_calloc(c->ctx, files->n, sizeof *lora);
    if (!lora)
        return cli_fail_status(c, IPT_ERR_NOMEM);
    for (size_t i = 0; i < files->n; i++)
        lora[i] = (ipt_lora){.path = files->item[i], .end = 1};
    cli_progress_init(&p, c->quiet);
    ipt_request_init(&r);
    r.model = a->model;
    r.config_dir = a->config_dir;
    r.prompt = a->prompt;
    r.width = a->width;
    r.height = a->height;
    r.seed = a->seed;
    r.precision = a->precision;
    r.allow_partial = a->allow_partial;
    r.lora = lora;
    r.n_lora = files->n;
    r.progress = cli_progress_show;
    r.user = &p;
    ipt_status s = search(c, a, &r, &h);
    cli_progress_end(&p);
    int rc = s == IPT_OK ? print_result(c, a, &r, &h) : cli_fail_status(c, s);
    ipt_free(lora);
    return rc;
}

static int run(cli *c, const cli_command *cmd, int argc, char **argv)
{
    hub_args a = {.seed = 42, .penalty = 0.05};
    cli_list files = {0};
    int rc = cli_parse(c, cmd, argc, argv, &a, &files);
    if (rc == CLI_GO_ON && (!a.out || !a.images || !a.prompt))
        rc = cli_usage_error(c, "expected --images DIR, --prompt TEXT and -o RECIPE.json; see "
                                "impasto lora hub --help");
    if (rc == CLI_GO_ON)
        rc = with_request(c, &a, &files);
    cli_list_finish(&files);
    return rc;
}

#define AT(m) offsetof(hub_args, m)
static const cli_option options[] = {
    {"images", 'i', CLI_TEXT, "DIR", "folder of pictures that the result is to be good at",
     AT(images), 0, 0, NULL},
    {"prompt", 'p', CLI_TEXT, "TEXT", "what they show, with the adapters' trigger words",
     AT(prompt), 0, 0, NULL},
    {"out", 'o', CLI_TEXT, "RECIPE.json", "the request with method, adapters and weights", AT(out),
     0, 0, NULL},
    {"model", 'm', CLI_TEXT, "MODEL", "model they are for (default: the built-in model)", AT(model),
     0, 0, NULL},
    {"config-dir", 0, CLI_TEXT, "DIR", "diffusers folder whose configs a single file follows",
     AT(config_dir), 0, 0, NULL},
    {"evaluations", 0, CLI_INT, "N", "weights that are tried, default 40", AT(evaluations), 1,
     100000, NULL},
    {"pairs", 0, CLI_INT, "K", "noise levels of each picture, default 4", AT(pairs), 1, 100, NULL},
    {"penalty", 0, CLI_NUMBER, "P", "of the mean size of the weights, default 0.05", AT(penalty), 0,
     100, NULL},
    {"seed", 's', CLI_SEED, "S", "of noise and search, default 42", AT(seed), 0, 0, NULL},
    {"width", 'W', CLI_INT, "W", "pixels (default: the model's)", AT(width), 8, 16384, NULL},
    {"height", 'H', CLI_INT, "H", "pixels (default: the model's)", AT(height), 8, 16384, NULL},
    {"precision", 0, CLI_CHOICE, "f16|f32|q8|auto", "storage of weights and activations",
     AT(precision), 0, 0, "auto f16 f32 q8"},
    {"device", 0, CLI_TEXT, "NAME", "number, part of a name, or cpu", AT(device), 0, 0, NULL},
    {"allow-partial", 0, CLI_FLAG, NULL, "take a LoRA of which some modules do not fit",
     AT(allow_partial), 0, 0, NULL},
    {0},
};

const cli_command cli_cmd_lora_hub = {
    .name = "lora hub",
    .brief = "weights of several adapters that suit some pictures (LoraHub)",
    .usage = "FILE... --images DIR -p TEXT -o RECIPE.json [-m MODEL] [--evaluations N]",
    .about =
        "LoraHub's product of sums, (sum w B) (sum w A), with the weights from -1.5 to 1.5 under "
        "which the\n"
        "model predicts the noise in the pictures best: a search without gradients from 0, in "
        "which "
        "every\n"
        "trial sees the same pictures, noise and noise levels. Scored is the mean squared error "
        "relative to\n"
        "that without adapters, plus the penalty times the mean size of the weights. Pictures are "
        "cut in the\n"
        "middle to the shape of the result. Takes N x pictures x K evaluations of the UNet; ctrl-C "
        "ends it.\n"
        "The recipe is a request: impasto generate --request RECIPE.json -p TEXT.\n",
    .option = options,
    .example = "  impasto lora hub a.safetensors b.safetensors --images photos -p \"a photo of sks "
               "dog\" \\\n"
               "      -m sd15.safetensors -o dog.json\n"
               "  impasto generate --request dog.json -p \"sks dog on a beach\" -o dog.png\n",
    .run = run,
    .min_args = 1,
    .max_args = 32,
};
