"""SAM's mask decoder. Shapes: O objects, T tokens, P places of the grid, C width, M masks."""
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polysense.base.spec import Spec
from polysense.base.system import Part
from polysense.nn.attention import Attention
from polysense.nn.mlp import MLP
from polysense.nn.norm import LayerNorm


class Across(Attention):
    """Attention between a few tokens and many places, at half the width (T tokens, P places, N heads of width H, NH = C/2).

    A product with a place may be taken in either order: q . (W p) = (W^T q) . p, and sum_i a_i (W p_i) = W (sum_i a_i p_i). Projecting the
    places costs P*C*NH, bringing the tokens' side to the width of the places P*C*NT: with few tokens the second is taken, so that no key,
    value or query of a place is ever computed.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Attention.Config):
        pass

    def __init__(self, c: Config):
        super().__init__(replace(c, head_width=c.width // 2 // c.heads))

    def gather(self, x: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Tokens look at the picture: x [O,T,C], key and value [O,P,C] -> [O,T,C]."""
        if not self._few(x):
            return self(x, key, value=value)
        seen = self._scores(self.q(x), self.k, key).softmax(-1) @ value                                          # [O,NT,C]
        v = seen.unflatten(1, (self.heads, -1)) @ self.v.weight.unflatten(0, (self.heads, -1)).mT
        return self.out(v.transpose(1, 2).flatten(2) + self.v.bias)                                              # weights sum to 1

    def spread(self, image: Tensor, key: Tensor, x: Tensor, value: Tensor) -> Tensor:
        """The picture looks at the tokens: image and key [O,P,C], x and value [O,T,C] -> image + what it saw [O,P,C]."""
        if not self._few(x):
            return image + self(key, x, value=value)
        weight = self._scores(self.k(x), self.q, key).unflatten(1, (self.heads, -1)).softmax(2).flatten(1, 2)     # [O,NT,P]
        say = self._split(self.v(value)) @ self.out.weight.T.unflatten(0, (self.heads, -1)) + self.out.bias / self.heads
        return image + weight.mT @ say.flatten(1, 2)

    def _scores(self, token: Tensor, project: nn.Linear, place: Tensor) -> Tensor:
        """Projected tokens [O,T,NH] against places [O,P,C] that `project` would bring to [O,P,NH] -> [O,NT,P]."""
        token = self._split(token) * self.head_width ** -0.5
        ask, bias = token @ project.weight.unflatten(0, (self.heads, -1)), token @ project.bias.view(self.heads, -1, 1)
        return torch.baddbmm(bias.flatten(1, 2), ask.flatten(1, 2), place.mT)

    def _few(self, x: Tensor) -> bool:
        return x.shape[1] < self.head_width and "mix" not in self.__dict__                   # see `maps.mixing`

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class TwoWayBlock(Part):
    """Tokens attend to themselves, then to the picture; an MLP; the picture attends to the tokens. Post-norm. What the tokens and places were
    at first is added to queries and keys at every attention, as positions; between tokens and picture the width is halved."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        width: int
        heads: int
        hidden: int
        eps: float

    def __init__(self, c: Config):
        super().__init__()
        self.own = Attention(Attention.Config(width=c.width, heads=c.heads))
        self.to_image, self.to_tokens = (Across(Across.Config(width=c.width, heads=c.heads)) for _ in range(2))
        self.mlp = MLP(MLP.Config(width=c.width, hidden=c.hidden, act="relu"))
        self.norm1, self.norm2, self.norm3, self.norm4 = (LayerNorm(LayerNorm.Config(width=c.width, eps=c.eps)) for _ in range(4))

    def forward(self, x: Tensor, image: Tensor, first: Tensor | None, token: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """x [O,T,C], image [O,P,C], their positions token [O,T,C] and place [P,C] -> both anew. `first` is None in the first block, whose
        self-attention has neither positions nor a residual (as released)."""
        x = self.norm1(self.own(x) if first is None else x + self.own(x + first, x + first, value=x))
        key = image + place
        x = self.norm2(x + self.to_image.gather(x + token, key, image))
        x = self.norm3(x + self.mlp(x))
        return x, self.norm4(self.to_tokens.spread(image, key, x + token, x))


class Layered(Part):
    """`copies` MLPs of the same shape side by side, ReLU between their linears: [O,copies,widths[0]] -> [O,copies,widths[-1]].

    Weights begin with the variance 2 / inputs (He et al. 2015, equation 10): what goes in comes out about as large.
    Smaller ones, torch's default, make kernels that hardly tell one place from another, and training begins on a plateau.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        widths: tuple[int, ...]
        copies: int

    def __init__(self, c: Config):
        super().__init__()
        self.layers: Any = nn.ModuleList()
        for a, b in zip(c.widths[:-1], c.widths[1:], strict=True):
            layer = nn.Module()
            layer.weight = nn.Parameter(torch.empty(c.copies, b, a).uniform_(-(6 / a) ** 0.5, (6 / a) ** 0.5))
            layer.bias = nn.Parameter(torch.empty(c.copies, b).uniform_(-a ** -0.5, a ** -0.5))
            self.layers.append(layer)

    def forward(self, x: Tensor, start: int, stop: int) -> Tensor:
        """x [O,stop-start,.] through the copies from start to stop alone."""
        x = x.transpose(0, 1)
        for i, layer in enumerate(self.layers):
            x = torch.baddbmm(layer.bias[start:stop, None], x.relu() if i else x, layer.weight[start:stop].mT)
        return x.transpose(0, 1)


