"""Two towers and a third network that reads both. Abstract: a system adds its objectives and is final.

Shapes: B batch, T image tokens, L text tokens, D width of the text, h w grid of the image tokens.
"""
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from polysense.base.errors import UserError
from polysense.base.system import Spec, System
from polysense.towers.encoded import Encoded

Net = Mapping[str, Any]


class FusionEncoder(System):
    """Image tower, text tower, and a fusion encoder: text states that read all image tokens by cross-attention.

    Features of single pictures and texts come from the two towers through their heads (cosines: fast, comparable across a whole collection);
    `match_text` lets the fusion encoder judge pairs (slow, exact). Methods take `net`, by name the modules to run: the system's own, or
    those of a teacher.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        vision: Spec
        text: Spec
        fusion: Spec                         # a Transformer whose blocks have `cross`, reading tokens of the image tower
        image_head: Spec
        text_head: Spec
        match_head: Spec                     # fused [CLS] -> (no, yes)
        ground: int = 2                      # the fusion block whose cross-attention is looked at in `ground_text`

    def __init__(self, c: Config):
        super().__init__()
        self.vision, self.text, self.fusion = c.vision.build(), c.text.build(), c.fusion.build()
        self.image_head, self.text_head, self.match_head = c.image_head.build(), c.text_head.build(), c.match_head.build()
        if len(self.fusion.blocks) < 2:
            raise UserError("a fusion encoder of one block cannot be looked into", "give it at least two")
        self.ground = min(c.ground, len(self.fusion.blocks) - 2)      # behind the last block only the class token counts: words have no slope

    @property
    def net(self) -> Net:
        """The system's own modules by name."""
        return {name: getattr(self, name) for name in ("vision", "text", "fusion", "image_head", "text_head")}

    def features(self, net: Net, seen: Encoded, said: Encoded) -> tuple[Tensor, Tensor]:
        """What the towers returned -> image and text features [B,E] in the joint space, unit norm, in float32."""
        return unit(net["image_head"](seen.pooled)), unit(net["text_head"](said.pooled))

    def fuse(self, net: Net, image: Tensor, said: Tensor, mask: Tensor | None) -> Tensor:
        """Image tokens [B,T,.], states of the text tower [B,L,D] and their mask [B,L] -> fused text states [B,L,D].

        The states go in as they are: nothing is embedded again (Li et al. 2021, section 3.1).
        """
        return net["fusion"](said, image, mask=mask)

    def encode_image(self, image: Tensor) -> Tensor:
        """image [B,3,H,W] -> [B,E], unit norm."""
        return unit(self.image_head(self.vision.pooled(image)))

    def encode_text(self, text: Tensor) -> Tensor:
        """text [B,L] token ids -> [B,E], unit norm."""
        return unit(self.text_head(self.text.pooled(text)))

    def match_text(self, image: Tensor, text: Tensor) -> Tensor:
        """image [B,3,H,W] and text [B,L], or one of either for all of the other -> probability [B] that they belong together."""
        return self.match_logits(self.vision(image).tokens, self.text(text)).float().softmax(-1)[:, 1]

    def match_logits(self, image: Tensor, said: Encoded) -> Tensor:
        """Image tokens and encoded texts, paired as in `match_text` -> (no, yes) [B,2]. UserError where neither has one row or both as many."""
        image, states, mask = paired(image, said)
        return self.match_head(self.fuse(self.net, image, states, mask)[:, 0])

    @torch.inference_mode(False)
    def ground_text(self, image: Tensor, text: Tensor) -> Tensor:
        """image [B,3,H,W], text [B,L] -> [B,h,w] in [0,1]: where in the picture the text is found.

        Grad-CAM on cross-attention (Li et al. 2021, section 5.4 and appendix; Selvaraju et al. 2017): the attention of one fusion block, times
        the positive part of its gradient for "they match", averaged over heads and words, scaled by its maximum.
        """
        with torch.no_grad():
            tokens, states, mask = paired(self.vision(image.clone()).tokens, self.text(text.clone()))
            *_, before = self.fusion.layers(states, tokens, mask=mask, stop=self.ground)
        block, prefix = self.fusion.blocks[self.ground], getattr(self.vision, "prefix", 0)
        words = (mask if mask is not None else torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)).clone()
        words[:, 0] = False                                            # the class token reads everything: only the words point
        words[torch.arange(len(words)), -1 - words.flip(1).int().argmax(1)] = False      # and neither does the last one, the end of the text
        with torch.no_grad():
            x = block.norm1(before + block.attn(before, mask=mask))
            weights = block.cross.weights(x, tokens)
        with torch.enable_grad():
            weights = weights.requires_grad_()
            y = block.norm_cross(x + block.cross.mixed(weights, tokens))
            y = block.norm2(y + block.mlp(y))
            y = self.fusion.norm(self.fusion.layers(y, tokens, mask=mask, start=self.ground + 1)[-1])
            slope, = torch.autograd.grad(self.match_head(y[:, 0])[:, 1].sum(), weights)
        heat = (weights.detach() * slope.clamp(min=0))[..., prefix:].mean(1)
        heat = (heat * words[..., None]).sum(1) / words.sum(1, keepdim=True).clamp(min=1)
        side = round(heat.shape[1] ** 0.5)
        return (heat / heat.amax(1, keepdim=True).clamp(min=1e-12)).unflatten(1, (side, -1))


def unit(x: Tensor) -> Tensor:
    """x [B,E] -> rows of length 1, in float32 whatever the autocast type."""
    return F.normalize(x.float(), dim=-1)


def paired(image: Tensor, said: Encoded) -> tuple[Tensor, Tensor, Tensor | None]:
    """Image tokens, text states and text mask with equally many rows: a single row of either goes with all of the other."""
    a, b, mask = len(image), len(said.tokens), said.mask
    if a != b and 1 not in (a, b):
        raise UserError(f"{a} pictures and {b} texts cannot be paired", "give equally many, or one of either")
    n = max(a, b)
    return image.expand(n, -1, -1), said.tokens.expand(n, -1, -1), None if mask is None else mask.expand(n, -1)
