"""Scenes: one to three drawings on a plain background, with a caption; planned here, painted by torch.

A plan is arrays, one row a scene: drawings' rows [n,3] (-1: none), boxes [n,3,4] (centre x, y, edge,
1 or -1 for mirrored), background colours [n,3] in 0..255, token ids [n,77], layout [n], concept indices
[n,3] (-1: none), style [n].
"""
import functools
import hashlib
import json
import multiprocessing
import os
import re

import numpy as np
import torch
import torch.nn.functional as F

from common import (COLOURS, PACK, SEED, SIZE, STYLE_NAMES, STYLES, TRAIN_STYLES, for_training,
                    training_concepts)

# layout: share of the scenes, cells' centres, jitter of centres (x, y), edges of the drawings
# (least, most), edge of the window in which the judge sees a cell
LAYOUTS = {
    "one": (0.40, [(64, 64)], (9, 9), (84, 112), 128),
    "row of two": (0.22, [(32, 64), (96, 64)], (4, 12), (45, 58), 68),
    "column of two": (0.12, [(64, 33), (64, 95)], (12, 4), (45, 58), 68),
    "row of three": (0.18, [(21.5, 64), (64, 64), (106.5, 64)], (2, 14), (35, 42), 50),
    "triangle": (0.08, [(64, 33), (33, 95), (95, 95)], (4, 4), (42, 54), 64),
}
LAYOUT_NAMES = list(LAYOUTS)
SCENES = 400000     # of a full run


def ground(colour):
    return f"on {'an' if colour[0] in 'aeiou' else 'a'} {colour} background"


def objects_text(parts, layout, rng):
    """The part of a caption that names the objects and how they stand."""
    r, names = rng.random(), [p.phrase for p in parts]
    if layout == "one":
        lead = "a picture of " if r < 0.04 else "an emoji of " if r < 0.08 else ""
        return parts[0].words if 0.08 <= r < 0.12 else lead + names[0]
    if layout == "row of two":
        a, b = names
        if r < 0.6:
            return f"{a} and {b}"
        return f"{a} next to {b}" if r < 0.8 else f"{a} on the left and {b} on the right"
    if layout == "column of two":
        return f"{names[0]} above {names[1]}" if r < 0.65 else f"{names[1]} below {names[0]}"
    a, b, c = names
    if layout == "triangle":
        return f"{a} above {b} and {c}"
    if r < 0.75:
        return f"{a}, {b} and {c}"
    return f"{a} on the left, {b} in the middle and {c} on the right"


def caption(parts, layout, style, colour, rng):
    """A caption and the colour that the picture must have (white where none is named)."""
    what, words = objects_text(parts, layout, rng), STYLES[style][0]
    r = rng.random()
    if r < 0.50:
        return f"{what}, {words} style, {ground(colour)}", colour
    if r < 0.65:
        return f"{what} {ground(colour)}", colour
    if r < 0.85:
        return f"{what}, {words} style", "white"
    return what, "white"


def placed(parts, layout, rng, jitter=1.0):
    """Boxes [(x, y, edge, side)] of a layout's cells, jittered; mirrored where a drawing allows it."""
    _, cells, (dx, dy), (least, most), _ = LAYOUTS[layout]
    out = []
    for part, (x, y) in zip(parts, cells):
        edge = 0.5 * (least + most) + 0.5 * (most - least) * rng.uniform(-1, 1) * jitter
        side = -1.0 if part.mirrors and rng.random() < 0.5 else 1.0
        out.append((x + dx * rng.uniform(-1, 1) * jitter, y + dy * rng.uniform(-1, 1) * jitter,
                    edge, side))
    return out


def shade(colour, rng):
    rgb = np.asarray(COLOURS[colour], dtype=np.float32)
    return rgb if colour == "white" else np.clip(rgb + rng.uniform(-4, 4, 3), 0, 255)


