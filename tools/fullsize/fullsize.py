#!/usr/bin/env python3
"""SD 1.5, SD 2.1-v and SDXL at their true configurations with seeded random weights.

    fullsize.py make   --kind sd15|sd21|sdxl --dtype f16|f32 --out X.safetensors  (CompVis/sgm file)
    fullsize.py make   --kind ... --layout diffusers --out DIR                     (folder)
    fullsize.py golden --kind ... --dtype f16|f32 --out GOLDEN.safetensors [--size 256] [--steps 2]

`make` streams tensor by tensor (a few hundred MB of memory). `golden` runs text encoders, UNet
(DDIM, guidance 1: one evaluation a step) and VAE decoder with PyTorch in f32 on the values that
`make` wrote with the same dtype and seed, one model in memory at a time, and stores what
`impasto generate --trace` stores. Compare the two with compare.py. The matching command is
    impasto generate -m X.safetensors -p "PROMPT" --sampler ddim --steps 2 --cfg 1 --seed 0 \\
        -W 256 -H 256 --precision f32 --trace trace.safetensors -o out.png
(PROMPT stands in the golden's metadata.)
Needs torch, diffusers, transformers, safetensors, open-clip-torch (for CLIP's merges).
"""

import argparse
import json
import os
import struct
import sys
import zlib
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fixtures import singlefile  # noqa: E402
from fixtures.clip import clip_words, published_tokenizer  # noqa: E402

PROMPT = "a photograph of an astronaut riding a horse"
DTYPES = {"f16": torch.float16, "f32": torch.float32}
ST_NAMES = {torch.float16: "F16", torch.float32: "F32", torch.int64: "I64", torch.int32: "I32"}

CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
          "num_attention_heads": 12, "hidden_act": "quick_gelu", "projection_dim": 768}
OPENCLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23,
              "num_attention_heads": 16, "hidden_act": "gelu", "projection_dim": 512}
OPENCLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
              "num_attention_heads": 20, "hidden_act": "gelu", "projection_dim": 1280}
DOWN4 = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
UP4 = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
UNETS = {
    "sd15": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8,
             "block_out_channels": (320, 640, 1280, 1280), "down_block_types": DOWN4,
             "up_block_types": UP4},
    "sd21": {"sample_size": 96, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20),
             "block_out_channels": (320, 640, 1280, 1280), "down_block_types": DOWN4,
             "up_block_types": UP4, "use_linear_projection": True},
    "sdxl": {"sample_size": 128, "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20),
             "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10),
             "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
             "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
             "use_linear_projection": True, "addition_embed_type": "text_time",
             "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816},
}
TEXTS = {"sd15": [CLIP_L], "sd21": [OPENCLIP_H], "sdxl": [CLIP_L, OPENCLIP_G]}
SCALING = {"sd15": 0.18215, "sd21": 0.18215, "sdxl": 0.13025}
DDIM = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
        "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1,
        "timestep_spacing": "leading"}


def build_unet(kind):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**UNETS[kind])


def build_vae(kind):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, latent_channels=4,
        sample_size=512, scaling_factor=SCALING[kind])


def build_text(kind, index):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(bos_token_id=49406, eos_token_id=49407, pad_token_id=1,
                            **TEXTS[kind][index])
    return (CLIPTextModelWithProjection if index else CLIPTextModel)(config)


def value(part, name, shape, seed, dtype):
    """The tensor `name` of a model part: depends on nothing but the arguments."""
    name = name.removeprefix("text_model.")
    gen = torch.Generator("cpu").manual_seed(zlib.crc32(f"{part}.{name}".encode()) + seed)
    v = torch.randn(shape, generator=gen)
    if name.endswith("embedding.weight"):
        v *= 0.5 if "token" in name else 0.1
    elif len(shape) >= 2:
        v *= 0.7 / v[0].numel() ** 0.5
    elif name.endswith("weight"):
        v.mul_(0.1).add_(1)
    else:
        v *= 0.05
    return v.to(dtype)


class Lazy:
    """A tensor's shape now, its values on demand; knows what the key rules do with tensors."""

    def __init__(self, shape, make):
        self.shape, self.make = tuple(shape), make
        self.ndim = len(self.shape)

    def __getitem__(self, index):  # [:, :, None, None] of the VAE's attention matrices
        assert index == (slice(None), slice(None), None, None), index
        return Lazy(self.shape + (1, 1), lambda: self.make()[:, :, None, None])

    @property
    def T(self):
        return Lazy(self.shape[::-1], lambda: self.make().T.contiguous())


