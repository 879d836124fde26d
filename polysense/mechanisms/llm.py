"""A language model behind an OpenAI-compatible address, as a planner of agents. Standard library only."""
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from polysense.base.agent import Message
from polysense.base.errors import UserError
from polysense.base.spec import Configured, Spec

MOST_BYTES = 4 << 20


class Endpoint(Configured):
    """`POST url/chat/completions`. The address and the key come from the configuration or from OPENAI_BASE_URL and OPENAI_API_KEY."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        model: str
        url: str = ""                        # such as http://localhost:8000/v1; "": $OPENAI_BASE_URL
        temperature: float = 0.0
        tokens: int = 512                    # of a reply
        timeout: float = 120.0               # seconds

    def __init__(self, c: Config):
        self.c = c

    def complete(self, messages: Sequence[Message]) -> str:
        """The model's next message. UserError where there is no address, no answer, or one that is not understood."""
        url = self.c.url or os.environ.get("OPENAI_BASE_URL", "")
        if not url.startswith(("http://", "https://")):
            raise UserError("no language model is named" if not url else f"{url!r} is no http address",
                            "give the address of an OpenAI-compatible server, or set OPENAI_BASE_URL")
        key = os.environ.get("OPENAI_API_KEY", "")
        asked = json.dumps({"model": self.c.model, "messages": list(messages), "temperature": self.c.temperature, "max_tokens": self.c.tokens})
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        try:
            with urlopen(Request(url.rstrip("/") + "/chat/completions", asked.encode(), headers), timeout=self.c.timeout) as reply:
                said = json.loads(reply.read(MOST_BYTES))
            text = said["choices"][0]["message"]["content"]
        except HTTPError as error:
            raise UserError(f"the language model at {url} refused ({error.code})", error.read(300).decode("utf-8", "replace")) from error
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            raise UserError(f"the language model at {url} gave no answer that can be read", f"{type(error).__name__}: {error}") from error
        if not isinstance(text, str):
            raise UserError(f"the language model at {url} gave no text", "is it a chat model?")
        return text
