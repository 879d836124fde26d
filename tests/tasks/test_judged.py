"""A language model as judge, played by a local endpoint that speaks OpenAI's protocol."""
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import pytest
import torch

from polysense.base.errors import UserError
from polysense.data import source
from polysense.tasks import take
from polysense.tasks.judged import GRADE, context, grades

TEST = "scenes:qa?n=6&size=16&objects=1"


@pytest.fixture()
def endpoint():
    """(address, requests seen, function of the messages that replies): grades what contains "right" 8 and everything else 2, the reference 4."""
    seen: list = []
    state = SimpleNamespace(reply=lambda m: ("4 8\nbetter" if "Assistant 2: right" in m[1]["content"] else "4 2\nworse") if m[0]["content"] == GRADE
                            else "a reference")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append(asked)
            body = json.dumps({"choices": [{"message": {"content": state.reply(asked["messages"])}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", seen, state
    server.shutdown()
    server.server_close()


def subject(say):
    system = SimpleNamespace(generate_text=lambda image, prompt, *, max_new: prompt)
    return SimpleNamespace(system=system, ask=lambda image, question, max_new: say(question), id="talker", device=torch.device("cpu"))


def test_grades_are_relative_to_the_reference(endpoint):
    url, seen, _ = endpoint
    said = iter(["right"] * 3 + ["wrong"] * 3)
    found = take("judged", subject(lambda q: next(said)), source(TEST), judge="some-model", url=url)
    assert found.value == pytest.approx(100 * (3 * 8 + 3 * 2) / (6 * 4)) and found.n == 6
    assert found.metrics["grade"].value == 5 and found.metrics["reference_grade"].value == 4 and found.metrics["relative"].low <= found.value
    assert len(seen) == 12 and all(a["model"] == "some-model" for a in seen) and found.notes["judge"] == "some-model"
    first = source(TEST)[0]
    asked = seen[1]["messages"][1]["content"]
    assert first["captions"][0] in asked and first["qa"][0][0] in asked and "Assistant 1: a reference" in asked
    assert not any(isinstance(m["content"], list) for a in seen for m in a["messages"]), "the judge sees no picture"


def test_the_datas_own_answers_can_be_the_reference(endpoint):
    url, seen, _ = endpoint
    take("judged", subject(lambda q: "right"), source(TEST), judge="m", url=url, reference="data", questions=2)
    assert len(seen) == 2 and f"Assistant 1: {source(TEST)[0]['qa'][0][1]}\n" in seen[0]["messages"][1]["content"]


def test_what_cannot_be_read_is_asked_for_again_then_left_out(endpoint):
    url, seen, state = endpoint
    replies = iter(["I would rather not.", "3 9", "no", "11 0", "5 5"])
    state.reply = lambda m: next(replies)
    found = take("judged", subject(lambda q: "x"), source(TEST), judge="m", url=url, reference="data", questions=3)
    assert found.n == 2 and len(seen) == 5 and len(found.notes["skipped"]) == 1 and "cannot be read" in found.notes["skipped"][0][1]
    state.reply = lambda m: "nothing"
    with pytest.raises(UserError, match=r"none of 2 answers could be graded.*cannot be read"):
        take("judged", subject(lambda q: "x"), source(TEST), judge="m", url=url, reference="data", questions=2)


@pytest.mark.parametrize("said, want", [("8 9\nbecause", (8, 9)), ("8, 9.5", (8, 9.5)), ("Assistant: 7 3", (7, 3)), ("seven three", None), ("", None),
                                        ("0 5", None), ("7\n8", None)])
def test_only_the_first_line_counts(said, want):
    assert grades(said) == want


def test_context_tells_captions_and_boxes():
    about = {"captions": ["a dog"], "boxes": [[0.1, 0.2, 0.5, 1.0]], "box_label": [1]}
    assert context(about, ("cat", "dog")) == "a dog\ndog: [0.100, 0.200, 0.500, 1.000]"


def test_what_is_missing_is_said(endpoint, monkeypatch):
    url, *_ = endpoint
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    for options, says in (({}, "no judge is named"), ({"judge": "m"}, "no language model is named"),
                          ({"judge": "m", "url": url, "reference": "x"}, 'it is "judge" or "data"')):
        with pytest.raises(UserError, match=says):
            take("judged", subject(lambda q: "x"), source(TEST), **options)
    with pytest.raises(UserError, match=r"no answer that can be read|refused"):
        take("judged", subject(lambda q: "x"), source(TEST), judge="m", url="http://127.0.0.1:9/v1")
