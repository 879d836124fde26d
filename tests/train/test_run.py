"""The run folder from claim to weights; killed runs; starts."""
import json
import os
import random
import signal
import subprocess
import sys
import warnings
import zlib
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from train.child import plan
from train.toys import Toy, ToyFeeding, ToyStream, preset_of, stage_of, toy

from polysense.base.card import Card
from polysense.base.errors import UserError
from polysense.base.plan import Start
from polysense.train import checkpoint, starts
from polysense.train import run as run_module
from polysense.train.fit import Diverged
from polysense.train.folder import Run
from polysense.train.run import Finished, Noted, Saved, Started, Stepped, load_run, override, shortened, train_preset

NEEDS = ("image", "text")


def go(out, preset=None, **options):
    return list(train_preset("toy", preset or preset_of(), NEEDS, out=out, feeding=options.pop("feeding", ToyFeeding()), device="cpu", **options))


def lines(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def same(one, two, file="weights.safetensors"):
    a, b = load_file(one / file), load_file(two / file)
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of child.py that nobody disturbs."""
    out = tmp_path_factory.mktemp("alone") / "run"
    go(out, plan(40), checkpoint_every=3)
    return out


def test_a_run_folder(tmp_path):
    out = tmp_path / "run"
    events = go(out, checkpoint_every=2)
    assert [type(e) for e in events] == [Started, Stepped, Stepped, Saved, Stepped, Stepped, Saved, Stepped, Stepped, Saved, Finished]
    assert events[0].steps == 6 and events[0].parameters == sum(p.numel() for p in toy().parameters()) > events[0].trainable
    assert {p.name for p in out.iterdir()} == {"run.json", "preset.txt", "log.jsonl", "weights.safetensors", "checkpoints", "tensorboard"}
    assert (out / "preset.txt").read_text().splitlines() == list(preset_of().lines())
    assert [p.name for p in sorted((out / "checkpoints").iterdir())] == ["000000004", "000000006"]
    assert any(p.name.startswith("events.out") for p in (out / "tensorboard").iterdir())
    log = lines(out)
    assert [x["step"] for x in log] == [1, 2, 3, 4, 5, 6]
    assert log[0].keys() >= {"step", "stage", "losses", "lr", "grad_norm", "samples_per_s", "seconds", "skipped"}
    assert log[0]["losses"].keys() == {"images", "texts"} and events[-1].samples == 48
    facts = json.loads((out / "run.json").read_text())
    assert facts["system"] == "toy" and facts["seed"] == 0 and facts["plan"]["stages"][0]["steps"] == 6


def test_the_seed_decides(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        go(tmp_path / name, seed=seed)
    assert same(tmp_path / "a", tmp_path / "b") and not same(tmp_path / "a", tmp_path / "c")


def kill_at(out, moment):
    """Runs child.py and kills it when `moment(line)` says so, or inside a checkpoint."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen([sys.executable, Path(__file__).with_name("child.py"), str(out), json.dumps({"steps": 40})],
                             stdout=subprocess.PIPE, text=True, env=env)
    for line in child.stdout:
        if moment(line):
            break
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()


def test_killed_at_random_moments_and_resumed_it_ends_bit_identical(tmp_path, alone):
    rng, out = random.Random(4), tmp_path / "run"
    for at in (rng.randint(1, 12), rng.randint(16, 39)):
        kill_at(out, lambda line, at=at: line.startswith("Stepped") and int(line.split()[1]) >= at)
        assert not (out / "weights.safetensors").exists()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        unfinished = load_run(out, preset=plan(40))
    assert "is not finished" in str(caught[0].message) and isinstance(unfinished.system, Toy) and not unfinished.system.training
    events = go(out, plan(40), resume=True, checkpoint_every=3)
    assert 1 < events[0].done < 45, "it went on from a checkpoint"
    assert same(out, alone)
    assert [x["step"] for x in lines(out)] == list(range(1, 46)), "the log has every step once"
    assert [x["losses"] for x in lines(out)] == [x["losses"] for x in lines(alone)]
    events = go(out, plan(40), resume=True)
    assert [type(e) for e in events] == [Noted, Finished], "a finished run is left alone"


class Killed(BaseException):
    pass


