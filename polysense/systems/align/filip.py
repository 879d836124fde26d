"""FILIP: pictures and texts are compared patch by word.

With v_k the patches of picture i and t_r the real words of text j, projected and of unit length,

    s_I(i, j) = mean_k max_r v_k . t_r        s_T(j, i) = mean_r max_k t_r . v_k                  (equations 3 and 4)
    loss = (CE over the rows of s_I + CE over the rows of s_T) / 2,   both times the learned scale

The two matrices differ. Padding takes part in no maximum and no mean. Before samples are compared with those of the whole batch, each picture and
text keeps a quarter of its tokens, those that score best against the local batch; its own side stays whole. What word each patch chooses is an
alignment map for free (`ground_text`, `align`); search and zero-shot labels rank by s_I or s_T (`encode_patches`, `encode_words`), and prompt
templates are averaged as similarities. `encode_image` and `encode_text` give one vector each, the mean patch and the end token, for a first look.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from polysense.archetypes.dual_encoder import DualEncoder
from polysense.base.card import Card
from polysense.base.system import AugmentPlan, Batch, Feed, ImagePlan, Losses, Optim, Preset, Stage, TextPlan, ViewPlan, final
from polysense.base.telling import Rewrites, ToldFeed
from polysense.nn.transformer import Transformer
from polysense.objectives.tokenwise import token_nce
from polysense.towers.clip import body, vit_pair

card = Card(
    name="FILIP", paper="Yao et al., FILIP: Fine-grained Interactive Language-Image Pre-Training, ICLR 2022", arxiv="2111.07783", year=2022,
    says="Compares every patch of a picture with every word of a text, so that it can show which word is where.",
    needs=("image", "text"), can=("encode_image", "encode_text", "encode_patches", "encode_words", "ground_text"),
)

PARAMETERS = 426_699_009                     # ViT-L/14 303.2M, text 12x768 123.1M, projections to 256 0.5M; no total is published


@final
class FILIP(DualEncoder):
    @dataclass(frozen=True, kw_only=True)
    class Config(DualEncoder.Config):
        keep: float = 0.25                   # share of its tokens that a sample shows to the others

    def __init__(self, c: Config):
        super().__init__(c)
        self.keep = c.keep

    def words(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """text [B,L] ids -> (tokens [B,L,D], unit norm, zero on padding; mask [B,L])."""
        said = self.text(text)
        return F.normalize(self.text_head(said.tokens).float(), dim=-1) * said.mask[..., None], said.mask

    def encode_words(self, text: Tensor) -> Tensor:
        """text [B,L] ids -> [B,L,D], unit norm, zeros where a token is padding."""
        return self.words(text)[0]

    def embed_tokens(self, batch: Batch) -> dict[str, Tensor]:
        words, mask = self.words(batch["text"])
        return {"patches": self.encode_patches(batch["image"]).flatten(1, 2), "words": words, "mask": mask}

    def compare_tokens(self, seen: dict[str, Tensor]) -> Losses:
        return Losses(contrast=token_nce(seen["patches"], seen["words"], seen["mask"], self.scale, self.keep))

    def align(self, image: Tensor, text: Tensor) -> Tensor:
        """image [B,3,H,W], text [B,L] -> [B,h,w]: the position of the word that each patch is most like."""
        patches, (words, mask) = self.encode_patches(image), self.words(text)
        return torch.einsum("bhwd,bld->bhwl", patches, words).masked_fill(~mask[:, None, None], -torch.inf).argmax(-1)

    def ground_text(self, image: Tensor, text: Tensor) -> Tensor:
        """image [B,3,H,W], text [B,L] -> [B,h,w] in [0,1]: how like the words, without start and end, a patch is; 1 at the strongest."""
        patches, (words, mask) = self.encode_patches(image), self.words(text)
        inner = mask & mask.roll(-1, 1) & (torch.arange(mask.shape[1], device=mask.device) > 0)
        inner = torch.where(inner.any(1, keepdim=True), inner, mask)
        inner[:, -1] &= ~inner[:, :-1].any(1)
        like = torch.einsum("bhwd,bld->bhwl", patches, words * inner[..., None]).sum(-1)
        low, high = like.amin((1, 2), keepdim=True), like.amax((1, 2), keepdim=True)
        return (like - low) / (high - low).clamp(min=1e-6)


def config(size: int, patch: int, image: Transformer.Config, text: Transformer.Config, dim: int, vocab: int = 49408, length: int = 77,
           end: int | None = None, keep: float = 0.25) -> FILIP.Config:
    towers = vit_pair(size, patch, image, text, dim, vocab, length, end)
    return FILIP.Config(**{**towers, "vision": towers["vision"].but(pool="mean", dense="tokens")}, keep=keep)


def tiny() -> Preset:
    return Preset(
        data="scenes", config=config(64, 8, body(128, 4, 2), body(128, 3, 2), 96, 4096, 48, 2),
        feed=Feed(image=ImagePlan(size=64), text=TextPlan(vocab=4096, length=48), train_image=ViewPlan(size=64, scale=(0.6, 1.0))),
        stages=(Stage(objective=FILIP.compare_tokens, embed=FILIP.embed_tokens, steps=400, batch_size=64,
                      optim=Optim(lr=1e-3, weight_decay=0.1, betas=(0.9, 0.98), warmup=40, clip=1.0)),))


def _paper(of: FILIP.Config, lr: float) -> Preset:
    """Back-translations of the captions are rewrites that the data bring; RandAugment where the authors have AutoAugment."""
    return Preset(
        data="filip300m+cc3m+cc12m+yfcc100m", config=of,
        feed=ToldFeed(image=ImagePlan(size=224), text=TextPlan(vocab=49_408, length=77, pad="zero"), told=(Rewrites(),),
                      train_image=AugmentPlan(size=224, scale=(0.5, 1.0), erase=0.0)),
        stages=(Stage(objective=FILIP.compare_tokens, embed=FILIP.embed_tokens, steps=30 * 340_000_000 // 24_576, batch_size=24_576,
                      checkpoint_activations=True, optim=Optim(name="lamb", lr=lr, weight_decay=3e-2, warmup=10_000)),))


def paper() -> Preset:
    """FILIP-large: ViT-L/14, 340M pairs, 30 epochs with LAMB."""
    return _paper(config(224, 14, body(1024, 24, 16), body(768, 12, 12), 256), 2.4e-3)


def base() -> Preset:
    """FILIP-base: ViT-B/32."""
    return _paper(config(224, 32, body(768, 12, 12), body(512, 12, 8), 256), 2e-3)
