"""MVP's essence (Wei et al. 2022)."""
import pytest
import torch
import torch.nn.functional as F

import polysense
from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.decoders.features import FeatureTarget
from polysense.nn.head import Linear
from polysense.objectives.masked import masked_cosine
from polysense.towers.clip import body, image_tower
from polysense.train.fit import fit

recipe = polysense.load("mvp")
TOY = {"config.encoder.body.width": 24, "config.encoder.body.depth": 2, "config.encoder.body.heads": 2, "config.target.tower.body.depth": 2,
       "config.target.tower.body.width": 48, "config.target.head.into": 48, "config.target.head.out": 16, "config.target.width": 16}


def toy(**more):
    torch.manual_seed(0)
    return preset_of("mvp").but(**TOY, **more).config.build().eval()


@pytest.fixture()
def mvp():
    return toy()


@pytest.fixture()
def image():
    return torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_the_target_is_clips_projected_token_of_the_same_place_in_clips_own_pixels(mvp, image):
    plan = preset_of("mvp")
    mean, std, theirs, clips = (torch.tensor(v).view(1, 3, 1, 1) for v in (recipe.MEAN, recipe.STD, plan.config.target.tower_mean,
                                                                        plan.config.target.tower_std))
    assert plan.config.target.tower_mean != recipe.MEAN
    tokens = mvp.target.tower(((image * std + mean).clamp(0, 1) - theirs) / clips).tokens
    masking = mvp.masking(image)
    torch.testing.assert_close(mvp.target(image, masking), F.linear(tokens, mvp.target.head.weight)[:, 1:][masking.mask], rtol=1e-4, atol=1e-5)
    bare = FeatureTarget.Config(tower=image_tower(64, 8, body(12, 0, 2)), head=Linear.Config(into=12, out=12), width=12).build()
    bright = image.clone()
    bright[:, :, 16:24, 40:48] += 3                              # the patch of row 2, column 5
    change = (bare.whole(bright) - bare.whole(image)).norm(dim=-1)
    assert (change.argmax(1) == 2 * 8 + 5).all() and (change > 1e-6).sum() == 3


def test_the_teacher_is_frozen_whole_and_does_not_know_the_mask(mvp, image):
    before = {k: v.clone() for k, v in mvp.target.state_dict().items()}
    stage = preset_of("mvp").stages[0].but(steps=15, **{"optim.warmup": 1})
    steps = list(fit(mvp, stage, iter([{"image": image}] * 15)))
    assert steps[-1].total < steps[0].total - 0.02 and not mvp.target.training
    assert all(torch.equal(v, before[k]) for k, v in mvp.target.state_dict().items())
    one, two = mvp.masking(image), mvp.masking(image)
    both = one.mask & two.mask
    whole = mvp.target.whole(image)
    assert torch.equal(mvp.target(image, one), whole[one.mask]) and torch.equal(mvp.target(image, two), whole[two.mask]) and both.any()


def test_a_teacher_of_other_pictures_teaches_nothing(mvp):
    """Pictures of one colour each, and what the teacher says less its mean over them: all else is alike for all of them, and learned from any."""
    g = torch.Generator().manual_seed(3)
    image = torch.randn(4, 3, 1, 1, generator=g) + 0.2 * torch.randn(4, 3, 64, 64, generator=g)
    plan, final = preset_of("mvp").stages[0].but(steps=40, **{"optim.warmup": 1, "optim.lr": 3e-3}), []
    real = mvp.target.whole
    for shuffle in (lambda x: x, lambda x: x[torch.randperm(len(x))]):
        model = toy()
        model.target.load_state_dict(mvp.target.state_dict())
        model.target.whole = lambda pixels, shuffle=shuffle: shuffle(real(pixels) - real(pixels).mean(0))
        steps = list(fit(model, plan, iter([{"image": image}] * 40)))
        final.append(1 - sum(s.total for s in steps[-10:]) / 10)
    assert final[0] > 0.3 and abs(final[1]) < 0.15, final


def test_loss_is_one_minus_cosine_whatever_the_lengths(mvp, image):
    torch.manual_seed(2)
    masking = mvp.masking(image)
    said, truth = mvp.pairs(image, masking)
    slow = torch.stack([1 - (a @ b) / (a.norm() * b.norm()) for a, b in zip(said, truth)]).mean()
    torch.manual_seed(2)
    torch.testing.assert_close(mvp.losses({"image": image})["features"], slow)
    torch.testing.assert_close(masked_cosine(said * 7, truth * 0.1), slow)
    assert masked_cosine(truth, truth).abs() < 1e-5 and abs(float(masked_cosine(-truth, truth)) - 2) < 1e-5


@pytest.mark.parametrize("positions, count", [("all", 64), ("cls", None)])
def test_positions_say_what_enters_the_mean(positions, count, image):
    model = toy(**{"config.positions": positions})
    torch.manual_seed(2)
    masking = model.masking(image)
    chosen = model.chosen(masking)
    assert chosen.shape == (3, 65) and torch.equal(chosen.sum(1), torch.full((3,), count) if count else 1 + masking.mask.sum(1))
    said, truth = model.decoder.head(model.see(image, masking)), model.target.tokens(image)
    want = 1 - F.cosine_similarity(said, truth, dim=-1)[chosen].mean()
    torch.manual_seed(2)
    torch.testing.assert_close(model.losses({"image": image})["features"], want)
    with pytest.raises(UserError, match="masked, all, cls"):
        toy(**{"config.positions": "some"})


def test_student_is_beits_and_does_not_see_hidden_pixels(mvp, image):
    masking = mvp.masking(image)
    hidden = masking.mask.view(-1, 1, 8, 8).repeat_interleave(8, 2).repeat_interleave(8, 3)
    other = torch.where(hidden, torch.randn_like(image), image)
    assert torch.equal(mvp.decoder(mvp.see(image, masking), masking), mvp.decoder(mvp.see(other, masking), masking))
    assert mvp.encoder.position is None and hasattr(mvp.encoder.body, "relative")
    torch.testing.assert_close(mvp.predicted(image).norm(dim=-1), torch.ones(3))
    paper = preset_of("mvp", "paper").config
    assert (paper.sampler.hidden, paper.sampler.least) == (75, 16) and paper.target.tower.patch == paper.encoder.patch == 16
    assert not hasattr(paper.target, "codec"), "nothing is quantised"
