"""DeCLIP's essence (Li et al. 2022): each test fails if its mechanism is replaced by a shortcut."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fake import fake_batch

import polysense
from polysense.base.catalogue import preset_of
from polysense.base.system import After
from polysense.data.eda import SYNONYMS, eda, replaced, swapped, thinned
from polysense.data.loader import Loader
from polysense.data.sources import ListSource
from polysense.data.tokenizer import make_tokenizer
from polysense.objectives.contrastive import info_nce
from polysense.train.fit import fit

recipe = polysense.load("declip")
NEEDS = ("views", "text", "retold")


@pytest.fixture()
def system():
    torch.manual_seed(0)
    return preset_of("declip").config.but(**{"queue.size": 12}).build()


@pytest.fixture(scope="module")
def batch():
    return fake_batch(preset_of("declip"), NEEDS, n=6)


def gradients(system, batch, weights):
    system.zero_grad()
    torch.manual_seed(5)
    system.compare_all(system.embed_all(batch)).total(weights).backward()
    return {n: p.grad.clone() for n, p in system.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}


def only(**kept: float) -> tuple[tuple[str, float], ...]:
    return tuple((k, kept.get(k, 0.0)) for k in ("clip", "image", "words", "views", "near"))


def test_terms_are_those_of_the_paper(system, batch):
    torch.manual_seed(3)
    seen = system.embed_all(batch)
    losses, s = system.compare_all(seen), system.scale
    one, two, text, retold = (seen[k] for k in ("one", "two", "text", "retold"))
    torch.testing.assert_close(losses["clip"], info_nce(one, text, s))
    torch.testing.assert_close(losses["views"], (info_nce(two, text, s) + info_nce(one, retold, s) + info_nce(two, retold, s)) / 3)
    p, z = (seen["one_p"], seen["two_p"]), (seen["one_z"], seen["two_z"])
    torch.testing.assert_close(losses["image"], -(F.cosine_similarity(p[0], z[1]).mean() + F.cosine_similarity(p[1], z[0]).mean()) / 2)
    keys, near = system.queue.keys, []
    for t in (text, retold):
        neighbour = keys[(t @ keys.T).argmax(1)]
        near += [F.cross_entropy(s * v @ neighbour.T, torch.arange(6)) for v in (one, two)]
    torch.testing.assert_close(losses["near"], torch.stack(near).mean())
    assert dict(preset_of("declip").stages[0].weights) == pytest.approx({"clip": 0.4, "image": 0.2, "words": 0.2, "views": 0.2, "near": 0.2})


def test_each_term_can_be_switched_off_and_without_all_it_is_clip(system, batch):
    got = gradients(system, batch, recipe.weights_of(0, 0, 0))
    system.zero_grad()
    torch.manual_seed(5)
    hidden = system.hide(batch["text"])[0]
    info_nce(system.encode_image(batch["views"][:, 0]), system.encode_text(hidden), system.scale).backward()
    want = {n: p.grad for n, p in system.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert set(got) == set(want)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-6, msg=name)
    assert {n.split(".")[0] for n in gradients(system, batch, only(image=1.0))} == {"vision", "image_head", "projector", "predictor"}
    assert {n.split(".")[0] for n in gradients(system, batch, only(words=1.0))} == {"text", "guess"}
    near = {n.split(".")[0] for n in gradients(system, batch, only(near=1.0))}
    assert near == {"vision", "image_head", "log_scale"}, "from pictures to texts only: neighbours come from the queue"


def test_no_gradient_passes_through_the_target_view(system, batch):
    seen = system.embed_all(batch)
    blocked = {k: v.detach().requires_grad_() if v.is_floating_point() else v for k, v in seen.items()}
    losses = system.compare_all(blocked)["image"]
    z = torch.autograd.grad(losses, (blocked["one_z"], blocked["two_z"]), allow_unused=True)
    assert z == (None, None), "z is a constant of the loss; it learns through the predictor alone"


def test_the_queue_is_read_before_this_steps_texts_enter_it(system, batch):
    before = system.queue.keys.clone()
    seen = system.embed_all(batch)
    losses = system.compare_all(seen)
    assert torch.equal(system.queue.keys, before), "comparing moves nothing"
    system.after_step(After(step=1, progress=0.1, optimizer=torch.optim.SGD(system.parameters(), lr=0.1), keep=losses.keep))
    torch.testing.assert_close(system.queue.keys[:6], seen["text"].detach())
    assert torch.equal(system.queue.keys[6:], before[6:]) and len(system.queue.keys) == 12
    for step in range(2):
        system.after_step(After(step=2 + step, progress=0.1, optimizer=torch.optim.SGD(system.parameters(), lr=0.1), keep={"text": -seen["text"]}))
    torch.testing.assert_close(system.queue.keys[:6], -seen["text"].detach(), msg="first in, first out")


def test_words_are_guessed_where_they_were_hidden(system, batch):
    torch.manual_seed(4)
    seen = system.embed_all(batch)
    torch.manual_seed(4)
    hidden, chosen = system.hide(batch["text"])
    if chosen.any():
        want = F.cross_entropy(system.guess(system.text(hidden).tokens)[chosen], batch["text"][chosen])
        torch.testing.assert_close(system.compare_all(seen)["words"], want)
    torch.testing.assert_close(seen["text"], system.encode_text(hidden), msg="the masked text is the one that is compared")
    assert not chosen[:, 0].any() and not chosen[:, -1].any()


def test_without_the_predictor_and_the_stop_gradient_views_collapse():
    """SimSiam's point: features keep their spread in training; pulling the views together directly loses it."""
    def deviation(naive: bool) -> float:
        torch.manual_seed(0)
        head, predictor = recipe.Projector.Config(widths=(8, 16, 16), last="bias").build(), recipe.Projector.Config(widths=(16, 4, 16)).build()
        optimizer = torch.optim.SGD([*head.parameters(), *predictor.parameters()], lr=0.5, momentum=0.9)
        g = torch.Generator().manual_seed(1)
        x = torch.randn(64, 8, generator=g)
        for _ in range(60):
            one, two = (head(x + 0.3 * torch.randn(64, 8, generator=g)) for _ in range(2))
            loss = -F.cosine_similarity(one, two).mean() if naive else recipe.mirror_cosine(predictor(one), predictor(two), one, two)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return float(F.normalize(head(x).detach(), dim=1).std(0).mean())
    assert deviation(naive=True) < 0.5 * deviation(naive=False)


