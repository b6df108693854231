/* sampler/vector.c - arithmetic on latents: weighted sums, clipping, thresholding, predictions,
 * guidance and embeddings.  Knows no schedule. */
#include "sampler/internal.h"

#include <stdlib.h>
#include <string.h>

void combine(float *out, size_t n, int32_t count, const double *c, const float *const *v)
{
    for (size_t i = 0; i < n; i++) {
        double sum = 0;
        for (int32_t j = 0; j < count; j++) /* a zero weight must not read an unused buffer */
            if (c[j] != 0)
                sum += c[j] * (double)v[j][i];
        out[i] = (float)sum;
    }
}

void clamp_values(float *v, size_t n, double range)
{
    float r = (float)range;
    for (size_t i = 0; i < n; i++)
        v[i] = v[i] < -r ? -r : v[i] > r ? r : v[i];
}

static int compare_floats(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

void threshold_values(const ipt_sampler_config *cfg, float *x0, size_t n, float *work)
{
    for (size_t i = 0; i < n; i++)
        work[i] = fabsf(x0[i]);
    qsort(work, n, sizeof(*work), compare_floats);
    double rank = cfg->dynamic_thresholding_ratio * (double)(n - 1);
    size_t low = (size_t)rank;
    size_t high = low + 1 < n ? low + 1 : low;
    double at = (double)work[low] + (rank - (double)low) * ((double)work[high] - (double)work[low]);
    /* torch.clamp(min=1, max=max): the upper bound wins when it is below 1 */
    double s = at < 1 ? 1 : at;
    s = s > cfg->sample_max_value ? cfg->sample_max_value : s;
    for (size_t i = 0; i < n; i++) {
        double v = (double)x0[i];
        v = v < -s ? -s : v > s ? s : v;
        x0[i] = (float)(v / s);
    }
}

void history_push(ipt_sampler *s, const float *v, double t)
{
    float *oldest = s->hist[SAMPLER_HISTORY - 1];
    for (int32_t j = SAMPLER_HISTORY - 1; j > 0; j--) {
        s->hist[j] = s->hist[j - 1];
        s->hist_t[j] = s->hist_t[j - 1];
    }
    s->hist[0] = oldest;
    s->hist_t[0] = t;
    memcpy(oldest, v, s->n * sizeof(*v));
    if (s->n_hist < SAMPLER_HISTORY)
        s->n_hist++;
}

void x0_coefficients_alpha(ipt_prediction pred, double abar, double *p, double *q)
{
    double a = sqrt(abar), b = sqrt(1 - abar);
    *p = pred == IPT_PRED_EPSILON ? 1 / a : pred == IPT_PRED_V ? a : 0;
    *q = pred == IPT_PRED_EPSILON ? -b / a : pred == IPT_PRED_V ? -b : 1;
}

void x0_coefficients_ve(ipt_prediction pred, double sigma, double *p, double *q)
{
    double v = square(sigma) + 1;
    *p = pred == IPT_PRED_EPSILON ? 1 : pred == IPT_PRED_V ? 1 / v : 0;
    *q = pred == IPT_PRED_EPSILON ? -sigma : pred == IPT_PRED_V ? -sigma / sqrt(v) : 1;
}

void x0_coefficients_vp(ipt_prediction pred, double sigma, double *p, double *q)
{
    double a = 1 / sqrt(square(sigma) + 1);
    *p = pred == IPT_PRED_EPSILON ? 1 / a : pred == IPT_PRED_V ? a : 0;
    *q = pred == IPT_PRED_EPSILON ? -sigma : pred == IPT_PRED_V ? -sigma * a : 1;
}

bool solve_small(int32_t n, double *a, double *b, double *y)
{
    for (int32_t col = 0; col < n; col++) {
        int32_t pivot = col;
        for (int32_t r = col + 1; r < n; r++)
            if (fabs(a[r * n + col]) > fabs(a[pivot * n + col]))
                pivot = r;
        if (!(fabs(a[pivot * n + col]) > 0))
            return false;
        for (int32_t c = 0; c < n; c++) {
            double swap = a[col * n + c];
            a[col * n + c] = a[pivot * n + c];
            a[pivot * n + c] = swap;
        }
        double swap = b[col];
        b[col] = b[pivot];
        b[pivot] = swap;
        for (int32_t r = col + 1; r < n; r++) {
            double f = a[r * n + col] / a[col * n + col];
            for (int32_t c = col; c < n; c++)
                a[r * n + c] -= f * a[col * n + c];
            b[r] -= f * b[col];
        }
    }
    for (int32_t r = n - 1; r >= 0; r--) {
        double sum = b[r];
        for (int32_t c = r + 1; c < n; c++)
            sum -= a[r * n + c] * y[c];
        y[r] = sum / a[r * n + r];
    }
    return true;
}

/* --- guidance -------------------------------------------------------------------------------- */
static double deviation(const float *v, size_t n)
{
    double sum = 0, squares = 0;
    for (size_t i = 0; i < n; i++)
        sum += (double)v[i];
    double mean = sum / (double)n;
    for (size_t i = 0; i < n; i++)
        squares += square((double)v[i] - mean);
    return n > 1 ? sqrt(squares / (double)(n - 1)) : 0;
}

void ipt_cfg(const float *uncond, const float *cond, size_t n, double scale, double rescale,
             float *out)
{
    if (n == 0)
        return;
    double cond_deviation = rescale > 0 ? deviation(cond, n) : 0; /* before out overwrites cond */
    for (size_t i = 0; i < n; i++)
        out[i] = (float)((double)uncond[i] + scale * ((double)cond[i] - (double)uncond[i]));
    if (!(rescale > 0))
        return;
    double out_deviation = deviation(out, n);
    if (!(out_deviation > 0))
        return; /* a constant output has no deviation to restore */
    double factor = rescale * (cond_deviation / out_deviation) + (1 - rescale);
    for (size_t i = 0; i < n; i++)
        out[i] = (float)((double)out[i] * factor);
}

/* --- embeddings: f32 at the places where the reference rounds, as sin of a large argument shows
 *     every bit of it ------------------------------------------------------------------------- */
void ipt_guidance_embedding(double w, int32_t dim, float *out)
{
    int32_t half = dim / 2;
    float scaled = (float)w * 1000.0f;
    float rate = logf(10000.0f) / (float)(half > 1 ? half - 1 : 1);
    for (int32_t i = 0; i < half; i++) {
        float frequency = (float)exp((double)((float)i * -rate));
        float angle = scaled * frequency;
        out[i] = (float)sin((double)angle);
        out[half + i] = (float)cos((double)angle);
    }
    if (dim % 2 == 1)
        out[dim - 1] = 0;
}

void ipt_timestep_embedding(double t, int32_t dim, bool flip_sin_to_cos, double freq_shift,
                            float *out)
{
    int32_t half = dim / 2;
    float base = (float)-log(10000.0);
    double denominator = (double)half - freq_shift;
    float divisor = (float)(denominator > 0 ? denominator : 1);
    for (int32_t i = 0; i < half; i++) {
        float exponent = base * (float)i / divisor;
        float angle = (float)t * (float)exp((double)exponent);
        float sine = (float)sin((double)angle), cosine = (float)cos((double)angle);
        out[i] = flip_sin_to_cos ? cosine : sine;
        out[half + i] = flip_sin_to_cos ? sine : cosine;
    }
    if (dim % 2 == 1)
        out[dim - 1] = 0;
}
