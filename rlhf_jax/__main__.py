"""The command `rlhf-jax`: `rlhf-jax NAME --flags` is `python experiments/NAME.py --flags`, from any folder.

rlhf-jax                    # the names, and what each does
rlhf-jax ppo_summarize --config=ppo_summarize:tiny --workdir=runs/demo
"""

from rlhf_jax import command

if __name__ == "__main__":
    command.begin()

import ast
import runpy
import sys
from pathlib import Path

EXPERIMENTS = Path(__file__).parent / "experiments"  # a link to experiments/, which installations follow


def scripts() -> dict[str, Path]:
    """The experiments by name."""
    return {path.stem: path for path in sorted(EXPERIMENTS.glob("*.py")) if path.stem != "launch"}


def main() -> None:
    """Runs the experiment that the first argument names, as `python` runs its file."""
    known = scripts()
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        sys.stdout.write("rlhf-jax NAME --flags; rlhf-jax NAME --help lists its flags\n\n")
        sys.stdout.writelines(f"  {name:18}{_first_line(path)}\n" for name, path in known.items())
        return
    if name not in known:
        command.leave(f"{name}: expected one of {', '.join(known)}")
    sys.argv[:] = [str(known[name]), *rest]
    sys.path.insert(0, str(EXPERIMENTS))  # the experiments import launch.py, which is beside them
    runpy.run_path(sys.argv[0], run_name="__main__")


def _first_line(path: Path) -> str:
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n")[0]


if __name__ == "__main__":
    main()
