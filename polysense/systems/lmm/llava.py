"""LLaVA: a frozen CLIP, one matrix, and a language model that is taught to follow instructions about what it sees.

    H_v = W g(X_v)          g: the patch tokens of CLIP ViT-L/14 after the last block but one; they stand where `<image>` stood   (equation 1)
    p(X_a | X_v, X_q) = prod_i p(x_i | H_v, X_q,<i, X_a,<i)                                                                        (equation 3)

A conversation is: system message, end, then for each turn Human: question, end, Assistant: reply, end. The picture stands before or after
the first question, at random; only replies and the ends behind them are learned. Stage 1 (align) trains W alone: a caption answers one of
several ways to ask for a brief description. Stage 2 (instruct) trains W and the whole language model on conversations of several turns.
Both leave CLIP as it is. The tiny preset begins by teaching its language model to read (stage read), which the paper buys ready-made.
"""
from dataclasses import dataclass

from polysense.archetypes.visual_lm import VisualLM
from polysense.base.card import Card
from polysense.base.system import Batch, ChatPlan, Feed, ImagePlan, Losses, Optim, Preset, Stage, Start, final
from polysense.connectors.linear import LinearConnector
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
    name="LLaVA", paper="Liu et al., Visual Instruction Tuning, NeurIPS 2023", arxiv="2304.08485", year=2023,
    says="Talks about a picture: CLIP's features through one matrix into a language model, trained on conversations about pictures.",
    needs=("image", "brief", "brief_reply", "chat", "chat_reply"), can=("generate_text",), official="haotian-liu/LLaVA",
)

PARAMETERS = 7_045_826_560                   # ViT-L/14 303,179,776; W 4,198,400; Vicuna-7B 6,738,415,616 and 4 more rows of vocabulary

SYSTEM = "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to " \
         "the human's questions."
weights = {"official": llava_hf.OFFICIAL}

BRIEFLY = ("describe the image briefly.", "what is in this picture?", "give a short description of the image.", "say in one sentence what you see.",
           "summarise the picture.")


@final
class LLaVA(VisualLM):
    @dataclass(frozen=True, kw_only=True)
    class Config(VisualLM.Config):
        pass

    def read(self, batch: Batch) -> Losses:
        """What a language model knows before it sees: conversations, half of them without their pictures, half with words of the caption in the
        picture's place, from which also the caption is told."""
        chat, said, half = batch["chat"], (batch["brief"], batch["brief_reply"] & (batch["brief"] != self.end)), max(1, len(batch["chat"]) // 2)
        return Losses(blind=self.blind_nll(chat[:half]), told=self.told_nll(chat[-half:], *(x[-half:] for x in said)),
                      brief=self.told_nll(batch["brief"], *said))

    def align(self, batch: Batch) -> Losses:
        """One turn: an instruction to describe the picture, the caption replies."""
        return Losses(language=self.nll(batch["image"], batch["brief"], batch["brief_reply"]))

    def instruct(self, batch: Batch) -> Losses:
        return Losses(language=self.nll(batch["image"], batch["chat"], batch["chat_reply"]))


def tiny() -> Preset:
    """One matrix between the convolutional tower of `clip` at 64 px (16 places) and a LLaMA of 4 layers that learns to read first."""
    eye = PatchTokens.Config(tower=ClipResNet.Config(image_size=64, layers=(1, 1, 1), base=32, heads=4, dim=192), layer=None)
    language = llama(vocab=1008, length=224, width=192, depth=4, heads=4, hidden=512)
    optim = Optim(lr=2e-3, betas=(0.9, 0.98), warmup=20, clip=1.0)
    text = ChatPlan(vocab=1000, length=160, image=1000, user="human:", stop="all", place="either", turns=4, briefly=BRIEFLY, describe=BRIEFLY[0])
    return Preset(
        data="scenes:qa", starts=(Start(into="vision.tower", from_="clip", take="vision"),),
        config=LLaVA.Config(vision=eye, connector=LinearConnector.Config(into=192, out=192), language=language, image_token=1000),
        feed=Feed(image=ImagePlan(size=64), text=text),
        stages=(Stage(name="read", objective=LLaVA.read, trainable=("language.*",), steps=300, batch_size=64, optim=optim),
                Stage(name="align", objective=LLaVA.align, trainable=("connector.*",), steps=150, batch_size=64, optim=optim),
                Stage(name="instruct", objective=LLaVA.instruct, trainable=("connector.*", "language.*"), steps=500, batch_size=64,
                      optim=optim.but(lr=1e-3))))


def paper() -> Preset:
    """Vicuna-7B; CC3M filtered to 595K pairs, one pass of batch 128; then 158K conversations, three passes of batch 32 (section 4.2).

    Vicuna is not taught to read here and no Start brings it, so a run of this preset begins with a language model at random; a taught one comes with
    a whole LLaVA by `polysense convert --layout official`, from files that hold CLIP's weights, too."""
    body = Transformer.Config(width=1024, depth=24, heads=16, block=PreNorm.Config(attn=Attention.Config(), mlp=MLP.Config(act="quick_gelu")))
    eye = ViT.Config(image_size=224, patch=14, body=body, patch_bias="", norm_pre=LayerNorm.Config(), dense="values", std=None)
    text = ChatPlan(kind="llama", vocab=32003, length=2048, image=32003, system=SYSTEM, user="Human:", assistant="Assistant:", stop="all",
                    place="either", turns=16, briefly=BRIEFLY, describe=BRIEFLY[0])
    return Preset(
        data="llava", starts=(Start(into="vision.tower", from_="clip", take="vision", preset="paper"),),
        config=LLaVA.Config(vision=PatchTokens.Config(tower=eye), connector=LinearConnector.Config(into=1024, out=4096), image_token=32003,
                            language=llama(vocab=32004, length=2048, width=4096, depth=32, heads=32, hidden=11008)),
        feed=Feed(image=ImagePlan(size=224), text=text),
        stages=(Stage(name="align", objective=LLaVA.align, trainable=("connector.*",), steps=595_000 // 128, batch_size=128,
                      optim=Optim(lr=2e-3, warmup=139)),
                Stage(name="instruct", objective=LLaVA.instruct, trainable=("connector.*", "language.*"), steps=3 * 158_000 // 32, batch_size=32,
                      optim=Optim(lr=2e-5, warmup=444), checkpoint_activations=True)))
