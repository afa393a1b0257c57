"""The HTTP server: what it answers, what it refuses in one line, and what it survives."""

import asyncio
import concurrent.futures
import dataclasses
import html.parser
import http.client
import importlib
import json
import socket
import sys
import threading
import time

import httpx
import numpy as np
import pytest
import serving_world

from onerec_jax.distributed import fetch
from onerec_jax.errors import InputError
from onerec_jax.run import Run
from onerec_jax.serving.catalogue import publish
from onerec_jax.serving.config import HttpConfig, ServiceConfig
from onerec_jax.serving.server import create_app
from onerec_jax.serving.service import Service

SMALL = ServiceConfig(widths=(4,), users=(4,), max_n=4, max_history=50, wait_ms=2, poll_s=0.05)


def recommend(server, **body):
    return server.client.post("/v1/recommend", json=body)


def get(server, path, **query):
    return server.client.get(path, params=query)


# ---------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize(
    ("body", "history", "options"),
    [
        ({"user_id": 1}, 1, {}),
        ({"user_id": "1", "n": 3, "include_seen": True}, 1, {"n": 3, "include_seen": True}),
        ({"history": [], "beam_width": 5}, [], {}),
        ({"history": ["4", 9], "n": 2}, [4, 9], {"n": 2}),
        (
            {"history": [{"item_id": 4, "time_s": 5, "rating": 5}], "request_time_s": 99},
            [{"item_id": 4, "time_s": 5, "rating": 5}],
            {"request_time_s": 99},
        ),
        (
            {"history": [4], "exclude_items": [12, 10], "exclude_authors": ["a1"]},
            [4],
            {"exclude": [12, 10], "exclude_authors": ["a1"]},
        ),
        ({"history": [4], "allowed_items": [1, 2, 3, 12]}, [4], {"allowed": [1, 2, 3, 12]}),
    ],
)
def test_recommendations_are_those_of_python(server, recommender, body, history, options):
    """The narrow width serves n and beam_width up to 4, the wide one the rest."""
    answer = recommend(server, **body)
    assert answer.status_code == 200, answer.text
    wide = 12 if max(body.get("n", 10), body.get("beam_width", 4)) > 4 else 4
    query = recommender.query(history, **{"beam_width": wide, **options})
    batch = recommender.gather([query], 4, server.service.config.filter_size)
    ((rows, logp),) = recommender.lists([query], fetch(recommender.search(*batch, wide)))
    wanted = [recommender.catalogue.describe(row) for row in rows]
    items = answer.json()["items"]
    np.testing.assert_allclose([item.pop("logp") for item in items], logp, rtol=1e-5)
    assert items == wanted
    assert answer.json()["beam_width"] == wide
    assert answer.json()["step"] == 3


def test_items_users_and_likeness(server, recommender):
    catalogue = recommender.catalogue
    found = get(server, "/v1/items", query="item 1", limit=3).json()["items"]
    assert found == [catalogue.describe(row) for row in catalogue.search("item 1", 3)]
    assert len(get(server, "/v1/items").json()["items"]) == 20
    one = get(server, "/v1/items/1").json()
    assert (one["title"], one["author_id"]) == ("<b>Bold</b> & “quoted”", "a0")
    assert one["training_actions"] == recommender.run.popularity[1]

    alike = get(server, "/v1/similar", item_id="3", n=4).json()
    rows, cosine = catalogue.similar(3, 4)
    assert alike["item"] == catalogue.describe(3)
    assert [item["item_id"] for item in alike["items"]] == rows.tolist()
    np.testing.assert_allclose([item["cosine"] for item in alike["items"]], cosine, rtol=1e-6)
    for item in alike["items"]:
        equal = np.equal(item["semantic_id"], alike["item"]["semantic_id"]).tolist()
        assert item["shared_levels"] == (equal + [False]).index(False)

    assert get(server, "/v1/users", prefix="3").json() == {"users": [3]}
    user = get(server, "/v1/users/2", limit=3).json()
    history = catalogue.history(2)
    assert user["actions"] == len(history)
    assert [item["item_id"] for item in user["history"]] == history[::-1][:3].tolist()


