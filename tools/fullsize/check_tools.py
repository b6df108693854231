#!/usr/bin/env python3
"""Files of `impasto lora ...` and `impasto model bake` in diffusers, PEFT and LyCORIS.

    check_tools.py --impasto build/impasto                  (the tiny models of tests/data/models)
    check_tools.py --impasto build/impasto --match sdxl.conv --keep DIR

For every model and kind of adapter of check_loras.py, the change of every weight that a loader makes
of a written file, against PEFT's factors in memory: kohya's file as diffusers' (load_lora_weights), as
PEFT's folder (PeftModel.from_pretrained) and, by way of diffusers', as kohya's again, which diffusers
converts itself. DiffuseKronA's and the nearest LoKr in LyCORIS (create_lycoris_from_weights), merges,
an extracted LoRA, and baked folders and single files against the sums in double. Exit 1 when a loader
refuses a file, leaves a key, or makes another change of it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parent))

from check_loras import KINDS, ROOT, diffusers_file, encoders, factors, inject, kohya_file, load  # noqa: E402,E501
from fixtures.loras import text_path  # noqa: E402

LIMIT = 1e-6  # loaders multiply f32 factors in f32
CONVERTED = ("plain", "alpha")  # what diffusers' own reader of kohya's names takes, all of it


def impasto(args, *command):
    done = subprocess.run([args.impasto, *[str(c) for c in command], "--json", "-q"],
                          capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip())
    return json.loads(done.stdout)


def relative(got, want):
    """Worst relative distance of two sets of changes; infinite when the modules differ."""
    if set(got) != set(want):
        return float("inf")
    return max(((got[k].double().reshape(-1) - want[k].double().reshape(-1)).norm()
                / want[k].double().norm()).item() for k in want)


def truth(parts):
    """{component.module: change} of PEFT's factors in memory, in double."""
    out = {}
    for name, part in parts.items():
        for module, (a, b, scale) in factors(part).items():
            delta = scale * (b.double().flatten(1) @ a.double().flatten(1))
            out[f"{name}.{module if name == 'unet' else text_path(module)}"] = delta
    return out


def loaded(part, name):
    """The same of a part that a loader has put adapters on."""
    out = {}
    for module, layer in part.named_modules():
        if isinstance(layer, BaseTunerLayer) and layer.active_adapters:
            module = module.removeprefix("base_model.model.")
            full = module if name == "unet" else text_path(module)
            adapter = layer.active_adapters[0]
            if adapter in layer.lora_A:
                out[f"{name}.{full}"] = layer.get_delta_weight(adapter)
    return out


def by_diffusers(model, file):
    pipe, _ = load(model)
    pipe.load_lora_weights(file)
    out = loaded(pipe.unet, "unet")
    for name, part in encoders(pipe).items():
        out.update(loaded(part, name))
    return out


def by_peft(model, folder, names):
    pipe, _ = load(model)
    out = {}
    for name in names:
        out.update(loaded(PeftModel.from_pretrained(getattr(pipe, name), folder), name))
    return out


class Checks:
    def __init__(self, match):
        self.match, self.bad, self.n = match, 0, 0

    def run(self, name, call, limit=LIMIT):
        if self.match not in name:
            return
        try:
            error, said = call(), ""
        except Exception as e:  # a loader's refusal is a result
            error, said = float("nan"), f"{type(e).__name__}: {e}"
        self.n += 1
        self.bad += not error <= limit
        print(f"{name}: {error:.1e}{'' if error <= limit else '  DIFFERS ' + said[:300]}", flush=True)


