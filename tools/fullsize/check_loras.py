#!/usr/bin/env python3
"""LoRA files as diffusers, PEFT and kohya's scripts write them, beside PEFT in memory.

    check_loras.py --impasto build/impasto                  (the tiny models of tests/data/models)
    check_loras.py --impasto build/impasto --match sdxl.conv --keep DIR
    check_loras.py --golden tests/data                      (writes the files that the tests use)

For every model, kind of adapter, way of writing and clip skip: the final latents of a guided picture
of three steps, made by the program from the file, against those of the pipeline in which PEFT holds
the factors. Loading the files back is not the truth: loaders drop things. Exit 1 when one differs by
more than NMSE 1e-6 or when a key of a file fits nothing.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import diffusers
import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from diffusers.training_utils import _collate_lora_metadata  # noqa: E402
from diffusers.utils import convert_state_dict_to_diffusers  # noqa: E402
from fixtures import singlefile  # noqa: E402
from fixtures.common import NEGATIVE, PROMPT, nmse, sort_header  # noqa: E402
from fixtures.loras import text_path  # noqa: E402
from fixtures.pipelines import scheduler  # noqa: E402

SIZES = {"sd1": (32, 24), "sd2": (56, 40), "sdxl": (40, 24)}
STEPS, CFG, SEED, LIMIT = 3, 5.0, 11, 1e-6
# --clip-skip of the program and clip_skip of diffusers, which counts from the model's own layer
SKIPS = {"sd1": {0: None, 1: None, 2: 1}, "sd2": {0: None, 1: None, 2: 1},
         "sdxl": {0: None, 2: None, 3: 1}}
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
LINEAR = ATTENTION + ["ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj"]
KINDS = {  # settings of the UNet's and of the text encoders' adapter
    "plain": (dict(r=4, lora_alpha=4, target_modules=ATTENTION),
              dict(r=4, lora_alpha=4, target_modules=TEXT)),
    "alpha": (dict(r=4, lora_alpha=6, target_modules=LINEAR),
              dict(r=3, lora_alpha=1, target_modules=TEXT + ["fc1", "fc2"])),
    "rslora": (dict(r=4, lora_alpha=3, use_rslora=True, target_modules=LINEAR),
               dict(r=2, lora_alpha=2, use_rslora=True, target_modules=TEXT)),
    "conv": (dict(r=2, lora_alpha=3, target_modules=None),  # every linear and convolution
             dict(r=2, lora_alpha=1, target_modules=TEXT + ["fc1", "fc2"])),
    "patterns": (dict(r=4, lora_alpha=2, target_modules=LINEAR,
                      rank_pattern={"attn2.to_k": 2, r"mid_block\..*": 3, "^up_blocks.0": 5},
                      alpha_pattern={"attn2.to_k": 7, r"down_blocks\.\d+\..*attn1\.to_(q|k)": 1,
                                     r"^mid_block.attentions.0.proj_in": 5}),
                 dict(r=4, lora_alpha=4, target_modules=TEXT, rank_pattern={"k_proj": 2},
                      alpha_pattern={r".*layers\.[01]\..*": 3, "v_proj": 1})),
    "patterns_rslora": (dict(r=4, lora_alpha=2, use_rslora=True, target_modules=ATTENTION,
                             rank_pattern={r".*attn1\.to_q": 2},
                             alpha_pattern={r".*attn1\.to_q": 6, "to_v": 3}),
                        dict(r=2, lora_alpha=4, use_rslora=True, target_modules=TEXT,
                             alpha_pattern={"q_proj": 1})),
}


# --- the truth ------------------------------------------------------------------------------------
def encoders(pipe):
    return {n: m for n, m in pipe.components.items()
            if n in ("text_encoder", "text_encoder_2") and m is not None}


def load(model):
    folder = ROOT / "tests/data/models" / model
    cls = diffusers.StableDiffusionXLPipeline if model == "sdxl" else diffusers.StableDiffusionPipeline
    more = {} if model == "sdxl" else {"safety_checker": None, "requires_safety_checker": False}
    pipe = cls.from_pretrained(folder, dtype=torch.float32, **more)
    pipe.scheduler = scheduler(folder, "euler")
    pipe.set_progress_bar_config(disable=True)
    return pipe, folder


def config_of(settings, model):
    settings = dict(settings)
    if settings["target_modules"] is None:
        kinds = (torch.nn.Linear, torch.nn.Conv2d)
        settings["target_modules"] = [n for n, m in model.named_modules() if isinstance(m, kinds)]
    return LoraConfig(init_lora_weights=False, **settings)


def inject(pipe, kind):
    """Adapters with seeded factors in the UNet and in every text encoder."""
    parts = {"unet": pipe.unet, **encoders(pipe)}
    gen = torch.Generator("cpu").manual_seed(SEED)
    for name, part in parts.items():
        inject_adapter_in_model(config_of(KINDS[kind][name != "unet"], part), part)
        for key, p in sorted(part.named_parameters()):
            if "lora_" in key:
                scale = 0.4 / (p.shape[1] if "lora_B" in key else p[0].numel()) ** 0.5
                p.data.copy_(torch.randn(p.shape, generator=gen) * scale)
    return parts


def embeddings(pipe, text, skip):
    """What a prompt is encoded to: (embeddings, pooled or None)."""
    if "text_encoder_2" in encoders(pipe):
        got = pipe.encode_prompt(text, device="cpu", do_classifier_free_guidance=False,
                                 clip_skip=skip)
        return got[0], got[2]
    # diffusers 0.42 looks for the final norm where transformers 4 had it
    object.__setattr__(pipe.text_encoder, "text_model", pipe.text_encoder)
    return pipe.encode_prompt(text, "cpu", 1, False, clip_skip=skip)[0], None


def latents(pipe, model, skip):
    """Clip skip acts on the negative prompt too, as in A1111; diffusers' own call leaves that out."""
    width, height = SIZES[model]
    given = {}
    for prefix, text in (("", PROMPT), ("negative_", NEGATIVE)):
        given[prefix + "prompt_embeds"], pooled = embeddings(pipe, text, skip)
        if pooled is not None:
            given[prefix + "pooled_prompt_embeds"] = pooled
    return pipe(num_inference_steps=STEPS, guidance_scale=CFG, width=width, height=height,
                output_type="latent", generator=torch.Generator("cpu").manual_seed(SEED),
                **given).images


