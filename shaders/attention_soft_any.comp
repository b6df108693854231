// shaders/attention_soft_any.comp - attention_soft.comp for CPU devices, without its log-sums: an
// invocation has a row to itself, no shared memory, no barrier.
//   p[i,j] = exp(s[i,j]) / sum_j exp(s[i,j]); causal: only j <= query of row i
// Grid: one invocation per row, 64 a group (linear).
//! variant f32
//! variant f16 -DACT_F16=1
#version 450
#extension GL_GOOGLE_include_directive : require
#include "attention.glsl"
layout(local_size_x = 64) in;
layout(constant_id = 0) const uint CAUSAL = 0;
layout(push_constant) uniform Push {
    uint n_row, rows, row0, n, ld; // as in attention_soft.comp
    uint ld_out, out_off;
    uint lse_off, lse_ld;
} pc;
layout(binding = 0, std430) readonly buffer SBlock { float s[]; };
layout(binding = 1, std430) writeonly buffer PBlock { ELT p[]; };

void main()
{
    const uint r = group_linear() * 64 + gl_LocalInvocationID.x;
    if (r >= pc.n_row)
        return;
    const uint at = r * pc.ld, query = pc.row0 + r % pc.rows;
    const uint lim = CAUSAL != 0 ? min(pc.n, query + 1) : pc.n;
    float m = MASKED, l = 0;
    for (uint j = 0; j < lim; j++)
        m = max(m, s[at + j]);
    for (uint j = 0; j < lim; j++)
        l += exp2((s[at + j] - m) * LOG2E);
    const float inv = 1.0 / l;
    for (uint j = 0; j < pc.ld_out; j++)
        p[pc.out_off + r * pc.ld_out + j] =
            ELT(j < lim ? exp2((s[at + min(j, pc.n - 1)] - m) * LOG2E) * inv : 0.0);
}
