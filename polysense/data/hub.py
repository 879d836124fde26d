"""Hugging Face data sets as sources."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from polysense.base.errors import UserError, need_extra
from polysense.data.sources import HEAVY, Sample, Source, held_out, offered
from polysense.data.user import SPLITS, captions_of, classes_of, columns, picture_of


class TableOfHub(Source):
    """A Hugging Face data set with columns mapped to roles; rows are read as they are asked for."""

    def __init__(self, name: str, data: Any, at: dict[str, list[str]], split: str, classes: Sequence[str]):
        self.name, self.data, self.at, self.split, self.classes = name, data, at, split, tuple(classes)
        self.light = data.remove_columns(at["image"])
        self.numbered = {c: i for i, c in enumerate(self.classes)}
        roles = (("text", "caption"), ("label", "label"), ("question", "question"), ("answer", "answer"))
        self.offers = offered(("image", *(key for key, role in roles if role in at)))

    def __len__(self) -> int:
        return len(self.data)

    def id(self, i: int) -> str:
        return f"{self.split}_{i:06d}"

    def _about(self, i: int) -> Sample:
        row, about = self.light[i] if self.light.column_names else {}, {}
        if "caption" in self.at:
            about["captions"] = [c for column in self.at["caption"] for c in captions_of(row[column])]
        if "label" in self.at:
            value = row[self.at["label"][0]]
            about["label"] = value if isinstance(value, int) else self.numbered[str(value)]
        return about | {role: row[self.at[role][0]] for role in ("question", "answer") if role in self.at}

    def _load(self, i: int, key: str) -> Any:
        from polysense.data.images import decode

        if key not in HEAVY[:1]:
            return super()._load(i, key)
        image, _ = picture_of(self.data[i][self.at["image"][0]], Path(), i)
        return decode(image)


def hf_source(spec: str | Any, split: str, options: dict[str, str]) -> Source:
    """`NAME`, `NAME:CONFIG` on the hub, a folder written by `save_to_disk`, or a Dataset / DatasetDict. Needs the extra `hub`."""
    datasets = need_extra("datasets", "hub")
    data: Any = spec
    name = "hf"
    if isinstance(spec, str):
        name = f"hf:{spec}"
        try:
            if Path(spec).expanduser().is_dir():
                data = datasets.load_from_disk(str(Path(spec).expanduser()))
            else:
                hub, _, config = spec.partition(":")
                data = datasets.load_dataset(hub, config or None)
        except Exception as error:  # the library raises many kinds: not found, offline, gated, damaged
            raise UserError(f"cannot open the Hugging Face data set {spec!r}", f"{type(error).__name__}: {error}".splitlines()[0]) from error
    whole = not isinstance(data, dict)
    if not whole:
        from polysense.data.named import split_of

        called = {SPLITS.get(str(k), str(k)): k for k in data}
        alone = len(called) == 1
        data = data[called[next(iter(called)) if alone else split_of(name, split, tuple(called))]]
        whole = alone
    at = columns(data.column_names, options, name)
    # Undecoded, so that a damaged picture costs one sample and not the whole batch of rows that the library reads.
    for column, feature in data.features.items():
        if column in at["image"] and isinstance(feature, datasets.Image):
            data = data.cast_column(column, datasets.Image(decode=False))
    label = at.get("label", [None])[0]
    feature: Any = data.features[label] if label else None
    classes = list(feature.names) if isinstance(feature, datasets.ClassLabel) else list(classes_of(data[label])[0]) if label else []
    if label and not isinstance(feature, datasets.ClassLabel) and data.features[label].dtype.startswith("int"):
        classes = [str(i) for i in range(max(data[label], default=-1) + 1)]
    source = TableOfHub(name, data, at, split, classes)
    return held_out(source, split) if whole else source
