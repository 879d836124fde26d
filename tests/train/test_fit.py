"""The loop: what a step does, what it leaves alone, and what stops it."""
from itertools import count

import pytest
import torch
from train.toys import Toy, batch_of, stage_of, toy

from polysense.base.batch import Losses
from polysense.base.errors import UserError
from polysense.train.fit import Diverged, fit
from polysense.train.gradients import Call, backward, restore_random_state, whole
from polysense.train.precision import autocast
from polysense.train.state import Training, equipped

FP32 = autocast("fp32", torch.device("cpu"))


def stream(size: int = 8):
    for i in count():
        yield batch_of(list(range(i * size, (i + 1) * size)))


def weights(system):
    return {k: v.clone() for k, v in system.state_dict().items()}


def test_the_loop_equals_a_hand_written_one():
    ours, theirs, stage = toy(), toy(), stage_of(weight_decay=0.1, clip=0.5, warmup=2, weights=(("texts", 0.5),))
    steps = list(fit(ours, stage, stream()))
    theirs.choose_trainable(stage.trainable)
    theirs.train()
    decay = [p for n, p in theirs.named_parameters() if p.requires_grad and p.ndim > 1]
    plain = [p for n, p in theirs.named_parameters() if p.requires_grad and p.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}], lr=1e-2)
    schedule = [0.5, 1, 1, 0.8535533905932737, 0.5, 0.14644660940672627]
    for step, factor, batch in zip(steps, schedule, stream()):
        losses = theirs.compare(theirs.embed(batch))
        total = losses["images"] + 0.5 * losses["texts"]
        optimizer.zero_grad()
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_([*decay, *plain], 0.5)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * factor
        optimizer.step()
        assert step.total == pytest.approx(float(total.detach()), abs=1e-5) and step.grad_norm == pytest.approx(float(norm), rel=1e-4)
        assert step.lr == pytest.approx(1e-2 * factor)
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(dict(ours.named_parameters())[name], p, rtol=1e-4, atol=1e-6)
    assert [s.index for s in steps] == [1, 2, 3, 4, 5, 6] and steps[0].samples == 8 and int(ours.seen) == 6


def test_the_frozen_part_is_untouched_and_in_eval_mode():
    system = toy()
    before = weights(system.frozen)
    for _ in fit(system, stage_of(), stream()):
        assert not system.frozen[1].training and system.vision.training
    assert all(torch.equal(v, before[k]) for k, v in system.frozen.state_dict().items()), "running statistics included"
    assert not torch.equal(system.vision.patch.weight, toy().vision.patch.weight)


def gradients(stage, seed=3, **config):
    system = toy(**config)
    system.choose_trainable(stage.trainable)
    system.train()
    torch.manual_seed(seed)
    losses, keep = backward(Call(system), stage, batch_of(list(range(8))), FP32)
    return losses, keep, {n: p.grad for n, p in system.named_parameters() if p.grad is not None}, torch.rand(1)


