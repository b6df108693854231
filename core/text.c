/* core/text.c - foreign text: UTF-8 read with care, and a form of it that is safe to show. */
#include "core/core.h"

#include <string.h>

uint32_t ipt_utf8_next(const char **s)
{
    const unsigned char *p = (const unsigned char *)*s;
    uint32_t c = p[0];
    int more = c < 0x80                ? 0
               : c >= 0xc2 && c < 0xe0 ? 1
               : c >= 0xe0 && c < 0xf0 ? 2
               : c >= 0xf0 && c < 0xf5 ? 3
                                       : -1;
    if (c == 0)
        return 0;
    *s += 1;
    if (more < 0)
        return 0xfffd;
    c = more == 0 ? c : c & (0x3fu >> more);
    for (int i = 1; i <= more; i++) {
        if ((p[i] & 0xc0) != 0x80)
            return 0xfffd;
        c = c << 6 | (p[i] & 0x3fu);
    }
    if ((more == 2 && c < 0x800) || (more == 3 && (c < 0x10000 || c > 0x10ffff)) ||
        (c >= 0xd800 && c < 0xe000))
        return 0xfffd;
    *s += more;
    return c;
}

/* Characters that a terminal obeys or that reorder what is read: C0, DEL, C1; line and paragraph
 * separators, embeddings and overrides (U+2028..202E), isolates (U+2066..2069). */
bool ipt_is_control(uint32_t c)
{
    return c < 0x20 || (c >= 0x7f && c < 0xa0) || (c >= 0x2028 && c <= 0x202e) ||
           (c >= 0x2066 && c <= 0x2069);
}

size_t ipt_printable_next(const char **s, char out[IPT_PRINTABLE])
{
    const char *from = *s;
    uint32_t c = ipt_utf8_next(s);
    size_t n = (size_t)(*s - from);
    if (c == 0)
        return 0;
    if ((c == 0xfffd && n == 1) || (ipt_is_control(c) && n == 1)) {
        static const char names[] = "\tt\nn\rr";
        const char *name = n == 1 ? strchr(names, *from) : NULL;
        if (name && (name - names) % 2 == 0)
            return (size_t)snprintf(out, IPT_PRINTABLE, "\\%c", name[1]);
        return (size_t)snprintf(out, IPT_PRINTABLE, "\\x%02x", (unsigned)(unsigned char)*from);
    }
    if (ipt_is_control(c))
        return (size_t)snprintf(out, IPT_PRINTABLE, "\\u%04x", (unsigned)c);
    memcpy(out, from, n);
    return n;
}

const char *ipt_printable(const char *s, char *buf, size_t n)
{
    char piece[IPT_PRINTABLE];
    size_t at = 0, len = 0;
    while ((len = ipt_printable_next(&s, piece)) > 0 && at + len < n) {
        memcpy(buf + at, piece, len);
        at += len;
    }
    buf[at] = 0;
    return buf;
}
