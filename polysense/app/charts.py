"""Small line charts as inline SVG that takes its colours from the page, so that it is legible in light and dark."""
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

INK, LINES = "#010203", tuple(f"#0103{i:02x}" for i in range(1, 9))       # placeholders that CSS variables --line1 ... --line8 replace
SMOOTH = 0.06                                        # width of the moving average, as a share of the curve


def line_chart(series: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, size: tuple[float, float] = (6.4, 2.6), smooth: bool = False,
               log: bool = False, ylabel: str = "", marks: Sequence[tuple[float, str]] = ()) -> str:
    """An <svg> of lines {name: (x, y)}; `smooth` draws the moving average over the pale raw curve, `marks` are labelled vertical lines."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rc: Any = {"svg.fonttype": "none", "svg.hashsalt": "polysense", "font.size": 9, "font.family": "sans-serif", "text.color": INK,
                          "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.edgecolor": INK}
    with rc_context(rc):
        figure = Figure(size, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        figure.patch.set_alpha(0)
        axes.patch.set_alpha(0)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.8)
        for i, (name, (x, y)) in enumerate(series.items()):
            colour = LINES[i % len(LINES)]
            if smooth and len(y) > 20:
                axes.plot(x, y, color=colour, alpha=0.25, linewidth=0.8)
                axes.plot(x, moving_average(y), color=colour, linewidth=1.8, label=name)
            else:
                axes.plot(x, y, color=colour, linewidth=1.8, label=name, marker="o" if len(y) == 1 else None)
        for at, word in marks:
            axes.axvline(at, color=INK, alpha=0.4, linewidth=0.8, linestyle=":")
            axes.annotate(word, (at, 1), (3, -2), xycoords=("data", "axes fraction"), textcoords="offset points", va="top", fontsize=8)
        if log:
            axes.set_yscale("log")
        axes.set_xlabel("step")
        axes.set_ylabel(ylabel)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if not log:
            axes.set_ylim(bottom=min(0, *(min(y, default=0) for _, y in series.values())))
        if len(series) > 1:
            axes.legend(frameon=False, fontsize=8, labelcolor=INK)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    svg = out.getvalue()
    svg = svg[svg.index("<svg"):].replace(INK, "currentColor")
    for i, colour in enumerate(LINES, 1):
        svg = svg.replace(colour, f"var(--line{i})")
    return svg


def moving_average(values: Sequence[float]) -> np.ndarray:
    """The centred mean of a window of SMOOTH of the curve; at the ends of what there is of it."""
    width = max(3, int(len(values) * SMOOTH) | 1)
    ones = np.ones(width)
    return np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")
