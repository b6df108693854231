/* tests/test_hostile.c - what a file or a place does that is no file format: pipes and devices as
 * inputs, limits on file sizes, files that shrink while they are read, sizes that overflow, words
 * without end; and an engine that goes on after each refused request.  Runs IPT_PROGRAM by fork and
 * exec with a limit in time: a hang is a failure. */
#include "tests/support.h"

#include "compose/compose.h"
#include "engine/impasto.h"
#include "model_io/model_io.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define SD1 IPT_TEST_DATA "/models/sd1"
#define LORA IPT_TEST_DATA "/golden_lora_kohya.safetensors"
enum {
    SIDE = 16,
    MAX_ARGS = 40,
    PATIENCE_MS = 120 * 1000
}; /* sanitizers and a busy machine included */

typedef struct place {
    char dir[PATH_MAX / 4];
    ipt_ctx *ctx;
    rlim_t file_limit; /* bytes the program may write to one file; 0: any */
} place;

static const char *in(const place *p, char *buf, const char *name)
{
    return ipt_name(buf, PATH_MAX, "%s/%s", p->dir, name);
}

/* --- running ---------------------------------------------------------------------------------- */
/* Child only: streams to files, then the program. */
static void become(const place *p, char *const *argv)
{
    char path[PATH_MAX];
    int out = open(in(p, path, "stdout"), O_WRONLY | O_CREAT | O_TRUNC, 0600);
    int err = open(in(p, path, "stderr"), O_WRONLY | O_CREAT | O_TRUNC, 0600);
    if (out < 0 || err < 0 || dup2(out, 1) < 0 || dup2(err, 2) < 0 || chdir(p->dir) != 0)
        _exit(126);
    if (p->file_limit) {
        struct rlimit l = {p->file_limit, p->file_limit};
        setrlimit(RLIMIT_FSIZE, &l);
    }
    execv(IPT_PROGRAM, argv);
    _exit(127);
}

static pid_t start(const place *p, const char *const *args)
{
    char *argv[MAX_ARGS + 2] = {NULL};
    size_t n = 0;
    argv[0] = strdup("impasto");
    for (; args[n] && n < MAX_ARGS; n++)
        argv[n + 1] = strdup(args[n]);
    fflush(NULL);
    pid_t pid = fork();
    if (pid == 0)
        become(p, argv);
    for (size_t i = 0; i <= n; i++)
        free(argv[i]);
    assert_true(pid > 0);
    return pid;
}

static void wait_ms(long ms)
{
    nanosleep(&(struct timespec){.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000}, NULL);
}

/* Exit code, 1000 + signal when killed, -1 when it did not end in time. */
static int finish(pid_t pid)
{
    int status = 0;
    for (int t = 0; t < PATIENCE_MS; t += 10) {
        pid_t r = waitpid(pid, &status, WNOHANG);
        if (r == pid)
            return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
        assert_true(r == 0 || errno == EINTR);
        wait_ms(10);
    }
    kill(pid, SIGKILL);
    waitpid(pid, &status, 0);
    return -1;
}

/* Fails unless the run said exactly one line "impasto: ..." that holds `text` and ended with rc. */
static void expect_end(const place *p, int rc, int want, const char *text, const char *what)
{
    char path[PATH_MAX], *err = NULL;
    size_t n = 0;
    assert_ok(p->ctx, ipt_file_read(p->ctx, in(p, path, "stderr"), 1 << 24, &err, &n));
    const char *end = strchr(err, '\n');
    if (rc != want || strncmp(err, "impasto: ", 9) != 0 || !end || end[1] != 0 ||
        !strstr(err, text))
        fail_msg("%s: exit %d, expected %d and one line with '%s'; said: %s", what, rc, want, text,
                 err);
    ipt_free(err);
}

static void expect(const place *p, const char *const *args, int rc, const char *text)
{
    expect_end(p, finish(start(p, args)), rc, text, args[0]);
}
#define EXPECT(p, rc, text, ...) expect(p, (const char *const[]){__VA_ARGS__, NULL}, rc, text)
#define GENERATE "generate", "-q", "-p", "x", "--steps", "1", "-W", "16", "-H", "16", "-o", "x.png"

