"""Weights between a published layout and a run folder of ours, and the check of what came out against recorded outputs."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from polysense.base.catalogue import card_of, load
from polysense.base.errors import UserError
from polysense.base.protocols import CAPABILITIES
from polysense.base.spec import parse_overrides

INPUTS = {"encode_image": "image", "encode_text": "text", "classify": "image"}      # what each capability that can be checked reads


def convert_weights(source: Path, target: Path, system: str, layout: str, check: Path | None = None,
                    settings: Sequence[str] = ()) -> dict[str, Any]:
    """Writes `target` and returns {system, layout, from, to, direction, parameters, largest_difference}.

    A run folder is exported, anything else imported into a run folder. `check`: a .safetensors file of inputs (`image` [B,3,H,W] or `picture`, uint8
    [B,H,W,3], which is then read as the system reads pictures; `text`) and of the outputs that the authors' code gave for them, named by capability
    (`encode_image` ...); beyond 1e-4 nothing is written and UserError says which, and what closes the gap. `settings`: such as
    "vision.body.block.mlp.act=gelu", for what a published file does not say about its configuration; on import only.
    """
    card_of(system)
    layouts = getattr(load(system), "weights", {})
    if layout not in layouts:
        raise UserError(f"{system} has no layout {layout!r}", f"it has {', '.join(layouts)}" if layouts else "its weights were never published")
    if target.exists() and (target.is_file() or any(target.iterdir())):
        raise UserError(f"{target} is already there", "give another place to write to")
    out = (source / "run.json").is_file()
    import polysense

    pipeline = polysense.open(source, device="cpu") if out else polysense.open(source, system=system, layout=layout, device="cpu")
    if out and pipeline.id != system:
        raise UserError(f"{source} is a run of {pipeline.id}, not of {system}", f"say --system {pipeline.id}")
    if settings and out:
        raise UserError("a run knows its configuration", "--set is for published checkpoints")
    if settings:
        pipeline = with_settings(pipeline, parse_overrides(list(settings)))
    difference = differ(pipeline, check) if check else None
    if out:
        from polysense.weights.convert import export

        export(pipeline.system.state_dict(), pipeline.preset.config, layouts[layout], target, pipeline.preset.feed)
        if pipeline.tokenizer is not None and target.is_dir():
            pipeline.tokenizer.save(target)
    else:
        write_run(pipeline, target, {"system": system, "preset": layout, "overrides": {}, "plan": pipeline.preset.to_dict(), "seed": 0,
                                     "data": pipeline.preset.data, "split": "train", "ranks": 1,
                                     "converted": {"from": str(source), "layout": layout}})
    return {"system": system, "layout": layout, "from": str(source), "to": str(target), "direction": "export" if out else "import",
            "parameters": sum(p.numel() for p in pipeline.system.parameters()), "largest_difference": difference}


def with_settings(pipeline: Any, settings: dict[str, Any]) -> Any:
    """The same weights under another configuration, such as another activation; UserError where they do not fit it."""
    from polysense.pipeline import Pipeline

    config = pipeline.preset.config.but(**settings)
    system = config.build()
    try:
        system.load_state_dict(pipeline.system.state_dict())
    except RuntimeError as error:
        raise UserError("the weights do not fit these settings",
                        f"only what has no weights can be set: {str(error).splitlines()[-1].strip()}") from error
    return Pipeline(system, pipeline.preset.but(config=config), pipeline.tokenizer, id=pipeline.id, source=pipeline.source, device="cpu")


def write_run(pipeline: Any, target: Path, facts: dict[str, Any]) -> None:
    """A run folder of weights that were not trained here: what `polysense.open`, exams and the app take."""
    from polysense.train.checkpoint import write_tensors
    from polysense.train.folder import Folder

    folder = Folder(target)
    folder.claim(facts, pipeline.preset, resume=False)
    if pipeline.tokenizer is not None:
        pipeline.tokenizer.save(target / "tokenizer")
    state = {k: v.cpu().contiguous() for k, v in pipeline.system.state_dict().items()}
    write_tensors(folder.weights, state, {"format": "pt", "system": facts["system"], "preset": facts["preset"], "steps": "0"})


def differ(pipeline: Any, reference: Path) -> float:
    """The largest relative difference between a system's outputs and recorded ones; beyond 1e-4 a UserError that names the cause."""
    import torch

    from polysense.weights.causes import find_causes
    from polysense.weights.convert import compare, gap

    said = read_reference(pipeline, reference)
    names = [k for k in said if k in INPUTS]
    plan = pipeline.preset.feed.image if "picture" in said else None

    def outputs(system: Any, image: Any) -> dict[str, Any]:
        from polysense.data.images import read_images

        given = said if image is None else said | {"image": read_images(image, [p.numpy() for p in said["picture"]])}
        with torch.inference_mode():
            return {k: getattr(system, k)(given[INPUTS[k]]) for k in names}

    theirs = {k: said[k] for k in names}
    try:
        return compare(outputs(pipeline.system, plan), theirs)
    except UserError as error:
        found, left = find_causes(pipeline.system, pipeline.preset.config, plan, said.get("text"),
                                  lambda system, image: gap(outputs(system, image), theirs))
        if not found:
            raise
        whole = {k: v for c in found for k, v in c.config.items()}
        told = "say " + " ".join(f"--set {k}={v}" for k, v in sorted(whole.items())) if whole else "the reference was made from other pictures"
        raise UserError(f"{error.what}; with {' and '.join(c.says for c in found)} it differs by {left:.1g}", told) from error


def read_reference(pipeline: Any, reference: Path) -> dict[str, Any]:
    """{name: tensor} of a file of inputs and recorded outputs; UserError where it lacks what it takes to compare."""
    from safetensors.torch import load_file

    try:
        said = load_file(reference)
    except Exception as error:
        raise UserError(f"cannot read the reference {str(reference)!r} ({type(error).__name__})",
                        "give a .safetensors file of inputs and outputs") from error
    names = [k for k in said if k in INPUTS]
    inputs = said.keys() | ({"image"} if "picture" in said else set())
    if not names or any(INPUTS[k] not in inputs for k in names):
        raise UserError(f"the reference holds {', '.join(sorted(said))}", "it should hold image (or picture) or text and the outputs encode_image, "
                        "encode_text or classify that the authors' code gave for them")
    if unable := [k for k in names if not isinstance(pipeline.system, CAPABILITIES[k])]:
        raise UserError(f"{type(pipeline.system).__name__} cannot {unable[0]}", "leave it out of the reference")
    return said
