// shaders/attention_pack.comp - keys or values of one head as panels for attention_rows.comp.
//   MODE 0: quad (panel, c, lane) = k[4 j .. 4 j + 3][c], j = panel SG + lane   (k transposed, K =
//   d)
//   MODE 1: quad (panel, r, lane) = v[r][4 j .. 4 j + 3]                        (K = keys, K4 rows)
// Zeros outside.  Grid: linear over quads, 64 per workgroup.
#version 450
#extension GL_GOOGLE_include_directive : require
#include "common.glsl"
layout(local_size_x = 64) in;
layout(constant_id = 0) const uint SG = 8;
layout(constant_id = 1) const uint MODE = 0;
layout(push_constant) uniform Push {
    uint count, s, d, k_rows; // k_rows: rows of a panel
    uint off, ld, out_off;    // elements, elements, quads
} pc;
layout(binding = 0, std430) readonly buffer XBlock { float x[]; };
layout(binding = 1, std430) writeonly buffer YBlock { vec4 y[]; };

void main()
{
    const uint e = group_linear() * 64 + gl_LocalInvocationID.x;
    if (e >= pc.count)
        return;
    const uint lane = e % SG, r = e / SG % pc.k_rows, j = (e / SG / pc.k_rows * SG + lane) * 4;
    vec4 v = vec4(0);
    [[unroll]] for (uint i = 0; i < 4; i++) {
        const uint key = MODE == 0 ? j + i : r, c = MODE == 0 ? r : j + i;
        if (key < pc.s && c < pc.d)
            v[i] = x[pc.off + key * pc.ld + c];
    }
    y[pc.out_off + e] = v;
}
