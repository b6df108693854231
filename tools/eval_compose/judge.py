"""Stage 5: trains judge 1 or 2: a residual network over 64 x 64 pictures that says what each window shows.

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

from world import CLASSES, NOTHING, SEED, STYLE_NAMES, WORK, concepts
from judge_data import layouts, random_scenes, training
from optim import Clock, Optimizer, laid_out, mixed, saved, tuned
from score import roughen
from train import rate

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
    """x [N,3,64,64] in -1..1 -> features [N,96,8,8]; logits() has what they say of the windows."""

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


def loss_of(judge, x, facts, style):
    """Objects weigh more than the many windows of nothing."""
    small, weight, large, concept = facts
    with torch.autocast(x.device.type, torch.bfloat16, enabled=mixed(x.device.type)):
        f = judge(x)
    f = f.float()
    s, l, k = logits(judge, f)
    cells, whole = windows(f)
    each = -(small * s.log_softmax(-1)).sum(-1)
    seldom = 1 + 4 * (1 - large[:, NOTHING])
    loss = (each * weight).sum() / weight.sum()
    loss = loss + (seldom * -(large * l.log_softmax(-1)).sum(-1)).sum() / seldom.sum()
    named = F.cross_entropy(k, style.clamp_min(0), reduction="none") * (style >= 0)
    loss = loss + 0.5 * named.sum() / (style >= 0).sum().clamp_min(1)
    known = concept >= 0
    seen = judge.aux(torch.cat([cells, whole[:, None]], 1)[known])
    return loss + 0.4 * F.cross_entropy(seen, concept[known])


def smooth(n, channels, cells, edge, device):
    return F.interpolate(torch.randn(n, channels, cells, cells, device=device), size=edge, mode="bicubic",
                         align_corners=True)


def distorted(x):
    """Shapes bent and colours blotched inside objects, as few steps of a denoiser leave them."""
    n, edge, d = len(x), x.shape[-1], x.device
    much = torch.rand(n, 1, 1, 1, device=d) * (torch.rand(n, 1, 1, 1, device=d) < 0.75)
    field = much * (1.4 * smooth(n, 2, 6, edge, d) + 0.8 * smooth(n, 2, 14, edge, d)) * 2 / edge
    straight = F.affine_grid(torch.eye(2, 3, device=d).expand(n, 2, 3), x.shape, align_corners=False)
    x = F.grid_sample(x, straight + field.permute(0, 2, 3, 1), padding_mode="border", align_corners=False)
    inside = (x - F.avg_pool2d(x, 9, 1, 4, count_include_pad=False)).abs().amax(1, keepdim=True)
    inside = F.max_pool2d(inside, 5, 1, 2).clamp(0, 1)
    return x + 0.45 * much * inside * smooth(n, 3, 16, edge, d)


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("number", type=int, choices=(1, 2))
    ap.add_argument("--seconds", type=float, default=70)
    ap.add_argument("--device", default="cpu")
    ap.add_argument("--batch", type=int, default=512)
    ap.add_argument("--rate", type=float, default=2e-3)
    ap.add_argument("--weights", help="judge_N.pt to go on from")
    ap.add_argument("--out", default=WORK)
    args = ap.parse_args()
    clock = Clock(time.time() + args.seconds)
    tuned(args.device)
    torch.manual_seed(SEED + 2000 * args.number)
    choice = layouts(20000, np.random.default_rng(SEED + 2000 * args.number + 1))
    pick, judge = training(args.number, args.device), laid_out(Judge(), args.device)
    if args.weights:
        judge.load_state_dict(torch.load(args.weights, map_location=args.device))
    named = list(judge.named_parameters())
    opt = Optimizer(named, args.rate, args.rate, 0.995, 0.05, ("stem", "head", "aux"))

    def log(text):
        print(f"[{time.time() - clock.start:5.0f} judge {args.number}] {text}", flush=True)

    log(f"{sum(p.numel() for n, p in named if 'aux' not in n)} parameters, "
        f"{sum(map(len, pick.own[:-1]))} drawings of the concepts, {len(pick.own[-1])} others")
    path, told = os.path.join(args.out, f"judge_{args.number}.pt"), 0.0
    while opt.count < 5 or clock.passed() < 1:
        x, facts, style = random_scenes(pick, args.batch, choice)
        loss = loss_of(judge, roughen(distorted(x)), facts, style)
        loss.backward()
        opt.step(rate(clock.passed()))
        if opt.count % 50 == 0 and time.time() - told > 8:
            told = time.time()
            log(f"step {opt.count} of {args.batch}, loss {loss.item():.3f}")
            saved(opt.averaged(named), path)
    log(f"{opt.count} steps, loss {loss.item():.3f}")
    saved(opt.averaged(named), path)


if __name__ == "__main__":
    main()