@pytest.mark.parametrize("call", ["mkdir", "write_text", "fsync", "replace", "rmtree"])
def test_dying_inside_any_write_loses_nothing(tmp_path, alone, monkeypatch, call):
    """As SIGKILL between any two file operations: the n-th one never happens, for several n, each time resumed."""
    owner, real = {"mkdir": (Path, Path.mkdir), "write_text": (Path, Path.write_text), "fsync": (os, os.fsync), "replace": (os, os.replace),
                   "rmtree": (checkpoint.shutil, checkpoint.shutil.rmtree)}[call]
    out, rng, deaths = tmp_path / "run", random.Random(call), 0
    for _ in range(6):
        left = rng.randint(1, 9)

        def dying(*args, **kwargs):
            nonlocal left
            left -= 1
            if left == 0:
                raise Killed
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(owner, call, dying)
            try:
                go(out, plan(40), resume=True, checkpoint_every=3)
            except Killed:
                deaths += 1
    assert deaths >= 2
    go(out, plan(40), resume=True, checkpoint_every=3)
    assert same(out, alone)
    assert [x["step"] for x in lines(out)] == list(range(1, 46))


def test_resume_falls_back_behind_a_damaged_checkpoint(tmp_path, alone):
    out = tmp_path / "run"
    for event in train_preset("toy", plan(40), NEEDS, out=out, feeding=ToyFeeding(), device="cpu", checkpoint_every=3):
        if isinstance(event, Saved) and event.step == 15:
            break
    file = out / "checkpoints" / "000000015" / checkpoint.TENSORS
    file.write_bytes(file.read_bytes()[:1000])
    events = go(out, plan(40), resume=True, checkpoint_every=3)
    assert "000000015 is damaged" in events[0].text and events[1].done == 12
    assert same(out, alone)


def test_averaged_weights_are_saved_beside(tmp_path):
    out = tmp_path / "run"
    go(out, preset_of(stage_of(ema=0.5)))
    run, averaged = load_run(out, preset=preset_of()), load_run(out, preset=preset_of(), averaged=True)
    assert isinstance(run, Run) and run.id == "toy" and run.tokenizer is None
    assert not torch.equal(run.system.vision.patch.weight, averaged.system.vision.patch.weight)
    assert torch.equal(run.system.queue, averaged.system.queue)
    go(tmp_path / "plain")
    with pytest.raises(UserError, match="no averaged weights"):
        load_run(tmp_path / "plain", preset=preset_of(), averaged=True)


def test_a_used_folder_is_refused(tmp_path):
    out = tmp_path / "run"
    go(out)
    with pytest.raises(UserError, match="already holds files"):
        go(out)
    for change, word in (({"seed": 3}, "seed"), ({"preset": preset_of(stage_of(steps=7))}, r"preset.*stages\.0\.steps: 6 before, 7 now")):
        with pytest.raises(UserError, match=f"another {word}"):
            go(out, resume=True, **change)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("")
    with pytest.raises(UserError, match="not a run folder"):
        go(tmp_path / "photos", resume=True)
    with pytest.raises(UserError, match="say which one with --out"):
        go(None, resume=True)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        go(tmp_path / "file" / "run")