class Words:
    """Token ids of captions by the packed BPE vocabulary, 77 as CLIP pads them."""
    PATTERN = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|[^\s\w]+|_+")

    def __init__(self, folder=None):
        folder = folder or os.path.join(PACK, "tokenizer")
        with open(os.path.join(folder, "vocab.json"), encoding="utf-8") as f:
            self.vocab = json.load(f)
        with open(os.path.join(folder, "merges.txt"), encoding="utf-8") as f:
            pairs = [tuple(line.split()) for line in f.read().split("\n")[1:] if line]
        self.rank = {p: i for i, p in enumerate(pairs)}
        self.known = {}

    def word(self, text):
        """Ids of one ASCII word."""
        if text not in self.known:
            parts = [*text[:-1], text[-1] + "</w>"]
            while len(parts) > 1:
                best = min(zip(parts, parts[1:]), key=lambda p: self.rank.get(p, 1 << 30))
                if best not in self.rank:
                    break
                out, i = [], 0
                while i < len(parts):
                    if tuple(parts[i:i + 2]) == best:
                        out.append(parts[i] + parts[i + 1])
                        i += 2
                    else:
                        out.append(parts[i])
                        i += 1
                parts = out
            self.known[text] = [self.vocab[p] for p in parts]
        return self.known[text]

    def ids(self, text):
        end = self.vocab["<|endoftext|>"]
        ids = [self.vocab["<|startoftext|>"]]
        for word in self.PATTERN.findall(text.lower()):
            ids += self.word(word)
        ids = ids[:76] + [end]
        return ids + [end] * (77 - len(ids))


def vocabulary(folder=None):
    """SHA-256 of the vocabulary's two files."""
    folder, digest = folder or os.path.join(PACK, "tokenizer"), hashlib.sha256()
    for name in ("vocab.json", "merges.txt"):
        with open(os.path.join(folder, name), "rb") as f:
            digest.update(f.read())
    return digest.hexdigest()


class Plan:
    """The arrays described above, for n scenes, and the captions."""

    def __init__(self, n):
        self.rows = np.full((n, 3), -1, np.int64)
        self.boxes = np.zeros((n, 3, 4), np.float32)
        self.shades = np.zeros((n, 3), np.float32)
        self.ids = np.zeros((n, 77), np.int16)
        self.layout = np.zeros(n, np.int64)
        self.concepts = np.full((n, 3), -1, np.int64)
        self.style = np.zeros(n, np.int64)
        self.texts = [""] * n

    ARRAYS = ("rows", "boxes", "shades", "ids", "layout", "concepts", "style")

    def put(self, i, drawn, parts, layout, style, colour, text, rng, words, jitter=1.0):
        """Fills scene i; `drawn` maps (concept index, style) to the drawing's row."""
        k = len(parts)
        self.rows[i, :k] = [drawn[p.index, style] for p in parts]
        self.boxes[i, :k] = placed(parts, layout, rng, jitter)
        self.shades[i] = shade(colour, rng)
        self.layout[i] = LAYOUT_NAMES.index(layout)
        self.concepts[i, :k] = [p.index for p in parts]
        self.style[i] = STYLE_NAMES.index(style)
        self.texts[i] = text
        if words:
            self.ids[i] = words.ids(text)


def choose(drawn, pool, rng, styles):
    """(parts, layout, style) of a random scene; all parts are drawn in the style."""
    shares = np.cumsum([v[0] for v in LAYOUTS.values()])
    while True:
        layout = LAYOUT_NAMES[min(int(np.searchsorted(shares, rng.random())), len(LAYOUTS) - 1)]
        style = styles[rng.integers(len(styles))]
        parts = [pool[rng.integers(len(pool))] for _ in LAYOUTS[layout][1]]
        if len(set(parts)) == len(parts) and all((p.index, style) in drawn for p in parts):
            return parts, layout, style


def training_scene(drawn, pool, rng, styles=None):
    """A random scene of the training distribution: (parts, layout, style, colour, caption)."""
    parts, layout, style = choose(drawn, pool, rng, styles or TRAIN_STYLES)
    names = list(COLOURS)
    colour = names[rng.integers(len(names))] if rng.random() < 0.8 else "white"
    text, colour = caption(parts, layout, style, colour, rng)
    return parts, layout, style, colour, text


def _share(job):
    count, seed, drawn = job
    rng, words, pool, plan = np.random.default_rng(seed), Words(), training_concepts(), Plan(count)
    for i in range(count):
        plan.put(i, drawn, *training_scene(drawn, pool, rng), rng, words)
    return plan


def joined(plans):
    out = Plan(0)
    for name in Plan.ARRAYS:
        setattr(out, name, np.concatenate([getattr(p, name) for p in plans]))
    out.texts = [t for p in plans for t in p.texts]
    return out


