"""Shows a run in the browser: its page, and a playground where the run has weights. Prints one URL on 127.0.0.1.

    python experiments/serve.py --workdir=runs/demo
    python experiments/serve.py                      # the small run that is in the package
    python experiments/serve.py --workdir=runs/demo --export=site            # static files, for any web host
    python experiments/serve.py --workdir=runs/demo --export-unipo=run.json  # the run in UNIPO's JSON

The URL has the token of this launch. Programs send it as a key to the completions API of OpenAI that is under /v1.
"""

import secrets
from pathlib import Path

from launch import WORKDIR, flags, start

from rlhf_jax import command
from rlhf_jax.report.console import Reporter
from rlhf_jax.viz import export, playground, server

PORT = flags.DEFINE_integer("port", 8000, "Port on 127.0.0.1; 0: any that is free.")
EXPORT = flags.DEFINE_string("export", None, "Folder to write the page to as static files, instead of serving it.")
UNIPO = flags.DEFINE_string(
    "export-unipo", None, "JSON file to write the run to in UNIPO's schema, instead of serving it."
)


def main():
    with Reporter() as reporter:
        if EXPORT.value or UNIPO.value:
            _export(reporter)
        else:
            _serve(reporter)


def _serve(reporter):
    run, trace = _open(WORKDIR.value)
    listener, token = server.listen(PORT.value), secrets.token_urlsafe(16)
    address = f"http://{server.HOST}:{listener.getsockname()[1]}"
    reporter.note(f"{address}/?token={token}")
    if run and run.missing:
        reporter.note(f"no playground: {run.missing}")
    elif run:
        reporter.note(f"OpenAI's clients: base_url={address}/v1 api_key={token}")
    command.taken_over = True  # the server ends its requests at a signal, then raises it again: exit code 3
    server.serve(server.app(run, token=token, trace=trace, warm=True), listener)


def _export(reporter):
    source = WORKDIR.value or export.demo_folder()
    for write, out in ((export.static, EXPORT.value), (export.unipo, UNIPO.value)):
        if out:
            reporter.note(f"written to {write(source, out)}")


def _open(workdir):
    """(the run, the folder of its trace); a trace alone has no run. The default is the package's trace."""
    if not workdir:
        return None, export.demo_folder()
    folder = Path(workdir).expanduser()
    trace = folder / "trace"
    alone = (trace / "manifest.json").exists() and not (folder / "config.json").exists()
    return None if alone else playground.Run(folder), trace


if __name__ == "__main__":
    start(main, optional=("workdir",))
