"""The closed vocabulary of batches: every tensor a loader may hand to an objective has one name, shape and meaning."""
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from polysense.base.errors import UserError

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Key:
    shape: str                               # legend: B batch, V views, T frames, L tokens, N objects, H W pixels
    dtype: str                               # "float", "int" or "bool"
    means: str


VOCABULARY: dict[str, Key] = {
    "index": Key("B", "int", "position of the sample in its source; always offered, for error messages"),
    "image": Key("B 3 H W", "float", "picture, normalised as the preset's feed says"),
    "views": Key("B V 3 H W", "float", "V independently augmented views of the same picture"),
    "crops": Key("B V 3 H W", "float", "V small random crops of the same picture (multi-crop)"),
    "text": Key("B L", "int", "token ids, trimmed to the longest of the batch"),
    "retold": Key("B L", "int", "token ids of `text` with a word replaced, moved or left out"),
    "segment": Key("B L", "int", "which of two sentences a token of `text` belongs to: 0 or 1; 0 on padding"),
    "follows": Key("B", "int", "1 where the second sentence of `text` goes on from the first, 0 where it is from elsewhere"),
    "text_mask": Key("B L", "bool", "True where `text` holds a real token, False on padding"),
    "word": Key("B L", "int", "which word, counted from 0, a token of `text` is a piece of; -1 on special tokens and padding"),
    "has": Key("B", "int", "what the sample has: 0 a picture and its text, 1 a picture alone, 2 a text alone; the other key holds a filler"),
    "label": Key("B", "int", "class number"),
    "names": Key("B C L", "int", "token ids of what each of the C classes is called, the same for every sample"),
    "tags": Key("B C", "float", "multi-label targets, 0 or 1"),
    "video": Key("B T 3 H W", "float", "frames, normalised"),
    "video_mask": Key("B T", "bool", "True where `video` holds a real frame, False on padding"),
    "audio": Key("B S", "float", "mono samples in [-1, 1] at the feed's rate"),
    "thermal": Key("B 1 H W", "float", "heat picture of one channel"),
    "imu": Key("B C S", "float", "acceleration and rotation, C channels of S samples"),
    "features": Key("B D", "float", "cached pooled features of a locked tower"),
    "regions": Key("B N D", "float", "features of detected regions"),
    "boxes": Key("B N 4", "float", "boxes as x0 y0 x1 y1 in [0, 1]; rows of -1 are padding"),
    "box_label": Key("B N", "int", "class of each box; -1 is padding"),
    "mask": Key("B N H W", "bool", "one mask an object"),
    "polygon": Key("B N P 2", "float", "outline of each mask's largest piece, x y in [0, 1], clockwise; -1 is padding"),
    "keypoints": Key("B N K 3", "float", "places of each object's parts, x y in [0, 1] and 1 where seen, 0 where hidden; -1 is padding"),
    "depth": Key("B 1 H W", "float", "distance, 0 near to 1 far"),
    "hint": Key("B C H W", "float", "spatial condition: edges, depth, segments"),
    "edited": Key("B 3 H W", "float", "`image` after the instruction in `text`"),
    "question": Key("B L", "int", "token ids of a question"),
    "answer": Key("B L", "int", "token ids of its answer"),
    "chat": Key("B L", "int", "token ids of a conversation about the picture, the feed's id for a picture in its place, 0 is padding"),
    "chat_reply": Key("B L", "bool", "True on the replies in `chat`, their end tokens included: what is learned"),
    "brief": Key("B L", "int", "as `chat`: one turn that asks for a description, the caption replies"),
    "brief_reply": Key("B L", "bool", "True on the reply in `brief`"),
    "images": Key("B N 3 H W", "float", "pictures that stand in `chat` or `episode`, in the order of their places"),
    "episode": Key("B L", "int", "token ids of interleaved pictures and texts, the feed's id for a picture in its place, 0 is padding"),
    "origin": Key("B 3", "float", "start of a camera ray"),
    "direction": Key("B 3", "float", "unit direction of a camera ray"),
    "rgb": Key("B 3", "float", "colour seen along a ray, in [0, 1]"),
}


class Losses(dict[str, Tensor]):
    """Named scalar terms to minimise; `keep` carries detached tensors that after_step needs (queue keys, teacher logits)."""

    def __init__(self, **terms: Tensor):
        super().__init__(terms)
        self.keep: dict[str, Tensor] = {}

    def keeping(self, **tensors: Tensor) -> "Losses":
        self.keep |= {k: v.detach() for k, v in tensors.items()}
        return self

    def total(self, weights: Iterable[tuple[str, float]] = ()) -> Tensor:
        """Weighted sum; a term without a weight counts once, a weight without a term is an error."""
        weight = dict(weights)
        if extra := set(weight) - set(self):
            raise UserError(f"weights name no loss term: {sorted(extra)}", f"the terms are {sorted(self)}")
        return torch.stack([weight.get(k, 1.0) * v for k, v in self.items()]).sum()


def check_batch(batch: Batch, needs: Iterable[str]) -> None:
    """Refuses a batch that lacks a needed key, has a key outside the vocabulary, or a tensor of wrong rank or kind.

    Raises UserError that names the key, what it should be and what it is.
    """
    for need in needs:
        if not any(k in batch for k in need.split("|")):
            raise UserError(f"the batch lacks {need!r}", f"it has {sorted(batch)}")
    for name, value in batch.items():
        if name not in VOCABULARY:
            raise UserError(f"{name!r} is not a batch key", f"the keys are {', '.join(VOCABULARY)}")
        key = VOCABULARY[name]
        if value.ndim != len(key.shape.split()):
            raise UserError(f"{name!r} has shape {tuple(value.shape)}", f"it should be [{key.shape}]: {key.means}")
        kind = "bool" if value.dtype == torch.bool else "float" if value.is_floating_point() else "int"
        if kind != key.dtype:
            raise UserError(f"{name!r} holds {value.dtype}", f"it should be {key.dtype}: {key.means}")
