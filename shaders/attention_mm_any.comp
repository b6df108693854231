// shaders/attention_mm_any.comp - attention_mm.comp for CPU devices: c = alpha a b per (batch
// element, head), all operands with free strides, without shared memory.
//   a [m,k], b [k,n], c [m,n]; element (i,j) of x at x.off + batch x.sb + head x.sh + i x.s0 + j
//   x.s1 (modulo 2^32)
// Grid: x = blocks of 4 x 4 results, columns first, 64 a group; z = pairs (batch, head) from pair0.
// Storage of a, b, c: -DA_F16, -DB_F16, -DC_F16.
//! variant f32
//! variant hhf -DACT_F16=1 -DA_F16=1 -DB_F16=1
//! variant hhh -DACT_F16=1 -DA_F16=1 -DB_F16=1 -DC_F16=1
//! variant fhh -DACT_F16=1 -DB_F16=1 -DC_F16=1
#version 450
#extension GL_GOOGLE_include_directive : require
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
layout(local_size_x = 64) in;
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
    const uint across = (pc.n + 3) / 4, block = gl_GlobalInvocationID.x;
    const uint m0 = block / across * 4, n0 = block % across * 4;
    const uint pair = pc.pair0 + gl_WorkGroupID.z, batch = pair / pc.heads, head = pair % pc.heads;
    if (m0 >= pc.m)
        return;
    uint a_at[4], b_at[4];
    [[unroll]] for (uint i = 0; i < 4; i++) { // what lies outside repeats the last
        a_at[i] = pc.a.off + batch * pc.a.sb + head * pc.a.sh + min(m0 + i, pc.m - 1) * pc.a.s0;
        b_at[i] = pc.b.off + batch * pc.b.sb + head * pc.b.sh + min(n0 + i, pc.n - 1) * pc.b.s1;
    }
    vec4 acc[4];
    [[unroll]] for (uint i = 0; i < 4; i++)
        acc[i] = vec4(0);
    for (uint k = 0; k < pc.k; k++) {
        vec4 b;
        [[unroll]] for (uint j = 0; j < 4; j++)
            b[j] = float(b_in[b_at[j] + k * pc.b.s0]);
        [[unroll]] for (uint i = 0; i < 4; i++)
            acc[i] += float(a_in[a_at[i] + k * pc.a.s1]) * b;
    }
    const uint c_at = pc.c.off + batch * pc.c.sb + head * pc.c.sh;
    [[unroll]] for (uint i = 0; i < 4; i++) {
        [[unroll]] for (uint j = 0; j < 4; j++) {
            if (m0 + i < pc.m && n0 + j < pc.n)
                c_out[c_at + (m0 + i) * pc.c.s0 + (n0 + j) * pc.c.s1] = ELT_C(acc[i][j] * pc.alpha);
        }
    }
}
