/* tests/program.h - runs the program from outside: in a folder of its own, by fork and exec, with
 * its streams in files. */
#ifndef IPT_TESTS_PROGRAM_H
#define IPT_TESTS_PROGRAM_H
#include "tests/support.h"

#include <limits.h>
#include <sys/types.h>

/* What one run left behind. */
typedef struct result {
    int rc; /* exit code, 1000 + signal when killed */
    char *out, *err;
    size_t n_out;
} result;

typedef struct place {
    const char *program;
    char dir[PATH_MAX / 4];
    ipt_ctx *ctx;
    bool has_device;         /* what the library finds, not what the program says */
    const char *stdout_path; /* of the next runs; NULL: a file, read into result.out */
    const char *const *env;  /* "NAME=VALUE" of the next runs, NULL-terminated, or NULL */
} place;

/* cmocka group fixtures; `program` is the path of the program under test. */
int place_create(void **state, const char *program);
int place_destroy(void **state);
/* Skips, printing why, when this machine has no device. */
void need_device(const place *p);

const char *in(const place *p, char *buf, const char *name); /* buf: PATH_MAX */
void write_text(const place *p, const char *name, const void *data, size_t n);

pid_t program_start(const place *p, const char *const *args, bool no_device);
result program_finish(const place *p, pid_t pid);
result run_args(const place *p, const char *const *args);
#define RUN(p, ...) run_args(p, (const char *const[]){__VA_ARGS__, NULL})
void done(result *r);
/* Fails unless the run ended with rc and said one line "impasto: ..." that holds `text`.  Frees r.
 */
void expect_line(result *r, int rc, const char *text, const char *what);
#endif
