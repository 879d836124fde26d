"""The command line before anything heavy: what it imports, what it says, how it fails."""
import json
import shlex
import subprocess
import sys
from importlib import import_module

import pytest
import typer

import polysense
from polysense.cli import app, main

HEAVY = {"torch", "numpy", "PIL", "kornia", "matplotlib", "jinja2", "transformers", "faiss", "sklearn"}


def imports_of(*words: str) -> set[str]:
    """The modules that a fresh process has loaded after one command."""
    code = f"import sys; from polysense.cli import main; main({list(words)!r}); print(*sys.modules, sep='\\n', file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


@pytest.mark.parametrize("words", [("--help",), ("train", "--help"), ("list",), ("list", "--can", "encode_text", "--json"), ("--version",)],
                         ids=" ".join)
def test_looking_around_imports_nothing_heavy(words):
    assert not HEAVY & imports_of(*words)


def test_listing_data_imports_no_torch():
    assert not {"torch", "kornia", "sklearn", "transformers"} & imports_of("data", "list")


def test_lists_as_json_need_not_even_rich():
    assert "rich" not in imports_of("list", "--json")


def commands(group=None, path=()):
    """(words, typer's command) of every command, groups included."""
    group = group or typer.main.get_command(app)
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


ALL = dict(commands())


