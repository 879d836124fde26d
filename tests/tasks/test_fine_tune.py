"""Fine-tuning as an exam: it learns what frozen features cannot say, by the rates of the paper, in a copy, and looks at the test data once."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.data.sources import BadSample
from polysense.tasks import take
from polysense.tasks.encode import encode_all_images
from polysense.tasks.fine_tune import Tuned, answers, endless, fit, groups

NAMES = ("even", "bright above")


class Sides:
    """Noise whose upper half is brighter in every other sample, which is the label; `bad` samples cannot be read, `mute` ones have no label."""
    name, offers, classes = "sides", ("image", "label"), NAMES

    def __init__(self, n=80, seed=0, bad=(), mute=(), split="train"):
        self.n, self.seed, self.bad, self.mute, self.read, self.split = n, seed, bad, mute, [], split

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        self.read.append(i)
        if i in self.bad:
            raise BadSample(f"s{i}", "torn")
        image, label = np.random.default_rng([self.seed, i]).normal(size=(3, 4, 4)).astype(np.float32), i % 2
        image[:, :2] += 2 * label                        # rows, so that a mirrored picture keeps its label
        return {"image": image, "label": -1 if i in self.mute else label}


class Shut(nn.Module):
    """Born blind to the upper half of a picture, where the classes differ: no probe of its frozen feature can tell them apart."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(48, 16), nn.Linear(16, 8)
        with torch.no_grad():
            self.first.weight.view(16, 3, 4, 4)[:, :, :2] = 0

    def encode_image(self, image):
        return F.normalize(self.last(self.first(image.flatten(1)).relu() + 0.1), dim=-1)


def subject(system):
    return SimpleNamespace(system=system, id="toy", read_images=lambda images: torch.stack([torch.from_numpy(x) for x in images]))


def test_it_learns_and_what_is_shuffled_is_not_learned():
    torch.manual_seed(0)
    who = subject(Shut())
    found = take("fine_tune", who, Sides(60, 9, split="test"), Sides(120), rates=(3e-2,), steps=60, batch_size=32)
    assert take("linear_probe", who, Sides(60, 9, split="test"), Sides(120)).value < 0.7
    assert found.value > 0.9 and found.n == 60 and found.units is not None and found.notes["train_samples"] == 120

    class Shuffled(Sides):
        def __getitem__(self, i):
            return {**super().__getitem__(i), "label": int(np.random.default_rng(i).integers(2))}

    assert abs(take("fine_tune", who, Sides(60, 9, split="test"), Shuffled(120), rates=(3e-2,), steps=60, batch_size=32).value - 0.5) < 0.25


def test_weights_move_in_the_copy_alone_and_all_of_them():
    torch.manual_seed(0)
    system = Shut()
    before = {k: v.clone() for k, v in system.state_dict().items()}
    model = fit(subject(system), Sides(40), range(40), 2, 1e-2, 3, 0.75, 0.05, 0.1, 0, 16)
    assert all(torch.equal(v, before[k]) for k, v in system.state_dict().items())
    assert all(not torch.equal(v, before[k]) for k, v in model.system.state_dict().items())


def test_a_teacher_whose_features_are_read_learns_too_and_in_the_run_stays_a_teacher():
    """DINO's encode_image reads the average of the student, which no gradient reaches in training."""
    torch.manual_seed(0)
    system = preset_of("dino").config.build()
    before = {k: v.clone() for k, v in system.state_dict().items()}
    who = SimpleNamespace(system=system, id="dino", read_images=lambda images: torch.stack([torch.from_numpy(x) for x in images]).repeat(1, 1, 8, 8))
    model = fit(who, Sides(8), range(8), 2, 1e-2, 2, 0.75, 0.05, 0.1, 0, 4)
    backbone = "teacher.module.backbone."
    assert all(torch.equal(v, before[k]) for k, v in system.state_dict().items()) and not any("teacher" in n for n, _ in system.named_parameters())
    moved = {k for k, v in model.system.state_dict().items() if not torch.equal(v, before[k])}
    assert moved and all(k.startswith(backbone) for k in moved) and f"{backbone}body.blocks.0.mlp.up.weight" in moved
    rate = {id(p): g["lr"] for g in groups(model, 1.0, 0.5, 0.0) for p in g["params"]}
    named = dict(model.system.named_parameters())
    assert [rate[id(named[f"{backbone}body.blocks.{i}.mlp.up.weight"])] for i in range(4)] == [0.5 ** (4 - i) for i in range(4)]


