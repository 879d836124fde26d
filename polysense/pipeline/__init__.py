"""A system with everything needed to use it: files, pictures, addresses and strings go in, answers come out.

`open_pipeline(path, *, system=None, layout=None, device=None) -> Pipeline`
`Pipeline.encode(images=... | texts=... | videos=... | audios=...) -> [N,D]`, `.similarity(images, texts) -> [N,M]`,
`.label(images, labels) -> list[Labelled]`, `.classify(images, classes) -> list[Labelled]`, `.explain(image, text) -> Explanation`,
`.match(images, texts) -> [N,M]`, `.ground(image, text) -> Explanation`, `.detect(image, labels) -> list[Detection]`,
`.fill(text) -> list[list[Guess]]`, `.translate(texts) -> list[str]`,
`.caption(images) -> list[str]`, `.ask(image, question) -> str`, `.chat(image, messages) -> str`,
`.segment(image, points, box) -> Segmentation`, `.reconstruct(images) -> list[picture]`, `.encode_codes(images) -> [N,h,w]`,
`.decode_codes(codes) -> list[picture]`.
"""
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from polysense.base.catalogue import catalogue
from polysense.base.errors import UserError
from polysense.base.plan import ImagePlan, Preset
from polysense.base.protocols import fulfils
from polysense.data.images import decode, read_images, window
from polysense.data.templates import DEFAULT
from polysense.data.told import queries
from polysense.pipeline import pairs
from polysense.pipeline.clips import Clips
from polysense.pipeline.draw import generate
from polysense.pipeline.heat import NEUTRAL, Detection, Explanation, Heat, Labelled, content_words, heat_maps, overlay
from polysense.pipeline.mask import Segmentation, detect, keypoints, segment
from polysense.pipeline.open import best_device, digest_of, find
from polysense.pipeline.pictures import to_pictures
from polysense.pipeline.scene import render
from polysense.pipeline.talk import Talk
from polysense.pipeline.texts import Texts
from polysense.pipeline.words import label_scores
from polysense.tasks.zero_shot import templates_of, zero_shot_classifier
from polysense.train.precision import autocast

__all__ = ["Detection", "Explanation", "Heat", "Labelled", "Pipeline", "Segmentation", "open_pipeline", "overlay"]

Progress = Callable[[int, int], object]
TEMPLATES = DEFAULT                                   # CLIP's prompt (Radford et al. 2021, section 3.1.4)
BACKGROUNDS = ("background", "a blurry photo of nothing in particular.", "a plain surface.", "a texture.")
SHARE = 1 / 64                                        # of the patches that a word must win to count as matched
THUMBNAIL = 512                                       # longest side of the picture that an explanation is drawn on, pixels


