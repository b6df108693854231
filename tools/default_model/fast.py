"""What makes a training step fast on an NVIDIA GPU: fused group norms, bfloat16 weights, recorded steps.

PyTorch's group norm turns channels-last pictures round and back, in f32 under autocast, and its calls cost more than
their work. Here the norm with its SiLU is four passes over bfloat16 in Triton; a step's kernels are
recorded once as a CUDA graph. No compiler runs for longer than a few seconds. On a CPU nothing of this is used.
"""
import copy

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:     # CPU builds of PyTorch have none
    triton = None

ROWS = 64       # pixels of one tile


if triton:
    @triton.jit
    def _tile(x, n, i, hw, c, cols, BH: tl.constexpr):
        rows = i + tl.arange(0, BH)
        at = (n * hw + rows)[:, None] * c + cols[None, :]
        return at, (rows < hw)[:, None] & (cols < c)[None, :]

    @triton.jit
    def _sums(x, out, hw, c, BC: tl.constexpr, BH: tl.constexpr):
        """out [n,2,c]: sums and sums of squares over the pixels."""
        n, cols = tl.program_id(0), tl.program_id(1) * BC + tl.arange(0, BC)
        s, q = tl.zeros([BC], tl.float32), tl.zeros([BC], tl.float32)
        for i in range(0, hw, BH):
            at, there = _tile(x, n, i, hw, c, cols, BH)
            v = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
            s += tl.sum(v, 0)
            q += tl.sum(v * v, 0)
        tl.store(out + 2 * n * c + cols, s, mask=cols < c)
        tl.store(out + (2 * n + 1) * c + cols, q, mask=cols < c)

    @triton.jit
    def _factors(sums, gamma, beta, out, stats, c, per, count, eps, BP: tl.constexpr):
        """out [n,2,c]: y = x a + b before SiLU; stats [n,groups,2]: mean and 1 / deviation."""
        n, g = tl.program_id(0), tl.program_id(1)
        k = tl.arange(0, BP)
        at, there = g * per + k, k < per
        mean = tl.sum(tl.load(sums + 2 * n * c + at, mask=there, other=0.0), 0) / count
        square = tl.sum(tl.load(sums + (2 * n + 1) * c + at, mask=there, other=0.0), 0) / count
        r = 1.0 / tl.sqrt(tl.maximum(square - mean * mean, 0.0) + eps)
        a = tl.load(gamma + at, mask=there, other=0.0).to(tl.float32) * r
        b = tl.load(beta + at, mask=there, other=0.0).to(tl.float32) - mean * a
        tl.store(out + 2 * n * c + at, a, mask=there)
        tl.store(out + (2 * n + 1) * c + at, b, mask=there)
        tl.store(stats + 2 * (n * tl.num_programs(1) + g), mean)
        tl.store(stats + 2 * (n * tl.num_programs(1) + g) + 1, r)

    @triton.jit
    def _apply(x, ab, y, hw, c, SILU: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr):
        n, cols = tl.program_id(0), tl.program_id(1) * BC + tl.arange(0, BC)
        a = tl.load(ab + 2 * n * c + cols, mask=cols < c, other=0.0)
        b = tl.load(ab + (2 * n + 1) * c + cols, mask=cols < c, other=0.0)
        for i in range(0, hw, BH):
            at, there = _tile(x, n, i, hw, c, cols, BH)
            z = tl.load(x + at, mask=there, other=0.0).to(tl.float32) * a[None, :] + b[None, :]
            if SILU:
                z = z * tl.sigmoid(z)
            tl.store(y + at, z.to(y.dtype.element_ty), mask=there)

    @triton.jit
    def _slope(x, dy, at, there, a, b, SILU: tl.constexpr):
        """(x, gradient before SiLU) of a tile."""
        v = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
        d = tl.load(dy + at, mask=there, other=0.0).to(tl.float32)
        if SILU:
            z = v * a[None, :] + b[None, :]
            s = tl.sigmoid(z)
            d = d * s * (1.0 + z * (1.0 - s))
        return v, d

    @triton.jit
    def _back_sums(x, dy, ab, out, hw, c, SILU: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr):
        """out [n,2,c]: sums over the pixels of d and of d x."""
        n, cols = tl.program_id(0), tl.program_id(1) * BC + tl.arange(0, BC)
        a = tl.load(ab + 2 * n * c + cols, mask=cols < c, other=0.0)
        b = tl.load(ab + (2 * n + 1) * c + cols, mask=cols < c, other=0.0)
        s, q = tl.zeros([BC], tl.float32), tl.zeros([BC], tl.float32)
        for i in range(0, hw, BH):
            at, there = _tile(x, n, i, hw, c, cols, BH)
            v, d = _slope(x, dy, at, there, a, b, SILU)
            s += tl.sum(d, 0)
            q += tl.sum(d * v, 0)
        tl.store(out + 2 * n * c + cols, s, mask=cols < c)
        tl.store(out + (2 * n + 1) * c + cols, q, mask=cols < c)

    @triton.jit
    def _back_factors(sums, gamma, stats, out, c, per, count, BP: tl.constexpr):
        """sums[:,1] becomes gamma's share; out [n,2,c]: dx = a d + x out0 + out1."""
        n, g = tl.program_id(0), tl.program_id(1)
        k = tl.arange(0, BP)
        at, there = g * per + k, k < per
        mean = tl.load(stats + 2 * (n * tl.num_programs(1) + g))
        r = tl.load(stats + 2 * (n * tl.num_programs(1) + g) + 1)
        d = tl.load(sums + 2 * n * c + at, mask=there, other=0.0)
        dx = (tl.load(sums + (2 * n + 1) * c + at, mask=there, other=0.0) - mean * d) * r
        w = tl.load(gamma + at, mask=there, other=0.0).to(tl.float32)
        m1, m2 = tl.sum(w * d, 0) / count, tl.sum(w * dx, 0) / count
        none = tl.zeros([BP], tl.float32)
        tl.store(sums + (2 * n + 1) * c + at, dx, mask=there)
        tl.store(out + 2 * n * c + at, none - r * r * m2, mask=there)
        tl.store(out + (2 * n + 1) * c + at, none + r * (r * m2 * mean - m1), mask=there)

    @triton.jit
    def _back_apply(x, dy, ab, more, dx, hw, c, SILU: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr):
        n, cols = tl.program_id(0), tl.program_id(1) * BC + tl.arange(0, BC)
        a = tl.load(ab + 2 * n * c + cols, mask=cols < c, other=0.0)
        b = tl.load(ab + (2 * n + 1) * c + cols, mask=cols < c, other=0.0)
        p = tl.load(more + 2 * n * c + cols, mask=cols < c, other=0.0)
        q = tl.load(more + (2 * n + 1) * c + cols, mask=cols < c, other=0.0)
        for i in range(0, hw, BH):
            at, there = _tile(x, n, i, hw, c, cols, BH)
            v, d = _slope(x, dy, at, there, a, b, SILU)
            tl.store(dx + at, (d * a[None, :] + v * p[None, :] + q[None, :]).to(dx.dtype.element_ty),
                     mask=there)


