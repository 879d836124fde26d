"""Towers against timm, transformers and open_clip: toy sizes, random weights everywhere."""
import pytest
import torch
import torch.nn.functional as F
from reference import pour, reference, renamed, shake

from polysense.nn.block import PostNorm, PreNorm
from polysense.nn.head import TanhHead
from polysense.nn.init import ClipInit
from polysense.nn.mlp import MLP
from polysense.nn.norm import LayerNorm
from polysense.nn.residual import Basic, Bottleneck, Project, Stem
from polysense.nn.transformer import Transformer
from polysense.towers.bert import Bert
from polysense.towers.bit import Bit, PreActivation
from polysense.towers.clip_resnet import ClipResNet
from polysense.towers.clip_text import ClipText
from polysense.towers.resnet import ResNet
from polysense.towers.vit import ViT

TIMM_VIT = [(r"^cls_token", "cls"), (r"^pos_embed", "position"), (r"^patch_embed\.proj", "patch"), (r"^head\..*", ""),
            (r"^(blocks|norm)\.", r"body.\1."), (r"attn\.proj", "attn.out"), (r"fc1", "up"), (r"fc2", "down")]
TV_RESNET = [(r"^(conv|bn)1\.", r"stem.\1."), (r"^stem\.bn", "stem.norm"), (r"^layer(\d)", lambda m: f"stages.{int(m[1]) - 1}"),
             (r"bn(\d)", r"norm\1"), (r"downsample\.0", "shortcut.conv"), (r"downsample\.1", "shortcut.norm"), (r"^fc\..*", "")]
OPENAI_BODY = [(r"^.*resblocks", "body.blocks"), (r"ln_(\d)", r"norm\1"), (r"attn\.in_proj_", "attn.qkv."), (r"out_proj", "out"),
               (r"c_fc", "up"), (r"c_proj", "down")]


def assert_close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * max(1.0, b.abs().max().item()), (a - b).abs().max()


def body(width: int = 32, depth: int = 2, heads: int = 4, act: str = "gelu", eps: float = 1e-6) -> Transformer.Config:
    norm = LayerNorm.Config(eps=eps)
    return Transformer.Config(width=width, depth=depth, heads=heads, block=PreNorm.Config(norm=norm, mlp=MLP.Config(act=act)), norm=norm)


@torch.no_grad()
def test_vit_equals_timm_after_each_block():
    timm = reference("timm.models.vision_transformer")
    theirs = shake(timm.VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=3))
    ours = pour(ViT.Config(image_size=32, patch=8, body=body()).build(), renamed(theirs.state_dict(), TIMM_VIT, 32))
    image = torch.randn(2, 3, 32, 32)
    assert_close(ours(image).tokens, theirs.forward_features(image))
    for a, b in zip(ours.features(image), theirs.forward_intermediates(image, norm=False, return_prefix_tokens=True, output_fmt="NLC",
                                                                       intermediates_only=True), strict=True):
        assert_close(a, torch.cat([b[1], b[0]], 1))
    logits = F.linear(ours(image).pooled, theirs.head.weight, theirs.head.bias)
    assert_close(logits, theirs(image))


@torch.no_grad()
def test_vit_equals_transformers():
    hf = reference("transformers")
    config = hf.ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, image_size=32, patch_size=8)
    theirs = shake(hf.ViTModel(config, add_pooling_layer=False))
    rules = [(r"^embeddings\.cls_token", "cls"), (r"^embeddings\.position_embeddings", "position"), (r"^.*projection", "patch"),
             (r"^layers", "body.blocks"), (r"attention\.(\w)_proj", r"attn.\1"), (r"attn\.o\.", "attn.out."), (r"layernorm_before", "norm1"),
             (r"layernorm_after", "norm2"), (r"^layernorm", "body.norm"), (r"fc1", "up"), (r"fc2", "down")]
    ours = pour(ViT.Config(image_size=32, patch=8, body=body(eps=1e-12)).build(), renamed(theirs.state_dict(), rules))
    image = torch.randn(2, 3, 32, 32)
    assert_close(ours(image).tokens, theirs(image).last_hidden_state)
    wide = torch.randn(2, 3, 48, 32)
    assert ours(wide).tokens.shape == theirs(wide, interpolate_pos_encoding=True).last_hidden_state.shape


@pytest.mark.parametrize("depths", [(2, 2, 2, 2), (1, 2, 1, 1)])
@torch.no_grad()
def test_resnet_basic_equals_timm(depths: tuple[int, ...]):
    timm = reference("timm.models.resnet")
    theirs = shake(timm.ResNet(timm.BasicBlock, depths, num_classes=3))
    assert_resnet(theirs, ResNet.Config(layers=depths, block=Basic.Config()))


