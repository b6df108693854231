/* engine/image_check.c - which picture format a file is, and whether it is whole.  Only structure
 * is read here (chunks, markers, blocks, sizes): pixels are the decoder's. */
#include "engine/image_internal.h"

#include <string.h>
#include <strings.h>

/* The bytes of one file under its name. */
typedef struct view {
    ipt_ctx *ctx;
    const char *name;
    const uint8_t *d;
    size_t n;
} view;

static uint32_t be16(const uint8_t *p) { return (uint32_t)p[0] << 8 | p[1]; }
static uint32_t be32(const uint8_t *p) { return be16(p) << 16 | be16(p + 2); }
static uint32_t le16(const uint8_t *p) { return (uint32_t)p[1] << 8 | p[0]; }
static uint32_t le32(const uint8_t *p) { return le16(p + 2) << 16 | le16(p); }

static ipt_status truncated(const view *v, const char *kind, uint64_t need)
{
    return ipt_fail(v->ctx, IPT_ERR_FORMAT,
                    "%s: truncated %s: found %zu bytes, expected at least %" PRIu64, v->name, kind,
                    v->n, need);
}

static ipt_status check_png(const view *v)
{
    size_t at = 8;
    bool has_data = false;
    for (;;) {
        if (v->n - at < 12)
            return truncated(v, "PNG", (uint64_t)at + 12);
        uint64_t len = be32(v->d + at);
        const uint8_t *type = v->d + at + 4;
        if (len + 12 > v->n - at)
            return truncated(v, "PNG", at + len + 12);
        uint32_t found = be32(type + 4 + len), expected = ipt_crc32(type, (size_t)len + 4);
        if (found != expected)
            return ipt_fail(
                v->ctx, IPT_ERR_FORMAT,
                "%s: damaged PNG: chunk %.4s at byte %zu: found CRC %08x, expected %08x", v->name,
                (const char *)type, at, found, expected);
        has_data = has_data || memcmp(type, "IDAT", 4) == 0;
        at += (size_t)len + 12;
        if (memcmp(type, "IEND", 4) == 0)
            break;
    }
    if (!has_data || be32(v->d + 8) != 13 || memcmp(v->d + 12, "IHDR", 4) != 0)
        return ipt_fail(v->ctx, IPT_ERR_FORMAT, "%s: damaged PNG: no %s chunk", v->name,
                        has_data ? "IHDR" : "IDAT");
    return IPT_OK;
}

/* Entropy-coded data from `at`: place of the next marker's 0xff, n at the end of the file. */
static size_t skip_scan(const uint8_t *d, size_t n, size_t at)
{
    while (at + 1 < n) {
        if (d[at] != 0xff) {
            at++;
            continue;
        }
        uint8_t m = d[at + 1];
        if (m == 0xff)
            at++; /* fill byte */
        else if (m == 0 || (m >= 0xd0 && m <= 0xd7))
            at += 2; /* stuffed byte or restart */
        else
            return at;
    }
    return n;
}

/* Huffman tables defined so far: bit class * 4 + id. */
static bool define_tables(const uint8_t *p, size_t n, unsigned *defined)
{
    size_t at = 0;
    while (at < n) {
        if (n - at < 17 || p[at] >> 4 > 1 || (p[at] & 15) > 3)
            return false;
        uint32_t code = 0, total = 0;
        for (unsigned len = 1; len <= 16; len++) {
            code = (code << 1) + p[at + len];
            total += p[at + len];
            if (code > 1u << len)
                return false; /* more codes than their length allows */
        }
        if (total > 256 || total > n - at - 17)
            return false;
        *defined |= 1u << ((p[at] >> 4) * 4 + (p[at] & 15));
        at += 17 + total;
    }
    return true;
}

/* Whether the scan whose header is p [n] uses only tables that exist.  (stb_image 2.27 does not
 * ask.) */
