"""A finished run behind a server, as its page and other programs see it."""

import json
import shutil

import pytest
from starlette.testclient import TestClient

from rlhf_jax.viz import server
from rlhf_jax.viz.playground import Run

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
