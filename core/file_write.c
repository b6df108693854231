/* core/file_write.c - outputs: files whole or not at all; devices and pipes as they are. */
#include "core/core.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { MAX_LINKS = 40 }; /* as many as Linux follows */

/* What a path leads to. */
typedef struct target {
    char path[PATH_MAX]; /* with symbolic links followed: the file that is made or replaced */
    int number;          /* of a descriptor named as /dev/fd/N, else -1 */
    bool direct;         /* a device or a pipe: written into, never replaced */
    bool pipe;           /* a pipe with a name, which may have no reader yet */
} target;

static ipt_status cannot(ipt_ctx *ctx, const char *path, const char *why)
{
    return ipt_fail(ctx, IPT_ERR_OUTPUT, "%s: cannot write: %s", path, why);
}

/* Replaces t->path by what the link there says; false with errno set. */
static bool follow_link(target *t)
{
    char to[PATH_MAX], whole[PATH_MAX];
    ssize_t n = readlink(t->path, to, sizeof to - 1);
    if (n < 0)
        return false;
    to[n] = 0;
    const char *slash = strrchr(t->path, '/');
    int dir = slash && to[0] != '/' ? (int)(slash + 1 - t->path) : 0;
    int len = snprintf(whole, sizeof whole, "%.*s%s", dir, t->path, to);
    if (len < 0 || (size_t)len >= sizeof whole) {
        errno = ENAMETOOLONG;
        return false;
    }
    memcpy(t->path, whole, (size_t)len + 1);
    return true;
}

/* /dev/fd/N and what /dev/stdout leads to are open already.  Opened by name a second time, a file
 * behind them would be written from its start, over what the program has said there. */
static int descriptor_of(const char *path)
{
    static const char *const folders[] = {"/dev/fd/", "/proc/self/fd/"};
    for (size_t i = 0; i < IPT_COUNT(folders); i++) {
        size_t n = strlen(folders[i]);
        if (strncmp(path, folders[i], n) == 0 && path[n] >= '0' && path[n] <= '9' &&
            strlen(path + n) < 9)
            return (int)strtol(path + n, NULL, 10);
    }
    return -1;
}

static ipt_status find_target(ipt_ctx *ctx, const char *path, target *t)
{
    struct stat st;
    int len = snprintf(t->path, sizeof t->path, "%s", path);
    if (len < 0 || (size_t)len >= sizeof t->path)
        return ipt_fail(ctx, IPT_ERR_OUTPUT, "%.200s...: cannot write: path too long", path);
    if (len == 0)
        return ipt_fail(ctx, IPT_ERR_OUTPUT, "cannot write to a file without a name");
    t->direct = t->pipe = false;
    for (int i = 0;; i++) {
        t->number = descriptor_of(t->path);
        if (t->number >= 0) {
            int mode = fcntl(t->number, F_GETFL);
            t->direct = true;
            return mode < 0 || (mode & O_ACCMODE) == O_RDONLY
                       ? cannot(ctx, path, "is not open for writing")
                       : IPT_OK;
        }
        if (lstat(t->path, &st) != 0) /* a new file, or a name that cannot be */
            return errno == ENOENT && t->path[strlen(t->path) - 1] != '/'
                       ? IPT_OK
                       : cannot(ctx, path, strerror(errno));
        if (!S_ISLNK(st.st_mode))
            break;
        if (i >= MAX_LINKS)
            return cannot(ctx, path, strerror(ELOOP));
        if (!follow_link(t))
            return cannot(ctx, path, strerror(errno));
    }
    if (S_ISDIR(st.st_mode))
        return cannot(ctx, path, "is a folder");
    if (S_ISBLK(st.st_mode) || S_ISSOCK(st.st_mode))
        return cannot(ctx, path, "is a disk or a socket");
    t->direct = !S_ISREG(st.st_mode);
    t->pipe = S_ISFIFO(st.st_mode);
    return IPT_OK;
}

static bool write_all(int fd, const char *p, size_t n)
{
    while (n > 0) {
        ssize_t w = write(fd, p, n < (size_t)1 << 30 ? n : (size_t)1 << 30);
        if (w < 0 && errno == EINTR)
            continue;
        if (w <= 0)
            return false;
        p += w;
        n -= (size_t)w;
    }
    return true;
}

