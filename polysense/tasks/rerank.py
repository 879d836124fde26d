"""A second, exact look at the best candidates of a retrieval: systems that read a picture and a text together judge the pairs.

The k best by cosine, in each direction, are ordered anew by `match_text` and stand before all others (Li et al. 2021, ALBEF, section 3.4).
"""
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from polysense.base.errors import UserError
from polysense.base.protocols import fulfils
from polysense.data.sources import BadSample
from polysense.tasks.encode import Features, frozen


class Again(NamedTuple):
    """What a second look found: for each of n rows k columns, their numbers [n,k] and their probabilities [n,k]."""
    column: Tensor
    chance: Tensor

    def over(self, similar: Tensor, start: int) -> Tensor:
        """Cosines of the rows from `start` on; those looked at again are lifted above all others, in the order of their probabilities."""
        at = slice(start, start + len(similar))
        return similar.double().scatter(1, self.column[at], 2.0 + self.chance[at].double())


def check_rerank(subject: Any, test: Any, rerank: int) -> None:
    """UserError where nothing can be looked at again."""
    if not fulfils(subject.system, "match_text"):
        raise UserError(f"rerank asks for match_text, which {type(subject.system).__name__} cannot", "leave rerank out, or take a system that fuses")
    if rerank < 0 or isinstance(test, Features):
        raise UserError(f"rerank={rerank} of {test.name!r}", "it is a number of candidates, and needs the pictures themselves, not features")


def second_looks(subject: Any, test: Any, has: list[int], said: list[str], images: Tensor, texts: Tensor, k: int) -> tuple[Again, Again]:
    """The k best texts of each picture, and the k best pictures of each text, judged: (rows are pictures, rows are texts).

    Each picture is read and encoded once, for all the texts that it meets. has: the numbers of the readable pictures behind the rows of
    images [n,D]; said: the m texts behind texts [m,D].
    """
    best_text, best_image = ((a @ b.T).topk(min(k, len(b)), 1).indices for a, b in ((images, texts), (texts, images)))
    place: dict[int, list[tuple[int, int]]] = defaultdict(list)      # picture -> (text, where it stands among the text's candidates)
    for text, row in enumerate(best_image.tolist()):
        for rank, picture in enumerate(row):
            place[picture].append((text, rank))
    to_text, to_image, row_of = torch.zeros(best_text.shape), torch.zeros(best_image.shape), {i: n for n, i in enumerate(has)}
    with frozen(subject.system):
        for i, image in enumerate(readable(test)):
            if (n := row_of.get(i)) is None:
                continue
            mine = best_text[n].tolist()
            asked = sorted({*mine, *(t for t, _ in place[n])})
            pixels, chance = subject.read_images([image]), list[Tensor]()
            for s in range(0, len(asked), 64):
                chance.append(subject.system.match_text(pixels, subject.read_texts([said[t] for t in asked[s:s + 64]])).float().cpu())
            found = dict(zip(asked, torch.cat(chance).tolist(), strict=True))
            to_text[n] = torch.tensor([found[t] for t in mine])
            for text, rank in place[n]:
                to_image[text, rank] = found[text]
    if not (to_text.isfinite().all() and to_image.isfinite().all()):
        raise UserError("match_text returned numbers that are not finite", "the weights are damaged, or its training diverged")
    return Again(best_text, to_text), Again(best_image, to_image)


def readable(test: Any) -> Iterator[Any]:
    """The pictures of a source that can be read, in its order."""
    for i in range(len(test)):
        try:
            yield test[i]["image"]
        except BadSample:
            continue
