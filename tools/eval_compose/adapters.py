"""Stage 1: one plain LoRA for each concept and new style, on the frozen model, with peft.

Plain DreamBooth: pictures of one new concept with captions, half of them beside an object that the default
model knows, the ordinary loss over the whole picture, and class pictures for prior preservation. No masks,
and nothing here knows that there are other adapters.
"""
import argparse
import json
import os
import time

import numpy as np
import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file

from world import (COLOURS, CONCEPT_STYLES, CONCEPTS, EVAL, MODELS, NEW_STYLES, SEED, STYLES,
                   Drawings, by_words, compose, draw_scene, ground, phrase, threads, training_concepts)
from cache import ids_of
from loras import TARGETS
from publish import load
from train import noised, rate, weight
from vae import to_tensor

FRAMES = ("{}", "{}", "{}", "a picture of {}", "an emoji of {}")


def tail(style_words, rng):
    """The end of a caption and the background that it asks for (white where it names none)."""
    colour, text = "white", ""
    if rng.random() < 0.6:
        text = f", {style_words} style" if "style" not in style_words else f", {style_words}"
    if rng.random() < 0.65:
        colour = list(COLOURS)[rng.integers(len(COLOURS))]
        text += (", " if text else " ") + ground(colour)
    return text, colour


def concept_scenes(name, args, rng):
    """Pictures of the concept: alone, or small beside something that the model knows."""
    drawings, part, pool = Drawings(), by_words(name), training_concepts()
    pics, texts = [], []
    while len(pics) < args.scenes:
        style = CONCEPT_STYLES[rng.integers(len(CONCEPT_STYLES))]
        end, colour = tail(STYLES[style][0], rng)
        parts, words = [part], ["a " + phrase(name)]
        if rng.random() < args.beside:
            other = pool[rng.integers(len(pool))]
            if (other.index, style) not in drawings.index:
                continue
            at = rng.integers(2)
            parts.insert(at, other)
            words.insert(at, other.phrase)
        pics.append(compose(drawings, parts, style, colour, rng, 0.25))
        texts.append(FRAMES[rng.integers(len(FRAMES))].format(" and ".join(words)) + end)
    return np.stack(pics), texts


def class_scenes(count, rng):
    """Pictures of what the model can paint already, one object or two, as it was trained on."""
    drawings, pool = Drawings(), training_concepts()
    pics, texts = [], []
    for _ in range(count):
        parts, style, colour, text = draw_scene(drawings, pool, rng, pair_share=0.5)
        pics.append(compose(drawings, parts, style, colour, rng, 0.25))
        texts.append(text)
    return np.stack(pics), texts


def style_scenes(style, count, rng):
    """The model's own objects, one or two of them, drawn in a style that it does not know."""
    drawings, pool = Drawings(), training_concepts()
    pics, texts = [], []
    while len(pics) < count:
        parts = [pool[i] for i in rng.choice(len(pool), 2 if rng.random() < 0.3 else 1, replace=False)]
        if not all((p.index, style) in drawings.index for p in parts):
            continue
        _, colour = tail("", rng)
        pics.append(compose(drawings, parts, style, colour, rng, 0.25))
        text = " and ".join(p.phrase for p in parts) + f", {NEW_STYLES[style]}"
        texts.append(text + (f", {ground(colour)}" if colour != "white" or rng.random() < 0.2 else ""))
    return np.stack(pics), texts


@torch.no_grad()
def encode(vae, pictures, batch=64):
    """(mean, deviation) of the posterior, unscaled; f32: bfloat16 is emulated on most CPUs, and slow."""
    dists = [vae.encode(to_tensor(pictures[i:i + batch])).latent_dist for i in range(0, len(pictures), batch)]
    return torch.cat([d.mean for d in dists]), torch.cat([d.std for d in dists])


def dataset(pipe, name, args, rng):
    """(mean, deviation of the latents, text states, the empty prompt's) of one adapter's pictures.

    The last args.classes of a concept's are class pictures.
    """
    if name in CONCEPTS:
        pictures, texts = concept_scenes(name, args, rng)
        others, named = class_scenes(args.classes, rng)
        pictures, texts = np.concatenate([pictures, others]), texts + named
    else:
        pictures, texts = style_scenes(name, args.scenes * 2, rng)
    mean, std = encode(pipe.vae, pictures)
    ids = torch.from_numpy(ids_of(pipe.tokenizer, texts + [""])).long()
    with torch.no_grad():
        cond = torch.cat([pipe.text_encoder(ids[i:i + 64]).last_hidden_state
                          for i in range(0, len(ids), 64)])
    return mean, std, cond[:-1], cond[-1:]


def batch_of(n, args, is_concept, rng):
    """Numbers of a batch's pictures: of a concept's, some are class pictures."""
    if not is_concept:
        return rng.integers(n, size=args.batch)
    k = round(args.batch * args.share)
    return np.concatenate([rng.integers(n - args.classes, size=args.batch - k),
                           rng.integers(n - args.classes, n, size=k)])


