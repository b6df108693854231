/* core/core.h - what every folder of Impasto stands on: statuses and messages, memory, sizes,
 * number formats, files, JSON, random numbers, clocks.
 *
 * Must not know: Vulkan, tensors, models.
 * Threads: an ipt_ctx belongs to one thread at a time; an ipt_stop may be asked from any thread and
 *          from a signal handler. */
#ifndef IPT_CORE_CORE_H
#define IPT_CORE_CORE_H
#include <inttypes.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#if defined(__GNUC__) || defined(__clang__)
#define IPT_CHECKED __attribute__((warn_unused_result))
#define IPT_PRINTF(fmt, args) __attribute__((format(printf, fmt, args)))
#define IPT_UNREACHABLE() __builtin_unreachable()
#else
#define IPT_CHECKED
#define IPT_PRINTF(fmt, args)
#define IPT_UNREACHABLE() ((void)0)
#endif

#define IPT_COUNT(a) (sizeof(a) / sizeof((a)[0]))
#define IPT_VERSION "0.1.0"

/* --- statuses ---------------------------------------------------------------------------- */
typedef enum ipt_status {
    IPT_OK = 0,
    IPT_ERR_ARG,         /* caller broke a documented rule                    */
    IPT_ERR_NOMEM,       /* host memory                                       */
    IPT_ERR_DEVICE_MEM,  /* device memory: message says need / have           */
    IPT_ERR_IO,          /* file or socket; message has path and errno text   */
    IPT_ERR_FORMAT,      /* file content is not what it claims                */
    IPT_ERR_SHAPE,       /* shapes do not fit; message names the node         */
    IPT_ERR_MISSING,     /* weight, adapter, device, extension not found      */
    IPT_ERR_UNSUPPORTED, /* valid, but this build or device cannot            */
    IPT_ERR_DEVICE_LOST, /* sticky: recreate the gpu                          */
    IPT_ERR_CANCELLED,   /* the caller asked for it                           */
    IPT_ERR_NO_DEVICE,   /* no usable Vulkan device                           */
    IPT_ERR_OUTPUT,      /* an output file cannot be written                  */
    IPT_ERR_TOO_LARGE,   /* a tensor passes a limit of the device (binding, index, work
                            groups): less at once may do, as with IPT_ERR_DEVICE_MEM */
} ipt_status;

/* Propagate a failure whose message was already set at its origin. */
#define IPT_TRY(expr)                                                                              \
    do {                                                                                           \
        ipt_status ipt_try_status_ = (expr);                                                       \
        if (ipt_try_status_ != IPT_OK)                                                             \
            return ipt_try_status_;                                                                \
    } while (0)
/* The same inside a function with a local `ipt_status status` and one clean-up label. */
#define IPT_TRY_GOTO(expr, label)                                                                  \
    do {                                                                                           \
        status = (expr);                                                                           \
        if (status != IPT_OK)                                                                      \
            goto label;                                                                            \
    } while (0)

/* --- context ----------------------------------------------------------------------------- */
typedef struct ipt_ctx ipt_ctx;
typedef enum ipt_log_level {
    IPT_LOG_ERROR,
    IPT_LOG_WARN,
    IPT_LOG_INFO,
    IPT_LOG_DEBUG
} ipt_log_level;
/* One line without its newline, as ipt_printable shows it; called on the thread that uses the ctx.
 */
typedef void (*ipt_log_fn)(void *user, ipt_log_level level, const char *line);

/* Creates a context.  log may be NULL (silent); user is kept until destroy.
 * Errors: IPT_ERR_NOMEM. */
IPT_CHECKED ipt_status ipt_ctx_create(ipt_log_fn log, void *user, ipt_ctx **out);
void ipt_ctx_destroy(ipt_ctx **ctx); /* ctx and *ctx may be NULL */

/* Sets the message of the ctx (printf style, one line, cut at 1023 bytes) and returns `s`.  Names
 * from files may hold anything: the message is kept as ipt_printable shows it.
 * Called once, where the failure arises.  ctx may be NULL. */
ipt_status ipt_fail(ipt_ctx *ctx, ipt_status s, const char *fmt, ...) IPT_PRINTF(3, 4);
/* The last message, "" if none; valid until the next failure or destroy. */
const char *ipt_last_error(const ipt_ctx *ctx);
const char *ipt_status_name(ipt_status s);
void ipt_log(ipt_ctx *ctx, ipt_log_level level, const char *fmt, ...) IPT_PRINTF(3, 4);

