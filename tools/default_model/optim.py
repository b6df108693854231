"""Muon for the weights of more than one dimension, AdamW for the rest, EMA, and clocks."""
import os
import time

import torch


class Clock:
    """A stage's wall-clock span; the learning rate follows it, not the number of steps."""

    def __init__(self, end, start=None):
        self.start, self.end = time.time() if start is None else start, end

    def passed(self):
        return min(1.0, max(0.0, (time.time() - self.start) / max(self.end - self.start, 1e-3)))


def orthogonal(x):
    """Five Newton-Schulz steps (Jordan 2024) towards the nearest orthogonal matrices; x [n,r,c]."""
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-12)
    x = x.bfloat16() if x.is_cuda else x
    for _ in range(5):
        y = x @ x.mT
        z = torch.baddbmm(y, y, y, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, z, x, beta=3.4445)
    return (x.mT if tall else x).float()


class Optimizer:
    """One update a call of step(); parameters' gradients are taken and cleared."""

    def __init__(self, named, matrix_rate, rest_rate, ema=0.998, weight_decay=1e-2, skip=()):
        named = list(named)
        self.params = [p for _, p in named]
        self.rates, self.decay, self.keep, self.count = (matrix_rate, rest_rate), weight_decay, ema, 0
        self.groups, rest = {}, []
        for name, p in named:
            if p.ndim > 1 and "embedding.weight" not in name and not name.startswith(tuple(skip)):
                self.groups.setdefault((p.shape[0], p[0].numel()), []).append(p)
            else:
                rest.append(p)
        self.momenta = {k: torch.zeros(len(ps), *k, device=ps[0].device)
                        for k, ps in self.groups.items()}
        self.rest = rest
        self.adam = torch.optim.AdamW(rest, lr=rest_rate, betas=(0.9, 0.99), weight_decay=1e-3,
                                      fused=True)
        self.ema = [p.detach().clone() for p in self.params]
        self.clears = True      # False where a recorded step writes the gradients in place

    @torch.no_grad()
    def step(self, factor):
        """Updates with both learning rates times `factor`."""
        torch.nn.utils.clip_grad_norm_(self.params, 1.0, foreach=True)
        for p in self.rest:     # the fused kernel wants equal strides, of edges of one too
            if p.grad.stride() != p.stride():
                p.grad = torch.empty_like(p).copy_(p.grad)
        for group in self.adam.param_groups:
            group["lr"] = self.rates[1] * factor
        self.adam.step()
        rate = self.rates[0] * factor
        for (rows, cols), ps in self.groups.items():
            g = torch.stack([p.grad.reshape(rows, cols) for p in ps])
            m = self.momenta[rows, cols].lerp_(g, 0.05)
            u = orthogonal(torch.lerp(g, m, 0.95))
            torch._foreach_mul_(ps, 1 - rate * self.decay)
            torch._foreach_add_(ps, [x.view(p.shape) for x, p in zip(u.unbind(0), ps)],
                                alpha=-rate * 0.2 * max(rows, cols) ** 0.5)
        self.count += 1
        if self.count % 4 == 0:
            keep = min(self.keep, (1 + self.count) / (10 + self.count)) ** 4
            torch._foreach_lerp_(self.ema, self.params, 1 - keep)
        if self.clears:
            for p in self.params:
                p.grad = None

    def averaged(self, named):
        """name -> EMA of the parameters that this optimizer was made with."""
        return {n: e.clone() for (n, _), e in zip(named, self.ema)}


def mixed(device):
    """Whether to compute in bfloat16: on a GPU; on a CPU to try that path (IMPASTO_BF16=1)."""
    return device != "cpu" or os.environ.get("IMPASTO_BF16") == "1"


def tuned(device):
    """Settings that every training process begins with."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.benchmark_limit = 3    # more cost more than they bring within minutes
    if device == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


def laid_out(module, device):
    """The module on the device; there its 3 x 3 weights channels last, as tensor cores want them."""
    module = module.to(device)
    if device != "cpu":     # oneDNN is slower that way; and 1 x 1 weights' strides would be ambiguous
        for m in module.modules():
            if isinstance(m, torch.nn.Conv2d) and m.kernel_size != (1, 1):
                m.weight.data = m.weight.data.contiguous(memory_format=torch.channels_last)
    return module


def saved(value, path):
    """torch.save, complete or not there."""
    torch.save(value, path + ".tmp")
    os.replace(path + ".tmp", path)


def awaited(path, limit=None):
    """Waits until a file is there; False when the clock passes `limit` first."""
    while not os.path.exists(path):
        if limit and time.time() > limit:
            return False
        time.sleep(0.05)
    return True
