"""VirTex's essence (Desai & Johnson 2021): each test fails if its mechanism is replaced by a shortcut."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fake import fake_batch
from reference import shake
from torch import nn

import polysense
from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.base.plan import LookAhead, MirrorPlan
from polysense.base.system import Feed, ImagePlan, Stage, ViewPlan
from polysense.data.loader import Loader
from polysense.data.maker import swapped
from polysense.data.sources import ListSource
from polysense.data.tokenizer import make_tokenizer
from polysense.nn.residual import Basic, Stem
from polysense.towers.decoding import Beam
from polysense.towers.resnet import ResNet
from polysense.train.fit import fit
from polysense.train.state import Training

recipe = polysense.load("virtex")
TOWER = ResNet.Config(layers=(1, 1), base=8, stem=Stem.Config(kernel=3, stride=2, pool=0), block=Basic.Config())
CONFIG = recipe.config(TOWER, 24, 2, 2, 48, 60, 12, dropout=0.0)


@pytest.fixture()
def system():
    torch.manual_seed(0)
    return shake(CONFIG.build())


@pytest.fixture(scope="module")
def batch():
    g = torch.Generator().manual_seed(0)
    text = torch.randint(5, 60, (5, 9), generator=g)
    text[:, 0] = 1
    for row, at in enumerate((8, 5, 3, 7, 4)):
        text[row, at], text[row, at + 1:] = 2, 0
    return {"image": torch.randn(5, 3, 32, 32, generator=g), "text": text}


def test_turning_a_caption_twice_restores_it_and_it_begins_at_its_end(batch):
    text = batch["text"]
    back = recipe.turned(text)
    assert torch.equal(recipe.turned(back), text) and (back[:, 0] == 2).all() and torch.equal(back == 0, text == 0)
    for row, turned in zip(text.tolist(), back.tolist(), strict=True):
        n = row.index(2) + 1
        assert turned[:n] == row[:n][::-1]


def test_both_directions_share_all_but_their_layers(system):
    own = [n for n, _ in system.named_parameters()]
    assert sum(n.startswith("decoder.text.body.") for n in own) == sum(n.startswith("backward.") for n in own) > 0
    assert sum("embed" in n for n in own) == sum(n == "project.weight" for n in own) == sum(n == "decoder.words.bias" for n in own) == 1
    assert not any(n.startswith("decoder.words.") and n != "decoder.words.bias" for n in own), "the output is the word embeddings, with its own bias"
    ids = {id(p) for p in system.decoder.text.body.parameters()}
    assert not any(id(p) in ids for p in system.backward.parameters())


def test_the_loss_is_both_cross_entropies_over_real_words(system, batch):
    losses, seen = system.caption(batch), system.see(batch["image"])
    assert set(losses) == {"forward", "backward"}
    for name, text, body in (("forward", batch["text"], system.decoder.text.body), ("backward", recipe.turned(batch["text"]), system.backward)):
        logits, label = system.logits(text, seen, body)[:, :-1], text[:, 1:]
        torch.testing.assert_close(losses[name], F.cross_entropy(logits[label != 0], label[label != 0]))
    with_padding = {"image": batch["image"], "text": F.pad(batch["text"], (0, 3))}
    for name, value in system.caption(with_padding).items():
        torch.testing.assert_close(value, losses[name])


@torch.no_grad()
def test_each_direction_reads_its_own_past_alone(system, batch):
    """Words are counted in the caption; the backward model has read all words behind its target and none before."""
    seen, text = system.see(batch["image"])[:1], batch["text"][:1]
    n, at = 9, 4
    other = text.clone()
    other[0, at] = 59 if text[0, at] != 59 else 58
    ahead = (system.logits(text, seen, system.decoder.text.body) - system.logits(other, seen, system.decoder.text.body))[0].abs().amax(-1) > 1e-5
    assert not ahead[:at].any() and ahead[at]
    one, two = (system.logits(recipe.turned(t), seen, system.backward) for t in (text, other))
    behind = (one - two)[0].abs().amax(-1) > 1e-5
    turned_at = n - 1 - at
    assert not behind[:turned_at].any() and behind[turned_at], "the words to the left of a target change nothing"


def test_the_picture_is_read_as_the_places_of_the_last_map(system):
    image, read = torch.randn(2, 3, 32, 32), []
    for block in (system.decoder.text.body.blocks[0], system.backward.blocks[0]):
        block.cross.register_forward_pre_hook(lambda m, args, read=read: read.append(args[1]))
    system.caption({"image": image, "text": torch.tensor([[1, 9, 2]] * 2)})
    assert read[0] is read[1] and read[0].shape == (2, 64, 24)
    torch.testing.assert_close(read[0], system.project(system.vision.features(image)[-1].flatten(2).mT))
    torch.testing.assert_close(system.encode_image(image), F.normalize(system.vision.features(image)[-1].mean((2, 3)), dim=-1))


@torch.no_grad()
def test_captions_are_written_forward_with_five_beams(system, batch):
    prompt = torch.tensor([[1]] * 5)
    new = system.generate_text(batch["image"], prompt, max_new=5)
    torch.testing.assert_close(new, system.generate_text(batch["image"], prompt, max_new=5, how=Beam.Config(beams=5)))
    one = system.generate_text(batch["image"], prompt, max_new=1, how=Beam.Config(beams=1))
    assert torch.equal(one[:, 0], system.logits(prompt, system.see(batch["image"]), system.decoder.text.body)[:, -1].argmax(-1))
    assert system.generate_text(batch["image"], prompt, max_new=99, how=Beam.Config(beams=1)).shape[1] <= 12
    system.backward.blocks[0].mlp.up.weight.zero_()
    assert torch.equal(system.generate_text(batch["image"], prompt, max_new=5), new), "the backward layers do not write"


def test_mirrored_pictures_swap_left_and_right():
    assert swapped("a cat left of a dog", (("left", "right"),)) == "a cat right of a dog"
    assert swapped("Right by the LEFT bright door", (("left", "right"),)) == "Left by the RIGHT bright door"
    assert swapped(swapped("left and right", (("left", "right"),)), (("left", "right"),)) == "left and right"
    picture = np.zeros((16, 16, 3), np.uint8)
    picture[:, :8] = 255                                     # what is told lies on the left
    photos = ListSource("sides", [{"id": i, "image": picture, "captions": ["bright left"]} for i in range(32)], ("image", "text"))
    for plan, follows in ((MirrorPlan(vocab=120, length=8), True), (preset_of("cappa").feed.text.but(vocab=120, length=8), False)):
        feed = Feed(image=ImagePlan(size=16), train_image=ViewPlan(size=16, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.5), text=plan)
        tokenizer = make_tokenizer(plan, ["bright left", "bright right"])
        batch = next(iter(Loader(photos, feed, tokenizer, batch_size=32, needs=("image", "text"))))
        left = batch["image"][:, 0, :, :8].mean((1, 2)) > batch["image"][:, 0, :, 8:].mean((1, 2))
        assert 4 < left.sum() < 28
        said = [tokenizer.decode(t) for t in batch["text"]]
        assert said == [("bright left" if at else "bright right") if follows else "bright left" for at in left.tolist()]
    still = next(iter(Loader(photos, feed.but(text=MirrorPlan(vocab=120, length=8)), tokenizer, batch_size=4, needs=("image", "text"), train=False)))
    assert [tokenizer.decode(t) for t in still["text"]] == ["bright left"] * 4


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_slow_weights_move_every_five_steps_half_of_the_way(name):
    torch.manual_seed(0)
    system, plain = CONFIG.build(), CONFIG.build()
    plain.load_state_dict(system.state_dict())
    batch = fake_batch(preset_of("virtex"), ("image", "text")) | {"image": torch.randn(4, 3, 32, 32)}
    optim = LookAhead(name=name, lr=0.01, schedule="constant")
    stage = Stage(objective=recipe.VirTex.caption, steps=10, batch_size=4, optim=optim)
    training, start, seen = Training(system, stage), dict(plain.state_dict()), []
    start = {k: v.clone() for k, v in start.items()}
    other = fit(plain, stage.but(optim=stage.optim.but(every=100)), [batch] * 10)
    for step, fast in zip(fit(system, stage, [batch] * 10, training=training), other, strict=True):
        p, f = system.project.weight.detach(), plain.project.weight.detach()
        slow = training.optimizers["main"].state[system.project.weight]["slow"]
        seen.append(slow.clone())
        if step.index < 5:
            torch.testing.assert_close(p, f)
            assert torch.equal(slow, start["project.weight"]), fast
        if step.index == 5:
            torch.testing.assert_close(p, (start["project.weight"] + f) / 2)
            assert torch.equal(p, slow)
    assert all(torch.equal(a, b) == (i % 5 != 4) for i, (a, b) in enumerate(zip([start["project.weight"], *seen], seen, strict=False)))


def test_a_run_under_look_ahead_goes_on_from_its_slow_weights():
    batch = fake_batch(preset_of("virtex"), ("image", "text")) | {"image": torch.randn(4, 3, 32, 32)}
    stage = Stage(objective=recipe.VirTex.caption, steps=7, batch_size=4, optim=LookAhead(name="sgd", lr=0.01, schedule="constant"))
    whole, half = (shake(CONFIG.build()) for _ in range(2))
    half.load_state_dict(whole.state_dict())
    list(fit(whole, stage, [batch] * 7))
    first = Training(half, stage)
    steps = fit(half, stage, [batch] * 7, training=first)
    for _ in range(3):
        next(steps)
    later = Training(half, stage)
    later.load({k: v.clone() for k, v in first.tensors().items()}, 3)
    list(fit(half, stage, [batch] * 4, training=later))
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(half.state_dict()[name], value, msg=name)


def test_the_decoder_is_post_norm_and_the_published_plan_is_the_papers():
    plan = preset_of("virtex", "paper")
    assert type(plan.config.backward.block).__qualname__ == "PostNorm.Config" and plan.config.backward.norm is None
    assert (plan.stages[0].optim.every, plan.stages[0].optim.follow, plan.stages[0].optim.name) == (5, 0.5, "sgd")
    assert plan.stages[0].optim.lr * dict(plan.stages[0].optim.lr_scale)["vision.*"] == pytest.approx(0.2)
    assert preset_of("virtex", "tiny_forward").config.build().backward is None
    assert isinstance(CONFIG.build().decoder.text.embed, nn.Embedding)


def test_bad_input_is_refused_in_one_line(system, batch):
    with pytest.raises(UserError, match="at most 12"):
        system.caption({"image": batch["image"], "text": torch.full((5, 13), 9)})
    with pytest.raises(UserError, match="shorter"):
        system.generate_text(batch["image"][:1], torch.full((1, 12), 9), max_new=2)
    with pytest.raises(UserError, match="every=0"):
        stage = Stage(objective=recipe.VirTex.caption, steps=1, batch_size=5, optim=LookAhead(name="sgd", lr=0.01, every=0))
        list(fit(system, stage, [batch]))
