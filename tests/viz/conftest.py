"""The page in a real browser: one Chromium for all tests, over files that the package exports."""

import functools
import http.server
import os
import shutil
import subprocess
import tarfile
import threading
import types

import pytest

from rlhf_jax.viz import export

AXE = "axe-core@4.14.1"  # of npm; it checks accessibility, and is in no installation


def needed(program, how):
    """The path of a program. Without it a test is skipped, or fails where nothing may be skipped: in CI."""
    path = shutil.which(program)
    if path is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{program} is missing: {how}")
    return path


@pytest.fixture(scope="session")
def node():
    return needed("node", "apt-get install nodejs")


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
    opened, told = [], types.SimpleNamespace(problems=[], expected=())

    def visit(place="", *, width=1280, dark=False, routes=None, ready=True):
        scheme = "dark" if dark else "light"
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme, reduced_motion="reduce")
        opened.append(page)
        page.on("console", lambda message: told.problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: told.problems.append(str(error)))
        page.on("dialog", lambda dialog: told.problems.append(dialog.message))
        page.on("request", lambda request: request.url.startswith(site) or told.problems.append(request.url))
        for name, body in (routes or {}).items():
            page.route(f"**/{name}", functools.partial(_fulfill, body))
        page.goto(site + place)
        page.wait_for_selector("html[data-ready]" if ready else "#banner:not([hidden])")
        return page

    def _fulfill(body, route):
        route.fulfill(status=404) if body is None else route.fulfill(body=body)

    visit.told = told
    yield visit
    for page in opened:
        page.close()
    assert [each for each in told.problems if not any(word in each for word in told.expected)] == []
