"""`make demo`: the whole way from captioned pictures to a searchable folder, by the very command lines that a user types.

Trains `clip` on real captioned pictures where POLYSENSE_DATA (or ../shared/data) holds them, else on digits and drawn scenes; examines it, indexes
pictures that it was not trained on, searches them, labels some, and writes demo/report.html. Eight minutes on two cores.
"""
from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
REAL = ("natural_captions", "fashion_products")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NEARBY = "../shared/data"


def main() -> int:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--out", type=Path, default=Path("demo"), help="where everything is written (made anew)")
    words.add_argument("--minutes", type=float, default=3.5, help="time for training")
    words.add_argument("--plain", action="store_true", help="digits and drawn scenes, even where real pictures are present")
    asked = words.parse_args()
    os.chdir(ROOT)
    begun = time.monotonic()
    real = not asked.plain and find_data()
    out = fresh(asked.out)
    run, photos = out / "clip", out / "photos"
    labels = out / "labels.txt"
    if real:
        print("Real captioned pictures are here: photographs and shop products. The pictures that are searched later are kept out of training.")
        sets, split, counts = list(REAL), "dev", {}
        exams = [("retrieval", name) for name in REAL] + [("zero_shot", "fashion_products")]
        queries = ["grass and trees", "people on the beach", "brown sunglasses", "women's red handbag", "men's black watch"]
        labels.write_text("\n".join(["a dog", "food on a plate", "people playing sport", "a street", "a snowy mountain", "shirts", "jackets",
                                     "casual shoes", "watches", "handbags", "backpacks", "sunglasses", "belts"]) + "\n", encoding="utf-8")
    else:
        print(f"No real captioned pictures here (POLYSENSE_DATA names no folder with {' and '.join(REAL)}): digits and drawn scenes instead.")
        sets, split, counts = ["digits", "scenes"], "val", {"scenes": 300}
        exams = [("zero_shot", "digits"), ("retrieval", "scenes")]
        queries = ["a red circle", "a blue square", "a handwritten digit seven", "a green triangle", "two yellow shapes"]
        labels.write_text("\n".join([*(f"the digit {d}" for d in DIGITS), "a circle", "a square", "a triangle"]) + "\n", encoding="utf-8")
    polysense("train", "clip", "--data", "+".join(sets), "--steps", "2000", "--minutes", f"{asked.minutes:g}", "--out", run)
    for exam, name in exams:
        polysense("exam", run, exam, "--data", name, "--split", split)
    for name in sets:
        polysense("data", "get", name, photos / name, "--split", split, *(["-n", counts[name]] if name in counts else []))
    polysense("index", photos, "-m", run)
    for query in queries:
        polysense("search", query, "--index", photos, "-k", 3)
    polysense("label", photos, "--labels", labels, "-m", run, "--template", "{}", "--out", out / "labels.csv")
    polysense("report", run, "--index", photos, *(w for q in queries for w in ("-q", q)), "--labels", labels, "--template", "{}",
              "--out", out / "report.html")
    print(f"\nDone in {(time.monotonic() - begun) / 60:.1f} minutes. Look at {out / 'report.html'}")
    return 0


def find_data() -> bool:
    """Whether both real sets are present; POLYSENSE_DATA is set to the folder beside the repository where it names none itself."""
    if "POLYSENSE_DATA" not in os.environ and (ROOT / NEARBY).is_dir():
        os.environ["POLYSENSE_DATA"] = str((ROOT / NEARBY).resolve())
    from polysense.data import list_sources

    here = {s.name for s in list_sources() if s.size is not None}
    return set(REAL) <= here


def fresh(out: Path) -> Path:
    """The demo's folder without what an earlier demo left in it."""
    for name in ("clip", "photos"):
        shutil.rmtree(out / name, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    return out


def polysense(*words: object) -> None:
    """Prints a command line and runs it in this process (torch is imported once)."""
    from polysense.cli import main as run

    line = [str(w) for w in words]
    print(f"\n$ polysense {shlex.join(line)}", flush=True)
    if status := run(line):
        stop(status)


def stop(status: int) -> NoReturn:
    print("The demo stopped there; run it again with: make demo", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    sys.exit(main())
