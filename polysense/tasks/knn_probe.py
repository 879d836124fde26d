"""k-nearest-neighbour probe (Wu et al. 2018, section 3.4; DINO's k = 20): neighbours by cosine vote with weight exp(cosine / 0.07)."""
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polysense.tasks.encode import Progress, class_names, encode_all_images, name_of, reader
from polysense.tasks.result import Result, classification


def run(subject: Any, test: Any, train: Any, *, k: int = 20, temperature: float = 0.07, seed: int = 0, tokens: str = "pooled",
        batch_size: int = 64, progress: Progress | None = None) -> Result:
    """`k` neighbours (all, where there are fewer training samples). `tokens`: which features, see `encode.reader`."""
    look = reader(subject.system, tokens) if tokens != "pooled" else None
    learn, asked = (encode_all_images(subject, s, progress, batch_size=batch_size, encode=look) for s in (train, test))
    names, (x, y), (features, label) = class_names(asked, learn), learn.labelled(), asked.labelled()
    scores = votes(features, x, y, len(names), k, temperature)
    notes = {**asked.notes(), "tokens": tokens, "k": min(k, len(y)), "train_samples": len(y)}
    return classification("knn_probe", name_of(subject), asked.name, scores, label, names, seed=seed, notes=notes)


def votes(features: Tensor, x: Tensor, y: np.ndarray, classes: int, k: int, temperature: float, block: int = 512) -> np.ndarray:
    """Weight of the votes [n,classes] that the k rows of x [m,D] nearest to each row of features [n,D] cast for their labels y [m].

    Weights are relative to the nearest neighbour's, which leaves their order as it is and keeps the exponential in range.
    """
    label, out = torch.from_numpy(y), torch.zeros(len(features), classes)
    for s in range(0, len(features), block):
        near, where = (features[s:s + block] @ x.T).topk(min(k, len(x)), 1)
        out[s:s + block].scatter_add_(1, label[where], ((near - near[:, :1]) / temperature).exp())
    return out.numpy()
