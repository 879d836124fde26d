"""Learned prefixes for a frozen transformer: keys and values in front of every layer's own, or virtual tokens among the embeddings.

    prefix  P [m, L, 2, M H]: in each of L layers m keys and values that all tokens see (Li & Liang 2021; Liu et al. 2022, P-Tuning v2), in training
            through an MLP,  P = up(tanh(down(small))),  afterwards baked
    prompt  m embeddings among the real ones, nothing else (Lester et al. 2021)
    lstm    the same, computed by a two-layer bidirectional LSTM and a ReLU MLP while training (Liu et al. 2021, P-Tuning v1)

Nothing of the base moves. Real tokens of a causal language model count their positions from m on, as if the prefix had been read. Shapes: m virtual
tokens, L layers, M key heads of width H, D width, B batch, T tokens.
"""
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polysense.base.errors import UserError
from polysense.mechanisms.adapter import AdapterConfig, Rename, beside, copied, patterns
from polysense.nn.attention import Attention

KINDS = ("prefix", "prompt", "lstm")
AFTER = -1


@dataclass(frozen=True, kw_only=True)
class VirtualTokens(AdapterConfig):
    """How many, of which kind, for which tower. `also` names parameters that train beside them, such as a task's "head.*"."""
    tokens: int = 8
    kind: str = "prefix"
    hidden: int = 0                          # of the network that makes them in training ("prefix": 0 for none)
    small: int = 0                           # "prefix" with `hidden`: width of what it is made from; 0: the width of the keys
    on: str = "*"                            # the tower: all of its self-attention, or for "prompt" and "lstm" the language model
    at: tuple[int, ...] = ()                 # of each virtual token: how many real ones stand before it, -1 for all; (): all are in front
    like: tuple[int, ...] = ()               # "prompt": ids of the words that it begins as, again and again
    also: str = ""

    def put(self, system: nn.Module) -> None:
        if self.kind not in KINDS or self.tokens < 0 or (self.at and (self.kind == "prefix" or len(self.at) != self.tokens)):
            raise UserError(f"kind={self.kind!r}, tokens={self.tokens}, at={self.at}",
                            f"the kind is one of {', '.join(KINDS)}; `at` is for embeddings and has one number a token")
        if any(isinstance(m, Prefix | Prompt) for m in system.modules()):
            raise UserError("this system has virtual tokens already", "put one set on it")
        if self.kind == "prefix":
            put_prefix(system, self)
        else:
            put_prompt(system, self)

    def trainable(self, system: nn.Module) -> tuple[str, ...]:
        made = [n for n, _ in system.named_parameters() if ".virtual." in f".{n}" or ".soft." in f".{n}"]
        return (*made, *patterns(self.also))

    def about(self, system: nn.Module, name: Rename = str) -> dict[str, Any]:
        """PrefixTuningConfig or PromptTuningConfig of peft. UserError for what they cannot express."""
        held = virtual_of(system)
        if isinstance(held, Prompt) and any(held.at):
            raise UserError("peft puts virtual tokens in front of the text only", "keep the run folder")
        out = {"task_type": "CAUSAL_LM", "inference_mode": True, "base_model_name_or_path": "", "num_virtual_tokens": self.tokens,
               "num_transformer_submodules": 1}
        if isinstance(held, Prefix):
            return out | {"peft_type": "PREFIX_TUNING", "token_dim": held.heads * held.width, "num_layers": held.layers,
                          "num_attention_heads": held.heads, "encoder_hidden_size": self.hidden or None, "prefix_projection": False}
        return out | {"peft_type": "PROMPT_TUNING", "token_dim": held.whole().shape[1], "prompt_tuning_init": "RANDOM"}

    def tensors(self, system: nn.Module, name: Rename = str) -> dict[str, Tensor]:
        """`prompt_embeddings`, baked: [m, L 2 M H] or [m, D]."""
        also = {n: p.detach() for n, p in beside(system, self.also).items()}
        return {"prompt_embeddings": virtual_of(system).whole().detach().flatten(1), **also}

    def load(self, system: nn.Module, tensors: dict[str, Tensor], name: Rename = str) -> None:
        held = virtual_of(system)
        if "prompt_embeddings" not in tensors:
            raise UserError("the file has no prompt_embeddings", "it should be of prefix or prompt tuning")
        held.bake()
        copied(held.P, tensors["prompt_embeddings"].view_as(held.P) if held.P.numel() == tensors["prompt_embeddings"].numel()  # type: ignore[arg-type,union-attr]
               else tensors["prompt_embeddings"], "prompt_embeddings")
        for n, p in beside(system, self.also).items():
            copied(p, tensors.get(n, p), n)


