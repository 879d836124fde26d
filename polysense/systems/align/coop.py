"""CoOp: what stands around the name of a class is learned, not written.

CLIP is frozen altogether. M vectors V in the space of its word embeddings stand beside the name of a class,

    [SOS] [V]_1 ... [V]_M [CLASS] . [EOS],      p(c | image) = softmax_c exp(s) cos(I, T_c),       loss = CE      (equations 2 and 3)

and are all that trains, from a few labelled pictures of each class: the gradient passes through the text tower to them. One context may serve all
classes, and then takes any name, also of classes never seen; or each class has its own (`text.kind=specific`). The name stands at
the end, in the middle or in front. Positions are added after the vectors are in, and the end is found from ids, so it moves with them.

The tower is `towers/clip_context.py`: the vectors enter where words learned later do. Pictures of a fixed view may be given as
cached `features`. `--base RUN` puts the context onto a CLIP of your own.
"""
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from polysense.archetypes.dual_encoder import DualEncoder
from polysense.base.card import Card
from polysense.base.errors import UserError
from polysense.base.plan import NamedPlan
from polysense.base.system import After, Batch, Feed, ImagePlan, Losses, Optim, Preset, Stage, Start, ViewPlan, final
from polysense.objectives.classify import softmax_ce
from polysense.towers.clip import body, resnet_pair, tiny_pair, vit_pair
from polysense.towers.clip_context import ContextText
from polysense.towers.clip_text import ClipText
from polysense.weights import coop_official

card = Card(
    name="CoOp", paper="Zhou et al., Learning to Prompt for Vision-Language Models, IJCV 2022", arxiv="2109.01134", year=2022,
    says="Learns the prompt of a frozen CLIP from a few labelled pictures of each class.",
    needs=("image|features", "label", "names"), can=("encode_image", "encode_text", "encode_patches", "classify"), official="KaiyangZhou/CoOp",
)

PARAMETERS = 102_007_137 + 16 * 512          # CLIP with RN50, and sixteen vectors

weights = {"official": coop_official.LAYOUT}

@final
class CoOp(DualEncoder):
    @dataclass(frozen=True, kw_only=True)
    class Config(DualEncoder.Config):
        text: ContextText.Config             # type: ignore[assignment]

    def after_start(self) -> None:
        self.text.begin()

    def rows(self, names: Tensor) -> Tensor:
        """names [C,L] of all classes in order -> the classifier [C,D], unit norm."""
        seen = self.text(names, short=True, number=torch.arange(len(names), device=names.device))
        return F.normalize(self.text_head(seen.pooled).float(), dim=-1)

    def losses(self, batch: Batch) -> Losses:
        names = batch["names"][0]
        if len(names) != len(self.text.names):
            raise UserError(f"the data have {len(names)} classes, this system {len(self.text.names)}", f"set text.classes={len(names)}")
        image = self.from_features(batch["features"]) if "features" in batch else self.encode_image(batch["image"])
        return Losses(label=softmax_ce(self.scale * image @ self.rows(names).T, batch["label"])).keeping(names=batch["names"][:1])

    def after_step(self, after: After) -> None:
        super().after_step(after)
        self.text.meet(after.keep["names"][0])

    def classify(self, image: Tensor) -> Tensor:
        """image [B,3,H,W] -> logits [B,C] over the classes it learned from. UserError where nobody said what they are called."""
        if not bool(self.text.names.any()):
            raise UserError("this context came without the names of its classes", "give them as labels, or tell them with system.text.meet(ids)")
        return self.scale * self.encode_image(image) @ self.rows(self.text.names[:, :int(self.text.last(self.text.names).max()) + 1]).T


def prompting(pair: dict[str, Any], **context: Any) -> CoOp.Config:
    """The towers of a CLIP with a context in its text tower."""
    text = pair["text"]
    given: dict[str, Any] = pair | {"text": ContextText.Config(**{f.name: getattr(text, f.name) for f in fields(text)}, **context)}
    return CoOp.Config(**given)


def onto(preset: Preset, base: Preset, start: Start) -> Preset:
    """A preset on another CLIP: its towers, its way of reading, its weights. UserError for a base without CLIP's text tower."""
    of, own = base.config, preset.config.text  # type: ignore[attr-defined]
    if not isinstance(of, DualEncoder.Config) or type(of.text) is not ClipText.Config or base.feed.text is None:
        raise UserError(f"{start.from_} has not the two towers of CLIP", "a context stands among the words of such a text tower")
    pair = {f.name: getattr(of, f.name) for f in fields(DualEncoder.Config)}
    text = NamedPlan(**{f.name: getattr(base.feed.text, f.name) for f in fields(NamedPlan) if f.name != "template"})
    view = preset.feed.train_image.but(size=base.feed.image.size) if preset.feed.train_image and base.feed.image else None
    return preset.but(config=prompting(pair, **{k: getattr(own, k) for k in ("context", "place", "kind", "classes", "like")}), starts=(start,),
                      feed=preset.feed.but(image=base.feed.image, train_image=view, text=text))


def tiny() -> Preset:
    """Kinds of products, on a CLIP of photographs with captions and titles."""
    return Preset(
        data="fashion_products", config=prompting(tiny_pair(), classes=49), starts=(Start(into="", from_="clip", preset="tiny_photos"),),
        feed=Feed(image=ImagePlan(size=64), text=NamedPlan(vocab=4096, length=48), train_image=ViewPlan(size=64, scale=(0.6, 1.0), flip=0.5)),
        stages=(Stage(objective=CoOp.losses, trainable=("text.context",), steps=200, batch_size=32,
                      optim=Optim(name="sgd", lr=0.02, weight_decay=5e-4, warmup=10)),))


def tiny_specific() -> Preset:
    """A context for each class."""
    return tiny().but(**{"config.text.kind": "specific"})


def _paper(pair: dict[str, Any], preset: str) -> Preset:
    adam = Optim(name="sgd", lr=0.002, weight_decay=5e-4)
    return Preset(
        data="imagenet", config=prompting(pair, classes=1000), starts=(Start(into="", from_="clip", preset=preset),),
        feed=Feed(image=ImagePlan(size=224), text=NamedPlan(vocab=49408, length=77, pad="zero"),
                  train_image=ViewPlan(size=224, scale=(0.08, 1.0), flip=0.5)),
        stages=(Stage(name="warm", objective=CoOp.losses, trainable=("text.context",), steps=500, batch_size=32,
                      optim=adam.but(lr=1e-5, schedule="constant")),
                Stage(objective=CoOp.losses, trainable=("text.context",), steps=49 * 500, batch_size=32, optim=adam)))


def paper() -> Preset:
    """RN50 on ImageNet, 16 shots, M=16: 50 epochs of batch 32, the first at 1e-5 (section 4.1)."""
    return _paper(resnet_pair(224, (3, 4, 6, 3), 64, 32, 1024, body(512, 12, 8)), "rn50")


def paper_vit() -> Preset:
    """ViT-B/16."""
    return _paper(vit_pair(224, 16, body(768, 12, 12), body(512, 12, 8), dim=512), "vit_b_16")
