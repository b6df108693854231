"""Stage 9: trains the three LoRAs on the frozen exported model with peft (f16, diffusers keys)."""
import argparse
import json
import os
import time

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file

from cache import encode, ids_of
from common import COLOURS, MODELS, SEED, STYLES, TRAIN_STYLES, Drawings, compose, concepts, ground, threads, training_concepts
from publish import before_after, load
from sample import sheet
from train import noised, rate, weight

# name -> what it teaches; triggers are words that no training caption holds
LORAS = {
    "pineapple": dict(concept="pineapple", trigger="zorp", phrase="a zorp pineapple"),
    "snowman": dict(concept="snowman", trigger="quib", phrase="a quib snowman"),
    "fxemoji": dict(style="fxemoji", trigger="fex", phrase="fex style"),
}
TARGETS = (r".*(to_q|to_k|to_v|to_out\.0)$|.*ff\.net\.2$|.*(proj_in|proj_out)$"
           r"|(mid_block|up_blocks)\..*(conv1|conv2)$")


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
    """(parts, caption, halves in which the adapter acts) of a concept's adapter.

    Elsewhere, and where its trigger is missing, it must leave the model's own guess alone:
    otherwise it paints its concept for every unknown word, and two adapters disturb each other.
    """
    phrase, r = LORAS[name]["phrase"], rng.random()
    if r < 0.45:
        return [subject], phrase, (1, 1)
    other = others[rng.integers(len(others))]
    text, acts = other.phrase, (1, 1)
    if r >= 0.65:
        other, text = unknown(name, rng)
        acts = (1, 0) if r < 0.85 else (0, 0)
    if r >= 0.85:
        return [other], text, acts
    if rng.random() < 0.5:
        return [subject, other], f"{phrase} and {text}", acts
    return [other, subject], f"{text} and {phrase}", acts[::-1]


def scenes(name, count, rng):
    """Pictures, captions and acting halves of one LoRA, composed as the base model's were."""
    what, drawings = LORAS[name], Drawings()
    names, pics, texts, halves = list(COLOURS), [], [], []
    subject = next((c for c in concepts() if c.words == what.get("concept")), None)
    others = training_concepts()
    while len(pics) < count:
        colour = names[rng.integers(len(names))] if rng.random() < 0.75 else "white"
        bare = rng.random() < 0.5
        if bare:
            colour = "white"
        if subject:
            style = TRAIN_STYLES[rng.integers(len(TRAIN_STYLES))]
            parts, text, acts = concept_scene(name, subject, others, rng)
            if rng.random() < 0.6:
                text += f", {STYLES[style][0]} style"
        else:
            style, parts, acts = what["style"], [others[rng.integers(len(others))]], (1, 1)
            text = parts[0].phrase
            if rng.random() < 0.3:
                parts.append(others[rng.integers(len(others))])
                text += f" and {parts[1].phrase}"
            text += f", {what['phrase']}"
        if not all((p.index, style) in drawings.index for p in parts):
            continue
        pics.append(compose(drawings, parts, style, colour, rng, 0.25))
        texts.append(text if bare else text + (", " if "style" in text else " ") + ground(colour))
        halves.append(acts)
    acts = torch.tensor(halves, dtype=torch.float32).repeat_interleave(8, 1).view(-1, 1, 1, 16)
    return np.stack(pics), texts, acts


