// shaders/norm_apply.comp - group norm, last stage: y = (x - mean) rstd gamma + beta, then silu
// if SILU is set.
// Grid: norm_span.glsl.
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
ITEMS_OUT(4, y_out);
#include "norm_channel.glsl"

ITEM value(ITEM x, Channels k, ITEM a)
{
    const ITEM z = (x - k.mean) * a + k.beta;
    return SILU != 0 ? z * sigmoid(z) : z;
}

void main()
{
    const Span r = span();
    if (!r.ok)
        return;
    const Channels k = channels_of(r);
    const ITEM a = k.rstd * k.gamma;
    uint p = 0, at = r.at;
    for (; p + 4 <= r.count; p += 4) {
        [[unroll]] for (uint i = 0; i < 4; i++)
            y_out[at + i * pc.items] = STORED(value(LOAD(x_in, at + i * pc.items), k, a));
        at += 4 * pc.items;
    }
    for (; p < r.count; p++) {
        y_out[at] = STORED(value(LOAD(x_in, at), k, a));
        at += pc.items;
    }
}
