"""The pages that are generated say what the command line says; the others name nothing that does not exist."""
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import polysense
from polysense.cli import app

ROOT = Path(__file__).parents[2]
PROSE = [ROOT / "README.md", ROOT / "README.zh.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")),
         *sorted((ROOT / "docs" / "commands").glob("*.md")),
         *sorted((ROOT / "docs" / "systems").glob("*.md"))]


@pytest.fixture(scope="module")
def generator():
    spec = importlib.util.spec_from_file_location("gen_docs", ROOT / "scripts" / "gen_docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_command_pages_are_up_to_date(generator):
    pages = generator.command_pages()
    on_disk = {f"commands/{p.name}" for p in (ROOT / "docs" / "commands").glob("*.md")}
    assert on_disk == set(pages), "run: make docs"
    for name, text in pages.items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == text, f"docs/{name} is out of date: run make docs"


def test_command_pages_explain_every_option(generator):
    pages = generator.command_pages()
    for name, command in typer.main.get_command(app).commands.items():
        inner = getattr(command, "commands", {name: command})
        for p in (p for c in inner.values() for p in c.params if p.param_type_name == "option"):
            assert all(f"`{', '.join(p.opts)}`" in pages[f"commands/polysense-{name}.md"] for _ in [0] if p.name != "help")
        assert f"commands/polysense-{name}.md" in (ROOT / "mkdocs.yml").read_text()


def test_the_catalogue_page_has_every_system(generator):
    page = generator.catalogue_page()
    written = (ROOT / "docs" / "catalogue.md").read_text(encoding="utf-8")
    for card in polysense.catalogue().values():
        assert f"| [`{card.id}`](systems/{card.id}.md) |" in page and card.says in page
        assert f"| [`{card.id}`]" in written, "docs/catalogue.md is out of date: run make docs"


def test_every_system_has_a_page_that_says_what_its_recipe_says(generator):
    pages = generator.system_pages()
    assert set(pages) == {f"systems/{p.name}" for p in (ROOT / "docs" / "systems").glob("*.md")}, "run: make docs"
    for card in polysense.catalogue().values():
        page = pages[f"systems/{card.id}.md"]
        filed = ROOT / "docs" / "proofs" / f"{card.id}.json"
        assert card.says in page and all(f"| `{name}` |" in page for name in card.presets)
        assert ("Not filed yet" in page) != filed.exists()
        assert not filed.exists() or json.loads(filed.read_text())["commit"] in page


def test_the_speed_page_shows_every_filed_bench(generator):
    page, written = generator.speed_page(), (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    for path in (ROOT / "docs" / "proofs").glob("bench_*.json"):
        filed = json.loads(path.read_text(encoding="utf-8"))
        title = path.stem.removeprefix("bench_").replace("_", " ")
        assert f"Commit `{filed['commit']}`" in page and f"## {title}" in written, "run: make docs"
        for goal in filed.get("goals", {}).values():
            assert f"| {goal['measured']:.3g} | {'reached' if goal['reached'] else '**missed**'} |" in page
        assert all(f"| {value:.3g} |" in page for value in filed.get("ratios", {}).values())


def lines():
    for path in PROSE:
        for block in re.findall(r"```bash\n(.*?)```", path.read_text(encoding="utf-8"), re.S):
            for line in block.splitlines():
                if line.startswith("polysense ") and "siglip9" not in line and "moco9" not in line:     # those are yet to be written
                    yield pytest.param(line, id=f"{path.name}: {line[:50]}")


@pytest.mark.parametrize("line", lines())
def test_every_command_line_in_the_documents_parses(line):
    group, words = typer.main.get_command(app), shlex.split(line, comments=True)[1:]
    command = group.commands[words.pop(0)]
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    context = command.make_context("polysense", words)          # raises for an option that is not there and for a missing argument
    said = context.params
    assert not context.args, "words that the command does not take"
    assert "id" not in said or said["id"].startswith("my_") or said["id"] in polysense.catalogue(), "a system that is not there"
    if command.name == "train":                          # its dotted changes fit the preset
        from polysense.base.catalogue import preset_of
        from polysense.base.spec import parse_overrides
        from polysense.train.run import override

        changed = override(preset_of(said["id"], said["preset"] or "tiny"), changes := parse_overrides(said["overrides"] or []))
        assert not changes or changed != preset_of(said["id"], said["preset"] or "tiny"), "changes that change nothing"


@pytest.mark.parametrize("path", PROSE, ids=lambda p: p.name)
def test_links_between_documents_lead_somewhere(path):
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_both_readmes_show_the_same_commands():
    def typed(name: str) -> list[str]:
        found = re.findall(r"^(?:polysense|make|model\.\w+)[^#\n]*", (ROOT / name).read_text(encoding="utf-8"), re.M)
        return [line.strip() for line in found]

    assert typed("README.md") == typed("README.zh.md") and len(typed("README.md")) > 10


def test_nothing_committed_names_a_place_outside():
    for path in [*PROSE, ROOT / "Makefile", ROOT / "mkdocs.yml", *(ROOT / "scripts").glob("*.py"), *(ROOT / "polysense").rglob("*.py")]:
        found = re.findall(r"(?<![\w.~])/(?:work|root|home)/\S+|pypi\.\w+|download\.pytorch", path.read_text(encoding="utf-8"))
        assert not found, f"{path.name}: {found}"


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "polysense.pipeline.Pipeline.explain" in (tmp_path / "site" / "api.html").read_text(encoding="utf-8")
    assert "--resume" in (tmp_path / "site" / "commands" / "polysense-train.html").read_text(encoding="utf-8")
