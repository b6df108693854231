/* cli/cmd_profile.c - impasto lora profile: on which frequencies adapters act, kept beside their
 * files, as a plot and as an order. */
#include "cli/cli.h"
#include "cli/draw.h"

#include <jansson.h>
#include <stdlib.h>

#include "engine/profile.h"

typedef struct profile_args {
    const char *model, *prompt, *plot, *device, *precision;
    int32_t steps, seeds, width, height;
    uint64_t seed;
    bool forget;
} profile_args;

/* An adapter and what was measured. */
typedef struct entry {
    const char *file;
    ipt_profile p;
} entry;

/* --- the plot --------------------------------------------------------------------------------- */
enum { PLOT_W = 640, PLOT_H = 400, MARGIN = 24 };

/* Steps to the right, the share of high frequencies upwards, from the least to the most. */
static ipt_status plot(ipt_ctx *ctx, const char *path, const entry *e, size_t n)
{
    static const uint8_t axis[3] = {60, 60, 60};
    ipt_image im = {0};
    const double left = MARGIN, bottom = PLOT_H - MARGIN, wide = PLOT_W - 2 * MARGIN,
                 high = PLOT_H - 2 * MARGIN;
    double least = e[0].p.h[0], most = least;
    IPT_TRY(cli_draw_create(ctx, PLOT_W, PLOT_H, &im));
    for (size_t k = 0; k < n; k++)
        for (int32_t i = 0; i <= e[k].p.n_step; i++) {
            least = e[k].p.h[i] < least ? e[k].p.h[i] : least;
            most = e[k].p.h[i] > most ? e[k].p.h[i] : most;
        }
    double range = most > least ? most - least : 1;
    cli_draw_line(&im, left, bottom, left + wide, bottom, 2, axis);
    cli_draw_line(&im, left, bottom, left, bottom - high, 2, axis);
    for (size_t k = 0; k < n; k++)
        for (int32_t i = 0; i < e[k].p.n_step; i++)
            cli_draw_line(&im, left + wide * i / e[k].p.n_step,
                          bottom - high * (e[k].p.h[i] - least) / range,
                          left + wide * (i + 1) / e[k].p.n_step,
                          bottom - high * (e[k].p.h[i + 1] - least) / range, 2,
                          cli_series[k % CLI_SERIES].rgb);
    ipt_status s = ipt_image_save(ctx, path, &im, NULL, NULL);
    ipt_image_finish(&im);
    return s;
}

/* --- results ---------------------------------------------------------------------------------- */
static int by_high(const void *a, const void *b)
{
    double x = ((const entry *)a)->p.high, y = ((const entry *)b)->p.high;
    return x > y ? -1 : x < y;
}

static int print_all(const cli *c, const profile_args *a, const entry *e, size_t n)
{
    json_t *list = json_array();
    for (size_t k = 0; k < n; k++) {
        json_t *o = json_object(), *h = json_array();
        for (int32_t i = 0; i <= e[k].p.n_step; i++)
            json_array_append_new(h, json_real(e[k].p.h[i]));
        json_object_set_new(o, "file", ipt_json_text(e[k].file));
        json_object_set_new(o, "high", json_real(e[k].p.high));
        json_object_set_new(o, "high_frequencies", h);
        json_array_append_new(list, o);
        if (!c->json)
            cli_line(stdout, "%-8.6f %s%s%s%s", e[k].p.high, e[k].file, a->plot ? " (" : "",
                     a->plot ? cli_series[k % CLI_SERIES].name : "", a->plot ? ")" : "");
    }
    if (c->json)
        return cli_print_json(c, json_pack("{s:o}", "adapters", list));
    json_decref(list);
    return CLI_OK;
}

/* --- run -------------------------------------------------------------------------------------- */
static ipt_status measure(cli *c, const profile_args *a, ipt_engine *e, cli_progress *p,
                          const char *file, ipt_profile *out)
{
    ipt_lora l = {.path = file, .weight = 1, .te_weight = 1, .end = 1};
    ipt_profile_opts o = {.seeds = a->seeds, .keep = !a->forget};
    ipt_request r;
    (void)c;
    ipt_request_init(&r);
    r.model = a->model;
    r.prompt = a->prompt;
    r.steps = a->steps;
    r.width = a->width;
    r.height = a->height;
    r.seed = a->seed;
    r.precision = a->precision;
    r.lora = &l;
    r.n_lora = 1;
    r.progress = cli_progress_show;
    r.user = p;
    return ipt_profile_measure(e, &r, &o, out);
}