class Pipeline(Clips, Talk, Texts):
    """A Subject (`polysense.base.protocols`): what exams examine and the app stands on."""

    def __init__(self, system: Any, preset: Preset, tokenizer: Any = None, *, id: str = "", source: str = "", device: str | None = None):
        self.device = best_device(device)
        self.system, self.preset, self.tokenizer, self.id, self.source = system.to(self.device).eval(), preset, tokenizer, id, source
        self.asked: tuple[tuple[str, ...], np.ndarray] = (), np.zeros((0, 0), np.float32)

    # -- what goes in -------------------------------------------------------------------------------------------------------------------

    def prepare(self, image: Any) -> Tensor:
        """One picture (path, PIL, uint8 array, http address) -> [3,H,W] on the CPU, as the preset's feed says. Safe in threads."""
        return read_images(self._image_plan(), [image])[0]

    def _image_plan(self) -> ImagePlan:
        if self.preset.feed.image is None:
            raise UserError(f"{self.id or 'this system'} does not read pictures", self._who("encode_image"))
        return self.preset.feed.image

    def read_images(self, images: Sequence[Any]) -> Tensor:
        """Paths, PIL pictures, uint8 arrays or http addresses -> [B,3,H,W] on the device; UserError names the first that cannot be read."""
        with ThreadPoolExecutor(4) as pool:          # decoding and resampling release the interpreter lock
            return torch.stack(list(pool.map(self.prepare, images))).to(self.device)

    def read_texts(self, texts: Sequence[str]) -> Tensor:
        """Strings -> token ids [B,L] on the device."""
        if self.tokenizer is None:
            raise UserError(f"{self.id or 'this system'} does not read text", self._who("encode_text"))
        return self.tokenizer(list(texts)).to(self.device)

    # -- what it is ---------------------------------------------------------------------------------------------------------------------

    @cached_property
    def digest(self) -> str:
        """Names weights and feed: features of two pipelines can be compared if and only if their digests agree."""
        return digest_of(self.system, self.preset)

    @cached_property
    def dim(self) -> int:
        """Width of the features."""
        return self.encode(images=[np.zeros((32, 32, 3), np.uint8)]).shape[1]

    @property
    def scale(self) -> float:
        """What cosines are multiplied by before a softmax: the learned temperature, or CLIP's final 100."""
        with torch.no_grad():
            return float(getattr(self.system, "scale", 100.0))

    def can(self, capability: str) -> bool:
        return fulfils(self.system, capability)

    def _who(self, capability: str) -> str:
        able = [card.id for card in catalogue().values() if capability in card.can]
        return f"systems that can {capability}: {', '.join(able)}" if able else f"no system here can {capability} yet"

    def _need(self, *capabilities: str) -> None:
        for capability in capabilities:
            if not self.can(capability):
                raise UserError(f"{self.id or type(self.system).__name__} cannot {capability}", self._who(capability))

    def _run(self, capability: str, tensor: Tensor) -> np.ndarray:
        """One capability on one tensor, without a graph, in bf16 where the hardware multiplies it faster; float32 comes out."""
        with torch.inference_mode(), autocast("auto", self.device)(True):
            out = getattr(self.system, capability)(tensor).float().cpu()
        if not out.isfinite().all():
            raise UserError(f"{capability} returned numbers that are not finite", "the weights are damaged, or their training diverged")
        return out.numpy()

    # -- verbs --------------------------------------------------------------------------------------------------------------------------

    def encode(self, images: Sequence[Any] | None = None, texts: Sequence[str] | None = None, *, videos: Sequence[Any] | None = None,
               audios: Sequence[Any] | None = None, batch_size: int = 64, progress: Progress | None = None) -> np.ndarray:
        """Unit features [N,D], float32, of pictures, texts, videos or sounds; `progress(done, total)` after each batch. Texts of a system that
        learned with a dictionary get what it says of the first thing that they name."""
        given = [g for g in (images, texts, videos, audios) if g is not None]
        if len(given) != 1:
            raise UserError("encode takes images=, texts=, videos= or audios=, one of them", "call it once for each")
        items: list[Any] = _listed(given[0])
        if not items:
            raise UserError("there is nothing to encode", "give at least one picture, text, video or sound")
        if videos is not None or audios is not None:
            self._need("encode_video" if audios is None else "encode_audio")
            return (self.encode_videos if audios is None else self.encode_audios)(items, progress)
        capability, read = ("encode_image", self.read_images) if texts is None else ("encode_text", self.read_texts)
        self._need(capability)
        items = items if texts is None else queries(self.preset.feed, items)
        out = []
        for start in range(0, len(items), batch_size):
            out.append(self._run(capability, read(items[start:start + batch_size])))
            if progress:
                progress(min(start + batch_size, len(items)), len(items))
        return np.concatenate(out)

    def encode_prepared(self, batch: Tensor) -> np.ndarray:
        """Features [B,D] of pictures that `prepare` made: for callers that decode ahead of the encoder."""
        self._need("encode_image")
        return self._run("encode_image", batch.to(self.device))

    def similarity(self, images: Sequence[Any], texts: Sequence[str]) -> np.ndarray:
        """Cosines [N,M] of N pictures and M texts."""
        return self.encode(images=images) @ self.encode(texts=texts).T

    def prompts(self, labels: Sequence[str], templates: str | Sequence[str] = TEMPLATES) -> np.ndarray:
        """Zero-shot classifier rows [C,D]: each label's templates encoded, averaged, normalised again (CLIP, section 3.1.4).

        `templates`: as in exams, the name of a set of `data.templates`, one template, or several.
        """
        self._need("encode_text")
        if not (labels := _listed(labels)):
            raise UserError("there are no labels", "give at least one")
        return zero_shot_classifier(self, labels, templates_of(templates)).numpy()

    def label(self, images: Sequence[Any], labels: Sequence[str], templates: str | Sequence[str] = TEMPLATES, *, top: int | None = None,
              progress: Progress | None = None) -> list[Labelled]:
        """Zero-shot: the probability of each label, softmax of scaled cosines over the labels given, most probable first."""
        images, labels = _listed(images), _listed(labels)
        return _ranked(images, softmax(self.scale * label_scores(self, images, labels, templates, progress)), labels, top)

    def classify(self, images: Sequence[Any], classes: Sequence[str] | None = None, *, top: int | None = 5) -> list[Labelled]:
        """The classes that the system was trained on, most probable first; without names, and where the system keeps none, by their numbers."""
        self._need("classify")
        images = _listed(images)
        logits = np.concatenate([self._run("classify", self.read_images(images[i:i + 64])) for i in range(0, len(images), 64)])
        names = self._called(logits.shape[1]) if classes is None else list(classes)
        if len(names) != logits.shape[1]:
            raise UserError(f"{len(names)} class names were given", f"the system knows {logits.shape[1]} classes")
        return _ranked(images, softmax(logits), names, top)

    def _called(self, classes: int) -> list[str]:
        """What the classes are called: by a system that keeps their names as ids (`text.names`), else by their numbers."""
        ids = getattr(getattr(self.system, "text", None), "names", None)
        if ids is None or self.tokenizer is None or len(ids) != classes:
            return [str(i) for i in range(classes)]
        return [self.tokenizer.decode(row).removesuffix(".").strip() for row in ids.cpu()]

    def explain(self, image: Any, text: str | np.ndarray, *, words: int = 4) -> Explanation:
        """Where in a picture a text (or a feature [D] in the same space) matches: one heat-map for the whole text, and one each for at most
        `words` of its words that matched: they fit the picture, or win some of its patches, against texts that say nothing."""
        self._need("encode_patches", "encode_text")
        plan, picture = self._image_plan(), decode(image)
        tensor = self.read_images([picture])
        asked = [text, *content_words(text)] if isinstance(text, str) else ["(picture)"]
        rows = self._rows((*asked, *NEUTRAL)) if isinstance(text, str) else np.concatenate([text[None], self._rows(NEUTRAL)])
        thumbnail = picture.copy()
        thumbnail.thumbnail((THUMBNAIL, THUMBNAIL))
        whole, *each = heat_maps(self._run("encode_patches", tensor)[0], self._run("encode_image", tensor)[0], asked, rows[:len(asked)],
                                 rows[len(asked):], thumbnail, window(picture.size, plan))
        matched = sorted((h for h in each if h.score > 0 or h.share >= SHARE), key=lambda h: -h.score)
        return Explanation(asked[0], thumbnail, whole, tuple(matched[:words]))

    def _rows(self, texts: tuple[str, ...]) -> np.ndarray:
        """Text features, remembered from one picture to the next of the same query."""
        if self.asked[0] != texts:
            self.asked = texts, self.encode(texts=texts)
        return self.asked[1]

    def match(self, images: Sequence[Any], texts: Sequence[str]) -> np.ndarray:
        """Probability [N,M] that a text belongs to a picture, by a system that reads both together."""
        return pairs.match(self, _listed(images), _listed(texts))

    def ground(self, image: Any, text: str) -> Explanation:
        """Where in a picture a text is found, by a system that reads both together; `whole.score` is the probability that it is there."""
        return pairs.ground(self, image, text)

    def reconstruct(self, images: Sequence[Any]) -> list[Image.Image]:
        """Pictures as the system sees them: what it draws again of each. In float32, as codes are, so that both agree."""
        self._need("reconstruct")
        images = _listed(images)
        with torch.inference_mode():
            drawn = [self.system.reconstruct(self.read_images(images[i:i + 32])) for i in range(0, len(images), 32)]
        return [picture for batch in drawn for picture in to_pictures(batch, self._image_plan())]

    def encode_codes(self, images: Sequence[Any]) -> np.ndarray:
        """Pictures -> the numbers of their codes, int64 [N,h,w]."""
        self._need("encode_codes")
        if not (images := _listed(images)):
            raise UserError("there is nothing to encode", "give at least one picture")
        with torch.inference_mode():
            return np.concatenate([self.system.encode_codes(self.read_images(images[i:i + 32])).cpu().numpy() for i in range(0, len(images), 32)])

    def decode_codes(self, codes: np.ndarray) -> list[Image.Image]:
        """Codes [N,h,w], as `encode_codes` returned them -> pictures."""
        self._need("decode_codes")
        codes = np.asarray(codes)
        if codes.ndim != 3 or codes.dtype.kind not in "iu":
            raise UserError(f"codes of shape {list(codes.shape)} and type {codes.dtype}", "give integers [N,h,w], as encode_codes returns them")
        with torch.inference_mode():
            drawn = [self.system.decode_codes(torch.from_numpy(codes[i:i + 32].astype(np.int64)).to(self.device)) for i in range(0, len(codes), 32)]
        return [picture for batch in drawn for picture in to_pictures(batch, self._image_plan())]

    def generate(self, texts: str | Sequence[str] = (), count: int = 1, **options: Any) -> list[Image.Image]:
        """`count` pictures of each text, or without words: see `pipeline.draw.generate` for steps, guidance, seed, hints, strength, sampler."""
        return generate(self, [texts] if isinstance(texts, str) else list(texts), count, **options)

    def segment(self, image: Any, points: Sequence[tuple[float, float]] = (), labels: Sequence[int] | None = None,
                box: tuple[float, float, float, float] | None = None, text: str | None = None) -> Segmentation:
        """The outline of one thing, told by places (x y in [0, 1]; `labels` 1 inside, 0 outside), a box (x0 y0 x1 y1), both, or by a text. Several
        readings of an ambiguous prompt, best first. The next prompt on the same picture reuses its encoding."""
        return segment(self, image, points, labels, box, text)

    def render(self, turn: int = 1, *, elevation: float = 30.0, size: int = 100, start: float = 0.0, distance: float | None = None,
               fov: float | None = None) -> list[Image.Image]:
        """`turn` views of a learned scene, from around it: `elevation` and `start` in degrees, `size` in pixels, `distance` of the camera from the
        origin and `fov` in radians (None: the system's own)."""
        return render(self, turn, elevation, size, start, distance, fov)

    def keypoints(self, image: Any, found: Sequence[Detection]) -> list[Detection]:
        """What `detect` found in a picture, with the places of its parts."""
        return keypoints(self, image, found)

    def detect(self, image: Any, labels: Sequence[str] | None = None, *, templates: str | Sequence[str] = TEMPLATES,
               backgrounds: Sequence[str] = BACKGROUNDS,
               scales: Sequence[float] = (1.0, 0.66, 0.5, 0.33), threshold: float = 0.5, iou: float = 0.3, top: int = 100) -> list[Detection]:
        """Zero-shot detection (CLIP on region crops): square crops of a grid at several scales (fractions of the short side, half a crop
        apart) are scored against the labels and the background prompts; what is likelier than `threshold` is kept after
        non-maximum suppression at overlap `iou` within each label. Best first. A system that detects by itself needs no labels: they keep some of
        its classes."""
        if self.can("detect"):
            return detect(self, image, _listed(labels or []), threshold, top)
        if not labels:
            raise UserError("nothing says what to find", "give labels: this system compares pictures and texts")
        from kornia.geometry.bbox import nms

        picture, labels = decode(image), _listed(labels)
        rows = np.concatenate([self.prompts(labels, templates), self.encode(texts=backgrounds)]) if backgrounds else self.prompts(labels, templates)
        boxes = grid_boxes(picture.size, scales)
        chance = softmax(self.scale * self.encode(images=[picture.crop(tuple(b)) for b in boxes.tolist()]) @ rows.T)
        crop, which = np.nonzero(chance[:, :len(labels)] >= threshold)
        score, found = chance[crop, which], boxes[crop] / np.array([*picture.size, *picture.size], np.float32)
        apart = torch.from_numpy(found + 2.0 * which[:, None].astype(np.float32))       # classes moved apart: one pass suppresses within each
        kept = nms(apart, torch.from_numpy(score), iou)[:top].tolist() if len(score) else []
        return [Detection(labels[which[i]], float(score[i]), (float(x0), float(y0), float(x1), float(y1)))
                for i, (x0, y0, x1, y1) in ((i, found[i]) for i in kept)]


