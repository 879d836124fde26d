"""The preflight: each invariant against a recipe that breaks it, and that looking changes nothing."""
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from train.toys import Toy, ToyFeeding, ToyStream, preset_of, stage_of, toy

from polysense.base.batch import Losses
from polysense.base.errors import UserError
from polysense.train.preflight import inspect, preflight, undisturbed
from polysense.train.run import Noted, train_preset

NEEDS = ("image", "text")


def stream(n=4):
    return ToyStream(n, 0, None)


def doubts(system, stage, batches=None, needs=NEEDS):
    with undisturbed(system):
        return [reason for reason, _ in inspect(system, stage, batches or stream(), needs)]


def whole_stage(objective, **changes):
    return stage_of(objective=objective, embed=None, **changes)


# -- nothing is disturbed -------------------------------------------------------------------------------------------------------------------

def test_a_sound_recipe_passes_and_says_how_long_it_took():
    said = preflight(toy(dropout=0.1), [(stage_of(), stream())], NEEDS)
    assert said.startswith("preflight: 1 stage looked at in ")


def test_weights_buffers_modes_gradients_and_random_states_are_as_before():
    system = toy(dropout=0.3)
    system.text.eval()
    system.words.requires_grad_(False)
    state = {k: v.clone() for k, v in system.state_dict().items()}
    modes, chosen = [m.training for m in system.modules()], [p.requires_grad for p in system.parameters()]
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    preflight(system, [(stage_of(), stream())], NEEDS)
    assert all(torch.equal(v, state[k]) for k, v in system.state_dict().items())
    assert modes == [m.training for m in system.modules()] and chosen == [p.requires_grad for p in system.parameters()]
    assert all(p.grad is None for p in system.parameters())
    assert random.getstate() == before[0] and (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])


def test_a_run_with_a_preflight_takes_the_same_steps_as_one_without(tmp_path):
    totals = {}
    for looked in (False, True):
        events = list(train_preset("toy", preset_of(stage_of(steps=3), dropout=0.2), NEEDS, out=tmp_path / str(looked), feeding=ToyFeeding(),
                                   device="cpu", preflight=looked))
        totals[looked] = [e.total for e in events if hasattr(e, "total")]
        assert looked == any(isinstance(e, Noted) and "preflight" in e.text for e in events)
    assert totals[True] == totals[False] and len(totals[True]) == 3
    one, two = ((tmp_path / n / "weights.safetensors").read_bytes() for n in ("True", "False"))
    assert one == two


def test_a_refused_run_leaves_nothing_behind_and_a_resumed_one_is_not_looked_at(tmp_path):
    broken = preset_of(stage_of(objective=backwards))
    out = tmp_path / "run"
    with pytest.raises(UserError, match=r"preflight, stage train: one batch cannot be learned.*--no-preflight"):
        list(train_preset("toy", broken, NEEDS, out=out, feeding=ToyFeeding(), device="cpu", preflight=True))
    assert not out.exists()
    run = train_preset("toy", broken, NEEDS, out=out, feeding=ToyFeeding(), device="cpu", checkpoint_every=1)
    for event in run:
        if type(event).__name__ == "Saved":
            run.close()
            break
    events = list(train_preset("toy", broken, NEEDS, out=out, feeding=ToyFeeding(), device="cpu", resume=True, preflight=True))
    assert not any("preflight" in getattr(e, "text", "") for e in events)


# -- gradients ------------------------------------------------------------------------------------------------------------------------------

class Idle(Toy):
    def __init__(self, c=None):
        super().__init__(c or Toy.Config())
        self.idle = nn.Linear(3, 3)


def backwards(system, got):
    """Its value is the loss, its gradient points the other way."""
    good = Toy.compare(system, got).total()
    return Losses(contrast=2 * good.detach() - good).keeping(image=got["image"])


def test_what_is_chosen_and_unused_is_named():
    torch.manual_seed(0)
    found = doubts(Idle(), stage_of(trainable=("*",)))
    assert found == ["no gradient reaches idle.bias and 1 more, which is chosen to train"]


def test_a_parameter_that_another_batch_reaches_is_no_fault():
    class Kinds(Idle):
        def pick(self, batch):
            extra = self.idle(batch["image"][:, :, 0, 0]).square().mean() if batch["index"][0] % 8 == 4 else 0.0
            return Losses(gap=self.pointwise(batch)["gap"] + extra)

    torch.manual_seed(0)
    assert doubts(Kinds(), whole_stage(Kinds.pick, trainable=("vision.*", "text.*", "words.*", "log_scale", "idle.*"))) == []


@pytest.mark.parametrize(("objective", "says"), [
    (lambda s, b: Losses(gap=s.pointwise(b)["gap"].detach()), "does not depend on anything trainable"),
    (lambda s, b: Losses(gap=s.pointwise(b)["gap"] * 0 + 1), "every gradient is exactly zero"),
    (lambda s, b: Losses(gap=s.pointwise(b)["gap"], none=0 * s.words.weight.sum()), "the loss none is exactly zero"),
    (lambda s, b: Losses(gap=(s.log_scale - s.log_scale).sqrt() + s.pointwise(b)["gap"]), "is not finite")])
