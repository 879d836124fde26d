"""Word by word and patch by patch: late interaction, and the terms of sparse systems."""
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from polysense.base.errors import UserError
from polysense.data.images import decode, window
from polysense.pipeline.heat import NEUTRAL, STOP, Explanation, Heat, placed
from polysense.pipeline.pairs import THUMBNAIL
from polysense.tasks.zero_shot import asked, by_words, patch_scores, templates_of, words_of

Array = np.ndarray


def encode_words(pipeline: Any, text: str) -> Array:
    """A text -> its tokens' vectors [L,D], unit norm, padding left out."""
    pipeline._need("encode_words")
    vectors: Array = pipeline._run("encode_words", pipeline.read_texts([text]))[0]
    return vectors[np.linalg.norm(vectors, axis=1) > 0.5]


def late_scores(patches: Array, words: Array) -> Array:
    """patches [N,P,D], words [L,D] -> [N]: the mean over words of their best patch (FILIP's text-to-image similarity, equation 5)."""
    return (patches @ words.T).max(1).mean(1)


def scorer(pipeline: Any, labels: Sequence[str], templates: str | Sequence[str]) -> Callable[[torch.Tensor], Array]:
    """Prepared pictures [B,3,H,W] -> how like each label they are [B,C]: the cosine with its row, or of a system that compares patch by word, the
    mean similarity with its prompts."""
    if not by_words(pipeline.system):
        rows = pipeline.prompts(labels, templates)
        return lambda batch: pipeline.encode_prepared(batch) @ rows.T
    said = words_of(pipeline, asked(pipeline, labels, templates_of(templates)))
    return lambda batch: patch_scores(torch.from_numpy(pipeline._run("encode_patches", batch.to(pipeline.device))).flatten(1, 2), said).numpy()


def label_scores(pipeline: Any, images: Sequence[Any], labels: Sequence[str], templates: str | Sequence[str], progress: Any = None) -> Array:
    """The same of pictures in any form."""
    if not by_words(pipeline.system) or not images or not labels:
        return pipeline.encode(images=images, progress=progress) @ pipeline.prompts(labels, templates).T
    score, out = scorer(pipeline, labels, templates), list[Array]()
    for start in range(0, len(images), 64):
        out.append(score(pipeline.read_images(images[start:start + 64])))
        if progress:
            progress(min(start + 64, len(images)), len(images))
    return np.concatenate(out)


def encode_terms(pipeline: Any, images: Sequence[Any] | None = None, texts: Sequence[str] | None = None) -> Array:
    """Pictures or texts -> [N,V], the weight of each token of the vocabulary."""
    if images is not None:
        pipeline._need("encode_image_terms")
        return pipeline._run("encode_image_terms", pipeline.read_images(images))
    pipeline._need("encode_text_terms")
    return pipeline._run("encode_text_terms", pipeline.read_texts(list(texts or ())))


def terms_of(pipeline: Any, weights: Array, top: int = 10) -> list[tuple[str, float]]:
    """The heaviest terms of one row of weights [V], as (token, weight), heaviest first."""
    best = [int(i) for i in np.argsort(-weights)[:top] if weights[i] > 0]
    return [(plain_token(pipeline.tokenizer.token(i)), float(weights[i])) for i in best]


def explain_words(pipeline: Any, image: Any, text: str, *, words: int = 4) -> Explanation:
    """Where each word of a text finds its best patch: one heat-map a word, by the tokens' own vectors; the whole is their mean."""
    pipeline._need("encode_patches", "encode_words")
    picture = decode(image)
    patches: Array = pipeline._run("encode_patches", pipeline.read_images([picture]))[0]
    vectors, spans = encode_words(pipeline, text), pipeline.tokenizer.spans(text)
    if len(spans) < len(vectors):
        raise UserError("this system's words are not its tokenizer's tokens", "search without --why")
    said_of_any = np.concatenate([encode_words(pipeline, t) for t in NEUTRAL])
    neutral = said_of_any.mean(0) if len(said_of_any) else 0.0        # a vocabulary may have no word for what says nothing
    thumbnail = picture.copy()
    thumbnail.thumbnail((THUMBNAIL, THUMBNAIL))
    seen = window(picture.size, pipeline._image_plan())
    heats: dict[str, list[Array]] = {}
    for (start, stop), vector in zip(spans, vectors, strict=False):
        word = _whole_word(text, start, stop)
        if word and word not in STOP:
            heats.setdefault(word, []).append(patches @ (vector - neutral))
    said = [_heat(word, np.mean(maps, 0), thumbnail.size, seen) for word, maps in heats.items()]
    whole = _heat(text, np.mean([h.patches for h in said], 0) if said else np.zeros(patches.shape[:2], np.float32), thumbnail.size, seen)
    return Explanation(text, thumbnail, whole, tuple(sorted(said, key=lambda h: -h.score)[:words]))


def _heat(word: str, raw: Array, size: tuple[int, int], seen: tuple[float, float, float, float]) -> Heat:
    flat = (raw - raw.min()) / max(float(raw.max() - raw.min()), 1e-6)
    return Heat(word, float(raw.max()), 1.0, placed(flat, size, seen), raw.astype(np.float32))


def _whole_word(text: str, start: int, stop: int) -> str:
    """The word of a text that the characters [start, stop) belong to, lower-cased; "" for start, end and signs."""
    while start > 0 and start < stop and text[start - 1].isalnum():
        start -= 1
    while start < stop < len(text) and text[stop].isalnum():
        stop += 1
    return text[start:stop].strip().lower() if any(c.isalnum() for c in text[start:stop]) else ""


def plain_token(token: str) -> str:
    """A token of a vocabulary as it is read: without the signs of its kind."""
    return token.replace("</w>", "").removeprefix("##")


def patches_of(pipeline: Any, batch: torch.Tensor) -> Array:
    """Pictures that `prepare` made, [B,3,H,W] -> the vectors of their patches, [B,P,D]."""
    grid = pipeline._run("encode_patches", batch.to(pipeline.device))
    return grid.reshape(len(grid), -1, grid.shape[-1])


def terms_of_prepared(pipeline: Any, batch: torch.Tensor) -> Array:
    """Pictures that `prepare` made, [B,3,H,W] -> [B,V]."""
    pipeline._need("encode_image_terms")
    return pipeline._run("encode_image_terms", batch.to(pipeline.device))