# --- the files ------------------------------------------------------------------------------------
def scaling(part, name):
    return part.get_submodule(name).scaling["default"]


def factors(part):
    """{module: (A, B, scale)}"""
    state = {k: v.contiguous() for k, v in get_peft_model_state_dict(part).items()}
    names = sorted({k.rsplit(".lora_", 1)[0] for k in state})
    return {n: (state[n + ".lora_A.weight"], state[n + ".lora_B.weight"], scaling(part, n))
            for n in names}


def diffusers_file(out, pipe, parts, convert, meta):
    """save_lora_weights as diffusers' training scripts call it."""
    layers = {n: get_peft_model_state_dict(p) for n, p in parts.items()}
    if convert:
        layers = {n: convert_state_dict_to_diffusers(s) for n, s in layers.items()}
    given = {f"{n}_lora_layers": s for n, s in layers.items()}
    if meta:
        given.update(_collate_lora_metadata(parts))
    type(pipe).save_lora_weights(out, **given)
    return [out / "pytorch_lora_weights.safetensors"]


def save_peft(out, parts, folders):
    """What PeftModel.save_pretrained writes, one folder a model."""
    made = []
    for name, part in parts.items():
        folder = out / name
        folder.mkdir()
        state = {f"base_model.model.{k}": v.contiguous()
                 for k, v in get_peft_model_state_dict(part).items()}
        save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        part.peft_config["default"].save_pretrained(folder)
        made.append(folder if folders else folder / "adapter_model.safetensors")
    return made


def kohya_file(out, pipe, parts, model, dtype=torch.float32):
    """sd-scripts' networks/lora.py: sgm names for SDXL's UNet, an alpha for every module."""
    state = {k.replace(".base_layer", ""): v for k, v in parts["unet"].state_dict().items()
             if ".lora_" not in k}
    prefix = {"unet": "lora_unet_", "text_encoder": "lora_te1_" if model == "sdxl" else "lora_te_",
              "text_encoder_2": "lora_te2_"}
    tensors = {}
    for name, part in parts.items():
        for module, (a, b, scale) in factors(part).items():
            if name == "unet" and model == "sdxl":
                module = singlefile.unet_key(module + ".weight", state).removesuffix(".weight")
            elif name != "unet":
                module = text_path(module)
            key = prefix[name] + module.replace(".", "_")
            tensors[key + ".lora_down.weight"] = a.to(dtype)
            tensors[key + ".lora_up.weight"] = b.to(dtype)
            tensors[key + ".alpha"] = torch.tensor(scale * a.shape[0])
    save_file(tensors, out / "kohya.safetensors", metadata={"ss_network_module": "networks.lora"})
    return [out / "kohya.safetensors"]


def attn_procs_file(out, parts):
    """LoraAttnProcessor's names; there is no alpha, so the scale goes into the up factor."""
    tensors = {}
    for name, part in parts.items():
        for module, (a, b, scale) in factors(part).items():
            if name == "unet":
                block, leaf = re.match(r"(.+\.attn[12])\.to_(q|k|v|out)", module).groups()
                stem = f"unet.{block}.processor.to_{leaf}_lora"
            else:
                block, leaf = re.match(r"(.+)\.(q|k|v|out)_proj", text_path(module)).groups()
                stem = f"{name}.{block}.to_{leaf}_lora"
            tensors[stem + ".down.weight"], tensors[stem + ".up.weight"] = a, b * scale
    save_file(tensors, out / "attn_procs.safetensors", metadata={"format": "pt"})
    return [out / "attn_procs.safetensors"]


def single_models(out, parts):
    """save_lora_adapter of the UNet: metadata without the component's name."""
    parts["unet"].save_lora_adapter(out, weight_name="unet_only.safetensors")
    return [out / "unet_only.safetensors"]