@torch.no_grad()
def test_resnet_bottleneck_equals_timm():
    timm = reference("timm.models.resnet")
    theirs = shake(timm.ResNet(timm.Bottleneck, (2, 1, 1, 2), num_classes=3))
    assert_resnet(theirs, ResNet.Config(layers=(2, 1, 1, 2)))


def assert_resnet(theirs, config: ResNet.Config) -> None:
    ours = pour(config.build(), renamed(theirs.state_dict(), TV_RESNET))
    image = torch.randn(2, 3, 64, 64)
    maps = theirs.forward_intermediates(image, intermediates_only=True)[-4:]
    for a, b in zip(ours.features(image), maps, strict=True):
        assert_close(a, b)
    assert_close(ours(image).pooled, maps[-1].mean((2, 3)))


@pytest.mark.parametrize("stride_in", ["1x1", "3x3"])
@torch.no_grad()
def test_resnet_stride_places_equal_transformers(stride_in: str):
    hf = reference("transformers")
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[32, 64], depths=[2, 2], downsample_in_bottleneck=stride_in == "1x1")
    theirs = shake(hf.ResNetModel(config))
    rules = [(r"^embedder\.embedder\.", "stem."), (r"convolution", "conv"), (r"normalization", "norm"),
             (r"^encoder\.stages\.(\d)\.layers", r"stages.\1"), (r"layer\.(\d)\.(conv|norm)", lambda m: f"{m[2]}{int(m[1]) + 1}")]
    ours = pour(ResNet.Config(layers=(2, 2), base=8, block=Bottleneck.Config(stride_in=stride_in)).build(), renamed(theirs.state_dict(), rules))
    image = torch.randn(2, 3, 64, 64)
    assert_close(ours.features(image)[-1], theirs(image).last_hidden_state)
    assert_close(ours(image).pooled, theirs(image).pooler_output.flatten(1))


@torch.no_grad()
def test_bit_equals_transformers():
    hf = reference("transformers")
    theirs = shake(hf.BitModel(hf.BitConfig(embedding_size=16, hidden_sizes=[64, 128], depths=[2, 2], num_groups=8)))
    rules = [(r"^embedder\.convolution", "stem.conv"), (r"^encoder\.stages\.(\d)\.layers", r"stages.\1"), (r"downsample", "shortcut")]
    block = PreActivation.Config().but(**{"norm.groups": 8})
    ours = pour(Bit.Config(layers=(2, 2), base=16, block=block).build(), renamed(theirs.state_dict(), rules))
    image = torch.randn(2, 3, 64, 64)
    assert_close(ours.features(image)[-1], theirs(image).last_hidden_state)


@torch.no_grad()
def test_hybrid_vit_patches_the_map_of_a_convolutional_tower():
    stem = Bit.Config(layers=(1, 1), base=8).but(**{"block.norm.groups": 4})
    vit = ViT.Config(image_size=64, patch=2, body=body(), stem=stem).build().eval()
    image = torch.randn(2, 3, 64, 64)
    assert vit.position.shape == (1, 1 + 4 * 4, 32) and vit.patch.in_channels == 64 and vit(image).tokens.shape == (2, 17, 32)
    assert_close(vit.embed(image)[0][:, 1:], F.conv2d(vit.stem.features(image)[-1], vit.patch.weight, vit.patch.bias,
                 2).flatten(2).mT + vit.position[:, 1:])


def clip_reference(vision: dict, act: str = "gelu"):
    open_clip = reference("open_clip")
    return shake(open_clip.CLIP(embed_dim=16, vision_cfg=vision, quick_gelu=act == "quick_gelu",
                                text_cfg={"context_length": 16, "vocab_size": 100, "width": 32, "heads": 4, "layers": 2}))


@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
@torch.no_grad()
def test_clip_vit_and_text_equal_open_clip(act: str):
    theirs = clip_reference({"layers": 2, "width": 32, "image_size": 32, "patch_size": 8, "head_width": 8}, act)
    state = theirs.state_dict()
    rules = [(r"^visual\.", ""), (r"^class_embedding", "cls"), (r"^positional_embedding", "position"), (r"^conv1", "patch"), (r"^ln_pre", "norm_pre"),
             (r"^ln_post", "body.norm"), *OPENAI_BODY, (r"^proj$", "")]
    vision = ViT.Config(image_size=32, patch=8, body=body(act=act, eps=1e-5), norm_pre=LayerNorm.Config(), patch_bias="")
    ours = pour(vision.build(), renamed({k: v for k, v in state.items() if k.startswith("visual.")}, rules, 32))
    image = torch.randn(2, 3, 32, 32)
    assert_close(ours(image).pooled @ state["visual.proj"], theirs.encode_image(image))

    rules = [(r"^positional_embedding", "position"), (r"^token_embedding", "embed"), (r"^ln_final", "body.norm"), *OPENAI_BODY,
             (r"^(text_projection|logit_scale)$", "")]
    text = ClipText.Config(vocab=100, length=16, body=body(act=act, eps=1e-5))
    ours = pour(text.build(), renamed({k: v for k, v in state.items() if not k.startswith("visual.")}, rules, 32))
    ids = torch.randint(1, 99, (3, 16))
    ids[torch.arange(3), torch.tensor([4, 9, 15])] = 99
    assert_close(ours(ids).pooled @ state["text_projection"], theirs.encode_text(ids))


