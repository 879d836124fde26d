"""A run as one self-contained page: what was trained and how it went, what it scores, what it finds and why, how to go on.

`write_report(run, out, *, index=None, queries=(), labels=None, ...) -> Path`. Sections without material are left out, except that the page says how
to get them. Nothing is loaded from the network: curves are inline SVG, pictures are data URLs.
"""
import base64
import io
import json
import os
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from polysense.app.charts import line_chart
from polysense.app.files import place
from polysense.base.catalogue import catalogue
from polysense.base.errors import UserError

Progress = Callable[[int, int], object]
SIDE = 240                                           # longest side of the pictures in the page, pixels
HITS, LABELLED = 6, 12


def write_report(run: str | Path, out: str | Path, *, index: str | Path | None = None, queries: Sequence[str] = (),
                 labels: str | Path | Sequence[str] | None = None, templates: Sequence[str] | None = None, device: str | None = None,
                 progress: Progress | None = None, notes: Sequence[str] = ()) -> Path:
    """Writes the page and returns its path.

    `index`: indexed pictures; `queries` are searched in it, and LABELLED of its pictures get the `labels` (zero-shot, in the `templates`).
    `notes`: paragraphs to print below the title. `progress(done, total)` counts the parts. Raises UserError where the run or the index
    cannot be read.
    """
    run, out = Path(run), Path(out)
    from polysense.train.folder import read_facts

    facts, log = read_facts(run), read_log(run / "log.jsonl")
    parts = 2 + len(queries) + (labels is not None)
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, parts)

    page: dict[str, Any] = {"run": str(run), "facts": facts, "card": catalogue().get(facts["system"]), "notes": list(notes),
                            "overview": overview(run, facts, log), "curves": curves(log), "exams": exams(run / "exams"),
                            "lines": (run / "preset.txt").read_text(encoding="utf-8") if (run / "preset.txt").exists() else "",
                            "searches": [], "labelled": [], "labels": []}
    tick()
    if index is not None:
        import polysense
        from polysense.app.index import NAME, Index

        folder = Path(index) / NAME if (Path(index) / NAME).is_dir() else Path(index)
        with Index.open(folder) as opened:
            pipeline = polysense.open(run, device=device)
            page["indexed"] = len(opened)
            captions = Captions()
            for query in queries:
                page["searches"].append(searched(opened, pipeline, query, captions))
                tick()
            if labels is not None:
                from polysense.app.label import read_labels

                page["labels"] = read_labels(labels)
                page["labelled"] = labelled(pipeline, opened.paths(), page["labels"], captions, templates)
                tick()
    page["commands"] = commands(run, facts, index, page)
    html = environment().get_template("report.html").render(**page)
    with place(out) as beside:
        beside.write_text(html, encoding="utf-8")
    tick()
    return out


