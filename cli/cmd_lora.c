/* cli/cmd_lora.c - impasto lora convert, resize, merge, extract and model bake: adapter files in,
 * adapter files or a checkpoint out. */
#include "cli/cli.h"

#include <jansson.h>
#include <string.h>

#include "engine/lora_tools.h"

typedef struct lora_args {
    const char *model, *config_dir, *out, *format, *dtype; /* all commands */
    bool allow_partial;
    const char *to, *kron; /* convert */
    int32_t factor, rank, conv_rank;
    double keep;
    const char *method, *majority; /* merge */
    double density;
    uint64_t seed;
    const char *lego_norm, *lego_output, *lego_gauge;
    const char *base; /* extract */
    cli_list lora;    /* bake */
} lora_args;

/* --- what was done ---------------------------------------------------------------------------- */
static void show(const json_t *o)
{
    const json_t *e = json_object_get(o, "error");
    long long rank = ipt_json_int(o, "rank_max", 0);
    cli_line(stdout, "%-15s %s", "written", ipt_json_str(o, "out", "-"));
    cli_line(stdout, "%-15s %lld written, %lld of them exact", "modules",
             (long long)ipt_json_int(o, "modules", 0), (long long)ipt_json_int(o, "exact", 0));
    if (ipt_json_int(o, "empty", 0) > 0)
        cli_line(stdout, "%-15s %lld modules change nothing", "",
                 (long long)ipt_json_int(o, "empty", 0));
    if (ipt_json_int(o, "left_out", 0) > 0)
        cli_line(stdout, "%-15s %lld changes that this result does not hold", "left out",
                 (long long)ipt_json_int(o, "left_out", 0));
    if (rank > 0)
        cli_line(stdout, "%-15s %lld..%lld", "rank", (long long)ipt_json_int(o, "rank_min", 0),
                 rank);
    if (ipt_json_int(o, "clamped", 0) > 0)
        cli_line(stdout, "%-15s %lld modules have fewer ranks than --rank: all are kept", "",
                 (long long)ipt_json_int(o, "clamped", 0));
    if (!json_object_get(o, "autov3"))
        return;
    cli_line(stdout, "%-15s %.3g worst%s%s%s, %.3g mean, %.3g of the whole", "relative error",
             ipt_json_num(e, "worst", 0), ipt_json_num(e, "worst", 0) > 0 ? " (" : "",
             ipt_json_str(e, "worst_module", ""), ipt_json_num(e, "worst", 0) > 0 ? ")" : "",
             ipt_json_num(e, "mean", 0), ipt_json_num(e, "total", 0));
    cli_line(stdout, "%-15s %s (A1111: %s)", "hash", ipt_json_str(o, "autov2", "-"),
             ipt_json_str(o, "autov3", "-"));
}

static int report(const cli *c, ipt_status s, char *text)
{
    json_t *o = NULL;
    if (s == IPT_OK)
        s = ipt_json_parse(c->ctx, "report", text, strlen(text), &o);
    ipt_free(text);
    if (s != IPT_OK)
        return cli_fail_status(c, s);
    if (c->json)
        return cli_print_json(c, o);
    show(o);
    json_decref(o);
    return CLI_OK;
}

static ipt_lora_job job_of(const lora_args *a, cli_progress *p)
{
    return (ipt_lora_job){.model = a->model,
                          .config_dir = a->config_dir,
                          .out = a->out,
                          .format = a->format,
                          .dtype = a->dtype,
                          .allow_partial = a->allow_partial,
                          .progress = cli_progress_show,
                          .user = p};
}

/* Reads the arguments; CLI_GO_ON: the command may run. */
static int begin(cli *c, const cli_command *cmd, int argc, char **argv, lora_args *a,
                 cli_list *args)
{
    int rc = cli_parse(c, cmd, argc, argv, a, args);
    if (rc == CLI_GO_ON && !a->out)
        rc = cli_usage_error(c, "expected -o OUT, where the result goes; see impasto %s --help",
                             cmd->name);
    return rc;
}

