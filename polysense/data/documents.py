"""Documents as pictures: each page of a PDF, drawn."""
from pathlib import Path
from typing import Any

from polysense.base.errors import UserError, need_extra

ENDING = ".pdf"
DPI = 150                                    # small print can be read, an A4 page is 1240 x 1754 pixels
MOST = 100                                   # pages that are drawn of one document


def pages(document: str | Path, folder: str | Path, dpi: int = DPI) -> list[str]:
    """Draws each page of a PDF into `folder`; the pictures' paths, which name the document and the page. Extra `pdf`.

    UserError for a file that is no PDF, has no pages or more than `MOST`, or is locked by a password.
    """
    pypdfium2: Any = need_extra("pypdfium2", "pdf")
    path, out = Path(document), list[str]()
    try:
        opened = pypdfium2.PdfDocument(path)
    except (pypdfium2.PdfiumError, OSError) as error:
        locked = "password" in str(error).lower()
        raise UserError(f"cannot read {str(document)!r} ({error})",
                        "take its password away first" if locked else "is it a whole PDF file?") from error
    try:
        if not 0 < len(opened) <= MOST:
            raise UserError(f"{str(document)!r} has {len(opened)} pages", f"give a PDF of 1 to {MOST} pages")
        for i in range(len(opened)):
            place = Path(folder) / f"{path.stem}-page-{i + 1}.png"
            opened[i].render(scale=dpi / 72).to_pil().save(place)
            out.append(str(place))
    finally:
        opened.close()
    return out
