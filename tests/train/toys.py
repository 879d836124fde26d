"""A system small enough to train in milliseconds, with everything the loop has to respect: dropout, batch norm, a frozen part, a queue."""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from polysense.base.batch import Batch, Losses
from polysense.base.system import After, Optim, Preset, Spec, Stage, System
from polysense.objectives.contrastive import info_nce
from polysense.objectives.spread import gather


class Block(nn.Module):
    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down, self.dropout = nn.Linear(width, 2 * width), nn.Linear(2 * width, width), nn.Dropout(dropout)

    def forward(self, x):
        return x + self.down(self.dropout(F.gelu(self.up(self.norm(x)))))


class Tower(nn.Module):
    def __init__(self, inputs: int, width: int, dropout: float):
        super().__init__()
        self.patch, self.cls = nn.Linear(inputs, width), nn.Parameter(torch.zeros(1, width))     # one row: a rank of two has none of it
        self.blocks = nn.ModuleList(Block(width, dropout) for _ in range(3))
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        x = self.patch(x) + self.cls
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Toy(System):
    """Two towers and a temperature over `image` [B,3,2,2] and `text` [B,L]."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        width: int = 8
        dropout: float = 0.0
        noise: float = 0.5                   # dropout of the frozen part, which must never act while it is frozen

    def __init__(self, c: Config):
        super().__init__()
        self.vision, self.text = Tower(12, c.width, c.dropout), Tower(c.width, c.width, c.dropout)
        self.words = nn.Embedding(64, c.width)
        self.frozen = nn.Sequential(nn.Linear(12, 12), nn.BatchNorm1d(12), nn.Dropout(c.noise))
        self.log_scale = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("queue", torch.zeros(4, c.width))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def embed(self, batch: Batch) -> dict[str, torch.Tensor]:
        image = self.vision(self.frozen(batch["image"].flatten(1)))
        return {"image": F.normalize(image, dim=-1), "text": F.normalize(self.text(self.words(batch["text"]).mean(1)), dim=-1)}

    def compare(self, got: dict[str, torch.Tensor]) -> Losses:
        logits, truth = self.log_scale.exp() * got["image"] @ got["text"].T, torch.arange(len(got["image"]))
        return Losses(images=F.cross_entropy(logits, truth), texts=F.cross_entropy(logits.T, truth)).keeping(image=got["image"])

    def pointwise(self, batch: Batch) -> Losses:
        got = self.embed(batch)
        return Losses(gap=(self.log_scale.exp() * got["image"] - got["text"]).square().sum(1).mean()).keeping(image=got["image"])

    def compare_all(self, got: dict[str, torch.Tensor]) -> Losses:
        """As `compare`, over the samples of all ranks."""
        return Losses(contrast=info_nce(got["image"], got["text"], self.log_scale.exp())).keeping(image=got["image"])

    def after_step(self, after: After) -> None:
        self.queue.copy_(torch.cat([gather(after.keep["image"]), self.queue])[:4])
        self.seen += 1


OF_OPTIM = set(Optim.__dataclass_fields__) - {"name"}
TRAINABLE = ("vision.*", "text.*", "words.*", "log_scale")


def batch_of(index: list[int]) -> Batch:
    """The same sample for the same index, always."""
    made = [torch.Generator().manual_seed(i) for i in index]
    return {"image": torch.stack([torch.randn(3, 2, 2, generator=g) for g in made]),
            "text": torch.stack([torch.randint(0, 64, (5,), generator=g) for g in made]), "index": torch.tensor(index)}


def stage_of(**changes) -> Stage:
    optim = Optim(**{"lr": 1e-2, **{k: changes.pop(k) for k in list(changes) if k in OF_OPTIM}})
    return Stage(**{"objective": Toy.compare, "embed": Toy.embed, "trainable": TRAINABLE, "steps": 6, "batch_size": 8, "optim": optim,
                    "precision": "fp32", **changes})


def toy(seed: int = 0, **config) -> Toy:
    torch.manual_seed(seed)
    return Toy(Toy.Config(**config))


def preset_of(*stages: Stage, **config) -> Preset:
    return Preset(config=Toy.Config(**config), stages=stages or (stage_of(),), data="toy")


class ToyStream:
    """Endless batches; the batch at a position depends on (seed, position) alone, each rank gets its slice."""

    def __init__(self, size: int, seed: int, state, rank: int = 0, world: int = 1):
        self.size, self.seed, self.at, self.rank, self.world, self.skipped = size, seed, (state or {"at": 0})["at"], rank, world, []

    def __iter__(self):
        while True:
            index = [self.seed * 100_003 + self.at * self.size + i for i in range(self.size)]
            self.at += 1
            share = self.size // self.world
            yield batch_of(index[self.rank * share:(self.rank + 1) * share])

    def state(self):
        return {"at": self.at}


class ToyFeeding:
    name, size, tokenizer = "toy", 1000, None

    def open(self, keep_tokenizer, lent):
        pass

    def stream(self, stage, seed, state, world):
        return ToyStream(stage.batch_size, seed, state, world.rank, world.size)

    def names(self, rows):
        return [f"sample{r}" for r in rows]