static int set_up(void **state)
{
    place *p = calloc(1, sizeof *p);
    const char *tmp = getenv("TMPDIR");
    if (!p)
        return -1;
    ipt_name(p->dir, sizeof p->dir, "%s/impasto-hostile-XXXXXX", tmp ? tmp : "/tmp");
    if (!mkdtemp(p->dir))
        return -1;
    p->ctx = test_ctx();
    *state = p;
    return 0;
}

static int tear_down(void **state)
{
    place *p = *state;
    pid_t pid = fork();
    if (pid == 0) {
        execl("/bin/rm", "rm", "-rf", p->dir, (char *)NULL);
        _exit(127);
    }
    waitpid(pid, NULL, 0);
    ipt_ctx_destroy(&p->ctx);
    free(p);
    return 0;
}

/* Asks Vulkan, not the program under test. */
static void need_device(place *p)
{
    ipt_gpu *gpu = NULL;
    ipt_gpu_opts o = {.device = getenv("IPT_TEST_DEVICE"), .cache_dir = ""};
    ipt_status s = ipt_gpu_create(p->ctx, &o, &gpu);
    ipt_gpu_destroy(&gpu);
    if (s == IPT_ERR_NO_DEVICE) {
        print_message("skipped: %s\n", ipt_last_error(p->ctx));
        skip();
    }
    assert_ok(p->ctx, s);
}

/* Copy of a safetensors file as f32; `edit` may change dims, values lie in room for 4096 more. */
static void copy_with(const place *p, const char *from, const char *to,
                      void (*edit)(ipt_st_write *t, float *values))
{
    char path[PATH_MAX];
    ipt_safetensors *st = NULL;
    assert_ok(p->ctx, ipt_safetensors_open(p->ctx, from, &st));
    size_t n = ipt_safetensors_count(st);
    ipt_st_write *w = calloc(n, sizeof *w);
    float **values = calloc(n, sizeof *values);
    assert_true(w && values);
    for (size_t i = 0; i < n; i++) {
        const ipt_st_tensor *t = ipt_safetensors_at(st, i);
        values[i] = calloc(t->count + 4096, sizeof **values);
        assert_non_null(values[i]);
        ipt_st_to_f32(t, 0, t->count, values[i]);
        w[i] = (ipt_st_write){
            .name = t->name, .dtype = IPT_ST_F32, .rank = t->rank, .data = values[i]};
        memcpy(w[i].dim, t->dim, sizeof t->dim);
        edit(&w[i], values[i]);
    }
    assert_ok(p->ctx, ipt_safetensors_write(p->ctx, in(p, path, to), w, n, NULL, 0));
    for (size_t i = 0; i < n; i++)
        free(values[i]);
    free(values);
    free(w);
    ipt_safetensors_close(&st);
}

/* --- what is no file -------------------------------------------------------------------------- */
/* Every option that takes a file, given `path`: one sentence, and no waiting for anybody. */
static void refuse_everywhere(const place *p, const char *path, const char *what)
{
    EXPECT(p, 64, what, "model", "inspect", path);
    EXPECT(p, 64, what, "lora", "inspect", path);
    EXPECT(p, 64, what, "lora", "inspect", path, "-m", SD1);
    EXPECT(p, 64, what, GENERATE, "-m", path);
    EXPECT(p, 64, what, GENERATE, "-m", SD1, "--vae", path);
    EXPECT(p, 64, what, GENERATE, "-m", SD1, "--init", path);
    EXPECT(p, 64, what, GENERATE, "-m", SD1, "--init", "ok.png", "--mask", path);
}

static void no_regular_files(void **state)
{
    place *p = *state;
    char path[PATH_MAX];
    static uint8_t grey[3] = {128, 128, 128};
    const ipt_image one = {1, 1, grey};
    assert_ok(p->ctx, ipt_image_save(p->ctx, in(p, path, "ok.png"), &one, NULL, NULL));
    assert_int_equal(mkfifo(in(p, path, "pipe"), 0600), 0);
    refuse_everywhere(p, "pipe", "pipe: this is a named pipe, expected a");
    refuse_everywhere(p, "/dev/zero", "/dev/zero: this is a device, expected a");
    EXPECT(p, 64, "folder", GENERATE, "-m", SD1, "--init", ".");
    /* inside folders, where a pipe counts as absent */
    assert_int_equal(mkdir(in(p, path, "model"), 0700), 0);
    assert_int_equal(mkdir(in(p, path, "model/unet"), 0700), 0);
    assert_int_equal(mkfifo(in(p, path, "model/unet/config.json"), 0600), 0);
    EXPECT(p, 64, "unet/config.json not found", "model", "inspect", "model");
    EXPECT(p, 64, "model", GENERATE, "-m", "model");
}

