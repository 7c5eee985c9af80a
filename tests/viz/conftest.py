"""The page in a real browser, over files that the package exports; and a finished run behind the server."""

import functools
import http.server
import json
import os
import shutil
import subprocess
import tarfile
import threading
import time
import types

import pytest
import uvicorn
from starlette.testclient import TestClient

from rlhf_jax.viz import export, server
from rlhf_jax.viz.playground import Run
from tests.support import needed

AXE = "axe-core@4.14.1"  # of npm; it checks accessibility, and is in no installation
TOKEN = "secret"
ADDRESS = "http://127.0.0.1:8000"


@pytest.fixture(scope="session")
def axe(tmp_path_factory):
    """The source of axe-core, which npm fetches."""
    npm, folder = needed("npm", "apt-get install npm"), tmp_path_factory.mktemp("axe")
    done = subprocess.run([npm, "pack", AXE, "--silent"], cwd=folder, text=True, capture_output=True, timeout=120)
    if done.returncode:
        problem = f"npm cannot fetch {AXE}: {(done.stderr or done.stdout).strip().splitlines()[-1:]}"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(problem)
    with tarfile.open(next(folder.glob("*.tgz"))) as archive:
        return archive.extractfile("package/axe.min.js").read().decode()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The URL of the exported page with the trace of the package."""
    folder = tmp_path_factory.mktemp("site") / "run"
    export.static(export.demo_folder(), folder)
    handler = functools.partial(Quiet, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import sync_playwright

    path = needed("chromium", "apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, site):
    """visit(hash, width, dark, routes, ready): opens the page. At the end: no error and no request to elsewhere."""
    opened, seen = [], types.SimpleNamespace(problems=[], expected=())

    def visit(place="", *, width=1280, dark=False, routes=None, ready=True):
        scheme = "dark" if dark else "light"
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme, reduced_motion="reduce")
        opened.append(page)
        page.on("console", lambda message: seen.problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: seen.problems.append(str(error)))
        page.on("dialog", lambda dialog: seen.problems.append(dialog.message))
        page.on("request", lambda request: request.url.startswith(site) or seen.problems.append(request.url))
        for name, body in (routes or {}).items():
            page.route(f"**/{name}", functools.partial(_fulfill, body))
        page.goto(site + place)
        page.wait_for_selector("html[data-ready]" if ready else "#banner:not([hidden])")
        return page

    def _fulfill(body, route):
        route.fulfill(status=404) if body is None else route.fulfill(body=body)

    visit.seen = seen
    yield visit
    for page in opened:
        page.close()
    assert [each for each in seen.problems if not any(word in each for word in seen.expected)] == []


# The server


@pytest.fixture(scope="session")
def run(tmp_path_factory, workdir):
    """A copy of the finished run, which may be voted on: prompts of 31 tokens and completions of 9 fill its context."""
    folder = tmp_path_factory.mktemp("served") / "demo"
    shutil.copytree(workdir, folder)
    config = json.loads((folder / "config.json").read_text())
    config["data"] |= {"prompt_length": 31, "cut": "left"}
    config["ppo"] |= {"temperature": 1.0}
    (folder / "config.json").write_text(json.dumps(config))
    rows = [{"prompt": "Sam is sad"}, {"prompt": "Sam is sad"}, {"prompt": "TL/DR:"}]
    (folder / "ppo" / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Run(folder)


@pytest.fixture(scope="session")
def static(tmp_path_factory):
    """A page, instead of the package's."""
    folder = tmp_path_factory.mktemp("static")
    (folder / "index.html").write_text("<!doctype html><title>A run</title>")
    (folder / "page.js").write_text("export const x = 1;")
    return folder


@pytest.fixture(scope="session")
def served(run, static, tmp_path_factory):
    """The application, with a trace of one file."""
    trace = tmp_path_factory.mktemp("run") / "trace"
    trace.mkdir()
    (trace / "manifest.json").write_text("{}")
    (trace / "iter_000001.json.gz").write_bytes(b"\x1f\x8b")
    (trace.parent / "config.json").write_text("{}")
    return server.app(run, token=TOKEN, trace=trace, static=static)


@pytest.fixture
def visitor(served):
    """A client without a token."""
    return TestClient(served, base_url=ADDRESS)


@pytest.fixture
def client(served):
    """A program that has the token."""
    return TestClient(served, base_url=ADDRESS, headers={"Authorization": f"Bearer {TOKEN}"})


@pytest.fixture(scope="session")
def live(run, tmp_path_factory):
    """The URL, with its token, of a server of the playground alone."""
    folder = tmp_path_factory.mktemp("playground")
    for name in ("playground.js", "playground.css", "style.css"):
        shutil.copyfile(server.STATIC / name, folder / name)
    (folder / "index.html").write_text(
        '<!doctype html><html lang="en"><title>A run</title><link rel="icon" href="data:,">'
        '<link rel="stylesheet" href="style.css">'
        '<section id="playground" hidden></section><script type="module" src="playground.js"></script>'
    )
    listener = server.listen(0)
    config = uvicorn.Config(server.app(run, token=TOKEN, static=folder), log_level="error", lifespan="off")
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/?token={TOKEN}"
    running.should_exit = True
    thread.join()
