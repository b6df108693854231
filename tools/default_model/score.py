"""A classifier of concepts and styles, and the model's score by it.

The judge learns from drawings of all seven styles, two of which (and all held-out concepts) the
model never saw, composed as the scenes are, less one drawing in eight, which is kept for checking
the judge itself; it looks at one cell of a scene at a time. Then it judges generated pictures: how
often its first or first five guesses name what the prompt asked for; and how much a prompt's seeds
differ, beside how much real scenes of that prompt do.

run.py runs this beside the training; here: `score.py train`, `score.py judge` on the exported model.
"""
import argparse
import json
import math
import os
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import fast
from common import (COLOURS, HERE, MODELS, SEED, STYLE_NAMES, STYLES, TRAIN_STYLES, WORK, Drawings, concepts,
                    threads, training_concepts)
from optim import Clock, Optimizer, awaited, laid_out, mixed, saved, tuned
from sample import generate, load, of_training, sheet
from scenes import (LAYOUT_NAMES, LAYOUTS, Plan, Source, cells, choose, ground, joined, paint_plan)

# layout: (how its objects are asked for, pictures)
ASKED = {
    "one": ("{0}", 160),
    "row of two": ("{0} and {1}", 60),
    "column of two": ("{0} above {1}", 40),
    "row of three": ("{0}, {1} and {2}", 50),
    "triangle": ("{0} above {1} and {2}", 30),
}


class Judge(nn.Module):
    """Plain residual CNN, 64 px in, one head for concepts and one for styles."""

    def __init__(self, classes, widths=(48, 96, 192, 384)):
        super().__init__()
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


def kept_for_checks(index, style):
    return (index * 7 + STYLE_NAMES.index(style) * 3) % 8 == 0


def judge_plan(count, drawings, checks, seed):
    """Scenes of all concepts and styles, of drawings kept for checks or of the others."""
    drawn = {k: v for k, v in drawings.index.items() if kept_for_checks(*k) == checks}
    rng, plan, names, pool = np.random.default_rng(seed), Plan(count), list(COLOURS), concepts()
    for i in range(count):
        parts, layout, style = choose(drawn, pool, rng, STYLE_NAMES)
        plan.put(i, drawn, parts, layout, style, names[rng.integers(len(names))], "", rng, None, 1.2)
    return plan


def examples(source, layout, concept, style, take):
    """(crops, concept, style) of one random cell of each scene taken."""
    there = (concept[take] >= 0).float()
    which = torch.multinomial(there, 1)[:, 0]
    x = cells(source.at(take), layout[take], which)
    return x, concept[take, which], style[take]


def roughen(x):
    """Blur, contrast, shift and noise, so that the judge is not thrown by a decoder's softness."""
    n, d = len(x), x.device
    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    k = torch.rand(n, 1, 1, 1, device=d)
    x = x * (1 - k) + soft * k
    x = x * (1 + 0.3 * (torch.rand(n, 3, 1, 1, device=d) - 0.5))
    x = x + 0.2 * (torch.rand(n, 3, 1, 1, device=d) - 0.5)
    return x + 0.06 * torch.randn_like(x)


def on(device, plan):
    return tuple(torch.from_numpy(a).to(device) for a in (plan.layout, plan.concepts, plan.style))


def train_judge(device, batch, scenes, end, log, least=5):
    torch.manual_seed(SEED + 700)
    drawings = Drawings(device, dtype=torch.float16 if device != "cpu" else torch.float32)
    plan = judge_plan(scenes, drawings, False, SEED + 701)
    source, facts = Source(drawings, plan, device), on(device, plan)
    judge = laid_out(Judge(len(concepts())), device)
    opt = Optimizer(judge.named_parameters(), 2e-3, 2e-3, 0.99, 0.02, ("stem", "concept", "style"))
    clock = Clock(end)
    while opt.count < least or clock.passed() < 1:
        x, concept, style = examples(source, *facts, torch.randint(scenes, (batch,), device=device))
        with torch.autocast(device, torch.bfloat16, enabled=mixed(device)):
            c, s = judge(roughen(x))
        loss = (F.cross_entropy(c.float(), concept, label_smoothing=0.1)
                + 0.3 * F.cross_entropy(s.float(), style))
        loss.backward()
        opt.step(min(1.0, (opt.count + 1) / 100) * (0.01 + 0.495 * (1 + math.cos(math.pi * clock.passed()))))
        if opt.count % 200 == 0:
            hit = (c.argmax(1) == concept).float().mean().item()
            log(f"step {opt.count} loss {loss.item():.3f} batch top-1 {hit:.2f} "
                f"{time.time() - clock.start:.0f} s")
    log(f"{opt.count} steps of {batch} in {time.time() - clock.start:.0f} s, {len(plan.rows)} scenes")
    saved({n: v.cpu() for n, v in judge.state_dict().items()}, os.path.join(WORK, "judge.pt"))
    return judge.eval().requires_grad_(False), drawings


