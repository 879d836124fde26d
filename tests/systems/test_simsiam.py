"""SimSiam's essence (Chen & He 2021): heads, stop-gradient, steady predictor, and what happens without."""
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fake import fake_batch
from PIL import Image

import polysense
from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.cli import main
from polysense.objectives.twin import mirror_cosine
from polysense.pipeline import Pipeline
from polysense.train.fit import fit
from polysense.train.health import Watch
from polysense.train.run import override
from polysense.train.state import Training

recipe = polysense.load("simsiam")
TOY = {"config.backbone.base": 8, "config.projector.widths": (32, 16, 16, 16), "config.predictor.widths": (16, 4, 16)}
PRESET = preset_of("simsiam").but(**TOY)


@pytest.fixture()
def simsiam():
    torch.manual_seed(0)
    return PRESET.config.build()


@pytest.fixture(scope="module")
def batch():
    return fake_batch(PRESET, ("views",), n=4)


def drawn(steps: int, n: int = 32):
    """Batches of two noisy views of 64 smooth pictures of 16 pixels."""
    g = torch.Generator().manual_seed(0)
    base = F.interpolate(torch.randn(64, 3, 4, 4, generator=g), 16, mode="bilinear")
    for _ in range(steps):
        rows = torch.randperm(64, generator=g)[:n]
        yield {"views": torch.stack([base[rows] * (0.7 + 0.6 * torch.rand(n, 1, 1, 1, generator=g))
                                     + 0.2 * torch.randn(n, 3, 16, 16, generator=g) for _ in range(2)], 1)}


def trained(steps=25, **words):
    """(system, its last step) of a toy whose projection has no norm at its end (table 3b), which would hide a collapse from a batch of 32."""
    plan = override(PRESET.but(**{"config.projector.last": "bias"}), words)
    torch.manual_seed(0)
    system = plan.config.build()
    stage = plan.stages[0].but(steps=steps, precision="fp32", **{"optim.lr": 0.1})
    return system, list(fit(system, stage, drawn(steps)))[-1]


def test_without_the_stop_gradient_the_features_collapse_and_with_it_they_do_not():
    _, well = trained()
    _, ill = trained(stop_gradient="off")
    assert well.health["feature_spread"] > 0.6 and ill.health["feature_spread"] < 0.5 * well.health["feature_spread"]
    assert ill.total < -0.95 and ill.total < well.total, "the loss of a collapse is the best of all"


def test_without_a_predictor_they_collapse_too():
    _, ill = trained(predictor="none")
    assert ill.total < -0.95 and ill.health["feature_spread"] < 0.5


def test_no_gradient_passes_the_target(simsiam, batch):
    z1, z2, p1, p2 = (torch.randn(4, 6, requires_grad=True) for _ in range(4))
    mirror_cosine(p1, p2, z1, z2).backward()
    assert z1.grad is None and z2.grad is None and p1.grad is not None and p2.grad is not None
    loss = simsiam.train().agree(batch)["agree"]
    (seen, said) = simsiam.both(batch)
    slow = -sum(F.cosine_similarity(p, z.detach(), dim=-1).mean() for p, z in ((said[0], seen[1]), (said[1], seen[0]))) / 2
    torch.testing.assert_close(loss, slow, rtol=1e-4, atol=1e-5)
    free = simsiam.agree_freely(batch)["agree"]
    torch.testing.assert_close(free, loss, rtol=1e-4, atol=1e-5)
    weight = simsiam.projector.layers[0].linear.weight
    stopped, flowing = (torch.autograd.grad(x, weight)[0] for x in (loss, free))
    assert not torch.allclose(stopped, flowing, atol=1e-5)


def test_the_loss_lies_between_minus_one_and_one_is_symmetric_and_least_for_equal_views(simsiam, batch):
    simsiam.eval()
    loss = simsiam.agree(batch)["agree"]
    assert -1 <= float(loss.detach()) <= 1
    torch.testing.assert_close(simsiam.agree({"views": batch["views"].flip(1)})["agree"], loss)
    alike = {"views": batch["views"][:, :1].expand(-1, 2, -1, -1, -1)}
    plain = override(PRESET, {"predictor": "none"}).config.build().eval()
    assert float(plain.agree(alike)["agree"].detach()) == pytest.approx(-1, abs=1e-5)