/* A wish that work stops, owned by whoever may utter it: one for each request, or one for a whole
 * program.  Zeroed: nothing is asked.  It cannot be taken back, and says nothing to other work. */
typedef struct ipt_stop {
    atomic_int asked;
} ipt_stop;
void ipt_stop_ask(ipt_stop *s); /* async-signal-safe, from any thread */
bool ipt_stop_asked(const ipt_stop *s);
/* Whom work on this ctx listens to: all of it, and what one request adds while it runs (the engine
 * sets and clears that).  NULL: nobody.  The stop outlives the listening. */
typedef enum ipt_listen { IPT_LISTEN_ALWAYS, IPT_LISTEN_REQUEST, IPT_LISTEN_COUNT } ipt_listen;
void ipt_ctx_listen(ipt_ctx *ctx, ipt_listen which, const ipt_stop *s);
/* Either of them was asked.  Long loops poll this, on the thread of the ctx. */
bool ipt_cancelled(const ipt_ctx *ctx);

/* --- foreign text (core/text.c) -------------------------------------------------------------- */
/* Next code point of a UTF-8 text, U+FFFD for bytes that are none; *s moves on.  0 at the end. */
uint32_t ipt_utf8_next(const char **s);
/* A code point that a terminal obeys or that reorders what is read: C0, DEL, C1, U+2028..202E,
 * U+2066..2069. */
bool ipt_is_control(uint32_t c);
/* The next character of s as it may be shown: itself, or a visible escape (\n, \x1b, \u202e; bytes
 * that are not UTF-8: \xff).  Returns its length, 0 at the end; *s moves on.  out is not
 * terminated. */
enum { IPT_PRINTABLE = 8 };
size_t ipt_printable_next(const char **s, char out[IPT_PRINTABLE]);
/* All of s so into buf [n], cut at a whole character; returns buf.  What is printable stays as it
 * is, backslashes too: to do it twice changes nothing. */
const char *ipt_printable(const char *s, char *buf, size_t n);

/* --- memory ------------------------------------------------------------------------------ */
/* Zeroed memory, 64-byte aligned; n = 0 gives a valid pointer.  NULL after failure, with the
 * message set: the caller returns IPT_ERR_NOMEM.  Freed with ipt_free. */
void *ipt_alloc(ipt_ctx *ctx, size_t n);
/* count * size with overflow check, else as ipt_alloc. */
void *ipt_calloc(ipt_ctx *ctx, size_t count, size_t size);
/* Grows `p` (NULL allowed) from old_n to n bytes, zeroing the new tail; `p` stays valid when
 * NULL is returned. */
void *ipt_regrow(ipt_ctx *ctx, void *p, size_t old_n, size_t n);
void ipt_free(void *p);
char *ipt_strdup(ipt_ctx *ctx, const char *s);
/* Tests only: the n-th allocation from now (1 = next) and all later ones fail; 0 = off. */
void ipt_alloc_fail_after(ipt_ctx *ctx, uint64_t n);
uint64_t ipt_alloc_count(const ipt_ctx *ctx); /* allocations so far */

/* Bump allocator: objects die together with their owner. */
typedef struct ipt_arena {
    ipt_ctx *ctx;
    struct ipt_arena_block *head;
} ipt_arena;
void ipt_arena_init(ipt_arena *a, ipt_ctx *ctx);
void *ipt_arena_alloc(ipt_arena *a, size_t n); /* zeroed, 16-byte aligned; NULL: as ipt_alloc */
char *ipt_arena_strdup(ipt_arena *a, const char *s);
void ipt_arena_finish(ipt_arena *a);

/* Writes a name into buf (printf style) and returns buf; a name that does not fit is cut. */
const char *ipt_name(char *buf, size_t n, const char *fmt, ...) IPT_PRINTF(3, 4);

/* Checked size arithmetic: false on overflow (out is then untouched). */
IPT_CHECKED bool ipt_mul_size(size_t a, size_t b, size_t *out);
IPT_CHECKED bool ipt_add_size(size_t a, size_t b, size_t *out);

/* --- number formats (round to nearest even; NaN stays NaN, overflow becomes infinity,
 *     e4m3fn has no infinity: overflow becomes NaN) ------------------------------------------ */
float ipt_f16_to_f32(uint16_t h);
uint16_t ipt_f32_to_f16(float f);
float ipt_bf16_to_f32(uint16_t h);
uint16_t ipt_f32_to_bf16(float f);
float ipt_f8e4m3_to_f32(uint8_t v); /* OCP E4M3FN, bias 7 */
float ipt_f8e5m2_to_f32(uint8_t v); /* OCP E5M2, bias 15 */

