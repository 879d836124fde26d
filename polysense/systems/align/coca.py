"""CoCa: one model that compares pictures with texts and captions them, trained from scratch by both at once.

A causal text decoder is cut in the middle. Its first half reads words alone, and a learned token behind them becomes the text's feature; its second
half reads the same words and, by cross-attention, the picture. So one forward pass gives both losses:

    L = l_con (CE(rows) + CE(columns)) / 2  +  l_cap (- mean_t log p(w_t | w_<t, image)),      l_con = 1, l_cap = 2          (equations 4 and 5)

No word sees the token behind, and the token sees no padding. Pictures are read by attentional poolers: 256 queries make what the decoder reads, one
query the feature; the latter reads what the former made ("cascade"), or both read the ViT ("parallel"), or, in the weights of open_clip, one pooler
does both ("single"). Labels are texts like others: `told` puts them into prompts. For a new task the encoder stays and a new pooler is learned;
`fuse` is the last state of the decoder, for answers about a picture.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polysense.archetypes.dual_encoder import DualEncoder
from polysense.base.card import Card
from polysense.base.errors import UserError
from polysense.base.system import Batch, ImagePlan, Losses, Optim, Preset, PromptPlan, Spec, Stage, ViewPlan, final
from polysense.base.telling import Mixed, ToldFeed, Triplets
from polysense.base.telling import Telling as Told
from polysense.connectors.attentional_pool import AttentionalPooler, PooledViT
from polysense.decoders.split import ClosedText, Telling, alternating
from polysense.nn.attention import Attention
from polysense.nn.block import PreNorm
from polysense.nn.head import Linear
from polysense.nn.mlp import MLP
from polysense.nn.transformer import Transformer
from polysense.objectives.contrastive import info_nce
from polysense.towers.clip import body, image_tower
from polysense.towers.decoding import Greedy
from polysense.towers.shapes import plain_vit
from polysense.towers.vit import ViT
from polysense.weights import coca_open_clip

card = Card(
    name="CoCa", paper="Yu et al., CoCa: Contrastive Captioners are Image-Text Foundation Models, TMLR 2022", arxiv="2205.01917", year=2022,
    says="One model for search and zero-shot labels on the one hand, and captions on the other.",
    needs=("image", "text"), can=("encode_image", "encode_text", "encode_patches", "generate_text"), official=None,
)

PARAMETERS = 2_212_247_553                   # published as 2.1B: 1B of the image and 1.1B of the text side, without the poolers

weights = {"open_clip": coca_open_clip.LAYOUT}


@final
class CoCa(DualEncoder):
    @dataclass(frozen=True, kw_only=True)
    class Config(DualEncoder.Config):
        vision: PooledViT.Config             # type: ignore[assignment]
        text: ClosedText.Config              # type: ignore[assignment]
        decoder: Transformer.Config          # the second half: its blocks read a source
        words: Linear.Config                 # [D -> V]
        start: int = 1
        end: int = 2

    def __init__(self, c: Config):
        super().__init__(c)
        self.decoder, self.words = c.decoder.build(), c.words.build()
        self.start, self.end, self.pad = c.start, c.end, c.text.pad

    def read(self, batch: Batch) -> dict[str, Tensor]:
        """One pass: `image`, `text` [B,D] of unit norm; `nll` [B], summed over the words of each caption, and `count` [B], how many they are."""
        text, seen, said = batch["text"], self.vision(batch["image"]), self.text(batch["text"])
        logits, label = self.tell(said.tokens[:, :-1], seen.tokens), text[:, 1:]
        nll = F.cross_entropy(logits.mT.float(), label, ignore_index=self.pad, reduction="none").sum(1)
        return {"image": F.normalize(self.image_head(seen.pooled).float(), dim=-1), "nll": nll, "count": (label != self.pad).sum(1).float(),
                "text": F.normalize(self.text_head(said.pooled).float(), dim=-1)}

    def both(self, seen: dict[str, Tensor]) -> Losses:
        """The mean over all words of the batch, not over captions."""
        return Losses(contrast=info_nce(seen["image"], seen["text"], self.scale), caption=seen["nll"].sum() / seen["count"].sum().clamp(min=1))

    def tell(self, said: Tensor, seen: Tensor) -> Tensor:
        """said [B,L,D] of the first half, seen [B,Q,D] -> logits [B,L,V] of the word after each."""
        return self.words(self.decoder(said, seen, causal=True))

    def fuse(self, image: Tensor, text: Tensor) -> Tensor:
        """image [B,3,H,W], text [B,L] -> [B,D], the decoder's state at the end of the text: what an answer is classified from (section 3.3)."""
        said = self.text(text)
        last = (text != self.pad).sum(1) - 1
        return self.decoder(said.tokens, self.vision(image).tokens, causal=True)[torch.arange(len(text), device=text.device), last]

    @torch.no_grad()
    def generate_text(self, image: Tensor, prompt: Tensor, *, max_new: int, how: Spec | None = None) -> Tensor:
        """image [B,3,H,W], prompt [B,P] how the caption begins, ids right-padded -> new ids [B,N], up to and with the end token."""
        if max_new < 1 or len(prompt) != len(image):
            raise UserError(f"max_new={max_new}, {len(prompt)} prompts for {len(image)} pictures", "ask for at least one word, with one prompt each")
        seen = self.vision(image).tokens
        given = [row[(row != self.start) & (row != self.end) & (row != self.pad)].tolist() for row in prompt]
        out: dict[int, Tensor] = {}
        for words in {tuple(g): None for g in given}:                    # all pictures that are asked alike, at once
            rows = [i for i, g in enumerate(given) if tuple(g) == words]
            text = torch.tensor([[self.start, *words]], device=image.device).expand(len(rows), -1)
            room = min(text.shape[1] + max_new, self.text.length)
            if room <= text.shape[1]:
                raise UserError(f"a beginning of {len(words)} tokens", f"this decoder writes at most {self.text.length - 1}: give a shorter one")
            writer = Telling(self.text, self.decoder, self.words, seen[rows], room)
            most = min(max_new, room - text.shape[1] + 1)                # the last word is written, not read
            new = (how or Greedy.Config()).build()(writer.read(text), writer, max_new=most, end=self.end, pad=self.pad)
            out |= dict(zip(rows, new, strict=True))
        return nn.utils.rnn.pad_sequence([out[i] for i in range(len(given))], batch_first=True, padding_value=self.pad)


