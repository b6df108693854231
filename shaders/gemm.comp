// shaders/gemm.comp - matrix product and implicit-GEMM convolution without shared memory, for CPU
// devices (and any device with subgroup shuffles).
//
// Shapes and layouts: gemm_iface.glsl.  One subgroup per workgroup makes TM rows x 4 SG columns:
// lane l owns columns 4l..4l+3 in acc[TM].  Rows of `a` are fetched with lanes = rows (one quad of
// k each) and broadcast by shuffle; a panel row of `b` is one quad a lane.  Four k's at a time, row
// by row: an accumulator is touched once per 16 multiply-adds, so it may live on the stack.  Both
// are fetched one group of four k's ahead; the last fetch of `b` reads the zeros behind the panels.
// -DQ8: panels hold q8 (q8.glsl), one quad a lane and four k's.
// -DMIX: rows of the product are those of matrices of MIX_I rows; y[r, o] = g sum_i p[i, o] of row
// r MIX_I + i, or with SWAPPED its transpose; g = gates[mix_gates + r / mix_each, slot[0]].
// Grid: x = column tiles, y = row tiles (turned: the other way).  Shared memory: none.
// Four k's a turn: eight made the loop longer than, probably, a CPU's cache of decoded instructions
// (at half the speed on Mesa 25.0.7, no gain on 22.3.6).  Tried on llvmpipe 22.3.6 and not better:
// u64 stores, fetching `a` without looking ahead (-10 %), row tiles first for small `b` (-7 %),
// blocks of 2, 4 or 8 row tiles for each column tile (0 to -8 %), imageStore for y (-5 %; to
// rgba16f it cuts off).
#version 450
//! variant tx32 -DTEXEL
//! variant tx16 -DTEXEL -DACT_F16
//! variant mx32 -DTEXEL -DMIX
//! variant mx16 -DTEXEL -DMIX -DACT_F16
//! variant sb32
//! variant sb16 -DACT_F16
//! variant tq32 -DTEXEL -DQ8
//! variant tq16 -DTEXEL -DQ8 -DACT_F16
//! variant sq32 -DQ8
//! variant sq16 -DQ8 -DACT_F16
#extension GL_GOOGLE_include_directive : require
#extension GL_KHR_shader_subgroup_basic : require
#extension GL_KHR_shader_subgroup_shuffle : require
#include "gemm_iface.glsl"
#ifdef Q8
#include "q8.glsl"
#endif

layout(local_size_x_id = 0) in;
layout(constant_id = 0) const int SG = 8;  // subgroup size
layout(constant_id = 1) const int TM = 16; // rows, a multiple of SG
layout(constant_id = 2) const int B16 = 0; // panels hold pairs of f16
layout(constant_id = 3) const int MODE = 0;
layout(constant_id = 4) const int HAS = 0;
layout(constant_id = 5) const int SIDE16 = 0; // panels of u hold pairs of f16
const int RS = TM / SG;
#ifdef MIX
layout(constant_id = 6) const int MIX_I = 1; // divides TM
layout(constant_id = 7) const int MIX_O = 1;
layout(constant_id = 8) const int SWAPPED = 0;
layout(constant_id = 9) const int GATED = 0;
const int MATRICES = TM / MIX_I;
#endif

vec4 acc[TM];
vec4 b[4], next[4];
int b_at; // quad (f16: pair quad; q8: of k) of the next fetch

// 32 columns of two k's lie in eight quads of f16 pairs: this lane's four columns of both.
void unpack_pair(uvec4 u, out vec4 even, out vec4 odd)
{
    vec2 p0 = unpackHalf2x16(u.x), p1 = unpackHalf2x16(u.y);
    vec2 p2 = unpackHalf2x16(u.z), p3 = unpackHalf2x16(u.w);
    even = vec4(p0.x, p1.x, p2.x, p3.x);
    odd = vec4(p0.y, p1.y, p2.y, p3.y);
}

