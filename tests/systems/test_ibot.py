"""iBOT's essence (Zhou et al. 2022)."""
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
from polysense.base.system import After
from polysense.cli import main
from polysense.mechanisms.sinkhorn import Sinkhorn
from polysense.mechanisms.varied_mask import VariedBlocks
from polysense.nn.masking import masking_of
from polysense.objectives.twin import distil_ce
from polysense.towers.resnet import ResNet
from polysense.train.fit import fit
from polysense.train.run import override

recipe = polysense.load("ibot")
TOY = {"config.backbone.patch": 8, "config.backbone.body.width": 32, "config.backbone.body.depth": 2, "config.backbone.body.heads": 2,
       "config.projector.into": 32, "config.projector.hidden": 24, "config.projector.bottleneck": 16, "config.projector.out": 20,
       "config.centre.width": 20, "config.patch_centre.width": 20, "config.sampler.blocks.least": 1}
PRESET = preset_of("ibot").but(**TOY)


@pytest.fixture()
def ibot():
    torch.manual_seed(0)
    return PRESET.config.build()


@pytest.fixture(scope="module")
def batch():
    return fake_batch(PRESET, ("views", "crops"), n=4)


def fixed(system, mask):
    """The system with this mask [8,16] in place of a drawn one."""
    system.sampler.forward = lambda batch, grid, device=None: masking_of(mask)
    return system


MASK = torch.zeros(8, 16, dtype=torch.bool)
MASK[0, :5], MASK[3, 2:4], MASK[6, 9] = True, True, True


