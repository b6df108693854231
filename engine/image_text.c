/* engine/image_text.c - the request inside a PNG: a walk over its chunks, nothing is decoded. */
#include "engine/impasto.h"

#include <string.h>

static uint32_t be32(const uint8_t *p)
{
    return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3];
}

/* iTXt: keyword, 0, compressed or not, method, language, 0, translated keyword, 0, text. */
static bool is_request(const uint8_t *data, size_t n, size_t *skip)
{
    static const char key[] = "impasto";
    size_t at = sizeof key + 2;
    if (n < at || memcmp(data, key, sizeof key) != 0 || data[sizeof key] != 0)
        return false;
    for (int texts = 0; texts < 2; texts++) {
        while (at < n && data[at] != 0)
            at++;
        at++;
    }
    *skip = at;
    return at <= n;
}

ipt_status ipt_image_find_request(ipt_ctx *ctx, const char *path, const char *png, size_t n,
                                  const char **text, size_t *n_text)
{
    const uint8_t *p = (const uint8_t *)png;
    size_t skip = 0;
    for (size_t at = 8; at + 12 <= n;) {
        size_t len = be32(p + at);
        if (len > n - at - 12)
            break;
        if (memcmp(p + at + 4, "iTXt", 4) == 0 && is_request(p + at + 8, len, &skip)) {
            *text = png + at + 8 + skip;
            *n_text = len - skip;
            return IPT_OK;
        }
        at += 12 + len;
    }
    return ipt_fail(ctx, IPT_ERR_FORMAT,
                    "%s: holds no request: not a PNG that impasto wrote, or its texts were taken "
                    "out",
                    path);
}
