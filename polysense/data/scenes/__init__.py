"""Rendered scenes: our own procedural source of pictures, words, boxes, masks, questions, edits, hints, clips and sounds."""
from polysense.data.scenes.source import ScenesSource, scenes_source

__all__ = ["ScenesSource", "scenes_source"]
