"""How near drawn pictures come to real ones: Fréchet and kernel distance between their features, and how clearly they show something.

The features are those of a small classifier that is taught, always in the same way, on real training pictures of the data at hand; published
FIDs are taken on Inception's and are not comparable. All systems examined on the same data are.
"""
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polysense.base.errors import UserError
from polysense.base.plan import Feed, ImagePlan
from polysense.data.loader import Loader
from polysense.tasks.encode import Progress, name_of
from polysense.tasks.result import Metric, Result

WIDTHS, DRAWS = (32, 64, 64), 100


class Judge(nn.Module):
    """A small convolutional classifier: pictures [B,3,H,W] -> features [B,64] and logits [B,C]."""

    def __init__(self, classes: int):
        super().__init__()
        layers: list[nn.Module] = []
        for into, out in zip((3, *WIDTHS[:-1]), WIDTHS, strict=True):
            layers += [nn.Conv2d(into, out, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
        self.body, self.head = nn.Sequential(*layers), nn.Linear(WIDTHS[-1], classes)

    def features(self, image: Tensor) -> Tensor:
        return self.body(image.contiguous(memory_format=torch.channels_last)).mean((2, 3))

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.features(image))


def teach(train: Any, plan: ImagePlan, *, steps: int = 400, batch_size: int = 128, seed: int = 0,
          fed: Iterable[dict[str, Tensor]] | None = None) -> Judge:
    """The judge of a source with labels, at the size and normalisation of `plan`; the same for the same arguments. fed: batches of image and label
    to learn from, where the source's pictures are in memory already."""
    classes = len(train.classes)
    if classes < 2:
        raise UserError(f"{train.name} has {classes} classes", "the judge learns to tell classes apart: take data with labels")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = Judge(classes).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(judge.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    fed = fed or Loader(train, Feed(image=plan), None, batch_size=batch_size, seed=seed, needs=("image", "label"))
    with torch.inference_mode(False), torch.enable_grad():
        for _, batch in zip(range(steps), fed):
            loss = F.cross_entropy(judge(batch["image"]), batch["label"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return judge.eval().requires_grad_(False)


@torch.inference_mode()
def seen_by(judge: Judge, images: Tensor, batch_size: int = 250) -> tuple[np.ndarray, np.ndarray]:
    """Pictures [N,3,H,W] -> (features [N,D], probabilities [N,C])."""
    features = torch.cat([judge.features(x) for x in images.split(batch_size)])
    return features.double().numpy(), judge.head(features).softmax(1).double().numpy()


def fid(one: np.ndarray, two: np.ndarray) -> float:
    """Fréchet distance of two Gaussians fitted to features [N,D], [M,D]: |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2) (Heusel et al. 2017)."""
    (m1, s1), (m2, s2) = ((x.mean(0), np.atleast_2d(np.cov(x, rowvar=False))) for x in (one, two))
    values, vectors = np.linalg.eigh(s1)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    shared = np.sqrt(np.clip(np.linalg.eigvalsh(root @ s2 @ root), 0, None)).sum()
    return float(max(((m1 - m2) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * shared, 0.0))


def kid(one: np.ndarray, two: np.ndarray) -> float:
    """Kernel distance: the unbiased squared maximum mean discrepancy under (x.y / D + 1)^3 (Binkowski et al. 2018)."""
    n, m, d = len(one), len(two), one.shape[1]
    a, b, c = ((x @ y.T / d + 1) ** 3 for x, y in ((one, one), (two, two), (one, two)))
    return float((a.sum() - np.trace(a)) / (n * (n - 1)) + (b.sum() - np.trace(b)) / (m * (m - 1)) - 2 * c.mean())


def compared(exam: str, subject: Any, test: Any, train: Any, drawn: Tensor, *, seed: int, judge_steps: int, notes: dict[str, Any]) -> Result:
    """The result of drawn pictures [N,3,H,W] against the pictures of `test`."""
    plan = subject.preset.feed.image
    judge = teach(train, plan, steps=judge_steps)
    fed = Loader(test, Feed(image=plan), None, batch_size=250, train=False, needs=("image", "label"))
    held = list(fed)
    real, _ = seen_by(judge, torch.cat([b["image"] for b in held]))
    made, chance = seen_by(judge, drawn)
    if len(made) < 2 or len(real) < 2:
        raise UserError(f"{len(made)} drawn and {len(real)} real pictures", "distances need at least two of each, and mean little below some hundred")
    right = [float((judge(b["image"]).argmax(1) == b["label"]).float().mean()) for b in held]
    rng, sure = np.random.default_rng(seed), (chance.max(1) > 0.9).astype(float)
    rows = [(rng.integers(len(made), size=len(made)), rng.integers(len(real), size=len(real))) for _ in range(DRAWS)]

    def metric(value: float, again: list[float]) -> Metric:
        low, high = np.percentile(again, [2.5, 97.5])
        return Metric(value, float(low), float(high))

    few = rows[:20]                          # a kernel distance costs the product of both numbers of pictures
    return Result(exam, name_of(subject), test.name, len(made), {
        "fid": metric(fid(made, real), [fid(made[i], real[j]) for i, j in rows]),
        "kid": metric(kid(made, real), [kid(made[np.unique(i)], real[np.unique(j)]) for i, j in few]),
        "confident": metric(float(sure.mean()), [float(sure[i].mean()) for i, _ in rows])},
        notes={"judge_accuracy": sum(right) / len(right), "real": len(real), **notes})


def run(subject: Any, test: Any, train: Any, *, count: int = 500, steps: int = 50, seed: int = 0, judge_steps: int = 400, batch_size: int = 100,
        progress: Progress | None = None) -> Result:
    """`count` pictures drawn in `steps` steps each, without words."""
    out: list[Tensor] = []
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(seed)
        for start in range(0, count, batch_size):
            out.append(subject.system.sample_image(min(batch_size, count - start), steps=steps).float().cpu())
            if progress:
                progress(min(start + batch_size, count), count)
    return compared("generation", subject, test, train, torch.cat(out), seed=seed, judge_steps=judge_steps, notes={"steps": steps})
