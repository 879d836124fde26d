"""LLaVA-1.5: what made LLaVA good was little: two layers for one, more pixels, and telling the model how to answer.

The patch tokens of a frozen CLIP (ViT-L/14 at 336 px, after the last block but one, without class token) pass a two-layer perceptron and
stand in the text where `<image>` stood:

    H_v = W2 gelu(W1 g(X_v)),   p(X_a | X_v, X_q) = prod_i p(x_i | H_v, X_q, x_<i)                                      (sections 3.2 to 3.4)

Stage 1 (align) trains the connector alone on captions. Stage 2 (instruct) trains connector and language model on conversations: several
questions about one picture are merged into one, short answers are asked for with "Answer the question using a single word or phrase.",
pictures are padded to squares, and only replies count in the loss. `hd` reads a picture in tiles, encoded one by one, and as a whole
besides (section 4.2). The tiny preset begins by teaching its language model to read (stage read), which the paper buys ready-made.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from polysense.archetypes.visual_lm import VisualLM
from polysense.base.card import Card
from polysense.base.system import Batch, ChatPlan, Feed, ImagePlan, Losses, Optim, Part, Preset, Spec, Stage, Start, final
from polysense.connectors.mlp import MLPConnector
from polysense.nn.attention import Attention
from polysense.nn.block import PreNorm
from polysense.nn.mlp import MLP
from polysense.nn.norm import LayerNorm
from polysense.nn.transformer import Transformer
from polysense.towers.causal_lm import llama
from polysense.towers.clip_resnet import ClipResNet
from polysense.towers.patch_tokens import PatchTokens
from polysense.towers.vit import ViT
from polysense.weights import llava_hf

card = Card(
    name="LLaVA-1.5", paper="Liu et al., Improved Baselines with Visual Instruction Tuning, CVPR 2024", arxiv="2310.03744", year=2024,
    says="Talks about a picture: a stronger LLaVA with a two-layer connector, more pixels and prompts that say how to answer.",
    needs=("image", "text", "chat", "chat_reply"), can=("generate_text",), official="haotian-liu/LLaVA",
)

PARAMETERS = 7_063_427_072                   # ViT-L/14 at 336, connector, Vicuna-7B with 64 more rows of vocabulary: llava-hf/llava-1.5-7b-hf

weights = {"hf": llava_hf.LAYOUT, "official": llava_hf.OFFICIAL_1_5}

SYSTEM = "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to " \
         "the human's questions."
SHORT = "Answer the question using a single word or phrase."


class Tiles(Part):
    """Reads a picture of `across` x `across` tiles: each tile by itself, merged into one grid row by row, then the whole picture, shrunk."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        eye: Spec
        across: int = 2

        @property
        def width(self) -> int:
            return self.eye.width  # type: ignore[attr-defined,no-any-return]

    def __init__(self, c: Config):
        super().__init__()
        self.eye, self.across = c.eye.build(), c.across

    def forward(self, image: Tensor) -> Tensor:
        """image [B,3,k*S,k*S] -> [B,(k*k+1)*P,D]: the merged grid of k*k*P tokens, then the P of the whole."""
        k, side = self.across, image.shape[-1] // self.across
        tiles = image.unfold(2, side, side).unfold(3, side, side).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)      # [B*k*k,3,S,S], row by row
        whole = F.interpolate(image, (side, side), mode="bicubic", antialias=True, align_corners=False)
        seen = self.eye(torch.cat([tiles, whole]))
        n = round(seen.shape[1] ** 0.5)
        grid = seen[:len(tiles)].unflatten(1, (n, n)).unflatten(0, (len(image), k, k)).transpose(2, 3)         # [B,k,n,k,n,D]
        return torch.cat([grid.flatten(1, 4), seen[len(tiles):]], 1)


