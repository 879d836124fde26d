"""Zero-shot labels for a folder of pictures, as CSV.

`label_folder(pipeline, photos, labels, out, *, templates=..., top=1, batch_size=64, workers=4, progress=None) -> LabelReport`,
`read_labels(file | list) -> list[str]`.

Answers are appended to `OUT.part` a batch at a time; a run that was interrupted goes on there if labels, templates and model are the same. The CSV
appears whole at the end.
"""
import csv
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from polysense.app.files import Progress, ahead, find_photos, place, readable
from polysense.base.errors import UserError
from polysense.pipeline import TEMPLATES, softmax
from polysense.pipeline.words import scorer
from polysense.tasks.zero_shot import templates_of


@dataclass(frozen=True)
class LabelReport:
    """What was written: `labelled` pictures in `out` (`resumed` of them by an earlier, interrupted run), how often each label came first."""
    out: str
    labelled: int
    resumed: int
    counts: dict[str, int]
    skipped: list[tuple[str, str]]

    def to_json(self) -> dict[str, Any]:
        return {"out": self.out, "labelled": self.labelled, "resumed": self.resumed, "counts": self.counts,
                "skipped": [{"path": p, "reason": r} for p, r in self.skipped]}


def read_labels(labels: str | Path | Sequence[str]) -> list[str]:
    """Labels from a file with one a line, or as given; blank lines and repetitions fall away, order stays."""
    if isinstance(labels, (str, Path)):
        try:
            labels = Path(labels).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the labels in {str(labels)!r} ({error})", "give a UTF-8 text file with one label a line") from error
    found = list(dict.fromkeys(name.strip() for name in labels if name.strip()))
    if not found:
        raise UserError("there are no labels", "write one a line")
    return found


def label_folder(pipeline: Any, photos: str | Path, labels: str | Path | Sequence[str], out: str | Path, *,
                 templates: str | Sequence[str] = TEMPLATES, top: int = 1, batch_size: int = 64, workers: int = 4,
                 progress: Progress | None = None) -> LabelReport:
    """Label every picture below `photos` and write `path,label,probability[,label_2,probability_2 ...],error` to `out`, one row a picture.

    Paths are relative to `photos`. Probabilities are a softmax over the labels given. A picture that cannot be read keeps a row with its error.
    """
    names, out, photos = read_labels(labels), Path(out), Path(os.path.abspath(photos))
    if top < 1:
        raise UserError(f"cannot give {top} labels a picture", "ask for at least one")
    top = min(top, len(names))
    templates = templates_of(templates)
    score = scorer(pipeline, names, templates)
    paths = sorted(p for p, _, _ in find_photos(photos))
    if not paths:
        raise UserError(f"no pictures in {str(photos)!r}", "check the path")
    what = json.dumps([pipeline.digest, names, list(templates), top, str(photos)])
    task = hashlib.blake2b(what.encode(), digest_size=16).hexdigest()
    part = out.with_name(out.name + ".part")
    answers = _resume(part, task)
    # only what is still there counts as done; a picture that came since is new
    answers = {p: a for p, a in answers.items() if p in set(paths)}
    resumed, todo = len(answers), [p for p in paths if p not in answers]
    if progress:
        progress(resumed, len(paths))
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(part, "a", encoding="utf-8") as f:
        for batch in _batches(pipeline, todo, batch_size, workers):
            good = [seen for _, seen in batch if isinstance(seen, torch.Tensor)]
            chance = iter(softmax(pipeline.scale * score(torch.stack(good))) if good else ())
            for path, seen in batch:
                answers[path] = {"error": seen} if isinstance(seen, str) else _best(next(chance), names, top)
                f.write(json.dumps({"path": path, **answers[path]}) + "\n")
            f.flush()
            if progress:
                progress(len(answers), len(paths))
    _write(out, photos, {p: answers[p] for p in paths}, top)
    part.unlink()
    return LabelReport(str(out), sum("labels" in a for a in answers.values()), resumed,
                       dict(Counter(a["labels"][0][0] for a in answers.values() if "labels" in a).most_common()),
                       [(p, answers[p]["error"]) for p in paths if "error" in answers[p]])


def _batches(pipeline: Any, paths: list[str], batch_size: int, workers: int) -> Iterator[list[tuple[str, Any]]]:
    read = ahead(lambda p: readable(pipeline, p), paths, workers=workers, depth=2 * batch_size)
    while batch := list(islice(read, batch_size)):
        yield batch


def _best(chance: np.ndarray, names: list[str], top: int) -> dict[str, Any]:
    return {"labels": [[names[i], round(float(chance[i]), 6)] for i in np.argsort(-chance, kind="stable")[:top]]}


def _resume(part: Path, task: str) -> dict[str, dict[str, Any]]:
    """What an interrupted run of the same task wrote; its torn last line is cut off, the file of another task is started anew."""
    said = part.read_bytes() if part.exists() else b""
    whole = said[:said.rfind(b"\n") + 1]
    try:
        first, *lines = [json.loads(line) for line in whole.splitlines()]
        if first != {"task": task}:
            raise ValueError
        answers = {a.pop("path"): a for a in lines}
    except (ValueError, KeyError, AttributeError, TypeError):
        whole, answers = json.dumps({"task": task}).encode() + b"\n", {}
    with place(part) as beside:
        beside.write_bytes(whole)
    return answers


def _write(out: Path, photos: Path, answers: dict[str, dict[str, Any]], top: int) -> None:
    head = ["path", *(f"{column}{'' if i == 0 else f'_{i + 1}'}" for i in range(top) for column in ("label", "probability")), "error"]
    with place(out) as beside, open(beside, "w", encoding="utf-8", errors="surrogateescape", newline="") as f:
        rows = csv.writer(f)
        rows.writerow(head)
        for path, answer in answers.items():
            said = [v for pair in answer.get("labels", [["", ""]] * top) for v in pair]
            rows.writerow([Path(os.path.relpath(path, photos)).as_posix(), *said, answer.get("error", "")])
