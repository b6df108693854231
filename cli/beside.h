/* cli/beside.h - files beside the pictures of generate: the method's masks, and what each adapter
 * did (--masks DIR, --explain DIR).  Names in DIR begin with the picture's, without its ending. */
#ifndef IPT_CLI_BESIDE_H
#define IPT_CLI_BESIDE_H
#include "cli/cli.h"

#define CLI_WHERE "-where" /* ends the name of a heat map */
#define CLI_WHEN "-when"   /* and that of the plot over steps */
enum { CLI_NAME = 80 };    /* room of a name that is safe in a file's name, with its end */

/* A text as a part of a file's name: letters, digits, '.', '-' and what is not ASCII stay, runs of
 * everything else become '_', none at the start; cut at a whole character. */
const char *cli_safe_name(const char *text, char buf[CLI_NAME]);
/* The adapter's word without its number and phrase, else its own name; safe, and like no earlier
 * one of `taken` [n], also in another case; nor do files of --masks and --explain meet in one
 * folder. */
void cli_adapter_name(const char *name, const char *word, char (*taken)[CLI_NAME], size_t n,
                      char out[CLI_NAME]);

/* Whether files of a picture named `stem` can be written into dir, which is made when the first one
 * is.  Leaves no trace.  Errors: IPT_ERR_OUTPUT. */
IPT_CHECKED ipt_status cli_beside_check(ipt_ctx *ctx, const char *dir, const char *stem);
/* Writes dir/<stem><rest>; its path goes behind `files`, in memory of arena.  Errors:
 * IPT_ERR_OUTPUT, IPT_ERR_NOMEM. */
IPT_CHECKED ipt_status cli_beside_write(ipt_arena *arena, const char *dir, const char *stem,
                                        const char *rest, const void *data, size_t n,
                                        cli_list *files);

/* A mask [h,w] 0..1 as grey of a picture's size [im->h,im->w]; a cell is a block. */
void cli_mask_pixels(const float *mask, int32_t h, int32_t w, const ipt_image *im, uint8_t *grey);
/* dir/<stem>-<adapter>.png for each mask: grey, white where the adapter was let in, in the
 * picture's size; a cell of the latent is a block.  Errors: as above. */
IPT_CHECKED ipt_status cli_masks_save(ipt_arena *arena, const char *dir, const char *stem,
                                      const ipt_masks *m, cli_list *files);

/* What adapters did to the picture at `picture` (explain.c): dir/<stem>-<adapter>-where.png for
 * each, <stem>-when.png, <stem>.json and <stem>.ora.  Errors: as above. */
IPT_CHECKED ipt_status cli_explain_save(ipt_arena *arena, const char *dir, const char *stem,
                                        const char *picture, const ipt_explanation *x,
                                        cli_list *files);
#endif
