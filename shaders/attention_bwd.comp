// shaders/attention_bwd.comp - one of the two passes of the attention gradient for CPU devices.
//   p = exp(scale q k^T - lse), dp = do v^T, ds = p (dp - delta), delta = rowsum(do o)
//   MODE 0 (rows are queries): dq = scale ds k
//   MODE 1 (rows are keys): dk = scale ds^T q, dv = p^T do
// Lanes are rows (TQ per lane); the other side goes round in blocks of KB rows as in
// attention_simd.comp.  a1 a2: q do (mode 0) or k v (mode 1); b1 b2: the other pair.
// Grid: x = row blocks, y = heads, z = batch.  Shared memory: none.
// Source: Dao et al. 2022, algorithm 4.
//! variant f32 -DTEXEL=1
//! variant f16 -DTEXEL=1 -DACT_F16=1
//! variant f32_ssbo
//! variant f16_ssbo -DACT_F16=1
#version 450
#extension GL_GOOGLE_include_directive : require
#extension GL_KHR_shader_subgroup_basic : require
#extension GL_KHR_shader_subgroup_shuffle : require
#include "attention.glsl"
layout(local_size_x_id = 0) in;
layout(constant_id = 0) const uint SG = 8;
layout(constant_id = 1) const uint D4 = 10;
layout(constant_id = 2) const uint KB = 4;
layout(constant_id = 3) const uint TQ = 1;
layout(constant_id = 4) const uint CAUSAL = 0;
layout(constant_id = 5) const uint MODE = 0;
layout(push_constant) uniform Push {
    uint rows, other, heads;
    uint ld;                             // quads per token
    uint a1_off, a2_off, b1_off, b2_off; // quads
    uint o1_off, o2_off;
    uint lse_off, delta_off;
    float scale; // natural
} pc;
QUADS_IN(0, a1_in);
QUADS_IN(1, a2_in);
QUADS_IN(2, b1_in);
QUADS_IN(3, b2_in);
layout(binding = 4, std430) readonly buffer LseBlock { float lse[]; };
layout(binding = 5, std430) readonly buffer DeltaBlock { float delta[]; };
QUADS_OUT(6, o1_out);
QUADS_OUT(7, o2_out);

const uint NR = (KB * D4 + SG - 1) / SG;
const uint N2 = MODE == 0 ? 1 : TQ * D4;

vec4 shuffle4(vec4 v, uint i)
{
    return vec4(subgroupShuffle(v.x, i), subgroupShuffle(v.y, i), subgroupShuffle(v.z, i),
                subgroupShuffle(v.w, i));
}

