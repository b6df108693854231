/* cli/cmd_bench.c - impasto bench: figures of this machine. */
#include "bench/bench.h"
#include "bench/compare.h"
#include "cli/cli.h"

#include <string.h>

typedef struct bench_args {
    const char *device, *kernels, *config, *model, *precision, *lora_kind, *compare;
    int32_t width, height, batch, repeat, lora_rank, lora_count, steps, maps, regions;
    bool profile, composite;
} bench_args;

#define AT(field) offsetof(bench_args, field)
static const cli_option options[] = {
    {"config", 0, CLI_CHOICE, "sd15|sd21|sdxl", "configuration of unet and vae, default sd15",
     AT(config), 0, 0, "sd15 sd21 sdxl"},
    {"model", 'm', CLI_TEXT, "MODEL",
     "model of generate (default: $IMPASTO_MODEL, else the built-in one)", AT(model), 0, 0, NULL},
    {"width", 'W', CLI_INT, "W", "pixels, default 512", AT(width), 64, 4096, NULL},
    {"height", 'H', CLI_INT, "H", "pixels, default 512", AT(height), 64, 4096, NULL},
    {"batch", 0, CLI_INT, "N", "rows in one evaluation, default 1", AT(batch), 1, 64, NULL},
    {"steps", 0, CLI_INT, "N", "steps of generate, default 20", AT(steps), 1, 1000, NULL},
    {"precision", 0, CLI_CHOICE, "f16|f32|q8", "of weights, default f16", AT(precision), 0, 0,
     "f16 f32 q8"},
    {"repeat", 0, CLI_INT, "N", "measured runs, the median counts; default 5 (unet, vae: 3)",
     AT(repeat), 1, 1000, NULL},
    {"lora-rank", 0, CLI_INT, "R", "unet: also with LoRAs of this rank", AT(lora_rank), 1, 128,
     NULL},
    {"lora-count", 0, CLI_INT, "N", "how many of them, default 1", AT(lora_count), 1, 8, NULL},
    {"lora-kind", 0, CLI_CHOICE, "lora|lokr|krona", "of about as many values, default lora",
     AT(lora_kind), 0, 0, "lora lokr krona"},
    {"maps", 0, CLI_INT, "L",
     "unet: also the attention maps of level L - 1 and their gradient to the latent, one row",
     AT(maps), 1, 8, NULL},
    {"regions", 0, CLI_INT, "N",
     "unet with LoRAs: also bound to places, with N texts that are seen by place", AT(regions), 2,
     32, NULL},
    {"composite", 0, CLI_FLAG, NULL, "also all LoRAs as the rows of one batch", AT(composite), 0, 0,
     NULL},
    {"profile", 0, CLI_FLAG, NULL, "unet, vae: time by operator", AT(profile), 0, 0, NULL},
    {"compare", 0, CLI_TEXT, "FILE",
     "also against this earlier run, as --json printed it: new / old of each row", AT(compare), 0,
     0, NULL},
    {"device", 0, CLI_TEXT, "DEVICE", "index, \"cpu\" or part of a name", AT(device), 0, 0, NULL},
    {"kernels", 0, CLI_CHOICE, "simd|tile", "kernel shape, default by device", AT(kernels), 0, 0,
     "simd tile"},
    {0},
};
#undef AT

static double num(const json_t *o, const char *key) { return ipt_json_num(o, key, 0); }

/* --- tables ----------------------------------------------------------------------------------- */
enum { TEXT = -1 };
typedef struct column {
    const char *key, *title;
    int width, decimals; /* TEXT: left-aligned */
    double scale;
} column;
#define SHARES                                                                                     \
    {"gflops", "GFLOP/s", 9, 1, 1}, {"of_peak", "peak %", 7, 1, 100},                              \
    {                                                                                              \
        "of_bandwidth", "mem %", 7, 1, 100                                                         \
    }
static const column matrix_columns[] = {{"name", "", 27, TEXT, 0},
                                        {"m", "rows", 6, 0, 1},
                                        {"n", "columns", 8, 0, 1},
                                        {"k", "depth", 6, 0, 1},
                                        {"ms", "ms", 9, 2, 1},
                                        SHARES,
                                        {"sgemm_gflops", "sgemm", 8, 1, 1},
                                        {"of_sgemm", "of it %", 8, 1, 100},
                                        {0}};
static const column op_columns[] = {{"op", "operator", 15, TEXT, 0},
                                    {"name", "", 19, TEXT, 0},
                                    {"shape", "first operand", 16, TEXT, 0},
                                    {"ms", "ms", 10, 3, 1},
                                    SHARES,
                                    {0}};
static const column part_columns[] = {{"name", "", 28, TEXT, 0},
                                      {"batch", "batch", 5, 0, 1},
                                      {"ms", "ms", 10, 1, 1},
                                      SHARES,
                                      {"gmac", "GMAC", 8, 1, 1},
                                      {"arena_mib", "arena", 7, 0, 1},
                                      {"first_ms", "first ms", 9, 0, 1},
                                      {"ratio", "ratio", 7, 3, 1},
                                      {0}};
