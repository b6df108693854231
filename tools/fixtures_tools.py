#!/usr/bin/env python3
"""Writes tests/data/tools: LoRA files for models/sd1, what PEFT merges them to, errors of SVDs.

    python3 tools/fixtures_tools.py [--out DIR]        (after tools/fixtures_adapters.py)

Needs torch, diffusers, transformers, safetensors and peft. Merged changes are those of PEFT's
add_weighted_adapter in double; errors are torch.linalg.svd's, of the changes in tests/data/kinds.
"""

import argparse
import sys
import warnings
from pathlib import Path

import diffusers
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent))

from fixtures.common import save  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402

T = "down_blocks.0.attentions.0.transformer_blocks.0."
UNET = [T + "attn1.to_q", T + "ff.net.0.proj", "down_blocks.0.attentions.0.proj_in",
        "down_blocks.0.resnets.0.conv1"]
TEXT = ["text_model.encoder.layers.0.self_attn.q_proj"]
FILES = {"a": (3, 2.0), "b": (3, 6.0), "c": (2, 2.0)}  # rank, alpha
MERGES = {  # files, weights, settings of add_weighted_adapter
    "linear": ("ab", (0.7, 0.4), {}),
    "linear_minus": ("ab", (0.7, -0.5), {}),
    "cat": ("abc", (0.7, -0.5, 1.25), {}),
    "svd": ("abc", (0.7, 0.4, 0.3), dict(svd_rank=4)),
    "ties": ("ab", (0.7, 0.4), dict(density=0.5)),
    "ties_minus": ("ab", (0.7, -0.4), dict(density=0.8)),
    "ties_frequency": ("ab", (0.7, 0.4), dict(density=0.5, majority_sign_method="frequency")),
    "ties_svd": ("abc", (0.7, 0.4, -0.3), dict(density=0.5, svd_rank=3)),
    "magnitude_prune": ("ab", (0.7, 0.4), dict(density=0.3)),
    "magnitude_prune_svd": ("abc", (0.7, 0.4, 0.3), dict(density=0.3, svd_rank=3)),
    "dare_linear": ("ab", (0.7, 0.4), dict(density=1.0)),
    "dare_ties": ("ab", (0.7, 0.4), dict(density=1.0)),
    "dare_linear_svd": ("abc", (0.7, 0.4, 0.3), dict(density=1.0, svd_rank=4)),
    "dare_ties_svd": ("abc", (0.7, 0.4, 0.3), dict(density=1.0, svd_rank=4)),
}
RANKS = (1, 2, 3)
KEEPS = (0.5, 0.8, 0.95)
KRON = (2, 4)


def kohya(name):
    return ("lora_te_" if name.startswith("text_model.") else "lora_unet_") + name.replace(".", "_")


def peft_over(model, names):
    """The adapters over one model: {name of a module: its layer}, the wrapped model."""
    wrapped = None
    for file, (rank, alpha) in FILES.items():
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=names, init_lora_weights=False)
        if wrapped is None:
            wrapped = get_peft_model(model, config, file, autocast_adapter_dtype=False)
        else:
            wrapped.add_adapter(file, config)
    return wrapped, {n: wrapped.base_model.model.get_submodule(n) for n in names}


def fill(layers, gen):
    """Factors exact in f32, and the files of them."""
    tensors = {file: {} for file in FILES}
    for file, (rank, alpha) in FILES.items():
        for name, layer in layers.items():
            full = name if name in UNET or name in TEXT else "text_model." + name
            for part, key in ((layer.lora_A, "lora_down"), (layer.lora_B, "lora_up")):
                w = part[file].weight
                v = (torch.randn(w.shape, generator=gen) * 0.3).float()
                w.data.copy_(v)
                tensors[file][f"{kohya(full)}.{key}.weight"] = v
            tensors[file][kohya(full) + ".alpha"] = torch.tensor(alpha)
    return tensors


