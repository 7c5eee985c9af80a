"""A finished run behind a server, as its page and other programs see it."""

import json
import os
import shutil
import threading
import time
from pathlib import Path

import pytest
import uvicorn
from starlette.testclient import TestClient

from rlhf_jax.viz import server
from rlhf_jax.viz.playground import Run

STATIC = Path(server.__file__).parent / "static"
TOKEN = "secret"
ADDRESS = "http://127.0.0.1:8000"


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
def browser():
    """Chromium. Without it a test is skipped, or fails where nothing may be skipped: in CI."""
    path, missing = shutil.which("chromium"), pytest.fail if os.environ.get("CI") else pytest.skip
    if path is None:
        missing("chromium is missing: apt-get install chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("playwright is missing: requirements-test.txt")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def live(run, tmp_path_factory):
    """The URL, with its token, of a server of the playground alone."""
    folder = tmp_path_factory.mktemp("playground")
    for name in ("playground.js", "playground.css"):
        shutil.copyfile(STATIC / name, folder / name)
    (folder / "index.html").write_text(
        '<!doctype html><html lang="en"><title>A run</title><link rel="icon" href="data:,">'
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
