"""Trains the VAE (128 px -> 4 x 32 x 32) on scenes; later its decoder alone, from roughened latents.

The first steps teach the encoder the four principal components of 4 x 4 patches and the decoder to
paint from them: without that start the colours' channels collapse onto brightness for long.
"""
import math
import os
import time

import numpy as np
import torch
import torch.nn.functional as F

import fast
from common import SEED, WORK, Drawings, for_training
from nets import Vae
from optim import Clock, Optimizer, awaited, laid_out, mixed, saved, tuned
from scenes import Plan, Source

KL = 5e-4


def load_plan():
    """The training scenes that run.py planned."""
    data, plan = np.load(os.path.join(WORK, "plan.npz")), Plan(0)
    for name in Plan.ARRAYS:
        setattr(plan, name, data[name])
    return plan


def source(device):
    drawings = Drawings(device, for_training, torch.float16 if device != "cpu" else torch.float32)
    return Source(drawings, load_plan(), device)


def patch_basis(x):
    """The first four principal components of 4 x 4 RGB patches, whitened: the warm-up's target."""
    flat = F.pixel_unshuffle(x, 4).permute(0, 2, 3, 1).reshape(-1, 48).double()
    mean = flat.mean(0)
    values, vectors = torch.linalg.eigh((flat - mean).T @ (flat - mean) / len(flat))
    rows = vectors.T.flip(0)[:4] / values.flip(0)[:4].sqrt()[:, None]
    return mean.float(), rows.float().contiguous()


def patch_code(x, mean, rows):
    flat = F.pixel_unshuffle(x, 4).permute(0, 2, 3, 1) - mean
    return (flat @ rows.T).permute(0, 3, 1, 2)


def edge_loss(d):
    return d.diff(dim=2).abs().mean() + d.diff(dim=3).abs().mean()


def picture_loss(y, x):
    """(loss, L1): L1, squares, and edges at three sizes."""
    d = y - x
    l1 = d.abs().mean()
    loss = l1 + 0.5 * d.square().mean() + 0.5 * edge_loss(d)
    half = F.avg_pool2d(d, 2)
    quarter = F.avg_pool2d(half, 2)
    return loss + 0.25 * edge_loss(half) + 0.25 * edge_loss(quarter) + 0.5 * quarter.abs().mean(), l1


def roughness(z, fine, blotches, strength):
    """Errors of the kind that the denoiser leaves: grain and blotches, of random strength."""
    s = 0.25 * strength
    broad = F.interpolate(blotches, scale_factor=2, mode="bilinear")
    return s[0].view(-1, 1, 1, 1) * fine + s[1].view(-1, 1, 1, 1) * broad


def joint_loss(vae, device):
    def f(x, noise, mean_, rows, lead):
        """lead: 1 while the patch basis leads, 0 later."""
        with torch.autocast(device, torch.bfloat16, enabled=mixed(device)):
            mean, logvar = vae.encode(x)
            mean, logvar = mean.float(), logvar.float()
            code = patch_code(x, mean_, rows).float()
            z = torch.lerp(mean + torch.exp(0.5 * logvar) * noise, code + 0.1 * noise, lead)
            y = vae.decode(z).float()
        loss, l1 = picture_loss(y, x)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        follow = F.mse_loss(mean, code) + 0.01 * (logvar + 4.6).square().mean()
        return loss + KL * kl + lead * follow, torch.stack([l1, kl]).detach()
    return f


def decoder_loss(vae, device):
    def f(x, fine, blotches, strength):
        with torch.autocast(device, torch.bfloat16, enabled=mixed(device)):
            with torch.no_grad():
                mean, _ = vae.encode(x)
            mean = mean.float()
            y = vae.decode(mean + roughness(mean, fine, blotches, strength)).float()
        loss, l1 = picture_loss(y, x)
        return loss, l1.detach()
    return f


def train_joint(vae, step, pictures, batch, end, device, log, least, count):
    opt = Optimizer(vae.named_parameters(), 1.2e-3, 1.2e-3, 0.998, 1e-3,
                    ("encoder.conv_in", "encoder.conv_out", "decoder.conv_in", "decoder.conv_out",
                     "quant", "post_quant"))
    basis = patch_basis(pictures.at(torch.arange(min(count, len(pictures)), device=device)))
    clock, sums, last = Clock(end), torch.zeros(2, device=device), 0
    while opt.count < least or clock.passed() < 1:
        p = clock.passed()
        lead = torch.tensor(max(0.0, min(1.0, (0.10 - p) / 0.04)), device=device)
        x = pictures.at(torch.randint(len(pictures), (batch,), device=device))
        loss, parts = step(x, torch.randn(batch, 4, 32, 32, device=device), *basis, lead)
        loss.backward()
        opt.step(min(1.0, (opt.count + 1) / 100) * (0.02 + 0.49 * (1 + math.cos(math.pi * p))))
        sums += parts
        if opt.count % 200 == 0 or opt.count == least:
            l1, kl = (sums / (opt.count - last)).tolist()
            log(f"step {opt.count} l1 {l1:.4f} kl {kl:.3f} {time.time() - clock.start:.0f} s")
            sums.zero_()
            last = opt.count
    log(f"{opt.count} steps of {batch} in {time.time() - clock.start:.0f} s")
    with torch.no_grad():
        for p, e in zip(vae.parameters(), opt.ema):
            p.copy_(e)