def test_requests_at_once_get_what_each_gets_alone(server):
    bodies = [{"user_id": i % 7, "n": 1 + i % 9} for i in range(40)]
    bodies += [{"history": [i % 30, 3], "n": 2} for i in range(40)]
    alone = [recommend(server, **body).json() for body in bodies]
    before = batches(server)
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda body: recommend(server, **body).json(), bodies))
    assert batches(server) - before < 80  # some shared a batch
    for one, other in zip(alone, together, strict=True):
        assert [x["item_id"] for x in one["items"]] == [x["item_id"] for x in other["items"]]
        for x, y in zip(one["items"], other["items"], strict=True):
            assert x["logp"] == pytest.approx(y["logp"], rel=1e-5)


def test_docs_name_every_operation_and_schema_and_load_nothing(server):
    answer, openapi = get(server, "/docs"), get(server, "/openapi.json").json()
    assert answer.headers["Content-Type"].startswith("text/html")
    found = Outline()
    found.feed(answer.text)
    operations = [
        f"{method.upper()} {path}"
        for path, methods in openapi["paths"].items()
        for method in methods
    ]
    assert len(operations) == 9
    assert found.texts["code"] == operations
    assert set(openapi["components"]["schemas"]) == found.ids
    assert {link for link in found.links if link.startswith("#")} <= {f"#{x}" for x in found.ids}
    assert "#Error" in found.links
    assert not {"script", "link", "img", "iframe"} & found.tags
    assert "http" not in "".join(found.links)


class Outline(html.parser.HTMLParser):
    """Tags, ids, links, and the text of each kind of tag."""

    def __init__(self):
        super().__init__()
        self.tags, self.ids, self.links, self.texts = set(), set(), [], {}

    def handle_starttag(self, tag, attrs):
        attrs, self.last = dict(attrs), tag
        self.tags.add(tag)
        self.ids |= {attrs["id"]} if "id" in attrs else set()
        self.links += [attrs[name] for name in ("href", "src") if name in attrs]

    def handle_data(self, data):
        self.texts.setdefault(self.last, []).append(data)

    def handle_endtag(self, tag):
        self.last = None


def values(server) -> dict[str, float]:
    lines = get(server, "/metrics").text.splitlines()
    return {
        name: float(value)
        for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    }


def batches(server):
    return values(server)["onerec_batch_users_count"]


def test_metrics(server):
    before = values(server)
    recommend(server, user_id=1, n=3)
    recommend(server, user_id="nobody")
    after = values(server)

    def more(name):
        return after[name] - before.get(name, 0)

    assert more('onerec_requests_total{route="/v1/recommend",status="200"}') == 1
    assert more('onerec_requests_total{route="/v1/recommend",status="404"}') == 1
    assert more('onerec_request_seconds_count{route="/v1/recommend"}') == 2
    for stage in ("queue", "gather", "wait", "search", "lists"):
        assert more(f'onerec_stage_seconds_count{{stage="{stage}"}}') == 1
    assert more("onerec_batch_users_sum") == 1
    assert after["onerec_queue_length"] == 0
    assert after["onerec_model_step"] == 3
    assert after["process_resident_memory_bytes"] > 1e7


# --------------------------------------------------------------------------------------- refusals


