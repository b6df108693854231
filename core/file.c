/* core/file.c - whole files, paths, SHA-256, clocks. */
#include "core/core.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static const char *kind_of(mode_t m)
{
    return S_ISDIR(m)                 ? "a folder"
           : S_ISFIFO(m)              ? "a named pipe"
           : S_ISSOCK(m)              ? "a socket"
           : S_ISCHR(m) || S_ISBLK(m) ? "a device"
                                      : "no regular file";
}

ipt_status ipt_file_open(ipt_ctx *ctx, const char *path, const char *expected, int *fd,
                         uint64_t *size)
{
    struct stat st;
    /* Not to wait for the other end of a pipe; regular files do not know the flag. */
    int f = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    if (f < 0 && errno == ENXIO)
        return ipt_fail(ctx, IPT_ERR_IO, "%s: this is a socket or a device, expected %s", path,
                        expected);
    if (f < 0)
        return ipt_fail(ctx, IPT_ERR_IO, "%s: %s", path, strerror(errno));
    if (fstat(f, &st) != 0) {
        int err = errno;
        close(f);
        return ipt_fail(ctx, IPT_ERR_IO, "%s: %s", path, strerror(err));
    }
    if (!S_ISREG(st.st_mode)) {
        close(f);
        return ipt_fail(ctx, IPT_ERR_IO, "%s: this is %s, expected %s", path, kind_of(st.st_mode),
                        expected);
    }
    *fd = f;
    *size = (uint64_t)st.st_size;
    return IPT_OK;
}

ipt_status ipt_file_read_at(ipt_ctx *ctx, int fd, const char *path, uint64_t at, size_t n,
                            void *data)
{
    char *p = data;
    while (n > 0) {
        ssize_t r = pread(fd, p, n < (size_t)1 << 30 ? n : (size_t)1 << 30, (off_t)at);
        if (r < 0 && errno == EINTR)
            continue;
        if (r < 0)
            return ipt_fail(ctx, IPT_ERR_IO, "%s: %s", path, strerror(errno));
        if (r == 0)
            return ipt_fail(
                ctx, IPT_ERR_IO,
                "%s: the file became shorter while it was read: it ends at byte %" PRIu64
                ", %zu more were expected",
                path, at, n);
        p += r;
        at += (uint64_t)r;
        n -= (size_t)r;
    }
    return IPT_OK;
}

ipt_status ipt_file_read(ipt_ctx *ctx, const char *path, size_t max_bytes, char **data,
                         size_t *size)
{
    int fd = -1;
    uint64_t n = 0;
    char *buf = NULL;
    ipt_status status = IPT_OK;
    IPT_TRY(ipt_file_open(ctx, path, "a file", &fd, &n));
    if (n > max_bytes)
        status = ipt_fail(ctx, IPT_ERR_FORMAT, "%s: %" PRIu64 " bytes, expected at most %zu", path,
                          n, max_bytes);
    if (status == IPT_OK && !(buf = ipt_alloc(ctx, (size_t)n + 1)))
        status = IPT_ERR_NOMEM;
    if (status == IPT_OK)
        status = ipt_file_read_at(ctx, fd, path, 0, (size_t)n, buf);
    close(fd);
    if (status != IPT_OK) {
        ipt_free(buf);
        return status;
    }
    *data = buf;
    *size = (size_t)n;
    return IPT_OK;
}

bool ipt_is_dir(const char *path)
{
    struct stat st;
    return stat(path, &st) == 0 && S_ISDIR(st.st_mode);
}

bool ipt_is_file(const char *path)
{
    struct stat st;
    return stat(path, &st) == 0 && S_ISREG(st.st_mode);
}

uint64_t ipt_file_stamp(const char *path)
{
    struct stat st;
    if (!path || stat(path, &st) != 0)
        return 0;
    const uint64_t part[] = {(uint64_t)st.st_dev, (uint64_t)st.st_ino, (uint64_t)st.st_size,
                             (uint64_t)st.st_mtim.tv_sec, (uint64_t)st.st_mtim.tv_nsec};
    uint64_t h = 14695981039346656037U; /* FNV-1a over words */
    for (size_t i = 0; i < IPT_COUNT(part); i++)
        h = (h ^ part[i]) * 1099511628211U;
    return h;
}

bool ipt_path_join(char *buf, size_t n, const char *dir, const char *name)
{
    int len = snprintf(buf, n, "%s/%s", dir, name);
    return len >= 0 && (size_t)len < n;
}

static uint32_t ror(uint32_t x, int n) { return (x >> n) | (x << (32 - n)); }

static uint32_t big_endian(const uint8_t *p)
{
    return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | (uint32_t)p[3];
}

/* NOLINTNEXTLINE(readability-function-size): FIPS 180-4's eight letters and a word */
static inline void sha256_round(uint32_t a, uint32_t b, uint32_t c, uint32_t *d, uint32_t e,
                                uint32_t f, uint32_t g, uint32_t *h, uint32_t kw)
{
    uint32_t t = *h + (ror(e, 6) ^ ror(e, 11) ^ ror(e, 25)) + (g ^ (e & (f ^ g))) + kw;
    *d += t;
    *h = t + (ror(a, 2) ^ ror(a, 13) ^ ror(a, 22)) + ((a & b) | (c & (a | b)));
}

