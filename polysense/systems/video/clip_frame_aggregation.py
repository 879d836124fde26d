"""Text-video search with an untouched CLIP: encode frames as pictures, make few vectors of them, compare by cosine.

    f_t = norm(image_head(vision(frame_t))),   q = norm(text_head(text(words))),   similarity(q, video) = max_k <q, c_k>

Nothing is trained. Three ways of making c from the frames of a clip (section 3.2), each a value for the slot `aggregate`:

- `SingleFrame`: the 30th frame alone; a shorter clip gives its last frame (own rule).
- `Mean`: all frames averaged, normalised after averaging: the paper's best, hence the default. It is a running sum, so that a video of any
  length is read in constant memory (`encode_stream`).
- `KMeans`: k centroids of the clip's own frames, each normalised. A text meets the nearest: the LARGEST cosine, as in the authors' code.

With several captions a video each caption is a query of its own; from video to text the best placed of its captions counts (`tasks.video_retrieval`).
"""
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from polysense.archetypes.dual_encoder import DualEncoder
from polysense.base.card import Card
from polysense.base.errors import UserError
from polysense.base.system import Feed, ImagePlan, Part, Preset, Spec, Start, TextPlan, VideoPlan, ViewPlan, final
from polysense.towers.clip import body, resnet_pair, tiny_pair, vit_pair
from polysense.weights import clip_hf, clip_open_clip, clip_openai

card = Card(
    name="CLIP frame aggregation", paper="Portillo-Quintero et al., A Straightforward Framework For Video Retrieval Using CLIP, MCPR 2021",
    arxiv="2102.12443", year=2021, says="Finds videos by text and text by videos with an untouched CLIP that looks at their frames.",
    can=("encode_image", "encode_text", "encode_patches", "encode_video", "encode_video_parts", "encode_stream"),
    official="Deferf/CLIP_Video_Representation",
)

PARAMETERS = 151_277_313                     # CLIP ViT-B/32, as released; the aggregation has none

weights = {"openai": clip_openai.LAYOUT, "hf": clip_hf.LAYOUT, "open_clip": clip_open_clip.LAYOUT}

FRAMES = 64                                  # that pass the image tower at once


class SingleFrame(Part):
    """One frame stands for the clip."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        index: int = 29                      # from 0: the 30th

    def __init__(self, c: Config):
        super().__init__()
        if c.index < 0:
            raise UserError(f"there is no frame {c.index}", "frames count from 0")
        self.index = c.index

    def forward(self, frames: Tensor, mask: Tensor) -> Tensor:
        """frames [B,T,D] unit, mask [B,T] (real frames first) -> [B,1,D] unit."""
        at = (mask.sum(1) - 1).clamp(max=self.index)
        return frames.take_along_dim(at[:, None, None], 1)

    def stream(self, chunks: Iterable[Tensor]) -> Tensor:
        """Unit frames in pieces [t,D] -> [1,D]; stops reading once the frame has come."""
        seen, last = 0, None
        for chunk in chunks:
            last, seen = chunk[min(self.index - seen, len(chunk) - 1)], seen + len(chunk)
            if seen > self.index:
                break
        return _some(last)[None]


class Mean(Part):
    """The average of all frames, normalised afterwards; the sums are kept in float64."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        pass

    def __init__(self, c: Config):
        super().__init__()

    def forward(self, frames: Tensor, mask: Tensor) -> Tensor:
        """frames [B,T,D] unit, mask [B,T] -> [B,1,D] unit."""
        return _unit((frames.double() * mask[..., None]).sum(1, keepdim=True) / mask.sum(1)[:, None, None]).to(frames.dtype)

    def stream(self, chunks: Iterable[Tensor]) -> Tensor:
        """Unit frames in pieces [t,D] -> [1,D]; holds one running sum, never the frames."""
        total, like = None, None
        for chunk in chunks:
            total, like = chunk.double().sum(0) + (0.0 if total is None else total), chunk
        return _unit(_some(total))[None].to(_some(like).dtype)


