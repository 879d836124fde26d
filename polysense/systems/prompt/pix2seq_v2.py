"""Pix2Seq v2: four vision tasks as one language.

A picture is encoded once; a decoder writes tokens. The first tokens, the prompt, say which task: everything that is found (boxes and classes),
the outline of one thing, its key points, or a sentence. Boxes, polygons and points are numbers cut into bins, each bin a token; classes and
words are tokens too, all in one vocabulary:

    0 end and padding | 10 detect 11 segment 12 keypoints 13 caption | 30 fake | 41 hidden | classes | bins of coordinates | words   (section 3)

All tasks share all weights and one loss, a cross-entropy over tokens with a weight each,

    L = sum over tasks of  sum_j w_j CE(token_j | picture, prompt, tokens before j) / sum_j w_j

where the prompt weighs nothing. Detection alone is hard to end at the right time, so sequences are filled up with noise boxes (moved true ones
or random ones) whose class is "fake" and whose coordinates weigh nothing, and the classes that the decoder reads are noise as well (Pix2Seq,
section 2.4): it learns to tell boxes from noise, always writes the full number, and the probability of the class is the score. Pictures that
carry all annotations serve all tasks from one encoding here, where the paper mixes a batch of each.
"""
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polysense.base.card import Card
from polysense.base.errors import UserError
from polysense.base.system import Batch, Feed, ImagePlan, Losses, Optim, Preset, Spec, Stage, System, TextPlan, final
from polysense.nn.attention import Attention
from polysense.nn.block import PreNorm
from polysense.nn.coords import CAPTION, DETECT, END, FAKE, HIDDEN, KEYPOINTS, SEGMENT, Vocabulary, filled, noise_boxes
from polysense.nn.head import LinearBias
from polysense.nn.mlp import MLP
from polysense.nn.norm import LayerNorm
from polysense.nn.position import sincos_2d
from polysense.nn.residual import Basic, Stem
from polysense.nn.transformer import Transformer
from polysense.towers.causal_lm import CausalLM, LearnedPositions
from polysense.towers.decoding import Nucleus
from polysense.towers.resnet import ResNet
from polysense.towers.vit import ViT

card = Card(
    name="Pix2Seq v2", paper="Chen et al., A Unified Sequence Interface for Vision Tasks, NeurIPS 2022", arxiv="2206.07669", year=2022,
    says="Finds things, outlines them, marks their key points and describes the picture, all by writing tokens.",
    needs=("image", "boxes", "box_label", "polygon", "keypoints", "text"), can=("segment", "detect", "keypoints", "generate_text"),
    official="google-research/pix2seq",
)

PARAMETERS = 151_552_440                     # counted here: ViT-B/16, six decoder layers, 35,000 tokens read and written; the paper gives no total
LIGHT = 0.1                                  # weight of ends, padding and hidden points
TASKS = ("detect", "segment", "keypoints", "caption")


