/* cli/cmd_inspect.c - impasto model inspect, lora inspect, tokenize: what a file is, before using
 * it. */
#include "cli/cli.h"

#include <jansson.h>
#include <string.h>

/* The description as JSON, or shown by `show`; takes text. */
static int print_description(const cli *c, char *text, void (*show)(const json_t *o))
{
    json_t *o = NULL;
    int rc = CLI_OK;
    ipt_status s = ipt_json_parse(c->ctx, "description", text, strlen(text), &o);
    ipt_free(text);
    if (s != IPT_OK)
        return cli_fail_status(c, s);
    if (c->json)
        return cli_print_json(c, o);
    show(o);
    json_decref(o);
    return rc;
}

static const char *member(const json_t *o, const char *key) { return ipt_json_str(o, key, "-"); }

static void field(const char *title, const char *value)
{
    cli_line(stdout, "%-15s %s", title, value);
}

/* The first items of a list, then how many more. */
static void show_list(const char *title, const json_t *list, size_t most)
{
    size_t n = json_array_size(list);
    if (n == 0)
        return;
    cli_line(stdout, "%s (%zu):", title, n);
    for (size_t i = 0; i < n && i < most; i++) {
        const json_t *item = json_array_get(list, i);
        if (json_is_string(item))
            cli_line(stdout, "  %s", json_string_value(item));
        else
            cli_line(stdout, "  %s: found %s, expected %s (%s)", member(item, "name"),
                     member(item, "found"), member(item, "expected"), member(item, "key"));
    }
    if (n > most)
        cli_line(stdout, "  ... and %zu more (see --json)", n - most);
}

/* --- model inspect -------------------------------------------------------------------------------
 */
static void show_component(const char *name, const json_t *p)
{
    const json_t *files = json_object_get(p, "files");
    cli_line(stdout,
             "%-15s %8.1f M values, %-5s %4lld weights bound, %lld missing, %lld misshaped, %lld "
             "unclaimed",
             name, ipt_json_num(p, "parameters", 0) / 1e6, member(p, "dtype"),
             (long long)ipt_json_int(p, "bound", 0),
             (long long)json_array_size(json_object_get(p, "missing")),
             (long long)json_array_size(json_object_get(p, "misshaped")),
             (long long)json_array_size(json_object_get(p, "unclaimed")));
    for (size_t i = 0; i < json_array_size(files) && i < 4; i++)
        field("", json_string_value(json_array_get(files, i)));
}

static void show_model(const json_t *o)
{
    const json_t *parts = json_object_get(o, "components");
    const char *name;
    json_t *p;
    bool assumed = ipt_json_bool(o, "prediction_assumed", false);
    field("file", member(o, "path"));
    cli_line(stdout, "%-15s %s, %s layout", "model", member(o, "architecture"),
             member(o, "layout"));
    cli_line(stdout, "%-15s %s%s", "prediction", member(o, "prediction"),
             assumed ? " (assumed: the files do not say)" : "");
    cli_line(stdout, "%-15s %lld x %lld", "picture size", (long long)ipt_json_int(o, "width", 0),
             (long long)ipt_json_int(o, "height", 0));
    json_object_foreach((json_t *)(uintptr_t)parts, name, p) show_component(name, p);
    json_object_foreach((json_t *)(uintptr_t)parts, name, p)
    {
        char title[80];
        show_list(ipt_name(title, sizeof title, "%s: missing", name), json_object_get(p, "missing"),
                  8);
        show_list(ipt_name(title, sizeof title, "%s: misshaped", name),
                  json_object_get(p, "misshaped"), 8);
        show_list(ipt_name(title, sizeof title, "%s: unclaimed", name),
                  json_object_get(p, "unclaimed"), 8);
    }
}

typedef struct inspect_args {
    const char *model, *config_dir, *file;
    bool energy;
} inspect_args;

static int run_model(cli *c, const cli_command *cmd, int argc, char **argv)
{
    inspect_args a = {0};
    cli_list args = {0};
    char *text = NULL;
    int rc = cli_parse(c, cmd, argc, argv, &a, &args);
    if (rc == CLI_GO_ON) {
        ipt_status s = ipt_model_describe(c->ctx, args.item[0], a.config_dir, &text);
        rc = s == IPT_OK ? print_description(c, text, show_model) : cli_fail_status(c, s);
    }
    cli_list_finish(&args);
    return rc;
}

