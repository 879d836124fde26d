"""Every recipe's tiny preset passes its preflight, as its training begins, and within about a second on a quiet core."""
import time

import pytest
import torch
from fake import fake_batch

import polysense
from polysense.base.agent import Agent
from polysense.base.catalogue import preset_of
from polysense.train.preflight import preflight

CARDS = polysense.catalogue()
CPU_SECONDS = 8.0                            # of this process: machines differ, and an overfit check may have to try twice


@pytest.mark.parametrize("name", CARDS)
def test_a_sound_recipe_passes(name: str):
    torch.manual_seed(0)
    card, preset = CARDS[name], preset_of(name)
    system = preset.config.build()
    if isinstance(system, Agent) or not preset.stages:
        pytest.skip("trains nothing")
    with torch.no_grad():                    # what its Starts lend is no longer as at birth
        for start in preset.starts:
            for p in (p for n, p in system.named_parameters() if not start.into or n == start.into or n.startswith(f"{start.into}.")):
                p.add_(torch.randn_like(p) * 0.02)
    if preset.starts:
        system.after_start()
    batches = [fake_batch(preset, card.needs, n=8, seed=i) for i in range(4)]
    begun = time.process_time()
    said = preflight(system, [(s, batches) for s in preset.stages], card.needs)
    spent = time.process_time() - begun
    print(f"{name}: {said}, {spent:.2f} s of processor")
    assert spent < CPU_SECONDS * len(preset.stages), said


def doubts(name: str, change, **overrides) -> list[str]:
    torch.manual_seed(0)
    preset = preset_of(name)
    system = preset.but(**overrides).config.build()
    change(system)
    return list(system.doubts(fake_batch(preset, CARDS[name].needs, n=4)))


def test_a_text_tower_that_pools_the_first_token_is_found():
    assert doubts("clip", lambda s: None) == []
    found = doubts("clip", lambda s: None, **{"config.text.end": 4000})
    assert len(found) == 1 and "every text of a batch has the same feature" in found[0]


@pytest.mark.parametrize("name", ["mae", "beit", "videomae"])
def test_a_mask_the_wrong_way_round_is_found(name):
    def turned(system):
        real = system.see

        def see(pixels, masking):
            from polysense.nn.masking import masking_of

            return real(pixels, masking_of(~masking.mask))
        system.see = see

    assert doubts(name, lambda s: None) == []
    assert "wrong way round" in doubts(name, turned)[0]
