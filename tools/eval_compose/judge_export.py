"""Stage 4: a judge's thresholds, references and own error on real drawings; models/eval/judge_N.safetensors.

All of it is measured on drawings that the judge did not train on: of the concepts the very drawings that the
adapters learn, of other objects those that neither judge nor generator saw. Also writes the golden
of tests/test_eval.c (judge 1).
"""
import argparse
import itertools
import json
import os

import numpy as np
import torch
from safetensors.torch import save_file

from judge import CLASSES, Judge, logits, windows
from judge_data import (NAMES, NOTHING, OTHER, STYLE_NAMES, WINDOWS, Pick, generator_saw, ground, layout,
                        mixed, place, scene, sprite, training, trains, unseen)
from world import EVAL, MODELS, ROOT, SEED, SIZE, WORK, threads
from publish import load
from vae import to_tensor

APART, ELSEWHERE, WHOLE = 16, 24, len(WINDOWS)


def look(judge, pictures, batch=64):
    """(probabilities [N,26,classes], features [N,26,C], style logits) of uint8 pictures."""
    out = []
    with torch.no_grad():
        for i in range(0, len(pictures), batch):
            f = judge(to_tensor(pictures[i:i + batch]))
            s, l, k = logits(judge, f)
            cells, whole = windows(f)
            out.append((torch.cat([s, l[:, None]], 1).softmax(-1), torch.cat([cells, whole[:, None]], 1), k))
    return [torch.cat(o) for o in zip(*out)]


def apart(a, b):
    if WHOLE in (a, b):
        return 0
    return max(abs(WINDOWS[a][0] - WINDOWS[b][0]), abs(WINDOWS[a][1] - WINDOWS[b][1]))


def places(p, limit, names):
    """Where each concept is: as eval/metrics.c chooses it."""
    best, found = None, None
    tries = [sorted(range(WHOLE + 1), key=lambda v: -p[v, c])[:10] + [None] for c in names]
    for way in itertools.product(*tries):
        if any(a is not None and b is not None and apart(a, b) < APART
               for i, a in enumerate(way) for b in way[:i]):
            continue
        worth = sum(p[v, c] + 12.0 * (p[v, c] >= limit[c]) for v, c in zip(way, names) if v is not None)
        if best is None or worth > best:
            best, found = worth, way
    return found


def leak(p, way, names):
    top = [max((p[v, c] for v in range(WHOLE + 1) if w is None or apart(v, w) >= ELSEWHERE), default=0)
           for w, c in zip(way, names)]
    return sum(top) / len(names)


def real(labels, pick, rng, hybrid=False):
    """A real picture of these concepts, as the model's pictures are laid out; hybrid: mixtures."""
    canvas = ground(rng, False)
    spots = {1: [(32, 32, 56)], 2: [(16, 32, 30), (48, 32, 30)]}.get(len(labels)) or layout(len(labels), rng)
    drawn = [sprite(pick.own[c][rng.integers(len(pick.own[c]))], int(s[2]), rng, False)
             for c, s in zip(labels, spots)]
    for i, (x, y, _) in enumerate(spots):
        px = mixed(drawn[i], drawn[i - 1], rng)[0] if hybrid else drawn[i]
        place(canvas, px, x + rng.uniform(-1, 1), y + rng.uniform(-1, 1))
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8)


def thresholds(judge, pick, rng, count):
    """Lowest probability, of any view, that one real picture in a hundred without the concept reaches."""
    rows = [scene(pick, rng, False) for _ in range(count)]
    rows = [r for r in rows if r[1].concept.max() >= 0 or r[1].large[NOTHING] == 1]
    there = np.stack([np.maximum(r[1].small.max(0), r[1].large) for r in rows])
    p = look(judge, np.stack([r[0] for r in rows]))[0].amax(1).numpy()
    return np.array([max(0.5, np.quantile(p[there[:, c] == 0, c], 0.99)) for c in range(OTHER)], np.float32)