/* --- lora inspect --------------------------------------------------------------------------------
 */
static void show_words(const json_t *list)
{
    if (json_array_size(list) == 0)
        return;
    cli_put(stdout, "%-15s", "trigger words");
    for (size_t i = 0; i < json_array_size(list) && i < 20; i++)
        cli_put(stdout, "%s %s", i ? "," : "", json_string_value(json_array_get(list, i)));
    cli_line(stdout, "%s", "");
}

static void show_embeddings(const json_t *list)
{
    for (size_t i = 0; i < json_array_size(list) && i < 20; i++) {
        const json_t *e = json_array_get(list, i);
        long long n = ipt_json_int(e, "text_encoder", 0), m = ipt_json_int(e, "text_encoder_2", 0);
        cli_line(stdout, "%-15s %s (%lld vectors%s)%s", i ? "" : "words inside", member(e, "word"),
                 n ? n : m,
                 m == 0 ? ""
                 : n    ? " for each text encoder"
                        : " for the second encoder",
                 ipt_json_bool(e, "usable", true) ? "" : ": not usable with this model");
    }
}

/* What fits, what does not by groups, what it was made for, values that are no numbers. */
static void show_fit(const json_t *o)
{
    const json_t *groups = json_object_get(o, "groups"), *nan = json_object_get(o, "nan");
    const char *made = ipt_json_str(o, "made_for", NULL), *says = ipt_json_str(o, "claims", NULL);
    size_t n_unmatched = json_array_size(json_object_get(o, "unmatched"));
    cli_line(stdout, "%-15s %lld/%lld keys in %lld modules%s", "will apply",
             (long long)ipt_json_int(o, "keys_applied", 0), (long long)ipt_json_int(o, "keys", 0),
             (long long)ipt_json_int(o, "matched", 0),
             ipt_json_int(o, "harmless", 0) ? " (the rest could change nothing)" : "");
    cli_line(stdout, "%-15s %lld matched, %zu keys unmatched%s, %zu with NaN", "modules",
             (long long)ipt_json_int(o, "matched", 0), n_unmatched,
             n_unmatched ? " (generate needs --allow-partial)" : "", json_array_size(nan));
    if (made)
        cli_line(stdout, "%-15s %s, by its keys", "made for", made);
    if (says)
        cli_line(stdout, "%-15s %.100s, by its metadata", made ? "" : "made for", says);
    for (size_t i = 0; i < json_array_size(groups); i++) {
        const json_t *g = json_array_get(groups, i);
        cli_line(stdout, "%-15s %lld keys %s* (first: %s)", i ? "" : "unmatched",
                 (long long)ipt_json_int(g, "keys", 0), member(g, "name"), member(g, "first"));
    }
    if (json_array_size(nan) > 0)
        cli_line(stdout, "%-15s %lld values in %zu tensors (first: %s): refused by generate",
                 "NaN or infinite", (long long)ipt_json_int(o, "nan_values", 0),
                 json_array_size(nan), json_string_value(json_array_get(nan, 0)));
}

/* Where its change is: the share of each block in the squared norm of all. */
static void show_energy(const json_t *energy)
{
    const char *comp, *block;
    json_t *part, *v;
    double total = ipt_json_num(energy, "total", 0);
    json_object_foreach((json_t *)(uintptr_t)energy, comp, part)
    {
        bool first = true;
        json_object_foreach(part, block, v)
        {
            if (first)
                cli_put(stdout, "%-15s", comp);
            cli_put(stdout, "%s %s %.1f %%", first ? "" : ",", block,
                    total > 0 ? 100 * json_number_value(v) / total : 0);
            first = false;
        }
        if (!first)
            cli_line(stdout, "%s", " of its energy");
    }
}

/* kohya's own note of the data's hash: another one means that tensors changed since. */
static const char *noted_hash(const json_t *o)
{
    const char *noted = ipt_json_str(json_object_get(o, "metadata"), "sshs_model_hash", NULL);
    if (!noted)
        return "";
    return strcmp(noted, member(o, "data_sha256")) == 0
               ? ", as its metadata says"
               : "; its metadata notes another: the tensors changed since";
}

