"""DINO's essence (Caron et al. 2021)."""
import json
from math import log

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fake import fake_batch
from PIL import Image

import polysense
from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.base.system import After
from polysense.cli import main
from polysense.data import source
from polysense.data.loader import Loader
from polysense.nn.position import fit_positions
from polysense.objectives.twin import distil_ce
from polysense.towers.resnet import ResNet
from polysense.train.fit import fit
from polysense.train.schedule import decayed

recipe = polysense.load("dino")
TOY = {"config.backbone": recipe.tower(32, 8, 32, 2, 2), "config.projector.into": 32, "config.projector.hidden": 24,
       "config.projector.bottleneck": 16, "config.projector.out": 20, "config.centre.width": 20}
PRESET = preset_of("dino").but(**TOY)


@pytest.fixture()
def dino():
    torch.manual_seed(0)
    return PRESET.config.build()


@pytest.fixture(scope="module")
def batch():
    return fake_batch(PRESET, ("views", "crops"), n=4)


def after(keep, progress=0.5):
    return After(1, progress, None, keep)


def test_every_pair_but_the_same_crop_counts_once():
    student, teacher = torch.randn(5, 3, 7), torch.randn(2, 3, 7).softmax(-1)
    terms = [-(teacher[i] * F.log_softmax(student[j] / 0.1, -1)).sum(-1).mean() for i in range(2) for j in range(5) if i != j]
    assert len(terms) == 2 * 5 - 2
    torch.testing.assert_close(distil_ce(student, teacher, 0.1), torch.stack(terms).mean(), rtol=1e-4, atol=1e-5)
    wild = student.clone()
    wild[0] = torch.randn(3, 7)
    both = [distil_ce(s, torch.stack([teacher[0], torch.zeros(3, 7)]), 0.1) for s in (student, wild)]
    torch.testing.assert_close(*both, msg="a crop never meets itself")


def test_the_loss_is_sharpened_centred_cross_entropy(dino, batch):
    dino.eval()
    with torch.no_grad():
        dino.centre.value.normal_()
        views, crops = batch["views"], batch["crops"]
        said = [dino.aim(views[:, i]) for i in (0, 1)]
        heard = [dino.project(v) for v in (*views.unbind(1), *crops.unbind(1))]
        target = [((g - dino.centre.value) / 0.04).softmax(-1) for g in said]
        terms = [-(target[i] * F.log_softmax(heard[j] / 0.1, -1)).sum(-1).mean() for i in (0, 1) for j in range(5) if i != j]
        torch.testing.assert_close(dino.losses(batch)["distil"], torch.stack(terms).mean(), rtol=1e-4, atol=1e-4)


def test_the_teacher_sees_only_the_large_crops_and_the_student_all(dino, batch):
    seen = {"student": 0, "teacher": 0}
    for name, tower in (("student", dino.backbone), ("teacher", dino.teacher.module["backbone"])):
        tower.patch.register_forward_hook(lambda m, args, out, name=name: seen.update({name: seen[name] + out[..., 0].numel()}))
    dino.losses(batch)
    assert seen == {"teacher": 4 * 2 * 16, "student": 4 * (2 * 16 + 3 * 4)}


def test_the_teacher_is_an_average_without_gradient(dino, batch):
    dino.choose_trainable(("*",))
    losses = dino.train().losses(batch)
    losses.total().backward()
    copy = dino.teacher.module["backbone"].patch.weight
    assert not copy.requires_grad and not any(n.startswith("teacher") for n, _ in dino.named_parameters())
    before = copy.clone()
    with torch.no_grad():
        dino.backbone.patch.weight.add_(1)
    dino.teacher.first = dino.teacher.last = 1.0
    dino.after_step(after(losses.keep))
    assert torch.equal(copy, before), "momentum 1 never moves"
    teacher = preset_of("dino", "paper").config.teacher
    assert (teacher.momentum, teacher.final) == (0.996, 1.0)


def test_the_centre_moves_after_the_loss_by_the_mean_of_the_teacher(dino, batch):
    losses = dino.losses(batch)
    assert torch.equal(dino.centre.value, torch.zeros(20)), "the centre of step t does not hold batch t"
    with torch.no_grad():
        mean = torch.cat([dino.aim(v) for v in batch["views"].unbind(1)]).mean(0)
    dino.after_step(after(losses.keep))
    torch.testing.assert_close(dino.centre.value, 0.1 * mean, rtol=1e-3, atol=1e-6)


