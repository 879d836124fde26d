"""EVA's essence (Fang et al. 2023)."""
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import polysense
from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.train.fit import fit
from polysense.train.starts import carry

recipe = polysense.load("eva")
TOY = {"config.encoder.body.width": 24, "config.encoder.body.depth": 2, "config.encoder.body.heads": 2, "config.encoder.body.block.mlp.hidden": 48,
       "config.target.tower.body.depth": 2, "config.target.tower.body.width": 48, "config.target.head.into": 48, "config.target.head.out": 16,
       "config.target.width": 16}


@pytest.fixture()
def eva():
    torch.manual_seed(0)
    return preset_of("eva").but(**TOY).config.build().eval()


@pytest.fixture()
def image():
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def test_a_plain_vit_with_learned_positions_and_keys_without_bias(eva):
    assert eva.encoder.position.requires_grad and eva.encoder.position.shape == (1, 65, 24) and not hasattr(eva.encoder.body, "relative")
    for block in eva.encoder.body.blocks:
        assert block.scale1 is None and block.attn.k.bias is None and block.attn.q.bias is not None and block.attn.v.bias is not None
    with torch.device("meta"):
        big = preset_of("eva", "paper").config
        tower = big.encoder.build()
    assert sum(p.numel() for p in tower.parameters()) == pytest.approx(1.011e9, rel=1e-3) and big.encoder.body.block.mlp.hidden == 6144
    torch.manual_seed(0)
    made = recipe.tower(28, 14, 96, 3, 3, 384).body.build()
    for i, block in enumerate(made.blocks):
        assert block.attn.out.weight.std().item() == pytest.approx(0.88 * 0.015 / (2 * (i + 1)) ** 0.5, rel=0.1)


def test_105_of_256_patches_are_hidden_block_by_block_and_named_in_clips_width():
    paper = preset_of("eva", "paper").config
    torch.manual_seed(0)
    counts = paper.sampler.build()(100, (16, 16)).mask.sum(1)
    assert counts.max() == 105 and counts.float().mean() > 95 and (paper.sampler.hidden, paper.sampler.least) == (105, 16)
    assert paper.target.width == paper.target.head.out == 768 and paper.target.tower.patch == paper.encoder.patch == 14
    assert paper.target.size is None, "teacher and student read the very same crop, normalised alike"
    assert preset_of("eva", "paper").feed.image.mean == (0.48145466, 0.4578275, 0.40821073) and paper.target.norm == "none"


def test_target_is_clip_behind_norm_and_projection_and_loss_is_the_cosine(eva, image):
    torch.manual_seed(2)
    masking = eva.masking(image)
    truth = F.linear(eva.target.tower(image).tokens[:, 1:], eva.target.head.weight)[masking.mask]
    said, aimed = eva.pairs(image, masking)
    torch.testing.assert_close(aimed, truth)
    assert said.shape == (int(masking.mask.sum()), 16)
    torch.manual_seed(2)
    torch.testing.assert_close(eva.losses({"image": image})["features"], 1 - (F.normalize(said, dim=-1) * F.normalize(truth, dim=-1)).sum(-1).mean())


def test_hidden_pixels_change_the_target_alone(eva, image):
    masking = eva.masking(image)
    hidden = masking.mask.view(-1, 1, 8, 8).repeat_interleave(8, 2).repeat_interleave(8, 3)
    other = torch.where(hidden, torch.randn_like(image), image)
    (said, truth), (again, moved) = eva.pairs(image, masking), eva.pairs(other, masking)
    assert torch.equal(said, again) and not torch.equal(truth, moved)


def test_it_learns_from_a_frozen_teacher_and_lends_its_kernels(eva, image):
    before = {k: v.clone() for k, v in eva.target.state_dict().items()}
    steps = list(fit(eva, preset_of("eva").stages[0].but(steps=15, **{"optim.warmup": 1}), iter([{"image": image}] * 15)))
    assert steps[-1].total < steps[0].total - 0.02 and all(torch.equal(v, before[k]) for k, v in eva.target.state_dict().items())
    assert eva.patches(10).shape == (24, 3, 10, 10)
    torch.testing.assert_close(eva.patches(8), eva.encoder.patch.weight.detach())
    with pytest.raises(UserError, match="one at least"):
        eva.patches(0)


def test_fine_tuning_takes_the_encoder_over_and_puts_the_norm_behind_the_mean_of_the_patches(eva, image):
    plan = preset_of("eva", "tiny_finetune").but(**{k.replace("encoder", "backbone"): v for k, v in TOY.items() if ".encoder." in k},
                                                 **{"config.head.into": 24})
    torch.manual_seed(0)
    tuned = plan.config.build()
    carry(plan.starts[0], SimpleNamespace(system=eva), tuned)
    ours = tuned.backbone.state_dict()
    assert all(torch.equal(v, ours[k]) for k, v in eva.encoder.state_dict().items() if not k.startswith("body.norm."))
    assert not any(k.startswith("body.norm.") for k in ours) and float(tuned.head.out.weight.detach().std()) < 1e-4
    tuned.eval()
    mean = eva.encoder.body.layers(eva.encoder.embed(image)[0])[-1][:, 1:].mean(1)
    torch.testing.assert_close(tuned.classify(image), tuned.head.out(F.layer_norm(mean, (24,), eps=1e-6)))
    batch = {"image": image, "label": torch.tensor([0, 1, 14])}
    steps = list(fit(tuned, plan.stages[0].but(steps=10, **{"optim.warmup": 0}), iter([batch] * 10)))
    assert steps[-1].total < steps[0].total


def test_fine_tuning_goes_over_imagenet_21k_as_released():
    first, then, larger, clip = (preset_of("eva", p) for p in ("intermediate", "finetune", "finetune_560", "clip_finetune"))
    assert [(s.from_, s.preset, s.take) for s in first.starts] == [("eva", "paper", "encoder")]
    assert {(s.from_, s.preset) for s in then.starts} == {("eva", "intermediate")}
    assert {s.into for s in then.starts} == {"backbone", "head.norm"}, "the norm behind the mean goes on, the classes are others"
    of = [(p.stages[0].batch_size, p.stages[0].optim.lr, p.stages[0].optim.layer_decay, p.config.smoothing, p.config.mix.cutmix)
          for p in (first, then, larger, clip)]
    assert of == [(4096, 1e-4, 0.85, 0.1, 1.0), (512, 3e-5, 0.95, 0.3, 0.0), (512, 3e-5, 0.95, 0.3, 0.0), (1024, 3e-5, 0.9, 0.3, 0.0)]
    assert not any(p.config.mix.mixup for p in (first, then, larger, clip))
    assert first.stages[0].ema is None and then.stages[0].ema == 0.9999 and all(p.feed.train_image.erase == 0 for p in (first, then))
    assert [p.feed.image.size for p in (first, then, larger, clip)] == [224, 336, 560, 224]
    assert clip.feed.image.mean != then.feed.image.mean == (0.485, 0.456, 0.406)
    with torch.device("meta"):
        assert sum(p.numel() for p in then.config.build().parameters()) == pytest.approx(1.013e9, rel=1e-3)
