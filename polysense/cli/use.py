"""index, search, label, encode: a trained system at work on a folder of pictures."""
from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from polysense.base.errors import UserError
from polysense.cli.learn import Device, Layout, System
from polysense.cli.systems import Json

Photos = Annotated[Path, typer.Argument(metavar="PHOTOS", help="A folder of pictures, searched at any depth.")]
Model = Annotated[str, typer.Option("-m", "--model", metavar="RUN", help="A run folder, or with --system and --layout a published checkpoint.")]


def index(photos: Photos, model: Model,
          out: Annotated[Path | None, typer.Option(metavar="DIR", help="Where the index lives.  [default: PHOTOS/.polysense-index]")] = None,
          system: System = None, layout: Layout = None, device: Device = None,
          ways: Annotated[bool, typer.Option("--ways", help="Also make now what --by sparse and --by late will ask for.")] = False,
          forget: Annotated[list[str] | None, typer.Option("--forget", metavar="PATH", help="Take pictures or folders out of the index "
                                                           "instead; may be given several times.")] = None,
          as_json: Json = False) -> None:
    """Make a folder of pictures searchable. Run it again at any time: only new and changed pictures are encoded.

    \b
    Examples
      polysense index ~/photos -m runs/clip
      polysense index ~/photos -m downloads/clip-vit-base-patch32 --system clip --layout hf --out b32.index
    """
    from polysense.app.index import NAME, open_index
    from polysense.cli.out import Bar, json_out, note, say

    place = out or photos / NAME
    if not photos.is_dir():
        raise UserError(f"no folder {str(photos)!r}", "check the path")
    pipeline = _open(model, system, layout, device)
    with open_index(place, pipeline) as made:
        if forget:
            gone = made.remove(forget)
            json_out({"removed": gone, "pictures": len(made)}) if as_json else say(f"{gone} pictures forgotten, {len(made)} left in {place}")
            return
        with Bar("indexing", "pictures") as bar:
            told = made.update(photos, pipeline, progress=bar)
        if ways:
            from polysense.app.ways import prepare_ways

            with Bar("other ways", "pictures") as bar:
                prepare_ways(made, pipeline, bar)
        count = len(made)
    if as_json:
        json_out({"index": str(place), "pictures": count, **told.to_json()})
        return
    say(f"{count} pictures in {place}: {told.added} new, {told.changed} changed, {told.removed} removed, {told.unchanged} unchanged")
    for path, reason in told.skipped[:5]:
        note(f"left out {path}: {reason}")
    if len(told.skipped) > 5:
        note(f"... and {len(told.skipped) - 5} more that could not be read")


def search(query: Annotated[str | None, typer.Argument(metavar="QUERY", help="What to look for, in words.", show_default=False)] = None,
           index: Annotated[Path, typer.Option(metavar="DIR", help="An index, or the folder of pictures that it was made of.")] = Path("."),
           image: Annotated[str | None, typer.Option(metavar="FILE", help="Look for pictures like this one instead.")] = None,
           audio: Annotated[str | None, typer.Option(metavar="FILE", help="Look for pictures that go with this sound instead.")] = None,
           video: Annotated[str | None, typer.Option(metavar="FILE", help="Look for pictures like this video instead.")] = None,
           depth: Annotated[str | None, typer.Option(metavar="FILE", help="Look for pictures that fit this map of distances (.npy in metres, "
                                                     "16-bit .png in millimetres) instead.")] = None,
           thermal: Annotated[str | None, typer.Option(metavar="FILE", help="Look for pictures that fit this heat picture instead.")] = None,
           count: Annotated[int, typer.Option("-k", "--count", metavar="N", min=1, help="How many pictures.")] = 10,
           by: Annotated[str, typer.Option(metavar="WAY", help="dense: one vector a picture; sparse: shared terms, which are shown; late: each word "
                                           "looks for its best patch; fused: all that the system can.")] = "dense",
           rerank: Annotated[int, typer.Option(metavar="N", min=0, help="Look at the N best once more, with a system that reads words and picture "
                                               "together.")] = 0,
           why: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the answer with heat-maps of what matched: .png .jpg .html")] = None,
           model: Annotated[str | None, typer.Option("-m", "--model", metavar="RUN", help="The model, if it has moved since indexing.")] = None,
           system: System = None, layout: Layout = None, device: Device = None, as_json: Json = False) -> None:
    """Search indexed pictures by words, by picture, or by a sound, video or map (systems with such a tower), and see why they were found.

    \b
    Examples
      polysense search "two dogs on grass" --index ~/photos
      polysense search "a red dress" --index ~/photos -k 20 --why answer.html
      polysense search --image holiday.jpg --index ~/photos --json
      polysense search --audio rain.wav --index ~/photos
      polysense search "a dog on grass" --index ~/photos --by fused --why answer.html
      polysense search "a red circle left of a square" --index ~/photos --rerank 32
    """
    from polysense.cli.out import Bar, json_out, note, say, table

    sensed = {"audio": audio, "video": video, "depth": depth, "thermal": thermal}
    if [query, image, *sensed.values()].count(None) != 5:
        raise UserError("search takes words, --image, --audio, --video, --depth or --thermal, one of them",
                        'for instance: polysense search "a red circle" --index PHOTOS')
    if query is not None and not query.strip():
        raise UserError("the query is empty", "say what to look for")
    if image is not None and "://" not in image and not Path(image).is_file():
        raise UserError(f"no file {image!r}", "check the path")
    from polysense.app.index import NAME, Index
    from polysense.app.search import search as ask
    from polysense.app.search import write_results

    place = index / NAME if (index / NAME).is_dir() else index
    with Index.open(place) as opened:
        name = model or opened.model
        if model is None and not (name and (Path(name).exists() or system)):
            raise UserError(f"the model {name!r} that made this index is not there", "say where it is with -m")
        pipeline = _open(name, system, layout, device)
        of = next((name for name, file in sensed.items() if file), "")
        asked = sensed[of] if of else (query if image is None else image if "://" in image else Path(image))
        with Bar(f"looking at pictures for {by} search", "pictures") as bar:
            hits = ask(opened, pipeline, asked, count, of=of, by=by, why=why is not None,
                       rerank=rerank, progress=bar)
    if why and hits:
        note(f"wrote {write_results(hits, why, query or str(asked))}")
    if as_json:
        json_out({"query": query, "image": image, **sensed, "index": str(place), "hits": [h.to_json() for h in hits]})
    elif hits:
        met = {h.rank: " ".join(f"{t} {a * b:.2f}" for t, a, b in h.terms[:4]) for h in hits}
        head = ("", "score", "terms", "picture") if any(met.values()) else ("", "score", "picture")
        table(head, [(h.rank, f"{h.score:.3f}", *([met[h.rank]] if "terms" in head else []), h.path) for h in hits], right=("", "score"))
    else:
        say("nothing found: the index is empty")


