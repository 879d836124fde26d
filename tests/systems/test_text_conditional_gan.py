"""GAN-CLS and GAN-INT: their essence (Reed et al. 2016)."""
from math import log

import pytest
import torch
import torch.nn.functional as F
from fake import fake_batch
from PIL import Image

import polysense
from polysense.archetypes.generator import alternate, still
from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.cli import main
from polysense.objectives.adversarial import mismatched, r1, should_be_fake, should_be_real, should_fool
from polysense.train.fit import fit
from polysense.train.run import load_run, train_preset
from polysense.train.state import Training

recipe = polysense.load("text_conditional_gan")


def toy(**changes):
    plan = preset_of("text_conditional_gan").but(**{
        "config.generator.width": 8, "config.discriminator.width": 8, "config.text.body.depth": 1, "config.text.body.width": 24,
        "config.generator.text": 24, "config.discriminator.text": 24, "config.generator.size": 16, "config.discriminator.size": 16,
        "feed.image.size": 16, "feed.train_image.size": 16, "stages.0.batch_size": 8, "starts": ()})
    return plan.but(**changes)


@pytest.fixture()
def gan():
    torch.manual_seed(0)
    return toy().config.build()


@pytest.fixture(scope="module")
def batch():
    made = fake_batch(toy(), ("image", "text"), n=8)
    return {"image": made["image"].tanh(), "text": made["text"]}


# -- the objective ----------------------------------------------------------------------------------------------------------------------

def test_with_a_judge_at_one_half_the_loss_is_two_log_two(gan, batch):
    gan.discriminator.forward = lambda image, phi: torch.zeros(len(image))
    judged = gan.judge(batch)
    assert judged.total().item() == pytest.approx(2 * log(2)) and judged["real"].item() == pytest.approx(log(2))
    assert judged["wrong"].item() == judged["fake"].item() == pytest.approx(log(2) / 2)
    assert gan.deceive(batch)["fool"].item() == pytest.approx(log(2))


def test_losses_are_those_of_the_formulas():
    s = torch.tensor([-1.0, 0.5, 2.0])
    d = torch.sigmoid(s)
    torch.testing.assert_close(should_be_real(s), -d.log().mean())
    torch.testing.assert_close(should_be_fake(s), -(1 - d).log().mean())
    torch.testing.assert_close(should_fool(s), -d.log().mean())
    assert should_be_real(s, "hinge").item() == pytest.approx((2 + 0.5 + 0) / 3) and should_fool(s, "hinge").item() == pytest.approx(-0.5)
    assert should_be_fake(s, "hinge").item() == pytest.approx((0 + 1.5 + 3) / 3)
    image = torch.randn(2, 3, 4, 4, requires_grad=True)
    assert r1((image * 3).flatten(1).sum(1), image).item() == pytest.approx(9 * 48 / 2)


def test_the_wrong_text_is_of_the_batch_and_says_something_else(gan, batch):
    text = torch.tensor([[1, 5, 2], [1, 5, 2], [1, 6, 2], [1, 7, 2]])
    for seed in range(20):
        rows, found = mismatched(text, torch.Generator().manual_seed(seed))
        assert found.all() and all((text[r] != t).any() for r, t in zip(rows, text))
    assert not mismatched(text[:2])[1].any()
    seen = []
    gan.discriminator.forward = lambda image, phi: seen.append((image, phi)) or torch.zeros(len(image))
    gan.judge(batch)
    right, (image, wrong) = gan.phi(batch["text"]), seen[0]
    assert torch.equal(image, batch["image"]) and not any(torch.equal(a, b) for a, b in zip(wrong, right))
    assert all((w == right).all(1).any() for w in wrong)


def test_the_generator_also_gets_phi_between_two_sentences(gan, batch):
    seen = []
    real = gan.generator.forward
    gan.generator.forward = lambda noise, phi: seen.append(phi) or real(noise, phi)
    gan.deceive(batch)
    phi = gan.phi(batch["text"])
    torch.testing.assert_close(seen[0], phi)
    torch.testing.assert_close(seen[1], 0.5 * phi + 0.5 * phi.roll(1, 0))


