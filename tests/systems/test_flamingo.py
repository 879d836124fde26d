"""Flamingo's essence (Alayrac et al. 2022)."""
import pytest
import torch
import torch.nn.functional as F
from fake import fake_batch

import polysense
from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.connectors.perceiver_resampler import PerceiverResampler, ResamplerLayer
from polysense.nn.attention import Attention
from polysense.objectives.language import labels_of
from polysense.towers.decoding import Beam
from polysense.train.fit import fit
from polysense.train.optim import undecayed

recipe = polysense.load("flamingo")
LANGUAGE = recipe.looking_llama(vocab=1008, length=96, width=32, depth=3, heads=2, hidden=48, source=192, every=2)
SMALL = preset_of("flamingo").but(**{"config.language": LANGUAGE})
PLACE = SMALL.config.image_token
TEXT = torch.tensor([[1, 9, PLACE, 5, 6, 2, PLACE, 7, 8, 2]])


def built(**more):
    torch.manual_seed(0)
    return SMALL.config.but(**more).build().eval()


def opened(system):
    """With its gates half open, as after some training."""
    with torch.no_grad():
        for name, p in system.named_parameters():
            if ".look.gate" in name:
                p.fill_(0.5)
    return system


@pytest.fixture()
def flamingo():
    return opened(built())


@pytest.fixture(scope="module")
def batch():
    return fake_batch(SMALL, ("images", "episode", "image", "text"), n=3)


@torch.no_grad()
def test_at_birth_it_is_the_language_model_bit_for_bit():
    system = built()
    alone = system.predict(None, TEXT)
    for scale in (0.0, 1.0, 100.0):
        assert torch.equal(system.predict(scale * torch.randn(1, 2, 3, 64, 64), TEXT), alone)
    assert all(float(b.look.gate1) == float(b.look.gate2) == 0 for b in system.language.body.blocks if hasattr(b, "look"))
    assert not torch.equal(opened(system).predict(torch.randn(1, 2, 3, 64, 64), TEXT), alone)


def test_gated_layers_stand_before_every_nth_block(flamingo):
    assert [hasattr(b, "look") for b in flamingo.language.body.blocks] == [True, False, True]
    x, source = torch.randn(1, 3, 32), torch.randn(1, 4, 192)
    block = flamingo.language.body.blocks[0]
    torch.testing.assert_close(block(x, source, causal=True), block(block.look(x, source), causal=True), msg="before the block, not inside")


