"""Writes the generated pages of the site: docs/commands/*.md from the command line itself, docs/catalogue.md and
docs/systems/*.md from the cards, the recipes' own words and the filed proofs."""
from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path
from shlex import quote
from typing import Any

import typer

from polysense.base.catalogue import catalogue

DOCS = Path(__file__).resolve().parents[1] / "docs"
MARK = "<!-- written by scripts/gen_docs.py (make docs): edit the source, not this page -->\n"


def main() -> int:
    pages = command_pages() | {"catalogue.md": catalogue_page(), "speed.md": speed_page(), "comparisons.md": comparisons_page()} | system_pages()
    for folder in ("commands", "systems"):
        (DOCS / folder).mkdir(exist_ok=True)
        for old in (DOCS / folder).glob("*.md"):
            if f"{folder}/{old.name}" not in pages:
                old.unlink()
    for name, text in pages.items():
        path = DOCS / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(f"wrote docs/{name}")
    return 0


# -- commands -----------------------------------------------------------------------------------------------------------------------------

def command_pages() -> dict[str, str]:
    """Page by path: one a command, and an index that lists them by panel."""
    from polysense.cli import app

    top: Any = typer.main.get_command(app)
    pages, panels = {}, dict[str, list[str]]()
    for name, command in top.commands.items():
        inner = getattr(command, "commands", None)
        if inner:
            body = f"# polysense {name}\n\n{command.help}\n\n" + "".join(section(f"polysense {name} {sub}", c, "##") for sub, c in inner.items())
        else:
            body = section(f"polysense {name}", command, "#")
        pages[f"commands/polysense-{name}.md"] = MARK + "\n" + body
        panels.setdefault(str(command.rich_help_panel), []).append(f"| [`{name}`](polysense-{name}.md) | {summary(command)} |")
    tables = "\n\n".join(f"## {panel}\n\n| command | what it does |\n|---|---|\n" + "\n".join(rows) for panel, rows in panels.items())
    pages["commands/index.md"] = f"""{MARK}
# Commands

{tables}

## Behind every command

`--help` explains it with examples. `--json`, where there is one, prints the answer for programs; progress and notes go to the standard error
stream, so the answer can be piped. `--debug` shows the traceback of an error.

| exit status | meaning |
|---|---|
| 0 | done |
| 1 | a mistake of polysense itself: please report it with the output of `--debug` |
| 2 | something that you can mend; one line says what and how |
| 130 | interrupted; where work can be gone on with, one line says how |
"""
    return pages


def summary(command: Any) -> str:
    return " ".join((command.help or "").split("\n\n")[0].split()).partition(". ")[0].rstrip(".") + "."


def section(title: str, command: Any, level: str) -> str:
    """Usage, description, examples and parameters of one command."""
    prose, _, examples = (command.help or "").replace("\b\n", "").partition("Examples\n")
    usage = " ".join(piece(p) for p in command.params if p.name != "help")
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and p.name != "help"]
    out = [f"{level} {title}\n", prose.strip() + "\n", f"```text\n{title} {usage}\n```\n"]
    if examples.strip():
        lines = [line.strip() for line in examples.strip().splitlines()]
        out.append("```bash\n" + "\n".join(comment(line) for line in lines) + "\n```\n")
    for what, params in (("argument", arguments), ("option", options)):
        if params:
            rows = "\n".join(f"| {name_of(p)} | {cell(p.help)}{default(p)} |" for p in params)
            out.append(f"| {what} | |\n|---|---|\n{rows}\n")
    return "\n".join(out) + "\n"


def piece(p: Any) -> str:
    if p.param_type_name == "argument":
        word = p.metavar or p.name.upper()
        return word if p.required or word.startswith("[") else f"[{word}]"
    word = p.opts[-1] if p.is_flag else f"{p.opts[-1]} {p.metavar or 'VALUE'}"
    return word if p.required else f"[{word}]"


def name_of(p: Any) -> str:
    words = p.metavar or p.name.upper() if p.param_type_name == "argument" else ", ".join(p.opts)
    return f"`{cell(words)}`"


def default(p: Any) -> str:
    value = p.default() if callable(p.default) else p.default
    shown = value not in (None, False, (), []) and not p.required and "[default" not in (p.help or "") and isinstance(value, (int, float, str, Path))
    return f" Default: `{value}`." if shown else ""


