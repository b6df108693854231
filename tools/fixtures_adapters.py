#!/usr/bin/env python3
"""Writes tests/data/kinds: an adapter of every kind for models/sd1, and what it does.

    python3 tools/fixtures_adapters.py [--out DIR] [--krona krona.py]
    python3 tools/fixtures_adapters.py --real FILE --out REFERENCE.safetensors

Needs torch, diffusers, transformers, safetensors, lycoris-lora and peft.  Every change of a weight
comes from the modules of LyCORIS and PEFT themselves, in double: W' as their forward uses it, less W.
--krona: DiffuseKronA's own module, to check that the loops below are what it computes.
--real: the changes of a published file that needs no base weight, as products with a fixed vector
(delta v, v[i] = cos(i + 1)): for tests/test_adapter_kinds.c.
"""

import argparse
import importlib.util
import json
import re
import sys
from pathlib import Path

import diffusers
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent))

from fixtures import compose, pipelines  # noqa: E402
from fixtures.common import rand, save  # noqa: E402
from reference.regions import Change  # noqa: E402

from lycoris.functional.general import rebuild_tucker  # noqa: E402
from lycoris.functional.lokr import make_kron  # noqa: E402
from lycoris.modules.boft import ButterflyOFTModule  # noqa: E402
from lycoris.modules.diag_oft import DiagOFTModule  # noqa: E402
from lycoris.modules.full import FullModule  # noqa: E402
from lycoris.modules.glora import GLoRAModule  # noqa: E402
from lycoris.modules.ia3 import IA3Module  # noqa: E402
from lycoris.modules.locon import LoConModule  # noqa: E402
from lycoris.modules.loha import LohaModule  # noqa: E402
from lycoris.modules.lokr import LokrModule  # noqa: E402
from lycoris.modules.norms import NormModule  # noqa: E402

T = "down_blocks.0.attentions.0.transformer_blocks.0."
UNET = [T + "attn1.to_q", T + "attn2.to_k", T + "ff.net.0.proj", "down_blocks.0.attentions.0.proj_in",
        "down_blocks.0.resnets.0.conv1", "down_blocks.0.downsamplers.0.conv",
        "up_blocks.0.upsamplers.0.conv", "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"]
ATTENTION = [T + "attn1.to_q", T + "attn2.to_k", T + "attn1.to_out.0",
             "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"]
TEXT = ["text_model.encoder.layers.0.self_attn.q_proj", "text_model.encoder.layers.1.mlp.fc1"]
NORMS = ["down_blocks.0.resnets.0.norm1", T + "norm1", "conv_norm_out"]
TEXT_NORMS = ["text_model.encoder.layers.0.layer_norm1"]
GOLDEN = [T + "attn2.to_k", T + "ff.net.0.proj", "down_blocks.0.resnets.0.conv1", TEXT[0]]


class Base:
    """models/sd1: the weights of a module in double, by component and name."""

    def __init__(self, folder):
        self.folder = folder
        self.pipe = diffusers.StableDiffusionPipeline.from_pretrained(
            folder, safety_checker=None, requires_safety_checker=False)
        self.pipe.set_progress_bar_config(disable=True)

    def module(self, name):
        if name.startswith("text_model."):
            text = self.pipe.text_encoder
            full = name if any(n == name for n, _ in text.named_modules()) else name[11:]
            return text.get_submodule(full)
        return self.pipe.unet.get_submodule(name)

    def double(self, name):
        import copy
        return copy.deepcopy(self.module(name)).double()


def kohya(name):
    prefix = "lora_te_" if name.startswith("text_model.") else "lora_unet_"
    return prefix + name.replace(".", "_")


def fill(module, seed, gain=0.5):
    """Random parameters, exact in f32, of an effect below the weight's own."""
    gen = torch.Generator("cpu").manual_seed(seed)
    for name, p in sorted(module.named_parameters(), key=lambda item: item[0]):
        v = torch.randn(p.shape, generator=gen)
        if name.endswith("dora_scale"):
            v = p.detach().float() * (1 + 0.2 * v)
        elif name.endswith("rescale"):
            v = 1 + 0.2 * v
        else:
            v = gain * v / max(1.0, p[0].numel() ** 0.5 if p.ndim > 1 else 2.0)
        p.data.copy_(v.float())


def in_double(call):
    """LyCORIS inverts in float whatever it is given; here in the type it is given."""
    plain = torch.Tensor.float
    torch.Tensor.float = lambda self: self
    try:
        return call()
    finally:
        torch.Tensor.float = plain


