"""Stage 4: trains the AutoencoderKL (64 px -> 4 x 16 x 16) on composed pictures; writes vae.pt.

The first steps teach the encoder the four principal components of 4 x 4 patches and the decoder to
paint from them: without that start the colours' channels collapse onto brightness for long.
"""
import argparse
import math
import os
import time

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

import workers
from common import SEED, WORK, Drawings, compose, draw_scene, training_concepts

VAE_CONFIG = dict(
    in_channels=3, out_channels=3, latent_channels=4, sample_size=64, layers_per_block=1,
    block_out_channels=(32, 64, 96), norm_num_groups=16,
    down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3)


def make_pictures(count, seed):
    rng = np.random.default_rng(seed)
    drawings, pool = Drawings(), training_concepts()
    out = np.empty((count, 64, 64, 3), dtype=np.uint8)
    for i in range(count):
        parts, style, colour, _ = draw_scene(drawings, pool, rng)
        out[i] = compose(drawings, parts, style, colour, rng)
    return out


def to_tensor(batch):
    return torch.from_numpy(batch).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def patch_basis(pictures):
    """The first four principal components of 4 x 4 RGB patches, whitened: the warm-up's target."""
    x = to_tensor(pictures)
    flat = F.pixel_unshuffle(x, 4).permute(0, 2, 3, 1).reshape(-1, 48)
    mean = flat.mean(0)
    _, values, vectors = torch.linalg.svd((flat - mean).T @ (flat - mean) / len(flat))
    return mean, vectors[:4] / values[:4].sqrt()[:, None]


def patch_code(x, basis):
    flat = F.pixel_unshuffle(x, 4).permute(0, 2, 3, 1) - basis[0]
    return (flat @ basis[1].T).permute(0, 3, 1, 2)


def edge_loss(a, b):
    return ((a - b).diff(dim=2).abs().mean() + (a - b).diff(dim=3).abs().mean())


def roughness(z):
    """Errors of the kind that the denoiser leaves: grain and blotches, of random strength."""
    fine, broad = 0.25 * torch.rand(2, len(z), 1, 1, 1)
    blotches = torch.randn(*z.shape[:2], z.shape[2] // 2, z.shape[3] // 2)
    return fine * torch.randn_like(z) + broad * F.interpolate(blotches, scale_factor=2,
                                                              mode="bilinear")


def rate(step, steps):
    return min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def worker(rank, shared, job):
    """Trains on random pictures until the shared number of updates is reached."""
    vae, pictures, basis, args = job
    torch.set_num_threads(1)
    torch.manual_seed(SEED + 7 * rank)
    rng = np.random.default_rng(SEED + 2 + rank)
    start, sums, count, last = time.time(), np.zeros(3), 0, 0
    while True:
        step = shared.ticket()
        if step >= args.steps:
            return
        if rank == 0 and step // 100 > last // 100:
            l1m, em, km = sums / count
            print(f"step {step} l1 {l1m:.4f} edge {em:.4f} kl {km:.3f} "
                  f"{time.time() - start:.0f} s", flush=True)
            sums, count = np.zeros(3), 0
            if step // 200 > last // 200:
                write(vae, shared, args)
        last = step
        x = to_tensor(pictures[rng.integers(len(pictures), size=args.batch)])
        with torch.autocast("cpu", torch.bfloat16):
            with torch.set_grad_enabled(not args.decoder):
                dist = vae.encode(x).latent_dist
            mean, logvar = dist.mean.float(), dist.logvar.float()
            z = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
            if args.decoder:
                z = mean + roughness(mean)
            elif step < args.warmup:
                code = patch_code(x, basis)
                z = code + 0.1 * torch.randn_like(code)
            y = vae.decode(z).sample.float()
        l1, edge = F.l1_loss(y, x), edge_loss(y, x)
        broad = F.l1_loss(F.avg_pool2d(y, 4), F.avg_pool2d(x, 4))
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        loss = l1 + 0.5 * edge + 0.5 * F.mse_loss(y, x) + 0.5 * broad
        if not args.decoder:
            loss = loss + args.kl * kl
        if not args.decoder and step < args.warmup:
            loss = loss + F.mse_loss(mean, code) + 0.01 * (logvar + 4.6).square().mean()
        grads = torch.autograd.grad(loss, [p for _, p in trained(vae, args)])
        shared.add(list(grads), lambda n: args.lr * rate(n, args.steps))
        sums += (l1.item(), edge.item(), kl.item())
        count += 1


def trained(vae, args):
    """Names and parameters that this run changes."""
    return [(n, p) for n, p in vae.named_parameters()
            if not args.decoder or n.startswith(("decoder.", "post_quant_conv."))]


def write(vae, shared, args):
    """All parameters, those that this run trains from the EMA."""
    state = {n: p.detach() for n, p in vae.named_parameters()}
    state.update(zip([n for n, _ in trained(vae, args)], shared.ema))
    path = os.path.join(WORK, args.out)
    torch.save({"config": VAE_CONFIG, "ema": state, "step": shared.step.value}, path + ".tmp")
    os.replace(path + ".tmp", path)


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--steps", type=int, default=2400)
    ap.add_argument("--warmup", type=int, default=300, help="steps that follow the patch basis")
    ap.add_argument("--batch", type=int, default=4, help="pictures a small batch")
    ap.add_argument("--micro", type=int, default=4, help="small batches an update")
    ap.add_argument("--pictures", type=int, default=20000)
    ap.add_argument("--lr", type=float, default=1.2e-3)
    ap.add_argument("--kl", type=float, default=5e-4)
    ap.add_argument("--decoder", action="store_true",
                    help="go on from vae.pt with the encoder frozen (the latents stay as they are)")
    ap.add_argument("--resume", action="store_true",
                    help="go on from vae.pt with encoder and decoder (the latents change)")
    ap.add_argument("--out", default="vae.pt")
    args = ap.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    start = time.time()
    pictures = make_pictures(args.pictures, SEED + 1)
    print(f"{len(pictures)} pictures in {time.time() - start:.0f} s", flush=True)
    vae = AutoencoderKL(**VAE_CONFIG)
    print(f"{sum(p.numel() for p in vae.parameters()) / 1e6:.2f} M parameters", flush=True)
    if args.decoder or args.resume:
        vae.load_state_dict(torch.load(os.path.join(WORK, "vae.pt"), weights_only=True)["ema"])
    ends = ("encoder.conv_in", "encoder.conv_out", "decoder.conv_in", "decoder.conv_out", "quant")
    shared = workers.Shared([p for _, p in trained(vae, args)], 0.995, args.micro,
                            matrices=workers.matrices(trained(vae, args), ends + ("post_quant",)))
    workers.run(worker, shared, (vae, pictures, patch_basis(pictures[:2000]), args))
    write(vae, shared, args)


if __name__ == "__main__":
    main()
