"""Exams: what they ask of a system and of the data, and `take`, which sits one. Listing them imports no torch.

`take("zero_shot", subject, test)`; `take("linear_probe", subject, test, train, seed=1)`. A subject is a `Subject` of base/protocols.py
(a Pipeline is one); test and train are sources, or `Features` that `encode.encode_all_images` made of them, so that several exams share
one pass of the images.
"""
from __future__ import annotations

from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any

from polysense.base.errors import UserError
from polysense.base.protocols import fulfils

if TYPE_CHECKING:
    from polysense.tasks.result import Result


@dataclass(frozen=True)
class Exam:
    name: str
    module: str                              # whose `run` it is, or "module:function"
    asks: tuple[str, ...]                    # capabilities of the system
    needs: tuple[str, ...]                   # batch keys that the sources offer
    trains: str                              # what is done with a training source; "" where it takes none
    says: str
    reads: str = "features"                  # what it is given: the features that encode_image says of pictures, or the data themselves


EXAMS: dict[str, Exam] = {e.name: e for e in (
    Exam("zero_shot", "polysense.tasks.zero_shot", ("encode_image", "encode_text"), ("image", "label"), "",
         "classify pictures by the names of their classes, written into prompt templates"),
    Exam("retrieval", "polysense.tasks.retrieval", ("encode_image", "encode_text"), ("image", "text"), "",
         "find the captions of a picture among all captions, and the picture of a caption among all pictures"),
    Exam("sound_zero_shot", "polysense.tasks.sound_zero_shot", ("encode_audio", "encode_text"), ("audio", "label"), "",
         "classify sounds by the names of their classes, written into prompt templates", "sounds"),
    Exam("video_retrieval", "polysense.tasks.video_retrieval", ("encode_video", "encode_text"), ("video", "text"), "",
         "find the video of a caption among all videos, and the captions of a video among all captions", "videos"),
    Exam("views", "polysense.tasks.views", ("render_view",), ("origin", "direction", "rgb"), "",
         "render views that were not trained on: PSNR, SSIM, and the error of distances where they are known", "pictures"),
    Exam("reconstruction", "polysense.tasks.reconstruction", ("reconstruct",), ("image",), "",
         "draw pictures again: PSNR and SSIM, and how many of its codes a codec uses", "pictures"),
    Exam("detection", "polysense.tasks.detection", ("detect",), ("image", "boxes", "box_label"), "",
         "find things with their classes: average precision at an overlap of one half", "pictures"),
    Exam("clicks", "polysense.tasks.segmentation", ("segment",), ("image", "mask"), "",
         "outline things from 1, 3 and 5 simulated clicks, by overlap with the true mask", "pictures"),
    Exam("linear_probe", "polysense.tasks.linear_probe", ("encode_image",), ("image", "label"), "logistic regression",
         "logistic regression on frozen features, its strength chosen on a validation split"),
    Exam("knn_probe", "polysense.tasks.knn_probe", ("encode_image",), ("image", "label"), "a vote of the neighbours",
         "let the nearest training pictures vote on the class"),
    Exam("few_shot", "polysense.tasks.few_shot", ("encode_image",), ("image", "label"), "ridge regression",
         "learn from 1, 5 or 10 pictures a class by ridge regression on frozen features"),
    Exam("attentive_probe", "polysense.tasks.attentive_probe", ("encode_image",), ("image", "label"), "an attention over frozen patches",
         "a learned query over the frozen patches of a picture, and a linear layer", "pictures"),
    Exam("fine_tune", "polysense.tasks.fine_tune", ("encode_image",), ("image", "label"), "every weight, in a copy",
         "tune a copy of the image tower on labels, every weight of it", "pictures"),
    Exam("probes", "polysense.tasks.probes", ("encode_image",), ("image", "label"), "neighbours, linear, few-shot and attentive probe",
         "all probes on features computed once, beside the same encoder untrained", "pictures"),
    Exam("video_recognition", "polysense.tasks.video_recognition", ("classify_video",), ("video", "label"), "",
         "say what happens in videos, by the mean of several clips and crops of each: clips=5 crops=3", "videos"),
    Exam("video_linear_probe", "polysense.tasks.video_probes:linear", ("encode_video",), ("video", "label"), "logistic regression",
         "logistic regression on frozen features of videos, of one view of each or the mean of several", "videos"),
    Exam("video_knn_probe", "polysense.tasks.video_probes:neighbours", ("encode_video",), ("video", "label"), "a vote of the neighbours",
         "let the nearest training videos vote on the class", "videos"),
    Exam("judged", "polysense.tasks.judged", ("generate_text",), ("image", "question", "answer"), "",
         "answer questions about pictures, graded by a language model that is told in words what they show, relative to a reference", "pictures"),
    Exam("generation", "polysense.tasks.generation", ("sample_image",), ("image", "label"), "a small classifier whose features are compared",
         "how near pictures drawn without words come to real ones: Fréchet and kernel distance of a small classifier's features", "pictures"),
)}


def exams_for(system: Any) -> tuple[str, ...]:
    """Names of the exams that a system has the capabilities for."""
    return tuple(e.name for e in EXAMS.values() if all(fulfils(system, c) for c in e.asks))


def exam_of(name: str) -> Exam:
    """The exam of this name; an unknown one is refused with the list."""
    if name not in EXAMS:
        raise UserError(f"no exam {name!r}", f"the exams are {', '.join(EXAMS)}")
    return EXAMS[name]


def take(exam: str, subject: Any, test: Any, train: Any = None, **options: Any) -> Result:
    """Sit one exam. Options are the keyword arguments of the exam's `run` (seed, templates, k ...).

    Raises UserError where the system lacks a capability, the data lack labels or captions, training data are missing, or an option
    is unknown.
    """
    asked = exam_of(exam)
    missing = [c for c in asked.asks if not fulfils(subject.system, c)]
    if missing:
        able = exams_for(subject.system)
        raise UserError(f"{exam} asks for {' and '.join(missing)}, which {type(subject.system).__name__} cannot",
                        f"exams it can take: {', '.join(able)}" if able else "it can take none of the exams")
    for role, data in (("test", test), ("training", train)):
        if data is not None and (lacks := [k for k in asked.needs if k not in data.offers]):
            raise UserError(f"{exam} needs {' and '.join(lacks)}, which the {role} data {data.name!r} do not offer",
                            f"they offer {', '.join(data.offers)}")
    if asked.trains and train is None:
        raise UserError(f"{exam} needs training data as well", "give the training split of the same data")
    if asked.trains and (train is test or (hasattr(test, "split") and (test.name, test.split) == (train.name, getattr(train, "split", None)))):
        raise UserError(f"{exam} would be examined on what it learned from ({test.name!r})", "give another split for training")
    from importlib import import_module

    module, _, name = asked.module.partition(":")
    run = getattr(import_module(module), name or "run")
    known = [p.name for p in signature(run).parameters.values() if p.kind is p.KEYWORD_ONLY]
    if unknown := sorted(set(options) - set(known)):
        raise UserError(f"{exam} has no option {unknown[0]!r}", f"it has {', '.join(known)}")
    return run(subject, test, train, **options) if asked.trains else run(subject, test, **options)


__all__ = ["EXAMS", "Exam", "exam_of", "exams_for", "take"]
