"""Key maps: two-way, total, composable; clear about what does not fit."""
import pytest
import torch
from torch import nn

from polysense.base.errors import UserError
from polysense.weights.keymap import KeyMap, batch_norm, both, lead1, lead2, load_into, rename, rule, same, scalar, split, stack, stack3, transpose
from polysense.weights.ours import RENAMES, Rename, renamed

R = torch.randn


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) and v.shape == b[k].shape and v.dtype == b[k].dtype for k, v in a.items())


@pytest.mark.parametrize("op, theirs", [
    (same, [R(3, 2)]), (stack3, [R(6, 2)]), (stack(4), [R(8)]), (split(2), [R(3, 2), R(3, 2)]), (transpose, [R(3, 2)]), (lead1, [R(5, 2)]),
    (lead2, [R(4)]), (scalar, [R(())])], ids=lambda v: getattr(v, "name", ""))
def test_every_operation_is_undone_exactly(op, theirs):
    ours = op.load(theirs)
    back = op.save(ours)
    assert len(back) == len(theirs) and all(torch.equal(a, b) and a.shape == b.shape for a, b in zip(back, theirs))


def test_what_the_operations_do():
    assert torch.equal(stack3.load([torch.arange(6.0)])[1], torch.tensor([2.0, 3.0]))
    assert lead1.load([R(5, 2)])[0].shape == (1, 5, 2) and lead2.load([R(4)])[0].shape == (1, 1, 4)
    assert scalar.load([R(1)])[0].shape == ()
    w, x = R(3, 2), R(4, 3)
    assert torch.allclose(x @ w, nn.functional.linear(x, transpose.load([w])[0]))


TABLE = KeyMap((
    rule("emb", "position", lead1), rule("layer{s+1}.{b}.qkv.weight", tuple(f"stages.{{s}}.{{b}}.{n}.weight" for n in "qkv"), stack3),
    *batch_norm("layer{s+1}.{b}.bn", "stages.{s}.{b}.norm"), *both("layer{s+1}.{b}.conv{n}", "stages.{s}.{b}.conv{n+1}"),
), drop=(r"ids",), alias=(("{rest}.gamma", "{rest}.weight"),))


def state() -> dict[str, torch.Tensor]:
    out = {"emb": R(4, 2)}
    for s in (1, 2):
        for b in (0, 1, 10):
            at = f"layer{s}.{b}"
            out |= {f"{at}.qkv.weight": R(6, 2), f"{at}.conv0.weight": R(2, 2, 1, 1),
                    f"{at}.bn.running_mean": R(2), f"{at}.bn.num_batches_tracked": torch.tensor(7)}
    return out


def test_several_indices_and_offsets_both_ways_bit_for_bit():
    theirs = state()
    ours = TABLE.load(theirs)
    assert {"stages.0.10.q.weight", "stages.1.0.conv1.weight", "stages.1.1.norm.num_batches_tracked"} <= ours.keys()
    assert torch.equal(torch.cat([ours[f"stages.1.10.{n}.weight"] for n in "qkv"]), theirs["layer2.10.qkv.weight"])
    assert equal(TABLE.save(ours), theirs) and equal(TABLE.load(TABLE.save(ours)), ours)


def test_a_table_moves_under_prefixes_and_adds_up():
    whole = TABLE.at("visual.trunk", "vision") + KeyMap((rule("scale", "log_scale", scalar),), drop=("junk",))
    theirs = {f"visual.trunk.{k}": v for k, v in state().items()} | {"scale": R(1)}
    ours = whole.load({**theirs, "junk": R(1), "visual.trunk.ids": R(3)})
    assert "vision.stages.0.0.q.weight" in ours and ours["log_scale"].shape == ()
    back = whole.save(ours)
    assert back.keys() == theirs.keys() and equal({k: v for k, v in back.items() if k != "scale"}, {k: v for k, v in theirs.items() if k != "scale"})
    with pytest.raises(UserError, match="ids"):
        whole.load({**theirs, "ids": R(3)})                       # the drop moved with its table
    assert equal(TABLE.at().load(state()), TABLE.load(state())) is False     # other random numbers: equal() can say no


def test_aliases_are_read_and_never_written():
    table = KeyMap((*both("norm", "body.norm"),), alias=(("{rest}.gamma", "{rest}.weight"), ("{rest}.beta", "{rest}.bias"))).at("bert", "text")
    old = {"bert.norm.gamma": R(2), "bert.norm.beta": R(2)}
    ours = table.load(old)
    assert torch.equal(ours["text.body.norm.weight"], old["bert.norm.gamma"])
    assert set(table.save(ours)) == {"bert.norm.weight", "bert.norm.bias"}
    with pytest.raises(UserError, match="two names"):
        table.load({**old, "bert.norm.weight": R(2)})