def joined(parts):
    return Lazy((sum(p.shape[0] for p in parts),) + parts[0].shape[1:],
                lambda: torch.cat([p.make() for p in parts]))


def lazy_state(part, builder, seed, dtype):
    with torch.device("meta"):
        model = builder()
    out = {}
    for name, p in model.named_parameters():
        out[name] = Lazy(p.shape, lambda n=name, s=p.shape: value(part, n, s, seed, dtype))
    return model, out


def write_streaming(path, tensors, default):
    """safetensors with the values made one tensor at a time; written beside, then renamed."""
    header, offset = {"__metadata__": {"format": "pt", "made_by": "tools/fullsize"}}, 0
    size = {torch.float16: 2, torch.float32: 4, torch.int64: 8, torch.int32: 4}
    for key, t in tensors.items():
        dtype = default if isinstance(t, Lazy) else t.dtype
        n = size[dtype]
        for dim in t.shape:
            n *= dim
        header[key] = {"dtype": ST_NAMES[dtype], "shape": list(t.shape),
                       "data_offsets": [offset, offset + n]}
        offset += n
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    part = Path(str(path) + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    with open(part, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for t in tensors.values():
            data = t.make() if isinstance(t, Lazy) else t
            data.contiguous().numpy().tofile(f)
    os.replace(part, path)
    print(f"{path}: {len(tensors)} tensors, {offset / 1e9:.2f} GB")


def single_file(kind, seed, dtype):
    """All tensors of the checkpoint under CompVis/sgm names, lazily."""
    cat, singlefile.torch_cat = singlefile.torch_cat, joined
    try:
        out = singlefile.unet_to_ldm(lazy_state("unet", lambda: build_unet(kind), seed, dtype)[1])
        vae = lazy_state("vae", lambda: build_vae(kind), seed, dtype)[1]
        out.update(singlefile.vae_to_ldm(vae, 4))
        texts = [lazy_state(f"text{i}", lambda i=i: build_text(kind, i), seed, dtype)[1]
                 for i in range(len(TEXTS[kind]))]
        if kind == "sd15":
            out.update(singlefile.clip_to_hf(texts[0], "cond_stage_model.transformer."))
        elif kind == "sd21":
            out.update(singlefile.clip_to_openclip(texts[0], "cond_stage_model.model.", 1))
        else:
            out.update(singlefile.clip_to_hf(texts[0], "conditioner.embedders.0.transformer."))
            out.update(singlefile.clip_to_openclip(texts[1], "conditioner.embedders.1.model."))
    finally:
        singlefile.torch_cat = cat
    return out


def write_folder(kind, seed, dtype, out):
    """The same weights as a diffusers folder with configs, scheduler and tokenizers."""
    out = Path(out)
    parts = {"unet": ("unet", lambda: build_unet(kind), "diffusion_pytorch_model"),
             "vae": ("vae", lambda: build_vae(kind), "diffusion_pytorch_model")}
    for i in range(len(TEXTS[kind])):
        folder = "text_encoder" if i == 0 else "text_encoder_2"
        parts[folder] = (f"text{i}", lambda i=i: build_text(kind, i), "model")
    index = {"_class_name": "StableDiffusionXLPipeline" if kind == "sdxl" else
             "StableDiffusionPipeline", "scheduler": ["diffusers", "DDIMScheduler"]}
    for folder, (part, builder, name) in parts.items():
        model, state = lazy_state(part, builder, seed, dtype)
        if folder.startswith("text"):
            state = {"text_model." + k if not k.startswith("text_") else k: v
                     for k, v in state.items()}
            model.config.architectures = [type(model).__name__]
            (out / folder).mkdir(parents=True, exist_ok=True)
            model.config.to_json_file(out / folder / "config.json", use_diff=False)
            index[folder] = ["transformers", type(model).__name__]
        else:
            model.save_config(out / folder)
            index[folder] = ["diffusers", type(model).__name__]
        write_streaming(out / folder / f"{name}.safetensors", state, dtype)
    words, merges = clip_words()
    for i, folder in enumerate(["tokenizer", "tokenizer_2"][: len(TEXTS[kind])]):
        pad = "<|endoftext|>" if kind == "sd15" or (kind == "sdxl" and i == 0) else "!"
        special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>",
                   "unk_token": "<|endoftext|>", "pad_token": pad}
        (out / folder).mkdir(exist_ok=True)
        (out / folder / "vocab.json").write_text(
            json.dumps({w: n for n, w in enumerate(words)}, ensure_ascii=False), encoding="utf-8")
        (out / folder / "merges.txt").write_text(
            "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")
        (out / folder / "special_tokens_map.json").write_text(json.dumps(special))
        (out / folder / "tokenizer_config.json").write_text(json.dumps(
            dict(special, model_max_length=77, tokenizer_class="CLIPTokenizer")))
        index[folder] = ["transformers", "CLIPTokenizer"]
    scheduler = dict(DDIM, _class_name="DDIMScheduler", num_train_timesteps=1000,
                     prediction_type="v_prediction" if kind == "sd21" else "epsilon")
    (out / "scheduler").mkdir(exist_ok=True)
    (out / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler, indent=2) + "\n")
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def loaded(part, builder, seed, dtype):
    """The model in f32, holding the values that a file of `dtype` has; never held twice."""
    model, state = lazy_state(part, builder, seed, dtype)
    modules = dict(model.named_modules())
    for name, lazy in state.items():
        owner, leaf = name.rpartition(".")[::2]
        setattr(modules[owner], leaf, torch.nn.Parameter(lazy.make().float(), requires_grad=False))
    for module in modules.values():  # CLIP's position_ids, left on the meta device
        for name, b in list(module.named_buffers(recurse=False)):
            if b.is_meta:
                assert name == "position_ids", name
                module.register_buffer(name, torch.arange(b.shape[-1])[None], persistent=False)
    return model.eval()