static void show_lora(const json_t *o)
{
    const json_t *meta = json_object_get(o, "metadata");
    const char *key;
    json_t *v;
    int shown = 0;
    field("file", member(o, "path"));
    cli_line(stdout, "%-15s %s, %s", "adapter", member(o, "algorithm"), member(o, "family"));
    field("model", member(o, "model"));
    cli_line(stdout, "%-15s %lld..%lld, alpha %g..%g", "rank",
             (long long)ipt_json_int(o, "rank_min", 0), (long long)ipt_json_int(o, "rank_max", 0),
             ipt_json_num(o, "alpha_min", 0), ipt_json_num(o, "alpha_max", 0));
    show_fit(o);
    const json_t *by = json_object_get(o, "components");
    json_object_foreach((json_t *)(uintptr_t)by, key, v)
        cli_line(stdout, "%-15s %lld modules", key, (long long)json_integer_value(v));
    show_energy(json_object_get(o, "energy"));
    show_embeddings(json_object_get(o, "embeddings"));
    show_words(json_object_get(o, "trigger_words"));
    field("sha256", member(o, "sha256"));
    cli_line(stdout, "%-15s %s (A1111: %s%s)", "hash", member(o, "autov2"), member(o, "autov3"),
             noted_hash(o));
    json_object_foreach((json_t *)(uintptr_t)meta, key, v) if (shown++ < 12)
        cli_line(stdout, "  %s: %.100s", key, json_is_string(v) ? json_string_value(v) : "...");
}

static int run_lora(cli *c, const cli_command *cmd, int argc, char **argv)
{
    inspect_args a = {0};
    cli_list args = {0};
    char *text = NULL;
    int rc = cli_parse(c, cmd, argc, argv, &a, &args);
    if (rc == CLI_GO_ON) {
        ipt_status s =
            a.energy ? ipt_lora_describe_all(c->ctx, args.item[0], a.model, a.config_dir, &text)
                     : ipt_lora_describe(c->ctx, args.item[0], a.model, a.config_dir, &text);
        rc = s == IPT_OK ? print_description(c, text, show_lora) : cli_fail_status(c, s);
    }
    cli_list_finish(&args);
    return rc;
}

/* --- tokenize
 * -------------------------------------------------------------------------------------- */
static void show_tokens(const json_t *o)
{
    const json_t *lines = json_object_get(o, "lines");
    for (size_t i = 0; i < json_array_size(lines); i++) {
        const json_t *line = json_array_get(lines, i), *ids = json_object_get(line, "ids");
        const json_t *pieces = json_object_get(line, "pieces");
        cli_put(stdout, "%lld tokens:", (long long)ipt_json_int(line, "count", 0));
        for (size_t k = 0; k < json_array_size(ids); k++)
            cli_put(stdout, " %lld %s", (long long)json_integer_value(json_array_get(ids, k)),
                    json_string_value(json_array_get(pieces, k)));
        cli_line(stdout, "%s", "");
    }
}

/* Lines of a text, cut in place; *out [n] allocated.  A last line may lack its newline. */
static ipt_status split_lines(ipt_ctx *ctx, char *text, size_t size, const char ***out, size_t *n)
{
    size_t count = 0;
    for (size_t i = 0; i < size; i++)
        count += text[i] == '\n' || i + 1 == size;
    const char **line = ipt_calloc(ctx, count + 1, sizeof *line);
    if (!line)
        return IPT_ERR_NOMEM;
    *n = 0;
    for (char *p = text; p < text + size;) {
        char *end = memchr(p, '\n', (size_t)(text + size - p));
        end = end ? end : text + size;
        line[(*n)++] = p;
        if (end > p && end[-1] == '\r')
            end[-1] = 0;
        *end = 0; /* ipt_file_read put a NUL after the text */
        p = end + 1;
    }
    *out = line;
    return IPT_OK;
}

static int tokenize(cli *c, const inspect_args *a, const char *const *line, size_t n)
{
    char *text = NULL;
    ipt_status s = ipt_tokenize_describe(c->ctx, a->model, line, n, &text);
    return s == IPT_OK ? print_description(c, text, show_tokens) : cli_fail_status(c, s);
}

