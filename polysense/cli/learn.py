"""train, exam, prove, report: a system learns and is examined."""
from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from polysense.base.errors import UserError
from polysense.cli.systems import Id, Json

Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or with --system and --layout a published checkpoint.")]
System = Annotated[str | None, typer.Option(metavar="ID", help="Of a published checkpoint: which system it is.")]
Layout = Annotated[str | None, typer.Option(metavar="LAYOUT", help="Of a published checkpoint: hf, openai, open_clip, timm ...")]
Device = Annotated[str | None, typer.Option(metavar="DEVICE", help="cuda, mps or cpu.  [default: the first that exists]")]

NEXT = (("encode_text", "index PHOTOS"), ("detect", "detect PHOTO --out FILE.png"), ("generate_text", "ask PHOTO QUESTION"),
        ("generate_image", "generate WORDS --out FILE.png"), ("sample_image", "generate --out FILE.png"),
        ("segment", "segment PHOTO --point X,Y --out FILE.png"), ("render_view", "render --out FILE.png"),
        ("reconstruct", "reconstruct PHOTO --out FILE.png"), ("encode_image", "encode PHOTOS"), ("encode_video", "encode VIDEOS"))


def train(id: Id,
          overrides: Annotated[list[str] | None, typer.Argument(metavar="[dotted=value]...", help="Changes to the preset, checked against its "
                                                                "fields: text.body.depth=6 optim.lr=5e-4", show_default=False)] = None,
          preset: Annotated[str | None, typer.Option(metavar="PRESET", help="Which configuration; `polysense show ID` lists them.  "
                                                     "[default: tiny]")] = None,
          data: Annotated[str | None, typer.Option(metavar="DATA", help="A set's name or a path; a+b joins.  [default: the preset's own]")] = None,
          out: Annotated[Path | None, typer.Option(metavar="DIR", help="The run folder.  [default: runs/ID-PRESET]")] = None,
          seed: Annotated[int | None, typer.Option(metavar="N", help="Decides first weights, order of data, augmentations.  [default: 0]")] = None,
          steps: Annotated[int | None, typer.Option(metavar="N", min=1, help="Steps in all, in place of the preset's.")] = None,
          minutes: Annotated[float | None, typer.Option(metavar="M", help="End after so many minutes at the latest; schedules fit into it.")] = None,
          resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out, bit for bit where it stopped.")] = False,
          device: Device = None,
          workers: Annotated[int | None, typer.Option(metavar="N", min=0, help="Processes that decode pictures.")] = None,
          wandb: Annotated[str | None, typer.Option(metavar="PROJECT", help="Log to this Weights & Biases project too (extra `wandb`).")] = None,
          parallel: Annotated[str, typer.Option(metavar="ddp|fsdp", help="Under torchrun: how ranks share the work.")] = "ddp",
          adapt: Annotated[str | None, typer.Option(metavar="HOW", help="Freeze the system and train a mechanism on it: "
                                                    "lora:rank=8,on=\"vision.*.q|v\"; qlora, prefix_tuning, freeze_tuning.")] = None,
          base: Annotated[Path | None, typer.Option(metavar="RUN", help="With --adapt: the run it goes onto; else the run that a system such as "
                                                  "coop stands on.  [default: the preset, trained once]")]
          = None,
          begin: Annotated[list[str] | None, typer.Option(metavar="PART=RUN[:ITS_PART]", help="Let a part begin as that of a run of yours, or of a "
                                                          "converted checkpoint, in place of what the preset stands on: "
                                                          "vision=runs/clip:vision; several times for several.", show_default=False)] = None,
          no_preflight: Annotated[bool, typer.Option("--no-preflight", help="Skip the second of checks before the first step.")] = False,
          as_json: Json = False) -> None:
    """Train a system. What it learns stands in the run folder: weights, tokenizer, log, configuration.

    Before the first step it is looked at for about a second: does a gradient reach what is to be trained, are labels there, masks the right way
    round, negatives counted, can one batch be learned? If not, the run is refused with the reason.

    Stop it with Ctrl-C, or kill it: `polysense train ID --out DIR --resume` goes on exactly where it was.

    \b
    Examples
      polysense train clip --data scenes --out runs/clip
      polysense train clip --data "photos.csv?image=path&caption=title" --minutes 30
      polysense train clip optim.lr=5e-4 text.body.depth=6
      polysense train clip --out runs/clip --resume
      polysense train clip --adapt lora:rank=8,on="vision.*.q|v" --base runs/clip --data PHOTOS --out runs/mine
      polysense train lit --begin vision=runs/seen:backbone --data PHOTOS
      torchrun --nproc-per-node 2 -m polysense train clip --out runs/clip
    """
    from polysense.base.catalogue import card_of
    from polysense.base.spec import from_dict, parse_overrides

    card, changes = card_of(id), parse_overrides(overrides or [])
    if minutes is not None and minutes <= 0:
        raise UserError(f"--minutes {minutes:g} leaves no time to train", "give a positive number")
    options: dict[str, Any] = {"out": out, "resume": resume, "device": device, "workers": workers, "wandb": wandb, "parallel": parallel,
                               "time_budget_s": minutes * 60 if minutes else None, "preflight": not no_preflight}
    from polysense.train.run import train as run_of
    from polysense.train.run import train_preset

    if resume and out and (out / "run.json").is_file():
        from polysense.train.folder import read_facts

        before = read_facts(out)
        if before["system"] == id and not (preset or data or steps or changes or begin):      # the folder knows its own plan
            events = train_preset(id, from_dict(before["plan"]), card.needs, name=before["preset"], overrides=before["overrides"],
                                  split=before["split"], seed=before["seed"] if seed is None else seed, **options)
            return draw(events, id, minutes, as_json)
        seed = before["seed"] if seed is None else seed
    if begin and (adapt or base):
        raise UserError("--begin and --adapt or --base", "an adapter and a system such as coop stand on one run as a whole: say --base RUN alone")
    if base and not adapt:
        from polysense.base.catalogue import preset_of
        from polysense.train.adapting import standing
        from polysense.train.run import override, shortened

        plan = override(standing(id, preset_of(id, preset or "tiny"), base), changes)
        plan = plan.but(data=data) if data else plan
        plan = shortened(plan, steps) if steps is not None else plan
        return draw(train_preset(id, plan, card.needs, name=preset or "tiny", overrides=changes, seed=seed or 0, **options), id, minutes, as_json)
    draw(run_of(id, preset or "tiny", data=data, steps=steps, overrides=changes, seed=seed or 0, adapt=adapt, base=base, begin=begin or (),
                **options), id, minutes, as_json)


