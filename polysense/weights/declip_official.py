"""DeCLIP as SenseTime released it: CLIP's image tower under `visual`, the text tower under `encode_text`, SimSiam's heads, the word predictor.

The queue of texts is not in the files: a loaded system begins with random directions.
"""
from typing import Any

from polysense.base.errors import UserError
from polysense.weights import clip_openai as openai
from polysense.weights.keymap import KeyMap, Op, State, batch_norm, both, rule, transpose
from polysense.weights.layout import Layout
from polysense.weights.sizes import Dict, count, side, size
from polysense.weights.slip_official import folded

one = Op("one", lambda t: [t[0].reshape(())], lambda t: [t[0].reshape(1)])


def _normed(linear: str, norm: str, ours: str) -> tuple[Any, ...]:
    """A linear, whose bias the batch norm behind it takes away, and that norm."""
    return (rule(f"{linear}.weight", f"{ours}.linear.weight"), rule((f"{linear}.bias", f"{norm}.running_mean"), f"{ours}.norm.running_mean", folded),
            *(r for r in batch_norm(norm, f"{ours}.norm") if not r.theirs[0].endswith("running_mean")))


HEADS = KeyMap((
    *(r for n in (1, 2, 3) for r in _normed(f"projector.linear{n}", f"projector.bn{n}", f"projector.layers.{n - 1}")),
    *_normed("predictor.linear1", "predictor.bn1", "predictor.layers.0"), *both("predictor.layer2", "predictor.layers.1.linear"),
    *both("text_label_predictor", "guess"), *both("encode_text.text_projection", "text_head"), rule("logit_scale", "log_scale", one),
    rule("visual.proj", "image_head.weight", transpose)), drop=(r"nn_replacer_(img|text)\..*",), own=(r"queue\..*",))


def keymap(config: Any) -> KeyMap:
    return openai.VIT.at("visual", "vision") + openai.TEXT.at("encode_text", "text") + HEADS


def read(config: Dict, state: State) -> tuple[str, Dict]:
    """(preset, overrides) from the shapes."""
    if "visual.class_embedding" not in state:
        raise UserError("this DeCLIP has a ResNet tower", "of the released models those with a ViT are read")
    width, patch, dim = size(state, "visual.conv1.weight"), size(state, "visual.conv1.weight", 3), size(state, "visual.proj", 1)
    text, vocab = size(state, "encode_text.ln_final.weight"), size(state, "encode_text.token_embedding.weight")
    out = openai.text_sizes(vocab, size(state, "encode_text.positional_embedding"), dim, width=text, act="quick_gelu", eps=1e-5,
                            depth=count(state, "encode_text.transformer.resblocks"), heads=max(1, text // openai.HEAD),
                            hidden=size(state, "encode_text.transformer.resblocks.0.mlp.c_fc.weight"))
    out |= openai.vit_sizes(patch * side(size(state, "visual.positional_embedding")), patch, dim, width=width, act="quick_gelu", eps=1e-5,
                            depth=count(state, "visual.transformer.resblocks"), heads=max(1, width // openai.HEAD),
                            hidden=size(state, "visual.transformer.resblocks.0.mlp.c_fc.weight"))
    del out["feed.train_image.size"]
    hidden, inner = size(state, "projector.linear1.weight"), size(state, "predictor.linear1.weight")
    return "paper", out | {
        "config.text.end": vocab - 2, "feed.text.vocab": vocab - 1, "config.projector.widths": (dim, hidden, hidden, hidden),
        "config.predictor.widths": (hidden, inner, hidden), "config.guess.into": text, "config.guess.out": vocab, "config.queue.width": dim,
        "config.hide.vocab": vocab, "config.hide.mask": vocab - 1, "config.hide.special": (0, vocab - 3, vocab - 2)}


def write(config: Any) -> Dict:
    """Nothing: the shapes say all. UserError for a system that these files cannot hold."""
    openai.check_vit(config, "official")
    if not hasattr(config.text_head, "std") or config.text.end != config.text.vocab - 2 or config.projector.last != "scaled":
        raise UserError("these files mean a text head with a bias, an end token before the mask's, and SimSiam's projector", "keep the run folder")
    return {}


LAYOUT = Layout(of="declip", name="official", keymap=keymap, read=read, write=write, config_file="", weights_file="declip.pth.tar")
