/* cli/cli.h - what the sub-commands share: exit codes, option tables, progress, results.
 *
 * Must not know: Vulkan, tensors.  Only cli/ and bench/ print.
 * Threads: all on the main thread. */
#ifndef IPT_CLI_CLI_H
#define IPT_CLI_CLI_H
#include "core/core.h"
#include "engine/impasto.h"

struct json_t;

enum {
    CLI_OK = 0,
    CLI_USAGE = 2,
    CLI_BAD_INPUT = 64,
    CLI_NO_DEVICE = 69,
    CLI_OUTPUT = 73,
    CLI_TRY_AGAIN = 75,
    CLI_TERMINATED = 143,
    CLI_GO_ON = -1, /* of cli_parse: the command may run */
};

typedef struct cli {
    ipt_ctx *ctx;
    const char *command; /* "generate", "lora inspect", "" before it is known */
    bool json, quiet, verbose;
} cli;

/* --- options (args.c)
 * ------------------------------------------------------------------------------ */
typedef struct cli_list {
    const char **item; /* [n]; points into argv */
    size_t n;
} cli_list;

typedef enum cli_type {
    CLI_FLAG,   /* bool */
    CLI_TEXT,   /* const char *, not empty */
    CLI_PROMPT, /* const char * */
    CLI_INT,    /* int32_t within min..max */
    CLI_NUMBER, /* double within min..max */
    CLI_SEED,   /* uint64_t; "random" or -1: drawn from the system */
    CLI_CHOICE, /* const char *, one word of `choices` */
    CLI_TILE,   /* int32_t: 0 "auto", -1 "never", or within min..max */
    CLI_REPEAT, /* cli_list of texts that are not empty */
    CLI_LATER,  /* known, but not in this version */
} cli_type;

typedef struct cli_option {
    const char *name; /* without dashes; NULL ends a table */
    char letter;      /* short form, 0: none */
    cli_type type;
    const char *value; /* how --help calls the value, NULL for flags */
    const char *help;
    size_t at; /* offset of the variable */
    double min, max;
    const char *choices; /* space separated; for CLI_LATER: what to use instead, or NULL */
} cli_option;

/* Another program's word for an option: a habit that need not be unlearnt. */
typedef struct cli_alias {
    const char *name, *option; /* without dashes; NULL ends a table */
} cli_alias;

typedef struct cli_command {
    const char *name;  /* "generate", "lora inspect" */
    const char *brief; /* one line for `impasto help` */
    const char *usage; /* after "impasto NAME " */
    const char *about; /* paragraphs, may be "" */
    const cli_option *option;
    const cli_alias *alias; /* may be NULL */
    const char *example;    /* ready lines */
    void (*more)(void);     /* further help on stdout, may be NULL */
    int (*run)(cli *c, const struct cli_command *cmd, int argc, char **argv);
    int min_args, max_args; /* positional arguments; max -1: any number */
} cli_command;

/* Reads argv[0..argc-1] into the struct at `into` and positional arguments into *args (may be NULL
 * when the command takes none).  --json, -q, --verbose and --help are understood by every command.
 * Returns CLI_GO_ON, or the exit code after having printed help or an error.  Lists:
 * cli_list_finish. */
int cli_parse(cli *c, const cli_command *cmd, int argc, char **argv, void *into, cli_list *args);
void cli_list_finish(cli_list *l);
IPT_CHECKED bool cli_list_add(ipt_ctx *ctx, cli_list *l, const char *v); /* false: no memory */
void cli_help(const cli_command *cmd);
/* Nearest of the space separated words, NULL when none is near; buf [n] holds it. */
const char *cli_nearest(const char *word, const char *words, char *buf, size_t n);
bool cli_has_word(const char *word, const char *words);

/* --- numbers (number.c)
 * -------------------------------------------------------------------------------------------- */
/* A whole number or a number, nothing after it; false otherwise. */
bool cli_read_int(const char *text, int64_t min, int64_t max, int64_t *out);
bool cli_read_number(const char *text, double min, double max, double *out);

/* --- results and failures (print.c)
 * -------------------------------------------------------------------------------------------- */
/* Printf of one line or a part of one.  Whatever a terminal would obey becomes a visible escape
 * (ipt_printable): arguments may come from files.  No newline in fmt: cli_line ends the line. */
void cli_put(FILE *f, const char *fmt, ...) IPT_PRINTF(2, 3);
void cli_line(FILE *f, const char *fmt, ...) IPT_PRINTF(2, 3);
/* Texts of this program on stdout, with their newlines: help. */
void cli_own_text(const char *fmt, ...) IPT_PRINTF(1, 2);
/* The name of a file that was written, on stdout: as it is for scripts, printable on a terminal. */
void cli_path_line(const char *path);
/* Prints the object on stdout and takes it. */
int cli_print_json(const cli *c, struct json_t *o);
/* Prints "impasto: ..." on one line of stderr (with --json also an object with "error" on stdout)
 * and returns the exit code. */
int cli_fail(const cli *c, ipt_status s, const char *fmt, ...) IPT_PRINTF(3, 4);
int cli_fail_status(const cli *c, ipt_status s); /* message of the ctx */
int cli_usage_error(const cli *c, const char *fmt, ...) IPT_PRINTF(2, 3);
void cli_log(void *c, ipt_log_level level, const char *line); /* an ipt_log_fn */
/* Closes stdout at the end of the program: rc, or CLI_OUTPUT with its message when something could
 * not be written there. */
int cli_finish_output(const cli *c, int rc);

/* --- the program (main.c)
 * -------------------------------------------------------------------------------------------- */
int cli_exit_code(ipt_status s);
/* Draws a seed of 32 bits, the range that other programs use. */
IPT_CHECKED ipt_status cli_random_seed(ipt_ctx *ctx, uint64_t *seed);

/* --- progress (progress.c)
 * -------------------------------------------------------------------------- */
typedef struct cli_progress {
    bool quiet, terminal, open; /* open: a bar stands on the current line */
    char stage[16];
    int32_t image, tenth;
    double last_ms;
} cli_progress;
void cli_progress_init(cli_progress *p, bool quiet);
void cli_progress_show(void *progress, const ipt_progress *p); /* an ipt_progress_fn */
void cli_progress_end(cli_progress *p);                        /* ends the line of a bar */

/* --- pieces of generate (lora_arg.c, sheet.c)
 * --------------------------------------------------------- */
/* FILE[:W[:TE_W]][,start=X][,end=X][,blocks=...][@WORD] -> *out; buf: copies, freed by the caller
 * with ipt_free.  Errors: IPT_ERR_ARG with a message. */
IPT_CHECKED ipt_status cli_lora_parse(ipt_ctx *ctx, const char *arg, ipt_lora *out, char **buf);
/* n pictures of one size side by side with gaps of 4 pixels; columns: the square root, rounded up.
 */
IPT_CHECKED ipt_status cli_sheet(ipt_ctx *ctx, const ipt_image *im, size_t n, ipt_image *out);

extern const cli_command cli_cmd_generate, cli_cmd_devices, cli_cmd_model_inspect,
    cli_cmd_model_bake, cli_cmd_lora_inspect, cli_cmd_lora_convert, cli_cmd_lora_resize,
    cli_cmd_lora_merge, cli_cmd_lora_extract, cli_cmd_lora_profile, cli_cmd_lora_hub,
    cli_cmd_tokenize, cli_cmd_bench, cli_cmd_eval_compose;
#endif