static bool scan_has_tables(const uint8_t *p, size_t n, bool progressive, unsigned defined)
{
    if (n < 1 || n != 4 + 2 * (size_t)p[0])
        return false;
    unsigned start = p[n - 3];
    bool want_dc = !progressive || start == 0, want_ac = !progressive || start > 0;
    bool refines = progressive && p[n - 1] >> 4 != 0; /* later bits of DC come without codes */
    for (size_t i = 0; i < p[0]; i++) {
        unsigned dc = p[2 + 2 * i] >> 4, ac = p[2 + 2 * i] & 15;
        if (dc > 3 || ac > 3 || (want_dc && !refines && !(defined >> dc & 1)) ||
            (want_ac && !(defined >> (4 + ac) & 1)))
            return false;
    }
    return true;
}

/* Marker after marker; *app1 (may be NULL) is the place of the first EXIF segment, 0: none. */
static ipt_status walk_jpeg(const view *v, size_t *app1)
{
    size_t at = 2;
    unsigned tables = 0, scans = 0;
    bool progressive = false;
    for (;;) {
        while (at + 1 < v->n && v->d[at] == 0xff && v->d[at + 1] == 0xff)
            at++;
        if (at + 1 >= v->n)
            return truncated(v, "JPEG", (uint64_t)v->n + 2);
        if (v->d[at] != 0xff)
            return ipt_fail(v->ctx, IPT_ERR_FORMAT,
                            "%s: damaged JPEG at byte %zu: found 0x%02x, expected a marker",
                            v->name, at, v->d[at]);
        uint8_t m = v->d[at + 1];
        at += 2;
        if (m == 0xd9)
            break;
        if (m == 0x01 || (m >= 0xd0 && m <= 0xd8))
            continue; /* markers without a length */
        if (v->n - at < 2)
            return truncated(v, "JPEG", (uint64_t)at + 2);
        size_t len = be16(v->d + at);
        if (len < 2 || len > v->n - at)
            return truncated(v, "JPEG", (uint64_t)at + (len < 2 ? 2 : len));
        if (m == 0xe1 && app1 && *app1 == 0 && len >= 8 && memcmp(v->d + at + 2, "Exif\0", 6) == 0)
            *app1 = at;
        const uint8_t *body = v->d + at + 2;
        progressive = progressive || m == 0xc2;
        if ((m == 0xc4 && !define_tables(body, len - 2, &tables)) ||
            (m == 0xda && !scan_has_tables(body, len - 2, progressive, tables)))
            return ipt_fail(v->ctx, IPT_ERR_FORMAT, "%s: damaged JPEG at byte %zu: %s", v->name, at,
                            m == 0xc4 ? "bad Huffman table" : "a scan without its Huffman table");
        at += len;
        if (m == 0xda) {
            if (++scans > IPT_IMAGE_MAX_SCANS)
                return ipt_fail(v->ctx, IPT_ERR_FORMAT,
                                "%s: a JPEG of more than %d scans, which is no photo's; expected "
                                "fewer: save it again",
                                v->name, IPT_IMAGE_MAX_SCANS);
            at = skip_scan(v->d, v->n, at);
        }
    }
    if (scans == 0)
        return ipt_fail(v->ctx, IPT_ERR_FORMAT, "%s: damaged JPEG: no picture data", v->name);
    return IPT_OK;
}

/* Tag 0x0112 of the first directory of a TIFF header with what follows it. */
static int tiff_orientation(const uint8_t *t, size_t len)
{
    if (len < 10 || (memcmp(t, "II", 2) != 0 && memcmp(t, "MM", 2) != 0))
        return 1;
    bool little = t[0] == 'I';
    uint32_t ifd = little ? le32(t + 4) : be32(t + 4);
    if (ifd > len - 2)
        return 1;
    uint32_t count = little ? le16(t + ifd) : be16(t + ifd);
    for (uint32_t i = 0; i < count; i++) {
        size_t e = (size_t)ifd + 2 + 12 * (size_t)i;
        if (e > len || len - e < 12)
            break;
        uint32_t tag = little ? le16(t + e) : be16(t + e);
        uint32_t value = little ? le16(t + e + 8) : be16(t + e + 8);
        if (tag == 0x0112)
            return value >= 1 && value <= 8 ? (int)value : 1;
    }
    return 1;
}

