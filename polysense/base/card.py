"""What a system says about itself. Torch-free: read by the catalogue without importing the recipe."""
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Card:
    name: str
    paper: str
    arxiv: str | None = None
    year: int
    says: str                                # one sentence for a user
    needs: tuple[str, ...] = ()              # batch keys read in training; alternatives as "text|audio"
    can: tuple[str, ...] = ()                # capabilities, checked against protocols by the contract test
    official: str | None = None              # where the authors' code or weights live
    id: str = ""                             # the four below are filled in by the catalogue
    family: str = ""
    module: str = ""
    presets: tuple[str, ...] = ()