/* --- random numbers (core/rng.c) ------------------------------------------------------------ */
/* Fills out[n] with the values of torch.manual_seed(seed); torch.randn(n) on the CPU, f32, for
 * any n (torch takes another path below 16 values).  `stream` keeps the generator between calls,
 * so that two calls give what two torch.randn calls give.
 * Source: PyTorch aten/src/ATen/native/cpu/DistributionTemplates.h (normal_fill) and
 * core/DistributionsHelper.h (normal_distribution<double>). */
typedef struct ipt_rng_torch {
    uint32_t mt[624];
    uint32_t at;     /* next word, 624 = refill first      */
    bool has_cached; /* second value of the last pair held */
    double cached;
} ipt_rng_torch;
void ipt_rng_torch_seed(ipt_rng_torch *r, uint64_t seed);
void ipt_rng_torch_randn(ipt_rng_torch *r, float *out, size_t n);
/* CUDA's torch.randn(n, device="cuda"): Philox 4x32-10, one subsequence an element.
 * offset counts earlier randn calls of that generator (0, 1, 2, ...).
 * Source: Salmon et al. 2011; PyTorch's philox_normal as used by A1111's rng_philox. */
void ipt_rng_philox_randn(uint64_t seed, uint32_t offset, float *out, size_t n);
/* splitmix64: cheap deterministic stream for tests, benches and initialisers. */
uint64_t ipt_rng_next(uint64_t *state);
float ipt_rng_uniform(uint64_t *state); /* [0,1) */
float ipt_rng_normal(uint64_t *state);

/* --- files ---------------------------------------------------------------------------------- */
/* Files are read with read(2), never mapped: a file that is cut short meanwhile is an error, not a
 * signal.  Opens a regular file; a pipe or device is refused without waiting for it.  `expected`
 * ("a picture") is what the message names.  Ownership of *fd: caller, close.  Errors: IPT_ERR_IO.
 */
IPT_CHECKED ipt_status ipt_file_open(ipt_ctx *ctx, const char *path, const char *expected, int *fd,
                                     uint64_t *size);
/* Bytes at .. at + n - 1 of an open file.  Errors: IPT_ERR_IO, also when the file ends before. */
IPT_CHECKED ipt_status ipt_file_read_at(ipt_ctx *ctx, int fd, const char *path, uint64_t at,
                                        size_t n, void *data);
/* Whole file into memory, NUL-terminated (the NUL is not counted).  Ownership: caller, ipt_free.
 * Errors: IPT_ERR_IO; IPT_ERR_FORMAT when larger than max_bytes; IPT_ERR_NOMEM. */
IPT_CHECKED ipt_status ipt_file_read(ipt_ctx *ctx, const char *path, size_t max_bytes, char **data,
                                     size_t *size);
/* Writes `size` bytes to a temporary sibling, fsyncs, renames over `path`; a symbolic link is
 * followed, and its target replaced.  On failure nothing is left behind; that holds for a limit on
 * file sizes (RLIMIT_FSIZE) only where the program ignores SIGXFSZ, as impasto does.  A device, a
 * pipe or /dev/fd/N is written into as it is, which may wait for a reader (a closed pipe: SIGPIPE
 * ignored likewise); a folder or a disk is refused.
 * Errors: IPT_ERR_OUTPUT; IPT_ERR_CANCELLED while waiting. */
IPT_CHECKED ipt_status ipt_file_write(ipt_ctx *ctx, const char *path, const void *data,
                                      size_t size);
typedef struct ipt_bytes {
    const void *data;
    size_t size;
} ipt_bytes;
/* The same for n pieces, one after the other. */
IPT_CHECKED ipt_status ipt_file_write_parts(ipt_ctx *ctx, const char *path, const ipt_bytes *part,
                                            size_t n);
/* The same in steps, for what is made as it is written: open, write any number of times, close.
 * *out: the caller's until ipt_file_close, which gives the file its name (keep) or leaves nothing
 * behind; it is closed after a failure of either, too. */