def test_the_commands_of_the_house_are_all_there():
    assert {"list", "show", "train", "exam", "prove", "convert", "index", "search", "agent", "clips", "label", "encode", "new", "report", "generate",
            "codes", "decode", "compare", "merge", "reconstruct", "ask", "attend", "caption", "chat", "detect", "match", "render", "segment",
            "fill", "translate",
            "data list", "data get", "data show"} == {" ".join(w) for w in ALL}


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_help_teaches_by_examples_that_parse(words, capsys):
    assert main([*words, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"polysense {' '.join(words)}" in shown and "Examples" in shown
    for line in (ALL[words].help or "").splitlines():
        if line.strip().startswith("polysense ") and line.strip().split()[1:1 + len(words)] == list(words):
            typed = shlex.split(line.strip().split("     ")[0])              # what follows a wide gap is a remark
            ALL[words].make_context("polysense", typed[1 + len(words):])     # raises for an option that does not exist


def test_every_parameter_is_explained():
    for words, command in ALL.items():
        for p in command.params:
            assert getattr(p, "help", None), f"{' '.join(words)}: {p.name} has no help"


def test_list_is_the_catalogue(capsys):
    assert main(["list", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [s["id"] for s in said] == list(polysense.catalogue())
    for s in said:
        card = polysense.catalogue()[s["id"]]
        assert (s["name"], s["family"]) == (card.name, card.family)
        assert (s["can"], s["needs"], s["presets"]) == (list(card.can), list(card.needs), list(card.presets))


def test_list_can_be_narrowed(capsys):
    main(["list", "--can", "encode_text", "--family", "align", "--json"])
    ids = {s["id"] for s in json.loads(capsys.readouterr().out)}
    assert ids == {c.id for c in polysense.catalogue().values() if "encode_text" in c.can and c.family == "align"} and "clip" in ids
    main(["list"])
    table = capsys.readouterr().out
    assert all(name in table for name in polysense.catalogue())


def test_show_counts_what_the_system_holds(capsys):
    from polysense.base.catalogue import preset_of

    assert main(["show", "clip", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    preset, system = preset_of("clip"), preset_of("clip").config.build()
    counts = said["preset"]["parameters"]
    assert counts["total"] == sum(p.numel() for p in system.parameters()) == sum(counts["by_module"].values())
    assert counts["by_module"]["vision"] == sum(p.numel() for p in system.vision.parameters())
    assert said["preset"]["lines"] == list(preset.lines()) and said["preset"]["digest"] == preset.digest()
    assert said["layouts"] == list(import_module(said["module"]).weights)


def test_show_paper_allocates_nothing_and_agrees_with_the_published_count(capsys):
    assert main(["show", "clip", "--preset", "paper", "--json"]) == 0
    total = json.loads(capsys.readouterr().out)["preset"]["parameters"]["total"]
    assert total == polysense.load("clip").PARAMETERS
    assert main(["show", "clip", "--preset", "paper"]) == 0
    assert f"{total:,}" in capsys.readouterr().out


@pytest.mark.parametrize("words, says", [
    (["shwo"], "show"),
    (["show", "clpi"], "did you mean clip"),
    (["show", "clip", "--preset", "tniy"], "it has tiny"),
    (["list", "--can", "encode_txt"], "did you mean encode_text"),
    (["list", "--family", "algn"], "did you mean align"),
    (["list", "--nonsense"], "--nonsense"),
    (["train"], "polysense train --help"),
    (["train", "clip", "text.body.dept=4"], "depth"),
    (["train", "clip", "vision.body.depth"], "vision.body.depth=4"),
    (["train", "clip", "text.body.depth=four"], "wrong type"),
    (["train", "clip", "--preset", "huge"], "it has tiny"),
    (["train", "clip", "--data", "no_such_set"], "polysense data list"),
    (["train", "clip", "--minutes", "-1"], "positive"),
    (["train", "clip", "--steps", "many"], "--steps"),
    (["train", "clip", "--device", "abacus"], "device"),
    (["exam", "no/run", "zero_shot", "--data", "digits"], "no/run"),
    (["exam", "no/run", "zero_shoot", "--data", "digits"], "the exams are"),
    (["exam", "no/run", "zero_shot"], "--data"),
    (["prove", "clpi"], "did you mean clip"),
    (["index", "no_folder", "-m", "run"], "check the path"),
    (["search"], "polysense search"),
    (["search", "a", "--image", "b.png"], "one of them"),
    (["search", "--image", "b.png"], "no file"),
    (["search", "a dog", "--index", "nowhere"], "polysense index"),
    (["label", "nowhere", "--labels", "l.txt", "-m", "run"], "check the path"),
    (["encode", "nowhere", "-m", "run", "--out", "x.txt"], ".npz"),
    (["convert", "a", "b", "--system", "clip", "--layout", "hfx"], "it has"),
    (["convert", "a", "b", "--system", "slip", "--layout", "hf"], "slip"),
    (["data", "show", "digits", "--split", "tset"], "it has train, test"),
    (["new", "CLIP2"], "snake_case"),
    (["new", "clip"], "already"),
    (["report", "nowhere"], "nowhere"),
    (["report", "nowhere", "-q", "a dog"], "--index"),
], ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_an_error_is_one_line_that_says_what_to_do(words, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and err.count("\n") == 1 and says in err, err
    assert not list(tmp_path.iterdir()), "an error leaves nothing behind"


def test_debug_shows_the_traceback_wherever_it_stands():
    for words in (["--debug", "show", "clpi"], ["show", "clpi", "--debug"]):
        with pytest.raises(polysense.UserError, match="did you mean clip"):
            main(words)


def test_a_mistake_of_ours_is_one_line_with_a_hint(monkeypatch, capsys):
    import polysense.base.catalogue as catalogue

    def broken(*_):
        raise RuntimeError("first\nsecond")

    monkeypatch.setattr(catalogue, "catalogue", broken)
    assert main(["list"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "RuntimeError: first second" in err and "--debug" in err


def test_an_interrupt_ends_with_130(monkeypatch, capsys):
    import polysense.base.catalogue as catalogue

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(catalogue, "catalogue", interrupted)
    assert main(["list"]) == 130
    assert capsys.readouterr().err == "stopped\n"


def test_no_words_show_the_help(capsys):
    assert main([]) in (0, 2)
    assert "polysense train" in capsys.readouterr().out


def test_a_reader_that_leaves_early_is_no_error():
    code = "from polysense.cli import main; raise SystemExit(main(['list', '--json']))"
    writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    writer.stdout.close()
    assert writer.wait() == 0 and writer.stderr.read() == ""


def test_a_bar_that_begins_anew_counts_anew_under_its_new_name(capsys):
    from polysense.cli.out import Bar

    with Bar("training mofi", every=0.0) as bar:
        bar.begin("training clip for mofi")
        bar(900, 1000)
        bar.begin("training mofi")
        bar(10, 1000)
        bar(20, 1000)
    said = capsys.readouterr().err.splitlines()
    assert [line.split(" %")[0] for line in said] == ["training clip for mofi 90", "training mofi 1", "training mofi 2"]
    assert "left" not in said[1], "time is measured from its own first step"
