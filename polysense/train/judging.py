"""Who says whether a picture shows what its text names (`Entities.judge`): a trained dual encoder, found or trained once like a Start, on the same
pairs as the run that asks it."""
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from polysense.base.catalogue import card_of
from polysense.base.errors import UserError
from polysense.base.plan import Preset, Start
from polysense.base.telling import Cleaned, Entities
from polysense.data.entities import EntityBase, Score
from polysense.data.images import read_images
from polysense.data.sources import BadSample, Source
from polysense.data.told import tellings
from polysense.train.adapting import RunStart
from polysense.train.folder import WEIGHTS, Run, read_facts
from polysense.train.starts import cache_root, locked

AT_ONCE = 64                                 # pictures


@dataclass(frozen=True, kw_only=True)
class DataStart(Start):
    """The cached run of a preset on other data than its own."""
    data: str


def judge_start(preset: Preset) -> Start | None:
    """The run that a preset's feed asks about pictures and texts, where it asks one."""
    asked = next((t.judge for t in tellings(preset.feed) if isinstance(t, Entities | Cleaned) and t.judge), "")
    if not asked:
        return None
    folder = Path(asked).expanduser()
    run = read_facts(folder)["system"] if (folder / "run.json").is_file() else ""
    id, _, name = asked.partition(":")
    if not {"encode_image", "encode_text"} <= set(card_of(run or id).can):
        raise UserError(f"{asked!r} cannot judge whether a text fits a picture", "name a system that encodes both, such as clip, or a run of one")
    if run:
        return RunStart(into="", from_=run, folder=str(folder.absolute()))
    return DataStart(into="", from_=id, preset=name or "tiny", data=preset.data)


class RunJudge:
    """Cosines of a system's features. `tokenizer` reads its texts as its preset says."""

    def __init__(self, system: Any, preset: Preset, tokenizer: Any):
        self.system, self.plan, self.tokenizer = system, preset.feed.image, tokenizer

    def score(self, source: Source, base: EntityBase, rows: list[int]) -> Score:
        texts = [e.text for e in base.entities]
        seen, said = self.features(source, texts, rows)
        place = {text: k for k, text in enumerate(texts)}
        return lambda i, asked: [float(seen[i] @ said[place[t]]) for t in asked]

    def features(self, source: Source, texts: list[str], rows: list[int]) -> tuple[Tensor, Tensor]:
        """Unit features of the pictures `rows` [len(source),D], nought elsewhere and where one cannot be read, and of the texts [T,D]."""
        device = next(self.system.parameters()).device
        self.system.eval()
        with torch.inference_mode():
            said = torch.cat([self.system.encode_text(self.tokenizer(texts[k:k + 256]).to(device)).float().cpu() for k in range(0, len(texts), 256)])
            seen = torch.zeros(len(source), said.shape[1])
            for k in range(0, len(rows), AT_ONCE):
                good = [(i, picture) for i in rows[k:k + AT_ONCE] if (picture := loaded(source, i)) is not None]
                if good:
                    assert self.plan is not None
                    pictures = read_images(self.plan, [p for _, p in good]).to(device)
                    seen[[i for i, _ in good]] = self.system.encode_image(pictures).float().cpu()
        return torch.nn.functional.normalize(seen, dim=1), torch.nn.functional.normalize(said, dim=1)


class CachedJudge(RunJudge):
    """The same of a run folder. What it saw is kept in the cache under a hash of its weights, the data and the texts: a run that is gone on with gets
    the very same numbers."""

    def __init__(self, run: Run):
        super().__init__(run.system, run.preset, run.tokenizer)
        self.run = run

    def features(self, source: Source, texts: list[str], rows: list[int]) -> tuple[Tensor, Tensor]:
        key = hashlib.sha256((self.run.folder / WEIGHTS).read_bytes() if (self.run.folder / WEIGHTS).is_file() else str(self.run.folder).encode())
        for part in (source.name, source.split, len(source), *texts, *(source.id(i) for i in rows)):
            key.update(f"{part}\n".encode("utf-8", "surrogateescape"))
        place = cache_root().parent / "judged" / f"{key.hexdigest()[:24]}.safetensors"
        with locked(place):
            if not place.is_file():
                seen, said = super().features(source, texts, rows)
                save_file({"seen": seen, "said": said}, part := place.with_suffix(".part"))
                part.replace(place)
            kept = load_file(place)
        return kept["seen"], kept["said"]


def loaded(source: Source, i: int) -> Any:
    try:
        return source.load(i, "image")
    except BadSample:
        return None