def _last(x):
    return x.contiguous(memory_format=torch.channels_last)


class GroupNorm(torch.autograd.Function):
    """SiLU(group norm(x)) of channels-last pictures; weights in any precision, sums in f32."""

    @staticmethod
    def forward(ctx, x, gamma, beta, groups, eps, silu):
        x = _last(x)
        n, c, h, w = x.shape
        hw, per, block = h * w, c // groups, 64 if c % 64 == 0 else 32
        grid, f32 = (n, triton.cdiv(c, block)), {"device": x.device, "dtype": torch.float32}
        sums, ab = torch.empty(n, 2, c, **f32), torch.empty(n, 2, c, **f32)
        stats, y = torch.empty(n, groups, 2, **f32), torch.empty_like(x)
        _sums[grid](x, sums, hw, c, BC=block, BH=ROWS)
        _factors[(n, groups)](sums, gamma, beta, ab, stats, c, per, float(per * hw), eps,
                              BP=triton.next_power_of_2(per), num_warps=1)
        _apply[grid](x, ab, y, hw, c, SILU=silu, BC=block, BH=ROWS)
        ctx.save_for_backward(x, gamma, beta, ab, stats)
        ctx.groups, ctx.silu = groups, silu
        return y

    @staticmethod
    def backward(ctx, dy):
        x, gamma, beta, ab, stats = ctx.saved_tensors
        dy = _last(dy)
        n, c, h, w = x.shape
        hw, per, block = h * w, c // ctx.groups, 64 if c % 64 == 0 else 32
        grid = (n, triton.cdiv(c, block))
        sums, more, dx = torch.empty_like(ab), torch.empty_like(ab), torch.empty_like(x)
        _back_sums[grid](x, dy, ab, sums, hw, c, SILU=ctx.silu, BC=block, BH=ROWS)
        _back_factors[(n, ctx.groups)](sums, gamma, stats, more, c, per, float(per * hw),
                                       BP=triton.next_power_of_2(per), num_warps=1)
        _back_apply[grid](x, dy, ab, more, dx, hw, c, SILU=ctx.silu, BC=block, BH=ROWS)
        d = sums.sum(0)
        return dx, d[1].to(gamma.dtype), d[0].to(beta.dtype), None, None, None


