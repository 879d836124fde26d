"""ControlNet: a frozen text-to-image model learns to follow a map (edges, depth, segments).

The U-Net of a trained latent diffusion model is frozen. A copy of its way down and its middle, born with the same weights, reads the same z_t, t and
words, and beside them a hint, brought to the size of the latents by a few convolutions and added to the copy's first map. What the copy sees goes
through 1x1 convolutions that start at exactly zero and is added to the frozen network's skip connections and middle:

    y = F(x; frozen) + Z(F(x + Z(c; z_1); copy); z_2),    Z(.; 0) = 0                                            (equation 2)

so that at birth nothing is changed, and harm is learned at no time before use. The first step moves only the outer zero convolutions, the second also
the copy, the third also the hint's convolutions. The loss is the usual one, with half of the captions dropped, so that the map must carry meaning.

Several kinds of map have a copy each; what they add is summed, each with its own strength. `guess` (no words needed): what is added grows from 0.1
to 1 with depth, on the side with words only. `weighting`: the same side only, each map's share times 64 over its size (section 3.3).
`data.hints` takes outlines and straight lines from photographs; maps of other kinds are given as pictures.
"""
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polysense.archetypes.denoiser import Sampler
from polysense.archetypes.latent_diffusion import LatentDiffusion
from polysense.archetypes.stable_diffusion import PARAMETERS as BASE
from polysense.archetypes.stable_diffusion import TINY_WORDS, WORDS, pictures, standing_on, tiny_base, version_1
from polysense.base.card import Card
from polysense.base.errors import UserError
from polysense.base.system import Batch, Losses, Optim, Preset, Stage, final
from polysense.nn.spatial import zeroed
from polysense.nn.unet import UNet, UNetHalf
from polysense.weights import controlnet as layouts

card = Card(
    name="ControlNet", paper="Zhang et al., Adding Conditional Control to Text-to-Image Diffusion Models, ICCV 2023",
    arxiv="2302.05543", year=2023, says="Makes a text-to-image model follow a drawing-like map.",
    needs=("image", "text", "hint"), can=("generate_image", "reconstruct"), official="lllyasviel/ControlNet",
)

PARAMETERS = BASE + 361_279_120              # Stable Diffusion 1, and the copy with its convolutions as published

weights = {"diffusers": layouts.DIFFUSERS, "original": layouts.ORIGINAL}


class HintEncoder(nn.Module):
    """hint [B,3,H,W] -> [B,width,H/f,W/f] by 3x3 convolutions, f = 2 ** (len(widths) - 1); the last one starts at zero."""

    def __init__(self, widths: tuple[int, ...], width: int):
        super().__init__()
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1, stride=s) for i in range(len(widths) - 1)
                                    for a, b, s in ((widths[i], widths[i], 1), (widths[i], widths[i + 1], 2)))
        self.conv_out = zeroed(nn.Conv2d(widths[-1], width, 3, padding=1))

    def forward(self, hint: Tensor) -> Tensor:
        x = F.silu(self.conv_in(hint))
        for block in self.blocks:
            x = F.silu(block(x))
        return self.conv_out(x)


class Control(nn.Module):
    """One kind of map: `listen` (the hint's convolutions), `copy` (half a U-Net) and `whisper` (a zero convolution for each of its maps)."""

    def __init__(self, unet: UNet.Config, widths: tuple[int, ...]):
        super().__init__()
        half = UNetHalf.Config(levels=unet.levels, channels=unet.channels, mid=unet.mid, block=unet.block, time=unet.time, pad=unet.pad)
        self.copy, self.listen = UNetHalf(half), HintEncoder(widths, unet.levels[0].width)
        self.whisper: Any = nn.ModuleList(zeroed(nn.Conv2d(w, w, 1)) for w in (*half.skips, unet.levels[-1].width))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, z: Tensor, t: Tensor, context: Tensor, hint: Tensor) -> list[Tensor]:
        """What is added to each skip connection, first to last, and to the middle."""
        seen = self.copy.encode(z, self.copy.told(z, t), context, hint=self.listen(hint))
        return [zero(s) for zero, s in zip(self.whisper, seen, strict=True)]