/* --- convert, resize, extract ----------------------------------------------------------------- */
static int run_convert(cli *c, const cli_command *cmd, int argc, char **argv)
{
    lora_args a = {.factor = -1};
    cli_list args = {0};
    cli_progress p;
    char *text = NULL;
    int rc = begin(c, cmd, argc, argv, &a, &args);
    if (rc == CLI_GO_ON && !a.to)
        rc = cli_usage_error(c, "expected --to kohya, peft, diffusers, lora, lokr or krona; see "
                                "impasto lora convert --help");
    if (rc == CLI_GO_ON) {
        cli_progress_init(&p, c->quiet);
        ipt_lora_job job = job_of(&a, &p);
        ipt_lora_convert_opts o = {a.to, a.kron, a.rank, a.factor};
        ipt_status s = ipt_lora_convert(c->ctx, &job, args.item[0], &o, &text);
        cli_progress_end(&p);
        rc = report(c, s, text);
    }
    cli_list_finish(&args);
    return rc;
}

static int run_resize(cli *c, const cli_command *cmd, int argc, char **argv)
{
    lora_args a = {0};
    cli_list args = {0};
    cli_progress p;
    char *text = NULL;
    int rc = begin(c, cmd, argc, argv, &a, &args);
    if (rc == CLI_GO_ON) {
        cli_progress_init(&p, c->quiet);
        ipt_lora_job job = job_of(&a, &p);
        ipt_lora_resize_opts o = {a.rank, a.conv_rank, a.keep};
        ipt_status s = ipt_lora_resize(c->ctx, &job, args.item[0], &o, &text);
        cli_progress_end(&p);
        rc = report(c, s, text);
    }
    cli_list_finish(&args);
    return rc;
}

static int run_extract(cli *c, const cli_command *cmd, int argc, char **argv)
{
    lora_args a = {.rank = 32};
    cli_list args = {0};
    cli_progress p;
    char *text = NULL;
    int rc = begin(c, cmd, argc, argv, &a, &args);
    if (rc == CLI_GO_ON && !a.base)
        rc = cli_usage_error(c, "expected --base MODEL, what the LoRA is relative to; see impasto "
                                "lora extract --help");
    if (rc == CLI_GO_ON) {
        cli_progress_init(&p, c->quiet);
        a.model = a.base;
        ipt_lora_job job = job_of(&a, &p);
        ipt_lora_extract_opts o = {a.rank, a.conv_rank, a.keep};
        ipt_status s = ipt_lora_extract(c->ctx, &job, args.item[0], &o, &text);
        cli_progress_end(&p);
        rc = report(c, s, text);
    }
    cli_list_finish(&args);
    return rc;
}

/* --- several files: merge, bake --------------------------------------------------------------- */
typedef struct inputs {
    ipt_lora *lora; /* [n] */
    char **buf;     /* [n] what they point into */
    size_t n;
} inputs;

static void inputs_finish(inputs *in)
{
    for (size_t i = 0; in->buf && i < in->n; i++)
        ipt_free(in->buf[i]);
    ipt_free(in->lora);
    ipt_free(in->buf);
}

/* FILE[:W[:TE_W]]: what varies over steps, blocks and words cannot go into weights. */
static ipt_status inputs_read(ipt_ctx *ctx, const cli_list *l, inputs *in)
{
    in->lora = ipt_calloc(ctx, l->n + 1, sizeof *in->lora);
    in->buf = ipt_calloc(ctx, l->n + 1, sizeof *in->buf);
    if (!in->lora || !in->buf)
        return IPT_ERR_NOMEM;
    for (; in->n < l->n; in->n++) {
        ipt_lora *x = &in->lora[in->n];
        IPT_TRY(cli_lora_parse(ctx, l->item[in->n], x, &in->buf[in->n]));
        if (x->word || x->blocks || x->start > 0 || x->end < 1) {
            ipt_free(in->buf[in->n]);
            in->buf[in->n] = NULL;
            return ipt_fail(ctx, IPT_ERR_ARG,
                            "%.200s: found a word, steps or blocks; expected FILE[:W[:TE_W]]: "
                            "weights have none of these",
                            l->item[in->n]);
        }
    }
    return IPT_OK;
}

