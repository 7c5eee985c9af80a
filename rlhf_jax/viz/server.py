"""The page's server: static files, a trace, the playground and an OpenAI-compatible API, by a fixed table of routes.

It is for one person on this machine. It answers requests to 127.0.0.1 or localhost only; a POST must come from the page
itself or carry the token of this launch; bodies have a limit; one text is written at a time, and a client that leaves
ends its own. Every response forbids scripts, styles and connections that are not the server's own.
"""

import asyncio
import contextlib
import json
import logging
import re
import secrets
import socket
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request, cookie_parser
from starlette.responses import FileResponse, JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from rlhf_jax.data import tldr
from rlhf_jax.errors import InputError
from rlhf_jax.viz import completions, export
from rlhf_jax.viz.completions import ApiError
from rlhf_jax.viz.playground import Run, finite, settings

STATIC = export.static_folder()
HOST = "127.0.0.1"
HOSTS = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d{1,5})?")  # an SSH tunnel may have another port
BODY = 64 * 1024  # bytes of a request
WAITING = 32  # requests that wait for the one in progress
MESSAGE = 500  # characters of an error
KINDS = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
KINDS |= {".json": "application/json", ".gz": "application/octet-stream"}  # the browser itself unpacks .gz

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


class Busy(Exception):
    """A request more than can wait."""


class Job:
    """What a job has yielded so far, from its thread to the event loop."""

    def __init__(self):
        self._loop, self._left = asyncio.get_running_loop(), threading.Event()
        self._items: asyncio.Queue = asyncio.Queue()

    def stop(self) -> None:
        """Ends the job at its next item: nobody reads it any more."""
        self._left.set()

    def work(self, items: Callable[[], Iterator]) -> None:
        """Runs the job, in its thread."""
        try:
            if not self._left.is_set():
                for item in items():
                    self._put((item, None))
                    if self._left.is_set():
                        break
        except Exception as error:
            self._put((None, error))
        self._put(None)

    def _put(self, item):
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server ends
            self._loop.call_soon_threadsafe(self._items.put_nowait, item)

    async def __aiter__(self) -> AsyncIterator:
        while (pair := await self._items.get()) is not None:
            item, error = pair
            if error is not None:
                raise error
            yield item


class Jobs:
    """Runs jobs one at a time, in the order in which they come. Raises Busy where too many wait.

    A job runs in a thread to its end, or until it is stopped, however slowly its items are read.
    """

    def __init__(self, waiting: int = WAITING):
        self._thread, self._places = ThreadPoolExecutor(1, "job"), threading.BoundedSemaphore(1 + waiting)
        self._jobs: weakref.WeakSet[Job] = weakref.WeakSet()

    def start(self, items: Callable[[], Iterator]) -> Job:
        """Queues the job that yields items()."""
        if not self._places.acquire(blocking=False):
            raise Busy
        job = Job()
        self._jobs.add(job)

        def work():
            try:
                job.work(items)
            finally:
                self._places.release()

        self._thread.submit(work)
        return job

    def stop(self) -> None:
        """Ends all jobs, each at its next item."""
        for job in list(self._jobs):
            job.stop()


class Events(StreamingResponse):
    """Server-sent events from a job, which is stopped when the client leaves."""

    def __init__(self, job: Job, lines: Callable[[Job], AsyncIterator[str]]):
        super().__init__(lines(job), media_type="text/event-stream")
        self.job = job

    async def __call__(self, scope, receive, send):
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.job.stop()


