/* cli/print.c - the one place that writes to standard output and standard error (progress.c draws
 * its bar): names and texts of files go through cli_put, which shows what a terminal would obey. */
#include "cli/cli.h"

#include <errno.h>
#include <jansson.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* --- text
 * --------------------------------------------------------------------------------------------- */
static void put_printable(FILE *f, const char *s)
{
    char piece[IPT_PRINTABLE];
    for (size_t n = 0; (n = ipt_printable_next(&s, piece)) > 0;)
        fwrite(piece, 1, n, f);
}

static void put(FILE *f, const char *fmt, va_list ap) IPT_PRINTF(2, 0);
static void put(FILE *f, const char *fmt, va_list ap)
{
    char small[512];
    va_list again;
    va_copy(again, ap);
    int n = vsnprintf(small, sizeof small, fmt, ap);
    char *text = n >= (int)sizeof small ? ipt_alloc(NULL, (size_t)n + 1) : NULL;
    if (text)
        vsnprintf(text, (size_t)n + 1, fmt, again);
    put_printable(f, text ? text : small); /* without memory: cut */
    ipt_free(text);
    va_end(again);
}

void cli_put(FILE *f, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    put(f, fmt, ap);
    va_end(ap);
}

void cli_line(FILE *f, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    put(f, fmt, ap);
    va_end(ap);
    fputc('\n', f);
}

void cli_own_text(const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    vprintf(fmt, ap);
    va_end(ap);
}

void cli_path_line(const char *path)
{
    if (isatty(STDOUT_FILENO) == 1)
        cli_line(stdout, "%s", path);
    else
        printf("%s\n", path); /* a script needs the name as it is */
    fflush(stdout);
}

/* --- JSON
 * --------------------------------------------------------------------------------------------- */
/* jansson leaves DEL, C1 and bidirectional controls as they are: inside strings, the only place
 * where they can stand, they become JSON's own escapes. */
static void put_json(const char *s)
{
    const char *from = s;
    for (uint32_t c; (c = ipt_utf8_next(&s)) != 0; from = s)
        if (c >= 0x20 && ipt_is_control(c))
            printf("\\u%04x", (unsigned)c);
        else
            fwrite(from, 1, (size_t)(s - from), stdout);
    putchar('\n');
}

static int stdout_failed(const cli *c)
{
    return cli_fail(c, IPT_ERR_OUTPUT, "cannot write to standard output: %s", strerror(errno));
}

int cli_print_json(const cli *c, json_t *o)
{
    char *text = o ? json_dumps(o, JSON_INDENT(2) | JSON_REAL_PRECISION(9)) : NULL;
    json_decref(o);
    if (!text)
        return cli_fail(c, IPT_ERR_NOMEM, "no memory for the result");
    put_json(text);
    free(text);
    return CLI_OK;
}

int cli_finish_output(const cli *c, int rc)
{
    /* an earlier flush may have failed: then only the stream's mark still tells */
    bool failed = fflush(stdout) != 0 || ferror(stdout);
    if (fclose(stdout) != 0) /* network file systems refuse at the end */
        failed = true;
    cli quiet = *c;
    quiet.json = false; /* nothing more fits there */
    return failed && rc == CLI_OK ? stdout_failed(&quiet) : rc;
}

/* --- failures
 * ------------------------------------------------------------------------------------------ */
static int report(const cli *c, const char *status, int code, const char *text)
{
    cli_line(stderr, "impasto: %s", text);
    if (c->json) {
        json_t *o = json_pack("{s:{s:s, s:o, s:i}}", "error", "status", status, "message",
                              ipt_json_text(text), "exit", code);
        char *dump = o ? json_dumps(o, JSON_INDENT(2)) : NULL;
        json_decref(o);
        if (dump)
            put_json(dump);
        free(dump);
    }
    return code;
}

int cli_fail(const cli *c, ipt_status s, const char *fmt, ...)
{
    char text[1024];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    return report(c, ipt_status_name(s), cli_exit_code(s), text);
}

int cli_fail_status(const cli *c, ipt_status s)
{
    const char *text = ipt_last_error(c->ctx);
    if (s == IPT_ERR_CANCELLED)
        text = cli_exit_code(s) == CLI_TERMINATED ? "terminated" : "interrupted";
    return report(c, ipt_status_name(s), cli_exit_code(s), text[0] ? text : ipt_status_name(s));
}

int cli_usage_error(const cli *c, const char *fmt, ...)
{
    char text[1024];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    return report(c, "usage", CLI_USAGE, text);
}

void cli_log(void *user, ipt_log_level level, const char *line)
{
    const cli *c = user;
    if (level == IPT_LOG_DEBUG || (level == IPT_LOG_INFO && !c->verbose) ||
        (level == IPT_LOG_WARN && c->quiet))
        return;
    cli_line(stderr, "impasto: %s%s", level == IPT_LOG_WARN ? "warning: " : "", line);
}