# -- two optimisers in turn -------------------------------------------------------------------------------------------------------------

def test_each_player_moves_alone(gan, batch):
    training = Training(gan, toy().stages[0])
    before = {n: p.clone() for n, p in gan.named_parameters()}
    real, log_ = gan.deceive, {}

    def watch(given):
        log_["after D"] = {n for n, p in gan.named_parameters() if not torch.equal(p, before[n])}
        log_["grads"] = {n for n, p in gan.generator.named_parameters() if p.grad is not None}
        log_["D"] = {n: p.clone() for n, p in gan.discriminator.named_parameters()}
        return real(given)

    gan.deceive = watch
    next(alternate(gan, toy().stages[0], iter([batch]), training))
    assert log_["grads"] == set(), "the discriminator's step leaves no gradient in the generator"
    assert log_["after D"] and all(n.startswith("discriminator.") for n in log_["after D"])
    assert all(torch.equal(p, log_["D"][n]) for n, p in gan.discriminator.named_parameters()), "the generator's step moves no judge"
    assert any(not torch.equal(p, before[f"generator.{n}"]) for n, p in gan.generator.named_parameters())
    assert all(p.requires_grad for p in gan.discriminator.parameters())
    assert not any(n.startswith("text.") and not torch.equal(p, before[n]) for n, p in gan.named_parameters())


def test_gradients_still_flow_through_the_judge(gan, batch):
    with still(gan.discriminator):
        gan.deceive(batch).total().backward()
    assert all(p.grad is not None for p in gan.generator.parameters()) and all(p.grad is None for p in gan.discriminator.parameters())


def test_a_weight_of_zero_takes_a_term_out_of_the_game(gan, batch):
    twin = toy().config.build()
    twin.load_state_dict(gan.state_dict())
    for system, weights in ((gan, (("wrong", 0.0),)), (twin, ())):
        torch.manual_seed(1)
        list(fit(system, toy(**{"stages.0.steps": 1, "stages.0.weights": weights}).stages[0], iter([batch])))
    assert not torch.equal(gan.discriminator.project.weight, twin.discriminator.project.weight)


def test_a_run_stopped_halfway_ends_as_one_that_was_not(tmp_path, monkeypatch):
    plan = toy(**{"stages.0.steps": 4, "data": "digits", "stages.0.optim.lr": 1e-3})
    options = {"name": "tiny", "seed": 3, "workers": 0, "checkpoint_every": 1, "device": "cpu"}
    list(train_preset("text_conditional_gan", plan, ("image", "text"), out=tmp_path / "whole", **options))
    events = train_preset("text_conditional_gan", plan, ("image", "text"), out=tmp_path / "cut", **options)
    for event in events:
        if type(event).__name__ == "Saved" and event.step == 2:
            events.close()
            break
    list(train_preset("text_conditional_gan", plan, ("image", "text"), out=tmp_path / "cut", resume=True, **options))
    one, two = (load_run(tmp_path / n).system.state_dict() for n in ("whole", "cut"))
    assert all(torch.equal(one[k], two[k]) for k in one)
    log_ = (tmp_path / "whole" / "log.jsonl").read_text()
    assert all(f'"{term}"' in log_ for term in ("real", "wrong", "fake", "fool", "interpolate"))
    words = ["generate", "a handwritten digit", "-m", str(tmp_path / "whole"), "-n", "2"]
    assert main([*words, "--out", str(tmp_path / "drawn.png")]) == 0
    assert Image.open(tmp_path / "drawn.png").size in ((34, 16), (16, 34))
    assert main([*words, "--guidance", "3", "--out", str(tmp_path / "no.png")]) == 2 and not (tmp_path / "no.png").exists()


# -- the networks -----------------------------------------------------------------------------------------------------------------------

