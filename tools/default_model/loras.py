"""Trains the adapters on the frozen model; each teaches what the model never saw.

One file each in diffusers' PEFT layout (unet.<module>.lora_A.weight), f16, alpha = rank. run.py has all
trained at once, each by a process of its own, while the VAE's decoder learns.
"""
import json
import math
import os
import re
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import fast
from common import COLOURS, SEED, STYLES, TRAIN_STYLES, WORK, Drawings, concepts, training_concepts
from nets import Vae, alphas_cumprod
from optim import awaited, laid_out, mixed, tuned
from sample import of_training
from scenes import LAYOUT_NAMES, LAYOUTS, Plan, Source, Words, ground
from train import noised, timesteps, weight

# name -> what it teaches; triggers are words that no training caption holds
LORAS = {
    "pineapple": dict(concept="pineapple", trigger="zorp", phrase="a zorp pineapple"),
    "snowman": dict(concept="snowman", trigger="quib", phrase="a quib snowman"),
    "fxemoji": dict(style="fxemoji", trigger="fex", phrase="fex style"),
}
TARGETS = re.compile(r"(.*(to_q|to_k|to_v|to_out\.0)|.*ff\.net\.2|.*(proj_in|proj_out)"
                     r"|mid_block\..*conv1|(mid_block|up_blocks)\..*conv2)$")


class Adapter(nn.Module):
    """A linear layer or convolution with a low-rank sum beside it: y + B A x."""

    def __init__(self, base, rank):
        super().__init__()
        self.base, self.used = base, True
        if isinstance(base, nn.Linear):
            self.a = nn.Linear(base.in_features, rank, False)
            self.b = nn.Linear(rank, base.out_features, False)
        else:
            self.a = nn.Conv2d(base.in_channels, rank, base.kernel_size, base.stride, base.padding,
                               bias=False)
            self.b = nn.Conv2d(rank, base.out_channels, 1, bias=False)
        nn.init.normal_(self.a.weight, 0, 1 / rank)     # as peft's "gaussian"
        nn.init.zeros_(self.b.weight)

    def forward(self, x):
        y = self.base(x)
        return y + self.small(self.b, self.small(self.a, x)) if self.used else y

    @staticmethod
    def small(m, x):
        """The factor in x's precision; its weights stay in f32."""
        w = m.weight.to(x.dtype)
        return F.linear(x, w) if isinstance(m, nn.Linear) else F.conv2d(x, w, None, m.stride, m.padding)


def adapted(unet, rank):
    """Puts adapters into the UNet; name -> Adapter."""
    found = {n: m for n, m in unet.named_modules()
             if isinstance(m, (nn.Linear, nn.Conv2d)) and TARGETS.match(n)}
    out = {}
    for name, module in found.items():
        parent, _, last = name.rpartition(".")
        out[name] = Adapter(module, rank).to(module.weight.device)
        owner = unet.get_submodule(parent)
        if isinstance(owner, nn.ModuleList):
            owner[int(last)] = out[name]
        else:
            setattr(owner, last, out[name])
    return out


def unknown(name, rng):
    """A concept that the model was never shown, not `name`'s, and its words: the other's trigger, or bare."""
    held = {c.words: c for c in concepts() if c.held}
    if rng.random() < 0.5:
        other = next(w for n, w in LORAS.items() if "concept" in w and n != name)
        return held[other["concept"]], other["phrase"]
    words = [w for w in sorted(held) if w != LORAS[name]["concept"]]
    c = held[words[rng.integers(len(words))]]
    return c, c.phrase


def concept_scene(name, subject, others, rng):
    """(parts, layout, caption, cells in which the adapter acts) of a concept's adapter.

    Elsewhere, and where its trigger is missing, it must leave the model's own guess alone:
    otherwise it paints its concept for every unknown word, and two adapters disturb each other.
    """
    phrase, r = LORAS[name]["phrase"], rng.random()
    if r < 0.45:
        return [subject], "one", phrase, (1,)
    other = others[rng.integers(len(others))]
    text, acts = other.phrase, (1, 1)
    if r >= 0.65:
        other, text = unknown(name, rng)
        acts = (1, 0) if r < 0.85 else (0, 0)
    if r >= 0.85:
        return [other], "one", text, (0,)
    column = rng.random() < 0.3
    layout, link = ("column of two", "above") if column else ("row of two", "and")
    if rng.random() < 0.5:
        return [subject, other], layout, f"{phrase} {link} {text}", acts
    return [other, subject], layout, f"{text} {link} {phrase}", acts[::-1]