static void sha256_block(uint32_t h[8], const uint8_t *p)
{
    static const uint32_t k[64] = {
        0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4,
        0xab1c5ed5, 0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe,
        0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f,
        0x4a7484aa, 0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7,
        0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967, 0x27b70a85, 0x2e1b2138, 0x4d2c6dfc,
        0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85, 0xa2bfe8a1, 0xa81a664b,
        0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116,
        0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
        0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7,
        0xc67178f2};
    uint32_t w[16] = {0}, a = h[0], b = h[1], c = h[2], d = h[3], e = h[4], f = h[5], g = h[6],
             l = h[7];
    for (int i = 0; i < 64; i += 16) {
        for (int t = 0; t < 16; t++) {
            uint32_t x = w[(t + 1) & 15], y = w[(t + 14) & 15];
            w[t] = i == 0 ? big_endian(p + 4 * (ptrdiff_t)t)
                          : w[t] + (ror(x, 7) ^ ror(x, 18) ^ (x >> 3)) + w[(t + 9) & 15] +
                                (ror(y, 17) ^ ror(y, 19) ^ (y >> 10));
        }
        for (int t = 0; t < 16; t += 8) { /* after eight rounds the letters are where they were */
            const uint32_t *kt = k + i + t, *wt = w + t;
            sha256_round(a, b, c, &d, e, f, g, &l, kt[0] + wt[0]);
            sha256_round(l, a, b, &c, d, e, f, &g, kt[1] + wt[1]);
            sha256_round(g, l, a, &b, c, d, e, &f, kt[2] + wt[2]);
            sha256_round(f, g, l, &a, b, c, d, &e, kt[3] + wt[3]);
            sha256_round(e, f, g, &l, a, b, c, &d, kt[4] + wt[4]);
            sha256_round(d, e, f, &g, l, a, b, &c, kt[5] + wt[5]);
            sha256_round(c, d, e, &f, g, l, a, &b, kt[6] + wt[6]);
            sha256_round(b, c, d, &e, f, g, l, &a, kt[7] + wt[7]);
        }
    }
    const uint32_t add[8] = {a, b, c, d, e, f, g, l};
    for (int i = 0; i < 8; i++)
        h[i] += add[i];
}

void ipt_sha256_init(ipt_sha256 *s)
{
    static const uint32_t h0[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                   0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    memset(s, 0, sizeof *s);
    memcpy(s->h, h0, sizeof h0);
}

void ipt_sha256_update(ipt_sha256 *s, const void *data, size_t n)
{
    const uint8_t *p = data;
    while (n > 0) {
        size_t at = (size_t)(s->n_bytes % 64), take = 64 - at < n ? 64 - at : n;
        if (take == 64) {
            sha256_block(s->h, p);
            s->n_bytes += 64;
            p += 64;
            n -= 64;
            continue;
        }
        memcpy(s->block + at, p, take);
        s->n_bytes += take;
        p += take;
        n -= take;
        if (s->n_bytes % 64 == 0)
            sha256_block(s->h, s->block);
    }
}

void ipt_sha256_final(ipt_sha256 *s, uint8_t digest[32])
{
    uint64_t bits = s->n_bytes * 8;
    uint8_t pad[72] = {0x80}, len[8];
    size_t n_pad = 1 + (119 - (size_t)(s->n_bytes % 64)) % 64;
    for (int i = 0; i < 8; i++)
        len[i] = (uint8_t)(bits >> (56 - 8 * i));
    ipt_sha256_update(s, pad, n_pad);
    ipt_sha256_update(s, len, 8);
    for (int i = 0; i < 32; i++)
        digest[i] = (uint8_t)(s->h[i / 4] >> (24 - 8 * (i % 4)));
}

uint32_t ipt_crc32(const void *data, size_t n)
{
    static const uint32_t nibble[16] = {0x00000000, 0x1db71064, 0x3b6e20c8, 0x26d930ac,
                                        0x76dc4190, 0x6b6b51f4, 0x4db26158, 0x5005713c,
                                        0xedb88320, 0xf00f9344, 0xd6d6a3e8, 0xcb61b38c,
                                        0x9b64c2b0, 0x86d3d2d4, 0xa00ae278, 0xbdbdf21c};
    const uint8_t *p = data;
    uint32_t c = 0xffffffff;
    for (size_t i = 0; i < n; i++) {
        c ^= p[i];
        c = c >> 4 ^ nibble[c & 15];
        c = c >> 4 ^ nibble[c & 15];
    }
    return ~c;
}

void ipt_hex(const uint8_t *bytes, size_t n, char *out)
{
    for (size_t i = 0; i < n; i++)
        snprintf(out + 2 * i, 3, "%02x", bytes[i]);
}

double ipt_now_ms(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (double)ts.tv_sec * 1e3 + (double)ts.tv_nsec * 1e-6;
}

uint64_t ipt_host_bytes(void)
{
    long pages = sysconf(_SC_PHYS_PAGES), size = sysconf(_SC_PAGESIZE);
    return pages > 0 && size > 0 ? (uint64_t)pages * (uint64_t)size : 0;
}

uint64_t ipt_peak_host_bytes(void)
{
    struct rusage u;
    return getrusage(RUSAGE_SELF, &u) == 0 ? (uint64_t)u.ru_maxrss * 1024u : 0;
}