static void no_regular_files_on_a_device(void **state)
{
    place *p = *state;
    char path[PATH_MAX];
    need_device(p);
    assert_int_equal(mkfifo(in(p, path, "pipe.safetensors"), 0600), 0);
    EXPECT(p, 64, "named pipe", GENERATE, "-m", SD1, "--taesd", "pipe.safetensors");
    EXPECT(p, 64, "named pipe", GENERATE, "-m", SD1, "--lora", "pipe.safetensors");
    EXPECT(p, 64, "named pipe", "generate", "-q", "-p", "a pipe", "-m", SD1, "--embedding-dir",
           ".");
}

/* A limit on file sizes is a failed write like any other: exit 73, nothing left behind. */
static void file_size_limit(void **state)
{
    place *p = *state, limited = *p;
    char path[PATH_MAX];
    need_device(p);
    limited.file_limit = 512; /* stderr and stdout are shorter */
    int rc = finish(start(&limited, (const char *const[]){GENERATE, "-m", SD1, NULL}));
    if (rc == 1000 + SIGBUS) { /* lavapipe of Mesa 25: memory of memfd_create, cut by ftruncate */
        print_message("the driver keeps its memory in files and cannot live with the limit\n");
        skip();
    }
    expect_end(&limited, rc, 73, "x.png: cannot write: File too large", "generate");
    EXPECT(&limited, 73, "t.safetensors: cannot write: File too large", GENERATE, "-m", SD1,
           "--trace", "t.safetensors");
    pid_t pid = fork(); /* no x.png.1234-abc.part */
    if (pid == 0) {
        execl("/bin/sh", "sh", "-c", "ls \"$1\" | grep -q part && exit 9; exit 0", "sh", p->dir,
              (char *)NULL);
        _exit(127);
    }
    assert_int_equal(finish(pid), 0);
    assert_false(ipt_is_file(in(p, path, "x.png")));
}

/* --- sizes ------------------------------------------------------------------------------------ */
/* The UNet's input of added conditions is six numbers narrower than the pooled text alone (10): six
 * embedded sizes of -1 value each. */
static void narrow_label(ipt_st_write *t, float *values)
{
    (void)values;
    if (strstr(t->name, "label_emb.0.0.weight"))
        t->dim[1] = 10 - 6;
}

static void added_conditions(void **state)
{
    place *p = *state;
    char path[PATH_MAX];
    ipt_model *m = NULL;
    copy_with(p, IPT_TEST_DATA "/model_sdxl_single_f16.safetensors", "narrow.safetensors",
              narrow_label);
    assert_int_equal(ipt_model_open(p->ctx, in(p, path, "narrow.safetensors"), NULL, &m),
                     IPT_ERR_SHAPE);
    EXPECT(p, 64, "label_emb", GENERATE, "-m", "narrow.safetensors");
    EXPECT(p, 64, "label_emb", "model", "inspect", "narrow.safetensors");
}

/* --- bombs ------------------------------------------------------------------------------------ */
static void write_text(const place *p, const char *name, const void *data, size_t n)
{
    char path[PATH_MAX];
    assert_ok(p->ctx, ipt_file_write(p->ctx, in(p, path, name), data, n));
}

/* A configuration of a few hundred bytes asks for 8 levels x `layers` x `depth` transformer layers.
 */
