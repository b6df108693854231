/* engine/hash.c - see hash.h. */
#define _XOPEN_SOURCE 700 /* realpath */
#include "engine/hash.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { BLOCK = 1 << 20, HEX = 64, CACHED_FROM = 8 << 20 }; /* smaller files are read in no time */

typedef struct entry {
    char *path;     /* real path */
    char head[256]; /* what identifies its state: sizes and times as text */
    bool want_data;
    bool known, from_cache;
    ipt_file_hash hash;
} entry;

struct ipt_hashes {
    ipt_ctx *ctx;
    entry *file; /* [n] */
    size_t n;
    pthread_t thread;
    bool running;
    atomic_bool stop, done;
};

/* --- one file --------------------------------------------------------------------------------- */
static bool state_of(const struct stat *st, char *buf, size_t n)
{
    ipt_name(buf, n, "%llu %llu %lld %lld.%09ld %lld.%09ld", (unsigned long long)st->st_dev,
             (unsigned long long)st->st_ino, (long long)st->st_size, (long long)st->st_mtim.tv_sec,
             st->st_mtim.tv_nsec, (long long)st->st_ctim.tv_sec, st->st_ctim.tv_nsec);
    return S_ISREG(st->st_mode);
}

/* Where the data of a safetensors file of `size` bytes begins, from its first eight; 0: nowhere. */
static uint64_t data_start(const uint8_t *p, size_t n, uint64_t size)
{
    uint64_t header = 0;
    for (size_t i = 0; n >= 8 && i < 8; i++)
        header |= (uint64_t)p[i] << (8 * i);
    return n >= 8 && size >= 8 && header <= size - 8 ? header + 8 : 0;
}

static void finish_hex(ipt_sha256 *s, char out[HEX + 1])
{
    uint8_t digest[32];
    ipt_sha256_final(s, digest);
    ipt_hex(digest, sizeof digest, out);
}

/* Reads fd to its end; false when that fails, is stopped, or the length is another. */
static bool read_all(const ipt_hashes *h, int fd, uint64_t size, uint8_t *buf, bool want_data,
                     ipt_file_hash *out)
{
    ipt_sha256 all, data;
    uint64_t at = 0, start = 0;
    ipt_sha256_init(&all);
    ipt_sha256_init(&data);
    for (;;) {
        ssize_t got = read(fd, buf, BLOCK);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0 || atomic_load(&h->stop))
            return false;
        if (got == 0)
            break;
        size_t n = (size_t)got;
        if (at == 0 && want_data)
            start = data_start(buf, n, size);
        ipt_sha256_update(&all, buf, n);
        if (start > 0 && at + n > start)
            ipt_sha256_update(&data, buf + (at < start ? start - at : 0),
                              n - (size_t)(at < start ? start - at : 0));
        at += n;
    }
    if (at != size)
        return false;
    finish_hex(&all, out->sha256);
    if (start > 0)
        finish_hex(&data, out->data);
    return true;
}

/* The hash of a file that is the same before and after. */
static void read_entry(const ipt_hashes *h, entry *e, uint8_t *buf)
{
    struct stat st;
    char state[sizeof e->head];
    ipt_file_hash found = {{0}, {0}};
    int fd = open(e->path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0)
        return;
    bool ok =
        fstat(fd, &st) == 0 && state_of(&st, state, sizeof state) && strcmp(state, e->head) == 0 &&
        read_all(h, fd, (uint64_t)st.st_size, buf, e->want_data, &found) && fstat(fd, &st) == 0 &&
        state_of(&st, state, sizeof state) && strcmp(state, e->head) == 0;
    close(fd);
    if (ok) {
        e->hash = found;
        e->known = true;
    }
}

static void *read_files(void *user)
{
    ipt_hashes *h = user;
    uint8_t *buf = malloc(BLOCK); /* not ipt_alloc: the context is the other thread's */
    for (size_t i = 0; buf && i < h->n; i++)
        if (!h->file[i].known)
            read_entry(h, &h->file[i], buf);
    free(buf);
    atomic_store(&h->done, true);
    return NULL;
}

/* --- the cache -------------------------------------------------------------------------------- */
/* One small file for each hashed one: its path and state, then the hashes.  The head is compared as
 * a whole: nothing in the file is parsed but hexadecimal digits. */
static char *cache_head(ipt_ctx *ctx, const entry *e)
{
    size_t n = strlen(e->path) + strlen(e->head) + 64;
    char *head = ipt_alloc(ctx, n);
    if (head)
        ipt_name(head, n, "impasto sha256 1\n%s\n%s\n", e->path, e->head);
    return head;
}

static bool cache_path(const entry *e, bool make, char *buf, size_t n)
{
    char dir[PATH_MAX], name[HEX + 16], hex[HEX + 1];
    ipt_sha256 s;
    if (!ipt_cache_dir(dir, sizeof dir) || (make && !ipt_make_dirs(dir)))
        return false;
    ipt_sha256_init(&s);
    ipt_sha256_update(&s, e->path, strlen(e->path));
    finish_hex(&s, hex);
    ipt_name(name, sizeof name, "sha256-%.32s.txt", hex);
    return ipt_path_join(buf, n, dir, name);
}

static bool is_hex(const char *s, size_t n) { return strspn(s, "0123456789abcdef") >= n; }

