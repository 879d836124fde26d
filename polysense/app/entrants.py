"""Who takes part in a comparison: systems brought to the same towers, the same pictures and texts, the same batch and the same budget.

What can be shared is taken from the first system (the reference): its image and text tower with their heads, how pictures and texts are read, the
augmentation of the paired view, the batch size. A tower that a Start brings stays, as it comes with weights. Whether a system works with what it
was given is tried on a few samples; where it does not, it keeps its own, and a note says so. Optimisers and all that makes a recipe itself
(views, queues, extra terms) stay the recipe's.
"""
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from polysense.base.catalogue import card_of, catalogue, load, preset_of
from polysense.base.errors import UserError
from polysense.base.plan import Preset
from polysense.base.spec import Spec
from polysense.base.system import System
from polysense.train.run import override, shortened

IMAGE, TEXT = ("vision", "backbone", "encoder"), ("text",)       # what an image and a text tower are called in configurations
HEADS = ("image_head", "text_head")
TRIED = 4                                                        # samples
FOREVER = 1_000_000                                              # steps, where time decides


@dataclass(frozen=True)
class Budget:
    """How long everybody trains: one of steps, samples seen, or seconds of training. Only the first two give the same table again."""
    steps: int | None = None
    samples: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        given = [v for v in (self.steps, self.samples, self.seconds) if v is not None]
        if len(given) != 1 or given[0] <= 0:
            raise UserError("a budget is a positive number of steps, samples or seconds, one of them", "such as steps=300")

    def __str__(self) -> str:
        return f"{self.steps:,} steps" if self.steps else f"{self.samples:,} samples" if self.samples else f"{self.seconds:g} s of training"


@dataclass
class Entrant:
    """One line of the table. `plan` is what will be trained, unless it stays as it is born (`trained`); `notes` say what it does not share, `why`
    it cannot take part ("" where it can)."""
    label: str
    id: str
    preset: str
    plan: Preset
    changes: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    why: str = ""
    trained: bool = True

    @property
    def needs(self) -> tuple[str, ...]:
        return card_of(self.id).needs


def entrant(word: str, changes: dict[str, Any]) -> Entrant:
    """`clip` or `clip:tiny_vit` with dotted changes. UserError for an unknown system, preset or field, and for one that trains nothing."""
    id, _, preset = word.partition(":")
    plan = override(preset_of(id, preset or "tiny"), changes)
    if not issubclass(plan.config.owner, System) or not plan.stages:
        raise UserError(f"{word} trains nothing, so there is nothing to compare", "choose systems that are trained: polysense list")
    return Entrant(word, id, preset or "tiny", plan)


def varied(of: Entrant, vary: Sequence[tuple[str, Sequence[Any]]]) -> list[Entrant]:
    """One entrant for each combination of values. `objective` takes a method of the system, a loss of `train.swap`, or another system's id."""
    out = [of]
    for path, values in vary:
        if len(values) < 2:
            raise UserError(f"--vary {path} has one value", "give at least two, such as objective=info_nce,sigmoid")
        out = [changed(e, path, v) for e in out for v in values]
    for e in out:
        e.label = ", ".join(f"{k}={v}" for k, v in e.changes.items())
    return out


def changed(e: Entrant, path: str, value: Any) -> Entrant:
    changes = {**e.changes, path: value}
    if path != "objective":
        return Entrant(e.label, e.id, e.preset, override(e.plan, {path: value}), changes)
    from polysense.train.swap import NAMES, Contrast

    if value in NAMES:
        if "encode_text" not in card_of(e.id).can:
            raise UserError(f"{e.id} does not compare pictures with texts", f"the losses {', '.join(NAMES)} are for systems that do")
        if "embed" not in dir(e.plan.config.owner):
            raise UserError(f"{e.id} has no `embed`, so its objective cannot be exchanged", "vary another field")
        owner: Any = e.plan.config.owner
        stages = tuple(s.but(objective=Contrast(of=value), embed=owner.embed) for s in e.plan.stages)
        return Entrant(e.label, e.id, e.preset, e.plan.but(stages=stages), changes)
    method = getattr(e.plan.config.owner, str(value), None)
    if callable(method):
        return Entrant(e.label, e.id, e.preset, e.plan.but(stages=tuple(s.but(objective=method) for s in e.plan.stages)), changes)
    if value in catalogue():
        return Entrant(e.label, str(value), "tiny", preset_of(str(value)), changes)
    raise UserError(f"no objective {value!r} for {e.id}", f"it is a loss ({', '.join(NAMES)}), a method of the system, or the id of another system")


