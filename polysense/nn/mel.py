"""Log-mel spectrograms as Kaldi computes them. Shapes: B batch, S samples, F frames, M mel bins, N samples a frame."""
from dataclasses import dataclass
from math import log1p

import torch
import torch.nn.functional as F
from torch import Tensor

from polysense.base.errors import UserError
from polysense.base.spec import Spec
from polysense.base.system import Part

FLOOR = 1.1920928955078125e-07               # smallest energy before the logarithm: float32's epsilon, as Kaldi
PREEMPHASIS = 0.97


def check_audio(audio: Tensor) -> None:
    """Raises UserError unless audio is float [B,S] with samples in it."""
    if audio.ndim != 2 or not audio.is_floating_point() or not audio.shape[1]:
        raise UserError(f"a sound tensor of shape {list(audio.shape)} and type {audio.dtype}", "this tower reads float [B,S], mono")


def mel(hertz: float) -> float:
    """HTK's and Kaldi's scale."""
    return 1127.0 * log1p(hertz / 700.0)


def triangles(bins: int, points: int, rate: int, low: float, high: float) -> Tensor:
    """Mel filters [points/2 + 1, bins]: triangles of equal width on the mel scale, over the bins of a `points`-point transform; the Nyquist bin is
    left out (Kaldi)."""
    edge = torch.linspace(mel(low), mel(high), bins + 2, dtype=torch.float64)
    at = 1127.0 * torch.log1p(torch.arange(points // 2, dtype=torch.float64) * rate / points / 700.0)[:, None]
    up, down = (at - edge[:-2]) / (edge[1:-1] - edge[:-2]), (edge[2:] - at) / (edge[2:] - edge[1:-1])
    return F.pad(torch.minimum(up, down).clamp(min=0), (0, 0, 0, 1)).float()


class MelSpectrogram(Part):
    """Sound to a normalised picture of one channel, [B,S] -> [B,1,M,F].

    Each sound loses its mean; each frame (no padding at the ends) its own mean, is pre-emphasised, windowed (Hann) and transformed; the power goes
    through the mel triangles and a logarithm; frames are filled up with zeros or cut to `frames`; then (x - mean) / std. In float32 always.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        rate: int = 16000                    # samples a second
        bins: int = 128
        frames: int = 204                    # of the result
        window: float = 0.025                # seconds a frame
        hop: float = 0.010                   # seconds from frame to frame
        low: float = 20.0                    # Hz, of the lowest triangle; the highest ends at half the rate
        mean: float = -4.268
        std: float = 9.138

    def __init__(self, c: Config):
        super().__init__()
        self.frames, self.mean, self.std = c.frames, c.mean, c.std
        self.length, self.hop = round(c.window * c.rate), round(c.hop * c.rate)
        self.points = 1 << (self.length - 1).bit_length()
        self.window: Tensor
        self.filters: Tensor
        self.register_buffer("window", torch.hann_window(self.length, periodic=False), persistent=False)
        self.register_buffer("filters", triangles(c.bins, self.points, c.rate, c.low, c.rate / 2), persistent=False)

    def energies(self, audio: Tensor) -> Tensor:
        """audio [B,S] -> log mel energies [B,F,M] of the frames that fit into it. UserError where none does."""
        check_audio(audio)
        if audio.shape[1] < self.length:
            raise UserError(f"a sound of {audio.shape[1]} samples", f"it takes {self.length} for one frame: pad it with silence")
        with torch.autocast(audio.device.type, enabled=False):
            x = audio.float()
            x = (x - x.mean(1, keepdim=True)).unfold(1, self.length, self.hop)                  # [B,F,N]
            x = x - x.mean(2, keepdim=True)
            x = x - PREEMPHASIS * torch.cat([x[..., :1], x[..., :-1]], 2)
            power = torch.fft.rfft(x * self.window, self.points).abs().square()
            return (power @ self.filters).clamp(min=FLOOR).log()

    def forward(self, audio: Tensor) -> Tensor:
        """audio [B,S] in [-1, 1] -> [B,1,M,frames]."""
        x = self.energies(audio)[:, :self.frames]
        x = F.pad(x, (0, 0, 0, self.frames - x.shape[1]))
        return ((x - self.mean) / self.std).transpose(1, 2)[:, None]


class MelChunks(MelSpectrogram):
    """Three pieces of a sound's spectrogram as the channels of one picture: one each out of the front, the middle and the back third of all pieces
    of `frames` frames (Zhu et al. 2024, LanguageBind). Drawn in training, the first of each third otherwise.

    A shorter sound is said over and over, as often as it fits; silence fills the rest, and all channels are the same.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(MelSpectrogram.Config):
        pass

    def starts(self, spare: int, count: int, device: torch.device | None = None) -> Tensor:
        """Where the three pieces begin, [count,3], in a spectrogram with `spare` frames more than a piece has."""
        third, rest = divmod(spare + 1, 3)
        low = torch.tensor([0, third + (rest > 0), 2 * third + rest], device=device)              # thirds as even as can be, the longer ones first
        many = torch.tensor([third + (rest > i) for i in range(3)], device=device)
        low = torch.where(many > 0, low, 0)
        part = torch.rand(count, 3, device=device) if self.training else torch.zeros(count, 3, device=device)
        return low + (part * many).long()

    def forward(self, audio: Tensor) -> Tensor:
        """audio [B,S] in [-1, 1] -> [B,3,M,frames]."""
        check_audio(audio)
        room = self.frames * self.hop
        if audio.shape[1] < room:
            audio = audio.repeat(1, room // audio.shape[1])
            audio = F.pad(audio, (0, room - audio.shape[1]))
        x = self.energies(audio)
        x = F.pad(x, (0, 0, 0, max(0, self.frames - x.shape[1])))
        rows = self.starts(x.shape[1] - self.frames, len(x), x.device)[..., None] + torch.arange(self.frames, device=x.device)    # [B,3,frames]
        pieces = x[torch.arange(len(x), device=x.device)[:, None, None], rows]                                                    # [B,3,frames,M]
        return ((pieces - self.mean) / self.std).transpose(2, 3)