def refused(answer, status, words):
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert list(answer.json()) == ["error"]
    assert words in error
    assert "\n" not in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({}, 422, "give a user_id or a history"),
        ({"user_id": "nobody"}, 404, "no user 'nobody'"),
        ({"user_id": 10**25}, 404, "no user"),
        ({"user_id": "x" * 201}, 422, "at most 200"),
        ({"user_id": None}, 422, "user_id"),
        ({"user_id": True}, 422, "user_id"),
        ({"user_id": 1, "history": [1]}, 422, "a user_id or a history, not both"),
        ({"history": [999]}, 404, "no item '999'"),
        ({"history": "1,2"}, 422, "list"),
        ({"history": [[1]]}, 422, "history"),
        ({"history": [1] * 51}, 422, "at most 50 items"),
        ({"history": [{"item_id": 1, "stars": 5}]}, 422, "body.history.0.stars: Extra inputs"),
        ({"history": [{"item_id": 1, "follow": 1}]}, 422, "follow: the model knows"),
        ({"history": [{"item_id": 1, "like": 2}]}, 422, "like"),
        ({"history": [{"item_id": 1, "time_s": 5}, 2]}, 422, "no time_s"),
        ({"user_id": 1, "n": 0}, 422, "n: "),
        ({"user_id": 1, "n": -1}, 422, "n: "),
        ({"user_id": 1, "n": 10**9}, 422, "less than or equal to 10"),
        ({"user_id": 1, "n": "3"}, 422, "n: "),
        ({"user_id": 1, "n": 2.5}, 422, "n: "),
        ({"user_id": 1, "beam_width": 0}, 422, "beam_width"),
        ({"user_id": 1, "beam_width": -1}, 422, "beam_width"),
        ({"user_id": 1, "beam_width": 10**9}, 422, "less than or equal to 12"),
        ({"user_id": 1, "exclude_items": [999]}, 404, "no item '999'"),
        ({"user_id": 1, "exclude_authors": ["me"]}, 404, "no author 'me'"),
        ({"user_id": 1, "allowed_items": []}, 422, "at least 1"),
        ({"user_id": 1, "include_seen": 1}, 422, "include_seen"),
        ({"user_id": 1, "request_time_s": -1}, 422, "request_time_s"),
        ({"user_id": 1, "width": 9}, 422, "width: Extra inputs"),
        ([], 422, "body"),
        ("text", 422, "body"),
        (None, 422, "body"),
    ],
)
def test_bad_requests(server, body, status, words):
    refused(server.client.post("/v1/recommend", json=body), status, words)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 422),
        (b'{"user_id": "\\ud800"}', 422),
        (b"{", 422),
        (b"\xff\xfe{}", 422),
        (b'{"user_id": "\xc3\x28"}', 400),
        (b"[" * 100_000, 400),
        (b'{"user_id": 1, "n": ' + b"9" * 5000 + b"}", 400),
        (b'{"user_id": 1, "n": NaN}', 422),
        (b'{"user_id": 1, "n": 1e999}', 422),
        (b'{"history": [' + b"1," * 400_000 + b"1]}", 422),
        (b'{"user_id": "' + b"x" * 10_000_000 + b'"}', 413),
    ],
)
def test_bad_bodies(server, body, status):
    headers = {"Content-Type": "application/json"}
    refused(server.client.post("/v1/recommend", content=body, headers=headers), status, "")
    assert get(server, "/healthz").json() == {"status": "ok"}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"user_id": 1', "the body is no JSON: Expecting ',' delimiter at character 13"),
        (b'{"user_id": "\xc3\x28"}', "the body is not UTF-8"),
    ],
)
def test_what_cannot_be_read_is_said(server, body, words):
    answer = server.client.post(
        "/v1/recommend", content=body, headers={"Content-Type": "application/json"}
    )
    assert answer.json()["error"].startswith(words)


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("/v1/items/999", 404, "no item '999'"),
        ("/v1/items/a/b%00%ff", 404, "no item"),
        ("/v1/items?limit=0", 422, "limit"),
        ("/v1/items?limit=1e9", 422, "limit"),
        ("/v1/items?query=" + "x" * 201, 422, "query"),
        ("/v1/similar", 422, "item_id"),
        ("/v1/similar?item_id=zzz", 404, "no item 'zzz'"),
        ("/v1/similar?item_id=1&n=-1", 422, "n: "),
        ("/v1/users/99", 404, "no user '99'"),
        ("/v1/nothing", 404, "Not Found"),
        ("/v1/recommend", 405, "Method Not Allowed"),
        ("/../../etc/passwd", 404, "Not Found"),
    ],
)
def test_bad_paths(server, path, status, words):
    refused(server.client.get(path), status, words)


