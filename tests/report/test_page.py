"""The page: nothing hostile gets out of its text, nothing is loaded, and a real browser opens its folds."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import summarize_results
from opsd.evaluation.grading import ProblemGrade
from opsd.evaluation.names import result_path
from opsd.evaluation.results import problem_record, write_result
from tests.report.test_summarize import result

HOSTILE = (
    "</pre></details><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
)
TAGS = set(
    re.findall(r"\w+", "html head meta title style body h1 h2 h3 h4 p img div details summary pre code")
)
TAGS |= {"table", "thead", "tbody", "tr", "th", "td"}


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """Two methods on four problems, with markup in everything that a model, a file or a name can hold."""
    folder = tmp_path_factory.mktemp("page")
    for name, right in (("small_pwopsd", [True] * 2), ("small_opsd", [False] * 2)):
        stored = result("small", 1, [right] * 4, model_identity=HOSTILE[:30])
        stored["results"] = [
            problem_record(
                problem_id=index,
                problem=f"Problem {index} {HOSTILE}",
                ground_truth=HOSTILE,
                texts=[f"{HOSTILE}\x00\u202e\ud800 {'long ' * 3000}the end"] * 2,
                predicted=[HOSTILE, None],
                truncated=[False, True],
                tokens=[5, 900],
                grade=ProblemGrade(right, [[0], [1]], 0, right[0]),
            )
            for index in range(4)
        ]
        training = {"training_run": {"run_name": f"<b>{name}", "method": name[6:], "adapter_step": 100}}
        write_result(result_path(name, "small", 1, folder=folder), stored | training)
    path = folder / "report.html"
    flags = ["--compare", "pwopsd", "opsd", "--html", str(path), "--output", str(folder / "table.md")]
    assert summarize_results.main([f"{folder}/*.json", *flags]) == 0
    return path


class Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_no_markup_of_an_answer_is_markup_of_the_page(page):
    text = page.read_text("utf-8")
    reader = Reader()
    reader.feed(text)
    assert {tag for tag, _ in reader.tags} <= TAGS
    for tag, attributes in reader.tags:
        assert not [name for name in attributes if name.startswith("on") or name in ("href", "srcdoc")]
        if tag == "img":
            assert attributes["src"].startswith("data:image/svg+xml;base64,")
    assert "default-src 'none'" in text
    assert HOSTILE in reader.text, "the answer itself is shown"
    assert not any(sign in text for sign in ("\x00", "\u202e", "http://", "https://"))
    assert "characters left out" in reader.text
    assert reader.text.count("the end") == 4 * 2 * 2
    kinds = [attributes.get("class") for tag, attributes in reader.tags if tag == "details"]
    assert (kinds.count("problem"), kinds.count("sample")) == (4, 16)


@contextmanager
def browser(url: str) -> Iterator[tuple[Callable[..., Any], list[dict]]]:
    """Open a page in a headless Chromium; yield what sends it a DevTools command, and its events."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no Chromium is installed")
    (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()

    def use_pipes() -> None:
        # DevTools speaks on the descriptors 3 and 4.
        high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 10) for descriptor in (theirs_in, theirs_out)]
        os.dup2(high[0], 3)
        os.dup2(high[1], 4)

    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "about:blank"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([program, *flags], preexec_fn=use_pipes, close_fds=False, **quiet)
    os.close(theirs_in)
    os.close(theirs_out)
    events: list[dict] = []
    numbers = itertools.count(1)
    with os.fdopen(ours_in, "rb") as answers, os.fdopen(ours_out, "wb", buffering=0) as commands:

        def send(method: str, **params: Any) -> Any:
            number = next(numbers)
            address = {"sessionId": session} if session else {}
            command = {"id": number, "method": method, "params": params} | address
            commands.write(json.dumps(command).encode() + b"\0")
            while True:
                text = b"".join(itertools.takewhile(b"\0".__ne__, iter(lambda: answers.read(1), b"")))
                message = json.loads(text)
                if message.get("id") == number:
                    return message["result"]
                events.append(message)

        session = None
        try:
            target = send("Target.createTarget", url="about:blank")["targetId"]
            session = send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            send("Network.enable")
            send("Page.enable")
            send("Page.navigate", url=url)
            while not any(event.get("method") == "Page.loadEventFired" for event in events):
                send("Page.enable")
            yield send, events
        finally:
            process.kill()
            process.wait()


def test_a_browser_opens_every_fold_and_runs_nothing(page):
    with browser(page.as_uri()) as (send, events):

        def value(expression: str) -> Any:
            return send("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

        def click(selector: str) -> None:
            x, y = value(
                f"(() => {{ const one = document.querySelector({selector!r}); one.scrollIntoView();"
                "const box = one.getBoundingClientRect(); return [box.x + 5, box.y + 5] })()"
            )
            for kind in ("mousePressed", "mouseReleased"):
                send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

        assert value("[...document.images].every(image => image.complete && image.naturalWidth > 100)")
        assert value("document.querySelectorAll('details[open]').length") == 0
        click("details.problem > summary")
        click("details.problem details.sample > summary")
        assert value("document.querySelectorAll('details[open]').length") == 2
        assert value("document.querySelector('details.sample[open] pre').innerText").startswith(HOSTILE)
        assert (value("document.title"), value("document.scripts.length")) == ("Results", 0)
        asked = [e["params"]["request"] for e in events if e.get("method") == "Network.requestWillBeSent"]
        assert {request["url"].split(":")[0] for request in asked} == {"file", "data"}
        assert len([request for request in asked if request["url"].startswith("file")]) == 1
