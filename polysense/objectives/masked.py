"""Losses on what was hidden: the caller hands over the hidden places alone."""
import torch
from torch import Tensor

from polysense.base.errors import UserError


def masked_mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over hidden patches, [B,M,D] each, in float32 (He et al. 2022, MAE, section 3). Scalar.

    Every sample hides as many patches, so the mean over ranks is the loss of the global batch.
    """
    if prediction.shape != target.shape:
        raise UserError(f"predictions {list(prediction.shape)} and targets {list(target.shape)}", "they are of the same hidden patches")
    return torch.nn.functional.mse_loss(prediction.float(), target.float())


def masked_cosine(prediction: Tensor, target: Tensor) -> Tensor:
    """1 - cosine, mean over hidden patches, [M,D] or [B,M,D] each, in float32 (Fang et al. 2023, EVA, section 2.1): lengths do not count. Scalar."""
    if prediction.shape != target.shape:
        raise UserError(f"predictions {list(prediction.shape)} and targets {list(target.shape)}", "they are of the same hidden patches")
    return 1 - torch.nn.functional.cosine_similarity(prediction.float(), target.float(), dim=-1).mean()
