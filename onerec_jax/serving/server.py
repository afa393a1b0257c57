"""The HTTP server: routes, limits, errors in one line, and how it starts and stops.

    GET  /                page to try it in a browser
    POST /v1/recommend    for a user of the data set, or for a history in the request
    GET  /v1/similar      items of like content
    GET  /v1/items        search by title; /v1/items/{id}: one item
    GET  /v1/users        ids; /v1/users/{id}: one history
    GET  /healthz /readyz /metrics /docs /openapi.json

Nothing that comes over the wire is unpickled, evaluated or used as a path.
"""

import asyncio
import contextlib
import pathlib
import signal
import socket
import threading
import time
from typing import Annotated

from onerec_jax.errors import InputError
from onerec_jax.serving import schemas
from onerec_jax.serving.batching import QueueFull
from onerec_jax.serving.config import HttpConfig
from onerec_jax.serving.questions import UnknownId
from onerec_jax.serving.reference import reference_page
from onerec_jax.serving.service import NotReady, Service

try:
    import uvicorn
    from fastapi import Body, FastAPI, Path, Query
    from fastapi.concurrency import run_in_threadpool
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import HTMLResponse, JSONResponse, Response
    from starlette.datastructures import MutableHeaders
    from starlette.exceptions import HTTPException
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ImportError as error:
    raise InputError('the server needs more packages: pip install -e ".[serve]"') from error

PAGE = pathlib.Path(__file__).with_name("page.html")
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; connect-src 'self'; img-src data:; "
    "style-src 'unsafe-inline'; script-src 'unsafe-inline'"
}
"""The pages load nothing and talk to no one else."""
LONG = 256
"""Actions from which a history is checked in another thread than the one that reads sockets."""


class Limits:
    """ASGI middleware: reads a body within its limits before the application sees it, and counts.

    While the server is about to stop, every answer closes its connection, so that no client sends
    its next request on one that is closed meanwhile.

    What is too large is read to its end (and thrown away), for a client that is still sending does
    not listen; a client that is too slow for that finds the connection closed.
    """

    def __init__(self, app, *, config: HttpConfig, service: Service):
        self.app, self.config, self.service = app, config, service

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        start, status = time.perf_counter(), 500  # unless an answer begins

        async def counted(message):
            nonlocal status
            status = message.get("status", status)
            if message["type"] == "http.response.start" and self.service.stopping:
                headers = MutableHeaders(scope=message)
                headers["Connection"] = "close"
            await send(message)

        try:
            error, body = await self._read(receive)
            if error is not None:
                return await error(scope, receive, counted)
            if body is None:
                status = 499  # the client is gone; nginx's number
                return

            async def replay():
                nonlocal body
                if body is None:
                    return await receive()
                message, body = {"type": "http.request", "body": body, "more_body": False}, None
                return message

            await self.app(scope, replay, counted)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            metrics = self.service.metrics
            metrics.requests.labels(route, status).inc()
            metrics.seconds.labels(route).observe(time.perf_counter() - start)

    async def _read(self, receive):
        """An answer that refuses, or the body; neither if the client is gone."""
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.config.read_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None, None
                    part = message.get("body", b"")
                    size += len(part)
                    if size <= self.config.max_body:
                        parts.append(part)
                    if not message.get("more_body"):
                        break
        except TimeoutError:
            line = f"the request did not arrive within {self.config.read_timeout_s:g} s"
            return refusal(408, line, {"Connection": "close"}), None
        if size > self.config.max_body:
            line = f"the body has {size} bytes: at most {self.config.max_body} are read"
            return refusal(413, line, {"Connection": "close"}), None
        return None, b"".join(parts)


def refusal(status: int, line: str, headers=None) -> JSONResponse:
    """An error as all routes give it."""
    # What came from outside may hold halves of characters, which no encoder takes.
    line = line.encode("utf-8", "backslashreplace").decode()
    return JSONResponse({"error": line}, status, headers)


