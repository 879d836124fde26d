"""The one error a user is meant to read. Its message says what is wrong and what to do, in one line."""


class UserError(ValueError):
    """Something the user can mend: `UserError("no file photo.jpg", "check the path")`.

    The command line prints `str(error)` as one line and exits with 2; the library raises it as it is.
    """

    def __init__(self, what: str, advice: str = ""):
        self.what, self.advice = what.rstrip("."), advice.rstrip(".")
        super().__init__(f"{self.what}: {self.advice}" if self.advice else self.what)


def need_extra(module: str, extra: str):
    """Import an optional dependency or say how to install it."""
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError as error:
        raise UserError(f"this needs the package {module!r}, which cannot be imported ({error})",
                        f"install it with: pip install 'polysense[{extra}]'") from error