def grid_boxes(size: tuple[int, int], scales: Iterable[float]) -> np.ndarray:
    """Square boxes [N,4] (x0 y0 x1 y1, whole pixels) that cover a picture of (width, height) at each scale, half a box apart."""
    out = []
    for side in dict.fromkeys(max(1, round(s * min(size))) for s in scales):
        x, y = (np.linspace(0, n - side, 1 + int(np.ceil((n - side) / (side / 2)))).round() for n in size)
        corner = np.stack(np.meshgrid(x, y), -1).reshape(-1, 2)
        out.append(np.concatenate([corner, corner + side], 1))
    return np.concatenate(out).astype(np.float32)


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _listed(items: Any) -> list[Any]:
    """A list of what was given: a single path, string or picture counts as one."""
    return [items] if isinstance(items, (str, Path, Image.Image)) or (isinstance(items, np.ndarray) and items.ndim < 4) else list(items)


def _ranked(images: list[Any], chance: np.ndarray, names: list[str], top: int | None) -> list[Labelled]:
    order = np.argsort(-chance, 1, kind="stable")[:, :top]
    return [Labelled(str(item) if isinstance(item, (str, Path)) else f"#{i}", tuple((names[j], float(p[j])) for j in row))
            for i, (item, row, p) in enumerate(zip(images, order, chance, strict=True))]


def open_pipeline(path: str | Path, *, system: str | None = None, layout: str | None = None, device: str | None = None) -> Pipeline:
    """Open a run folder, or (with `system` and `layout`) a published checkpoint folder, file or hub id.

    `device`: "cuda", "mps" or "cpu"; by default the first of these that exists. UserError says what is missing and what to give.
    """
    name, built, preset, tokenizer, source = find(path, system, layout)
    return Pipeline(built, preset, tokenizer, id=name, source=source, device=device)
