"""Clips: one thing (or a pair) of a scene does something, and the caption says what."""
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from polysense.data.scenes.paint import backdrop_light, paint
from polysense.data.scenes.say import a, noun
from polysense.data.scenes.world import Scene, Thing

ACTIONS = ("moves left", "moves right", "moves up", "moves down", "turns clockwise", "turns anticlockwise", "grows", "shrinks", "bounces", "swap")
_SAID = {"moves left": ("moves to the left", "slides left"), "moves right": ("moves to the right", "slides right"),
         "moves up": ("moves up", "rises"), "moves down": ("moves down", "sinks"), "turns clockwise": ("turns clockwise", "rotates to the right"),
         "turns anticlockwise": ("turns anticlockwise", "rotates to the left"), "grows": ("grows", "gets bigger"),
         "shrinks": ("shrinks", "gets smaller"), "bounces": ("bounces", "jumps up and down")}
_ROUND = {"circle", "ring"}


@dataclass(frozen=True)
class Clip:
    """`at(t)` is the scene at time t in [0, 1]."""
    scene: Scene
    action: str                              # of ACTIONS
    captions: list[str]
    at: Callable[[float], Scene]


def _path(action: str, t: Thing, rng: np.random.Generator) -> tuple[Thing, Callable[[float], dict[str, float]]]:
    """Where the thing starts so that it stays in view, and its changed values over time."""
    edge = 1.16 * t.r + 0.005
    far = float(rng.uniform(0.35, 0.55)) if t.r < 0.2 else float(rng.uniform(0.28, 0.38))
    if action.startswith("moves"):
        axis, sign = ("x" if action in ("moves left", "moves right") else "y"), (1 if action in ("moves right", "moves down") else -1)
        low = float(rng.uniform(edge, 1 - edge - far))
        start = low if sign > 0 else low + far
        return replace(t, **{axis: start}), lambda u: {axis: start + sign * far * u}
    if action.startswith("turns"):
        sign = 1 if action == "turns clockwise" else -1           # the square looks the same after a quarter: stay below an eighth a frame
        turn = float(rng.uniform(1.2, 1.5))
        return t, lambda u: {"angle": t.angle + sign * turn * u}
    if action in ("grows", "shrinks"):
        small, big = float(rng.uniform(0.08, 0.1)), float(rng.uniform(0.2, 0.25))
        edge = 1.16 * big + 0.005
        here = replace(t, x=float(np.clip(t.x, edge, 1 - edge)), y=float(np.clip(t.y, edge, 1 - edge)), r=small if action == "grows" else big)
        return here, lambda u: {"r": small + (big - small) * (u if action == "grows" else 1 - u)}
    floor, high = 1 - edge, min(far, 1 - 2 * edge)                # bounces: twice, as a falling body
    return replace(t, y=floor), lambda u: {"y": floor - high * (1 - (2 * (2 * u % 1) - 1) ** 2)}


def animate(scene: Scene, rng: np.random.Generator, action: str = "") -> Clip:
    """A clip that starts from (nearly) this scene: an actor drawn by lot comes to the front and acts.

    `swap` needs two things; where the scene has one, or the asked action cannot be seen on it (a turning circle), another is drawn.
    """
    i = int(rng.integers(len(scene.things)))
    t = scene.things[i]
    others = [o for k, o in enumerate(scene.things) if k != i and (o.colour, o.shape) != (t.colour, t.shape)]
    able = [x for x in ACTIONS if not (x == "swap" and not others) and not (x.startswith("turns") and t.shape in _ROUND and t.texture == "plain")]
    action = action if action in able else able[rng.integers(len(able))]
    t = replace(t, z=0.05, seed=t.seed)
    if action == "swap":
        return _swap(scene, t, others[0])
    if action.startswith("turns") and t.size == "small":
        t = replace(t, size="medium", r=0.15, x=float(np.clip(t.x, 0.18, 0.82)), y=float(np.clip(t.y, 0.18, 0.82)))
    t, values = _path(action, t, rng)
    still = tuple(o for o in others if _apart(o, t, values))
    name = noun(t)
    said = [f"{a(name)} {way}" for way in _SAID[action]] + [f"the {name} {way}" for way in _SAID[action][:1]]
    if still:
        said.append(f"{a(name)} {_SAID[action][0]}, {a(noun(still[0]))} stays where it is")
    if action not in ("grows", "shrinks"):
        said.append(f"{a(noun(t, size=True, texture=True))} {_SAID[action][0]}")
    return Clip(replace(scene, things=(*still, t)), action, [said[k] for k in rng.permutation(len(said))],
                lambda u: replace(scene, things=(*still, replace(t, **values(u)))))  # type: ignore[arg-type]


def _apart(o: Thing, t: Thing, values: Callable[[float], dict[str, float]]) -> bool:
    """Whether the actor leaves most of `o` to be seen at all times."""
    track = [replace(t, **values(u)) for u in np.linspace(0, 1, 9)]  # type: ignore[arg-type]
    return all(np.hypot(o.x - p.x, o.y - p.y) > 0.75 * (o.r + p.r) for p in track)


def _swap(scene: Scene, one: Thing, two: Thing) -> Clip:
    """Both go round their middle by half a turn."""
    mx, my, dx, dy = (one.x + two.x) / 2, (one.y + two.y) / 2, (one.x - two.x) / 2, (one.y - two.y) / 2
    reach = max(one.r, two.r) * 1.16 + np.hypot(dx, dy) + 0.005
    if reach < 0.5:                                               # the whole round stays in view
        mx, my = np.clip(mx, reach, 1 - reach), np.clip(my, reach, 1 - reach)

    def at(u: float) -> Scene:
        c, s = np.cos(np.pi * u), np.sin(np.pi * u)
        x, y = c * dx - s * dy, c * dy + s * dx
        return replace(scene, things=(replace(two, x=float(mx - x), y=float(my - y)), replace(one, x=float(mx + x), y=float(my + y))))
    x, y = noun(one), noun(two)
    return Clip(at(0), "swap", [f"{a(x)} and {a(y)} swap places", f"the {x} and the {y} change places", f"{a(y)} and {a(x)} trade places"], at)


def film(clip: Clip, frames: int, size: int) -> np.ndarray:
    """uint8 [frames, size, size, 3]; the first frame is time 0, the last time 1."""
    empty = backdrop_light(clip.scene.backdrop, size)
    return np.stack([paint(clip.at(float(u)), size, empty).image for u in np.linspace(0, 1, frames)])
