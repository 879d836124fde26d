"""LoRA on any layer: birth, gradients, parts, merging, several at once, files."""
import pytest
import torch
from torch import nn

from polysense.base.errors import UserError
from polysense.mechanisms.adapter import patterns
from polysense.mechanisms.lora import LowRank, adapted_layers, bare, merge, plain_names, switch, unmerge


class Net(nn.Module):
    """One layer of each kind, and a fused one."""

    def __init__(self):
        super().__init__()
        self.embed, self.conv = nn.Embedding(20, 6), nn.Conv2d(6, 5, 3, stride=2, padding=1)
        self.q, self.qkv, self.head = nn.Linear(5, 4), nn.Linear(4, 12), nn.Linear(12, 3)

    def forward(self, ids):
        x = self.embed(ids).transpose(1, 2).unflatten(2, (4, 4))
        return self.head(self.qkv(self.q(self.conv(x).flatten(2).transpose(1, 2))))


IDS = torch.arange(32).view(2, 16) % 20


def net(*adapters, shaken=False):
    torch.manual_seed(0)
    made = Net()
    for a in adapters:
        a.put(made)
    if shaken:
        with torch.no_grad():
            for n, p in made.named_parameters():
                if ".lora." in n:
                    p.copy_(torch.randn_like(p) * 0.3)
    return made.eval()


ALL = LowRank(rank=2, alpha=6.0, on="embed|conv|q|head")


def test_patterns_have_alternatives_within_a_step():
    assert patterns("vision.*.q|v text.*.out") == ("vision.*.q", "vision.*.v", "text.*.out") and patterns("") == ()


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_at_birth_the_output_is_the_bases_bit_for_bit_and_the_names_are_too(init):
    plain, made = net(), net(ALL.but(init=init))
    assert torch.equal(plain(IDS), made(IDS))
    assert set(plain.state_dict()) == {k for k in made.state_dict() if ".lora." not in k}
    assert isinstance(made.q, nn.Linear) and made.q.in_features == 5


def test_the_first_gradient_moves_b_and_not_a_and_reaches_no_weight():
    made = net(LowRank(rank=2, on="q|conv"))
    for p in (p for n, p in made.named_parameters() if ".lora." not in n):
        p.requires_grad_(False)
    made(IDS).square().sum().backward()
    for layer in (made.q, made.conv):
        one = layer.lora["default"]
        assert one.A.grad.abs().sum() == 0 and one.B.grad.abs().sum() > 0 and layer.weight.grad is None


def test_an_embeddings_roles_are_swapped():
    one = net(LowRank(rank=2, on="embed")).embed.lora["default"]
    assert one.A.abs().sum() == 0 and one.B.abs().sum() > 0 and one.A.shape == (2, 20) and one.B.shape == (6, 2)


def test_the_update_is_alpha_over_r_times_b_a_of_that_rank():
    made = net(ALL, shaken=True)
    one = made.q.lora["default"]
    torch.testing.assert_close(one.delta(), 3.0 * one.B @ one.A)
    assert torch.linalg.matrix_rank(one.delta()) <= 2
    root = net(ALL.but(scaling="root"), shaken=True).q.lora["default"]
    torch.testing.assert_close(root.delta(), 6.0 / 2 ** 0.5 * root.B @ root.A)
    assert sum(p.numel() for n, p in made.named_parameters() if ".lora." in n) == 2 * ((20 + 6) + (6 * 9 + 5) + (5 + 4) + (12 + 3))


def test_merging_keeps_the_output_and_unmerging_restores_the_weights():
    made = net(ALL, shaken=True)
    before, out = {k: v.clone() for k, v in made.state_dict().items()}, made(IDS)
    assert not torch.allclose(out, net()(IDS))
    merge(made)
    torch.testing.assert_close(made(IDS), out, atol=1e-5, rtol=0)
    merge(made)
    torch.testing.assert_close(made(IDS), out, atol=1e-5, rtol=0, msg="merging twice is merging once")
    unmerge(made)
    assert all(torch.allclose(v, before[k], atol=1e-6) for k, v in made.state_dict().items())
    merge(made)
    bare(made)
    torch.testing.assert_close(made(IDS), out, atol=1e-5, rtol=0)
    assert set(made.state_dict()) == set(net().state_dict()) and type(made.q) is nn.Linear and not list(adapted_layers(made))


def test_a_fused_layer_has_an_update_for_each_enabled_part_and_none_for_the_others():
    made = net(LowRank(rank=2, on="qkv", parts=3, enabled=(0, 2)), shaken=True)
    one = made.qkv.lora["default"]
    assert one.A.shape == (4, 4) and one.B.shape == (8, 2)
    x = torch.randn(7, 4)
    added = made.qkv(x) - nn.functional.linear(x, made.qkv.weight, made.qkv.bias)
    assert torch.equal(added[:, 4:8], torch.zeros(7, 4)) and (added[:, :4].abs() > 0).all() and (added[:, 8:].abs() > 0).all()
    torch.testing.assert_close(added, x @ one.delta().T, atol=1e-5, rtol=0)
    torch.testing.assert_close(added[:, 8:], x @ one.A[2:].T @ one.B[4:].T, atol=1e-5, rtol=0)