def cell(text: str | None) -> str:
    return re.sub(r"\s\s+\[default: (.*?)\]", r" Default: \1.", (text or "").strip()).replace("|", "\\|")


def comment(line: str) -> str:
    """A remark behind a wide gap becomes a shell comment."""
    words, gap, remark = re.sub(r"\s{3,}", "\0", line).partition("\0")
    return f"{words}    # {remark}" if gap else line


# -- catalogue ----------------------------------------------------------------------------------------------------------------------------

def catalogue_page() -> str:
    """All systems by family, each with its card and what its proof measured."""
    cards = list(catalogue().values())
    families = dict.fromkeys(sorted(c.family for c in cards))
    out = [MARK, "# Catalogue", "",
           f"{len(cards)} systems. `polysense list` prints this table, `polysense show ID` the rest. A proof is a small honest experiment that the "
           "system has to win against its baseline: `polysense prove ID` repeats it.", ""]
    for family in families:
        out += [f"## {family}", "", "| id | system | can | presets | proof |", "|---|---|---|---|---|"]
        for c in (c for c in cards if c.family == family):
            paper = f"[{c.paper}](https://arxiv.org/abs/{c.arxiv})" if c.arxiv else c.paper
            can, presets = " ".join(f"`{k}`" for k in c.can), " ".join(f"`{k}`" for k in c.presets)
            out.append(f"| [`{c.id}`](systems/{c.id}.md) | **{c.name}**: {c.says}<br>{paper} | {can} | {presets} | {proof_of(c.id)} |")
        out.append("")
    return "\n".join(out)


def proof_of(id: str) -> str:
    """What docs/proofs/<id>.json says, in a cell."""
    path = DOCS / "proofs" / f"{id}.json"
    if not path.exists():
        return "not filed yet"
    filed = json.loads(path.read_text(encoding="utf-8"))
    mean = lambda values: sum(values) / len(values)
    against = ", ".join(f"{name} {mean(values):.3g}" for name, values in filed["baselines"].items())
    verdict = "beats" if filed["beats_baseline"] else "does not beat"
    return f"{filed['metric']} {mean(filed['system']):.3g} {verdict} {against} ({len(filed['seeds'])} seeds)"


# -- one page a system --------------------------------------------------------------------------------------------------------------------

USES = {
    "encode_image": "polysense encode PHOTOS -m RUN", "encode_text": 'polysense search "two dogs on grass" --index PHOTOS', "encode_patches":
    'polysense search "two dogs on grass" --index PHOTOS --why answer.html', "encode_video": "polysense encode VIDEOS -m RUN",
    "encode_audio": "polysense encode SOUNDS -m RUN", "match_text": 'polysense match photo.jpg "a red car" -m RUN', "generate_text":
    'polysense ask photo.jpg "what is in this picture?" -m RUN', "generate_image": 'polysense generate "a red circle" -m RUN --out drawn.png',
    "sample_image": "polysense generate -m RUN -n 9 --out drawn.png", "segment": "polysense segment photo.jpg -m RUN --point 0.4,0.6 --out mask.png",
    "detect": "polysense detect photo.jpg -m RUN --out found.png", "render_view": "polysense render -m RUN --turn 8 --out views.png",
    "reconstruct": "polysense reconstruct photo.jpg -m RUN --out again.png", "encode_codes": "polysense codes photo.jpg -m RUN --out codes.npz",
    "ask": 'polysense agent mm_react photo.jpg --ask "what does the sign say?"',
    "attend": "polysense attend photo.jpg -m RUN --out looks.png"}


def system_pages() -> dict[str, str]:
    """Page by path: what a recipe says about itself, how it is used, and every number of its proof."""
    root = DOCS.parent
    return {f"systems/{c.id}.md": system_page(c, (root / (c.module.replace(".", "/") + ".py")).read_text(encoding="utf-8"))
            for c in catalogue().values()}