def new_weight(m):
    """(W', b') of a LyCORIS module, by what its forward does."""
    w = m.org_module[0].weight.data
    if isinstance(m, FullModule):
        return w + m.weight, m.org_module[0].bias + m.bias if m.bias is not None else None
    if isinstance(m, NormModule):
        return m.make_weight()
    if isinstance(m, (DiagOFTModule, ButterflyOFTModule)):
        return in_double(m.make_weight), None
    if isinstance(m, IA3Module):
        return m.get_merged_weight()[0], None
    if isinstance(m, GLoRAModule):
        return w + m.get_diff_weight()[0], None
    diff = m.make_weight() * m.scale if isinstance(m, LoConModule) else m.get_weight(m.shape)
    return (m.apply_weight_decompose(w + diff) if m.wd else w + diff), None


def lycoris(base, cls, names, seed, **options):
    """{file key: tensor}, {module: (dW, db)}"""
    tensors, deltas = {}, {}
    for i, name in enumerate(names):
        org = base.double(name)
        m = cls(kohya(name), org, 1.0, **options).double()
        fill(m, seed + i)
        if isinstance(m, IA3Module) and m.weight.ndim > 1:
            m.weight.data = m.weight.data.reshape(m.weight.shape)
        w, b = new_weight(m)
        state = m.custom_state_dict()
        if state is None:
            state = m.state_dict()
        if isinstance(m, FullModule):
            state = {"diff": m.weight.data} | ({} if m.bias is None else {"diff_b": m.bias.data})
        for key, value in state.items():
            tensors[f"{kohya(name)}.{key}"] = value.detach().float()
        deltas[name] = (w.detach() - org.weight.data,
                        None if b is None else b.detach() - org.bias.data)
    return tensors, deltas


def peft_model(base, names, config, seed):
    """A PEFT adapter over one module at a time, as its file names it."""
    from peft import get_peft_model_state_dict, inject_adapter_in_model

    tensors, deltas = {}, {}
    for i, name in enumerate(names):
        holder = torch.nn.ModuleDict({"leaf": base.double(name)})
        org = {k: None if v is None else v.detach().clone()
               for k, v in (("weight", holder["leaf"].weight), ("bias", holder["leaf"].bias))}
        inject_adapter_in_model(config(), holder)
        holder = holder.double()
        layer = holder["leaf"]
        for key, p in layer.named_parameters():
            if "base_layer" in key:
                continue
            v = rand(seed + 17 * i + len(key), *p.shape)
            if "magnitude" in key or "ia3_l" in key:
                v = p.data.float() * (1 + 0.2 * v)
            else:
                v = 0.5 * v / max(1.0, p[0].numel() ** 0.5 if p.ndim > 1 else 2.0)
            p.data.copy_(v.float())
        state = get_peft_model_state_dict(holder)
        prefix = "text_encoder." if name.startswith("text_model.") else "unet."
        for key, value in state.items():
            short = key[key.index("leaf.") + 5:]
            tensors[f"{prefix}{name}.{short}"] = value.detach().float()
        layer.merge()
        merged = layer.get_base_layer()
        bias = None
        if org["bias"] is not None and not torch.equal(merged.bias.data, org["bias"]):
            bias = merged.bias.data - org["bias"]
        deltas[name] = (merged.weight.data - org["weight"], bias)
    return tensors, deltas


def krona_delta(down, up):
    """Row p*a1+q, column i*b2+j: up[p][j] down[i][q] (krona.py, three dimensional path)."""
    return torch.einsum("pj,iq->pqij", up, down).reshape(
        up.shape[0] * down.shape[1], down.shape[0] * up.shape[1])


