"""SLIP's essence (Mu et al. 2022)."""
from math import exp, log

import pytest
import torch
import torch.nn.functional as F
from fake import fake_batch

import polysense
from polysense.base.catalogue import preset_of
from polysense.objectives.contrastive import info_nce, nt_xent

recipe = polysense.load("slip")


@pytest.fixture()
def slip():
    torch.manual_seed(0)
    return preset_of("slip").config.build()


@pytest.fixture(scope="module")
def batch():
    return fake_batch(preset_of("slip"), ("image", "text", "views"), n=6)


def gradients(system, batch, weights):
    system.zero_grad()
    system.compare_views(system.embed_views(batch)).total(weights).backward()
    return {n: p.grad.clone() for n, p in system.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}


def test_without_the_ssl_term_it_is_clip(slip, batch):
    got = gradients(slip, batch, (("ssl", 0.0),))
    slip.zero_grad()
    info_nce(slip.encode_image(batch["image"]), slip.encode_text(batch["text"]), slip.scale).backward()
    want = {n: p.grad for n, p in slip.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert set(got) == set(want) and not any(n.startswith("projector") for n in got)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_ssl_reaches_the_shared_tower_and_projector_but_no_text(slip, batch):
    got = gradients(slip, batch, (("clip", 0.0),))
    assert any(n.startswith("vision.") for n in got) and any(n.startswith("projector.") for n in got)
    assert not any(n.startswith(("text", "image_head", "log_scale")) for n in got)


def test_all_three_views_pass_the_same_tower(slip, batch):
    seen = []
    slip.vision.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    slip.embed_views(batch)
    assert len(seen) == 3 and sum(torch.equal(s, batch["image"]) for s in seen) == 1


def test_projector_has_three_layers_with_batch_norm_after_the_first_two():
    with torch.device("meta"):
        projector = preset_of("slip", "paper").config.projector.build()
    kinds = [type(m).__name__ for m in projector.modules()]
    assert sum("Linear" in k for k in kinds) == 3 and sum("BatchNorm" in k for k in kinds) == 2
    linears = [m for m in projector.modules() if isinstance(m, torch.nn.Linear)]
    assert [m.out_features for m in linears] == [4096, 4096, 256]
    small = recipe.Projector.Config(widths=(4, 8, 8, 3)).build()
    assert (small(torch.randn(16, 4)) < 0).any(), "no ReLU after the last layer"


def test_projector_reads_the_feature_below_clips_head(slip, batch):
    got = slip.embed_views(batch)["one"]
    torch.testing.assert_close(got, slip.projector(slip.vision(batch["views"][:, 0]).pooled))


def test_nt_xent_of_identical_orthogonal_views_has_its_closed_form():
    n, t = 5, 0.1
    z = torch.eye(n)
    assert nt_xent(z, z, t).item() == pytest.approx(log(1 + (2 * n - 2) * exp(-1 / t)), abs=1e-5)


def test_nt_xent_excludes_self_similarity_and_counts_both_views():
    one, two = (F.normalize(torch.randn(4, 6), dim=-1) for _ in range(2))
    z, total = torch.cat([one, two]), 0.0
    for i in range(8):
        others = [j for j in range(8) if j != i]
        logits = torch.stack([z[i] @ z[j] for j in others]) / 0.1
        total += F.cross_entropy(logits[None], torch.tensor([others.index((i + 4) % 8)])).item()
    assert nt_xent(one, two, 0.1).item() == pytest.approx(total / 8, rel=1e-5)


def test_removing_the_projector_does_not_change_zero_shot_output(slip, batch):
    slip.eval()
    before = slip.encode_image(batch["image"]) @ slip.encode_text(batch["text"]).T
    slip.projector = None
    assert torch.equal(before, slip.encode_image(batch["image"]) @ slip.encode_text(batch["text"]).T)


def test_views_are_as_the_paper_says():
    feed = preset_of("slip", "paper").feed
    assert (feed.image.mean, feed.image.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), "scaled as ImageNet's, as the released weights are"
    assert preset_of("laclip", "paper").feed.image == feed.image == preset_of("declip", "paper").feed.image
    assert preset_of("laclip", "laion").feed.image == preset_of("clip", "paper").feed.image, "those of LAION as CLIP's"
    assert feed.train_image.scale == (0.5, 1.0) and feed.train_image.jitter == 0, "CLIP's view is lightly cropped, its colours are true"
    assert len(feed.views) == 2 and all(v.scale[0] == 0.08 and v.jitter == 0.8 and v.grey == 0.2 and v.blur == 0.5 for v in feed.views)


def test_image_tower_is_timms_without_clips_first_norm(slip):
    assert slip.vision.norm_pre is None and slip.vision.body.norm.eps == 1e-6
    torch.testing.assert_close(slip.vision.body.blocks[0].mlp.act(torch.ones(2)), F.gelu(torch.ones(2)))
