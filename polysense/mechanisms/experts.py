"""Tools of agents that need no trained system: arithmetic, printed text, faces; and how findings become text and numbers again."""
import ast
import operator
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from polysense.base.errors import UserError, need_extra

OPERATIONS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod, ast.Pow: operator.pow, ast.USub: operator.neg, ast.UAdd: operator.pos}
LARGEST, DEEPEST = 1e12, 200                 # of numbers, of characters of a sum


@dataclass(frozen=True)
class Found:
    """A thing in a picture: its name (or the words read there) and its box in pixels, x0 y0 x1 y1."""
    name: str
    box: tuple[int, int, int, int]


def calculate(text: str) -> str:
    """The value of the longest arithmetic expression in a text: numbers, + - * / // % **, brackets. Nothing is ever executed.

    Raises UserError where there is none, or it is too large.
    """
    spans = [s.strip() for s in re.findall(r"[-+*/%().,\d\s×÷]+", text)]
    spans = sorted((s for s in spans if re.search(r"\d", s)), key=len)
    if not spans:
        raise UserError(f"there is nothing to calculate in {text[:80]!r}", "write numbers and + - * /")
    plain = re.sub(r"(?<=\d),(?=\d{3}\b)", "", spans[-1].replace("×", "*").replace("÷", "/")).rstrip(".,+-*/% ")
    try:
        if len(plain) > DEEPEST:
            raise ValueError("it is too long")
        value = _value(ast.parse(plain.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError) as error:
        raise UserError(f"cannot calculate {plain[:80]!r}", str(error) or "write numbers and + - * /") from error
    return f"{plain.strip()} = {round(value, 6):.12g}"


def _value(node: ast.expr) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and not isinstance(node.value, bool):
        out: Any = node.value
    elif isinstance(node, ast.UnaryOp) and type(node.op) in OPERATIONS:
        out = OPERATIONS[type(node.op)](_value(node.operand))
    elif isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Pow) and abs(right) > 64:
            raise ValueError("the power is too high")
        out = OPERATIONS[type(node.op)](left, right)
    else:
        raise ValueError("only numbers and + - * / // % ** are read")
    if isinstance(out, complex) or not abs(out) <= LARGEST:
        raise ValueError("the number is too large, or none")
    return out


def no_tesseract() -> str:
    """Why text cannot be read here: "" where it can."""
    return "" if shutil.which("tesseract") else "the program tesseract is not installed (Debian: apt-get install tesseract-ocr)"


def read_text(path: str) -> list[Found]:
    """The lines of printed text in a picture, by tesseract, with their boxes. UserError where it is not installed or cannot read the file."""
    if why := no_tesseract():
        raise UserError("text cannot be read", why)
    done = subprocess.run(["tesseract", os.path.abspath(path), "stdout", "--psm", "11", "tsv"], capture_output=True, text=True, timeout=60,
                          check=False, env={**os.environ, "OMP_THREAD_LIMIT": "1"})
    if done.returncode:
        raise UserError(f"tesseract cannot read {path!r}", (done.stderr.strip().splitlines() or ["it gave no reason"])[-1])
    rows = [line.split("\t") for line in done.stdout.splitlines()[1:]]
    words = [r for r in rows if len(r) == 12 and r[11].strip() and float(r[10]) >= 0]
    lines: dict[tuple[str, ...], list[list[str]]] = {}
    for r in words:
        lines.setdefault(tuple(r[1:5]), []).append(r)
    out = []
    for line in lines.values():
        x, y, w, h = ([int(r[k]) for r in line] for k in (6, 7, 8, 9))
        box = min(x), min(y), max(a + b for a, b in zip(x, w, strict=True)), max(a + b for a, b in zip(y, h, strict=True))
        out.append(Found(" ".join(r[11] for r in line), box))
    return sorted(out, key=lambda f: (f.box[1], f.box[0]))


def no_faces() -> str:
    """Why faces cannot be found here: "" where they can."""
    try:
        cv2 = need_extra("cv2", "faces")
    except UserError as error:
        return error.advice
    return "" if hasattr(cv2, "CascadeClassifier") else "this OpenCV has no cascade classifiers: pip install 'opencv-python-headless<5'"


def find_faces(path: str) -> list[Found]:
    """Frontal faces, by OpenCV's Haar cascade (Viola & Jones 2001). Needs the extra `faces` (OpenCV 4)."""
    if why := no_faces():
        raise UserError("faces cannot be found", why)
    cv2 = need_extra("cv2", "faces")
    picture = cv2.imread(path, cv2.IMREAD_GRAYSCALE)
    if picture is None:
        raise UserError(f"cannot read the picture {path!r}", "is it a picture?")
    found = cv2.CascadeClassifier(cv2.data.haarcascades + "haarcascade_frontalface_default.xml").detectMultiScale(picture, 1.1, 5)
    return [Found("face", (int(x), int(y), int(x + w), int(y + h))) for x, y, w, h in found]


def serialised(found: Sequence[Found], of: str) -> str:
    """Findings as lines `name x0 y0 x1 y1` below a sentence that explains the numbers."""
    if not found:
        return f"no {of} found"
    lines = [f"{' '.join(f.name.split())} {' '.join(str(v) for v in f.box)}" for f in found]
    return "\n".join([f"{of}, one a line, each with its place in pixels: left top right bottom, counted from the left top corner", *lines])


def parsed(text: str) -> list[Found]:
    """The inverse of `serialised`; lines of other shape are passed over."""
    hits = (re.fullmatch(r"(.*\S) (-?\d+) (-?\d+) (-?\d+) (-?\d+)", line) for line in text.split("\n"))
    return [Found(m[1], (int(m[2]), int(m[3]), int(m[4]), int(m[5]))) for m in hits if m]
