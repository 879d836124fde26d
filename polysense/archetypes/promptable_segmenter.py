"""One encoding of a picture, any number of prompts: masks for what a click, a box or a rough mask means. Abstract."""
from dataclasses import dataclass

import torch
from torch import Tensor

from polysense.base.errors import UserError
from polysense.base.system import Spec, System
from polysense.connectors.prompt import places


class PromptableSegmenter(System):
    """An image tower with `map(image) -> [B,C,h,w]`, a prompt encoder and a mask decoder (Kirillov et al. 2023, section 3).

    The encoding of the last batch of pictures is kept outside training, so that the next prompt on the same picture costs the decoder alone.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        vision: Spec
        prompt: Spec
        decoder: Spec

    def __init__(self, c: Config):
        super().__init__()
        self.vision, self.prompt, self.decoder = c.vision.build(), c.prompt.build(), c.decoder.build()
        self._seen: tuple[tuple[int, ...], Tensor, Tensor] | None = None           # state of the weights, pictures, their encoding

    def look(self, image: Tensor) -> Tensor:
        """image [B,3,H,W] -> its encoding [B,C,h,w]; without a graph, the same pictures are encoded once."""
        if torch.is_grad_enabled() or self.training:
            self._seen = None                # the weights may change next, and fused optimisers do not count that as a new version
            return self.vision.map(image)
        state = tuple(0 if p.is_inference() else p._version for p in self.vision.parameters())
        if self._seen is None or self._seen[0] != state or self._seen[1].device != image.device or not torch.equal(self._seen[1], image):
            self._seen = state, image.clone(), self.vision.map(image)
        return self._seen[2]

    def answer(self, seen: Tensor, tokens: Tensor, mask: Tensor | None = None, *, single: bool) -> tuple[Tensor, Tensor]:
        """One prompt for each of O encodings: seen [O,C,h,w], its tokens [O,T,C], mask [O,4h,4w] (logits) -> mask logits [O,M,4h,4w],
        predicted IoU [O,M]. `single`: one answer, else the candidates of an ambiguous prompt."""
        return self.decoder(self.prompt.dense(seen, mask), tokens, self.prompt.grid(*seen.shape[-2:]), single=single)

    def segment(self, image: Tensor, points: Tensor | None = None, point_label: Tensor | None = None, boxes: Tensor | None = None,
                mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """image [B,3,H,W]; points [B,N,K,2] (x y in [0,1]), point_label [B,N,K] (1 inside, 0 outside, -1 padding; None: all inside), boxes
        [B,N,4] (x0 y0 x1 y1 in [0,1]), mask [B,N,4h,4w] (logits) -> mask logits [B,N,M,4h,4w] and predicted IoU [B,N,M].

        A single point or box may mean several things: M candidates. More than one prompt for an object: M = 1. Raises UserError for prompts
        of other shapes, or none.
        """
        points, point_label = self._check(image, points, point_label, boxes, mask)
        given = next(p for p in (points, boxes, mask) if p is not None)
        b, n = given.shape[:2]
        count = 0 if point_label is None or not point_label.numel() else int((point_label >= 0).sum(-1).max())
        seen = self.look(image)
        if n > 1:                            # channels stay last, as the tower leaves them: the decoder reads place by place
            seen = seen.permute(0, 2, 3, 1).repeat_interleave(n, 0).permute(0, 3, 1, 2)
        points, point_label, boxes, mask = (None if p is None else p.flatten(0, 1) for p in (points, point_label, boxes, mask))
        asked = places(points, point_label, boxes)
        tokens = self.prompt.tokens(*asked) if asked else seen.new_zeros(b * n, 0, seen.shape[1])
        logits, score = self.answer(seen, tokens, mask, single=count + (boxes is not None) > 1)
        return logits.unflatten(0, (b, n)).float(), score.unflatten(0, (b, n)).float()

    def _check(self, image: Tensor, points: Tensor | None, point_label: Tensor | None, boxes: Tensor | None,
               mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if point_label is not None and points is None:
            raise UserError("point_label without points", "give both")
        if points is None and boxes is None and mask is None:
            raise UserError("nothing says what to segment", "give points, boxes or a mask")
        if points is not None and point_label is None and points.ndim == 4:
            point_label = torch.ones(points.shape[:3], dtype=torch.long, device=points.device)
        shapes = {"points": (points, 4, 2), "point_label": (point_label, 3, None), "boxes": (boxes, 3, 4), "mask": (mask, 4, None)}
        there = {name: p for name, (p, _, _) in shapes.items() if p is not None}
        for name, value in there.items():
            rank, last = shapes[name][1:]
            if value.ndim != rank or (last and value.shape[-1] != last) or len(value) != len(image):
                raise UserError(f"{name} has shape {list(value.shape)} for {len(image)} pictures", "it is [B,N,K,2] for points, [B,N,K] for "
                                "point_label, [B,N,4] for boxes, [B,N,h,w] for mask")
            if value.is_floating_point() and not value.isfinite().all():
                raise UserError(f"{name} holds numbers that are not finite", "give places in [0, 1] and finite logits")
        if len({tuple(v.shape[:2]) for v in there.values()}) > 1 or (points is not None and points.shape[:3] != there["point_label"].shape):
            raise UserError(f"prompts of different numbers: {', '.join(f'{k} {list(v.shape)}' for k, v in there.items())}",
                            "all name the same N objects of the same B pictures")
        if point_label is not None and point_label.numel() and (int(point_label.min()) < -1 or int(point_label.max()) > 1):
            raise UserError("a point_label is none of 1, 0 and -1", "1 is inside, 0 outside, -1 padding")
        return points, point_label
