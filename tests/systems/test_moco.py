"""MoCo's essence: v1 and v2 (a queue), v3 (the batch), and what each changes."""
import re
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
from polysense.data import source
from polysense.data.loader import Loader
from polysense.mechanisms.teacher import Teacher
from polysense.nn.norm import SplitNorm
from polysense.objectives.twin import batch_nce, queue_nce
from polysense.pipeline import Pipeline
from polysense.train.fit import fit

recipe = polysense.load("moco")
SMALL = {"config.backbone.base": 8, "config.projector.width": 32, "config.projector.hidden": 16, "config.projector.out": 8, "config.queue.width": 8,
         "config.queue.size": 12}


def build(name="tiny", **changes):
    torch.manual_seed(0)
    return preset_of("moco", name).but(**changes).config.build()


@pytest.fixture()
def moco():
    return build(**SMALL)


@pytest.fixture(scope="module")
def v3():
    preset = preset_of("moco", "v3").but(**{
        "config.backbone.image_size": 32, "config.backbone.patch": 8, "config.backbone.body.width": 24, "config.backbone.body.depth": 2,
        "config.projector.widths": (24, 16, 16, 8), "config.predictor.widths": (8, 16, 8),
        "feed.views": (recipe.ViewPlan(size=32),) * 2, "stages.0.batch_size": 4})
    torch.manual_seed(0)
    return preset, preset.config.build()


@pytest.fixture(scope="module")
def batch():
    return fake_batch(preset_of("moco"), ("views",), n=4)


def after(keep, progress=0.0):
    return After(1, progress, None, keep)


def test_the_key_encoder_is_a_copy_that_follows_and_never_trains(moco, batch):
    copy = moco.teacher.module["backbone"].stages[0][0].conv1.weight
    assert torch.equal(copy, moco.backbone.stages[0][0].conv1.weight) and moco.teacher.first == 0.99
    assert preset_of("moco", "v1").config.teacher.momentum == 0.999
    assert not any(n.startswith("teacher") for n, _ in moco.named_parameters())
    moco.choose_trainable(("*",))
    losses = moco.train().look_up(batch)
    losses.total().backward()
    assert not copy.requires_grad and copy.grad is None and not moco.queue.keys.requires_grad
    start = copy.clone()
    with torch.no_grad():
        moco.backbone.stages[0][0].conv1.weight.add_(1)
    for _ in range(3):
        moco.after_step(after(losses.keep))
    torch.testing.assert_close(copy, 0.99 ** 3 * start + (1 - 0.99 ** 3) * moco.backbone.stages[0][0].conv1.weight)


def test_the_copy_is_refreshed_when_weights_come_in(moco):
    with torch.no_grad():
        moco.backbone.stages[0][0].conv1.weight.add_(1)
    moco.after_start()
    assert torch.equal(moco.teacher.module["backbone"].stages[0][0].conv1.weight, moco.backbone.stages[0][0].conv1.weight)


def test_statistics_are_the_key_encoders_own(moco, batch):
    losses = moco.train().look_up(batch)
    mine, its = moco.backbone.stem.norm, moco.teacher.module["backbone"].stem.norm
    moco.after_step(after(losses.keep))
    assert int(its.num_batches_tracked) == 1 and not torch.equal(mine.running_mean, its.running_mean)


def test_the_loss_reads_the_queue_before_the_batch_enters_it(moco, batch):
    moco.train()
    before = moco.queue.keys.clone()
    torch.manual_seed(1)
    losses = moco.look_up(batch)
    torch.manual_seed(1)
    key = moco.keys(batch["views"][:, 1])
    query = F.normalize(moco.project(batch["views"][:, 0]), dim=-1)
    logits = torch.cat([(query * key).sum(1, keepdim=True), query @ before.T], 1) / 0.2
    assert logits.shape == (4, 1 + 12)
    torch.testing.assert_close(losses["contrast"], F.cross_entropy(logits, torch.zeros(4, dtype=torch.long)), rtol=1e-4, atol=1e-5)
    assert torch.equal(moco.queue.keys, before), "an objective moves nothing"
    moco.after_step(after(losses.keep))
    torch.testing.assert_close(moco.queue.keys[:4], key, rtol=1e-4, atol=1e-5)
    assert torch.equal(moco.queue.keys[4:], before[4:]) and int(moco.queue.pointer) == 4
    for _ in range(2):
        moco.after_step(after(moco.look_up(batch).keep))
    assert int(moco.queue.pointer) == 0 and not any((moco.queue.keys == row).all(1).any() for row in before)