def fit(pipe, data, args, is_concept, rng):
    """The training loop; mean weighted losses of every 50 steps."""
    steps = args.steps if is_concept else args.style_steps
    mean, std, cond, none = data
    named = [(n, p) for n, p in pipe.unet.named_parameters() if p.requires_grad]
    params = [p for _, p in named]
    opt = torch.optim.AdamW([{"params": [p for n, p in named if ("lora_B" in n) == b], "scale": scale}
                             for b, scale in ((False, 1.0), (True, args.b_scale))],
                            lr=args.lr, betas=(0.9, 0.99), weight_decay=1e-3)
    alphas = pipe.scheduler.alphas_cumprod
    start, total, losses = time.time(), 0.0, []
    for step in range(steps):
        for g in opt.param_groups:
            g["lr"] = args.lr * g["scale"] * rate(step, steps, 30, 0.7)
        take = torch.from_numpy(batch_of(len(mean), args, is_concept, rng))
        m = mean[take]
        x0 = (m + std[take] * torch.randn_like(m)) * pipe.vae.config.scaling_factor
        x, v, t, snr = noised(x0, alphas, 1)
        c = torch.where(torch.rand(len(take), 1, 1) < 0.1, none, cond[take])
        guess = pipe.unet(x.to(memory_format=torch.channels_last), t, c).sample
        loss = ((guess - v).square().mean(dim=(1, 2, 3)) * weight(snr)).mean()
        opt.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        opt.step()
        total += loss.item()
        if (step + 1) % 50 == 0:
            losses.append(round(total / 50, 4))
            print(f"  step {step + 1} weighted {total / 50:.4f} {time.time() - start:.0f} s", flush=True)
            total = 0.0
    return losses, time.time() - start


def save(name, pipe, args, losses, seconds):
    """One file in diffusers' PEFT layout (unet.<module>.lora_A.weight), f16, alpha = rank."""
    words = phrase(name) if name in CONCEPTS else NEW_STYLES[name]
    state = get_peft_model_state_dict(pipe.unet)
    tensors = {f"unet.{k}": v.detach().half().contiguous() for k, v in state.items()}
    path = os.path.join(args.out, f"{name}.safetensors")
    os.makedirs(args.out, exist_ok=True)
    save_file(tensors, path, metadata={
        "format": "pt", "trigger": words.split()[0], "trigger_phrase": words,
        "kind": "concept" if name in CONCEPTS else "style", "rank": str(args.rank),
        "alpha": str(args.rank), "base_model": "models/eval/model", "steps": str(50 * len(losses)),
        "batch": str(args.batch), "lr": str(args.lr), "losses": json.dumps(losses),
        "seconds": f"{seconds:.0f}", "source": "tools/eval_compose/adapters.py"})
    os.chmod(path, 0o644)
    print(f"  {path} {os.path.getsize(path)} bytes", flush=True)


def train(name, args):
    seed = SEED + 900 + (list(CONCEPTS) + list(NEW_STYLES)).index(name)
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    pipe = load(args.model)
    pipe.unet.requires_grad_(False)
    pipe.text_encoder.requires_grad_(False)
    data = dataset(pipe, name, args, rng)
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.unet.add_adapter(LoraConfig(r=args.rank, lora_alpha=args.rank, init_lora_weights="gaussian",
                                     target_modules=TARGETS))
    print(name, flush=True)
    losses, seconds = fit(pipe, data, args, name in CONCEPTS, rng)
    save(name, pipe, args, losses, seconds)


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--only", nargs="*", default=list(CONCEPTS) + list(NEW_STYLES))
    ap.add_argument("--steps", type=int, default=300)
    ap.add_argument("--style-steps", type=int, default=400)
    ap.add_argument("--batch", type=int, default=8)
    ap.add_argument("--scenes", type=int, default=300)
    ap.add_argument("--classes", type=int, default=100, help="class pictures of a concept")
    ap.add_argument("--share", type=float, default=0.25, help="of class pictures in a batch")
    ap.add_argument("--beside", type=float, default=0.5, help="share of a concept's pictures with a second object")
    ap.add_argument("--rank", type=int, default=3)
    ap.add_argument("--b-scale", type=float, default=1.0, help="rate of the B factors to A's (LoRA+)")
    ap.add_argument("--lr", type=float, default=3e-3)
    ap.add_argument("--model", default=os.path.join(MODELS, "eval", "model"))
    ap.add_argument("--out", default=os.path.join(EVAL, "loras"))
    ap.add_argument("--missing", action="store_true", help="leave adapters alone that are there")
    args = ap.parse_args()
    torch.set_num_threads(threads())
    for name in args.only:
        if not (args.missing and os.path.exists(os.path.join(args.out, f"{name}.safetensors"))):
            train(name, args)


if __name__ == "__main__":
    main()
