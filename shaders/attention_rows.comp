// shaders/attention_rows.comp - c = alpha a b for CPU devices, row-blocked: one subgroup makes
// TM rows x 4 SG columns.  a [m,k] row-major (quads along k), b packed in panels
// [n / (4 SG)][k][SG] of vec4, c row-major.  Lanes run along columns for b and c; a is fetched
// with lanes = rows, four k at a time, and handed round by subgroupShuffle with a constant index.
// k is a multiple of 4.  Each turn fetches the b rows of the next one: 4 rows after the last panel
// exist in memory.
// Grid: x = row blocks, y = panels.  Shared memory: none.
#version 450
#extension GL_GOOGLE_include_directive : require
#extension GL_KHR_shader_subgroup_basic : require
#extension GL_KHR_shader_subgroup_shuffle : require
#include "common.glsl"
layout(local_size_x_id = 0) in;
layout(constant_id = 0) const uint SG = 8;
layout(constant_id = 1) const uint RB = 2; // TM / SG
layout(constant_id = 2) const uint UK = 4; // groups of four k per loop turn, divides k / 4
layout(push_constant) uniform Push {
    uint m, n4, k4;          // rows, quads of columns, quads of k
    uint a_off, a_ld, b_off; // quads
    uint c_off, c_ld;        // quads
    float alpha;
} pc;
layout(binding = 0, rgba32f) uniform readonly imageBuffer a_in;
layout(binding = 1, rgba32f) uniform readonly imageBuffer b_in;
layout(binding = 2, std430) writeonly buffer CBlock { vec4 c_out[]; };

void main()
{
    const uint lane = gl_LocalInvocationID.x, m0 = gl_WorkGroupID.x * SG * RB;
    const uint col = gl_WorkGroupID.y * SG + lane;
    int b_at = int(pc.b_off + gl_WorkGroupID.y * pc.k4 * 4 * SG + lane);
    int a_at[RB];
    vec4 acc[RB * SG];
    [[unroll]] for (uint r = 0; r < RB; r++)
        a_at[r] = int(pc.a_off + min(m0 + r * SG + lane, pc.m - 1) * pc.a_ld);
    [[unroll]] for (uint i = 0; i < RB * SG; i++)
        acc[i] = vec4(0);
    vec4 next[4];
    [[unroll]] for (uint j = 0; j < 4; j++)
        next[j] = imageLoad(b_in, b_at + int(j * SG));
    for (uint k = 0; k < pc.k4; k += UK) {
        [[unroll]] for (uint u = 0; u < UK; u++) {
            vec4 b[4];
            b_at += int(4 * SG);
            [[unroll]] for (uint j = 0; j < 4; j++) {
                b[j] = next[j];
                next[j] = imageLoad(b_in, b_at + int(j * SG));
            }
            [[unroll]] for (uint r = 0; r < RB; r++) {
                const vec4 a = imageLoad(a_in, a_at[r] + int(k + u));
                [[unroll]] for (uint i = 0; i < SG; i++) {
                    vec4 x = acc[r * SG + i];
                    x += subgroupShuffle(a.x, i) * b[0];
                    x += subgroupShuffle(a.y, i) * b[1];
                    x += subgroupShuffle(a.z, i) * b[2];
                    x += subgroupShuffle(a.w, i) * b[3];
                    acc[r * SG + i] = x;
                }
            }
        }
    }
    [[unroll]] for (uint i = 0; i < RB * SG; i++) {
        if (m0 + i < pc.m && col < pc.n4)
            c_out[pc.c_off + (m0 + i) * pc.c_ld + col] = acc[i] * pc.alpha;
    }
}