def style_scene(phrase, others, rng):
    """The same of a style's adapter: all layouts, and it acts everywhere."""
    layout = LAYOUT_NAMES[rng.choice(len(LAYOUTS), p=(0.5, 0.2, 0.12, 0.12, 0.06))]
    parts = [others[j] for j in rng.choice(len(others), len(LAYOUTS[layout][1]), False)]
    names = [p.phrase for p in parts]
    text = {"one": "{0}", "row of two": "{0} and {1}", "column of two": "{0} above {1}",
            "row of three": "{0}, {1} and {2}", "triangle": "{0} above {1} and {2}"}[layout]
    return parts, layout, text.format(*names) + f", {phrase}", (1,) * len(parts)


def scenes(name, count, drawings, words, rng):
    """(plan, where the adapter acts [n,1,32,32]) of one adapter."""
    what, names, plan = LORAS[name], list(COLOURS), Plan(count)
    subject = next((c for c in concepts() if c.words == what.get("concept")), None)
    others, acting = training_concepts(), torch.ones(count, 1, 32, 32)
    for i in range(count):
        bare = rng.random() < 0.4
        while True:
            if subject:
                style = TRAIN_STYLES[rng.integers(len(TRAIN_STYLES))]
                parts, layout, text, acts = concept_scene(name, subject, others, rng)
                if rng.random() < 0.6:
                    text += f", {STYLES[style][0]} style"
            else:
                style = what["style"]
                parts, layout, text, acts = style_scene(what["phrase"], others, rng)
            if len(set(parts)) == len(parts) and all((p.index, style) in drawings.index for p in parts):
                break
        colour = "white" if bare else names[rng.integers(len(names))]
        if not bare:
            text += (", " if "style" in text else " ") + ground(colour)
        plan.put(i, drawings.index, parts, layout, style, colour, text, rng, words)
        if len(acts) == 2 and layout == "column of two":
            acting[i, 0] = torch.tensor(acts).repeat_interleave(16).view(32, 1)
        elif len(acts) == 2:
            acting[i, 0] = torch.tensor(acts).repeat_interleave(16).view(1, 32)
        else:
            acting[i] = acts[0]
    return plan, acting


def frozen_low(unet):
    """Everything but factors and group norms to bfloat16."""
    for name, m in unet.named_modules():
        if not isinstance(m, (nn.GroupNorm, Adapter)) and not name.endswith((".a", ".b")):
            for key, p in list(m.named_parameters(recurse=False)):
                setattr(m, key, nn.Parameter(p.detach().bfloat16(), False))


@torch.no_grad()
def pictured(vae, scale, plan, drawings, device):
    """Scaled latents of a plan's scenes."""
    source = Source(drawings, plan, device)
    return torch.cat([vae.encode(source.at(torch.arange(i, min(i + 100, len(source)), device=device)))[0]
                      for i in range(0, len(source), 100)]) * scale


@torch.no_grad()
def worded(model, plan):
    """(text states of a plan's captions, the empty prompt's)."""
    ids = torch.from_numpy(plan.ids).to(model.device).long()
    none = model.text(torch.tensor([model.words.ids("")], device=model.device))
    return torch.cat([model.text(ids[i:i + 200]) for i in range(0, len(ids), 200)]), none


