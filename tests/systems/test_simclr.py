"""SimCLR's essence (Chen et al. 2020): views, head, loss over the 2B views, negatives of all ranks, LARS."""
from math import exp, log

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fake import fake_batch
from PIL import Image

import polysense
from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.data import source
from polysense.data.loader import Loader
from polysense.objectives.contrastive import nt_xent
from polysense.pipeline import Pipeline
from polysense.train.fit import fit
from polysense.train.optim import LARS, make_optimizer
from polysense.train.run import override

recipe = polysense.load("simclr")
PRESET = preset_of("simclr").but(**{"config.backbone.base": 8, "config.projector.width": 32, "config.projector.hidden": 16,
                                    "config.projector.out": 8})
TAU = 0.2


@pytest.fixture()
def simclr():
    torch.manual_seed(0)
    return PRESET.config.build()


@pytest.fixture(scope="module")
def batch():
    return fake_batch(PRESET, ("views",), n=4)


def loss_of(system, batch):
    return system.compare(system.embed(batch))["contrast"]


def test_the_loss_is_the_papers_over_all_ordered_pairs_of_the_views(simclr, batch):
    simclr.train()
    seen = simclr.embed(batch)
    z = F.normalize(torch.cat([seen["one"], seen["two"]]), dim=-1).detach()
    terms = []
    for i in range(8):
        j = (i + 4) % 8
        others = [float(z[i] @ z[k]) for k in range(8) if k != i]
        assert len(others) == 7, "its partner and the 2(B - 1) views of other pictures"
        terms.append(-log(exp(float(z[i] @ z[j]) / TAU) / sum(exp(s / TAU) for s in others)))
    assert float(simclr.compare(seen)["contrast"].detach()) == pytest.approx(sum(terms) / 8, rel=1e-4)


def test_order_of_pictures_and_of_views_does_not_matter_nor_does_length(simclr, batch):
    simclr.eval()
    base = loss_of(simclr, batch)
    torch.testing.assert_close(loss_of(simclr, {"views": batch["views"][[2, 0, 3, 1]]}), base)
    torch.testing.assert_close(loss_of(simclr, {"views": batch["views"].flip(1)}), base)
    seen = simclr.embed(batch)
    torch.testing.assert_close(simclr.compare({k: 37.0 * v for k, v in seen.items()})["contrast"], base)


def test_the_ends_of_the_loss():
    alike = torch.randn(1, 6).expand(5, -1)
    assert float(nt_xent(alike, alike, 0.1)) == pytest.approx(log(2 * 5 - 1), rel=1e-5)
    apart = torch.eye(5, 8)
    assert float(nt_xent(apart, apart, 0.5)) == pytest.approx(log(1 + (2 * 5 - 2) * exp(-1 / 0.5)), rel=1e-5)


def test_gradients_reach_both_views_and_the_negatives_and_no_view_meets_itself():
    one, two = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    z = F.normalize(torch.cat([one, two]), dim=-1)
    logits = (z @ z.T / TAU).masked_fill(torch.eye(6, dtype=torch.bool), -torch.inf)
    assert (logits.softmax(1).diagonal() == 0).all()
    naive = F.cross_entropy(logits, torch.tensor([3, 4, 5, 0, 1, 2]))
    want = torch.autograd.grad(naive, (one, two), retain_graph=True)
    got = torch.autograd.grad(nt_xent(one, two, TAU), (one, two))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    asked = z[:1] @ z[[1, 2, 3, 4, 5]].T / TAU                   # one view alone: its partner is number 3, the others are negatives
    alone = torch.cat(torch.autograd.grad(-asked.log_softmax(1)[0, 2], (one, two)))
    assert (alone[[1, 2, 4, 5]].abs().sum(1) > 0).all(), "negatives are moved too"


def test_the_views_are_crops_with_colour_in_the_published_measures():
    one, two = preset_of("simclr", "paper").feed.views
    assert one == two, "t and t' come from one family"
    assert (one.scale, one.flip, one.jitter, one.grey, one.blur) == ((0.08, 1.0), 0.5, 0.8, 0.2, 0.5) and one.jitter_by == (0.8, 0.8, 0.8, 0.2)
    data = Loader(source("scenes:single?n=4"), PRESET.feed, None, batch_size=4, needs=("views",), workers=0)
    views = next(iter(data))["views"]
    assert not torch.equal(views[:, 0], views[:, 1])
    colours = [override(PRESET, {"augment": w}).feed.views[0] for w in ("crop", "colour", "crop_and_colour")]
    assert [(v.jitter, v.scale) for v in colours] == [(0.0, (0.2, 1.0)), (0.8, (1.0, 1.0)), (0.8, (0.2, 1.0))]
    with pytest.raises(UserError, match="no augment is called 'crops'"):
        override(PRESET, {"augment": "crops"})


