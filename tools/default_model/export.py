"""Stage 8: writes models/default (diffusers layout, f16 safetensors) from vae.pt and unet.pt (EMA)."""
import argparse
import json
import os
import shutil

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from common import MODELS, WORK
from train import SCHEDULER_CONFIG, TEXT_CONFIG, UNET_CONFIG


def from_checkpoint(ema=True):
    """(vae, text encoder, unet, scale, step) of the working folder's checkpoints, f32."""
    vs = torch.load(os.path.join(WORK, "vae.pt"), weights_only=True)
    us = torch.load(os.path.join(WORK, "unet.pt"), weights_only=True)
    vae = AutoencoderKL(**vs["config"], scaling_factor=us["scale"])
    vae.load_state_dict(vs["ema"])
    unet, text = UNet2DConditionModel(**UNET_CONFIG), CLIPTextModel(CLIPTextConfig(**TEXT_CONFIG))
    if ema:
        for p, e in zip([*unet.parameters(), *text.parameters()], us["ema"]):
            p.data.copy_(e)
    else:
        unet.load_state_dict(us["unet"])
        text.load_state_dict(us["text"])
    return vae.eval(), text.eval(), unet.eval(), us["scale"], us["step"]


def pipeline():
    vae, text, unet, _, step = from_checkpoint()
    return StableDiffusionPipeline(
        vae=vae, text_encoder=text, unet=unet, scheduler=DDIMScheduler(**SCHEDULER_CONFIG),
        tokenizer=CLIPTokenizer.from_pretrained(os.path.join(WORK, "tokenizer")),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False), step


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


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--out", default=os.path.join(MODELS, "default"))
    args = ap.parse_args()
    pipe, step = pipeline()
    pipe.to(dtype=torch.float16)
    shutil.rmtree(args.out, ignore_errors=True)
    pipe.save_pretrained(args.out, safe_serialization=True)
    published_names(args.out)
    computed_in_f32(args.out)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(os.path.join(WORK, "tokenizer", name), os.path.join(args.out, "tokenizer", name))
    extra = os.path.join(args.out, "tokenizer", "tokenizer.json")
    if os.path.exists(extra):
        os.remove(extra)
    check = StableDiffusionPipeline.from_pretrained(args.out, safety_checker=None)
    for part in ("unet", "text_encoder", "vae"):
        ours, theirs = getattr(pipe, part).state_dict(), getattr(check, part).state_dict()
        for key, value in ours.items():
            if not torch.equal(value.float(), theirs[key].float()):
                raise SystemExit(f"{part}: {key} did not come back")
    check("a picture", num_inference_steps=1)  # without a dtype, as the README says
    total = 0
    for base, _, files in os.walk(args.out):
        for f in files:
            os.chmod(os.path.join(base, f), 0o644)
        total += sum(os.path.getsize(os.path.join(base, f)) for f in files)
    print(json.dumps({"step": step, "bytes": total, "out": args.out}))


if __name__ == "__main__":
    main()
