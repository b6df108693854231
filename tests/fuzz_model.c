/* libFuzzer target: models, and on: what the tensors or configurations tell, the graphs built from
 * it, the check of the weights against them, the scheduler and a few of its steps; word files.
 *   fuzz_model -max_total_time=60 tests/data/model_fuzz
 * The first byte chooses what the rest is: 'f' the files of a diffusers folder, separated by 0xFF,
 * in the order of folder_files; 'e' a word's file (textual inversion); anything else changes to one
 * of the tests' single files: which one, then four bytes each, see change(). */
#include "engine/internal.h"
#include "engine/modules.h"
#include "model_io/internal.h"
#include "sampler/sampler.h"

#include <fcntl.h>
#include <jansson.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define REQUIRE(cond)                                                                              \
    do {                                                                                           \
        if (!(cond))                                                                               \
            abort();                                                                               \
    } while (0)

static const char *const folder_files[] = {
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "text_encoder_2/config.json",
    "scheduler/scheduler_config.json",
    "model_index.json",
    "unet/diffusion_pytorch_model.safetensors.index.json",
};
static const char *const sub_folders[] = {"unet", "vae", "text_encoder", "text_encoder_2",
                                          "scheduler"};
static const char *const single_files[] = {"model_sd1_single_f16", "model_sd2_single_f16",
                                           "model_sdxl_single_f16"};
enum { N_SINGLE = IPT_COUNT(single_files), PATH = 256, MOST_DATA = 16 << 20 };
static char root[PATH]; /* of this process, removed at the end */
static json_t *header[N_SINGLE];

static const char *in_root(char *buf, const char *name)
{
    return ipt_name(buf, PATH, "%s/%s", root, name);
}

/* The file with `extra` zeros behind the data, which cost nothing. */
static void put(const char *name, const void *data, size_t n, int64_t extra)
{
    char path[PATH];
    int fd = open(in_root(path, name), O_WRONLY | O_CREAT | O_TRUNC, 0600);
    REQUIRE(fd >= 0 && write(fd, data, n) == (ssize_t)n);
    REQUIRE(extra == 0 || ftruncate(fd, (off_t)n + (off_t)extra) == 0);
    close(fd);
}

static void put_tensors(const char *name, const char *text, int64_t bytes)
{
    size_t n = strlen(text);
    uint8_t *file = malloc(8 + n);
    REQUIRE(file);
    for (int i = 0; i < 8; i++)
        file[i] = (uint8_t)(n >> (8 * i));
    memcpy(file + 8, text, n);
    put(name, file, 8 + n, bytes);
    free(file);
}

static void clean_up(void)
{
    static const char *const others[] = {"single.safetensors", "word.safetensors"};
    char path[PATH], name[PATH];
    for (size_t i = 0; i < IPT_COUNT(folder_files); i++)
        unlink(in_root(path, folder_files[i]));
    for (size_t i = 0; i < IPT_COUNT(others); i++)
        unlink(in_root(path, others[i]));
    for (size_t i = 0; i < IPT_COUNT(sub_folders); i++) {
        unlink(in_root(path, ipt_name(name, sizeof name, "%s/s.safetensors", sub_folders[i])));
        rmdir(in_root(path, sub_folders[i]));
    }
    rmdir(root);
    for (size_t i = 0; i < N_SINGLE; i++)
        json_decref(header[i]);
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    char path[PATH];
    (void)argc, (void)argv;
    ipt_name(root, sizeof root, "/tmp/impasto-fuzz-%ld", (long)getpid());
    REQUIRE(mkdir(root, 0700) == 0);
    for (size_t i = 0; i < IPT_COUNT(sub_folders); i++) {
        REQUIRE(mkdir(in_root(path, sub_folders[i]), 0700) == 0);
        ipt_name(path, sizeof path, "%s/s.safetensors", sub_folders[i]);
        if (i + 1 < IPT_COUNT(sub_folders)) /* shards and weights with a tensor that nobody wants */
            put_tensors(
                path,
                "{\"conv_in.weight\":{\"dtype\":\"F16\",\"shape\":[1],\"data_offsets\":[0,2]}}", 2);
    }
    for (size_t i = 0; i < N_SINGLE; i++) {
        uint64_t n = 0;
        ipt_name(path, sizeof path, "%s/%s.safetensors", IPT_TEST_DATA, single_files[i]);
        FILE *f = fopen(path, "rb");
        REQUIRE(f && fread(&n, sizeof n, 1, f) == 1); /* of this machine's byte order: x86, Arm */
        char *text = malloc((size_t)n);
        REQUIRE(text && fread(text, 1, (size_t)n, f) == n);
        header[i] = json_loadb(text, (size_t)n, 0, NULL);
        REQUIRE(header[i]);
        free(text);
        fclose(f);
    }
    atexit(clean_up);
    return 0;
}