#ifdef Q8
#define B_STEP 1
uvec4 raw;
vec4 scale;
int b_panel, b_lane; // first quad of words of this lane's panel; of eight lanes along it

// The scales come anew with each quad of k: in a loop of its own around eight quads, whose value is
// kept through the inner one, they cost more (4 to 8 % of a product for 0 to 5 %).
void fetch(int part, int n)
{
    if (part == 0) {
        int block = b_panel + (b_at >> 3) * Q8_BLOCK;
        raw = LOAD_B(block + 4 + (b_at & 7) * 8 + b_lane);
        scale = q8_scales(LOAD_B(block + (b_lane >> 1)), b_lane);
    }
    [[unroll]] for (int i = 0; i < 4; i++)
        if (part == i * n / 4)
            next[i] = q8_values(raw, i) * scale;
}
#else
#define B_STEP (B16 != 0 ? 16 : 32)
// Fetches row i of the next four k's; of f16 pairs rows i and i + 1.
void fetch_row(int i)
{
    if (B16 != 0)
        unpack_pair(LOAD_B(b_at + (i >> 1) * 8), next[i], next[i + 1]);
    else
        next[i] = uintBitsToFloat(LOAD_B(b_at + i * 8));
}

// Fetches part `part` of `n` of the next four k's.  Not a loop that steps over the others' rows:
// Mesa 25 unrolls no loop with a `continue` in it, nor then the loops around it.
void fetch(int part, int n)
{
    if (part == 0)
        fetch_row(0);
    if (part == n / 4 && B16 == 0)
        fetch_row(1);
    if (part == n / 2)
        fetch_row(2);
    if (part == 3 * n / 4 && B16 == 0)
        fetch_row(3);
}
#endif

// acc[rows of r] += quad a of k's times b
void multiply(int r, vec4 a)
{
    [[unroll]] for (int i = 0; i < SG; i++) {
        vec4 sum = acc[r * SG + i];
        sum += subgroupShuffle(a.x, uint(i)) * b[0];
        sum += subgroupShuffle(a.y, uint(i)) * b[1];
        sum += subgroupShuffle(a.z, uint(i)) * b[2];
        sum += subgroupShuffle(a.w, uint(i)) * b[3];
        acc[r * SG + i] = sum;
    }
}

#ifdef MIX
vec4 mixed[MATRICES * MIX_O];

// The small matrix from the left.  Before any control flow: only there does llvmpipe read p once
// for all lanes.
void mix_rows(int matrix0)
{
    int slot = GATED != 0 ? slot_data[0] : 0;
    bool is_slot = slot >= 0 && slot < pc.mix_slots;
    [[unroll]] for (int r = 0; r < MATRICES; r++) {
        float g = 1.0;
        if (GATED != 0) {
            // The tile may reach behind the last matrix.
            int n = min(matrix0 + r, out_rows - 1) / pc.mix_each;
            g = gates_data[(pc.mix_gates + n) * pc.mix_slots + (is_slot ? slot : 0)];
            g = is_slot ? g : 0.0;
        }
        [[unroll]] for (int o = 0; o < MIX_O; o++) {
            vec4 sum = vec4(0);
            [[unroll]] for (int i = 0; i < MIX_I; i++)
                sum += float(p_data[i * MIX_O + o]) * acc[r * MIX_I + i];
            mixed[r * MIX_O + o] = g * sum;
        }
    }
}

// y from `to` on: column c of the mixed rows of a matrix, one after the other.
void store_line(int r, int to, int c)
{
    if ((HAS & HAS_QUADS) != 0) {
        [[unroll]] for (int o = 0; o < MIX_O; o += 4) {
            vec4 v = vec4(mixed[r * MIX_O + o][c], mixed[r * MIX_O + o + 1][c],
                          mixed[r * MIX_O + o + 2][c], mixed[r * MIX_O + o + 3][c]);
            if ((HAS & HAS_R) != 0)
                v += LOAD_R((to + o) >> 2);
            y_data4[(to + o) >> 2] = ELT4(v);
        }
    } else {
        [[unroll]] for (int o = 0; o < MIX_O; o++)
            y_data[to + o] =
                ELT(mixed[r * MIX_O + o][c] + ((HAS & HAS_R) != 0 ? float(r_data[to + o]) : 0.0));
    }
}