int ipt_image_orientation(const uint8_t *d, size_t n)
{
    view v = {NULL, "", d, n};
    size_t at = 0;
    if (n > 20 && d[0] == 0x89) { /* PNG: the chunk eXIf */
        for (at = 8; n - at >= 12 && be32(d + at) <= n - at - 12; at += be32(d + at) + 12)
            if (memcmp(d + at + 4, "eXIf", 4) == 0)
                return tiff_orientation(d + at + 8, be32(d + at));
        return 1;
    }
    if (n < 4 || d[0] != 0xff || walk_jpeg(&v, &at) != IPT_OK || at == 0)
        return 1;
    return tiff_orientation(d + at + 8, be16(d + at) - 8u);
}

static ipt_status check_bmp(const view *v)
{
    if (v->n < 30)
        return truncated(v, "BMP", 30);
    uint64_t start = le32(v->d + 10), header = le32(v->d + 14), w, h, bits;
    if (header == 12) {
        w = le16(v->d + 18);
        h = le16(v->d + 20);
        bits = le16(v->d + 24);
    } else {
        uint32_t rows = le32(v->d + 22); /* negative: top row first */
        w = le32(v->d + 18);
        h = rows > INT32_MAX ? UINT32_MAX - (uint64_t)rows + 1 : rows;
        bits = le16(v->d + 28);
    }
    if (w == 0 || h == 0 || w > IPT_IMAGE_MAX_SIDE || h > IPT_IMAGE_MAX_SIDE || bits > 32)
        return ipt_fail(v->ctx, IPT_ERR_FORMAT,
                        "%s: BMP of %" PRIu64 " x %" PRIu64 " pixels, %" PRIu64
                        " bits; expected sides of 1..%d, at most 32 bits",
                        v->name, w, h, bits, IPT_IMAGE_MAX_SIDE);
    uint32_t packing = header >= 40 && v->n >= 34 ? le32(v->d + 30) : 0; /* 3: channel masks */
    if (packing != 0 && packing != 3)
        return ipt_fail(v->ctx, IPT_ERR_FORMAT,
                        "%s: found a compressed BMP (%s), which is not read: convert it to PNG or "
                        "JPEG",
                        v->name,
                        packing <= 2   ? "run lengths"
                        : packing == 4 ? "JPEG inside"
                        : packing == 5 ? "PNG inside"
                                       : "an unusual way");
    uint64_t need = start + (w * bits + 31) / 32 * 4 * h;
    return need > v->n ? truncated(v, "BMP", need) : IPT_OK;
}

/* The sub-blocks of a GIF from `at`; false when they do not end inside the file. */
static bool skip_blocks(const view *v, size_t *at)
{
    while (*at < v->n && v->d[*at] != 0)
        *at += (size_t)v->d[*at] + 1;
    if (*at >= v->n)
        return false;
    (*at)++;
    return true;
}

/* Up to the end of the first frame, the one that is taken. */
static ipt_status check_gif(const view *v)
{
    if (v->n < 14)
        return truncated(v, "GIF", 14);
    uint32_t screen_w = le16(v->d + 6), screen_h = le16(v->d + 8);
    size_t at = 13;
    if (v->d[10] & 0x80)
        at += (size_t)3 << ((v->d[10] & 7) + 1);
    while (at < v->n) {
        uint8_t what = v->d[at++];
        if (what == 0x21) {
            at++;
            if (!skip_blocks(v, &at))
                break;
        } else if (what == 0x2c) {
            if (v->n - at < 10)
                break;
            const uint8_t *p = v->d + at;
            if (le16(p + 4) == 0 || le16(p + 6) == 0 || le16(p) + le16(p + 4) > screen_w ||
                le16(p + 2) + le16(p + 6) > screen_h)
                return ipt_fail(
                    v->ctx, IPT_ERR_FORMAT,
                    "%s: damaged GIF: frame of %u x %u at %u, %u, expected inside %u x %u", v->name,
                    le16(p + 4), le16(p + 6), le16(p), le16(p + 2), screen_w, screen_h);
            at += 9;
            if (p[8] & 0x80)
                at += (size_t)3 << ((p[8] & 7) + 1);
            at++; /* code size */
            if (at >= v->n || !skip_blocks(v, &at))
                break;
            return IPT_OK;
        } else {
            return ipt_fail(v->ctx, IPT_ERR_FORMAT,
                            "%s: damaged GIF at byte %zu: found block 0x%02x, expected a frame",
                            v->name, at - 1, what);
        }
    }
    return truncated(v, "GIF", (uint64_t)v->n + 1);
}