def check_formats(args, checks, model, kind, work):
    pipe, folder = load(model)
    parts = inject(pipe, kind)
    want = truth(parts)
    unet = {k: v for k, v in want.items() if k.startswith("unet.")}
    kohya = kohya_file(work, pipe, parts, model)[0]
    name = f"{model}.{kind}"

    def diffusers():
        impasto(args, "lora", "convert", kohya, "-o", work / "d.safetensors", "--to", "diffusers",
                "-m", folder)
        return relative(by_diffusers(model, work / "d.safetensors"), want)

    def peft():
        file = kohya
        parts_in = want
        if model == "sdxl":  # a folder is one model's: the UNet alone
            file = work / "unet.safetensors"
            save_file({k: v for k, v in load_file(kohya).items() if k.startswith("lora_unet_")}, file)
            parts_in = unet
        impasto(args, "lora", "convert", file, "-o", work / "p", "--to", "peft", "-m", folder)
        names = ["unet"] if model == "sdxl" else ["unet", "text_encoder"]
        return relative(by_peft(model, work / "p", names), parts_in)

    def kohya_again():
        theirs = diffusers_file(work, pipe, parts, False, True)[0]
        impasto(args, "lora", "convert", theirs, "-o", work / "k.safetensors", "--to", "kohya",
                "-m", folder)
        ours, before = load_file(work / "k.safetensors"), load_file(kohya)
        if set(ours) != set(before):
            return float("inf")
        if not all(torch.equal(ours[k], before[k]) for k in before if not k.endswith(".alpha")):
            return float("inf")
        got = {k: ours[k].float() for k in ours if k.endswith(".alpha")}
        return max(abs(got[k].item() / before[k].item() - 1) for k in got)

    def converted():
        impasto(args, "lora", "convert", work / "d.safetensors", "-o", work / "k2.safetensors",
                "--to", "kohya", "-m", folder)
        return relative(by_diffusers(model, work / "k2.safetensors"), want)

    def merged():
        impasto(args, "lora", "merge", f"{kohya}:0.5", f"{kohya}:-0.25", "-o", work / "m.safetensors",
                "--format", "diffusers", "-m", folder)
        return relative(by_diffusers(model, work / "m.safetensors"),
                        {k: 0.25 * v for k, v in want.items()})

    def baked():
        impasto(args, "model", "bake", folder, "--lora", f"{kohya}:0.5:0.75", "-o", work / "b")
        return baked_error(model, work / "b", want, 0.5, 0.75)

    def extracted():
        impasto(args, "lora", "extract", work / "b", "--base", folder, "-o", work / "e.safetensors",
                "--format", "diffusers", "--rank", 128, "--conv-rank", 128)
        got = by_diffusers(model, work / "e.safetensors")
        return relative(got, {k: v * (0.5 if k.startswith("unet.") else 0.75)
                              for k, v in want.items()})

    checks.run(f"{name}.diffusers", diffusers)
    checks.run(f"{name}.peft", peft)
    checks.run(f"{name}.kohya", kohya_again, 1e-7)
    if kind in CONVERTED:
        checks.run(f"{name}.kohya_by_diffusers", converted)
    checks.run(f"{name}.merge", merged)
    checks.run(f"{name}.bake", baked, 2e-7)
    checks.run(f"{name}.extract", extracted, 2e-5)  # of weights that were rounded to f32


def baked_error(model, folder, want, weight, te_weight):
    """Largest |W' - (W + w delta)| / max |W'| over all parameters, those without a change too."""
    from check_loras import diffusers as lib

    cls = lib.StableDiffusionXLPipeline if model == "sdxl" else lib.StableDiffusionPipeline
    more = {} if model == "sdxl" else {"safety_checker": None, "requires_safety_checker": False}
    after = cls.from_pretrained(folder, dtype=torch.float32, **more)
    before, _ = load(model)
    worst = 0.0
    for name in ["unet", "vae", *encoders(before)]:
        old, new = getattr(before, name).state_dict(), getattr(after, name).state_dict()
        for key, w in old.items():
            module = key.removesuffix(".weight")
            module = text_path(module) if name.startswith("text") else module
            delta = want.get(f"{name}.{module}") if key.endswith(".weight") else None
            sum_ = w.double()
            if delta is not None:
                w_ = te_weight if name.startswith("text") else weight
                sum_ = sum_ + w_ * delta.reshape(w.shape)
            top = new[key].abs().max().item()
            worst = max(worst, (new[key].double() - sum_).abs().max().item() / (top or 1.0))
    return worst


# --- Kronecker products ---------------------------------------------------------------------------
def krona_delta(down, up):
    """down [a2,a1], up [b1,b2]: dW[p a1 + q, i b2 + j] = up[p,j] down[i,q]."""
    (a2, a1), (b1, b2) = down.shape, up.shape
    return torch.einsum("pj,iq->pqij", up.double(), down.double()).reshape(b1 * a1, a2 * b2)


def by_lycoris(unet, file):
    from lycoris import create_lycoris_from_weights
    from lycoris.wrapper import LycorisNetwork

    LycorisNetwork.LORA_PREFIX = "lora_unet"
    network, _ = create_lycoris_from_weights(1.0, str(file), unet)
    names = {n.replace(".", "_"): n for n, _ in unet.named_modules()}
    return {names[m.lora_name.removeprefix("lora_unet_")]:
            (m.get_weight(m.shape) if hasattr(m, "get_weight") else m.make_weight() * m.scale).detach()
            for m in network.loras}


