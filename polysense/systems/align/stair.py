"""STAIR: a picture and a text are weights over the words of a vocabulary, most of them zero.

    p_j = E transform(h_j) + b  for every patch or word token h_j,    w = log(1 + relu(max_j p_j))  in R^V            (equations 1 and 2)
    L = InfoNCE(w_image, w_text) + ramp (lambda_I FLOPS(w_image) + lambda_T FLOPS(w_text)),   FLOPS(w) = sum_k (mean_i w_ik)^2

Padding never wins a maximum. Three stages tie the dimensions to what words mean: (1) `ground`: the text's weights are masked to the words that stand
in it, so pictures learn to name what is said; (2) `expand`: the picture tower is frozen and the text, unmasked, may grow related words; (3) `refine`:
both. Vectors are compared by their cosine. The weights can be read (`terms`), and an inverted index ranks by the same products as the dense ones.
"""
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from polysense.archetypes.dual_encoder import DualEncoder
from polysense.base.card import Card
from polysense.base.errors import UserError
from polysense.base.system import After, Batch, Feed, ImagePlan, Losses, Optim, Part, Preset, Spec, Stage, TextPlan, ViewPlan, final
from polysense.decoders.words import WordHead
from polysense.objectives.contrastive import info_nce
from polysense.objectives.sparse import flops
from polysense.towers.bert import Bert
from polysense.towers.encoded import Encoded, Tower
from polysense.towers.shapes import plain_vit, pre_norm_bert

card = Card(
    name="STAIR", paper="Chen et al., STAIR: Learning Sparse Text and Image Representation in Grounded Tokens, EMNLP 2023", arxiv="2301.13081",
    year=2023, says="Describes pictures and texts by weighted words, which a person can read and an inverted index can search.",
    needs=("image", "text"), can=("encode_image", "encode_text", "encode_patches", "encode_image_terms", "encode_text_terms"),
)

PARAMETERS = 242_481_781                     # ViT-B/16 85.8M, text 12x768 108.5M, two heads to 30,522 words 48.1M; no total is published


class Terms(Part):
    """log(1 + relu(max over tokens of (E transform(h) + b))): [B,T,D] -> [B,V]; of places [B,h,w,D] each for itself -> [B,h,w,V]."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        into: int
        vocab: int

    def __init__(self, c: Config):
        super().__init__()
        self.head = WordHead(WordHead.Config(width=c.into, vocab=c.vocab))
        self.words = nn.Parameter(torch.randn(c.vocab, c.into) * c.into ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        said = self.head(x, self.words)
        return torch.log1p((said.amax(1) if x.ndim == 3 else said).relu())


class EveryToken(Tower):
    """A text tower whose pooled feature is all its tokens [B,L,D]; the first stands in for padding, which so wins no maximum."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        tower: Bert.Config

        @property
        def width(self) -> int:
            return self.tower.width

    def __init__(self, c: Config):
        super().__init__()
        self.tower, self.pad, self.width = c.tower.build(), c.tower.pad, c.width

    def forward(self, text: Tensor) -> Encoded:
        said = self.tower(text)
        return Encoded(tokens=said.tokens, pooled=torch.where(said.mask[..., None], said.tokens, said.tokens[:, :1]), mask=said.mask)


