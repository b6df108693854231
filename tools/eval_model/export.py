"""Stage 8: writes models/default (diffusers layout, f16 safetensors) from vae.pt and unet.pt (EMA)."""
import argparse
import json
import os
import shutil

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from common import MODELS, WORK
from publish import save_folder
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


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--out", default=os.path.join(MODELS, "eval", "model"))
    args = ap.parse_args()
    pipe, step = pipeline()
    shutil.rmtree(args.out, ignore_errors=True)
    total = save_folder(pipe, args.out, os.path.join(WORK, "tokenizer"))
    print(json.dumps({"step": step, "bytes": total, "out": args.out}))


if __name__ == "__main__":
    main()
