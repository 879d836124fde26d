"""EVA-CLIP: CLIP whose image tower has first learned to see what CLIP sees, trained steadily at a large scale.

First the tower learns alone (`EVATower`): some 40 percent of the patches are hidden, block by block, and a linear head names what a frozen CLIP says
of them, in the space of texts:

    min  mean over hidden patches of  1 - cos(W h_i, clip(image)_i)                                    (EVA, section 2.1)

Then it meets a text tower that comes from CLIP (`EVACLIP`). Heads and temperature begin anew; half of the patches are dropped in training; LAMB
moves every tensor in proportion to its length, the text tower ten times less than the image tower, deeper layers more than shallow ones; the
loss is CLIP's. Everything else, half precision, sharding, recomputing, gathering, must not change the mathematics.

Two generations of towers (`towers.eva`): EVA-02 turns queries and keys of patches by their place besides learned positions, has SwiGLU and a norm
inside each branch; EVA-01 and the largest EVA-02 are plain. Keys never have a bias.
"""
from dataclasses import dataclass
from typing import Any

from polysense.archetypes.dual_encoder import MaskedDualEncoder
from polysense.archetypes.masked_model import MaskedFeatures
from polysense.base.card import Card
from polysense.base.system import Feed, ImagePlan, Optim, Preset, Stage, Start, TextPlan, ViewPlan, final
from polysense.decoders.codes import CodeHead
from polysense.decoders.features import FeatureTarget
from polysense.mechanisms.mask_sampler import BlockMask, FillHidden, RandomMask
from polysense.nn.head import Linear, LinearBias
from polysense.towers.clip import body, vit_pair
from polysense.towers.clip_text import ClipText
from polysense.towers.eva import EvaViT, eva01, eva02, eva02_e
from polysense.weights import eva_clip

card = Card(
    name="EVA-CLIP", paper="Sun et al., EVA-CLIP: Improved Training Techniques for CLIP at Scale, 2023", arxiv="2303.15389", year=2023,
    says="CLIP on an image tower that has learned to predict CLIP's features: better at equal cost, and steady at a large scale.",
    needs=("image", "text|image"), can=("encode_image", "encode_text", "encode_patches"), official="baaivision/EVA",
)

PARAMETERS = 427_755_457                     # EVA02-CLIP-L/14

weights = {"official": eva_clip.OFFICIAL, "open_clip": eva_clip.OPEN_CLIP}


@final
class EVACLIP(MaskedDualEncoder):
    """Rotations are those of the kept places."""

    @dataclass(frozen=True, kw_only=True)
    class Config(MaskedDualEncoder.Config):
        pass


@final
class EVATower(MaskedFeatures):
    """The image tower's own training, before there are texts; its feature is the class token."""

    @dataclass(frozen=True, kw_only=True)
    class Config(MaskedFeatures.Config):
        pass


LEARNS = ("encoder.*", "hide.*", "decoder.*")


def config(image: EvaViT.Config, text: ClipText.Config, dim: int, ratio: float) -> EVACLIP.Config:
    return EVACLIP.Config(vision=image, text=text, image_head=LinearBias.Config(into=image.width, out=dim, std=0.02),
                          text_head=Linear.Config(into=text.width, out=dim), sampler=RandomMask.Config(ratio=ratio))


def falling(tower: str, depth: int, rate: float) -> tuple[tuple[str, float], ...]:
    """Factors of a tower's own layer-wise decay, as `lr_scale` takes them: `rate` to the power of how many layers stand above. Patches, positions
    and words are layer 0; the final norm and what follows it have the full rate."""
    first = tuple((f"{tower}.{n}*", rate ** (depth + 1)) for n in (("embed.", "position") if tower == "text" else ("patch.", "cls", "position")))
    return first + tuple((f"{tower}.body.blocks.{i}.*", rate ** (depth - i)) for i in range(depth))


def optim(of: EVACLIP.Config, lr: float, **more: Any) -> Optim:
    """LAMB. lr is the image side's; the text side has a tenth of it, the temperature five quarters (4e-4, 4e-5 and 5e-4 as published)."""
    image, text = of.vision.body.depth, of.text.body.depth  # type: ignore[attr-defined]
    return Optim(name="lamb", lr=lr, betas=(0.9, 0.98), eps=1e-6, clip=5.0, lr_scale=(
        *falling("vision", image, 0.85), *falling("text", text, 0.75), ("text.*", 0.1), ("text_head.*", 0.1), ("log_scale", 1.25)), **more)


def tiny() -> Preset:
    """EVA-02's blocks, 6x192 on 64 patches of 8 pixels, from `tiny_mim`; the text tower from `clip` tiny_vit. With so few steps all rates are
    higher than published, in the published proportions."""
    lent = vit_pair(64, 8, body(192, 6, 3), body(192, 3, 3), 192, vocab=4096, length=48, end=2)
    of = config(eva02(64, 8, 192, 6, 3, grid=8), lent["text"], 192, 0.5)
    return Preset(
        data="scenes", config=of,
        starts=(Start(into="vision", from_="eva_clip", take="encoder", preset="tiny_mim"),
                Start(into="text", from_="clip", take="text", preset="tiny_vit")),
        feed=Feed(image=ImagePlan(size=64), text=TextPlan(vocab=4096, length=48), train_image=ViewPlan(size=64, scale=(0.6, 1.0))),
        stages=(Stage(objective=EVACLIP.compare, embed=EVACLIP.embed_masked, steps=300, batch_size=128,
                      optim=optim(of, 1e-2, weight_decay=0.05, warmup=30)),))