def test_vision_and_language_are_bit_identical_after_training(batch):
    system = built()
    before = {n: p.clone() for n, p in system.named_parameters()}
    stage = SMALL.stages[-1].but(steps=3, batch_size=3, precision="fp32")
    list(fit(system, stage, iter([batch] * 3)))
    moved = {n for n, p in system.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all(n.startswith("resampler.") or ".look." in n for n in moved)
    assert all(".look." in n for n in moved if n.startswith("language."))
    assert {n for n, p in system.named_parameters() if not p.requires_grad} >= {n for n in before if n.startswith("vision.")}


def test_the_reading_stage_leaves_the_gated_layers_alone(batch):
    system = built()
    before = {n: p.clone() for n, p in system.named_parameters()}
    list(fit(system, SMALL.stages[0].but(steps=1, batch_size=3, precision="fp32"), iter([batch])))
    moved = {n for n, p in system.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if n.startswith("language.") and ".look." not in n}


@torch.no_grad()
def test_a_token_looks_at_the_last_picture_before_it_only(flamingo):
    looks = flamingo.looked_at(TEXT, 2, 3)[0]
    assert not looks[:2].any(), "before any picture: nothing"
    assert all(row.tolist() == [True] * 3 + [False] * 3 for row in looks[2:6]) and all(row.tolist() == [False] * 3 + [True] * 3 for row in looks[6:])
    image = torch.randn(1, 2, 3, 64, 64)
    other = image.clone()
    other[:, 0] = torch.randn(1, 3, 64, 64)
    gate, x = flamingo.language.body.blocks[0].look, flamingo.language.embed(TEXT)
    one, two = (gate(x, flamingo.see(i).flatten(1, 2), flamingo.looked_at(TEXT, 2, 16)) for i in (image, other))
    assert torch.equal(one[:, 6:], two[:, 6:]) and torch.equal(one[:, :2], two[:, :2]) and not torch.equal(one[:, 2:6], two[:, 2:6])
    a, b = flamingo.predict(image, TEXT), flamingo.predict(other, TEXT)
    assert not torch.equal(a[:, 6:], b[:, 6:]), "what it knows of the first picture it has from the language model's own attention"
    assert torch.equal(a[:, :2], b[:, :2])


@torch.no_grad()
def test_text_before_any_picture_gets_nothing_not_an_average(flamingo):
    gate, x = flamingo.language.body.blocks[0].look, flamingo.language.embed(TEXT)
    out = gate(x, torch.randn(1, 32, 192), flamingo.looked_at(TEXT, 2, 16))
    only_mlp = x + gate.gate2.tanh() * gate.mlp(gate.norm2(x))
    torch.testing.assert_close(out[:, :2], only_mlp[:, :2])
    assert out.isfinite().all() and flamingo.predict(torch.randn(1, 2, 3, 64, 64), TEXT).isfinite().all()


@torch.no_grad()
def test_tags_may_stand_behind_their_texts():
    system = built()
    behind = torch.tensor([[1, 5, 6, 2, PLACE, 7, 8, 2, PLACE]])
    looks = system.looked_at(behind, 2, 1, torch.tensor([True]))[0]
    assert looks[1:4].tolist() == [[True, False]] * 3 and looks[5:8].tolist() == [[False, True]] * 3
    assert preset_of("flamingo", "paper").feed.text.p_next == SMALL.feed.text.p_next == 0.5


def test_all_previous_pictures_is_another_choice():
    looks = built(looks="all").looked_at(TEXT, 2, 1)[0]
    assert looks[8].tolist() == [True, True] and looks[3].tolist() == [True, False] and not looks[0].any()


@pytest.mark.parametrize("shape", [(2, 5, 24), (2, 40, 24), (2, 1, 9, 24), (2, 3, 9, 24), (2, 11, 9, 24)])
def test_resampler_gives_the_same_number_of_tokens_for_any_input(shape):
    resampler = PerceiverResampler.Config(width=24, depth=2, heads=3, latents=7, frames=4,
                                          layer=ResamplerLayer.Config(attn=Attention.Config(bias="", head_width=8))).build()
    x = torch.randn(shape)
    out = resampler(x)
    assert out.shape == (2, 7, 24)
    order = torch.randperm(shape[-2])
    torch.testing.assert_close(resampler(x[..., order, :]), out, rtol=1e-4, atol=1e-5, msg="no spatial position")
    if len(shape) == 4 and shape[1] > 1:
        assert not torch.allclose(resampler(x.flip(1)), out, atol=1e-3), "time is known"


def test_resampler_layer_is_the_papers():
    layer = ResamplerLayer.Config(width=16, heads=2, attn=Attention.Config(bias="", head_width=8)).build()
    latents, x = torch.randn(1, 3, 16), torch.randn(1, 5, 16)
    q = layer.norm1(latents)
    mixed = latents + layer.attn(q, torch.cat([layer.norm_source(x), q], 1))
    up = layer.mlp.up(layer.norm2(mixed))
    torch.testing.assert_close(layer(latents, x), mixed + F.linear(F.relu(up) ** 2, layer.mlp.down.weight))    # squared ReLU


def test_more_frames_than_trained_are_read_with_interpolated_time():
    resampler = PerceiverResampler.Config(width=4, depth=1, heads=1, latents=2, frames=3).build()
    times = resampler.times(5)
    torch.testing.assert_close(times[::2], resampler.time)
    torch.testing.assert_close(times[1], (resampler.time[0] + resampler.time[1]) / 2)
    with pytest.raises(UserError, match="no time embedding"):
        PerceiverResampler.Config(width=4, depth=1, heads=1, latents=2, frames=0).build()(torch.randn(1, 2, 3, 4))


def test_terms_of_several_data_sets_are_added_in_one_step(flamingo, batch):
    losses = flamingo.speak(batch)
    assert set(losses) == {"interleaved", "pairs"} and dict(SMALL.stages[-1].weights) == {"interleaved": 1.0, "pairs": 0.2}
    video = {k: v for k, v in batch.items() if k != "image"} | {"video": torch.randn(3, 4, 3, 64, 64)}
    seen = flamingo.speak(video)
    assert set(seen) == {"interleaved", "videos"}
    weights = [dict(preset_of("flamingo", name).stages[0].weights) for name in ("paper", "paper_videos")]
    assert weights == [{"interleaved": 1.0, "pairs": 0.2}, {"interleaved": 1.0, "videos": 0.03}]
    torch.testing.assert_close(seen.total(weights[1].items()), seen["interleaved"] + 0.03 * seen["videos"])


def test_everything_decays_but_the_resampler(flamingo):
    free = undecayed(flamingo)
    new = {n for n, p in flamingo.named_parameters() if p.ndim > 1 and (n.startswith("resampler.") or ".look." in n)}
    assert {n for n in new if n in free} == {n for n in new if n.startswith("resampler.")}
    assert preset_of("flamingo", "paper").stages[0].optim.weight_decay == 0.1


@torch.no_grad()
def test_loss_is_of_words_and_ends_given_what_stands_before(flamingo):
    image = torch.randn(1, 2, 3, 64, 64)
    logp = flamingo.predict(image, TEXT)[0].log_softmax(-1)
    counted = [t for t in range(1, 10) if TEXT[0, t] != PLACE]
    want = -torch.stack([logp[t - 1, TEXT[0, t]] for t in counted]).mean()
    batch = {"images": image, "episode": torch.cat([TEXT[:, :1], TEXT[:, 2:]], 1), "image": image[:, 0], "text": torch.tensor([[1, 5, 2]])}
    first = flamingo.predict(image, batch["episode"])[0].log_softmax(-1)
    assert flamingo.learned(TEXT)[0].nonzero()[:, 0].tolist() == counted
    terms = [first[t - 1, batch["episode"][0, t]] for t in range(1, 9) if batch["episode"][0, t] != PLACE]
    torch.testing.assert_close(flamingo.speak(batch)["interleaved"], -torch.stack(terms).mean(), rtol=1e-4, atol=1e-5)
    summed = flamingo.log_likelihood(image, TEXT, flamingo.learned(TEXT))
    torch.testing.assert_close(-summed[0] / len(counted), want, rtol=1e-4, atol=1e-5)
    assert (labels_of(TEXT, flamingo.learned(TEXT)) == PLACE).sum() == 0


@torch.no_grad()
def test_writing_token_by_token_equals_the_full_pass(flamingo):
    image, prompt = torch.randn(1, 2, 3, 64, 64), TEXT[:, :8]
    new = flamingo.generate_text(image, prompt, max_new=6)
    text = prompt
    for token in new[0].tolist():
        assert int(flamingo.predict(image, text)[0, -1].argmax()) == token
        text = torch.cat([text, torch.tensor([[token]])], 1)
    both = flamingo.generate_text(image.expand(2, -1, -1, -1, -1), torch.tensor([prompt[0].tolist(), [1, PLACE, 5, 2, PLACE, 0, 0, 0]]), max_new=6)
    assert both[0, :new.shape[1]].tolist() == new[0].tolist()
    alone = flamingo.generate_text(image, torch.tensor([[1, PLACE, 5, 2, PLACE]]), max_new=6)
    assert both[1, :alone.shape[1]].tolist() == alone[0].tolist(), "padded or alone"
    beams = flamingo.generate_text(image, prompt, max_new=4, how=Beam.Config(beams=3))
    assert beams.shape[1] <= 4


@torch.no_grad()
def test_a_prompts_own_end_and_missing_place_are_mended(flamingo):
    image = torch.randn(1, 3, 64, 64)
    a = flamingo.generate_text(image, torch.tensor([[1, 5, 2]]), max_new=4)
    assert a.tolist() == flamingo.generate_text(image, torch.tensor([[1, PLACE, 5]]), max_new=4).tolist()


@torch.no_grad()
def test_examples_are_chosen_by_likeness_the_likest_last(flamingo):
    supports = torch.randn(6, 3, 64, 64)
    picked = flamingo.alike(supports[2:4] + 0.01 * torch.randn(2, 3, 64, 64), supports, 3)
    assert picked.shape == (2, 3) and picked[:, -1].tolist() == [2, 3]


def test_bad_input_is_refused(flamingo):
    image = torch.randn(1, 3, 64, 64)
    for wrong, said in ((lambda: flamingo.predict(image, TEXT), "2 places for 1"), (lambda: flamingo.see(torch.randn(3, 64, 64)), "shape"),
                        (lambda: flamingo.generate_text(image, torch.randn(1, 3), max_new=2), "int64"),
                        (lambda: flamingo.generate_text(image[:, :1], torch.tensor([[1, 5]]), max_new=2), "channels"),
                        (lambda: flamingo.generate_text(image, torch.full((1, 90), 5), max_new=30), "at most 96"),
                        (lambda: flamingo.generate_text(image * torch.nan, torch.tensor([[1, 5]]), max_new=2), "finite"),
                        (lambda: flamingo.resampler(torch.randn(2, 3, 7)), "reads")):
        with pytest.raises(UserError, match=said):
            wrong()
