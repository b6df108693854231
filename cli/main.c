/* cli/main.c - the program: which command, signals, how results and failures are printed. */
#include "cli/cli.h"

#include <errno.h>
#include <jansson.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <unistd.h>

static const cli_command *const commands[] = {
    &cli_cmd_generate,     &cli_cmd_devices,      &cli_cmd_model_inspect, &cli_cmd_model_bake,
    &cli_cmd_lora_inspect, &cli_cmd_lora_convert, &cli_cmd_lora_resize,   &cli_cmd_lora_merge,
    &cli_cmd_lora_extract, &cli_cmd_lora_profile, &cli_cmd_lora_hub,      &cli_cmd_tokenize,
    &cli_cmd_bench,        &cli_cmd_eval_compose};

/* What a signal handler may touch: the one place of the program that needs a global. */
static ipt_stop stop;
static volatile sig_atomic_t caught;

static void on_signal(int sig)
{
    caught = sig; /* SA_RESETHAND: the second one ends the process */
    ipt_stop_ask(&stop);
}

static void catch_signals(ipt_ctx *ctx)
{
    struct sigaction a = {.sa_handler = on_signal, .sa_flags = (int)(SA_RESETHAND | SA_RESTART)};
    ipt_ctx_listen(ctx, IPT_LISTEN_ALWAYS, &stop);
    sigemptyset(&a.sa_mask);
    sigaction(SIGINT, &a, NULL);
    sigaction(SIGTERM, &a, NULL);
    /* A closed pipe and a limit on file sizes are failed writes, not deaths without a message. */
    signal(SIGPIPE, SIG_IGN);
    signal(SIGXFSZ, SIG_IGN);
}

int cli_exit_code(ipt_status s)
{
    switch (s) {
    case IPT_OK:
        return CLI_OK;
    case IPT_ERR_ARG:
        return CLI_USAGE;
    case IPT_ERR_IO:
    case IPT_ERR_FORMAT:
    case IPT_ERR_SHAPE:
    case IPT_ERR_MISSING:
    case IPT_ERR_UNSUPPORTED:
        return CLI_BAD_INPUT;
    case IPT_ERR_NO_DEVICE:
        return CLI_NO_DEVICE;
    case IPT_ERR_OUTPUT:
        return CLI_OUTPUT;
    case IPT_ERR_NOMEM:
    case IPT_ERR_DEVICE_MEM:
    case IPT_ERR_DEVICE_LOST:
    case IPT_ERR_TOO_LARGE:
        return CLI_TRY_AGAIN;
    case IPT_ERR_CANCELLED:
        return 128 + (caught ? (int)caught : SIGINT);
    }
    return CLI_BAD_INPUT;
}

ipt_status cli_random_seed(ipt_ctx *ctx, uint64_t *seed)
{
    uint32_t v = 0;
    if (getentropy(&v, sizeof v) != 0)
        return ipt_fail(ctx, IPT_ERR_IO, "cannot draw a random seed: %s", strerror(errno));
    *seed = v;
    return IPT_OK;
}

static int print_help(void)
{
    cli_own_text(
        "usage: impasto COMMAND [OPTION...]\n\n"
        "Pictures from text with Stable Diffusion 1.x, 2.x and XL models and LoRA adapters, on "
        "any\n"
        "Vulkan device.\n\nCommands:\n");
    for (size_t i = 0; i < IPT_COUNT(commands); i++)
        cli_own_text("  %-15s %s\n", commands[i]->name, commands[i]->brief);
    cli_own_text("  %-15s %s\n  %-15s %s\n", "help COMMAND", "options and examples of a command",
                 "--version", "the version");
    cli_own_text(
        "\nExamples:\n"
        "  impasto generate -p \"a red apple, noto style, on a blue background\" -o apple.png\n"
        "  impasto generate -m sd15.safetensors -p \"a cat\" --lora style.safetensors:0.8 -o "
        "cat.png\n"
        "  impasto devices\n"
        "\nEnvironment: IMPASTO_MODEL, the model where none is given; XDG_CACHE_HOME/impasto "
        "(~/.cache/impasto),\npipelines and hashes; XDG_DATA_HOME/impasto/loras "
        "(~/.local/share/impasto/loras), LoRAs of <lora:name>.\n"
        "\nExit codes: 0 done, 2 usage, 64 bad input file, 69 no usable device, 73 cannot write "
        "output,\n"
        "75 try again later (out of memory, device lost), 130 interrupted, 143 terminated.\n");
    return CLI_OK;
}