def test_queue_loss_against_a_slow_twin_and_without_gradient_to_keys():
    q, k, queue = (F.normalize(torch.randn(n, 5), dim=-1).requires_grad_() for n in (3, 3, 7))
    loss = queue_nce(q, k, queue, 0.1)
    with torch.no_grad():
        pair = [float(torch.exp(q[i] @ k[i] / 0.1)) for i in range(3)]
        slow = sum(-log(p / (p + float(torch.exp(q[i] @ queue.T / 0.1).sum()))) for i, p in enumerate(pair)) / 3
    assert float(loss.detach()) == pytest.approx(slow, rel=1e-4)
    loss.backward()
    assert q.grad is not None and k.grad is None and queue.grad is None


def test_the_loss_is_one_directional(moco, batch):
    moco.train()
    seen = []
    moco.backbone.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    moco.look_up(batch)
    assert len(seen) == 1 and torch.equal(seen[0], batch["views"][:, 0])


def test_keys_pass_in_random_order_and_come_back_in_theirs(moco, batch):
    seen = []
    moco.teacher.module["backbone"].register_forward_hook(lambda m, args, out: seen.append(args[0]))
    moco.eval()
    image = torch.randn(8, 3, 32, 32)
    torch.manual_seed(0)
    keys = moco.keys(image)
    assert not torch.equal(seen[0], image) and torch.equal(seen[0].sum((1, 2, 3)).sort().values, image.sum((1, 2, 3)).sort().values)
    torch.testing.assert_close(keys, F.normalize(moco.aim(image), dim=-1), rtol=1e-4, atol=1e-5)


def test_split_norm_is_batch_norm_of_each_part():
    norm, parts = SplitNorm.Config(width=3, groups=2).build(), [torch.nn.BatchNorm2d(3) for _ in range(2)]
    x = torch.randn(6, 3, 4, 4)
    got = norm.train()(x)
    want = torch.cat([p(x[3 * i:3 * i + 3]) for i, p in enumerate(parts)])
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(norm.running_var, (parts[0].running_var + parts[1].running_var) / 2)
    assert not torch.allclose(got, torch.nn.BatchNorm2d(3)(x)), "parts have statistics of their own"
    torch.testing.assert_close(norm.eval()(x), F.batch_norm(x, norm.running_mean, norm.running_var))
    assert norm.train()(torch.randn(5, 3, 2, 2)).shape == (5, 3, 2, 2)


@pytest.mark.parametrize("name", ["tiny", "v1", "paper"])
def test_every_norm_of_both_encoders_is_split(name):
    """Shuffled keys hide nothing where statistics are those of the whole batch."""
    with torch.device("meta"):
        system = preset_of("moco", name).config.build()
    for tower in (system.backbone, system.teacher.module["backbone"]):
        norms = [m for m in tower.modules() if "Norm" in type(m).__name__]
        assert norms and all(isinstance(m, SplitNorm) and m.groups > 1 for m in norms)


def test_v2_changes_head_temperature_views_and_schedule_of_v1_and_nothing_else():
    one, two = (dict(line.split(" = ", 1) if " = " in line else (line, "") for line in preset_of("moco", n).lines()) for n in ("v1", "paper"))
    differ = {k for k in one.keys() | two.keys() if one.get(k) != two.get(k)}
    allowed = re.compile(r"config\.(projector\b|temperature$)|feed\.views\.\d\.(jitter|jitter_by|blur)$|stages\.0\.optim\.(schedule|milestones)$")
    assert differ and all(allowed.match(d) for d in differ), differ
    assert (preset_of("moco", "v1").config.temperature, preset_of("moco").config.temperature) == (0.07, 0.2)
    head = preset_of("moco", "paper").config.projector
    assert (head.width, head.hidden, head.out, head.act) == (2048, 2048, 128, "relu")


def test_v3_has_no_queue_and_is_symmetric_and_zero_for_one_pair(v3):
    _, system = v3
    system.train()
    views = torch.randn(5, 2, 3, 32, 32)
    loss = system.meet({"views": views})["contrast"]
    torch.testing.assert_close(loss, system.meet({"views": views.flip(1)})["contrast"], rtol=1e-4, atol=1e-5)
    asked = [F.normalize(system.predictor(system.project(views[:, i])), dim=-1) for i in (0, 1)]
    keys = [F.normalize(system.aim(views[:, i]), dim=-1) for i in (0, 1)]
    slow = sum(2 * 0.2 * F.cross_entropy(q @ k.T / 0.2, torch.arange(5)) for q, k in zip(asked, reversed(keys), strict=True))
    torch.testing.assert_close(loss, slow, rtol=1e-4, atol=1e-5)
    assert system.queue is None and "keys" not in system.meet({"views": views}).keep
    one = F.normalize(torch.randn(1, 8), dim=-1)
    assert batch_nce(one, F.normalize(torch.randn(1, 8), dim=-1), 0.2) == 0


