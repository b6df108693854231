"""Writes tests/data/default_model_golden.safetensors: diffusers, f32 on the CPU, f16 weights."""
import os

import diffusers
import torch
import transformers
from diffusers import DDIMScheduler
from safetensors.torch import save_file

from common import MODELS, ROOT, threads
from sample import load

PROMPT, NEGATIVE, SEED, STEPS, CFG = "a dog and a rocket", "", 7, 20, 5.0


@torch.no_grad()
def main():
    torch.set_num_threads(threads())
    pipe = load(os.path.join(MODELS, "default"))
    out = {}

    def ids_of(text):
        return pipe.tokenizer(text, padding="max_length", max_length=77, truncation=True,
                              return_tensors="pt").input_ids

    ids, ids_negative = ids_of(PROMPT), ids_of(NEGATIVE)
    out["ids"], out["ids_negative"] = ids[0].int(), ids_negative[0].int()
    text = pipe.text_encoder(ids).last_hidden_state
    negative = pipe.text_encoder(ids_negative).last_hidden_state
    out["text"] = text  # the negative's is left out for size: every latent depends on it
    torch.manual_seed(SEED)
    x = torch.randn(1, 4, 16, 16)
    out["noise"] = x.clone()
    sched = DDIMScheduler.from_config(pipe.scheduler.config)
    sched.set_timesteps(STEPS)
    x = x * sched.init_noise_sigma
    for i, t in enumerate(sched.timesteps):
        un = pipe.unet(x, t, negative).sample
        co = pipe.unet(x, t, text).sample
        eps = un + CFG * (co - un)
        if i == 0:
            out["eps_step0"] = eps
        x = sched.step(eps, t, x).prev_sample
        if i % 2 == 0 or i == STEPS - 1:
            out[f"latent_step{i}"] = x
    y = pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample
    out["image"] = (y / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    path = os.path.join(ROOT, "tests/data/default_model_golden.safetensors")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    save_file({k: v.contiguous() for k, v in out.items()}, path, metadata={
        "prompt": PROMPT, "negative": NEGATIVE, "seed": str(SEED), "steps": str(STEPS),
        "cfg": str(CFG), "sampler": "ddim", "timesteps": " ".join(str(int(t)) for t in sched.timesteps),
        "torch": torch.__version__, "diffusers": diffusers.__version__,
        "transformers": transformers.__version__, "source": "tools/default_model/golden.py"})
    print(path, os.path.getsize(path), "bytes")


if __name__ == "__main__":
    main()
