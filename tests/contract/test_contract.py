"""One exam for every recipe: checks x catalogue. A new system gets all of these without writing a line."""
import inspect
import json
from contextlib import nullcontext
from dataclasses import fields
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from fake import Strict, fake_batch
from safetensors.torch import load_file, save_file

import polysense
from polysense.base.agent import Agent
from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.base.plan import Stage
from polysense.base.protocols import CAPABILITIES, capabilities
from polysense.base.spec import from_dict
from polysense.base.system import System
from polysense.data import source
from polysense.train.gradients import Call, backward, joined, split
from polysense.train.starts import carry

CARDS = polysense.catalogue()
HOOKS = {"__init__", "after_step", "after_start", "doubts", "health", "steer", "Config", "is_final", "__init_subclass__"}


@pytest.fixture(params=list(CARDS), scope="module")
def recipe(request):
    """(card, module, tiny preset, built system), built once per recipe."""
    torch.manual_seed(0)
    card, module = CARDS[request.param], polysense.load(request.param)
    preset = preset_of(request.param)
    return card, module, preset, preset.config.build()


def small(stage: Stage) -> Stage:
    return stage.but(**{"batch_size": 4})


def begun(preset):
    """A system as its training begins: what its Starts lend is no longer as at birth (a network born silent would pass no gradient on)."""
    system = preset.config.build()
    with torch.no_grad():
        for start in preset.starts:
            for name, p in system.named_parameters():
                if not start.into or name == start.into or name.startswith(f"{start.into}."):
                    p.add_(torch.randn_like(p) * 0.02)
    if preset.starts:
        system.after_start()
    return system


def loss_of(system: System, stage: Stage, batch):
    return stage.objective(system, stage.embed(system, batch) if stage.embed else batch)


def test_card_is_complete(recipe):
    card, module, *_ = recipe
    assert card.says.endswith(".") and card.name and 1980 < card.year < 2030 and module.__doc__ and len(module.__doc__) > 200
    assert {"tiny", "paper"} <= set(card.presets), "every system has a tiny and a paper preset"


def test_card_equals_class(recipe):
    card, _, preset, _ = recipe
    cls = type(preset.config).owner
    assert set(card.can) == set(capabilities(cls))
    for name in card.can:
        want, got = (list(inspect.signature(getattr(c, name)).parameters) for c in (CAPABILITIES[name], cls))
        assert got[:len(want)] == want, f"{name} takes {got}, the protocol says {want}"


def test_class_is_final_and_overrides_only_hooks(recipe):
    _, _, preset, _ = recipe
    cls = type(preset.config).owner
    assert getattr(cls, "is_final", False), "mark it @final"
    with pytest.raises(TypeError, match="finished system"):
        type("Sub", (cls,), {})
    for base in (b for b in cls.__mro__[1:] if issubclass(b, System | Agent) and b is not System):
        clash = {k for k, v in vars(cls).items() if callable(v) and k in vars(base) and k != "train"} - HOOKS - getattr(
            base, "__abstractmethods__", frozenset())
        assert not clash, f"{cls.__name__} overrides {clash} of {base.__name__}: make it a hook or a part in a slot"


def test_reads_what_it_declares_and_trains_what_it_says(recipe):
    card, _, preset, system = recipe
    if isinstance(system, Agent):
        pytest.skip("an agent trains nothing")
    used, allowed = set(), {k for need in card.needs for k in need.split("|")}
    for stage in preset.stages:
        system.choose_trainable(stage.trainable)
        system.train()
        system.zero_grad(set_to_none=True)
        batch = Strict(fake_batch(preset, card.needs), allowed)
        losses = loss_of(system, stage, batch)
        assert losses and all(v.ndim == 0 for v in losses.values())
        assert all(float(v.detach()) != 0 for v in losses.values()), f"a loss that is silently zero: {losses}"
        losses.total(stage.weights).backward()
        used |= batch.read
        chosen = {n for n, p in system.named_parameters() if p.requires_grad}
        reached = {n for n, p in system.named_parameters() if p.grad is not None}
        assert chosen, f"stage {stage.name} trains nothing"
        assert reached == chosen, f"no gradient reaches {sorted(chosen - reached)[:5]}; unexpected {sorted(reached - chosen)[:5]}"
        system.zero_grad(set_to_none=True)
    assert all(any(k in used for k in need.split("|")) for need in card.needs), f"declares {card.needs}, reads {used}"


