/* cli/cmd_eval.c - impasto eval compose: pictures of sets of adapters by several methods, judged
 * and compared. */
#include "cli/cli.h"
#include "eval/report.h"

#include <jansson.h>
#include <limits.h>
#include <math.h>
#include <stdlib.h>

typedef struct eval_args {
    const char *methods, *world, *output, *device, *shard;
    bool draw, judge;
    int32_t sets, seeds, steps, vram_limit;
    double cfg;
} eval_args;

#define AT(member) offsetof(eval_args, member)
static const cli_option options[] = {
    {"methods", 0, CLI_TEXT, "LIST",
     "methods between ',', options after ':' and between ';' (default: base,single and all)",
     AT(methods), 0, 0, NULL},
    {"output", 'o', CLI_TEXT, "DIR", "pictures and reports (default: eval)", AT(output), 0, 0,
     NULL},
    {"sets", 0, CLI_INT, "N", "the first N sets (default: all)", AT(sets), 1, 10000, NULL},
    {"seeds", 0, CLI_INT, "N", "pictures of each set (default 5)", AT(seeds), 1, 1000, NULL},
    {"steps", 0, CLI_INT, "N", "steps of the sampler (default 20)", AT(steps), 1, 1000, NULL},
    {"cfg", 0, CLI_NUMBER, "G", "guidance (default 5)", AT(cfg), 0, 100, NULL},
    {"world", 0, CLI_TEXT, "DIR", "sets.json, judges, adapters, its model (default: models/eval)",
     AT(world), 0, 0, NULL},
    {"draw", 0, CLI_FLAG, NULL, "only draw: no judge, no report", AT(draw), 0, 0, NULL},
    {"judge", 0, CLI_FLAG, NULL, "only judge what is drawn already", AT(judge), 0, 0, NULL},
    {"shard", 0, CLI_TEXT, "I/N", "with --draw: only every N-th set from the I-th on", AT(shard), 0,
     0, NULL},
    {"device", 0, CLI_TEXT, "DEVICE", "index, \"cpu\" or part of a name; see impasto devices",
     AT(device), 0, 0, NULL},
    {"vram-limit", 0, CLI_INT, "MIB", "device memory to take at most", AT(vram_limit), 64, 1 << 24,
     NULL},
    {0},
};
#undef AT

static void show_progress(void *user, const ipt_progress *p) { cli_progress_show(user, p); }

static ipt_status evaluate(ipt_eval *v, bool draw, json_t **report)
{
    if (draw)
        IPT_TRY(ipt_eval_pictures(v));
    if (v->o.draw_only)
        return IPT_OK;
    IPT_TRY(ipt_eval_judge(v));
    IPT_TRY(ipt_eval_json(v, report));
    return ipt_eval_report(v, *report);
}

/* "I/N" as a number from 0 and a count; false: it is no such text. */
static bool read_shard(const char *text, int32_t *shard, int32_t *n)
{
    char *end = NULL;
    const long i = strtol(text, &end, 10), of = *end == '/' ? strtol(end + 1, &end, 10) : 0;
    *shard = (int32_t)(i - 1);
    *n = (int32_t)of;
    return *end == 0 && of >= 1 && of <= 10000 && i >= 1 && i <= of;
}

static int check(const cli *c, const eval_args *a, ipt_eval_opts *o)
{
    if (a->draw && a->judge)
        return cli_usage_error(c,
                               "--draw and --judge exclude each other; without both, both is done");
    if (a->shard && !a->draw)
        return cli_usage_error(c, "--shard needs --draw: judging needs the pictures of all sets");
    if (a->shard && !read_shard(a->shard, &o->shard, &o->n_shard))
        return cli_usage_error(c, "--shard is '%.40s'; expected I/N, I of 1 to N", a->shard);
    o->draw_only = a->draw;
    return CLI_GO_ON;
}

static int say(const cli *c, const ipt_eval *v, json_t *report)
{
    static const char *const files[] = {"eval.json", "table.md", "pictures.csv", "sheet.png"};
    char path[PATH_MAX];
    if (v->o.draw_only) {
        cli_line(stdout, "%zu pictures made, %zu were there", v->n_made, v->n_kept);
        return CLI_OK;
    }
    if (c->json)
        return cli_print_json(c, report);
    json_decref(report);
    if (!c->quiet && v->n_made + v->n_kept > 0)
        cli_line(stderr, "%zu pictures made, %zu were there", v->n_made, v->n_kept);
    if (!c->quiet)
        cli_line(stderr, "%zu judges on %s", v->n_judge, v->device);
    for (size_t i = 0; i < IPT_COUNT(files); i++)
        if (ipt_path_join(path, sizeof path, v->o.out, files[i]))
            cli_path_line(path);
    return CLI_OK;
}

static int run(cli *c, const cli_command *cmd, int argc, char **argv)
{
    eval_args a = {.output = "eval", .cfg = (double)NAN};
    cli_progress progress;
    ipt_eval v = {0};
    json_t *report = NULL;
    int rc = cli_parse(c, cmd, argc, argv, &a, NULL);
    if (rc != CLI_GO_ON)
        return rc;
    ipt_eval_opts o = {
        .world = a.world,
        .out = a.output,
        .methods = a.methods,
        .sets = a.sets,
        .seeds = a.seeds,
        .steps = a.steps,
        .cfg = a.cfg,
        .engine = {.device = a.device, .vram_limit = (uint64_t)a.vram_limit << 20},
        .progress = show_progress,
        .user = &progress,
    };
    rc = check(c, &a, &o);
    if (rc != CLI_GO_ON)
        return rc;
    cli_progress_init(&progress, c->quiet);
    ipt_status s = ipt_eval_open(c->ctx, &o, &v);
    if (s == IPT_OK)
        s = evaluate(&v, !a.judge, &report);
    cli_progress_end(&progress);
    if (s == IPT_OK) {
        rc = say(c, &v, report);
    } else {
        json_decref(report);
        rc = cli_fail_status(c, s);
    }
    ipt_eval_close(&v);
    return rc;
}

const cli_command cli_cmd_eval_compose = {
    .name = "eval compose",
    .brief = "compare composing methods by judges",
    .usage = "[--methods LIST] [--sets N] [--seeds N] [--draw | --judge] [-o DIR] [OPTION...]",
    .about =
        "Paints the sets of adapters of models/eval with each method from the same noise, "
        "lets judges, which saw\n"
        "other drawings than any generator, say what is in the pictures, and writes "
        "DIR/eval.json, table.md,\n"
        "pictures.csv and sheet.png.  Pictures that are there are not made again: the same "
        "command goes on\n"
        "where it was stopped.  \"base\" is the model without adapters, \"single\" each "
        "concept in a picture of its\n"
        "own.  With --draw and --judge pictures are drawn on one machine, by several processes, "
        "and judged on\n"
        "another.  docs/compose/README.md says what the figures mean.\n",
    .option = options,
    .example = "  impasto eval compose -o eval\n"
               "  impasto eval compose --methods \"merge,switch:tau=5,composite\" --sets 8 --seeds "
               "2 -o quick\n"
               "  impasto eval compose --draw --shard 1/6 -o eval\n",
    .run = run,
};