// y[matrix, o, col] of the four columns and all o, or y[matrix, col, o].
void store_mixed(int r, int matrix, int col)
{
    int at = matrix * MIX_O * out_cols;
    if (SWAPPED == 0) {
        [[unroll]] for (int o = 0; o < MIX_O; o++) {
            vec4 v = mixed[r * MIX_O + o];
            int to = at + o * out_cols + col;
            if ((HAS & HAS_QUADS) != 0) {
                if ((HAS & HAS_R) != 0)
                    v += LOAD_R(to >> 2);
                y_data4[to >> 2] = ELT4(v);
            } else {
                [[unroll]] for (int c = 0; c < 4; c++)
                    if (col + c < out_cols)
                        y_data[to + c] =
                            ELT(v[c] + ((HAS & HAS_R) != 0 ? float(r_data[to + c]) : 0.0));
            }
        }
        return;
    }
    [[unroll]] for (int c = 0; c < 4; c++)
        if (col + c < out_cols)
            store_line(r, at + (col + c) * MIX_O, c);
}
#elif defined(TEXEL)
// Group `group` of `groups`, for lanes whose column `col` of u is one.  A few quads only: nothing
// is fetched ahead.
void add_group(int first, int lane, int col, int group, int groups)
{
    bool is_mine = col >= 0 && col < pc.side_cols;
    int quad = (is_mine ? col : 0) >> 2;
    int u_at = (quad >> 3) * pc.side * (SIDE16 != 0 ? 16 : 32) + (quad & 7);
    for (int q = 0; q < pc.side; q++) {
        if (SIDE16 != 0) {
            [[unroll]] for (int i = 0; i < 4; i += 2)
                unpack_pair(imageLoad(u_view, u_at + q * 16 + (i >> 1) * 8), b[i], b[i + 1]);
        } else {
            [[unroll]] for (int i = 0; i < 4; i++)
                b[i] = uintBitsToFloat(imageLoad(u_view, u_at + q * 32 + i * 8));
        }
        if ((HAS & HAS_GROUPS) != 0) {
            [[unroll]] for (int i = 0; i < 4; i++)
                b[i] = is_mine ? b[i] : vec4(0);
        }
        [[unroll]] for (int r = 0; r < RS; r++) {
            int m = pc.row0 + min(first + r * SG + lane, pc.rows - 1);
            multiply(r, imageLoad(h_view, (m * groups + group) * pc.side + q));
        }
    }
}

// `tile`, `col`: first column of the workgroup and of this lane.
void add_side(int first, int lane, int tile, int col)
{
    if ((HAS & HAS_GROUPS) == 0) {
        add_group(first, lane, col, 0, 1);
        return;
    }
    int groups = pc.cols / pc.side_cols;
    int last = min(tile + 4 * SG, pc.cols) - 1;
    for (int j = tile / pc.side_cols; j <= last / pc.side_cols; j++)
        add_group(first, lane, col - j * pc.side_cols, j, groups);
}
#endif

#ifndef MIX
// What is added to whole columns: the bias, and t of the tile's first and last image, of which the
// last begins at the row that is returned.  Not constants, which would make four pipelines of one:
// what is not there is -0, which changes no sum.  (A tile of more images: HAS_T, gemm_store.)
int columns(int col, out vec4 bias, out vec4 t[2])
{
    bool has_bias = (out_adds & HAS_BIAS) != 0, has_t = (out_adds & HAS_T) != 0;
    int image = out_row0 / max(out_image, 1);
    int last = (out_row0 + min(out_rows, TM) - 1) / max(out_image, 1);
    [[unroll]] for (int c = 0; c < 4; c++) {
        int at = min(col + c, out_cols - 1);
        float none = uintBitsToFloat(0x80000000u);
        float v = bias_data[has_bias ? at : 0];
        float t0 = float(t_data[has_t ? image * out_cols + at : 0]);
        float t1 = float(t_data[has_t ? last * out_cols + at : 0]);
        bias[c] = has_bias ? v : none;
        t[0][c] = has_t ? t0 : none;
        t[1][c] = has_t ? t1 : none;
    }
    return last * out_image - out_row0;
}
#endif