def test_v3_heads_and_frozen_parts(v3):
    preset, system = v3
    paper = preset_of("moco", "v3")
    assert paper.config.projector.widths == (768, 4096, 4096, 256) and paper.config.predictor.widths == (256, 4096, 256)
    last = system.projector.layers[-1]
    assert last.linear.bias is None and not last.norm.affine and not system.predictor.layers[-1].norm.affine
    resnet = preset_of("moco", "v3_resnet").config
    assert len(resnet.projector.widths) == 3 and resnet.predictor.last == "nothing"
    system.choose_trainable(preset.stages[0].trainable)
    assert not system.backbone.patch.weight.requires_grad and system.backbone.cls.requires_grad
    assert "backbone.position" in system.state_dict() and not any("position" in n for n, _ in system.named_parameters())
    assert system.teacher.momentum(0) == pytest.approx(0.99) and system.teacher.momentum(1) == 1.0
    assert "predictor" not in system.teacher.module
    one, two = paper.feed.views
    assert (one.blur, one.solarize, two.blur, two.solarize) == (1.0, 0.0, 0.1, 0.2)
    assert [v.scale for n in ("v3", "v3_resnet") for v in preset_of("moco", n).feed.views] == [(0.08, 1.0)] * 2 + [(0.2, 1.0)] * 2


def test_v3_trains_and_its_patch_projection_stays(v3):
    preset, system = v3
    before = system.backbone.patch.weight.clone()
    batches = [{"views": torch.randn(4, 2, 3, 32, 32)}] * 3
    assert len(list(fit(system, preset.stages[0].but(steps=3), batches))) == 3
    assert torch.equal(system.backbone.patch.weight, before)
    assert torch.equal(system.teacher.module["backbone"].patch.weight, before)


def test_tiny_learns_through_the_one_loop_and_resumes_its_queue():
    preset = preset_of("moco").but(**SMALL | {"config.queue.size": 64})
    torch.manual_seed(0)
    system, stage = preset.config.build(), preset.stages[0].but(steps=30, batch_size=16, **{"optim.warmup": 2})
    list(fit(system, stage, Loader(source("scenes:single?n=64"), preset.feed, None, batch_size=16, needs=("views",))))
    assert int(system.queue.pointer) == 30 * 16 % 64
    twin = preset.config.build()
    twin.load_state_dict(system.state_dict())
    assert torch.equal(twin.queue.keys, system.queue.keys) and int(twin.queue.pointer) == int(system.queue.pointer)
    torch.testing.assert_close(system.queue.keys.norm(dim=1), torch.ones(64))


def test_pipeline_reads_files_and_refuses_broken_ones(moco, tmp_path):
    pipeline = Pipeline(moco, preset_of("moco"), id="moco")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    assert pipeline.encode(images=[tmp_path / "a.png"]).shape == (1, 32)
    (tmp_path / "b.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="cannot read"):
        pipeline.encode(images=[tmp_path / "b.png"])


def test_wrong_pictures_and_impossible_systems_are_refused(moco):
    with pytest.raises(UserError):
        moco.look_up({"views": torch.randn(2, 2, 1, 32, 32)})
    with pytest.raises(UserError, match="reads='teacher'"):
        preset_of("moco").config.but(teacher=None, reads="teacher").build()
    with pytest.raises(UserError, match="no teacher"):
        Teacher.Config(momentum=2.0).of(torch.nn.Linear(1, 1))
    wrong = moco.train().look_up({"views": torch.randn(13, 2, 3, 32, 32)})
    with pytest.raises(UserError, match="at least the global batch"):
        moco.after_step(after(wrong.keep))


def test_pixels_that_are_no_numbers_stop_training_by_name(moco, batch):
    views = batch["views"].clone()
    views[1, 0, 0, 0, 0] = float("nan")
    with pytest.raises(UserError, match=r"diverged.*1 hold values"):
        list(fit(moco, preset_of("moco").stages[0].but(batch_size=4, steps=1), [{"views": views, "index": torch.arange(4)}]))


def test_queue_and_keys_are_swapped_by_name(batch):
    from polysense.train.run import override

    plan = preset_of("moco").but(**SMALL)
    torch.manual_seed(0)
    system = override(plan, {"queue": None}).config.build().train()
    losses = system.look_up(batch)
    query = F.normalize(system.project(batch["views"][:, 0]), dim=-1)
    torch.manual_seed(0)
    key = system.keys(batch["views"][:, 1])
    torch.testing.assert_close(losses["contrast"], F.cross_entropy(query @ key.T / 0.2, torch.arange(4)), rtol=1e-4, atol=1e-4)
    assert "keys" not in losses.keep and override(plan, {"keys": "live"}).config.teacher.momentum == 0.0
    assert override(plan, {"queue": "keys"}) == plan
