// shaders/norm_gpart.comp - group norm gradient, first stage: per channel and chunk of pixels
// part[n][chunk][c] = (sum dz, sum dz xhat), dz = dL/d(xhat gamma + beta).  Grid: norm_span.glsl.
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
FLOATS_IN(1, gamma);
FLOATS_IN(2, beta);
FLOATS_IN(3, stat);
ITEMS_IN(4, dy_in);
layout(binding = 5, std430) writeonly buffer PartBlock { vec2 part[]; };
#include "norm_channel.glsl"

void main()
{
    const Span r = span();
    if (!r.ok)
        return;
    const Channels k = channels_of(r);
    ITEM s1 = ITEM(0), s2 = ITEM(0);
    uint at = r.at;
    for (uint p = 0; p < r.count; p++) {
        const ITEM xhat = (LOAD(x_in, at) - k.mean) * k.rstd;
        const ITEM dz = before_act(LOAD(dy_in, at), xhat, k);
        s1 += dz;
        s2 += dz * xhat;
        at += pc.items;
    }
    const uint o = part_at(r);
    [[unroll]] for (uint i = 0; i < VEC; i++)
        part[o + i] = vec2(CHANNEL(s1, i), CHANNEL(s2, i));
}