class Guard:
    """Refuses what is not for this server before any route sees it, and adds the headers to every response."""

    def __init__(self, app, token: str, jobs: Jobs):
        self.app, self.token, self.jobs = app, token, jobs

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope["authorized"] = authorized(scope, self.token)
        answer = self._refusal(scope) or self.app

        async def send_headers(message):
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await answer(scope, receive, send_headers)

    def _refusal(self, scope) -> Response | None:
        headers = Headers(scope=scope)
        host = headers.getlist("host")
        if len(host) != 1 or not HOSTS.fullmatch(host[0]):
            return _error(scope, ApiError("host: expected 127.0.0.1 or localhost", status=403))
        if scope["method"] in ("GET", "HEAD"):
            return None
        origin = headers.get("origin", f"http://{host[0]}")
        if origin != f"http://{host[0]}" or headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            return _error(scope, ApiError("origin: expected a request of the page itself", status=403))
        if not scope["authorized"]:
            openai = scope["path"].startswith("/v1/")
            status, code = (401, "invalid_api_key") if openai else (403, "token")
            message = "expected the token that the command printed: open its URL, or send Authorization: Bearer TOKEN"
            return _error(scope, ApiError(message, status=status, code=code))
        return None


def _cookie(scope) -> str:
    """The name of the cookie with the token. Cookies are not separate by port."""
    return f"rlhf_jax_{scope['server'][1]}"


def authorized(scope, token: str) -> bool:
    """Whether the request has the token: as a key, or as the cookie that the printed URL has set."""
    headers = Headers(scope=scope)
    scheme, _, key = headers.get("authorization", "").partition(" ")
    given = [key.strip()] if scheme.lower() == "bearer" else []
    given.append(cookie_parser(headers.get("cookie", "")).get(_cookie(scope), ""))
    return any(secrets.compare_digest(value.encode(), token.encode()) for value in given)


def _error(scope, error: ApiError) -> Response:
    message = str(error)
    error.args = (message if len(message) <= MESSAGE else message[:MESSAGE] + "...",)
    body = error.body() if scope["path"].startswith("/v1/") else {"error": str(error)}
    return JSONResponse(body, error.status, headers={"Retry-After": "1"} if error.status == 429 else None)


async def _handle(request: Request, error: Exception) -> Response:
    """The response to any error of a route."""
    if isinstance(error, InputError):
        error = ApiError(str(error))
    elif isinstance(error, Busy):
        error = ApiError("too many requests wait already; try again later", status=429, code="rate_limit_exceeded")
    elif isinstance(error, HTTPException):
        error = ApiError(error.detail, status=error.status_code)
    elif not isinstance(error, ApiError):
        error = ApiError(f"{type(error).__name__} in the server; its terminal has more", status=500)
    return _error(request.scope, error)


