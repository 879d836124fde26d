"""VL-BEiT's essence: one stage, three masked losses, each on its own third of the batch, both sides of a pair hidden at once."""
import copy

import pytest
import torch
import torch.nn.functional as F

from polysense.base.catalogue import preset_of
from polysense.decoders.codes import CodeTarget
from polysense.decoders.vq_codec import small_codec
from polysense.decoders.vqkd import UnitCodec
from polysense.systems.selfsup import vl_beit
from polysense.towers.multiway import shared_multiway

SIZE = 32


@pytest.fixture()
def system():
    torch.manual_seed(0)
    target = CodeTarget.Config(codec=small_codec(), size=16, mean=vl_beit.MEAN, std=vl_beit.STD, codec_mean=vl_beit.HALF, codec_std=vl_beit.HALF)
    return vl_beit.config(shared_multiway(SIZE, 8, 32, 3, 2, 1, 60, 12, 0.5, 16), target, 6, 2, 4, (0, 1, 2)).build().eval()


@pytest.fixture()
def batch():
    g = torch.Generator().manual_seed(1)
    text = torch.randint(5, 60, (9, 10), generator=g)
    text[:, 0], text[:, 9] = 1, 2
    return {"image": torch.randn(9, 3, SIZE, SIZE, generator=g), "text": text}


def losses(system, batch):
    torch.manual_seed(6)
    return system.losses(batch)


def test_the_only_stage_of_pretraining_has_three_masked_losses_that_are_added(system, batch):
    stage = vl_beit.paper().stages
    assert len(stage) == 1 and stage[0].weights == () and stage[0].batch_size == 6144
    made = losses(system, batch)
    assert set(made) == {"text", "image", "pair"}, "nothing is contrasted or matched"
    torch.testing.assert_close(made.total(), made["text"] + made["image"] + made["pair"])


@torch.no_grad()
def test_each_loss_reads_its_own_third(system, batch):
    whole = losses(system, batch)
    other = {"image": torch.randn_like(batch["image"]), "text": batch["text"].flip(1).clone()}
    other["text"][:, 0], other["text"][:, 9] = 1, 2
    third = torch.arange(9) % 3                                          # pairs, pictures, texts
    for role, key, moved in ((0, "image", "pair"), (0, "text", "pair"), (1, "image", "image"), (1, "text", None), (2, "text", "text"),
                             (2, "image", None)):
        mixed = {k: torch.where((third == role).view(-1, *[1] * (v.ndim - 1)), other[k], v) if k == key else v for k, v in batch.items()}
        changed = {k for k, v in losses(system, mixed).items() if not torch.equal(v, whole[k])}
        assert changed == ({moved} if moved else set()), (role, key, changed)
    roles = {**batch, "has": torch.tensor([2, 2, 2, 0, 0, 0, 1, 1, 1])}
    order = torch.tensor([3, 6, 0, 4, 7, 1, 5, 8, 2])                    # as the data say, wherever the rows stand
    told, plain = losses(system, roles), losses(system, {k: v[order] for k, v in batch.items()})
    assert all(torch.equal(told[k], plain[k]) for k in told)
    alone = losses(system, {**batch, "has": torch.ones(9, dtype=torch.long)})
    assert set(alone) == {"image"}


def test_sequences_of_three_kinds(system, batch, monkeypatch):
    seen = []
    forward = type(system.net).forward

    def spy(net, image=None, text=None, **more):
        seen.append((None if image is None else len(image), None if text is None else len(text), "fill" in more))
        return forward(net, image, text, **more)

    monkeypatch.setattr(type(system.net), "forward", spy)
    losses(system, batch)
    assert sorted(seen, key=str) == sorted([(3, None, True), (None, 3, False), (3, 3, True)], key=str), "only pairs hold both"


