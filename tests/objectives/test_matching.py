"""Hard negatives and soft targets against slow, naive twins."""
import pytest
import torch
import torch.nn.functional as F

from polysense.mechanisms.word_mask import WordMask
from polysense.objectives.contrastive import info_nce
from polysense.objectives.distil import distilled_contrast, distilled_words, soft_cross_entropy
from polysense.objectives.matching import hard_negatives, matching_pairs


def test_hard_negatives_are_never_the_own_pair_and_uniform_where_all_are_equal():
    torch.manual_seed(0)
    drawn = torch.stack([hard_negatives(torch.zeros(5, 5)) for _ in range(2000)])
    assert not (drawn == torch.arange(5)).any()
    for row in range(5):
        share = torch.bincount(drawn[:, row], minlength=5) / 2000
        assert all(abs(share[j] - 0.25) < 0.04 for j in range(5) if j != row)


def test_hard_negatives_follow_the_softmax_of_the_others():
    torch.manual_seed(0)
    similar = torch.tensor([[50.0, 0.0, 1.0, 2.0]]).repeat(4000, 1)
    similar = torch.cat([similar, torch.full((4000, 4000 - 4), -1e4)], 1)[:, :4000]
    similar[:, 0] = 50.0
    drawn = hard_negatives(similar)[:1]
    assert drawn[0] in (1, 2, 3), "the own pair is out even where it wins by far"
    want = torch.tensor([0.0, 1.0, 2.0]).softmax(0)
    some = torch.stack([hard_negatives(similar[:1, :4]) for _ in range(3000)])[:, 0]
    torch.testing.assert_close(torch.bincount(some, minlength=4)[1:] / 3000, want, atol=0.03, rtol=0)


def test_rows_of_one_rank_stand_anywhere_among_all_columns():
    similar = torch.zeros(2, 6)
    drawn = torch.stack([hard_negatives(similar, first=3) for _ in range(300)])
    assert set(drawn[:, 0].tolist()) == {0, 1, 2, 4, 5} and set(drawn[:, 1].tolist()) == {0, 1, 2, 3, 5}
    with pytest.raises(ValueError, match="no wrong column"):
        hard_negatives(torch.zeros(1, 1))


def test_pairs_are_a_third_true_and_each_wrong_one_keeps_one_side():
    pairs = matching_pairs(torch.randn(4, 4), torch.randn(4, 4))
    own = torch.arange(4)
    assert pairs.truth.tolist() == [1] * 4 + [0] * 8
    assert torch.equal(pairs.image[:4], own) and torch.equal(pairs.text[:4], own)
    assert torch.equal(pairs.text[4:8], own) and (pairs.image[4:8] != own).all()
    assert torch.equal(pairs.image[8:], own) and (pairs.text[8:] != own).all()


def unit(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


def test_without_soft_targets_it_is_info_nce():
    one, two = unit(5, 8), unit(5, 8)
    both = (distilled_contrast(one, two, one, 9.0, 0.0) + distilled_contrast(two, one, two, 9.0, 0.0)) / 2
    torch.testing.assert_close(both, info_nce(one, two, 9.0))


def test_soft_targets_are_the_kl_form_up_to_an_entropy():
    """(1 - a) CE + a CE(q, p) = (1 - a) CE + a (KL(q || p) + H(q)): equations 6 and 7."""
    feature, keys, teacher, alpha, scale = unit(4, 8).requires_grad_(), unit(9, 8), unit(4, 8), 0.4, 7.0
    got = distilled_contrast(feature, keys, teacher, scale, alpha)
    p, q = (scale * feature @ keys.T).log_softmax(1), (scale * teacher @ keys.T).softmax(1)
    kl, entropy = F.kl_div(p, q, reduction="batchmean"), -(q * q.log()).sum(1).mean()
    want = (1 - alpha) * F.nll_loss(p, torch.arange(4)) + alpha * (kl + entropy)
    torch.testing.assert_close(got, want)
    one, = torch.autograd.grad(got, feature, retain_graph=True)
    two, = torch.autograd.grad((1 - alpha) * F.nll_loss(p, torch.arange(4)) + alpha * kl, feature)
    torch.testing.assert_close(one, two)


def test_no_gradient_reaches_keys_or_teacher():
    feature, keys, teacher = (unit(*s).requires_grad_() for s in ((3, 4), (6, 4), (3, 4)))
    distilled_contrast(feature, keys, teacher, 5.0, 0.5).backward()
    assert feature.grad is not None and keys.grad is None and teacher.grad is None


def test_masked_words_mix_hard_and_soft_targets():
    logits, word, soft = torch.randn(2, 7), torch.randint(7, (2,)), torch.randn(2, 7)
    hard = F.cross_entropy(logits, word)
    torch.testing.assert_close(distilled_words(logits, word), hard)
    taught = torch.stack([soft_cross_entropy(logits[i], soft[i].softmax(0)) for i in range(2)]).mean()
    torch.testing.assert_close(distilled_words(logits, word, soft, 0.25), 0.75 * hard + 0.25 * taught)
    assert distilled_words(logits[:0], word[:0]) == 0


def test_words_are_hidden_as_in_bert():
    torch.manual_seed(0)
    hide = WordMask.Config(vocab=1000, mask=4, special=(0, 1, 2)).build()
    text = torch.randint(5, 1000, (200, 100))
    text[:, 0], text[:, 60], text[:, 61:] = 1, 2, 0
    hidden, chosen = hide(text)
    assert not chosen[:, 0].any() and not chosen[:, 60:].any() and torch.equal(hidden[~chosen], text[~chosen])
    n = chosen.sum().item()
    assert abs(n / (200 * 59) - 0.15) < 0.02
    masked, same = (hidden[chosen] == 4).sum().item() / n, (hidden[chosen] == text[chosen]).sum().item() / n
    assert abs(masked - 0.8) < 0.04 and abs(same - 0.1) < 0.03