Size = tuple[int, int, int]                  # width, depth, heads


def config(tower: ViT.Config, text: Size, queries: int, vocab: int, length: int, order: str = "cascade", mlp: int = 0) -> CoCa.Config:
    """The paper's form: each block of the second half meets words, then the picture, then its MLP."""
    width, depth, heads = text
    block = PreNorm.Config(mlp=MLP.Config(hidden=mlp))
    first = Transformer.Config(width=width, depth=depth, heads=heads, block=block)
    pooler = AttentionalPooler.Config(width=width, heads=heads, queries=queries)
    return CoCa.Config(
        vision=PooledViT.Config(tower=tower, caption=pooler, contrast=pooler.but(queries=1), order=order),
        text=ClosedText.Config(vocab=vocab, length=length, body=first), decoder=first.but(block=block.but(cross=Attention.Config())),
        words=Linear.Config(into=width, out=vocab), image_head=Linear.Config(into=width, out=width), text_head=Linear.Config(into=width, out=width))


def released(size: int, patch: int, image: Size, text: Size, length: int = 76, vocab: int = 49408, order: str = "single") -> CoCa.Config:
    """open_clip's form: CLIP's tower, blocks that read the picture between blocks that do not, each with an MLP."""
    of, (width, depth, heads) = body(*text, act="gelu"), text
    tower, dim = image_tower(size, patch, body(*image, act="gelu")), width
    pooler = AttentionalPooler.Config(width=dim, queries=256)
    if order == "single":
        tower = tower.but(body=tower.body.but(norm=None))
    return CoCa.Config(
        vision=PooledViT.Config(tower=tower.but(dense="tokens"), caption=pooler, order=order,
                                contrast=None if order == "single" else pooler.but(queries=1)),
        text=ClosedText.Config(vocab=vocab, length=length, body=of, sees="released"), start=49406, end=49407,
        decoder=alternating(width, depth, heads, PreNorm.Config(mlp=MLP.Config())).but(init=of.init), words=Linear.Config(into=width, out=vocab),
        image_head=Linear.Config(into=dim, out=dim), text_head=Linear.Config(into=width, out=dim))


