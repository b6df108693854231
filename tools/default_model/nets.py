"""The model's three networks in plain PyTorch, with diffusers' and transformers' names of weights.

The machine that trains has no diffusers; its classes load these state dicts as they are.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

from fast import normed

VAE_CONFIG = dict(
    in_channels=3, out_channels=3, latent_channels=4, sample_size=128, layers_per_block=1,
    block_out_channels=(32, 64, 96), norm_num_groups=16,
    down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3)
UNET_CONFIG = dict(
    sample_size=32, in_channels=4, out_channels=4, layers_per_block=1,
    block_out_channels=(64, 128, 192), cross_attention_dim=192, attention_head_dim=4,
    norm_num_groups=32,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"))
TEXT_CONFIG = dict(
    vocab_size=2000, hidden_size=192, intermediate_size=768, projection_dim=192,
    num_hidden_layers=4, num_attention_heads=4, hidden_act="quick_gelu",
    max_position_embeddings=77, bos_token_id=1998, eos_token_id=1999, pad_token_id=1999)
SCHEDULER_CONFIG = dict(
    num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
    clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type="v_prediction")


class Resnet(nn.Module):
    def __init__(self, c_in, c_out, groups, eps, time=None):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, c_in, eps), nn.Conv2d(c_in, c_out, 3, 1, 1)
        if time:
            self.time_emb_proj = nn.Linear(time, c_out)
        self.norm2, self.conv2 = nn.GroupNorm(groups, c_out, eps), nn.Conv2d(c_out, c_out, 3, 1, 1)
        if c_in != c_out:
            self.conv_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x, temb=None):
        h = self.conv1(normed(x, self.norm1))
        if temb is not None:
            h = h + self.time_emb_proj(F.silu(temb))[:, :, None, None]
        h = self.conv2(normed(h, self.norm2))
        return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class Attention(nn.Module):
    """to_q, to_k, to_v, to_out.0; a VAE's has biases and its own norm."""

    def __init__(self, c, context=None, heads=1, bias=False, groups=None):
        super().__init__()
        if groups:
            self.group_norm = nn.GroupNorm(groups, c, 1e-6)
        self.heads = heads
        self.to_q, self.to_k = nn.Linear(c, c, bias), nn.Linear(context or c, c, bias)
        self.to_v, self.to_out = nn.Linear(context or c, c, bias), nn.ModuleList([nn.Linear(c, c)])

    def forward(self, x, context=None):
        context = x if context is None else context
        q, k, v = (f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for f, y in ((self.to_q, x), (self.to_k, context), (self.to_v, context)))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.to_out[0](y.transpose(1, 2).flatten(2))


def as_tokens(x):
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def as_picture(tokens, like):
    return tokens.unflatten(1, like.shape[2:]).permute(0, 3, 1, 2)


class PictureAttention(Attention):
    """The VAE's middle attention."""

    def __init__(self, c, groups):
        super().__init__(c, None, 1, True, groups)

    def forward(self, x):
        return x + as_picture(super().forward(as_tokens(normed(x, self.group_norm, False))), x)


class GatedProjection(nn.Module):
    def __init__(self, c, inner):
        super().__init__()
        self.proj = nn.Linear(c, 2 * inner)

    def forward(self, x):
        value, gate = self.proj(x).chunk(2, -1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.net = nn.ModuleList([GatedProjection(c, 4 * c), nn.Identity(), nn.Linear(4 * c, c)])

    def forward(self, x):
        return self.net[2](self.net[0](x))


class Block(nn.Module):
    """Self-attention, cross-attention, feed-forward."""

    def __init__(self, c, context, heads):
        super().__init__()
        self.norm1, self.attn1 = nn.LayerNorm(c), Attention(c, None, heads)
        self.norm2, self.attn2 = nn.LayerNorm(c), Attention(c, context, heads)
        self.norm3, self.ff = nn.LayerNorm(c), FeedForward(c)

    def forward(self, x, context):
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer(nn.Module):
    def __init__(self, c, context, heads, groups):
        super().__init__()
        self.norm, self.proj_in = nn.GroupNorm(groups, c, 1e-6), nn.Conv2d(c, c, 1)
        self.transformer_blocks = nn.ModuleList([Block(c, context, heads)])
        self.proj_out = nn.Conv2d(c, c, 1)

    def forward(self, x, context):
        h = self.proj_in(normed(x, self.norm, False))
        tokens = as_tokens(h)
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        return x + self.proj_out(as_picture(tokens, h))


class Down(nn.Module):
    """The VAE's halving pads right and below, the UNet's on all sides."""

    def __init__(self, c, vae=False):
        super().__init__()
        self.conv, self.vae = nn.Conv2d(c, c, 3, 2, 0 if vae else 1), vae

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.vae else x)