def test_before_it_is_ready(served):
    """Alive, not ready, and no request is let in."""
    service = Service(served, SMALL)
    transport = httpx.ASGITransport(create_app(service))

    async def ask():
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            assert (await client.get("/healthz")).status_code == 200
            assert (await client.get("/metrics")).status_code == 200
            for answer in (
                await client.get("/readyz"),
                await client.post("/v1/recommend", json={"user_id": 1}),
                await client.get("/v1/items/1"),
            ):
                refused(answer, 503, "being compiled")
                assert int(answer.headers["Retry-After"]) > 0

    asyncio.run(ask())
    service.close()


# ----------------------------------------------------------------------------------- slow clients


def connect(server):
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def test_slow_clients_hold_nobody_up(served):
    with serving_world.running(served, SMALL, HttpConfig(port=0, read_timeout_s=0.5)) as server:
        sockets = [connect(server) for _ in range(50)]
        head = b"POST /v1/recommend HTTP/1.1\r\nHost: x\r\n"
        silent, slow_head, slow_body = sockets[:16], sockets[16:32], sockets[32:]
        for one in slow_head:
            one.sendall(head)
        for one in slow_body:
            one.sendall(head + b'Content-Length: 99\r\n\r\n{"user_id"')
        start = time.monotonic()
        assert recommend(server, user_id=1, n=2).status_code == 200
        assert time.monotonic() - start < 10
        for one in silent + slow_head:
            assert one.recv(1000) == b""
        for one in slow_body:
            answer = b"".join(iter(lambda one=one: one.recv(1000), b""))
            assert answer.startswith(b"HTTP/1.1 408"), answer
            assert b"did not arrive within 0.5 s" in answer
        gone = connect(server)  # who hangs up in the middle is no failure
        gone.sendall(head + b'Content-Length: 99\r\n\r\n{"user_id"')
        gone.close()
        assert recommend(server, user_id=1, n=2).status_code == 200


# --------------------------------------------------------------------- overload, reload, shutdown


class Gate:
    """Holds the batches of a server until it is opened."""

    def __init__(self, server):
        self.opened, self.held, self.users = threading.Event(), threading.Event(), 0
        answer = server.service.batcher._answer

        def hold(entries):
            self.users += len(entries)  # of both threads
            self.held.set()
            assert self.opened.wait(60)
            return answer(entries)

        server.service.batcher._answer = hold


def wait_for(condition, seconds=60):
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.005)


def test_overload_is_told_and_passes(served):
    config = ServiceConfig(**{**vars(SMALL), "max_queue": 5, "users": (1,)})
    with (
        serving_world.running(served, config) as server,
        concurrent.futures.ThreadPoolExecutor(9) as pool,
    ):
        gate = Gate(server)
        first = [pool.submit(recommend, server, user_id=0, n=2) for _ in range(2)]
        wait_for(lambda: gate.users == 2)
        waiting = [pool.submit(recommend, server, user_id=i, n=2) for i in range(1, 6)]
        wait_for(lambda: len(server.service.batcher) == 5)
        assert values(server)["onerec_queue_length"] == 5
        for _ in range(3):
            answer = recommend(server, user_id=6, n=2)
            refused(answer, 503, "too many requests are waiting")
            assert int(answer.headers["Retry-After"]) >= 1
        gate.opened.set()
        answers = [future.result(60) for future in first + waiting]
        assert [answer.status_code for answer in answers] == [200] * 7
        assert recommend(server, user_id=6, n=2).status_code == 200

        gate.opened.clear()  # the model hangs: who waits is told so, and taken from the queue
        server.service.config = dataclasses.replace(config, timeout_s=0.5)
        late = [pool.submit(recommend, server, user_id=i, n=2) for i in range(2)]
        for future in late:
            refused(future.result(60), 503, "try again in 1 s")
        server.service.config = config
        gate.opened.set()
        wait_for(lambda: len(server.service.batcher) == 0)
        assert recommend(server, user_id=6, n=2).status_code == 200


