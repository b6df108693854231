/* engine/frequency.c - see frequency.h.  Latents have some thousand values: sums over rows and then
 * columns do, and no library is needed. */
#include "engine/frequency.h"

#include <math.h>
#include <string.h>

/* out [n][m] complex = sum over i of in [n][i] e^(-2 pi j i k / m); stride: of i and k. */
static void transform(const double *re, const double *im, double *out_re, double *out_im, size_t m,
                      size_t stride, const double *turn)
{
    for (size_t k = 0; k < m; k++) {
        double a = 0, b = 0;
        for (size_t i = 0; i < m; i++) {
            double c = turn[2 * (i * k % m)], s = turn[2 * (i * k % m) + 1];
            a += re[i * stride] * c + im[i * stride] * s;
            b += im[i * stride] * c - re[i * stride] * s;
        }
        out_re[k * stride] = a;
        out_im[k * stride] = b;
    }
}

static void turns(double *turn, size_t m)
{
    const double pi = 3.14159265358979323846;
    for (size_t i = 0; i < m; i++) {
        turn[2 * i] = cos(2 * pi * (double)i / (double)m);
        turn[2 * i + 1] = sin(2 * pi * (double)i / (double)m);
    }
}

/* In place: re [h][w] real becomes its transform re, im; room [2 h w + 2 max(h, w)]. */
static void transform_2d(double *re, double *im, size_t h, size_t w, double *room)
{
    double *re2 = room, *im2 = room + h * w, *turn = room + 2 * h * w;
    turns(turn, w);
    for (size_t y = 0; y < h; y++)
        transform(re + y * w, im + y * w, re2 + y * w, im2 + y * w, w, 1, turn);
    turns(turn, h);
    for (size_t k = 0; k < w; k++)
        transform(re2 + k, im2 + k, re + k, im + k, h, w, turn);
}

/* Distance of cell i from the lowest frequency: cell i is frequency y, x of 0..m-1; from the middle
 * as fftshift has it. */
static double radius_of(size_t i, size_t h, size_t w)
{
    const size_t mid_y = h / 2, mid_x = w / 2;
    double y = (double)((i / w + mid_y) % h) - (double)mid_y,
           x = (double)((i % w + mid_x) % w) - (double)mid_x;
    return sqrt(y * y + x * x);
}

/* The mean over rings from `share` of the largest radius on, of ring means over the largest one. */
static double rings(const double *re, const double *im, size_t h, size_t w, double share,
                    double *sum, double *count, size_t n)
{
    double top = 0, high = 0, first = share * (double)(n - 1);
    size_t used = 0;
    for (size_t i = 0; i < h * w; i++) {
        size_t r = (size_t)radius_of(i, h, w);
        if (r < n) {
            sum[r] += sqrt(re[i] * re[i] + im[i] * im[i]);
            count[r]++;
        }
    }
    for (size_t r = 0; r < n; r++)
        if (count[r] > 0 && sum[r] / count[r] > top)
            top = sum[r] / count[r];
    for (size_t r = 0; r < n; r++)
        if (count[r] > 0 && (double)r >= first) {
            high += sum[r] / count[r];
            used++;
        }
    return used > 0 && top > 0 ? high / (double)used / top : 0;
}

ipt_status ipt_high_frequencies(ipt_ctx *ctx, const float *x, int32_t c, int32_t h, int32_t w,
                                double share, double *out)
{
    size_t sh = (size_t)h, sw = (size_t)w, n = sh * sw, side = sh > sw ? sh : sw;
    const size_t mid_y = sh / 2, mid_x = sw / 2;
    size_t radius = (size_t)sqrt((double)(mid_y * mid_y + mid_x * mid_x)) + 1;
    *out = 0;
    if (n == 0 || c < 1)
        return IPT_OK;
    double *v = ipt_calloc(ctx, 4 * n + 2 * side + 2 * radius, sizeof *v);
    if (!v)
        return IPT_ERR_NOMEM;
    double *re = v, *im = v + n, *room = v + 2 * n, *sum = room + 2 * n + 2 * side;
    for (size_t k = 0; k < (size_t)c; k++)
        for (size_t i = 0; i < n; i++)
            re[i] += (double)x[k * n + i] / c;
    transform_2d(re, im, sh, sw, room);
    *out = rings(re, im, sh, sw, share, sum, sum + radius, radius);
    ipt_free(v);
    return IPT_OK;
}

/* Means of the roots of power [h][w] over rings, and its mean from a radius on. */
static void rings_of_power(const double *power, size_t h, size_t w, double share,
                           double band[IPT_BANDS], double *high)
{
    const size_t mid_y = h / 2, mid_x = w / 2;
    double most = sqrt((double)(mid_y * mid_y + mid_x * mid_x)), count[IPT_BANDS] = {0};
    for (size_t i = 0; i < h * w; i++) {
        double r = radius_of(i, h, w);
        size_t k = most > 0 ? (size_t)(r / most * IPT_BANDS) : 0;
        k = k < IPT_BANDS ? k : IPT_BANDS - 1;
        band[k] += sqrt(power[i]);
        count[k]++;
        *high += r >= share * most ? power[i] / (double)(h * w) : 0;
    }
    for (size_t k = 0; k < IPT_BANDS; k++)
        band[k] /= count[k] > 0 ? count[k] : 1;
}

ipt_status ipt_frequency_bands(ipt_ctx *ctx, const float *x, int32_t c, int32_t h, int32_t w,
                               double share, double band[IPT_BANDS], double *high)
{
    size_t sh = (size_t)h, sw = (size_t)w, hw = sh * sw, side = sh > sw ? sh : sw;
    memset(band, 0, IPT_BANDS * sizeof *band);
    *high = 0;
    if (hw == 0 || c < 1)
        return IPT_OK;
    double *v = ipt_calloc(ctx, 5 * hw + 2 * side, sizeof *v);
    if (!v)
        return IPT_ERR_NOMEM;
    double *re = v, *im = v + hw, *power = v + 2 * hw, *room = v + 3 * hw;
    for (size_t k = 0; k < (size_t)c; k++) {
        for (size_t i = 0; i < hw; i++) {
            re[i] = (double)x[k * hw + i];
            im[i] = 0;
        }
        transform_2d(re, im, sh, sw, room);
        for (size_t i = 0; i < hw; i++)
            power[i] += (re[i] * re[i] + im[i] * im[i]) / (double)hw / c;
    }
    rings_of_power(power, sh, sw, share, band, high);
    ipt_free(v);
    return IPT_OK;
}
