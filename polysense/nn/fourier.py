"""Pictures as frequencies. Shapes: B batch, C channels, H W pixels, or as many frequencies."""
import torch
from torch import Tensor


def spectrum(image: Tensor) -> Tensor:
    """[B,C,H,W] -> [B,2C,H,W] in float32: the two-dimensional discrete Fourier transform of each channel, frequency zero in the middle, orthonormal;
    the real parts of all channels, then the imaginary ones."""
    f = torch.fft.fftshift(torch.fft.fft2(image.float(), norm="ortho"), dim=(-2, -1))
    return torch.cat([f.real, f.imag], 1)


def from_spectrum(parts: Tensor) -> Tensor:
    """The inverse, [B,2C,H,W] -> [B,C,H,W]; of a spectrum that belongs to no real picture, the real part."""
    real, imaginary = parts.float().chunk(2, 1)
    return torch.fft.ifft2(torch.fft.ifftshift(torch.complex(real, imaginary), dim=(-2, -1)), norm="ortho").real
