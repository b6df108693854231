"""Two one-thread workers that share parameters, gradients, moments and EMA.

An update is the mean of `micro` small batches. Workers draw tickets for them, add their gradients
under a lock, and whoever adds the last one makes the update. On a busy two-core machine this waits
far less than two OpenMP threads in one process, which meet in every operation.
"""
import time

import torch
import torch.multiprocessing as mp


class Shared:
    """What the workers share: parameters, moments, EMA and the number of updates so far."""

    def __init__(self, params, ema_decay, micro, betas=(0.9, 0.99), weight_decay=1e-3, matrices=()):
        self.params = [p.data.share_memory_() for p in params]
        self.g = [torch.zeros_like(p).share_memory_() for p in self.params]
        self.m = [torch.zeros_like(p).share_memory_() for p in self.params]
        self.v = [torch.zeros_like(p).share_memory_() for p in self.params]
        self.ema = [p.clone().share_memory_() for p in self.params]
        self.ema_decay, self.betas, self.weight_decay = ema_decay, betas, weight_decay
        self.matrices = list(matrices)  # numbers of the parameters that Muon updates
        self.step = mp.Value("l", 0, lock=False)
        self.lock, self.micro = mp.Lock(), micro
        self.tickets, self.done = mp.Value("l", 0, lock=False), mp.Value("l", 0, lock=False)

    def ticket(self):
        """Waits for a small batch to work on; returns the number of updates made so far."""
        while True:
            with self.lock:
                if self.tickets.value < self.micro:
                    self.tickets.value += 1
                    return self.step.value
            time.sleep(0.002)

    @torch.no_grad()
    def add(self, grads, lr_of_step, clip=1.0):
        """Adds one small batch's gradients; the last of them makes the AdamW update."""
        with self.lock:
            torch._foreach_add_(self.g, grads, alpha=1.0 / self.micro)
            self.done.value += 1
            if self.done.value < self.micro:
                return
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(self.g)))
            if torch.isfinite(norm):
                if norm > clip:
                    torch._foreach_mul_(self.g, float(clip / norm))
                self._update(lr_of_step(self.step.value))
            torch._foreach_zero_(self.g)
            self.step.value += 1
            self.tickets.value = self.done.value = 0

    def _update(self, lr):
        """AdamW, Muon for the matrices; the other worker waits. The EMA moves every fourth time."""
        n = self.step.value + 1
        rest = [i for i in range(len(self.params)) if i not in self.matrices]
        torch._fused_adamw_(*([x[i] for i in rest] for x in (self.params, self.g, self.m, self.v)),
                            [], [torch.tensor(float(n))] * len(rest), lr=lr,
                            beta1=self.betas[0], beta2=self.betas[1],
                            weight_decay=self.weight_decay, eps=1e-8, amsgrad=False, maximize=False)
        if self.matrices:
            self._muon(lr)
        if n % 4 == 0:
            keep = min(self.ema_decay, (1 + n) / (10 + n)) ** 4
            torch._foreach_lerp_(self.ema, self.params, 1 - keep)

    def _muon(self, lr):
        """Momentum, made orthogonal, its entries sized like Adam's."""
        torch.set_num_threads(2)    # the other worker sleeps
        g, m = [self.g[i] for i in self.matrices], [self.m[i] for i in self.matrices]
        torch._foreach_lerp_(m, g, 0.05)
        shapes = {}
        for i in self.matrices:
            p = self.params[i]
            shapes.setdefault((p.shape[0], p[0].numel()), []).append(i)
        for (rows, cols), group in shapes.items():
            x = orthogonal(torch.stack([(self.g[i] * 0.05 + self.m[i] * 0.95).reshape(rows, cols)
                                        for i in group]))
            size = lr * 0.2 * max(rows, cols) ** 0.5
            for i, u in zip(group, x):
                self.params[i].mul_(1 - lr * self.weight_decay).add_(u.reshape(self.params[i].shape),
                                                                     alpha=-size)
        torch.set_num_threads(1)

    def state(self):
        return {"m": self.m, "v": self.v, "ema": self.ema, "step": self.step.value}

    def restore(self, state):
        for name in ("m", "v", "ema"):
            for mine, theirs in zip(getattr(self, name), state[name]):
                mine.copy_(theirs)
        self.step.value = state["step"]


def orthogonal(x):
    """Five Newton-Schulz steps (Jordan 2024) towards the nearest orthogonal matrices; x [n,r,c]."""
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-12)).bfloat16()
    for _ in range(5):
        y = x @ x.mT
        x = 3.4445 * x + (2.0315 * y @ y - 4.7750 * y) @ x
    return (x.mT if tall else x).float()


def matrices(named, skip=()):
    """Numbers of the parameters for Muon: weights of more than one dimension, embeddings excepted."""
    return [i for i, (n, p) in enumerate(named)
            if p.ndim > 1 and "embeddings" not in n and not n.startswith(tuple(skip))]


def run(worker, shared, args, count=2):
    """Starts worker(rank, shared, args) `count` times; a worker's failure ends the run."""
    started = [mp.get_context("fork").Process(target=worker, args=(rank, shared, args))
               for rank in range(count)]
    for p in started:
        p.start()
    while any(p.is_alive() for p in started):
        time.sleep(0.5)
        if any(p.exitcode not in (None, 0) for p in started):
            for p in started:
                p.terminate()
            raise SystemExit("a worker failed")
