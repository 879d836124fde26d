"""Pictures compared frequency by frequency. Shapes: B batch, C channels, H W pixels, or as many frequencies."""
# torch is typed in part only, hence (strict mode would refuse what torch itself leaves open):
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from collections.abc import Sequence

from torch import Tensor

from polysense.base.errors import UserError
from polysense.objectives.masked import masked_mse


def focal_frequency(prediction: Tensor, target: Tensor, alpha: float = 1.0) -> Tensor:
    """mean over (u, v) of w |F' - F|^2, spectra [B,2C,H,W] each (Jiang et al. 2021, equation 8; Liu et al. 2023, Ge2-AE, section 3.3). Scalar.

    w = |F' - F|^alpha, divided by its largest value in each channel of each picture, has no gradient: frequencies that come out badly count more.
    With alpha = 0 it is, by Parseval's theorem, the mean squared error of the pictures.
    """
    if prediction.shape != target.shape:
        raise UserError(f"spectra {list(prediction.shape)} and {list(target.shape)}", "they are of the same pictures")
    real, imaginary = (prediction.float() - target.float()).chunk(2, 1)
    squared = real.square() + imaginary.square()
    return (focus(squared, alpha) * squared).mean()


def focus(squared: Tensor, alpha: float) -> Tensor:
    """The weights of `focal_frequency`, in [0, 1], without a gradient: squared errors [B,C,H,W] -> [B,C,H,W]."""
    weight = squared.detach() ** (alpha / 2)
    return (weight / weight.amax((-2, -1), keepdim=True)).nan_to_num(0.0).clamp(0, 1)


def geminated(drawn: Sequence[Tensor], target: Sequence[Tensor], alpha: float = 1.0) -> dict[str, Tensor]:
    """Two drawings, each judged in both domains (Liu et al. 2023, Ge2-AE, section 3.3). Four scalars, which the stage weighs.

    drawn: hidden patches [B,M,P], a spectrum [B,2C,H,W], the spectrum of the first and the hidden patches of the second; target: hidden patches and
    spectrum. Pixels are judged where they were hidden; spectra as a whole, as every patch has a part in every frequency.
    """
    patches, spectrum, of_patches, of_spectrum = drawn
    truth, frequencies = target
    return {"pixels": masked_mse(patches, truth), "frequency": focal_frequency(spectrum, frequencies, alpha),
            "pixels_in_frequency": focal_frequency(of_patches, frequencies, alpha), "frequency_in_pixels": masked_mse(of_spectrum, truth)}
