/* cli/ora.h - OpenRaster: a picture in layers, which GIMP, Krita, MyPaint and others open.  Source:
 * https://www.openraster.org, baseline 0.0.3. */
#ifndef IPT_CLI_ORA_H
#define IPT_CLI_ORA_H
#include "cli/zip.h"

typedef struct cli_layer {
    const char *name;  /* any text */
    const uint8_t *px; /* [h,w,channels] */
    int32_t channels;  /* 1 grey, 3 RGB, 4 RGBA */
    double opacity;    /* 0..1 */
    bool is_hidden;
} cli_layer;

typedef struct cli_ora {
    cli_zip zip;
    int32_t w, h, n_layer;
    uint8_t *merged; /* [h,w,3] */
    char *stack;     /* elements of stack.xml, the topmost first */
} cli_ora;
/* Ownership: caller, cli_ora_finish, also after a failure.  Errors: IPT_ERR_NOMEM. */
IPT_CHECKED ipt_status cli_ora_begin(ipt_ctx *ctx, int32_t w, int32_t h, cli_ora *o);
/* A layer on top of those before; the first one is opaque.  Errors: IPT_ERR_NOMEM; of the file
 * IPT_ERR_OUTPUT. */
IPT_CHECKED ipt_status cli_ora_add(cli_ora *o, const cli_layer *l);
/* Ends the file: o->zip.data [o->zip.n]. */
IPT_CHECKED ipt_status cli_ora_end(cli_ora *o);
void cli_ora_finish(cli_ora *o); /* frees; safe on zeroed */
#endif