def test_a_key_without_a_rule_is_refused_and_some_are_named():
    extra = {f"head.{i}.weight": R(2) for i in range(9)}
    with pytest.raises(UserError, match=r"9 keys \(head\.0\.weight.*no layout known here"):
        TABLE.load({**state(), **extra})
    with pytest.raises(UserError, match=r"looks like vit/timm"):
        TABLE.load({"patch_embed.proj.weight": R(2)})
    with pytest.raises(UserError, match=r"no name for our head\.weight"):
        TABLE.save({**TABLE.load(state()), "head.weight": R(2)})


def test_half_a_rule_and_a_wrong_shape_are_refused():
    ours = TABLE.load(state())
    del ours["stages.0.1.k.weight"]
    with pytest.raises(UserError, match=r"stages\.0\.1\.k\.weight is missing beside stages\.0\.1\.q\.weight"):
        TABLE.save(ours)
    with pytest.raises(UserError, match=r"layer1\.0\.qkv\.weight of shape \[7, 2\] cannot pass stack3"):
        TABLE.load({**state(), "layer1.0.qkv.weight": R(7, 2)})


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.norm, self.position = nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Parameter(torch.zeros(1, 5, 3))


TOY = KeyMap((*both("fc", "up"), *batch_norm("bn", "norm"), rule("pos", "position", lead1)))


def toy_state() -> dict[str, torch.Tensor]:
    return TOY.save({k: torch.full_like(v, 2) for k, v in Toy().state_dict().items()})


def test_load_into_fills_everything_casts_and_forgives_only_the_counter():
    toy, theirs = Toy(), toy_state()
    del theirs["bn.num_batches_tracked"]
    load_into(toy, TOY, {k: v.half() for k, v in theirs.items()})
    assert all((v == 2).all() and v.dtype == torch.float32 for k, v in toy.state_dict().items() if "num_batches" not in k)


@pytest.mark.parametrize("change, words", [
    ({"fc.bias": None}, r"lacks up\.bias \(theirs: fc\.bias\)"),
    ({"pos": R(7, 3)}, r"position \(theirs: pos\) has shape \[1, 7, 3\] in the file and \[1, 5, 3\] here.*image_size"),
    ({"fc.weight": R(4, 2), "fc.bias": R(4)}, r"up\.weight.*\[4, 2\] in the file and \[3, 2\] here and 1 more")])
def test_load_into_names_both_sides_and_changes_nothing(change, words):
    toy, theirs = Toy(), {k: v for k, v in {**toy_state(), **change}.items() if v is not None}
    before = {k: v.clone() for k, v in toy.state_dict().items()}
    with pytest.raises(UserError, match=words):
        load_into(toy, TOY, theirs)
    assert equal(before, dict(toy.state_dict()))


def test_a_file_with_more_than_the_system_is_refused():
    table = TOY + KeyMap((rule("extra", "scale1"),))
    with pytest.raises(UserError, match=r"no place for scale1 \(theirs: extra\)"):
        load_into(Toy(), table, {**toy_state(), "extra": R(2)})


def test_our_own_renames_apply_in_the_order_of_their_dates():
    lines = (Rename("2027-01-01", "{head}.up.{tail}", "{head}.rise.{tail}"), Rename("2026-01-01", "{head}.fc1.{tail}", "{head}.up.{tail}"))
    old = {"blocks.0.mlp.fc1.weight": R(2), "blocks.1.mlp.up.bias": R(2), "norm.weight": R(2)}
    new = renamed(old, lines)
    assert set(new) == {"blocks.0.mlp.rise.weight", "blocks.1.mlp.rise.bias", "norm.weight"}
    assert torch.equal(new["blocks.0.mlp.rise.weight"], old["blocks.0.mlp.fc1.weight"])
    with pytest.raises(UserError, match="mixed versions"):
        renamed({**old, "blocks.0.mlp.up.weight": R(2)}, lines)
    assert renamed(old) == old and list(RENAMES) == sorted(RENAMES, key=lambda r: r.date)
    assert rename("a.3.b", "a.{i}.b", "c.{i+1}") == "c.4" and rename("a.x.b", "a.{i}.b", "c") == "a.x.b"


def test_a_run_saved_before_a_rename_still_opens(monkeypatch):
    from polysense.train.folder import fill
    monkeypatch.setattr("polysense.weights.ours.RENAMES", (Rename("2026-01-01", "fc.{tail}", "up.{tail}"),))
    old = {k.replace("up.", "fc."): torch.full_like(v, 3) for k, v in Toy().state_dict().items()}
    toy = Toy()
    fill(toy, old, "weights.safetensors")
    assert (toy.up.weight == 3).all() and "fc.weight" in old