class Up(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, 1, 1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Resnets, each with its transformer where the level has them, and what changes the size."""

    def __init__(self, resnets, attentions=None, down=None, up=None):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        if attentions:
            self.attentions = nn.ModuleList(attentions)
        if down:
            self.downsamplers = nn.ModuleList([down])
        if up:
            self.upsamplers = nn.ModuleList([up])

    def step(self, i, x, temb, context):
        x = self.resnets[i](x, temb)
        return self.attentions[i](x, context) if hasattr(self, "attentions") else x


class Middle(nn.Module):
    def __init__(self, c, groups, eps, time, attention):
        super().__init__()
        self.resnets = nn.ModuleList([Resnet(c, c, groups, eps, time) for _ in range(2)])
        self.attentions = nn.ModuleList([attention])

    def forward(self, x, temb=None, *context):
        x = self.attentions[0](self.resnets[0](x, temb), *context)
        return self.resnets[1](x, temb)


class Encoder(nn.Module):
    def __init__(self, k):
        super().__init__()
        ch, g = k["block_out_channels"], k["norm_num_groups"]
        self.conv_in = nn.Conv2d(3, ch[0], 3, 1, 1)
        self.down_blocks = nn.ModuleList([
            Level([Resnet(ch[max(i - 1, 0)] if j == 0 else c, c, g, 1e-6)
                   for j in range(k["layers_per_block"])],
                  down=Down(c, True) if i + 1 < len(ch) else None) for i, c in enumerate(ch)])
        self.mid_block = Middle(ch[-1], g, 1e-6, None, PictureAttention(ch[-1], g))
        self.conv_norm_out = nn.GroupNorm(g, ch[-1], 1e-6)
        self.conv_out = nn.Conv2d(ch[-1], 2 * k["latent_channels"], 3, 1, 1)

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.down_blocks:
            for i in range(len(level.resnets)):
                x = level.step(i, x, None, None)
            if hasattr(level, "downsamplers"):
                x = level.downsamplers[0](x)
        return self.conv_out(normed(self.mid_block(x), self.conv_norm_out))


class Decoder(nn.Module):
    def __init__(self, k):
        super().__init__()
        ch, g = k["block_out_channels"][::-1], k["norm_num_groups"]
        self.conv_in = nn.Conv2d(k["latent_channels"], ch[0], 3, 1, 1)
        self.mid_block = Middle(ch[0], g, 1e-6, None, PictureAttention(ch[0], g))
        self.up_blocks = nn.ModuleList([
            Level([Resnet(ch[max(i - 1, 0)] if j == 0 else c, c, g, 1e-6)
                   for j in range(k["layers_per_block"] + 1)],
                  up=Up(c) if i + 1 < len(ch) else None) for i, c in enumerate(ch)])
        self.conv_norm_out = nn.GroupNorm(g, ch[-1], 1e-6)
        self.conv_out = nn.Conv2d(ch[-1], 3, 3, 1, 1)

    def forward(self, z):
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            for i in range(len(level.resnets)):
                x = level.step(i, x, None, None)
            if hasattr(level, "upsamplers"):
                x = level.upsamplers[0](x)
        return self.conv_out(normed(x, self.conv_norm_out))


class Vae(nn.Module):
    def __init__(self, config=None):
        super().__init__()
        k = config or VAE_CONFIG
        n = k["latent_channels"]
        self.encoder, self.decoder = Encoder(k), Decoder(k)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(2 * n, 2 * n, 1), nn.Conv2d(n, n, 1)

    def encode(self, x):
        """(mean, log variance), unscaled."""
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, 1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z):
        return self.decoder(self.post_quant_conv(z))


class TimeMlp(nn.Module):
    def __init__(self, c, out):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(c, out), nn.Linear(out, out)

    def forward(self, t):
        return self.linear_2(F.silu(self.linear_1(t)))


def timestep_waves(t, c):
    """[cos, sin] of t at c/2 frequencies from 1 down to 1/10000 (flip_sin_to_cos, shift 0)."""
    f = torch.exp(-math.log(10000.0) * torch.arange(c // 2, device=t.device, dtype=torch.float32)
                  / (c // 2))
    angle = t.float()[:, None] * f
    return torch.cat([angle.cos(), angle.sin()], -1)


class Unet(nn.Module):
    def __init__(self, config=None):
        super().__init__()
        k = config or UNET_CONFIG
        ch, g, layers = k["block_out_channels"], k["norm_num_groups"], k["layers_per_block"]
        heads, context, time = k["attention_head_dim"], k["cross_attention_dim"], 4 * ch[0]
        self.conv_in = nn.Conv2d(k["in_channels"], ch[0], 3, 1, 1)
        self.time_embedding = TimeMlp(ch[0], time)

        def transformers(kind, c, count):
            return [Transformer(c, context, heads, g) for _ in range(count)] if "Cross" in kind else None

        skips = [ch[0]]
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        for i, c in enumerate(ch):
            last = i + 1 == len(ch)
            self.down_blocks.append(Level(
                [Resnet(ch[max(i - 1, 0)] if j == 0 else c, c, g, 1e-5, time) for j in range(layers)],
                transformers(k["down_block_types"][i], c, layers), down=None if last else Down(c)))
            skips += [c] * (layers + (not last))
        self.mid_block = Middle(ch[-1], g, 1e-5, time, Transformer(ch[-1], context, heads, g))
        below = ch[-1]
        for i, c in enumerate(ch[::-1]):
            resnets = []
            for _ in range(layers + 1):
                resnets.append(Resnet(below + skips.pop(), c, g, 1e-5, time))
                below = c
            self.up_blocks.append(Level(resnets, transformers(k["up_block_types"][i], c, layers + 1),
                                        up=None if i + 1 == len(ch) else Up(c)))
        self.conv_norm_out = nn.GroupNorm(g, ch[0], 1e-5)
        self.conv_out = nn.Conv2d(ch[0], k["out_channels"], 3, 1, 1)

    def forward(self, x, t, context):
        kind = self.conv_in.weight.dtype
        x, context = x.to(kind), context.to(kind)
        temb = self.time_embedding(timestep_waves(t, self.conv_in.out_channels).to(kind))
        x = self.conv_in(x)
        skips = [x]
        for level in self.down_blocks:
            for i in range(len(level.resnets)):
                x = level.step(i, x, temb, context)
                skips.append(x)
            if hasattr(level, "downsamplers"):
                x = level.downsamplers[0](x)
                skips.append(x)
        x = self.mid_block(x, temb, context)
        for level in self.up_blocks:
            for i in range(len(level.resnets)):
                x = level.step(i, torch.cat([x, skips.pop()], 1), temb, context)
            if hasattr(level, "upsamplers"):
                x = level.upsamplers[0](x)
        return self.conv_out(normed(x, self.conv_norm_out))


class TextAttention(nn.Module):
    def __init__(self, c, heads):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(c, c) for _ in range(3))
        self.out_proj = nn.Linear(c, c)

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for f in (self.q_proj, self.k_proj, self.v_proj))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(y.transpose(1, 2).flatten(2))


class TextMlp(nn.Module):
    def __init__(self, c, inner):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(c, inner), nn.Linear(inner, c)

    def forward(self, x):
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))


class TextLayer(nn.Module):
    def __init__(self, c, heads, inner):
        super().__init__()
        self.layer_norm1, self.self_attn = nn.LayerNorm(c), TextAttention(c, heads)
        self.layer_norm2, self.mlp = nn.LayerNorm(c), TextMlp(c, inner)

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class TextEmbeddings(nn.Module):
    def __init__(self, vocabulary, c, length):
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary, c)
        self.position_embedding = nn.Embedding(length, c)

    def forward(self, ids):
        # index_select: its gradient is one kernel that needs no word from the host
        tokens = self.token_embedding.weight.index_select(0, ids.flatten()).view(*ids.shape, -1)
        return tokens + self.position_embedding.weight[:ids.shape[1]]


class TextModel(nn.Module):
    def __init__(self, k):
        super().__init__()
        c = k["hidden_size"]
        self.embeddings = TextEmbeddings(k["vocab_size"], c, k["max_position_embeddings"])
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList([
            TextLayer(c, k["num_attention_heads"], k["intermediate_size"])
            for _ in range(k["num_hidden_layers"])])
        self.final_layer_norm = nn.LayerNorm(c)


class Text(nn.Module):
    """CLIP's text encoder up to the last hidden state after the final norm."""

    def __init__(self, config=None):
        super().__init__()
        self.text_model = TextModel(config or TEXT_CONFIG)

    def forward(self, ids):
        x = self.text_model.embeddings(ids)
        for layer in self.text_model.encoder.layers:
            x = layer(x)
        return self.text_model.final_layer_norm(x)


def started(unet, text):
    """Starting weights: residual branches of the UNet begin at nothing, the text encoder as CLIP's."""
    with torch.no_grad():
        for name, p in unet.named_parameters():
            if name.endswith(("conv2.weight", "proj_out.weight")) or name.startswith("conv_out"):
                p.zero_()
        for name, p in text.named_parameters():
            if p.ndim > 1:
                p.normal_(0, 0.02)
            elif name.endswith("bias"):
                p.zero_()
    return unet, text


def alphas_cumprod(device="cpu"):
    k = SCHEDULER_CONFIG
    betas = torch.linspace(k["beta_start"] ** 0.5, k["beta_end"] ** 0.5, k["num_train_timesteps"],
                           dtype=torch.float32) ** 2
    return torch.cumprod(1 - betas, 0).to(device)


@torch.no_grad()
def sampled(unet, cond, none, noise, steps=20, cfg=5.0):
    """DDIM (Song et al. 2021, eta 0) on v predictions, timesteps 'leading' with offset 1."""
    alphas = alphas_cumprod(noise.device)
    stride = 1000 // steps
    cond, x = torch.cat([none.expand_as(cond), cond]), noise
    for t in [i * stride + 1 for i in range(steps)][::-1]:
        a2 = alphas[t]
        b2 = alphas[t - stride] if t >= stride else alphas[0]
        at = torch.full((2 * len(x),), t, device=x.device)
        un, co = unet(torch.cat([x, x]), at, cond).float().chunk(2)
        v = un + cfg * (co - un)
        x0, eps = a2.sqrt() * x - (1 - a2).sqrt() * v, a2.sqrt() * v + (1 - a2).sqrt() * x
        x = b2.sqrt() * x0 + (1 - b2).sqrt() * eps
    return x
