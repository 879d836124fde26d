"""How like two pictures are: peak signal to noise and structural similarity (Wang et al. 2004)."""
import torch
from torch import Tensor


def psnr(picture: Tensor, truth: Tensor) -> float:
    """-10 log10 of the mean squared error, for values in [0,1]; at most 100."""
    return float(-10 * torch.log10((picture - truth).square().mean().clamp_min(1e-10)))


def ssim(picture: Tensor, truth: Tensor) -> float:
    """Mean structural similarity of two pictures [H,W,3] in [0,1], in windows of 11 pixels, smaller in smaller pictures."""
    from kornia.metrics import ssim as similarity

    window = min(11, *(n if n % 2 else n - 1 for n in truth.shape[:2]))
    return float(similarity(picture.permute(2, 0, 1)[None], truth.permute(2, 0, 1)[None], window).mean())
