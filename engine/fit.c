/* engine/fit.c - what to do when a graph passes what the device holds: the UNet's rows in smaller
 * batches, and when nothing helps a message that names the picture size that fits.
 * Must not know: text, samplers, files. */
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

ipt_status ipt_fit_advise(ipt_engine *e, ipt_status s, int32_t width, int32_t height,
                          ipt_fit_fn fits)
{
    char first[800];
    const int32_t f = ipt_vae_factor(&e->config.vae), step = 8 * f;
    int32_t lo = 0, hi = ((width > height ? width : height) + step - 1) / step, w = 0, h = 0;
    ipt_name(first, sizeof first, "%s", ipt_last_error(e->ctx));
    while (lo + 1 < hi) { /* in steps of the longer side: lo fits, hi does not */
        int32_t mid = lo + (hi - lo) / 2;
        scaled(width, height, mid * step, f, &w, &h);
        ipt_status got = fits(e, w, h);
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
/* dry: only whether it fits; *out stays NULL. */
static ipt_status create_unet(ipt_engine *e, const ipt_unet_key *key, bool dry, ipt_plan **out)
{
    ipt_graph *g = NULL;
    ipt_weights *store = NULL;
    ipt_plan *plan = NULL;
    size_t n_site = 0;
    IPT_TRY(ipt_engine_store(e, IPT_COMP_UNET, &store));
    IPT_TRY(ipt_graph_create(e->ctx, &g));
    const ipt_adapter_site *site = ipt_bank_sites(e->bank, IPT_COMP_UNET, &n_site);
    ipt_graph_adapters(g, site, n_site, IPT_GATE_ROWS, key->batch, (int)ipt_bank_n_slot(e->bank));
    ipt_unet_build(g, &e->config.unet, key);
    ipt_plan_opts o = {.gpu = e->gpu, .weights = store, .dry = dry};
    ipt_status status = ipt_plan_create(g, &o, &plan);
    ipt_graph_destroy(&g);
    if (status == IPT_OK && !dry)
        status = ipt_bank_write(e->bank, IPT_COMP_UNET, plan, &e->bytes_uploaded);
    if (status != IPT_OK || dry)
        ipt_plan_destroy(&plan);
    *out = plan;
    return status;
}

static ipt_status one_row_fits(ipt_engine *e, int32_t width, int32_t height)
{
    const int32_t f = ipt_vae_factor(&e->config.vae);
    const ipt_unet_key key = {1, height / f, width / f, e->unet.key[3], (ipt_dtype)e->unet.key[4]};
    ipt_plan *none = NULL;
    return create_unet(e, &key, true, &none);
}

ipt_status ipt_unet_plan(ipt_engine *e, ipt_unet_key *key)
{
    const int32_t f = ipt_vae_factor(&e->config.vae), asked = key->batch;
    for (;; key->batch = (key->batch + 1) / 2) {
        const int32_t want[8] = {key->batch,
                                 key->h,
                                 key->w,
                                 key->tokens,
                                 (int32_t)key->act,
                                 (int32_t)ipt_bank_n_slot(e->bank),
                                 0,
                                 1};
        if (e->unet.plan && memcmp(e->unet.key, want, sizeof want) == 0)
            break;
        ipt_plan_destroy(&e->unet.plan);
        memcpy(e->unet.key, want, sizeof want);
        ipt_status status = create_unet(e, key, false, &e->unet.plan);
        if (status == IPT_OK) {
            e->n_plans++;
            break;
        }
        if (ipt_too_large(status) && key->batch == 1)
            return ipt_fit_advise(e, status, key->w * f, key->h * f, one_row_fits);
        if (!ipt_too_large(status))
            return status;
    }
    if (key->batch < asked)
        ipt_log(e->ctx, IPT_LOG_INFO, "%d rows at once pass what %s holds: evaluating %d", asked,
                ipt_engine_device_name(e), key->batch);
    return IPT_OK;
}