/* Next number of a PNM header; false when there is none. */
static bool pnm_number(const view *v, size_t *at, uint64_t *out)
{
    bool comment = false;
    while (*at < v->n) {
        uint8_t c = v->d[*at];
        if (comment)
            comment = c != '\n' && c != '\r';
        else if (c == '#')
            comment = true;
        else if (!(c == ' ' || (c >= 9 && c <= 13)))
            break;
        (*at)++;
    }
    uint64_t x = 0;
    size_t first = *at;
    for (; *at < v->n && v->d[*at] >= '0' && v->d[*at] <= '9'; ++*at)
        if (x < UINT64_MAX / 10 - 1) /* beyond, more digits change nothing: it is refused */
            x = x * 10 + (uint64_t)(v->d[*at] - '0');
    *out = x;
    return *at > first;
}

static ipt_status check_pnm(const view *v)
{
    size_t at = 2;
    uint64_t w, h, max; /* above 255 stb_image 2.27 reads past the end of its own buffer */
    if (!pnm_number(v, &at, &w) || !pnm_number(v, &at, &h) || !pnm_number(v, &at, &max))
        return ipt_fail(v->ctx, IPT_ERR_FORMAT,
                        "%s: damaged PNM: expected width, height and maximum", v->name);
    if (w == 0 || h == 0 || w > IPT_IMAGE_MAX_SIDE || h > IPT_IMAGE_MAX_SIDE || max == 0 ||
        max > 255)
        return ipt_fail(v->ctx, IPT_ERR_FORMAT,
                        "%s: PNM of %" PRIu64 " x %" PRIu64 " pixels, maximum %" PRIu64
                        "; expected sides of 1..%d, maximum 1..255",
                        v->name, w, h, max, IPT_IMAGE_MAX_SIDE);
    uint64_t need = at + 1 + w * h * (v->d[1] == '6' ? 3 : 1);
    return need > v->n ? truncated(v, "PNM", need) : IPT_OK;
}

static ipt_status check_tga(const view *v)
{
    if (v->n < 18)
        return truncated(v, "TGA", 18);
    uint32_t type = v->d[2], bits = v->d[16];
    uint64_t w = le16(v->d + 12), h = le16(v->d + 14), size = (bits + 7) / 8;
    bool is_rle = type == 9 || type == 10 || type == 11;
    if (!(is_rle || (type >= 1 && type <= 3)) || w == 0 || h == 0 || size == 0 || size > 4)
        return ipt_fail(v->ctx, IPT_ERR_FORMAT,
                        "%s: not a TGA picture: type %u, %" PRIu64 " x %" PRIu64 " pixels, %u bits",
                        v->name, type, w, h, bits);
    uint64_t at = (uint64_t)18 + v->d[0];
    if (v->d[1])
        at += (uint64_t)le16(v->d + 5) * ((v->d[7] + 7u) / 8);
    uint64_t left = w * h;
    if (!is_rle)
        at += left * size;
    while (is_rle && left > 0 && at < v->n) {
        uint64_t run = (v->d[at] & 0x7f) + 1u;
        at += 1 + (v->d[at] & 0x80 ? size : run * size);
        left -= run < left ? run : left;
    }
    if (at > v->n || (is_rle && left > 0))
        return truncated(v, "TGA", at > v->n ? at : (uint64_t)v->n + 1);
    return IPT_OK;
}

static bool starts(const view *v, const char *mark, size_t n)
{
    return v->n >= n && memcmp(v->d, mark, n) == 0;
}

static bool is_text(const view *v)
{
    size_t n = v->n < 512 ? v->n : 512;
    for (size_t i = 0; i < n; i++)
        if (v->d[i] < 9 || (v->d[i] > 13 && v->d[i] < 32))
            return false;
    return true;
}