def test_both_views_pass_the_same_weights(simsiam, batch):
    seen = []
    simsiam.backbone.stem.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    simsiam.agree(batch)
    assert len(seen) == 2 and simsiam.teacher is None


def test_heads_are_the_papers():
    config = preset_of("simsiam", "paper").config
    system = PRESET.config.build()
    assert config.projector.widths == (2048, 2048, 2048, 2048) and config.predictor.widths == (2048, 512, 2048)
    assert config.backbone.block.last_gamma == 0.0 and all(bool((b.norm2.weight == 0).all()) for s in system.backbone.stages for b in s)
    norms = [layer.norm for layer in system.projector.layers]
    assert [n.affine for n in norms] == [True, True, False] and all(layer.linear.bias is None for layer in system.projector.layers)
    hidden, out = system.predictor.layers
    assert isinstance(hidden.norm, torch.nn.BatchNorm1d) and isinstance(out.norm, torch.nn.Identity) and out.linear.bias is not None
    assert float(system.projector(torch.randn(8, 32)).detach().min()) < 0, "no ReLU at the end"


def test_the_predictor_keeps_its_rate_while_the_encoders_falls_to_nothing(simsiam):
    stage = PRESET.stages[0].but(steps=8, precision="fp32")
    training = Training(simsiam, stage)
    rates = []
    for _ in fit(simsiam, stage, drawn(8, 8), training=training):
        rates.append({g["steady"]: g["lr"] for g in training.optimizer_for("main").param_groups})
        assert {n.startswith("predictor") for g in training.optimizer_for("main").param_groups if g["steady"] for n in g["names"]} == {True}
    assert {r[True] for r in rates} == {0.06} and rates[0][False] == pytest.approx(0.06) and rates[-1][False] < 0.003
    with pytest.raises(UserError, match=r"steady='head.\*' matches no parameter"):
        Training(simsiam, stage.but(**{"optim.steady": ("head.*",)})).optimizer_for()
    optim = preset_of("simsiam", "paper").stages[0].optim
    assert optim.lr == pytest.approx(0.05 * 512 / 256) and optim.warmup == 0 and optim.name == "sgd" and optim.steady == ("predictor.*",)


def test_a_collapsed_run_is_warned_of_in_words():
    watch, looks = Watch(), [{"feature_spread": v, "effective_rank": 9.0} for v in (0.8, 0.09, 0.05, 0.02, 0.02)]
    assert [len(watch.say(h)) for h in looks] == [0, 0, 0, 1, 0]


def test_compare_varies_the_stop_gradient_by_name(tmp_path, capsys):
    assert main(["compare", "simsiam", "backbone.base=4", "projector.widths=(16,8,8,8)", "predictor.widths=(8,4,8)", "batch_size=4", "--vary",
                 "stop_gradient=target,off", "--data", "scenes:single?n=24", "--steps", "2", "--seeds", "1", "--exams", "knn_probe", "--test-split",
                 "val", "--probe", "16", "--points", "0", "--workers", "0", "--out", str(tmp_path / "out"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [r["system"] for r in told["table"]] == ["stop_gradient=target", "stop_gradient=off"]
    plans = [json.loads((p / "run.json").read_text())["plan"] for p in sorted((tmp_path / "out" / "runs").iterdir())]
    assert sorted(p["stages"][0]["objective"]["function"].rsplit(".", 1)[1] for p in plans) == ["agree", "agree_freely"]


def test_pipeline_reads_files_and_refuses_broken_ones(simsiam, tmp_path):
    pipeline = Pipeline(simsiam, PRESET, id="simsiam")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    assert pipeline.encode(images=[tmp_path / "a.png"]).shape == (1, 32)
    (tmp_path / "b.png").write_bytes(b"")
    with pytest.raises(UserError, match="no bytes"):
        pipeline.encode(images=[tmp_path / "b.png"])


def test_bad_batches_are_refused_by_name(simsiam, batch):
    with pytest.raises(UserError):
        simsiam.agree({"views": torch.randn(2, 2, 1, 32, 32)})
    views = batch["views"].clone()
    views[2, 1, 0, 0, 0] = float("nan")
    with pytest.raises(UserError, match=r"diverged.*2 hold values"):
        list(fit(simsiam, PRESET.stages[0].but(batch_size=4, steps=1), [{"views": views, "index": torch.arange(4)}]))
