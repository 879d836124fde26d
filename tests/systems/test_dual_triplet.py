"""The margin loss and its policies (Faghri et al. 2018; Schroff et al. 2015), against loops and torch's own."""
import pytest
import torch
import torch.nn.functional as F

import polysense
from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.objectives.contrastive import info_nce
from polysense.objectives.triplet import hinge

recipe = polysense.load("dual_triplet")
B, D, M = 7, 5, 0.3


def unit(n: int = B, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float32), dim=-1)


OWNER = torch.tensor([0, 1, 2, 2, 3, 4, 2])


def loops(image, text, policy: str, owner) -> float:
    """Anchor by anchor, in distances d = 1 - cos."""
    def d(x, y):
        return 1 - float(F.cosine_similarity(x, y, dim=0))
    total = 0.0
    for a, b in ((image, text), (text, image)):
        for i in range(len(a)):
            costs = []
            for j in range(len(a)):
                if owner[i] == owner[j]:
                    continue
                positive, negative = d(a[i], b[i]), d(a[i], b[j])
                if policy == "semi_hard" and not positive < negative < positive + M:
                    continue
                costs.append(max(0.0, M + positive - negative))
            total += sum(costs) if policy == "sum" else max(costs, default=0.0)
    return total / len(image)


@pytest.mark.parametrize("policy", ["sum", "hardest", "semi_hard"])
@pytest.mark.parametrize("owner", [torch.arange(B), OWNER], ids=["all different", "captions of one picture"])
def test_the_batch_form_is_the_sum_over_triplets(policy, owner):
    image, text = unit(), unit(seed=1)
    assert hinge(image, text, M, policy, owner).item() == pytest.approx(loops(image, text, policy, owner), rel=1e-4)
    assert hinge(3 * image, text / 7, M, policy, owner).item() == pytest.approx(loops(image, text, policy, owner), rel=1e-4), "lengths do not matter"


def test_two_samples_are_torchs_triplets_in_value_and_gradient():
    theirs = torch.nn.TripletMarginWithDistanceLoss(distance_function=lambda a, b: 1 - F.cosine_similarity(a, b), margin=M, reduction="sum")
    image, text = unit(2).requires_grad_(), unit(2, 1).requires_grad_()
    want = (theirs(image, text, text.flip(0)) + theirs(text, image, image.flip(0))) / 2
    for policy in ("sum", "hardest", "random"):
        got = hinge(image, text, M, policy, torch.arange(2))
        torch.testing.assert_close(got, want)
        for x, y in zip(torch.autograd.grad(got, (image, text)), torch.autograd.grad(want, (image, text), retain_graph=True), strict=True):
            torch.testing.assert_close(x, y)


def test_beyond_the_margin_there_is_no_gradient_where_info_nce_has_one():
    image = torch.eye(4)[:, :4].clone().requires_grad_()
    text = torch.eye(4)
    for policy in ("sum", "hardest", "semi_hard", "random"):
        loss = hinge(image, text, 0.2, policy, torch.arange(4))
        assert loss.item() == 0 and (torch.autograd.grad(loss, image)[0] == 0).all()
    assert torch.autograd.grad(info_nce(image, text, 10.0), image)[0].abs().sum() > 0


def test_the_hardest_is_the_largest_summand_and_one_at_random_is_some_summand():
    image, text, every = unit(), unit(seed=1), torch.arange(B)
    similar = image @ text.T
    cost = (M + similar - similar.diagonal()[:, None]).relu().fill_diagonal_(0)
    back = (M + similar.T - similar.diagonal()[:, None]).relu().fill_diagonal_(0)
    assert hinge(image, text, M, "hardest", every).item() == pytest.approx(float((cost.amax(1) + back.amax(1)).mean()), rel=1e-5)
    assert hinge(image, text, M, "hardest", every) <= hinge(image, text, M, "sum", every)
    drawn = torch.stack([hinge(image, text, M, "random", every) for _ in range(400)])
    off = (cost.sum(1) + back.sum(1)).mean() / (B - 1)
    assert drawn.std() > 0 and drawn.mean().item() == pytest.approx(float(off), rel=0.1)


def test_a_joint_permutation_changes_nothing():
    order, image, text = torch.randperm(B), unit(), unit(seed=1)
    for policy in ("sum", "hardest", "semi_hard"):
        torch.testing.assert_close(hinge(image[order], text[order], M, policy, OWNER[order]), hinge(image, text, M, policy, OWNER))


