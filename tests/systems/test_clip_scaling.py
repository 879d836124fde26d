"""What lets CLIP scale (Cherti et al. 2023, Pham et al. 2021): exact gradients at any batch, as the preset trains them."""
from contextlib import nullcontext

import pytest
import torch

import polysense
from polysense.base.catalogue import preset_of
from polysense.base.plan import Stage
from polysense.base.telling import Cleaned, Mixed
from polysense.towers.clip import body, vit_pair
from polysense.train.gradients import Call, backward, size_of

recipe = polysense.load("clip_scaling")


def system(dropout: float = 0.0):
    torch.manual_seed(0)
    small = body(24, 2, 2).but(**{"block.dropout": dropout, "block.attn.dropout": dropout})
    return recipe.CLIPScaling.Config(**vit_pair(32, 8, small, small, 20, vocab=60, length=10, end=2)).build().train()


def batch(n: int = 12):
    g = torch.Generator().manual_seed(1)
    text = torch.randint(5, 60, (n, 8), generator=g)
    text[:, 0], text[:, -1] = 1, 2
    return {"image": torch.randn(n, 3, 32, 32, generator=g), "text": text}


def gradients(chunk: int | None, dropout: float = 0.0, **more) -> tuple[dict[str, torch.Tensor], float]:
    """Gradients and loss of one step, at float64 so that only the mathematics can differ."""
    model = system(dropout).double()
    given = {k: v.double() if v.is_floating_point() else v for k, v in batch().items()}
    stage = preset_of("clip_scaling").stages[0].but(**{"chunk": chunk, "batch_size": 12, **more})
    torch.manual_seed(5)
    losses, _ = backward(Call(model), stage, given, lambda on: nullcontext())
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, float(losses["contrast"])


@pytest.mark.parametrize("chunk", [1, 2, 5, 12, 40])
def test_gradients_in_chunks_are_those_of_the_whole_batch(chunk):
    whole, loss = gradients(None)
    parts, same = gradients(chunk)
    assert same == pytest.approx(loss, abs=1e-6) and parts.keys() == whole.keys()
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("chunk", [3, 4])
def test_with_dropout_both_passes_of_a_chunk_drop_the_same(chunk):
    """Against one backward through the embeddings of all chunks, each drawn from the random state that it had."""
    parts, _ = gradients(chunk, dropout=0.3)
    model = system(0.3).double()
    given = {k: v.double() if v.is_floating_point() else v for k, v in batch().items()}
    torch.manual_seed(5)
    seen = [model.embed({k: v[i:i + chunk] for k, v in given.items()}) for i in range(0, size_of(given), chunk)]
    model.compare({k: torch.cat([s[k] for s in seen]) for k in seen[0]}).total().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(parts[name], p.grad, rtol=1e-5, atol=1e-5, msg=name)


def test_adding_up_gradients_of_small_batches_is_another_loss():
    """The negative control: each small batch has its own few negatives."""
    whole, loss = gradients(None)
    stage = Stage(objective=lambda s, b: s.compare(s.embed(b)), steps=1, batch_size=12, accumulate=3, optim=preset_of("clip_scaling").stages[0].optim)
    model = system().double()
    given = {k: v.double() if v.is_floating_point() else v for k, v in batch().items()}
    losses, _ = backward(Call(model), stage, given, lambda on: nullcontext())
    assert abs(float(losses["contrast"]) - loss) > 0.1
    assert max(float((p.grad - whole[n]).abs().max()) for n, p in model.named_parameters()) > 1e-3


def test_the_preset_trains_in_chunks_on_clean_data_mixed_by_share():
    plan = preset_of("clip_scaling")
    assert plan.stages[0].chunk < plan.stages[0].batch_size and plan.stages[0].embed is not None
    assert [type(t) for t in plan.feed.told] == [Cleaned, Mixed] and plan.feed.told[0].copies == "one"
    assert plan.feed.told[1].shares == (0.5, 0.5) and plan.data.count("+") == 1


def test_sizes_are_those_of_the_released_models():
    sizes = {"vit_b_32": 151_277_313, "vit_b_16": 149_620_737, "vit_l_14": 427_616_513, "vit_h_14": 986_109_441, "paper": 1_366_678_273}
    for name, want in sizes.items():
        with torch.device("meta"):
            assert sum(p.numel() for p in preset_of("clip_scaling", name).config.build().parameters()) == want, name
    assert preset_of("clip_scaling", "vit_b_32").stages[0].optim.weight_decay == 0.2