@final
class ControlNet(LatentDiffusion):
    @dataclass(frozen=True, kw_only=True)
    class Config(LatentDiffusion.Config):
        hint_widths: tuple[int, ...] = (16, 32, 96, 256)
        kinds: int = 1                       # of maps; `hint` holds 3 channels of each

    hears = ("hint", "strength", "guess", "weighting")

    def __init__(self, c: Config):
        super().__init__(c)
        if 2 ** (len(c.hint_widths) - 1) != c.vae.stride:
            raise UserError(f"hint_widths={c.hint_widths} shrink by {2 ** (len(c.hint_widths) - 1)}", f"the latents do by {c.vae.stride}")
        self.kinds = c.kinds
        self.controls: Any = nn.ModuleList(Control(c.unet, c.hint_widths) for _ in range(c.kinds))
        self.after_start()

    def after_start(self) -> None:
        """The copies begin as what they copy."""
        state = self.unet.state_dict()
        for control in self.controls:
            control.copy.load_state_dict({k: state[k] for k in control.copy.state_dict()})

    def losses(self, batch: Batch) -> Losses:
        return Losses(noise=self.noise_error(batch["image"], batch["text"], {"hint": batch["hint"]}))

    def steer(self, control: Batch, z: Tensor, t: Tensor, context: Tensor) -> dict[str, object]:
        """hint [B,3*kinds,H,W] in [0,1], of any size; strength [] or [kinds], 1 by default; guess, weighting []: on where not 0."""
        if "hint" not in control:
            return {}
        hint = control["hint"]
        if hint.ndim != 4 or hint.shape[1] != 3 * len(self.controls):
            raise UserError(f"a hint of shape {list(hint.shape)}", f"this ControlNet reads [B,{3 * len(self.controls)},H,W]")
        if hint.shape[-2:] != (self.size, self.size):
            hint = F.interpolate(hint, (self.size, self.size), mode="bilinear", antialias=True)
        strength = control.get("strength", torch.ones(())).expand(len(self.controls))
        each = [part(z, t, context, h) for part, h in zip(self.controls, hint.chunk(len(self.controls), 1), strict=True)]
        add = [torch.stack([s * r for s, r in zip(strength.to(z), residuals, strict=True)]).sum(0) for residuals in zip(*each, strict=True)]
        guess, weighting = (bool(control.get(k, torch.zeros(()))) for k in ("guess", "weighting"))
        if guess or weighting:
            share = torch.logspace(-1, 0, len(add)).tolist() if guess else [z.shape[-1] / a.shape[-1] for a in add]
            worded = control.get("worded", torch.ones(len(z), dtype=torch.bool)).to(z)[:, None, None, None]      # without guidance: all of them
            add = [a * s * worded for a, s in zip(add, share, strict=True)]
        return {"add": add}


def tiny() -> Preset:
    """On latent_diffusion tiny, after outlines of scenes."""
    return Preset(
        data="scenes?style=plain&size=32&objects=1&digits=0", feed=pictures(32, TINY_WORDS), starts=standing_on("tiny"),
        config=ControlNet.Config(**tiny_base(drop=0.5, hint_widths=(16, 32, 48))), stages=(Stage(
            objective=ControlNet.losses, trainable=("controls.*",), steps=800, batch_size=48, ema=0.995,
            optim=Optim(lr=5e-4, weight_decay=0.01, warmup=20, clip=1.0)),))


def paper() -> Preset:
    """Canny edges on Stable Diffusion 1.5, decoder locked (section 4 and appendix A)."""
    return Preset(
        data="canny_pairs", feed=pictures(512, WORDS), starts=standing_on("paper"),
        config=ControlNet.Config(**version_1(drop=0.5, sampler=Sampler(name="ddim", offset=1, last="first"))), stages=(Stage(
            objective=ControlNet.losses, trainable=("controls.*",), steps=100_000, batch_size=32,
            optim=Optim(lr=1e-5, weight_decay=0.01, schedule="constant")),))
