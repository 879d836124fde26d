"""NeRF: a scene is a function, and photographs are integrals of it.

A small network maps a place and a direction to density and colour (sigma, c). A pixel is what its ray r(t) = o + t d collects,

    C(r) = sum_i T_i (1 - exp(-sigma_i delta_i)) c_i,   T_i = exp(-sum_{j<i} sigma_j delta_j)                        (equation 3)

and since all of it is differentiable, posed photographs are enough to learn the function. Three things make it work: places and directions
are coded as waves of rising frequency (equation 4), without which the network only learns soft shapes; density is read before the direction
enters, so that every view agrees on where things are; and a coarse network's weights say where the fine one should look (section 5.2):

    L = |C_coarse - C|^2 + |C_fine - C|^2                                                                          (equation 6)

No gradient passes through the choice of samples. Background: what shines through is white (`background`); photographs with transparency are
laid on white when they are read.
"""
from dataclasses import dataclass

import torch.nn.functional as F

from polysense.archetypes.scene import Scene
from polysense.base.card import Card
from polysense.base.system import Batch, Feed, Losses, Optim, Preset, Stage, final
from polysense.decoders.radiance import Radiance, Waves
from polysense.weights import nerf_pytorch

card = Card(
    name="NeRF", paper="Mildenhall et al., NeRF: Representing Scenes as Neural Radiance Fields for View Synthesis, ECCV 2020",
    arxiv="2003.08934", year=2020, says="Learns a scene from posed photographs and shows it from anywhere else.",
    needs=("origin", "direction", "rgb"), can=("render_view",), official="yenchenlin/nerf-pytorch",
)

PARAMETERS = 1_191_688                       # two networks of 595,844: 8 x 256 with 63 and 27 inputs (released code)

weights = {"nerf_pytorch": nerf_pytorch.LAYOUT}


@final
class NeRF(Scene):
    @dataclass(frozen=True, kw_only=True)
    class Config(Scene.Config):
        pass

    def photometric(self, batch: Batch) -> Losses:
        """Squared error of the colour that each network shows."""
        shown = self.render(batch["origin"], batch["direction"])
        return Losses(**{name: F.mse_loss(s.colour, batch["rgb"].float()) for name, s in zip(("coarse", "fine"), shown, strict=False)})


def tiny() -> Preset:
    net = Radiance.Config(width=96, depth=4, skip=2, place=Waves.Config(levels=6), direction=Waves.Config(levels=2))
    return Preset(
        data="solids", feed=Feed(), config=NeRF.Config(coarse=net, fine=net, samples=24, more=24),
        stages=(Stage(objective=NeRF.photometric, steps=2500, batch_size=512, precision="fp32", optim=Optim(
            name="adam", lr=2e-3, schedule="exponential", final=0.1)),))


def paper() -> Preset:
    """Blender synthetic scenes at 800x800 (appendix A)."""
    return Preset(
        data="nerf_synthetic", feed=Feed(), config=NeRF.Config(coarse=Radiance.Config(), fine=Radiance.Config()),
        stages=(Stage(objective=NeRF.photometric, steps=300_000, batch_size=4096, precision="fp32", optim=Optim(
            name="adam", lr=5e-4, eps=1e-7, schedule="exponential", final=0.1)),))


def llff() -> Preset:
    """Forward-facing photographs at 1008x756 in device coordinates, with noise on the density (appendix A)."""
    base = paper()
    return base.but(data="nerf_llff", config=base.config.but(near=0.0, far=1.0, samples=64, more=64, background=None, noise=1.0,
                                                             ndc=(2 * 815 / 1008, 2 * 815 / 756)))