static void inspect_config(const place *p, int layers, int depth, int rc, const char *said)
{
    char json[2048], list[2][512] = {"", ""};
    for (int i = 0; i < 8; i++) {
        snprintf(list[0] + strlen(list[0]), 64, "%s\"CrossAttnDownBlock2D\"", i ? "," : "");
        snprintf(list[1] + strlen(list[1]), 64, "%s\"CrossAttnUpBlock2D\"", i ? "," : "");
    }
    snprintf(json, sizeof json,
             "{\"block_out_channels\":[32,32,32,32,32,32,32,32],\"layers_per_block\":%d,"
             "\"transformer_layers_per_block\":%d,\"attention_head_dim\":1,"
             "\"down_block_types\":[%s],\"up_block_types\":[%s]}",
             layers, depth, list[0], list[1]);
    write_text(p, "bomb/unet/config.json", json, strlen(json));
    double t = ipt_now_ms();
    if (rc == 0)
        assert_int_equal(finish(start(p, (const char *const[]){"model", "inspect", "bomb", NULL})),
                         0);
    else
        EXPECT(p, rc, said, "model", "inspect", "bomb");
    t = ipt_now_ms() - t;
    if (t > 20e3)
        fail_msg("%d layers of depth %d: %.0f ms", layers, depth, t);
}

static void config_bombs(void **state)
{
    place *p = *state;
    char path[PATH_MAX];
    const ipt_st_write none = {"x", IPT_ST_F16, 1, {0}, NULL};
    assert_int_equal(mkdir(in(p, path, "bomb"), 0700), 0);
    assert_int_equal(mkdir(in(p, path, "bomb/unet"), 0700), 0);
    assert_ok(p->ctx, ipt_safetensors_write(
                          p->ctx, in(p, path, "bomb/unet/diffusion_pytorch_model.safetensors"),
                          &none, 1, NULL, 0));
    inspect_config(p, 15, 64, 64, "at most 240 resnets in all blocks");
    inspect_config(p, 14, 64, 64, "at most 1024 transformer layers in all blocks");
    inspect_config(p, 64, 1, 64, "at most 240 resnets in all blocks");
    inspect_config(p, 2, 24, 0, NULL); /* 984: taken, and quick */
    inspect_config(p, 14, 2, 0, NULL);
}

/* One word of 60,000 letters, as prompt, negative prompt and text to count: refused or done at
 * once. */
static void endless_word(void **state)
{
    place *p = *state;
    char *word = calloc(1, 60001);
    need_device(p);
    assert_non_null(word);
    memset(word, 'q', 60000);
    double t = ipt_now_ms();
    EXPECT(p, 2, "longer than 64 chunks", "generate", "-q", "-m", SD1, "-p", word);
    EXPECT(p, 2, "longer than 64 chunks", GENERATE, "-m", SD1, "-n", word);
    assert_int_equal(finish(start(p, (const char *const[]){"tokenize", word, NULL})), 0);
    if (ipt_now_ms() - t > 60e3)
        fail_msg("%.0f ms", ipt_now_ms() - t);
    free(word);
}

/* --- files that shrink while they are read ---------------------------------------------------- */
static void copy_file(const place *p, const char *from, const char *to)
{
    char path[PATH_MAX], *data = NULL;
    size_t n = 0;
    assert_ok(p->ctx, ipt_file_read(p->ctx, from, 1 << 26, &data, &n));
    assert_ok(p->ctx, ipt_file_write(p->ctx, in(p, path, to), data, n));
    ipt_free(data);
}

/* Opened, then cut short: every reader says so. */
static void shrunk_after_opening(void **state)
{
    place *p = *state;
    char path[PATH_MAX];
    ipt_safetensors *st = NULL;
    ipt_weights *w = NULL;
    double *values = calloc(1 << 20, sizeof *values);
    assert_non_null(values);
    copy_file(p, SD1 "/unet/diffusion_pytorch_model.safetensors", "shrinks");
    assert_ok(p->ctx, ipt_safetensors_open(p->ctx, in(p, path, "shrinks"), &st));
    assert_int_equal(truncate(path, 4096), 0);
    assert_ok(p->ctx, ipt_weights_file(p->ctx, st, NULL, IPT_F32, NULL, &w));
    const ipt_st_tensor *t = ipt_safetensors_at(st, ipt_safetensors_count(st) - 1);
    assert_int_equal(ipt_st_load(t), IPT_ERR_IO);
    assert_non_null(strstr(ipt_last_error(p->ctx), "shorter"));
    assert_true(isnan(ipt_st_get(t, 0)));
    assert_false(ipt_st_finite(t, NULL));
    const ipt_shape shape = ipt_shape1(IPT_F32, (int32_t)t->dim[0]);
    if (t->rank == 1)
        assert_int_equal(w->read(w, t->name, &shape, values), IPT_ERR_IO);
    ipt_weights_destroy(&w);
    ipt_safetensors_close(&st);
    free(values);
}