def draw(events: Any, id: str, minutes: float | None, as_json: bool) -> None:
    """Iterates a run to its end: progress on stderr (of the first rank), what came out on stdout."""
    import os
    import time

    from polysense.cli.out import Bar, Stopped, clock, json_out, note, say, short
    from polysense.train.events import Finished, Noted, Saved, Started, Stepped

    quiet, last, folder, saved = os.environ.get("RANK", "0") != "0", None, None, 0
    begun, bar = time.monotonic(), Bar(f"training {id}", quiet=quiet)
    try:
        with bar:
            for event in events:
                folder = event.folder if event.id == id else folder
                if isinstance(event, Started) and not quiet:
                    begun = time.monotonic()
                    bar.begin(f"training {event.id}" + (f" for {id}" if event.id != id else ""))
                    bar.note(f"{event.id} {event.preset}: {short(event.parameters)} parameters ({short(event.trainable)} train), "
                             f"{'a stream' if event.samples is None else f'{event.samples:,} samples'} of {event.data}, "
                             f"on {event.device} in {event.precision}"
                             + (f", {event.ranks} ranks" if event.ranks > 1 else "") + (f", from step {event.done}" if event.done else ""))
                elif isinstance(event, Stepped):
                    done = event.step / event.steps
                    if minutes:
                        done = max(done, min(1.0, (time.monotonic() - begun) / (60 * minutes)))
                    terms = "  ".join(f"{k} {v:.4f}" for k, v in event.losses.items())
                    bar(round(1000 * done), 1000, f"step {event.step}/{event.steps}  {terms}  {event.samples_per_s:.0f} samples/s")
                elif isinstance(event, Noted) and not quiet:
                    bar.note(event.text)
                elif isinstance(event, Saved):
                    saved = event.step
                elif isinstance(event, Finished):
                    last = event
    except KeyboardInterrupt:
        again = f"`polysense train {id} --out {folder} --resume`" if folder else "the same command"
        raise Stopped(f"stopped, the last checkpoint is of step {saved}: go on with {again}" if saved or folder else "stopped") from None
    if quiet or last is None:
        return
    if as_json:
        json_out({"id": id, "out": str(last.folder), "weights": str(last.weights), "steps": last.step, "seconds": round(last.seconds, 2),
                  "samples": last.samples, "losses": last.losses})
        return
    terms = ", ".join(f"{k} {v:.4f}" for k, v in last.losses.items())
    say(f"{last.weights}: {last.step} steps, {last.samples:,} samples in {clock(last.seconds)}" + (f", last loss {terms}" if terms else ""))
    from polysense.base.catalogue import preset_of
    from polysense.base.protocols import capabilities
    from polysense.train.folder import read_facts

    can = capabilities(type(preset_of(id, read_facts(last.folder)["preset"]).config).owner)
    use = next((verb for capability, verb in NEXT if capability in can), "")
    words = [f"polysense {verb} -m {last.folder}" for verb in (use,) if verb]
    note("go on with: " + "   ".join([*words, f"polysense exam {last.folder} TASK --data DATA", f"polysense report {last.folder}"]))


