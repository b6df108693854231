/* tests/program.c - see program.h. */
#include "tests/program.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

enum { MAX_ARGS = 60 };

const char *in(const place *p, char *buf, const char *name)
{
    return ipt_name(buf, PATH_MAX, "%s/%s", p->dir, name);
}

void write_text(const place *p, const char *name, const void *data, size_t n)
{
    char path[PATH_MAX];
    assert_ok(p->ctx, ipt_file_write(p->ctx, in(p, path, name), data, n));
}

/* Child only: streams to files, then the program. */
static void become(const place *p, char **argv, bool no_device)
{
    char path[PATH_MAX];
    const char *to = p->stdout_path ? p->stdout_path : in(p, path, "stdout");
    int out = open(to, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    int err = open(in(p, path, "stderr"), O_WRONLY | O_CREAT | O_TRUNC, 0600);
    if (out < 0 || err < 0 || dup2(out, 1) < 0 || dup2(err, 2) < 0 || chdir(p->dir) != 0)
        _exit(126);
    if (no_device) {
        setenv("VK_DRIVER_FILES", "/dev/null", 1);
        setenv("VK_ICD_FILENAMES", "/dev/null", 1);
    }
    for (size_t i = 0; p->env && p->env[i]; i++) {
        char name[256];
        const char *value = strchr(p->env[i], '=');
        ipt_name(name, sizeof name, "%.*s", (int)(value - p->env[i]), p->env[i]);
        setenv(name, value + 1, 1);
    }
    execv(p->program, argv);
    _exit(127);
}

pid_t program_start(const place *p, const char *const *args, bool no_device)
{
    char *argv[MAX_ARGS + 2] = {NULL}, *copy[MAX_ARGS] = {NULL};
    size_t n = 0;
    argv[0] = strdup("impasto");
    for (; args[n]; n++) {
        assert_true(n < MAX_ARGS);
        argv[n + 1] = copy[n] = strdup(args[n]);
    }
    fflush(NULL);
    pid_t pid = fork();
    if (pid == 0)
        become(p, argv, no_device);
    for (size_t i = 0; i < n; i++)
        free(copy[i]);
    free(argv[0]);
    assert_true(pid > 0);
    return pid;
}

result program_finish(const place *p, pid_t pid)
{
    char path[PATH_MAX];
    int status = 0;
    size_t n = 0;
    result r = {0};
    while (waitpid(pid, &status, 0) < 0)
        assert_int_equal(errno, EINTR);
    r.rc = WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
    if (p->stdout_path)
        r.out = ipt_strdup(p->ctx, "");
    else
        assert_ok(p->ctx, ipt_file_read(p->ctx, in(p, path, "stdout"), 1 << 24, &r.out, &r.n_out));
    assert_ok(p->ctx, ipt_file_read(p->ctx, in(p, path, "stderr"), 1 << 24, &r.err, &n));
    return r;
}

result run_args(const place *p, const char *const *args)
{
    return program_finish(p, program_start(p, args, false));
}

void done(result *r)
{
    ipt_free(r->out);
    ipt_free(r->err);
}

void expect_line(result *r, int rc, const char *text, const char *what)
{
    const char *end = strchr(r->err, '\n');
    if (r->rc != rc || strncmp(r->err, "impasto: ", 9) != 0 || !end || end[1] != 0 ||
        !strstr(r->err, text))
        fail_msg("%s: exit %d, expected %d and one line with '%s'; said: %s", what, r->rc, rc, text,
                 r->err);
    done(r);
}

static void remove_all(const place *p)
{
    const char *argv[] = {"rm", "-rf", p->dir, NULL};
    pid_t pid = fork();
    if (pid == 0) {
        execl("/bin/rm", argv[0], argv[1], argv[2], (char *)NULL);
        _exit(127);
    }
    waitpid(pid, NULL, 0);
}

int place_create(void **state, const char *program)
{
    place *p = calloc(1, sizeof *p);
    const char *tmp = getenv("TMPDIR");
    ipt_gpu_info *list = NULL;
    size_t n = 0;
    if (!p)
        return -1;
    p->program = program;
    ipt_name(p->dir, sizeof p->dir, "%s/impasto-cli-XXXXXX", tmp ? tmp : "/tmp");
    if (!mkdtemp(p->dir))
        return -1;
    p->ctx = test_ctx();
    if (ipt_gpu_list(p->ctx, &list, &n) == IPT_OK)
        for (size_t i = 0; i < n; i++)
            p->has_device = p->has_device || list[i].usable;
    ipt_free(list);
    *state = p;
    return 0;
}

int place_destroy(void **state)
{
    place *p = *state;
    remove_all(p);
    ipt_ctx_destroy(&p->ctx);
    free(p);
    return 0;
}

void need_device(const place *p)
{
    if (p->has_device)
        return;
    print_message("skipped: no Vulkan device\n");
    skip();
}