static int run(cli *c, const cli_command *cmd, int argc, char **argv)
{
    profile_args a = {0};
    cli_list args = {0};
    cli_progress p;
    ipt_engine *e = NULL;
    int rc = cli_parse(c, cmd, argc, argv, &a, &args);
    if (rc != CLI_GO_ON) {
        cli_list_finish(&args);
        return rc;
    }
    entry *list = ipt_calloc(c->ctx, args.n, sizeof *list);
    ipt_engine_opts o = {.device = a.device};
    cli_progress_init(&p, c->quiet);
    ipt_status s = list ? ipt_engine_create(c->ctx, &o, &e) : IPT_ERR_NOMEM;
    for (size_t i = 0; i < args.n && s == IPT_OK; i++) {
        list[i].file = args.item[i];
        s = measure(c, &a, e, &p, args.item[i], &list[i].p);
    }
    cli_progress_end(&p);
    if (s == IPT_OK)
        qsort(list, args.n, sizeof *list, by_high);
    if (s == IPT_OK && a.plot)
        s = plot(c->ctx, a.plot, list, args.n);
    rc = s == IPT_OK ? print_all(c, &a, list, args.n) : cli_fail_status(c, s);
    for (size_t i = 0; list && i < args.n; i++)
        ipt_profile_finish(&list[i].p);
    ipt_free(list);
    ipt_engine_destroy(&e);
    cli_list_finish(&args);
    return rc;
}

#define AT(m) offsetof(profile_args, m)
static const cli_option options[] = {
    {"model", 'm', CLI_TEXT, "MODEL", "model they are for (default: the built-in model)", AT(model),
     0, 0, NULL},
    {"prompt", 'p', CLI_TEXT, "TEXT", "what is drawn, with the trigger word of the adapters",
     AT(prompt), 0, 0, NULL},
    {"steps", 0, CLI_INT, "N", "sampler steps, default 20", AT(steps), 2, 1000, NULL},
    {"seeds", 0, CLI_INT, "K", "pictures of each, default 3", AT(seeds), 1, 100, NULL},
    {"seed", 's', CLI_SEED, "S", "of the first, default 0", AT(seed), 0, 0, NULL},
    {"width", 'W', CLI_INT, "W", "pixels (default: the model's)", AT(width), 8, 16384, NULL},
    {"height", 'H', CLI_INT, "H", "pixels (default: the model's)", AT(height), 8, 16384, NULL},
    {"precision", 0, CLI_CHOICE, "f16|f32|q8|auto", "storage of weights and activations",
     AT(precision), 0, 0, "auto f16 f32 q8"},
    {"device", 0, CLI_TEXT, "NAME", "number, part of a name, or cpu", AT(device), 0, 0, NULL},
    {"plot", 0, CLI_TEXT, "IMG", "the shares over the steps as a picture", AT(plot), 0, 0, NULL},
    {"no-note", 0, CLI_FLAG, NULL, "write nothing beside the files", AT(forget), 0, 0, NULL},
    {0},
};

const cli_command cli_cmd_lora_profile = {
    .name = "lora profile",
    .brief = "on which frequencies adapters act: the order of --compose cmlora",
    .usage = "FILE... [-m MODEL] [-p TEXT] [--plot IMG]",
    .about =
        "Draws pictures with each adapter alone and measures the latent before and after each "
        "step:\n"
        "the share of high frequencies (from a fifth of the largest radius on), and how much a "
        "step\n"
        "changes it on average. That number is printed, the highest first, and kept beside the "
        "file\n"
        "as FILE.profile.json, where --compose cmlora finds it: the highest take turns early, the\n"
        "others late.\n",
    .option = options,
    .example = "  impasto lora profile style.safetensors place.safetensors -m sd15.safetensors -p "
               "\"a sks photo\"\n"
               "  impasto lora profile *.safetensors --plot frequencies.png --no-note\n",
    .run = run,
    .min_args = 1,
    .max_args = 32,
};
