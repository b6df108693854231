/* cli/zip.c - see zip.h. */
#include "cli/zip.h"

#include <string.h>

enum { DAY = 1 << 5 | 1, VERSION = 20 }; /* 1 January 1980: the same bytes whenever it is made */

static ipt_status append(ipt_ctx *ctx, uint8_t **data, size_t *n, size_t *room, const void *p,
                         size_t more)
{
    if (more > *room - *n) {
        size_t grown = *room + *room / 2 + more + 1024;
        uint8_t *v = ipt_regrow(ctx, *data, *room, grown);
        if (!v)
            return IPT_ERR_NOMEM;
        *data = v;
        *room = grown;
    }
    memcpy(*data + *n, p, more);
    *n += more;
    return IPT_OK;
}

static uint8_t *put(uint8_t *p, uint32_t v, int bytes)
{
    for (int i = 0; i < bytes; i++)
        *p++ = (uint8_t)(v >> (8 * i));
    return p;
}

/* What both headers of a member hold, from "version needed" to the length of the extra field. */
static uint8_t *put_common(uint8_t *p, uint32_t crc, size_t n, size_t n_name)
{
    p = put(p, VERSION, 2);
    p = put(p, 0, 2); /* flags */
    p = put(p, 0, 2); /* stored */
    p = put(p, 0, 2);
    p = put(p, DAY, 2);
    p = put(p, crc, 4);
    p = put(p, (uint32_t)n, 4);
    p = put(p, (uint32_t)n, 4);
    p = put(p, (uint32_t)n_name, 2);
    return put(p, 0, 2);
}

ipt_status cli_zip_add(cli_zip *z, const char *name, const void *data, size_t n)
{
    uint8_t local[30], central[46], *p = NULL;
    size_t n_name = strlen(name), at = z->n;
    uint32_t crc = ipt_crc32(data, n);
    if (n > UINT32_MAX || at + n > UINT32_MAX - (64 << 20) || z->count >= UINT16_MAX)
        return ipt_fail(z->ctx, IPT_ERR_OUTPUT, "%s: a ZIP file holds at most 4 GiB", name);
    put_common(put(local, 0x04034b50, 4), crc, n, n_name);
    p = put(put(central, 0x02014b50, 4), VERSION, 2);
    p = put_common(p, crc, n, n_name);
    p = put(p, 0, 2); /* comment */
    p = put(p, 0, 2); /* disk */
    p = put(p, 0, 2);
    p = put(p, 0, 4); /* attributes */
    put(p, (uint32_t)at, 4);
    IPT_TRY(append(z->ctx, &z->data, &z->n, &z->room, local, sizeof local));
    IPT_TRY(append(z->ctx, &z->data, &z->n, &z->room, name, n_name));
    IPT_TRY(append(z->ctx, &z->data, &z->n, &z->room, data, n));
    IPT_TRY(append(z->ctx, &z->index, &z->n_index, &z->index_room, central, sizeof central));
    IPT_TRY(append(z->ctx, &z->index, &z->n_index, &z->index_room, name, n_name));
    z->count++;
    return IPT_OK;
}

ipt_status cli_zip_end(cli_zip *z)
{
    uint8_t end[22] = {0}, *p = put(put(end, 0x06054b50, 4), 0, 4);
    p = put(p, z->count, 2);
    p = put(p, z->count, 2);
    p = put(p, (uint32_t)z->n_index, 4);
    put(p, (uint32_t)z->n, 4);
    IPT_TRY(append(z->ctx, &z->data, &z->n, &z->room, z->index, z->n_index));
    return append(z->ctx, &z->data, &z->n, &z->room, end, sizeof end);
}

void cli_zip_finish(cli_zip *z)
{
    ipt_free(z->data);
    ipt_free(z->index);
    *z = (cli_zip){0};
}
