"""A codec whose pictures a critic and a perceptual network look at, and a prior over its codes. Abstract: a system says what it pays and is final."""
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from polysense.archetypes.generator import together
from polysense.archetypes.image_codec import ImageCodec
from polysense.base.errors import UserError
from polysense.base.system import After, Batch, Losses, Spec
from polysense.objectives.adversarial import should_be_fake, should_be_real, should_fool
from polysense.objectives.spread import gather
from polysense.weights.lpips import load_perceptual


class AdversarialCodec(ImageCodec):
    """`codec`, `critic`, `perceptual` and `prior`. Trained in turns by `archetypes.generator.alternate`: the critic, then the codec.

    The perceptual network is frozen; it comes from a Start or from files, and without either it is one of random weights, which its preset says.
    """

    players = ("critic", "codec")

    @dataclass(frozen=True, kw_only=True)
    class Config(ImageCodec.Config):
        prior: Spec
        critic: Spec
        critic_from: int = 0                 # steps of the codec before the critic takes part
        form: str = "hinge"                  # of the adversarial loss; or "log"
        perceptual: Spec                     # a Perceptual
        perceptual_weight: float = 1.0
        perceptual_files: tuple[str, ...] = ()               # LPIPS as published, read once before training; (): as the Start left it

    met: Tensor                              # [] steps that the codec has trained

    def __init__(self, c: Config):
        super().__init__(c)
        if c.form not in ("log", "hinge"):
            raise UserError(f"no form={c.form!r} of an adversarial loss", "it is 'log' or 'hinge'")
        self.prior, self.critic, self.perceptual = c.prior.build(), c.critic.build(), c.perceptual.build()
        self.perceptual_config, self.perceptual_files, self.perceptual_weight = c.perceptual, c.perceptual_files, c.perceptual_weight
        self.critic_from, self.form = c.critic_from, c.form
        self.register_buffer("met", torch.zeros(()))

    def after_start(self) -> None:
        """Where files of the perceptual network are named, they take the place of what it was born with."""
        if self.perceptual_files:
            load_perceptual(self.perceptual, self.perceptual_config, *self.perceptual_files)

    @abstractmethod
    def rebuild(self, batch: Batch) -> tuple[Losses, Tensor]:
        """What pictures and codes cost without the critic, and the drawn pictures [B,3,H,W]. Keeps `encoded` and `ids`."""

    @abstractmethod
    def weigh(self, losses: Losses, fooled: Tensor) -> Tensor:
        """How much the adversarial term counts beside these, a scalar without a gradient."""

    def joined(self) -> bool:
        """Whether the critic takes part by now."""
        return int(self.met) >= self.critic_from

    def compress(self, batch: Batch) -> Losses:
        """The codec as if there were no critic."""
        return self.rebuild(batch)[0]

    def judge(self, batch: Batch) -> Losses:
        """What the critic pays; before it takes part, nothing."""
        if not self.joined():
            return Losses()
        image = batch["image"]
        with torch.no_grad():
            drawn = self.codec(image)[0]
        return Losses(critic=0.5 * (should_be_real(self.critic(image), self.form) + should_be_fake(self.critic(drawn), self.form)))

    def deceive(self, batch: Batch) -> Losses:
        """What the codec pays, the critic's verdict included once it takes part. The critic's running statistics stay as they are."""
        losses, drawn = self.rebuild(batch)
        if self.joined():
            fooled = should_fool(self.critic.looked_at(drawn), self.form)
            losses["fool"] = self.weigh(losses, fooled) * fooled
        return losses

    def losses(self, batch: Batch) -> Losses:
        """Both at once, for reading: training goes through `alternate`."""
        return together(self, batch)

    @torch.no_grad()
    def after_step(self, after: After) -> None:
        if "ids" in after.keep:
            self.met += 1
            self.codec.quantizer.move(gather(after.keep["encoded"]), gather(after.keep["ids"]), after.step)
