"""What the README and docs/ show is run as it stands there, what they name exists, and the README is short."""

import ast
import importlib.util
import itertools
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from rlhf_jax import config as configs
from rlhf_jax.commands.reuse import UPDATES
from rlhf_jax.data import sources
from rlhf_jax.models import decoder, heads
from rlhf_jax.report import plots
from rlhf_jax.text import char

ROOT = Path(__file__).parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
}
README, EVERYTHING = PAGES["README.md"], "\n".join(PAGES.values())


def blocks(page, language):
    """The blocks of code of a page, in their order."""
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], flags=re.DOTALL)


def section(page, title):
    """The text under a heading of a page, up to the next heading."""
    return re.split(r"\n##+ ", PAGES[page].split(f"# {title}\n")[1])[0]


# Python


@pytest.fixture
def demo(tmp_path, monkeypatch, finished):
    """The current folder has runs/demo, whose tokens are characters."""
    folder, tokenizer = tmp_path / "runs" / "demo", char.train([README])
    config = decoder.Config(layers=1, heads=1, head_size=8, width=8, context=160, vocab_size=tokenizer.vocab_size)
    tokenizer.save(folder / "text")
    whole = configs.Config(model=config, data=sources.Config(response_length=9))
    (folder / "config.json").write_text(json.dumps(configs.tree(whole)))
    policy = jax.jit(heads.LanguageModel(config).init)(jax.random.key(0))
    finished(folder, "reward", reward=heads.ScalarModel(config).init(jax.random.key(1), policy))
    finished(folder, "ppo", policy=policy)
    monkeypatch.chdir(tmp_path)


def run(page):
    """The names that a page's blocks of Python have defined, run one after another."""
    names = {}
    for i, code in enumerate(blocks(page, "python")):
        exec(compile(code, f"{page}, block {i + 1}", "exec"), names)
    return names


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python") and page != "docs/python.md"])
def test_every_block_of_python_runs(page, demo):
    assert run(page)


def test_from_python(demo):
    """Both sections: the second one trains the model that the first one loads."""
    names = run("docs/python.md")
    assert len(names["texts"]) == 4
    summary = json.loads(Path("runs", "names", "ppo", "summary.json").read_text())
    assert summary["ppo/steps"] == 20 and np.isfinite(summary["ppo/reward_gain"])
    before, after = names["model"].params, names["fitted"].state.policy
    assert jax.tree.structure(before) == jax.tree.structure(after)
    assert any(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x != y).any()), before, after)))
    assert len(names["nats"]) == len(names["scores"]) == 4 and np.isfinite(names["scores"]).all()
    assert all((nats_R < 0).all() for nats_R in names["nats"])


def test_the_readmes_own_reward_is_that_of_its_page(demo):
    assert blocks("README.md", "python")[0] == blocks("docs/reward.md", "python")[0]
    row = json.loads(re.search(r'`(\{"prompt".*?\})`', README)[1])
    scores = run("README.md")["score"]([row] * 2, ["It is 7 .", "8"])
    assert scores == {"correct": [1, 0], "brief": [-0.09, -0.01]}


# Commands