def test_rates_fall_along_the_depth_and_decay_spares_what_never_decays():
    """As in MAE's util/lr_decay.py, of a ViT of four blocks: patches 0, block i i + 1, the last norm and the head 5; decay^(5 - layer)."""
    model = Tuned(preset_of("mae").config.build(), 128, 5)
    rate = {id(p): (g["lr"], g["weight_decay"]) for g in groups(model, 1.0, 0.5, 0.05) for p in g["params"]}
    assert len(rate) == len(list(model.parameters()))
    named = dict(model.system.named_parameters())
    lr = lambda name: rate[id(named[name])][0]
    assert [lr(f"encoder.body.blocks.{i}.mlp.up.weight") for i in range(4)] == [0.5 ** (4 - i) for i in range(4)]
    assert lr("encoder.patch.weight") == 0.5 ** 5 and lr("encoder.body.norm.weight") == 1.0
    assert rate[id(model.head.weight)] == (1.0, 0.05) and rate[id(model.head.bias)] == (1.0, 0.0)
    assert rate[id(named["encoder.body.blocks.0.norm1.weight"])][1] == 0.0 and rate[id(named["encoder.patch.weight"])][1] == 0.05


def test_of_several_rates_the_best_on_held_out_training_data_is_taken_and_the_test_is_read_once():
    torch.manual_seed(0)
    test, train = Sides(30, 9, split="test"), Sides(100)
    found = take("fine_tune", subject(Shut()), test, train, rates=(1e-7, 3e-2), steps=40, batch_size=32)
    assert found.notes["rate"] == 3e-2 and found.notes["validation_accuracy"]["0.03"] > found.notes["validation_accuracy"]["1e-07"]
    assert sorted(test.read) == list(range(30))


def test_batches_pass_over_everything_readable_and_half_are_mirrored():
    who, train = subject(Shut()), Sides(20, bad=(3,), mute=(5,))
    fed = endless(who, train, range(20), 5, 0)
    plain = {tuple(train[i]["image"].ravel()): i for i in range(20) if i != 3}
    seen, turned = set(), 0
    for _ in range(4):
        for x in next(fed)[0].numpy():
            straight = plain.get(tuple(x.ravel()))
            turned += straight is None
            seen.add(plain[tuple(x[..., ::-1].ravel())] if straight is None else straight)
    assert seen == set(range(20)) - {3, 5} and 3 <= turned <= 15


def test_classes_without_names_are_numbered():
    class Nameless(Sides):
        classes = ()

        def labels(self):
            return [i % 2 for i in range(self.n)]

    found = take("fine_tune", subject(Shut()), Nameless(20, split="test"), Nameless(40), steps=2, batch_size=8)
    assert set(found.classes) == {"0", "1"}


def test_torn_pictures_are_listed_and_what_has_no_label_is_not_asked():
    model = fit(subject(Shut()), Sides(20), range(20), 2, 1e-3, 1, 0.75, 0.05, 0.1, 0, 8)
    scores, label, skipped = answers(model, subject(Shut()), Sides(20, bad=(4,), mute=(6, 7)), range(20), 8)
    assert len(scores) == len(label) == 17 and skipped == [["s4", "torn"]]


class Closed(Shut):
    @torch.no_grad()
    def encode_image(self, image):
        return super().encode_image(image)


class Broken(Shut):
    def encode_image(self, image):
        return super().encode_image(image) * (float("nan") if not self.training and len(image) > 1 else 1.0)


@pytest.mark.parametrize(("system", "test", "train", "options", "says"), [
    (Closed, Sides(split="test"), Sides(), {}, "encode_image of Closed passes no gradient on.*linear_probe"),
    (Broken, Sides(split="test"), Sides(), {}, "diverged.*lower rate"),
    (Shut, Sides(split="test"), Sides(bad=range(80)), {}, "no two pictures with labels"),
    (Shut, Sides(3, bad=range(3), split="test"), Sides(), {}, "no picture of 'sides' can be read.*torn"),
    (Shut, Sides(split="test"), Sides(1), {"rates": (1e-3, 1e-4)}, "validation part"),
    (Shut, Sides(split="test"), Sides(), {"rates": ()}, "at least one step"),
    (Shut, Sides(split="test"), Sides(), {"steps": 0}, "at least one step"),
])
def test_what_cannot_be_tuned_is_refused_with_advice(system, test, train, options, says):
    with pytest.raises(UserError, match=says):
        take("fine_tune", subject(system()), test, train, **{"steps": 2, "batch_size": 16, **options})


def test_features_in_place_of_pictures_are_refused():
    who = subject(Shut())
    some = encode_all_images(who, Sides())
    with pytest.raises(UserError, match="was given features"):
        take("fine_tune", who, some, Sides(split="train"))
