"""ControlNet's essence (Zhang et al. 2023)."""
from functools import cache

import numpy as np
import pytest
import torch
from fake import fake_batch

import polysense
from polysense.archetypes.stable_diffusion import unet
from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.decoders.kl_vae import KLVAE
from polysense.nn.norm import GroupNorm
from polysense.systems.generate.controlnet import ControlNet
from polysense.towers.clip import body
from polysense.towers.clip_text import ClipText
from polysense.train.fit import fit

polysense.load("controlnet")
TINY = preset_of("controlnet")
SMALL = TINY.but(config=TINY.config.but(
    vae=KLVAE.Config(widths=(8, 16), depth=1, norm=GroupNorm.Config(groups=4, eps=1e-6)), size=16, hint_widths=(4, 8),
    unet=unet((16, 32), (0, 1), 24, depth=1, heads=2, groups=8), text=ClipText.Config(vocab=64, length=10, body=body(24, 1, 2), end=2))).but(
    **{"feed.image.size": 16, "feed.train_image.size": 16})
BATCH = fake_batch(SMALL, ("image", "text", "hint"), n=4)


def made(**change) -> ControlNet:
    """On a base that says something, as a trained one does."""
    torch.manual_seed(0)
    system = SMALL.config.but(**change).build()
    with torch.no_grad():
        for p in system.unet.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    system.after_start()
    return system


def loud(system) -> ControlNet:
    """With zero convolutions that are zero no more."""
    with torch.no_grad():
        for p in (*system.controls.parameters(),):
            p.add_(torch.randn_like(p) * 0.05)
    return system


def look(system, control, n=2, **more):
    torch.manual_seed(5)
    z, t = torch.randn(n, 4, 8, 8), torch.full((n,), 300)
    return system.says(control, z, t, system.context(BATCH["text"][:n]))


def draw(system, **control):
    torch.manual_seed(3)
    return system.generate_image(BATCH["text"][:2], steps=2, **control)


def test_the_copy_is_born_with_the_frozen_weights():
    system = made()
    theirs, ours = system.unet.state_dict(), system.controls[0].copy.state_dict()
    assert all(torch.equal(v, theirs[k]) for k, v in ours.items()) and not any(k.startswith(("up.", "conv_out")) for k in ours)
    assert any(k.startswith("mid.") for k in ours)
    ptrs = {p.data_ptr() for p in system.unet.parameters()}
    assert not any(p.data_ptr() in ptrs for p in system.controls.parameters()), "a copy, not the same weights"


def test_at_birth_every_residual_is_zero_and_pictures_are_the_bases_bit_for_bit():
    system = made()
    control = {"hint": BATCH["hint"][:2]}
    add = system.steer(control, torch.randn(2, 4, 8, 8), torch.full((2,), 9), system.context(BATCH["text"][:2]))["add"]
    assert all(not a.any() for a in add)
    assert torch.equal(draw(system, **control), draw(system))


def test_twelve_residuals_and_one_for_stable_diffusion_and_as_many_as_the_unet_has_for_tiny():
    with torch.device("meta"):
        assert len(preset_of("controlnet", "paper").config.build().controls[0].whisper) == 12 + 1
    assert len(made().controls[0].whisper) == len(SMALL.config.unet.skips) + 1 == 5