class KMeans(Part):
    """k centroids of each clip's own frames (Lloyd's algorithm on the unit vectors), normalised; a clip of fewer frames repeats some.

    Deterministic: the first centre is the frame nearest the mean, each next one the frame farthest from the centres so far.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        k: int = 3
        iterations: int = 25                 # at most; stops when no frame changes its cluster

    def __init__(self, c: Config):
        super().__init__()
        if c.k < 1 or c.iterations < 1:
            raise UserError(f"k={c.k} and iterations={c.iterations} make no clusters", "both count from 1")
        self.k, self.iterations = c.k, c.iterations

    def forward(self, frames: Tensor, mask: Tensor) -> Tensor:
        """frames [B,T,D] unit, mask [B,T] -> [B,K,D] unit."""
        return _unit(self.centroids(frames, mask))

    def centroids(self, frames: Tensor, mask: Tensor) -> Tensor:
        """frames [B,T,D], mask [B,T] -> the centroids [B,K,D], not normalised."""
        x, real = frames.double(), mask[..., None].double()
        middle = (x * real).sum(1, keepdim=True) / real.sum(1, keepdim=True)
        gap = torch.cdist(x, middle)[..., 0].masked_fill(~mask, torch.inf)
        centres = x.take_along_dim(gap.argmin(1)[:, None, None], 1)
        for _ in range(1, self.k):
            far = torch.cdist(x, centres).amin(2).masked_fill(~mask, -torch.inf).argmax(1)
            centres = torch.cat([centres, x.take_along_dim(far[:, None, None], 1)], 1)
        before = None
        for _ in range(self.iterations):
            near = torch.cdist(x, centres).argmin(2)
            if before is not None and torch.equal(near, before):
                break
            before, share = near, F.one_hot(near, self.k) * real                                 # [B,T,K]
            count = share.sum(1)[..., None]
            centres = torch.where(count > 0, share.mT @ x / count.clamp(min=1), centres)         # an empty cluster stays where it is
        return centres.to(frames.dtype)

    def stream(self, chunks: Iterable[Tensor]) -> Tensor:
        """Unit frames in pieces [t,D] -> [K,D]; holds the vectors of all frames, not their pixels."""
        held = list(chunks)
        rows = torch.cat([_some(held[0] if held else None), *held[1:]])
        return self(rows[None], torch.ones(1, len(rows), dtype=torch.bool, device=rows.device))[0]


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)


def _some(found: Tensor | None) -> Tensor:
    if found is None:
        raise UserError("the video has no frames", "the file is damaged or cut off")
    return found


@final
class CLIPFrameAggregation(DualEncoder):
    @dataclass(frozen=True, kw_only=True)
    class Config(DualEncoder.Config):
        aggregate: Spec = field(default_factory=Mean.Config)

    def __init__(self, c: Config):
        super().__init__(c)
        self.aggregate = c.aggregate.build()

    def encode_frames(self, frames: Tensor) -> Tensor:
        """frames [N,3,H,W] -> [N,D], unit norm, a few at a time through the tower."""
        return torch.cat([self.encode_image(f) for f in frames.split(FRAMES)])

    def encode_video_parts(self, video: Tensor, mask: Tensor | None = None) -> Tensor:
        """video [B,T,3,H,W], mask [B,T] of real frames (None: all) -> [B,K,D], unit norm. A text's similarity is the largest of K cosines."""
        if video.ndim != 5 or not video.shape[1]:
            raise UserError(f"a video of shape {list(video.shape)}", "it should be [B, T, 3, H, W] with at least one frame")
        mask = torch.ones(video.shape[:2], dtype=torch.bool, device=video.device) if mask is None else mask
        if mask.shape != video.shape[:2] or not mask.any(1).all():
            raise UserError(f"the mask of shape {list(mask.shape)} leaves a video without frames, or is not of this video",
                            "it should be [B, T] with a real frame in every row")
        frames = self.encode_frames(video[mask])
        spread = frames.new_zeros(*mask.shape, frames.shape[-1])
        spread[mask] = frames
        return self.aggregate(spread, mask)

    def encode_video(self, video: Tensor, mask: Tensor | None = None) -> Tensor:
        """video [B,T,3,H,W], mask [B,T] or None -> [B,D], unit norm. Of several centroids the normalised mean (own rule: one vector cannot
        stand for a maximum; `encode_video_parts` gives all)."""
        return _unit(self.encode_video_parts(video, mask).mean(1))

    def encode_stream(self, chunks: Iterable[Tensor]) -> Tensor:
        """The frames of one video in pieces [t,3,H,W] -> [K,D], unit norm: `encode_video_parts` of all of them, without holding them."""
        return self.aggregate.stream(self.encode_frames(c) for c in chunks)


def preset(pair: dict[str, Any], size: int, words: TextPlan, start: str, data: str) -> Preset:
    """`train_image` is CLIP's: nothing trains here, but published layouts say its size together with the other."""
    return Preset(data=data, config=CLIPFrameAggregation.Config(**pair), stages=(), starts=(Start(into="", from_="clip", preset=start),),
                  feed=Feed(image=ImagePlan(size=size), train_image=ViewPlan(size=size), text=words, video=VideoPlan(frames=0, sample="all")))


def tiny() -> Preset:
    """On `clip` tiny, mean of all frames."""
    return preset(tiny_pair(), 64, TextPlan(vocab=4096, length=48), "tiny", "scenes:clips")


def tiny_single() -> Preset:
    """The 30th frame alone."""
    return tiny().but(**{"config.aggregate": SingleFrame.Config()})


def tiny_kmeans() -> Preset:
    """Three centroids a clip."""
    return tiny().but(**{"config.aggregate": KMeans.Config()})


OPENAI = TextPlan(vocab=49408, length=77, pad="zero")


def paper() -> Preset:
    """ViT-B/32, every frame, mean (table 1)."""
    return preset(vit_pair(224, 32, body(768, 12, 12), body(512, 12, 8), dim=512), 224, OPENAI, "vit_b_32", "msr_vtt")


def vit_b_32() -> Preset:
    """The same: what published checkpoints with a ViT are read into."""
    return paper()


def rn50() -> Preset:
    """With the ResNet tower."""
    return preset(resnet_pair(224, (3, 4, 6, 3), 64, 32, 1024, body(512, 12, 8)), 224, OPENAI, "rn50", "msr_vtt")