def references(judge, pick, rng):
    """(centre [2,C], references [2,K,C]) of small windows and of the whole."""
    every = look(judge, np.stack([scene(pick, rng, False)[0] for _ in range(400)]))[1]
    centre = torch.stack([every[:, :WHOLE].mean(dim=(0, 1)), every[:, WHOLE].mean(0)])
    rows = []
    for c in range(OTHER):
        small, large = [], []
        for _ in range(24):
            canvas, k = ground(rng, False), int(rng.integers(len(WINDOWS)))
            x, y = np.clip(WINDOWS[k], 16, 48)
            key = pick.own[c][rng.integers(len(pick.own[c]))]
            place(canvas, sprite(key, 30, rng, False), x, y)
            small.append((np.clip(canvas + 0.5, 0, 255).astype(np.uint8), k))
            large.append(real([c], pick, rng))
        f = look(judge, np.stack([s[0] for s in small]))[1]
        a = torch.stack([f[i, s[1]] for i, s in enumerate(small)]) - centre[0]
        b = look(judge, np.stack(large))[1][:, WHOLE] - centre[1]
        rows.append(torch.stack([torch.nn.functional.normalize(t, dim=-1).mean(0) for t in (a, b)]))
    ref = torch.nn.functional.normalize(torch.stack(rows, 1), dim=-1)
    return centre, ref


def likeness(f, centre, ref):
    """Cosines [N,26,K]."""
    small = torch.nn.functional.normalize(f[:, :WHOLE] - centre[0], dim=-1) @ ref[0].T
    whole = torch.nn.functional.normalize(f[:, WHOLE] - centre[1], dim=-1) @ ref[1].T
    return torch.cat([small, whole[:, None]], 1)


