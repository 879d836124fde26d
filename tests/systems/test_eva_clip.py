"""EVA-CLIP's essence (Sun et al. 2023): each test fails if its mechanism is replaced by a shortcut."""
from fnmatch import fnmatch

import pytest
import torch
import torch.nn.functional as F

import polysense
from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.base.plan import Optim
from polysense.nn.attention import Attention
from polysense.nn.masking import masking_of
from polysense.nn.rotary import GridRotary
from polysense.nn.subnorm import BranchNorm, SubNormAttention, SubNormGatedMLP
from polysense.objectives.masked import masked_cosine
from polysense.towers.clip import body, vit_pair
from polysense.towers.eva import eva01, eva02, eva02_e
from polysense.train.fit import fit
from polysense.train.optim import LAMB, groups

recipe = polysense.load("eva_clip")
TEXT = recipe.ClipText.Config(vocab=100, length=12, end=2, body=body(32, 2, 2))
SMALL = recipe.config(eva02(32, 8, 48, 3, 3, grid=4), TEXT, 16, 0.5)


@pytest.fixture()
def system():
    torch.manual_seed(0)
    return SMALL.build()


@pytest.fixture(scope="module")
def batch():
    g = torch.Generator().manual_seed(0)
    return {"image": torch.randn(6, 3, 32, 32, generator=g), "text": torch.randint(5, 60, (6, 8), generator=g)}


def test_rotations_make_scores_depend_on_the_distance_by_row_and_by_column():
    rope = GridRotary.Config(width=16, grid=16).build()
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def score(a, b) -> float:
        at = [rope(x, torch.tensor([place], dtype=torch.float32)) for x, place in ((q, a), (k, b))]
        return float((at[0] * at[1]).sum())

    assert score((3, 5), (1, 9)) == pytest.approx(score((7.5, 2), (5.5, 6)), abs=1e-4)
    assert abs(score((3, 5), (1, 9)) - score((3, 5), (1, 8))) > 1e-3 and abs(score((3, 5), (1, 9)) - score((3, 5), (2, 9))) > 1e-3
    assert abs(score((3, 5), (1, 9)) - score((5, 3), (9, 1))) > 1e-3, "rows and columns are told apart"
    assert torch.equal(rope(q, torch.zeros(1, 2)), q), "what stands at (0, 0) is not turned"


def test_a_finer_grid_turns_by_fractions_of_the_grid_of_pre_training():
    rope = GridRotary.Config(width=16, grid=16).build()
    coarse, fine = rope.places((16, 16), 1), rope.places((32, 32), 1)
    assert coarse[0].tolist() == [0, 0] and coarse[2].tolist() == [0, 1] and coarse[17].tolist() == [1, 0]
    torch.testing.assert_close(fine[1:].view(32, 32, 2)[::2, ::2], coarse[1:].view(16, 16, 2))
    assert fine[2].tolist() == [0, 0.5]


@torch.no_grad()
def test_the_class_token_does_not_turn_and_patches_do(system, batch, monkeypatch):
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    turn = GridRotary.forward

    def watched(self, x, position):
        out = turn(self, x, position)
        seen.append((x, out))
        return out

    monkeypatch.setattr(GridRotary, "forward", watched)
    system.eval().encode_image(batch["image"])
    assert len(seen) == 2 * 3, "queries and keys of every block, values never"
    assert all(torch.equal(a[:, :, 0], b[:, :, 0]) and not torch.allclose(a[:, :, 2:], b[:, :, 2:], atol=1e-3) for a, b in seen)


@torch.no_grad()
def test_the_order_of_kept_patches_does_not_matter_but_their_places_do(system, batch):
    system.eval()
    keep = torch.stack([torch.randperm(16)[:8] for _ in range(6)])
    mixed = keep[:, torch.randperm(8)]
    one, two = (system.vision(batch["image"], keep=k).pooled for k in (keep, mixed))
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)
    system.vision.position.zero_()                                         # rotations alone know the place now
    rope = system.vision.body.blocks[0].attn.rope
    one = system.vision(batch["image"], keep=keep).pooled
    tokens = system.vision.embed(batch["image"], keep)[0]
    ungathered = system.vision.body(tokens, position=rope.turn(rope.places((4, 4), 1)[:9]))[:, 0]
    assert (one - ungathered).abs().max() > 1e-3, "the table of the first places would be another result"


def lengths(system, run) -> list[int]:
    seen: list[int] = []
    hooks = [b.register_forward_hook(lambda m, args, out: seen.append(args[0].shape[1])) for b in system.vision.body.blocks]
    run()
    for hook in hooks:
        hook.remove()
    return seen