/* --- what is done with a model ---------------------------------------------------------------- */
static void use_sampler(ipt_ctx *ctx, const ipt_settings *set)
{
    enum { N = 16, MOST_STEPS = 64 };
    ipt_sampler *s = NULL;
    ipt_sampler_request r = {.kind = set->kind,
                             .config = &set->config,
                             .schedule = set->schedule,
                             .steps = set->steps,
                             .n = N};
    float x[N], in[N], out[N], z[N];
    if (set->steps > MOST_STEPS || ipt_sampler_create(ctx, &r, &s) != IPT_OK)
        return;
    for (int k = 0; k < N; k++)
        x[k] = z[k] = (float)(k - N / 2) / N;
    for (int32_t i = 0; i < ipt_sampler_n_evals(s); i++) {
        ipt_sampler_scale_input(s, i, x, in);
        memcpy(out, in, sizeof out);
        (void)ipt_sampler_timestep(s, i);
        (void)!ipt_sampler_step(s, i, out, x, z);
        (void)ipt_sampler_completes_step(s, i);
    }
    ipt_sampler_destroy(&s);
}

static void use_settings(ipt_ctx *ctx, ipt_model *m)
{
    ipt_engine *e = calloc(1, sizeof *e);
    ipt_loaded *loaded = calloc(1, sizeof *loaded);
    ipt_request r;
    ipt_settings set;
    ipt_arena arena;
    REQUIRE(e && loaded);
    e->ctx = ctx;
    e->m = loaded;
    loaded->model = m;
    loaded->config = *ipt_model_get_config(m);
    ipt_arena_init(&arena, ctx);
    ipt_request_init(&r);
    r.prompt = "";
    r.steps = 4;
    if (ipt_settings_choose(e, &r, &arena, &set) == IPT_OK) {
        REQUIRE(set.w > 0 && set.h > 0 && set.n > 0);
        use_sampler(ctx, &set);
    }
    ipt_arena_finish(&arena);
    free(loaded);
    free(e);
}

static void use_model(ipt_ctx *ctx, ipt_model *m)
{
    const ipt_model_config *c = ipt_model_get_config(m);
    ipt_module_list modules;
    for (int comp = 0; comp < IPT_COMP_COUNT; comp++) {
        ipt_want_list wants;
        ipt_check check;
        if (!c->has[comp] || ipt_wants_create(ctx, c, comp, &wants) != IPT_OK)
            continue;
        REQUIRE(wants.n > 0);
        if (ipt_model_check(m, comp, wants.want, wants.n, &check) == IPT_OK) {
            (void)!ipt_check_status(m, comp, &check);
            ipt_check_finish(&check);
        }
        ipt_wants_finish(&wants);
    }
    if (ipt_modules_create(ctx, c, &modules) == IPT_OK)
        ipt_modules_finish(&modules);
    if (c->has[IPT_COMP_VAE] && c->has[IPT_COMP_TEXT]) /* else the engine refuses the model */
        use_settings(ctx, m);
}

static void open_and_use(ipt_ctx *ctx, const char *path)
{
    ipt_model *m = NULL;
    if (ipt_model_open(ctx, path, NULL, &m) == IPT_OK)
        use_model(ctx, m);
    else
        REQUIRE(ipt_last_error(ctx)[0] != '\0');
    ipt_model_close(&m);
}

/* --- folders ---------------------------------------------------------------------------------- */
static void try_folder(ipt_ctx *ctx, const uint8_t *data, size_t size)
{
    char path[PATH];
    for (size_t i = 0; i < IPT_COUNT(folder_files); i++) {
        const uint8_t *end = size ? memchr(data, 0xFF, size) : NULL;
        size_t n = end ? (size_t)(end - data) : size;
        if (n > 0)
            put(folder_files[i], data, n, 0);
        else /* no such file */
            unlink(in_root(path, folder_files[i]));
        data += n + (end != NULL);
        size -= n + (end != NULL);
    }
    open_and_use(ctx, root);
    char *told = NULL; /* what `model inspect` shows */
    if (ipt_model_describe(ctx, root, NULL, &told) == IPT_OK)
        REQUIRE(told && told[0] == '{');
    ipt_free(told);
}