def label(photos: Photos,
          labels: Annotated[Path, typer.Option(metavar="FILE", help="A text file with one label a line.")],
          model: Model,
          out: Annotated[Path, typer.Option(metavar="FILE.csv", help="The table to write: path, label, probability.")] = Path("labels.csv"),
          top: Annotated[int, typer.Option(metavar="N", min=1, help="How many labels a picture.")] = 1,
          template: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="A sentence with {} for the label; several are averaged.  "
                                                             "[default: a photo of a {}.]")] = None,
          system: System = None, layout: Layout = None, device: Device = None, as_json: Json = False) -> None:
    """Give every picture of a folder the most fitting of your labels, without any training (zero-shot).

    \b
    Examples
      polysense label ~/photos --labels labels.txt -m runs/clip --out labels.csv
      polysense label ~/photos --labels labels.txt -m runs/clip --top 3 --template "a drawing of a {}."
    """
    from polysense.cli.out import Bar, json_out, note, say, table

    if not photos.is_dir():
        raise UserError(f"no folder {str(photos)!r}", "check the path")
    if not labels.is_file():
        raise UserError(f"no file {str(labels)!r}", "write one label a line into it")
    from polysense.app.label import label_folder
    from polysense.pipeline import TEMPLATES

    pipeline = _open(model, system, layout, device)
    with Bar("labelling", "pictures") as bar:
        told = label_folder(pipeline, photos, labels, out, templates=tuple(template or TEMPLATES), top=top, progress=bar)
    if as_json:
        json_out(told.to_json())
        return
    table(("label", "pictures"), told.counts.items(), right=("pictures",))
    say(f"{told.labelled} pictures in {told.out}" + (f" ({told.resumed} of them by an earlier, interrupted run)" if told.resumed else ""))
    for path, reason in told.skipped[:5]:
        note(f"left out {path}: {reason}")


def encode(photos: Annotated[Path, typer.Argument(metavar="PHOTOS|VIDEOS|SOUNDS|TEXTS",
                                              help="A folder of pictures, videos or sounds; one video or sound; a text file, one text a line.")],
           model: Model,
           out: Annotated[Path | None, typer.Option(metavar="FILE", help=".npz (arrays path, vector) or .parquet; of --tokens .npz or .json.  "
                                                    "[default: features.npz; of --tokens standard output]")] = None,
           tokens: Annotated[bool, typer.Option("--tokens", help="The numbers of an image codec's codes in place of features, as `polysense codes`"
                                                " writes them.")] = False,
           workers: Annotated[int, typer.Option(metavar="N", min=0, help="With Ray (extra `ray`): so many copies of the model; 0: without.")] = 0,
           of: Annotated[str, typer.Option("--of", metavar="KIND", help="Of a mixed folder: pictures, videos or sounds.")] = "",
           system: System = None, layout: Layout = None, device: Device = None, as_json: Json = False) -> None:
    """Write the features of many pictures, videos, sounds or texts into one file, for your own programs.

    \b
    Examples
      polysense encode ~/photos -m runs/clip --out features.npz
      polysense encode captions.txt -m runs/clip --out texts.npz
      polysense encode ~/videos -m runs/clip_frame_aggregation --out videos.npz
      polysense encode ~/recordings -m runs/imagebind --of sounds --out sounds.npz
      polysense encode ~/photos -m runs/clip --workers 8 --out features.parquet
      polysense encode photo.jpg --tokens -m runs/vq_vae --out ids.json
    """
    from polysense.cli.encoding import encode_file
    from polysense.cli.out import Bar, json_out, note, say

    if tokens:
        from polysense.cli.codes import codes

        if workers or of:
            raise UserError("--tokens goes without --workers and --of", "leave them out")
        return codes([photos], model, out, system, layout, device, as_json)
    with Bar("encoding") as bar:
        told = encode_file(photos, out or Path("features.npz"), lambda: _open(model, system, layout, device), (model, system, layout), workers, bar,
                           of=of)
    if as_json:
        json_out(told)
        return
    say(f"{told['encoded']} vectors of width {told['dim']} in {told['out']}")
    for path, reason in told["skipped"][:5]:
        note(f"left out {path}: {reason}")


def _open(model: str, system: str | None, layout: str | None, device: str | None) -> Any:
    import polysense

    return polysense.open(model, system=system, layout=layout, device=device)