@final
class Pix2SeqV2(System):
    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        vision: Spec
        places: int                          # of the encoder's grid, a square: each has a learned position
        decoder: CausalLM.Config
        vocabulary: Vocabulary
        objects: int = 100                   # that detection always writes
        instances: int = 8                   # of a picture that are outlined in one batch, at most
        points: int = 128                    # of an outline
        fill: str = "noise"                  # how sequences of few objects go on: "noise" boxes or "end" (for comparison)
        tasks: tuple[str, ...] = TASKS       # that are learned
        bins_at_birth: str = "random"        # or "ordered", see `Vocabulary.order`
        joints: int = 17                     # key points of a thing
        polygons: int = 8                    # that are drawn and averaged for a mask
        box_p: float = 0.4                   # nucleus of coordinates of boxes
        mask_p: float = 0.8                  # and of outlines

    def __init__(self, c: Config):
        super().__init__()
        if c.fill not in ("noise", "end"):
            raise UserError(f"fill={c.fill!r}", "sequences are filled with noise, or end")
        if not c.tasks or set(c.tasks) - set(TASKS):
            raise UserError(f"tasks={c.tasks}", f"some of {', '.join(TASKS)}")
        c.vocabulary.check()
        self.c, self.v, self.classes = c, c.vocabulary, c.vocabulary.classes
        self.vision, self.decoder = c.vision.build(), c.decoder.build()
        self.project, self.norm = nn.Linear(c.vision.width, c.decoder.width), LayerNorm(LayerNorm.Config(width=c.decoder.width))  # type: ignore
        self.mix = nn.Sequential(LayerNorm(LayerNorm.Config(width=c.decoder.width)), MLP(MLP.Config(width=c.decoder.width)))
        side = round(c.places ** 0.5)
        self.position = nn.Parameter(sincos_2d(c.decoder.width, (side, side)))       # learned from there on
        if c.bins_at_birth == "ordered":
            self.v.order(self.decoder.embed.weight)
            self.v.order(self.decoder.head.weight)

    def look(self, image: Tensor) -> Tensor:
        """image [B,3,H,W] -> what the decoder reads [B,S,D]: what stands at each place, and which place it is, mixed."""
        x = self.norm(self.project(self.vision.dense(image).flatten(1, 2))) + self.position
        return x + self.mix(x)

    # -- sequences ----------------------------------------------------------------------------------------------------------------------

    def detection(self, boxes: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """boxes [B,N,4], label [B,N] (-1: padding) -> what is read, what is to be written, and weights, each [B,5 * objects].

        True objects stand in random order; noise takes the other places: half of it moved copies of true boxes, half random boxes.
        """
        b, m = len(boxes), self.c.objects
        lot = torch.rand(label.shape, device=boxes.device) + (label < 0)
        order = lot.argsort(1)[:, :m]
        boxes, label = boxes.gather(1, order[..., None].expand(-1, -1, 4)), label.gather(1, order)
        boxes, label = F.pad(boxes, (0, 0, 0, m - boxes.shape[1]), value=-1.0), F.pad(label, (0, m - label.shape[1]), value=-1)
        real = label >= 0
        tokens = self.v.box_tokens(torch.where(real[..., None], boxes, noise_boxes(boxes, real)))
        kind = torch.where(real, self.v.class_from + label, FAKE)
        written = torch.cat([tokens, kind[..., None]], -1)
        read = torch.cat([tokens, self.v.random_class(kind)[..., None]], -1)
        weight = torch.ones_like(written, dtype=torch.float)
        weight[..., :4] = real[..., None].float()
        if self.c.fill == "end":
            gone = ~real[..., None]
            read = written = torch.where(gone, END, written)
            weight = torch.where(gone, LIGHT, 1.0).expand(-1, -1, 5)
        return read.flatten(1), written.flatten(1), weight.reshape(b, -1)

    def instances(self, label: Tensor) -> tuple[Tensor, Tensor]:
        """label [B,N] -> picture and number [O] of the objects that are outlined: at most `instances` a picture, by lot."""
        lot = torch.where(label >= 0, torch.rand(label.shape, device=label.device), -1.0)
        chosen = (label >= 0) & (lot >= lot.topk(min(self.c.instances, label.shape[1]), 1).values[:, -1:])
        picture, column = chosen.nonzero(as_tuple=True)
        return picture, column

    def outline(self, polygon: Tensor) -> Tensor:
        """polygon [O,P',2] -> tokens [O,2 * points] of every so many-th point, beginning anywhere."""
        step, start = polygon.shape[1] // self.c.points, torch.randint(polygon.shape[1], (len(polygon), 1), device=polygon.device)
        at = (start + step * torch.arange(self.c.points, device=polygon.device)) % polygon.shape[1]
        return self.v.place_tokens(polygon.gather(1, at[..., None].expand(-1, -1, 2)))

    def score(self, seen: Tensor, prompt: Tensor, read: Tensor, written: Tensor, weight: Tensor) -> Tensor:
        """Weighted cross-entropy of what follows the prompt: seen [O,S,D], prompt [O,P], read, written and weight [O,L] -> a scalar."""
        hidden = self.decoder.read(self.decoder.embed(torch.cat([prompt, read[:, :-1]], 1)), source=seen)[:, prompt.shape[1] - 1:]
        each = F.cross_entropy(self.decoder.logits(hidden).float().flatten(0, 1), written.flatten(), reduction="none")
        return (each * weight.flatten()).sum() / weight.sum().clamp_min(1e-6)

    def write(self, batch: Batch) -> Losses:
        """All tasks on one encoding; each instance has its own copy of it."""
        seen, boxes, label = self.look(batch["image"]), batch["boxes"], batch["box_label"]
        which, column = self.instances(label)
        if not len(which):
            raise UserError("no picture of this batch has an object", "give data with boxes")
        task, tiled, thing = torch.full((len(seen), 1), DETECT, device=seen.device), seen[which], (boxes[which, column], label[which, column])
        out = Losses()
        if "detect" in self.c.tasks:
            out["detect"] = self.score(seen, task, *self.detection(boxes, label))
        if "segment" in self.c.tasks:
            points = self.outline(batch["polygon"][which, column])
            out["segment"] = self.score(tiled, self.v.prompt(SEGMENT, *thing), points, points, torch.ones_like(points, dtype=torch.float))
        if "keypoints" in self.c.tasks:
            keys = batch["keypoints"][which, column]
            shown = (keys[..., 2] > 0).repeat_interleave(2, 1)
            places = torch.where(shown, self.v.place_tokens(keys[..., :2]), HIDDEN)
            out["keypoints"] = self.score(tiled, self.v.prompt(KEYPOINTS, *thing), places, places, torch.where(shown, 1.0, LIGHT))
        if "caption" in self.c.tasks:
            said, weight = self.sentence(batch["text"])
            out["caption"] = self.score(seen, task + CAPTION - DETECT, said, said, weight)
        return out

    def sentence(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """text [B,L] (start, words, end 2, padding 0) -> tokens without the start [B,L-1] and weights."""
        text = text[:, 1:]
        real = text > 2
        return torch.where(real, self.v.text_from + text, END), torch.where(real, 1.0, LIGHT) * ((text == 2) | real)

    # -- use ----------------------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def detect(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """image [B,3,H,W] -> boxes [B,objects,4], class [B,objects], score [B,objects], best first: `objects` are always written; coordinates
        are drawn from the nucleus, the class is the likeliest of the real ones and its probability the score."""
        seen, kinds = self.look(image), slice(self.v.class_from, self.v.class_from + len(self.v.classes))
        logits, writer = self.begin(seen, torch.full((len(seen), 1), DETECT, device=seen.device), 5 * self.c.objects)
        draw, out, score, over = self.drawer(self.c.box_p), [], [], torch.zeros(len(seen), dtype=torch.bool, device=seen.device)
        for i in range(5 * self.c.objects):
            if i % 5 == 0 and self.c.fill == "end":                     # such lists end by themselves
                over = over | (logits[:, END] > logits[:, self.v.bins_from:self.v.text_from].logsumexp(1))
            if i % 5 == 4:
                p = logits.float().softmax(-1)[:, kinds]
                score.append(p.amax(1).masked_fill(over, 0.0))
                token = self.v.class_from + p.argmax(1)
            else:
                token = draw(logits)
            out.append(token)
            logits = writer(token) if i + 1 < 5 * self.c.objects else logits
        found = torch.stack(out, 1).unflatten(1, (-1, 5))
        boxes = self.v.boxes(found[..., :4])
        p, kind = torch.stack(score, 1), found[..., 4] - self.v.class_from
        kind = torch.where((boxes[..., 2:] > boxes[..., :2]).all(-1) & (p > 0), kind, -1)
        order = torch.where(kind >= 0, p, -1.0).argsort(1, descending=True)
        return boxes.gather(1, order[..., None].expand(-1, -1, 4)), kind.gather(1, order), p.gather(1, order)

    def drawer(self, top_p: float) -> Callable[[Tensor], Tensor]:
        """Draws coordinates [B] from logits [B,V]; the same every time."""
        nucleus, lot, low = Nucleus.Config(top_p=top_p).build(), torch.Generator(self.device).manual_seed(0), self.v.bins_from
        return lambda logits: low + torch.multinomial(nucleus.chances(logits[:, low:low + self.v.bins]), 1, generator=lot)[:, 0]

    @torch.no_grad()
    def classes_of(self, seen: Tensor, boxes: Tensor) -> Tensor:
        """seen [O,S,D], boxes [O,4] -> the class [O] that detection would give each box."""
        prompt = torch.cat([torch.full((len(boxes), 1), DETECT, device=boxes.device), self.v.box_tokens(boxes)], 1)
        logits = self.decoder.logits(self.decoder.read(self.decoder.embed(prompt), source=seen)[:, -1])
        return logits[:, self.v.class_from:self.v.class_from + len(self.v.classes)].argmax(1)

    @torch.no_grad()
    def segment(self, image: Tensor, points: Tensor | None = None, point_label: Tensor | None = None, boxes: Tensor | None = None,
                mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """image [B,3,H,W], boxes [B,N,4] -> logits [B,N,1,H/2,W/2] of how many of the drawn outlines hold each place, and how much they agree
        [B,N,1]. Raises UserError for prompts other than boxes."""
        if boxes is None or points is not None or mask is not None:
            raise UserError("this system outlines what is in a box", "give boxes alone")
        if boxes.ndim != 3 or boxes.shape[-1] != 4 or len(boxes) != len(image):
            raise UserError(f"boxes has shape {list(boxes.shape)} for {len(image)} pictures", "it is [B,N,4]")
        b, n, k = *boxes.shape[:2], self.c.polygons
        seen, flat = self.look(image).repeat_interleave(n, 0), boxes.flatten(0, 1)
        prompt = self.v.prompt(SEGMENT, flat, self.classes_of(seen, flat)).repeat_interleave(k, 0)
        written = self.tokens(seen.repeat_interleave(k, 0), prompt, 2 * self.c.points, self.drawer(self.c.mask_p))
        drawn = filled(self.v.places(written), image.shape[-2] // 2, image.shape[-1] // 2).unflatten(0, (-1, k))
        share = drawn.float().mean(1)
        best = share > 0.5
        agree = (drawn & best[:, None]).flatten(2).sum(-1) / (drawn | best[:, None]).flatten(2).sum(-1).clamp(min=1)
        return torch.logit(share, 0.02).unflatten(0, (b, n))[:, :, None], agree.mean(1).view(b, n, 1)

    @torch.no_grad()
    def keypoints(self, image: Tensor, boxes: Tensor) -> Tensor:
        """image [B,3,H,W], boxes [B,N,4] -> [B,N,K,3]: x y and 1, or 0 where the point is hidden."""
        b, n, count = *boxes.shape[:2], self.c.joints
        seen, flat = self.look(image).repeat_interleave(n, 0), boxes.flatten(0, 1)

        def likeliest(logits: Tensor) -> Tensor:
            range_ = logits[:, self.v.bins_from:self.v.bins_from + self.v.bins]
            return torch.where(logits[:, HIDDEN] > range_.amax(1), HIDDEN, self.v.bins_from + range_.argmax(1))
        tokens = self.tokens(seen, self.v.prompt(KEYPOINTS, flat, self.classes_of(seen, flat)), 2 * count, likeliest)
        shown = (tokens != HIDDEN).unflatten(1, (count, 2)).all(-1, keepdim=True)
        return torch.cat([self.v.places(tokens) * shown, shown.float()], -1).unflatten(0, (b, n))

    def begin(self, seen: Tensor, prompt: Tensor, count: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Logits [O,V] of the first of `count` tokens behind a prompt [O,P], and the writer of the others."""
        logits, writer = self.decoder.start(self.decoder.embed(prompt), room=count - 1, source=seen)
        if not bool(logits.isfinite().all()):
            raise UserError("the decoder returned numbers that are not finite", "the weights or the picture are damaged")
        return logits, writer

    def tokens(self, seen: Tensor, prompt: Tensor, count: int, choose: Callable[[Tensor], Tensor]) -> Tensor:
        """`count` tokens [O,count] behind a prompt [O,P], each chosen from its logits [O,V]."""
        logits, writer = self.begin(seen, prompt, count)
        out = [choose(logits)]
        for _ in range(count - 1):
            out.append(choose(writer(out[-1])))
        return torch.stack(out, 1)

    @torch.no_grad()
    def generate_text(self, image: Tensor, prompt: Tensor, *, max_new: int) -> Tensor:
        """image [B,3,H,W] -> the likeliest caption, ids of the feed's tokenizer [B,N] up to and with the end (2), then 0. It answers no questions:
        of prompt [B,L] only the number of rows is read."""
        seen, low = self.look(image), self.v.text_from
        allowed = torch.full((self.v.size,), -torch.inf, device=seen.device)
        allowed[low + 3:], allowed[END] = 0.0, 0.0
        room = min(max_new, self.decoder.length - 1)
        written = self.tokens(seen, torch.full((len(seen), 1), CAPTION, device=seen.device), room, lambda x: (x + allowed).argmax(1))
        ended = (written == END).long().cumsum(1)
        return torch.where(ended == 0, written - low, torch.where((ended == 1) & (written == END), 2, 0))


# -- presets --------------------------------------------------------------------------------------------------------------------------------

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "crescent", "hexagon", "arrow", "diamond", "ellipse", "pentagon",
          "semicircle", "trapezoid", *(f"digit {word}" for word in ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]))


