"""Stage 12: a small classifier of concepts and styles, and the model's score by it.

`score.py train` trains the judge on drawings of all seven styles, two of which (and all held-out
concepts) the denoiser never saw, less one drawing in eight of the others, which is kept for checking
the judge itself. `score.py judge` generates pictures from the exported model and counts how often
the judge's first or first five guesses name what the prompt asked for.
"""
import argparse
import glob
import json
import os
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import workers
from common import (COLOURS, MODELS, SEED, STYLES, TRAIN_STYLES, WORK, Drawings, compose, concepts,
                    ground, threads, training_concepts)
from sample import generate, load
from train import rate
from vae import to_tensor

STYLE_NAMES = list(STYLES)


class Judge(nn.Module):
    """Plain residual CNN, 64 px in, one head for concepts and one for styles."""

    def __init__(self, classes):
        super().__init__()
        widths = (32, 64, 128, 256)
        self.stem = nn.Conv2d(3, widths[0], 3, 2, 1)
        self.down, self.body = nn.ModuleList(), nn.ModuleList()
        for i, w in enumerate(widths):
            self.down.append(nn.Conv2d(widths[i - 1], w, 3, 2, 1) if i else nn.Identity())
            self.body.append(nn.Identity() if i == 0 else nn.Sequential(
                nn.BatchNorm2d(w), nn.ReLU(), nn.Conv2d(w, w, 3, 1, 1),
                nn.BatchNorm2d(w), nn.ReLU(), nn.Conv2d(w, w, 3, 1, 1)))
        self.norm = nn.BatchNorm2d(widths[-1])
        self.concept = nn.Linear(widths[-1], classes)
        self.style = nn.Linear(widths[-1], len(STYLE_NAMES))

    def forward(self, x):
        x = self.stem(x)
        for down, body in zip(self.down, self.body):
            x = down(x)
            x = x if isinstance(body, nn.Identity) else x + body(x)
        x = F.relu(self.norm(x)).mean(dim=(2, 3))
        return self.concept(x), self.style(x)


def halves(pictures):
    """Left and right objects of two-object pictures, each enlarged to a whole picture."""
    x = to_tensor(pictures)
    cut = torch.stack([x[:, :, 16:48, :32], x[:, :, 16:48, 32:]], 1).flatten(0, 1)
    return F.interpolate(cut, size=64, mode="bilinear", align_corners=False)


def kept_for_checks(index, style):
    return (index * 7 + STYLE_NAMES.index(style) * 3) % 8 == 0


def examples(count, checks, rng, drawings):
    """(pictures, concept, style) of drawings the judge trains on or is checked with."""
    rows = [r for r in drawings.index if kept_for_checks(*r) == checks]
    names, everything = list(COLOURS), concepts()
    pics = np.empty((count, 64, 64, 3), dtype=np.uint8)
    want = np.empty((count, 2), dtype=np.int64)
    small = rng.random(count) < 0.35
    for i in range(count):
        index, style = rows[rng.integers(len(rows))]
        parts = [everything[index]] * (2 if small[i] else 1)
        pics[i] = compose(drawings, parts, style, names[rng.integers(len(names))], rng, 1.5)
        want[i] = index, STYLE_NAMES.index(style)
    x = to_tensor(pics)
    if small.any():
        x[torch.from_numpy(small)] = halves(pics[small])[::2]
    return x, torch.from_numpy(want)


def roughen(x):
    """Blur, contrast, shift and noise, so that the judge is not thrown by a decoder's softness."""
    n = len(x)
    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    k = torch.rand(n, 1, 1, 1)
    x = x * (1 - k) + soft * k
    x = x * (1 + 0.3 * (torch.rand(n, 3, 1, 1) - 0.5)) + 0.2 * (torch.rand(n, 3, 1, 1) - 0.5)
    x = torch.roll(x, tuple(torch.randint(-3, 4, (2,)).tolist()), (2, 3))
    return x + 0.06 * torch.randn_like(x)


