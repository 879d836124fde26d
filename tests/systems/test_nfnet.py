"""NFNet's essence (Brock et al. 2021)."""
import pytest
import torch
from reference import reference

import polysense
from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.nn.conv import ScaledConv
from polysense.towers.nfnet import GAMMA, NFNet, NormFree, SqueezeExcite, active
from polysense.train.optim import clip_units, groups, make_optimizer

recipe = polysense.load("nfnet")


def opened(tower, skip: float = 1.0):
    """As after training: no branch is silent."""
    for name, p in tower.named_parameters():
        if name.endswith("skip"):
            p.data.fill_(skip)
    return tower


def test_f6_has_the_published_size_and_shape():
    plan = preset_of("nfnet", "paper").config.backbone
    assert plan.layers == (7, 14, 42, 21) and plan.widths == (256, 512, 1536, 1536) and plan.stem == (16, 32, 64, 128)
    assert plan.stem_strides == (2, 1, 1, 2) and plan.block.group == 128 and plan.last == 3072
    with torch.device("meta"):
        assert sum(p.numel() for p in preset_of("nfnet", "paper").config.build().parameters()) == 438_359_116


def test_at_birth_every_block_without_transition_is_the_identity():
    torch.manual_seed(0)
    tower = preset_of("nfnet").config.backbone.build()
    for stage in tower.stages:
        for block in stage:
            x = torch.randn(2, block.conv1.in_channels, 8, 8)
            if block.shortcut is None:
                assert torch.equal(block(x), x)
            else:
                assert block(x).shape[1] == block.conv4.out_channels and block.skip == 0


def test_a_block_is_the_published_sum_and_its_shortcut_reads_the_scaled_activation():
    torch.manual_seed(0)
    block = opened(NormFree.Config(into=16, width=32, stride=2, beta=0.7, group=8).build(), 0.6)
    x = torch.randn(2, 16, 8, 8)
    y = active(x) * 0.7
    inner = block.conv3(active(block.conv2(active(block.conv1(y)))))
    want = block.shortcut(torch.nn.functional.avg_pool2d(y, 2)) + 0.2 * 0.6 * block.gate(block.conv4(active(inner)))
    torch.testing.assert_close(block(x), want)
    assert [c.kernel_size[0] for c in (block.conv1, block.conv2, block.conv3, block.conv4)] == [1, 3, 3, 1]
    assert [c.groups for c in (block.conv1, block.conv2, block.conv3, block.conv4)] == [1, 2, 2, 1]
    gate = SqueezeExcite.Config(width=8).build()
    torch.nn.init.zeros_(gate.fc2.weight)
    torch.nn.init.zeros_(gate.fc2.bias)
    torch.testing.assert_close(gate(x[:, :8]), x[:, :8], msg="an indifferent gate passes everything on: its sigmoid is doubled")


def test_betas_follow_the_expected_variance():
    betas = NFNet.Config(layers=(1, 2, 3)).betas
    one = 1 / 1.04 ** 0.5
    assert betas[0] == (1.0,) and betas[1] == pytest.approx((one, one)) and betas[2] == pytest.approx((1 / 1.08 ** 0.5, one, 1 / 1.08 ** 0.5))


@torch.no_grad()
def test_the_variance_that_each_block_reads_is_the_predicted_one():
    torch.manual_seed(0)
    # One stage: a 2x2 mean, which loses nothing of a picture, takes three quarters of the variance of white noise.
    plan = NFNet.Config(layers=(7,), widths=(256,), stem=(32, 64, 64, 128), stem_strides=(1, 1, 1, 2), last=64, block=NormFree.Config(group=64))
    tower, seen = opened(plan.build()), []
    for stage in tower.stages:
        for block in stage:
            block.register_forward_pre_hook(lambda m, x: seen.append((float(x[0].var()), m.beta ** -2)))
    tower(torch.randn(8, 3, 32, 32))
    assert [p for _, p in seen] == pytest.approx([1 + 0.04 * k for k in range(7)])
    for found, predicted in seen:
        assert found == pytest.approx(predicted, rel=0.2), seen


def test_filters_are_standardised_over_their_fan_in():
    conv = ScaledConv.Config(into=16, out=8, kernel=3, groups=2).build()
    with torch.no_grad():
        conv.weight.mul_(3).add_(0.5)
        conv.gain.copy_(torch.linspace(0.5, 2, 8))
    w = conv.standardised.flatten(1)
    assert float(w.detach().mean(1).abs().max()) < 1e-6
    torch.testing.assert_close(w.var(1, unbiased=False), conv.gain ** 2 / 72, rtol=1e-3, atol=0)
    assert abs(GAMMA * float(torch.nn.functional.gelu(torch.randn(2_000_000)).std()) - 1) < 5e-3


def test_an_odd_border_lies_below_and_at_the_right():
    conv = ScaledConv.Config(into=1, out=1, kernel=3, stride=2).build()
    x = torch.randn(1, 1, 8, 8)
    want = torch.nn.functional.conv2d(torch.nn.functional.pad(x, (0, 1, 0, 1)), conv.standardised, conv.bias, stride=2)
    torch.testing.assert_close(conv(x), want)