SHELL = [line for page in PAGES for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
COMMAND = re.compile(r"(?:python experiments/([a-z]\w+)\.py|rlhf-jax ([a-z]\w+))([^`|\n]*)")
INLINE = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", EVERYTHING, flags=re.DOTALL))
COMMANDS = [
    (script or name, rest) for line in [*SHELL, *INLINE]
    for script, name, rest in COMMAND.findall(" ".join(line.split()))
]  # fmt: skip


def test_commands_are_found():
    assert len(COMMANDS) > 40 and len({script for script, _ in COMMANDS}) > 12


@pytest.mark.parametrize("script", sorted({script for script, _ in COMMANDS}))
def test_every_command_has_its_script_and_every_flag_is_one_of_it(script):
    """Configs and their fields: tests/experiments/test_launch.py reads each as the command does."""
    source = (ROOT / "experiments" / f"{script}.py").read_text(encoding="utf-8")
    known = {*re.findall(r'DEFINE_\w+\(\s*"([\w-]+)"', source), "config", "workdir", "help"}
    given = {flag for name, rest in COMMANDS if name == script for flag in re.findall(r"(?<=\s--)[\w-]+", f" {rest}")}
    assert given <= known


def test_every_make_target_is_in_the_makefile():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = {name for line in SHELL for name in re.findall(r"^make ([a-z]+)", line)}
    assert {"demo", "see", "test", "docs"} <= named <= targets


def test_every_module_that_is_run_has_its_subcommand():
    found = re.findall(r"python -m (rlhf_jax\.\w+) ([a-z]+)\b", "\n".join(SHELL))
    assert len(found) > 5
    for module, command in found:
        spec = importlib.util.find_spec(module)
        path = Path(spec.submodule_search_locations[0], "__main__.py") if spec.submodule_search_locations else None
        assert f'"{command}"' in (path or Path(spec.origin)).read_text(encoding="utf-8"), (module, command)


def test_every_flag_is_a_field_of_a_config():
    values = [configs.tree(configs.Config()), configs.tree(configs.write())]
    known = {name for tree in values for name in fields(tree)}
    named = set(re.findall(r"--config\.([a-z_][\w.]*\w)=", EVERYTHING)) - {"above.group"}  # of a page's own example
    assert len(named) > 30 and named - known == set()


def fields(tree, prefix=""):
    """The paths of all fields of a config, and of the section that a reward's name may stand for."""
    for name, value in tree.items():
        if not isinstance(value, dict) or name == "reward":
            yield prefix + name
        if isinstance(value, dict):
            yield from fields(value, f"{prefix}{name}.")


# Names and links


def defined(path):
    """The names that a file defines at its top level, and Class.name of what its classes define."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return found


def test_every_name_of_the_table_is_defined_in_its_file():
    table = section("docs/article.md", "From the article to the code")
    rows = [line.split("|")[2] for line in table.splitlines() if "`" in line]
    places = [place for row in rows for place in re.findall("`(.*?)`", row)]
    assert len(places) > 20
    for place in places:
        path, names = place.split(": ")
        assert set(names.split(", ")) <= defined(ROOT / "rlhf_jax" / path), place


def test_every_test_that_a_page_names_exists():
    named = re.findall(r"`(tests/[\w/]+\.py)(?:: (\w+))?`", EVERYTHING)
    assert len(named) > 25
    for path, name in named:
        assert (ROOT / path).is_file() and (not name or name in defined(ROOT / path)), (path, name)


def test_every_name_of_the_tree_exists():
    folders = {path.stem for path in (ROOT / "rlhf_jax").iterdir() if path.suffix == ".py" or path.is_dir()}
    folders -= {"__init__", "__main__", "__pycache__", "py", "configs", "experiments"}
    tree = re.search(r"```\nrlhf_jax/\n(.*?)\nexperiments/", section("docs/design.md", "The house"), flags=re.DOTALL)
    assert set(re.findall(r"(?<=  )(\w+)(?=/|\.py)", tree[1])) == folders


@pytest.mark.parametrize("page", PAGES)
def test_every_link_to_a_file_has_one(page):
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", PAGES[page]) if "://" not in link]
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []


def test_every_page_is_in_the_menu():
    menu = set(re.findall(r": (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE))
    assert menu == {path.name for path in (ROOT / "docs").glob("*.md")}


REFERENCE = re.findall(r"^::: ([\w.]+)$", PAGES["docs/api.md"], flags=re.MULTILINE)


@pytest.mark.parametrize("name", REFERENCE)
def test_everything_of_the_reference_has_a_docstring(name):
    """A module with all of its public functions and classes, or one of these."""
    parts = name.split(".")
    path = ROOT.joinpath(*parts).with_suffix(".py")
    if path.is_file():
        module = ast.parse(path.read_text(encoding="utf-8"))
        nodes = [module, *module.body]
    else:
        folder = ROOT.joinpath(*parts[:-1])
        source = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
        nodes = [node for node in ast.parse(source.read_text()).body if getattr(node, "name", "") == parts[-1]]
        assert nodes
    nodes = [node for node in nodes if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef)]
    public = [node for node in nodes if not getattr(node, "name", "").startswith("_")]
    assert [node.name for node in public if not ast.get_docstring(node)] == []


# The pictures


@pytest.fixture(scope="module")
def pictures():
    """docs/pictures.py."""
    spec = importlib.util.spec_from_file_location("pictures", ROOT / "docs" / "pictures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FLAGS = ("demo", "over", "reuse", "scaling", "frontier")  # of docs/pictures.py: folders of runs


def test_every_picture_is_made_by_the_target(pictures):
    assert {path.name for path in (ROOT / "docs").glob("*.png")} == {*pictures.RUNS, *pictures.STOPS}


def test_the_command_of_its_run_stands_under_every_picture():
    found = [(text, rest) for text in PAGES.values() for rest in re.split(r"!\[.*?\]\(.*?\.png\)", text)[1:]]
    assert len(found) >= 10
    for _, rest in found:
        assert re.match(r"\n\n\*`(make|python) ", rest), rest[:80]


def test_a_missing_run_is_named_with_its_command(pictures, tmp_path):
    found = pictures.draw(dict.fromkeys(FLAGS, tmp_path), tmp_path)
    assert len(found) == len(pictures.RUNS) and list(tmp_path.iterdir()) == []
    needed = tmp_path / "ppo" / "metrics.jsonl"
    assert found[0] == f"pipeline.png is not drawn: {needed} is missing. It is made by: make demo"


def test_pictures_are_drawn_from_numbers(pictures, tmp_path):
    uses = {count: dict.fromkeys(plots.REUSE, 1.0) for count in "1248"}
    points = [{"label": "best of 2", "kl": float(n), "proxy": 0.1 * n, "gold": 0.0} for n in range(1, 5)]
    curve = {"kind": "best_of_n", "a": 1.0, "b": 0.5, "most": 2.0, "peak": None, "peak_ci95": None, "points": points}
    counts = dict.fromkeys(plots.DIVIDED, dict.fromkeys(plots.SCALING, 1.0))
    points = [
        {"scaling": kind, "mesh": mesh, "devices": devices, "programs": counts}
        for kind, mesh, devices in itertools.product(("strong", "weak"), ("data", "fsdp"), (1, 2))
    ]
    for name, found in (
        ("reuse/summary.json", {"reuse": dict.fromkeys(UPDATES, uses)}),
        ("overoptimization/summary.json", {"best_of_n": curve, "settings": {}}),
        ("scaling.json", {"points": points}),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(found))
    run = tmp_path / "tweets" / "annealed-1" / "rl"
    run.mkdir(parents=True)
    (run / "config.json").write_text('{"algorithm": "ppo", "section": "ppo", "ppo": {"batch": 8}}')
    (run / "summary.json").write_text("{}")
    (run / "metrics.jsonl").write_text('{"step": 1, "time": 1, "rl/eval_reward": 0.5, "rl/eval_kl_exact": 1}\n')
    (run / "samples.jsonl").write_text('{"reward_sft": 0.1, "reward_rl": 0.5}\n' * 20)
    missing = pictures.draw(dict.fromkeys(FLAGS, tmp_path), tmp_path)
    assert [line.split()[0] for line in missing] == ["pipeline.png", "frontier_stories.png"]
    drawn = ["frontier_tweets.png", "over_optimization.png", "reuse.png", "scaling.png"]
    assert sorted(path.name for path in tmp_path.glob("*.png")) == drawn


# The notebook


def test_the_notebooks_two_files_have_the_same_cells():
    """`jupytext --sync` writes the older one anew. `make notebook` runs the cells."""
    path = ROOT / "docs" / "notebooks" / "from_the_article.py"
    header, *cells = re.split(r"^# %%", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    written = []
    for cell in cells:
        kind, _, source = cell.partition("\n")
        markdown = kind.strip() == "[markdown]"
        lines = [re.sub(r"^# ?", "", line) if markdown else line for line in source.strip().splitlines()]
        written.append(("markdown" if markdown else "code", "\n".join(lines)))
    notebook = json.loads(path.with_suffix(".ipynb").read_text(encoding="utf-8"))
    assert [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]] == written
    assert len(written) > 20


# The first ten minutes


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 160


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_no_sentence_has_more_than_thirty_words(page):
    text = re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL)
    text = re.sub(r"^(\||#|!|- ).*$", "\n", text, flags=re.MULTILINE)
    sentences = [" ".join(part.split()) for part in re.split(r"(?<=[.!?:])\s|\n\n", text)]
    assert [sentence for sentence in sentences if len(sentence.split()) > 30] == []
