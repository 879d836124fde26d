"""What a dictionary says about words, and how it is added to texts: Wiktionary or WordNet, as files, no network.

A knowledge base maps a headword to its senses; a sense has a gloss, a path of hypernyms (WordNet), or points to another headword ("plural of
..."). `Knowledge.gloss` looks a name up as K-LITE does; `enrich` and `prompts` write it into texts as `text ; name , gloss`.
"""
from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from polysense.base.errors import UserError
from polysense.data.retold import retold
from polysense.data.sources import Sample

SUFFIXES = (("ies", "y"), ("ves", "f"), ("sses", "ss"), ("xes", "x"), ("ches", "ch"), ("shes", "sh"), ("zes", "z"), ("men", "man"), ("ing", ""),
            ("ing", "e"), ("ed", ""), ("ed", "e"), ("es", "e"), ("es", ""), ("s", ""))
STOP = frozenset((
    "a", "an", "the", "of", "on", "in", "at", "to", "by", "for", "with", "and", "or", "is", "are", "be", "it", "its", "this", "that", "these",
    "those", "from", "as", "into", "over", "under", "near", "some", "one", "two", "three", "his", "her", "their", "there", "here", "which",
    "who"))
WORD = re.compile(r"[^\W_]+(?:['-][^\W_]+)*")


@dataclass(frozen=True)
class Sense:
    """One meaning: what it is said to be, kinds of which it is one (nearest first), or the headword whose form this is; and what else is said of it,
    such as by a language model: prompts of a class use all of that."""
    gloss: str = ""
    kinds: tuple[str, ...] = ()
    form_of: str = ""
    more: tuple[str, ...] = ()


@dataclass
class Knowledge:
    """Headword (lower case) -> senses, the first of which is used."""
    entries: dict[str, list[Sense]] = field(default_factory=dict)

    @staticmethod
    def of(glosses: dict[str, str]) -> Knowledge:
        """A word list with one gloss each."""
        return Knowledge({word.lower().strip(): [Sense(gloss)] for word, gloss in glosses.items()})

    @staticmethod
    def read(path: str | Path) -> Knowledge:
        """A JSON object `{word: gloss}`, `{word: [gloss, more, ...]}` or `{word: {"definition": ..., "hypernyms": [...], "more": [...]}}`, or
        lines of JSON as Wiktionary extracts have them (`word`, `senses` with `glosses`, `form_of`, `alt_of`). Raises UserError for a file that
        is neither."""
        path = Path(path)
        if not path.is_file():
            raise UserError(f"no dictionary at {path}", "give a .json or .jsonl file")
        text, out = path.read_text(encoding="utf-8-sig", errors="replace"), Knowledge()
        try:
            if path.suffix == ".json":
                for word, about in json.loads(text).items():
                    out.entries.setdefault(word.lower().strip(), []).append(_sense(about))
            else:
                for line in filter(str.strip, text.splitlines()):
                    row = json.loads(line)
                    out.entries.setdefault(row["word"].lower().strip(), []).extend(_wiktionary(row.get("senses", [])))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path.name} is no dictionary ({type(error).__name__}: {error})", "see data/knowledge.py for the two forms") from error
        return out

    def write(self, path: str | Path) -> Path:
        """All senses as lines of JSON that `read` takes back."""
        rows = ({"word": word, "senses": [{"glosses": [s.gloss] if s.gloss else [], "hypernyms": list(s.kinds), "more": list(s.more),
                                           "form_of": [{"word": s.form_of}] if s.form_of else []} for s in senses]}
                for word, senses in self.entries.items())
        Path(path).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return Path(path)

    def gloss(self, name: str) -> str:
        """What the first sense says of a name; "" where nothing is known."""
        return next(iter(self.glosses(name)), "")

    def glosses(self, name: str) -> tuple[str, ...]:
        """All that the first sense says of a name, its own gloss first; () where nothing is known.

        Lower case, no punctuation; the whole name, then its first word in other forms, then without its leading words, one by one. Forms lead
        to their headword, at most once through each.
        """
        words = WORD.findall(name.lower())
        for k in range(len(words)):
            for form in (" ".join(words[k:]), *(" ".join((lemma, *words[k + 1:])) for lemma in lemmas(words[k])),
                         *(" ".join((*words[k:-1], lemma)) for lemma in lemmas(words[-1]))):
                if found := self._follow(form):
                    return found
        return ()

    def _follow(self, word: str) -> tuple[str, ...]:
        seen: set[str] = set()
        while word in self.entries and word not in seen:
            seen.add(word)
            sense = next(iter(self.entries[word]), Sense())
            if sense.gloss and not sense.form_of:
                return (sense.gloss + (f" ; {' , '.join(sense.kinds)}" if sense.kinds else ""), *sense.more)
            word = sense.form_of.lower().strip()
        return ()

    def concepts(self, text: str, most: int = 3) -> list[str]:
        """Names in a text that the dictionary knows: of each run of words without stop words the longest beginning that `gloss` knows, from left to
        right."""
        out: list[str] = []
        for run in _runs(text):
            name = next((" ".join(run[:end]) for end in range(len(run), 0, -1) if self.gloss(" ".join(run[:end]))), "")
            if name and name not in out:
                out.append(name)
        return out[:most]

    def enrich(self, text: str, name: str) -> str:
        """`text ; name , gloss`, or the text as it is where nothing is known of the name. The name stands in the text before the gloss, so a
        text that is cut short keeps it."""
        return self.versions(text, name)[0]

    def versions(self, text: str, name: str) -> list[str]:
        """`text ; name , gloss` for each gloss of the name, or the text alone."""
        return [f"{text} ; {name} , {found}" for found in self.glosses(name)] or [text]

    def ask(self, text: str) -> str:
        """A question in free words with the gloss of the first thing that it names, in the form of the texts of training; one that carries a
        gloss already stays as it is."""
        return text if parted(text)[1] else next((self.enrich(text, name) for name in self.concepts(text, 1)), text)

    def prompts(self, names: Sequence[str], templates: Sequence[str]) -> list[list[str]]:
        """For each class the templates with its name, each with every gloss where there are some: rows for `zero_shot(prompts=...)`."""
        return [[said for t in templates for said in self.versions(t.replace("{}", name), name)] for name in names]


