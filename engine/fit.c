/* engine/fit.c - what to do when a graph passes what the device holds: the UNet's rows in smaller
 * batches, then with weights that come in while it runs, and when nothing helps a message that
 * names the picture size that fits. Must not know: text, samplers, files. */
#include "engine/internal.h"

#include "vae/vae.h"

#include <string.h>

bool ipt_too_large(ipt_status s) { return s == IPT_ERR_DEVICE_MEM || s == IPT_ERR_TOO_LARGE; }

/* The size of the same aspect whose longer side is `longer`. */
static void scaled(int32_t width, int32_t height, int32_t longer, int32_t f, int32_t *w, int32_t *h)
{
    int32_t most = width > height ? width : height;
    int32_t n = (int32_t)(((int64_t)longer * (width < height ? width : height) + most / 2) / most);
    n = n / f > 0 ? n / f * f : f;
    *w = width >= height ? longer : n;
    *h = width >= height ? n : longer;
}

ipt_status ipt_fit_advise(ipt_engine *e, ipt_status s, const ipt_plan_key *failed, int32_t width,
                          int32_t height, ipt_fit_fn fits)
{
    char first[800];
    const int32_t f = ipt_vae_factor(&e->m->config.vae), step = 8 * f;
    int32_t lo = 0, hi = ((width > height ? width : height) + step - 1) / step, w = 0, h = 0;
    ipt_name(first, sizeof first, "%s", ipt_last_error(e->ctx));
    while (lo + 1 < hi) { /* in steps of the longer side: lo fits, hi does not */
        int32_t mid = lo + (hi - lo) / 2;
        scaled(width, height, mid * step, f, &w, &h);
        ipt_status got = fits(e, failed, w, h);
        if (got != IPT_OK && !ipt_too_large(got))
            return got;
        *(got == IPT_OK ? &lo : &hi) = mid;
    }
    if (lo == 0)
        return ipt_fail(e->ctx, s, "%s", first);
    scaled(width, height, lo * step, f, &w, &h);
    return ipt_fail(e->ctx, s, "a picture of %dx%d is too large here, -W %d -H %d fits (%s)", width,
                    height, w, h, first);
}

/* --- the UNet --------------------------------------------------------------------------------- */
static ipt_plan_key unet_key(const ipt_engine *e, const ipt_unet_key *key)
{
    return (ipt_plan_key){.kind = IPT_PLAN_UNET, .model = e->m->id, .unet = *key};
}

/* One row of the key that failed in another size. */
static ipt_status one_row_fits(ipt_engine *e, const ipt_plan_key *failed, int32_t width,
                               int32_t height)
{
    const int32_t f = ipt_vae_factor(&e->m->config.vae);
    ipt_plan_key key = *failed;
    key.unet.batch = 1;
    key.unet.h = height / f;
    key.unet.w = width / f;
    return ipt_plan_dry(e, &key);
}

ipt_status ipt_unet_plan(ipt_engine *e, ipt_unet_key *key, ipt_plan **out)
{
    const int32_t f = ipt_vae_factor(&e->m->config.vae), asked = key->batch;
    ipt_plan_key full = unet_key(e, key);
    const ipt_kept_plan *kept = ipt_plan_find(e, &full, asked);
    if (kept) { /* perhaps for fewer rows: what was found out before */
        key->batch = kept->key.unet.batch;
        e->is_tight = e->is_tight || ipt_plan_is_streamed(kept->plan);
    }
    for (;;) {
        full = unet_key(e, key);
        ipt_status status = ipt_plan_get(e, &full, asked, out);
        if (status == IPT_OK)
            break;
        if (!ipt_too_large(status))
            return status;
        if (key->batch > 1) {
            key->batch = (key->batch + 1) / 2;
        } else if (status == IPT_ERR_DEVICE_MEM && e->opts.vram_limit > 0 && !e->is_tight) {
            e->is_tight = true;
            key->batch = asked;
        } else {
            return ipt_fit_advise(e, status, &full, key->w * f, key->h * f, one_row_fits);
        }
    }
    if (key->batch < asked)
        ipt_log(e->ctx, IPT_LOG_INFO, "%d rows at once pass what %s holds: evaluating %d", asked,
                ipt_engine_device_name(e), key->batch);
    return IPT_OK;
}