def test_gradients_arrive_in_three_stages():
    """Step 1: the outer zero convolutions only. Step 2: the copy and the hint's zero convolution. Step 3: the hint's earlier convolutions."""
    system, arrived = made(), []
    system.choose_trainable(("controls.*",))
    optimizer = torch.optim.SGD([p for p in system.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        torch.manual_seed(1)
        system.losses(BATCH).total().backward()
        arrived.append({n.split("controls.0.")[1] for n, p in system.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0})
        optimizer.step()
    weights = {n for n, _ in system.controls[0].named_parameters()}
    assert arrived[0] == {n for n in weights if n.startswith("whisper")}
    assert {n for n in weights if n.startswith("copy.conv_in")} | {"listen.conv_out.weight"} <= arrived[1]
    assert not any(n.startswith(("listen.conv_in", "listen.blocks")) for n in arrived[1])
    assert any(n.startswith("listen.conv_in") for n in arrived[2]) and any(n.startswith("listen.blocks") for n in arrived[2])


def test_the_base_has_no_gradient_and_stays_as_it_is():
    system = made()
    before = {n: v.clone() for n, v in system.state_dict().items()}
    list(fit(system, SMALL.stages[0].but(steps=3, batch_size=4), iter([BATCH] * 3)))
    moved = {n for n, v in system.state_dict().items() if not torch.equal(v, before[n])}
    assert moved and all(n.startswith("controls.") for n in moved)
    assert all(p.grad is None for n, p in system.named_parameters() if not n.startswith("controls."))


def test_half_of_the_captions_are_dropped():
    assert TINY.config.drop == preset_of("controlnet", "paper").config.drop == 0.5


def test_residuals_are_added_to_the_skips_and_the_middle():
    system = loud(made())
    plain, steered = look(system, {}), look(system, {"hint": BATCH["hint"][:2]})
    assert not torch.allclose(plain, steered, atol=1e-4)
    assert not torch.allclose(steered, look(system, {"hint": BATCH["hint"][2:4]}), atol=1e-5), "another map, another look"
    torch.manual_seed(5)
    z, t, context = torch.randn(2, 4, 8, 8), torch.full((2,), 300), system.context(BATCH["text"][:2])
    *add, last = system.controls[0](z, t, context, BATCH["hint"][:2])
    time = system.unet.told(z, t)
    *skips, x = system.unet.encode(z, time, context)
    given = [s + a for s, a in zip(skips, add, strict=True)]
    x = x + last
    for level in system.unet.up:
        for i in range(len(level.blocks)):
            x = level.each(i, torch.cat([x, given.pop()], 1), time, context)
        x = level.grow(x) if hasattr(level, "grow") else x
    torch.testing.assert_close(system.unet.conv_out(torch.nn.functional.silu(system.unet.norm_out(x))), steered, rtol=1e-4, atol=1e-5)


def test_the_copy_reads_noise_time_and_words():
    system = loud(made())
    part, hint = system.controls[0], BATCH["hint"][:1]
    z, t, words = torch.randn(1, 4, 8, 8), torch.tensor([3]), system.context(BATCH["text"][:1])
    first = part(z, t, words, hint)[2]
    for other in (part(z + 1, t, words, hint), part(z, t + 500, words, hint), part(z, t, system.context(BATCH["text"][1:2]), hint)):
        assert not torch.allclose(other[2], first, atol=1e-5)


def test_strength_zero_is_the_base_and_strength_is_linear():
    system = loud(made())
    hint = BATCH["hint"][:2]
    assert torch.equal(draw(system, hint=hint, strength=torch.tensor(0.0)), draw(system))
    z, t, context = torch.randn(2, 4, 8, 8), torch.full((2,), 300), system.context(BATCH["text"][:2])
    one, half = (system.steer({"hint": hint, "strength": torch.tensor(s)}, z, t, context)["add"] for s in (1.0, 0.5))
    for a, b in zip(one, half, strict=True):
        torch.testing.assert_close(0.5 * a, b)


def test_two_kinds_are_summed_with_their_strengths():
    system = loud(made(kinds=2))
    hint = torch.cat([BATCH["hint"][:2], BATCH["hint"][2:4]], 1)
    z, t, context = torch.randn(2, 4, 8, 8), torch.full((2,), 300), system.context(BATCH["text"][:2])
    both = system.steer({"hint": hint, "strength": torch.tensor([0.3, 2.0])}, z, t, context)["add"]
    one, two = (part(z, t, context, h) for part, h in zip(system.controls, hint.chunk(2, 1), strict=True))
    for got, a, b in zip(both, one, two, strict=True):
        torch.testing.assert_close(got, 0.3 * a + 2.0 * b)


def test_guess_mode_grows_with_depth_on_the_side_with_words_only():
    system = loud(made())
    z, t, hint = torch.randn(2, 4, 8, 8), torch.full((2,), 300), BATCH["hint"][:2]
    context = system.context(BATCH["text"][:2])
    plain = system.steer({"hint": hint}, z, t, context)["add"]
    for name, shares in (("guess", [10 ** (-1 + i / 4) for i in range(5)]), ("weighting", [1, 1, 2, 2, 2])):
        got = system.steer({"hint": hint, name: torch.tensor(1), "worded": torch.tensor([False, True])}, z, t, context)["add"]
        for a, b, s in zip(got, plain, shares, strict=True):
            assert not a[0].any()
            torch.testing.assert_close(a[1], b[1] * s)


def test_the_side_without_words_is_left_alone_where_there_is_one():
    system, seen = loud(made()), []
    plain = system.steer
    system.steer = lambda *given: seen.append(plain(*given)["add"]) or {"add": seen[-1]}
    for guidance, worded in ((3.0, [False, False, True, True]), (1.0, [True, True])):
        seen.clear()
        draw(system, hint=BATCH["hint"][:2], guess=torch.tensor(1), guidance=torch.tensor(guidance))
        assert [bool(row.any()) for row in seen[0][-1]] == worded, guidance


def test_hints_of_any_size_are_fitted_and_others_refused():
    system = loud(made())
    assert look(system, {"hint": torch.rand(2, 3, 40, 40)}).shape == (2, 4, 8, 8)
    for bad in (torch.rand(2, 1, 16, 16), torch.rand(3, 16, 16)):
        with pytest.raises(UserError, match=r"reads \[B,3,H,W\]"):
            look(system, {"hint": bad})
    with pytest.raises(UserError, match="shrink by"):
        SMALL.config.but(hint_widths=(4, 8, 8)).build()
    with pytest.raises(UserError, match="does not hear"):
        draw(system, colour=torch.zeros(1))


def test_maps_come_from_scenes():
    from polysense.data import source
    from polysense.data.loader import Loader
    from polysense.data.tokenizer import make_tokenizer
    for kind in ("edges", "depth", "segments"):
        data = source(f"scenes?n=8&size=32&hint={kind}")
        batch = next(iter(Loader(data, TINY.feed, make_tokenizer(TINY.feed.text, data.captions()), batch_size=4, needs=("image", "text", "hint"))))
        assert batch["hint"].shape == (4, 3, 32, 32) and batch["hint"].min() >= 0 and batch["hint"].max() <= 1 and batch["hint"].std() > 0.01


def test_a_map_from_a_file_steers_what_is_drawn(tmp_path):
    from PIL import Image

    from polysense.data.hints import extracted
    from polysense.data.tokenizer import make_tokenizer
    from polysense.pipeline import Pipeline
    from polysense.pipeline.draw import read_hints
    words = SMALL.feed.text.but(vocab=64, length=10)
    preset = SMALL.but(**{"feed.text": words})
    pipeline = Pipeline(loud(made()), preset, make_tokenizer(words, ["a red circle"]), id="controlnet")
    Image.new("RGB", (40, 40), "white").save(tmp_path / "map.png")
    plain = pipeline.generate("a red circle", 2, steps=2)
    steered = pipeline.generate("a red circle", 2, steps=2, hints=[tmp_path / "map.png"])
    assert len(steered) == 2 and steered[0].tobytes() != plain[0].tobytes()
    Image.new("RGB", (40, 40), "white").save(tmp_path / "photo.png")
    with Image.open(tmp_path / "photo.png") as photo:
        photo.paste((0, 0, 0), (10, 10, 30, 30))
        photo.save(tmp_path / "photo.png")
    taken = extracted("canny", read_hints(preset.feed.image, [tmp_path / "photo.png"], 1))
    assert taken.any() and not taken.all()
    (outlined,), (same,) = (pipeline.generate("a red circle", steps=2, **given) for given in (
        {"hints": [tmp_path / "photo.png"], "extract": "canny"}, {"hints": [(taken[0].permute(1, 2, 0) * 255).byte().numpy()]}))
    assert outlined.tobytes() == same.tobytes() != pipeline.generate("a red circle", steps=2, hints=[tmp_path / "photo.png"])[0].tobytes()
    for wrong in ({"extract": "canny"}, {"hints": [tmp_path / "photo.png"], "extract": "depth"}):
        with pytest.raises(UserError):
            pipeline.generate("a red circle", **wrong)
    with pytest.raises(UserError, match="hints for"):
        pipeline.generate("a red circle", hints=[tmp_path / "map.png"] * 3)


WHITE, DARK, HALF = (np.full((16, 16, 3), v, np.uint8) for v in (255, 0, 90))


@cache
def piped(kinds=1):
    from polysense.data.tokenizer import make_tokenizer
    from polysense.pipeline import Pipeline
    words = SMALL.feed.text.but(vocab=64, length=10)
    preset, tokenizer = SMALL.but(**{"feed.text": words}), make_tokenizer(words, ["a red circle", "a blue star"])
    return Pipeline(loud(made(kinds=kinds)), preset, tokenizer, id="controlnet")


def bytes_of(pipeline, texts=("a red circle",), **given):
    return [p.tobytes() for p in pipeline.generate(texts, steps=1, guidance=3.0, **given)]


def test_strength_guess_and_weighting_reach_the_system_from_the_pipeline(monkeypatch):
    pipeline = piped()
    plain, full = bytes_of(pipeline), bytes_of(pipeline, hints=[WHITE])
    assert bytes_of(pipeline, hints=[WHITE], strength=0) == plain != full == bytes_of(pipeline, hints=[WHITE], strength=[1.0])
    seen = {"full": full[0]} | {str(given): bytes_of(pipeline, hints=[WHITE], **given)[0] for given in (
        {"strength": 0.5}, {"guess": True}, {"weighting": True})}
    assert len(set(seen.values())) == len(seen), "each way of following draws another picture"
    heard, steer = [], pipeline.system.steer
    monkeypatch.setattr(pipeline.system, "steer", lambda control, *rest: heard.append(control) or steer(control, *rest))
    bytes_of(pipeline, hints=[WHITE], strength=0.5, guess=True)
    assert float(heard[0]["strength"]) == 0.5 and bool(heard[0]["guess"]) and "weighting" not in heard[0]


def test_guess_needs_no_words():
    pipeline = piped()
    two = bytes_of(pipeline, (), hints=[WHITE, DARK], guess=True)
    assert len(two) == 2 and two[0] != two[1] and two[0] != bytes_of(pipeline, hints=[WHITE], guess=True)[0]
    with pytest.raises(UserError, match="what it is told"):
        bytes_of(pipeline, (), hints=[WHITE])


def test_each_kind_of_map_has_its_strength_however_many_texts_there_are():
    pipeline = piped(kinds=2)
    texts = ("a red circle", "a blue star")                # as many as kinds: strengths are no rows of the batch
    second = bytes_of(pipeline, texts, hints=[WHITE, DARK], strength=[0, 1])
    assert second == bytes_of(pipeline, texts, hints=[HALF, DARK], strength=[0, 1]) != bytes_of(pipeline, texts, hints=[WHITE, DARK], strength=[1, 0])
    assert bytes_of(pipeline, texts, hints=[WHITE, DARK] * 2, strength=[0.3, 2]) == bytes_of(pipeline, texts, hints=[WHITE, DARK], strength=[0.3, 2])


def test_strengths_that_fit_nothing_are_refused():
    for given, said in (({"hints": [WHITE], "strength": [0.5, 0.5]}, "2 strengths for 1 kind of map"), ({"strength": 0.5}, "no map"),
                        ({"guess": True}, "no map"), ({"hints": [WHITE], "strength": -1}, "strength of -1"),
                        ({"hints": [WHITE], "strength": float("nan")}, "strength of nan")):
        with pytest.raises(UserError, match=said):
            bytes_of(piped(), **given)
    for given, said in (({"hints": [WHITE, DARK], "strength": [1, 1, 1]}, "3 strengths for 2 kinds"), ({"hints": [WHITE]}, "2 kinds of map"),
                        ({"hints": [WHITE], "guess": True, "texts": ()}, "2 kinds of map")):
        with pytest.raises(UserError, match=said) as refused:
            bytes_of(piped(kinds=2), **given)
        assert refused.value.advice
