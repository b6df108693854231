"""What both recipes do with a finished model: the diffusers folder, its golden, sheets.

Nothing here knows a recipe; `tools/default_model_2` imports this file too.
"""
import json
import os
import shutil

import diffusers
import numpy as np
import torch
import transformers
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

GOLDEN = "tests/data/default_model_golden.safetensors"
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")


def published_names(folder):
    """Text encoder keys as SD 1.x publishes them (text_model.*), whatever transformers writes."""
    path = os.path.join(folder, "text_encoder", "model.safetensors")
    tensors = load_file(path)
    named = {}
    for key, value in tensors.items():
        if key.endswith("position_ids"):
            continue
        named[key if key.startswith("text_model.") else "text_model." + key] = value
    save_file(named, path, metadata={"format": "pt"})


def computed_in_f32(folder):
    """transformers computes in the type that config.json names, diffusers in f32: the same here."""
    path = os.path.join(folder, "text_encoder", "config.json")
    with open(path) as f:
        config = json.load(f)
    config["dtype"] = "float32"
    with open(path, "w") as f:
        f.write(json.dumps(config, indent=2, sort_keys=True) + "\n")


def save_folder(pipe, folder, tokenizer):
    """Writes the pipeline in f16 with the files of `tokenizer`, loads it again; bytes of all files."""
    pipe.to(dtype=torch.float16)
    pipe.save_pretrained(folder, safe_serialization=True)
    published_names(folder)
    computed_in_f32(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(os.path.join(tokenizer, name), os.path.join(folder, "tokenizer", name))
    extra = os.path.join(folder, "tokenizer", "tokenizer.json")
    if os.path.exists(extra):
        os.remove(extra)
    check = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    for part in ("unet", "text_encoder", "vae"):
        ours, theirs = getattr(pipe, part).state_dict(), getattr(check, part).state_dict()
        for key, value in ours.items():
            if not torch.equal(value.float(), theirs[key].float()):
                raise SystemExit(f"{part}: {key} did not come back")
    check("a picture", num_inference_steps=1)  # without a dtype, as the README says
    total = 0
    for base, _, files in os.walk(folder):
        for f in files:
            os.chmod(os.path.join(base, f), 0o644)
        total += sum(os.path.getsize(os.path.join(base, f)) for f in files)
    return total


def load(path):
    pipe = StableDiffusionPipeline.from_pretrained(path, safety_checker=None,
                                                   torch_dtype=torch.float32)
    pipe.unet.eval(), pipe.vae.eval(), pipe.text_encoder.eval()
    return pipe


@torch.no_grad()
def generate(pipe, prompts, seeds, steps=20, cfg=5.0, batch=16, negative=""):
    """uint8 [n,h,w,3]; each picture's noise comes from its own seed alone."""
    def embed(texts):
        ids = pipe.tokenizer(texts, padding="max_length", max_length=77, truncation=True,
                             return_tensors="pt").input_ids
        return pipe.text_encoder(ids).last_hidden_state

    out, edge = [], pipe.unet.config.sample_size
    sched = DDIMScheduler.from_config(pipe.scheduler.config)
    for i in range(0, len(prompts), batch):
        texts = prompts[i:i + batch]
        cond = torch.cat([embed([negative]).expand(len(texts), -1, -1), embed(texts)])
        x = torch.cat([torch.randn(1, 4, edge, edge, generator=torch.Generator().manual_seed(s))
                       for s in seeds[i:i + batch]])
        sched.set_timesteps(steps)
        for t in sched.timesteps:
            un, co = pipe.unet(torch.cat([x, x]), t, cond).sample.chunk(2)
            x = sched.step(un + cfg * (co - un), t, x).prev_sample
        y = pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample
        out.append(((y.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy())
    return np.concatenate(out)


@torch.no_grad()
def golden(pipe, path, source, prompt, negative="", seed=7, steps=20, cfg=5.0):
    """Writes latents and the picture of one prompt: f32 on the CPU, f16 weights.

    Above 64 px three latents, no text (they depend on it) and the picture in f16 (2.4e-4 off at most,
    the test allows 3.9e-3): goldens stay below 200 KB.
    """
    out, edge = {}, pipe.unet.config.sample_size
    brief = edge > 16
    kept = {0, steps // 2, steps - 1} if brief else {*range(0, steps, 2), steps - 1}

    def ids_of(text):
        return pipe.tokenizer(text, padding="max_length", max_length=77, truncation=True,
                              return_tensors="pt").input_ids

    ids, ids_negative = ids_of(prompt), ids_of(negative)
    out["ids"], out["ids_negative"] = ids[0].int(), ids_negative[0].int()
    text = pipe.text_encoder(ids).last_hidden_state
    none = pipe.text_encoder(ids_negative).last_hidden_state
    if not brief:
        out["text"] = text  # the negative's is left out for size: every latent depends on it
    torch.manual_seed(seed)
    x = torch.randn(1, 4, edge, edge)
    out["noise"] = x.clone()
    sched = DDIMScheduler.from_config(pipe.scheduler.config)
    sched.set_timesteps(steps)
    x = x * sched.init_noise_sigma
    for i, t in enumerate(sched.timesteps):
        un = pipe.unet(x, t, none).sample
        co = pipe.unet(x, t, text).sample
        eps = un + cfg * (co - un)
        if i == 0:
            out["eps_step0"] = eps
        x = sched.step(eps, t, x).prev_sample
        if i in kept:
            out[f"latent_step{i}"] = x
    y = pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample
    image = (y / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    out["image"] = image.half() if brief else image
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    save_file({k: v.contiguous() for k, v in out.items()}, path, metadata={
        "prompt": prompt, "negative": negative, "seed": str(seed), "steps": str(steps),
        "cfg": str(cfg), "width": str(y.shape[3]), "height": str(y.shape[2]),
        "sampler": "ddim", "timesteps": " ".join(str(int(t)) for t in sched.timesteps),
        "torch": torch.__version__, "diffusers": diffusers.__version__,
        "transformers": transformers.__version__, "source": source})
    print(path, os.path.getsize(path), "bytes")


def before_after(loras, model, folder, sheet, out):
    """Two rows for each of `loras` (name: phrase, concept or style): without and with it, same seeds."""
    pages, labels = [], []
    for name, what in loras.items():
        if "style" in what:
            prompts = [f"a {w}, {what['phrase']}" for w in ("cat", "rocket", "house", "red apple")]
            prompts += [f"a fish, {what['phrase']}, on a blue background", f"a dog and a star, {what['phrase']}"]
        else:
            p = what["phrase"]
            prompts = [p, f"{p}, noto style", f"{p}, twemoji style, on a blue background",
                       f"{p}, fluent 3d style, on a yellow background", f"{p} and a dog", f"a cat and {p}"]
        path = os.path.join(folder, f"{name}.safetensors")
        for use in (False, True):
            pipe = load(model)
            if use:
                pipe.load_lora_weights(path)
            pages.append(generate(pipe, prompts, [11 + i for i in range(6)]))
            labels += [("with: " if use else "without: ") + p for p in prompts]
    sheet(np.concatenate(pages), labels, 6).save(out)


def contact_sheet(prompts, seen, painted, folder):
    """contact_sheet.png and .txt of 64 prompts of which none is in `seen`; painted() is the page."""
    known = [p for p in prompts if p in seen]
    if known or len(set(prompts)) != 64:
        raise SystemExit(f"{len(set(prompts))} prompts, seen in training: {known}")
    page = painted()
    page.quantize(256).save(os.path.join(folder, "contact_sheet.png"), optimize=True)
    with open(os.path.join(folder, "contact_sheet.txt"), "w", encoding="utf-8") as f:
        f.write("# row by row; DDIM, 20 steps, CFG 5, empty negative prompt; seed = line number from 0\n")
        f.write("\n".join(prompts) + "\n")
