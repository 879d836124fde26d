"""What the proofs of image codecs share: pictures in [0, 1], peak signal to noise, and the plain codes they must beat."""
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from polysense.data.loader import Loader
from polysense.data.sources import Source


def pictures(source: Source, subject: Any, batch_size: int = 100) -> Iterator[Tensor]:
    """Batches of a source as the subject's system reads them, [B,3,H,W]."""
    for batch in Loader(source, subject.preset.feed, None, batch_size=batch_size, train=False, needs=("image",)):
        yield batch["image"]


def unit(image: Tensor, subject: Any) -> Tensor:
    """Pictures as the subject's system sees them -> [0, 1]."""
    plan = subject.preset.feed.image
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (plan.mean, plan.std))
    return (image * std + mean).clamp(0, 1)


def psnr(out: Tensor, image: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each picture: [B,3,H,W] in [0,1], twice -> [B]."""
    return -10 * (out - image).square().flatten(1).mean(1).clamp_min(1e-10).log10()


def codec_psnr(subject: Any, source: Source) -> float:
    """Mean over a source of the PSNR of `reconstruct`: hard codes, decoded."""
    with torch.inference_mode():
        scores = [psnr(unit(subject.system.reconstruct(x), subject), unit(x, subject)) for x in pictures(source, subject)]
    return float(torch.cat(scores).mean())


def code_counts(subject: Any, source: Source) -> Tensor:
    """How often each code occurs in a source, [K]."""
    with torch.inference_mode():
        return sum(torch.bincount(subject.system.encode_codes(x).flatten(), minlength=subject.system.codec.codes) for x in pictures(source, subject))


def patch_mean(images: Tensor, stride: int) -> Tensor:
    """Every patch painted in its mean colour: as many places as the codec has, each with a real-valued colour in place of a code."""
    return F.interpolate(F.avg_pool2d(images, stride), scale_factor=stride)


def patches(images: Tensor, stride: int) -> Tensor:
    """[B,3,H,W] -> [B*h*w, 3*stride*stride]."""
    return F.unfold(images, stride, stride=stride).transpose(1, 2).flatten(0, 1)


def kmeans_psnr(train: Tensor, test: Tensor, stride: int, codes: int, seed: int) -> float:
    """PSNR of a k-means codebook on raw patches, with as many codes and places."""
    from sklearn.cluster import MiniBatchKMeans

    fitted = MiniBatchKMeans(codes, batch_size=4096, n_init=1, random_state=seed).fit(patches(train, stride).numpy())
    centres, flat = torch.from_numpy(fitted.cluster_centers_).float(), patches(test, stride)
    chosen = centres[torch.from_numpy(fitted.predict(flat.numpy())).long()]
    places = test.shape[-1] // stride
    out = F.fold(chosen.unflatten(0, (len(test), places * places)).transpose(1, 2), test.shape[-2:], stride, stride=stride)
    return float(psnr(out.clamp(0, 1), test).mean())
