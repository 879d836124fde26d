"""DINOv2's essence (Oquab et al. 2024; registers: Darcet et al. 2024)."""
import pytest
import torch
import torch.nn.functional as F
from fake import fake_batch

import polysense
from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.base.system import After
from polysense.mechanisms.centre import Centre
from polysense.nn.block import PreNorm
from polysense.nn.masking import masking_of
from polysense.objectives.clusters import sinkhorn
from polysense.objectives.twin import koleo
from polysense.pipeline import Pipeline
from polysense.towers.registers import RegisteredBody, SkippingBlock
from polysense.train.fit import fit
from polysense.train.optim import groups
from polysense.train.run import override

recipe = polysense.load("dinov2")
TOY = {"config.backbone.patch": 8, "config.backbone.body.width": 32, "config.backbone.body.depth": 2, "config.backbone.body.heads": 2,
       **{f"config.{h}.{k}": v for h in ("projector", "patch_head") for k, v in (("into", 32), ("hidden", 24), ("bottleneck", 16), ("out", 20))},
       "config.sampler.blocks.least": 1}
PRESET = preset_of("dinov2").but(**TOY)
MASK = torch.zeros(8, 16, dtype=torch.bool)
MASK[0, :5], MASK[3, 2:4], MASK[6, 9] = True, True, True


@pytest.fixture()
def dinov2():
    torch.manual_seed(0)
    system = PRESET.config.build()
    system.sampler.forward = lambda batch, grid, device=None: masking_of(MASK)
    return system


@pytest.fixture(scope="module")
def batch():
    return fake_batch(PRESET, ("views", "crops"), n=4)