def test_logit_scale_is_kept_between_its_bounds():
    config = preset_of("declip", "paper").config
    assert np.log(config.min_scale) == pytest.approx(3, abs=1e-3) and np.log(config.max_scale) == pytest.approx(6, abs=1e-3)
    system = preset_of("declip").config.but(min_scale=config.min_scale, max_scale=config.max_scale).build()
    for value, want in ((1.0, 3.0), (4.0, 4.0), (9.0, 6.0)):
        with torch.no_grad():
            system.log_scale.fill_(value)
        system.after_step(After(step=1, progress=0.1, optimizer=torch.optim.SGD(system.parameters(), lr=0.1), keep={"text": torch.randn(2, 128)}))
        assert system.log_scale.item() == pytest.approx(want, abs=1e-3)


# Another telling of a text

def test_eda_keeps_a_word_and_leaves_single_words_alone():
    rng = np.random.default_rng(0)
    for text in ("dog", "a dog", "a big dog runs near the house", "x y"):
        made = {eda(text, rng) for _ in range(200)}
        assert all(m.split() for m in made) and (made == {"dog"} if text == "dog" else len(made) > 1)
    assert thinned(["one", "two"], np.random.default_rng(3))


def test_eda_changes_one_thing_at_a_time():
    rng, words = np.random.default_rng(0), ["a", "big", "dog", "runs", "near", "the", "old", "house"]
    for _ in range(50):
        assert sorted(swapped(words, rng)) == sorted(words) and swapped(words, rng) != words
        other = replaced(words, rng)
        changed = [(a, b) for a, b in zip(words, other, strict=True) if a != b]
        assert len(changed) == 1 and changed[0][1] in SYNONYMS[changed[0][0]]
        kept = thinned(words, rng)
        assert 1 <= len(kept) <= 8 and [w for w in words if w in kept] == kept
    assert sorted(replaced(["zig", "zag"], rng)) == ["zag", "zig"], "no synonym: two words swap places"


def test_the_loader_hands_out_two_tellings_the_same_for_the_same_seed():
    grey = np.zeros((64, 64, 3), np.uint8)
    data = ListSource("said", [{"id": i, "image": grey, "captions": [f"a big dog number {i} runs near the old house"]} for i in range(8)],
                      ("image", "text"))
    feed = preset_of("declip").feed
    words = make_tokenizer(feed.text, data.captions())
    one, two = (next(iter(Loader(data, feed, words, batch_size=8, seed=3, needs=NEEDS))) for _ in range(2))
    assert all(torch.equal(one[k], two[k]) for k in one) and set(one) == {"index", *NEEDS}
    told = [(words.decode(a), words.decode(b)) for a, b in zip(one["text"], one["retold"], strict=True)]
    assert sum(a != b for a, b in told) >= 6


def test_one_step_of_training_runs(system, batch):
    list(fit(system, preset_of("declip").stages[0].but(steps=1, batch_size=6, precision="fp32"), [batch]))
    assert int(system.queue.pointer) == 6