/* Formats that are told by their first bytes, but not read. */
static const struct {
    size_t at, n;
    const char *mark, *name;
    bool picture;
} known[] = {
    {8, 4, "WEBP", "a WebP picture", true},
    {4, 8, "ftypavif", "an AVIF picture", true},
    {4, 8, "ftypavis", "an AVIF picture", true},
    {4, 7, "ftyphei", "a HEIC picture", true}, /* heic, heix and others */
    {4, 8, "ftypmif1", "a HEIF picture", true},
    {4, 8, "ftypmsf1", "a HEIF picture", true},
    {4, 7, "ftyphev", "a HEIC picture", true},
    {4, 4, "ftyp", "a video file", false},
    {0, 4, "II*\0", "a TIFF picture", true},
    {0, 4, "MM\0*", "a TIFF picture", true},
    {0, 4, "8BPS", "a Photoshop picture", true},
    {0, 12, "\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL picture", true},
    {0, 2, "\xff\x0a", "a JPEG XL picture", true},
    {0, 8, "\0\0\0\x0cjP  ", "a JPEG 2000 picture", true},
    {0, 4, "\xff\x4f\xff\x51", "a JPEG 2000 picture", true},
    {0, 4, "v/1\x01", "an OpenEXR picture", true},
    {0, 10, "#?RADIANCE", "a Radiance HDR picture", true},
    {0, 4, "qoif", "a QOI picture", true},
    {0, 4, "\0\0\1\0", "an icon", true},
    {0, 4, "DDS ", "a DDS texture", true},
    {0, 4, "%PDF", "a PDF document", true},
    {0, 4, "<svg", "an SVG drawing", true},
    {0, 4, "PK\3\4", "a zip archive (or a PyTorch checkpoint)", false},
    {0, 4, "GGUF", "a GGUF model", false},
};

static const char *what_it_is(const view *v, bool *picture)
{
    *picture = false;
    if (v->n == 0)
        return "an empty file";
    for (size_t i = 0; i < IPT_COUNT(known); i++)
        if (v->n >= known[i].at + known[i].n &&
            memcmp(v->d + known[i].at, known[i].mark, known[i].n) == 0) {
            *picture = known[i].picture;
            return known[i].name;
        }
    if (v->n > 1 && v->d[0] == 0x80 && v->d[1] >= 2 && v->d[1] <= 5)
        return "a Python pickle";
    if (v->n > 9 && v->d[8] == '{' && v->d[7] == 0 && v->d[6] == 0)
        return "a safetensors file";
    if (v->n > 2 && v->d[0] == 'P' && strchr("12347Ff", v->d[1]) && v->d[1] &&
        (v->d[2] == ' ' || (v->d[2] >= 9 && v->d[2] <= 13))) {
        *picture = true;
        return "a PNM picture of another kind than P5 and P6";
    }
    return is_text(v) ? "a text file" : "unknown data";
}

ipt_status ipt_image_check(ipt_ctx *ctx, const char *name, const uint8_t *d, size_t n,
                           ipt_image_kind *kind)
{
    view v = {ctx, name, d, n};
    size_t len = strlen(name);
    if (starts(&v, "\x89PNG\r\n\x1a\n", 8)) {
        *kind = IPT_IMAGE_PNG;
        return check_png(&v);
    }
    if (starts(&v, "\xff\xd8\xff", 3)) {
        *kind = IPT_IMAGE_JPEG;
        return walk_jpeg(&v, NULL);
    }
    if (starts(&v, "GIF87a", 6) || starts(&v, "GIF89a", 6)) {
        *kind = IPT_IMAGE_GIF;
        return check_gif(&v);
    }
    if (n > 2 && d[0] == 'P' && (d[1] == '5' || d[1] == '6') &&
        (d[2] == ' ' || (d[2] >= 9 && d[2] <= 13))) {
        *kind = IPT_IMAGE_PNM;
        return check_pnm(&v);
    }
    if (starts(&v, "BM", 2) && !is_text(&v)) {
        *kind = IPT_IMAGE_BMP;
        return check_bmp(&v);
    }
    if (n > 0 && len > 4 && strcasecmp(name + len - 4, ".tga") == 0) {
        *kind = IPT_IMAGE_TGA;
        return check_tga(&v);
    }
    bool picture = false;
    const char *found = what_it_is(&v, &picture);
    return ipt_fail(ctx, IPT_ERR_FORMAT, "%s: found %s, %s", name, found,
                    picture ? "which is not read: convert it to PNG or JPEG"
                            : "expected a PNG, JPEG, BMP, GIF, PNM or TGA picture");
}