def test_no_semi_hard_negative_costs_nothing():
    image, text = torch.eye(3), torch.eye(3).roll(1, 0)                # every negative is either much nearer or as far
    assert hinge(image, text, 0.1, "semi_hard", torch.arange(3)).item() == 0 < hinge(image, text, 0.1, "hardest", torch.arange(3)).item()
    torch.testing.assert_close(hinge(image, text, 0.1, "semi_hard", torch.arange(3), "hardest"), hinge(image, text, 0.1, "hardest", torch.arange(3)))


def test_an_anchor_with_a_semi_hard_negative_does_not_fall_back_and_the_system_does_as_configured():
    """Anchor 0 has a negative nearer than its positive (which costs more) and one within the band; the others have none in it."""
    image, text = torch.eye(3, 4), F.normalize(torch.tensor([[0.8, 0, 0, 0.6], [0.9, 0.43589, 0, 0], [0.7, 0, 0.71414, 0]]), dim=1)
    owner = torch.arange(3)
    first = 0.2 + 0.7 - 0.8                              # the third text, further than the positive by less than the margin; the second is nearer
    similar = image @ text.T

    def pays(s, policy):
        cost, positive = (0.2 + s - s.diagonal()[:, None]).relu().fill_diagonal_(0), s.diagonal()[:, None]
        band = (s < positive) & (s > positive - 0.2) & ~torch.eye(3, dtype=torch.bool)
        return torch.where(band.any(1), (cost * band).amax(1), cost.amax(1) if policy == "hardest" else 0.0)
    assert pays(similar, "hardest")[0].item() == pytest.approx(first, abs=1e-4)
    for fallback in ("none", "hardest"):
        want = float((pays(similar, fallback) + pays(similar.T, fallback)).mean())
        assert hinge(image, text, 0.2, "semi_hard", owner, fallback).item() == pytest.approx(want, abs=1e-5), fallback
        system = preset_of("dual_triplet").config.but(policy="semi_hard", fallback=fallback).build()
        assert system.tell_apart({"image": image, "text": text, "owner": owner})["hinge"].item() == pytest.approx(want, abs=1e-5)
    with pytest.raises(UserError, match="fallback='easiest'"):
        preset_of("dual_triplet").config.but(fallback="easiest").build()


def test_the_hardest_begin_after_a_warm_up_with_the_sum():
    for name in ("tiny", "paper"):
        warm, hard = preset_of("dual_triplet", name).stages[:2]
        assert warm.objective is recipe.DualTriplet.warm_up and hard.objective is recipe.DualTriplet.tell_apart
        assert "log_scale" not in warm.trainable
    system = preset_of("dual_triplet").config.build()
    seen = {"image": unit(), "text": unit(seed=1), "owner": OWNER}
    torch.testing.assert_close(system.warm_up(seen)["hinge"], hinge(seen["image"], seen["text"], 0.2, "sum", OWNER))
    torch.testing.assert_close(system.tell_apart(seen)["hinge"], hinge(seen["image"], seen["text"], 0.2, "hardest", OWNER))
    torch.testing.assert_close(system.compare(seen)["contrast"], info_nce(seen["image"], seen["text"], system.scale))
    with pytest.raises(UserError, match="chooses no negatives"):
        preset_of("dual_triplet").config.but(policy="easiest").build()
    with pytest.raises(ValueError, match="one of"):
        hinge(unit(), unit(), M, "easiest", OWNER)


def test_the_papers_tower_of_pictures_is_imagenets_first_frozen_then_tuned_at_a_tenth():
    preset = preset_of("dual_triplet", "paper")
    assert [(s.into, s.from_, s.take) for s in preset.starts] == [("vision", "resnet", "backbone")]
    assert preset_of("resnet", preset.starts[0].preset).config.backbone == preset.config.vision, "the tower that is lent is this one"
    warm, hard, tune = preset.stages
    assert not any(t.startswith(("vision", "*")) for s in (warm, hard) for t in s.trainable) and "vision.*" in tune.trainable
    assert tune.objective is recipe.DualTriplet.tell_apart and (tune.optim.lr, hard.optim.lr) == (2e-5, 2e-4)
    assert 2 * tune.steps == warm.steps + hard.steps


def test_the_text_is_read_up_to_its_last_word():
    system = preset_of("dual_triplet").config.build().eval()
    text = torch.tensor([[1, 9, 8, 2, 0, 0], [1, 9, 8, 7, 6, 2]])
    with torch.inference_mode():
        torch.testing.assert_close(system.encode_text(text)[:1], system.encode_text(text[:1, :4]))
        tokens = system.text(text)
        torch.testing.assert_close(tokens.pooled[0], tokens.tokens[0, 3])