def merges(root):
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(
        root / "tests/data/models/sd1", safety_checker=None, requires_safety_checker=False)
    names = {n for n, _ in pipe.text_encoder.named_modules()}
    text = [n if n in names else n.removeprefix("text_model.") for n in TEXT]
    gen = torch.Generator("cpu").manual_seed(71)
    files, golden = {f: {} for f in FILES}, {}
    for model, wanted in ((pipe.unet.double(), UNET), (pipe.text_encoder.double(), text)):
        wrapped, layers = peft_over(model, wanted)
        for file, tensors in fill(layers, gen).items():
            files[file].update(tensors)
        for key, (which, weights, more) in MERGES.items():
            kind = key.removesuffix("_minus").removesuffix("_frequency")
            wrapped.base_model.add_weighted_adapter(list(which), list(weights), key,
                                                    combination_type=kind, **more)
            for name, layer in layers.items():
                full = name if name in UNET or name in TEXT else "text_model." + name
                delta = layer.get_delta_weight(key)
                golden[f"{key}.{full}"] = delta.reshape(delta.shape[0], -1).double()
    return files, golden


def error(delta, rank):
    s = torch.linalg.svdvals(delta.reshape(delta.shape[0], -1))
    return (s[rank:].square().sum() / s.square().sum()).sqrt()


def kept(delta, keep):
    """kohya's index_sv_fro, without its limit of one value less than all."""
    s = torch.linalg.svdvals(delta.reshape(delta.shape[0], -1))
    share = s.square().cumsum(0) / s.square().sum()
    return torch.tensor(float(min(int(torch.searchsorted(share, keep ** 2)) + 1, len(s))))


def square(n):
    """LyCORIS' factorization(n, -1)."""
    from lycoris.functional.general import factorization
    return factorization(n, -1)


def nearest(delta, o1, i1, shuffled):
    """Relative error of the nearest Kronecker product with a first factor of o1 x i1."""
    out, width = delta.shape[0], delta.shape[1]
    taps = delta[0, 0].numel()
    x = delta.reshape(out // o1, o1, i1, width // i1 * taps) if shuffled else \
        delta.reshape(o1, out // o1, i1, width // i1 * taps)
    x = x.permute(1, 2, 0, 3) if shuffled else x.permute(0, 2, 1, 3)
    return error(x.reshape(o1 * i1, -1), 1)


def errors(kinds):
    deltas = load_file(kinds / "golden_deltas_1.safetensors")
    deltas.update(load_file(kinds / "golden_deltas_2.safetensors"))
    golden = {}
    for key, delta in sorted(deltas.items()):
        kind, name = key.split(".", 1)
        if kind not in ("locon", "loha", "lokr", "lokr_full", "lokr_tucker", "dora", "oft", "krona") \
                or not name.endswith(".weight"):
            continue
        for rank in RANKS:
            if rank < min(delta.shape[0], delta[0].numel()):
                golden[f"lora{rank}.{key}"] = error(delta, rank)
        if kind == "locon":
            for keep in KEEPS:
                golden[f"keep{keep}.{key}"] = kept(delta, keep)
            golden[f"lokr.{key}"] = nearest(delta, square(delta.shape[0])[0],
                                            square(delta.shape[1])[0], False)
        if kind == "lokr" and name.split(".weight")[0].endswith(("to_q", "to_k", "to_v")):
            golden[f"krona.{key}"] = nearest(delta, *KRON, True)
    return {k: v.double().reshape(1) for k, v in golden.items()}


def main():
    root = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default=root / "tests/data/tools")
    out = Path(parser.parse_args().out)
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    warnings.simplefilter("ignore")
    made_by = dict(made_by="tools/fixtures_tools.py")
    files, golden = merges(root)
    for file, tensors in files.items():
        save(out / f"{file}.safetensors", tensors, ss_network_module="networks.lora", **made_by)
    save(out / "golden_merge.safetensors", golden, settings={k: [list(w), list(x), m] for k, (w, x, m)
                                                             in MERGES.items()}, **made_by)
    save(out / "golden_errors.safetensors", errors(root / "tests/data/kinds"), **made_by)


if __name__ == "__main__":
    main()
