"""Imports go one way: each part of the package may import the parts below it, and the libraries it is there for."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "rlhf_jax"

# Part: what it may import of ours, besides itself. `errors`, `fields` and `jsonfile` are added for all but ops.
MAY_IMPORT = {
    "ops": set(),
    "errors": set(),
    "command": set(),
    "fields": set(),
    "jsonfile": set(),
    "hub": set(),
    "hosts": {"command"},
    "text": {"hub"},
    "models": {"ops", "hub"},
    "data": {"text", "hub"},
    "rewards": {"text", "rollout", "evaluate", "hosts"},
    "tasks": {"data", "text", "rewards"},
    "evaluate": set(),
    "generate": {"ops"},
    "rollout": {"ops", "generate"},
    "algorithms": {"ops", "rollout", "training/state", "training/optim"},
    "training/state": set(),
    "training/optim": {"ops", "training/sharding"},
    "training/sharding": {"ops", "hosts"},
    "training/crc": set(),
    "training/checkpoint": {"training/crc", "training/sharding", "hosts"},
    "training/guard": {"training/checkpoint", "training/sharding", "report/metrics", "hosts"},
    "training/loop": {"training/guard", "command", "report/metrics", "hosts"},
    "training/workdir": {"training/checkpoint", "report/metrics", "hosts"},
    "training/fit": {"training", "hosts", "report/console", "report/metrics", "report/trackers"},
    "stages": {
        "rollout",
        "generate",
        "rewards",
        "algorithms",
        "alarms",
        "tasks",
        "data",
        "text",
        "evaluate",
        "training",
        "report",
        "hosts",
    },
    "report/metrics": {"report/trackers"},
    "report/trackers": set(),
    "report/plots": {"report/metrics"},  # it draws what metrics reads
    "report/console": set(),
    "out_of_memory": {"command", "config"},
    "alarms": set(),
    "judges": set(),
    "__main__": {"command"},
    "__init__": {"pretrained", "training/fit"},  # when its names are asked for
}
# The world is scored by its own gold reward while it is written.
MAY_ALSO = {"data/world.py": {"rewards"}}
# What composes the rest.
ANYTHING = {"checkpoint", "config", "pipeline", "provenance", "pretrained", "commands", "replay", "viz"}

SPLIT = {"training", "report"}  # folders whose files each have a line of their own

ONLY_JAX = {"jax", "math"}  # ops
NEVER = {"torch", "tensorflow", "pickle", "dill", "cloudpickle", "joblib"}
FLAGS = {"absl", "ml_collections"}
SILENCES_TFDS = {("data/world.py", "absl.logging")}

FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
OTHERS = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("experiments", "configs", "tests")
    for path in (ROOT / folder).rglob("*.py")
)


def imports(path):
    """Every module that the file imports, at its top or anywhere: `from a import b` gives a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def ours(path):
    """The parts of our package that the file imports."""
    modules = [name.split(".")[1:3] for name in imports(path) if name.split(".")[0] == "rlhf_jax" and "." in name]
    return {"/".join(names) if names[0] in SPLIT else names[0] for names in modules}


def part(file):
    folders = file.removesuffix(".py").split("/")
    return "/".join(folders[:2]) if folders[0] in SPLIT else folders[0]


@pytest.mark.parametrize("file", FILES)
def test_the_package_imports_one_way(file):
    if part(file) in ANYTHING or not imports(PACKAGE / file):
        return
    assert part(file) in MAY_IMPORT, f"{file}: a new part; say in this test and in the design what it may import"
    allowed = MAY_IMPORT[part(file)] | {part(file)} | MAY_ALSO.get(file, set())
    if part(file) != "ops":
        allowed |= {"errors", "fields", "jsonfile"}
    allowed |= {name for name in ours(PACKAGE / file) if name.split("/")[0] in allowed}  # a whole folder
    assert ours(PACKAGE / file) <= allowed


def test_the_package_imports_nothing_until_it_is_asked():
    assert loaded("import rlhf_jax; dir(rlhf_jax)") - loaded("pass") <= sys.stdlib_module_names | {"rlhf_jax"}


@pytest.mark.parametrize("file", [file for file in FILES if part(file) == "ops"])
def test_ops_import_jax_alone(file):
    assert {name.split(".")[0] for name in imports(PACKAGE / file)} <= ONLY_JAX | {"rlhf_jax"}


@pytest.mark.parametrize("file", FILES)
def test_the_library_has_no_flags(file):
    flags = {name for name in imports(PACKAGE / file) if name.split(".")[0] in FLAGS}
    assert {(file, name) for name in flags} <= SILENCES_TFDS


@pytest.mark.parametrize("file", [f"rlhf_jax/{file}" for file in FILES] + OTHERS)
def test_nothing_imports_torch_tensorflow_or_pickle(file):
    if file in ("tests/models/make_gpt2_parity.py", "tests/models/make_neox_parity.py"):
        return  # wrote the parity files, with torch and transformers; no test or installation runs them
    assert {name.split(".")[0] for name in imports(ROOT / file)}.isdisjoint(NEVER)


@pytest.mark.parametrize("file", FILES)
def test_nothing_imports_an_experiment(file):
    """Composition is on top; algorithms know no model."""
    assert {name.split(".")[0] for name in imports(PACKAGE / file)}.isdisjoint({"experiments", "configs", "tests"})


@pytest.mark.parametrize("file", FILES)
def test_the_library_does_not_print(file):
    """Nor does it read flags: what a person sees goes through console.py."""
    calls = [node for node in ast.walk(ast.parse((PACKAGE / file).read_text())) if isinstance(node, ast.Call)]
    assert "print" not in {ast.unparse(call.func) for call in calls}


HEAVY = {"tensorflow_datasets", "pyarrow", "orbax", "huggingface_hub", "matplotlib", "scipy"}


def loaded(statement):
    """The top-level modules that are loaded after the statement, in a process of its own."""
    code = f"{statement}; import sys; print(*{{name.split('.')[0] for name in sys.modules}})"
    return set(
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout.split()
    )


def test_a_config_is_read_without_what_reads_data_writes_or_draws():
    assert loaded("import rlhf_jax.config").isdisjoint(HEAVY)