usable = False      # set by checked()


def normed(x, norm, silu=True):
    """SiLU of the group norm's output, or that itself."""
    if usable and x.is_cuda:
        return GroupNorm.apply(x, norm.weight, norm.bias, norm.num_groups, norm.eps, silu)
    y = F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
    return F.silu(y) if silu else y


def checked(device, log=print):
    """Tries the fused norm beside PyTorch's own; it is used only where both agree."""
    global usable
    usable = False
    if device == "cpu" or not triton:
        return False
    try:
        worst = 0.0
        for n, c, edge, groups, silu in ((3, 64, 32, 32, True), (2, 192, 8, 32, False), (2, 96, 16, 16, True)):
            x = torch.randn(n, c, edge, edge, device=device) * 2 + 0.5
            norm = torch.nn.GroupNorm(groups, c, 1e-5).to(device)
            torch.nn.init.normal_(norm.weight)
            torch.nn.init.normal_(norm.bias)
            pull, out = torch.randn_like(x), []
            for fused in (True, False):
                z = _last(x.clone()).requires_grad_()
                norm.zero_grad()
                y = (GroupNorm.apply(z, norm.weight, norm.bias, groups, norm.eps, silu) if fused
                     else F.silu(norm(z)) if silu else norm(z))
                (y * pull).sum().backward()
                out.append([y.detach(), z.grad, norm.weight.grad.clone(), norm.bias.grad.clone()])
            worst = max([worst] + [float((a - b).abs().max() / b.abs().max()) for a, b in zip(*out)])
        usable = worst < 1e-4
        log(f"fused group norm: largest difference {worst:.1e}" + ("" if usable else ", not used"))
    except Exception as e:      # slower is better than nothing
        log(f"no fused group norm ({type(e).__name__}: {str(e)[:300]})")
    return usable


class Half:
    """A copy of a module, in bfloat16, that the gradient is taken of; the f32 original learns.

    Group norms stay in f32: the fused norm takes them as they are.
    """

    def __init__(self, module, kind=torch.bfloat16):
        self.low = copy.deepcopy(module)
        for m in self.low.modules():
            if not isinstance(m, torch.nn.GroupNorm):
                for name, p in list(m.named_parameters(recurse=False)):
                    setattr(m, name, torch.nn.Parameter(p.detach().to(kind), p.requires_grad))
        self.pairs = [(a, b) for a, b in zip(module.parameters(), self.low.parameters())]

    @torch.no_grad()
    def refresh(self):
        for _, b in self.pairs:
            b.grad = None
        torch._foreach_copy_([b for _, b in self.pairs], [a for a, _ in self.pairs])

    @torch.no_grad()
    def hand_back(self):
        """Gradients to the originals."""
        for a, b in self.pairs:
            if a.grad is None:
                a.grad = torch.empty_like(a)
        torch._foreach_copy_([a.grad for a, _ in self.pairs], [b.grad for _, b in self.pairs])


def recorded(step, log, device, warm=2):
    """step() as one CUDA graph that runs on call; step itself where that fails or there is no GPU.

    What step reads and writes must stay where it is; it draws its random numbers itself.
    """
    if device == "cpu":
        return step
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(warm):
                step()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()

        def run():
            graph.replay()
        run.keeps = step    # what it has closed over lies where the graph reads and writes
        return run
    except Exception as e:
        log(f"not recorded ({type(e).__name__}: {str(e)[:300]})")
        torch.cuda.synchronize()
        return step