def test_what_trains_nothing_stands_on_others(recipe):
    """A system may have no stages: then it declares no needs, and in every preset each of its weights comes from a Start."""
    card, _, _, system = recipe
    for name in card.presets:
        plan = preset_of(card.id, name)
        if plan.stages:
            continue
        assert not card.needs, f"{card.id} trains nothing, so it reads no batch keys"
        if isinstance(system, Agent):        # holds no weights: its helpers come to named seats
            assert system.roles and not system.helpers and not hasattr(system, "state_dict")
            continue
        with torch.device("meta"):
            weights = plan.config.build().state_dict()
        lost = [k for k in weights if not any(not s.into or k == s.into or k.startswith(f"{s.into}.") for s in plan.starts)]
        assert weights and not lost, f"{name}: nothing trains or lends {lost[:4]}"


@cache
def on_meta(name: str, preset: str):
    """A system without memory, for its shapes."""
    with torch.device("meta"):
        return preset_of(name, preset).config.build()


@pytest.mark.parametrize("name", list(CARDS))
def test_what_presets_stand_on_fits_them(name):
    """Every Start of every preset, the papers' too: the lender has the weights that are asked for, in the shapes that are needed."""
    misfits = []
    for preset in CARDS[name].presets:
        plan = preset_of(name, preset)
        for start in plan.starts:
            lent = preset_of(start.from_, start.preset).config
            if start.into and getattr(lent, start.take, lent) == getattr(plan.config, start.into, plan):
                continue                                     # the very same part: nothing to build
            try:
                carry(start, SimpleNamespace(system=on_meta(start.from_, start.preset)), on_meta(name, preset))
            except UserError as error:
                misfits.append(f"{preset}: {error}")
    assert not misfits, misfits


@pytest.mark.parametrize("name", list(CARDS))
def test_heads_of_small_presets_know_all_classes_of_their_data(name):
    for made in (preset_of(name, p) for p in CARDS[name].presets if p.startswith("tiny") and CARDS[name].family in ("backbone", "selfsup", "adapt")):
        if not (made.data and hasattr(type(made.config), "owner") and hasattr(type(made.config).owner, "classify")):
            continue
        with torch.device("meta"):
            system = made.config.build().eval()
            try:
                said = system.classify(torch.zeros(1, 3, made.feed.image.size, made.feed.image.size))
            except UserError:
                continue                     # this preset has no head for labels, and says so
        assert said.shape[1] >= len(source(made.data).classes), made.data


def test_weights_and_preset_survive_a_file(recipe, tmp_path):
    card, _, preset, system = recipe
    plain = json.loads(json.dumps(preset.to_dict()))
    assert from_dict(plain) == preset and from_dict(plain).digest() == preset.digest()
    if isinstance(system, Agent):
        return
    save_file({k: v.contiguous() for k, v in system.state_dict().items()}, tmp_path / "w.safetensors")
    twin = preset.config.build()
    twin.load_state_dict(load_file(tmp_path / "w.safetensors"), strict=True)
    for mine, theirs in zip(twin.parameters(), system.parameters(), strict=True):
        mine.requires_grad_(theirs.requires_grad)            # torch orders the sums of a product otherwise where its weight is frozen
    if "encode_image" in card.can:
        image = fake_batch(preset, ("image",))["image"]
        with torch.inference_mode():
            assert torch.equal(system.eval().encode_image(image), twin.eval().encode_image(image))


def test_same_seed_same_weights_and_loss(recipe):
    card, _, preset, _ = recipe

    def first_loss():
        torch.manual_seed(7)
        system = preset.config.build()
        if isinstance(system, Agent):
            system.ask("what is written there?", ["/no/such/picture.png"])
            assert system.log, "an agent writes down what it does"
            return [e.to_json() for e in system.log]
        if not preset.stages:
            return float(sum(v.double().abs().sum() for v in system.state_dict().values()))
        stage = preset.stages[0]
        system.choose_trainable(stage.trainable)
        system.train()
        torch.manual_seed(8)
        return float(loss_of(system, stage, fake_batch(preset, card.needs)).total(stage.weights).detach())

    assert first_loss() == first_loss()