static const column profile_columns[] = {{"op", "  operator", 18, TEXT, 0},
                                         {"n", "nodes", 7, 0, 1},
                                         {"ms", "ms", 10, 1, 1},
                                         SHARES,
                                         {0}};
#undef SHARES

static const column *columns_of(const char *what)
{
    if (cli_has_word(what, "gemm conv"))
        return matrix_columns;
    return strcmp(what, "ops") == 0 ? op_columns : part_columns;
}

static void put_titles(FILE *f, const column *c)
{
    for (; c->key; c++)
        cli_put(f, c->decimals == TEXT ? "%-*s" : "%*s", c->width, c->title);
    cli_line(f, "%s", "");
}

/* What a row does not have, or has nothing of, is a dash. */
static void put_row(FILE *f, const column *c, const json_t *row)
{
    const char *note = ipt_json_str(row, "note", NULL);
    for (; c->key && !(note && c->decimals != TEXT); c++)
        if (c->decimals == TEXT)
            cli_put(f, "%-*s", c->width, ipt_json_str(row, c->key, ""));
        else if (num(row, c->key) > 0)
            cli_put(f, "%*.*f", c->width, c->decimals, c->scale * num(row, c->key));
        else
            cli_put(f, "%*s", c->width, "-");
    cli_line(f, "%s", note ? note : "");
}

typedef struct shown {
    const cli *c;
    const char *what;
} shown;

/* Rows are seen as they come; with --json beside it, and not with -q. */
static FILE *stream_of(const shown *s)
{
    return !s->c->json ? stdout : s->c->quiet ? NULL : stderr;
}

static void show_begin(void *user, const json_t *o)
{
    const json_t *peak = json_object_get(o, "peak");
    FILE *f = stream_of(user);
    if (!f)
        return;
    cli_put(f, "peak %.1f GFLOP/s", num(peak, "gflops"));
    if (num(peak, "matrix_gflops") > 0)
        cli_put(f, ", on matrix units %.1f", num(peak, "matrix_gflops"));
    cli_line(f, ", memory %.1f GB/s; shares of these (see --help):", num(peak, "gbytes"));
    put_titles(f, columns_of(((const shown *)user)->what));
}

static void show_row(void *user, const json_t *row)
{
    FILE *f = stream_of(user);
    if (!f)
        return;
    if (json_object_get(row, "first_step_ms"))
        cli_line(f,
                 "%-6s load %.0f ms, text %.0f ms, first step %.0f ms, step %.1f ms, vae %.0f ms, "
                 "total %.0f ms",
                 ipt_json_str(row, "name", ""), num(row, "load_ms"), num(row, "text_ms"),
                 num(row, "first_step_ms"), num(row, "ms_per_step"), num(row, "vae_ms"),
                 num(row, "ms"));
    else
        put_row(f, columns_of(((const shown *)user)->what), row);
    fflush(f);
}

static void show_end(const json_t *o)
{
    const json_t *ops = json_object_get(o, "profile");
    if (ops)
        put_titles(stdout, profile_columns);
    for (size_t i = 0; i < json_array_size(ops); i++)
        put_row(stdout, profile_columns, json_array_get(ops, i));
    cli_put(stdout, "%s%s%s", ipt_json_str(o, "device", ""),
            json_object_get(o, "kernels") ? ", kernels " : "", ipt_json_str(o, "kernels", ""));
    if (json_object_get(o, "peak_host_mib"))
        cli_put(stdout, ", peak device %.0f MiB, host %.0f MiB", num(o, "peak_device_mib"),
                num(o, "peak_host_mib"));
    if (json_object_get(o, "sgemm_threads"))
        cli_put(stdout, ", sgemm: OpenBLAS on %.0f threads", num(o, "sgemm_threads"));
    cli_line(stdout, "%s", "");
}

/* --- against an earlier run ------------------------------------------------------------------- */
static const column ratio_columns[] = {{"name", "new / old", 48, TEXT, 0},
                                       {"ms", "ms", 12, 3, 1},
                                       {"earlier_ms", "before", 12, 3, 1},
                                       {"ratio", "ratio", 9, 3, 1},
                                       {0}};

/* A string as it is, a number as JSON writes it. */
static void put_value(FILE *f, const json_t *v)
{
    if (json_is_integer(v))
        cli_put(f, "%" PRId64, (int64_t)json_integer_value(v));
    else
        cli_put(f, "%s", json_is_string(v) ? json_string_value(v) : "not said");
}

static void warn_of_differences(const cli *c, const json_t *differs)
{
    for (size_t i = 0; i < json_array_size(differs) && !c->quiet; i++) {
        const json_t *d = json_array_get(differs, i);
        cli_put(stderr, "impasto: warning: another %s: now ", ipt_json_str(d, "what", ""));
        put_value(stderr, json_object_get(d, "now"));
        cli_put(stderr, "%s", ", before ");
        put_value(stderr, json_object_get(d, "earlier"));
        cli_line(stderr, "%s", "");
    }
}

