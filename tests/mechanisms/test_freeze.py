"""Freeze plans: what they choose, that the rest is untouched, and that nothing is kept below the lowest trained layer."""
import pytest
import torch
from torch import nn

from polysense.archetypes.language_model import tiny_language
from polysense.base.errors import UserError
from polysense.base.system import Losses, Optim, Spec, Stage, System
from polysense.mechanisms.adapter import blocks
from polysense.mechanisms.freeze import Freeze
from polysense.nn.block import PreNorm
from polysense.nn.residual import Basic, Stem
from polysense.nn.transformer import Transformer
from polysense.towers.resnet import ResNet
from polysense.towers.vit import ViT
from polysense.train.fit import fit
from polysense.train.state import Training


class Two(System):
    """A transformer and a convolutional tower with dropout and batch norm, and a head."""

    def __init__(self, depth=3):
        super().__init__()
        body = Transformer.Config(width=16, depth=depth, heads=2, block=PreNorm.Config(dropout=0.5))
        self.vision = ViT.Config(image_size=8, patch=4, body=body).build()
        self.conv = ResNet.Config(layers=(1, 2), base=4, stem=Stem.Config(kernel=3, stride=1, pool=0), block=Basic.Config()).build()
        self.head = nn.Linear(16 + 8, 3)

    def losses(self, batch):
        seen = torch.cat([self.vision(batch["image"]).pooled, self.conv(batch["image"]).pooled], 1)
        return Losses(label=nn.functional.cross_entropy(self.head(seen), batch["label"]))


def two(depth=3):
    torch.manual_seed(0)
    return Two(depth)


STAGE = Stage(objective=Two.losses, steps=4, batch_size=4, optim=Optim(lr=1e-2, weight_decay=0.1, warmup=0), precision="fp32", ema=0.5)
BATCH = {"image": torch.randn(4, 3, 8, 8), "label": torch.tensor([0, 1, 2, 0])}


def names(plan, system=None):
    system = system or two()
    system.choose_trainable(plan.trainable(system))
    return {n for n, p in system.named_parameters() if p.requires_grad}


def test_blocks_of_all_kinds_of_towers_are_found_in_order():
    assert dict(blocks(two())) == {"vision.body.blocks": [f"vision.body.blocks.{i}" for i in range(3)],
                                   "conv.stages": ["conv.stages.0.0", "conv.stages.1.0", "conv.stages.1.1"]}


def test_last_blocks_words_and_patterns():
    top = names(Freeze(last=1, on="vision.*", train="head.*"))
    assert top == {n for n, _ in two().named_parameters() if n.startswith(("vision.body.blocks.2.", "head."))}
    assert all(n.endswith("bias") for n in names(Freeze(train="biases"))) and "head.bias" in names(Freeze(train="biases"))
    norms = names(Freeze(train="norms"))
    assert "vision.body.norm.weight" in norms and "conv.stem.norm.bias" in norms and not any("attn" in n or "conv1" in n for n in norms)
    assert names(Freeze(train="embeddings")) == {"vision.cls", "vision.position"}
    both = names(Freeze(last=2))
    assert any(n.startswith("conv.stages.1.0") for n in both) and not any(n.startswith("conv.stages.0") for n in both)


def test_frozen_tensors_are_bit_identical_and_hold_no_state():
    system, plan = two(), Freeze(last=1, train="head.*")
    stage = plan.stages(STAGE, system)[0]
    before = {k: v.clone() for k, v in system.state_dict().items()}
    training = Training(system, stage)
    list(fit(system, stage, [BATCH] * 4, training=training))
    moved = {k for k, v in system.state_dict().items() if not torch.equal(v, before[k])}
    chosen = {n for n, p in system.named_parameters() if p.requires_grad}
    running = {k for k in moved if "running" in k or "num_batches" in k}
    assert moved - running == chosen and all(k.startswith("conv.stages.1.1.") for k in running), "frozen batch norms keep their statistics"
    optimizer = training.optimizer_for("main")
    held = [n for g in optimizer.param_groups for n in g["names"]]
    assert set(held) == chosen and len(optimizer.state) == len(chosen) and set(training.average.weights) == chosen


def test_calling_train_never_wakes_a_frozen_module():
    system, plan = two(), Freeze(train="head.*")
    system.choose_trainable(plan.trainable(system))
    system.train()
    assert not any(m.training for n, m in system.named_modules() if n.startswith(("vision", "conv"))) and system.head.training
    first, again = (system.losses(BATCH)["label"] for _ in range(2))
    assert torch.equal(first, again), "no dropout acts below"


def kept_by(depth, plan):
    system = two(depth)
    system.choose_trainable(plan.trainable(system))
    system.train()
    count = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: count.append(t.numel()) or t, lambda t: t):
        system.losses(BATCH)["label"].backward()
    return sum(count)


def test_what_is_kept_for_the_backward_pass_does_not_grow_with_a_frozen_prefix():
    top = Freeze(last=1, on="vision.*", train="head.*")
    assert kept_by(2, top) == kept_by(6, top) < kept_by(6, Freeze(train="*"))
    assert kept_by(6, Freeze(train="vision.cls head.*")) > kept_by(2, Freeze(train="vision.cls head.*")), "gradients pass through what is frozen"


def test_gradual_unfreezing_is_a_row_of_stages():
    made = Freeze(last=3, on="vision.*", train="head.*", gradual=3).stages(STAGE.but(steps=7), two())
    assert [(s.name, s.steps) for s in made] == [("train_1", 2), ("train_2", 2), ("train_3", 3)]
    assert [sum("blocks" in t for t in s.trainable) for s in made] == [1, 2, 3] and all("head.*" in s.trainable for s in made)


def test_files_hold_what_trained_and_nothing_else():
    plan, made, twin = Freeze(last=1, train="head.*"), two(), two()
    with torch.no_grad():
        for n, p in made.named_parameters():
            p.add_(1.0 if n in names(plan) else 0.0)
    file = plan.tensors(made)
    assert set(file) == names(plan)
    plan.load(twin, file)
    assert all(torch.equal(v, twin.state_dict()[k]) for k, v in made.state_dict().items())
    with pytest.raises(UserError, match=r"lacks head\.bias"):
        plan.load(twin, {k: v for k, v in file.items() if k != "head.bias"})


@pytest.mark.parametrize(("plan", "wrong"), [
    (Freeze(), "nothing would train"), (Freeze(train="hed.*"), "matches no parameter"), (Freeze(last=9), "last=9 of a tower of 3"),
    (Freeze(last=1, on="text"), "names no tower"), (Freeze(last=2, gradual=3), "gradual=3")])
def test_what_cannot_be_is_said(plan, wrong):
    with pytest.raises(UserError, match=wrong):
        plan.put(two())
        plan.stages(STAGE, two())


def test_a_language_model_is_a_tower_too():
    torch.manual_seed(0)
    assert [n for n, _ in blocks(tiny_language().build())] == ["body.blocks"] and isinstance(tiny_language(), Spec)
