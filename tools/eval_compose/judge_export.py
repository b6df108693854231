"""Stage 6: a judge's thresholds, references and own error on real drawings; models/eval/judge_N.safetensors.

All of it is measured on drawings that the judge did not train on: of the concepts the very drawings that the
adapters learn, of other objects those that neither judge nor generator saw, laid out as the default model's
pictures are, 128 pixels wide and then shrunk as eval/judge.c does it. Also writes the golden of
tests/test_eval.c (judge 1).
"""
import argparse
import itertools
import json
import os

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from world import (CLASSES, COLOURS, EVAL, MODELS, NAMES, NOTHING, OTHER, ROOT, SEED, STYLE_NAMES, WORK,
                   generator_saw, threads, trains)
from judge import Judge, logits, windows
from judge_data import CENTRES, EDGE, Pick, Spec, layouts, paint, random_scenes, rendered, unseen
from sample import load
from scenes import LAYOUTS

APART, ELSEWHERE, WHOLE = 16, 24, len(CENTRES)
WIDE = 128      # of a picture


def shrunk(pictures):
    """[n,3,128,128] in 0..255 -> [n,3,64,64] in -1..1, by means of 2 x 2 pixels."""
    return F.avg_pool2d(pictures, pictures.shape[-1] // EDGE) / 127.5 - 1


@torch.no_grad()
def look(judge, pictures, batch=64):
    """(probabilities [N,26,classes], features [N,26,C], style logits) of pictures in 0..255."""
    out = []
    for i in range(0, len(pictures), batch):
        f = judge(shrunk(pictures[i:i + batch].float()))
        s, l, k = logits(judge, f)
        cells, whole = windows(f)
        out.append((torch.cat([s, l[:, None]], 1).softmax(-1), torch.cat([cells, whole[:, None]], 1), k))
    return [torch.cat(o) for o in zip(*out)]


def apart(a, b):
    if WHOLE in (a, b):
        return 0
    return max(abs(CENTRES[a][0] - CENTRES[b][0]), abs(CENTRES[a][1] - CENTRES[b][1]))


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


def spots_of(k, rng):
    """Places of k objects, in 64ths: a layout of the default model's; it has none of four."""
    name = {1: "one", 2: "row of two" if rng.random() < 0.7 else "column of two",
            3: "row of three" if rng.random() < 0.5 else "triangle"}.get(k)
    if name is None:
        return [(x + rng.uniform(-2, 2), y + rng.uniform(-2, 2), rng.uniform(22, 29))
                for x, y in ((16, 16), (48, 16), (16, 48), (48, 48))]
    _, cells, (dx, dy), (least, most), _ = LAYOUTS[name]
    return [((x + dx * rng.uniform(-1, 1)) / 2, (y + dy * rng.uniform(-1, 1)) / 2, rng.uniform(least, most) / 2)
            for x, y in cells]


def real(sets, pick, rng, hybrid=False, spots=None, batch=64):
    """Real pictures (bytes) of sets of classes; hybrid: in each place a mixture of two of the set."""
    out = []
    for at in range(0, len(sets), batch):
        part = sets[at:at + batch]
        spec = Spec(len(part))
        for n, labels in enumerate(part):
            rows = [pick.own[c][rng.integers(len(pick.own[c]))] for c in labels]
            where = spots[at + n] if spots else spots_of(len(labels), rng)
            for i, row in enumerate(rows):
                spec.rows[n, i], spec.spots[n, i] = row, torch.tensor(where[i])
                spec.turn[n, i, 3] = -1.0 if rng.random() < 0.5 else 1.0
                if hybrid:
                    spec.second[n, i] = rows[i - 1]
                    spec.blend[n, i] = torch.tensor([float(rng.integers(2)), rng.uniform(0.25, 0.75),
                                                     rng.uniform(0, 2 * np.pi), rng.uniform(-0.3, 0.3)])
            spec.shade[n] = torch.tensor(list(COLOURS.values())[rng.integers(len(COLOURS))])
        out.append(paint(pick, spec, WIDE).round().byte())
    return torch.cat(out)


def random_real(pick, count, rng, batch=64):
    """(pictures, what the windows show) of random scenes."""
    choice, px, facts = layouts(500, rng), [], []
    for _ in range(0, count, batch):
        x, f, _ = random_scenes(pick, batch, choice, False, WIDE)
        px.append(((x + 1) * 127.5).round().byte())
        facts.append(f)
    return torch.cat(px), [torch.cat(f) for f in zip(*facts)]


def thresholds(judge, pick, rng, count):
    """Lowest probability, of any view, that one real picture in a hundred without the concept reaches."""
    pictures, (small, _, large, concept) = random_real(pick, count, rng)
    rows = (concept.amax(1) >= 0) | (large[:, NOTHING] == 1)
    there = torch.maximum(small.amax(1), large)[rows].numpy()
    p = look(judge, pictures[rows])[0].amax(1).numpy()
    return np.array([max(0.5, np.quantile(p[there[:, c] == 0, c], 0.99)) for c in range(OTHER)], np.float32)


def references(judge, pick, rng):
    """(centre [2,C], references [2,K,C]) of small windows and of the whole."""
    every = look(judge, random_real(pick, 384, rng)[0])[1]
    centre = torch.stack([every[:, :WHOLE].mean(dim=(0, 1)), every[:, WHOLE].mean(0)])
    rows = []
    for c in range(OTHER):
        which = rng.integers(len(CENTRES), size=24)
        spots = [[(*CENTRES[k], rng.uniform(21, 29))] for k in which]
        f = look(judge, real([[c]] * 24, pick, rng, spots=spots))[1]
        a = f[torch.arange(24), torch.from_numpy(which)] - centre[0]
        b = look(judge, real([[c]] * 24, pick, rng))[1][:, WHOLE] - centre[1]
        rows.append(torch.stack([F.normalize(t, dim=-1).mean(0) for t in (a, b)]))
    return centre, F.normalize(torch.stack(rows, 1), dim=-1)


def likeness(f, centre, ref):
    """Cosines [N,26,K]."""
    small = F.normalize(f[:, :WHOLE] - centre[0], dim=-1) @ ref[0].T
    whole = F.normalize(f[:, WHOLE] - centre[1], dim=-1) @ ref[1].T
    return torch.cat([small, whole[:, None]], 1)


@torch.no_grad()
def through(vae, pictures, batch=16):
    """What the default model's VAE leaves of pictures: the best that any generator can paint."""
    out = []
    for i in range(0, len(pictures), batch):
        y = vae.decode(vae.encode(pictures[i:i + batch].float() / 127.5 - 1)[0])
        out.append(((y.clamp(-1, 1) + 1) * 127.5).round().byte())
    return torch.cat(out)


def present(p, limit, sets):
    ways = [places(q, limit, s) for q, s in zip(p, sets)]
    return round(float(np.mean([all(w is not None and q[w, c] >= limit[c] for w, c in zip(way, s))
                                for q, way, s in zip(p, ways, sets)])), 3)


def of_each(judge, pick, limit, centre, ref, sets, pictures):
    """Presence, leak, strangers and identity of real pictures of sets; and which were found."""
    p, f, _ = look(judge, pictures)
    like, found, spilt, strange, own = likeness(f, centre, ref), [], [], [], []
    for n, s in enumerate(sets):
        q = p[n].numpy()
        way = places(q, limit, s)
        found.append([w is not None and q[w, c] >= limit[c] for w, c in zip(way, s)])
        spilt.append(leak(q, way, s))
        strange.append(np.mean([q[:, c].max() >= limit[c] for c in range(OTHER) if c not in s]))
        own += [like[n, w, c].item() for w, c in zip(way, s) if w is not None]
    return {"presence": round(float(np.mean([all(x) for x in found])), 3),
            "leak": round(float(np.mean(spilt)), 4), "strangers": round(float(np.mean(strange)), 4),
            "identity": round(float(np.mean(own)), 3)}, found


def own_error(judge, vae, pick, limit, centre, ref, rng, count):
    """What the judge says of real pictures: 1 - error, and what mixtures of two concepts pass for."""
    out, hits = {}, np.zeros((OTHER, 2))
    for k in (1, 2, 3, 4):
        sets = [rng.permutation(OTHER)[:k] for _ in range(count)]
        pictures = real(sets, pick, rng)
        figures, found = of_each(judge, pick, limit, centre, ref, sets, pictures)
        out.update({f"{key}@{k}": v for key, v in figures.items()})
        blurred = through(vae, pictures[:count // 4])
        out[f"presence@{k} through the VAE"] = present(look(judge, blurred)[0].numpy(), limit, sets)
        for s, ok in zip(sets, found):
            for c, yes in zip(s, ok):
                hits[c] += (yes, 1) if k == 2 else (0, 0)
    out["recall of each, pairs"] = {n: round(float(h[0] / max(1, h[1])), 3) for n, h in zip(NAMES, hits)}
    sets = [rng.permutation(OTHER)[:2] for _ in range(count)]
    figures, _ = of_each(judge, pick, limit, centre, ref, sets, real(sets, pick, rng, True))
    out["presence@2 of two mixtures of both"] = figures["presence"]
    out["leak of two mixtures of both"] = figures["leak"]
    return out


def style_error(judge, number, rng, count):
    """How often the style of two objects that neither judge nor generator saw is told."""
    pick = Pick(rendered(lambda c, s: s in STYLE_NAMES and not generator_saw(c, s) and not trains(number, c, s)))
    styles = [int(s) for s in rng.integers(len(STYLE_NAMES), size=count)]
    spec = Spec(count)
    for n, style in enumerate(styles):
        rows = [i for (_, s), i in pick.index.items() if s == STYLE_NAMES[style]]
        for i, spot in enumerate(spots_of(2, rng)):
            spec.rows[n, i], spec.spots[n, i] = rows[rng.integers(len(rows))], torch.tensor(spot)
    k = look(judge, paint(pick, spec, WIDE).round().byte())[2].argmax(1)
    return round(float((k == torch.tensor(styles)).float().mean()), 3)


@torch.no_grad()
def golden(judge, pick, centre, ref, rng):
    px = torch.cat([real([[0, 5]], pick, rng), real([[8]], pick, rng)])
    p, f, style = look(judge, px)
    cells = judge.head(judge(shrunk(px.float())).permute(0, 2, 3, 1)).flatten(1, 2)
    save_file({"pictures": px.permute(0, 2, 3, 1).contiguous(), "cells": cells.contiguous(), "p": p.contiguous(),
               "like": likeness(f, centre, ref).contiguous(), "style": style.softmax(-1).contiguous()},
              os.path.join(ROOT, "tests", "data", "golden_judge.safetensors"),
              metadata={"source": "tools/eval_compose/judge_export.py", "torch": torch.__version__})


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("number", type=int, choices=(1, 2))
    ap.add_argument("--count", type=int, default=240)
    ap.add_argument("--model", default=os.path.join(MODELS, "default"))
    ap.add_argument("--weights", help="default: judge_N.pt in $IMPASTO_DM")
    args = ap.parse_args()
    torch.set_num_threads(threads())
    torch.manual_seed(SEED + 2500 + args.number)
    rng = np.random.default_rng(SEED + 2500 + args.number)
    judge = Judge().eval()
    weights = args.weights or os.path.join(WORK, f"judge_{args.number}.pt")
    judge.load_state_dict(torch.load(weights, weights_only=True, map_location="cpu"))
    judge.half().float()
    pick = unseen(args.number)
    limit = thresholds(judge, pick, rng, 6 * args.count)
    centre, ref = references(judge, pick, rng)
    error = own_error(judge, load(args.model).vae, pick, limit, centre, ref, rng, args.count)
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
        "views": "25 windows of 32 px of 64, 8 px apart, row by row, then the whole"})
    os.chmod(path, 0o644)
    assert len(tensors["head.bias"]) == 2 * CLASSES + len(STYLE_NAMES)
    print(path, os.path.getsize(path), "bytes")
    if args.number == 1:
        golden(judge, pick, centre, ref, rng)


if __name__ == "__main__":
    main()
