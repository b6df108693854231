"""CLoRA (Meral et al. 2024, arXiv 2403.19776) as it is meant, around a diffusers pipeline.

World 0 is the model with the styles alone, world j has concept j - 1 besides and its own variant of the
prompt. A contrastive loss on the worlds' cross-attention moves the latent, masks from the same maps
blend the worlds' predictions. The gradient is autograd's. Adapters act in the UNet alone.
"""

import copy
import dataclasses
import functools
import math
import re

import torch
import torch.nn.functional as F


@dataclasses.dataclass
class Options:
    update: bool = True
    refine: int = 20
    every: float = 0.2
    until: float = 0.5
    refresh: bool = True
    maps: str = "cond"
    tau: float = 0.5
    step_size: float = 20.0
    guard: float = 0.1
    masks: str = "attention"
    threshold: float = 0.4
    morph: str = "none"
    overlap: str = "mean"
    mask_after: float = 0.0
    grid: int | None = None

    @classmethod
    def parse(cls, text):
        """Of "refine=2 refresh=off"."""
        out = cls()
        for key, value in (item.split("=") for item in text.split()):
            kind = int if key == "grid" else type(getattr(out, key))
            setattr(out, key, {"on": True, "off": False}[value] if kind is bool else kind(value))
        return out


@dataclasses.dataclass
class Slot:
    """An adapter: FILE:W:TE, a concept's with @WORD, @WORD#NTH or either with =PHRASE."""

    file: str
    weight: float
    word: str | None = None
    nth: int | None = None
    phrase: str | None = None

    @classmethod
    def parse(cls, text):
        text, _, bound = text.partition("@")
        file, weight, *_ = text.split(":")
        word, _, phrase = bound.partition("=")
        word, _, nth = word.partition("#")
        return cls(file, float(weight), word or None, int(nth) if nth else None, phrase or None)


# --- the worlds' texts and where the concepts stand in them -----------------------------------------


def pieces(tokenizer, text):
    return tokenizer(text).input_ids[1:-1]


def place(tokenizer, prompt, word, nth):
    """Where the nth occurrence of a word begins and ends: in characters, and as token positions."""
    found = list(re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", prompt, re.IGNORECASE))
    if nth > len(found):
        raise ValueError(f'"{word}" is not {nth} times in "{prompt}"')
    begin, end = found[nth - 1].span()
    first = 1 + len(pieces(tokenizer, prompt[:begin]))  # after the start token
    count = len(pieces(tokenizer, word))
    whole = pieces(tokenizer, prompt)
    assert whole[first - 1 : first - 1 + count] == pieces(tokenizer, word), (prompt, word)
    return (begin, end), (first, first + count)


def worlds_texts(tokenizer, prompt, concepts):
    """(text of each world, positions[world][concept])."""
    places, taken = [], {}
    for c in concepts:
        key = tuple(pieces(tokenizer, c.word))
        nth = c.nth
        if nth is None:
            nth = taken[key] = taken.get(key, 0) + 1
        places.append(place(tokenizer, prompt, c.word, nth))
    texts, positions = [prompt], [[list(range(*tokens)) for _, tokens in places]]
    for c, ((begin, end), (first, last)) in zip(concepts, places):
        phrase = c.phrase or c.word
        texts.append(prompt[:begin] + phrase + prompt[end:] if c.phrase else prompt)
        grown = len(pieces(tokenizer, phrase)) - (last - first)
        here = []
        for _, (a, b) in places:
            shift = grown if a >= last else 0
            here.append(list(range(a + shift, b + (grown if b >= last else 0))))
        positions.append(here)
    return texts, positions


# --- cross-attention maps ---------------------------------------------------------------------------


class Tap:
    """Processor of a cross-attention that keeps its probabilities [rows, heads, cells, tokens]."""

    def __init__(self, kept):
        self.kept = kept

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_):
        def heads(x):
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        q = heads(attn.to_q(hidden_states))
        k = heads(attn.to_k(encoder_hidden_states))
        v = heads(attn.to_v(encoder_hidden_states))
        p = (q @ k.transpose(-1, -2) * attn.scale).softmax(-1)
        self.kept.append(p)
        return attn.to_out[0]((p @ v).transpose(1, 2).flatten(2))


def attention_levels(unet):
    """{name of a cross-attention: how often its grid was halved}."""
    deepest = len(unet.down_blocks) - 1
    out = {}
    for name, _ in unet.named_modules():
        where = name.split(".")
        if where[-1] == "attn2":
            block = where[0]
            out[name] = (deepest if block == "mid_block" else
                         int(where[1]) if block == "down_blocks" else deepest - int(where[1]))
    return out


