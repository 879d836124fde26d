"""Scenes in a formal language, as commands that would draw them, and in one English sentence: two texts that say the same, so that either follows
from the other.

    put circle red striped large left top ; put star blue plain small somewhere ; on plain white
    a large striped red circle in the top left and a small blue star, on a plain white background
"""
from polysense.data.scenes.palette import BACKDROP_KINDS, TEXTURES
from polysense.data.scenes.say import a, enumerate_words, in_spot, noun, spot
from polysense.data.scenes.world import Scene, Thing

ENGLISH, PROGRAM = "in English:", "as a program:"        # what the other text is to be


def program(scene: Scene) -> str:
    """The commands, far things first."""
    return " ; ".join([*(f"put {t.shape} {t.colour} {TEXTURES[t.texture] or 'plain'} {t.size} {_place(t)}" for t in scene.things),
                       f"on {BACKDROP_KINDS[scene.backdrop.kind]} {scene.backdrop.colour}"])


def english(scene: Scene) -> str:
    """The sentence."""
    things = [f"{a(noun(t, size=True, texture=True))} {in_spot(t)}".strip() for t in scene.things]
    return f"{enumerate_words(things)}, on {a(f'{BACKDROP_KINDS[scene.backdrop.kind]} {scene.backdrop.colour}')} background"


def both_ways(scene: Scene) -> list[tuple[str, str]]:
    """(what is asked, its answer), from the program and from the sentence."""
    one, two = program(scene), english(scene)
    return [(f"{ENGLISH} {one}", two), (f"{PROGRAM} {two}", one)]


def _place(t: Thing) -> str:
    """The words of `spot` in the other order: `left top`, `bottom`, `centre`, or `somewhere` near a border between two places."""
    return " ".join(reversed(spot(t).split())) or "somewhere"
