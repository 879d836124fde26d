"""The essence of supervised pre-training and transfer (BiT, linear probes)."""
import pytest
import torch
import torch.nn.functional as F
from fake import fake_batch

import polysense
from polysense.base.catalogue import preset_of
from polysense.train.fit import fit
from polysense.train.optim import make_optimizer

recipe = polysense.load("supervised")


def test_one_label_is_softmax_and_many_are_sigmoid_cross_entropy():
    torch.manual_seed(0)
    system = preset_of("supervised").config.but(**{"head.out": 3}).build()
    batch = fake_batch(preset_of("supervised"), ("image", "label", "tags"))
    logits = system.classify(batch["image"])
    torch.testing.assert_close(system.losses(batch)["label"], F.cross_entropy(logits, batch["label"]))
    torch.testing.assert_close(system.tag_losses(batch)["tags"], F.binary_cross_entropy_with_logits(logits, batch["tags"]) * 3)


def test_larger_tasks_learn_from_mixtures_of_two_pictures():
    torch.manual_seed(0)
    system, heard = preset_of("supervised").config.but(**{"head.out": 3}).build(), []
    system.backbone.register_forward_pre_hook(lambda m, args: heard.append(args[0]))
    system.register_forward_hook(lambda m, args, out: heard.append(out))
    image, label = torch.stack([torch.zeros(3, 32, 32), torch.ones(3, 32, 32)]), torch.tensor([2, 0])
    shares = []
    for _ in range(12):
        heard.clear()
        loss = system.mixed_losses({"image": image, "label": label})["label"]
        (mixed, logits), share = heard, float(1 - heard[0][0, 0, 0, 0])                      # how much of the first, black, is left of it
        torch.testing.assert_close(mixed[1], torch.full((3, 32, 32), share), msg="one share a batch")
        each = [F.cross_entropy(logits[i:i + 1], label[[i]]) * share + F.cross_entropy(logits[i:i + 1], label[[1 - i]]) * (1 - share) for i in (0, 1)]
        torch.testing.assert_close(loss, torch.stack(each).mean())
        shares.append(share)
    assert any(0 < s < 1 for s in shares), "something was mixed"


def test_one_rule_for_all_transfers():
    steps = {"transfer": (500, recipe.Supervised.losses), "transfer_medium": (10_000, recipe.Supervised.mixed_losses),
             "transfer_large": (20_000, recipe.Supervised.mixed_losses)}
    for name, (many, objective) in steps.items():
        preset = preset_of("supervised", name)
        stage, start = preset.stages[0], preset.starts[0]
        assert (stage.steps, stage.objective, stage.batch_size, stage.optim.lr, stage.optim.weight_decay) == (many, objective, 512, 0.003, 0.0)
        assert preset.config.backbone == preset_of("supervised", start.preset).config.backbone and preset.config.head.std == 0
    assert recipe.MIXED == 0.1


def test_the_head_of_a_transfer_starts_at_zero():
    for name in ("finetune", "linear"):
        assert torch.equal(preset_of("supervised", name).config.build().classify(torch.randn(2, 3, 64, 64)), torch.zeros(2, 10))


def test_a_linear_probe_leaves_every_tensor_of_the_tower_bit_identical():
    preset = preset_of("supervised", "linear")
    for backbone in (preset.config.backbone, preset_of("resnet").config.backbone):
        torch.manual_seed(0)
        config = preset.config.but(backbone=backbone).but(**{"head.into": backbone.width})
        system = config.build()
        before = {k: v.clone() for k, v in system.state_dict().items()}
        batch = {**fake_batch(preset, ("image",)), "label": torch.arange(4)}
        list(fit(system, preset.stages[0].but(**{"steps": 3, "batch_size": 4, "optim.warmup": 0}), [batch] * 3))
        moved = {k for k, v in system.state_dict().items() if not torch.equal(v, before[k])}
        assert moved == {"head.weight", "head.bias"}, "frozen means frozen: batch-norm statistics too"


def test_fine_tuning_moves_lower_layers_slower_and_every_parameter_once():
    preset = preset_of("supervised", "finetune")
    system = preset.config.build()
    optimizer = make_optimizer(system, preset.stages[0].optim)
    rate, seen = {}, []
    names = {id(p): n for n, p in system.named_parameters()}
    for group in optimizer.param_groups:
        for p in group["params"]:
            rate[names[id(p)]] = group["lr"]
            seen.append(id(p))
    assert sorted(seen) == sorted(names), "each parameter exactly once"
    order = [rate["backbone.stem.conv.weight"], *(rate[f"backbone.stages.{i}.0.conv1.weight"] for i in range(4)), rate["head.weight"]]
    assert order == sorted(set(order)), order
    assert order[1] / order[2] == pytest.approx(0.75)


def test_paper_is_bit_m_with_group_norm_and_standardised_weights():
    with torch.device("meta"):
        system = preset_of("supervised", "paper").config.build()
    assert not any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in system.modules())
    assert sum(isinstance(m, torch.nn.GroupNorm) for m in system.modules()) > 90


def test_weight_standardisation_ignores_shift_and_scale_of_a_filter():
    from polysense.towers.bit import Bit
    torch.manual_seed(0)
    tower, image = Bit.Config(layers=(1, 1), base=32).build().eval(), torch.randn(2, 3, 32, 32)
    before = tower(image).pooled
    with torch.no_grad():
        tower.stages[0][0].conv2.weight.mul_(3).add_(0.7)
    torch.testing.assert_close(tower(image).pooled, before, rtol=1e-3, atol=1e-4)
