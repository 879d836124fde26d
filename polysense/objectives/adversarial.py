"""Losses of two players: a discriminator that tells drawn pictures from real ones, and whoever draws them. Logits have any shape."""
# torch is typed in part only, hence (strict mode would refuse what torch itself leaves open):
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
import torch
import torch.nn.functional as F
from torch import Tensor


def should_be_real(logits: Tensor, form: str = "log") -> Tensor:
    """What the discriminator pays for real pictures: -log D ("log", Goodfellow et al. 2014, D = sigmoid(logit)) or max(0, 1 - logit) ("hinge")."""
    return (F.softplus(-logits.float()) if form == "log" else F.relu(1 - logits.float())).mean()


def should_be_fake(logits: Tensor, form: str = "log") -> Tensor:
    """What it pays for what is not real: -log(1 - D), or max(0, 1 + logit)."""
    return (F.softplus(logits.float()) if form == "log" else F.relu(1 + logits.float())).mean()


def should_fool(logits: Tensor, form: str = "log") -> Tensor:
    """What the generator pays: -log D, which does not saturate where it draws badly (Goodfellow et al. 2014, section 3), or -logit."""
    return (F.softplus(-logits.float()) if form == "log" else -logits.float()).mean()


def r1(logits: Tensor, image: Tensor) -> Tensor:
    """E |grad_x D(x)|^2 / 2 at real pictures, which must require a gradient (Mescheder et al. 2018, equation 9)."""
    grad, = torch.autograd.grad(logits.float().sum(), image, create_graph=True)
    return grad.square().flatten(1).sum(1).mean() / 2


def mismatched(text: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """text [B,L] -> (rows [B], found [B]): for each text a random row of the batch that says something else; found is False where none does."""
    other = (text[:, None] != text).any(-1)
    order = torch.rand(other.shape, generator=generator, device=text.device).masked_fill(~other, -1.0)
    return order.argmax(1), other.any(1)