def mim(size: int, encoder: EvaViT.Config, hidden: int, least: int, tower: Any, head: Any, width: int, starts: tuple[Start, ...], data: str,
        stage: Stage) -> Preset:
    return Preset(
        data=data, starts=starts, stages=(stage,), feed=Feed(image=ImagePlan(size=size), train_image=ViewPlan(size=size, scale=(0.2, 1.0), flip=0.5)),
        config=EVATower.Config(encoder=encoder, sampler=BlockMask.Config(hidden=hidden, least=least), hide=FillHidden.Config(),
                               decoder=CodeHead.Config(), target=FeatureTarget.Config(tower=tower, head=head, width=width)))


def teacher(from_: str, preset: str) -> tuple[Start, ...]:
    """Image tower and head of a CLIP."""
    return tuple(Start(into=f"target.{into}", from_=from_, take=take, preset=preset) for into, take in (("tower", "vision"), ("head", "image_head")))


def tiny_mim() -> Preset:
    """The tower of `tiny`, taught by `clip` tiny_vit."""
    lent = vit_pair(64, 8, body(192, 6, 3), body(192, 3, 3), 192)
    return mim(64, eva02(64, 8, 192, 6, 3, grid=8), 26, 6, lent["vision"], lent["image_head"], 192, teacher("clip", "tiny_vit"), "scenes", Stage(
        objective=EVATower.losses, trainable=LEARNS, steps=300, batch_size=64,
        optim=Optim(lr=1.5e-3, weight_decay=0.05, betas=(0.9, 0.98), warmup=30, clip=3.0)))


WORDS = TextPlan(vocab=49_408, length=77, pad="zero")


def words(width: int, depth: int, heads: int) -> ClipText.Config:
    return ClipText.Config(vocab=49_408, length=77, body=body(width, depth, heads, act="gelu"))


def _paper(size: int, of: EVACLIP.Config, starts: tuple[Start, ...], data: str, batch: int, seen: int) -> Preset:
    return Preset(
        data=data, config=of, starts=starts,
        feed=Feed(image=ImagePlan(size=size), train_image=ViewPlan(size=size, scale=(0.9, 1.0)), text=WORDS),
        stages=(Stage(objective=EVACLIP.compare, embed=EVACLIP.embed_masked, steps=seen // batch, batch_size=batch, checkpoint_activations=True,
                      optim=optim(of, 4e-4, weight_decay=0.05, warmup=2000)),))


TEXT_L, TEXT_B = (Start(into="text", from_="clip", take="text", preset=p) for p in ("paper", "vit_b_16"))


def paper() -> Preset:
    """EVA02-CLIP-L/14 on Merged-2B: 4 billion samples in batches of 131k (table 4). Its release drops no patches; the paper's half is the default."""
    return _paper(224, config(eva02(224, 14, 1024, 24, 16), words(768, 12, 12), 768, 0.5),
                  (Start(into="vision", from_="eva_clip", take="encoder", preset="mim_paper"), TEXT_L), "merged2b", 131_072, 4_000_000_000)


def paper_336() -> Preset:
    """EVA02-CLIP-L/14+: 2 billion more at 336 px, on interpolated positions; rotations go on in units of the grid of pre-training."""
    base = _paper(336, paper().config.but(**{"vision.image_size": 336}), (Start(into="", from_="eva_clip", preset="paper"),), "merged2b",  # type: ignore[arg-type]
                  61_440, 2_000_000_000)
    return base.but(**{"stages.0.optim.lr": 4e-5})


def b_16() -> Preset:
    """EVA02-CLIP-B/16: 8 billion samples."""
    return _paper(224, config(eva02(224, 16, 768, 12, 12), words(512, 12, 8), 512, 0.5), (TEXT_B,), "merged2b", 131_072, 8_000_000_000)


def g_14() -> Preset:
    """EVA01-CLIP-g/14 on LAION-400M: 11 billion samples in batches of 41k, drop-path 0.4. Its image tower is the released EVA-01."""
    tower = eva01(224, 14, 1408, 40, 16, 6144)
    return _paper(224, config(tower.but(**{"body.drop_path": 0.4}), words(768, 12, 12), 1024, 0.5), (TEXT_L,), "laion400m", 40_960, 11_000_000_000)


def e_14() -> Preset:
    """EVA02-CLIP-E/14: norms behind the branches, no rotations. Its text tower is OpenCLIP's H, read from its release."""
    return _paper(224, config(eva02_e(224, 14, 1792, 64, 16, 15_360), words(1024, 24, 16), 1024, 0.5), (), "laion2b", 114_688, 4_000_000_000)


def mim_paper() -> Preset:
    """EVA-02-L on Merged-38M, 56 epochs of batch 2048: the features of EVA01-CLIP-g/14 (Fang et al. 2023, EVA-02, table 4)."""
    g, epoch = g_14().config, 38_000_000 // 2048
    return mim(224, eva02(224, 14, 1024, 24, 16), 105, 16, g.vision, g.image_head, 1024, teacher("eva_clip", "g_14"), "merged38m",  # type: ignore[attr-defined]
               Stage(objective=EVATower.losses, trainable=LEARNS, steps=56 * epoch, batch_size=2048, checkpoint_activations=True,
                     optim=Optim(lr=1.5e-3, weight_decay=0.05, betas=(0.9, 0.98), eps=1e-6, warmup=epoch, clip=3.0)))
