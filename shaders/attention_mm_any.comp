// shaders/attention_mm_any.comp - attention_mm.comp for CPU devices: c = alpha a b per (batch
// element, head), all operands with free strides, without shared memory.
//   a [m,k], b [k,n], c [m,n]; element (i,j) of x at x.off + batch x.sb + head x.sh + i x.s0 + j
//   x.s1 (modulo 2^32)
// Grid: x = 2 SG columns, y = 2 SG rows, z = pairs (batch, head) from pair0; a workgroup is a
// subgroup of SG invocations.  Each loads two columns of b and two rows of a, and hears of the
// other rows from its neighbours: on llvmpipe a load costs 90 cycles a lane, a shuffle by a
// constant next to nothing. Storage of a, b, c: -DA_F16, -DB_F16, -DC_F16.
//! variant f32
//! variant hhf -DACT_F16=1 -DA_F16=1 -DB_F16=1
//! variant hhh -DACT_F16=1 -DA_F16=1 -DB_F16=1 -DC_F16=1
//! variant fhh -DACT_F16=1 -DB_F16=1 -DC_F16=1
#version 450
#extension GL_GOOGLE_include_directive : require
#extension GL_KHR_shader_subgroup_shuffle : require
#include "common.glsl"
#ifdef A_F16
#define ELT_A ELT
#else
#define ELT_A float
#endif
#ifdef B_F16
#define ELT_B ELT
#else
#define ELT_B float
#endif
#ifdef C_F16
#define ELT_C ELT
#else
#define ELT_C float
#endif
layout(local_size_x_id = 0) in;
layout(constant_id = 0) const uint SG = 8;
struct Operand {
    uint off, sb, sh, s0, s1;
};
layout(push_constant) uniform Push {
    uint m, n, k, heads, pair0;
    float alpha;
    Operand a, b, c;
} pc;
layout(binding = 0, std430) readonly buffer ABlock { ELT_A a_in[]; };
layout(binding = 1, std430) readonly buffer BBlock { ELT_B b_in[]; };
layout(binding = 2, std430) writeonly buffer CBlock { ELT_C c_out[]; };

void main()
{
    const uint lane = gl_SubgroupInvocationID;
    const uint n0 = gl_WorkGroupID.x * 2 * SG + lane, m0 = gl_WorkGroupID.y * 2 * SG;
    const uint pair = pc.pair0 + gl_WorkGroupID.z, batch = pair / pc.heads, head = pair % pc.heads;
    uint a_at[2], b_at[2];
    [[unroll]] for (uint h = 0; h < 2; h++) { // what lies outside repeats the last
        a_at[h] = pc.a.off + batch * pc.a.sb + head * pc.a.sh +
                  min(m0 + h * SG + lane, pc.m - 1) * pc.a.s0;
        b_at[h] =
            pc.b.off + batch * pc.b.sb + head * pc.b.sh + min(n0 + h * SG, pc.n - 1) * pc.b.s1;
    }
    vec2 acc[2 * SG];
    [[unroll]] for (uint i = 0; i < 2 * SG; i++)
        acc[i] = vec2(0);
    for (uint k = 0; k < pc.k; k++) {
        const vec2 b = vec2(float(b_in[b_at[0]]), float(b_in[b_at[1]]));
        [[unroll]] for (uint h = 0; h < 2; h++) {
            const float a = float(a_in[a_at[h]]); // row h * SG + lane
            [[unroll]] for (uint i = 0; i < SG; i++)
                acc[h * SG + i] += subgroupShuffle(a, i) * b;
            a_at[h] += pc.a.s1;
            b_at[h] += pc.b.s0;
        }
    }
    const uint c_at = pc.c.off + batch * pc.c.sb + head * pc.c.sh + n0 * pc.c.s1;
    [[unroll]] for (uint i = 0; i < 2 * SG; i++) {
        [[unroll]] for (uint h = 0; h < 2; h++) {
            if (m0 + i < pc.m && n0 + h * SG < pc.n)
                c_out[c_at + (m0 + i) * pc.c.s0 + h * SG * pc.c.s1] = ELT_C(acc[i][h] * pc.alpha);
        }
    }
}