def ways(pipe, parts, model, kind):
    yield "diffusers", lambda out: diffusers_file(out, pipe, parts, False, True)
    yield "diffusers_old_keys", lambda out: diffusers_file(out, pipe, parts, True, True)
    if kind == "plain":  # without metadata the scale is lost
        yield "diffusers_bare", lambda out: diffusers_file(out, pipe, parts, False, False)
        yield "diffusers_old_bare", lambda out: diffusers_file(out, pipe, parts, True, False)
    yield "peft_folder", lambda out: save_peft(out, parts, True)
    yield "peft_file", lambda out: save_peft(out, parts, False)
    yield "kohya", lambda out: kohya_file(out, pipe, parts, model)
    if kind in ("plain", "patterns_rslora"):
        yield "attn_procs", lambda out: attn_procs_file(out, parts)
    if kind in ("alpha", "patterns"):
        yield "adapter_only", lambda out: single_models(out, {"unet": parts["unet"]})


# --- the program ----------------------------------------------------------------------------------
def run(args, model, files, skip, out):
    width, height = SIZES[model]
    trace = out / "trace.safetensors"
    cmd = [args.impasto, "generate", "-q", "-m", ROOT / "tests/data/models" / model, "-p", PROMPT,
           "-n", NEGATIVE, "--steps", STEPS, "--cfg", CFG, "--seed", SEED, "-W", width, "-H", height,
           "--sampler", "euler", "--precision", "f32", "--trace", trace, "-o", out / "o.png"]
    for file in files:
        cmd += ["--lora", file]
    if skip:
        cmd += ["--clip-skip", skip]
    done = subprocess.run([str(c) for c in cmd], capture_output=True, text=True)
    if done.returncode != 0:
        return None, done.stderr.strip()
    with safe_open(trace, "pt") as f:
        return f.get_tensor(f"latent_step{STEPS - 1}"), ""


def check(args, model, kind, work):
    pipe, _ = load(model)
    parts = inject(pipe, kind)
    want = {}
    bad = n = 0
    for way, write in ways(pipe, parts, model, kind):
        if args.match not in f"{model}.{kind}.{way}":
            continue
        out = work / f"{model}.{kind}.{way}"
        out.mkdir(parents=True)
        files = write(out)
        for skip, theirs in SKIPS[model].items():
            key = (theirs, way == "adapter_only")
            if key not in want:
                for part in encoders(pipe).values():
                    for layer in part.modules():
                        if isinstance(layer, BaseTunerLayer):
                            layer.enable_adapters(not key[1])
                want[key] = latents(pipe, model, theirs)
            got, said = run(args, model, files, skip, out)
            error = float("nan") if got is None else nmse(got, want[key])
            n += 1
            bad += not error <= LIMIT
            verdict = "" if error <= LIMIT else f"  DIFFERS {said}"
            print(f"{model}.{kind}.{way} clip-skip {skip}: NMSE {error:.1e}{verdict}", flush=True)
    return bad, n


# --- goldens --------------------------------------------------------------------------------------
def write_goldens(folder):
    """Two files with metadata (old and new keys) and the latents that PEFT makes of them."""
    tensors = {}
    for model, convert in (("sd1", True), ("sdxl", False)):
        pipe, _ = load(model)
        parts = inject(pipe, "patterns_rslora")
        with tempfile.TemporaryDirectory() as out:
            [file] = diffusers_file(Path(out), pipe, parts, convert, True)
            target = folder / f"golden_lora_{model}_patterns.safetensors"
            target.write_bytes(Path(file).read_bytes())
            sort_header(target)
        for skip, theirs in SKIPS[model].items():
            tensors[f"{model}.skip{skip}"] = latents(pipe, model, theirs)
    note = {"made_by": "tools/fullsize/check_loras.py", "steps": str(STEPS), "cfg": str(CFG),
            "seed": str(SEED), "prompt": PROMPT, "negative": NEGATIVE, "sampler": "euler",
            "sizes": json.dumps(SIZES)}
    save_file(tensors, folder / "golden_lora_patterns.safetensors", metadata=note)
    sort_header(folder / "golden_lora_patterns.safetensors")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--impasto")
    parser.add_argument("--match", default="", help="only MODEL.KIND.WAY that hold this")
    parser.add_argument("--keep", help="folder for the files")
    parser.add_argument("--golden", metavar="DIR", help="only write the tests' files")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    if args.golden:
        write_goldens(Path(args.golden))
        return
    bad = n = 0
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(args.keep or temporary)
        for model in SIZES:
            for kind in KINDS:
                if any(args.match in f"{model}.{kind}.{w}" for w in (
                        "diffusers", "diffusers_old_keys", "diffusers_bare", "diffusers_old_bare",
                        "peft_folder", "peft_file", "kohya", "attn_procs", "adapter_only")):
                    b, m = check(args, model, kind, work)
                    bad, n = bad + b, n + m
    print(f"{n - bad} of {n} agree")
    sys.exit(bad > 0 or n == 0)


if __name__ == "__main__":
    main()