@torch.no_grad()
def through(vae, pictures, batch=32):
    """What the model's VAE leaves of pictures: the best that any generator can paint."""
    out = []
    for i in range(0, len(pictures), batch):
        y = vae.decode(vae.encode(to_tensor(pictures[i:i + batch])).latent_dist.mean).sample
        out.append(((y.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy())
    return np.concatenate(out)


def present(p, limit, sets):
    ways = [places(q, limit, s) for q, s in zip(p, sets)]
    return round(float(np.mean([all(w is not None and q[w, c] >= limit[c] for w, c in zip(way, s))
                                for q, way, s in zip(p, ways, sets)])), 3)


def own_error(judge, vae, pick, limit, centre, ref, rng, count):
    """What the judge says of real pictures: 1 - error, and what mixtures of two concepts pass for."""
    out, hits = {}, np.zeros((OTHER, 2))
    for k in (1, 2, 3, 4):
        sets = [rng.permutation(OTHER)[:k] for _ in range(count)]
        pictures = np.stack([real(s, pick, rng) for s in sets])
        p, f, _ = look(judge, pictures)
        blurred = look(judge, through(vae, pictures[:count // 2]))[0].numpy()
        out[f"presence@{k} through the VAE"] = present(blurred, limit, sets)
        like, there, spilt, strange = likeness(f, centre, ref), [], [], []
        own = []
        for n, s in enumerate(sets):
            q = p[n].numpy()
            way = places(q, limit, s)
            ok = [w is not None and q[w, c] >= limit[c] for w, c in zip(way, s)]
            there.append(all(ok))
            spilt.append(leak(q, way, s))
            strange.append(np.mean([q[:, c].max() >= limit[c] for c in range(OTHER) if c not in s]))
            own += [like[n, w, c].item() for w, c in zip(way, s) if w is not None]
            if k == 2:
                for c, yes in zip(s, ok):
                    hits[c] += yes, 1
        out[f"presence@{k}"] = round(float(np.mean(there)), 3)
        out[f"leak@{k}"] = round(float(np.mean(spilt)), 4)
        out[f"strangers@{k}"] = round(float(np.mean(strange)), 4)
        out[f"identity@{k}"] = round(float(np.mean(own)), 3)
    out["recall of each, pairs"] = {n: round(float(h[0] / max(1, h[1])), 3) for n, h in zip(NAMES, hits)}
    sets = [rng.permutation(OTHER)[:2] for _ in range(count)]
    p, f, _ = look(judge, np.stack([real(s, pick, rng, True) for s in sets]))
    ways = [places(p[n].numpy(), limit, s) for n, s in enumerate(sets)]
    out["presence@2 of two mixtures of both"] = present(p.numpy(), limit, sets)
    out["leak of two mixtures of both"] = round(float(np.mean(
        [leak(p[n].numpy(), way, s) for n, (way, s) in enumerate(zip(ways, sets))])), 3)
    return out


def fit_styles(judge, number, rng, count=3500):
    """The head's rows for styles anew, on as many pictures of each: the training's own styles are those of the
    judge's few drawings of the concepts, and its rows say little more than which of them is the commonest."""
    pick, pics = training(number), []
    for i in range(count):
        canvas, style = ground(rng, True), STYLE_NAMES[i % len(STYLE_NAMES)]
        for x, y, size in layout(int(rng.integers(1, 4)), rng):
            place(canvas, sprite(pick.draw(OTHER, style, rng), int(round(size)), rng, True), x, y)
        pics.append(np.clip(canvas + 0.5, 0, 255).astype(np.uint8))
    f = look(judge, np.stack(pics))[1][:, WHOLE]
    want, mean, spread = torch.arange(count) % len(STYLE_NAMES), f.mean(0), f.std(0) + 1e-4
    w = torch.zeros(f.shape[1], len(STYLE_NAMES), requires_grad=True)
    b = torch.zeros(len(STYLE_NAMES), requires_grad=True)
    opt = torch.optim.LBFGS([w, b], max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        opt.zero_grad()
        value = torch.nn.functional.cross_entropy((f - mean) / spread @ w + b, want) + 1e-3 * (w ** 2).sum()
        value.backward()
        return value

    opt.step(loss)
    with torch.no_grad():
        judge.head.weight[2 * CLASSES:] = (w / spread[:, None]).T
        judge.head.bias[2 * CLASSES:] = b - mean / spread @ w


def style_error(judge, number, rng, count):
    pick = Pick(lambda c, s: s in STYLE_NAMES and not generator_saw(c, s) and not trains(number, c, s))
    pics, want = [], []
    for _ in range(count):
        style = STYLE_NAMES[rng.integers(len(STYLE_NAMES))]
        canvas = ground(rng, False)
        for x in (16, 48):
            place(canvas, sprite(pick.draw(OTHER, style, rng), 30, rng, False), x, 32)
        pics.append(np.clip(canvas + 0.5, 0, 255).astype(np.uint8))
        want.append(STYLE_NAMES.index(style))
    k = look(judge, np.stack(pics))[2].argmax(1)
    return round(float((k == torch.tensor(want)).float().mean()), 3)


def golden(judge, pick, centre, ref, rng):
    pics = np.stack([real([0, 5], pick, rng), real([8], pick, rng), real([1, 2], pick, rng, True)])
    p, f, style = look(judge, pics)
    with torch.no_grad():
        cells = judge.head(judge(to_tensor(pics)).permute(0, 2, 3, 1)).flatten(1, 2)
    save_file({"pictures": torch.from_numpy(pics), "cells": cells.contiguous(), "p": p.contiguous(),
               "like": likeness(f, centre, ref).contiguous(), "style": style.softmax(-1).contiguous()},
              os.path.join(ROOT, "tests", "data", "golden_judge.safetensors"),
              metadata={"source": "tools/eval_compose/judge_export.py", "torch": torch.__version__})


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("number", type=int, choices=(1, 2))
    ap.add_argument("--count", type=int, default=400)
    args = ap.parse_args()
    torch.set_num_threads(threads())
    rng = np.random.default_rng(SEED + 2500 + args.number)
    judge = Judge().eval()
    judge.load_state_dict(torch.load(os.path.join(WORK, f"judge_{args.number}.pt"), weights_only=True))
    fit_styles(judge, args.number, np.random.default_rng(SEED + 2600 + args.number))
    judge.half().float()
    pick = unseen(args.number)
    limit = thresholds(judge, pick, rng, 6 * args.count)
    centre, ref = references(judge, pick, rng)
    error = own_error(judge, load(os.path.join(MODELS, "eval", "model")).vae, pick, limit, centre, ref, rng, args.count)
    error["style"] = style_error(judge, args.number, rng, args.count)
    error["pictures of each kind"] = args.count
    print(json.dumps(error, indent=1), "thresholds", dict(zip(NAMES, limit.round(3).tolist())))
    tensors = {k: v.half().contiguous() for k, v in judge.state_dict().items() if not k.startswith("aux.")}
    tensors.update({"threshold": torch.from_numpy(limit), "identity.centre": centre.contiguous(),
                    "identity.reference": ref.contiguous()})
    os.makedirs(EVAL, exist_ok=True)
    path = os.path.join(EVAL, f"judge_{args.number}.safetensors")
    save_file(tensors, path, metadata={
        "format": "pt", "classes": json.dumps(NAMES), "styles": json.dumps(STYLE_NAMES),
        "own_error": json.dumps(error), "source": "tools/eval_compose/judge_export.py",
        "views": "25 windows of 32 px, 8 px apart, row by row, then the whole"})
    os.chmod(path, 0o644)
    assert len(tensors["head.bias"]) == 2 * CLASSES + len(STYLE_NAMES) and SIZE == 64
    print(path, os.path.getsize(path), "bytes")
    if args.number == 1:
        golden(judge, pick, centre, ref, rng)


if __name__ == "__main__":
    main()
