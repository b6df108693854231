// shaders/norm_gdx.comp - group norm gradient: dx = rstd (gamma dz - s1 - xhat s2) with the group
// means
// (s1, s2) of norm_gsum.comp.  Grid: norm_span.glsl.
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
FLOATS_IN(5, sums);
ITEMS_OUT(6, dx_out);
#include "norm_channel.glsl"

void main()
{
    const Span r = span();
    if (!r.ok)
        return;
    const Channels k = channels_of(r);
    ITEM s1, s2;
    [[unroll]] for (uint i = 0; i < VEC; i++) {
        const uint g = (r.n * pc.groups + (r.item * VEC + i) / pc.per_group) * 2;
        CHANNEL(s1, i) = sums[g];
        CHANNEL(s2, i) = sums[g + 1];
    }
    uint at = r.at;
    for (uint p = 0; p < r.count; p++) {
        const ITEM xhat = (LOAD(x_in, at) - k.mean) * k.rstd;
        const ITEM dz = before_act(LOAD(dy_in, at), xhat, k);
        dx_out[at] = STORED(k.rstd * (k.gamma * dz - s1 - xhat * s2));
        at += pc.items;
    }
}