/* True when the process has the file open or mapped; false as well when it has ended. */
static bool holds(const place *p, pid_t pid, const char *name)
{
    char dir[64], path[PATH_MAX], at[PATH_MAX], link[PATH_MAX], line[PATH_MAX];
    bool found = false;
    in(p, path, name);
    for (int fd = 3; fd < 64 && !found; fd++) {
        ipt_name(at, sizeof at, "/proc/%ld/fd/%d", (long)pid, fd);
        ssize_t n = readlink(at, link, sizeof link - 1);
        link[n > 0 ? n : 0] = 0;
        found = strcmp(link, path) == 0;
    }
    FILE *maps = fopen(ipt_name(dir, sizeof dir, "/proc/%ld/maps", (long)pid), "r");
    while (maps && !found && fgets(line, sizeof line, maps))
        found = strstr(line, path) != NULL;
    if (maps)
        fclose(maps);
    return found;
}

/* Runs the program and cuts `name` short as soon as it is open. */
static int run_shrinking(const place *p, const char *const *args, const char *name)
{
    char path[PATH_MAX];
    pid_t pid = start(p, args);
    for (int t = 0; t < PATIENCE_MS && !holds(p, pid, name); t++) {
        siginfo_t ended = {.si_pid = 0};
        wait_ms(1);
        if (waitid(P_PID, (id_t)pid, &ended, WEXITED | WNOHANG | WNOWAIT) == 0 &&
            ended.si_pid == pid)
            break;
    }
    assert_int_equal(truncate(in(p, path, name), 600), 0);
    return finish(pid);
}

/* The program, with somebody who cuts its files short: exit 64 and one sentence, never a signal.
 * Who is faster is open, so that several runs are made, of which one must be cut in time. */
static void shrinking_under_the_program(void **state)
{
    static const struct {
        const char *from, *name, *args[24];
    } rows[] = {
        {IPT_TEST_DATA "/model_sd1_single_f16.safetensors",
         "m.safetensors",
         {GENERATE, "-m", "m.safetensors"}},
        {LORA, "l.safetensors", {GENERATE, "-m", SD1, "--lora", "l.safetensors"}},
    };
    place *p = *state;
    need_device(p);
    for (size_t i = 0; i < IPT_COUNT(rows); i++) {
        int n_cut = 0;
        for (int run = 0; run < 10 && n_cut == 0; run++) {
            copy_file(p, rows[i].from, rows[i].name);
            int rc = run_shrinking(p, rows[i].args, rows[i].name);
            if (rc != 0)
                expect_end(p, rc, 64, rows[i].name, "shrinking");
            n_cut += rc == 64;
        }
        if (n_cut == 0 && i == 0) /* an adapter may be read faster than it can be cut */
            fail_msg("%s was never cut in time", rows[i].name);
    }
}

/* --- one engine after refused requests -------------------------------------------------------- */
typedef struct wrong {
    ipt_request r;
    ipt_lora lora[IPT_MAX_SLOT + 1];
    const char *text[1];
    ipt_image picture;
    char path[PATH_MAX];
    ipt_stop stop;
    bool refuse_picture;
} wrong;

typedef struct kept {
    uint8_t rgb[SIDE * SIDE * 3];
    bool refuse;
} kept;

static ipt_status keep(void *user, int32_t index, const ipt_image *im, const char *text,
                       const char *json)
{
    kept *k = user;
    (void)index, (void)text, (void)json;
    if (k->refuse)
        return IPT_ERR_OUTPUT;
    assert_true(im->w == SIDE && im->h == SIDE);
    memcpy(k->rgb, im->rgb, sizeof k->rgb);
    return IPT_OK;
}

static void cancel_in_sampling(void *user, const ipt_progress *p)
{
    if (strcmp(p->stage, "sample") == 0)
        ipt_stop_ask(user);
}

static void one_lora(wrong *w, const char *path)
{
    w->lora[0] = (ipt_lora){.path = path, .weight = 1, .te_weight = 1, .end = 1};
    w->r.lora = w->lora;
    w->r.n_lora = 1;
}

