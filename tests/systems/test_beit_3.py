"""BEiT-3's essence: one objective, two forms, experts that do not meet, captions that see what stands before, a head for each task."""
import copy

import pytest
import torch
import torch.nn.functional as F
from fake import fake_batch

from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.base.system import After
from polysense.decoders.answers import KnownAnswers
from polysense.decoders.codes import CodeTarget
from polysense.decoders.vq_codec import small_codec
from polysense.decoders.vqkd import UnitCodec
from polysense.nn.block import PreNorm
from polysense.nn.head import NormLinear, NormMLP, NormTanh
from polysense.nn.multiway import Route
from polysense.nn.transformer import Transformer
from polysense.systems.selfsup import beit_3
from polysense.towers.multiway import apart_sees, prefix_sees, together

SIZE, WIDE = 32, 32
FORMS = {"shared": beit_3.shared(SIZE, 8, WIDE, 3, 2, 1, 60, 12), "decoupled": beit_3.decoupled(SIZE, 8, WIDE, 3, 2, 60, 12)}


def build(form, **heads):
    torch.manual_seed(0)
    target = CodeTarget.Config(codec=small_codec(), size=16, mean=beit_3.MEAN, std=beit_3.STD, codec_mean=beit_3.HALF, codec_std=beit_3.HALF)
    made = beit_3.config(FORMS[form], target, 6, 2, 4, (0, 1, 2)).but(**heads).build().eval()
    with torch.no_grad():
        for n, p in made.named_parameters():
            if "net." in n:
                p.add_(torch.randn_like(p) * 0.05)
    return made


@pytest.fixture(params=list(FORMS))
def system(request):
    return build(request.param)


@pytest.fixture()
def batch():
    g = torch.Generator().manual_seed(1)
    text = torch.randint(5, 60, (4, 8), generator=g)
    text[:, 0], text[:, 7], text[1, 5], text[1, 6:] = 1, 2, 2, 0
    return {"image": torch.randn(4, 3, SIZE, SIZE, generator=g), "text": text}


def shaken(system, part):
    other = copy.deepcopy(system)
    with torch.no_grad():
        for n, p in other.named_parameters():
            if part in n and n.startswith("net."):
                p.add_(torch.randn_like(p))
    return other


@torch.no_grad()
def test_each_modality_has_its_own_half_and_a_pair_reads_both(system, batch):
    image, text = batch["image"], batch["text"]
    assert torch.equal(shaken(system, ".text.").net(image).image, system.net(image).image)
    assert torch.equal(shaken(system, ".image.").net(text=text).text, system.net(text=text).text)
    for part in (".text.", ".image."):
        other, mine = shaken(system, part).net(image, text), system.net(image, text)
        assert not torch.allclose(other.image, mine.image, atol=1e-3) and not torch.allclose(other.text[:, 0], mine.text[:, 0], atol=1e-3)