def krona(base, names, seed, check):
    tensors, deltas = {}, {}
    for i, name in enumerate(names):
        out, width = base.module(name).weight.shape
        a1, a2 = (2, 4) if i % 2 else (4, 2)
        down = (0.5 * rand(seed + 2 * i, a2, a1)).double()
        up = (0.5 * rand(seed + 2 * i + 1, out // a1, width // a2)).double()
        block, leaf = re.match(r"(.+\.attn[12])\.to_(q|k|v|out)", name).groups()
        for side, value in (("down", down), ("up", up)):
            tensors[f"unet.{block}.processor.to_{leaf}_lora.{side}.weight"] = value.float()
        deltas[name] = (krona_delta(down, up), None)
        if check:
            m = check(width, out, rank=(a1, a2)).double()
            m.down.weight.data, m.up.weight.data = down, up
            x = rand(seed, 2, 3, width).double()
            assert torch.allclose(m(x), x @ deltas[name][0].T, rtol=1e-12, atol=1e-12), name
    return tensors, deltas


def oft_diag(base, names, seed):
    """Old LyCORIS: the blocks are R itself; formula of A1111's network_oft.py."""
    tensors, deltas = {}, {}
    for i, name in enumerate(names):
        w = base.double(name).weight.data
        size = 4 if w.shape[0] % 4 == 0 else 1
        r = (torch.eye(size) + 0.2 * rand(seed + i, w.shape[0] // size, size, size)).double()
        blocks = w.reshape(-1, size, *w.shape[1:])
        new = torch.einsum("knm,kn...->km...", r, blocks).reshape(w.shape)
        tensors[kohya(name) + ".oft_diag"] = r.float()
        r = r.float().double()
        new = torch.einsum("knm,kn...->km...", r, blocks).reshape(w.shape)
        deltas[name] = (new - w, None)
    return tensors, deltas


def lokr_flat(base, names, seed):
    """The first LyCORIS: inputs and taps of a kernel are cut together; make_kron's own product."""
    from lycoris.functional.general import factorization

    tensors, deltas = {}, {}
    for i, name in enumerate(names):
        shape = base.module(name).weight.shape
        out, width = factorization(shape[0]), factorization(shape[1:].numel())
        f = {k: (0.5 * rand(seed + 4 * i + j, *s)).double() for j, (k, s) in enumerate((
            ("lokr_w1_a", (out[0], 1)), ("lokr_w1_b", (1, width[0])),
            ("lokr_w2_a", (out[1], 2)), ("lokr_w2_b", (2, width[1]))))}
        f["alpha"] = torch.tensor(3.0, dtype=torch.float64)
        tensors.update({f"{kohya(name)}.{k}": v.float() for k, v in f.items()})
        deltas[name] = (lokr_of(f.get).reshape(shape), None)
    return tensors, deltas


def set_weight(base, names, seed):
    tensors, deltas = {}, {}
    for i, name in enumerate(names):
        w = base.double(name).weight.data
        new = (w * (1 + 0.3 * rand(seed + i, *w.shape))).float()
        tensors[kohya(name) + ".set_weight"] = new
        deltas[name] = (new.double() - w, None)
    return tensors, deltas


def cases(base, krona_class):
    from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig

    every, norms = UNET + TEXT, NORMS + TEXT_NORMS
    even = [n for n in every if "fc1" not in n]  # 37 outputs
    linear = [n for n in every if base.module(n).weight.ndim == 2]
    L = lambda cls, names=every, **o: lambda seed: lycoris(base, cls, names, seed, **o)
    P = lambda config, names=every: lambda seed: peft_model(base, names, config, seed)
    leaf = {"target_modules": ["leaf"]}
    return {
        "locon": L(LoConModule, lora_dim=2, alpha=1),
        "dora": L(LoConModule, lora_dim=2, alpha=1, weight_decompose=True, wd_on_out=True),
        "dora_in": L(LoConModule, lora_dim=2, alpha=1, weight_decompose=True, wd_on_out=False,
                     use_tucker=True),
        "loha": L(LohaModule, lora_dim=2, alpha=1),
        "loha_tucker": L(LohaModule, lora_dim=2, alpha=3, use_tucker=True),
        "loha_dora": L(LohaModule, lora_dim=3, alpha=1, weight_decompose=True),
        "lokr": L(LokrModule, lora_dim=1, alpha=2, decompose_both=True),
        "lokr_full": L(LokrModule, lora_dim=9, alpha=77, full_matrix=True),
        "lokr_half": L(LokrModule, lora_dim=1, alpha=0.5, factor=2),
        "lokr_tucker": L(LokrModule, lora_dim=1, alpha=0.5, use_tucker=True),
        "lokr_flat": lambda seed: lokr_flat(base, [n for n in every if ".conv" in n], seed),
        "lokr_dora": L(LokrModule, lora_dim=1, alpha=1, weight_decompose=True),
        "oft": L(DiagOFTModule, lora_dim=4, constraint=2.0**-10, rescaled=True),
        "oft_free": L(DiagOFTModule, lora_dim=2),
        "boft": L(ButterflyOFTModule, even, lora_dim=4, rescaled=True),
        "oft_diag": lambda seed: oft_diag(base, every, seed),
        "ia3": L(IA3Module),
        "ia3_in": L(IA3Module, train_on_input=True),
        "glora": L(GLoRAModule, lora_dim=2, alpha=1),
        "full": L(FullModule),
        "norm": L(NormModule, norms),
        "set": lambda seed: set_weight(base, every + norms[:1], seed),
        "krona": lambda seed: krona(base, ATTENTION, seed, krona_class),
        "peft_dora": P(lambda: LoraConfig(r=2, lora_alpha=3, use_dora=True, **leaf)),
        "peft_loha": P(lambda: LoHaConfig(r=2, alpha=3, init_weights=False, **leaf)),
        "peft_lokr": P(lambda: LoKrConfig(r=2, alpha=3, init_weights=False, **leaf)),
        "peft_ia3": P(lambda: IA3Config(feedforward_modules=[], init_ia3_weights=False, **leaf),
                      linear),
        "peft_ia3_in": P(lambda: IA3Config(feedforward_modules=["leaf"], init_ia3_weights=False,
                                           **leaf), linear),
    }


PEFT_META = {
    "peft_dora": {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "use_dora": True},
    "peft_loha": {"peft_type": "LOHA", "r": 2, "alpha": 3},
    "peft_lokr": {"peft_type": "LOKR", "r": 2, "alpha": 3},
    "peft_ia3": {"peft_type": "IA3"},
    "peft_ia3_in": {"peft_type": "IA3"},
}


class Applied:
    """models/sd1 with changes added to its weights, in f32, for the time of a with."""

    def __init__(self, base, parts):
        self.base, self.parts, self.kept = base, parts, []

    def __enter__(self):
        for deltas, weights in self.parts:
            for name, change in deltas.items():
                s = weights[name.startswith("text_model.")]
                m = self.base.module(name)
                for p, d in zip((m.weight, m.bias), change):
                    if d is None:
                        continue
                    self.kept.append((p, p.data.clone()))
                    p.data = (p.data.double() + s * d).float()

    def __exit__(self, *_):
        for p, value in reversed(self.kept):
            p.data = value


def make(base, out, krona_class):
    made = {}
    text = pipelines.text_tensors(base.pipe)
    ids = text["ids"][None].long()
    x, t = rand(61, 1, 4, 8, 10), 641
    golden = {"sample": x, "timestep": torch.tensor([float(t)]), "ids": text["ids"],
              "text_base": text["text"]}
    every = {}
    for i, (name, build) in enumerate(cases(base, krona_class).items()):
        tensors, deltas = build(1000 * (i + 1))
        meta = {"made_for": "models/sd1"}
        if name in PEFT_META:
            meta["lora_adapter_metadata"] = json.dumps(
                {f"{c}.{k}": v for c in ("unet", "text_encoder")
                 for k, v in PEFT_META[name].items()})
        save(out / f"{name}.safetensors", tensors, **meta)
        made[name] = deltas
        for module, (w, b) in deltas.items():
            if module in GOLDEN or w.ndim == 1 or (b is not None and module == TEXT[1]):
                every[f"{name}.{module}.weight"] = w
                if b is not None:
                    every[f"{name}.{module}.bias"] = b
        with Applied(base, [(deltas, (1.0, 1.0))]):
            golden[f"eps_{name}"] = base.pipe.unet(x, t, text["text"]).sample
            if any(n.startswith("text_model.") for n in deltas):
                golden[f"text_{name}"] = base.pipe.text_encoder(ids)[0]
        print(f"  {name}: {len(tensors)} tensors, {len(deltas)} modules", flush=True)
    mix = [("lokr_full", 0.7), ("dora", 0.5), ("loha", -0.4)]
    with Applied(base, [(made[n], (w, w)) for n, w in mix]):
        golden["eps_mix"] = base.pipe.unet(x, t, text["text"]).sample
        golden["text_mix"] = base.pipe.text_encoder(ids)[0]
    rows = ["lokr_tucker", "oft", "norm", "krona"]
    golden["eps_rows"] = torch.cat([golden[f"eps_{n}"] for n in rows])
    save(out / "golden_sd1.safetensors", golden, mix=mix, rows=rows)
    half = len(every) // 2
    keys = sorted(every)
    save(out / "golden_deltas_1.safetensors", {k: every[k] for k in keys[:half]})
    save(out / "golden_deltas_2.safetensors", {k: every[k] for k in keys[half:]})
    traces(base, out, made)
    regions(base, out, made)


def traces(base, out, made):
    """Four steps with one adapter of each way to act, and with three kinds mixed."""
    for name, parts in {
        "mix": [("lokr_full", 0.7), ("dora", 0.5), ("loha", 0.4)],
        "kron": [("lokr", 1.0)], "dense": [("oft", 1.0)], "vectors": [("norm", 1.0)],
    }.items():
        with Applied(base, [(made[n], (w, w)) for n, w in parts]):
            pipelines.trace_golden(
                out / f"golden_trace_{name}.safetensors", (base.pipe, Path(base.folder)), "ddim", 4,
                7.5, 8, (32, 24), notes={"kinds": " ".join(f"{n}:{w}:{w}" for n, w in parts)})


def regions(base, out, made):
    """Every way to act, bound to soft masks that overlap."""
    # vectors and whole kernels; a Kronecker product is the matrix that it stands for
    parts, masks = {"lokr": 1.0, "full": 1.0, "norm": 1.0}, ("ramp", "hill", "corner")
    changes = {n: {m: Change(*[None if d is None else s * d for d in change], change[0].ndim > 1)
                   for m, change in made[n].items() if not m.startswith("text_model.")}
               for n, s in parts.items()}
    sampler, steps, size = "ddim", 3, (40, 24)
    areas = [(mask, f"lora:{n}") for mask, n in zip(masks, parts)] + [("left", "sks dog")]
    got = compose.regions_trace((base.pipe, Path(base.folder)), changes, sampler, steps, size, areas)
    compose.save_regions(out / "golden_trace_regions.safetensors", got, "sd1",
                         ";".join(f"{n}:{s}:0" for n, s in parts.items()), sampler, steps, size, areas)


# --- published files ------------------------------------------------------------------------------
def probe(n):
    return torch.cos(torch.arange(1, n + 1, dtype=torch.float64))


def lokr_of(get):
    w1, w2 = get("lokr_w1"), get("lokr_w2")
    rank = None
    if w1 is None:
        rank = get("lokr_w1_b").shape[0]
        w1 = get("lokr_w1_a") @ get("lokr_w1_b")
    if w2 is None:
        a, b, t2 = get("lokr_w2_a"), get("lokr_w2_b"), get("lokr_t2")
        rank = b.shape[0]
        w2 = a @ b if t2 is None else rebuild_tucker(t2, a, b)
    return make_kron(w1, w2, 1.0 if rank is None else float(get("alpha")) / rank)


def real(path, out):
    """{key without ending: delta v} of a LoRA or LoKr file, whatever its names."""
    with safe_open(path, "pt") as f:
        tensors = {k: f.get_tensor(k).double() for k in f.keys()}
    pairs = [(".down.weight", ".up.weight"), (":down", ":up"), (".lora_down.weight", ".lora_up.weight")]
    result = {}
    for key in sorted(tensors):
        if ".lokr_" in key:
            stem = key[: key.index(".lokr_")]
            if stem not in result:
                delta = lokr_of(lambda k: tensors.get(f"{stem}.{k}"))
                # a factored kernel's columns are (input, tap); v runs over the file's order
                result[stem] = delta.flatten(1) @ probe(delta[0].numel())
            continue
        for down, up in pairs:
            if key.endswith(down):
                stem = key[: -len(down)]
                a, b = tensors[key].flatten(1), tensors[stem + up].flatten(1)
                alpha = tensors.get(stem + ".alpha")
                s = 1.0 if alpha is None else float(alpha) / a.shape[0]
                result[stem] = s * (b @ (a @ probe(a.shape[1])))
    save(out, result, file=Path(path).name)
    print(f"{path}: {len(result)} modules")


def main():
    root = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default=root / "tests/data/kinds")
    parser.add_argument("--krona", help="DiffuseKronA's krona.py")
    parser.add_argument("--real", help="a published adapter file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    if args.real:
        real(args.real, args.out)
        return
    krona_class = None
    if args.krona:
        spec = importlib.util.spec_from_file_location("krona", args.krona)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        krona_class = next(v for k, v in vars(module).items() if k.startswith("KronA") or "Kron" in k)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    make(Base(root / "tests/data/models/sd1"), out, krona_class)


if __name__ == "__main__":
    main()