def parted(text: str) -> tuple[str, str, str]:
    """An enriched text -> (text, name, gloss); ("", "") for the last two where it carries none."""
    head, found, rest = text.partition(" ; ")
    name, comma, gloss = rest.partition(" , ")
    return (head, name, gloss) if found and comma else (text, "", "")


def lemmas(word: str) -> list[str]:
    """Simpler forms that an inflected English word may come from, best first."""
    return [word[:-len(end)] + new for end, new in SUFFIXES if word.endswith(end) and len(word) - len(end) >= 2]


def _runs(text: str) -> Iterable[list[str]]:
    run: list[str] = []
    for word in [*WORD.findall(text.lower()), "the"]:
        if word in STOP:
            if run:
                yield run
            run = []
        else:
            run.append(word)


def _sense(about: Any) -> Sense:
    if isinstance(about, str | list):
        first, *more = [about] if isinstance(about, str) else about
        return Sense(first, more=tuple(more))
    return Sense(about.get("definition", ""), tuple(about.get("hypernyms", ())), about.get("form_of", ""), tuple(about.get("more", ())))


def _wiktionary(senses: list[dict[str, Any]]) -> Iterable[Sense]:
    for s in senses:
        linked = next((link["word"] for key in ("form_of", "alt_of") for link in s.get(key, ())), "")
        yield Sense(next(iter(s.get("glosses", ())), ""), tuple(s.get("hypernyms", ())), linked, tuple(s.get("more", ())))


def informed(base: Any, knowledge: Knowledge, name: str = "") -> Any:
    """Every caption as it is and, once for each concept found in it, with the gloss of that concept: both kinds of text are learned. Labelled
    pictures are told first by `prompted`, whose class names are concepts like any other. An empty dictionary changes nothing."""
    def tell(i: int, about: Sample) -> Sample:
        label = about.get("label")
        known = [base.classes[int(label)].replace("_", " ")] if label is not None and 0 <= int(label) < len(base.classes) else []
        said: list[str] = []
        for caption in about["captions"]:
            mentioned = [n for n in known if n.lower() in caption.lower()] or knowledge.concepts(caption)
            said += [caption, *(t for n in mentioned if (t := knowledge.enrich(caption, n)) != caption)]
        return about | {"captions": said}
    return retold(base, tell, name)