def test_both_losses_written_out(ibot, batch):
    fixed(ibot.eval(), MASK)
    with torch.no_grad():
        ibot.centre.value.normal_()
        ibot.patch_centre.value.normal_()
        views = batch["views"]
        flat = torch.cat([views[:, 0], views[:, 1]])
        held = ibot.teacher.module
        tokens = held["backbone"](flat).tokens
        cls = ((held["projector"](tokens[:, 0]) - ibot.centre.value) / 0.04).softmax(-1).unflatten(0, (2, 4))
        place = ((held["projector"](tokens[:, 1:]) - ibot.patch_centre.value) / 0.04).softmax(-1)
        seen = ibot.backbone(flat, fill=(MASK, ibot.hide.token)).tokens
        crops = [ibot.backbone(batch["crops"][:, i]).tokens[:, 0] for i in range(batch["crops"].shape[1])]
        heard = ibot.projector(torch.cat([seen[:, 0], *crops])).unflatten(0, (-1, 4))
        terms = [-(cls[i] * (heard[j] / 0.1).log_softmax(-1)).sum(-1).mean() for i in (0, 1) for j in range(len(heard)) if i != j]
        said = (ibot.projector(seen[:, 1:]) / 0.1).log_softmax(-1)
        hidden = [sum(-(place[b, k] * said[b, k]).sum() for k in range(16) if MASK[b, k]) / max(1, int(MASK[b].sum())) for b in range(8)]
        losses = ibot.losses(batch)
        torch.testing.assert_close(losses["distil"], torch.stack(terms).mean(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(losses["patches"], torch.stack([torch.as_tensor(h) for h in hidden]).mean(), rtol=1e-4, atol=1e-4)
        assert PRESET.stages[0].weights == (), "each counts once"


def test_without_a_mask_the_patch_loss_is_zero_and_the_rest_is_dinos(ibot, batch):
    fixed(ibot.eval(), torch.zeros_like(MASK))
    with torch.no_grad():
        losses = ibot.losses(batch)
        crops = batch["crops"].transpose(0, 1).flatten(0, 1)
        student = torch.cat([ibot.project(v) for v in (*batch["views"].unbind(1), crops)]).unflatten(0, (-1, 4))
        target = torch.stack([((ibot.aim(v) - ibot.centre.value) / ibot.heat).softmax(-1) for v in batch["views"].unbind(1)])
        assert float(losses["patches"]) == 0
        torch.testing.assert_close(losses["distil"], distil_ce(student, target, 0.1), rtol=1e-4, atol=1e-4)
    assert float(override(PRESET, {"masking": "none"}).config.build().losses(batch)["patches"].detach()) == 0


def test_the_teacher_sees_whole_pictures_and_never_the_small_crops(ibot, batch):
    seen = []
    ibot.teacher.module["backbone"].body.register_forward_hook(lambda m, args, out: seen.append(args[0].shape))
    fixed(ibot, MASK).losses(batch)
    assert seen == [torch.Size([8, 17, 32])]
    token = ibot.hide.token
    with torch.no_grad():
        before = ibot.hear(batch).target
        token.add_(5)
        torch.testing.assert_close(ibot.hear(batch).target, before, msg="the mask token is the student's alone")
    assert not any("hide" in n for n in ibot.teacher.state_dict())


def test_the_patch_loss_is_blind_to_unhidden_places(ibot, batch):
    fixed(ibot.eval(), MASK)
    with torch.no_grad():
        heard = ibot.hear(batch)
    assert len(heard.patches) == len(heard.patch_target) == int(MASK.sum()), "only hidden patches take part"


def test_one_head_judges_pictures_and_patches_in_both(ibot, batch):
    assert not hasattr(ibot, "patch_head") and set(ibot.teacher.module) == {"backbone", "projector"}
    seen = []
    ibot.projector.register_forward_hook(lambda m, args, out: seen.append(len(args[0])))
    fixed(ibot, MASK).losses(batch)
    assert seen == [8 + 8, int(MASK.sum())] and ibot.centre is not ibot.patch_centre


def test_the_mask_token_stands_in_before_positions_and_learns(ibot, batch):
    fixed(ibot.train(), MASK).losses(batch)["patches"].backward()
    assert float(ibot.hide.token.grad.abs().sum()) > 0
    noisy = batch["views"].clone()
    noisy[0, 0, :, :8, :8] = 9.0                                                     # behind patch 0 of picture 0, view 1
    with torch.no_grad():
        ibot.eval()
        torch.testing.assert_close(ibot.hear({**batch, "views": noisy}).patches, ibot.hear(batch).patches, rtol=1e-4, atol=1e-5)


def test_both_centres_follow_the_teacher_after_the_loss_the_second_over_all_patches(ibot, batch):
    losses = fixed(ibot, MASK).losses(batch)
    assert not ibot.centre.value.any() and not ibot.patch_centre.value.any()
    with torch.no_grad():
        flat = torch.cat(batch["views"].unbind(1))
        tokens = ibot.teacher.module["backbone"](flat).tokens
        cls, place = (ibot.teacher.module["projector"](t).mean(0) for t in (tokens[:, 0], tokens[:, 1:].flatten(0, 1)))
    ibot.after_step(After(1, 0.05, None, losses.keep))
    torch.testing.assert_close(ibot.centre.value, 0.1 * cls, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(ibot.patch_centre.value, 0.1 * place, rtol=1e-3, atol=1e-6)
    assert float(ibot.heat) == pytest.approx(0.055) and float(ibot.projector.gate) == 1


def test_half_of_the_pictures_are_masked_by_a_tenth_to_a_half():
    torch.manual_seed(0)
    paper = preset_of("ibot", "paper").config
    mask = paper.sampler.build()(2000, (14, 14)).mask
    share = mask.float().mean(1)
    assert float((share == 0).float().mean()) == pytest.approx(0.5, abs=0.04)
    some = share[share > 0]
    assert float(some.min()) >= 0.1 and float(some.max()) <= 0.5 and float(some.mean()) == pytest.approx(0.3, abs=0.02)
    one = mask[share > 0.2][0].view(14, 14)
    assert float((one[1:] & one[:-1]).sum() / one.sum()) > 0.5, "blocks, not dust"
    even = VariedBlocks.Config(draw="even").build()(40, (14, 14)).mask.float().mean(1)
    assert int((even > 0).sum()) == 20 and sorted(even[even > 0].tolist())[0] < 0.13 and max(even.tolist()) > 0.47
    with pytest.raises(UserError, match="make no mask"):
        VariedBlocks.Config(share=1.5).build()
    assert (paper.teacher.momentum, paper.teacher.final, paper.warming) == (0.996, 1.0, pytest.approx(30 / 800)) and paper.projector.out == 8192
    assert len(preset_of("ibot", "paper").feed.crops) == 10


def test_centring_is_swapped_by_name(batch):
    system = override(PRESET, {"centre": "sinkhorn"}).config.build()
    assert isinstance(system.centre, Sinkhorn) and isinstance(system.patch_centre, Sinkhorn)
    fixed(system, MASK)
    torch.testing.assert_close(system.hear(batch).target.sum(-1), torch.ones(2, 4))
    assert override(PRESET, {"centre": None}).config.centre.momentum == 1.0
    with pytest.raises(UserError, match="no centre is called 'middle'"):
        override(PRESET, {"centre": "middle"})


def test_tiny_trains_without_collapse_and_logs_the_teachers_entropy(ibot):
    g = torch.Generator().manual_seed(0)
    pictures = F.interpolate(torch.randn(16, 3, 4, 4, generator=g), 32)

    def noisy(side, n):
        return torch.stack([F.interpolate(pictures, side) + 0.2 * torch.randn(16, 3, side, side, generator=g) for _ in range(n)], 1)
    stage = PRESET.stages[0].but(steps=20, batch_size=16, precision="fp32", **{"optim.warmup": 2})
    first = ibot.backbone.patch.weight.clone()
    steps = list(fit(ibot, stage, [{"views": noisy(32, 2), "crops": noisy(16, 2)} for _ in range(20)]))
    said = [s.health for s in steps if s.health][-1]
    assert {"teacher_entropy", "teacher_certainty", "answers_used", "feature_spread"} <= said.keys() and said["answers_used"] > 1.5
    copy = ibot.teacher.module["backbone"].patch.weight
    assert not torch.equal(copy, first) and (copy - first).norm() < (ibot.backbone.patch.weight - first).norm()
    twin = PRESET.config.build()
    twin.load_state_dict(ibot.state_dict())
    assert torch.equal(twin.patch_centre.value, ibot.patch_centre.value)


def test_attend_and_encode_from_files(tmp_path, capsys):
    assert main(["train", "ibot", "backbone.body.width=24", "backbone.body.depth=1", "projector.into=24", "projector.hidden=16", "projector.out=16",
                 "centre.width=16", "patch_centre.width=16", "batch_size=4", "--data", "scenes:single?n=8", "--steps", "2", "--workers", "0",
                 "--out", str(tmp_path / "run")]) == 0
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    capsys.readouterr()
    assert main(["attend", str(tmp_path / "a.png"), "-m", str(tmp_path / "run"), "--out", str(tmp_path / "b.png"), "--json"]) == 0
    assert np.array(json.loads(capsys.readouterr().out)["attention"]).shape == (3, 8, 8)
    assert polysense.open(tmp_path / "run").encode(images=[tmp_path / "a.png"]).shape == (1, 24)


def test_what_cannot_be_is_refused_in_one_line(ibot, batch):
    with pytest.raises(UserError, match="class token"):
        PRESET.config.but(backbone=ResNet.Config(layers=(1,), base=8)).build()
    with pytest.raises(UserError, match="no teacher"):
        PRESET.config.but(teacher=None, reads="student", centre=None, patch_centre=None).build().losses(batch)
    with pytest.raises(UserError, match="without a teacher"):
        PRESET.config.but(teacher=None).build()
    with pytest.raises(UserError):
        ibot.losses({"views": torch.randn(2, 2, 1, 32, 32), "crops": batch["crops"]})
