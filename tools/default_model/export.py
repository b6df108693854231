"""Writes a run's results as models/default and models/loras hold them: export.py OUT FOLDER.

OUT holds denoiser-1.safetensors, denoiser-2.safetensors, vae.safetensors and loras.zip, as run.py left
them. FOLDER becomes a diffusers folder in f16; the adapters go to --loras, where that is given. What is
there already is replaced only with --force, and only after the new files have passed all checks.
"""
import argparse
import json
import os
import shutil
import zipfile

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from common import WORK, threads
from loras import LORAS, adapted
from nets import SCHEDULER_CONFIG, TEXT_CONFIG, UNET_CONFIG, VAE_CONFIG, Unet
from publish import save_folder
from sample import PEEK
from scenes import Words, vocabulary

LIMIT = 32_000_000      # bytes of folder and adapters together
FILES = ("denoiser-1.safetensors", "denoiser-2.safetensors", "vae.safetensors")


def from_run(out):
    """(weights by the networks' names, f32; scaling factor; vocabulary, of old runs None) of a run."""
    state, scales, words = {}, set(), set()
    for name in FILES:
        with safe_open(os.path.join(out, name), "pt") as f:
            about = f.metadata() or {}
            scales.add(about.get("scale"))
            words.add(about.get("vocabulary"))
            state.update({k: f.get_tensor(k).float() for k in f.keys()})
    if len(scales) != 1 or len(words) != 1 or scales & {None, "None"}:
        raise SystemExit(f"{out}: not the files of one run: scaling factors {scales}")
    return state, float(scales.pop()), words.pop()


def filled(model, state, name):
    """The model with the weights that begin with `name`; transformers drops the text encoder's prefix."""
    part = {k[len(name) + 1:]: v for k, v in state.items() if k.startswith(name + ".")}
    own = {k: k for k in model.state_dict() if not k.endswith("position_ids")}
    if name == "text":
        own = {k: k if k.startswith("text_model.") else "text_model." + k for k in own}
    if set(own.values()) != set(part):
        raise SystemExit(f"{name}: other weights than expected: {sorted(set(own.values()) ^ set(part))[:3]}")
    bad = [k for k, v in part.items() if not torch.isfinite(v.half()).all()]
    if bad:
        raise SystemExit(f"{name}: not finite in f16: {bad[:3]}")
    model.load_state_dict({k: part[v] for k, v in own.items()}, strict=False)
    return model.eval()


def pipeline(out, tokenizer):
    state, scale, trained = from_run(out)
    words, theirs = Words(tokenizer), CLIPTokenizer.from_pretrained(tokenizer)
    shape = (len(words.vocab), words.vocab["<|startoftext|>"], words.vocab["<|endoftext|>"])
    if shape != tuple(TEXT_CONFIG[k] for k in ("vocab_size", "bos_token_id", "eos_token_id")):
        raise SystemExit(f"{tokenizer}: not the vocabulary that the text encoder reads")
    if trained not in (None, vocabulary(tokenizer)):
        raise SystemExit(f"{tokenizer}: not the vocabulary that the run was trained with")
    for text in [*PEEK, "", *(w["phrase"] for w in LORAS.values())]:
        if words.ids(text) != theirs(text, padding="max_length", max_length=77).input_ids:
            raise SystemExit(f"'{text}': CLIPTokenizer makes other tokens of it than the training did")
    return StableDiffusionPipeline(
        vae=filled(AutoencoderKL(**VAE_CONFIG, scaling_factor=scale), state, "vae"),
        text_encoder=filled(CLIPTextModel(CLIPTextConfig(**TEXT_CONFIG)), state, "text"),
        unet=filled(UNet2DConditionModel(**UNET_CONFIG), state, "unet"),
        scheduler=DDIMScheduler(**SCHEDULER_CONFIG), tokenizer=theirs,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def check_adapter(path, name):
    """Every module that the recipe adapts, f16, with the trigger in the metadata."""
    with safe_open(path, "pt") as f:
        about, got = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}
    want = {}
    for module, a in adapted(Unet(), int(about["rank"])).items():
        want[f"unet.{module}.lora_A.weight"] = a.a.weight.shape
        want[f"unet.{module}.lora_B.weight"] = a.b.weight.shape
    if {k: v.shape for k, v in got.items()} != want:
        raise SystemExit(f"{path}: other modules or shapes than the recipe's")
    if any(v.dtype != torch.float16 or not torch.isfinite(v).all() for v in got.values()):
        raise SystemExit(f"{path}: not f16 or not finite")
    if (about["trigger"], about["trigger_phrase"]) != (LORAS[name]["trigger"], LORAS[name]["phrase"]):
        raise SystemExit(f"{path}: the trigger is '{about['trigger']}'")


def adapters(out, folder):
    """Unpacks loras.zip; name -> bytes."""
    sizes = {}
    os.makedirs(folder)
    with zipfile.ZipFile(os.path.join(out, "loras.zip")) as z:
        for name in LORAS:
            path = os.path.join(folder, name + ".safetensors")
            with open(path, "wb") as f:
                f.write(z.read(name + ".safetensors"))
            os.chmod(path, 0o644)
            check_adapter(path, name)
            sizes[name] = os.path.getsize(path)
    return sizes


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    ap.add_argument("out", help="a run's results")
    ap.add_argument("folder", help="diffusers folder to write")
    ap.add_argument("--loras", help="folder of the adapters")
    ap.add_argument("--tokenizer", default=os.path.join(WORK, "tokenizer"))
    ap.add_argument("--force", action="store_true", help="replace what is there")
    args = ap.parse_args()
    torch.set_num_threads(threads())
    folder, made = os.path.abspath(args.folder), os.path.abspath(args.folder) + ".new"
    targets = [folder]
    if args.loras:
        targets += [os.path.join(args.loras, name + ".safetensors") for name in LORAS]
    there = [t for t in targets if os.path.exists(t)]
    if there and not args.force:
        raise SystemExit(f"{there[0]} exists: --force replaces it")
    if os.path.exists(folder) and "model_index.json" not in os.listdir(folder):
        raise SystemExit(f"{folder} is not a diffusers folder: not replaced")
    shutil.rmtree(made, ignore_errors=True)
    report = {"bytes": save_folder(pipeline(args.out, args.tokenizer), made, args.tokenizer)}
    if args.loras:
        report["adapters"] = adapters(args.out, os.path.join(made, "loras"))
    total = report["bytes"] + sum(report.get("adapters", {}).values())
    if total > LIMIT:
        raise SystemExit(f"{total} bytes are more than {LIMIT}; see {made}")
    for name in report.get("adapters", {}):
        os.makedirs(args.loras, exist_ok=True)
        shutil.move(os.path.join(made, "loras", name + ".safetensors"),
                    os.path.join(args.loras, name + ".safetensors"))
    shutil.rmtree(os.path.join(made, "loras"), ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(made, folder)
    print(json.dumps({**report, "total": total, "folder": args.folder}))


if __name__ == "__main__":
    main()
