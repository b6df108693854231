// shaders/attention_ds.comp - gradient of the scores, in place in scratch, elementwise.
//   s := p = exp(s - lse), dp := scale p (dp - delta); causal: p = 0 where key > query
// Element e = ((pair) rows + i) cols + j of both; query row0 + i, key col0 + j; lse and delta
// [n,h,t].
// Grid: linear, 64 per workgroup.
#version 450
#extension GL_GOOGLE_include_directive : require
#include "attention.glsl"
layout(local_size_x = 64) in;
layout(constant_id = 0) const uint CAUSAL = 0;
layout(push_constant) uniform Push {
    uint count, rows, cols, row0, col0, t, pair0;
    uint lse_off;
    float scale;
} pc;
layout(binding = 0, std430) buffer SBlock { float s[]; };
layout(binding = 1, std430) buffer DpBlock { float dp[]; };
layout(binding = 2, std430) readonly buffer LseBlock { float lse[]; };
layout(binding = 3, std430) readonly buffer DeltaBlock { float delta[]; };

void main()
{
    const uint e = group_linear() * 64 + gl_LocalInvocationID.x;
    if (e >= pc.count)
        return;
    const uint j = e % pc.cols, i = e / pc.cols % pc.rows, pair = pc.pair0 + e / pc.cols / pc.rows;
    const uint stat = pair * pc.t + pc.row0 + i;
    const bool seen = CAUSAL == 0 || pc.col0 + j <= pc.row0 + i;
    const float p = seen ? exp2((s[e] - lse[pc.lse_off + stat]) * LOG2E) : 0.0;
    s[e] = p;
    dp[e] = pc.scale * p * (dp[e] - delta[stat]);
}
