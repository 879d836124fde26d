"""ViT's essence (Dosovitskiy et al. 2021); towers and parity are tested on their own floors."""
import pytest
import torch
import torch.nn.functional as F

import polysense
from polysense.base.catalogue import preset_of
from polysense.nn.head import LinearBias
from polysense.nn.position import fit_positions

recipe = polysense.load("vit")


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return preset_of("vit").config.build().eval()


def test_base_16_with_1000_classes_has_the_published_size():
    config = preset_of("vit", "finetune").config.but(backbone=recipe.tower(224, 16, 768, 12, 12))
    with torch.device("meta"):
        assert sum(p.numel() for p in config.build().parameters()) == 86_567_656


def test_sequence_is_class_token_then_patches_plus_learned_positions(vit):
    image = torch.randn(2, 3, 32, 32)
    tokens, grid = vit.backbone.embed(image)
    conv = F.conv2d(image, vit.backbone.patch.weight.view(96, 3, 4, 4), vit.backbone.patch.bias, stride=4).flatten(2).transpose(1, 2)
    want = torch.cat([vit.backbone.cls.expand(2, -1, -1), conv], 1) + vit.backbone.position
    torch.testing.assert_close(tokens, want, rtol=1e-4, atol=1e-5)
    assert grid == (8, 8) and vit.backbone.position.shape == (1, 65, 96)


def test_blocks_are_pre_norm_with_exact_gelu(vit):
    block, x = vit.backbone.body.blocks[0], torch.randn(2, 5, 96)
    y = x + block.attn(block.norm1(x))
    want = y + F.linear(F.gelu(F.linear(block.norm2(y), block.mlp.up.weight, block.mlp.up.bias)), block.mlp.down.weight, block.mlp.down.bias)
    torch.testing.assert_close(block(x), want, rtol=1e-4, atol=1e-5)


def test_representation_is_the_normed_class_token(vit):
    image = torch.randn(2, 3, 32, 32)
    last = vit.backbone.features(image)[-1]
    torch.testing.assert_close(vit.backbone(image).pooled, vit.backbone.body.norm(last)[:, 0])


def test_only_positions_know_where_a_patch_stands(vit):
    image = torch.randn(1, 3, 32, 32)
    patches = image.unfold(2, 4, 4).unfold(3, 4, 4).reshape(1, 3, 64, 4, 4)[:, :, torch.randperm(64)]
    shuffled = patches.reshape(1, 3, 8, 8, 4, 4).permute(0, 1, 2, 4, 3, 5).reshape(1, 3, 32, 32)
    with torch.no_grad():
        assert not torch.allclose(vit.classify(image), vit.classify(shuffled), atol=1e-4)
        kept = vit.backbone.position.clone()
        vit.backbone.position.zero_()
        torch.testing.assert_close(vit.classify(image), vit.classify(shuffled), rtol=1e-4, atol=1e-4)
        vit.backbone.position.copy_(kept)


def test_another_resolution_interpolates_patch_positions_and_leaves_the_class_position(vit):
    position = vit.backbone.position
    torch.testing.assert_close(fit_positions(position, 1, (8, 8), (8, 8)), position)
    bigger = fit_positions(position, 1, (12, 12), (8, 8))
    assert bigger.shape == (1, 145, 96) and torch.equal(bigger[:, :1], position[:, :1])
    assert vit.classify(torch.randn(1, 3, 48, 48)).shape == (1, 10)


def test_pre_training_head_has_one_tanh_layer_and_the_fine_tuning_head_starts_at_zero():
    head = preset_of("vit", "paper").config.head.but(into=8, hidden=6, out=5).build()
    x = torch.randn(3, 8)
    torch.testing.assert_close(head(x), head.out(torch.tanh(head.pre(x))))
    config = preset_of("vit").config.but(head=LinearBias.Config(into=96, out=7, std=preset_of("vit", "finetune").config.head.std))
    assert torch.equal(config.build().classify(torch.randn(2, 3, 32, 32)), torch.zeros(2, 7))


def test_a_subset_of_patches_can_be_read(vit):
    image = torch.randn(2, 3, 32, 32)
    everything = torch.arange(64).expand(2, -1)
    torch.testing.assert_close(vit.backbone(image, keep=everything).pooled, vit.backbone(image).pooled)
    assert vit.backbone(image, keep=everything[:, :10]).tokens.shape == (2, 11, 96)


@pytest.mark.parametrize("eps", [1e-5, 1e-6, 1e-12])
def test_norm_epsilon_is_in_the_configuration(eps):
    tower = recipe.tower(32, 16, 32, 1, 2, eps=eps).build()
    assert tower.body.norm.eps == tower.body.blocks[0].norm1.eps == eps