@final
class STAIR(DualEncoder):
    ramp: Tensor

    @dataclass(frozen=True, kw_only=True)
    class Config(DualEncoder.Config):
        special: tuple[int, ...]             # ids that are no words: padding, start, end
        ramp: float = 0.3                    # share of a stage in which the FLOPS terms reach their weights, quadratically

    def __init__(self, c: Config):
        if getattr(c.vision, "pool", "") != "none" or not isinstance(c.text, EveryToken.Config):
            raise UserError("STAIR takes the maximum over every token of a picture and of a text, and these towers give one feature",
                            "give it a ViT with pool='none' and a text tower in EveryToken")
        super().__init__(c)
        self.special, self.rise = c.special, c.ramp
        self.register_buffer("ramp", torch.tensor(0.01))

    def encode_image_terms(self, image: Tensor) -> Tensor:
        """image [B,3,H,W] -> [B,V], weights of words."""
        return self.image_head(self.vision.pooled(image)).float()

    def encode_text_terms(self, text: Tensor) -> Tensor:
        """text [B,L] ids -> [B,V], weights of words."""
        return self.text_head(self.text.pooled(text)).float()

    def present(self, text: Tensor) -> Tensor:
        """text [B,L] ids -> bool [B,V]: the words that stand in it."""
        vocab = self.text_head.words.shape[0]
        out = torch.zeros(len(text), vocab, dtype=torch.bool, device=text.device).scatter_(1, text, True)
        out[:, list(self.special)] = False
        return out

    def embed_terms(self, batch: Batch) -> dict[str, Tensor]:
        return {"image": self.encode_image_terms(batch["image"]), "text": self.encode_text_terms(batch["text"])}

    def embed_grounded(self, batch: Batch) -> dict[str, Tensor]:
        """As `embed_terms`, the text's weights masked to its own words."""
        seen = self.embed_terms(batch)
        return {**seen, "text": seen["text"] * self.present(batch["text"])}

    def compare_terms(self, seen: dict[str, Tensor]) -> Losses:
        image, text = (nn.functional.normalize(seen[k], dim=-1) for k in ("image", "text"))
        return Losses(contrast=info_nce(image, text, self.scale), image_flops=self.ramp * flops(seen["image"]),
                      text_flops=self.ramp * flops(seen["text"]))

    def compare_fixed_images(self, seen: dict[str, Tensor]) -> Losses:
        """The same without the term of pictures, which do not move."""
        losses = self.compare_terms(seen)
        return Losses(contrast=losses["contrast"], text_flops=losses["text_flops"])

    def terms(self, weights: Tensor, most: int = 5) -> list[list[tuple[int, float]]]:
        """weights [B,V] -> for each row its largest (id, weight) pairs, zeros left out."""
        top = weights.detach().topk(most, dim=1)
        return [[(int(i), float(w)) for w, i in zip(*row, strict=True) if w > 0] for row in zip(top.values, top.indices, strict=True)]

    @torch.no_grad()
    def after_step(self, after: After) -> None:
        super().after_step(after)
        self.ramp.fill_(max(0.01, min(1.0, after.progress / self.rise) ** 2))


def config(size: int, patch: int, image: tuple[int, int, int], text: tuple[int, int, int], vocab: int, length: int,
           special: tuple[int, ...]) -> STAIR.Config:
    """image and text: (width, depth, heads)."""
    return STAIR.Config(vision=plain_vit(size, patch, *image, pool="none"), text=EveryToken.Config(tower=pre_norm_bert(vocab, length, *text)),
                        image_head=Terms.Config(into=image[0], vocab=vocab), text_head=Terms.Config(into=text[0], vocab=vocab), special=special)


def stages(steps: int, batch: int, optim: Optim, flops_weight: float) -> tuple[Stage, ...]:
    """`ground`, `expand`, `refine`, of so many steps each."""
    both, text = (("image_flops", flops_weight), ("text_flops", flops_weight)), (("text_flops", flops_weight),)
    return (Stage(name="ground", objective=STAIR.compare_terms, embed=STAIR.embed_grounded, steps=steps, batch_size=batch, optim=optim, weights=both),
            Stage(name="expand", objective=STAIR.compare_fixed_images, embed=STAIR.embed_terms, trainable=("text.*", "text_head.*", "log_scale"),
                  steps=steps, batch_size=batch, optim=optim, weights=text),
            Stage(name="refine", objective=STAIR.compare_terms, embed=STAIR.embed_terms, steps=steps, batch_size=batch, weights=both,
                  optim=optim.but(lr=optim.lr / 5)))


def tiny() -> Preset:
    optim = Optim(lr=1e-3, weight_decay=0.1, betas=(0.9, 0.98), warmup=20, clip=1.0)
    return Preset(
        data="scenes:combos", config=config(64, 8, (128, 4, 2), (128, 2, 2), 1024, 48, (0, 1, 2)), stages=stages(150, 128, optim, 1e-3),
        feed=Feed(image=ImagePlan(size=64), text=TextPlan(kind="wordpiece", vocab=1024, length=48), train_image=ViewPlan(size=64, scale=(0.6, 1.0))))


def paper() -> Preset:
    """ViT-B/16 and a text tower of 12 layers over BERT's word pieces, 1.1 billion pairs, batch 16,384."""
    optim = Optim(lr=5e-4, weight_decay=0.1, betas=(0.9, 0.98), warmup=10_000)
    return Preset(
        data="image_text_1_1b", config=config(224, 16, (768, 12, 12), (768, 12, 12), 30_522, 77, (0, 101, 102)),
        stages=stages(200_000, 16_384, optim, 1e-3),
        feed=Feed(image=ImagePlan(size=224), text=TextPlan(kind="wordpiece", vocab=30_522, length=77),
                  train_image=ViewPlan(size=224, scale=(0.9, 1.0))))
