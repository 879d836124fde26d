"""ViT-VQGAN as the reimplementation enhancing-transformers released it (the authors released none): linears in place of the paper's projections of
two layers, tanh in the blocks, fixed positions that the file holds, pixels in [0,1] (here: [-1,1], which its first and last layer are told)."""
from typing import Any

from torch import Tensor

from polysense.base.errors import UserError
from polysense.base.spec import from_dict
from polysense.weights.keymap import KeyMap, Op, Rule, State, both, rule, stack3, ties
from polysense.weights.layout import Layout
from polysense.weights.sizes import Dict, count, image_feed, side, size

HEAD = 64                                    # width of a head, which no shape shows
OWN = (r"prior\..*", r"critic\..*", r"perceptual\..*", r"met", r"codec\.decoder\.log_scale", r"codec\.quantizer\.count")


def patches(t: list[Tensor]) -> list[Tensor]:
    """Their patches are of pixels in [0,1], ours of [-1,1]."""
    return [t[0] / 2, t[1] + t[0].flatten(1).sum(1) / 2]


def unpatches(t: list[Tensor]) -> list[Tensor]:
    return [t[0] * 2, t[1] - t[0].flatten(1).sum(1)]


def halves(c: Any) -> list[Rule]:
    patch = c.codec.decoder.patch
    turned = Op("turned", lambda t: [2 * t[0].flatten(1).T], lambda t: [(t[0] / 2).T.unflatten(1, (-1, patch, patch))])
    each = Op("each", lambda t: [2 * t[0].repeat_interleave(patch ** 2) - 1],
              lambda t: ties(patch ** 2).load([(t[0] / 2 + 0.5)[i::patch ** 2] for i in range(patch ** 2)]))
    first, mine = "encoder.to_patch_embedding.0", "codec.encoder.patch"
    rules = [rule((f"{first}.weight", f"{first}.bias"), (f"{mine}.weight", f"{mine}.bias"), Op("centred", patches, unpatches)),
             rule("encoder.en_pos_embedding", "codec.encoder.position"),
             rule("decoder.de_pos_embedding", "codec.decoder.position"), *both("pre_quant", "codec.encoder.project"),
             *both("post_quant", "codec.decoder.spread"), rule("quantizer.embedding.weight", "codec.quantizer.codebook"),
             rule("decoder.to_pixel.1.weight", "codec.decoder.project.weight", turned),
             rule("decoder.to_pixel.1.bias", "codec.decoder.project.bias", each)]
    for half in ("encoder", "decoder"):
        theirs, ours = f"{half}.transformer.layers.{{i}}", f"codec.{half}.body.blocks.{{i}}"
        rules += [*both(f"{theirs}.0.norm", f"{ours}.norm1"), *both(f"{theirs}.1.norm", f"{ours}.norm2"),
                  rule(f"{theirs}.0.fn.to_qkv.weight", tuple(f"{ours}.attn.{n}.weight" for n in "qkv"), stack3),
                  *both(f"{theirs}.0.fn.to_out", f"{ours}.attn.out"), *both(f"{theirs}.1.fn.net.0", f"{ours}.mlp.up"),
                  *both(f"{theirs}.1.fn.net.2", f"{ours}.mlp.down"), *both(f"{half}.transformer.norm", f"codec.{half}.body.norm")]
    return rules


EARLIER = (*((f"{half}.norm.{{rest}}", f"{half}.transformer.norm.{{rest}}") for half in ("encoder", "decoder")),
           ("decoder.to_pixel.conv_out.{rest}", "decoder.to_pixel.1.{rest}"))            # names of the reimplementation's first versions


def keymap(config: Any) -> KeyMap:
    return KeyMap(tuple(halves(config)), drop=(r"loss\..*",), alias=EARLIER, own=OWN)


def body(width: int, depth: int, hidden: int) -> Dict:
    return {"is": "polysense.nn.transformer:Transformer.Config", "width": width, "depth": depth, "heads": max(1, width // HEAD), "block": {
        "is": "polysense.nn.block:PreNorm.Config", "attn": {"is": "polysense.nn.attention:Attention.Config", "bias": "out"},
        "mlp": {"is": "polysense.nn.mlp:MLP.Config", "hidden": hidden, "act": "tanh"}}}


def read(config: Dict, state: State) -> tuple[str, Dict]:
    """Sizes from the shapes; heads are 64 wide."""
    patch, dim = size(state, "encoder.to_patch_embedding.0.weight", 2), size(state, "quantizer.embedding.weight", 1)
    codes = size(state, "quantizer.embedding.weight")
    out: Dict = {"is": "polysense.decoders.vq_codec:VQCodec.Config", "quantizer": {
        "is": "polysense.decoders.vit_codec:CosineQuantizer.Config", "codes": codes, "width": dim}}
    n = 0
    for half, at, kind in (("encoder", "en", "ViTEncoder"), ("decoder", "de", "ViTDecoder")):
        n, width = side(size(state, f"{half}.{at}_pos_embedding", 1), 0), size(state, f"{half}.{at}_pos_embedding", 2)
        out[half] = {"is": f"polysense.decoders.vit_codec:{kind}.Config", "patch": patch, "side": n, "code": dim, "project": {
            "is": "polysense.nn.head:LinearBias.Config", "into": width, "out": dim if half == "encoder" else 3 * patch ** 2}, "body": body(
                width, count(state, f"{half}.transformer.layers"), size(state, f"{half}.transformer.layers.0.1.fn.net.0.weight"))}
    return "paper", {"config.codec": from_dict(out), "config.prior.codes": codes, "config.prior.side": n, **image_feed(n * patch)}


def write(config: Any) -> Dict:
    for half in (config.codec.encoder, config.codec.decoder):
        if not hasattr(half.project, "into") or hasattr(half.project, "hidden"):
            raise UserError("enhancing-transformers has one linear where this has two layers", "keep the run folder")
        if half.body.width // half.body.heads != HEAD or half.body.block.mlp.act != "tanh":
            raise UserError(f"enhancing-transformers has heads of {HEAD} and tanh in its blocks", "keep the run folder")
    return {}


ENHANCING = Layout(of="vit_vqgan", name="enhancing", keymap=keymap, read=read, write=write, config_file="")
