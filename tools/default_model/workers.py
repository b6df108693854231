"""Two one-thread workers that share parameters, gradients, AdamW moments and EMA.

An update is the mean of `micro` small batches. Workers draw tickets for them, add their gradients
under a lock, and whoever adds the last one makes the update. On a busy two-core machine this waits
far less than two OpenMP threads in one process, which meet in every operation.
"""
import time

import torch
import torch.multiprocessing as mp


class Shared:
    """What the workers share: parameters, moments, EMA and the number of updates so far."""

    def __init__(self, params, ema_decay, micro, betas=(0.9, 0.99), weight_decay=1e-3):
        self.params = [p.data.share_memory_() for p in params]
        self.g = [torch.zeros_like(p).share_memory_() for p in self.params]
        self.m = [torch.zeros_like(p).share_memory_() for p in self.params]
        self.v = [torch.zeros_like(p).share_memory_() for p in self.params]
        self.ema = [p.clone().share_memory_() for p in self.params]
        self.ema_decay, self.betas, self.weight_decay = ema_decay, betas, weight_decay
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
                self._adamw(lr_of_step(self.step.value))
            torch._foreach_zero_(self.g)
            self.step.value += 1
            self.tickets.value = self.done.value = 0

    def _adamw(self, lr):
        n, (b1, b2) = self.step.value + 1, self.betas
        torch._foreach_lerp_(self.m, self.g, 1 - b1)
        torch._foreach_mul_(self.v, b2)
        torch._foreach_addcmul_(self.v, self.g, self.g, 1 - b2)
        den = torch._foreach_sqrt(self.v)
        torch._foreach_add_(den, 1e-8 * (1 - b2 ** n) ** 0.5)
        torch._foreach_mul_(self.params, 1 - lr * self.weight_decay)
        torch._foreach_addcdiv_(self.params, self.m, den,
                                -lr * (1 - b2 ** n) ** 0.5 / (1 - b1 ** n))
        torch._foreach_lerp_(self.ema, self.params, 1 - min(self.ema_decay, (1 + n) / (10 + n)))

    def state(self):
        return {"m": self.m, "v": self.v, "ema": self.ema, "step": self.step.value}

    def restore(self, state):
        for name in ("m", "v", "ema"):
            for mine, theirs in zip(getattr(self, name), state[name]):
                mine.copy_(theirs)
        self.step.value = state["step"]


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