@torch.no_grad()
def scaling(vae, pictures, device, log, count):
    """The factor that makes latents' deviation one; logs how well pictures come back."""
    m, s, worst = [], [], []
    for i in range(0, min(count, len(pictures)), 128):
        x = pictures.at(torch.arange(i, min(i + 128, count, len(pictures)), device=device))
        with torch.autocast(device, torch.bfloat16, enabled=mixed(device)):
            mean, logvar = vae.encode(x)
            y = vae.decode(mean)
        m.append(mean.float())
        s.append(torch.exp(0.5 * logvar.float()))
        worst.append((y.float() - x).square().mean())
    m, s = torch.cat(m), torch.cat(s)
    scale = float(1.0 / ((m.square() + s.square()).mean() - m.mean() ** 2).sqrt())
    psnr = 10 * math.log10(4 / float(torch.stack(worst).mean()))
    log(f"scaling factor {scale:.4f} posterior deviation {float(s.mean()):.3f} channel means "
        f"{[round(v, 3) for v in m.mean(dim=(0, 2, 3)).tolist()]} deviations "
        f"{[round(v, 3) for v in m.std(dim=(0, 2, 3)).tolist()]} PSNR {psnr:.2f} dB")
    return scale


def train_decoder(vae, step, pictures, batch, end, device, log, least):
    named = [(n, p) for n, p in vae.named_parameters() if n.startswith(("decoder.", "post_quant"))]
    opt = Optimizer(named, 6e-4, 6e-4, 0.995, 1e-3, ("decoder.conv_in", "decoder.conv_out", "post"))
    clock, sums, last = Clock(end), torch.zeros((), device=device), 0
    while opt.count < least or clock.passed() < 1:
        x = pictures.at(torch.randint(len(pictures), (batch,), device=device))
        loss, l1 = step(x, torch.randn(batch, 4, 32, 32, device=device),
                        torch.randn(batch, 4, 16, 16, device=device),
                        torch.rand(2, batch, device=device))
        loss.backward()
        opt.step(min(1.0, (opt.count + 1) / 50)
                 * (0.01 + 0.495 * (1 + math.cos(math.pi * clock.passed()))))
        sums += l1
        if opt.count % 200 == 0 or opt.count == least:
            log(f"decoder step {opt.count} l1 {sums.item() / (opt.count - last):.4f}")
            sums.zero_()
            last = opt.count
    log(f"decoder: {opt.count} steps of {batch} in {time.time() - clock.start:.0f} s")
    with torch.no_grad():
        for (_, p), e in zip(named, opt.ema):
            p.copy_(e)


def keep(vae, scale, name, publish):
    state = {n: p.detach().cpu() for n, p in vae.named_parameters()}
    saved({"vae": state, "scale": scale}, os.path.join(WORK, name))
    publish(state, scale)


def main(args, log, publish):
    """Role of run.py: the joint training until args.vae_end, the decoder's until args.decoder_end."""
    device, batch = args.device, args.vae_batch
    tuned(device)
    torch.manual_seed(SEED)
    vae = laid_out(Vae(), device)
    log(f"{sum(p.numel() for p in vae.parameters()) / 1e6:.2f} M parameters, batch {batch}")
    fast.checked(device, log)
    awaited(os.path.join(WORK, "plan.npz"))
    pictures = source(device)
    torch.manual_seed(SEED + 1)
    log(f"{len(pictures)} scenes")
    train_joint(vae, joint_loss(vae, device), pictures, batch, args.vae_end, device, log, args.least, args.probe // 2)
    scale = scaling(vae, pictures, device, log, args.probe)
    keep(vae, scale, "vae.pt", publish)
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    awaited(os.path.join(WORK, "unet.done"), args.unet_end + args.patience)
    train_decoder(vae, decoder_loss(vae, device), pictures, batch, args.decoder_end, device, log, args.least)
    scaling(vae, pictures, device, log, args.probe)
    keep(vae, scale, "vae2.pt", publish)
