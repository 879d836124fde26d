"""CLIP at any scale: data, batch and model grow, and a fitted law says what that brings.

    E = beta C^alpha,    C = GMACs of a sample x samples seen                                    (Cherti et al. 2023, section 3)

The objective is CLIP's. What makes a scale reachable stands around it, for every system here alike:

  data    pairs of the web, made tidy and filtered (`feed.told`: `Cleaned`, with a CLIP as judge of what fits), joined by shares (`Mixed`); the
          axis is samples seen, not epochs (`app.scaling.seen`)
  batch   exact contrastive gradients with one chunk in memory (`Stage.chunk`): all chunks are embedded without a graph, the loss over all pairs gives
          the gradient of each embedding, and each chunk is embedded again, with its random state, to receive it. To add up gradients of small batches
          is another loss: each has its own few negatives
  model   one rate for each size, from short warm-ups (`app.scaling.scan_rate`); the same tokenizer, views and exams for all
  law     fitted to the Pareto front of error and compute, with a bootstrap interval, and tried on the largest run held out (`app.scaling.fit_law`)

Any dual encoder scales so: `polysense train slip chunk=32 --data PHOTOS`. The presets are those of LAION's released models.
"""
from dataclasses import dataclass

from polysense.archetypes.dual_encoder import DualEncoder
from polysense.base.card import Card
from polysense.base.system import ImagePlan, Optim, Preset, Stage, TextPlan, ViewPlan, final
from polysense.base.telling import Cleaned, Mixed, ToldFeed
from polysense.towers.clip import body, tiny_pair, vit_pair
from polysense.weights import clip_open_clip

card = Card(
    name="CLIP scaling", paper="Cherti et al., Reproducible Scaling Laws for Contrastive Language-Image Learning, CVPR 2023",
    arxiv="2212.07143", year=2023, says="Trains CLIP on any amount of noisy pairs at any batch, and fits the law by which its error falls.",
    needs=("image", "text"), can=("encode_image", "encode_text", "encode_patches"), official="LAION-AI/scaling-laws-openclip",
)

PARAMETERS = 1_366_678_273                   # ViT-g/14, as open_clip builds it

weights = {"open_clip": clip_open_clip.layout("clip_scaling", "vit_b_32")}


@final
class CLIPScaling(DualEncoder):
    @dataclass(frozen=True, kw_only=True)
    class Config(DualEncoder.Config):
        pass


def tiny() -> Preset:
    """Photographs with captions and products with titles, half and half, tidied, one copy of each; batches of 128 in chunks of 32.

    A judge is asked with feed.told.0.judge=clip feed.told.0.fit=0.1."""
    return Preset(
        data="natural_captions+fashion_products", config=CLIPScaling.Config(**tiny_pair()),
        feed=ToldFeed(image=ImagePlan(size=64), text=TextPlan(vocab=4096, length=48), train_image=ViewPlan(size=64, scale=(0.6, 1.0), flip=0.5),
                      told=(Cleaned(words=(2, 64), smallest=32, ratio=3.0, copies="one"), Mixed(shares=(0.5, 0.5)))),
        stages=(Stage(objective=CLIPScaling.compare, embed=CLIPScaling.embed, chunk=32, steps=400, batch_size=128,
                      optim=Optim(lr=1.5e-3, weight_decay=0.1, betas=(0.9, 0.98), eps=1e-6, warmup=40, clip=1.0)),))


Size = tuple[int, int, int]                  # width, depth, heads


def _laion(patch: int, image: Size, text: Size, dim: int, lr: float, samples: int, hidden: int = 0, batch: int = 88_064) -> Preset:
    tower = body(*image, act="gelu").but(**{"block.mlp.hidden": hidden})
    return Preset(
        data="laion2b", config=CLIPScaling.Config(**vit_pair(224, patch, tower, body(*text, act="gelu"), dim)),
        feed=ToldFeed(image=ImagePlan(size=224), text=TextPlan(vocab=49_408, length=77, pad="zero"), train_image=ViewPlan(size=224, scale=(0.9, 1.0)),
                      told=(Cleaned(words=(1, 77), copies="one"),)),
        stages=(Stage(objective=CLIPScaling.compare, embed=CLIPScaling.embed, chunk=1024, steps=samples // batch, batch_size=batch,
                      checkpoint_activations=True, precision="bf16",
                      optim=Optim(lr=lr, weight_decay=0.2, betas=(0.9, 0.98), eps=1e-6, warmup=2000)),))


def vit_b_32() -> Preset:
    return _laion(32, (768, 12, 12), (512, 12, 8), 512, 1e-3, 34_000_000_000)


def vit_b_16() -> Preset:
    return _laion(16, (768, 12, 12), (512, 12, 8), 512, 1e-3, 34_000_000_000)


def vit_l_14() -> Preset:
    return _laion(14, (1024, 24, 16), (768, 12, 12), 768, 1e-3, 34_000_000_000)


def vit_h_14() -> Preset:
    return _laion(14, (1280, 32, 16), (1024, 24, 16), 1024, 5e-4, 34_000_000_000)


def paper() -> Preset:
    """ViT-g/14 on 13 billion samples of LAION-2B, the largest run of the study."""
    return _laion(14, (1408, 40, 16), (1024, 24, 16), 1024, 5e-4, 13_000_000_000, hidden=6144)
