"""Flamingo: a language model that is left as it is learns to look, and learns new tasks from a few examples in its prompt.

    x_n = Resampler(vision(image_n)),   p(y | x) = prod_l p(y_l | y_<l, x_<=l)                                                  (equation 1)
    before a block of the language model: y = y + tanh(a) xattn(y, x);  y = y + tanh(b) ffw(y)          a = b = 0 at birth      (figure 4)

Pictures and texts come in turn: start, picture, text, end, picture, text, end ... A token looks only at the last picture before it, phi(t);
what it knows of others it has from the language model's own attention, so a model trained on few pictures reads many. A token before any
picture looks at nothing. In training the tag of a picture stands before or, with chance p_next, behind its text (phi then points to the
next one). Terms of several data sets are added up in every step, interleaved pages counting 1, pairs 0.2 and videos 0.03 (section 2.4).
Only resampler and gated layers train. The tiny preset begins by teaching its language model to read (stage read).

The paper's eye, NFNet-F6, and its language model, Chinchilla, were never released: `paper` stands on CLIP's ViT-L/14, as OpenFlamingo does,
and on LLaMA blocks of Chinchilla's sizes.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from polysense.base.card import Card
from polysense.base.errors import UserError
from polysense.base.system import Batch, EpisodePlan, Feed, ImagePlan, Losses, Optim, Preset, Spec, Stage, Start, System, VideoPlan, final
from polysense.connectors.gated_cross_attention import GatedBlock, GatedCrossAttention
from polysense.connectors.perceiver_resampler import PerceiverResampler, ResamplerLayer
from polysense.nn.attention import Attention
from polysense.nn.block import PreNorm
from polysense.nn.head import Linear
from polysense.nn.mlp import MLP, GatedMLP
from polysense.nn.norm import LayerNorm, RMSNorm
from polysense.nn.rotary import Rotary
from polysense.nn.transformer import Transformer
from polysense.objectives.language import labels_of, next_token, token_log_likelihood
from polysense.towers.causal_lm import CausalLM
from polysense.towers.clip_resnet import ClipResNet
from polysense.towers.patch_tokens import PatchTokens
from polysense.towers.vit import ViT
from polysense.weights import idefics_hf

card = Card(
    name="Flamingo", paper="Alayrac et al., Flamingo: a Visual Language Model for Few-Shot Learning, NeurIPS 2022", arxiv="2204.14198", year=2022,
    says="Writes about pictures after a few examples in its prompt: a frozen language model that looks through gated cross-attention.",
    needs=("images", "episode", "image|video", "text"), can=("generate_text",), official="mlfoundations/open_flamingo",
)

PARAMETERS = 2_831_968_304                   # LM 1.35B, gated layers 1.11B, resampler 0.08B, ViT-L/14 0.30B; the paper: 1.4, 1.2, 0.19, NFNet-F6 0.44

weights = {"idefics": idefics_hf.LAYOUT}


@final
class Flamingo(System):
    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        vision: Spec                         # image -> [B,S,D]
        resampler: Spec
        language: Spec                       # a CausalLM.Config some of whose blocks are GatedBlocks
        image_token: int
        looks: str = "last"                  # at the "last" picture before a token; "all": at all of them (an ablation, section 3.3)
        end: int = 2
        pad: int = 0

    def __init__(self, c: Config):
        super().__init__()
        self.vision, self.resampler, self.language = c.vision.build(), c.resampler.build(), c.language.build()
        self.image_token, self.looks, self.end, self.pad = c.image_token, c.looks, c.end, c.pad

    def see(self, image: Tensor) -> Tensor:
        """image [B,3,H,W], [B,N,3,H,W] or videos [B,N,T,3,H,W] -> visual tokens [B,N,R,D]."""
        images = image[:, None] if image.ndim == 4 else image
        if images.ndim not in (5, 6):
            raise UserError(f"an image tensor of shape {list(image.shape)}", "give [B,3,H,W], or [B,N,3,H,W] for pictures in turn with text")
        flat = images.flatten(0, images.ndim - 4)
        return self.resampler(self.vision(flat).unflatten(0, images.shape[:-3]).flatten(0, 1)).unflatten(0, images.shape[:2])

    def looked_at(self, text: Tensor, n: int, each: int, following: Tensor | None = None) -> Tensor:
        """Which of the n * each visual tokens a token of text [B,L] sees, bool [B,L,n*each]: those of the last picture before it, phi(t); of the
        next one in samples where `following` [B] is true. Raises UserError for other numbers of places and pictures."""
        here = text == self.image_token
        if int(here.sum(1).max()) > n:
            raise UserError(f"{int(here.sum(1).max())} places for {n} pictures", "give one place to every picture")
        number, token = here.cumsum(1), torch.arange(n * each, device=text.device) // each + 1
        if following is not None:
            number = torch.where(following[:, None], number - here.long() + 1, number)
        if self.looks == "all":
            return token <= number[..., None]
        return number[..., None] == token

    def predict(self, image: Tensor | None, text: Tensor, following: Tensor | None = None) -> Tensor:
        """Logits [B,L,V] at every token of text [B,L] with its pictures; without pictures those of the language model alone."""
        x, mask = self.language.embed(text), text != self.pad
        mask = None if bool(mask.all()) else mask
        if image is None:
            return self.language.logits(self.language.read(x, mask))
        seen = self.see(image)
        return self.language.logits(self.language.read(x, mask, seen.flatten(1, 2), self.looked_at(text, seen.shape[1], seen.shape[2], following)))

    def learned(self, text: Tensor) -> Tensor:
        """True on what counts in the loss: words and ends, not the start, places of pictures, or padding."""
        out = (text != self.pad) & (text != self.image_token)
        out[:, 0] = False
        return out

    def read(self, batch: Batch) -> Losses:
        """Episodes without their pictures: what a language model knows before it sees. Tags are tokens like others."""
        text, counted = batch["episode"], batch["episode"] != self.pad
        return Losses(language=next_token(self.predict(None, text), labels_of(text, counted)))

    def speak(self, batch: Batch) -> Losses:
        text, caption = batch["episode"], batch["text"]
        pages = self.predict(batch["images"], text, text[:, 1] != self.image_token)
        pair = torch.cat([caption[:, :1], torch.full_like(caption[:, :1], self.image_token), caption[:, 1:]], 1)
        name, shown = ("pairs", batch["image"]) if "image" in batch else ("videos", batch["video"][:, None])
        terms = {"interleaved": next_token(pages, labels_of(text, self.learned(text))),
                 name: next_token(self.predict(shown, pair), labels_of(pair, self.learned(pair)))}
        return Losses(**terms)

    def log_likelihood(self, image: Tensor, text: Tensor, learned: Tensor) -> Tensor:
        """Sum of log p of the learned tokens of text [B,L] (bool [B,L]) for each sample, [B]: close-ended answers are ranked by it."""
        return token_log_likelihood(self.predict(image, text), labels_of(text, learned))

    @torch.no_grad()
    def generate_text(self, image: Tensor, prompt: Tensor, *, max_new: int, how: Spec | None = None) -> Tensor:
        """image [B,3,H,W] or [B,N,3,H,W], prompt [B,L] ids (right-padded) -> new ids [B,M], M <= max_new, up to and with the end, then padding.

        A prompt of examples and a query: start, (picture, text, end) for each example, picture. One without a place shows the picture behind
        its first token. The end of a text that is to be continued is left out. how: a strategy of `towers.decoding`; the paper's is Beam of 3.
        """
        if prompt.ndim != 2 or prompt.dtype != torch.int64:
            raise UserError(f"a prompt of shape {list(prompt.shape)} and type {prompt.dtype}", "give token ids, int64 [B,L]")
        last = ((prompt != self.pad) * torch.arange(1, prompt.shape[1] + 1, device=prompt.device)).argmax(1, keepdim=True)
        prompt = prompt.scatter(1, last, prompt.gather(1, last).masked_fill(prompt.gather(1, last) == self.end, self.pad))
        if not bool((prompt == self.image_token).any()):
            places = prompt.new_full((len(prompt), 1 if image.ndim == 4 else image.shape[1]), self.image_token)
            prompt = torch.cat([prompt[:, :1], places, prompt[:, 1:]], 1)
        seen, mask = self.see(image), prompt != self.pad
        return self.language.generate(self.language.embed(prompt), mask, max_new=max_new, end=self.end, pad=self.pad, how=how,
                                      source=seen.flatten(1, 2), source_mask=self.looked_at(prompt, seen.shape[1], seen.shape[2]))

    @torch.no_grad()
    def alike(self, image: Tensor, supports: Tensor, k: int) -> Tensor:
        """The k of supports [S,3,H,W] most like each image [B,3,H,W] to its eye, [B,k] positions, the likest last, nearest to the query: RICES
        (Yang et al. 2022; appendix A.2)."""
        one, many = (F.normalize(self.vision.tower.pooled(x).float(), dim=-1) for x in (image, supports))  # type: ignore[union-attr,operator]
        return (one @ many.T).topk(k, 1).indices.flip(1)


def looking_llama(*, vocab: int, length: int, width: int, depth: int, heads: int, hidden: int, source: int, every: int) -> CausalLM.Config:
    """A LLaMA with a gated layer before each `every`-th block, the first included."""
    attn = Attention.Config(bias="", rope=Rotary.Config())
    plain = PreNorm.Config(attn=attn, mlp=GatedMLP.Config(hidden=hidden), norm=RMSNorm.Config())
    gated = GatedBlock.Config(attn=attn, mlp=GatedMLP.Config(hidden=hidden), norm=RMSNorm.Config(), look=GatedCrossAttention.Config(source=source))
    blocks = tuple(gated if i % every == 0 else plain for i in range(depth))
    return CausalLM.Config(vocab=vocab, length=length, head=Linear.Config(into=width, out=vocab, std=0.02),
                           body=Transformer.Config(width=width, depth=depth, heads=heads, block=blocks, norm=RMSNorm.Config()))


WORDS = ("language.embed.*", "language.head.*", "language.body.norm.*", "language.body.blocks.[0-9].[!l]*")      # all but the gated layers
NEW = ("resampler.*", "language.body.blocks.*.look.*")


def tiny() -> Preset:
    """The convolutional tower of `clip` at 64 px, 16 latents, a LLaMA of 4 layers that learns to read first; episodes of 3 captioned scenes."""
    eye = PatchTokens.Config(tower=ClipResNet.Config(image_size=64, layers=(1, 1, 1), base=32, heads=4, dim=192), layer=None)
    language = looking_llama(vocab=1008, length=192, width=192, depth=4, heads=4, hidden=512, source=192, every=1)
    layer = ResamplerLayer.Config(attn=Attention.Config(bias="", head_width=48))
    optim = Optim(lr=2e-3, betas=(0.9, 0.98), warmup=20, clip=1.0)
    return Preset(
        data="scenes", starts=(Start(into="vision.tower", from_="clip", take="vision"),),
        config=Flamingo.Config(vision=eye, language=language, image_token=1000,
                               resampler=PerceiverResampler.Config(width=192, depth=2, heads=4, latents=16, layer=layer)),
        feed=Feed(image=ImagePlan(size=64), text=EpisodePlan(vocab=1000, length=128, image=1000, shots=3, p_next=0.5)),
        stages=(Stage(name="read", objective=Flamingo.read, trainable=WORDS, steps=300, batch_size=32, optim=optim),
                Stage(name="speak", objective=Flamingo.speak, trainable=NEW, weights=(("interleaved", 1.0), ("pairs", 0.2)), steps=500,
                      batch_size=32, optim=optim.but(lr=1e-3))))


def paper() -> Preset:
    """Flamingo-3B: gated layers before every block, M3W pages of at most 5 pictures and 256 tokens, constant lr, 500,000 steps (table 3). Pictures
    are of 224 px, as CLIP reads them, in place of the 320 of the paper's tower.

    The language model is not taught to read here and no Start brings it, so a run of this preset keeps one that is frozen at random; a taught one
    comes with a whole Idefics by `polysense convert --layout idefics` from its published files."""
    body = Transformer.Config(width=1024, depth=24, heads=16, block=PreNorm.Config(attn=Attention.Config(), mlp=MLP.Config(act="quick_gelu")))
    eye = ViT.Config(image_size=224, patch=14, body=body, patch_bias="", norm_pre=LayerNorm.Config(), dense="values", std=None)
    language = looking_llama(vocab=32064, length=2048, width=2048, depth=24, heads=16, hidden=5504, source=1024, every=1)
    return Preset(
        data="m3w+align+ltip+vtp", starts=(Start(into="vision.tower", from_="clip", take="vision", preset="paper"),),
        config=Flamingo.Config(vision=PatchTokens.Config(tower=eye, layer=-1), language=language, image_token=32000,
                               resampler=PerceiverResampler.Config(width=1024, depth=6, heads=16, latents=64)),
        feed=Feed(image=ImagePlan(size=224), text=EpisodePlan(kind="llama", vocab=32000, length=256, image=32000, shots=5, p_next=0.5)),
        stages=(Stage(name="speak", objective=Flamingo.speak, trainable=NEW, weights=(("interleaved", 1.0), ("pairs", 0.2)), steps=500_000,
                      batch_size=64, optim=Optim(lr=1e-4, weight_decay=0.1, warmup=5000, schedule="constant", clip=1.0)),))


def paper_videos() -> Preset:
    """`paper` where captioned videos, 8 frames of each, stand in place of captioned pictures: their term counts 0.03 (section 2.4)."""
    return paper().but(data="m3w+vtp", **{"feed.video": VideoPlan(frames=8), "stages.0.weights": (("interleaved", 1.0), ("videos", 0.03))})