@pytest.mark.parametrize("chunk", [1, 3, 4, 8])
def test_gradient_caching_is_exact(chunk):
    plain, cached = gradients(stage_of()), gradients(stage_of(chunk=chunk))
    assert plain[2].keys() == cached[2].keys()
    for name, g in plain[2].items():
        torch.testing.assert_close(cached[2][name], g, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(plain[0], cached[0])
    torch.testing.assert_close(plain[1], cached[1])


def test_gradient_caching_repeats_dropout():
    _, _, got, after = gradients(stage_of(chunk=3), dropout=0.5)
    system, batch = toy(dropout=0.5), batch_of(list(range(8)))
    system.choose_trainable(stage_of().trainable)
    system.train()
    torch.manual_seed(3)
    parts = [system.embed({k: v[i:i + 3] for k, v in batch.items()}) for i in (0, 3, 6)]       # one graph over all chunks
    system.compare({k: torch.cat([p[k] for p in parts]) for k in parts[0]}).total().backward()
    for name, g in got.items():
        torch.testing.assert_close(g, dict(system.named_parameters())[name].grad, rtol=1e-5, atol=1e-6)
    assert torch.equal(after, torch.rand(1)), "the random stream goes on as if there had been one pass"


def test_gradient_caching_holds_one_chunk_of_activations():
    def peak(stage) -> int:
        held, most = [0], [0]

        class Held:
            def __init__(self, t):
                weight = t if t._base is None else t._base
                self.t, self.size = t, 0 if isinstance(weight, torch.nn.Parameter) else t.numel()
                held[0] += self.size
                most[0] = max(most[0], held[0])

            def __del__(self):
                held[0] -= self.size

        with torch.autograd.graph.saved_tensors_hooks(Held, lambda h: h.t):
            gradients(stage, width=32)
        return most[0]

    assert peak(stage_of(chunk=1)) < 0.25 * peak(stage_of())


def test_accumulation_adds_up_to_the_whole_batch():
    plain, parts = (gradients(stage_of(objective=Toy.pointwise, embed=None, accumulate=a)) for a in (1, 3))
    torch.testing.assert_close(plain[0], parts[0])
    torch.testing.assert_close(plain[1], parts[1])
    for name, g in plain[2].items():
        torch.testing.assert_close(parts[2][name], g, rtol=1e-5, atol=1e-6)


def test_accumulation_of_a_split_objective_still_compares_the_whole_batch():
    plain, parts = gradients(stage_of()), gradients(stage_of(accumulate=4))
    for name, g in plain[2].items():
        torch.testing.assert_close(parts[2][name], g, rtol=1e-5, atol=1e-6)


def test_activation_checkpointing_changes_nothing_but_memory():
    stage = stage_of(checkpoint_activations=True)
    ours, theirs = toy(dropout=0.3), toy(dropout=0.3)
    torch.manual_seed(1)
    one = [s.total for s in fit(ours, stage, stream())]
    torch.manual_seed(1)
    two = [s.total for s in fit(theirs, stage_of(), stream())]
    assert one == pytest.approx(two, abs=1e-6) and "forward" not in vars(ours.vision.blocks[0])
    with equipped(ours, stage):
        assert "forward" in vars(ours.vision.blocks[0])


def test_compile_reaches_every_tower(monkeypatch):
    seen = []
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **kw: seen.append(f) or real(f, backend="eager", **kw))
    ours, theirs = toy(), toy()
    got = [s.total for s in fit(ours, stage_of(compile=True), stream())]
    assert got == pytest.approx([s.total for s in fit(theirs, stage_of(), stream())], abs=1e-5)
    assert len(seen) == len(list(ours.children())) and ours.vision._compiled_call_impl is None


def test_averaged_weights_follow_the_formula():
    system, stage = toy(), stage_of(ema=0.9)
    training = Training(system, stage)
    want = {n: p.detach().clone() for n, p in system.named_parameters() if p.requires_grad}
    for _ in fit(system, stage, stream(), training=training):
        want = {n: 0.9 * a + 0.1 * dict(system.named_parameters())[n].detach() for n, a in want.items()}
    assert training.average is not None and training.average.weights.keys() == want.keys()
    for name, a in want.items():
        torch.testing.assert_close(training.average.weights[name], a)


def test_a_nan_stops_before_it_touches_the_weights_and_names_its_samples():
    system = toy()
    bad = batch_of([7, 8, 9])
    bad["image"][1, 0, 0, 0] = float("nan")
    run = fit(system, stage_of(), [batch_of([1, 2, 3]), bad], names=lambda rows: [f"photo{r}.jpg" for r in rows])
    next(run)
    before = weights(system)
    with pytest.raises(Diverged, match=r"step 2 \(images=nan.*photo7\.jpg, photo8\.jpg, photo9\.jpg: the samples photo8\.jpg hold") as caught:
        next(run)
    assert caught.value.step == 2 and caught.value.suspects == ["photo8.jpg"] and "\n" not in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in system.state_dict().items())