def test_all_three_losses_written_out(dinov2, batch):
    dinov2.eval()
    with torch.no_grad():
        flat, held = torch.cat(batch["views"].unbind(1)), dinov2.teacher.module
        tokens = held["backbone"](flat).tokens
        cls = sinkhorn(held["projector"](tokens[:, 0]), 0.04).unflatten(0, (2, 4))
        place = sinkhorn(held["patch_head"](tokens[:, 1:][MASK]), 0.04)
        seen = dinov2.backbone(flat, fill=(MASK, dinov2.hide.token)).tokens
        heard = dinov2.projector(torch.cat([seen[:, 0], *(dinov2.backbone.pooled(c) for c in batch["crops"].unbind(1))])).unflatten(0, (-1, 4))
        terms = [-(cls[i] * (heard[j] / 0.1).log_softmax(-1)).sum(-1).mean() for i in (0, 1) for j in range(len(heard)) if i != j]
        said = (dinov2.patch_head(seen[:, 1:][MASK]) / 0.1).log_softmax(-1)
        weight = torch.tensor([1 / 5] * 5 + [1 / 2] * 2 + [1.0])
        losses = dinov2.losses(batch)
        torch.testing.assert_close(losses["distil"], torch.stack(terms).mean(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(losses["patches"], (weight * -(place * said).sum(-1)).sum() / 8, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(losses["koleo"], 0.1 * (koleo(seen[:4, 0]) + koleo(seen[4:, 0])), rtol=1e-4, atol=1e-5)


def test_only_hidden_patches_enter_the_patch_head_which_is_another(dinov2, batch):
    rows = {"student": [], "teacher": []}
    for who, head in (("student", dinov2.patch_head), ("teacher", dinov2.teacher.module["patch_head"])):
        head.register_forward_hook(lambda m, args, out, who=who: rows[who].append(len(args[0])))
    dinov2.losses(batch)
    assert rows == {"student": [int(MASK.sum())], "teacher": [int(MASK.sum())]}
    assert dinov2.patch_head is not dinov2.projector and dinov2.patch_head.last.data_ptr() != dinov2.projector.last.data_ptr()
    assert set(dinov2.teacher.module) == {"backbone", "projector", "patch_head"}
    one = override(PRESET, {"heads": "one"}).config.build()
    assert not hasattr(one, "patch_head")


def test_both_heads_follow_into_the_teacher_and_are_still_at_first(dinov2, batch):
    losses = dinov2.losses(batch)
    losses.total().backward()
    assert dinov2.patch_head.last.grad.abs().sum() == 0 == dinov2.projector.last.grad.abs().sum()
    with torch.no_grad():
        dinov2.patch_head.layers[0].weight.add_(1)
    held = dinov2.teacher.module["patch_head"].layers[0].weight
    before = held.clone()
    dinov2.after_step(After(1, 0.5, None, losses.keep))
    assert not torch.equal(held, before) and float(dinov2.patch_head.gate) == 1 == float(dinov2.projector.gate)


def test_koleo_is_of_the_features_below_the_head_one_view_at_a_time(dinov2, batch):
    dinov2.train().losses(batch)["koleo"].backward()
    assert all(p.grad is None for p in dinov2.projector.parameters()) and dinov2.backbone.patch.weight.grad is not None
    plain = PRESET.but(**{"config.koleo": 0.0}).config.build()
    assert "koleo" not in plain.losses(batch)


def test_registers_are_inside_and_not_outside():
    torch.manual_seed(0)
    config = recipe.tower(32, 8, 24, 2, 2, scale=1.0, registers=4)
    tower, image = config.build().eval(), torch.randn(2, 3, 32, 32)
    torch.nn.init.normal_(tower.body.registers)
    inside = []
    tower.body.blocks[0].register_forward_hook(lambda m, args, out: inside.append(out.shape[1]))
    with torch.no_grad():
        out = tower(image)
        assert inside == [1 + 16 + 4] and out.tokens.shape == (2, 17, 24) and tower.dense(image).shape == (2, 4, 4, 24)
        torch.testing.assert_close(tower.pooled(image), out.pooled, rtol=1e-4, atol=1e-5)
        assert tower.position.shape[1] == 17, "registers have no position"
        plain = recipe.tower(32, 8, 24, 2, 2, scale=1.0).build().eval()
        plain.load_state_dict({k: v for k, v in tower.state_dict().items() if "registers" not in k})
        assert not torch.allclose(plain(image).tokens, out.tokens, atol=1e-4)
        x = plain.embed(image)[0]
        seen = torch.ones(1, 21, 21, dtype=torch.bool)
        seen[:, :, 17:] = False                                                      # nobody attends to the registers
        y = torch.cat([x, tower.body.registers.expand(2, -1, -1)], 1)
        for block in tower.body.blocks:
            y = block(y, mask=seen)
        torch.testing.assert_close(tower.body.norm(y[:, :17]), plain(image).tokens, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="registers"):
        RegisteredBody.Config(width=8, depth=1, heads=2, registers=0).build()


def test_dropped_samples_are_not_computed_and_the_mean_is_kept():
    torch.manual_seed(0)
    said = {"width": 8, "heads": 2, "layer_scale": 0.5}
    block, plain, x = SkippingBlock.Config(**said, drop_path=0.5).build(), PreNorm.Config(**said).build(), torch.randn(8, 3, 8)
    plain.load_state_dict(block.state_dict())
    rows = []
    block.attn.register_forward_hook(lambda m, args, out: rows.append(len(args[0])))
    block.train()(x)
    assert rows == [4], "half of the samples pass the branch"
    torch.testing.assert_close(block.eval()(x), plain.eval()(x))
    with torch.no_grad():
        block.train()
        first = torch.stack([block._some(x, lambda part: block.attn(block.norm1(part)), block.scale1) for _ in range(400)]).mean(0)
        torch.testing.assert_close(first, x + 0.5 * plain.attn(plain.norm1(x)), rtol=0.2, atol=0.08)


def test_the_recipes_numbers():
    paper = preset_of("dinov2", "paper")
    c, optim = paper.config, paper.stages[0].optim
    assert c.sampler.draw == "even" and c.sampler.share == 0.5 and c.sampler.ratio == (0.1, 0.5) and c.centre.iterations == 3
    assert c.backbone.body.block.layer_scale == 1e-5 and c.backbone.body.drop_path == 0.4 and c.backbone.body.block.mlp.hidden == 4096
    assert c.projector.out == c.patch_head.out == 131_072 and c.projector.bottleneck == 384 and c.koleo == 0.1
    assert optim.layer_decay == 1.0 and paper.config.teacher.momentum == 0.994
    assert optim.lr == pytest.approx(2e-4 * 3 ** 0.5) and paper.stages[0].steps == 625_000 and optim.lr_scale == (("backbone.patch.*", 0.2),)
    scales = {n: g["scale"] for g in groups(PRESET.config.build(), PRESET.stages[0].optim) for n in g["names"]}
    assert scales["backbone.patch.weight"] == pytest.approx(0.2) and scales["backbone.cls"] == 1.0
    assert preset_of("dinov2", "high").feed.views[0].size == 518 and preset_of("dinov2", "high").starts[0].from_ == "dinov2"


def test_centring_by_a_mean_is_swapped_in_by_name_and_uses_fewer_prototypes(batch):
    assert override(PRESET, {"heads": "one", "centre": "mean"}).config.patch_centre.width == 20
    mean = override(PRESET, {"centre": "mean"}).config.build()
    assert isinstance(mean.centre, Centre) and mean.patch_centre.value.shape == (20,)
    torch.manual_seed(0)
    shared = PRESET.config.build()
    mean.load_state_dict(shared.state_dict(), strict=False)
    used = [float(s.health(s.eval().losses(batch).keep)["answers_used"]) for s in (shared, mean)]
    assert used[0] > used[1]


def test_a_small_tower_learns_from_a_frozen_guide(batch):
    small = preset_of("dinov2", "distilled")
    assert small.stages[0].trainable == ("backbone.*", "projector.*", "patch_head.*") and small.config.backbone.body.drop_path == 0.0
    assert {s.into: s.take for s in small.starts} == {f"guide.{n}": f"teacher.module.{n}" for n in ("backbone", "projector", "patch_head")}
    head = PRESET.config.projector
    config = PRESET.config.but(guide=recipe.tower(32, 8, 24, 1, 2, drop_path=0.5), guide_head=head.but(into=24))
    system = config.build().eval()
    with torch.no_grad():
        flat, held = torch.cat(batch["views"].unbind(1)), system.guide
        tokens, seen = held["backbone"](flat).tokens, system.backbone(flat).tokens
        cls = sinkhorn(held["projector"](tokens[:, 0]), 0.04).unflatten(0, (2, 4))
        place = sinkhorn(held["patch_head"](tokens[:, 1:].flatten(0, 1)), 0.04)
        heard = system.projector(torch.cat([seen[:, 0], *(system.backbone.pooled(c) for c in batch["crops"].unbind(1))])).unflatten(0, (-1, 4))
        terms = [-(cls[i] * (heard[j] / 0.1).log_softmax(-1)).sum(-1).mean() for i in (0, 1) for j in range(len(heard)) if i != j]
        said = (system.patch_head(seen[:, 1:].flatten(0, 1)) / 0.1).log_softmax(-1)
        losses = system.learn_from_guide(batch)
        torch.testing.assert_close(losses["distil"], torch.stack(terms).mean(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(losses["patches"], -(place * said).sum(-1).mean(), rtol=1e-4, atol=1e-4, msg="on every patch, none masked")
        torch.testing.assert_close(losses["koleo"], 0.1 * (koleo(seen[:4, 0]) + koleo(seen[4:, 0])), rtol=1e-4, atol=1e-5)
    stage = PRESET.stages[0].but(objective=recipe.DINOv2.learn_from_guide, trainable=small.stages[0].trainable, steps=2, batch_size=4)
    guide = {k: v.clone() for k, v in system.guide.state_dict().items()}
    copy = system.teacher.module["backbone"].patch.weight.clone()
    assert len(list(fit(system, stage, [batch] * 2))) == 2
    assert all(torch.equal(v, guide[k]) for k, v in system.guide.state_dict().items()) and not system.guide.training
    assert not torch.equal(copy, system.teacher.module["backbone"].patch.weight), "the average is what is used"
    with pytest.raises(UserError, match="no guide"):
        PRESET.config.build().learn_from_guide(batch)
    with pytest.raises(UserError, match="patches of one size"):
        config.but(guide=recipe.tower(32, 16, 24, 1, 2)).build().learn_from_guide(batch)


def test_tiny_trains_and_its_features_are_the_teachers(dinov2, batch, tmp_path):
    steps = list(fit(dinov2, PRESET.stages[0].but(steps=10, batch_size=4, precision="fp32", **{"optim.warmup": 1}), [batch] * 10))
    assert steps[-1].total < steps[0].total and {"teacher_entropy", "feature_spread"} <= steps[-1].health.keys()
    image = batch["views"][:, 0]
    with torch.no_grad():
        want = F.normalize(dinov2.eval().teacher.module["backbone"](image).tokens[:, 0], dim=-1)
        torch.testing.assert_close(dinov2.encode_image(image), want, rtol=1e-4, atol=1e-5)
        assert dinov2.attend(image).shape == (4, 2, 4, 4)
    (tmp_path / "b.png").write_bytes(b"")
    with pytest.raises(UserError, match="no bytes"):
        Pipeline(dinov2, PRESET, id="dinov2").encode(images=[tmp_path / "b.png"])