def train_judge(args):
    torch.manual_seed(SEED + 700)
    rng = np.random.default_rng(SEED + 701)
    drawings, judge = Drawings(), Judge(len(concepts()))
    named = list(judge.named_parameters())
    params = [p for _, p in named]
    opt = workers.Shared(params, 0.9, 1, weight_decay=0.05,
                         matrices=workers.matrices(named, ("stem", "concept", "style")))
    start, x, want = time.time(), None, None
    for step in range(args.steps):
        if step % 100 == 0:
            x, want = examples(100 * args.batch // 2, False, rng, drawings)
        take = torch.randint(len(x), (args.batch,))
        with torch.autocast("cpu", torch.bfloat16):
            c, s = judge(roughen(x[take]))
        loss = (F.cross_entropy(c.float(), want[take, 0], label_smoothing=0.1)
                + 0.3 * F.cross_entropy(s.float(), want[take, 1]))
        opt.ticket()
        opt.add(list(torch.autograd.grad(loss, params)),
                lambda n: args.lr * rate(n, args.steps, 100, 0.8))
        torch.set_num_threads(threads())
        if (step + 1) % 200 == 0:
            hit = (c.argmax(1) == want[take, 0]).float().mean()
            print(f"step {step + 1} loss {loss.item():.3f} batch top-1 {hit:.2f} "
                  f"{time.time() - start:.0f} s", flush=True)
    torch.save(judge.state_dict(), os.path.join(WORK, "judge.pt"))


def guesses(judge, x):
    with torch.no_grad():
        out = [judge(x[i:i + 64]) for i in range(0, len(x), 64)]
    return torch.cat([o[0] for o in out]), torch.cat([o[1] for o in out])


def rates(logits, want):
    first = logits.argsort(1, descending=True)[:, :5]
    hit = first == want[:, None]
    return {"top1": round(hit[:, 0].float().mean().item(), 3),
            "top5": round(hit.any(1).float().mean().item(), 3), "n": len(want)}


def judge_model(args):
    rng = np.random.default_rng(SEED + 800)
    drawings, judge = Drawings(), Judge(len(concepts()))
    judge.load_state_dict(torch.load(os.path.join(WORK, "judge.pt"), weights_only=True))
    judge.eval()
    report = {"classes": len(concepts()), "chance top1": round(1 / len(concepts()), 4),
              "chance top5": round(5 / len(concepts()), 4), "chance style": round(1 / 7, 3)}
    x, want = examples(1500, True, rng, drawings)
    c, s = guesses(judge, x)
    report["judge on drawings it never saw"] = {"concept": rates(c, want[:, 0]),
                                                "style": rates(s, want[:, 1])}
    pool, names = training_concepts(), list(COLOURS)
    plan, pairs = [], []
    while len(plan) < args.singles:
        p, style = pool[rng.integers(len(pool))], TRAIN_STYLES[rng.integers(len(TRAIN_STYLES))]
        if (p.index, style) in drawings.index:
            plan.append((p, style, names[rng.integers(len(names))]))
    while len(pairs) < args.pairs:
        a, b = pool[rng.integers(len(pool))], pool[rng.integers(len(pool))]
        style = TRAIN_STYLES[rng.integers(len(TRAIN_STYLES))]
        if a is not b and all((p.index, style) in drawings.index for p in (a, b)):
            pairs.append((a, b, style, names[rng.integers(len(names))]))
    one = [f"{p.phrase}, {STYLES[s][0]} style, {ground(k)}" for p, s, k in plan]
    two = [f"{a.phrase} and {b.phrase}, {STYLES[s][0]} style, {ground(k)}" for a, b, s, k in pairs]
    seen = set()
    for name in glob.glob(os.path.join(WORK, "captions*.json")):  # of every cache trained on
        seen.update(json.load(open(name, encoding="utf-8")))
    report["prompts seen word for word"] = sum(t in seen for t in one + two)
    pipe = load(args.model)
    px1 = generate(pipe, one, [1000 + i for i in range(len(one))], args.ddim, args.cfg)
    px2 = generate(pipe, two, [2000 + i for i in range(len(two))], args.ddim, args.cfg)
    want1 = torch.tensor([p.index for p, _, _ in plan])
    style1 = torch.tensor([STYLE_NAMES.index(s) for _, s, _ in plan])
    want2 = torch.tensor([p.index for a, b, _, _ in pairs for p in (a, b)])
    real1 = np.stack([compose(drawings, [p], s, k, rng) for p, s, k in plan])
    real2 = np.stack([compose(drawings, [a, b], s, k, rng) for a, b, s, k in pairs])
    for tag, one_px, two_px in (("generated", px1, px2), ("real", real1, real2)):
        c, s = guesses(judge, to_tensor(one_px))
        report[f"{tag}, one object"] = {"concept": rates(c, want1), "style": rates(s, style1)}
        c, s = guesses(judge, halves(two_px))
        report[f"{tag}, two objects (each judged)"] = {"concept": rates(c, want2)}
    text = json.dumps(report, indent=1)
    print(text)
    with open(os.path.join(WORK, "score.json"), "w", encoding="utf-8") as f:
        f.write(text + "\n")


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("what", choices=("train", "judge"))
    ap.add_argument("--steps", type=int, default=1200)
    ap.add_argument("--batch", type=int, default=64)
    ap.add_argument("--lr", type=float, default=2e-3)
    ap.add_argument("--singles", type=int, default=80)
    ap.add_argument("--pairs", type=int, default=24)
    ap.add_argument("--ddim", type=int, default=20)
    ap.add_argument("--cfg", type=float, default=5.0)
    ap.add_argument("--model", default=os.path.join(MODELS, "eval", "model"))
    args = ap.parse_args()
    torch.set_num_threads(threads())
    train_judge(args) if args.what == "train" else judge_model(args)


if __name__ == "__main__":
    main()
