"""ViT as its authors publish it: arrays of a .npz file, whose kernels have their inputs first and their heads apart.

Shapes: D width, h heads, H width of one, P patch, C channels.
"""
from typing import Any

from polysense.base.errors import UserError
from polysense.base.spec import from_dict
from polysense.weights.keymap import KeyMap, Op, Rule, State, Tensors, rule, transpose
from polysense.weights.layout import Layout
from polysense.weights.sizes import Dict, body, body_of, count_named, image_feed, side, size

EPS, ACT = 1e-6, "gelu_tanh"                 # flax's GELU is the one by tanh
BLOCK = "Transformer.encoderblock_{i}"
HALF = (0.5, 0.5, 0.5)

patches = Op("patches", lambda t: [_of(t[0], 4).permute(3, 2, 0, 1)], lambda t: [_of(t[0], 4).permute(2, 3, 1, 0)])         # [P,P,C,D]


def _of(t: Any, axes: int) -> Any:
    if t.ndim != axes:
        raise ValueError(f"it has not {axes} axes")
    return t


def apart(heads: int) -> tuple[Op, Op, Op]:
    """Between ours and theirs: a kernel into heads [D,h,H], the bias of it [h,H], a kernel out of heads [h,H,D]."""
    def cut(t: Tensors, axis: int) -> Tensors:
        return [t[0].unflatten(axis, (heads, -1))]
    return (Op("into_heads", lambda t: [_of(t[0], 3).flatten(1).T], lambda t: cut([t[0].T], 1)), Op("of_heads", lambda t: [_of(t[0], 2).flatten()],
            lambda t: cut(t, 0)), Op("from_heads", lambda t: [_of(t[0], 3).flatten(0, 1).T], lambda t: cut([t[0].T], 0)))


def dense(theirs: str, ours: str) -> tuple[Rule, ...]:
    return rule(f"{theirs}.kernel", f"{ours}.weight", transpose), rule(f"{theirs}.bias", f"{ours}.bias")


def norm(theirs: str, ours: str) -> tuple[Rule, ...]:
    return rule(f"{theirs}.scale", f"{ours}.weight"), rule(f"{theirs}.bias", f"{ours}.bias")


def vision(heads: int) -> KeyMap:
    """The table of a tower of so many heads."""
    attention, (into, of, out) = f"{BLOCK}.MultiHeadDotProductAttention_1", apart(heads)
    return KeyMap((
        rule("cls", "cls"), rule("Transformer.posembed_input.pos_embedding", "position"), rule("embedding.kernel", "patch.weight", patches),
        rule("embedding.bias", "patch.bias"), *norm("Transformer.encoder_norm", "body.norm"),
        *(r for t, o in (("query", "q"), ("key", "k"), ("value", "v")) for r in (
            rule(f"{attention}.{t}.kernel", f"body.blocks.{{i}}.attn.{o}.weight", into),
            rule(f"{attention}.{t}.bias", f"body.blocks.{{i}}.attn.{o}.bias", of))),
        rule(f"{attention}.out.kernel", "body.blocks.{i}.attn.out.weight", out), rule(f"{attention}.out.bias", "body.blocks.{i}.attn.out.bias"),
        *norm(f"{BLOCK}.LayerNorm_0", "body.blocks.{i}.norm1"), *norm(f"{BLOCK}.LayerNorm_2", "body.blocks.{i}.norm2"),
        *dense(f"{BLOCK}.MlpBlock_3.Dense_0", "body.blocks.{i}.mlp.up"), *dense(f"{BLOCK}.MlpBlock_3.Dense_1", "body.blocks.{i}.mlp.down")))


def tower(state: State, at: str, ours: str) -> tuple[Dict, int]:
    """(overrides of a `ViT.Config` at a dotted path, image size) from the shapes below `at` ("img." or "")."""
    if f"{at}cls" not in state or f"{at}conv_root.kernel" in state:
        raise UserError("this ViT has no class token, or a ResNet below it", "only the plain one with a class token is read")
    patch, first = size(state, f"{at}embedding.kernel"), f"{at}{BLOCK.replace('{i}', '0')}"
    image = patch * side(size(state, f"{at}Transformer.posembed_input.pos_embedding", 1))
    return {f"{ours}.image_size": image, f"{ours}.patch": patch, **body(
        f"{ours}.body", width=size(state, f"{at}cls", 2), depth=count_named(state, rf"{at}Transformer\.encoderblock_(\d+)\.LayerNorm_0\.scale"),
        heads=size(state, f"{first}.MultiHeadDotProductAttention_1.query.kernel", 1), hidden=size(state, f"{first}.MlpBlock_3.Dense_0.kernel", 1),
        act="gelu_new", eps=EPS)}, image


def checked(tower: Any, layout: str) -> Dict:
    """Sizes of a `ViT.Config` that these files can hold. UserError for another tower."""
    of = body_of(tower.body, layout) if hasattr(tower, "body") and hasattr(tower, "patch") else None
    if of is None or tower.prefix != 1 or tower.norm_pre is not None or tower.stem is not None or not tower.patch_bias or tower.pool != "cls" \
            or tower.position != "learned" or of["act"] != ACT or of["eps"] != EPS:
        raise UserError(f"these files hold a plain ViT with a class token, GELU by tanh and eps {EPS}", "keep the run folder, or export elsewhere")
    return of


def keymap(config: Any) -> KeyMap:
    """A Classifier of a ViT under a dense head, one with a tanh layer (`pre_logits`), or none."""
    head = config.head
    found = (*dense("pre_logits", "head.pre"), *dense("head", "head.out")) if hasattr(head, "hidden") else dense("head", "head")
    return vision(config.backbone.body.heads).at("", "backbone") + KeyMap(found if hasattr(head, "out") else ())


def read(config: Dict, state: State) -> tuple[str, Dict]:
    """(preset, overrides) from the shapes."""
    out, image = tower(state, "", "config.backbone")
    width = size(state, "cls", 2)
    kind = "TanhHead" if "pre_logits.kernel" in state else "LinearBias" if "head.kernel" in state else "Nothing"
    sizes = {"into": width, "out": size(state, "head.kernel", 1)} if kind != "Nothing" else {}
    hidden = {"hidden": size(state, "pre_logits.kernel", 1)} if kind == "TanhHead" else {}
    return "finetune", out | image_feed(image, mean=HALF, std=HALF, resample="bilinear", fit="squash") | {
        "config.head": from_dict({"is": f"polysense.nn.head:{kind}.Config", **sizes, **hidden})}


def write(config: Any) -> Dict:
    """Nothing: the shapes say all. UserError for a system that these files cannot hold."""
    checked(config.backbone, "jax")
    return {}


LAYOUT = Layout(of="vit", name="jax", keymap=keymap, read=read, write=write, config_file="", weights_file="vit.npz")