def test_a_centre_that_equals_constant_logits_gives_the_uniform_target(dino):
    logits = torch.randn(20)
    dino.centre.value.copy_(logits)
    target = (dino.centre(logits.expand(3, -1)) / dino.heat).softmax(-1)
    torch.testing.assert_close(target, torch.full((3, 20), 1 / 20))
    assert float(-(target * target.log()).sum(-1)[0]) == pytest.approx(log(20), rel=1e-5)


def test_the_teachers_temperature_warms_and_the_last_layer_is_still_at_first(dino, batch):
    assert float(dino.heat) == pytest.approx(0.04) and float(dino.projector.gate) == 0
    dino.train().losses(batch).total().backward()
    assert dino.projector.last.grad.abs().sum() == 0 and dino.projector.layers[0].weight.grad.abs().sum() > 0
    keep = dino.losses(batch).keep
    dino.after_step(after(keep, 0.05))
    assert float(dino.heat) == pytest.approx(0.055) and float(dino.projector.gate) == 1
    dino.zero_grad()
    dino.losses(batch).total().backward()
    assert dino.projector.last.grad.abs().sum() > 0
    dino.after_step(after(keep, 0.9))
    assert float(dino.heat) == pytest.approx(0.07)
    paper = preset_of("dino", "paper")
    assert paper.config.warming == pytest.approx(30 / 800) and paper.config.still == pytest.approx(1 / 800)
    torch.testing.assert_close(dino.state_dict()["heat"], dino.heat)


def test_head_rows_have_unit_norm_whatever_the_optimiser_does(dino):
    with torch.no_grad():
        dino.projector.last.mul_(37).add_(torch.randn_like(dino.projector.last))
    torch.testing.assert_close(dino.projector.rows().norm(dim=1), torch.ones(20))
    out = dino.projector(torch.randn(6, 32))
    assert out.abs().max() <= 1 + 1e-5, "cosines of unit vectors"
    head = preset_of("dino", "paper").config.projector
    assert (head.hidden, head.bottleneck, head.out, head.depth) == (2048, 256, 65536, 3)
    assert not any("Norm" in type(m).__name__ for m in dino.projector.modules())


def test_weight_decay_rises_on_a_cosine_and_spares_biases_and_norms(dino, batch):
    paper = preset_of("dino", "paper").stages[0].optim
    assert [decayed(paper, p) for p in (0, 0.5, 1)] == pytest.approx([0.04, 0.22, 0.4]) and paper.clip == 3.0
    seen = []
    stage = PRESET.stages[0].but(steps=4, batch_size=4)
    from polysense.train.state import Training
    training = Training(dino, stage)
    for _ in fit(dino, stage, [batch] * 4, training=training):
        groups = training.optimizer_for("main").param_groups
        seen.append({"bias" in n or "norm" in n: g["weight_decay"] for g in groups for n in g["names"]})
    assert [s[False] for s in seen] == pytest.approx([decayed(stage.optim, i / 4) for i in range(4)]) and all(s[True] == 0 for s in seen)


def test_small_crops_read_interpolated_positions(dino):
    crop = torch.randn(1, 3, 16, 16)
    tokens, grid = dino.backbone.embed(crop)
    want = dino.backbone.patch(crop).flatten(1, 2) + fit_positions(dino.backbone.position, 1, (2, 2))[:, 1:]
    assert grid == (2, 2)
    torch.testing.assert_close(tokens[:, 1:], want)


def test_features_and_attention_are_the_teachers(dino):
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        dino.teacher.module["backbone"].cls.add_(1)
        want = F.normalize(dino.teacher.module["backbone"](image).tokens[:, 0], dim=-1)
        torch.testing.assert_close(dino.eval().encode_image(image), want, rtol=1e-4, atol=1e-5)
        maps = dino.attend(image)
    assert maps.shape == (2, 2, 4, 4) and (maps >= 0).all() and (maps.sum((2, 3)) < 1).all()
    with torch.no_grad():
        tower = dino.teacher.module["backbone"]
        block, x = tower.body.blocks[-1], tower.body.layers(tower.embed(image)[0], stop=-1)[-1]
        q, k = (f(block.norm1(x)).unflatten(-1, (2, 16)).transpose(1, 2) for f in (block.attn.q, block.attn.k))
        slow = (q @ k.mT / 4).softmax(-1)[:, :, 0, 1:].unflatten(-1, (4, 4))
    torch.testing.assert_close(maps, slow, rtol=1e-4, atol=1e-6)