def test_a_gradient_that_is_not_finite_stops_too():
    def root_of_zero(system, batch):
        return Losses(root=(system.log_scale * 0).sqrt() + 0 * system.embed(batch)["image"].sum())

    system = toy()
    with pytest.raises(Diverged, match=r"gradient norm (nan|inf)"):
        next(fit(system, stage_of(objective=root_of_zero, embed=None), stream()))
    assert float(system.log_scale.detach()) == 1


def test_data_that_end_early_are_an_error():
    with pytest.raises(UserError, match="ended after 2 batches"):
        list(fit(toy(), stage_of(), [batch_of([1, 2]), batch_of([3, 4])]))


def test_a_time_budget_ends_the_stage_and_its_schedule():
    times = iter([0.0, 0.5, 0.9, 1.0])
    steps = list(fit(toy(), stage_of(steps=1000, schedule="linear"), stream(), clock=lambda: next(times)))
    assert [s.lr for s in steps] == pytest.approx([1e-2, 5e-3, 1e-3])


def test_warm_up_is_counted_in_steps_even_under_a_time_budget():
    times = iter([0.1, 0.3, 0.5, 0.7, 1.0])
    steps = list(fit(toy(), stage_of(steps=1000, schedule="linear", warmup=4), stream(), clock=lambda: next(times)))
    assert [s.lr for s in steps] == pytest.approx([2.5e-3, 5e-3, 1e-2 * (1 - 496 / 996), 1e-2 * (1 - 696 / 996)])


def test_a_recipe_may_bring_its_own_generator():
    def alternate(system, stage, batches, training):
        one, two = training.optimizer_for("vision", "vision.*"), training.optimizer_for("text", "text.*")
        for i, batch in enumerate(batches):
            losses = system.compare(system.embed(batch))
            training.descend(losses.total(), (one, two)[i % 2])
            yield losses

    system, stage = toy(), stage_of(run=alternate, steps=1, ema=0.5)
    steps = list(fit(system, stage, stream()))
    assert steps[0].grad_norm > 0 and not torch.equal(system.vision.patch.weight, toy().vision.patch.weight)
    assert torch.equal(system.text.patch.weight, toy().text.patch.weight)


def test_bf16_trains_like_fp32_and_keeps_fp32_weights():
    runs = [[s.total for s in fit(toy(), stage_of(precision=p, steps=30, lr=5e-3), stream())] for p in ("fp32", "bf16")]
    assert runs[0] == pytest.approx(runs[1], abs=0.1) and runs[0] != runs[1]
    system = toy()
    list(fit(system, stage_of(precision="bf16", chunk=2), stream()))
    assert {p.dtype for p in system.parameters()} == {torch.float32}


def test_bf16_caching_equals_bf16_plain():
    bf16 = autocast("bf16", torch.device("cpu"))
    out = []
    for stage in (stage_of(), stage_of(chunk=2)):
        system = toy(width=32)
        system.choose_trainable(stage.trainable)
        system.train()
        backward(Call(system), stage, batch_of(list(range(8))), bf16)
        out.append({n: p.grad for n, p in system.named_parameters() if p.grad is not None})
    assert out[0].keys() == out[1].keys(), "the casts of the first pass, made without a graph, must not serve the second"
    for name, g in out[0].items():
        assert torch.nn.functional.cosine_similarity(g.flatten(), out[1][name].flatten(), 0) > 0.99 or g.norm() < 1e-3, name


def test_helpers_agree_with_each_other():
    stage = stage_of()
    got = whole(stage)(toy().eval(), batch_of([1, 2, 3]))
    assert got.keys() == {"images", "texts"}
    state = (torch.get_rng_state(), None)
    one = torch.rand(3)
    restore_random_state(state, torch.device("cpu"))
    assert torch.equal(one, torch.rand(3))