# -- keys and values in every layer -----------------------------------------------------------------------------------------------------------

class Prefix(nn.Module):
    """P [m, L, 2, M H] as a parameter `P`, or made by `up(tanh(down(small)))` until `bake()`."""

    def __init__(self, c: VirtualTokens, layers: int, heads: int, width: int):
        super().__init__()
        self.tokens, self.layers, self.heads, self.width, inner = c.tokens, layers, heads, width, heads * width
        self.P: nn.Parameter | None = None
        self.small: nn.Parameter | None = None
        if c.hidden:
            self.small = nn.Parameter(torch.randn(c.tokens, c.small or inner))
            self.down, self.up = nn.Linear(c.small or inner, c.hidden), nn.Linear(c.hidden, layers * 2 * inner)
        else:
            self.P = nn.Parameter(torch.randn(c.tokens, layers, 2, inner) * 0.02)

    def whole(self) -> Tensor:
        """P [m, L, 2, M H]."""
        return torch.stack([self.of(i) for i in range(self.layers)], 1)

    def of(self, layer: int) -> Tensor:
        """[m, 2, M H] of one layer: of the reparametrisation only the rows that it needs."""
        if self.P is not None:
            return self.P[:, layer]
        assert self.small is not None
        rows = slice(layer * 2 * self.heads * self.width, (layer + 1) * 2 * self.heads * self.width)
        return F.linear(torch.tanh(self.down(self.small)), self.up.weight[rows], self.up.bias[rows]).unflatten(-1, (2, -1))

    @torch.no_grad()
    def bake(self) -> None:
        """Keeps the result and drops the network that made it."""
        if self.P is None:
            self.P = nn.Parameter(self.whole())
            self.small = None
            del self.down, self.up