class Upscale(Part):
    """The grid at four times its resolution and an eighth of its width: two transposed convolutions of stride 2. Each place is computed on
    its own, so they are linears whose outputs are sorted into place last (`Upscale.shuffle`)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        width: int

    def __init__(self, c: Config):
        super().__init__()
        half, out = c.width // 4, c.width // 8
        self.conv1, self.conv2 = nn.ConvTranspose2d(c.width, half, 2, 2), nn.ConvTranspose2d(half, out, 2, 2)
        self.norm = LayerNorm(LayerNorm.Config(width=half, eps=1e-6))

    def forward(self, image: Tensor) -> Tensor:
        """image [O,P,C] -> [O,P,4,4,C/8]: the four quarters of each place, and of each of these again."""
        x = F.gelu(self.norm(spread(image, self.conv1)))
        return F.gelu(spread(x, self.conv2))


def spread(x: Tensor, conv: nn.ConvTranspose2d) -> Tensor:
    """[...,C] -> [...,4,D]: a transposed convolution of 2x2 and stride 2 at each place."""
    weight = conv.weight.permute(2, 3, 1, 0).flatten(0, 2)                   # [4D,C]
    bias = conv.bias.repeat(4) if conv.bias is not None else None
    return F.linear(x, weight, bias).unflatten(-1, (4, -1))


def shuffle(mask: Tensor, h: int, w: int) -> Tensor:
    """[O,M,h*w*16] in the order of `Upscale` -> [O,M,4h,4w]."""
    return mask.unflatten(2, (h, w, 2, 2, 2, 2)).permute(0, 1, 2, 4, 6, 3, 5, 7).flatten(5, 7).flatten(2, 4)


class MaskDecoder(Part):
    """Prompt tokens and picture -> masks and how good they are (Kirillov et al. 2023, appendix A, "Lightweight mask decoder").

    Token 0 answers unambiguous prompts, tokens 1 to `candidates` give as many readings of an ambiguous one.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        width: int = 256
        heads: int = 8
        depth: int = 2
        hidden: int = 2048
        candidates: int = 3
        judge: int = 256                     # hidden width of the head that predicts IoU
        judge_depth: int = 3
        eps: float = 1e-5                    # of the two-way blocks (transformers has 1e-6)

    def __init__(self, c: Config):
        super().__init__()
        self.iou_token = nn.Parameter(torch.randn(1, c.width))
        self.mask_tokens = nn.Parameter(torch.randn(1 + c.candidates, c.width))
        block = TwoWayBlock.Config(width=c.width, heads=c.heads, hidden=c.hidden, eps=c.eps)
        self.blocks: Any = nn.ModuleList(block.build() for _ in range(c.depth))
        self.last, self.norm = Across(Across.Config(width=c.width, heads=c.heads)), LayerNorm(LayerNorm.Config(width=c.width))
        self.upscale = Upscale(Upscale.Config(width=c.width))
        self.kernels = Layered(Layered.Config(widths=(c.width, c.width, c.width, c.width // 8), copies=1 + c.candidates))
        self.judge = Layered(Layered.Config(widths=(c.width, *(c.judge,) * (c.judge_depth - 1), 1 + c.candidates), copies=1))

    def forward(self, image: Tensor, prompt: Tensor, place: Tensor, *, single: bool) -> tuple[Tensor, Tensor]:
        """image [O,C,h,w], prompt [O,T,C], place [h*w,C] -> mask logits [O,M,4h,4w] and predicted IoU [O,M]; M is 1 (token 0) where
        `single`, else the number of candidates."""
        (h, w), own = image.shape[-2:], torch.cat([self.iou_token, self.mask_tokens])
        token = torch.cat([own.to(prompt.dtype).expand(len(image), -1, -1), prompt], 1)
        x, seen = token, image.flatten(2).transpose(1, 2)
        for i, block in enumerate(self.blocks):
            x, seen = block(x, seen, token if i else None, token, place)
        x = self.norm(x + self.last.gather(x + token, seen + place, seen))
        start, stop = (0, 1) if single else (1, len(self.mask_tokens))
        kernel = self.kernels(x[:, 1 + start:1 + stop], start, stop)
        mask = kernel @ self.upscale(seen).flatten(1, 3).mT
        return shuffle(mask, h, w), self.judge(x[:, :1], 0, 1)[:, 0, start:stop]
