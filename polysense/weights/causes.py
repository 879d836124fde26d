"""Why outputs differ from recorded ones: the usual causes are tried on the weights at hand, and those that close the gap are named.

A published file often does not say which activation, epsilon, end token or resize kernel its authors used; none of them has weights, so each can be
changed in the configuration while the weights stay.
"""
import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from polysense.base.errors import UserError
from polysense.base.plan import ImagePlan

ACTS = ("gelu", "quick_gelu", "gelu_tanh")
EPSILONS = (1e-5, 1e-6, 1e-12)
KERNELS = ("bicubic", "bilinear")
COLOURS = {"CLIP's": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
           "ImageNet's": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), "0.5": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))}


@dataclass(frozen=True)
class Change:
    """One setting that could be otherwise: `says` for the user, `config` and `image` the dotted changes of configuration and picture plan."""
    says: str
    config: dict[str, Any]
    image: dict[str, Any]


def leaves(config: Any, name: str) -> dict[str, Any]:
    """{dotted path: value} of all fields of that name in a configuration."""
    out: dict[str, Any] = {}
    for line in config.lines():
        path, equals, value = line.partition(" = ")
        if equals and path.rsplit(".", 1)[-1] == name:
            out[path] = ast.literal_eval(value)
    return out


def changes(config: Any, image: ImagePlan | None, text: Tensor | None) -> Iterator[Change]:
    """What may be the matter: for each tower and for all together another activation; another epsilon; for texts another end token (ids that
    stand in every text, or the largest id); for pictures that are read here another kernel and other colour means."""
    for act in ACTS:
        found = {p for p, v in leaves(config, "act").items() if v in ACTS and v != act}
        for part in sorted({p.split(".")[0] for p in found}):
            yield Change(f"the activation {act} in {part}", {p: act for p in found if p.split(".")[0] == part}, {})
        if len({p.split(".")[0] for p in found}) > 1:
            yield Change(f"the activation {act}", dict.fromkeys(found, act), {})
    for eps in EPSILONS:
        if found := {p for p, v in leaves(config, "eps").items() if v != eps}:
            yield Change(f"the norms' epsilon {eps:g}", dict.fromkeys(found, eps), {})
    if text is not None:
        rows = cast(list[list[int]], text.tolist())  # pyright: ignore[reportUnknownMemberType]
        shared = set(rows[0][1:]).intersection(*rows)
        for path, now in leaves(config, "end").items():
            for end in (None, *sorted(shared)):
                if end != now:
                    yield Change("the text pooled at the largest id" if end is None else f"the text pooled at the first id {end}", {path: end}, {})
    if image is not None:
        for kernel in KERNELS:
            if kernel != image.resample:
                yield Change(f"pictures resized by the {kernel} kernel", {}, {"resample": kernel})
        for whose, (mean, std) in COLOURS.items():
            if mean != image.mean:
                yield Change(f"{whose} colour means", {}, {"mean": mean, "std": std})


def find_causes(system: nn.Module, config: Any, image: ImagePlan | None, text: Tensor | None,
                gap_of: Callable[[Any, ImagePlan | None], float], tolerance: float = 1e-4, most: int = 3) -> tuple[list[Change], float]:
    """(changes that together bring the difference down, the difference then); no changes where none helps.

    Greedy: the best single change is kept if it at least halves the difference, then the next is looked for, `most` times. `gap_of(system, image
    plan)` gives the difference of a rebuilt system, whose weights are those of `system`.
    """
    kept: list[Change] = []
    best = gap_of(system, image)
    state = system.state_dict()
    while best > tolerance and len(kept) < most:
        tried = [(*_tried(change, state, config, image, gap_of), change) for change in changes(config, image, text)]
        if not tried:
            break
        gap, changed, plan, change = min(tried, key=lambda t: t[0])
        if gap > best / 2:
            break
        kept.append(change)
        best, config, image = gap, changed, plan
    return kept, best


def _tried(change: Change, state: dict[str, Tensor], config: Any, image: ImagePlan | None,
           gap_of: Callable[[Any, ImagePlan | None], float]) -> tuple[float, Any, ImagePlan | None]:
    try:
        changed = config.but(**change.config)
        system = changed.build().eval()
        system.load_state_dict(state)
        plan = image.but(**change.image) if image is not None else None
        return gap_of(system, plan), changed, plan
    except (UserError, ValueError, RuntimeError):         # a part that cannot be built so, or a text without that token
        return float("inf"), config, image
