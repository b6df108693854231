/* tests/test_output.c - where results go: files behind links, devices, pipes, names of every
 * length, and that what cannot be written is told before anything is computed. */
#include "tests/support.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "engine/impasto.h"
#include "model_io/model_io.h"

typedef struct place {
    ipt_ctx *ctx;
    char dir[PATH_MAX / 4];
} place;

/* Exit code of a line of shell. */
static int shell(const char *line)
{
    int status = -1;
    fflush(NULL);
    pid_t pid = fork();
    if (pid == 0) {
        execl("/bin/sh", "sh", "-c", line, (char *)NULL);
        _exit(127);
    }
    while (waitpid(pid, &status, 0) < 0)
        assert_int_equal(errno, EINTR);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 1000;
}

static int set_up(void **state)
{
    place *p = calloc(1, sizeof *p);
    const char *tmp = getenv("TMPDIR");
    assert_non_null(p);
    ipt_name(p->dir, sizeof p->dir, "%s/impasto-output-XXXXXX", tmp ? tmp : "/tmp");
    assert_non_null(mkdtemp(p->dir));
    p->ctx = test_ctx();
    *state = p;
    return 0;
}

static int tear_down(void **state)
{
    place *p = *state;
    char command[PATH_MAX];
    ipt_ctx_destroy(&p->ctx);
    int rc = shell(ipt_name(command, sizeof command, "rm -rf '%s'", p->dir));
    free(p);
    return rc;
}

static const char *in(const place *p, char buf[PATH_MAX], const char *name)
{
    return ipt_name(buf, PATH_MAX, "%s/%s", p->dir, name);
}

static void expect_content(const place *p, const char *name, const char *text)
{
    char path[PATH_MAX], *data = NULL;
    size_t n = 0;
    assert_ok(p->ctx, ipt_file_read(p->ctx, in(p, path, name), 1 << 20, &data, &n));
    assert_string_equal(data, text);
    ipt_free(data);
}

static ipt_status write_text(const place *p, const char *path, const char *text)
{
    return ipt_file_write(p->ctx, path, text, strlen(text));
}

static void expect_refused(const place *p, const char *path, const char *why)
{
    assert_int_equal(ipt_file_check_write(p->ctx, path), IPT_ERR_OUTPUT);
    assert_non_null(strstr(ipt_last_error(p->ctx), why));
    assert_int_equal(write_text(p, path, "x"), IPT_ERR_OUTPUT);
    assert_non_null(strstr(ipt_last_error(p->ctx), why));
}

/* A link stays a link: its target is made or replaced, wherever it is. */
static void links_are_followed(void **state)
{
    place *p = *state;
    char path[PATH_MAX], to[PATH_MAX];
    struct stat st;
    static const struct {
        const char *link, *to, *file;
    } rows[] = {{"near", "target", "target"},
                {"far", "../%s/sub/other", "sub/other"},
                {"chain", "near2", "target2"},
                {"near2", "target2", "target2"}};
    assert_int_equal(mkdir(in(p, path, "sub"), 0700), 0);
    for (size_t i = 0; i < IPT_COUNT(rows); i++) {
        const char *last = strrchr(p->dir, '/') + 1;
        const char *text = strncmp(rows[i].to, "../", 3) == 0
                               ? ipt_name(to, sizeof to, "../%s/sub/other", last)
                               : rows[i].to;
        assert_int_equal(symlink(text, in(p, path, rows[i].link)), 0);
    }
    for (size_t i = 0; i < IPT_COUNT(rows); i++)
        for (int again = 0; again < 2; again++) {
            assert_ok(p->ctx, ipt_file_check_write(p->ctx, in(p, path, rows[i].link)));
            assert_ok(p->ctx, write_text(p, path, again ? "again" : "first"));
            assert_int_equal(lstat(path, &st), 0);
            assert_true(S_ISLNK(st.st_mode));
            expect_content(p, rows[i].file, again ? "again" : "first");
        }
    assert_int_equal(symlink("loop", in(p, path, "loop")), 0);
    expect_refused(p, path, strerror(ELOOP));
    assert_int_equal(symlink("nowhere/x", in(p, path, "broken")), 0);
    expect_refused(p, path, "folder");
}

static void *read_pipe(void *arg)
{
    char *buf = arg;
    int fd = open(buf, O_RDONLY | O_CLOEXEC);
    size_t at = 0;
    for (ssize_t n = 1; fd >= 0 && n > 0; at += (size_t)(n > 0 ? n : 0))
        n = read(fd, buf + at, PATH_MAX - 1 - at);
    buf[at] = 0;
    close(fd);
    return NULL;
}