static int run_merge(cli *c, const cli_command *cmd, int argc, char **argv)
{
    lora_args a = {.density = 0.5};
    cli_list args = {0};
    inputs in = {0};
    cli_progress p;
    char *text = NULL;
    int rc = begin(c, cmd, argc, argv, &a, &args);
    if (rc == CLI_GO_ON) {
        cli_progress_init(&p, c->quiet);
        ipt_lora_job job = job_of(&a, &p);
        ipt_lora_merge_opts o = {.method = a.method,
                                 .majority = a.majority,
                                 .rank = a.rank,
                                 .density = a.density,
                                 .seed = a.seed,
                                 .lego_norm = a.lego_norm,
                                 .lego_output = a.lego_output,
                                 .lego_gauge = a.lego_gauge};
        ipt_status s = inputs_read(c->ctx, &args, &in);
        if (s == IPT_OK)
            s = ipt_lora_merge(c->ctx, &job, in.lora, in.n, &o, &text);
        cli_progress_end(&p);
        rc = report(c, s, text);
    }
    inputs_finish(&in);
    cli_list_finish(&args);
    return rc;
}

static int run_bake(cli *c, const cli_command *cmd, int argc, char **argv)
{
    lora_args a = {0};
    cli_list args = {0};
    inputs in = {0};
    cli_progress p;
    char *text = NULL;
    int rc = begin(c, cmd, argc, argv, &a, &args);
    if (rc == CLI_GO_ON && a.lora.n == 0)
        rc = cli_usage_error(c, "expected --lora FILE[:W[:TE_W]], once or more; see impasto model "
                                "bake --help");
    if (rc == CLI_GO_ON) {
        cli_progress_init(&p, c->quiet);
        a.model = args.item[0];
        ipt_lora_job job = job_of(&a, &p);
        ipt_status s = inputs_read(c->ctx, &a.lora, &in);
        if (s == IPT_OK)
            s = ipt_model_bake_loras(c->ctx, &job, in.lora, in.n, &text);
        cli_progress_end(&p);
        rc = report(c, s, text);
    }
    inputs_finish(&in);
    cli_list_finish(&a.lora);
    cli_list_finish(&args);
    return rc;
}

/* --- tables ----------------------------------------------------------------------------------- */
#define AT(field) offsetof(lora_args, field)
#define OUT_OPTION                                                                                 \
    {                                                                                              \
        "out", 'o', CLI_TEXT, "OUT", "where the result goes (peft: a new folder)", AT(out), 0, 0,  \
            NULL                                                                                   \
    }
#define MODEL_OPTIONS                                                                              \
    {"model",                                                                                      \
     'm',                                                                                          \
     CLI_TEXT,                                                                                     \
     "MODEL",                                                                                      \
     "model it is for (default: found by its keys); needed by DoRA, OFT, IA3, GLoRA",              \
     AT(model),                                                                                    \
     0,                                                                                            \
     0,                                                                                            \
     NULL},                                                                                        \
    {                                                                                              \
        "config-dir", 0, CLI_TEXT, "DIR", "diffusers folder whose configs a single file follows",  \
            AT(config_dir), 0, 0, NULL                                                             \
    }
#define FORMAT_OPTION                                                                              \
    {                                                                                              \
        "format", 0, CLI_CHOICE, "NAME", "names of the keys: kohya (default), peft, diffusers",    \
            AT(format), 0, 0, "kohya peft diffusers"                                               \
    }