# -- the same for all -----------------------------------------------------------------------------------------------------------------------

def likewise(plan: Preset, overrides: dict[str, Any]) -> Preset:
    """The preset with what was changed in the reference, where it has such a field. How long texts are goes with the tower that reads them. All at
    once where that is possible: two parts that have to agree may refuse what is changed in one of them."""
    try:
        return override(plan, overrides)
    except UserError:
        lacks = set[str]()
    for k in sorted(overrides, key=lambda k: k.startswith("feed.")):
        if k.startswith("feed.") and k.removeprefix("feed.") in lacks:
            continue
        try:
            plan = override(plan, {k: overrides[k]})
        except UserError:
            lacks.add(k.removeprefix("config."))
    return plan


def shared(e: Entrant, reference: Entrant, tokenizers: "Tokenizers") -> Entrant:
    """`e` with as much of the reference as it works with: both towers, else one of them, else none; what it keeps is noted."""
    batch = {f"stages.{i}.batch_size": reference.plan.stages[0].batch_size for i in range(len(e.plan.stages))}
    ours = e.plan.but(data=reference.plan.data, **batch)
    reason = own = ""                                            # why it keeps a tower of its own, and why it cannot take part with that either
    for image, text in ((True, True), (False, True), (True, False), (False, False)):
        plan, missing = lend(ours, reference.plan, image, text)
        if (image and "image" in missing) or (text and "text" in missing) or (missing and not (image or text)):
            reason = reason or "; ".join(missing.values())
        if any(k in missing for k, asked in (("image", image), ("text", text)) if asked):
            continue
        refused = tried(e, plan, tokenizers)
        if not refused:
            kept = [n for n, lent in (("image", image), ("text", text)) if not lent and tower_of(plan.config, n)]
            notes = [f"its own {' and '.join(kept)} tower{'s' if len(kept) > 1 else ''}" + (f" ({reason})" if reason else "")] if kept else []
            return Entrant(e.label, e.id, e.preset, plan, e.changes, [*e.notes, *notes])
        reason, own = reason or refused, refused
    return Entrant(e.label, e.id, e.preset, ours, e.changes, e.notes, why=own or reason)


def tower_of(config: Spec, kind: str) -> str:
    """The field of a configuration that holds its tower for "image" or "text"; "" where it has none."""
    names = [f.name for f in fields(config)]
    return next((n for n in (IMAGE if kind == "image" else TEXT) if n in names and isinstance(getattr(config, n), Spec)), "")


def lend(ours: Preset, reference: Preset, image: bool, text: bool) -> tuple[Preset, dict[str, str]]:
    """(our preset with towers of the reference, what could not be lent and why)."""
    started = {s.into.split(".")[0] for s in ours.starts}
    config, feed, missing, lent = ours.config, ours.feed, dict[str, str](), dict[str, tuple[str, int, int]]()
    for kind, asked in (("image", image), ("text", text)):
        mine, theirs = tower_of(config, kind), tower_of(reference.config, kind)
        if not mine or not theirs:
            continue                                             # nothing to share; not a lack
        if started & {mine, ""}:
            missing[kind] = f"its {kind} tower comes with weights"
        elif asked:
            before, after = getattr(config, mine), with_own_words(getattr(reference.config, theirs), getattr(config, mine), feed, reference.feed)
            if before == after:
                lent[kind] = mine, 0, 0
                continue
            try:
                config = config.but(**{mine: after})
            except UserError as error:
                missing[kind] = str(error)
                continue
            lent[kind] = mine, getattr(before, "width", 0), getattr(after, "width", 0)
    both = len(lent) == 2 or not (tower_of(config, "image") and tower_of(config, "text"))
    heads = {h for h in HEADS if both and type(getattr(config, h, None)) is type(getattr(reference.config, h, 0))}
    space = {getattr(getattr(config, h), "out", None) for h in heads}
    config = config.but(**{h: getattr(reference.config, h) for h in heads})      # a head of another kind makes a recipe itself
    queue, out = getattr(config, "queue", None), [getattr(getattr(config, h), "out", None) for h in sorted(heads)]
    if queue is not None and out and out[0] and getattr(queue, "width", None) in space:     # it keeps features as they leave the heads
        config = config.but(**{"queue.width": out[0]})
    kept = {f.name for f in fields(config) if len(lent) == 1 and f.name.startswith("text_" if "image" in lent else ("image_", "vision_"))}
    for _, before, after in lent.values():
        if before != after:
            config = widened(config, before, after, {n for n, *_ in lent.values()} | heads | kept)
    if "image" in lent:
        feed = pictures_like(feed, reference.feed)
    if "text" in lent and feed.text is not None and type(feed.text) is type(reference.feed.text):
        feed = feed.but(text=reference.feed.text)
    return ours.but(config=config, feed=feed), missing


