"""The protocols of probes: what learns, at which rate, on what, and what must not change."""
import pytest
import torch
from fake import fake_batch

import polysense
from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.base.system import Optim
from polysense.nn.head import BatchLinear
from polysense.tasks.encode import reader
from polysense.train.fit import fit
from polysense.train.optim import groups, make_optimizer
from polysense.train.run import override
from polysense.train.schedule import factor
from polysense.train.starts import carry

recipe = polysense.load("probes")
FROZEN = ("linear", "sgd", "dino", "attentive")


def plan_of(protocol="finetune", encoder="mae"):
    return override(preset_of("probes"), {"encoder": encoder, "protocol": protocol})


def batch_of(plan, n=8):
    return fake_batch(plan, ("image", "label"), n=n)


@pytest.mark.parametrize("protocol, encoder", [("linear", "mae"), ("attentive", "cae"), ("linear", "simclr"), ("sgd", "simclr"),
                                                ("dino", "dino")])
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


def test_dinos_probe_reads_the_class_tokens_of_four_blocks_each_behind_the_norm():
    torch.manual_seed(0)
    model = plan_of("dino").config.build().eval()
    image, tower = torch.randn(2, 3, 64, 64), model.backbone
    with torch.no_grad():
        blocks = [tower.body.norm(x)[:, 0] for x in tower.features(image)]
        said = torch.cat(blocks[-4:], 1)
        assert said.shape == (2, 4 * tower.width) and not torch.allclose(blocks[-1], blocks[-2])
        torch.testing.assert_close(model.classify(image), torch.nn.functional.linear(said, model.head.weight, model.head.bias))
        torch.testing.assert_close(reader(model, "cls4")(image), said)
        torch.testing.assert_close(model.encode_image(image), torch.nn.functional.normalize(said, dim=-1))
        torch.testing.assert_close(tower(image).tokens[:, 0], blocks[-1])


def test_no_gradient_reaches_the_encoder_of_dinos_probe():
    plan = plan_of("dino", "dino")
    model = plan.config.build()
    model.choose_trainable(plan.stages[0].trainable)
    model.train()
    batch = batch_of(plan)
    assert not model.backbone.training and not model.backbone.pooled(batch["image"]).requires_grad
    model.losses(batch)["label"].backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {"head.weight", "head.bias"}


def test_dinos_rate_falls_on_a_cosine_from_a_thousandth_for_each_256_of_the_batch():
    plan = preset_of("probes", "paper_dino")
    stage, view = plan.stages[0], plan.feed.train_image
    assert (stage.optim.name, stage.optim.momentum, stage.optim.weight_decay, stage.batch_size) == ("sgd", 0.9, 0.0, 1024)
    assert stage.optim.lr == pytest.approx(0.001 * stage.batch_size / 256) and stage.steps == 100 * (1_281_167 // 1024)
    for share, left in ((0, 1.0), (0.5, 0.5), (1, 0.0)):
        assert factor(stage.optim, share * stage.steps, stage.steps) == pytest.approx(left, abs=1e-4)
    assert (view.scale, view.flip, type(view).__name__) == ((0.08, 1.0), 0.5, "ViewPlan") and plan.config.mix.mixup == plan.config.mix.cutmix == 0
    assert plan.config.head.into == 4 * 384 and plan.starts[0].take == "teacher.module.backbone"
    swept = override(plan, {"optim.lr": 0.01})
    assert swept.stages[0].optim.lr == 0.01 and recipe.protocol_of(swept) is recipe.dino


def test_dinos_encoder_is_its_teacher():
    plan = plan_of("dino", "dino")
    torch.manual_seed(0)
    lender, model = preset_of("dino").config.build(), plan.config.build()
    lender.teacher.module["backbone"].cls += 1.0

    class Run:
        system = lender

    carry(plan.starts[0], Run(), model)
    assert torch.equal(model.backbone.cls, lender.teacher.module["backbone"].cls) and not torch.equal(model.backbone.cls, lender.backbone.cls)


@pytest.mark.parametrize("name", recipe.PROTOCOLS)
def test_a_preset_tells_its_protocol(name):
    assert recipe.protocol_of(plan_of(name, "cae")) is recipe.PROTOCOLS[name]
    assert plan_of("dino", "dino") == override(preset_of("probes"), {"protocol": "dino", "encoder": "dino"})


def test_what_has_no_four_class_tokens_is_refused():
    with pytest.raises(UserError, match="protocol=sgd"):
        plan_of("dino", "simclr")
    with pytest.raises(UserError, match="reads 4 blocks, this tower has 3"):
        plan_of("dino").but(**{"config.backbone.body.depth": 3}).config.build()


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
    with pytest.raises(UserError, match="finetune, scratch, linear, sgd, dino, attentive"):
        override(preset_of("probes"), {"protocol": "guess"})


@pytest.mark.parametrize("protocol", recipe.PROTOCOLS)
def test_every_protocol_learns(protocol):
    plan = plan_of(protocol).but(**{"config.backbone.body.depth": 4 if protocol == "dino" else 1, "config.backbone.body.drop_path": 0.0})
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
