"""SAM: a model of what "this" may mean in a picture.

A picture is encoded once. A prompt (clicks inside or outside, a box, a rough mask, words) becomes a few tokens that two layers of two-way
attention compare with the encoding; from one token for each answer an MLP makes a kernel whose dot product with the upscaled encoding is the
mask, from another token a head predicts how good each mask is. One click may mean a thing or its part, so three candidates answer a single
prompt; when more is given, a fourth token answers alone (section 3).

Training plays the user (appendix A, "Training algorithm"). The first prompt is, with equal chance, a random place inside the object or its
box with 10 % noise; 8 further points are drawn where the last mask was wrong, its logits fed back; in one round chosen by lot and in the last
one no point is added: 11 answers from one encoding. With m the candidates of a round and t the truth

    L = min over m of (20 focal(m, t) + dice(m, t))  +  mean over m of (predicted IoU(m) - IoU(m, t))^2

where only the best candidate receives the gradient of the first term. The random frequencies of the position code never move.

`words` is the paper's proof of concept (section 7.5): the first prompt is the CLIP feature of the object's crop in training, the CLIP feature
of a text at test. The paper's encoder starts from MAE weights; here presets start from random ones, or import the released ones.
"""
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polysense.archetypes.promptable_segmenter import PromptableSegmenter
from polysense.base.card import Card
from polysense.base.errors import UserError
from polysense.base.system import Batch, Feed, ImagePlan, Losses, Optim, Part, Preset, Spec, Stage, Start, TextPlan, final
from polysense.connectors.prompt import FIRST, INSIDE, PADDING, SECOND, PromptEncoder
from polysense.decoders.mask import MaskDecoder
from polysense.objectives.segment import boxes_of, dice, error_point, focal, iou, jittered, pick, shrunk
from polysense.towers.clip import tiny_pair
from polysense.towers.sam_vit import SamViT
from polysense.weights import sam_hf, sam_official

card = Card(
    name="SAM", paper="Kirillov et al., Segment Anything, ICCV 2023", arxiv="2304.02643", year=2023,
    says="Draws the outline of whatever you click on or box in, with three readings where a click may mean several things.",
    needs=("image", "mask"), can=("segment",), official="facebookresearch/segment-anything",
)

PARAMETERS = 641_090_608                     # sam_vit_h_4b8939.pth without the fixed frequencies
FOCAL = 20.0                                 # focal : dice
IMAGENET: Any = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}

weights = {"hf": sam_hf.LAYOUT, "official": sam_official.LAYOUT}