def exam(run: Run,
         task: Annotated[str | None, typer.Argument(metavar="TASK", help="Which exam; leave it out to see what this run can sit.",
                                                    show_default=False)] = None,
         options: Annotated[list[str] | None, typer.Argument(metavar="[option=value]...", help="Of the exam: templates=imagenet k=5 seed=1",
                                                             show_default=False)] = None,
         data: Annotated[str | None, typer.Option(metavar="DATA", help="What to examine on: a set's name or a path.")] = None,
         split: Annotated[str, typer.Option(metavar="SPLIT", help="The part it is examined on.")] = "val",
         train_split: Annotated[str, typer.Option(metavar="SPLIT", help="The part that probes learn from.")] = "train",
         system: System = None, layout: Layout = None, device: Device = None, as_json: Json = False) -> None:
    """Examine a trained system: zero-shot classification, retrieval, probes. Every number comes with its 95 % interval.

    The result is also kept in RUN/exams, where `polysense report` finds it.

    \b
    Examples
      polysense exam runs/clip
      polysense exam runs/clip retrieval --data natural_captions
      polysense exam runs/albef retrieval rerank=16 --data natural_captions
      polysense exam runs/clip zero_shot templates=imagenet --data cifar10 --json
      polysense exam runs/vit linear_probe --data digits
      polysense exam runs/vq_vae reconstruction --data cifar10
      polysense exam runs/nerf views lpips=vgg.pth,vgg16.pth --data solids
      polysense exam downloads/b32 zero_shot --data cifar10 --system clip --layout hf
    """
    import json

    import polysense
    from polysense.cli.options import exam_options
    from polysense.cli.out import Bar, console, json_out, note, table
    from polysense.tasks import EXAMS, exam_of, exams_for, take

    chosen = exam_of(task) if task else None
    if chosen and not data:
        raise UserError("an exam needs data", f"say --data with something that offers {' and '.join(chosen.needs)} (polysense data list)")
    pipeline = polysense.open(run, system=system, layout=layout, device=device)
    if chosen is None:
        able = exams_for(pipeline.system)
        rows = [(e.name, "yes" if e.name in able else "no", " ".join(e.needs), e.says) for e in EXAMS.values()]
        json_out([dict(zip(("exam", "can", "needs", "says"), r)) for r in rows]) if as_json else table(("exam", "can", "needs", "what it is"), rows)
        return
    from polysense.data import source

    asked = exam_options(chosen.name, options or [])
    test = source(str(data), split)
    train = source(str(data), train_split) if chosen.trains else None
    with Bar("tuning", "steps") if chosen.name == "fine_tune" else Bar("encoding", "pictures") as bar:
        result = take(chosen.name, pipeline, test, train, **({"progress": bar} | asked))
    said = {**result.to_dict(), "split": test.split}
    if (Path(run) / "run.json").is_file():
        from polysense.app.files import place

        name = "".join(c if c.isalnum() or c in "._-" else "_" for c in f"{chosen.name}-{data}-{test.split}")[-120:]
        with place(Path(run) / "exams" / f"{name}.json") as beside:
            beside.write_text(json.dumps(said, indent=1, default=str) + "\n", encoding="utf-8")
    if as_json:
        json_out(said)
        return
    console().print(result.table())
    if skipped := result.notes.get("skipped"):
        note(f"{len(skipped)} samples could not be read and were left out")