/* --- single files ----------------------------------------------------------------------------- */
/* Four bytes: which tensor (two), what, and how: dimension 0 to 3 becomes another number, the last
 * one goes, a digit in the name changes, the tensor goes. */
static void change(json_t *o, const uint8_t b[4])
{
    static const int64_t odd[] = {0, 1, -1, 77, 320, 2816, 65536, INT32_MAX, INT64_MAX};
    size_t at = (size_t)(b[0] | b[1] << 8) % json_object_size(o);
    void *it = json_object_iter(o);
    for (size_t i = 0; i < at; i++)
        it = json_object_iter_next(o, it);
    char name[IPT_KEY_MAX];
    ipt_name(name, sizeof name, "%s", json_object_iter_key(it));
    json_t *t = json_object_iter_value(it), *shape = json_object_get(t, "shape");
    size_t rank = json_array_size(shape), what = b[2] % 8;
    if (what < 4 && what < rank) {
        json_array_set_new(shape, what,
                           json_integer(b[3] < 240 ? b[3] : odd[b[3] % IPT_COUNT(odd)]));
    } else if (what == 4 && rank > 0) {
        json_array_remove(shape, rank - 1);
    } else if (what == 5) {
        json_array_append_new(shape, json_integer(b[3]));
    } else if (what == 6) {
        char *digit = strpbrk(name + b[3] % (strlen(name) + 1), "0123456789");
        json_t *moved = json_incref(t);
        json_object_del(o, json_object_iter_key(it));
        if (digit)
            *digit = (char)('0' + b[3] % 10);
        json_object_set_new(o, name, moved);
    } else if (what == 7) {
        json_object_del(o, name);
    }
}

/* The bytes of a tensor by its shape; -1: no file holds them. */
static int64_t tensor_bytes(const json_t *t)
{
    const json_t *shape = json_object_get(t, "shape");
    int64_t n = 1;
    for (size_t d = 0; d < json_array_size(shape); d++) {
        int64_t k = json_integer_value(json_array_get(shape, d));
        if (k < 0 || k > MOST_DATA || n * k > MOST_DATA)
            return -1;
        n *= k;
    }
    return n;
}

static void try_single(ipt_ctx *ctx, const uint8_t *data, size_t size)
{
    char path[PATH];
    const char *key;
    json_t *t, *o = json_deep_copy(header[size ? data[0] % N_SINGLE : 0]);
    int64_t at = 0;
    REQUIRE(o);
    json_object_del(o, "__metadata__");
    for (size_t i = 1; i + 4 <= size && i < 64 && json_object_size(o) > 0; i += 4)
        change(o, data + i);
    json_object_foreach(o, key, t)
    {
        int64_t n = tensor_bytes(t);
        n = n < 0 ? 1 : n; /* the reader says so */
        json_object_set_new(t, "dtype", json_string("F8_E4M3"));
        json_object_set_new(t, "data_offsets",
                            json_pack("[I,I]", (json_int_t)at, (json_int_t)(at + n)));
        at += n;
    }
    char *text = json_dumps(o, JSON_COMPACT);
    REQUIRE(text);
    put_tensors("single.safetensors", text, at);
    free(text);
    json_decref(o);
    open_and_use(ctx, in_root(path, "single.safetensors"));
}

/* --- words ------------------------------------------------------------------------------------ */
static void try_word(ipt_ctx *ctx, const uint8_t *data, size_t size)
{
    char path[PATH];
    ipt_embedding_file e = {0};
    put("word.safetensors", data, size, 0);
    if (ipt_embedding_open(ctx, in_root(path, "word.safetensors"), &e) != IPT_OK) {
        REQUIRE(ipt_last_error(ctx)[0] != '\0');
        return;
    }
    REQUIRE(strcmp(e.name, "word") == 0 && e.n_vector > 0 && (e.vector[0] || e.vector[1]));
    for (int k = 0; k < 2; k++)
        for (int32_t i = 0; e.vector[k] && i < e.n_vector * e.width[k]; i++)
            REQUIRE(isfinite(e.vector[k][i]));
    ipt_embedding_close(&e);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    ipt_ctx *ctx = NULL;
    if (size == 0 || ipt_ctx_create(NULL, NULL, &ctx) != IPT_OK)
        return 0;
    if (data[0] == 'f')
        try_folder(ctx, data + 1, size - 1);
    else if (data[0] == 'e')
        try_word(ctx, data + 1, size - 1);
    else
        try_single(ctx, data + 1, size - 1);
    ipt_ctx_destroy(&ctx);
    return 0;
}