def environment() -> Any:
    """Jinja over app/templates, escaping everything that is not marked safe."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True,
                       undefined=StrictUndefined)


# -- what was trained ---------------------------------------------------------------------------------------------------------------------

def read_log(path: Path) -> list[dict[str, Any]]:
    """The steps of log.jsonl; a line that a kill left half-written is passed over."""
    steps = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                step = json.loads(line)
                steps.append(step | {"step": int(step["step"]), "total": float(step["total"])})
            except (ValueError, KeyError, TypeError):
                continue
    return steps


def overview(run: Path, facts: dict[str, Any], log: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """The figures at the top, as (name, value)."""
    from safetensors import safe_open

    rows = [("preset", facts.get("preset", "")), ("data", facts.get("data", "")), ("seed", str(facts.get("seed", "")))]
    weights = run / "weights.safetensors"
    if weights.exists():
        with safe_open(weights, "pt") as file:
            # buffers such as running statistics are few; they count, as they are stored
            count = sum(_product(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118  (not a dict)
        rows.append(("numbers in the weights", f"{count:,}"))
    if log:
        seconds = sum(float(s.get("seconds", 0)) for s in log)
        logged = log[-1]["step"] / len(log)              # with log_every > 1 each line stands for several steps
        speed = sorted(float(s.get("samples_per_s", 0)) for s in log)[len(log) // 2]
        rows += [("steps", f"{log[-1]['step']:,} of at most {sum(s['steps'] for s in facts['plan']['stages']):,}"),
                 ("time in steps", f"{seconds * logged / 60:.1f} min"), ("typical speed", f"{speed:,.0f} samples/s"),
                 ("last loss", f"{log[-1]['total']:.4g}")]
        if log[-1].get("skipped"):
            rows.append(("unreadable samples", str(log[-1]["skipped"])))
    if not weights.exists():
        rows.append(("state", "not finished: opened at its last checkpoint"))
    versions = facts.get("versions", {})
    return [*rows, ("made with", ", ".join(f"{k} {v}" for k, v in versions.items() if k != "python"))]


def _product(shape: Sequence[int]) -> int:
    out = 1
    for n in shape:
        out *= n
    return out


def curves(log: list[dict[str, Any]]) -> dict[str, str]:
    """SVG charts by name: the loss with its terms, learning rate, speed, gradient norm, and the numbers of health that the system logs."""
    if not log:
        return {}
    x, stages = [s["step"] for s in log], {}
    for s in log:
        stages.setdefault(s.get("stage", ""), s["step"])
    marks = [(at, name) for name, at in stages.items()] if len(stages) > 1 else []
    terms = list(dict.fromkeys(k for s in log for k in s.get("losses", {})))[:4]
    series = {t: ([s["step"] for s in log if t in s["losses"]], [s["losses"][t] for s in log if t in s["losses"]]) for t in terms}
    out = {"loss": line_chart(series or {"loss": (x, [s["total"] for s in log])}, smooth=True, ylabel="loss", marks=marks, size=(9.6, 3.2))}
    for key, name in (("lr", "learning rate"), ("samples_per_s", "samples a second"), ("grad_norm", "gradient norm")):
        if all(key in s for s in log):
            out[name] = line_chart({name: (x, [float(s[key]) for s in log])}, smooth=key != "lr", size=(4.2, 2.1))
    for key in dict.fromkeys(k for s in log for k in s.get("health", {})):               # looked at every few steps
        seen = [(s["step"], float(s["health"][key])) for s in log if key in s.get("health", {})]
        name = key.replace("_", " ")
        out[name] = line_chart({name: ([at for at, _ in seen], [v for _, v in seen])}, size=(4.2, 2.1))
    return out


# -- what it scores -----------------------------------------------------------------------------------------------------------------------

def exams(folder: Path) -> list[dict[str, Any]]:
    """The results that `polysense exam` kept in the run, each metric with where its bar, interval and chance stand in percent."""
    out = []
    for path in sorted(folder.glob("*.json")):
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
            rows = [{"name": metric_name(k), "value": _number(m["value"]), "interval": f"{_number(m['low'])} – {_number(m['high'])}",
                     "chance": None if m["chance"] is None else _number(m["chance"]),
                     "bar": {k2: None if m[k2] is None else round(100 * m[k2], 2) for k2 in ("value", "low", "high", "chance")}
                     if "rank" not in k else None} for k, m in said["metrics"].items()]
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        ranked = sorted(((name, value, n) for name, (value, n) in said.get("classes", {}).items()), key=lambda c: (-c[1], -c[2], c[0]))
        best, worst = ranked[:6], ranked[6:][-6:]
        out.append({"exam": said["exam"].replace("_", " "), "data": said["data"], "split": said.get("split", ""), "n": said["n"], "rows": rows,
                    "best": best, "worst": worst, "classes": len(ranked), "notes": notes_of(said.get("notes", {}))})
    return out


def notes_of(notes: dict[str, Any]) -> str:
    return "; ".join(f"{k.replace('_', ' ')}: {len(v) if isinstance(v, (list, dict)) else v}" for k, v in notes.items()).rstrip(".")


def metric_name(key: str) -> str:
    """image_to_text_r10 -> "image → text R@10"; the rest as words."""
    return re.sub(r" r(\d+)$", r" R@\1", key.replace("_to_", " → ").replace("_", " "))


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"


# -- what it finds ------------------------------------------------------------------------------------------------------------------------

class Captions:
    """What people wrote about a picture, where a metadata.jsonl lies beside it; shown, never used."""

    def __init__(self) -> None:
        self.known: dict[str, dict[str, str]] = {}

    def __call__(self, path: str) -> str:
        folder, name = os.path.split(path)
        if folder not in self.known:
            self.known[folder] = {}
            file = Path(folder) / "metadata.jsonl"
            if file.is_file():
                for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
                    try:
                        row = json.loads(line)
                        said = (row.get("captions") or [row.get("label")])[0]
                        self.known[folder][row["file_name"]] = str(said or "")
                    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
                        continue
        return self.known[folder].get(name, "")


def searched(index: Any, pipeline: Any, query: str, captions: Captions) -> dict[str, Any]:
    """One query: its best pictures, where each matches, and the words of the best one on their own."""
    from polysense.app.search import search

    hits = search(index, pipeline, query, HITS)
    words = [{"word": h.word, "image": data_url(hits[0].why.overlay(h.word))} for h in hits[0].why.words[:3]] if hits and hits[0].why else []
    return {"query": query, "words": words, "hits": [
        {"rank": h.rank, "score": f"{h.score:.3f}", "name": Path(h.path).name, "caption": captions(h.path),
         "image": data_url(h.why.image if h.why else h.path), "heat": data_url(h.why.overlay()) if h.why else None,
         "words": ", ".join(w.word for w in h.why.words) if h.why else ""} for h in hits]}


def labelled(pipeline: Any, paths: Sequence[str], labels: Sequence[str], captions: Captions,
             templates: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """LABELLED pictures, evenly spread over the index, with the three most probable labels of each."""
    from polysense.pipeline import TEMPLATES

    chosen = [paths[round(i * (len(paths) - 1) / max(1, LABELLED - 1))] for i in range(LABELLED)] if len(paths) > LABELLED else list(paths)
    readable = [p for p in dict.fromkeys(chosen) if data_url(p)]
    return [{"image": data_url(p), "name": Path(p).name, "caption": captions(p),
             "labels": [(name, f"{100 * chance:.0f}") for name, chance in said.labels]}
            for p, said in zip(readable, pipeline.label(readable, labels, templates or TEMPLATES, top=3) if readable else [], strict=True)]


def data_url(picture: Image.Image | str) -> str:
    """A picture made small, as a data URL; empty where the file cannot be read any more."""
    if isinstance(picture, str):
        from polysense.data.images import decode

        try:
            picture = decode(picture)
        except UserError:
            return ""
    small, out = picture.convert("RGB"), io.BytesIO()
    if max(small.size) < SIDE // 2:                      # tiny pictures such as digits would otherwise be blurred by the browser
        scale = SIDE // 2 // max(small.size)
        small = small.resize((small.width * scale, small.height * scale), Image.Resampling.NEAREST)
    small.thumbnail((SIDE, SIDE))
    small.save(out, "jpeg", quality=84)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


# -- how to go on -------------------------------------------------------------------------------------------------------------------------

def commands(run: Path, facts: dict[str, Any], index: str | Path | None, page: dict[str, Any]) -> list[tuple[str, str]]:
    """(what for, the exact line) for whoever read this far."""
    q, card = (lambda p: shlex.quote(str(p))), page["card"]
    can = card.can if card else ()
    out = [("Train longer, into a new run", f"polysense train {facts['system']} --preset {q(facts['preset'])} --data {q(facts['data'])} "
            f"--minutes 60 --out {q(str(run) + '-long')}")]
    if "encode_image" in can and "encode_text" in can:
        place = q(index) if index is not None else "PHOTOS"
        out += [("Make your own pictures searchable", f"polysense index ~/Pictures -m {q(run)}"),
                ("Search, with heat-maps", f'polysense search "two dogs on grass" --index {place} --why answer.html'),
                ("Search by picture", f"polysense search --image picture.jpg --index {place}"),
                ("Label a folder", f"polysense label ~/Pictures --labels labels.txt -m {q(run)} --out labels.csv")]
    out += [("What it can be examined in", f"polysense exam {q(run)}"), ("This page again", f"polysense report {q(run)}"),
            ("From Python", f'python -c "import polysense; print(polysense.open({str(run)!r}).system)"')]
    return out
