"""CLIP's essence (Radford et al. 2021): each test fails if its mechanism is replaced by a shortcut."""
from math import log

import pytest
import torch
import torch.nn.functional as F
from fake import fake_batch

import polysense
from polysense.base.catalogue import preset_of
from polysense.base.system import After
from polysense.nn.head import Linear, Nothing
from polysense.towers.clip_resnet import ClipResNet

recipe = polysense.load("clip")


@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(0)
    return preset_of("clip", "tiny_vit").config.build()


@pytest.fixture(scope="module")
def batch():
    return fake_batch(preset_of("clip"), ("image", "text"), n=6)


def test_loss_is_both_cross_entropies_halved_over_scaled_cosines(clip, batch):
    seen = clip.embed(batch)
    logits = clip.log_scale.exp() * seen["image"] @ seen["text"].T
    want = (F.cross_entropy(logits, torch.arange(6)) + F.cross_entropy(logits.T, torch.arange(6))) / 2
    torch.testing.assert_close(clip.compare(seen)["contrast"], want)


def test_loss_is_invariant_to_a_joint_permutation_and_symmetric_in_the_towers(clip, batch):
    seen, order = {k: v.detach() for k, v in clip.embed(batch).items()}, torch.randperm(6)
    loss = clip.compare(seen)["contrast"]
    torch.testing.assert_close(clip.compare({k: v[order] for k, v in seen.items()})["contrast"], loss)
    torch.testing.assert_close(clip.compare({"image": seen["text"], "text": seen["image"]})["contrast"], loss)
    assert not torch.isclose(clip.compare({"image": seen["image"], "text": seen["text"].roll(1, 0)})["contrast"], loss), "pairs are the targets"


def test_loss_of_a_collapsed_batch_is_log_n(clip):
    same = F.normalize(torch.randn(1, 32), dim=-1).expand(7, -1)
    assert clip.compare({"image": same, "text": same})["contrast"].item() == pytest.approx(log(7), abs=1e-5)


def test_temperature_starts_at_one_over_007_is_learned_and_never_exceeds_100(batch):
    clip = preset_of("clip").config.build()
    assert clip.scale.item() == pytest.approx(1 / 0.07, rel=1e-5)
    loss = clip.compare(clip.embed(batch))["contrast"]
    loss.backward()
    assert clip.log_scale.grad.abs() > 0
    with torch.no_grad():
        clip.log_scale.fill_(9.0)
    assert clip.scale.item() <= 100.001
    clip.after_step(After(step=1, progress=0.1, optimizer=torch.optim.SGD(clip.parameters(), lr=0.1), keep={}))
    assert clip.log_scale.item() == pytest.approx(log(100)), "the stored value comes back to the bound, where it still gets a gradient"
    clip.log_scale.grad = None
    clip.scale.backward()
    assert clip.log_scale.grad.item() == pytest.approx(100, rel=1e-4)


def test_heads_are_linear_without_bias_and_features_unit_norm(clip):
    assert clip.image_head.bias is None and clip.text_head.bias is None
    image = torch.randn(2, 3, 64, 64)
    want = F.normalize(clip.vision(image).pooled @ clip.image_head.weight.T, dim=-1)
    torch.testing.assert_close(clip.encode_image(image), want)


def test_text_is_read_causally_up_to_its_end_and_padding_changes_nothing(clip):
    clip.eval()
    text = torch.tensor([[1, 9, 8, 7, 2, 2, 2], [1, 9, 8, 7, 2, 0, 0], [1, 9, 8, 7, 2, 55, 66]])
    with torch.inference_mode():
        a = clip.encode_text(text)
        torch.testing.assert_close(a[0], a[1])
        torch.testing.assert_close(a[0], a[2])
        torch.testing.assert_close(clip.encode_text(text[:1, :5])[0], a[0], msg="a trimmed batch gives the same feature")
        other = clip.encode_text(torch.tensor([[1, 9, 8, 6, 2]]))
        assert not torch.allclose(other[0], a[0], atol=1e-3), "the feature at the end sees every word"
        tokens = clip.text(text[:1]).tokens, clip.text(torch.tensor([[1, 9, 8, 3, 2, 2, 2]])).tokens
        torch.testing.assert_close(tokens[0][:, :3], tokens[1][:, :3], msg="no token sees a later one")


