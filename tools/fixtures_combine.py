#!/usr/bin/env python3
"""Writes tests/data/combine: adapters that LoRA-LEGO and LoraHub make one of, by tools/reference.

    python3 tools/fixtures_combine.py [--out DIR]        (after make_fixtures.py, fixtures_tools.py)

Needs torch, diffusers, transformers, safetensors. Changes are those of tools/reference/lego.py and
lorahub.py in double; traces and losses are diffusers' with the change added to the weights.
"""

import argparse
import sys
from pathlib import Path

import diffusers
import numpy as np
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent))

from fixtures.common import NEGATIVE, PROMPT, rand, save  # noqa: E402
from fixtures.pipelines import scheduler, trace  # noqa: E402
from reference import lego, lorahub  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests/data"
T = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_"
Q, FF = T + "attn1_to_q", T + "ff_net_0_proj"
# files, weights, settings of lego.merge; planted: see plant()
LEGO = {
    "default": ("abc", (1, 1, 1), {}),
    "weights": ("abc", (0.8, -0.4, 1.5), {"rank": 4}),
    "inf": ("abc", (1, 0.5, 1), {"rank": 3, "norm": "inf"}),
    "off": ("abc", (1, 1, 0.3), {"rank": 2, "norm": "off", "output": False}),
    "raw": ("ab", (1, 0.7), {"rank": 3, "gauge": False}),
    "one": ("a", (1,), {"rank": 2}),
    "all": ("abc", (0.7, -0.5, 1.25), {"rank": 99, "output": False}),
    "planted": ("xyz", (1, 1, 1), {"rank": 3}),
}
HUB = {
    "two": ("ab", (0.7, -0.4)),
    "ranks": ("abc", (0.8, 0.5, -1.1)),  # 3, 3 and 2
    "alone": ("c", (-0.5,)),
    "none": ("ab", (0, 0)),
}
TRACES = {"lego": ("lego", lego.merge, {"rank": 3}, "rank=3"),
          "lego_plain": ("lego", lego.merge, {"norm": "inf", "output": False, "gauge": False},
                         "norm=inf output=off gauge=off"),
          "lorahub": ("lorahub", lorahub.merge, {}, "")}
SD1 = {"golden_lora_kohya": 0.8, "golden_lora_locon": -0.6, "golden_lora_locon_cp": 0.7}


def plant():
    """Three adapters of the same three units at two modules, nearly: each in an order, lengths and
    signs of its own, with a unit of zeros more in y."""
    files = {f: {} for f in "xyz"}
    for stem, n_out, n_in in ((Q, 8, 8), (FF, 64, 8)):
        a, b = rand(81, 3, n_in), rand(82, n_out, 3)
        for i, f in enumerate("xyz"):
            order = np.roll(np.arange(3), i).tolist()
            stretch = torch.tensor([[1, 1, 1], [-4, 0.5, 3], [0.25, -2, -1]][i])[:, None]
            down = (a[order] + 0.02 * rand(90 + i, 3, n_in)) * stretch
            up = (b[:, order] + 0.02 * rand(95 + i, n_out, 3)) / stretch.T
            if f == "y":
                down = torch.cat([down, rand(99, 1, n_in)])
                up = torch.cat([up, torch.zeros(n_out, 1)], 1)
            files[f] |= {stem + ".lora_down.weight": down, stem + ".lora_up.weight": up,
                         stem + ".alpha": torch.tensor(float(down.shape[0]))}
    return files


def modules(t):
    """{stem: (down [r,fan], up [out,r], scale)} of kohya's names, a Tucker middle multiplied in."""
    out = {}
    for key in t:
        if not key.endswith(".lora_down.weight"):
            continue
        stem = key.removesuffix(".lora_down.weight")
        down, up = t[key].double(), t[stem + ".lora_up.weight"].double().flatten(1)
        if stem + ".lora_mid.weight" in t:
            mid = t[stem + ".lora_mid.weight"].double()
            down = torch.einsum("rjhw,ji->rihw", mid, down.flatten(1))
        scale = float(t.get(stem + ".alpha", down.shape[0])) / up.shape[1]
        out[stem] = (down.flatten(1).numpy(), up.numpy(), scale)
    return out


def combined(files, weights, merge, settings):
    """{stem: change} of what `merge` makes of the files."""
    out = {}
    for stem in dict.fromkeys(s for f in files for s in f):
        adapters = [(*f[stem], w) for f, w in zip(files, weights) if stem in f]
        down, up = merge(adapters, **settings)
        out[stem] = torch.from_numpy(up @ down)
    return out