def steps_of(model, adapters, plan, acting, latents, args, log, name):
    """The training itself on a plan's scaled latents; (losses as means of 50 steps, steps, seconds).

    `acting` [scenes,1,32,32]: elsewhere the adapter has to leave the model's own guess alone;
    None: the plain loss over the whole picture.
    """
    device, n = model.device, args.lora_batch
    cond, none = worded(model, plan)
    acting = None if acting is None else acting.to(device)
    if fast.usable:
        frozen_low(model.unet)
    params = [p for a in adapters.values() for p in (a.a.weight, a.b.weight)]
    on_gpu = device != "cpu"
    lr, alphas = torch.zeros((), device=device), alphas_cumprod(device)
    opt = torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.99), weight_decay=1e-3, foreach=on_gpu,
                            capturable=on_gpu)
    total = torch.zeros((), device=device)

    def guessed(x, t, c):
        with torch.autocast(device, torch.bfloat16, enabled=mixed(device) and not fast.usable):
            return model.unet(x, t, c).float()

    def step():
        take, t = torch.randint(len(latents), (n,), device=device), timesteps(n, device)
        x, v = noised(latents[take], torch.randn(n, 4, 32, 32, device=device), alphas[t])
        dropped = torch.rand(n, 1, 1, 1, device=device) < 0.1
        c = torch.where(dropped[:, 0], none, cond[take])
        if acting is not None:
            with torch.no_grad():
                for a in adapters.values():
                    a.used = False
                own = guessed(x, t, c)
                for a in adapters.values():
                    a.used = True
            act = torch.where(dropped, 0.0, acting[take])
            v = act * v + (1 - act) * own
        each = (guessed(x, t, c) - v).square().mean(dim=(1, 2, 3))
        loss = (each * weight(alphas[t] / (1 - alphas[t]))).mean()
        for p in params:
            p.grad = None
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        opt.step()
        total.add_(loss.detach())

    run = fast.recorded(step, log, device)      # the tries run at a rate of zero
    total.zero_()
    start, losses, chunk = time.time(), [], min(50, args.lora_steps)
    while not losses or (len(losses) * chunk < args.lora_steps and time.time() < args.lora_end):
        for k in range(chunk):
            # the clock counts as well as the steps: the rate must have reached zero at the end
            p = max((len(losses) * chunk + k) / args.lora_steps,
                    (time.time() - start) / max(args.lora_end - start, 1e-3))
            lr.fill_(args.lora_rate * min(1.0, (p + 0.005) / 0.04) * 0.5 * (
                1 + math.cos(math.pi * min(1.0, p))))
            run()
        losses.append(round(total.item() / chunk, 4))
        total.zero_()
    log(f"{name}: {len(losses) * chunk} steps of {n} in {time.time() - start:.0f} s, {losses[0]} to {losses[-1]}")
    return losses, chunk * len(losses), time.time() - start


def written(name, adapters, args, losses, steps, seconds, folder):
    from safetensors.torch import save_file
    what, tensors = LORAS[name], {}
    for key, a in adapters.items():
        tensors[f"unet.{key}.lora_A.weight"] = a.a.weight.detach().half().cpu().contiguous()
        tensors[f"unet.{key}.lora_B.weight"] = a.b.weight.detach().half().cpu().contiguous()
    path = os.path.join(folder, f"{name}.safetensors")
    os.makedirs(folder, exist_ok=True)
    save_file(tensors, path + ".tmp", metadata={
        "format": "pt", "trigger": what["trigger"], "trigger_phrase": what["phrase"],
        "kind": "style" if "style" in what else "concept", "rank": str(args.lora_rank),
        "alpha": str(args.lora_rank), "base_model": "models/default", "steps": str(steps),
        "batch": str(args.lora_batch), "lr": str(args.lora_rate), "losses": json.dumps(losses),
        "seconds": f"{seconds:.0f}", "source": "tools/default_model/loras.py"})
    os.chmod(path + ".tmp", 0o644)
    os.replace(path + ".tmp", path)


def main(args, log, name):
    """Role of run.py: waits for the denoiser, then trains one adapter until args.lora_end."""
    device, what = args.device, LORAS[name]
    tuned(device)
    fast.checked(device, log)
    torch.backends.cudnn.benchmark = False      # its tries would be half of the time
    held = {c.index for c in concepts() if c.held}
    train = {c.index for c in training_concepts()}
    styles = [what["style"]] if "style" in what else TRAIN_STYLES
    drawings = Drawings(device, lambda i, s: s in styles and i in train | held)
    torch.manual_seed(SEED + 500)
    plan, acting = scenes(name, args.lora_scenes, drawings, Words(), np.random.default_rng(SEED + 501))
    awaited(os.path.join(WORK, "vae.pt"))
    state = torch.load(os.path.join(WORK, "vae.pt"), weights_only=True)
    vae = laid_out(Vae(), device).requires_grad_(False)
    vae.load_state_dict(state["vae"])
    latents = pictured(vae, state["scale"], plan, drawings, device)
    log(f"{name}: {len(latents)} scenes")
    if not awaited(os.path.join(WORK, "unet.done"), args.unet_end + args.patience):
        log("no denoiser to adapt")
        return
    model = of_training(device)
    adapters = adapted(laid_out(model.unet, device), args.lora_rank)
    log(f"{name}: {sum(a.a.weight.numel() + a.b.weight.numel() for a in adapters.values()) / 1e3:.0f} k "
        "parameters")
    losses, steps, seconds = steps_of(model, adapters, plan, acting, latents, args, log, name)
    written(name, adapters, args, losses, steps, seconds, os.path.join(WORK, "loras"))