/* Devices, pipes and open descriptors take the bytes; none of them is replaced by a file. */
static void devices_and_pipes_are_written(void **state)
{
    place *p = *state;
    char path[PATH_MAX], text[PATH_MAX];
    pthread_t reader;
    struct stat st;
    assert_ok(p->ctx, ipt_file_check_write(p->ctx, "/dev/null"));
    assert_ok(p->ctx, write_text(p, "/dev/null", "x"));
    assert_int_equal(stat("/dev/null", &st), 0);
    assert_true(S_ISCHR(st.st_mode));
    assert_int_equal(symlink("/dev/full", in(p, path, "full.png")), 0);
    assert_ok(p->ctx, ipt_file_check_write(p->ctx, path));
    assert_int_equal(write_text(p, path, "x"), IPT_ERR_OUTPUT);
    assert_non_null(strstr(ipt_last_error(p->ctx), strerror(ENOSPC)));
    assert_non_null(strstr(ipt_last_error(p->ctx), "full.png"));

    assert_int_equal(mkfifo(in(p, path, "pipe"), 0600), 0);
    ipt_name(text, sizeof text, "%s", path);
    assert_int_equal(pthread_create(&reader, NULL, read_pipe, text), 0);
    assert_ok(p->ctx, ipt_file_check_write(p->ctx, path));
    assert_ok(p->ctx, write_text(p, path, "through the pipe"));
    assert_int_equal(pthread_join(reader, NULL), 0);
    assert_string_equal(text, "through the pipe");
    assert_int_equal(lstat(path, &st), 0);
    assert_true(S_ISFIFO(st.st_mode));

    ipt_stop stop = {0}; /* nobody reads: the wait can be cancelled */
    ipt_ctx_listen(p->ctx, IPT_LISTEN_ALWAYS, &stop);
    ipt_stop_ask(&stop);
    assert_int_equal(write_text(p, path, "x"), IPT_ERR_CANCELLED);
    ipt_ctx_listen(p->ctx, IPT_LISTEN_ALWAYS, NULL);

    int fd = open(in(p, path, "open"), O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
    assert_int_equal(write(fd, "before ", 7), 7);
    ipt_name(text, sizeof text, "/dev/fd/%d", fd);
    assert_true(ipt_file_is_direct(text));
    assert_ok(p->ctx, write_text(p, text, "after"));
    ipt_name(text, sizeof text, "/proc/self/fd/%d", fd);
    assert_int_equal(symlink(text, in(p, path, "to-open")), 0);
    assert_ok(p->ctx, write_text(p, path, "!"));
    close(fd);
    expect_content(p, "open", "before after!");
    expect_refused(p, text, "not open for writing");
    assert_false(ipt_file_is_direct(in(p, path, "open")));
    assert_false(ipt_file_is_direct(in(p, path, "new")));
}

/* Every legal name can be written; one byte more is refused by the check already. */
static void names_of_every_length(void **state)
{
    place *p = *state;
    char path[PATH_MAX], name[300];
    for (size_t n = 200; n <= 257; n++) {
        memset(name, 'a', n);
        name[n] = 0;
        bool legal = n <= NAME_MAX;
        in(p, path, name);
        assert_int_equal(ipt_file_check_write(p->ctx, path), legal ? IPT_OK : IPT_ERR_OUTPUT);
        assert_int_equal(write_text(p, path, "x"), legal ? IPT_OK : IPT_ERR_OUTPUT);
        assert_int_equal(ipt_is_file(path), legal);
    }
    memset(path, 'b', sizeof path - 1);
    path[sizeof path - 1] = 0;
    expect_refused(p, path, ""); /* too long as a path */
}

static void refusals(void **state)
{
    place *p = *state;
    char path[PATH_MAX];
    expect_refused(p, p->dir, "is a folder");
    expect_refused(p, in(p, path, "not/there"), "its folder does not exist");
    expect_refused(p, in(p, path, "new/"), "");
    expect_refused(p, "", "without a name");
    assert_ok(p->ctx, write_text(p, in(p, path, "file"), "kept"));
    expect_refused(p, in(p, path, "file/x"), strerror(ENOTDIR));
    assert_int_equal(chmod(in(p, path, "file"), 0444), 0);
    assert_int_equal(chmod(p->dir, 0777), 0);
    fflush(NULL);
    pid_t pid = fork();
    if (pid == 0) /* root may write everywhere: as nobody */
        _exit((geteuid() == 0 && setuid(65534) != 0) ||
              ipt_file_check_write(NULL, path) != IPT_ERR_OUTPUT);
    int status = -1;
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_int_equal(status, 0);
    expect_content(p, "file", "kept");
}

/* Pictures and traces go the same way. */
static void every_kind_of_output(void **state)
{
    place *p = *state;
    char path[PATH_MAX];
    uint8_t rgb[12] = {1, 2, 3};
    float value = 1;
    struct stat st;
    ipt_image im = {2, 2, rgb}, back = {0};
    ipt_st_write t = {.name = "a", .dtype = IPT_ST_F32, .rank = 1, .dim = {1}, .data = &value};
    assert_ok(p->ctx, ipt_image_save(p->ctx, "/dev/null", &im, "text", "{}"));
    assert_int_equal(ipt_image_save(p->ctx, "/dev/full", &im, NULL, NULL), IPT_ERR_OUTPUT);
    assert_ok(p->ctx, ipt_safetensors_write(p->ctx, "/dev/null", &t, 1, NULL, 0));
    assert_int_equal(ipt_safetensors_write(p->ctx, "/dev/full", &t, 1, NULL, 0), IPT_ERR_OUTPUT);
    assert_int_equal(symlink("real.png", in(p, path, "link.png")), 0);
    assert_ok(p->ctx, ipt_image_save(p->ctx, path, &im, NULL, NULL));
    assert_int_equal(lstat(path, &st), 0);
    assert_true(S_ISLNK(st.st_mode));
    assert_ok(p->ctx, ipt_image_load(p->ctx, in(p, path, "real.png"), &back));
    ipt_image_finish(&back);
    int fd = open(in(p, path, "out"), O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
    ipt_name(path, sizeof path, "/dev/fd/%d", fd); /* no ending: a PNG */
    assert_ok(p->ctx, ipt_image_save(p->ctx, path, &im, NULL, NULL));
    close(fd);
    assert_ok(p->ctx, ipt_image_load(p->ctx, in(p, path, "out"), &back));
    assert_memory_equal(back.rgb, rgb, sizeof rgb);
    ipt_image_finish(&back);
}

#ifdef IPT_PROGRAM
/* Exit code of the program where it finds no device; its stderr is in the file "err". */
static int run(const place *p, const char *args)
{
    char command[2 * PATH_MAX];
    ipt_name(command, sizeof command,
             "cd '%s' && VK_DRIVER_FILES=/dev/null VK_ICD_FILENAMES=/dev/null '%s' generate -p x "
             "%s >out 2>err",
             p->dir, IPT_PROGRAM, args);
    return shell(command);
}

/* 69: no device, which is what a run finds whose names are right. */
static void program_checks_first(void **state)
{
    place *p = *state;
    char name[300], args[700], path[PATH_MAX];
    struct {
        const char *args;
        int rc;
        const char *said;
    } rows[] = {
        {"-o /dev/null", 69, ""},
        {"-o /dev/null --count 3", 69, ""},
        {"-o /dev/stdout", 69, ""},
        {"-o a.png --trace /dev/null", 69, ""},
        {"-o a.png --sheet a.png", 2, "--sheet a.png would replace"},
        {"-o a.png --count 2 --sheet a-2.png", 2, "--sheet a-2.png would replace"},
        {"-o a.png --trace a.png", 2, "--trace a.png would replace"},
        {"-o a.png --sheet b.png --trace b.png", 2, "same file"},
        {"-o sub", 2, "the name must end in"},
        {"-o sub.png", 73, "is a folder"},
        {"-o a.png --init a.png --no-paste", 2, "--no-paste needs --mask"},
        {"-o none/a.png", 73, "its folder does not exist"},
    };
    assert_int_equal(mkdir(in(p, path, "sub.png"), 0700), 0);
    for (size_t i = 0; i < IPT_COUNT(rows); i++) {
        char *err = NULL;
        size_t n = 0;
        int rc = run(p, rows[i].args);
        assert_ok(p->ctx, ipt_file_read(p->ctx, in(p, path, "err"), 1 << 20, &err, &n));
        if (rc != rows[i].rc || !strstr(err, rows[i].said))
            fail_msg("%s: exit %d, expected %d and '%s'; said: %s", rows[i].args, rc, rows[i].rc,
                     rows[i].said, err);
        ipt_free(err);
    }
    for (size_t n = 220; n <= 256; n += 3) { /* of the last of ten pictures: 3 bytes more */
        memset(name, 'a', n - 4);
        ipt_name(name + n - 4, 5, ".png");
        ipt_name(args, sizeof args, "-o %s", name);
        assert_int_equal(run(p, args), n <= NAME_MAX ? 69 : 73);
        ipt_name(args, sizeof args, "--count 10 -o %s", name);
        assert_int_equal(run(p, args), n + 3 <= NAME_MAX ? 69 : 73);
    }
}
#endif

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(links_are_followed, set_up, tear_down),
        cmocka_unit_test_setup_teardown(devices_and_pipes_are_written, set_up, tear_down),
        cmocka_unit_test_setup_teardown(names_of_every_length, set_up, tear_down),
        cmocka_unit_test_setup_teardown(refusals, set_up, tear_down),
        cmocka_unit_test_setup_teardown(every_kind_of_output, set_up, tear_down),
#ifdef IPT_PROGRAM
        cmocka_unit_test_setup_teardown(program_checks_first, set_up, tear_down),
#endif
    };
    return cmocka_run_group_tests_name("output", tests, NULL, NULL);
}