def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
           out: Annotated[Path | None, typer.Option(metavar="FILE.html", help="The page to write.  [default: RUN/report.html]")] = None,
           index: Annotated[Path | None, typer.Option(metavar="DIR", help="Indexed pictures to search and label for the report.")] = None,
           query: Annotated[list[str] | None, typer.Option("--query", "-q", metavar="TEXT", help="A search to show; repeatable.")] = None,
           labels: Annotated[Path | None, typer.Option(metavar="FILE", help="Labels, one a line, for some of the pictures.")] = None,
           template: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="A sentence with {} for the label; several are averaged.  "
                                                              "[default: a photo of a {}.]")] = None,
           device: Device = None) -> None:
    """Write a report of a run as one self-contained HTML page: curves, exams, searches with heat-maps, labels, how to go on.

    \b
    Examples
      polysense report runs/clip
      polysense report runs/clip --index PHOTOS -q "a dog on grass" -q "a red car" --labels labels.txt
    """
    from polysense.app.report import write_report
    from polysense.cli.out import Bar, say

    if query and index is None:
        raise UserError("--query searches an index", "say which one with --index")
    if labels and index is None:
        raise UserError("--labels are given to indexed pictures", "say which index with --index")
    with Bar("report", "parts") as bar:
        say(str(write_report(run, out or run / "report.html", index=index, queries=query or (), labels=labels, templates=template,
                             device=device, progress=bar)))


def prove(id: Id,
          seed: Annotated[list[int] | None, typer.Option(metavar="N", help="A seed to run; may be given several times.  [default: 0 1 2]")] = None,
          out: Annotated[Path | None, typer.Option(metavar="DIR", help="Where ID.json is filed, such as docs/proofs.  [default: not filed]")] = None,
          anew: Annotated[bool, typer.Option("--anew", help="Run all seeds again, also those that an earlier run of this code has kept.")] = False,
          as_json: Json = False) -> None:
    """Run the proof of a system: a small honest experiment in which it has to beat its baseline.

    Each seed is kept when it ends: a stopped proof goes on with the next, and seeds may run beside each other before they are filed together.

    \b
    Examples
      polysense prove slip
      polysense prove clip --seed 0 --seed 1 --out docs/proofs
      polysense prove clip --seed 0 --anew
    """
    import sys

    from polysense.base.catalogue import card_of
    from polysense.cli.out import json_out, say

    card_of(id)
    from polysense.proofs.harness import prove as run_proof

    filed = run_proof(id, tuple(seed) if seed else (0, 1, 2), out, say=lambda line: print(line, file=sys.stderr, flush=True), anew=anew)
    if as_json:
        json_out(filed)
        return
    for name, gain in filed["gains"].items():
        within = "" if gain["low"] is None else f"  [{gain['low']:+.4g}, {gain['high']:+.4g}]"
        say(f"{id} against {name}: {gain['mean']:+.4g} {filed['metric']}{within}")
    say(f"{id} {'beats' if filed['beats_baseline'] else 'does not beat'} its baseline")