class Aligned(Part):
    """A frozen CLIP, under the names of that system: both towers into one space."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        vision: Spec
        text: Spec
        image_head: Spec
        text_head: Spec

    def __init__(self, c: Config):
        super().__init__()
        self.vision, self.text, self.image_head, self.text_head = (s.build() for s in (c.vision, c.text, c.image_head, c.text_head))
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.size: int = c.vision.image_size  # type: ignore[attr-defined]

    def image(self, image: Tensor) -> Tensor:
        """[O,3,H,W] -> [O,D], unit norm."""
        return F.normalize(self.image_head(self.vision.pooled(image)).float(), dim=-1)

    def said(self, text: Tensor) -> Tensor:
        """[O,L] -> [O,D], unit norm."""
        return F.normalize(self.text_head(self.text.pooled(text)).float(), dim=-1)


@final
class SAM(PromptableSegmenter):
    @dataclass(frozen=True, kw_only=True)
    class Config(PromptableSegmenter.Config):
        rounds: int = 11                     # answers to one encoding: the first prompt, 8 points, two without a new point
        objects: int = 64                    # of a picture in one batch, at most
        jitter: float = 20 / 1024            # most that a box corner is moved, as a fraction of the picture
        clip: Spec | None = None             # what reads crops and texts, frozen

    def __init__(self, c: Config):
        super().__init__(c)
        self.rounds, self.objects, self.jitter = c.rounds, c.objects, c.jitter
        self.clip = c.clip.build() if c.clip is not None else None

    # -- training -----------------------------------------------------------------------------------------------------------------------

    def interact(self, batch: Batch) -> Losses:
        """Points and boxes."""
        which, truth = self.chosen(batch["mask"])
        place, kind = self.first(truth)
        return self.play(self.look(batch["image"])[which], truth, place, kind)

    def speak(self, batch: Batch) -> Losses:
        """The first prompt is the CLIP feature of the crop, one to two times as wide as the box."""
        if self.clip is None:
            raise UserError("this SAM has no CLIP to read crops with", "train its preset `words`")
        image, (which, truth) = batch["image"], self.chosen(batch["mask"])
        with torch.no_grad():
            said = self.clip.image(crops(image[which], boxes_of(truth), self.clip.size))
        none = torch.zeros(len(truth), 1, 2, device=truth.device), torch.full((len(truth), 1), PADDING, device=truth.device)
        return self.play(self.look(image)[which], truth, *none, said)

    def chosen(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """mask [B,N,H,W] -> the picture of each object [O] and its mask [O,H,W]: objects in view, at most `objects` of a picture, by lot."""
        there = mask.flatten(2).any(-1)
        if not there.any():
            raise UserError("no picture of this batch has a mask", "give data whose objects are in view")
        if there.shape[1] > self.objects:
            lot = torch.where(there, torch.rand_like(there, dtype=torch.float), -1.0)
            there = there & (lot >= lot.topk(self.objects, 1).values[:, -1:])
        which, column = there.nonzero(as_tuple=True)
        return which, mask[which, column]

    def first(self, truth: Tensor) -> tuple[Tensor, Tensor]:
        """A click inside, or a noisy box, for each mask [O,H,W]: places [O,2,2] and what they are [O,2]."""
        click, _ = error_point(torch.full_like(truth, -1.0, dtype=torch.float), truth)
        box = jittered(boxes_of(truth), 0.1, self.jitter).unflatten(-1, (2, 2))
        boxed = torch.rand(len(truth), device=truth.device) < 0.5
        place = torch.where(boxed[:, None, None], box, torch.stack([click, torch.zeros_like(click)], 1))
        kinds = torch.tensor([[INSIDE, PADDING], [FIRST, SECOND]], device=truth.device)
        return place, kinds[boxed.long()]

    def play(self, seen: Tensor, truth: Tensor, place: Tensor, kind: Tensor, words: Tensor | None = None) -> Losses:
        """All rounds for encodings [O,C,h,w] and truths [O,H,W], from a first prompt: places [O,T,2], kinds [O,T], words [O,D].

        Masks are compared, and errors looked for, at the resolution of the answers (a quarter of the picture's): a click means the middle of
        such a place.
        """
        blank, previous, added, terms = int(torch.randint(1, max(2, self.rounds - 1), ())), None, 0, []
        target = shrunk(truth, (4 * seen.shape[-2], 4 * seen.shape[-1]))
        middle = 0.5 / torch.tensor([target.shape[-1], target.shape[-2]], device=seen.device) - 0.5 / self.vision.size
        for turn in range(self.rounds):
            tokens = self.prompt.tokens(place, kind)
            if words is not None:
                tokens = torch.cat([tokens, self.prompt.read(words)], 1)
            logits, score = self.answer(seen, tokens, previous, single=added > 0)
            terms.append(self.judged(logits.float(), score, target))
            best = score.argmax(1)
            previous = logits[torch.arange(len(best)), best].detach()
            if turn + 1 not in (blank, self.rounds - 1, self.rounds):
                new, inside = error_point(previous, target)
                place, kind, added = torch.cat([place, (new + middle)[:, None]], 1), torch.cat([kind, inside[:, None]], 1), added + 1
        one, two, three = torch.stack(terms).mean(0)
        return Losses(focal=one, dice=two, iou=three)

    def judged(self, logits: Tensor, score: Tensor, truth: Tensor) -> Tensor:
        """logits [O,M,H,W], score [O,M], truth [O,H,W] -> focal and dice of the best candidate of each object, error of all scores: [3]."""
        flat, target = logits.flatten(2), truth.flatten(1)[:, None].expand(-1, logits.shape[1], -1)
        one, two = focal(flat, target), dice(flat, target)
        best = (FOCAL * one + two).argmin(1)
        return torch.stack([pick(one, best).mean(), pick(two, best).mean(), (score.float() - iou(flat, target)).square().mean()])

    # -- use ----------------------------------------------------------------------------------------------------------------------------

    def segment_text(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """image [B,3,H,W], text [B,N,L] token ids -> as `segment`. Raises UserError where no words were learned."""
        if self.clip is None:
            raise UserError("this SAM does not read words", "give points or boxes, or train its preset `words`")
        b, n = text.shape[:2]
        seen, said = self.look(image).repeat_interleave(n, 0), self.prompt.read(self.clip.said(text.flatten(0, 1)))
        none = torch.zeros(b * n, 1, 2, device=image.device), torch.full((b * n, 1), PADDING, device=image.device)
        logits, score = self.answer(seen, torch.cat([self.prompt.tokens(*none), said], 1), single=False)
        return logits.unflatten(0, (b, n)).float(), score.unflatten(0, (b, n)).float()


def crops(image: Tensor, boxes: Tensor, size: int) -> Tensor:
    """image [O,3,H,W], boxes [O,4] -> squares [O,3,size,size] around the boxes, one to two times as wide; zero beyond the picture."""
    centre, side = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]).amax(1) * (1 + torch.rand(len(boxes), device=boxes.device))
    step = (torch.arange(size, device=image.device) + 0.5) / size - 0.5
    grid = torch.stack([step.expand(size, size), step[:, None].expand(size, size)], -1)
    return F.grid_sample(image, 2 * (centre[:, None, None] + side[:, None, None, None] * grid) - 1, align_corners=False)


# -- presets --------------------------------------------------------------------------------------------------------------------------------

def small(clip: Aligned.Config | None = None) -> SAM.Config:
    said = clip.text_head.out if clip else 0  # type: ignore[attr-defined]
    return SAM.Config(
        vision=SamViT.Config(image_size=64, patch=8, body=96, depth=4, heads=4, window=4, whole=(1, 3), width=128),
        prompt=PromptEncoder.Config(width=128, image_size=64, words=said), decoder=MaskDecoder.Config(width=128, heads=4, hidden=256, judge=64),
        jitter=0.03, clip=clip)


def learn(objective: Callable[..., Losses], trainable: tuple[str, ...] = ("*",)) -> Stage:
    return Stage(objective=objective, steps=800, batch_size=16, weights=(("focal", FOCAL),), trainable=trainable,
                 optim=Optim(lr=2e-3, betas=(0.9, 0.95), weight_decay=0.05, warmup=30, clip=1.0))


def tiny() -> Preset:
    return Preset(data="scenes:nested", config=small(), stages=(learn(SAM.interact),),
                  feed=Feed(image=ImagePlan(size=64, fit="corner", **IMAGENET)))


def words() -> Preset:
    """Prompts in words, on the toy CLIP of this library: its towers are frozen, its feed is used for both."""
    return Preset(data="scenes", config=small(Aligned.Config(**tiny_pair())), starts=(Start(into="clip", from_="clip"),),
                  stages=(learn(SAM.speak, ("vision.*", "prompt.*", "decoder.*")),),
                  feed=Feed(image=ImagePlan(size=64, fit="corner"), text=TextPlan(vocab=4096, length=48)))


def released(body: int, depth: int, heads: int, whole: tuple[int, ...], drop_path: float) -> Preset:
    """SA-1B, 90k steps of 256 pictures (appendix A); 1024 px, the long side fitted, the rest filled."""
    stage = Stage(objective=SAM.interact, steps=90_000, batch_size=256, weights=(("focal", FOCAL),), checkpoint_activations=True, optim=Optim(
        lr=8e-4, weight_decay=0.1, layer_decay=0.8, schedule="step", warmup=250, milestones=(60_000 / 90_000, 86_666 / 90_000)))
    return Preset(
        data="sa1b", stages=(stage,), feed=Feed(image=ImagePlan(size=1024, fit="corner", resample="bilinear", **IMAGENET)), config=SAM.Config(
            vision=SamViT.Config(body=body, depth=depth, heads=heads, whole=whole, drop_path=drop_path), prompt=PromptEncoder.Config(),
            decoder=MaskDecoder.Config()))


def vit_b() -> Preset:
    return released(768, 12, 12, (2, 5, 8, 11), 0.1)


def vit_l() -> Preset:
    return released(1024, 24, 16, (5, 11, 17, 23), 0.3)


def paper() -> Preset:
    """ViT-H."""
    return released(1280, 32, 16, (7, 15, 23, 31), 0.4)
