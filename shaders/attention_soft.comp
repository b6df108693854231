// shaders/attention_soft.comp - row softmax of scores in scratch.
//   p[i,j] = exp(s[i,j] - lse[i]), lse[i] = ln(sum_j exp(s[i,j])); causal: only j <= query of row i
// A row is `ld` floats of scratch of which `n` count; columns n .. ld_out - 1 of p become 0.
// Grid: one workgroup of 64 per row (linear).  Shared memory: 2 x 64 floats.
// Rows run over pairs (batch, head) and queries: row r is pair r / rows, query row0 + r % rows.
// p may be the scores themselves (variant f32).
//! variant f32
//! variant f16 -DACT_F16=1
#version 450
#extension GL_GOOGLE_include_directive : require
#include "attention.glsl"
layout(local_size_x = 64) in;
layout(constant_id = 0) const uint CAUSAL = 0;
layout(push_constant) uniform Push {
    uint n_row, rows, row0, n, ld;
    uint ld_out, out_off;
    uint lse_off, lse_ld; // row r: lse_off + r / rows * lse_ld + row0 + r % rows; ld 0: none
} pc;
layout(binding = 0, std430) readonly buffer SBlock { float s[]; };
layout(binding = 1, std430) writeonly buffer PBlock { ELT p[]; };
layout(binding = 2, std430) writeonly buffer LseBlock { float lse[]; };
shared float top[64];
shared float sum[64];

void main()
{
    const uint r = group_linear(), tid = gl_LocalInvocationID.x;
    if (r >= pc.n_row) // uniform
        return;
    const uint at = r * pc.ld, query = pc.row0 + r % pc.rows;
    const uint lim = CAUSAL != 0 ? min(pc.n, query + 1) : pc.n;
    float m = MASKED, l = 0;
    for (uint j = tid; j < lim; j += 64)
        m = max(m, s[at + j]);
    for (uint j = tid; j < lim; j += 64)
        l += exp2((s[at + j] - m) * LOG2E);
    top[tid] = m;
    sum[tid] = l;
    barrier();
    for (uint step = 32; step > 0; step /= 2) {
        if (tid < step) {
            const float a = top[tid], b = top[tid + step], c = max(a, b);
            sum[tid] = sum[tid] * exp2((a - c) * LOG2E) + sum[tid + step] * exp2((b - c) * LOG2E);
            top[tid] = c;
        }
        barrier();
    }
    m = top[0];
    const float inv = 1.0 / sum[0];
    for (uint j = tid; j < pc.ld_out; j += 64)
        p[pc.out_off + r * pc.ld_out + j] =
            ELT(j < lim ? exp2((s[at + min(j, pc.n - 1)] - m) * LOG2E) * inv : 0.0);
    if (tid == 0 && pc.lse_ld != 0)
        lse[pc.lse_off + r / pc.rows * pc.lse_ld + query] = m + log2(sum[0]) * LN2;
}