@torch.no_grad()
def test_clip_resnet_equals_open_clip():
    theirs = clip_reference({"layers": [1, 2, 1, 1], "width": 8, "image_size": 64, "head_width": 64})
    rules = [(r"^visual\.", ""), (r"^(conv|bn)([123])\.", lambda m: f"stem.{int(m[2]) - 1}.{m[1]}."), (r"^(stem\.\d)\.bn", r"\1.norm"),
             *TV_RESNET[2:], (r"^attnpool\.positional_embedding", "pool.position"),
             (r"^attnpool\.(\w)_proj", r"pool.\1"), (r"^pool\.c\.", "pool.out.")]
    ours = pour(ClipResNet.Config(layers=(1, 2, 1, 1), base=8, heads=4, dim=16, image_size=64).build(),
                renamed({k: v for k, v in theirs.state_dict().items() if k.startswith("visual.")}, rules))
    image = torch.randn(2, 3, 64, 64)
    assert_close(ours(image).pooled, theirs.encode_image(image))


@torch.no_grad()
def test_bert_equals_transformers_with_padding_and_segments():
    hf = reference("transformers")
    config = hf.BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
                           max_position_embeddings=12)
    theirs = shake(hf.BertModel(config))
    rules = [(r"^embeddings\.word_embeddings", "embed"), (r"^embeddings\.position_embeddings\.weight", "position"),
             (r"^embeddings\.token_type_embeddings", "kind"), (r"^embeddings\.LayerNorm", "norm_pre"), (r"^encoder\.layer", "body.blocks"),
             (r"attention\.self\.(\w)\w+", r"attn.\1"), (r"attention\.output\.dense", "attn.out"), (r"attention\.output\.LayerNorm", "norm1"),
             (r"intermediate\.dense", "mlp.up"), (r"output\.dense", "mlp.down"), (r"output\.LayerNorm", "norm2"), (r"^pooler\.dense", "pooler.pre")]
    norm = LayerNorm.Config(eps=1e-12)
    ours = pour(Bert.Config(vocab=50, length=12, norm_pre=norm, pooler=TanhHead.Config(into=32, hidden=32),
                            body=Transformer.Config(width=32, depth=2, heads=4, block=PostNorm.Config(norm=norm), norm=None)).build(),
                renamed(theirs.state_dict(), rules))
    ids, kind = torch.randint(1, 50, (2, 10)), torch.randint(0, 2, (2, 10))
    ids[1, 6:] = 0
    got, want = ours(ids, kind=kind), theirs(ids, attention_mask=(ids != 0).long(), token_type_ids=kind)
    assert_close(got.tokens[0], want.last_hidden_state[0])
    assert_close(got.tokens[1, :6], want.last_hidden_state[1, :6])
    assert_close(got.pooled, want.pooler_output)


def test_published_sizes():
    def count(config) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in config.build().parameters())
    wide = Transformer.Config(width=768, depth=12, heads=12)
    assert count(ViT.Config(image_size=224, patch=16, body=wide)) + 768 * 1000 + 1000 == 86_567_656
    assert count(ResNet.Config()) + 2048 * 1000 + 1000 == 25_557_032
    assert count(ResNet.Config(layers=(3, 4, 6, 3), block=Basic.Config())) + 512 * 1000 + 1000 == 21_797_672
    assert count(ResNet.Config(layers=(2, 2, 2, 2), block=Basic.Config())) + 512 * 1000 + 1000 == 11_689_512
    post = Transformer.Config(width=768, depth=12, heads=12, block=PostNorm.Config(), norm=None)
    pooler = TanhHead.Config(into=768, hidden=768)
    assert count(Bert.Config(vocab=30522, length=512, body=post, norm_pre=LayerNorm.Config(), pooler=pooler)) == 109_482_240
    vision = count(ViT.Config(image_size=224, patch=32, body=wide, norm_pre=LayerNorm.Config(), patch_bias="")) + 768 * 512
    text = count(ClipText.Config(vocab=49408, length=77, body=Transformer.Config(width=512, depth=12, heads=8, init=ClipInit.Config()))) + 512 * 512
    assert vision + text + 1 == 151_277_313                                           # CLIP ViT-B/32
    assert count(ClipResNet.Config()) + text + 512 * (1024 - 512) + 1 == 102_007_137  # CLIP RN50
    assert Project.Config().stride_in == "1x1" and Stem.Config().total_stride == 4