vec4 a_next[RS];

// Quad q of the row (pixel) at `from`; zeros outside the image.
vec4 load_a(int from, int q)
{
    if (MODE == PLAIN)
        return LOAD_A(from + q);
    vec4 a = LOAD_A(from < 0 ? 0 : from + q);
    return from < 0 ? vec4(0) : a;
}

void main()
{
    int lane = int(gl_SubgroupInvocationID);
    int first = int(pc.turned != 0 ? gl_WorkGroupID.x : gl_WorkGroupID.y) * TM;
    // Quad of columns among the bound panels.
    int quad = int(pc.turned != 0 ? gl_WorkGroupID.y : gl_WorkGroupID.x) * SG + lane;
    int panel = min(quad >> 3, pc.panels - 1);
    bool is_bound = panel == quad >> 3;
    int col = pc.col0 + quad * 4;
    gemm_begin(first, col);
    int depth = pc.taps * pc.quads;
    int matrix = pc.each > 0 ? (pc.row0 + first) / pc.each : 0;
#ifdef Q8
    b_panel = (matrix * pc.panels + panel) * (depth >> 3) * Q8_BLOCK;
    b_lane = quad & 7;
    b_at = 0;
#else
    b_at = (matrix * pc.panels + panel) * depth * (B16 != 0 ? 16 : 32) + (quad & 7);
#endif

    ivec3 origin[RS];
    int from[RS];
    [[unroll]] for (int r = 0; r < RS; r++) {
        int m = pc.row0 + min(first + r * SG + lane, pc.rows - 1);
        if (MODE == PLAIN)
            from[r] = m * pc.quads - pc.a_first;
        else
            origin[r] = gemm_origin(m);
    }
    [[unroll]] for (int i = 0; i < TM; i++)
        acc[i] = vec4(0);
    fetch(0, 1);
    b_at += B_STEP;

    for (int tap = 0; tap < pc.taps; tap++) {
        if (MODE != PLAIN) {
            int ky = tap / pc.kw;
            [[unroll]] for (int r = 0; r < RS; r++)
                from[r] = gemm_pixel(MODE, origin[r], ky, tap - ky * pc.kw);
        }
        [[unroll]] for (int r = 0; r < RS; r++)
            a_next[r] = load_a(from[r], 0);
        for (int q = 0; q < pc.quads; q++) {
            [[unroll]] for (int i = 0; i < 4; i++)
                b[i] = next[i];
            [[unroll]] for (int r = 0; r < RS; r++) {
                vec4 a = a_next[r];
                a_next[r] = load_a(from[r], min(q + 1, pc.quads - 1));
                fetch(r, RS);
                multiply(r, a);
            }
            b_at += B_STEP;
        }
    }

#ifdef MIX
    // From here on out_rows counts matrices.
    int matrix0 = first / MIX_I;
    out_rows = pc.rows / MIX_I;
    mix_rows(matrix0);
    if (col >= out_cols || !is_bound)
        return;
    [[unroll]] for (int r = 0; r < MATRICES; r++)
        if (matrix0 + r < out_rows)
            store_mixed(r, matrix0 + r, col);
#else
#ifdef TEXEL
    if (MODE == PLAIN && (HAS & HAS_NO_SIDE) == 0)
        add_side(first, lane, col - 4 * lane, col);
#endif
    if (col >= out_cols || !is_bound)
        return;
    vec4 bias, t[2];
    int edge = columns(col, bias, t);
    [[unroll]] for (int i = 0; i < TM; i++)
        gemm_store(HAS, i, col, acc[i] + bias + (i < edge ? t[0] : t[1]));
#endif
}