void main()
{
    const uint lane = gl_LocalInvocationID.x, h = gl_WorkGroupID.y, n = gl_WorkGroupID.z;
    const uint r0 = gl_WorkGroupID.x * SG * TQ;
    const uint n_query = MODE == 0 ? pc.rows : pc.other;
    const uint stat = (n * pc.heads + h) * n_query;
    vec4 a1[TQ * D4], a2[TQ * D4], o1[TQ * D4], o2[N2];
    float own_lse[TQ], own_delta[TQ];
    uint own[TQ];
    [[unroll]] for (uint t = 0; t < TQ; t++) {
        own[t] = min(r0 + t * SG + lane, pc.rows - 1);
        const uint at = (n * pc.rows + own[t]) * pc.ld + h * D4;
        [[unroll]] for (uint c = 0; c < D4; c++) {
            a1[t * D4 + c] = LOAD4(a1_in, pc.a1_off + at + c) * (pc.scale * LOG2E);
            a2[t * D4 + c] = LOAD4(a2_in, pc.a2_off + at + c);
            o1[t * D4 + c] = vec4(0);
            if (MODE != 0)
                o2[t * D4 + c] = vec4(0);
        }
        own_lse[t] = MODE == 0 ? lse[pc.lse_off + stat + own[t]] * LOG2E : 0.0;
        own_delta[t] = MODE == 0 ? delta[pc.delta_off + stat + own[t]] : 0.0;
    }
    uint key[NR], chunk[NR];
    [[unroll]] for (uint r = 0; r < NR; r++) {
        key[r] = (r * SG + lane) / D4;
        chunk[r] = (n * pc.other) * pc.ld + h * D4 + (r * SG + lane) % D4;
    }
    const uint begin = CAUSAL != 0 && MODE != 0 ? r0 / KB * KB : 0;
    const uint end = CAUSAL != 0 && MODE == 0 ? min(pc.other, r0 + SG * TQ) : pc.other;
    for (uint k0 = begin; k0 < end; k0 += KB) {
        vec4 b1[NR], b2[NR];
        float s[KB * TQ], dp[KB * TQ];
        [[unroll]] for (uint r = 0; r < NR; r++) {
            const uint at = chunk[r] + min(k0 + key[r], pc.other - 1) * pc.ld;
            b1[r] = LOAD4(b1_in, pc.b1_off + at);
            b2[r] = LOAD4(b2_in, pc.b2_off + at);
        }
        [[unroll]] for (uint i = 0; i < KB * TQ; i++) {
            s[i] = 0;
            dp[i] = 0;
        }
        [[unroll]] for (uint c = 0; c < D4; c++) {
            [[unroll]] for (uint j = 0; j < KB; j++) {
                const vec4 x1 = shuffle4(b1[(j * D4 + c) / SG], (j * D4 + c) % SG);
                const vec4 x2 = shuffle4(b2[(j * D4 + c) / SG], (j * D4 + c) % SG);
                [[unroll]] for (uint t = 0; t < TQ; t++) {
                    const vec4 u = a1[t * D4 + c], w = a2[t * D4 + c];
                    s[j * TQ + t] += u.x * x1.x;
                    s[j * TQ + t] += u.y * x1.y;
                    s[j * TQ + t] += u.z * x1.z;
                    s[j * TQ + t] += u.w * x1.w;
                    dp[j * TQ + t] += w.x * x2.x;
                    dp[j * TQ + t] += w.y * x2.y;
                    dp[j * TQ + t] += w.z * x2.z;
                    dp[j * TQ + t] += w.w * x2.w;
                }
            }
        }
        [[unroll]] for (uint j = 0; j < KB; j++) {
            const uint row = min(k0 + j, pc.other - 1);
            float row_lse = 0, row_delta = 0;
            if (MODE != 0) {
                row_lse = lse[pc.lse_off + stat + row] * LOG2E;
                row_delta = delta[pc.delta_off + stat + row];
            }
            [[unroll]] for (uint t = 0; t < TQ; t++) {
                bool seen = k0 + j < pc.other;
                if (CAUSAL != 0)
                    seen = seen && (MODE == 0 ? k0 + j <= own[t] : k0 + j >= own[t]);
                const float top = MODE == 0 ? own_lse[t] : row_lse;
                const float p = seen ? exp2(s[j * TQ + t] - top) : 0.0;
                s[j * TQ + t] = p;
                dp[j * TQ + t] = p * (dp[j * TQ + t] - (MODE == 0 ? own_delta[t] : row_delta));
            }
        }
        [[unroll]] for (uint c = 0; c < D4; c++) {
            [[unroll]] for (uint j = 0; j < KB; j++) {
                const vec4 x1 = shuffle4(b1[(j * D4 + c) / SG], (j * D4 + c) % SG);
                [[unroll]] for (uint t = 0; t < TQ; t++)
                    o1[t * D4 + c] += dp[j * TQ + t] * x1;
                if (MODE != 0) {
                    const vec4 x2 = shuffle4(b2[(j * D4 + c) / SG], (j * D4 + c) % SG);
                    [[unroll]] for (uint t = 0; t < TQ; t++)
                        o2[t * D4 + c] += s[j * TQ + t] * x2;
                }
            }
        }
    }
    [[unroll]] for (uint t = 0; t < TQ; t++) {
        const uint row = r0 + t * SG + lane;
        if (row < pc.rows) {
            const uint at = (n * pc.rows + row) * pc.ld + h * D4;
            [[unroll]] for (uint c = 0; c < D4; c++) {
                o1_out[pc.o1_off + at + c] = ELT4(o1[t * D4 + c] * pc.scale);
                if (MODE != 0)
                    o2_out[pc.o2_off + at + c] = ELT4(o2[t * D4 + c]);
            }
        }
    }
}