typedef struct ipt_file_out ipt_file_out;
IPT_CHECKED ipt_status ipt_file_create(ipt_ctx *ctx, const char *path, ipt_file_out **out);
IPT_CHECKED ipt_status ipt_file_append(ipt_file_out *f, const void *data, size_t size);
IPT_CHECKED ipt_status ipt_file_close(ipt_file_out **f, bool keep);
/* A folder whole or not at all: begin makes an empty folder beside `path` and names it in tmp;
 * commit renames it; abort removes it with the files and one level of folders in it.  `path` must
 * be new, or an empty folder.  Errors: IPT_ERR_OUTPUT. */
enum { IPT_DIR_MAX = 4096 };
IPT_CHECKED ipt_status ipt_dir_begin(ipt_ctx *ctx, const char *path, char tmp[IPT_DIR_MAX]);
IPT_CHECKED ipt_status ipt_dir_commit(ipt_ctx *ctx, const char *tmp, const char *path);
void ipt_dir_abort(const char *tmp);
/* Whether ipt_file_write could, asked before the work whose result goes there: the name's length,
 * the folder, permissions.  Leaves no trace.  Errors: IPT_ERR_OUTPUT. */
IPT_CHECKED ipt_status ipt_file_check_write(ipt_ctx *ctx, const char *path);
bool ipt_file_is_direct(const char *path); /* leads to a device, a pipe or an open descriptor */
bool ipt_is_dir(const char *path);
bool ipt_is_file(const char *path);
/* Changes when the file is written or replaced (device, inode, size, time); 0: no such file.  Of a
 * folder: when entries come or go. */
uint64_t ipt_file_stamp(const char *path);
/* The user's folders for what can be made again and for what is theirs ($XDG_CACHE_HOME/impasto,
 * default ~/.cache; $XDG_DATA_HOME/impasto, default ~/.local/share); they need not exist.  false:
 * there is none. */
IPT_CHECKED bool ipt_cache_dir(char *buf, size_t n);
IPT_CHECKED bool ipt_data_dir(char *buf, size_t n);
/* Creates every missing folder of `path`, which is as it was on return; false when impossible. */
IPT_CHECKED bool ipt_make_dirs(char *path);
/* dir + "/" + name into buf; false when it does not fit. */
IPT_CHECKED bool ipt_path_join(char *buf, size_t n, const char *dir, const char *name);

/* SHA-256 of a byte stream (FIPS 180-4); used for LoRA hashes. */
typedef struct ipt_sha256 {
    uint32_t h[8];
    uint64_t n_bytes;
    uint8_t block[64];
} ipt_sha256;
void ipt_sha256_init(ipt_sha256 *s);
void ipt_sha256_update(ipt_sha256 *s, const void *data, size_t n);
void ipt_sha256_final(ipt_sha256 *s, uint8_t digest[32]);
/* CRC-32 of PNG and ZIP (ISO 3309). */
uint32_t ipt_crc32(const void *data, size_t n);
void ipt_hex(const uint8_t *bytes, size_t n, char *out); /* out: 2n+1 chars */

/* --- JSON (core/json.c, over jansson: callers include <jansson.h> themselves) ---------------- */
struct json_t;
/* Parses a JSON text of an untrusted file: duplicate keys rejected, depth limited by jansson.
 * `what` names the text in messages.  Ownership: caller, json_decref.
 * Errors: IPT_ERR_FORMAT naming line and reason; IPT_ERR_NOMEM. */
IPT_CHECKED ipt_status ipt_json_parse(ipt_ctx *ctx, const char *what, const char *text, size_t n,
                                      struct json_t **out);
IPT_CHECKED ipt_status ipt_json_load(ipt_ctx *ctx, const char *path, struct json_t **out);
/* A JSON string of any bytes, those that are not UTF-8 as ipt_printable shows them; null for NULL.
 * NULL when out of memory.  Ownership: caller. */
struct json_t *ipt_json_text(const char *s);
/* A number up to 2^63 - 1, all that signed readers take, and its digits as a string above. */
struct json_t *ipt_json_uint(uint64_t v);
/* Member lookup with defaults; a member of another type counts as absent. */
double ipt_json_num(const struct json_t *o, const char *key, double dflt);
int64_t ipt_json_int(const struct json_t *o, const char *key, int64_t dflt);
bool ipt_json_bool(const struct json_t *o, const char *key, bool dflt);
const char *ipt_json_str(const struct json_t *o, const char *key, const char *dflt);

/* --- clocks and the process ------------------------------------------------------------------ */
double ipt_now_ms(void);            /* monotonic */
uint64_t ipt_host_bytes(void);      /* memory of this machine; 0: unknown */
uint64_t ipt_peak_host_bytes(void); /* peak resident set of this process; 0 = unknown */
#endif