def encode(kind, seed, dtype, prompt):
    out, states = {}, []
    for i in range(len(TEXTS[kind])):
        pad = "<|endoftext|>" if kind == "sd15" or (kind == "sdxl" and i == 0) else "!"
        tok = published_tokenizer(pad_token=pad)
        ids = tok(prompt, padding="max_length", max_length=77, truncation=True,
                  return_tensors="pt").input_ids
        out["ids" if i == 0 else "ids_2"] = ids[0].to(torch.int32)
        model = loaded(f"text{i}", lambda: build_text(kind, i), seed, dtype)
        got = model(ids, output_hidden_states=True)
        states.append(got.hidden_states[-2] if kind == "sdxl" else got.last_hidden_state)
        if i == 1:
            out["pooled"] = got.text_embeds
        del model
    out["text"] = torch.cat(states, -1)
    return out


def golden(args):
    from diffusers import DDIMScheduler
    from safetensors.torch import save_file

    dtype = DTYPES[args.dtype]
    out = encode(args.kind, args.seed, dtype, args.prompt)
    sched = DDIMScheduler(
        **DDIM, prediction_type="v_prediction" if args.kind == "sd21" else "epsilon")
    sched.set_timesteps(args.steps)
    n = args.size // 8
    x = torch.randn(1, 4, n, n, generator=torch.Generator("cpu").manual_seed(args.noise_seed))
    out["noise"], more = x, {}
    if args.kind == "sdxl":
        out["time_ids"] = torch.tensor([[args.size, args.size, 0, 0, args.size, args.size]]).float()
        more["added_cond_kwargs"] = {"text_embeds": out["pooled"], "time_ids": out["time_ids"]}
    unet = loaded("unet", lambda: build_unet(args.kind), args.seed, dtype)
    for i, t in enumerate(sched.timesteps):
        eps = unet(x, t, out["text"], **more).sample
        x = sched.step(eps, t, x).prev_sample
        out[f"eps_step{i}"], out[f"latent_step{i}"] = eps, x
        print(f"step {i}: t={int(t)} eps std {eps.std():.4f}", flush=True)
    del unet
    vae = loaded("vae", lambda: build_vae(args.kind), args.seed, dtype)
    image = vae.decode(x / SCALING[args.kind]).sample
    out["image"] = (image / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).contiguous()
    out["timesteps"] = sched.timesteps.float()
    import diffusers
    import transformers

    meta = {k: str(v) for k, v in vars(args).items() if isinstance(v, (str, int))}
    meta.update(cfg="1", sampler="ddim", torch=torch.__version__, diffusers=diffusers.__version__,
                transformers=transformers.__version__)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in out.items()}, args.out, metadata=meta)
    print(args.out)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["make", "golden"])
    parser.add_argument("--kind", choices=sorted(UNETS), required=True)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="f32")
    parser.add_argument("--layout", choices=["single", "diffusers"], default="single")
    parser.add_argument("--out", required=True)
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    parser.add_argument("--noise-seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--prompt", default=PROMPT)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    if args.action == "golden":
        golden(args)
    elif args.layout == "single":
        dtype = DTYPES[args.dtype]
        write_streaming(args.out, single_file(args.kind, args.seed, dtype), dtype)
    else:
        write_folder(args.kind, args.seed, DTYPES[args.dtype], args.out)


if __name__ == "__main__":
    main()