def test_tiny_trains_through_the_one_loop_without_collapse():
    torch.manual_seed(0)
    system, stage = PRESET.config.build(), PRESET.stages[0].but(steps=30, batch_size=16, **{"optim.warmup": 2})
    feed = Loader(source("scenes:single?n=64"), PRESET.feed, None, batch_size=16, needs=("views", "crops"))
    first = system.backbone.patch.weight.clone()
    assert len(list(fit(system, stage, feed))) == 30 and float(system.heat) == pytest.approx(0.07) and float(system.projector.gate) == 1
    with torch.no_grad():
        target = (system.centre(system.eval().aim(next(iter(feed))["views"][:, 0])) / system.heat).softmax(-1)
    assert 0.1 < float(-(target * target.clamp_min(1e-9).log()).sum(-1).mean()) <= log(20)
    copy = system.teacher.module["backbone"].patch.weight
    assert not torch.equal(copy, first) and (copy - first).norm() < (system.backbone.patch.weight - first).norm()
    twin = PRESET.config.build()
    twin.load_state_dict(system.state_dict())
    assert torch.equal(twin.heat, system.heat) and torch.equal(twin.centre.value, system.centre.value)


def test_attend_from_files_to_files(tmp_path, capsys):
    assert main(["train", "dino", "backbone.body.width=24", "backbone.body.depth=1", "projector.into=24", "projector.hidden=16",
                 "projector.out=16", "centre.width=16", "batch_size=4", "--data", "scenes:single?n=8", "--steps", "2", "--workers", "0",
                 "--out", str(tmp_path / "run")]) == 0
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    capsys.readouterr()
    assert main(["attend", str(tmp_path / "a.png"), "-m", str(tmp_path / "run"), "--out", str(tmp_path / "b.png"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert np.array(told["attention"]).shape == (3, 8, 8) and Image.open(tmp_path / "b.png").size == (5 * 256, 256)
    assert polysense.open(tmp_path / "run").encode(images=[tmp_path / "a.png"]).shape == (1, 24)
    (tmp_path / "empty.png").write_bytes(b"")
    for words, says in ((("attend", tmp_path / "none.png"), "no file"), (("attend", tmp_path / "empty.png"), "no bytes")):
        assert main([*map(str, words), "-m", str(tmp_path / "run"), "--out", str(tmp_path / "c.png")]) == 2
        error = capsys.readouterr().err.strip()
        assert says in error and "\n" not in error
    assert not (tmp_path / "c.png").exists()


def test_what_cannot_be_is_refused_in_one_line(dino, batch):
    with pytest.raises(UserError):
        dino.losses({"views": torch.randn(2, 2, 1, 32, 32), "crops": batch["crops"]})
    conv = PRESET.config.but(backbone=ResNet.Config(layers=(1,), base=8)).but(**{"projector.into": 32}).build()
    with pytest.raises(UserError, match="attends to nothing"):
        conv.attend(torch.randn(1, 3, 32, 32))
    frozen = preset_of("dino", "features").config.but(backbone=recipe.tower(32, 8, 32, 1, 2)).build()
    with pytest.raises(UserError, match="no teacher"):
        frozen.losses(batch)
    crops = batch["crops"].clone()
    crops[2, 1, 0, 0, 0] = float("nan")
    with pytest.raises(UserError, match=r"diverged.*2 hold values"):
        list(fit(dino, PRESET.stages[0].but(batch_size=4, steps=1), [batch | {"crops": crops, "index": torch.arange(4)}]))


def test_centring_is_swapped_by_name_and_the_teachers_entropy_is_watched(batch):
    from polysense.mechanisms.sinkhorn import Sinkhorn
    from polysense.objectives.clusters import sinkhorn
    from polysense.train.run import override

    torch.manual_seed(0)
    system = override(PRESET, {"centre": "sinkhorn"}).config.build().eval()
    losses = system.losses(batch)
    assert isinstance(system.centre, Sinkhorn)
    with torch.no_grad():
        said = torch.cat([system.aim(v) for v in batch["views"].unbind(1)])
    torch.testing.assert_close(losses.keep["answer"], sinkhorn(said, system.heat), rtol=1e-4, atol=1e-5)
    system.after_step(after(losses.keep))
    health = system.health(losses.keep)
    answer = losses.keep["answer"]
    assert float(health["teacher_entropy"]) == pytest.approx(float(-(answer * answer.clamp_min(1e-12).log()).sum(-1).mean()), rel=1e-3)
    assert override(PRESET, {"centre": None}).config.centre.momentum == 1.0
