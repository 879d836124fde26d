"""What a run tells whoever iterates over it."""
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Event:
    """Something that happened in the run of `id` in `folder`."""
    id: str
    folder: Path


@dataclass
class Started(Event):
    """The run is about to take its first step (the first after a resume)."""
    preset: str
    steps: int                               # of all stages
    done: int                                # taken before, on a resume
    parameters: int
    trainable: int                           # in the first stage
    samples: int | None                      # in the data; None for a stream
    data: str
    device: str
    precision: str
    ranks: int


@dataclass
class Stepped(Event):
    """A step that was logged."""
    stage: str
    step: int                                # over all stages
    steps: int
    losses: dict[str, float]
    total: float                             # the weighted sum of the losses
    lr: float
    grad_norm: float
    samples_per_s: float
    seconds: float
    skipped: int                             # samples that could not be read so far


@dataclass
class Saved(Event):
    """A checkpoint is whole and on disk."""
    step: int
    path: Path


@dataclass
class Noted(Event):
    """Something the user should know: skipped samples, a damaged checkpoint, a start being trained."""
    text: str


@dataclass
class Finished(Event):
    """The weights are written."""
    step: int
    losses: dict[str, float]                 # of the last step taken now; empty where nothing was left to do
    seconds: float                           # of this sitting
    samples: int                             # seen in this sitting
    weights: Path