@torch.no_grad()
def test_what_is_hidden_of_a_pair_never_reaches_the_network(system, batch, monkeypatch):
    image, text = batch["image"][:3], batch["text"][:3]
    torch.manual_seed(2)
    masking, (hidden, chosen) = system.masking(image), system.hide_pair(text)
    assert bool(masking.mask.any(1).all()) and bool(chosen.any()) and bool((hidden[chosen] == 4).all())
    monkeypatch.setattr(type(system), "masking", lambda self, image: masking)
    fed = []
    forward = type(system.net).forward
    monkeypatch.setattr(type(system.net), "forward", lambda net, *a, **k: fed.append(forward(net, *a, **k)) or fed[-1])
    monkeypatch.setattr(type(system.hide_pair), "forward", lambda self, t: (t.masked_fill(chosen, 4), chosen))
    system.pair_losses(image, text, system.hide_pair)
    behind = masking.mask.view(3, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    system.pair_losses(torch.where(behind, torch.randn_like(image), image), torch.where(chosen, 33, text), system.hide_pair)
    for a, b in zip(*fed, strict=True):
        torch.testing.assert_close(a, b)
    system.pair_losses(torch.where(behind, image, torch.randn_like(image)), text, system.hide_pair)
    assert not torch.allclose(fed[-1].text, fed[0].text, atol=1e-4), "words are guessed from the picture too"


def test_shares_of_what_is_hidden(system):
    text = torch.randint(5, 60, (600, 12))
    text[:, 0], text[:, 11] = 1, 2
    for mask, share in ((system.hide_text, 0.15), (system.hide_pair, 0.5)):
        hidden, chosen = mask(text)
        assert abs(float(chosen[:, 1:11].float().mean()) - share) < 0.02 and not bool(chosen[:, [0, 11]].any())
        assert bool((hidden[chosen] == 4).all()) and torch.equal(hidden[~chosen], text[~chosen])
    sampler = vl_beit.paper().config.sampler.build()
    assert abs(float(sampler(60, (14, 14)).mask.float().mean()) - 0.4) < 0.03


def test_all_three_losses_pass_the_shared_attention_and_only_their_experts(system, batch):
    system.train()
    experts = {"text": {"text"}, "image": {"image"}, "pair": {"image", "text", "pair"}}
    for name, want in experts.items():
        system.zero_grad(set_to_none=True)
        losses(system, batch)[name].backward()
        assert all(b.attn.q.weight.grad is not None for b in system.net.body.blocks)
        got = {e for b in system.net.body.blocks for e in b.names if getattr(b, e).mlp.up.weight.grad is not None}
        assert got == want, name
        assert all(p.grad is None for p in system.target.parameters())


@torch.no_grad()
def test_pictures_do_not_meet_the_language_experts(system, batch):
    other = copy.deepcopy(system)
    for n, p in other.named_parameters():
        if ".text." in n or ".pair." in n:
            p.add_(1.0)
    assert torch.equal(other.encode_image(batch["image"]), system.encode_image(batch["image"]))


@torch.no_grad()
def test_codes_are_those_of_the_whole_picture(system, batch):
    masking = system.masking(batch["image"])
    ids = system.target.ids(batch["image"]).flatten(1)
    tokens = system.net(batch["image"], fill=system.fill(masking)).image
    want = F.cross_entropy(system.codes.head(tokens[:, 1:][masking.mask]), ids[masking.mask])
    torch.testing.assert_close(system.code_loss(tokens, batch["image"], masking), want)


def test_the_tokenizer_is_a_choice():
    plain, other = preset_of("vl_beit"), preset_of("vl_beit", "tiny_vqkd")
    assert vl_beit.VLBEiT.choices["tokenizer"]["vqkd"](plain) == other and vl_beit.VLBEiT.choices["tokenizer"]["vq"](plain) == plain
    assert isinstance(other.config.target.codec, UnitCodec.Config) and other.starts[0].from_ == "beit_v2"
    system = other.config.build()
    assert set(system.losses({"image": torch.randn(3, 3, 64, 64), "text": torch.randint(5, 60, (3, 7))})) == {"text", "image", "pair"}


def test_the_stages_behind_make_the_single_passes_and_answers_useful(system, batch):
    names = [s.name for s in preset_of("vl_beit").stages]
    assert names == ["masked", "retrieval", "reply"]
    seen = system.embed(batch)
    logits = system.scale * seen["image"] @ seen["text"].T
    want = (F.cross_entropy(logits, torch.arange(9)) + F.cross_entropy(logits.T, torch.arange(9))) / 2
    torch.testing.assert_close(system.compare(seen)["contrast"], want)
