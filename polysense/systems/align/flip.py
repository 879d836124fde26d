"""FLIP: CLIP that looks at half of every picture while it learns.

    keep a random part of the patches, the same number for every picture, anew at every step; encode those alone      (section 3)
    loss = CLIP's symmetric cross-entropy, over a batch that may be two or four times as large for the same memory and time

Patches get the embedding of their place before any is dropped, the class token is never dropped, and there are no mask tokens, no decoder and
no reconstruction: what is hidden costs nothing. Whole pictures are read at test time without further ado; a short last stage that sees them in
training, too (`tune`), closes the gap between the two.

The towers are plain: a ViT with fixed sine-cosine positions, pooled by the mean of all tokens, and a transformer over word pieces that looks
both ways and is read at its first token.
"""
from dataclasses import dataclass

from polysense.archetypes.dual_encoder import MaskedDualEncoder
from polysense.base.card import Card
from polysense.base.system import Feed, ImagePlan, Optim, Preset, Stage, TextPlan, ViewPlan, final
from polysense.mechanisms.mask_sampler import RandomMask
from polysense.nn.mlp import MLP
from polysense.towers.clip import body, vit_pair
from polysense.towers.shapes import heads, plain_vit, pre_norm_bert
from polysense.weights import clip_open_clip

card = Card(
    name="FLIP", paper="Li et al., Scaling Language-Image Pre-training via Masking, CVPR 2023", arxiv="2212.00794", year=2023,
    says="Trains CLIP two to four times as fast by reading only some patches of each picture.",
    needs=("image", "text"), can=("encode_image", "encode_text", "encode_patches"), official="facebookresearch/flip",
)

PARAMETERS = 412_997_633                     # ViT-L/16 303.1M, text 108.5M (word pieces 23.4M), heads 1.4M; no total is published

weights = {"open_clip": clip_open_clip.layout("flip", "big_g")}


@final
class FLIP(MaskedDualEncoder):
    @dataclass(frozen=True, kw_only=True)
    class Config(MaskedDualEncoder.Config):
        pass


def config(size: int, patch: int, image: tuple[int, int, int], text: tuple[int, int, int], dim: int, vocab: int, length: int,
           ratio: float) -> FLIP.Config:
    """image and text: (width, depth, heads)."""
    return FLIP.Config(vision=plain_vit(size, patch, *image, pool="all", position="sincos"), text=pre_norm_bert(vocab, length, *text),
                       **heads(image[0], text[0], dim), sampler=RandomMask.Config(ratio=ratio))


def _preset(of: FLIP.Config, data: str, size: int, words: TextPlan, view: ViewPlan, masked: Stage, tuned: Stage) -> Preset:
    return Preset(config=of, data=data, feed=Feed(image=ImagePlan(size=size), train_image=view, text=words), stages=(masked, tuned))


def tiny() -> Preset:
    """64 patches of 8 pixels, half of them read."""
    optim = Optim(lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95), warmup=40, clip=1.0)
    return _preset(config(64, 8, (192, 6, 3), (192, 3, 3), 192, 4096, 48, 0.5), "scenes", 64, TextPlan(kind="wordpiece", vocab=4096, length=48),
                   ViewPlan(size=64, scale=(0.5, 1.0)),
                   Stage(name="mask", objective=FLIP.compare, embed=FLIP.embed_masked, steps=500, batch_size=128, optim=optim),
                   Stage(name="tune", objective=FLIP.compare, embed=FLIP.embed, steps=50, batch_size=128, optim=optim.but(lr=1e-4, warmup=5)))


def paper() -> Preset:
    """ViT-L/16 on LAION-400M, 32 epochs of batch 64k with half of the patches, then 0.32 of an epoch with all."""
    epoch, optim = 400_000_000 // 65_536, Optim(lr=4e-6 * 65_536 / 256, weight_decay=0.2, betas=(0.9, 0.95), warmup=40 * 1_281_167 // 65_536)
    return _preset(config(224, 16, (1024, 24, 16), (768, 12, 12), 768, 30_522, 32, 0.5), "laion400m", 224,
                   TextPlan(kind="wordpiece", vocab=30_522, length=32), ViewPlan(size=224, scale=(0.5, 1.0)),
                   Stage(name="mask", objective=FLIP.compare, embed=FLIP.embed_masked, steps=32 * epoch, batch_size=65_536, optim=optim),
                   Stage(name="tune", objective=FLIP.compare, embed=FLIP.embed, steps=round(0.32 * epoch), batch_size=65_536,
                         checkpoint_activations=True, optim=optim.but(lr=4e-8 * 65_536 / 256, warmup=round(0.032 * epoch))))


def three_quarters() -> Preset:
    """The same with a quarter of the patches."""
    return paper().but(**{"config.sampler.ratio": 0.75})


def big_g() -> Preset:
    """CLIP's own towers with patches dropped: LAION's ViT-bigG/14, which was trained so: 39 billion pictures seen in batches
    of 160,000, half of the patches of each."""
    image, text = body(1664, 48, 16, act="gelu"), body(1280, 32, 20, act="gelu")
    of = FLIP.Config(**vit_pair(224, 14, image.but(**{"block.mlp": MLP.Config(act="gelu", hidden=8192)}), text, 1280),
                     sampler=RandomMask.Config(ratio=0.5))
    base = paper()
    return base.but(config=of, data="laion2b", feed=base.feed.but(text=TextPlan(vocab=49_408, length=77, pad="zero"))).but(
        **{"stages.0.steps": 39_000_000_000 // 160_000, "stages.0.batch_size": 160_000})
