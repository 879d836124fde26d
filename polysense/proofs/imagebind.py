"""Sound and text meet though no sound was ever paired with a text: spoken digits are recognised by the names of digits.

A small CLIP learns handwritten digits with sentences about them and is frozen. An audio tower then sees recordings of spoken digits, each with
some picture of the same digit, and nothing else. Recordings never heard are classified by text prompts. The control sees the same recordings with
pictures of random digits: what it scores comes from no pairing.

Sizes and steps were chosen on recordings held out of the training part (250, seed 7), never on the test recordings that are reported.
"""
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from polysense.base.system import Preset
from polysense.data import source
from polysense.data.clips import cut, resampled, samples_of
from polysense.data.named import DIGIT_SAYINGS, DIGITS
from polysense.data.sources import ListSource, Sample, Source, offered
from polysense.nn.mel import MelSpectrogram
from polysense.nn.norm import LayerNorm
from polysense.pipeline import Pipeline
from polysense.proofs.arms import some_of, train_arm
from polysense.proofs.harness import Outcome
from polysense.systems.align import clip, imagebind
from polysense.tasks.zero_shot import zero_shot_classifier
from polysense.train.starts import carry

METRIC, HIGHER_IS_BETTER = "accuracy of spoken digits classified by text prompts (10 classes)", True
DATA = "fsdd (2,250 recordings to learn, 100 for the test) paired with pictures of mnist; CLIP on 5,000 pictures of mnist with sentences"
RATE, SECONDS, SIZE = 8000, 0.6, 28
CLIP_STEPS, STEPS = 200, 400


class Told(ListSource):
    """Digits with sentences about them."""

    def __init__(self, base: Source):
        super().__init__("mnist with sentences", [{"id": base.id(i), "captions": [s.format(DIGITS[label]) for s in DIGIT_SAYINGS]}
                                                  for i, label in enumerate(base.labels())], ("image", "text"))
        self.base = base

    def heavy(self, i: int) -> tuple[str, ...]:
        return ("image",)

    def _load(self, i: int, key: str) -> Any:
        return self.base.load(i, key)


class Paired(Source):
    """Recordings, each with a picture of the same digit (`honest`), or of a random one."""

    def __init__(self, sounds: Source, pictures: Source, seed: int, honest: str = "honest"):
        self.sounds, self.pictures, self.name, self.rate = sounds, pictures, f"{honest} pairs", sounds.rate
        self.offers = offered(("image", "audio"))
        rng, shown = np.random.default_rng(seed), np.array(pictures.labels())
        digits = np.array(sounds.labels()) if honest == "honest" else rng.integers(0, 10, len(sounds))
        self.picture = [int(rng.choice(np.flatnonzero(shown == d))) for d in digits]

    def __len__(self) -> int:
        return len(self.sounds)

    def id(self, i: int) -> str:
        return self.sounds.id(i)

    def _about(self, i: int) -> Sample:
        return {}

    def _load(self, i: int, key: str) -> Any:
        return self.sounds.load(i, "audio") if key == "audio" else self.pictures.load(self.picture[i], "image")


def pair() -> tuple[Preset, Preset]:
    """A CLIP for pictures of 28 px, and the ImageBind that stands on it."""
    image, text, words = clip.body(96, 3, 3), clip.body(64, 2, 2), {"vocab": 256, "length": 16, "end": 2}
    sizes = {"feed.image.size": SIZE, "feed.train_image.size": SIZE, "feed.train_image.flip": 0.0, "feed.train_image.jitter": 0.0,
             "feed.text.vocab": 256, "feed.text.length": 16, "stages.0.steps": CLIP_STEPS}
    lent = clip.tiny().but(config=clip.config(SIZE, 7, image, text, 64, **words)).but(**sizes)
    mel = MelSpectrogram.Config(rate=RATE, bins=48, frames=60)
    ours = imagebind.tiny().but(config=imagebind.ImageBind.Config(
        **imagebind.clip(SIZE, 7, image, text, 64, LayerNorm.Config(), **words), clip_samples=round(RATE * SECONDS),
        audio=imagebind.bound(96, 3, 3, 64, 20.0, mel=mel, kernel=12, stride=8)))
    return lent, ours.but(**{"feed.image.size": SIZE, "feed.text.vocab": 256, "feed.text.length": 16, "feed.audio.rate": RATE,
                             "feed.audio.seconds": SECONDS, "feed.audio.train_seconds": SECONDS, "stages.0.steps": STEPS})


def heard(subject: Pipeline, sounds: Source) -> float:
    """Share of the recordings whose nearest prompt names their digit."""
    plan = subject.preset.feed.audio
    waves = [cut(resampled(sounds.load(i, "audio"), RATE, RATE), samples_of(plan, False)) for i in range(len(sounds))]
    with torch.inference_mode():
        names = zero_shot_classifier(subject, list(DIGITS), DIGIT_SAYINGS)
        vectors = subject.system.encode_audio(torch.from_numpy(np.stack(waves)))
    return float(((vectors @ names.T).argmax(1).numpy() == np.array(sounds.labels())).mean())


def arms(seed: int, sounds: Source, test: Source) -> dict[str, float]:
    """Accuracies of the honest and of the shuffled pairing, on the same frozen CLIP."""
    pictures, (lent, ours) = some_of(source("mnist"), 5000, seed), pair()
    base = train_arm("clip", lent, Told(pictures), needs=("image", "text"), seed=seed).subject
    out = {}
    for name in ("honest", "shuffled"):
        def stand(system: Any) -> None:
            for start in ours.starts:
                carry(start, SimpleNamespace(system=base.system), system)  # type: ignore[arg-type]

        arm = train_arm("imagebind", ours, Paired(sounds, pictures, seed, name), needs=("image", "audio"), seed=seed, tokenizer=base.tokenizer,
                        prepare=stand).subject
        out[name] = heard(arm, test)
        out[f"{name}: frozen towers unchanged"] = all(torch.equal(v, base.system.state_dict()[f"text.{k}"])
                                                      for k, v in arm.system.text.state_dict().items())
    return out


def run(seed: int) -> Outcome:
    found = arms(seed, source("fsdd"), source("fsdd", split="test"))
    return Outcome(found["honest"], {"five times chance": 0.5, "shuffled pairs": found["shuffled"]}, {"chance": 0.1} | {
        k: v for k, v in found.items() if "unchanged" in k})
