"""polysense: the multimodal systems of the surveys, working, in one house. Importing it costs milliseconds (no torch)."""
from polysense.base.catalogue import catalogue, load
from polysense.base.errors import UserError

__version__ = "0.1.0"
__all__ = ["UserError", "__version__", "catalogue", "load", "open"]


def open(path, *, system: str | None = None, layout: str | None = None, device: str | None = None):
    """Open a run folder, an official checkpoint folder or a hub id as a Pipeline (files and strings in, answers out).

    See `polysense.pipeline.open_pipeline` for the arguments and errors.
    """
    from polysense.pipeline import open_pipeline

    return open_pipeline(path, system=system, layout=layout, device=device)