static void put_only(const char *when, const json_t *names)
{
    for (size_t i = 0; i < json_array_size(names); i++)
        cli_line(stdout, "only %s: %s", when, json_string_value(json_array_get(names, i)));
}

static void show_comparison(const json_t *o)
{
    const json_t *rows = json_object_get(o, "rows");
    put_titles(stdout, ratio_columns);
    for (size_t i = 0; i < json_array_size(rows); i++)
        put_row(stdout, ratio_columns, json_array_get(rows, i));
    put_only("now", json_object_get(o, "only_now"));
    put_only("before", json_object_get(o, "only_earlier"));
}

/* --- entry ------------------------------------------------------------------------------------ */
static int measure(cli *c, const bench_args *a, const char *what)
{
    bool whole = strcmp(what, "unet") == 0 || strcmp(what, "vae") == 0;
    json_t *out = NULL;
    shown to = {c, what};
    ipt_bench_opts o = {.what = what,
                        .device = a->device,
                        .kernels = a->kernels,
                        .config = a->config ? a->config : "sd15",
                        .model = a->model,
                        .width = a->width,
                        .height = a->height,
                        .batch = a->batch ? a->batch : 1,
                        .repeat = a->repeat ? a->repeat
                                  : whole   ? 3
                                            : 5,
                        .lora_rank = a->lora_rank    ? a->lora_rank
                                     : a->lora_count ? 8
                                                     : 0,
                        .lora_count = a->lora_count  ? a->lora_count
                                      : a->lora_rank ? 1
                                                     : 0,
                        .lora_kind = a->lora_kind ? a->lora_kind : "lora",
                        .weights = !a->precision                      ? IPT_F16
                                   : strcmp(a->precision, "f32") == 0 ? IPT_F32
                                   : strcmp(a->precision, "q8") == 0  ? IPT_Q8
                                                                      : IPT_F16,
                        .composite = a->composite,
                        .maps = a->maps,
                        .regions = a->regions,
                        .profile = a->profile,
                        .steps = a->steps,
                        .begin = show_begin,
                        .row = show_row,
                        .user = &to};
    json_t *earlier = NULL, *against = NULL;
    ipt_status s = a->compare ? ipt_bench_load(c->ctx, a->compare, what, &earlier) : IPT_OK;
    if (s == IPT_OK)
        s = ipt_bench_run(c->ctx, &o, &out);
    if (s == IPT_OK && earlier) {
        against = ipt_bench_compare(out, earlier);
        warn_of_differences(c, json_object_get(against, "differs"));
        json_object_set_new(out, "compare", against);
    }
    json_decref(earlier);
    if (s != IPT_OK)
        return cli_fail_status(c, s);
    if (c->json)
        return cli_print_json(c, out);
    show_end(out);
    if (against)
        show_comparison(against);
    json_decref(out);
    return CLI_OK;
}

static int run(cli *c, const cli_command *cmd, int argc, char **argv)
{
    static const char kinds[] = "gemm conv ops unet vae generate";
    bench_args a = {0};
    cli_list args = {0};
    int rc = cli_parse(c, cmd, argc, argv, &a, &args);
    if (rc == CLI_GO_ON && !cli_has_word(args.item[0], kinds))
        rc = cli_usage_error(c, "bench '%s' is unknown; one of: %s", args.item[0], kinds);
    if (rc == CLI_GO_ON && (a.width % 64 != 0 || a.height % 64 != 0) &&
        strcmp(args.item[0], "generate") != 0)
        rc = cli_usage_error(c, "bench: width and height are multiples of 64");
    if (rc == CLI_GO_ON)
        rc = measure(c, &a, args.item[0]);
    cli_list_finish(&args);
    return rc;
}

const cli_command cli_cmd_bench = {
    .name = "bench",
    .brief = "measure kernels, the UNet, the VAE or whole requests on this machine",
    .usage = "gemm|conv|ops|unet|vae|generate [OPTION...] [--json]",
    .about =
        "Weights are random except for generate.  gemm and conv stand beside OpenBLAS's sgemm "
        "where\n"
        "libopenblas.so.0 is installed.  Times are medians of warm runs; those of ops and of "
        "--profile\n"
        "are the device's own.\n"
        "\n"
        "What the device does at most is measured first: multiply-adds in f32, those of matrix "
        "units\n"
        "where products run on them, and memory read and written.  \"peak %\" is the share "
        "of the former\n"
        "that the row reaches, \"mem %\" that of the latter if inputs, weights and outputs "
        "were moved\n"
        "once.  A convolution by Winograd's method counts as the direct sum: it may pass 100.  "
        "Busy\n"
        "cores make peaks low and shares meaningless.\n",
    .option = options,
    .example =
        "  impasto bench gemm\n"
        "  impasto bench unet --config sd15 -W 512 -H 512 --profile\n"
        "  impasto bench unet --config sdxl -W 1024 -H 1024 --lora-rank 8 --lora-count 3 --json\n"
        "  impasto bench generate --json\n"
        "  impasto bench ops --json > before.json\n"
        "  impasto bench ops --compare before.json\n",
    .run = run,
    .min_args = 1,
    .max_args = 1,
};