static int run_tokenize(cli *c, const cli_command *cmd, int argc, char **argv)
{
    inspect_args a = {0};
    cli_list args = {0};
    const char **line = NULL;
    char *text = NULL;
    size_t n = 0, size = 0;
    int rc = cli_parse(c, cmd, argc, argv, &a, &args);
    if (rc == CLI_GO_ON && (a.file != NULL) == (args.n > 0)) {
        rc = cli_usage_error(c, "give texts or --file LINES.txt; see impasto tokenize --help");
    } else if (rc == CLI_GO_ON && a.file) {
        ipt_status s = ipt_file_read(c->ctx, a.file, 64u << 20, &text, &size);
        if (s == IPT_OK)
            s = split_lines(c->ctx, text, size, &line, &n);
        rc = s == IPT_OK ? tokenize(c, &a, line, n) : cli_fail_status(c, s);
    } else if (rc == CLI_GO_ON) {
        rc = tokenize(c, &a, args.item, args.n);
    }
    ipt_free(line);
    ipt_free(text);
    cli_list_finish(&args);
    return rc;
}

static const cli_option model_options[] = {
    {"config-dir", 0, CLI_TEXT, "DIR", "diffusers folder whose configs a single file follows",
     offsetof(inspect_args, config_dir), 0, 0, NULL},
    {0},
};
static const cli_option lora_options[] = {
    {"model", 'm', CLI_TEXT, "MODEL",
     "model it is matched against (default: $IMPASTO_MODEL, else the built-in one)",
     offsetof(inspect_args, model), 0, 0, NULL},
    {"config-dir", 0, CLI_TEXT, "DIR", "diffusers folder whose configs a single file follows",
     offsetof(inspect_args, config_dir), 0, 0, NULL},
    {"energy", 0, CLI_FLAG, NULL,
     "where its change is, block by block, also when that takes more than seconds",
     offsetof(inspect_args, energy), 0, 0, NULL},
    {0},
};
static const cli_option token_options[] = {
    {"model", 'm', CLI_TEXT, "MODEL",
     "model whose tokenizer is used (default: $IMPASTO_MODEL, else the built-in one)",
     offsetof(inspect_args, model), 0, 0, NULL},
    {"file", 0, CLI_TEXT, "LINES.txt", "one text a line", offsetof(inspect_args, file), 0, 0, NULL},
    {0},
};

const cli_command cli_cmd_model_inspect = {
    .name = "model inspect",
    .brief = "architecture, components and missing or unclaimed weights of a model",
    .usage = "FILE|DIR [--config-dir DIR] [--json]",
    .about = "FILE is a .safetensors checkpoint, DIR a folder in diffusers layout.\n",
    .option = model_options,
    .example = "  impasto model inspect sd15.safetensors\n"
               "  impasto model inspect ./stable-diffusion-2-1 --json\n",
    .run = run_model,
    .min_args = 1,
    .max_args = 1,
};
const cli_command cli_cmd_lora_inspect = {
    .name = "lora inspect",
    .brief = "family, ranks, trigger words and fit of a LoRA file",
    .usage = "FILE [-m MODEL] [--energy] [--json]",
    .about =
        "Says what will apply, what fits nothing and what it was made for; hashes as A1111, kohya "
        "and\n"
        "Civitai have them; and, of small files or with --energy, the share of each block in the\n"
        "squared norm of its change (DoRA, OFT, IA3 and GLoRA need -m MODEL for that).\n",
    .option = lora_options,
    .example = "  impasto lora inspect style.safetensors -m sd15.safetensors\n"
               "  impasto lora inspect style.safetensors -m sd15.safetensors --json\n",
    .run = run_lora,
    .min_args = 1,
    .max_args = 1,
};
const cli_command cli_cmd_tokenize = {
    .name = "tokenize",
    .brief = "token ids, pieces and counts of texts",
    .usage = "[-m MODEL] TEXT... | --file LINES.txt [--json]",
    .about = "Ids include start and end and are not padded.\n",
    .option = token_options,
    .example = "  impasto tokenize \"a red apple\" \"a photo of a cat\"\n"
               "  impasto tokenize -m sd15.safetensors --file prompts.txt --json\n",
    .run = run_tokenize,
    .min_args = 0,
    .max_args = -1,
};
