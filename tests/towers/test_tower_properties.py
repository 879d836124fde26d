"""What the catalogue says of the towers: invariances, pooling, padding, errors."""
import pytest
import torch

from polysense.base.errors import UserError
from polysense.base.spec import from_dict
from polysense.nn.block import PostNorm
from polysense.nn.norm import LayerNorm, freeze_norm
from polysense.nn.residual import CIFAR_STEM, Basic, Pad
from polysense.nn.rotary import Rotary
from polysense.nn.transformer import Transformer
from polysense.towers.bert import Bert
from polysense.towers.bit import Bit
from polysense.towers.clip_resnet import AttentionPool, ClipResNet
from polysense.towers.clip_text import ClipText
from polysense.towers.resnet import ResNet
from polysense.towers.vit import ViT

BODY = Transformer.Config(width=16, depth=2, heads=2)
VIT = ViT.Config(image_size=16, patch=4, body=BODY)
TEXT = ClipText.Config(vocab=50, length=77, body=BODY, end=2)
BERT = Bert.Config(vocab=50, length=20, norm_pre=LayerNorm.Config(),
                   body=Transformer.Config(width=16, depth=2, heads=2, block=PostNorm.Config(), norm=None))
CIFAR = ResNet.Config(layers=(1, 1, 1), base=8, block=Basic.Config(), stem=CIFAR_STEM)
CLIP_RN = ClipResNet.Config(layers=(1, 1, 1, 1), base=8, heads=4, dim=16, image_size=64)
BIT = Bit.Config(layers=(1, 1), base=8).but(**{"block.norm.groups": 4})
ROPE = {"body.block.attn.rope": Rotary.Config()}
IMAGE_TOWERS = [VIT, VIT.but(dense="values"), VIT.but(pool="mean", prefix=0), CIFAR, CLIP_RN, BIT]


@pytest.mark.parametrize("config", [*IMAGE_TOWERS, TEXT, BERT], ids=lambda c: type(c).__qualname__)
def test_every_tower_keeps_the_promises_of_the_floor(config):
    tower = config.build()
    if hasattr(config, "image_size") or hasattr(config, "channels"):
        given = torch.randn(2, 3, *[getattr(config, "image_size", 32)] * 2)
        with pytest.raises(UserError, match="channels"):
            tower(given[:, :1])
        dense = tower.dense(given)
        assert dense.ndim == 4 and dense.shape[0] == 2 and dense.shape[-1] == config.width
        assert tower.features(given)
    else:
        given = torch.randint(3, 50, (2, 8))
    out = tower(given)
    assert out.pooled.shape == (2, config.width) and out.tokens.ndim == 3 and tower.width == config.width
    out.pooled.square().sum().backward()
    reached = {n: p.grad is not None and p.grad.isfinite().all() for n, p in tower.named_parameters()}
    assert all(reached.values()) or set(n for n, r in reached.items() if not r) <= {"pooler"}
    assert from_dict(config.to_dict()) == config


