"""data2vec's essence for pictures (Baevski et al. 2022)."""
import pytest
import torch
import torch.nn.functional as F

import polysense
from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.objectives.regress import masked_smooth_l1
from polysense.train.fit import fit

recipe = polysense.load("data2vec_vision")
TOY = {"config.encoder.body.width": 24, "config.encoder.body.depth": 3, "config.encoder.body.heads": 2}


def toy(**more):
    torch.manual_seed(0)
    system = preset_of("data2vec_vision").but(**TOY, **more).config.build().eval()
    with torch.no_grad():
        for p in system.encoder.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    system.after_start()
    return system


@pytest.fixture()
def model():
    return toy()


@pytest.fixture()
def image():
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def test_target_is_the_normed_mean_of_normed_layers_of_the_unmasked_picture(model, image):
    held = model.target.teacher.module
    layers = held.body.layers(held.embed(image)[0])[-2:]
    mean = torch.stack([F.layer_norm(x[:, 1:], (24,)) for x in layers]).mean(0)
    want = F.layer_norm(mean, (24,))
    masking = model.masking(image)
    torch.testing.assert_close(model.target(image, masking), want[masking.mask])
    torch.testing.assert_close(want.mean(-1), torch.zeros(3, 64), atol=1e-5, rtol=0)
    torch.testing.assert_close(want.var(-1, unbiased=False), torch.ones(3, 64), atol=1e-3, rtol=0)


def test_one_layer_is_normed_twice(image):
    model = toy(**{"config.target.top": 1})
    last = model.encoder.body.layers(model.encoder.embed(image)[0])[-1][:, 1:]
    torch.testing.assert_close(model.target.whole(image), F.layer_norm(F.layer_norm(last, (24,)), (24,)), rtol=1e-4, atol=1e-5)


def test_the_teacher_sees_what_the_student_does_not(model, image):
    masking = model.masking(image)
    hidden = masking.mask.view(-1, 1, 8, 8).repeat_interleave(8, 2).repeat_interleave(8, 3)
    other = torch.where(hidden, torch.randn_like(image), image)
    (said, truth), (again, moved) = model.pairs(image, masking), model.pairs(other, masking)
    assert torch.equal(said, again) and not torch.equal(truth, moved)
    assert not truth.requires_grad and said.requires_grad


def test_the_teacher_is_an_average_that_moves_after_the_step_alone(model, image):
    before = {k: v.clone() for k, v in model.target.state_dict().items()}
    model.losses({"image": image}).total().backward()
    assert all(torch.equal(v, before[k]) for k, v in model.target.state_dict().items()) and not list(model.target.parameters())
    stage = preset_of("data2vec_vision").stages[0].but(steps=1, **{"optim.warmup": 0})
    list(fit(model, stage, iter([{"image": image}])))
    m = model.target.teacher.momentum(1.0)
    for name, value in model.encoder.state_dict().items():
        torch.testing.assert_close(model.target.teacher.module.state_dict()[name], m * before[f"teacher.module.{name}"] + (1 - m) * value)
    fresh = toy()
    assert all(torch.equal(v, fresh.target.teacher.module.state_dict()[k]) for k, v in fresh.encoder.state_dict().items()), "it begins as the student"


def test_the_loss_is_smooth_with_beta_2():
    d = torch.tensor([[0.0, 0.5, -1.5, 1.99, 2.0, -3.0, 10.0]])
    want = torch.where(d.abs() < 2, 0.5 * d ** 2 / 2, d.abs() - 1).mean()
    torch.testing.assert_close(masked_smooth_l1(d, torch.zeros_like(d)), want)
    with pytest.raises(UserError, match="same hidden patches"):
        masked_smooth_l1(d, d[:, :2])


def test_published_settings():
    paper = preset_of("data2vec_vision", "paper")
    c = paper.config
    assert (c.sampler.hidden, c.sampler.least, c.sampler.most) == (120, 16, None) and c.target.top == 6 and c.target.teacher.momentum == 0.9998
    assert c.target.teacher.final is None and c.encoder.body.block.layer_scale == 1e-4 and c.encoder.body.drop_path == 0.25 and c.beta == 2.0
    assert paper.stages[0].optim.lr == 2e-3 and paper.stages[0].optim.clip == 3.0


def test_it_learns_and_targets_stay_spread(model, image):
    stage = preset_of("data2vec_vision").stages[0].but(steps=20, **{"optim.warmup": 2})
    steps = list(fit(model, stage, iter([{"image": image}] * 20)))
    assert steps[-1].total < steps[0].total and 0.2 < float(model.spread(image)) <= 1.01
    same = torch.zeros_like(image)
    assert float(model.spread(same)) < float(model.spread(image))


def test_wrong_depths_are_refused():
    for top in (0, 4):
        with pytest.raises(UserError, match="top lies between 1 and 3"):
            toy(**{"config.target.top": top})
    with pytest.raises(UserError, match="norm is one of"):
        toy(**{"config.target.norm": "unit"})