def test_dropout_acts_on_the_adapters_input_alone():
    made = net(LowRank(rank=2, on="q", dropout=0.9), shaken=True)
    x = torch.randn(200, 5)
    plain = nn.functional.linear(x, made.q.weight, made.q.bias)
    made.train()
    off = ((made.q(x) - plain).abs().sum(1) == 0).float().mean()
    assert 0.4 < off < 0.75, "all five inputs of a row are dropped in 0.9^5 of them"
    with torch.no_grad():
        made.q.lora["default"].B.zero_()
    assert torch.equal(made.q(x), plain)


def test_two_adapters_sum_to_one_of_the_ranks_together_and_can_be_switched():
    one, two = LowRank(rank=2, on="q", name="one"), LowRank(rank=2, on="q", name="two")
    made, whole = net(one, two, shaken=True), net(LowRank(rank=4, on="q"))
    with torch.no_grad():
        for k, dim in (("A", 0), ("B", 1)):
            getattr(whole.q.lora["default"], k).copy_(torch.cat([getattr(made.q.lora[n], k) for n in ("one", "two")], dim))
    torch.testing.assert_close(made(IDS), whole(IDS))
    both = made(IDS)
    switch(made, ("one",))
    first = made(IDS)
    switch(made, ())
    assert torch.equal(made(IDS), net()(IDS)) and not torch.allclose(first, both)
    with pytest.raises(UserError, match="no adapter 'three'"):
        switch(made, ("three",))
    switch(made, ("two", "one"))
    torch.testing.assert_close(made(IDS), both)


# -- files ----------------------------------------------------------------------------------------------------------------------------------

def foreign(tensors, how):
    """Our file under another library's names."""
    out = {}
    for key, value in tensors.items():
        layer, _, kind = key.removeprefix("base_model.model.").rpartition(".lora_")
        kind = kind[0]
        out |= {"loralib": {f"{layer}.lora_{kind}": value}, "diffusers": {f"{layer}.lora.{'down' if kind == 'A' else 'up'}.weight": value},
                "kohya": {f"{layer}.lora_{'down' if kind == 'A' else 'up'}.weight": value, f"{layer}.alpha": torch.tensor(6.0)},
                "memory": {f"base_model.model.{layer}.lora_{kind}.default.weight": value}, "peft": {key: value}}[how]
    return out


@pytest.mark.parametrize("how", ["peft", "memory", "loralib", "diffusers", "kohya"])
def test_files_of_other_libraries_load(how):
    c = LowRank(rank=2, alpha=6.0, on="q|head|conv")
    made, twin = net(c, shaken=True), net(c)
    c.load(twin, foreign(c.tensors(made), how))
    torch.testing.assert_close(twin(IDS), made(IDS))


def test_kohyas_alpha_is_the_files_own():
    c = LowRank(rank=2, on="q")
    made, twin = net(c, shaken=True), net(c)
    c.load(twin, foreign(c.tensors(made), "kohya"))
    assert twin.q.lora["default"].scale == 3.0 and plain_names({"a.b.alpha": torch.tensor(1.0)}) == {"a.b": {"alpha": torch.tensor(1.0)}}


def test_what_trains_beside_is_in_the_file():
    c = LowRank(rank=2, on="q", also="head.*")
    made, twin = net(c, shaken=True), net(c)
    with torch.no_grad():
        made.head.weight.add_(1.0)
    assert set(c.trainable(made)) == {"*.lora.default.*", "head.*"}
    c.load(twin, c.tensors(made))
    torch.testing.assert_close(twin(IDS), made(IDS))
    assert c.about(made)["modules_to_save"] == ["head"] and c.about(made)["target_modules"] == ["q"]


@pytest.mark.parametrize(("make", "wrong"), [
    (lambda: net(LowRank(on="k")), r"on='k' matches no dense.*such as embed"), (lambda: net(LowRank(rank=0)), "rank=0"),
    (lambda: net(LowRank(on="q", init="warm")), "init"), (lambda: net(LowRank(on="qkv", parts=5)), "5 parts"),
    (lambda: net(LowRank(on="qkv", parts=3, enabled=(3,))), "enabled"), (lambda: net(LowRank(on="q"), LowRank(on="q")), "already"),
    (lambda: net(LowRank(on="q", name="a.b")), "without dots"), (lambda: LowRank(on="q").load(net(LowRank(on="q")), {}), "no update of q"),
    (lambda: LowRank(on="q").load(net(LowRank(on="q")), {f"{n}.lora_{k}": torch.zeros(8, 5) if k == "A" else torch.zeros(4, 8)
                                                         for n in ("q", "v") for k in "AB"}), "update of v"),
    (lambda: LowRank(on="q").load(net(LowRank(on="q")), {"q.lora_A": torch.zeros(3, 5), "q.lora_B": torch.zeros(4, 3)}),
     r"is \(3, 5\), not \(8, 5\)"),
    (lambda: LowRank(on="qkv", parts=3).about(net(LowRank(on="qkv", parts=3))), "fused")])
def test_what_cannot_be_is_said_in_one_line(make, wrong):
    with pytest.raises(UserError, match=wrong) as caught:
        make()
    assert "\n" not in str(caught.value)