@torch.no_grad()
def guesses(judge, x):
    out = [judge(x[i:i + 128].float()) for i in range(0, len(x), 128)]
    return torch.cat([o[0] for o in out]), torch.cat([o[1] for o in out])


def rates(logits, want):
    first = logits.argsort(1, descending=True)[:, :5]
    hit = first == want[:, None]
    return {"top1": round(hit[:, 0].float().mean().item(), 3),
            "top5": round(hit.any(1).float().mean().item(), 3), "n": len(want)}


def prompt_plan(drawings, share=1.0):
    """Random training objects, styles and colours, asked for in one way a layout; real scenes of them."""
    rng, pool, names = np.random.default_rng(SEED + 800), training_concepts(), list(COLOURS)
    plans = []
    for layout, (pattern, count) in ASKED.items():
        count = max(2, int(count * share))
        plan = Plan(count)
        for i in range(count):
            while True:
                style = TRAIN_STYLES[rng.integers(len(TRAIN_STYLES))]
                parts = [pool[j] for j in rng.choice(len(pool), len(LAYOUTS[layout][1]), False)]
                if all((p.index, style) in drawings.index for p in parts):
                    break
            colour = names[rng.integers(len(names))]
            text = (pattern.format(*(p.phrase for p in parts))
                    + f", {STYLES[style][0]} style, {ground(colour)}")
            plan.put(i, drawings.index, parts, layout, style, colour, text, rng, None)
        plans.append(plan)
    return joined(plans)


def judged(judge, pictures, plan, device):
    """Rates of concepts by number of objects and by layout, and of styles for single objects."""
    layout, concept, style = on(device, plan)
    report = {}
    logits, wants, kinds, styles = [], [], [], None
    for k in range(3):
        there = (concept[:, k] >= 0).nonzero()[:, 0]
        which = torch.full((len(there),), k, device=device)
        c, s = guesses(judge, cells(pictures[there], layout[there], which))
        logits.append(c)
        wants.append(concept[there, k])
        kinds.append(layout[there])
        styles = s if k == 0 else styles
    logits, wants, kinds = torch.cat(logits), torch.cat(wants), torch.cat(kinds)
    sizes = torch.tensor([len(v[1]) for v in LAYOUTS.values()], device=device)[kinds]
    for n, tag in ((1, "one object"), (2, "two objects, each"), (3, "three objects, each")):
        report[tag] = rates(logits[sizes == n], wants[sizes == n])
    for i, name in enumerate(LAYOUT_NAMES):
        report["layout " + name] = rates(logits[kinds == i], wants[kinds == i])
    one = layout == 0
    report["style, one object"] = rates(styles[one], style[one])
    return report


def spread(pictures, groups):
    """Mean absolute difference (0..255) between the pictures of each group, one value a group."""
    x = pictures.float().view(groups, -1, *pictures.shape[1:])
    n = x.shape[1]
    pairs = [(i, j) for i in range(n) for j in range(i)]
    return torch.stack([(x[:, i] - x[:, j]).abs().mean(dim=(1, 2, 3)) for i, j in pairs]).mean(0)


def diversity(model, plan, drawings, args):
    """How much 8 seeds of a prompt differ, over how much 8 real scenes of it do."""
    rng, everything = np.random.default_rng(SEED + 900), concepts()
    chosen = [i for name in LAYOUT_NAMES
              for i in np.nonzero(plan.layout == LAYOUT_NAMES.index(name))[0][:args.spread_prompts]]
    scenes, prompts = Plan(8 * len(chosen)), []
    for g, i in enumerate(chosen):
        style, layout = STYLE_NAMES[plan.style[i]], LAYOUT_NAMES[plan.layout[i]]
        parts = [everything[c] for c in plan.concepts[i] if c >= 0]
        for k in range(8):
            scenes.put(8 * g + k, drawings.index, parts, layout, style, "white", "", rng, None)
            scenes.shades[8 * g + k] = plan.shades[i]
        prompts += [plan.texts[i]] * 8
    real = (paint_plan(drawings, scenes, model.device).cpu() + 1) * 127.5
    made = generate(model, prompts, [3000 + i % 8 for i in range(len(prompts))], args.ddim, args.cfg)
    a, b = spread(made, len(chosen)), spread(real, len(chosen))
    report = {"generated": round(a.mean().item(), 2), "real": round(b.mean().item(), 2),
              "ratio": round((a.mean() / b.mean()).item(), 3), "prompts": len(chosen)}
    for i, name in enumerate(LAYOUT_NAMES):
        own = [g for g, c in enumerate(chosen) if plan.layout[c] == i]
        report[name] = round((a[own].mean() / b[own].mean()).item(), 3)
    return report