def test_a_disk_that_fills_up_is_one_line_and_leaves_a_run_to_resume(tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(UserError, match="No space left"):
            go(out)
    assert isinstance(go(out, resume=True)[-1], Finished)


def test_a_diverging_run_leaves_its_last_whole_checkpoint(tmp_path):
    class Poisoned(ToyStream):
        def __iter__(self):
            for batch in super().__iter__():
                if self.at == 5:
                    batch["image"][3] = float("inf")
                yield batch

    class Feeding(ToyFeeding):
        def stream(self, stage, seed, state, world):
            return Poisoned(stage.batch_size, seed, state)

    out = tmp_path / "run"
    with pytest.raises(Diverged, match=r"diverged at step 5 .* the samples sample35 hold"):
        go(out, feeding=Feeding(), checkpoint_every=2)
    assert checkpoint.latest(out / "checkpoints").step == 4 and not (out / "weights.safetensors").exists()


def test_opening_what_is_not_there(tmp_path):
    with pytest.raises(UserError, match="no run at"):
        load_run(tmp_path / "none")
    with pytest.raises(UserError, match=r"no run\.json"):
        load_run(tmp_path)
    go(tmp_path / "run")
    (tmp_path / "run" / "weights.safetensors").unlink()
    with pytest.warns(UserWarning, match="is not finished"):
        load_run(tmp_path / "run", preset=preset_of())
    for p in (tmp_path / "run" / "checkpoints").iterdir():
        p.rename(tmp_path / p.name)
    with pytest.raises(UserError, match="holds no weights yet"):
        load_run(tmp_path / "run", preset=preset_of())


def test_a_batch_outside_the_vocabulary_is_refused_before_the_first_step(tmp_path):
    class Wrong(ToyFeeding):
        def stream(self, stage, seed, state, world):
            stream = ToyStream(stage.batch_size, seed, state)
            stream.__class__ = type("S", (ToyStream,), {"__iter__": lambda s: ({**b, "picture": b["image"]} for b in ToyStream.__iter__(s))})
            return stream

    with pytest.raises(UserError, match="'picture' is not a batch key"):
        go(tmp_path / "run", feeding=Wrong())


def test_overrides_reach_preset_config_and_stages():
    preset = preset_of(stage_of(), stage_of())
    got = override(preset, {"width": 16, "optim.lr": 1e-4, "stages.1.steps": 9, "data": "digits"})
    assert got.config.width == 16 and [s.optim.lr for s in got.stages] == [1e-4, 1e-4] and got.stages[1].steps == 9 and got.data == "digits"
    with pytest.raises(UserError, match="did you mean width"):
        override(preset, {"widht": 16})


def test_steps_are_shared_in_proportion_and_the_warm_up_shrinks_with_them():
    got = shortened(preset_of(stage_of(steps=300, warmup=30), stage_of(steps=100, warmup=4)), 8)
    assert [(s.steps, s.optim.warmup) for s in got.stages] == [(6, 1), (2, 0)]
    assert shortened(preset_of(stage_of(steps=10)), 25).stages[0].steps == 25
    with pytest.raises(UserError, match="too few"):
        shortened(preset_of(stage_of(), stage_of()), 1)


def test_a_time_budget_finishes_early_with_weights(tmp_path, monkeypatch):
    ticks = count()                          # a clock that moves by a hundredth of a second whenever it is read: no machine is too slow for it
    monkeypatch.setattr(run_module, "time", SimpleNamespace(monotonic=lambda: next(ticks) * 0.01))
    events = go(tmp_path / "run", preset_of(stage_of(steps=10 ** 6)), time_budget_s=0.5)
    assert isinstance(events[-1], Finished) and 5 < events[-1].step < 51 and (tmp_path / "run" / "weights.safetensors").exists()
    assert lines(tmp_path / "run")[-1]["lr"] < 2e-3, "the cosine came down within the budget"


def same_towers(system):
    """The toy with a text tower that reads what its vision tower reads."""
    system.text.patch = torch.nn.Linear(12, 8)
    return system


def test_a_start_carries_weights_over_and_names_what_does_not_fit(tmp_path):
    go(tmp_path / "run")
    run = load_run(tmp_path / "run", preset=preset_of())
    system = toy(seed=9)
    starts.carry(Start(into="text", from_="toy", take="vision"), run, same_towers(system))
    assert torch.equal(system.text.blocks[0].up.weight, run.system.vision.blocks[0].up.weight)
    with pytest.raises(UserError, match=r"start vision <- toy\.text: patch\.weight is"):
        starts.carry(Start(into="vision", from_="toy", take="text"), run, toy())
    with pytest.raises(UserError, match="nothing called sight"):
        starts.carry(Start(into="sight", from_="toy", take="text"), run, toy())
    with pytest.raises(UserError, match="only the system has bias"):
        starts.carry(Start(into="text.norm", from_="toy", take="text"), run, toy())
    starts.carry(Start(into="", from_="toy"), run, system := toy(seed=9))
    assert torch.equal(system.queue, run.system.queue)


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A catalogue of toys: name -> preset, and a cache of its own."""
    presets = {}
    monkeypatch.setenv("POLYSENSE_CACHE", str(tmp_path / "cache"))
    for module in (run_module, starts):
        monkeypatch.setattr(module, "preset_of", lambda name, preset="tiny": presets[name])
    monkeypatch.setattr(run_module, "card_of", lambda name: Card(name=name, paper="", year=2026, says="", needs=NEEDS))
    monkeypatch.setattr(run_module, "SourceFeeding", lambda *a, **k: ToyFeeding())
    monkeypatch.setattr(run_module, "load_run", lambda place: load_run(place, preset=presets[place.name.split("-")[0]]))
    return presets


def test_a_preset_that_stands_on_others_trains_each_once(tmp_path, shelf, monkeypatch):
    refreshed = []
    monkeypatch.setattr(Toy, "after_start", lambda self: refreshed.append(self.vision.patch.weight.detach().clone()))
    shelf["base"] = preset_of(stage_of(steps=3))
    shelf["middle"] = preset_of(stage_of(steps=2)).but(starts=(Start(into="", from_="base"),))
    top = preset_of(stage_of(trainable=("text.*",), steps=2)).but(starts=(Start(into="vision", from_="middle", take="vision"),))
    events = go(tmp_path / "one", top)
    assert [e.id for e in events if isinstance(e, Finished)] == ["base", "middle", "toy"]
    assert [e.text.split(",")[0] for e in events if isinstance(e, Noted)] == ["toy stands on middle (tiny)", "middle stands on base (tiny)"]
    [kept] = [p for p in (tmp_path / "cache" / "runs").iterdir() if p.name.startswith("middle")]
    theirs, ours = load_file(kept / "weights.safetensors"), load_file(tmp_path / "one" / "weights.safetensors")
    assert all(torch.equal(v, theirs[k]) for k, v in ours.items() if k.startswith("vision.")), "the frozen tower is the start's, byte for byte"
    assert torch.equal(refreshed[-1], theirs["vision.patch.weight"]), "copies are taken after the weights are in"
    events = go(tmp_path / "two", top)
    assert [e.id for e in events if isinstance(e, Finished)] == ["toy"] and same(tmp_path / "one", tmp_path / "two")
    shelf["base"] = preset_of(stage_of(steps=4))
    assert [e.id for e in go(tmp_path / "three", top) if isinstance(e, Finished)] == ["base", "middle", "toy"], "another base, another key"


def test_a_start_that_was_killed_goes_on_where_it_was(tmp_path, shelf):
    shelf["base"] = preset_of(stage_of(steps=6))
    top = preset_of().but(starts=(Start(into="", from_="base"),))
    for event in train_preset("toy", top, NEEDS, out=tmp_path / "run", feeding=ToyFeeding(), device="cpu"):
        if isinstance(event, Stepped) and event.step == 3:
            break
    assert isinstance(go(tmp_path / "run", top, resume=True)[-1], Finished)


def test_a_chain_of_starts_has_an_end(tmp_path, shelf):
    shelf["loop"] = preset_of().but(starts=(Start(into="", from_="loop"),))
    with pytest.raises(UserError, match="more than 3 others"):
        go(tmp_path / "run", shelf["loop"])


def alternate(system, stage, batches, training):
    """A generator of its own, as a GAN has: two optimisers in turn."""
    one, two = training.optimizer_for("vision", "vision.*"), training.optimizer_for("text", "text.*")
    for batch in batches:
        losses = system.compare(system.embed(batch))
        training.descend(losses.total(), (one, two)[training.index % 2])
        yield losses


def test_a_stage_with_its_own_generator_resumes_bit_identical(tmp_path):
    preset = preset_of(stage_of(run=alternate, embed=None))
    go(tmp_path / "alone", preset)
    for event in train_preset("toy", preset, NEEDS, out=tmp_path / "run", feeding=ToyFeeding(), device="cpu", checkpoint_every=3):
        if isinstance(event, Saved):
            break
    assert go(tmp_path / "run", preset, resume=True)[0].done == 3
    assert same(tmp_path / "alone", tmp_path / "run")


def test_a_resume_with_another_number_of_ranks_says_so(tmp_path):
    go(tmp_path / "run", checkpoint_every=2)
    (tmp_path / "run" / "weights.safetensors").unlink()
    found = checkpoint.latest(tmp_path / "run" / "checkpoints")
    text = json.dumps({**found.facts, "ranks": 2})
    (found.path / checkpoint.FACTS).write_text(json.dumps({"crc": zlib.crc32(text.encode()), "facts": text}))
    [note, *_] = go(tmp_path / "run", resume=True)
    assert note.text == "the checkpoint is of 2 ranks, this is 1: the run goes on, not bit for bit"


def test_weights_and_biases_is_an_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install 'polysense\[wandb\]'"):
        go(tmp_path / "run", wandb="project")
    assert not (tmp_path / "run").exists()
    seen = []
    remote = SimpleNamespace(log=lambda line, step: seen.append((step, line["lr"])), finish=lambda: seen.append("done"))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **k: seen.append(k["project"]) or remote))
    go(tmp_path / "run", wandb="project", log_every=2)
    assert [s if isinstance(s, str) else s[0] for s in seen] == ["project", 2, 4, 6, "done"]


def test_tensorboard_holds_the_curve(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    go(tmp_path / "run")
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    assert [e.step for e in board.Scalars("loss/images")] == [1, 2, 3, 4, 5, 6]
    assert [e.value for e in board.Scalars("total")] == pytest.approx([x["total"] for x in lines(tmp_path / "run")])