def test_features_have_unit_norm_and_do_not_depend_on_the_batch(recipe):
    card, _, preset, system = recipe
    for key, capability in (("image", "encode_image"), ("text", "encode_text"), ("video", "encode_video"), ("audio", "encode_audio")):
        if capability in card.can:
            batch = fake_batch(preset, (key,), n=5)[key]
            with torch.inference_mode():
                system.eval()
                whole, alone = getattr(system, capability)(batch), getattr(system, capability)(batch[2:3])
            torch.testing.assert_close(whole.norm(dim=-1), torch.ones(5))
            torch.testing.assert_close(whole[2:3], alone, rtol=1e-4, atol=1e-5)


def test_bad_images_and_texts_are_refused_in_one_line(recipe):
    card, _, preset, system = recipe
    wrong = []
    if "encode_image" in card.can:
        size = preset.feed.image.size
        wrong += [(system.encode_image, torch.randn(2, 1, size, size)), (system.encode_image, torch.randn(3, size, size))]
    if "encode_text" in card.can:
        wrong += [(system.encode_text, torch.ones(2, 4096, dtype=torch.long)), (system.encode_text, torch.full((2, 4), 10 ** 7)),
                  (system.encode_text, torch.randn(2, 4))]
    for function, value in wrong:
        with pytest.raises(UserError) as caught:
            function(value)
        assert "\n" not in str(caught.value) and ":" in str(caught.value), "say what is wrong and what to do"


def test_a_step_down_the_gradient_lowers_the_loss(recipe):
    card, _, preset, _ = recipe
    for stage in preset.stages:
        torch.manual_seed(0)
        system = begun(preset)
        system.choose_trainable(stage.trainable)
        system.train()
        batch = fake_batch(preset, card.needs)
        optimizer = torch.optim.AdamW([p for p in system.parameters() if p.requires_grad], lr=1e-3)
        seen = []
        for _ in range(8):
            torch.manual_seed(1)
            loss = loss_of(system, stage, batch).total(stage.weights)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.append(float(loss.detach()))
        assert min(seen[1:]) < seen[0], f"{stage.name}: {seen}"


def test_any_batch_size_is_learned_exactly_with_the_activations_of_a_part_of_it(recipe):
    """Where samples meet only in the objective, gradient caching gives the gradients of one graph over all parts, noise and masks included."""
    card, _, preset, _ = recipe
    for stage in preset.stages:
        if stage.embed is None:
            continue
        found = []
        for chunk in (None, 3):
            torch.manual_seed(0)
            system = begun(preset)
            system.choose_trainable(stage.trainable)
            system.train()
            batch = fake_batch(preset, card.needs, n=5)
            torch.manual_seed(1)
            if chunk:
                backward(Call(system), stage.but(chunk=chunk), batch, lambda on: nullcontext())
            else:
                seen = joined([dict(stage.embed(system, part)) for part in split(batch, 3)])
                stage.objective(system, seen).total(stage.weights).backward()
            found.append({n: p.grad for n, p in system.named_parameters() if p.grad is not None})
        one, parts = found
        assert one and one.keys() == parts.keys(), stage.name
        for name, gradient in one.items():
            close = 1e-5 * max(1.0, float(gradient.abs().max()))
            torch.testing.assert_close(parts[name], gradient, rtol=1e-3, atol=close, msg=f"{stage.name} {name}")


def test_every_contrastive_row_of_language_supervision_can_be_taught_in_parts():
    """All but CoOp, whose prompts are compared with one picture at a time, and those that only write."""
    rows = "clip clip_scaling eva_clip flip klite laclip stair imagebind languagebind filip coca unicl lit mofi slip declip nclip_xclip mae_clip " \
           "dual_triplet"
    assert [i for i in rows.split() if any(s.embed is None for s in preset_of(i).stages)] == []


def test_paper_preset_builds_on_the_meta_device(recipe):
    card, module, *_ = recipe
    preset = module.paper()
    with torch.device("meta"):
        system = preset.config.build()
    published = getattr(module, "PARAMETERS", None)
    if isinstance(system, Agent):
        assert published is None, "an agent has no parameters of its own"
        return
    count = sum(p.numel() for p in system.parameters())
    assert published, f"{card.id}: say the published parameter count of paper() as PARAMETERS"
    assert abs(count / published - 1) < 0.005, f"{count:,} parameters, published {published:,}"


def test_every_preset_is_a_value_with_unique_fields(recipe):
    card, module, *_ = recipe
    for name in card.presets:
        preset = getattr(module, name)()
        assert preset == getattr(module, name)(), "a preset is a pure value"
        assert (preset.stages or not card.needs) and preset.data and {f.name for f in fields(preset)} >= {"config", "feed", "starts"}
