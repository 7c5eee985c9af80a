"""Commands, without the seconds that each would take to import what it needs."""

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# What a run imports, or first in its course, such as its report: a fork of a process that has it does not import it.
IMPORTS = """
import json, os, runpy, sys
sys.path.insert(0, "experiments")
import launch, rlhf_jax.stages, rlhf_jax.data.world, rlhf_jax.report.plots, orbax.checkpoint
import huggingface_hub.errors, jaxlib.mlir.dialects.mhlo, jinja2, matplotlib.colors, rich.emoji
rlhf_jax.report.plots._save = lambda plotters, path, **_: (path.parent.mkdir(parents=True, exist_ok=True), path.touch())
"""

# Imports once what takes seconds to import, then runs a command line in a fork of itself for each line it reads. The
# fork ends without Python's cleaning up, which takes seconds as well.
FORKS = """
import tempfile, traceback
for line in sys.stdin:
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        if not (child := os.fork()):
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            sys.argv, code = json.loads(line), 0
            try:
                runpy.run_path(sys.argv[0], run_name="__main__")
            except SystemExit as error:
                code = error.code or 0
            except BaseException:
                code = traceback.print_exc() or 1
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = [file.seek(0) or file.read() for file in (out, err)]
        print(json.dumps([code, *texts]), flush=True)
"""


@pytest.fixture(scope="module")
def forks():
    """forks(script, flags) -> its exit code and what it wrote."""
    with subprocess.Popen(
        [sys.executable, "-c", IMPORTS + FORKS], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:

        def run(*line):
            print(json.dumps(line), file=process.stdin, flush=True)
            code, out, err = json.loads(process.stdout.readline())
            return types.SimpleNamespace(code=code, out=out, err=err)

        yield run