/* A member of the request that is a text; "@" stands for the test's folder. */
static const struct {
    size_t at;
    const char *value;
} wrong_texts[] = {
    {offsetof(ipt_request, model), "@none"},
    {offsetof(ipt_request, model), "@narrow.safetensors"},
    {offsetof(ipt_request, model), LORA},
    {offsetof(ipt_request, vae), "@none"},
    {offsetof(ipt_request, vae), LORA},
    {offsetof(ipt_request, taesd), "@none"},
    {offsetof(ipt_request, taesd), LORA},
    {offsetof(ipt_request, taesd), SD1 "/vae/diffusion_pytorch_model.safetensors"},
    {offsetof(ipt_request, taesd), "@cut-taesd.safetensors"},
    {offsetof(ipt_request, prompt), "a <lora:x:heavy>"},
    {offsetof(ipt_request, prompt), "a <lora:not there:1>"},
    {offsetof(ipt_request, prompt), "a wideword here"},
    {offsetof(ipt_request, negative), "<lora:>x<lora::1>"},
    {offsetof(ipt_request, sampler), "eulr"},
    {offsetof(ipt_request, schedule), "krras"},
    {offsetof(ipt_request, rng), "cuda"},
    {offsetof(ipt_request, prediction), "x"},
    {offsetof(ipt_request, compose), "blend"},
    {offsetof(ipt_request, trace), "@none/t.safetensors"},
};

static void wrong_config_dir(wrong *w)
{
    w->r.model = IPT_TEST_DATA "/model_sd1_single_f16.safetensors";
    w->r.config_dir = LORA;
}
static void wrong_lora(wrong *w) { one_lora(w, SD1 "/unet/diffusion_pytorch_model.safetensors"); }
static void second_lora(wrong *w)
{
    one_lora(w, LORA);
    w->lora[1] = w->lora[0];
    w->lora[1].path = SD1 "/vae/diffusion_pytorch_model.safetensors";
    w->r.n_lora = 2;
}
static void too_many_loras(wrong *w)
{
    one_lora(w, LORA);
    for (size_t k = 1; k < IPT_COUNT(w->lora); k++)
        w->lora[k] = w->lora[0];
    w->r.n_lora = IPT_COUNT(w->lora);
}
static void wrong_blocks(wrong *w)
{
    one_lora(w, LORA);
    w->lora[0].blocks = "sideways:1";
}
static void wrong_weight(wrong *w)
{
    one_lora(w, LORA);
    w->lora[0].weight = NAN;
}
static void wrong_folder(wrong *w)
{
    w->text[0] = LORA;
    w->r.embedding_dirs = w->text;
}
static void wrong_option(wrong *w)
{
    w->text[0] = "tau=-1";
    w->r.compose = "switch";
    w->r.compose_opt = w->text;
    w->r.n_compose_opt = 1;
}
static void mask_alone(wrong *w) { w->r.mask = &w->picture; }
static void wrong_strength(wrong *w)
{
    w->r.init = &w->picture;
    w->r.strength = 7;
}
static void wrong_width(wrong *w) { w->r.width = 63; }
static void wrong_steps(wrong *w) { w->r.steps = -1; }
static void wrong_cfg(wrong *w) { w->r.cfg = 1e9; }
static void wrong_skip(wrong *w) { w->r.clip_skip = 60; }
static void wrong_count(wrong *w) { w->r.count = 100000; }
static void refused_picture(wrong *w)
{
    one_lora(w, LORA);
    w->refuse_picture = true;
}
static void cancelled(wrong *w)
{
    one_lora(w, LORA);
    w->r.progress = cancel_in_sampling;
    w->r.user = &w->stop;
    w->r.stop = &w->stop;
}

static void (*const wrong_values[])(wrong *) = {
    wrong_config_dir, wrong_lora,   second_lora, too_many_loras,  wrong_blocks, wrong_weight,
    wrong_folder,     wrong_option, mask_alone,  wrong_strength,  wrong_width,  wrong_steps,
    wrong_cfg,        wrong_skip,   wrong_count, refused_picture, cancelled};