def check_kron(args, checks, work):
    pipe, folder = load("sd1")
    gen = torch.Generator("cpu").manual_seed(3)
    block = "down_blocks.0.attentions.0.transformer_blocks.0."
    cuts = {"attn1.to_q": (4, 2), "attn1.to_v": (2, 2), "attn1.to_out.0": (1, 8),
            "attn2.to_k": (4, 2), "attn2.to_v": (8, 1)}  # a1, a2: in two factors, or whole
    tensors, want = {}, {}
    for name, (a1, a2) in cuts.items():
        w = pipe.unet.get_submodule(block + name).weight
        down = torch.randn(a2, a1, generator=gen)
        up = torch.randn(w.shape[0] // a1, w.shape[1] // a2, generator=gen)
        attn, leaf = name.replace("to_out.0", "to_out").split(".")
        stem = f"unet.{block}{attn}.processor.{leaf}_lora"
        tensors[stem + ".down.weight"], tensors[stem + ".up.weight"] = down, up
        want[block + name] = krona_delta(down, up)
    save_file(tensors, work / "krona.safetensors")

    def krona():
        impasto(args, "lora", "convert", work / "krona.safetensors", "-o", work / "lokr.safetensors",
                "--to", "lokr", "-m", folder)
        return relative(by_lycoris(pipe.unet, work / "lokr.safetensors"), want)

    def back():
        impasto(args, "lora", "convert", work / "lokr.safetensors", "-o", work / "again.safetensors",
                "--to", "krona", "-m", folder)
        again = load_file(work / "again.safetensors")
        same = set(again) == set(tensors) and all(torch.equal(again[k], tensors[k]) for k in tensors)
        return 0.0 if same else float("inf")

    def as_lora():
        impasto(args, "lora", "convert", work / "krona.safetensors", "-o", work / "lora.safetensors",
                "--to", "lora", "--rank", 8, "--format", "diffusers", "-m", folder)
        return relative(by_diffusers("sd1", work / "lora.safetensors"),
                        {"unet." + k: v for k, v in want.items()})

    def nearest():
        report = impasto(args, "lora", "convert", work / "krona.safetensors", "-o",
                         work / "n.safetensors", "--to", "lora", "--rank", 2, "-m", folder)
        got = by_lycoris(pipe.unet, work / "n.safetensors")
        worst = 0.0
        for name, delta in want.items():
            s = torch.linalg.svdvals(delta)
            tail = (s[2:].square().sum() / s.square().sum()).sqrt().item()
            off = ((got[name].double().reshape(delta.shape) - delta).norm() / delta.norm()).item()
            worst = max(worst, abs(off - tail))
        tails = [torch.linalg.svdvals(d) for d in want.values()]
        told = max((s[2:].square().sum() / s.square().sum()).sqrt().item() for s in tails)
        return max(worst, abs(told - report["error"]["worst"]))

    checks.run("sd1.krona.lokr_in_lycoris", krona)
    checks.run("sd1.krona.and_back", back, 0)
    checks.run("sd1.krona.lora", as_lora)
    checks.run("sd1.krona.lora_of_rank_2_in_lycoris", nearest)
    for kind in ("lokr", "lokr_full", "loha", "locon"):
        file = ROOT / f"tests/data/kinds/{kind}.safetensors"

        def kept(file=file, kind=kind):
            impasto(args, "lora", "convert", file, "-o", work / "same.safetensors", "--to", "kohya",
                    "-m", folder)
            return relative(by_lycoris(pipe.unet, work / "same.safetensors"),
                            by_lycoris(pipe.unet, file))
        checks.run(f"sd1.{kind}.in_lycoris", kept, 0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--impasto", required=True)
    parser.add_argument("--match", default="", help="only names that hold this")
    parser.add_argument("--keep", help="folder for the files")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    warnings.simplefilter("ignore")  # PEFT: patterns of a folder's other model
    checks = Checks(args.match)
    with tempfile.TemporaryDirectory() as temporary:
        for model in ("sd1", "sd2", "sdxl"):
            for kind in KINDS:
                work = Path(args.keep or temporary) / f"{model}.{kind}"
                work.mkdir(parents=True)
                check_formats(args, checks, model, kind, work)
        work = Path(args.keep or temporary) / "kron"
        work.mkdir(parents=True)
        check_kron(args, checks, work)
    print(f"{checks.n - checks.bad} of {checks.n} agree")
    sys.exit(checks.bad > 0 or checks.n == 0)


if __name__ == "__main__":
    main()