#define DTYPE_OPTION(dflt)                                                                         \
    {                                                                                              \
        "dtype", 0, CLI_CHOICE, "TYPE", "same, f32, f16, bf16 (default: " dflt ")", AT(dtype), 0,  \
            0, "same f32 f16 bf16"                                                                 \
    }
#define PARTIAL_OPTION                                                                             \
    {                                                                                              \
        "allow-partial", 0, CLI_FLAG, NULL,                                                        \
            "take what fits of a file that does not fit as a whole", AT(allow_partial), 0, 0, NULL \
    }
#define KEEP_OPTION                                                                                \
    {                                                                                              \
        "keep", 0, CLI_NUMBER, "SHARE",                                                            \
            "smallest rank with this share of each module's Frobenius norm (kohya's sv_fro)",      \
            AT(keep), 0, 1, NULL                                                                   \
    }
enum { MAX_RANK = 8192 };

static const cli_option convert_options[] = {
    OUT_OPTION,
    {"to", 0, CLI_CHOICE, "WHAT",
     "kohya, peft, diffusers: other names, same tensors; lora, lokr, krona: another kind", AT(to),
     0, 0, "kohya peft diffusers lora lokr krona"},
    {"rank", 'r', CLI_INT, "R", "rank of what becomes LoRA", AT(rank), 1, MAX_RANK, NULL},
    {"factor", 0, CLI_INT, "N", "LyCORIS' factor of --to lokr; -1 cuts most evenly", AT(factor), -1,
     65536, NULL},
    {"kron", 0, CLI_TEXT, "A1xA2", "first factor of --to krona (default: 4x64 where it divides)",
     AT(kron), 0, 0, NULL},
    FORMAT_OPTION,
    DTYPE_OPTION("same"),
    MODEL_OPTIONS,
    PARTIAL_OPTION,
    {0},
};
static const cli_option resize_options[] = {
    OUT_OPTION,
    {"rank", 'r', CLI_INT, "R", "rank at most", AT(rank), 1, MAX_RANK, NULL},
    {"conv-rank", 0, CLI_INT, "R", "rank at most of convolutions (default: as --rank)",
     AT(conv_rank), 1, MAX_RANK, NULL},
    KEEP_OPTION,
    FORMAT_OPTION,
    DTYPE_OPTION("same"),
    MODEL_OPTIONS,
    PARTIAL_OPTION,
    {0},
};
static const cli_option merge_options[] = {
    OUT_OPTION,
    {"method", 0, CLI_CHOICE, "NAME", "how (default: cat), see above", AT(method), 0, 0,
     "cat svd linear ties dare dare_linear dare_ties magnitude_prune ties_svd dare_linear_svd "
     "dare_ties_svd magnitude_prune_svd lego lorahub"},
    {"rank", 'r', CLI_INT, "R",
     "rank of svd methods (default: the largest of the files) and of lego (the mean)", AT(rank), 1,
     MAX_RANK, NULL},
    {"density", 0, CLI_NUMBER, "SHARE", "values that ties, dare and pruning keep (default: 0.5)",
     AT(density), 0, 1, NULL},
    {"majority", 0, CLI_CHOICE, "HOW", "ties: signs by their total (default) or frequency",
     AT(majority), 0, 0, "total frequency"},
    {"seed", 0, CLI_SEED, "S", "of dare: the same seed, the same file (default: 0)", AT(seed), 0, 0,
     NULL},
    {"lego-norm", 0, CLI_CHOICE, "2|inf|off",
     "norm of its members that a centroid keeps (default: 2)", AT(lego_norm), 0, 0, "2 inf off"},
    {"lego-output", 0, CLI_CHOICE, "on|off", "times the root of mean rank / rank (default: on)",
     AT(lego_output), 0, 0, "on off"},
    {"lego-gauge", 0, CLI_CHOICE, "on|off",
     "compare ranks by what they change (default: on), else as they lie in the files",
     AT(lego_gauge), 0, 0, "on off"},
    FORMAT_OPTION,
    DTYPE_OPTION("that of the first file"),
    MODEL_OPTIONS,
    PARTIAL_OPTION,
    {0},
};
static const cli_option extract_options[] = {
    OUT_OPTION,
    {"base", 'b', CLI_TEXT, "MODEL", "what the LoRA is relative to", AT(base), 0, 0, NULL},
    {"rank", 'r', CLI_INT, "R", "rank of linear modules (default: 32)", AT(rank), 1, MAX_RANK,
     NULL},
    {"conv-rank", 0, CLI_INT, "R", "rank of 3 x 3 convolutions (default: they are left out)",
     AT(conv_rank), 1, MAX_RANK, NULL},
    KEEP_OPTION,
    FORMAT_OPTION,
    DTYPE_OPTION("f32"),
    {"config-dir", 0, CLI_TEXT, "DIR", "diffusers folder whose configs single files follow",
     AT(config_dir), 0, 0, NULL},
    {0},
};
static const cli_option bake_options[] = {
    OUT_OPTION,
    {"lora", 'l', CLI_REPEAT, "FILE[:W[:TE_W]]", "adapter of any kind and its weights, repeatable",
     AT(lora), 0, 0, NULL},
    DTYPE_OPTION("each tensor keeps its own"),
    {"config-dir", 0, CLI_TEXT, "DIR", "diffusers folder whose configs a single file follows",
     AT(config_dir), 0, 0, NULL},
    PARTIAL_OPTION,
    {0},
};