WEIGHTS = (("contrast", 1.0), ("caption", 2.0))
LABELS_TOO = (Triplets(), Mixed(shares=(0.5, 0.5)))     # labels as prompts, half of every batch


def tiny() -> Preset:
    """Captioned photographs and labelled ones, which prompts call by their names, half and half in every batch; 16 queries."""
    return Preset(
        data="natural_captions+tiny_imagenet40", config=config(plain_vit(64, 8, 128, 4, 2), (128, 2, 2), 16, 4096, 48),
        feed=ToldFeed(image=ImagePlan(size=64), text=PromptPlan(vocab=4096, length=48), train_image=ViewPlan(size=64, scale=(0.6, 1.0)),
                      told=LABELS_TOO),
        stages=(Stage(objective=CoCa.both, embed=CoCa.read, weights=WEIGHTS, steps=400, batch_size=64,
                      optim=Optim(lr=1e-3, weight_decay=0.01, warmup=40, clip=1.0)),))


def tiny_parallel() -> Preset:
    """Both poolers read the ViT."""
    return tiny().but(**{"config.vision.order": "parallel"})


def _paper(of: CoCa.Config, size: int, data: str, vocab: int, length: int, lr: float = 8e-4, told: tuple[Told, ...] = (),
           optim: str = "adafactor") -> Preset:
    return Preset(
        data=data, config=of, feed=ToldFeed(image=ImagePlan(size=size), text=PromptPlan(vocab=vocab, length=length), train_image=ViewPlan(size=size),
                                            told=told),
        stages=(Stage(objective=CoCa.both, embed=CoCa.read, weights=WEIGHTS, steps=500_000, batch_size=65_536, checkpoint_activations=True,
                      optim=Optim(name=optim, lr=lr, weight_decay=0.01, betas=(0.9, 0.999), schedule="linear", warmup=10_000, clip=1.0)),))


def paper() -> Preset:
    """2.1B at 288 px (table 1 and section 4.1): ViT 40x1408, 18 and 18 layers; Adafactor with decoupled decay."""
    tower = plain_vit(288, 18, 1408, 40, 16)
    tower = tower.but(**{"body.block.mlp.hidden": 6144})
    return _paper(config(tower, (1408, 18, 16), 256, 64_000, 64), 288, "jft3b+align", 64_000, 64, told=LABELS_TOO)


def paper_base() -> Preset:
    """CoCa-Base, published as 383M without the poolers."""
    return _paper(config(plain_vit(288, 18, 768, 12, 12), (768, 12, 12), 256, 64_000, 64), 288, "jft3b+align", 64_000, 64, told=LABELS_TOO)


def vit_b_32() -> Preset:
    """As open_clip trained it on LAION-2B."""
    return _paper(released(224, 32, (768, 12, 12), (512, 12, 8)), 224, "laion2b", 49_408, 76, 1e-3, optim="adamw")


def vit_l_14() -> Preset:
    return _paper(released(224, 14, (1024, 24, 16), (768, 12, 12)), 224, "laion2b", 49_408, 76, 1e-3, optim="adamw")
