// shaders/attention_mm.comp - c = alpha a b per (batch element, head), all operands with free
// strides.
//   a [m,k], b [k,n], c [m,n]; element (i,j) of x at x.off + batch x.sb + head x.sh + i x.s0 + j
//   x.s1
// (modulo 2^32, so an offset may be "negative").  Used where probabilities are materialised.
// Grid: x = tiles of 64 columns, y = tiles of 64 rows, z = pairs (batch, head) from pair0.
// 128 invocations, 8 x 4 results each.  Shared memory: 2 x 16 x 65 floats = 8320 bytes.
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
layout(local_size_x = 128) in;
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
shared float sa[16 * 65];
shared float sb[16 * 65];

void main()
{
    const uint tid = gl_LocalInvocationID.x, tx = tid % 16, ty = tid / 16;
    const uint m0 = gl_WorkGroupID.y * 64, n0 = gl_WorkGroupID.x * 64;
    const uint pair = pc.pair0 + gl_WorkGroupID.z, batch = pair / pc.heads, head = pair % pc.heads;
    const uint a_at = pc.a.off + batch * pc.a.sb + head * pc.a.sh;
    const uint b_at = pc.b.off + batch * pc.b.sb + head * pc.b.sh;
    const uint c_at = pc.c.off + batch * pc.c.sb + head * pc.c.sh;
    float acc[32];
    [[unroll]] for (uint i = 0; i < 32; i++)
        acc[i] = 0;
    for (uint k0 = 0; k0 < pc.k; k0 += 16) {
        barrier();
        for (uint e = tid; e < 1024; e += 128) {
            // Neighbouring invocations go along the direction that is contiguous in memory.
            const uint i = pc.a.s1 == 1 ? e / 16 : e % 64, ka = pc.a.s1 == 1 ? e % 16 : e / 64;
            float x = 0;
            if (m0 + i < pc.m && k0 + ka < pc.k)
                x = float(a_in[a_at + (m0 + i) * pc.a.s0 + (k0 + ka) * pc.a.s1]);
            sa[ka * 65 + i] = x;
            const uint j = pc.b.s0 == 1 ? e / 16 : e % 64, kb = pc.b.s0 == 1 ? e % 16 : e / 64;
            float y = 0;
            if (n0 + j < pc.n && k0 + kb < pc.k)
                y = float(b_in[b_at + (k0 + kb) * pc.b.s0 + (n0 + j) * pc.b.s1]);
            sb[kb * 65 + j] = y;
        }
        barrier();
        for (uint kk = 0; kk < 16; kk++) {
            float b[4];
            [[unroll]] for (uint j = 0; j < 4; j++)
                b[j] = sb[kk * 65 + tx + 16 * j];
            [[unroll]] for (uint i = 0; i < 8; i++) {
                const float a = sa[kk * 65 + ty + 8 * i];
                [[unroll]] for (uint j = 0; j < 4; j++)
                    acc[i * 4 + j] += a * b[j];
            }
        }
    }
    [[unroll]] for (uint i = 0; i < 8; i++) {
        [[unroll]] for (uint j = 0; j < 4; j++) {
            const uint row = m0 + ty + 8 * i, col = n0 + tx + 16 * j;
            if (row < pc.m && col < pc.n)
                c_out[c_at + row * pc.c.s0 + col * pc.c.s1] = ELT_C(acc[i * 4 + j] * pc.alpha);
        }
    }
}
