"""The protocols of probes: what learns, at which rate, on what, and what must not change."""
import pytest
import torch
from fake import fake_batch

import polysense
from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.base.system import Optim
from polysense.nn.head import BatchLinear
from polysense.train.fit import fit
from polysense.train.optim import groups, make_optimizer
from polysense.train.run import override
from polysense.train.starts import carry

recipe = polysense.load("probes")
FROZEN = ("linear", "sgd", "attentive")


def plan_of(protocol="finetune", encoder="mae"):
    return override(preset_of("probes"), {"encoder": encoder, "protocol": protocol})


def batch_of(plan, n=8):
    return fake_batch(plan, ("image", "label"), n=n)


@pytest.mark.parametrize("protocol, encoder", [("linear", "mae"), ("attentive", "cae"), ("linear", "simclr"), ("sgd", "simclr")])
def test_probing_leaves_every_bit_of_the_encoder(protocol, encoder):
    plan = plan_of(protocol, encoder)
    torch.manual_seed(0)
    model = plan.config.build()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    list(fit(model, plan.stages[0].but(steps=4, batch_size=8, **{"optim.warmup": 0}), iter([batch_of(plan)] * 4)))
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed and all(k.startswith("head.") for k in changed), "parameters and running statistics of the encoder are as they were"
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {n for n, _ in model.named_parameters() if n.startswith("head.")}


def test_rates_fall_along_the_depth_and_norms_and_biases_do_not_decay():
    plan = plan_of()
    model, optim = plan.config.build(), plan.stages[0].optim
    depth = len(model.backbone.body.blocks)
    found = {n: g for g in groups(model, optim) for n in g["names"]}
    for name, group in found.items():
        layer = depth + 1 if name.startswith("head.") else int(name.split(".")[3]) + 1 if ".blocks." in name else 0
        assert group["lr"] == pytest.approx(optim.lr * optim.layer_decay ** (depth + 1 - layer)), name
        if "norm" in name or name.endswith("bias"):
            assert group["weight_decay"] == 0.0, name
    assert found["head.out.weight"]["lr"] == optim.lr and found["head.out.weight"]["weight_decay"] == 0.05
    paper = preset_of("probes", "paper").stages[0]
    assert (paper.optim.layer_decay, paper.batch_size, paper.optim.lr) == (0.65, 1024, pytest.approx(2e-3))


def test_fine_tuning_carries_the_encoder_over_and_scratch_is_the_same_but_for_that():
    plan, alone = plan_of(), plan_of("scratch")
    assert plan.starts and not alone.starts and alone.but(starts=plan.starts) == plan, "equal in everything else"
    encoder = preset_of("mae").config.build()

    class Run:
        system = encoder

    tuned = plan.config.build()
    carry(plan.starts[0], Run(), tuned)
    ours = tuned.backbone.state_dict()
    assert all(torch.equal(v, ours[k]) for k, v in encoder.encoder.state_dict().items() if not k.startswith("body.norm."))
    assert not any(k.startswith("body.norm.") for k in ours), "the norm moves behind the pooling"
    assert float(tuned.head.out.weight.detach().std()) < 1e-4, "the head begins small"
    image = torch.randn(2, 3, 64, 64)
    tuned.eval()
    mean = tuned.backbone(image).tokens[:, 1:].mean(1)
    torch.testing.assert_close(tuned.classify(image), tuned.head.out(tuned.head.norm(mean)))


def test_paper_mixes_smooths_and_augments_and_nothing_is_mixed_outside_training():
    paper = preset_of("probes", "paper")
    assert (paper.config.mix.mixup, paper.config.mix.cutmix, paper.config.smoothing) == (0.8, 1.0, 0.1)
    assert (paper.feed.train_image.operations, paper.feed.train_image.erase, paper.config.backbone.body.drop_path) == (2, 0.25, 0.1)
    assert paper.config.backbone.body.norm is None and paper.config.backbone.pool == "mean"
    plan = plan_of().but(**{"config.mix.mixup": 0.8, "config.backbone.body.depth": 1, "config.backbone.body.drop_path": 0.0})
    model, batch = plan.config.build(), batch_of(plan)
    seen = []
    model.backbone.patch.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    model.train().losses(batch)
    model.eval().losses(batch)
    assert not torch.equal(seen[0], batch["image"]) and torch.equal(seen[1], batch["image"])