class Beside:
    """`Attention.more` of one layer: the prefix's keys and values in front of the layer's own; whoever may see a key may see them."""

    def __init__(self, prefix: Prefix, layer: int, below: Callable[..., Any]):
        self.prefix, self.layer, self.below = prefix, layer, below

    def __call__(self, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        k, v, mask = self.below(k, v, mask, causal)
        key, value = (t.unflatten(-1, (k.shape[1], -1)).transpose(0, 1).to(k.dtype).expand(len(k), -1, -1, -1)
                      for t in self.prefix.of(self.layer).unbind(1))
        mask = mask if mask is None else F.pad(mask, (len(key[0, 0]), 0), value=True if mask.dtype == torch.bool else 0.0)
        return torch.cat([key, k], 2), torch.cat([value, v], 2), mask


def put_prefix(system: Any, c: VirtualTokens) -> None:
    towers = patterns(c.on)
    layers = [(n, m) for n, m in system.named_modules() if isinstance(m, Attention) and n.rpartition(".")[2] == "attn"
              and any(fnmatch(n, p) or fnmatch(n, f"{p}.*") for p in towers)]
    if not layers:
        raise UserError(f"on={c.on!r} names no tower with self-attention", "name a transformer of the system, such as on=language")
    shapes = {(m.kv_heads, m.head_width) for _, m in layers}
    if len(shapes) > 1:
        raise UserError(f"the layers of on={c.on!r} have keys of {len(shapes)} sizes", "choose one tower with on=")
    system.virtual = Prefix(c, len(layers), *shapes.pop())
    if c.tokens:
        for i, (_, attention) in enumerate(layers):
            attention.more = Beside(system.virtual, i, attention.more)  # type: ignore[method-assign]
    for name, tower in system.named_modules():
        if hasattr(tower, "first") and any(n.startswith(f"{name}." if name else "") for n, _ in layers):
            tower.first = c.tokens


# -- virtual tokens among the embeddings --------------------------------------------------------------------------------------------------------

class Prompt(nn.Module):
    """m embeddings `P` [m, D], or what an LSTM and an MLP make of `small` until `bake()`; `at` says where they stand."""

    def __init__(self, c: VirtualTokens, width: int, like: Tensor | None):
        super().__init__()
        self.at, self.P, self.small = c.at or (0,) * c.tokens, None, None
        if c.kind == "lstm":
            hidden = c.hidden or width
            self.small = nn.Parameter(torch.randn(c.tokens, width))
            self.lstm = nn.LSTM(width, hidden, num_layers=2, bidirectional=True, batch_first=True)
            self.down, self.up = nn.Linear(2 * hidden, 2 * hidden), nn.Linear(2 * hidden, width)
        else:
            begun = torch.randn(c.tokens, width) * 0.02 if like is None else like[torch.arange(c.tokens) % len(like)]
            self.P = nn.Parameter(begun.clone())

    def whole(self) -> Tensor:
        """[m, D]."""
        if self.P is not None:
            return self.P
        return self.up(F.relu(self.down(self.lstm(self.small[None])[0])))[0]  # type: ignore[index]

    @torch.no_grad()
    def bake(self) -> None:
        """Keeps the outputs and drops the network that made them."""
        if self.P is None:
            self.P = nn.Parameter(self.whole())
            self.small = None
            del self.lstm, self.down, self.up

    def among(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None, Callable[[Tensor], Tensor]]:
        """x [B,T,D], mask [B,T] -> both with the virtual tokens [B,m+T,.], and what takes the places of the real ones out of a result again."""
        (b, t), m = x.shape[:2], len(self.at)
        real = torch.ones(b, t, dtype=torch.bool, device=x.device) if mask is None else mask.bool()
        count = real.sum(1, keepdim=True)
        at = torch.tensor(self.at, device=x.device).expand(b, -1)
        at = torch.where(at < 0, count, torch.minimum(at, count))
        rank = real.long().cumsum(1) - 1                                       # a virtual token stands before the real one of its number
        keys = torch.cat([2 * at, torch.where(real, 2 * rank + 1, 2 * (t + 1) + torch.arange(t, device=x.device))], 1)
        order = keys.argsort(dim=1, stable=True)
        together = torch.cat([self.whole().to(x.dtype).expand(b, -1, -1), x], 1)
        mixed = together.gather(1, order[..., None].expand_as(together))
        seen = None if mask is None else torch.cat([real.new_ones(b, m), real], 1).gather(1, order)
        back = order.argsort(1)[:, m:]
        return mixed, seen, lambda out: out.gather(1, back[..., None].expand(-1, -1, out.shape[-1]))


def put_prompt(system: Any, c: VirtualTokens) -> None:
    found = [(n, m) for n, m in system.named_modules()
             if hasattr(m, "soft") and hasattr(m, "embed") and any(fnmatch(n, p) for p in patterns(c.on))]
    if len(found) != 1:
        raise UserError(f"on={c.on!r} names {len(found)} language models", "virtual tokens stand among the words of one, such as on=language")
    tower = found[0][1]
    table = tower.embed.weight.detach()
    if c.like and not all(0 <= i < len(table) for i in c.like):
        raise UserError(f"like={c.like}", f"ids lie below {len(table)}")
    tower.soft = Prompt(c, table.shape[1], table[list(c.like)] if c.like else None)


def virtual_of(system: nn.Module) -> Prefix | Prompt:
    """The virtual tokens of a system. UserError where it has none."""
    for module in system.modules():
        if isinstance(module, Prefix | Prompt):
            return module
    raise UserError("this system has no virtual tokens", "put them on it first")


def fill_from(system: nn.Module, keys: Tensor, values: Tensor) -> None:
    """A prefix that is what real tokens would have left: keys and values [L, M, m, H], such as a cache holds after reading them."""
    prefix = virtual_of(system)
    if not isinstance(prefix, Prefix) or prefix.P is None:
        raise UserError("only a baked prefix can be filled", "bake it first")
    with torch.no_grad():
        prefix.P.copy_(torch.stack([keys, values], 1).permute(3, 0, 1, 2, 4).flatten(3))
