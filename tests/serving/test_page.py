"""The page at `/`, in a real browser, over its debugging pipe: no driver and no package."""

import contextlib
import json
import os
import shutil
import subprocess
import time

import pytest

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium"
)


class Browser:
    """One tab of a headless Chromium, by the DevTools protocol: JSON messages that end in NUL."""

    def __init__(self, commands, answers):
        self._commands, self._answers, self._number, self._session = commands, answers, 0, {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._session = {"sessionId": session}
        self.complaints = []
        self.call("Runtime.enable")
        self.call("Log.enable")

    def call(self, method, **params):
        self._number += 1
        message = {"id": self._number, "method": method, "params": params, **self._session}
        self._commands.write(json.dumps(message).encode() + b"\0")
        self._commands.flush()
        while True:
            text = bytearray()
            while (byte := self._answers.read(1)) != b"\0":
                assert byte, "the browser is gone"
                text += byte
            answer = json.loads(text)
            if answer.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.complaints.append(answer["params"])
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def run(self, script):
        """The value of some JavaScript."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, script, value=True):
        limit = time.monotonic() + 30
        while (found := self.run(script)) != value:
            assert time.monotonic() < limit, (script, found, self.run("document.body.innerText"))
            time.sleep(0.02)

    def open(self, url):
        self.call("Page.navigate", url=url)
        self.wait(f"document.readyState == 'complete' && location.href.startsWith({url!r})")

    def texts(self, selector):
        return self.run(f"[...document.querySelectorAll({selector!r})].map(x => x.textContent)")

    def type(self, id, text):
        self.run(f"document.getElementById({id!r}).focus()")
        self.call("Input.insertText", text=text)

    def press(self, selector):
        self.run(f"document.querySelector({selector!r}).click()")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    (read_commands, commands), (answers, write_answers) = os.pipe(), os.pipe()
    # Chromium reads commands from file 3 and writes answers to file 4.
    redirected = f'exec "$@" 3<&{read_commands} 4>&{write_answers}'
    process = subprocess.Popen(
        [
            "bash", "-c", redirected, "bash",
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--no-first-run", "--remote-debugging-pipe", "--window-size=390,844",
            f"--user-data-dir={tmp_path_factory.mktemp('chromium')}",
        ],
        pass_fds=(read_commands, write_answers),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(read_commands)
    os.close(write_answers)
    with open(commands, "wb") as to, open(answers, "rb") as come:
        tab = Browser(to, come)
        yield tab
        tab._session = {}
        with contextlib.suppress(AssertionError):
            tab.call("Browser.close")
    process.wait(30)


@pytest.fixture
def page(browser, server):
    browser.complaints.clear()
    browser.open(f"{server.url}/")
    yield browser
    assert browser.complaints == []
    # A phone, upright: nothing sticks out to the side.
    assert browser.run("document.documentElement.scrollWidth <= window.innerWidth")


def test_a_user(page, server):
    page.type("user", "1")
    page.wait("[...document.querySelectorAll('#users option')].map(x => x.value).join()", "1")
    page.run("document.getElementById('user').dispatchEvent(new Event('change'))")
    page.wait("document.getElementById('status').textContent.includes('step 3')")
    wanted = server.client.post("/v1/recommend", json={"user_id": 1}).json()["items"]
    titles = [f"{place}. {item['title']}" for place, item in enumerate(wanted, 1)]
    assert page.texts("#list .title") == titles
    paths = [
        " › ".join(map(str, item["semantic_id"])) + f"  ·  {item['item_id']}" for item in wanted
    ]
    assert page.texts("#list .path") == paths
    assert page.texts("#list .score") == [f"log P {item['logp']:.2f} " for item in wanted]
    user = server.client.get("/v1/users/1").json()
    assert page.texts("#history .title") == [item["title"] for item in user["history"]]
    assert page.run("location.search") == "?user=1"
    page.press("#list button")
    page.wait("document.getElementById('heading').textContent.startsWith('Content like')")
    assert len(page.texts("#list .title")) == 20


def test_a_history_of_ones_own(page, server):
    """Markup in a title stays text."""
    page.type("query", "bold")
    page.wait("document.querySelectorAll('#found li').length", 1)
    assert page.texts("#found .title") == ["<b>Bold</b> & “quoted”"]
    page.press("#found button")
    page.wait("document.querySelectorAll('#list li').length", 10)
    page.type("query", "item 07")
    page.wait("document.querySelectorAll('#found li').length", 1)
    page.press("#found button")
    page.wait("document.querySelectorAll('#history li').length", 2)
    assert page.texts("#history .title") == ["Item 07", "<b>Bold</b> & “quoted”"]
    page.wait("document.getElementById('status').textContent.includes('step 3')")
    wanted = server.client.post("/v1/recommend", json={"history": [1, 7]}).json()["items"]
    titles = [f"{place}. {item['title']}" for place, item in enumerate(wanted, 1)]
    assert page.texts("#list .title") == titles
    assert page.run("location.search") == "?items=1,7"
    page.open(f"{server.url}/?items=1,7")  # the link shows the same
    page.wait("document.getElementById('status').textContent.includes('step 3')")
    assert page.texts("#list .title") == titles
    page.press("#history li:nth-child(1) button")
    page.wait("document.querySelectorAll('#history li').length", 1)
    assert page.texts("#history .title") == ["<b>Bold</b> & “quoted”"]
    page.press("#history button")
    page.wait("document.querySelectorAll('#list li').length", 0)


def test_what_goes_wrong_is_told(browser, server):
    browser.open(f"{server.url}/?user=%3Cimg%20src%3Dx%3E")
    browser.wait("document.getElementById('status').className", "error")
    assert browser.texts("#status") == ["the data set has no user '<img src=x>'"]
    assert browser.run("document.images.length") == 0


def test_nothing_comes_from_elsewhere(server):
    answer = server.client.get("/")
    assert "http:" not in answer.text.replace(server.url, "")
    assert "https:" not in answer.text
    assert "connect-src 'self'" in answer.headers["Content-Security-Policy"]