@torch.no_grad()
def test_without_positions_the_class_output_ignores_the_order_of_patches():
    tower, image, order = VIT.build(), torch.randn(2, 3, 16, 16), torch.randperm(16)
    shuffled = image.unfold(2, 4, 4).unfold(3, 4, 4).flatten(2, 3)[:, :, order].unflatten(2, (4, 4)).permute(0, 1, 2, 4, 3, 5).reshape(2, 3, 16, 16)
    assert (tower(image).pooled - tower(shuffled).pooled).abs().max() > 1e-4
    tower.position.zero_()
    torch.testing.assert_close(tower(image).pooled, tower(shuffled).pooled, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_kept_patches_carry_their_own_positions():
    tower, image = VIT.build(), torch.randn(2, 3, 16, 16)
    every = torch.arange(16).expand(2, -1)
    torch.testing.assert_close(tower(image, keep=every).tokens, tower(image).tokens)
    torch.testing.assert_close(tower(image, keep=every.flip(1)).pooled, tower(image).pooled, atol=1e-5, rtol=1e-4)
    some = torch.tensor([[3, 9, 0], [15, 1, 2]])
    tokens, whole = tower.embed(image, some)[0], tower.embed(image)[0]
    assert tokens.shape == (2, 4, 16)
    for b in range(2):
        assert torch.equal(tokens[b, 1:], whole[b, 1 + some[b]])


@torch.no_grad()
def test_vit_pools_and_dense_features():
    image = torch.randn(2, 3, 16, 16)
    tower = VIT.build()
    out = tower(image)
    assert torch.equal(out.pooled, out.tokens[:, 0])
    assert torch.equal(tower.dense(image).flatten(1, 2), out.tokens[:, 1:])
    mean = VIT.but(pool="mean").build()
    torch.testing.assert_close(mean(image).pooled, mean.dense(image).mean((1, 2)))
    assert VIT.but(pool="none", prefix=2).build()(image).pooled.shape == (2, 18, 16)
    local = VIT.but(dense="values").build()
    local.load_state_dict(tower.state_dict())
    block, before = local.body.blocks[-1], local.body.layers(local.embed(image)[0], stop=-1)[-1]
    alone = block.attn(block.norm1(before), mask=torch.eye(17, dtype=torch.bool)[None])
    torch.testing.assert_close(local.dense(image).flatten(1, 2), local.body.norm(alone)[:, 1:], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_another_size_is_read_with_interpolated_positions():
    tower = VIT.build()
    assert tower(torch.randn(1, 3, 24, 16)).tokens.shape == (1, 1 + 24, 16) and tower.dense(torch.randn(1, 3, 24, 16)).shape == (1, 6, 4, 16)
    with pytest.raises(UserError, match="18x16 pixels"):
        tower(torch.randn(1, 3, 18, 16))
    for wrong in (VIT.but(image_size=18), VIT.but(pool="max"), VIT.but(prefix=0), VIT.but(dense="keys")):
        with pytest.raises(UserError):
            wrong.build()


@pytest.mark.parametrize("end", [2, None])
@torch.no_grad()
def test_what_follows_the_end_of_a_text_changes_nothing(end: int | None):
    tower = TEXT.but(end=end).build()
    final = 49 if end is None else end
    text = torch.randint(3, 48, (3, 10))
    for row, at in enumerate((4, 9, 6)):
        text[row, at:] = 0
        text[row, at] = final
    trimmed = tower(text)
    for filler in (0, final, 1):                                                     # zeros as OpenAI, the end token as transformers
        padded = torch.full((3, 77), filler)
        padded[:, :10] = text
        torch.testing.assert_close(tower(padded).pooled, trimmed.pooled, atol=1e-5, rtol=1e-4)
    assert trimmed.mask.sum(1).tolist() == [5, 10, 7]
    assert torch.equal(trimmed.pooled[0], trimmed.tokens[0, 4])
    changed = text.clone()
    changed[0, 1] = 3 + (changed[0, 1] - 2) % 40
    assert not torch.allclose(tower(changed).pooled[0], trimmed.pooled[0])
    with pytest.raises(UserError, match="78 tokens"):
        tower(torch.ones(1, 78, dtype=torch.long))


@torch.no_grad()
def test_bert_looks_both_ways_but_never_at_padding():
    tower, text = BERT.build(), torch.randint(1, 50, (2, 6))
    padded = torch.cat([text, torch.zeros(2, 4, dtype=torch.long)], 1)
    torch.testing.assert_close(tower(padded).tokens[:, :6], tower(text).tokens, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(tower(padded, mask=padded != 0).pooled, tower(padded).pooled)
    later = text.clone()
    later[:, -1] = 1 + later[:, -1] % 48
    assert not torch.allclose(tower(later).pooled, tower(text).pooled)
    segments = torch.tensor([[0, 0, 0, 1, 1, 1]]).expand(2, -1)
    assert not torch.allclose(tower(text, kind=segments).pooled, tower(text).pooled)
    with pytest.raises(UserError, match="21 tokens"):
        tower(torch.ones(1, 21, dtype=torch.long))


@torch.no_grad()
def test_attention_pooling_with_uniform_attention_and_identity_maps_is_the_mean():
    pool = AttentionPool.Config(width=8, heads=2, grid=3).build()
    last = torch.randn(2, 8, 3, 3)
    assert torch.allclose((pool.tokens(last) - pool.position)[:, 0], last.mean((2, 3)), atol=1e-6)
    for m in (pool.q, pool.k):
        m.weight.zero_()
    for m in (pool.v, pool.out):
        m.weight.copy_(torch.eye(8))
    pool.position.zero_()
    torch.testing.assert_close(pool.pool(last), last.mean((2, 3)))
    torch.testing.assert_close(pool.values(pool.tokens(last))[:, 1:], last.flatten(2).mT)


@torch.no_grad()
def test_clip_resnet_reads_other_sizes_that_divide():
    tower = CLIP_RN.build().eval()
    assert tower(torch.randn(1, 3, 96, 64)).pooled.shape == (1, 16) and tower.dense(torch.randn(1, 3, 96, 64)).shape == (1, 3, 2, 16)
    with pytest.raises(UserError, match="multiples of 32"):
        tower(torch.randn(1, 3, 80, 64))
    assert all(b[-1].norm3.weight.abs().max() == 0 for b in tower.stages)


def test_frozen_norm_leaves_a_resnets_statistics_untouched():
    tower = freeze_norm(CIFAR.build()).train()
    before = {k: v.clone() for k, v in tower.state_dict().items() if "running" in k}
    tower(torch.randn(4, 3, 16, 16)).pooled.sum().backward()
    assert before and all(torch.equal(v, tower.state_dict()[k]) for k, v in before.items())
    assert tower.stem.conv.weight.grad is not None


def test_depth_leaves_the_gradient_of_a_residual_net_alone_and_ruins_a_plain_one():
    def gradient(depth: int, config: Basic.Config) -> float:
        n = (depth - 2) // 6
        torch.manual_seed(0)
        tower = ResNet.Config(layers=(n, n, n), base=4, block=config, stem=CIFAR_STEM).build()
        pooled = tower(torch.randn(8, 3, 16, 16)).pooled
        torch.nn.functional.cross_entropy(pooled, torch.arange(8)).backward()
        return tower.stem.conv.weight.grad.norm().item()
    residual = gradient(56, Basic.Config(shortcut=Pad.Config())) / gradient(20, Basic.Config(shortcut=Pad.Config()))
    plain = gradient(56, Basic.Config(shortcut=None)) / gradient(20, Basic.Config(shortcut=None))
    assert 0.1 < residual < 10 and not 0.1 < plain < 10


SHORT = [VIT, VIT.but(pool="mean"), TEXT, TEXT.but(end=None), TEXT.but(**ROPE), BERT, CIFAR]


@pytest.mark.parametrize("config", SHORT, ids=lambda c: type(c).__qualname__)
def test_the_short_way_to_the_pooled_feature_is_exact_with_its_gradient(config):
    tower = config.build()
    given = torch.randn(3, 3, 16, 16) if hasattr(config, "channels") else torch.tensor([[1, 9, 8, 2, 0, 0], [1, 5, 2, 0, 0, 0], [1, 4, 9, 9, 9, 2]])
    tower.eval()
    long, short = tower(given).pooled, tower.pooled(given)
    torch.testing.assert_close(short, long, atol=1e-5, rtol=1e-4)
    probe = torch.randn_like(long)
    one, other = (torch.autograd.grad((y * probe).sum(), list(tower.parameters()), retain_graph=True) for y in (long, short))
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)
