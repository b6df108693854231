"""CMLoRA (Zou et al. 2025, arXiv 2502.04923) as it is meant, around a diffusers UNet.

Every adapter predicts alone; one at a time is dominant: its features are fresh and it weighs d times
another's. d starts at N - 0.5 and falls by 0.5^k at the k-th change, never below 1.
"""

import contextlib

from fixtures.cache import skip_channels, taker_of


class Schedule:
    """Who is dominant, who is evaluated whole, and what each weighs, step by step."""

    def __init__(self, n, steps, interval=0, refresh="dominant", early=0.55, decay=True, equal=False,
                 high=None):
        self.n, self.steps, self.interval, self.refresh = n, steps, interval, refresh
        self.early, self.decay, self.equal = early, decay, equal
        order = list(range(n))
        cut = n
        if high is not None:
            order.sort(key=lambda i: -high[i])
            gaps = [high[order[i - 1]] - high[order[i]] for i in range(1, n)]
            if gaps and max(gaps) > 0:
                cut = 1 + gaps.index(max(gaps))
        self.pools = order[:cut], order[cut:] or order
        self.turn, self.changes, self.dominant, self.d = 0, 0, None, n - 0.5

    def refreshes(self):
        if self.interval:
            return set(range(0, self.steps, self.interval))
        a, b = self.steps * 3 // 8, self.steps * 7 // 8
        return set(range(0, a, 2)) | set(range(a, b, 3)) | set(range(b, self.steps, 2))

    def step(self, i):
        """(adapters evaluated whole, weight of each)"""
        fresh = i in self.refreshes()
        if fresh:
            pool = self.pools[0 if i < self.early * self.steps else 1]
            chosen = pool[self.turn % len(pool)]
            self.turn += 1
            if self.dominant not in (None, chosen) and self.decay:
                self.changes += 1
                self.d = max(1.0, self.d - 0.5**self.changes)
            self.dominant = chosen
        whole = set()
        if fresh or self.refresh == "always":
            whole.add(self.dominant)
        if i == 0 or self.n == 1 or (fresh and self.refresh != "dominant"):
            whole = set(range(self.n))
        other = self.n / (self.d + self.n - 1)
        weights = [self.d * other if j == self.dominant else other for j in range(self.n)]
        return whole, [1.0] * self.n if self.equal else weights


class Composed:
    """Stands for a UNet's forward: the weighted mean of the adapters' own predictions."""

    def __init__(self, unet, deltas, schedule, level):
        self.unet, self.deltas, self.schedule = unet, deltas, schedule
        self.level, self.skip = level, skip_channels(unet, level)
        self.kept, self.calls = [None] * len(deltas), 0
        self.alone = unet.forward

    def __enter__(self):
        self.unet.forward = self.forward

    def __exit__(self, *_):
        self.unet.forward = self.alone

    @contextlib.contextmanager
    def adapted(self, j):
        before = {}
        for name, delta in self.deltas[j].items():
            p = self.unet.get_submodule(name).weight
            before[name] = p.data
            p.data = (p.data.double() + delta).float()
        yield
        for name, value in before.items():
            self.unet.get_submodule(name).weight.data = value

    def predict(self, j, whole, *args, **kwargs):
        """One adapter's prediction; not whole: the hidden state at the cut is what it kept."""

        def at_cut(_, inputs, kw):
            both = inputs[0].clone()
            hidden = both.shape[1] - self.skip
            if whole:
                self.kept[j] = both[:, :hidden].clone()
            both[:, :hidden] = self.kept[j]
            return (both, *inputs[1:]), kw

        hook = taker_of(self.unet, self.level).register_forward_pre_hook(at_cut, with_kwargs=True)
        with self.adapted(j):
            out = self.alone(*args, **kwargs, return_dict=False)[0]
        hook.remove()
        return out

    def forward(self, *args, return_dict=True, **kwargs):
        whole, weights = self.schedule.step(self.calls)
        self.calls += 1
        n = len(self.deltas)
        out = sum(w * self.predict(j, j in whole, *args, **kwargs) for j, w in enumerate(weights)) / n
        return (out,)