/* The temporary sibling's name has a length of its own: whatever name the target has, it fits. */
static bool sibling_name(const target *t, char tmp[PATH_MAX])
{
    struct timespec now = {0};
    const char *slash = strrchr(t->path, '/');
    clock_gettime(CLOCK_REALTIME, &now);
    /* The time keeps apart processes of the same number: in containers, or after a kill. */
    int len = snprintf(tmp, PATH_MAX, "%.*s.impasto-%ld-%lx%08lx.part",
                       slash ? (int)(slash + 1 - t->path) : 0, t->path, (long)getpid(),
                       (unsigned long)now.tv_sec, (unsigned long)now.tv_nsec);
    return len > 0 && len < PATH_MAX;
}

static ipt_status open_sibling(ipt_ctx *ctx, const char *path, const target *t, char tmp[PATH_MAX],
                               int *fd)
{
    if (!sibling_name(t, tmp))
        return cannot(ctx, path, "path too long");
    *fd = open(tmp, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (*fd < 0)
        return cannot(ctx, path, errno == ENOENT ? "its folder does not exist" : strerror(errno));
    return IPT_OK;
}

struct ipt_file_out {
    ipt_ctx *ctx;
    target t;
    char *path;         /* for messages */
    char tmp[PATH_MAX]; /* not direct: what is written */
    int fd;
};

static int open_direct(ipt_ctx *ctx, const target *t)
{
    for (;;) { /* a pipe waits for its reader, but not so that nothing can be cancelled */
        int fd = t->number >= 0
                     ? dup(t->number)
                     : open(t->path, O_WRONLY | O_CLOEXEC | O_NOCTTY | (t->pipe ? O_NONBLOCK : 0));
        if (fd >= 0 || !t->pipe || errno != ENXIO || ipt_cancelled(ctx))
            return fd;
        nanosleep(&(struct timespec){.tv_nsec = 20 * 1000 * 1000}, NULL);
    }
}

static ipt_status create(ipt_file_out *f)
{
    if (!f->t.direct)
        return open_sibling(f->ctx, f->path, &f->t, f->tmp, &f->fd);
    f->fd = open_direct(f->ctx, &f->t);
    if (f->fd < 0 && errno == ENXIO && ipt_cancelled(f->ctx))
        return ipt_fail(f->ctx, IPT_ERR_CANCELLED, "cancelled");
    if (f->fd >= 0 && (!f->t.pipe || fcntl(f->fd, F_SETFL, O_WRONLY) == 0))
        return IPT_OK;
    int err = errno;
    if (f->fd >= 0)
        close(f->fd);
    return cannot(f->ctx, f->path, strerror(err));
}

static void destroy(ipt_file_out **f)
{
    ipt_free((*f)->path);
    ipt_free(*f);
    *f = NULL;
}

ipt_status ipt_file_create(ipt_ctx *ctx, const char *path, ipt_file_out **out)
{
    ipt_file_out *f = ipt_alloc(ctx, sizeof *f);
    if (!f)
        return IPT_ERR_NOMEM;
    f->ctx = ctx;
    f->path = ipt_strdup(ctx, path);
    ipt_status status = f->path ? find_target(ctx, path, &f->t) : IPT_ERR_NOMEM;
    if (status == IPT_OK)
        status = create(f);
    if (status != IPT_OK) {
        destroy(&f);
        return status;
    }
    *out = f;
    return IPT_OK;
}

ipt_status ipt_file_append(ipt_file_out *f, const void *data, size_t size)
{
    return write_all(f->fd, data, size) ? IPT_OK : cannot(f->ctx, f->path, strerror(errno));
}

ipt_status ipt_file_close(ipt_file_out **pf, bool keep)
{
    ipt_file_out *f = *pf;
    ipt_status status = IPT_OK;
    bool ok = !keep || f->t.direct || fsync(f->fd) == 0;
    int err = errno;
    if (close(f->fd) != 0 && ok) {
        ok = false;
        err = errno;
    }
    if (ok && keep && !f->t.direct && rename(f->tmp, f->t.path) != 0) {
        ok = false;
        err = errno;
    }
    if (!f->t.direct && !(ok && keep))
        unlink(f->tmp);
    if (!ok && keep)
        status = cannot(f->ctx, f->path, strerror(err));
    destroy(pf);
    return status;
}

ipt_status ipt_file_write_parts(ipt_ctx *ctx, const char *path, const ipt_bytes *part, size_t n)
{
    ipt_file_out *f = NULL;
    IPT_TRY(ipt_file_create(ctx, path, &f));
    ipt_status status = IPT_OK, closed = IPT_OK;
    for (size_t i = 0; status == IPT_OK && i < n; i++)
        status = ipt_file_append(f, part[i].data, part[i].size);
    closed = ipt_file_close(&f, status == IPT_OK);
    return status != IPT_OK ? status : closed;
}

ipt_status ipt_file_write(ipt_ctx *ctx, const char *path, const void *data, size_t size)
{
    const ipt_bytes whole = {data, size};
    return ipt_file_write_parts(ctx, path, &whole, 1);
}

ipt_status ipt_file_check_write(ipt_ctx *ctx, const char *path)
{
    target t;
    char tmp[PATH_MAX];
    IPT_TRY(find_target(ctx, path, &t));
    if (t.number >= 0)
        return IPT_OK;
    bool exists = access(t.path, F_OK) == 0;
    if (exists && access(t.path, W_OK) != 0)
        return cannot(ctx, path, strerror(errno));
    if (t.direct)
        return IPT_OK;
    int fd = -1;
    IPT_TRY(open_sibling(ctx, path, &t, tmp, &fd));
    close(fd);
    unlink(tmp);
    return IPT_OK;
}

bool ipt_file_is_direct(const char *path)
{
    target t;
    return find_target(NULL, path, &t) == IPT_OK && t.direct;
}

/* --- folders ---------------------------------------------------------------------------------- */
static bool is_empty(const char *dir)
{
    size_t n = 0;
    DIR *d = opendir(dir);
    for (struct dirent *e = d ? readdir(d) : NULL; e; e = readdir(d))
        n += strcmp(e->d_name, ".") != 0 && strcmp(e->d_name, "..") != 0;
    if (!d)
        return false;
    closedir(d);
    return n == 0;
}

ipt_status ipt_dir_begin(ipt_ctx *ctx, const char *path, char tmp[IPT_DIR_MAX])
{
    target t = {.number = -1};
    size_t len = strlen(path);
    while (len > 1 && path[len - 1] == '/')
        len--;
    if (len == 0 || len + 64 >= sizeof t.path)
        return cannot(ctx, path, len == 0 ? "no name" : "path too long");
    memcpy(t.path, path, len);
    t.path[len] = 0;
    if (!sibling_name(&t, tmp))
        return cannot(ctx, path, "path too long");
    if (ipt_is_dir(t.path) && !is_empty(t.path))
        return cannot(ctx, path, "the folder is there already and not empty");
    if (!ipt_is_dir(t.path) && access(t.path, F_OK) == 0)
        return cannot(ctx, path, "a file of this name is there, expected a new folder");
    if (mkdir(tmp, 0777) != 0)
        return cannot(ctx, path, errno == ENOENT ? "its folder does not exist" : strerror(errno));
    return IPT_OK;
}

ipt_status ipt_dir_commit(ipt_ctx *ctx, const char *tmp, const char *path)
{
    return rename(tmp, path) == 0 ? IPT_OK : cannot(ctx, path, strerror(errno));
}

/* Removes the files in a folder, and those of its folders when `below` is true. */
static void empty(const char *dir, bool below)
{
    char path[IPT_DIR_MAX];
    DIR *d = opendir(dir);
    for (struct dirent *e = d ? readdir(d) : NULL; e; e = readdir(d)) {
        if (strcmp(e->d_name, ".") == 0 || strcmp(e->d_name, "..") == 0 ||
            !ipt_path_join(path, sizeof path, dir, e->d_name))
            continue;
        if (unlink(path) != 0 && below) {
            empty(path, false);
            rmdir(path);
        }
    }
    if (d)
        closedir(d);
}

void ipt_dir_abort(const char *tmp)
{
    empty(tmp, true);
    rmdir(tmp);
}