def test_end_token_is_found_by_id_or_as_openai_by_being_the_largest():
    by_id = preset_of("clip").config.text.build()
    by_size = preset_of("clip").config.text.but(end=None).build()
    text = torch.tensor([[1, 900, 2, 0], [1, 5, 6, 2]])
    assert by_id.last(text).tolist() == [2, 3] and by_size.last(text).tolist() == [1, 2]


def test_vit_tower_normalises_before_the_blocks_and_its_patches_have_no_bias(clip):
    names = dict(clip.vision.named_parameters())
    assert "norm_pre.weight" in names and not any(n.startswith("patch") and n.endswith("bias") for n in names)
    assert clip.text.body.blocks[0].mlp.act is not torch.nn.functional.gelu
    x = torch.randn(4, 192)
    torch.testing.assert_close(clip.vision.body.blocks[0].mlp.act(x), x * torch.sigmoid(1.702 * x))


def test_activation_is_a_flag():
    exact = recipe.body(32, 1, 2, act="gelu").build()
    torch.testing.assert_close(exact.blocks[0].mlp.act(torch.ones(3)), F.gelu(torch.ones(3)))


def test_resnet_tower_projects_by_attention_pooling_of_the_mean_token():
    tower = ClipResNet.Config(image_size=64, layers=(1, 1, 1, 1), base=8, heads=4, dim=24)
    config = recipe.tiny().config.but(vision=tower, image_head=Nothing.Config(), text_head=Linear.Config(into=192, out=24))
    clip = config.build().eval()
    image = torch.randn(2, 3, 64, 64)
    assert clip.encode_image(image).shape == (2, 24) and clip.encode_patches(image).shape == (2, 2, 2, 24)
    image_map = clip.vision.features(image)[-1].flatten(2).transpose(1, 2)
    tokens = torch.cat([image_map.mean(1, keepdim=True), image_map], 1) + clip.vision.pool.position
    pool = clip.vision.pool
    q, k, v = (f(t).unflatten(-1, (4, -1)).transpose(1, 2) for f, t in ((pool.q, tokens[:, :1]), (pool.k, tokens), (pool.v, tokens)))
    pooled = pool.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))[:, 0]
    torch.testing.assert_close(clip.encode_image(image), F.normalize(pooled, dim=-1), rtol=1e-4, atol=1e-5)
    assert all(block.norm3.weight.abs().sum() == 0 for stage in clip.vision.stages for block in stage), "the last gamma of a block starts at zero"


@pytest.mark.parametrize("name, count", [("paper", 427_616_513), ("vit_b_32", 151_277_313), ("vit_b_16", 149_620_737), ("rn50", 102_007_137),
                                         ("rn50x64", 623_258_305)])
def test_presets_have_the_published_number_of_parameters(name, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in getattr(recipe, name)().config.build().parameters()) == count


def test_rates_are_those_of_the_papers_tables():
    rates = {"vit_b_32": 5e-4, "vit_b_16": 5e-4, "paper": 4e-4, "paper_336": 2e-5, "rn50": 5e-4, "rn50x64": 3.6e-4}
    for name, lr in rates.items():
        optim = preset_of("clip", name).stages[0].optim
        assert (optim.lr, optim.betas[1], optim.eps) == (lr, *((0.999, 1e-8) if name.startswith("rn") else (0.98, 1e-6))), name


def test_gradient_caching_changes_nothing(batch):
    """Encoding in chunks and back-propagating each chunk gives the gradients of the whole batch."""
    from polysense.train.fit import fit
    stage = recipe.tiny_vit().stages[0].but(steps=2, batch_size=6, precision="fp32")
    states = []
    for chunk in (None, 2):
        torch.manual_seed(0)
        clip = preset_of("clip", "tiny_vit").config.build()
        list(fit(clip, stage.but(chunk=chunk), [batch, batch]))
        states.append(clip.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-4, atol=2e-5, msg=name)