/* The command named by the first one or two words; *used: how many. */
static const cli_command *find_command(int argc, char **argv, int *used)
{
    char two[128] = "";
    if (argc > 1)
        ipt_name(two, sizeof two, "%s %s", argv[0], argv[1]);
    for (size_t i = 0; i < IPT_COUNT(commands); i++) {
        *used = strchr(commands[i]->name, ' ') ? 2 : 1;
        if (strcmp(commands[i]->name, *used == 2 ? two : argv[0]) == 0)
            return commands[i];
    }
    return NULL;
}

/* The second words of the commands that begin with `first`, space separated; "": there are none. */
static void second_words(const char *first, char *buf, size_t n)
{
    size_t at = 0, len = strlen(first);
    buf[0] = 0;
    for (size_t i = 0; i < IPT_COUNT(commands) && at < n; i++)
        if (strncmp(commands[i]->name, first, len) == 0 && commands[i]->name[len] == ' ')
            at += (size_t)snprintf(buf + at, n - at, "%s%s", at ? " " : "",
                                   commands[i]->name + len + 1);
}

static int unknown_command(const cli *c, int argc, char **argv)
{
    char words[256] = "", near[64];
    size_t at = 0;
    second_words(argv[0], words, sizeof words);
    if (words[0] && argc > 1 && argv[1][0] != '-') {
        const char *hint = cli_nearest(argv[1], words, near, sizeof near);
        return hint ? cli_usage_error(
                          c, "unknown command '%s %s'; did you mean %s %s? See impasto help",
                          argv[0], argv[1], argv[0], hint)
                    : cli_usage_error(c, "unknown command '%s %s'; one of: %s %s; see impasto help",
                                      argv[0], argv[1], argv[0], words);
    }
    if (words[0])
        return cli_usage_error(c, "%s needs a second word: %s; see impasto %s %.*s --help", argv[0],
                               words, argv[0], (int)strcspn(words, " "), words);
    for (size_t i = 0; i < IPT_COUNT(commands) && at < sizeof words; i++) {
        const char *name = commands[i]->name;
        at +=
            (size_t)snprintf(words + at, sizeof words - at, "%.*s ", (int)strcspn(name, " "), name);
    }
    const char *hint = cli_nearest(argv[0], words, near, sizeof near);
    return hint ? cli_usage_error(c, "unknown command '%s'; did you mean %s? See impasto help",
                                  argv[0], hint)
                : cli_usage_error(c, "unknown command '%s'; see impasto help", argv[0]);
}

static int dispatch(cli *c, int argc, char **argv)
{
    int used = 0;
    bool help = argc > 0 && strcmp(argv[0], "help") == 0;
    if (argc == 0 || strcmp(argv[0], "--help") == 0 || strcmp(argv[0], "-h") == 0 ||
        (help && argc == 1))
        return print_help() == CLI_OK && argc == 0 ? CLI_USAGE : CLI_OK;
    if (strcmp(argv[0], "--version") == 0 || strcmp(argv[0], "version") == 0) {
        cli_own_text("%s", "impasto " IPT_VERSION "\n");
        return CLI_OK;
    }
    if (help) {
        argc--;
        argv++;
    }
    const cli_command *cmd = find_command(argc, argv, &used);
    if (!cmd)
        return unknown_command(c, argc, argv);
    if (help) {
        cli_help(cmd);
        return CLI_OK;
    }
    c->command = cmd->name;
    return cmd->run(c, cmd, argc - used, argv + used);
}

int main(int argc, char **argv)
{
    cli c = {.command = ""};
    for (int i = 1; i < argc && strcmp(argv[i], "--") != 0;
         i++) /* also mistakes are told as JSON */
        c.json = c.json || strcmp(argv[i], "--json") == 0;
    if (ipt_ctx_create(cli_log, &c, &c.ctx) != IPT_OK) {
        cli_line(stderr, "impasto: no memory");
        return CLI_TRY_AGAIN;
    }
    catch_signals(c.ctx);
    int rc = dispatch(&c, argc - 1, argv + 1);
    rc = cli_finish_output(&c, rc);
    ipt_ctx_destroy(&c.ctx);
    return rc;
}
