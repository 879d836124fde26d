"""The freeze row: pictures or texts, only what the plan names. The plan: tests/mechanisms/test_freeze.py."""
import torch
from fake import fake_batch

import polysense
from polysense.base.catalogue import preset_of
from polysense.train.fit import fit

recipe = polysense.load("freeze_tuning")


def test_tiny_trains_its_last_block_and_head_and_keeps_the_statistics_of_the_rest():
    torch.manual_seed(0)
    preset = preset_of("freeze_tuning")
    system = preset.config.build()
    before = {k: v.clone() for k, v in system.state_dict().items()}
    batch = fake_batch(preset, ("image", "label"))
    list(fit(system, preset.stages[0].but(**{"steps": 2, "batch_size": 4, "optim.warmup": 0}), [batch] * 2))
    moved = {k for k, v in system.state_dict().items() if not torch.equal(v, before[k])}
    assert moved and all(k.startswith(("backbone.stages.3.0.", "head.")) for k in moved)


def system_body(tower):
    """The blocks without what they drop, which is no weight."""
    return tower.body.but(**{"block.dropout": 0.0, "block.attn.dropout": 0.0})


def test_the_papers_plan_is_the_top_quarter_of_bert():
    with torch.device("meta"):
        system = recipe.paper().config.build()
    system.choose_trainable(recipe.paper().stages[0].trainable)
    chosen = {n.split(".blocks.")[1].split(".")[0] if ".blocks." in n else n.split(".")[-3 if "pooler" in n else 0]
              for n, p in system.named_parameters() if p.requires_grad}
    assert {"9", "10", "11"} <= chosen and not chosen & {str(i) for i in range(9)}
    start, = recipe.paper().starts
    lent = preset_of(start.from_, start.preset).config.text
    assert (start.into, start.take) == ("backbone", "text") and lent.but(body=system_body(lent), dropout=0.0) == recipe.paper().config.backbone
    share = sum(p.numel() for p in system.parameters() if p.requires_grad) / sum(p.numel() for p in system.parameters())
    assert 0.15 < share < 0.25


def test_texts_are_read_too():
    from polysense.nn.block import PostNorm
    from polysense.nn.head import LinearBias
    from polysense.nn.norm import LayerNorm
    from polysense.nn.transformer import Transformer
    from polysense.towers.bert import Bert

    norm = LayerNorm.Config(eps=1e-12)
    body = Transformer.Config(width=16, depth=2, heads=2, norm=None, block=PostNorm.Config(norm=norm))
    tower = Bert.Config(vocab=60, length=8, norm_pre=norm, body=body)
    system = recipe.FreezeTuning.Config(backbone=tower, head=LinearBias.Config(into=16, out=3), reads="text").build()
    loss = system.losses({"text": torch.randint(1, 60, (4, 8)), "label": torch.tensor([0, 1, 2, 0])})["label"]
    assert loss.isfinite() and loss.requires_grad