def test_half_of_the_patches_in_training_and_all_of_them_after_it(system, batch):
    assert lengths(system, lambda: system.embed_masked(batch)) == [1 + 8] * 3
    assert lengths(system.eval(), lambda: system.encode_image(batch["image"])) == [17] * 3
    nothing = masking_of(torch.zeros(6, 16, dtype=torch.bool))
    torch.testing.assert_close(system.encode_part(batch["image"], nothing), system.encode_image(batch["image"]), atol=1e-6, rtol=1e-5)


def test_eva02_has_positions_swiglu_inner_norms_and_keys_without_bias(system):
    assert isinstance(system.vision.position, torch.nn.Parameter) and system.vision.position.shape == (1, 17, 48)
    for block in system.vision.body.blocks:
        assert isinstance(block.attn, SubNormAttention) and isinstance(block.mlp, SubNormGatedMLP)
        assert block.attn.k.bias is None and block.attn.q.bias is not None and block.attn.v.bias is not None and block.attn.out.bias is not None
        assert block.mlp.gate.weight.shape == (128, 48), "eight thirds of the width"
    assert system.image_head.bias is not None and system.text_head.bias is None


@torch.no_grad()
def test_the_gate_closes_and_norms_stand_where_they_should():
    mlp = SubNormGatedMLP.Config(width=12, hidden=20, bias="gate up down").build()
    x = torch.randn(3, 5, 12)
    mlp.norm_inner.weight.normal_()
    mlp.norm_inner.bias.normal_()
    want = mlp.down(F.layer_norm(F.silu(mlp.gate(x)) * mlp.up(x), (20,), mlp.norm_inner.weight, mlp.norm_inner.bias))
    torch.testing.assert_close(mlp(x), want)
    mlp.gate.weight.zero_()
    mlp.gate.bias.zero_()
    torch.testing.assert_close(mlp(x), mlp.down(mlp.norm_inner.bias).expand(3, 5, -1), msg="where the gate's input is 0 nothing passes")
    attn = SubNormAttention.Config(width=12, heads=3).build()
    attn.norm_inner.weight.normal_()
    heads = [f(x).unflatten(-1, (3, 4)).transpose(1, 2) for f in (attn.q, attn.k, attn.v)]
    mixed = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attn(x), attn.out(attn.norm_inner(mixed)), atol=1e-5, rtol=1e-4)


def test_the_plain_towers(batch):
    g, e = eva01(32, 8, 32, 2, 2, 56).build(), eva02_e(32, 8, 32, 2, 2, 56).build()
    assert all(type(b.attn) is Attention and b.attn.rope is None and b.attn.k.bias is None for t in (g, e) for b in t.body.blocks)
    assert all(isinstance(b, BranchNorm) for b in e.body.blocks) and not any(isinstance(b, BranchNorm) for b in g.body.blocks)
    block, x = e.body.blocks[0].eval(), torch.randn(2, 5, 32)
    with torch.no_grad():
        middle = x + block.norm1(block.attn(x))
        torch.testing.assert_close(block(x), middle + block.norm2(block.mlp(middle)))
        torch.testing.assert_close(e.eval().pooled(batch["image"]), e(batch["image"]).pooled, atol=1e-5, rtol=1e-4)
    shapes = {n: (c.width, c.depth, c.heads, c.block.mlp.hidden) for n in ("g_14", "e_14") for c in [preset_of("eva_clip", n).config.vision.body]}
    assert shapes == {"g_14": (1408, 40, 16, 6144), "e_14": (1792, 64, 16, 15_360)}
    assert preset_of("eva_clip", "g_14").config.vision.body.drop_path == 0.4


def test_it_stands_on_eva_and_clip_and_heads_and_temperature_begin_anew():
    for name, own in (("tiny", "tiny_mim"), ("paper", "mim_paper")):
        preset = preset_of("eva_clip", name)
        assert [(s.into, s.from_, s.take) for s in preset.starts] == [("vision", "eva_clip", "encoder"), ("text", "clip", "text")]
        assert preset.starts[0].preset == own
        lent = preset_of("eva_clip", own).config.encoder
        assert lent == preset.config.vision, "the tower is the very one that was taught"