async def _body(request: Request) -> dict:
    """The JSON object in the body."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError("content-type: expected application/json", status=415)
    data = bytearray()
    large = ApiError(f"body: expected at most {BODY} bytes", status=413)
    if int(request.headers.get("content-length") or 0) > BODY:
        raise large
    async for chunk in request.stream():
        data += chunk
        if len(data) > BODY:
            raise large
    try:
        values = json.loads(data)
        json.dumps(values, ensure_ascii=False, allow_nan=False).encode()  # no NaN, no half of a surrogate pair
    except (ValueError, RecursionError) as error:
        raise ApiError(f"body: expected JSON in UTF-8 ({error})") from None
    if not isinstance(values, dict):
        raise ApiError(f"body: expected a JSON object, got {type(values).__name__}")
    return values


def _checked(values: dict, fields: dict[str, type]) -> dict:
    """The values, each of the type of its field. Raises InputError for another type, or another field."""
    for name, value in values.items():
        if name not in fields:
            raise InputError(f"{name}: no such field, there are {', '.join(fields)}")
        if type(value) is not fields[name]:
            raise InputError(f"{name}: expected {fields[name].__name__}, got {type(value).__name__}")
    return values


def app(run: Run | None, *, token: str, trace: Path | None = None, static: Path = STATIC, warm: bool = False) -> Guard:
    """The ASGI application. run: the playground's, if there is one; trace: the folder that /trace/ has the files of.

    warm: compiles what the first texts need when the server starts.
    """
    jobs = Jobs()
    files = {f"/{path.relative_to(static).as_posix()}": path for path in sorted(static.rglob("*")) if path.is_file()}

    def needs_run() -> Run:
        if run is None or run.missing:
            raise ApiError(run.missing if run else "there is no run: start with --workdir=FOLDER", status=404)
        return run

    async def page(request: Request) -> Response:
        given = request.query_params.get("token")
        if given is None:
            return await file(request)
        if not secrets.compare_digest(given.encode(), token.encode()):
            raise ApiError("token: this URL is of another launch of the server; open the one printed last", status=403)
        response = RedirectResponse("/", 303)
        response.set_cookie(_cookie(request.scope), token, httponly=True, samesite="strict")
        return response

    async def file(request: Request) -> Response:
        path = files.get("/index.html" if request.url.path == "/" else request.url.path)
        if path is None:
            raise HTTPException(404, "no such file")
        return FileResponse(path, media_type=KINDS.get(path.suffix))

    async def trace_file(request: Request) -> Response:
        there = {path.name: path for path in trace.iterdir() if path.is_file()} if trace and trace.is_dir() else {}
        path = there.get(request.path_params["name"])
        if path is None:
            raise HTTPException(404, "no such file" if there else "no trace; --config.trace.every=10 records one")
        return FileResponse(path, media_type=KINDS.get(path.suffix))

    async def info(request: Request) -> Response:
        about = {"run": run.info() if run else None, "trace": bool(trace and trace.is_dir())}
        return JSONResponse(about | {"authorized": request.scope["authorized"]})

    async def examples(request: Request) -> Response:
        return JSONResponse({"prompts": await run_in_threadpool(needs_run().examples)})

    def read(values: dict) -> tuple[Any, Any, dict]:
        """(Prompt, Settings, values) of a request for texts: {"prompt"} or {"title", "post"}, ..."""
        fields = {"prompt": str, "title": str, "post": str, "subreddit": str, "recipe": bool, "settings": dict}
        fields |= {"forced": list, "reference": str}
        here, values = needs_run(), _checked(values, fields)
        how = settings(values.get("settings", {}))
        text = values.get("prompt", "")
        if "post" in values or "title" in values:
            title, subreddit = values.get("title", ""), values.get("subreddit") or "AskReddit"
            text = tldr.format_query(subreddit, title, values.get("post", ""))
        prompt = here.prompt(text, recipe=values.get("recipe", False), max_tokens=how.max_tokens)
        forced, ids = values.get("forced", []), here.model.tokenizer.vocab_size
        if not all(type(id) is int and 0 <= id < ids for id in forced):
            raise InputError(f"forced: expected ids from 0 to {ids - 1}")
        return prompt, how, values

    async def generate(request: Request) -> Response:
        prompt, how, values = await run_in_threadpool(read, await _body(request))
        here = needs_run()
        start = {"event": "start", "prompt": prompt.text, "note": prompt.note, "tokens": len(prompt.ids)}
        start["max_tokens"] = here.room(prompt, how)

        def events():
            yield start
            yield from here.compare(prompt, how, forced=values.get("forced", []), reference=values.get("reference", ""))

        return Events(jobs.start(events), _lines)

    async def duel(request: Request) -> Response:
        prompt, how, _ = await run_in_threadpool(read, await _body(request))
        *_, pair = await _all(request, jobs.start(lambda: needs_run().duel(prompt, how)))
        return JSONResponse(pair)

    async def vote(request: Request) -> Response:
        values = _checked(await _body(request), {"id": str, "choice": int})
        here = needs_run()
        saved = await run_in_threadpool(here.vote, values.get("id", ""), values.get("choice", -1))
        return JSONResponse(finite(saved))

    async def models(request: Request) -> Response:
        return JSONResponse(completions.models(needs_run()))

    async def one_model(request: Request) -> Response:
        return JSONResponse(completions.model(needs_run(), request.path_params["name"]))

    async def complete(request: Request) -> Response:
        here, values = needs_run(), await _body(request)
        wanted = await run_in_threadpool(completions.parse, here, values)
        if wanted.stream:
            job = jobs.start(lambda: completions.complete(here, wanted))
            return Events(job, lambda job: _chunks(job, wanted.usage))
        job = jobs.start(lambda: completions.complete(here, wanted))
        return JSONResponse(completions.whole(iter(await _all(request, job))))

    @contextlib.asynccontextmanager
    async def lifespan(_):
        if warm and run and not run.missing:
            jobs.start(run.warm)
        yield

    routes = [
        Route("/", page),
        *(Route(path, file) for path in files),
        Route("/trace/{name}", trace_file),
        Route("/api/info", info),
        Route("/api/examples", examples),
        Route("/api/generate", generate, methods=["POST"]),
        Route("/api/duel", duel, methods=["POST"]),
        Route("/api/vote", vote, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name}", one_model),
        Route("/v1/completions", complete, methods=["POST"]),
    ]
    handlers: Any = dict.fromkeys((InputError, Busy, ApiError, HTTPException, Exception), _handle)
    inner = Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)
    inner.router.redirect_slashes = False
    return Guard(inner, token, jobs)


async def _lines(job: Job) -> AsyncIterator[str]:
    """The items of a job as server-sent events; an error is the last one."""
    try:
        async for item in job:
            yield f"data: {json.dumps(finite(item), allow_nan=False)}\n\n"
    except InputError as error:
        yield f"data: {json.dumps({'event': 'error', 'message': str(error)})}\n\n"
    except Exception as error:
        message = f"{type(error).__name__} in the server; its terminal has more"
        yield f"data: {json.dumps({'event': 'error', 'message': message})}\n\n"
        raise


async def _chunks(job: Job, usage: bool) -> AsyncIterator[str]:
    """The chunks of a completion as OpenAI streams them."""
    try:
        async for chunk in job:
            if chunk["choices"] or usage:
                yield f"data: {json.dumps(finite(chunk), allow_nan=False)}\n\n"
        yield "data: [DONE]\n\n"
    except (InputError, ApiError) as error:
        yield f"data: {json.dumps(ApiError(str(error)).body())}\n\n"


async def _all(request: Request, job: Job) -> list:
    """All items of a job. It is stopped where the client leaves before its end."""
    items = []
    try:
        async for item in job:
            items.append(item)
            if await request.is_disconnected():
                raise ApiError("the client has left", status=499)
    finally:
        job.stop()
    return items


def listen(port: int) -> socket.socket:
    """A socket on 127.0.0.1. Raises InputError where the port is taken; 0 takes a free one."""
    if not 0 <= port < 2**16:
        raise InputError(f"port: expected 0 to 65535, got {port}")
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
    except OSError as error:
        listener.close()
        reason = error.strerror or error
        raise InputError(f"port: {port} cannot be used ({reason}); choose another with --port=, or 0 for any") from None
    return listener


class _Server(uvicorn.Server):
    """Stops the jobs when it ends, so that no response waits for the end of a text."""

    def __init__(self, config: uvicorn.Config, jobs: Jobs):
        super().__init__(config)
        self._jobs = jobs

    def handle_exit(self, sig, frame):
        self._jobs.stop()
        logging.getLogger("uvicorn.error").disabled = True  # a request that is cut short now is no error
        super().handle_exit(sig, frame)


def serve(application: Guard, listener: socket.socket) -> None:
    """Answers requests until SIGINT or SIGTERM, which end it at once."""
    config = uvicorn.Config(
        application, log_level="error", access_log=False, timeout_graceful_shutdown=1, server_header=False,
        h11_max_incomplete_event_size=BODY, lifespan="on",
    )  # fmt: skip
    _Server(config, application.jobs).run(sockets=[listener])
