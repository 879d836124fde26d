"""Ways of searching a photo index: what one query costs, and how many of the ten that an exhaustive comparison finds are found.

    python bench/search.py [--pictures 100000] [--json docs/proofs/bench_search.json]

The pictures are drawn: each has 16 patches around 3 of 2,000 themes (64 dimensions), its vector is their mean, its terms are its themes and some
noise (8 of 4,096 tokens), and a query names one to three themes, as words. So every way is asked the same, and what is measured is the index, not a
model.

    dense    FAISS inverted file (`app.index.Index` above its exact limit) against all cosines
    sparse   SQLite's inverted index against the whole matrix product: must find the same
    late     word by word within the 200 best by dense, against word by word over all pictures (on --late of them)
"""
import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from polysense.app.index import Index
from polysense.app.photos import Row
from polysense.app.ways import SHORTLIST, Parts
from polysense.pipeline.words import late_scores
from polysense.proofs.harness import commit, machine

DIM, PATCHES, THEMES, TERMS, QUERIES, K = 64, 16, 2000, 4096, 50, 10


class Drawn:
    """Stands in for a pipeline: its pictures are rows of arrays, its queries lists of themes."""
    id, source, digest, tokenizer = "drawn", "drawn", "0" * 16, None

    def __init__(self, themes: np.ndarray):
        self.themes = themes

    def can(self, capability: str) -> bool:
        return True

    def _need(self, *capabilities: str) -> None: ...

    def read_texts(self, texts: list[str]) -> list[list[int]]:
        return [[int(w) for w in t.split()] for t in texts]

    def encode(self, texts: list[str]) -> np.ndarray:
        return unit(np.stack([self.themes[ids].mean(0) for ids in self.read_texts(texts)]))

    def _run(self, capability: str, ids: list[list[int]]) -> np.ndarray:
        if capability == "encode_words":
            return self.themes[ids[0]][None]
        weights = np.zeros((1, TERMS), np.float32)
        weights[0, ids[0]] = 1
        return weights


def unit(x: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def timed(ask: Callable[[Any], Any], queries: list[Any]) -> tuple[list[Any], float]:
    """(answers, median milliseconds of a query)."""
    answers, spent = [], []
    for query in queries:
        start = time.perf_counter()
        answers.append(ask(query))
        spent.append(time.perf_counter() - start)
    return answers, 1000 * statistics.median(spent)


def best(scores: np.ndarray) -> set[int]:
    return set(np.argpartition(-scores, K)[:K].tolist())


def recall(found: list[set[int]], true: list[set[int]]) -> float:
    return float(np.mean([len(a & b) / len(b) for a, b in zip(found, true, strict=True)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=100_000)
    parser.add_argument("--late", type=int, default=20_000)
    parser.add_argument("--json", type=Path, default=Path("docs/proofs/bench_search.json"))
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    themes = unit(rng.normal(size=(THEMES, DIM)))
    shown = rng.integers(0, THEMES, (args.pictures, 3))
    patches = unit(themes[shown[np.arange(args.pictures)[:, None], rng.integers(0, 3, (args.pictures, PATCHES))]]
                   + 0.08 * rng.normal(size=(args.pictures, PATCHES, DIM)))
    vectors = unit(patches.mean(1))
    noise, heavy = rng.integers(THEMES, TERMS, (args.pictures, 5)), rng.uniform(0.2, 2, (args.pictures, 8)).astype(np.float32)
    eye = Drawn(themes)
    queries = [" ".join(map(str, shown[rng.integers(args.pictures)][:rng.integers(1, 4)])) for _ in range(QUERIES)]
    asked, result = eye.encode(queries), dict[str, Any]()

    with tempfile.TemporaryDirectory() as folder, Index.create(Path(folder) / "index", eye.digest, DIM, exact=0) as index:
        for start in range(0, args.pictures, 10_000):
            part = range(start, min(start + 10_000, args.pictures))
            index.put([Row(f"/{i}", 1, 1, i.to_bytes(16, "big")) for i in part], vectors[start:start + 10_000])
        index.nearest(asked[:1], K)                                          # builds the inverted file
        found, fast = timed(lambda q: {int(p[1:]) for p, _ in index.nearest(q[None], K)[0]}, list(asked))
        true, slow = timed(lambda q: best(vectors @ q), list(asked))
        result["dense"] = {"pictures": args.pictures, "milliseconds": fast, "exhaustive milliseconds": slow, "recall@10": recall(found, true)}

        parts = Parts(index, eye)
        parts.db.execute("begin")
        parts.db.executemany("insert into pictures values(?, ?)", ((i, i.to_bytes(16, "big")) for i in range(args.pictures)))
        parts.db.executemany("insert or ignore into terms values(?, ?, ?)", ((int(t), i, float(w)) for i in range(args.pictures)
                             for t, w in zip((*shown[i], *noise[i]), heavy[i], strict=True)))
        parts.db.executemany("insert into done values(?, 'sparse')", ((i,) for i in range(args.pictures)))
        parts.db.execute("commit")
        weights = [eye._run("encode_text_terms", eye.read_texts([q]))[0] for q in queries]
        answers, fast = timed(lambda w: parts.by_terms(w, K), weights)
        held = parts.db.execute("select picture, term, weight from terms").fetchall()
        at = torch.tensor([[p for p, _, _ in held], [t for _, t, _ in held]])
        matrix = torch.sparse_coo_tensor(at, torch.tensor([w for *_, w in held]), (args.pictures, TERMS), check_invariants=False).coalesce()
        exact, slow = timed(lambda w: (matrix @ torch.from_numpy(w)).numpy(), weights)
        gap = max(abs(f.score - float(e[int(f.path[1:])])) for row, e in zip(answers, exact, strict=True) for f in row)
        met = [np.sort(e)[::-1][len(row) - 1] <= row[-1].score + 1e-5 for row, e in zip(answers, exact, strict=True)]
        result["sparse"] = {"pictures": args.pictures, "milliseconds": fast, "exhaustive milliseconds": slow, "largest difference of scores": gap,
                            "recall@10": float(np.mean(met))}
        parts.close()

    n = min(args.late, args.pictures)
    words = [themes[ids] for ids in eye.read_texts(queries)]
    true, slow = timed(lambda w: best(late_scores(patches[:n], w)), words)

    def short(both: tuple[np.ndarray, np.ndarray]) -> set[int]:
        dense = vectors[:n] @ both[0]
        chosen = np.argpartition(-dense, SHORTLIST)[:SHORTLIST]
        return {int(chosen[i]) for i in best(late_scores(patches[chosen], both[1]))}
    found, fast = timed(short, list(zip(asked, words, strict=True)))
    result["late"] = {"pictures": n, "shortlist": SHORTLIST, "milliseconds": fast, "exhaustive milliseconds": slow, "recall@10": recall(found, true)}

    for way, row in result.items():
        print(way, {k: round(v, 4) for k, v in row.items()})
    told = {"what": f"one query by each way, median of {QUERIES}", "load": os.getloadavg()[0], "machine": machine(), "commit": commit(),
            "ways": result}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    main()
