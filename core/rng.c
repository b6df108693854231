/* core/rng.c - the random streams other programs made popular, rebuilt from their definitions:
 * PyTorch's CPU randn (Mersenne Twister), CUDA's randn (Philox 4x32-10), and splitmix64.
 *
 * Logarithms and sines are taken in double and rounded once, so values are within one or two
 * units in the last place of the originals, which use several vector math libraries. */
#include "core/core.h"

#include <math.h>
#include <string.h>

#define MT_N 624
#define MT_M 397

static const double two_pi = 6.283185307179586476925286766559;

/* --- torch CPU ------------------------------------------------------------------------------- */
void ipt_rng_torch_seed(ipt_rng_torch *r, uint64_t seed)
{
    memset(r, 0, sizeof(*r));
    /* torch keeps 64 bits of seed but initialises the twister with the low 32 */
    r->mt[0] = (uint32_t)seed;
    for (uint32_t i = 1; i < MT_N; i++)
        r->mt[i] = 1812433253u * (r->mt[i - 1] ^ (r->mt[i - 1] >> 30)) + i;
    r->at = MT_N;
}

static void mt_refill(ipt_rng_torch *r)
{
    for (uint32_t i = 0; i < MT_N; i++) {
        uint32_t y = (r->mt[i] & 0x80000000u) | (r->mt[(i + 1) % MT_N] & 0x7fffffffu);
        r->mt[i] = r->mt[(i + MT_M) % MT_N] ^ (y >> 1) ^ ((y & 1u) ? 0x9908b0dfu : 0u);
    }
    r->at = 0;
}

static uint32_t mt_next(ipt_rng_torch *r)
{
    if (r->at >= MT_N)
        mt_refill(r);
    uint32_t y = r->mt[r->at++];
    y ^= y >> 11;
    y ^= (y << 7) & 0x9d2c5680u;
    y ^= (y << 15) & 0xefc60000u;
    return y ^ (y >> 18);
}

static float mt_uniform(ipt_rng_torch *r) { return (float)(mt_next(r) & 0xffffffu) * 0x1p-24f; }

static double mt_uniform_double(ipt_rng_torch *r)
{
    uint64_t high = mt_next(r);
    uint64_t low = mt_next(r);
    return (double)(((high << 32) | low) & ((UINT64_C(1) << 53) - 1)) * 0x1p-53;
}

/* The serial path: pairs in double, the sine half kept for the next call of this path. */
static float normal_serial(ipt_rng_torch *r)
{
    if (r->has_cached) {
        r->has_cached = false;
        return (float)r->cached;
    }
    double u1 = mt_uniform_double(r);
    double u2 = mt_uniform_double(r);
    double radius = sqrt(-2.0 * log1p(-u2));
    double theta = two_pi * u1;
    r->cached = radius * sin(theta);
    r->has_cached = true;
    return (float)(radius * cos(theta));
}

/* Sixteen uniforms become sixteen normals in place. */
static void normal_block(float v[16])
{
    for (int j = 0; j < 8; j++) {
        double u1 = (double)(1.0f - v[j]); /* [0,1) to (0,1] for the logarithm */
        double radius = sqrt(-2.0 * log(u1));
        double theta = (double)((float)two_pi * v[j + 8]); /* rounded to f32 as torch does */
        v[j] = (float)(radius * cos(theta));
        v[j + 8] = (float)(radius * sin(theta));
    }
}

void ipt_rng_torch_randn(ipt_rng_torch *r, float *out, size_t n)
{
    if (n < 16) {
        for (size_t i = 0; i < n; i++)
            out[i] = normal_serial(r);
        return;
    }
    for (size_t i = 0; i < n; i++)
        out[i] = mt_uniform(r);
    for (size_t i = 0; i + 16 <= n; i += 16)
        normal_block(out + i);
    if (n % 16 != 0) { /* torch redraws the last sixteen as one block */
        float *tail = out + n - 16;
        for (int i = 0; i < 16; i++)
            tail[i] = mt_uniform(r);
        normal_block(tail);
    }
}

/* --- Philox ---------------------------------------------------------------------------------- */
static void philox_round(uint32_t c[4], const uint32_t k[2])
{
    uint64_t a = (uint64_t)c[0] * 0xD2511F53u;
    uint64_t b = (uint64_t)c[2] * 0xCD9E8D57u;
    uint32_t c1 = c[1], c3 = c[3];
    c[0] = (uint32_t)(b >> 32) ^ c1 ^ k[0];
    c[1] = (uint32_t)b;
    c[2] = (uint32_t)(a >> 32) ^ c3 ^ k[1];
    c[3] = (uint32_t)a;
}

void ipt_rng_philox_randn(uint64_t seed, uint32_t offset, float *out, size_t n)
{
    const double scale = (double)2.3283064e-10f; /* 2^-32 */
    const double scale_pi = (double)(float)(2.3283064e-10 * 6.2831855);
    for (size_t i = 0; i < n; i++) {
        uint32_t c[4] = {offset, 0, (uint32_t)i, (uint32_t)((uint64_t)i >> 32)};
        uint32_t k[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
        for (int round = 0; round < 10; round++) {
            philox_round(c, k);
            k[0] += 0x9E3779B9u;
            k[1] += 0xBB67AE85u;
        }
        double u = (double)c[0] * scale + scale / 2;
        double v = (double)c[1] * scale_pi + scale_pi / 2;
        out[i] = (float)(sqrt(-2.0 * log(u)) * sin(v));
    }
}

/* --- splitmix64 (Steele, Lea, Flood 2014) ---------------------------------------------------- */
uint64_t ipt_rng_next(uint64_t *state)
{
    uint64_t z = (*state += UINT64_C(0x9E3779B97F4A7C15));
    z = (z ^ (z >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94D049BB133111EB);
    return z ^ (z >> 31);
}

float ipt_rng_uniform(uint64_t *state) { return (float)(ipt_rng_next(state) >> 40) * 0x1p-24f; }

float ipt_rng_normal(uint64_t *state)
{
    double u = (double)(ipt_rng_next(state) >> 11) * 0x1p-53;
    double v = (double)(ipt_rng_next(state) >> 11) * 0x1p-53;
    return (float)(sqrt(-2.0 * log1p(-u)) * cos(two_pi * v));
}
