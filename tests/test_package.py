"""What `import rlhf_jax` gives, what is installed, and the command rlhf-jax."""

import ast
import importlib.metadata
import sys
import tomllib
from pathlib import Path

import pytest
import setuptools

import rlhf_jax
from rlhf_jax import __main__ as command


def test_it_has_its_names():
    assert {"load", "__version__"} <= {*dir(rlhf_jax)} and callable(rlhf_jax.load)
    with pytest.raises(AttributeError, match="^module 'rlhf_jax' has no attribute 'laod'$"):
        rlhf_jax.laod  # noqa: B018


def test_its_version_is_the_installed_one(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", {"rlhf_jax": "1.2"}.__getitem__)
    assert rlhf_jax.__version__ == "1.2"


def test_a_clone_that_is_not_installed_has_no_version(monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert rlhf_jax.__version__ == "0+unknown"


ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.mark.parametrize("name", ["configs", "experiments"])
def test_configs_and_experiments_are_in_it(name):
    """By a link, which installations follow: `make wheel` installs one and runs it."""
    inside, outside = (
        {path.name: path.read_bytes() for path in folder.glob("*.py")}
        for folder in (Path(rlhf_jax.__file__).parent / name, ROOT / name)
    )
    assert inside == outside != {}
    include = PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]
    assert f"rlhf_jax.{name}" in setuptools.find_namespace_packages(ROOT, include=include)


def test_the_page_and_its_small_run_are_data_of_the_package():
    for pattern in PROJECT["tool"]["setuptools"]["package-data"]["rlhf_jax"]:
        assert list(Path(rlhf_jax.__file__).parent.glob(pattern)), pattern


def test_an_extra_for_every_use():
    assert {"cuda", "tpu", "serve", "docs", "test"} <= set(PROJECT["project"]["optional-dependencies"])
    assert PROJECT["project"]["scripts"] == {"rlhf-jax": "rlhf_jax.__main__:main"}


# The command


@pytest.fixture
def run(monkeypatch):
    """run(arguments): the command, as the installed script calls it."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["rlhf-jax", *arguments])
        monkeypatch.setattr(sys, "path", [*sys.path])
        command.main()

    return run


@pytest.mark.parametrize("arguments", [(), ("--help",)])
def test_it_lists_every_experiment_with_what_it_does(arguments, run, capsys):
    run(*arguments)
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[2:])
    assert set(lines) == {path.stem for path in (ROOT / "experiments").glob("*.py")} - {"launch"}
    assert lines["ppo_summarize"].startswith("The main job: fine-tuning, reward model and PPO.")


def test_an_unknown_experiment_is_one_line(run, capfd):
    with pytest.raises(SystemExit) as caught:
        run("ppo_summarise")
    line = capfd.readouterr().err
    assert caught.value.code == 2 and line.startswith("rlhf-jax: ppo_summarise: expected one of benchmark, compare, ")
    assert line.count("\n") == 1


def test_it_runs_the_file_as_python_does(run, monkeypatch, tmp_path):
    """With the arguments, as __main__, and with the neighbours of the file."""
    (tmp_path / "launch.py").write_text("shared = 5\n")
    (tmp_path / "small.py").write_text(
        "import sys, pathlib\nimport launch\n"
        "if __name__ == '__main__':\n"
        "    pathlib.Path(sys.argv[2]).write_text(f'{sys.argv} {launch.shared}')\n"
    )
    monkeypatch.setattr(command, "EXPERIMENTS", tmp_path)
    monkeypatch.delitem(sys.modules, "launch", raising=False)
    run("small", "--to", f"{tmp_path}/out")
    sys.modules.pop("launch", None)
    assert (tmp_path / "out").read_text() == f"{[f'{tmp_path}/small.py', '--to', f'{tmp_path}/out']} 5"


FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.GeneratorExp)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp)


def _names(nodes, kind):
    """The names that are loaded or stored (`kind`) in the nodes, however deep."""
    return {
        each.id
        for node in nodes
        for each in ast.walk(node)
        if isinstance(each, ast.Name) and isinstance(each.ctx, kind)
    }


def _inside(node, kinds, stop):
    """The outermost nodes of `kinds` within a node, without what is within nodes of `stop`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, kinds):
            yield child
        if not isinstance(child, stop):
            yield from _inside(child, kinds, stop)


def _arguments(function):
    return (
        {each.arg for each in ast.walk(function.args) if isinstance(each, ast.arg)}
        if hasattr(function, "args")
        else set()
    )


def clashes(source, path):
    """Where Python 3.12.1 and 3.13.0 lose a variable of an outer function: (path, line, name).

    They inline a comprehension into its function. A name that the comprehension assigns, and that a lambda beside it
    captures from further out, is then unbound in the lambda.
    """
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, FUNCTIONS):
            continue
        targets = _names(
            [each.target for found in _inside(function, COMPREHENSIONS, FUNCTIONS) for each in found.generators],
            ast.Store,
        )
        own = {
            each.id
            for each in _inside(function, ast.Name, (*FUNCTIONS, *COMPREHENSIONS))
            if isinstance(each.ctx, ast.Store)
        }
        captured = set()
        for inner in _inside(function, FUNCTIONS, (*FUNCTIONS, *COMPREHENSIONS)):
            captured |= _names([inner], ast.Load) - _names([inner], ast.Store) - _arguments(inner)
        for name in (targets & captured) - own - _arguments(function):
            yield path, function.lineno, name


def test_no_comprehension_hides_a_variable_that_a_lambda_captures():
    bad = "def f(key):\n    def g():\n        return (lambda: key)(), [key for key in 'ab']\n    return g\n"
    assert list(clashes(bad, "bad")) == [("bad", 2, "key")]
    paths = [path for part in ("rlhf_jax", "experiments") for path in (ROOT / part).rglob("*.py")]
    assert len(paths) > 100
    assert [each for path in paths for each in clashes(path.read_text("utf-8"), str(path))] == []