def training_plan(count, seed, drawn, processes=2, chunk=10000):
    """`count` training scenes; the same for any number of processes."""
    jobs = [(min(chunk, count - i), seed + i // chunk, drawn) for i in range(0, count, chunk)]
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        return joined(pool.map(_share, jobs, chunksize=1))


def planned(count):
    """The recipe's `count` training scenes, of the drawings that may be trained on."""
    with open(os.path.join(PACK, "sprites.json"), encoding="utf-8") as f:
        rows = [r for r in json.load(f) if for_training(r[0], r[1])]
    drawn = {(c, s): i for i, (c, s, _, _) in enumerate(rows)}     # as Drawings numbers them
    return training_plan(count, SEED + 10, drawn, max(2, min(10, (os.cpu_count() or 2) - 4)))


def painted(drawings, rows, boxes, shades):
    """Pictures [n,3,128,128] in -1..1 of a plan's rows (tensors on the drawings' device)."""
    n, device = len(rows), rows.device
    canvas = shades.float().view(n, 3, 1, 1).expand(n, 3, SIZE, SIZE)
    line = torch.arange(SIZE, device=device, dtype=torch.float32) + 0.5
    for k in range(rows.shape[1]):
        x, y, edge, side = boxes[:, k].float().unbind(-1)
        edge = edge.clamp_min(1e-3)
        u = (line - x[:, None]) * (2 * side / edge)[:, None]
        v = (line - y[:, None]) * (2 / edge)[:, None]
        grid = torch.stack([u[:, None, :].expand(n, SIZE, SIZE), v[:, :, None].expand(n, SIZE, SIZE)], -1)
        there, sprite = (rows[:, k] >= 0), 0.0
        at = rows[:, k].clamp_min(0)
        limits = (1e9, 64.0, 44.0, 0.0)     # a drawing is never shrunk by more than about a half
        for j, bank in enumerate(drawings.banks):
            if k > 0 and j == 0:
                continue    # only single objects are larger than 64 pixels
            mine = (there & (edge <= limits[j]) & (edge > limits[j + 1])).view(n, 1, 1, 1)
            sprite = sprite + mine * F.grid_sample(bank[at].float(), grid, align_corners=False)
        canvas = canvas * (1 - sprite[:, 3:] / 255.0) + sprite[:, :3]
    return (canvas.clamp(0, 255) / 127.5 - 1.0).contiguous()


@functools.lru_cache(None)
def _windows(device):
    """Centre and half edge of each layout's judged cells, [layouts,3,3]."""
    table = torch.zeros(len(LAYOUTS), 3, 3)
    for i, (_, cells, _, _, window) in enumerate(LAYOUTS.values()):
        for k, (x, y) in enumerate(cells):
            table[i, k] = torch.tensor([x, y, window / 2])
    return table.to(device)


def cells(pictures, layout, which, edge=64):
    """What stands in cell `which` [n] of each picture, enlarged or shrunk to edge x edge."""
    x, y, half = _windows(str(pictures.device))[layout, which].unbind(-1)
    line = (torch.arange(edge, device=pictures.device) + 0.5) * (2 / edge) - 1
    u = (x[:, None] + half[:, None] * line) * (2 / SIZE) - 1
    v = (y[:, None] + half[:, None] * line) * (2 / SIZE) - 1
    n = len(pictures)
    grid = torch.stack([u[:, None, :].expand(n, edge, edge), v[:, :, None].expand(n, edge, edge)], -1)
    return F.grid_sample(pictures.float(), grid, padding_mode="border", align_corners=False)


class Source:
    """Pictures of a plan on a device, by scene number."""

    def __init__(self, drawings, plan, device):
        self.drawings = drawings
        self.rows, self.boxes, self.shades = (torch.from_numpy(a).to(device) for a in
                                              (plan.rows, plan.boxes, plan.shades))

    def __len__(self):
        return len(self.rows)

    def at(self, take):
        return painted(self.drawings, self.rows[take], self.boxes[take], self.shades[take])


def paint_plan(drawings, plan, device="cpu", batch=64):
    """All of a plan's pictures."""
    source = Source(drawings, plan, device)
    return torch.cat([source.at(torch.arange(i, min(i + batch, len(source)), device=device))
                      for i in range(0, len(source), batch)])


