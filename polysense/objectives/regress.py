"""Losses on numbers that were hidden, beside `masked_mse`: the caller hands over the hidden places alone."""
# torch is typed in part only, hence (strict mode would refuse what torch itself leaves open):
# pyright: reportUnknownMemberType=false
import torch.nn.functional as F
from torch import Tensor

from polysense.base.errors import UserError


def masked_l1(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error over hidden patches, [B,M,D] or [M,D] each, in float32 (Xie et al. 2022, SimMIM, equation 1). Scalar."""
    return F.l1_loss(*_alike(prediction, target))


def masked_smooth_l1(prediction: Tensor, target: Tensor, beta: float = 2.0) -> Tensor:
    """Mean over hidden places of d^2 / (2 beta) where |d| < beta, |d| - beta / 2 beyond (Baevski et al. 2022, data2vec, equation 3). Scalar."""
    return F.smooth_l1_loss(*_alike(prediction, target), beta=beta)


def _alike(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    if prediction.shape != target.shape:
        raise UserError(f"predictions {list(prediction.shape)} and targets {list(target.shape)}", "they are of the same hidden patches")
    return prediction.float(), target.float()