def decoder(vocab: int, length: int, width: int, depth: int, heads: int, hidden: int, dropout: float = 0.0) -> CausalLM.Config:
    block = PreNorm.Config(cross=Attention.Config(source=width), mlp=MLP.Config(hidden=hidden), dropout=dropout)
    return CausalLM.Config(vocab=vocab, length=length, position=LearnedPositions.Config(length=length, offset=0),
                           body=Transformer.Config(width=width, depth=depth, heads=heads, block=block), head=LinearBias.Config(into=width, out=vocab))


def tiny() -> Preset:
    v = Vocabulary(classes=SHAPES, bins=100, bins_from=150, text_from=300, words=700)
    vision = ResNet.Config(layers=(1, 1, 1), base=32, stem=Stem.Config(kernel=3, stride=2, pool=0), block=Basic.Config())
    return Preset(
        data="scenes", feed=Feed(image=ImagePlan(size=64), text=TextPlan(vocab=700, length=32, pad="zero")),
        config=Pix2SeqV2.Config(vision=vision, places=64, vocabulary=v, objects=8, instances=2, points=16, joints=5,
                                bins_at_birth="ordered", decoder=decoder(v.size, 48, 128, 2, 4, 512)),
        stages=(Stage(objective=Pix2SeqV2.write, steps=1500, batch_size=32, optim=Optim(
            lr=2e-3, weight_decay=0.05, betas=(0.9, 0.95), schedule="linear", warmup=50, clip=1.0)),))


def paper() -> Preset:
    """ViT-B/16 at 640 px on the four tasks of COCO (section 4.1), after detection on Objects365."""
    v = Vocabulary(classes=tuple(f"coco {i}" for i in range(1, 91)))
    norm = LayerNorm.Config(eps=1e-6)
    vision = ViT.Config(image_size=640, patch=16, prefix=0, pool="mean", body=Transformer.Config(
        width=768, depth=12, heads=12, block=PreNorm.Config(norm=norm), norm=norm, drop_path=0.1))
    return Preset(
        data="coco", feed=Feed(image=ImagePlan(size=640, fit="corner"), text=TextPlan(vocab=32_000, length=128, pad="zero")),
        config=Pix2SeqV2.Config(vision=vision, places=1600, vocabulary=v, decoder=decoder(v.size, 512, 512, 6, 16, 2048, 0.1)),
        stages=(Stage(objective=Pix2SeqV2.write, steps=100 * 118_000 // 128, batch_size=128, checkpoint_activations=True, optim=Optim(
            lr=1e-4, weight_decay=0.05, betas=(0.9, 0.95), schedule="linear", warmup=3000)),))