def test_no_sample_sees_another_in_train_mode():
    torch.manual_seed(0)
    system = preset_of("nfnet").config.build().train()
    opened(system.backbone)
    image = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(system.classify(image)[1:2], system.classify(image[1:2]), rtol=1e-4, atol=1e-5)
    assert not list(system.buffers())


def test_stochastic_depth_grows_with_depth_and_leaves_the_shortcut():
    tower = preset_of("nfnet").config.backbone.but(drop_path=0.5).build().train()
    rates = [b.drop_path for s in tower.stages for b in s]
    assert rates[0] == 0 and rates[-1] == 0.5 and rates == sorted(rates)
    torch.manual_seed(0)
    block, x = opened(tower).stages[2][1], torch.randn(64, 96, 2, 2)
    kept = (block(x) == x).flatten(1).all(1).float().mean()
    assert float(kept) == pytest.approx(block.drop_path, abs=0.2)


class Two(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = torch.nn.Linear(6, 5), torch.nn.Linear(5, 3)


def test_adaptive_clipping_shortens_units_and_nothing_else():
    torch.manual_seed(0)
    system, optim = Two(), preset_of("nfnet").stages[0].optim
    optimizer = make_optimizer(system, optim)
    for p in system.parameters():
        p.grad = torch.randn_like(p)
    system.body.weight.grad[0] *= 1e-4                                   # a unit whose gradient is short enough
    before = {n: p.grad.clone() for n, p in system.named_parameters()}
    clip_units(optim, optimizer, lambda t: t)
    grad, was, weight = system.body.weight.grad, before["body.weight"], system.body.weight.detach()
    assert torch.equal(grad[0], was[0])
    torch.testing.assert_close(grad[1:].norm(dim=1), optim.unit_clip * weight[1:].norm(dim=1).clamp(min=1e-3))
    torch.testing.assert_close(torch.nn.functional.cosine_similarity(grad, was), torch.ones(5))
    bias = system.body.bias
    torch.testing.assert_close(bias.grad.norm(), optim.unit_clip * bias.detach().norm())           # a vector is one unit
    assert torch.equal(system.head.weight.grad, before["head.weight"]) and torch.equal(system.head.bias.grad, before["head.bias"])
    reference("timm")
    agc = reference("timm.utils.agc")
    again = {n: torch.nn.Parameter(p.detach().clone()) for n, p in system.named_parameters()}
    for n, p in again.items():
        p.grad = before[n].clone()
    agc.adaptive_clip_grad([again["body.weight"], again["body.bias"]], clip_factor=optim.unit_clip, eps=optim.unit_floor)
    for n in ("body.weight", "body.bias"):
        torch.testing.assert_close(again[n].grad, dict(system.named_parameters())[n].grad, rtol=1e-5, atol=1e-7)


def test_the_loop_clips_before_it_steps():
    from polysense.train.fit import fit
    torch.manual_seed(0)
    plan = preset_of("nfnet")
    stage = plan.stages[0].but(**{"steps": 1, "batch_size": 4, "optim.warmup": 0, "optim.unit_clip": 1e-3, "optim.lr": 1.0,
                                  "optim.weight_decay": 0.0})
    system = plan.config.build()
    opened(system.backbone)
    before = {n: p.detach().clone() for n, p in system.named_parameters()}
    list(fit(system, stage, [{"image": torch.randn(4, 3, 32, 32) * 3, "label": torch.arange(4)}]))
    for name, p in system.named_parameters():
        if not name.startswith("head.") and p.ndim > 1:
            moved = (p.detach() - before[name]).flatten(1).norm(dim=1)
            most = 1.9e-3 * before[name].flatten(1).norm(dim=1).clamp(min=1e-3) * 1.01      # Nesterov's first step is 1.9 gradients long
            assert bool((moved <= most).all()), name


def test_decay_spares_biases_gains_and_skips():
    system = preset_of("nfnet").config.build()
    decayed = {n for g in groups(system, preset_of("nfnet").stages[0].optim) if g["weight_decay"] for n in g["names"]}
    assert decayed and all(n.endswith(".weight") for n in decayed) and len(decayed) == sum(p.ndim > 1 for p in system.parameters())


def test_labels_are_mixed_in_training_and_stay_in_tests():
    torch.manual_seed(0)
    mix = preset_of("nfnet", "paper").config.mix.but(classes=4).build().train()
    image, label = torch.randn(8, 3, 16, 16), torch.arange(8) % 4
    kinds = set()
    for _ in range(12):
        x, target = mix(image, label)
        torch.testing.assert_close(target.sum(1), torch.ones(8))
        own = (x == image).flatten(1).float().mean(1)
        if 0 < float(own[0]) < 1:                                          # CutMix: the share of own pixels is the weight of the own label
            kinds.add("cut")
            share = float(target[0, 0])
            assert float(own[0]) == pytest.approx(share, abs=1e-5)
        elif float(own[0]) == 0:
            kinds.add("mix")
            share = float(target[0, 0])
            torch.testing.assert_close(x, share * image + (1 - share) * image.flip(0), rtol=1e-4, atol=1e-4)
    assert kinds == {"cut", "mix"}
    x, target = mix.eval()(image, label)
    assert torch.equal(x, image) and torch.equal(target.argmax(1), label)


def test_groups_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match="groups of 128"):
        NormFree.Config(into=96, width=96, stride=1, beta=1.0).build()