def test_linear_probes_are_those_of_their_papers():
    mae, cae = (preset_of("probes", f"paper_{n}") for n in ("linear", "attentive"))
    assert (mae.stages[0].optim.name, mae.stages[0].optim.lr, mae.stages[0].batch_size, mae.stages[0].optim.weight_decay) == ("lars", 6.4, 16_384, 0)
    assert (cae.stages[0].optim.name, cae.stages[0].optim.lr, cae.stages[0].batch_size) == ("sgd", 0.4, 8192)
    assert cae.config.backbone.pool == "none" and mae.config.mix.mixup == 0 and type(mae.feed.train_image).__name__ == "ViewPlan"
    head = BatchLinear.Config(into=6, out=3).build()
    assert head.norm.weight is None and [n for n, _ in head.named_parameters()] == ["out.weight", "out.bias"]
    x = torch.randn(20, 6)
    torch.testing.assert_close(head(x * 1000 + 5), head(x), rtol=1e-3, atol=1e-3)


def test_lars_on_a_batch_norm_separates_what_can_be_separated_and_learns_nothing_of_random_labels():
    torch.manual_seed(0)
    label = torch.arange(240) % 3
    x = torch.randn(240, 8) + 6 * torch.nn.functional.one_hot(label, 8).float()
    for truth, least, most in ((label, 0.99, 1.0), (label[torch.randperm(240)], 0.15, 0.55)):
        head = BatchLinear.Config(into=8, out=3).build()
        optimizer = make_optimizer(head, Optim(name="lars", lr=6.4))
        for _ in range(150):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(head(x[:120]), truth[:120]).backward()
            optimizer.step()
        right = float((head.eval()(x[120:]).argmax(1) == truth[120:]).float().mean())
        assert least <= right <= most


def test_words_say_protocol_and_encoder_in_either_order():
    for encoder in ("mae", "simclr"):
        for protocol in ("finetune", "linear"):
            one = override(preset_of("probes"), {"encoder": encoder, "protocol": protocol})
            assert one == override(preset_of("probes"), {"protocol": protocol, "encoder": encoder})
            assert one.starts[0].from_ == encoder and one.feed.image == preset_of(encoder).feed.image
    with pytest.raises(UserError, match="no tokens that a query could look at"):
        plan_of("attentive", "simclr")
    with pytest.raises(UserError, match="finetune, scratch, linear, sgd, attentive"):
        override(preset_of("probes"), {"protocol": "guess"})


@pytest.mark.parametrize("protocol", recipe.PROTOCOLS)
def test_every_protocol_learns(protocol):
    plan = plan_of(protocol).but(**{"config.backbone.body.depth": 1, "config.backbone.body.drop_path": 0.0})
    torch.manual_seed(0)
    model, batch = plan.config.build(), batch_of(plan, 12)
    steps = list(fit(model, plan.stages[0].but(steps=12, batch_size=12, **{"optim.warmup": 0}), iter([batch] * 12)))
    assert steps[-1].total < steps[0].total
    assert model.classify(batch["image"]).shape == (12, 15) and model.encode_image(batch["image"]).shape[0] == 12


def test_labels_beyond_the_head_are_refused_in_one_line():
    plan = plan_of("linear")
    batch = batch_of(plan)
    batch["label"][0] = 15
    with pytest.raises(UserError, match="a label 15 among 15 classes") as caught:
        plan.config.build().losses(batch)
    assert "\n" not in str(caught.value)