def test_broken_losses_are_named(objective, says):
    found = doubts(toy(), whole_stage(objective))
    assert found and says in found[0]


def test_a_batch_whose_labels_are_all_masked_is_refused():
    def masked(system, batch):
        logits = system.text(system.words(batch["text"]))
        return Losses(words=F.cross_entropy(logits.flatten(0, 1), torch.full_like(batch["text"].flatten(), -100)))

    assert "the loss words is nan" in doubts(toy(), whole_stage(masked))[0]


def test_a_temperature_beyond_a_hard_clamp_does_not_move():
    def clamped(system, got):
        scale = system.log_scale.clamp(max=0.5).exp()
        return Losses(contrast=F.cross_entropy(scale * got["image"] @ got["text"].T, torch.arange(len(got["image"]))))

    assert doubts(toy(), stage_of(objective=clamped)) == ["the temperature log_scale does not move: its gradient is zero"]


# -- negatives ------------------------------------------------------------------------------------------------------------------------------

def test_pairs_that_are_told_from_nothing_are_refused():
    def close(system, got):
        return Losses(pull=system.log_scale.exp() * (1 - (got["image"] * got["text"]).sum(-1)).mean())

    assert doubts(toy(), stage_of(objective=close)) == ["no negatives are counted: the loss of pairs that look all alike is zero"]
    assert doubts(toy(), stage_of()) == []


def test_a_contrastive_batch_of_one_is_refused():
    stage = stage_of(batch_size=1)
    assert any("no negatives" in d for d in doubts(toy(), stage, stream(2)))


# -- data -----------------------------------------------------------------------------------------------------------------------------------

TEXT = torch.tensor([[1, 7, 8, 9, 2], [1, 7, 2, 0, 0], [1, 9, 8, 2, 0], [1, 5, 2, 0, 0]])


def texts(mask, **more):
    return [{"image": torch.randn(4, 3, 2, 2), "text": TEXT, "text_mask": mask, **more}] * 2


def reading(system, batch, turned=False):
    real = ~batch["text_mask"] if turned else batch["text_mask"]
    words = (system.words(batch["text"]) * real[..., None]).sum(1)
    seen = F.normalize(system.vision(batch["image"].flatten(1)), dim=-1)
    return Losses(gap=(system.log_scale.exp() * seen - system.text(words)).square().mean())


CHOSEN = ("vision.*", "text.*", "words.*", "log_scale")


def test_a_mask_turned_round_in_the_data_is_told_from_a_right_one():
    right = TEXT != 0
    stage = whole_stage(reading, trainable=CHOSEN)
    assert doubts(toy(), stage, texts(right), ("image", "text")) == []
    assert "text_mask is True on the padding of text" in doubts(toy(), stage, texts(~right), ("image", "text"))


def test_a_mask_turned_round_in_the_system_changes_the_loss_with_more_padding():
    stage = whole_stage(lambda s, b: reading(s, b, turned=True), trainable=CHOSEN)
    found = doubts(toy(), stage, texts(TEXT != 0), ("image", "text"))
    assert len(found) == 1 and found[0].startswith("longer padding changes the loss from ")


@pytest.mark.parametrize(("change", "says"), [
    ({"label": torch.full((4,), -1)}, "every label of 2 batches is -1"),
    ({"chat_reply": torch.zeros(4, 5, dtype=torch.bool)}, "chat_reply is False everywhere"),
    ({"image": torch.full((4, 3, 2, 2), torch.nan)}, "image holds values that are not finite")])
def test_empty_targets_and_broken_values_are_refused(change, says):
    found = doubts(toy(), whole_stage(reading, trainable=CHOSEN), texts(TEXT != 0, **change), ("image", "text"))
    assert says in found[0]


def test_an_empty_stream_and_a_missing_key_are_refused():
    assert doubts(toy(), stage_of(), [{}][:0] or iter([])) == ["the data are empty"]
    with pytest.raises(UserError, match="lacks 'video'"):
        doubts(toy(), stage_of(), None, ("video",))


# -- learning -------------------------------------------------------------------------------------------------------------------------------

def test_a_sign_turned_round_is_found():
    assert doubts(toy(), stage_of(objective=backwards))[0].startswith("one batch cannot be learned")


def test_a_recipe_may_doubt_by_itself():
    class Careful(Toy):
        def doubts(self, batch):
            yield "the pictures are of 2 x 2 pixels"

    torch.manual_seed(0)
    assert doubts(Careful(Toy.Config()), stage_of()) == ["the pictures are of 2 x 2 pixels"]


def test_a_stage_with_its_own_generator_has_only_its_data_looked_at():
    assert doubts(toy(), stage_of(objective=backwards, run=lambda *words: iter(()))) == []
