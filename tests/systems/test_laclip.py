"""LaCLIP's and K-LITE's objectives; what changes their texts is tested in tests/data/test_told.py and test_retold.py."""
import pytest
import torch
from fake import fake_batch

from polysense.base.catalogue import preset_of
from polysense.data.knowledge import Knowledge, Sense
from polysense.objectives.contrastive import apart, info_nce, multi_positive
from polysense.tasks.zero_shot import rows_of


@pytest.mark.parametrize("name, keys", [("laclip", ("image", "text")), ("klite", ("image", "text", "label"))])
def test_exactly_one_contrastive_loss(name, keys):
    preset = preset_of(name)
    torch.manual_seed(0)
    system, stage, batch = preset.config.build(), preset.stages[0], fake_batch(preset, keys, n=6)
    losses = stage.objective(system, stage.embed(system, batch))
    seen = system.embed(batch)
    want = info_nce(seen["image"], seen["text"], system.scale) if name == "laclip" else multi_positive(
        seen["image"], seen["text"], system.scale, apart(batch["label"]))
    assert list(losses) == ["contrast"]
    torch.testing.assert_close(losses["contrast"], want)


def test_without_rewrites_it_is_clip_bit_for_bit():
    ours, clip = preset_of("laclip"), preset_of("clip")
    a, b = [], []
    for preset, out in ((ours, a), (clip, b)):
        torch.manual_seed(3)
        system, stage = preset.config.build(), preset.stages[0]
        out.append(stage.objective(system, stage.embed(system, fake_batch(clip, ("image", "text")))).total())
        out.append(torch.autograd.grad(out[0], system.log_scale)[0])
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_without_knowledge_it_is_unicl_bit_for_bit():
    out = []
    for name in ("klite", "unicl"):
        torch.manual_seed(3)
        preset = preset_of(name).but(**{"config.text.length": 48})
        system, stage = preset.config.build(), preset.stages[0]
        out.append(stage.objective(system, stage.embed(system, fake_batch(preset_of("unicl"), ("image", "text", "label")))).total())
    assert torch.equal(*out)


class Subject:
    """Texts as bags of letters."""
    class System(torch.nn.Module):
        def encode_text(self, text):
            return text

    system = System()

    def read_texts(self, texts):
        return torch.nn.functional.normalize(torch.tensor([[t.count(c) + 0.1 for c in "abcdefgh"] for t in texts]), dim=-1)


def test_a_class_row_is_the_same_in_any_order_of_glosses_and_of_any_number():
    glosses = ["a bad cab", "a deaf bee", "a faded bead"]
    rows = rows_of(Subject(), [glosses, glosses[::-1], glosses[:1]])
    torch.testing.assert_close(rows[0], rows[1])
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(3))
    assert not torch.allclose(rows[0], rows[2])
    known = [Knowledge({"bee": [Sense(order[0], more=tuple(order[1:]))]}).prompts(["bee"], ["a {}."]) for order in (glosses, glosses[::-1])]
    assert len(known[0][0]) == 3 and known[0] != known[1]
    torch.testing.assert_close(rows_of(Subject(), known[0]), rows_of(Subject(), known[1]), msg="whatever the order in the dictionary")
    book = Knowledge.of({"bee": "a deaf bead"})
    assert book.prompts(["bee", "cab"], ["a {}."]) == [["a bee. ; bee , a deaf bead"], ["a cab."]]