static void cache_read(ipt_ctx *ctx, entry *e)
{
    char path[PATH_MAX], *text = NULL, *head = cache_head(ctx, e);
    size_t n = 0, k = head ? strlen(head) : 0;
    bool ok = head && cache_path(e, false, path, sizeof path) && ipt_is_file(path) &&
              ipt_file_read(ctx, path, 2 * PATH_MAX, &text, &n) == IPT_OK;
    ok = ok && n >= k + HEX + 1 && memcmp(text, head, k) == 0 && is_hex(text + k, HEX);
    bool has_data = ok && n == k + 2 * (size_t)(HEX + 1) && is_hex(text + k + HEX + 1, HEX);
    if (ok && (has_data || !e->want_data)) {
        memcpy(e->hash.sha256, text + k, HEX);
        if (has_data)
            memcpy(e->hash.data, text + k + HEX + 1, HEX);
        e->known = e->from_cache = true;
    }
    ipt_free(text);
    ipt_free(head);
}

static void cache_write(ipt_ctx *ctx, const entry *e)
{
    char path[PATH_MAX], tail[2 * HEX + 4], *head = cache_head(ctx, e);
    ipt_name(tail, sizeof tail, "%s\n%s%s", e->hash.sha256, e->hash.data,
             e->hash.data[0] ? "\n" : "");
    const ipt_bytes part[] = {{head, head ? strlen(head) : 0}, {tail, strlen(tail)}};
    if (head && cache_path(e, true, path, sizeof path) &&
        ipt_file_write_parts(ctx, path, part, IPT_COUNT(part)) != IPT_OK)
        ipt_log(ctx, IPT_LOG_INFO, "the hash of %s is not kept: %s", e->path, ipt_last_error(ctx));
    ipt_free(head);
}

/* --- life ------------------------------------------------------------------------------------- */
ipt_status ipt_hashes_create(ipt_ctx *ctx, ipt_hashes **out)
{
    ipt_hashes *h = ipt_alloc(ctx, sizeof *h);
    if (!h)
        return IPT_ERR_NOMEM;
    h->ctx = ctx;
    atomic_init(&h->stop, false);
    atomic_init(&h->done, true);
    *out = h;
    return IPT_OK;
}

static void drop(entry *file, size_t n)
{
    for (size_t i = 0; i < n; i++)
        free(file[i].path); /* realpath's */
    ipt_free(file);
}

static void join(ipt_hashes *h)
{
    if (h->running)
        pthread_join(h->thread, NULL);
    h->running = false;
}

void ipt_hashes_stop(ipt_hashes *h)
{
    if (!h)
        return;
    atomic_store(&h->stop, true);
    join(h);
}

void ipt_hashes_destroy(ipt_hashes **h)
{
    if (!h || !*h)
        return;
    ipt_hashes_stop(*h);
    drop((*h)->file, (*h)->n);
    ipt_free(*h);
    *h = NULL;
}

/* The entry of a path: what is known of it in its present state. */
static void prepare(const ipt_hashes *h, const char *path, bool want_data, entry *e)
{
    struct stat st;
    e->want_data = want_data;
    e->path = realpath(path, NULL);
    if (!e->path || stat(e->path, &st) != 0 || !state_of(&st, e->head, sizeof e->head)) {
        e->known = true; /* nothing to read: its hash stays empty */
        return;
    }
    for (size_t i = 0; i < h->n; i++) {
        const entry *old = &h->file[i];
        if (old->known && old->path && strcmp(old->path, e->path) == 0 &&
            strcmp(old->head, e->head) == 0 && (old->hash.data[0] || !want_data)) {
            e->hash = old->hash;
            e->known = e->from_cache = true;
            return;
        }
    }
    if (st.st_size >= CACHED_FROM)
        cache_read(h->ctx, e);
    else
        e->from_cache = true; /* not worth a file */
}

ipt_status ipt_hashes_want(ipt_hashes *h, const char *const *path, const bool *has_data, size_t n)
{
    ipt_hashes_stop(h); /* of a request that ended early */
    entry *file = ipt_calloc(h->ctx, n, sizeof *file);
    bool missing = false;
    if (!file)
        return IPT_ERR_NOMEM;
    for (size_t i = 0; i < n; i++) {
        prepare(h, path[i], has_data[i], &file[i]);
        missing = missing || !file[i].known;
    }
    drop(h->file, h->n);
    h->file = file;
    h->n = n;
    atomic_store(&h->stop, false);
    atomic_store(&h->done, !missing);
    if (!missing)
        return IPT_OK;
    sigset_t all, before; /* signals are the caller's */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    h->running = pthread_create(&h->thread, NULL, read_files, h) == 0;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (!h->running) /* no thread to be had: now */
        read_files(h);
    return IPT_OK;
}

bool ipt_hashes_ready(const ipt_hashes *h) { return atomic_load(&h->done); }

/* The context is this thread's: the other one learns from `stop` alone that it is cancelled. */
void ipt_hashes_wait(ipt_hashes *h)
{
    while (h->running && !atomic_load(&h->done) && !ipt_cancelled(h->ctx))
        nanosleep(&(struct timespec){.tv_nsec = 2 * 1000 * 1000}, NULL);
    if (ipt_cancelled(h->ctx))
        atomic_store(&h->stop, true);
    join(h);
    for (size_t i = 0; i < h->n; i++) {
        entry *e = &h->file[i];
        if (e->known && !e->from_cache && e->hash.sha256[0])
            cache_write(h->ctx, e);
        e->from_cache = e->from_cache || e->known;
    }
}

const ipt_file_hash *ipt_hashes_get(const ipt_hashes *h, size_t i)
{
    return i < h->n && h->file[i].known && h->file[i].hash.sha256[0] ? &h->file[i].hash : NULL;
}
