"""CLIP as OpenAI released it: one state dict, no configuration; everything is read off the shapes (heads are 64 wide).

The released archives are TorchScript; only their tensors are read, never their code. Their text feature is the token of the largest id,
their activation is QuickGELU: neither is in the file, both are the layout's.
"""
from typing import Any

from polysense.base.errors import UserError
from polysense.weights.keymap import KeyMap, State, batch_norm, both, lead1, lead2, rule, scalar, stack3, transpose
from polysense.weights.layout import Layout
from polysense.weights.sizes import Dict, body, body_of, count, image_feed, side, size

HEAD = 64                                                    # width of every attention head

BODY = KeyMap((
    *(rule(f"resblocks.{{i}}.attn.in_proj_{p}", tuple(f"blocks.{{i}}.attn.{n}.{p}" for n in "qkv"), stack3) for p in ("weight", "bias")),
    *both("resblocks.{i}.attn.out_proj", "blocks.{i}.attn.out"),
    *both("resblocks.{i}.ln_1", "blocks.{i}.norm1"), *both("resblocks.{i}.ln_2", "blocks.{i}.norm2"),
    *both("resblocks.{i}.mlp.c_fc", "blocks.{i}.mlp.up"), *both("resblocks.{i}.mlp.c_proj", "blocks.{i}.mlp.down"),
), drop=(r"resblocks\.\d+\.attn_mask", r"attn_mask"))

TEXT = KeyMap((
    rule("token_embedding.weight", "embed.weight"), rule("positional_embedding", "position", lead1), *both("ln_final", "body.norm"),
), drop=(r"attn_mask",)) + BODY.at("transformer", "body")

VIT = KeyMap((
    rule("class_embedding", "cls", lead2), rule("positional_embedding", "position", lead1), rule("conv1.weight", "patch.weight"),
    *both("ln_pre", "norm_pre"), *both("ln_post", "body.norm"),
)) + BODY.at("transformer", "body")

RESNET = KeyMap((
    rule("conv{i+1}.weight", "stem.{i}.conv.weight"), *batch_norm("bn{i+1}", "stem.{i}.norm"),
    rule("layer{s+1}.{b}.conv{n}.weight", "stages.{s}.{b}.conv{n}.weight"), *batch_norm("layer{s+1}.{b}.bn{n}", "stages.{s}.{b}.norm{n}"),
    rule("layer{s+1}.{b}.downsample.0.weight", "stages.{s}.{b}.shortcut.conv.weight"),
    *batch_norm("layer{s+1}.{b}.downsample.1", "stages.{s}.{b}.shortcut.norm"),
    rule("attnpool.positional_embedding", "pool.position", lead1), *both("attnpool.c_proj", "pool.out"),
    *(r for n in "qkv" for r in both(f"attnpool.{n}_proj", f"pool.{n}")),
))


def keymap(config: Any) -> KeyMap:
    """The whole of CLIP, with a ViT or a ResNet (`config.vision` says which)."""
    plain = KeyMap((rule("text_projection", "text_head.weight", transpose), rule("logit_scale", "log_scale", scalar)),
                   drop=("input_resolution", "context_length", "vocab_size"))
    vit = is_vit(config)
    image = VIT.at("visual", "vision") + KeyMap((rule("visual.proj", "image_head.weight", transpose),)) if vit else RESNET.at("visual", "vision")
    return plain + TEXT.at("", "text") + image


def is_vit(config: Any) -> bool:
    return hasattr(config.vision, "body")


def read(config: Dict, state: State) -> tuple[str, Dict]:
    """(preset, overrides) from the shapes."""
    text, dim = size(state, "ln_final.weight"), size(state, "text_projection", 1)
    out: Dict = text_sizes(size(state, "token_embedding.weight"), size(state, "positional_embedding"), dim,
                           width=text, depth=count(state, "transformer.resblocks"), heads=max(1, text // HEAD),
                           hidden=size(state, "transformer.resblocks.0.mlp.c_fc.weight"), act="quick_gelu", eps=1e-5)
    if "visual.proj" in state:
        width, patch = size(state, "visual.conv1.weight"), size(state, "visual.conv1.weight", 3)
        image = patch * side(size(state, "visual.positional_embedding"))
        return "vit_b_32", out | vit_sizes(image, patch, dim, width=width, depth=count(state, "visual.transformer.resblocks"),
                                           heads=max(1, width // HEAD), hidden=size(state, "visual.transformer.resblocks.0.mlp.c_fc.weight"),
                                           act="quick_gelu", eps=1e-5)
    layers, base = tuple(count(state, f"visual.layer{s}") for s in (1, 2, 3, 4)), size(state, "visual.layer1.0.conv1.weight")
    image = 32 * side(size(state, "visual.attnpool.positional_embedding"))
    return "rn50", out | resnet_sizes(image, layers, base, base * 32 // HEAD, dim)


def text_sizes(vocab: int, length: int, dim: int, **of: Any) -> Dict:
    """Overrides of `clip` for the text side; the text feature is the largest id's."""
    return {"config.text.vocab": vocab, "config.text.length": length, "config.text.end": None, "feed.text.vocab": vocab, "feed.text.length": length,
            "config.text_head.into": of["width"], "config.text_head.out": dim, **body("config.text.body", **of)}


def vit_sizes(image: int, patch: int, dim: int, **of: Any) -> Dict:
    """Overrides of `clip` for a ViT."""
    return {"config.vision.image_size": image, "config.vision.patch": patch, "config.vision.norm_pre.eps": of["eps"],
            "config.image_head.into": of["width"], "config.image_head.out": dim, **body("config.vision.body", **of), **image_feed(image)}


def resnet_sizes(image: int, layers: tuple[int, ...], base: int, heads: int, dim: int) -> Dict:
    """Overrides of `clip` (preset rn50) for a ResNet."""
    return {"config.vision.image_size": image, "config.vision.layers": layers, "config.vision.base": base, "config.vision.heads": heads,
            "config.vision.dim": dim, **image_feed(image)}


def check_vit(config: Any, layout: str) -> None:
    """Raises UserError for a ViT that CLIP's published code does not compute."""
    v = config.vision
    if v.prefix != 1 or v.norm_pre is None or v.patch_bias or v.stem is not None or v.norm_pre.eps != v.body.block.norm.eps:
        raise UserError(f"this ViT is not CLIP's, {layout} cannot hold it",
                        "CLIP's has one class token, a norm before the blocks and patches without bias")


def write(config: Any) -> Dict:
    """Nothing: the shapes say all. Raises UserError for a CLIP of which that would not be true."""
    bodies = [body_of(config.text.body, "openai")]
    if is_vit(config):
        check_vit(config, "openai")
        bodies.append(body_of(config.vision.body, "openai"))
    odd = [b for b in bodies if b["act"] != "quick_gelu" or b["eps"] != 1e-5 or b["heads"] != max(1, b["width"] // HEAD)]
    if odd or config.text.end is not None or (is_vit(config) and config.vision.pool != "cls") or \
            (not is_vit(config) and config.vision.heads != config.vision.base * 32 // HEAD):
        raise UserError("the layout 'openai' cannot say what this CLIP needs: it means QuickGELU, eps 1e-5, heads 64 wide, class token, "
                        "text read at the largest id", "export to open_clip or hf")
    return {}


LAYOUT = Layout(of="clip", name="openai", keymap=keymap, read=read, write=write, config_file="", weights_file="model.pt")
