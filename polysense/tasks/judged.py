"""A language model as the judge of answers about pictures (Liu et al. 2023, LLaVA, section 5.1; LLaVA-Bench).

The judge never sees a picture: it is given what is known of it in words (captions, boxes) and two answers to a question, a reference and the
system's, and grades both from 1 to 10. The result is relative: 100 times the mean grade of the system over that of the reference.
"""
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from polysense.base.errors import UserError
from polysense.base.spec import from_dict
from polysense.data.sources import BadSample
from polysense.tasks.encode import Progress, name_of
from polysense.tasks.result import Result, mean_of, metric

GRADES = re.compile(r"^\D*(\d+(?:\.\d+)?)\D+(\d+(?:\.\d+)?)")
ANSWER = "You are told in words what a picture shows. Answer the question about it as if you saw it, in a word or a few sentences as it asks."
GRADE = ("You are told in words what a picture shows, a question about it, and the answers of two assistants. Grade both answers by how helpful, "
         "relevant, correct and detailed they are, each from 1 to 10, the higher the better, whatever their order. Write the two grades on the "
         "first line, separated by a space, nothing else; explain them below it.")


def context(about: dict[str, Any], classes: Sequence[str] = ()) -> str:
    """What is known of a picture, in lines: its captions, then each box with its class as x0 y0 x1 y1 in [0,1]."""
    lines = [str(c) for c in about.get("captions") or ()]
    for box, kind in zip(about.get("boxes", ()), about.get("box_label", ()), strict=False):
        name = classes[int(kind)] if 0 <= int(kind) < len(classes) else "thing"
        lines.append(f"{name}: [{', '.join(f'{float(v):.3f}' for v in box)}]")
    return "\n".join(lines)


def grades(said: str) -> tuple[float, float] | None:
    """The two numbers on the first line of a judgement; None where there are none, or not from 1 to 10."""
    found = GRADES.match(said.strip().split("\n", 1)[0])
    pair = (float(found[1]), float(found[2])) if found else (0.0, 0.0)
    return pair if all(1 <= g <= 10 for g in pair) else None


def told(judge: Any, system: str, text: str) -> str:
    return str(judge.complete([{"role": "system", "content": system}, {"role": "user", "content": text}]))


def graded(judge: Any, known: str, question: str, reference: str, answer: str, tries: int = 2) -> tuple[float, float] | None:
    """Grades of (reference, answer); a judgement that cannot be read is asked for again, `tries` times in all."""
    text = f"The picture:\n{known}\n\nQuestion: {question}\n\nAssistant 1: {reference}\n\nAssistant 2: {answer}"
    for _ in range(tries):
        if (pair := grades(told(judge, GRADE, text))) is not None:
            return pair
    return None


def run(subject: Any, test: Any, *, judge: Any = "", url: str = "", reference: str = "judge", questions: int = 60, max_new: int = 256,
        seed: int = 0, progress: Progress | None = None) -> Result:
    """Grades of the answers to the first question of each of the first `questions` samples.

    judge: the name of a model behind an OpenAI-compatible address (`url`, or OPENAI_BASE_URL), or anything with `complete(messages)`.
    reference: "judge", the judge answers from the words alone (as the paper's text-only GPT-4), or "data", the answers of the data. Raises
    UserError where no judge is named, the data tell nothing of the pictures, or no judgement can be read.
    """
    if reference not in ("judge", "data"):
        raise UserError(f"reference={reference!r}", 'it is "judge" or "data"')
    if not hasattr(subject, "ask"):
        raise UserError("this exam asks questions about pictures", "give it a system opened with polysense.open")
    if isinstance(judge, str):
        if not judge:
            raise UserError("no judge is named", "say judge=MODEL, and url=... or OPENAI_BASE_URL where it is served")
        judge = from_dict({"is": "polysense.mechanisms.llm:Endpoint.Config", "model": judge, "url": url}).build()
    found: list[tuple[float, float]] = []
    skipped: list[tuple[str, str]] = []
    n = min(questions, len(test))
    for i in range(n):
        try:
            sample = test[i]
        except BadSample as error:
            skipped.append((test.id(i), str(error)))
            continue
        known, asked = context(sample, test.classes or ()), sample.get("qa") or [(sample["question"], sample["answer"])]
        if not known:
            skipped.append((test.id(i), "nothing is known of the picture in words"))
            continue
        question, true = asked[0]
        said = subject.ask(sample["image"], str(question), max_new=max_new)
        wanted = str(true) if reference == "data" else told(judge, ANSWER, f"The picture:\n{known}\n\nQuestion: {question}")
        pair = graded(judge, known, str(question), wanted, said)
        if pair is None:
            skipped.append((test.id(i), "the judge's grades cannot be read"))
        else:
            found.append(pair)
        if progress:
            progress(i + 1, n)
    if not found:
        raise UserError(f"none of {n} answers could be graded", skipped[0][1] if skipped else "there are no questions")
    theirs, ours = np.array(found).T
    return Result("judged", name_of(subject), test.name, len(found), {
        "relative": metric(lambda w: 100 * (w @ ours) / (w @ theirs), len(found), seed=seed),
        "grade": metric(mean_of(ours), len(found), seed=seed), "reference_grade": metric(mean_of(theirs), len(found), seed=seed)},
        notes={"judge": getattr(getattr(judge, "c", None), "model", type(judge).__name__), "reference": reference, "skipped": skipped})
