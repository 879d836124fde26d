"""The floor plan of docs/design.md: who may import whom, ceilings, no booleans, abstract or final, a torch-free lobby."""
import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "polysense"
PARTS = {"base", "nn", "towers", "connectors", "mechanisms", "decoders"}
MODEL = PARTS | {"objectives", "weights", "archetypes"}
MAY: dict[str, set[str]] = {
    "base": set(), "objectives": {"base"}, "nn": {"base"}, "weights": {"base"}, "mechanisms": {"base", "nn"}, "towers": {"base", "nn"},
    "connectors": {"base", "nn", "towers"}, "decoders": {"base", "nn", "towers"}, "archetypes": PARTS | {"objectives", "weights"},
    "systems": MODEL, "data": {"base"}, "tasks": {"base", "nn", "data"}, "train": {"base", "data", "weights", "objectives"},
    "pipeline": {"base", "data", "weights", "train", "tasks"},
    "app": {"base", "data", "weights", "train", "tasks", "pipeline"},
    "proofs": MODEL | {"systems", "data", "tasks", "train", "pipeline", "app"},
}
FILES = sorted(ROOT.rglob("*.py"))


def floor_of(path: Path) -> str:
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py").strip("_").split("_")[0] if first.endswith(".py") else first


def imported(path: Path) -> Iterator[str]:
    """Dotted polysense modules that a file imports anywhere, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} uses a relative import"
            if node.module == "polysense":
                yield from (f"polysense.{a.name}" for a in node.names)
            elif (node.module or "").startswith("polysense."):
                yield node.module or ""
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith("polysense."))


@pytest.mark.parametrize("floor", MAY)
def test_a_floor_imports_only_the_floors_named(floor: str):
    files = [f for f in FILES if floor_of(f) == floor]
    for path in files:
        wrong = {m for m in imported(path) if m.split(".")[1] not in MAY[floor] | {floor} and m.split(".")[1] in set(MAY) | {"cli"}}
        assert not wrong, f"{path.relative_to(ROOT)} may not import {sorted(wrong)}"


def test_every_file_stands_on_a_known_floor():
    strangers = {floor_of(f) for f in FILES} - set(MAY) - {"init", "", "main", "cli"}
    assert not strangers, f"not in the floor plan: {strangers}"


def test_systems_are_strangers_to_each_other():
    for path in (f for f in FILES if floor_of(f) == "systems"):
        others = [m for m in imported(path) if m.startswith("polysense.systems.")]
        assert not others, f"{path.name} imports {others}"


def test_there_are_no_import_cycles():
    graph = {".".join(f.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): f for f in FILES}
    top_level: dict[str, set[str]] = {}
    for name, path in graph.items():
        top_level[name] = set()
        for node in (n for n in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(n, ast.ImportFrom)):
            for alias in node.names:         # `from package import module` reads the module, not the package
                target = f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}" in graph else node.module or ""
                if target in graph and target != name:
                    top_level[name].add(target)
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail[trail.index(name):], name))
        if name not in done:
            for other in top_level[name]:
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


CEILINGS = {"systems": 300, "archetypes": 200, "nn": 250, "towers": 250, "mechanisms": 250, "connectors": 250, "decoders": 250, "objectives": 250}


def test_no_file_grows_through_its_ceiling():
    for path in FILES:
        limit = 150 if path == ROOT / "train" / "fit.py" else CEILINGS.get(floor_of(path))
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert limit is None or lines <= limit, f"{path.relative_to(ROOT)} has {lines} lines, its ceiling is {limit}"


@pytest.mark.parametrize("path", [f for f in FILES if floor_of(f) in PARTS - {"base"} | {"archetypes"}], ids=lambda p: p.stem)
def test_no_booleans_in_the_configuration_of_parts_and_archetypes(path: Path):
    for cls in (n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.ClassDef) and n.name == "Config"):
        for field in (n for n in cls.body if isinstance(n, ast.AnnAssign)):
            assert "bool" not in ast.unparse(field.annotation), f"{path.name}: {ast.unparse(field)}: use a Spec in a slot"


def test_listing_the_catalogue_imports_no_torch():
    code = "import sys, polysense; assert polysense.catalogue(); print(sorted({'torch', 'numpy', 'kornia', 'PIL'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert out == "[]", f"`polysense list` would import {out}"


def test_the_floor_plan_matches_import_linter():
    import tomllib
    contracts = tomllib.loads((ROOT.parent / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
    here = {f for f in (floor_of(p) for p in FILES) if f in set(MAY) | {"cli"}}
    forbidden = {floor_of(ROOT / f"{c['source_modules'][0].split('.')[1]}.py"): {m.split(".")[1].split("_")[0] for m in c["forbidden_modules"]}
                 for c in contracts if c["type"] == "forbidden"}
    assert forbidden == {f: here - MAY[f] - {f} for f in here - {"cli"}}, "pyproject.toml and MAY disagree"
