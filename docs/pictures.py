"""The pictures of README and docs, drawn from the numbers of finished runs: `make pictures`.

    python docs/pictures.py --demo=runs/demo --over=runs/over --reuse=runs/reuse --scaling=runs/scaling \
        --frontier=runs/frontier

Nothing is trained. A picture whose run is missing stays as it is; its command is printed, and the exit code is 1. The
page's pictures are those of the run in the package, by Chromium.
"""

import argparse
import functools
import http.server
import shutil
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np

from rlhf_jax import config as configs
from rlhf_jax import jsonfile
from rlhf_jax.commands import compare, overoptimize
from rlhf_jax.evaluate import scaling
from rlhf_jax.report import metrics, plots
from rlhf_jax.viz import export

DOCS = Path(__file__).parent
SIZE = {"width": 1240, "height": 860}  # pixels
STOPS = {"page.png": "tokens", "page_clip.png": "clip"}  # of the page's tour


def pipeline(demo, out):
    """Fine-tuning, the reward model and reinforcement learning."""
    config = configs.read(demo)
    stages = ("sft", "reward", configs.rl_name(config))
    rows = {name: metrics.read(demo / name / "metrics.jsonl") for name in stages}
    plots.pipeline(rows, out, title=f"{demo.name}: {config.task}, seed {config.seed}")


def reuse(run, out):
    """Three updates after 1, 2, 4 and 8 uses of one rollout."""
    plots.reuse(jsonfile.read(run / "reuse" / "summary.json")["reuse"], out)


def over_optimization(run, out):
    """The learned reward and gold over the square root of the KL, with the fitted curves."""
    found = jsonfile.read(run / overoptimize.FOLDER / "summary.json")
    found.pop("settings")
    points = {}
    for kind, each in sorted(found.items(), key=lambda item: "," in item[0]):  # smaller reward models stand last
        rows = each.pop("points")
        kl, proxy, gold = (np.array([row[name] for row in rows]) for name in ("kl", "proxy", "gold"))
        points[kind] = overoptimize.Points(kl, proxy, gold, np.arange(len(rows)), [row["label"] for row in rows])
    plots.over_optimization(points, {kind: scaling.Fit(**each) for kind, each in found.items()}, out)


def count(folder, out):
    """FLOPs, bytes, messages and memory of a device among ever more."""
    plots.scaling(jsonfile.read(folder / "scaling.json")["points"], out)


def frontier(folder, out, *, task):
    """The curves of all runs of a task, beside best-of-n."""
    runs = [run for place in sorted((folder / task).glob("*/")) for run in compare.read(place)]
    compare.draw(runs, "reward", out)


def page(folder):
    """Two stops of the page's tour, into `folder`: a token, and the clip."""
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as temporary:
        site = export.static(export.demo_folder(), Path(temporary) / "site").parent  # of its index.html
        handler = functools.partial(Quiet, directory=site)
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, sync_playwright() as playwright:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            opened = browser.new_page(viewport=SIZE, color_scheme="light", reduced_motion="reduce")
            opened.goto(f"http://127.0.0.1:{server.server_port}/")
            opened.wait_for_selector("html[data-ready]")
            opened.click("text=Take the tour")
            for name, view in STOPS.items():
                while not opened.query_selector(f"#{view}.toured"):
                    opened.click("#tour button:text-is('next')")
                    opened.wait_for_timeout(300)  # the views follow
                opened.screenshot(path=folder / name)
            browser.close()
            server.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Without a line for each request."""

    def log_message(self, *args):
        """Says nothing."""


# picture: (flag, what has to be in the workdir, what draws it, the command of the run)
RUNS = {
    "pipeline.png": ("demo", "ppo/metrics.jsonl", pipeline, "make demo"),
    "over_optimization.png": (
        "over",
        f"{overoptimize.FOLDER}/summary.json",
        over_optimization,
        "python experiments/overoptimize.py --config=configs/ppo_summarize.py --workdir=runs/over",
    ),
    "reuse.png": (
        "reuse",
        "reuse/summary.json",
        reuse,
        "python experiments/reuse_rollouts.py, with the flags under the picture in docs/results.md",
    ),
    "scaling.png": (
        "scaling",
        "scaling.json",
        count,
        "python experiments/plan.py, with the flags under the picture in docs/scale.md",
    ),
    **{
        f"frontier_{task}.png": (
            "frontier",
            f"{task}/annealed-1/rl/metrics.jsonl",
            functools.partial(frontier, task=task),
            "the six runs under the picture in docs/results.md",
        )
        for task in ("tweets", "stories")
    },
}


def draw(workdirs, out):
    """Draws each picture whose run is there: the lines to print about the others. `workdirs` is {flag: Path}."""
    missing = []
    for name, (flag, needed, plot, made_by) in RUNS.items():
        path = workdirs[flag] / needed
        if path.exists():
            plot(workdirs[flag], out / name)
        else:
            missing.append(f"{name} is not drawn: {path} is missing. It is made by: {made_by}")
    return missing


def main():
    """Reads the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, *_, made_by in RUNS.values():
        parser.add_argument(f"--{flag}", type=Path, default=Path("runs", flag), help=f"workdir of: {made_by}")
    parser.add_argument("--out", type=Path, default=DOCS, help="folder of the pictures")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    missing = draw({flag: getattr(given, flag).expanduser() for flag, *_ in RUNS.values()}, given.out)
    if shutil.which("chromium"):
        page(given.out)
    else:
        missing.append(f"{' and '.join(STOPS)} are not drawn: chromium is missing. apt-get install chromium")
    sys.exit("\n".join(missing) or None)


if __name__ == "__main__":
    main()