@torch.no_grad()
def test_without_looks_across_a_pair_is_two_passes(batch):
    image, text = batch["image"], batch["text"]
    system = build("decoupled")
    seen = system.net(image, text, sees=apart_sees(17, 8))
    real = text != 0
    torch.testing.assert_close(seen.image, system.net(image).image, rtol=0, atol=1e-5)
    torch.testing.assert_close(seen.text[real], system.net(text=text).text[real], rtol=0, atol=1e-5)
    net = build("shared").net                                            # below its experts for pairs
    x, mask, i = net.embed(image, text)
    below = net.body.layers(x, Route(i, 8, True), together(mask, apart_sees(i, 8)), stop=2)[-1]
    torch.testing.assert_close(below[:, :i], net.body.layers(net.embed(image)[0], Route(i, 0, False), stop=2)[-1], rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_with_equal_halves_it_is_a_plain_transformer_over_both(form, batch):
    """Shared form without an expert for pairs, or decoupled form: the text's half a copy of the picture's."""
    config = FORMS[form].but(**({"body.fused": 0} if form == "shared" else {}))
    net = config.build().eval()
    state = {k: v + torch.randn_like(v) * 0.05 for k, v in net.state_dict().items()}
    halves = {k: state[k.replace(".text.", ".image.")] if ".text." in k and ".blocks." in k else v for k, v in state.items()}
    halves |= {k: halves[k.replace("norm.text", "norm.image")] for k in halves if "body.norm.text" in k}
    net.load_state_dict(halves)
    body = config.body
    block = PreNorm.Config(attn=body.block.attn, mlp=body.block.mlp, norm=body.block.norm)
    plain = Transformer.Config(width=WIDE, depth=3, heads=2, norm=body.norm, block=block).build().eval()
    mine = {}
    for k, v in halves.items():
        if k.startswith("body.") and ".text." not in k:
            for old, new in (("body.", ""), (".image.norm.", ".norm2."), ("norm.image", "norm"), (".image.", ".")):
                k = k.replace(old, new)
            mine[k] = v
    plain.load_state_dict(mine)
    image, text = batch["image"][:1], batch["text"][:1]
    x = net.embed(image, text)[0]
    want, seen = plain(x), net(image, text)
    torch.testing.assert_close(torch.cat([seen.image, seen.text], 1), want, rtol=0, atol=1e-5)


@torch.no_grad()
def test_captions_see_the_picture_and_what_stands_before(system, batch):
    image, text = batch["image"], batch["text"]
    sees = prefix_sees(17, 8)
    assert bool(sees[:17, :17].all()) and not bool(sees[:17, 17:].any()) and bool(sees[17:, :17].all()) and torch.equal(
        sees[17:, 17:], torch.ones(8, 8, dtype=torch.bool).tril())
    whole = system.net(image, text, sees=sees)
    for place in (3, 4):
        other = text.clone()
        other[:, place] = 33
        changed = system.net(image, other, sees=sees)
        torch.testing.assert_close(changed.image, whole.image, rtol=0, atol=1e-6)
        torch.testing.assert_close(changed.text[:, :place], whole.text[:, :place], rtol=0, atol=1e-6)
        assert not torch.allclose(changed.text[0, place + 1:], whole.text[0, place + 1:], atol=1e-4)


def test_captions_are_written_by_appending_a_mask(system, batch):
    image = batch["image"]
    said = system.generate_text(image, torch.tensor([[1, 9, 2], [1, 2, 0], [1, 9, 2], [1, 8, 7]]), max_new=4)
    for row, words in enumerate(([1, 9], [1], [1, 9], [1, 8, 7])):
        text = torch.tensor([words])
        for word in said[row].tolist():
            asked = torch.cat([text, torch.tensor([[4]])], 1)
            with torch.no_grad():
                best = system.word_logits(system.net(image[row:row + 1], asked, sees=prefix_sees(17, asked.shape[1])).text[:, -1]).argmax()
            assert int(best) == word
            text = torch.cat([text, torch.tensor([[word]])], 1)
            if word == 2:
                break
    with pytest.raises(UserError, match="at most 12"):
        system.generate_text(image[:1], torch.arange(5, 18)[None], max_new=2)


def test_captions_are_learned_as_hidden_words_ends_included(batch):
    system = build("shared")
    hidden, chosen = system.hide_caption(batch["text"].repeat(200, 1))
    assert not bool(chosen[:, 0].any()) and abs(float(chosen[::4][:, 1:].float().mean()) - 0.6) < 0.05 and bool(chosen[:, 7].any())
    assert bool((hidden[chosen] == 4).all())
    optimizer = torch.optim.Adam([p for n, p in system.named_parameters() if not n.startswith("target")], lr=3e-3)
    torch.manual_seed(0)
    for _ in range(90):
        loss = system.caption(batch)["caption"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    said = system.eval().generate_text(batch["image"], torch.tensor([[1, 2]] * 4), max_new=8)
    right = [row[:row.index(2) + 1] if 2 in row else row for row in said.tolist()] == [t[1:].tolist()[:t.tolist().index(2)] for t in batch["text"]]
    assert right, said


def test_one_objective_on_thirds_of_the_batch(system, batch):
    stage = preset_of("beit_3", "paper").stages
    assert len(stage) == 1 and stage[0].batch_size == 6144 and stage[0].weights == ()
    losses = system.losses(batch)
    assert set(losses) == {"text", "image", "pair"} and all(float(v.detach()) > 0 for k, v in losses.items() if k != "text")
    for mask, share in ((system.hide_text, 0.15), (system.hide_pair, 0.5)):
        chosen = mask(torch.randint(5, 60, (500, 10)))[1]
        assert abs(float(chosen.float().mean()) - share) < 0.03
    assert isinstance(preset_of("beit_3").config.target.codec, UnitCodec.Config), "codes are those of BEiT v2's tokenizer"
    assert abs(preset_of("beit_3", "paper").config.sampler.hidden / 256 - 0.39) < 0.02


def test_forms_and_births():
    giant = preset_of("beit_3", "paper").config.net.body
    with torch.device("meta"):
        body = giant.build()
    kinds = [b.names for b in body.blocks]
    assert kinds == [("image", "text")] * 37 + [("image", "text", "pair")] * 3
    counts = [sum(p.numel() for b in body.blocks if hasattr(b, n) for p in getattr(b, n).mlp.parameters()) for n in ("image", "text", "pair")]
    assert [round(n / 1e6) for n in counts] == [692, 692, 52]
    assert round(sum(p.numel() for b in body.blocks for p in b.attn.parameters()) / 1e6) == 317
    torch.manual_seed(0)
    shared, apart = (FORMS[f].but(**{"body.width": 128}).build() for f in FORMS)
    stds = [float((b.image.mlp.down.weight.std() / b.image.mlp.up.weight.std()).detach()) for b in shared.body.blocks]
    for layer, std in enumerate(stds, 1):
        assert abs(std - (2 * layer) ** -0.5) < 0.03
    block, gain = apart.body.blocks[0], float(torch.log(torch.tensor(6.0)).sqrt())
    for half in (block.image, block.text):
        for m, want in ((half.attn.q, 1), (half.attn.v, gain), (half.attn.out, gain), (half.mlp.up, gain), (half.mlp.down, gain)):
            assert abs(float(m.weight.detach().std()) / (0.02 * 0.88) - want) < 0.1 * want
    assert not torch.equal(block.image.attn.q.weight, block.text.attn.q.weight)


def test_heads_of_all_tasks(system, batch):
    form = "decoupled" if system.net.body.norm.__class__.__name__ == "ModuleDict" else "shared"
    made = build(form, pooler=NormTanh.Config(into=WIDE), answer=KnownAnswers.Config(room=4, length=4), label=NormLinear.Config(into=WIDE, out=5),
                 reasoner=NormMLP.Config(into=4 * WIDE, hidden=2 * WIDE, out=2))
    image, text = batch["image"], batch["text"]
    with torch.no_grad():
        mean = made.net(image).image[:, 1:].mean(1)
        torch.testing.assert_close(made.classify(image), made.label.out(made.label.norm(mean)))
        first = made.net(image, text).image[:, 0]
        torch.testing.assert_close(made.asked(image, text), torch.tanh(made.pooler.pre(made.pooler.norm(first))))
        two = torch.stack([image, image.flip(0)], 1)
        a, b = made.net(image, text), made.net(image.flip(0), text)
        want = made.reasoner(torch.cat([a.image[:, 0], a.text[:, 0], b.image[:, 0], b.text[:, 0]], -1))
        torch.testing.assert_close(made.reason(two, text), want)
        assert float(made.scale) == pytest.approx(1 / 0.07, rel=1e-4)
        torch.testing.assert_close(made.encode_image(image), F.normalize(made.image_head(made.net(image).image[:, 0]), dim=-1))
    losses = made.reply({**batch, "question": text, "answer": torch.tensor([[1, 9, 2]] * 4)})
    made.after_step(After(1, 0.1, torch.optim.SGD(made.parameters(), 0.1), losses.keep))
    assert made.generate_text(image, text, max_new=5).tolist() == [[9, 2, 0, 0]] * 4, "a question gets an answer"
    assert made.generate_text(image, torch.tensor([[1, 2]] * 4), max_new=2).shape == (4, 2), "no question, a caption"
    for ask in (lambda: system.classify(image), lambda: system.reason(two, text), lambda: system.asked(image, text)):
        with pytest.raises(UserError, match="no head for"):
            ask()


@pytest.mark.parametrize("name", ["tiny_decoupled", "vqa", "finetune"])
def test_other_presets_train_what_they_say(name):
    preset = preset_of("beit_3", name)
    system = preset.config.build()
    for stage in preset.stages:
        system.choose_trainable(stage.trainable)
        system.train()
        batch = fake_batch(preset, ("image", "text", "question", "answer", "label"))
        losses = stage.objective(system, stage.embed(system, batch) if stage.embed else batch)
        losses.total().backward()
        chosen = {n for n, p in system.named_parameters() if p.requires_grad}
        assert chosen == {n for n, p in system.named_parameters() if p.grad is not None}
        system.zero_grad(set_to_none=True)