def test_the_tower_is_taught_what_clip_sees_at_hidden_patches_alone(batch):
    torch.manual_seed(0)
    lent, tower = vit_pair(32, 8, body(32, 2, 2), body(32, 1, 2), 24), SMALL.vision
    preset = recipe.mim(32, tower, 6, 2, lent["vision"], lent["image_head"], 24, (), "scenes", recipe.tiny_mim().stages[0])
    system = preset.config.build()
    image = batch["image"]
    masking = system.masking(image)
    said, target = system.pairs(image, masking)
    tokens = system.target.tower(image).tokens[:, 1:]
    want = system.target.head(tokens)[masking.mask]
    torch.testing.assert_close(target, want)
    assert not target.requires_grad and said.shape == target.shape and 0.2 < masking.mask.float().mean() < 0.5
    naive = sum(1 - F.cosine_similarity(a, b, dim=0) for a, b in zip(said, target)) / len(said)
    torch.testing.assert_close(masked_cosine(said, target), naive, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(masked_cosine(3 * said, 0.1 * target), masked_cosine(said, target))
    with pytest.raises(UserError, match="same hidden patches"):
        masked_cosine(said[1:], target)
    before = {k: v.clone() for k, v in system.target.state_dict().items()}
    list(fit(system, preset.stages[0].but(steps=2, batch_size=6, precision="fp32"), [{"image": image}] * 2))
    assert all(torch.equal(v, before[k]) for k, v in system.target.state_dict().items()), "the teacher is frozen"
    wrong = recipe.FeatureTarget.Config(tower=eva01(32, 16, 16, 1, 2, 16), width=16).build()
    with pytest.raises(UserError, match="image size / patch"):
        wrong(image, masking)


def test_rates_of_the_three_groups_and_along_the_depth(system):
    of = recipe.optim(SMALL, 4e-4)
    scale = {n: g["scale"] for g in groups(system, of) for n in g["names"]}
    assert of.name == "lamb" and of.betas == (0.9, 0.98) and of.eps == 1e-6 and of.clip == 5.0
    assert of.lr * scale["log_scale"] == pytest.approx(5e-4) and of.lr * scale["image_head.weight"] == pytest.approx(4e-4)
    assert of.lr * scale["text_head.weight"] == pytest.approx(4e-5) and of.lr * scale["text.body.norm.weight"] == pytest.approx(4e-5)
    twin = {n: g["scale"] for rate, tower in ((0.85, "vision"), (0.75, "text"))
            for g in groups(system, Optim(lr=1.0, layer_decay=rate)) for n in g["names"] if n.startswith(f"{tower}.")}
    for name, value in twin.items():                                       # as the house's own layer-wise decay counts layers
        assert scale[name] == pytest.approx(value * (0.1 if name.startswith("text.") else 1.0)), name
    assert not any(fnmatch("vision.body.blocks.11.mlp.up.weight", p) for p, _ in recipe.falling("vision", 3, 0.85))


def test_a_step_of_lamb_is_as_long_as_the_weight_and_texts_move_ten_times_less(system, batch):
    optimizer = LAMB(groups(system, recipe.optim(SMALL, 1e-3)), lr=1e-3)
    before = {n: p.detach().clone() for n, p in system.named_parameters()}
    system.compare(system.embed_masked(batch))["contrast"].backward()
    for group in optimizer.param_groups:
        group["lr"] = 1e-3 * group["scale"]
    optimizer.step()
    moved = {n: float((p.detach() - before[n]).norm() / before[n].norm()) for n, p in system.named_parameters() if p.ndim > 1 and p.grad is not None}
    decay = {"vision.body.blocks.2.attn.q.weight": 1e-3 * 0.85, "text.body.blocks.1.attn.q.weight": 1e-4 * 0.75, "image_head.weight": 1e-3,
             "text_head.weight": 1e-4}
    for name, want in decay.items():
        assert moved[name] == pytest.approx(want, rel=1e-3), name


def test_recomputing_activations_does_not_change_the_mathematics(batch):
    losses = []
    for checkpoint in (False, True):
        torch.manual_seed(0)
        system = SMALL.build()
        stage = preset_of("eva_clip").stages[0].but(steps=3, batch_size=6, precision="fp32", checkpoint_activations=checkpoint,
                                                    optim=recipe.optim(SMALL, 1e-2, warmup=0))
        torch.manual_seed(1)
        losses.append([step.total for step in fit(system, stage, [batch] * 3)])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_patches_have_features_of_their_own(system, batch):
    with torch.no_grad():
        patches = system.eval().encode_patches(batch["image"])
    assert patches.shape == (6, 4, 4, 16)
    torch.testing.assert_close(patches.norm(dim=-1), torch.ones(6, 4, 4))


def test_another_size_is_read_with_interpolated_positions_and_places(system):
    with torch.no_grad():
        assert system.eval().encode_image(torch.randn(2, 3, 48, 64)).shape == (2, 16)
    with pytest.raises(UserError, match="multiple of four"):
        GridRotary.Config(width=6).build()
    with pytest.raises(UserError, match="places of a grid"):
        GridRotary.Config(width=8).build().turn(torch.arange(5))