def test_transfer_reads_h_below_the_head_which_has_one_hidden_layer(simclr, batch):
    image = batch["views"][:, 0]
    simclr.eval()
    with torch.no_grad():
        h = simclr.backbone(image).pooled
        torch.testing.assert_close(simclr.encode_image(image), F.normalize(h, dim=-1))
        up, down = simclr.projector.up, simclr.projector.down
        z = F.linear(F.linear(h, up.weight, up.bias).relu(), down.weight, down.bias)
        torch.testing.assert_close(simclr.project(image), z)
    head = preset_of("simclr", "paper").config.projector
    assert (head.width, head.hidden, head.out, head.act) == (2048, 2048, 128, "relu")
    assert preset_of("simclr", "paper").config.temperature == 0.1


def test_lars_scales_with_the_batch_and_leaves_biases_and_norms_alone(simclr):
    stage = preset_of("simclr", "paper").stages[0]
    assert stage.optim.lr == pytest.approx(0.3 * stage.batch_size / 256) and stage.optim.weight_decay == 1e-6 and stage.optim.schedule == "cosine"
    assert stage.optim.warmup * 100 == stage.steps
    optimizer = make_optimizer(simclr, stage.optim)        # of the toy's parameters
    assert isinstance(optimizer, LARS)
    for group in optimizer.param_groups:
        plain = {("norm" in n or n.endswith("bias")) for n in group["names"]}
        assert plain == {not group["adapt"]} and (group["weight_decay"] == 0) == (not group["adapt"])


def test_tiny_learns_through_the_one_loop_and_says_how_it_is(simclr):
    g = torch.Generator().manual_seed(0)
    pictures = torch.randn(16, 3, 16, 16, generator=g)
    batches = [{"views": torch.stack([pictures + 0.3 * torch.randn(16, 3, 16, 16, generator=g) for _ in range(2)], 1)} for _ in range(20)]
    stage = PRESET.stages[0].but(steps=20, batch_size=16, precision="fp32", **{"optim.warmup": 1, "optim.lr": 5e-3})
    steps = list(fit(simclr, stage, batches))
    assert steps[-1].total < 0.6 * steps[0].total
    said = [s.health for s in steps if s.health]
    assert len(said) == 2 and said[-1].keys() == {"feature_spread", "effective_rank", "alignment", "uniformity"}
    assert said[-1]["feature_spread"] > 0.5


def test_parts_of_a_batch_meet_as_one_batch_when_nothing_else_joins_samples(batch):
    """Gradient caching: with the norms still, chunks give the gradient of the whole batch."""
    def gradient(**how):
        torch.manual_seed(0)
        system = PRESET.config.build()
        for m in system.modules():
            if isinstance(m, torch.nn.BatchNorm2d):
                m.train = lambda mode=True, m=m: m
                m.training = False
        stage = PRESET.stages[0].but(steps=1, batch_size=4, precision="fp32", optim=PRESET.stages[0].optim.but(name="sgd", lr=1.0, warmup=0), **how)
        before = [p.detach().clone() for p in system.parameters()]
        list(fit(system, stage, [batch]))
        return [b - p.detach() for b, p in zip(before, system.parameters(), strict=True)]
    for whole, parts in zip(gradient(), gradient(chunk=2), strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-3, atol=1e-5)


def test_pipeline_reads_files_and_refuses_broken_ones(simclr, tmp_path):
    pipeline = Pipeline(simclr, PRESET, id="simclr")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    assert pipeline.encode(images=[tmp_path / "a.png"]).shape == (1, 32)
    (tmp_path / "b.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="cannot read"):
        pipeline.encode(images=[tmp_path / "b.png"])


def test_bad_batches_are_refused_by_name(simclr, batch):
    with pytest.raises(UserError):
        simclr.embed({"views": torch.randn(2, 2, 1, 32, 32)})
    assert list(simclr.doubts({"views": batch["views"][:, :1].expand(-1, 2, -1, -1, -1)})) and not list(simclr.doubts(batch))
    views = batch["views"].clone()
    views[1, 0, 0, 0, 0] = float("nan")
    with pytest.raises(UserError, match=r"diverged.*1 hold values"):
        list(fit(simclr, PRESET.stages[0].but(batch_size=4, steps=1), [{"views": views, "index": torch.arange(4)}]))