def halved(size, level):
    for _ in range(level):
        size = tuple((n + 1) // 2 for n in size)
    return size


def default_level(levels, size):
    wide = [n for n in levels if min(halved(size, n)) >= 8]
    return 2 if 2 in wide else max(wide) if wide else min(levels)


class World:
    """A copy of the UNet with its adapters' changes added, its text, and its tapped maps."""

    def __init__(self, unet, deltas, text, level, dtype=torch.float32):
        self.kept = []
        self.unet = torch.nn.Module.to(copy.deepcopy(unet), dtype)  # diffusers' own warns of norms
        for d in deltas:
            for name, delta in d.items():
                p = self.unet.get_submodule(name).weight
                p.data = (p.data.double() + delta).to(dtype)
        for name, n in attention_levels(unet).items():
            if n == level:
                self.unet.get_submodule(name).set_processor(Tap(self.kept))
        self.text = {k: v.to(dtype) for k, v in text.items()}

    def predict(self, rows, t, both, **kwargs):
        """(prediction of both rows, map [cells, tokens])"""
        self.kept.clear()
        more = kwargs.get("added_cond_kwargs")
        if more:
            kwargs["added_cond_kwargs"] = more | {"text_embeds": self.text["pooled"]}
        kwargs["encoder_hidden_states"] = self.text["context"]
        eps = self.unet(rows, t, **kwargs, return_dict=False)[0]
        p = torch.stack([p if both else p[1:] for p in self.kept])
        return eps, p.mean((0, 1, 2))


# --- loss and masks ---------------------------------------------------------------------------------


def contrast(maps, positions, tau):
    """NT-Xent of the concepts' maps; None where nothing can be compared."""
    units, classes = [], []
    for c in range(len(positions[0])):
        for j, a in enumerate(maps):
            for p in positions[j][c]:
                x = a[:, p]
                e = (x - x.min()) / (x.max() - x.min() + 1e-6)
                if e.norm() > 0:
                    units.append(e / e.norm())
                    classes.append(c)
    if len(set(classes)) < 2:
        return None
    u, y = torch.stack(units), torch.tensor(classes)
    weight = torch.exp(u @ u.T / tau)
    same = y[:, None] == y[None]
    others = (weight * ~same).sum(1, keepdim=True)
    pairs = same & ~torch.eye(len(y), dtype=torch.bool)
    if not pairs.any():
        return None
    return -torch.log(weight / (weight + others))[pairs].mean()


def morphed(m, how):
    """m [worlds, 1, gh, gw] of 0 and 1; outside of the grid nothing counts."""
    def dilate(x):
        return F.max_pool2d(x, 3, 1, 1)

    def erode(x):
        return 1 - dilate(1 - x)

    return {"none": lambda x: x, "dilate": dilate, "erode": erode,
            "open": lambda x: dilate(erode(x)), "close": lambda x: erode(dilate(x))}[how](m)


def attention_masks(maps, positions, grid, o):
    """([worlds, cells], the smallest distance of a value from where a mask would change)."""
    share = [torch.stack([maps[j][:, p] / maps[j][:, p].max() for p in positions[j][j - 1]]).amax(0)
             for j in range(1, len(maps))]
    share = torch.stack(share)
    margin = (share - o.threshold).abs().min().item()
    m = morphed((share > o.threshold).float().reshape(-1, 1, *grid), o.morph).flatten(1)
    if o.overlap == "argmax":
        claims = torch.where(m > 0, share, -1.0)
        if len(m) > 1:
            top = claims.topk(2, 0).values
            shared = (top[1] >= 0) & (top[1] < 1)  # two maxima in one cell tie anyhow
            if shared.any():
                margin = min(margin, (top[0] - top[1])[shared].min().item())
        first = claims.argmax(0)  # of equal ones the first
        m = m * (torch.arange(len(m))[:, None] == first)
    return torch.cat([(m.sum(0, keepdim=True) == 0).float(), m]), margin


def enlarged(m, grid, size):
    """Nearest: [worlds, cells] to [worlds, h, w]."""
    y = torch.arange(size[0]) * grid[0] // size[0]
    x = torch.arange(size[1]) * grid[1] // size[1]
    return m.reshape(-1, *grid)[:, y][:, :, x]


# --- the method -------------------------------------------------------------------------------------


class Composed:
    """Stands for a UNet's forward and for its scheduler's step, which is given the moved latent.

    record holds, by evaluation: map_step [worlds, cells, tokens], mask_step [worlds, h, w], loss_step
    [updates], moved_step (the latent that the step is taken with, where it was moved); of the first
    update also loss and grad, in double. ratios: |dz| / |z| of every update; guarded: how many the
    guard cut; margin: how near a mask was to being another.
    """

    def __init__(self, unet, sched, worlds, positions, options, level, steps, begin, doubles):
        self.unet, self.sched, self.worlds, self.doubles = unet, sched, worlds, doubles
        self.level = level
        self.positions, self.o, self.steps, self.begin = positions, options, steps, begin
        self.calls, self.stopped, self.moved = 0, False, None
        self.record, self.ratios, self.guarded, self.margin = {}, [], 0, math.inf
        self.alone, self.step_alone = unet.forward, sched.step

    def __enter__(self):
        self.unet.forward = self.forward

        @functools.wraps(self.step_alone)
        def step(eps, t, sample, *args, **kwargs):
            if self.moved is not None:
                scale = self.sched.scale_model_input(torch.ones(1), t)
                sample = self.moved / scale
                self.record[f"moved_step{self.calls - 1}"] = sample
            return self.step_alone(eps, t, sample, *args, **kwargs)

        self.sched.step = step
        return self

    def __exit__(self, *_):
        self.unet.forward = self.alone

    def count_of_updates(self, i, is_first):
        o = self.o
        if not (o.update and is_first and i < o.until * self.steps) or len(self.positions[0]) < 2:
            return 0
        count = math.ceil(1 / o.every) + 1 if o.every > 0 else 1
        refined = {math.floor(k * o.every * self.steps + 0.5) for k in range(count)}
        return 1 + o.refine if i in refined else 1

    def evaluate(self, worlds, z, rest, t, kwargs):
        """(predictions [worlds, 2, c, h, w], maps [worlds, cells, tokens])"""
        rows = torch.cat([torch.cat([z, z]), rest.to(z.dtype)], 1)
        got = [w.predict(rows, t, self.o.maps == "both", **kwargs) for w in worlds]
        return torch.stack([eps for eps, _ in got]), torch.stack([a for _, a in got])

    def gradient(self, worlds, z, rest, t, kwargs):
        """(predictions, maps, loss, dloss/dz)"""
        with torch.enable_grad():
            z = z.detach().clone().requires_grad_()
            eps, maps = self.evaluate(worlds, z, rest, t, kwargs)
            loss = contrast(maps, self.positions, self.o.tau)
            grad = None if loss is None else torch.autograd.grad(loss, z)[0]
        return eps.detach(), maps.detach(), loss, grad

    def change(self, z, grad):
        """The latent's change, or None to leave it alone from here on."""
        dz = -self.o.step_size * grad
        if not dz.isfinite().all():
            self.stopped = True
            return None
        ratio = (dz.norm() / z.norm()).item()
        if ratio > self.o.guard:
            dz *= self.o.guard / ratio
            self.guarded += 1
        self.ratios.append(ratio)
        return dz

    def masks(self, i, maps, size, grid):
        n = len(maps)
        if self.o.masks == "mean" or i < self.o.mask_after * self.steps:
            return torch.ones(n, *size)
        if self.o.masks == "full":
            return (torch.arange(n) > 0).float()[:, None, None].expand(n, *size)
        m, margin = attention_masks(maps, self.positions, grid, self.o)
        self.margin = min(self.margin, margin)
        return enlarged(m, grid, size)

    def forward(self, sample, t, return_dict=True, **kwargs):
        o, k = self.o, self.calls
        i, half = divmod(k, self.sched.order)
        i += self.begin
        channels = self.unet.config.out_channels
        z, rest = sample[:1, :channels].clone(), sample[:, channels:]
        losses, self.moved = [], None
        updates = 0 if self.stopped else self.count_of_updates(i, half == 0)
        if updates and not k and self.doubles:
            _, _, loss, grad = self.gradient(self.doubles, z.double(), rest, t, kwargs)
            self.record["loss"], self.record["grad"] = loss.float().reshape(1), grad.float()
        for _ in range(updates):
            eps, maps, loss, grad = self.gradient(self.worlds, z, rest, t, kwargs)
            dz = None if loss is None else self.change(z, grad)
            if dz is None:
                break
            losses.append(loss.detach())
            z = self.moved = z + dz
        if o.refresh or not updates:
            eps, maps = self.evaluate(self.worlds, z, rest, t, kwargs)
        size = tuple(z.shape[2:])
        m = self.masks(i, maps, size, halved(size, self.level))
        self.record[f"map_step{k}"], self.record[f"mask_step{k}"] = maps, m
        if losses:
            self.record[f"loss_step{k}"] = torch.stack(losses)
        self.calls += 1
        weight = m[:, None, None]
        return ((eps * weight).sum(0) / weight.sum(0),)


def compose(pipe, sched, prompt, negative, slots, deltas, options, size, steps, begin=0, double=True):
    """A Composed, to stand around a call of the pipeline, and the worlds' texts, plain and encoded.

    deltas: {module: change} of each slot; size: the latent's (h, w); begin: the first step of the
    count that is taken; double: for loss and grad in the record.
    """
    concepts = [s for s in slots if s.word]
    texts, positions = worlds_texts(pipe.tokenizer, prompt, concepts)
    level = options.grid
    if level is None:
        level = default_level(attention_levels(pipe.unet).values(), size)
    encoded = [encode(pipe, text, negative) for text in texts]

    def worlds(dtype):
        out = []
        for j, text in enumerate(encoded):
            mine = [d for s, d in zip(slots, deltas) if not s.word or s is concepts[j - 1] and j]
            out.append(World(pipe.unet, mine, text, level, dtype))
        return out

    doubles = worlds(torch.float64) if double else None
    made = Composed(pipe.unet, sched, worlds(torch.float32), positions, options, level, steps,
                    begin, doubles)
    return made, texts, encoded


def encode(pipe, text, negative):
    """Rows (negative, positive) as the pipeline makes them."""
    got = pipe.encode_prompt(text, device="cpu", num_images_per_prompt=1,
                             do_classifier_free_guidance=True, negative_prompt=negative)
    out = {"context": torch.cat([got[1], got[0]])}
    if len(got) == 4:
        out["pooled"] = torch.cat([got[3], got[2]])
    return out
