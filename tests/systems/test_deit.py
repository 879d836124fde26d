"""DeiT's essence (Touvron et al. 2021)."""
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from fake import fake_batch

import polysense
from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.objectives.distil import soft_distillation
from polysense.systems.backbone import vit
from polysense.train.fit import fit
from polysense.train.starts import carry

recipe = polysense.load("deit")
NEEDS = ("views", "label")


@pytest.fixture
def deit():
    torch.manual_seed(0)
    return preset_of("deit").config.build()


@pytest.mark.parametrize("name, count", [("paper", 87_338_192), ("deit_tiny", 5_910_800)])
def test_published_sizes(name, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in preset_of("deit", name).config.build().parameters()) == count, "the teacher is no parameter"


@torch.no_grad()
def test_two_tokens_with_positions_of_their_own_end_in_two_heads(deit):
    deit.eval()
    assert deit.vision.cls.shape == (1, 2, 96) and deit.vision.position.shape == (1, 49 + 2, 96)
    image = torch.randn(2, 3, 28, 28)
    tokens = deit.vision(image).tokens
    one, two = deit.both(image)
    torch.testing.assert_close(one, F.linear(tokens[:, 0], deit.head.weight, deit.head.bias))
    torch.testing.assert_close(two, F.linear(tokens[:, 1], deit.head_distilled.weight, deit.head_distilled.bias))
    torch.testing.assert_close(deit.classify(image), (one + two) / 2)
    assert not torch.allclose(tokens[:, 0], tokens[:, 1], atol=1e-3), "the tokens are no clones"
    deit.vision.cls[:, 1] = 0                                             # without what the second token brings
    assert not torch.allclose(deit.classify(image), (one + two) / 2, atol=1e-4)


def test_hard_distillation_is_equation_3_on_the_same_pictures(deit):
    deit.train()
    deit.mix.eval()
    batch = fake_batch(preset_of("deit"), NEEDS)
    seen = []
    deit.teacher.module.register_forward_pre_hook(lambda m, x: seen.append(x[0]))
    deit.vision.register_forward_pre_hook(lambda m, x: seen.append(x[0]))
    for block in deit.vision.body.blocks:
        block.drop_path = 0.0
    losses = deit.losses(batch)
    assert torch.equal(*seen), "the teacher sees the very picture that the student sees"
    image, label = batch["views"].flatten(0, 1), batch["label"].repeat_interleave(3)
    one, two = deit.both(image)
    torch.testing.assert_close(losses["label"], F.cross_entropy(one, label, label_smoothing=0.1) / 2)
    torch.testing.assert_close(losses["distil"], F.cross_entropy(two, deit.teacher(image).argmax(1)) / 2)


def test_mixed_labels_belong_to_the_true_label_alone(deit):
    torch.manual_seed(0)
    config = preset_of("deit").config.but(**{"mix.mixup": 0.8})
    system = config.build().train()
    batch, heard = fake_batch(preset_of("deit"), NEEDS), {}
    system.teacher.module.register_forward_hook(lambda m, x, y: heard.update(teacher=y, image=x[0]))
    _, _, target, teacher = system.taught(batch)
    assert float(target.max(1).values.min()) < 1 and torch.equal(heard["teacher"], teacher)
    torch.manual_seed(0)
    assert not torch.equal(heard["image"], batch["views"].flatten(0, 1)), "the teacher sees the mixture"


def test_both_terms_agree_where_the_teacher_is_the_label_and_the_heads_are_tied(deit):
    deit.eval()
    config = preset_of("deit").config.but(smoothing=0.0)
    system = config.build().eval()
    with torch.no_grad():
        system.vision.cls[:, 1] = system.vision.cls[:, 0]
        system.vision.position[:, 1] = system.vision.position[:, 0]
        system.head_distilled.load_state_dict(system.head.state_dict())
    batch = fake_batch(preset_of("deit"), NEEDS)
    system.teacher.forward = lambda image: F.one_hot(batch["label"].repeat_interleave(3), 10).float()
    losses = system.losses(batch)
    torch.testing.assert_close(losses["label"], losses["distil"], rtol=1e-5, atol=1e-6)