const cli_command cli_cmd_lora_convert = {
    .name = "lora convert",
    .brief = "the same adapter in other names, or as another kind",
    .usage = "FILE -o OUT --to kohya|peft|diffusers|lora|lokr|krona [--rank R]",
    .about =
        "Other names leave every tensor as it is, bit for bit; alpha goes where the format keeps "
        "it:\n"
        "  kohya      lora_unet_... .alpha: A1111, ComfyUI, kohya, LyCORIS; holds every kind\n"
        "  peft       a folder with adapter_config.json for PeftModel.from_pretrained; LoRA, DoRA\n"
        "  diffusers  unet... .lora_A.weight for load_lora_weights; LoRA, DoRA\n"
        "Another kind is the nearest one there is, and the error is told:\n"
        "  lora       the best of --rank R (truncated SVD); a LoRA without --rank stays as it is\n"
        "  lokr       LyCORIS' Kronecker product; of DiffuseKronA exactly, in a form all loaders "
        "read\n"
        "  krona      DiffuseKronA's; exactly where a lokr was made from one\n"
        "An adapter written here is read back before the command ends.\n",
    .option = convert_options,
    .example =
        "  impasto lora convert style.safetensors -o style_diffusers.safetensors --to diffusers\n"
        "  impasto lora convert style.safetensors -o style_peft --to peft\n"
        "  impasto lora convert lokr.safetensors -o lora.safetensors --to lora --rank 32 "
        "--dtype f16\n"
        "  impasto lora convert krona.safetensors -o lokr.safetensors --to lokr -m sd21\n",
    .run = run_convert,
    .min_args = 1,
    .max_args = 1,
};
const cli_command cli_cmd_lora_resize = {
    .name = "lora resize",
    .brief = "an adapter of lower rank, with the error it costs",
    .usage = "FILE -o OUT --rank R | --keep SHARE",
    .about =
        "Each module keeps its largest singular values: --rank at most so many, --keep as few as\n"
        "hold that share of its Frobenius norm, so that modules get ranks of their own. Kinds\n"
        "other than LoRA become LoRA and need --rank.\n",
    .option = resize_options,
    .example = "  impasto lora resize big.safetensors -o small.safetensors --rank 16\n"
               "  impasto lora resize big.safetensors -o small.safetensors --keep 0.9 --rank 64\n",
    .run = run_resize,
    .min_args = 1,
    .max_args = 1,
};
const cli_command cli_cmd_lora_merge = {
    .name = "lora merge",
    .brief = "several adapters as one file",
    .usage = "A[:W[:TE_W]] B[:W[:TE_W]]... -o OUT [--method NAME] [--rank R]",
    .about =
        "Methods, but for the last two with the names and numbers of PEFT's "
        "add_weighted_adapter:\n"
        "  cat        the weighted sum, exactly; ranks add up (and may differ)\n"
        "  svd        the best approximation of that sum of --rank R; any kinds and ranks\n"
        "  linear     sums of the factors themselves; one rank for all\n"
        "  ties       of each file the largest values (--density), then the majority's sign\n"
        "  dare       (dare_linear, dare_ties) random values dropped, the rest enlarged\n"
        "  magnitude_prune   the largest values, summed\n"
        "  ..._svd    ties, dare and pruning on the whole changes instead of the factors, "
        "then --rank\n"
        "  lego       (LoRA-LEGO) the ranks of all files clustered into --rank: like ranks "
        "become one\n"
        "             (a mean, not a sum); LoRA, LoCon and what has ranks of its own\n"
        "  lorahub    (LoraHub) the product of the factors' sums: quadratic in the weights, and "
        "ranks meet by\n"
        "             their place; impasto lora hub searches the weights\n"
        "Weights are factors: 1 leaves an adapter as it is. Changes of biases and norms are "
        "summed.\n",
    .option = merge_options,
    .example =
        "  impasto lora merge hero.safetensors:0.8 style.safetensors:0.6 -o both.safetensors\n"
        "  impasto lora merge a.safetensors b.safetensors -o ab.safetensors --method svd --rank "
        "32\n"
        "  impasto lora merge a.safetensors b.safetensors -o ab.safetensors --method ties_svd "
        "--density 0.3\n"
        "  impasto lora merge a.safetensors b.safetensors -o ab.safetensors --method lego --rank "
        "16\n",
    .run = run_merge,
    .min_args = 1,
    .max_args = 32,
};
const cli_command cli_cmd_lora_extract = {
    .name = "lora extract",
    .brief = "the difference of two models as a LoRA",
    .usage = "TUNED --base MODEL -o OUT [--rank R] [--conv-rank R]",
    .about =
        "TUNED and MODEL are checkpoints or diffusers folders of one architecture, in any of the\n"
        "layouts that are read. What a LoRA does not hold (biases, norms, convolutions without\n"
        "--conv-rank) counts as lost in the error of the whole.\n",
    .option = extract_options,
    .example = "  impasto lora extract anime.safetensors --base sd15.safetensors -o "
               "anime_lora.safetensors "
               "--rank 64\n"
               "  impasto lora extract tuned_dir --base base_dir -o lora.safetensors --rank 32 "
               "--conv-rank 16 --dtype f16\n",
    .run = run_extract,
    .min_args = 1,
    .max_args = 1,
};
const cli_command cli_cmd_model_bake = {
    .name = "model bake",
    .brief = "a model with adapters in its weights",
    .usage = "MODEL --lora FILE[:W[:TE_W]]... -o OUT [--dtype f16]",
    .about = "The result has MODEL's own layout: a single file, or a new folder with its "
             "configurations\n"
             "and tokenizers. Adapters of every kind; W is their strength, TE_W that in the text\n"
             "encoders. Tensors that no adapter touches keep their bits, metadata stays.\n",
    .option = bake_options,
    .example =
        "  impasto model bake sd15.safetensors --lora style.safetensors:0.8 -o "
        "sd15_style.safetensors\n"
        "  impasto model bake ./sdxl --lora a.safetensors --lora b.safetensors:0.5 -o ./sdxl_ab\n",
    .run = run_bake,
    .min_args = 1,
    .max_args = 1,
};
