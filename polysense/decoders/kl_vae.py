"""The auto-encoder of latent diffusion. Shapes: B batch, H W pixels, h w = H/f W/f places, Z latent channels."""
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from polysense.base.errors import UserError
from polysense.base.spec import Spec
from polysense.base.system import Part
from polysense.decoders.res_codec import Ladder, ResDecoder, ResEncoder
from polysense.nn.norm import GroupNorm


class KLVAE(Part):
    """Pictures to a Gaussian over small maps and back (Rombach et al. 2022, section 3.1 and appendix G; f = 2^(levels - 1)).

    Names: `encoder.conv_in encoder.down.{l}.blocks.{i} encoder.down.{l}.shrink encoder.mid encoder.norm_out encoder.conv_out quant`, and
    `post_quant decoder.conv_in decoder.mid decoder.up.{l}.blocks.{i} decoder.up.{l}.grow decoder.norm_out decoder.conv_out`.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        widths: tuple[int, ...]              # of the levels, largest map first
        depth: int = 2                       # residual blocks a level in the encoder, one more in the decoder
        latents: int = 4
        channels: int = 3
        norm: Spec = field(default_factory=lambda: GroupNorm.Config(eps=1e-6))

        @property
        def stride(self) -> int:
            """f: pixels along a side of one place."""
            return 2 ** (len(self.widths) - 1)

    scale: Tensor                            # [] 1 / deviation of the latents: kept here, applied by whoever adds noise

    def __init__(self, c: Config):
        super().__init__()
        ladder = Ladder(widths=c.widths, depth=c.depth, maps=c.latents, channels=c.channels, norm=c.norm)
        self.encoder, self.decoder = ResEncoder(ladder.but(maps=2 * c.latents)), ResDecoder(ladder)
        self.quant, self.post_quant = nn.Conv2d(2 * c.latents, 2 * c.latents, 1), nn.Conv2d(c.latents, c.latents, 1)
        self.stride, self.channels, self.latents = c.stride, c.channels, c.latents
        self.register_buffer("scale", torch.ones(()))
        self.to(memory_format=torch.channels_last)

    def moments(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """image [B,3,H,W] in [-1,1] -> mean and log-variance [B,Z,h,w]. Raises UserError where f does not divide the size."""
        if image.ndim != 4 or image.shape[1] != self.channels or image.shape[2] % self.stride or image.shape[3] % self.stride:
            raise UserError(f"a picture of shape {list(image.shape)}",
                            f"this auto-encoder reads [B,{self.channels},H,W] with H and W multiples of {self.stride}")
        mean, log = self.quant(self.encoder(image)).chunk(2, 1)
        return mean, log.clamp(-30.0, 20.0)

    def encode(self, image: Tensor) -> Tensor:
        """image [B,3,H,W] -> latents [B,Z,h,w], drawn with torch's random numbers."""
        mean, log = self.moments(image)
        return mean + (0.5 * log).exp() * torch.randn_like(mean)

    def decode(self, z: Tensor) -> Tensor:
        """latents [B,Z,h,w] -> image [B,3,H,W], about in [-1,1]."""
        return self.decoder(self.post_quant(z.contiguous(memory_format=torch.channels_last)))


def kl_to_normal(mean: Tensor, log: Tensor) -> Tensor:
    """Divergence of N(mean, exp(log)) from N(0, 1), of each sample, summed over its numbers: [B,...] -> [B] nats."""
    return 0.5 * (mean.square() + log.exp() - 1 - log).flatten(1).sum(1)
