"""Weights between a published layout and a run folder of ours, and the check of what came out against recorded outputs."""
from __future__ import annotations

from pathlib import Path
from typing import Any

from polysense.base.catalogue import card_of, load
from polysense.base.errors import UserError
from polysense.base.protocols import CAPABILITIES

INPUTS = {"encode_image": "image", "encode_text": "text", "classify": "image"}      # what each capability that can be checked reads


def convert_weights(source: Path, target: Path, system: str, layout: str, check: Path | None = None) -> dict[str, Any]:
    """Writes `target` and returns {system, layout, from, to, direction, parameters, largest_difference}.

    A run folder is exported, anything else imported into a run folder. `check`: a .safetensors file of inputs (`image`, `text`) and of the outputs
    that the authors' code gave for them, named by capability (`encode_image` ...); beyond 1e-4 nothing is written and UserError says which.
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
    difference = differ(pipeline.system, check) if check else None
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


def differ(system: Any, reference: Path) -> float:
    """The largest relative difference between a system's outputs and recorded ones; UserError beyond 1e-4."""
    import torch
    from safetensors.torch import load_file

    from polysense.weights.convert import compare

    try:
        said = load_file(reference)
    except Exception as error:
        raise UserError(f"cannot read the reference {str(reference)!r} ({type(error).__name__})",
                        "give a .safetensors file of inputs and outputs") from error
    names = [k for k in said if k in INPUTS]
    missing = [INPUTS[k] for k in names if INPUTS[k] not in said]
    if not names or missing:
        raise UserError(f"the reference holds {', '.join(sorted(said))}", "it should hold image or text and the outputs encode_image, encode_text or "
                        "classify that the authors' code gave for them")
    if unable := [k for k in names if not isinstance(system, CAPABILITIES[k])]:
        raise UserError(f"{type(system).__name__} cannot {unable[0]}", "leave it out of the reference")
    with torch.inference_mode():
        ours = {k: getattr(system, k)(said[INPUTS[k]]) for k in names}
    return compare(ours, {k: said[k] for k in names})