def test_networks_are_the_papers():
    with torch.device("meta"):
        gan = preset_of("text_conditional_gan", "paper").config.build()
        image = gan.generator(torch.randn(2, 100), torch.randn(2, 512))
        assert image.shape == (2, 3, 64, 64)
        seen = []
        gan.discriminator.join.register_forward_hook(lambda m, args, out: seen.append((args[0].shape, out.shape)))
        assert gan.discriminator(image, torch.randn(2, 512)).shape == (2,)
    assert seen[0] == ((2, 512 + 128, 4, 4), (2, 512, 4, 4)) and gan.discriminator.join.kernel_size == (1, 1)
    assert gan.discriminator.last.kernel_size == (4, 4) and gan.generator.project.out_features == 128
    assert gan.discriminator.project is not gan.generator.project
    norms = [n for n, m in gan.discriminator.named_modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms == ["norms.0", "norms.1", "norms.2", "norm"], "none behind the first convolution"
    plan = preset_of("text_conditional_gan", "paper").stages[0]
    assert (plan.optim.lr, plan.optim.betas[0], plan.batch_size, plan.optim.name) == (2e-4, 0.5, 64, "adam")


def test_the_sentence_stands_at_every_place(gan):
    seen = []
    gan.discriminator.join.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    phi = torch.randn(2, 24)
    gan.discriminator(torch.randn(2, 3, 16, 16), phi)
    said = seen[0][:, -128:]
    assert (said == said[..., :1, :1]).all()
    torch.testing.assert_close(said[..., 0, 0], F.leaky_relu(gan.discriminator.project(phi), 0.2))


def test_other_captions_other_judgements_and_other_noise_other_pictures(gan, batch):
    gan.eval()
    phi = gan.phi(batch["text"])
    assert not torch.allclose(gan.discriminator(batch["image"], phi), gan.discriminator(batch["image"], phi.roll(1, 0)))
    noise = torch.randn(1, 100)
    one, two = (gan.generate_image(batch["text"][i:i + 1], steps=1, noise=noise) for i in (0, 1))
    three = gan.generate_image(batch["text"][:1], steps=1, noise=torch.randn(1, 100))
    assert not torch.allclose(one, two) and not torch.allclose(one, three)
    assert one.min() >= -1 and one.max() <= 1


def test_after_training_right_sentences_are_judged_better_than_wrong_ones():
    torch.manual_seed(0)
    gan = toy().config.build()
    colours = torch.tensor([[1.0, -1, -1], [-1, -1, 1.0]])
    label = torch.arange(16) % 2
    text = torch.tensor([[1, 5, 2], [1, 6, 2]])[label]

    def stream():
        while True:
            yield {"image": (colours[label][..., None, None] + 0.1 * torch.randn(16, 3, 16, 16)).clamp(-1, 1), "text": text}

    list(fit(gan, toy(**{"stages.0.steps": 60, "stages.0.optim.lr": 2e-3}).stages[0], stream()))
    image, phi = next(stream())["image"], gan.phi(text)
    with torch.no_grad():
        assert gan.discriminator(image, phi).mean() > gan.discriminator(image, phi.roll(1, 0)).mean() + 0.2


@pytest.mark.parametrize("call", [
    lambda s, b: s.generate_image(b["text"], steps=1, guidance=torch.tensor(3.0)),
    lambda s, b: s.generate_image(b["text"], steps=1, noise=torch.randn(1, 7)),
    lambda s, b: s.generate_image(torch.ones(1, 99, dtype=torch.long), steps=1), lambda s, b: s.generate_image(torch.randn(1, 4), steps=1),
    lambda s, b: s.discriminator(torch.randn(1, 3, 32, 32), torch.randn(1, 24)),
    lambda s, b: s.discriminator(torch.randn(1, 1, 16, 16), torch.randn(1, 24)),
    lambda s, b: toy(**{"config.generator.size": 20}).config.build(), lambda s, b: toy(**{"config.form": "wasserstein"}).config.build()])
def test_what_cannot_be_drawn_is_refused(gan, batch, call):
    with pytest.raises(UserError) as caught:
        call(gan, batch)
    assert "\n" not in str(caught.value)