def test_soft_distillation_against_a_slow_twin_and_both_divisors(deit):
    student, teacher = torch.randn(4, 7), torch.randn(4, 7) * 2
    total = 0.0
    for s, t in zip(student / 3, teacher / 3):
        p, q = t.softmax(0), s.softmax(0)
        total += float((p * (p.log() - q.log())).sum()) * 9
    assert float(soft_distillation(student, teacher)) == pytest.approx(total / 28, rel=1e-4)
    assert float(soft_distillation(student, teacher, per="batch")) == pytest.approx(total / 4, rel=1e-4)
    with pytest.raises(ValueError, match="number"):
        soft_distillation(student, teacher, per="class")
    deit.eval()
    batch = fake_batch(preset_of("deit"), NEEDS)
    losses = deit.soft_losses(batch)
    one, two = deit.both(batch["views"].flatten(0, 1))
    torch.testing.assert_close(losses["distil"], 0.1 * soft_distillation(two, deit.teacher(batch["views"].flatten(0, 1))))
    torch.testing.assert_close(losses["label"], 0.9 * F.cross_entropy(one, batch["label"].repeat_interleave(3), label_smoothing=0.1))


def test_the_teacher_gets_no_gradient_and_its_statistics_stand_still(deit):
    preset = preset_of("deit")
    before = {k: v.clone() for k, v in deit.teacher.state_dict().items()}
    assert any("running_mean" in k for k in before) and not list(deit.teacher.parameters())
    list(fit(deit, preset.stages[0].but(**{"steps": 2, "batch_size": 4, "optim.warmup": 0}), [fake_batch(preset, NEEDS)] * 2))
    assert all(torch.equal(v, before[k]) for k, v in deit.teacher.state_dict().items())
    assert not deit.teacher.module.training


def test_without_a_teacher_it_says_so_and_learns_labels_alone():
    system = preset_of("deit").config.but(teacher=None).build()
    batch = fake_batch(preset_of("deit"), NEEDS)
    with pytest.raises(UserError, match=r"config\.teacher"):
        system.losses(batch)
    assert set(system.alone(batch)) == {"label", "second"}


def test_a_start_from_a_vit_inserts_one_token_and_one_row(deit):
    torch.manual_seed(1)
    plain = vit.tower(28, 4, 96, 4, 3).build()
    own = deit.state_dict()["vision.cls"].clone(), deit.state_dict()["vision.position"].clone()
    start = preset_of("deit").starts[0].but(into="vision", from_="vit", take="")
    carry(start, SimpleNamespace(system=plain), deit)
    assert torch.equal(deit.vision.cls[:, :1], plain.cls) and torch.equal(deit.vision.cls[:, 1:], own[0][:, 1:])
    assert torch.equal(deit.vision.position[:, :1], plain.position[:, :1]) and torch.equal(deit.vision.position[:, 2:], plain.position[:, 1:])
    assert torch.equal(deit.vision.position[:, 1], own[1][:, 1])


def test_the_teacher_comes_from_a_trained_resnet(deit):
    from polysense.systems.backbone import resnet
    taught = resnet.tiny().config.build()
    carry(preset_of("deit").starts[0], SimpleNamespace(system=taught), deit)
    image = torch.randn(2, 3, 28, 28)
    torch.testing.assert_close(deit.teacher(image), taught.eval().classify(image))


def test_the_recipe_that_it_needs():
    plan = preset_of("deit", "paper")
    view, stage = plan.feed.views[0], plan.stages[0]
    assert len(plan.feed.views) == 3 and len(set(plan.feed.views)) == 1, "each picture three times, augmented independently"
    assert (view.operations, view.magnitude, view.vary, view.erase) == (2, 9.0, 0.5, 0.25)
    assert (plan.config.mix.mixup, plan.config.mix.cutmix, plan.config.smoothing) == (0.8, 1.0, 0.1)
    assert plan.config.vision.body.drop_path == 0.1 and stage.ema == 0.99996 and (stage.optim.name, stage.optim.weight_decay) == ("adamw", 0.05)
    weight = plan.config.vision.but(body=preset_of("deit").config.vision.body, image_size=28, patch=4).build().body.blocks[0].mlp.up.weight
    weight = weight.detach()
    assert float(weight.abs().max()) <= 0.04 and weight.std().item() == pytest.approx(0.0176, rel=0.1), "a normal cut off at two deviations"
