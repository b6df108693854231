/* cli/draw.h - drawing on pictures: lines, text in a small font of its own, colours of series and
 * of quantities.  What lies outside of the picture is not drawn.  Coordinates in pixels from the
 * upper left corner. */
#ifndef IPT_CLI_DRAW_H
#define IPT_CLI_DRAW_H
#include "engine/impasto.h"

enum { CLI_SERIES = 8, CLI_TEXT_H = 9 }; /* rows of a line of text at scale 1 */
typedef struct cli_colour {
    const char *name;
    uint8_t rgb[3];
} cli_colour;
extern const cli_colour cli_series[CLI_SERIES]; /* easy to tell apart, in this order */

/* White.  Ownership: caller, ipt_image_finish.  Errors: IPT_ERR_NOMEM. */
IPT_CHECKED ipt_status cli_draw_create(ipt_ctx *ctx, int32_t w, int32_t h, ipt_image *out);
void cli_draw_fill(ipt_image *im, int32_t x, int32_t y, int32_t w, int32_t h, const uint8_t rgb[3]);
/* Of a width in pixels, with smooth edges and round ends. */
void cli_draw_line(ipt_image *im, double x0, double y0, double x1, double y1, double width,
                   const uint8_t rgb[3]);
/* ASCII; each other character is a box.  scale: pixels of a dot. */
void cli_draw_text(ipt_image *im, int32_t x, int32_t y, int32_t scale, const uint8_t rgb[3],
                   const char *text);
int32_t cli_draw_text_width(const char *text, int32_t scale);
/* The colour of a quantity 0..1: dark blue to light yellow, as much lighter as it is larger. */
void cli_draw_heat(double v, uint8_t rgb[3]);
#endif