def system_page(card: Any, source: str) -> str:
    tree = ast.parse(source)
    layouts = next(([k.value for k in node.value.keys if isinstance(k, ast.Constant)] for node in tree.body if isinstance(node, ast.Assign)
                    and isinstance(node.value, ast.Dict) and getattr(node.targets[0], "id", "") == "weights"), [])
    said = {node.name: (ast.get_docstring(node) or "").split("\n\n")[0] for node in tree.body if isinstance(node, ast.FunctionDef)}
    paper = f"[{card.paper}](https://arxiv.org/abs/{card.arxiv})" if card.arxiv else card.paper
    out = [MARK, f"# {card.name}", "", card.says, "", paper + (f". Authors: {card.official}." if card.official else ""), ""]
    if (DOCS / "images" / "systems" / f"{card.id}.png").exists():
        out += [f"![{card.name}: {card.says}](../images/systems/{card.id}.png)", ""]
    out += ["## The idea", "", prose(ast.get_docstring(tree) or ""), "", "## Presets", "", "| preset | |", "|---|---|"]
    out += [f"| `{name}` | {cell(' '.join(said.get(name, '').split()))} |" for name in card.presets]
    verbs = [USES[k] for k in card.can if k in USES]
    train = [] if card.family == "agent" else [f"polysense train {card.id} --out runs/{card.id}"]
    use = (verb.replace("RUN", f"runs/{card.id}") for verb in dict.fromkeys(verbs))
    out += ["", "## Use", "", "```bash", f"polysense show {card.id}", *train, *use, "```", "",
            f"It can: {', '.join(f'`{k}`' for k in card.can)}. Training reads: {', '.join(f'`{k}`' for k in card.needs) or 'nothing'}."]
    if layouts:
        out += ["", f"Official files of these layouts are read and written: {', '.join(f'`{k}`' for k in layouts)} ([how](../weights.md))."]
    return "\n".join([*out, "", "## Proof", "", *proof_section(card.id), ""])


def prose(text: str) -> str:
    """A docstring as Markdown: what is indented stays as it is, elsewhere angle brackets are not tags."""
    plain = lambda line: "`".join(part if i % 2 else part.replace("<", "&lt;") for i, part in enumerate(line.split("`")))
    return "\n".join(line if line.startswith("    ") else plain(line) for line in text.splitlines())


def proof_section(id: str) -> list[str]:
    path = DOCS / "proofs" / f"{id}.json"
    if not path.exists():
        return ["Not filed yet."]
    words = ast.get_docstring(ast.parse((DOCS.parent / "polysense" / "proofs" / f"{id}.py").read_text(encoding="utf-8"))) or ""
    filed = json.loads(path.read_text(encoding="utf-8"))
    seeds, better = filed["seeds"], "higher" if filed["higher_is_better"] else "lower"
    row = lambda name, values: f"| {cell(name)} | " + " | ".join(f"{v:.4g}" for v in values) + " |"
    within = lambda g: "" if g["low"] is None else f" [{g['low']:+.3g}, {g['high']:+.3g}]"
    gains = [f"{cell(name)}: {g['mean']:+.3g}{within(g)}" for name, g in filed["gains"].items()]
    verdict = "beats every baseline" if filed["beats_baseline"] else "**does not beat every baseline**"
    return [prose(words), "", f"{filed['metric']} ({better} is better) on {filed['data']}.", "",
            "| | " + " | ".join(f"seed {s}" for s in seeds) + " |",
            "|---|" + "---|" * len(seeds), row(f"**{id}**", filed["system"]), *(row(k, v) for k, v in filed["baselines"].items()), "",
            f"In the mean over seeds it {verdict}. Gains with their 95 % intervals over seeds: {'; '.join(gains)}.", "",
            f"Commit `{filed['commit']}`, {filed['machine']['processor']}, {filed['seconds']:.0f} s. Again: `polysense prove {id}`. "
            f"Further measurements are in the notes of `docs/proofs/{id}.json`."]


# -- speed --------------------------------------------------------------------------------------------------------------------------------

def speed_page() -> str:
    """What every bench says of itself and what its filed run measured."""
    out = [MARK, "# Speed", "", "Measured as ratios in one run: the same weights or shapes, the same precision, arms in turns on one machine. "
           "Each section is one script of `bench/`; a goal that was missed stays here as missed. The load is how much wanted to run on the machine: "
           "above its number of cores the seconds are too long and the ratios rough.", ""]
    for path in sorted((DOCS / "proofs").glob("bench_*.json")):
        script = DOCS.parent / "bench" / f"{path.stem.removeprefix('bench_')}.py"
        filed, words = json.loads(path.read_text(encoding="utf-8")), ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
        where, load = filed["machine"], filed.get("load")
        told = f"Commit `{filed['commit']}`, {where['processor']}, {where['threads']} of {where['cores']} cores"
        told += "." if load is None else f", load {load:.1f}."
        out += [f"## {script.stem.replace('_', ' ')}", "", prose(words), "", *numbers(filed), told, ""]
    return "\n".join(out)