def create_app(service: Service, config: HttpConfig = HttpConfig()) -> FastAPI:  # noqa: B008
    """The application; it answers 503 to most requests until the service is ready."""

    @contextlib.asynccontextmanager
    async def lifespan(app):
        yield
        # Uvicorn comes here when every request that it took is answered.
        await run_in_threadpool(service.close)

    app = FastAPI(
        title="onerec_jax",
        summary="Recommendations of one trained run",
        lifespan=lifespan,
        docs_url=None,  # FastAPI's pages load their scripts from elsewhere
        redoc_url=None,
        responses={
            status: {"model": schemas.Error, "description": what}
            for status, what in {
                400: "Not UTF-8, nested too deeply, or a number too long",
                408: "The request came too slowly",
                413: "The body is too large",
                422: "A value that cannot be",
                503: "Not ready, or overloaded: see Retry-After",
            }.items()
        },
    )
    app.add_middleware(Limits, config=config, service=service)
    unknown = {404: {"model": schemas.Error, "description": "Unknown id"}}
    request_model = schemas.request_models(service.config)
    Limit = Annotated[int, Query(ge=1, le=100)]
    Text = Annotated[str, Query(max_length=200)]

    @app.exception_handler(RequestValidationError)
    async def invalid(request, error):
        line = schemas.explain(error.errors()[0])
        if request.method == "POST" and "json" not in request.headers.get("content-type", ""):
            line += " (send it with Content-Type: application/json)"
        return refusal(422, line)

    @app.exception_handler(InputError)
    async def wrong(request, error):
        return refusal(404 if isinstance(error, UnknownId) else 422, str(error))

    @app.exception_handler(HTTPException)
    async def plain(request, error):
        line = str(error.detail)
        if error.status_code == 400 and "parsing the body" in line:  # FastAPI's words
            line = "the body is not UTF-8, nested too deeply, or has a number too long"
        return refusal(error.status_code, line, error.headers)

    @app.exception_handler(QueueFull)
    async def full(request, error):
        return refusal(503, str(error), {"Retry-After": str(error.retry_after_s)})

    @app.exception_handler(NotReady)
    async def not_ready(request, error):
        return refusal(503, str(error), {"Retry-After": "5"})

    @app.exception_handler(Exception)
    async def bug(request, error):
        return refusal(500, "the server failed on this request: its log says how")

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page():
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=PAGE_HEADERS)

    @app.get("/docs", response_class=HTMLResponse, include_in_schema=False)
    async def docs():
        return HTMLResponse(reference_page(app.openapi()), headers=PAGE_HEADERS)

    @app.get("/healthz", response_model=schemas.Status)
    async def health():
        """The process answers."""
        return {"status": "ok"}

    @app.get("/readyz", response_model=schemas.Status)
    async def ready():
        """The model is compiled, and the server is not about to stop."""
        service.ready()
        if service.stopping:
            raise NotReady("the server is about to stop")
        return {"status": "ready"}

    @app.get("/metrics", response_class=Response)
    async def metrics():
        """For Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.post("/v1/recommend", response_model=schemas.Recommendations, responses=unknown)
    async def recommend(body: Annotated[request_model, Body()]):
        """At most n items, the most probable first; fewer where the beams hold too few."""
        recommender = service.ready()
        history = getattr(body, "history", None)
        given = history is not None and len(history) >= LONG
        query = (
            await run_in_threadpool(query_of, service, recommender, body)
            if given
            else query_of(service, recommender, body)
        )
        future = asyncio.wrap_future(service.submit(query))
        try:
            items = await asyncio.wait_for(future, service.config.timeout_s)
        except TimeoutError:
            raise QueueFull(1) from None
        return {"items": items, "beam_width": query.beam_width, "step": recommender.step}

    @app.get("/v1/similar", response_model=schemas.Similar, responses=unknown)
    def similar(item_id: Text, n: Limit = 10):
        """Items whose content vectors, as their codes tell them, have the highest cosine."""
        catalogue = service.ready().catalogue
        row = catalogue.items.row(item_id)
        sids = catalogue.run.ids.sids
        items = [
            catalogue.describe(other)
            | {
                "cosine": float(cosine),
                "shared_levels": int((sids[row] == sids[other]).cumprod().sum()),
            }
            for other, cosine in zip(*catalogue.similar(row, n), strict=True)
        ]
        return {"item": catalogue.describe(row), "items": items}

    @app.get("/v1/items", response_model=schemas.Items)
    def items(query: Text = "", limit: Limit = 20):
        """Items whose title has all words, the most popular first."""
        catalogue = service.ready().catalogue
        return {"items": [catalogue.describe(row) for row in catalogue.search(query, limit)]}

    @app.get("/v1/items/{item_id:path}", response_model=schemas.Details, responses=unknown)
    def item(item_id: Annotated[str, Path(max_length=200)]):
        """One item."""
        catalogue = service.ready().catalogue
        return catalogue.details(catalogue.items.row(item_id))

    @app.get("/v1/users", response_model=schemas.Users)
    def users(prefix: Text = "", limit: Limit = 20):
        """Ids of users that begin so."""
        return {"users": service.ready().catalogue.users.like(prefix, limit)}

    @app.get("/v1/users/{user_id:path}", response_model=schemas.User, responses=unknown)
    def user(user_id: Annotated[str, Path(max_length=200)], limit: Limit = 20):
        """The latest actions of a user of the data set."""
        catalogue = service.ready().catalogue
        row = catalogue.users.row(user_id)
        history = catalogue.history(row)
        latest = [catalogue.describe(item) for item in history[::-1][:limit]]
        return {"user_id": catalogue.users[row], "actions": len(history), "history": latest}

    return app


def query_of(service: Service, recommender, body):
    """The checked query of a request."""
    history = getattr(body, "history", None)
    if history is not None:
        history = [
            x.model_dump(exclude_none=True) if isinstance(x, schemas.Action) else x for x in history
        ]
    return recommender.query(
        body.user_id if history is None else history,
        n=body.n,
        beam_width=service.width(body.beam_width, body.n),
        exclude=body.exclude_items,
        exclude_authors=body.exclude_authors,
        allowed=body.allowed_items,
        include_seen=body.include_seen,
        request_time_s=body.request_time_s,
    )


class Server(uvicorn.Server):
    """Uvicorn on a socket of its own, with a service that gets ready beside it."""

    def __init__(self, service: Service, config: HttpConfig, on_ready=lambda url: None):
        """`on_ready` is called once with the address, when requests are answered there."""
        self.service, self.http, self.failure = service, config, None
        self._on_ready = on_ready
        try:
            family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
            self.socket = socket.create_server((config.host, config.port), family=family)
        except (OSError, OverflowError) as error:
            raise InputError(
                f"--http.host {config.host} --http.port {config.port}: cannot listen there "
                f"({error}): choose another port"
            ) from error
        host, port = self.socket.getsockname()[:2]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        super().__init__(
            uvicorn.Config(
                create_app(service, config),
                http=type("Protocol", (_Protocol,), {"wait_s": config.read_timeout_s}),
                ws="none",
                access_log=False,
                log_config=None,  # warnings go where those of Python go
                log_level="warning",
                timeout_graceful_shutdown=config.stop_timeout_s,
            )
        )

    def handle_exit(self, number, frame) -> None:
        """Drains before it stops; a second signal does not wait."""
        if self.service.stopping:
            return super().handle_exit(number, frame)
        self.service.stopping = True
        threading.Timer(self.http.drain_s, super().handle_exit, (number, frame)).start()

    def run(self) -> None:
        """Until SIGTERM or SIGINT, then until what was taken is answered.

        Raises:
          InputError: the run folder cannot be served.
        """
        threading.Thread(target=self._start, name="start", daemon=True).start()
        before = {}
        if threading.current_thread() is threading.main_thread():
            # Uvicorn raises the signal that stopped it once more: an orderly stop is no failure.
            for number in (signal.SIGTERM, signal.SIGINT):
                before[number] = signal.signal(number, lambda *_: None)
        super().run([self.socket])
        for number, handler in before.items():
            signal.signal(number, handler)
        if self.failure is not None:
            raise self.failure

    def _start(self) -> None:
        try:
            self.service.start()
            self._on_ready(self.url)
        except Exception as error:
            self.failure, self.should_exit = error, True


class _Protocol(H11Protocol):
    """Drops connections whose next request does not begin: uvicorn waits for headers for ever."""

    wait_s = 10.0
    _silence = None

    def connection_made(self, transport):
        super().connection_made(transport)
        self._watch()

    def data_received(self, data):
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc):
        self._cancel()
        super().connection_lost(exc)

    def _watch(self):
        """Starts the clock with the first byte of a request's headers, stops it with the last."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._cancel()
        elif self._silence is None:
            self._silence = self.loop.call_later(self.wait_s, self.transport.close)

    def _cancel(self):
        if self._silence is not None:
            self._silence.cancel()
            self._silence = None
