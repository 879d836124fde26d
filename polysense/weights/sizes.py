"""Between their configurations and ours: the sizes that every transformer and image layout shares. Works on values, imports no tower."""
import re
from collections.abc import Iterable
from typing import Any, cast

from polysense.base.errors import UserError
from polysense.base.plan import Feed
from polysense.base.spec import from_dict
from polysense.weights.keymap import State

Dict = dict[str, Any]
ACTS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu", "silu": "silu"}
RESAMPLE = {2: "bilinear", 3: "bicubic"}                                 # Pillow's numbers


def within(config: Dict, key: str) -> Dict:
    """A nested object of a configuration; empty where it is absent or null."""
    value = config.get(key)
    return cast(Dict, value) if isinstance(value, dict) else {}


def empty_head() -> Any:
    """A value for a slot that a headless checkpoint leaves empty."""
    return from_dict({"is": "polysense.nn.head:Nothing.Config"})


def body(at: str, *, width: int, depth: int, heads: int, hidden: int, act: str = "", eps: float | None = None, final: bool = True) -> Dict:
    """Overrides of a `Transformer.Config` at a dotted path. `final`: it has a last norm (pre-norm bodies)."""
    out: Dict = {f"{at}.width": width, f"{at}.depth": depth, f"{at}.heads": heads, f"{at}.block.mlp.hidden": hidden}
    if act:
        if act not in ACTS:
            raise UserError(f"the activation {act!r} is not known here", f"known are {', '.join(ACTS)}")
        out[f"{at}.block.mlp.act"] = ACTS[act]
    if eps is not None:
        out |= {f"{at}.block.norm.eps": eps} | ({f"{at}.norm.eps": eps} if final else {})
    return out


ALL, NO_QKV = "q k v out", "out"


def body_of(c: Any, layout: str, *, scales: str = "none", biases: tuple[str, ...] = (ALL,)) -> Dict:
    """width, depth, heads, hidden, act, eps, bias of a `Transformer.Config`. Raises UserError for a body that the layout cannot hold.

    scales: "some" where the layout can hold layer scale; biases: the values of `Attention.Config.bias` that it can hold.
    """
    if isinstance(c.block, tuple):
        raise UserError("blocks of different kinds have no published layout", f"export to {layout} needs one kind of block")
    block, mlp, attn = c.block, c.block.mlp, c.block.attn
    if (block.layer_scale is not None and scales == "none") or getattr(attn, "rope", None) or getattr(attn, "norm_qk", None) \
            or getattr(attn, "kv_heads", None) or not hasattr(block.norm, "eps") or hasattr(mlp, "gate") or block.cross is not None:
        raise UserError(f"{layout} has no name for a part of these blocks (layer scale, rotary, query norms, grouped heads, cross-attention)",
                        "keep the run folder, or export a plain transformer")
    if attn.bias not in biases or mlp.bias != "up down" or (c.norm is not None and getattr(c.norm, "eps", None) != block.norm.eps):
        raise UserError(f"{layout} has one eps for all norms of a body and biases {' or '.join(biases)}", "keep the run folder")
    return {"width": c.width, "depth": c.depth, "heads": c.heads, "hidden": mlp.hidden or int(mlp.ratio * c.width), "act": mlp.act,
            "eps": block.norm.eps, "bias": attn.bias}


def act_name(act: str, layout: str) -> str:
    """transformers' name of one of our activations."""
    for theirs, ours in ACTS.items():
        if ours == act:
            return theirs
    raise UserError(f"{layout} has no name for the activation {act!r}", f"it has those of {', '.join(sorted(set(ACTS.values())))}")


def size(state: State, key: str, axis: int = 0) -> int:
    """Length of one axis of a tensor of theirs; UserError where it is not there."""
    if key not in state or state[key].ndim <= axis:
        raise UserError(f"the file lacks {key}", "it is incomplete, or of another layout")
    return state[key].shape[axis]


def count(state: State, prefix: str) -> int:
    """How many numbered children (`prefix.0`, `prefix.1`, ...) there are."""
    numbers = {k[len(prefix) + 1:].split(".", 1)[0] for k in state if k.startswith(f"{prefix}.")}
    return sum(n.isdigit() for n in numbers)


def count_named(state: State, pattern: str) -> int:
    """How many keys there are of a regular expression."""
    return sum(re.fullmatch(pattern, k) is not None for k in state)


def side(positions: int, prefix: int = 1) -> int:
    """Patches along one side of the square that `positions` positions, `prefix` of them no patches, stand for."""
    out = round((positions - prefix) ** 0.5)
    if out * out != positions - prefix:
        raise UserError(f"{positions} positions do not form a square of patches", "only square images are read")
    return out


def single(value: Any) -> int:
    """A size given as a number, or as a pair that must be equal."""
    pair = set(cast(Iterable[int], value)) if isinstance(value, (list, tuple)) else {value}
    if len(pair) != 1:
        raise UserError(f"an image or patch of {value} is not square", "only square ones are read")
    return int(next(iter(pair)))


def image_feed(side: int, *, mean: Any = None, std: Any = None, resample: str = "", fit: str = "") -> Dict:
    """Overrides of a preset's `feed` for pictures: what is not given stays."""
    out: Dict = {"feed.image.size": side, "feed.train_image.size": side}
    out |= {"feed.image.mean": tuple(mean)} if mean is not None else {}
    out |= {"feed.image.std": tuple(std)} if std is not None else {}
    if resample:
        if resample not in RESAMPLE.values():
            raise UserError(f"pictures resampled with {resample!r} are not read here", f"known are {', '.join(RESAMPLE.values())}")
        out["feed.image.resample"] = resample
    return out | ({"feed.image.fit": fit} if fit else {})


def hf_feed(config: Dict, side: int) -> Dict:
    """The same from transformers' `preprocessor_config.json` (under "preprocessor_config"); without one only the size is known."""
    plan = within(config, "preprocessor_config")
    if not plan:
        return image_feed(side)
    code = plan.get("resample", 3)
    return image_feed(side, mean=plan.get("image_mean"), std=plan.get("image_std"), resample=RESAMPLE.get(code, f"number {code}"),
                      fit="crop" if plan.get("do_center_crop") or "shortest_edge" in within(plan, "size") else "squash")


def to_hf_feed(feed: Feed, kind: str) -> Dict:
    """The inverse of `hf_feed`; `kind` is transformers' image processor."""
    plan = feed.image
    if plan is None:
        return {}
    square = {"height": plan.size, "width": plan.size}
    crop = plan.fit == "crop"
    return {"preprocessor_config": {
        "image_processor_type": kind, "do_resize": True, "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255,
        "image_mean": list(plan.mean), "image_std": list(plan.std), "resample": {v: k for k, v in RESAMPLE.items()}[plan.resample],
        "do_center_crop": crop, "size": {"shortest_edge": plan.size} if crop else square, **({"crop_size": square} if crop else {})}}