def test_a_newer_checkpoint_and_a_newer_catalogue_fail_no_request(copied, tmp_path):
    config = ServiceConfig(**{**vars(SMALL), "users": (1, 4)})  # batches of both sizes
    with serving_world.running(copied, config) as server:
        stop, answers = threading.Event(), []

        def ask(user):
            with httpx.Client(base_url=server.url, timeout=60) as client:
                while not stop.is_set():
                    answer = client.post("/v1/recommend", json={"user_id": user, "n": 3})
                    answers.append((answer.status_code, answer.json().get("step")))
                    time.sleep(0.01)

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        try:
            run = Run.open(copied)
            serving_world.save_checkpoint(run, 4, seed=1)
            wait_for(lambda: (200, 4) in answers)

            publish(copied, *serving_world.grow(tmp_path / "grown", run, new_ids=False))
            new = f"/v1/items/{100 + serving_world.ITEMS - 1}"
            wait_for(lambda: get(server, new).status_code == 200)

            # What cannot be served is told, and the old model goes on.
            texts = (copied / "catalogue.json").read_text()
            (copied / "catalogue.json").write_text(texts.replace("ids", "nowhere"))
            wait_for(lambda: values(server)['onerec_reloads_total{result="failed"}'] == 1)
            complaint = "still serving step 4: "
            wait_for(lambda: any(line.startswith(complaint) for line in server.said))
            (copied / "catalogue.json").write_text(texts)
            serving_world.save_checkpoint(run, 5, seed=2)
            wait_for(lambda: (200, 5) in answers)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert {status for status, _ in answers} == {200}
        steps = [step for _, step in answers]
        assert sorted(set(steps)) == [3, 4, 5]
        assert values(server)['onerec_reloads_total{result="loaded"}'] == 3
        recommend(server, user_id=1, n=2)
        wait_for(lambda: values(server)['onerec_unmasked_ids_total{exists="true"}'] > 0)


def test_while_draining_every_answer_closes_its_connection(server, monkeypatch):
    """So that a client that keeps connections finds out before it sends the next request."""
    body = b'{"user_id": 1, "n": 2}'
    requests = [
        b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /v1/nothing HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /v1/recommend HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(body), body),
    ]
    sockets = [connect(server) for _ in requests]
    for one, request in zip(sockets, requests, strict=True):
        answer = http.client.HTTPResponse(one)
        one.sendall(request)
        answer.begin()
        assert answer.getheader("Connection") is None
        assert answer.read()
    monkeypatch.setattr(server.service, "stopping", True)
    for one, request in zip(sockets, requests, strict=True):
        one.sendall(request)  # on the connection that was kept
        answer = b"".join(iter(lambda one=one: one.recv(1000), b""))  # to its end
        head, _, content = answer.partition(b"\r\n\r\n")
        assert b"connection: close" in head.lower()
        assert json.loads(content)
        one.close()


def test_stopping_answers_what_was_taken(served):
    with (
        serving_world.running(served, SMALL) as server,
        concurrent.futures.ThreadPoolExecutor(8) as pool,
    ):
        gate = Gate(server)
        futures = [pool.submit(recommend, server, user_id=i % 7, n=2) for i in range(8)]
        assert gate.held.wait(60)
        wait_for(lambda: gate.users + len(server.service.batcher) == 8)
        server.should_exit = True
        time.sleep(0.3)
        gate.opened.set()
        assert [future.result(60).status_code for future in futures] == [200] * 8
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.url)


def test_without_the_extra_packages(monkeypatch):
    for package, module in (
        ("fastapi", "server"),
        ("pydantic", "schemas"),
        ("prometheus_client", "metrics"),
    ):
        with monkeypatch.context() as patch:
            for name in ("schemas", "server", "metrics", "service"):
                patch.delitem(sys.modules, f"onerec_jax.serving.{name}")
            patch.setitem(sys.modules, package, None)
            with pytest.raises(InputError) as error:
                importlib.import_module(f"onerec_jax.serving.{module}")
            assert 'pip install -e ".[serve]"' in str(error.value)