def score(model, judge, drawings, args, log):
    """(report, generated pictures, prompts)."""
    device, start = model.device, time.time()
    report = {"classes": len(concepts()), "trained concepts": len(training_concepts()),
              "chance top1": round(1 / len(concepts()), 4), "chance style": round(1 / 7, 3)}
    torch.manual_seed(SEED + 801)
    checks = judge_plan(args.check_scenes, drawings, True, SEED + 802)
    facts = on(device, checks)
    source, seen = Source(drawings, checks, device), []
    for i in range(0, args.check_scenes, 100):
        take = torch.arange(i, min(i + 100, args.check_scenes), device=device)
        x, concept, style = examples(source, *facts, take)
        seen.append((*guesses(judge, x), concept, style))
    c, s, concept, style = (torch.cat(v) for v in zip(*seen))
    report["judge on drawings it never saw"] = {"concept": rates(c, concept), "style": rates(s, style)}
    plan = prompt_plan(drawings, args.share)
    captions = os.path.join(WORK, "captions.json")
    if os.path.exists(captions):
        with open(captions, encoding="utf-8") as f:
            known = set(json.load(f))
        report["prompts"] = len(plan.texts)
        report["prompts seen word for word"] = sum(t in known for t in plan.texts)
    report["real"] = judged(judge, paint_plan(drawings, plan, device), plan, device)
    made = generate(model, plan.texts, [1000 + i for i in range(len(plan.texts))], args.ddim, args.cfg)
    report["generated"] = judged(judge, (made.to(device).float() / 127.5 - 1), plan, device)
    report["diversity"] = diversity(model, plan, drawings, args)
    report["sampled"] = f"DDIM {args.ddim} steps, guidance {args.cfg}"
    log(f"judged in {time.time() - start:.0f} s")
    return report, made, plan.texts


def write(report, folder):
    text = json.dumps(report, indent=1)
    with open(os.path.join(folder, "score.json"), "w", encoding="utf-8") as f:
        f.write(text + "\n")
    return text


def main_role(args, log, publish):
    """Role of run.py: trains the judge while compilers run, judges when the decoder is done."""
    device = args.device
    tuned(device)
    fast.checked(device, log)
    ready = os.path.join(HERE, "judge.safetensors")     # of an earlier call
    if os.path.exists(ready):
        from safetensors.torch import load_file
        judge = Judge(len(concepts()))
        judge.load_state_dict({n[6:]: v.float() for n, v in load_file(ready).items()})
        judge = laid_out(judge, device).eval().requires_grad_(False)
        drawings = Drawings(device, dtype=torch.float16 if device != "cpu" else torch.float32)
    else:
        judge, drawings = train_judge(device, args.judge_batch, args.judge_scenes, args.judge_end, log,
                                      args.least)
        publish({"judge." + n: v for n, v in judge.state_dict().items()})
    awaited(os.path.join(WORK, "vae2.pt"), args.decoder_end + args.patience)
    if not awaited(os.path.join(WORK, "unet.done"), args.decoder_end + args.patience):
        log("nothing to judge")
        return
    model = of_training(device)
    report, made, texts = score(model, judge, drawings, args, log)
    log(write(report, args.out))
    firsts = [i for name in LAYOUT_NAMES for i in _first(texts, name, 16, args.share)]
    sheet(made[firsts], [texts[i] for i in firsts], 8).save(os.path.join(args.out, "sheet.png"))


def _first(texts, layout, count, share):
    """Numbers of a layout's first prompts."""
    at = 0
    for name, (_, n) in ASKED.items():
        n = max(2, int(n * share))
        if name == layout:
            return range(at, at + min(count, n))
        at += n
    return range(0)


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("what", choices=("train", "judge"))
    ap.add_argument("--seconds", type=float, default=600)
    ap.add_argument("--batch", type=int, default=64)
    ap.add_argument("--scenes", type=int, default=60000)
    ap.add_argument("--check-scenes", type=int, default=2000)
    ap.add_argument("--share", type=float, default=1.0, help="of the prompts")
    ap.add_argument("--spread-prompts", type=int, default=6, help="prompts a layout for diversity")
    ap.add_argument("--ddim", type=int, default=20)
    ap.add_argument("--cfg", type=float, default=5.0)
    ap.add_argument("--model", default=os.path.join(MODELS, "default"))
    args = ap.parse_args()
    torch.set_num_threads(threads())
    if args.what == "train":
        train_judge("cpu", args.batch, args.scenes, time.time() + args.seconds, print)
        return
    judge = Judge(len(concepts()))
    judge.load_state_dict(torch.load(os.path.join(WORK, "judge.pt"), weights_only=True))
    report, _, _ = score(load(args.model), judge.eval().requires_grad_(False), Drawings(), args, print)
    print(write(report, WORK))


if __name__ == "__main__":
    main()