@final
class LLaVA15(VisualLM):
    @dataclass(frozen=True, kw_only=True)
    class Config(VisualLM.Config):
        pass

    def read(self, batch: Batch) -> Losses:
        """What a language model knows before it sees: conversations, half of them without their pictures, half with words of the caption in the
        picture's place, from which also the caption is told."""
        chat, text, half = batch["chat"], batch["text"], max(1, len(batch["chat"]) // 2)
        shown, learned = self.shown(text)
        said = learned & (shown != self.end)
        return Losses(blind=self.blind_nll(chat[:half]), told=self.told_nll(chat[-half:], shown[-half:], said[-half:]),
                      caption=self.told_nll(shown, shown, said))

    def shown(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Captions [B,L] -> `<image>` caption [B,L+1], and what is learned of it."""
        place = torch.full_like(text[:, :1], self.image_token)
        shown = torch.cat([text[:, :1], place, text[:, 1:]], 1)
        learned = shown != self.pad
        learned[:, :2] = False
        return shown, learned

    def align(self, batch: Batch) -> Losses:
        """`<image>` caption, nothing else: the caption is learned."""
        return Losses(language=self.nll(batch["image"], *self.shown(batch["text"])))

    def instruct(self, batch: Batch) -> Losses:
        return Losses(language=self.nll(batch["image"], batch["chat"], batch["chat_reply"]))


def tiny() -> Preset:
    """Two layers between the convolutional tower of `clip` at 64 px (16 places) and a LLaMA of 4 layers that learns to read first."""
    eye = PatchTokens.Config(tower=ClipResNet.Config(image_size=64, layers=(1, 1, 1), base=32, heads=4, dim=192), layer=None)
    language = llama(vocab=1008, length=224, width=192, depth=4, heads=4, hidden=512)
    optim = Optim(lr=2e-3, betas=(0.9, 0.98), warmup=20, clip=1.0)
    return Preset(
        data="scenes:qa", starts=(Start(into="vision.tower", from_="clip", take="vision"),),
        config=LLaVA15.Config(vision=eye, connector=MLPConnector.Config(into=192, out=192), language=language, image_token=1000),
        feed=Feed(image=ImagePlan(size=64), text=ChatPlan(vocab=1000, length=160, image=1000, turns=4)),
        stages=(Stage(name="read", objective=LLaVA15.read, trainable=("language.*",), steps=300, batch_size=64, optim=optim),
                Stage(name="align", objective=LLaVA15.align, trainable=("connector.*",), steps=150, batch_size=64, optim=optim),
                Stage(name="instruct", objective=LLaVA15.instruct, trainable=("connector.*", "language.*"), steps=500, batch_size=64,
                      optim=optim.but(lr=1e-3))))


def clip_eye(size: int) -> PatchTokens.Config:
    """CLIP's ViT-L/14, read after its last block but one."""
    body = Transformer.Config(width=1024, depth=24, heads=16, block=PreNorm.Config(attn=Attention.Config(), mlp=MLP.Config(act="quick_gelu")))
    return PatchTokens.Config(tower=ViT.Config(image_size=size, patch=14, body=body, patch_bias="", norm_pre=LayerNorm.Config(), dense="values",
                                               std=None), layer=-2)


def _paper(stage: Stage, fit: str, starts: tuple[Start, ...]) -> Preset:
    """One stage on Vicuna-7B and CLIP's ViT-L/14 at 336 px."""
    text = ChatPlan(kind="llama", vocab=32000, length=2048, image=32000, system=SYSTEM, user="USER:", assistant="ASSISTANT:", turns=16, short=SHORT,
                    describe="Provide a one-sentence caption for the provided image.")
    return Preset(
        data="llava_1_5", starts=(Start(into="vision.tower", from_="clip", take="vision", preset="paper_336"), *starts), stages=(stage,),
        config=LLaVA15.Config(vision=clip_eye(336), connector=MLPConnector.Config(into=1024, out=4096), image_token=32000,
                              language=llama(vocab=32064, length=4096, width=4096, depth=32, heads=32, hidden=11008, eps=1e-5)),
        feed=Feed(image=ImagePlan(size=336, fit=fit), text=text))


ALIGNED = Start(into="connector", from_="llava_1_5", take="connector", preset="paper_align")


def paper_align() -> Preset:
    """Stage 1: one pass over 558K captions in batches of 256; pictures are cut square as CLIP's were (table 9)."""
    return _paper(Stage(name="align", objective=LLaVA15.align, trainable=("connector.*",), steps=558_000 // 256, batch_size=256,
                        optim=Optim(lr=1e-3, warmup=65)), "crop", ())


def paper() -> Preset:
    """Stage 2 on the connector of stage 1: one pass over 665K conversations in batches of 128; pictures are padded to squares (table 9).

    Vicuna is not taught to read here and no Start brings it, so a run of this preset begins with a language model at random; a taught one comes with
    a whole LLaVA-1.5 by `polysense convert --layout hf` from its published files."""
    return _paper(Stage(name="instruct", objective=LLaVA15.instruct, trainable=("connector.*", "language.*"), steps=665_000 // 128, batch_size=128,
                        optim=Optim(lr=2e-5, warmup=156), checkpoint_activations=True), "pad", (ALIGNED,))


def hd() -> Preset:
    """LLaVA-1.5-HD: 2 x 2 tiles of 224 px and the whole (section 4.2)."""
    base = paper()
    config = base.config.but(vision=Tiles.Config(eye=clip_eye(224)))
    return base.but(config=config, starts=(Start(into="vision.eye.tower", from_="clip", take="vision", preset="paper"), ALIGNED)).but(
        **{"feed.image.size": 448})