def with_own_words(after: Spec, before: Spec, ours: Any, reference: Any) -> Spec:
    """The tower `after`, with as many ids behind those of the tokenizer as `before` has: what hides words needs one that says so."""
    plans = ours.text, reference.text
    if any(not hasattr(x, "vocab") for x in (after, before, *plans)) or plans[0].vocab != plans[1].vocab:
        return after
    return after.but(vocab=after.vocab + max(0, before.vocab - plans[0].vocab))  # type: ignore[attr-defined]


def widened(config: Any, before: int, after: int, but: Iterable[str] = ()) -> Any:
    """Whatever reads a tower's features, of width `before` so far, reads `after`, at any depth: a head's `into`, the `source` of cross-attention,
    the width that an MLP with an output of its own takes, the first of `widths`."""
    for f in fields(config):
        value = getattr(config, f.name)
        if f.name in but:
            continue
        if isinstance(value, Spec):
            config = config.but(**{f.name: widened(value, before, after)})
        elif value == before and (f.name in ("into", "source") or (f.name == "width" and getattr(config, "out", 0) and hasattr(config, "hidden"))):
            config = config.but(**{f.name: after})
        elif f.name == "widths" and value and value[0] == before:
            config = config.but(widths=(after, *value[1:]))
    return config


def pictures_like(feed: Any, reference: Any) -> Any:
    """The feed with pictures read as the reference reads them, the paired view included; its other views in the same size."""
    if feed.image is None or reference.image is None:
        return feed
    size = (reference.train_image or reference.image).size
    changes: dict[str, Any] = {"image": reference.image, "train_image": reference.train_image if feed.train_image is not None else None}
    if feed.views:
        changes["views"] = tuple(v.but(size=size) for v in feed.views)
    return feed.but(**changes)


def views(feed: Any) -> list[str]:
    """What is done to pictures in training, view by view: crops as shares of the area, and the chance of each change."""
    plans = list(feed.views) or [feed.train_image] if feed.train_image is not None or feed.views else []
    return [said_of(plan) for plan in plans] or ["as they are"]


def said_of(plan: Any) -> str:
    fine = lambda v: f"{v:.3g}"
    sides = getattr(plan, "sides", None)
    words = [f"crops of sides {sides[0]} to {sides[1]}" if sides else f"crops of {fine(plan.scale[0])} to {fine(plan.scale[1])}"]
    words += [f"{name} {fine(chance)}" for name, chance in (("flip", plan.flip), ("grey", plan.grey), ("blur", plan.blur),
                                                            ("solarize", plan.solarize)) if chance]
    if plan.jitter:
        by = [f"{name} {fine(v)}" for name, v in zip(("brightness", "contrast", "saturation", "hue"), plan.jitter_by) if v]
        words.append(f"jitter {fine(plan.jitter)} ({', '.join(by)})")
    if getattr(plan, "operations", 0):
        words.append(f"RandAugment {plan.operations} of magnitude {fine(plan.magnitude)}, erasing {fine(plan.erase)}")
    return ", ".join(words)


class Tokenizers:
    """A source as feeds tell it, and the tokenizers of its texts, each made once. Whoever judges pictures is asked only when the run begins."""

    def __init__(self, source: Any):
        self.source, self.sources, self.made = source, list[tuple[Any, Any]](), list[tuple[Any, Any]]()

    def told(self, feed: Any) -> Any:
        """The source of a feed. UserError where the data do not hold what it tells."""
        from polysense.data.told import tellings, told

        return once(self.sources, tellings(feed), lambda: told(self.source, feed))

    def __call__(self, feed: Any) -> Any:
        if feed.text is None:
            return None
        from polysense.data.chat import texts_of
        from polysense.data.tokenizer import make_tokenizer
        from polysense.data.told import tellings

        return once(self.made, (feed.text, tellings(feed)), lambda: make_tokenizer(feed.text, texts_of(self.told(feed), feed.text)))