/* Request number i that must be refused; false after the last. */
static bool make_wrong(const place *p, size_t i, wrong *w)
{
    if (i < IPT_COUNT(wrong_texts)) {
        const char *v = wrong_texts[i].value;
        v = v[0] == '@' ? in(p, w->path, v + 1) : v;
        memcpy((char *)&w->r + wrong_texts[i].at, &v, sizeof v);
        return true;
    }
    i -= IPT_COUNT(wrong_texts);
    if (i < IPT_COUNT(wrong_values))
        wrong_values[i](w);
    return i < IPT_COUNT(wrong_values);
}

static void small_request(ipt_request *r)
{
    ipt_request_init(r);
    r->model = SD1;
    r->prompt = "a cat";
    r->width = r->height = SIDE;
    r->steps = 1;
    r->sampler = "euler_a";
    r->seed = 3;
}

static void write_small_files(const place *p)
{
    static const float zeros[8 * 4 * 9];
    char path[PATH_MAX];
    const ipt_st_write tiny[] = {{"1.weight", IPT_ST_F32, 4, {8, 4, 3, 3}, zeros},
                                 {"3.conv.0.weight", IPT_ST_F32, 4, {8, 4, 3, 3}, zeros}};
    const ipt_st_write word = {"emb_params", IPT_ST_F32, 2, {1, 77}, zeros};
    assert_ok(p->ctx, ipt_safetensors_write(p->ctx, in(p, path, "cut-taesd.safetensors"), tiny, 2,
                                            NULL, 0));
    assert_ok(p->ctx, ipt_safetensors_write(p->ctx, in(p, path, "wideword.safetensors"), &word, 1,
                                            NULL, 0));
    copy_with(p, IPT_TEST_DATA "/model_sdxl_single_f16.safetensors", "narrow.safetensors",
              narrow_label);
}

/* After every refusal the same good request gives the first picture again. */
static void engine_after_refusals(void **state)
{
    place *p = *state;
    ipt_engine *e = NULL;
    static kept first, again;
    static uint8_t grey[SIDE * SIDE * 3];
    ipt_request good;
    need_device(p);
    write_small_files(p);
    const ipt_engine_opts o = {
        .precision = IPT_PRECISION_F32, .validate = true, .device = getenv("IPT_TEST_DEVICE")};
    assert_ok(p->ctx, ipt_engine_create(p->ctx, &o, &e));
    small_request(&good);
    assert_ok(p->ctx, ipt_generate(e, &good, keep, &first, NULL));
    wrong *w = calloc(1, sizeof *w);
    assert_non_null(w);
    for (size_t i = 0;; i++) {
        memset(w, 0, sizeof *w);
        w->picture = (ipt_image){SIDE, SIDE, grey};
        w->text[0] = p->dir; /* holds wideword.safetensors */
        small_request(&w->r);
        w->r.embedding_dirs = w->text;
        w->r.n_embedding_dirs = 1;
        if (!make_wrong(p, i, w))
            break;
        again.refuse = w->refuse_picture;
        ipt_status s = ipt_generate(e, &w->r, keep, &again, NULL);
        if (s == IPT_OK || ipt_last_error(p->ctx)[0] == 0)
            fail_msg("wrong request %zu was taken, or refused without a word", i);
        again.refuse = false;
        memset(again.rgb, 0, sizeof again.rgb);
        s = ipt_generate(e, &good, keep, &again, NULL);
        if (s != IPT_OK || memcmp(first.rgb, again.rgb, sizeof first.rgb) != 0)
            fail_msg("after wrong request %zu: %s", i,
                     s ? ipt_last_error(p->ctx) : "other picture");
    }
    free(w);
    assert_int_equal(ipt_gpu_validation_count(ipt_engine_gpu(e)), 0);
    ipt_engine_destroy(&e);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(no_regular_files),     cmocka_unit_test(no_regular_files_on_a_device),
        cmocka_unit_test(file_size_limit),      cmocka_unit_test(added_conditions),
        cmocka_unit_test(config_bombs),         cmocka_unit_test(endless_word),
        cmocka_unit_test(shrunk_after_opening), cmocka_unit_test(shrinking_under_the_program),
        cmocka_unit_test(engine_after_refusals)};
    return cmocka_run_group_tests_name("hostile", tests, set_up, tear_down);
}
