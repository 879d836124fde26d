"""CoOp as released: a prompt learner by itself, `ctx` and two buffers of embedded class names, which are left behind. It stands on a CLIP of
OpenAI's, whose file lies beside it; written out, both are in one file."""
from dataclasses import replace
from typing import Any

from polysense.base.errors import UserError
from polysense.weights import clip_openai
from polysense.weights.keymap import KeyMap, State, rule
from polysense.weights.sizes import Dict

CLIPS = ("RN50.pt", "RN101.pt", "ViT-B-32.pt", "ViT-B-16.pt", "ViT-L-14.pt", "clip.pt")
OURS = KeyMap((rule("ctx", "text.context"),), drop=(r"token_(prefix|suffix)",), own=(r"text\.names",), alias=(
    ("prompt_learner.{rest}", "{rest}"), ("image_encoder.{rest}", "clip.visual.{rest}"), ("text_encoder.{rest}", "clip.{rest}"),
    ("logit_scale", "clip.logit_scale")))


def keymap(config: Any) -> KeyMap:
    return clip_openai.keymap(config).at("clip", "") + OURS


def read(config: Dict, state: State) -> tuple[str, Dict]:
    """(preset, overrides) from the shapes. Where the name stands is not in the file: behind the context, as in the released runs."""
    clip = State({k.removeprefix("clip."): v for k, v in state.items() if k.startswith("clip.")})
    if not clip:
        raise UserError("this is a prompt learner without the CLIP that it stands on", f"put OpenAI's file beside it, as {' or '.join(CLIPS)}")
    preset, out = clip_openai.read({}, clip)
    ctx = state.get("ctx", state.get("prompt_learner.ctx"))
    if ctx is None or ctx.ndim not in (2, 3) or ctx.shape[-1] != out["config.text.body.width"]:
        raise UserError(f"a context of shape {None if ctx is None else list(ctx.shape)} does not fit this CLIP's text tower",
                        f"its words are {out['config.text.body.width']} wide: they belong to another CLIP")
    many = next((v.shape[0] for k, v in state.items() if k.endswith("token_suffix")), 1)
    return {"rn50": "paper", "vit_b_32": "paper_vit"}[preset], out | {
        "config.text.context": ctx.shape[-2], "config.text.kind": "unified" if ctx.ndim == 2 else "specific",
        "config.text.classes": many if ctx.ndim == 2 else ctx.shape[0]}


def write(config: Any) -> Dict:
    """Nothing: the shapes say all. UserError for a CLIP that OpenAI's files cannot hold."""
    return clip_openai.write(config)


LAYOUT = replace(clip_openai.LAYOUT, of="coop", name="official", keymap=keymap, read=read, write=write, weights_file="prompt_learner.pt",
                 also=tuple((file, "clip") for file in CLIPS))