def once(made: list[tuple[Any, Any]], key: Any, make: Callable[[], Any]) -> Any:
    """What was made for an equal key, or is made now."""
    for known, thing in made:
        if known == key:
            return thing
    made.append((key, make()))
    return made[-1][1]


def tried(e: Entrant, plan: Preset, tokenizers: Tokenizers) -> str:
    """Why a preset does not work: "" where each of its stages computes a finite loss on a few samples and has an optimiser that finds the
    parameters it names. Random states stay as they are."""
    from polysense.data.loader import Loader
    from polysense.train.optim import groups

    with torch.random.fork_rng(devices=[]):
        try:
            loader = Loader(tokenizers.told(plan.feed), plan.feed, tokenizers(plan.feed), batch_size=TRIED, seed=0, needs=e.needs, workers=0)
            batch = next(iter(loader))
            system = plan.config.build()
            for stage in plan.stages:
                if stage.run is not None:
                    continue
                system.choose_trainable(stage.trainable)
                groups(system, stage.optim)
                losses = stage.objective(system.train(), stage.embed(system, batch) if stage.embed else batch)
                if not all(bool(v.isfinite()) for v in losses.values()):
                    return "its loss is not finite"
        except UserError as error:
            return error.what
        except Exception as error:           # a recipe may fail in any way on a tower that it was not made for
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}".rstrip(": ")
    return ""


def budgeted(e: Entrant, budget: Budget) -> Preset:
    """The preset with the budget's steps; where time decides, more than there is time for."""
    if budget.seconds is not None:
        total = sum(s.steps for s in e.plan.stages)
        return e.plan.but(**{f"stages.{i}.steps": max(1, FOREVER * s.steps // total) for i, s in enumerate(e.plan.stages)})
    size = e.plan.stages[0].batch_size
    steps = budget.steps if budget.steps is not None else (budget.samples or 0) // size
    if steps < 1:
        raise UserError(f"{budget} are less than one batch of {size}", "raise the budget, or set batch_size")
    return shortened(e.plan, steps)


def line_up(systems: Iterable[str], data: str, budget: Budget, *, vary: Sequence[tuple[str, Sequence[Any]]] = (),
            overrides: dict[str, Any] | None = None, share: bool = True, split: str = "train") -> list[Entrant]:
    """All entrants, the reference first, ready to train; those that cannot take part say `why`. UserError where fewer than two can."""
    from polysense.data import source

    words = list(dict.fromkeys(systems))
    if vary and len(words) != 1:
        raise UserError("--vary changes one part of one system", f"give one system, not {len(words)}")
    if not vary and len(words) < 2:
        raise UserError("one system cannot be compared", "give at least two, or say what to --vary")
    train = source(data, split)
    first = entrant(words[0], overrides or {})
    crowd = varied(first, vary) if vary else [first, *(entrant(w, {}) for w in words[1:])]
    tokenizers, out = Tokenizers(train), list[Entrant]()
    for e in crowd:
        if e is not crowd[0]:
            e.plan = likewise(e.plan, overrides or {})
        e.plan = e.plan.but(data=data)
        from polysense.data.loader import check_needs

        try:
            load(e.id)
            check_needs(e.needs, tokenizers.told(e.plan.feed).offers, e.plan.feed, train.name, True)
        except UserError as error:
            out.append(Entrant(e.label, e.id, e.preset, e.plan, e.changes, e.notes, why=str(error)))
            continue
        reference = next((r for r in out if not r.why), None)
        if reference is None or not share or (vary and e.id == reference.id):
            e.why = tried(e, e.plan, tokenizers)
        else:
            e = shared(e, reference, tokenizers)
        out.append(e)
    fit = [e for e in out if not e.why]
    if len(fit) < 2:
        raise UserError(f"only {len(fit)} of {len(out)} can take part: " + "; ".join(f"{e.label}: {e.why}" for e in out if e.why),
                        "choose other systems or data")
    for e in fit:
        e.plan = budgeted(e, budget)
    return out
