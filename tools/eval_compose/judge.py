"""Stage 3: trains judge 1 or 2: a residual network over 64 x 64 pictures that says what each window shows.

Group norms and SiLU instead of batch norms, and one output layer on an 8 x 8 map of features, so that the
engine's graph can run it (eval/judge.c): a window's logits are the mean of its cells' logits.
"""
import argparse
import os
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from judge_data import NOTHING, STYLE_NAMES, scene, training
from world import SEED, WORK, concepts, threads
from score import roughen
from train import rate
from vae import to_tensor

CLASSES = NOTHING + 1  # of a window: the concepts, another object, nothing
WIDTHS = (32, 64, 96)
GROUPS = 8


class Block(nn.Module):
    def __init__(self, w):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(GROUPS, w), nn.Conv2d(w, w, 3, 1, 1)
        self.norm2, self.conv2 = nn.GroupNorm(GROUPS, w), nn.Conv2d(w, w, 3, 1, 1)

    def forward(self, x):
        return x + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


class Judge(nn.Module):
    """x [N,3,64,64] in -1..1 -> features [N,96,8,8], logits of cells [N, small | large | styles, 8,8]."""

    def __init__(self):
        super().__init__()
        a, b, c = WIDTHS
        self.stem = nn.Conv2d(3, a, 3, 2, 1)
        self.block0 = Block(a)
        self.down1, self.block1 = nn.Conv2d(a, b, 3, 2, 1), Block(b)
        self.down2, self.block2, self.block3 = nn.Conv2d(b, c, 3, 2, 1), Block(c), Block(c)
        self.norm = nn.GroupNorm(GROUPS, c)
        self.head = nn.Linear(c, 2 * CLASSES + len(STYLE_NAMES))
        self.aux = nn.Linear(c, len(concepts()))  # all concepts: for training only

    def forward(self, x):
        x = self.block0(self.stem(x))
        x = self.block1(self.down1(x))
        x = self.block3(self.block2(self.down2(x)))
        return F.silu(self.norm(x))


def windows(features):
    """Means of the 25 small windows and of the whole: [N,25,C], [N,C]."""
    small = F.avg_pool2d(features, 4, 1)
    return small.flatten(2).transpose(1, 2), features.mean(dim=(2, 3))


def logits(judge, features):
    """(small [N,25,classes], large [N,classes], style [N,styles])."""
    small, large = windows(features)
    head = judge.head(large)
    return judge.head(small)[..., :CLASSES], head[:, CLASSES:2 * CLASSES], head[:, 2 * CLASSES:]


def batch_of(pick, count, rng):
    rows = [scene(pick, rng) for _ in range(count)]
    stack = [torch.from_numpy(np.stack([getattr(r[1], k) for r in rows]))
             for k in ("small", "weight", "large", "concept")]
    return to_tensor(np.stack([r[0] for r in rows])), stack, torch.tensor([r[2] for r in rows])


def loss_of(judge, x, stack, style):
    small, weight, large, concept = stack
    f = judge(x)
    s, l, k = logits(judge, f)
    cells, whole = windows(f)
    each = -(small * s.log_softmax(-1)).sum(-1)
    loss = (each * weight).sum() / weight.sum() + 0.5 * -(large * l.log_softmax(-1)).sum(-1).mean()
    if (style >= 0).any():
        loss = loss + 0.6 * F.cross_entropy(k[style >= 0], style[style >= 0])
    known = concept >= 0
    return loss + 0.5 * F.cross_entropy(judge.aux(torch.cat([cells, whole[:, None]], 1)[known]), concept[known])


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("number", type=int, choices=(1, 2))
    ap.add_argument("--steps", type=int, default=1800)
    ap.add_argument("--batch", type=int, default=32)
    ap.add_argument("--lr", type=float, default=2e-3)
    ap.add_argument("--go-on", action="store_true", help="from the last checkpoint's weights, with a schedule of its own")
    args = ap.parse_args()
    torch.set_num_threads(threads())
    torch.manual_seed(SEED + 2000 * args.number)
    rng = np.random.default_rng(SEED + 2000 * args.number + 1 + 500 * args.go_on)
    pick, judge = training(args.number), Judge()
    file = os.path.join(WORK, f"judge_{args.number}.pt")
    if args.go_on:
        judge.load_state_dict(torch.load(file, weights_only=True))
    print(f"judge {args.number}: {sum(p.numel() for n, p in judge.named_parameters() if 'aux' not in n)} "
          f"parameters, {sum(map(len, pick.own))} drawings of the concepts, {len(pick.other)} others", flush=True)
    judge.to(memory_format=torch.channels_last)
    opt = torch.optim.AdamW(judge.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.05)
    start, total = time.time(), 0.0
    for step in range(args.steps):
        for g in opt.param_groups:
            g["lr"] = args.lr * rate(step, args.steps, 100, 0.7)
        x, stack, style = batch_of(pick, args.batch, rng)
        loss = loss_of(judge, roughen(x).to(memory_format=torch.channels_last), stack, style)
        opt.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(judge.parameters(), 5.0)
        opt.step()
        total += loss.item()
        if (step + 1) % 100 == 0:
            print(f"  step {step + 1} loss {total / 100:.3f} {time.time() - start:.0f} s", flush=True)
            total = 0.0
            torch.save(judge.state_dict(), file)


if __name__ == "__main__":
    main()