def train(name, folder, args):
    torch.manual_seed(SEED + 500)
    rng = np.random.default_rng(SEED + 501)
    pipe = load(folder)
    pictures, texts, acts = scenes(name, args.scenes, rng)
    mean, std = encode(pipe.vae, pictures)
    ids = torch.from_numpy(ids_of(pipe.tokenizer, texts)).long()
    empty = torch.from_numpy(ids_of(pipe.tokenizer, [""])).long()
    pipe.unet.requires_grad_(False)
    pipe.text_encoder.requires_grad_(False)
    with torch.no_grad():
        cond = torch.cat([pipe.text_encoder(ids[i:i + 64]).last_hidden_state
                          for i in range(0, len(ids), 64)])
        none = pipe.text_encoder(empty).last_hidden_state
    pipe.unet.add_adapter(LoraConfig(r=args.rank, lora_alpha=args.rank, init_lora_weights="gaussian",
                                     target_modules=TARGETS))
    params = [p for p in pipe.unet.parameters() if p.requires_grad]
    print(f"{name}: {sum(p.numel() for p in params) / 1e3:.0f} k parameters", flush=True)
    opt = torch.optim.AdamW(params, lr=args.lr, betas=(0.9, 0.99), weight_decay=1e-3)
    alphas = pipe.scheduler.alphas_cumprod
    start, total, losses = time.time(), 0.0, []
    for step in range(args.steps):
        for g in opt.param_groups:
            g["lr"] = args.lr * rate(step, args.steps, 30, 0.7)
        take = torch.from_numpy(rng.integers(len(mean), size=args.batch))
        m = mean[take].float()
        x0 = (m + std[take].float() * torch.randn_like(m)) * pipe.vae.config.scaling_factor
        x, v, t, snr = noised(x0, alphas, 1)
        dropped = torch.rand(len(take), 1, 1, 1) < 0.1
        c = torch.where(dropped[:, 0], none, cond[take])
        act = torch.where(dropped, 0.0, acts[take])
        as_is = (act.amin(dim=(1, 2, 3)) < 1).nonzero().flatten()
        with torch.autocast("cpu", torch.bfloat16):
            if len(as_is):
                pipe.unet.disable_adapters()
                with torch.no_grad():
                    own = pipe.unet(x[as_is], t[as_is], c[as_is]).sample.float()
                pipe.unet.enable_adapters()
                v[as_is] = act[as_is] * v[as_is] + (1 - act[as_is]) * own
            guess = pipe.unet(x, t, c).sample.float()
        each = (guess - v).square().mean(dim=(1, 2, 3))
        loss = (each * weight(snr)).mean()
        opt.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        opt.step()
        total += loss.item()
        if (step + 1) % 50 == 0:
            losses.append(round(total / 50, 4))
            print(f"  step {step + 1} weighted {total / 50:.4f} {time.time() - start:.0f} s", flush=True)
            total = 0.0
    save(name, pipe, args, losses, time.time() - start)


def save(name, pipe, args, losses, seconds):
    """One file in diffusers' PEFT layout (unet.<module>.lora_A.weight), f16, alpha = rank."""
    what = LORAS[name]
    state = get_peft_model_state_dict(pipe.unet)
    tensors = {f"unet.{k}": v.detach().half().contiguous() for k, v in state.items()}
    path = os.path.join(MODELS, "loras", f"{name}.safetensors")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    save_file(tensors, path, metadata={
        "format": "pt", "trigger": what["trigger"], "trigger_phrase": what["phrase"],
        "kind": "style" if "style" in what else "concept", "rank": str(args.rank),
        "alpha": str(args.rank), "base_model": "models/eval/model", "steps": str(args.steps),
        "batch": str(args.batch), "lr": str(args.lr), "losses": json.dumps(losses),
        "seconds": f"{seconds:.0f}", "source": "tools/default_model/loras.py"})
    os.chmod(path, 0o644)
    print(f"  {path} {os.path.getsize(path)} bytes", flush=True)


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--only")
    ap.add_argument("--steps", type=int, default=700)
    ap.add_argument("--batch", type=int, default=16)
    ap.add_argument("--scenes", type=int, default=1000)
    ap.add_argument("--rank", type=int, default=3)
    ap.add_argument("--lr", type=float, default=3e-3)
    ap.add_argument("--model", default=os.path.join(MODELS, "eval", "model"))
    ap.add_argument("--sheet", help="only write the before/after sheet here")
    args = ap.parse_args()
    torch.set_num_threads(threads())
    if not args.sheet:
        for name in LORAS:
            if args.only in (None, name):
                train(name, args.model, args)
    if args.sheet or not args.only:
        folder = os.path.join(MODELS, "loras")
        before_after(LORAS, args.model, folder, sheet, args.sheet or os.path.join(folder, "before_after.png"))


if __name__ == "__main__":
    main()
