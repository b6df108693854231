/* core/half.c - 16-bit and 8-bit floating point formats, bit by bit (no hardware needed). */
#include "core/core.h"

#include <math.h>
#include <string.h>

static float from_bits(uint32_t u)
{
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

float ipt_f16_to_f32(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16, exp = (h >> 10) & 31u, man = h & 1023u;
    if (exp == 31)
        return from_bits(sign | 0x7f800000u | (man << 13));
    if (exp != 0)
        return from_bits(sign | ((exp + 112) << 23) | (man << 13));
    float f = (float)man * 0x1p-24f; /* subnormal: exact */
    return sign ? -f : f;
}

uint16_t ipt_f32_to_f16(float f)
{
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    uint32_t sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
    if (a > 0x7f800000u)
        return (uint16_t)(sign | 0x7e00u);
    if (a >= 0x477ff000u) /* rounds to 65536 or more */
        return (uint16_t)(sign | 0x7c00u);
    if (a >= 0x38800000u) { /* normal result */
        uint32_t r = a + 0xfffu + ((a >> 13) & 1u);
        return (uint16_t)(sign | ((r - 0x38000000u) >> 13));
    }
    if (a < 0x33000000u) /* below half of the least subnormal */
        return (uint16_t)sign;
    uint32_t shift = 126u - (a >> 23), man = (a & 0x7fffffu) | 0x800000u;
    uint32_t q = man >> shift, rest = man & ((1u << shift) - 1u), half = 1u << (shift - 1u);
    if (rest > half || (rest == half && (q & 1u)))
        q++;
    return (uint16_t)(sign | q);
}

float ipt_bf16_to_f32(uint16_t h) { return from_bits((uint32_t)h << 16); }

uint16_t ipt_f32_to_bf16(float f)
{
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    if ((u & 0x7fffffffu) > 0x7f800000u)
        return (uint16_t)(u >> 16 | 0x40u);
    return (uint16_t)((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}

float ipt_f8e4m3_to_f32(uint8_t v)
{
    int exp = (v >> 3) & 15, man = v & 7;
    if (exp == 15 && man == 7)
        return NAN;
    float f = exp ? ldexpf((float)(8 + man), exp - 10) : ldexpf((float)man, -9);
    return v & 0x80 ? -f : f;
}

float ipt_f8e5m2_to_f32(uint8_t v) { return ipt_f16_to_f32((uint16_t)(v << 8)); }
