// shaders/norm_stat.comp - group norm, first stage: mean and sum of squared deviations of every
// channel over a chunk of pixels, part[n][chunk][c] = (mean, m2).  Sums are taken relative to the
// channel's first value in the chunk, so a large mean costs no accuracy.  Grid: norm_span.glsl.
//! variant f32_texel -DTEXEL=1
//! variant f32
//! variant f32_scalar -DSCALAR=1
//! variant f16 -DACT_F16=1
//! variant f16_texel -DACT_F16=1 -DTEXEL=1
//! variant f16_scalar -DACT_F16=1 -DSCALAR=1
#version 450
#extension GL_GOOGLE_include_directive : require
#include "norm.glsl"
#include "norm_span.glsl"
ITEMS_IN(0, x_in);
layout(binding = 1, std430) writeonly buffer PartBlock { vec2 part[]; };

void main()
{
    const Span r = span();
    if (!r.ok)
        return;
    const ITEM shift = LOAD(x_in, r.at);
    ITEM s1 = ITEM(0), s2 = ITEM(0);
    uint p = 0, at = r.at;
    for (; p + 8 <= r.count; p += 8) {
        ITEM v[8];
        [[unroll]] for (uint i = 0; i < 8; i++)
            v[i] = LOAD(x_in, at + i * pc.items) - shift;
        at += 8 * pc.items;
        s1 += ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
        [[unroll]] for (uint i = 0; i < 8; i++)
            v[i] *= v[i];
        s2 += ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
    }
    for (; p < r.count; p++) {
        const ITEM v = LOAD(x_in, at) - shift;
        at += pc.items;
        s1 += v;
        s2 += v * v;
    }
    const float inv = 1.0 / float(r.count);
    const uint o = part_at(r);
    [[unroll]] for (uint i = 0; i < VEC; i++)
        part[o + i] = vec2(CHANNEL(shift, i) + CHANNEL(s1, i) * inv,
                           max(CHANNEL(s2, i) - CHANNEL(s1, i) * CHANNEL(s1, i) * inv, 0.0));
}