def numbers(filed: dict[str, Any]) -> list[str]:
    """Goals, ratios and seconds of a bench as tables; the older forms without them show their plain numbers."""
    out = []
    if filed.get("goals"):
        limit = lambda g: " and ".join(f"at {k} {g[k]:g}" for k in ("least", "most") if k in g)
        verdict = {True: "reached", False: "**missed**"}
        rows = [f"| {cell(k)} | {limit(g)} | {g['measured']:.3g} | {verdict[g['reached']]} |" for k, g in filed["goals"].items()]
        out += ["| goal | | measured | |", "|---|---|---|---|", *rows, ""]
    plain = {k: v for k, v in filed.items() if isinstance(v, float) and k != "load"}
    for title, values in (("ratio", filed.get("ratios") or plain), ("seconds", filed.get("seconds"))):
        if isinstance(values, dict):
            out += [f"| {title} | |", "|---|---|", *(f"| {cell(k)} | {v:.3g} |" for k, v in values.items()), ""]
    return out


# -- comparisons --------------------------------------------------------------------------------------------------------------------------

def comparisons_page() -> str:
    """Every filed run of `polysense compare`: what docs/compared/NAME.md says of it, its command, the ranking in each exam, and its tables."""
    from polysense.app.compare import Comparison

    out = [MARK, "# Comparisons", "", "Filed runs of [`polysense compare`](commands/polysense-compare.md): every system with the same data order and "
           "budget, with the same towers unless said otherwise, and the same exams. A command with a budget of steps gives its table again.", ""]
    paths = sorted((DOCS / "compared").glob("*.json"))
    if not paths:
        out.append("None is filed yet.\n")
    for path in paths:
        made, words = Comparison(**json.loads(path.read_text(encoding="utf-8"))), path.with_suffix(".md").read_text(encoding="utf-8").strip()
        tables = made.markdown().partition("\n")[2].strip().replace("\n## ", "\n### ")
        out += [words, "", "```bash", command(made.facts), "```", "", "### Rankings", "", *rankings(made), "", tables, ""]
    return "\n".join(out)


def command(facts: dict[str, Any]) -> str:
    budget = facts["budget"].replace(",", "").split()
    changes = [f"{k}={json.dumps(v) if isinstance(v, bool) else v}" for k, v in facts["changes"].items()]
    vary = [f"--vary {k}={','.join(map(str, v))}" for k, v in facts["vary"]]
    systems = facts["systems"] if not vary else [facts["of"]]
    on = [f"--on {quote(facts['on'])}"] if facts["on"] != facts["data"] else []
    long = f"--budget {budget[0]}s" if budget[1] == "s" else f"--{budget[1]} {budget[0]}"
    return " ".join(["polysense compare", *systems, *changes, "--data", quote(facts["data"]), *on, *vary, long,
                     f"--seeds {len(facts['seeds'])} --exams {','.join(facts['exams'])} --probe {facts['probe']}",
                     *(["--untrained"] if facts.get("untrained") else []), *([] if facts.get("share", True) else ["--own-towers"])])


def rankings(made: Any) -> list[str]:
    """One line an exam, the best first; those that a paired test tells apart from the reference carry a sign."""
    out = []
    for slot in made.slots:
        rows = sorted((r for r in made.table if slot in r["scores"]), key=lambda r: -r["scores"][slot]["value"])
        chance = next((r["scores"][slot]["chance"] for r in rows), None)
        sign = lambda g: "" if not g or g["p_holm"] > 0.05 else " (+)" if g["value"] > 0 else " (-)"
        line = ", ".join(f"{r['system']} {r['scores'][slot]['value']:.3f}{sign(r['scores'][slot].get('gap'))}" for r in rows)
        out.append(f"- **{slot}**: {line}" + (f"; chance {chance:.3f}." if chance is not None else "."))
    return [*out, "", f"(+) and (-): better and worse than {made.facts['reference']}, p below 0.05 after Holm's correction."]


if __name__ == "__main__":
    sys.exit(main())
