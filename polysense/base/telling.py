"""What is said about the samples of training where the data alone do not say it, as values: steps between a source and its batches.

A feed carries them (`ToldFeed.told`); `data.told` carries them out, `train` and proofs go through it, and prompts ask by them (`Glosses`).
"""
from dataclasses import dataclass

from polysense.base.plan import Feed
from polysense.base.spec import Spec


@dataclass(frozen=True, kw_only=True)
class Telling(Spec):
    """One step. Steps follow each other: each is told about what the one before it made."""


@dataclass(frozen=True, kw_only=True)
class Triplets(Telling):
    """Every sample becomes (picture, text, label): one without captions is called by its class, in a prompt that is drawn anew each time; one
    without a label belongs to no class but its own (Yang et al. 2022, UniCL)."""
    templates: str | tuple[str, ...] = "imagenet"       # a set of `data.templates` by name, or prompts with {} where the name goes


@dataclass(frozen=True, kw_only=True)
class Rewrites(Telling):
    """Captions in other words; training draws among the original and its rewrites, all alike (Fan et al. 2023, LaCLIP).

    Rewrites are those that samples bring (`x.rewrites.txt` beside `x.jpg`, columns `rewrites`), and those of `files`.
    """
    files: tuple[str, ...] = ()                         # each a telling of all samples: line i belongs to sample i
    voices: tuple[str, ...] = ()                        # of rules that reword where a sample has no rewrite; (): data without any are refused


@dataclass(frozen=True, kw_only=True)
class Glosses(Telling):
    """Captions with and without what a dictionary says of the things that they name; prompts and queries get the same (Shen et al. 2022, K-LITE)."""
    dictionary: str                                     # a .json or .jsonl file, one of that name in the data folder, or "scenes", which is built in


@dataclass(frozen=True, kw_only=True)
class Entities(Telling):
    """Labels made of alt-texts: the things of a knowledge base that they name, as far as the picture shows them (Wu et al. 2024, MOFI)."""
    base: str                                           # a .jsonl file, one of that name in the data folder, or "scenes", which is built in
    judge: str = ""                                     # who scores pictures and texts: a run folder, or `id` or `id:preset`, trained once on the
                                                        # same pairs; "": nobody, names alone decide
    dropped: float = 0.3                                # share of the mentions, those that fit their pictures worst, that become no label
    rare: int = 1                                       # entities of fewer samples are dropped


@dataclass(frozen=True, kw_only=True)
class Cleaned(Telling):
    """Pairs from the web: captions are made tidy, and what breaks a rule is left out (LAION, as of Cherti et al. 2023)."""
    words: tuple[int, int] = (1, 256)                   # fewest and most of a caption
    smallest: int = 0                                   # pixels of the shorter side; 0: any
    ratio: float = 0.0                                  # of the longer side to the shorter one at most; 0: any
    copies: str = ""                                    # "one": of equal pictures with equal texts one stays; "": all
    fit: float | None = None                            # least cosine of picture and text, as the judge sees them; None: nobody is asked
    judge: str = ""                                     # who: a run folder, or `id` or `id:preset`, trained once on the same pairs


@dataclass(frozen=True, kw_only=True)
class Mixed(Telling):
    """The parts of joined data stand in every batch by these shares, however large they are (CoCa: half labels, half alt-texts)."""
    shares: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Roles(Telling):
    """Joined data of pictures, of texts and of pictures with texts, each part as what it is (`has`): what models that learn from all three at once
    read. What a sample lacks is filled with nothing that is looked at. With `Mixed` behind it, every batch holds the parts by their shares."""


@dataclass(frozen=True, kw_only=True)
class ToldFeed(Feed):
    """A feed whose samples are told about first."""
    told: tuple[Telling, ...] = ()