def loss(pipe, picture, prompt, seed, pairs):
    """Mean squared error of the UNet on one picture: every other of 2 x pairs timesteps of DDIM."""
    x = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 127.5 - 1
    vae = pipe.vae
    x0 = vae.encode(x).latent_dist.mean * vae.config.scaling_factor
    text = pipe.encode_prompt(prompt, "cpu", 1, False)[0]
    sched = scheduler(DATA / "models/sd1", "ddim")
    sched.set_timesteps(2 * pairs)
    gen, total = torch.Generator("cpu").manual_seed(seed), 0.0
    for t in sched.timesteps[::2]:
        noise = torch.randn(x0.shape, generator=gen)
        a = sched.alphas_cumprod[t]
        eps = pipe.unet(a.sqrt() * x0 + (1 - a).sqrt() * noise, t, text).sample
        total += float((eps - noise).square().mean())
    return total / pairs


def losses(pipe, files, size=(32, 24), seed=7, pairs=3):
    """Losses of `two` and `none` with the text encoder's part, and a search on a closed form."""
    picture = np.random.RandomState(5).randint(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    layers = {"lora_unet_" + n.replace(".", "_"): m for n, m in pipe.unet.named_modules()}
    for n, m in pipe.text_encoder.named_modules():
        layers["lora_te_" + ("" if n.startswith("text_model") else "text_model_") +
               n.replace(".", "_")] = m
    golden = {"picture": torch.from_numpy(picture).float()[None] / 255}
    for case in ("two", "none"):
        which, weights = HUB[case]
        before = {}
        for stem, change in combined([files[f] for f in which], weights, lorahub.merge, {}).items():
            p = layers[stem].weight
            before[stem] = p.data
            p.data = (p.data.double() + change.reshape(p.shape)).float()
        golden["loss_" + case] = torch.tensor([loss(pipe, picture, PROMPT, seed, pairs)]).double()
        for stem, value in before.items():
            layers[stem].weight.data = value
    goal = np.array([0.8, -0.3, 1.9])  # the last outside of the box
    points, values, best = lorahub.search(lambda w: float(((w - goal) ** 2).sum()), 3, 60, 42)
    golden |= {"points": torch.from_numpy(points), "values": torch.from_numpy(values),
               "best": torch.from_numpy(best)}
    return golden


def traces(pipe, out, steps=6, cfg=6.0, seed=43, size=(32, 24)):
    files = [modules(load_file(DATA / f"{f}.safetensors")) for f in SD1]
    layers = {"lora_unet_" + n.replace(".", "_"): m for n, m in pipe.unet.named_modules()}
    for name, (method, merge, settings, options) in TRACES.items():
        before = {}
        for stem, change in combined(files, SD1.values(), merge, settings).items():
            if stem in layers:
                p = layers[stem].weight
                before[stem] = p.data
                p.data = (p.data.double() + change.reshape(p.shape)).float()
        got = trace(pipe, scheduler(DATA / "models/sd1", "ddim"), steps, cfg, seed, size)
        save(out / f"golden_trace_{name}.safetensors", got, model="sd1", sampler="ddim", steps=steps,
             cfg=cfg, seed=seed, width=size[0], height=size[1], prompt=PROMPT, negative=NEGATIVE,
             compose=method, options=options, adapters=" ".join(f"{f}:{w}:0" for f, w in SD1.items()),
             made_by="tools/fixtures_combine.py")
        for stem, value in before.items():
            layers[stem].weight.data = value


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default=DATA / "combine")
    out = Path(parser.parse_args().out)
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    files = {f: load_file(DATA / f"tools/{f}.safetensors") for f in "abc"} | plant()
    for f in "xyz":
        save(out / f"{f}.safetensors", files[f], made_by="tools/fixtures_combine.py")
    golden = {}
    for case, (which, weights, settings) in LEGO.items():
        made = combined([modules(files[f]) for f in which], weights, lego.merge, settings)
        golden |= {f"{case}.{stem}": v for stem, v in made.items()}
    save(out / "golden_lego.safetensors", golden, made_by="tools/fixtures_combine.py",
         settings={k: [list(w), list(x), m] for k, (w, x, m) in LEGO.items()})
    golden = {}
    for case, (which, weights) in HUB.items():
        made = combined([modules(files[f]) for f in which], weights, lorahub.merge, {})
        golden |= {f"{case}.{stem}": v for stem, v in made.items()}
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(
        DATA / "models/sd1", safety_checker=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    golden |= losses(pipe, {f: modules(files[f]) for f in "abc"})
    save(out / "golden_lorahub.safetensors", golden, made_by="tools/fixtures_combine.py",
         prompt=PROMPT, settings={k: [list(w), list(x)] for k, (w, x) in HUB.items()})
    traces(pipe, out)


if __name__ == "__main__":
    main()
