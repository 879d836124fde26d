"""Rewrites the golden files (all, or those of the ids given) on purpose: `make golden`. Review their diff as you would review code."""
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from fake import fake_batch

import polysense
from polysense.base.agent import Agent
from polysense.base.catalogue import preset_of

HERE = Path(__file__).parent


def golden(name: str) -> dict[str, list[str]]:
    """Sections of one golden file: every preset's lines, tiny's parameters, its first five losses on random batches."""
    card = polysense.catalogue()[name]
    sections = {f"preset {p}": list(preset_of(name, p).lines()) for p in card.presets}
    preset = preset_of(name)
    torch.manual_seed(0)
    system = preset.config.build()
    if isinstance(system, Agent):                          # no weights, no losses: the steps it takes
        system.ask("What is 12.50 + 7.25?", [])
        return sections | {"steps of tiny": [json.dumps(e.to_json()) for e in system.log]}
    sections["parameters of tiny"] = [f"{k} {list(v.shape)}" for k, v in system.state_dict().items()]
    for stage in preset.stages:
        system.choose_trainable(stage.trainable)
        system.train()
        optimizer = torch.optim.SGD([p for p in system.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for step in range(5):
            torch.manual_seed(step)
            batch = fake_batch(preset, card.needs, seed=step)
            loss = stage.objective(system, stage.embed(system, batch) if stage.embed else batch).total(stage.weights)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(f"{float(loss.detach()):.5f}")
        sections[f"losses of tiny.{stage.name}"] = losses
    return sections


def write(name: str) -> None:
    text = "\n".join(f"# {title}\n" + "\n".join(lines) + "\n" for title, lines in golden(name).items())
    (HERE / f"{name}.txt").write_text(text, encoding="utf-8")


def read(name: str) -> dict[str, list[str]]:
    out: dict[str, list[str]] = {}
    for line in (HERE / f"{name}.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            out[line[2:]] = []
        elif line:
            out[list(out)[-1]].append(line)
    return out


if __name__ == "__main__":
    torch.set_num_threads(1)
    for path in HERE.glob("*.txt"):
        if path.stem not in polysense.catalogue():
            path.unlink()
    for each in sys.argv[1:] or polysense.catalogue():
        write(each)
        print(each)
