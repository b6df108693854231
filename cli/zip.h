/* cli/zip.h - ZIP files of stored members, made in memory.  Source: PKWARE's APPNOTE 6.3.3,
 * sections 4.3.7, 4.3.12, 4.3.16. */
#ifndef IPT_CLI_ZIP_H
#define IPT_CLI_ZIP_H
#include "core/core.h"

typedef struct cli_zip {
    ipt_ctx *ctx;
    uint8_t *data; /* [n] local headers and members */
    size_t n, room;
    uint8_t *index; /* [n_index] the central directory */
    size_t n_index, index_room;
    uint32_t count;
} cli_zip;
/* Appends a member; its name is ASCII.  The first one of an OpenRaster file is "mimetype".  After a
 * failure the file is good for cli_zip_finish only.
 * Errors: IPT_ERR_NOMEM; IPT_ERR_OUTPUT above 4 GiB or 65535 members. */
IPT_CHECKED ipt_status cli_zip_add(cli_zip *z, const char *name, const void *data, size_t n);
/* Ends the file: it is data [n] then.  Nothing can be added any more.  Errors: as above. */
IPT_CHECKED ipt_status cli_zip_end(cli_zip *z);
void cli_zip_finish(cli_zip *z); /* frees; safe on zeroed */
#endif
