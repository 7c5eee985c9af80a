"""What the tests share: float64, the golden numbers, a policy to do by hand, the smallest real models, and a hub."""

import contextlib
import gc
import hashlib
import json
import os
import re
from math import prod
from pathlib import Path

import httpx2
import huggingface_hub.constants
import hypothesis
import jax
import jax.numpy as jnp
import pytest

from rlhf_jax import config as configs
from rlhf_jax.data import sources
from rlhf_jax.models import decoder, heads
from rlhf_jax.ops import logprobs
from rlhf_jax.report import plots
from rlhf_jax.rollout import Apply
from rlhf_jax.text import char
from rlhf_jax.training.checkpoint import Checkpoints
from tests import support

# Compiling is most of the time, and four fifths of that are LLVM's optimizations and MLIR's kernels of fusions: small
# programs need neither, nor are they split for more threads. What XLA does before them (fusion, layouts, memory) is as
# always. XLA_FLAGS set by hand is left as it is. support.OPTIMIZED is for tests that compare the bits of two programs:
# without it they may round differently.
FLAGS = "--xla_backend_optimization_level=0"
if support.FUSION_EMITTERS:
    FLAGS += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
os.environ.setdefault("XLA_FLAGS", FLAGS)

# A second run takes a fifth of the first, and equal programs compile once in a run.
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rlhf_jax" / "compiled"
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# Tracing is most of the rest. It makes many objects and few cycles: collecting them took an eighth of all the time, and
# the stack of every operation, for the names in a profile, a twentieth.
gc.set_threshold(200_000, 50, 100)
jax.config.update("jax_include_full_tracebacks_in_locations", False)


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=5, help="how often test_kill.py kills each of its runs")


def pytest_configure(config):
    # A run that was killed while it wrote may leave half an entry. JAX compiles again, and says so.
    config.addinivalue_line("filterwarnings", "ignore:Error (reading|writing) persistent compilation cache entry")


# The first example compiles, which no deadline allows for; and a failure must be the same on every machine.
hypothesis.settings.register_profile("jax", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("jax")


@pytest.fixture(scope="session", autouse=True)
def pictures():
    """Runs leave empty files for their pictures: twenty take as long as the training. `with pictures():` draws them."""
    draw = plots._save

    def touch(plotters, path, **_):
        if plotters:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).touch()

    @contextlib.contextmanager
    def drawn():
        plots._save = draw
        yield
        plots._save = touch

    plots._save = touch
    yield drawn
    plots._save = draw


@pytest.fixture
def float64():
    """Arrays made in the test are float64."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def goldens():
    """Float64 values of the PPO mathematics, computed by others."""
    return support.golden("ppo_maths.json")


class Bigram(heads.LanguageModel):
    """A policy to do by hand: params[v] are the logits of the token after token v, whatever stood before it."""

    def __init__(self):
        super().__init__(config=None)

    def hidden(self, params, tokens_BT, mask_BT, count=None, dropout_key=None):
        hidden_BTV = params[tokens_BT]
        return hidden_BTV if count is None else logprobs.before(hidden_BTV, count)

    def logits(self, params, hidden):
        return hidden

    def cast(self, params):
        return params

    def prefill(self, params, tokens_BP, mask_BP, slots):
        return params[tokens_BP[:, -1]], ()

    def decode(self, params, token_B, mask_B, cache, slot=None):
        return params[token_B], cache

    def insert(self, cache, new, rows_G):
        return cache

    def repeat(self, cache, rows, padding):
        return cache


@pytest.fixture(scope="session")
def bigram():
    return Bigram()


@pytest.fixture(scope="session")
def node():
    return support.needed("node", "apt-get install nodejs")


# heads * head_size is not the width, and no other size is the vocabulary's: an array that has it shows. One layer: only
# the tests of the models look at more.
TINY = decoder.Config(layers=1, heads=2, head_size=7, width=16, context=40, vocab_size=29)
CHUNK = 8  # tokens projected on the vocabulary at a time, fewer than any batch has


@pytest.fixture(scope="session")
def apply():
    """A GPT-2 of one layer and width 16: (policy, scalar). Ids are 0 to 28; the tests take 0 as PAD and 1 as EOS."""
    return Apply(heads.LanguageModel(TINY, chunk=CHUNK), heads.ScalarModel(TINY))


@pytest.fixture(scope="session")
def policy(apply):
    """Parameters far from their small start, where all tokens are about as likely: here they differ."""
    return spread(init(apply.policy, jax.random.key(0)), jax.random.key(8))  # it writes EOS now and then


@pytest.fixture(scope="session")
def reference(apply):
    return spread(init(apply.policy, jax.random.key(2)), jax.random.key(3))


@pytest.fixture(scope="session")
def scalar(apply, policy):
    """Parameters of a reward or value model."""
    head = apply.scalar.init(jax.random.key(4), policy)
    return head | {"trunk": spread(init(apply.policy, jax.random.key(5)), jax.random.key(6))}


init = jax.jit(heads.LanguageModel.init, static_argnums=0)


@jax.jit
def spread(params, key):
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    return tree.unflatten([x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)])


@pytest.fixture(scope="session")
def prompts():
    """Six prompts of 1 to 6 tokens, left-padded with 0: (prompt_BP, prompt_mask_BP)."""
    prompt_BP = jax.random.randint(jax.random.key(7), (6, 6), 2, TINY.vocab_size)
    mask_BP = jnp.arange(6) >= jnp.arange(6)[:, None]
    return jnp.where(mask_BP, prompt_BP, 0), mask_BP


@pytest.fixture(scope="session")
def most_tokens():
    """A function of a program's text: the most tokens that any of its arrays has the vocabulary for, in any order.

    The vocabulary must be a prime, and no other size a multiple of it.
    """

    def most_tokens(program, config=TINY):
        shapes = [re.split("[x,]", sizes) for sizes in re.findall(r"[<\[](\d+(?:[x,]\d+)*)", program)]
        shapes = [[int(size) for size in shape] for shape in shapes]
        embedding = sorted((config.vocab_size, config.width))
        sizes = [prod(shape) for shape in shapes if sorted(shape) != embedding]
        return max(size // config.vocab_size for size in sizes if size % config.vocab_size == 0)

    return most_tokens


@pytest.fixture(scope="session")
def compilations():
    """`with compilations() as names`: the names of the functions that are compiled within."""

    @contextlib.contextmanager
    def compilations():
        names = []

        def listen(event, _, **details):
            if event == "/jax/core/compile/backend_compile_duration":
                names.append(details["fun_name"].removeprefix("jit(").removesuffix(")"))

        jax.monitoring.register_event_duration_secs_listener(listen)
        yield names
        jax.monitoring.unregister_event_duration_listener(listen)

    return compilations


class HubServer:
    """What the Hugging Face hub answers its client, which is the real one: only the network is replaced.

    `asked` are the paths of all requests, in order. `down` is what a request raises; `slow` comes before the answer.
    """

    def __init__(self):
        self.asked, self.down, self.slow, self.gated = [], None, lambda: None, set()
        self.revisions = {}  # by kind and repository, then by the name of a branch or a commit: (commit, files)

    def add(self, repo, files, kind="model", revision="main"):
        """Publishes {name: str or bytes}; returns the commit, which is another one if they are others."""
        files = {name: data.encode() if isinstance(data, str) else data for name, data in files.items()}
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        there = self.revisions.setdefault((kind, repo), {})
        there[revision] = there[commit] = (commit, files)
        return commit

    def answer(self, request):
        self.slow()
        if self.down:
            raise self.down
        path = request.url.raw_path.decode().split("?")[0].strip("/")
        self.asked.append(path)
        if path.startswith("api/"):
            _, kinds, owner, name, question, revision = path.split("/")
            return self.about(kinds.removesuffix("s"), f"{owner}/{name}", question, revision.replace("%2F", "/"))
        kind = "dataset" if path.startswith("datasets/") else "model"
        owner, name, _, commit, file = path.removeprefix("datasets/").split("/", 4)
        return self.file(kind, f"{owner}/{name}", commit, file, request.method)

    def about(self, kind, repo, question, revision):
        there = self.revisions.get((kind, repo))
        if there is None or revision not in there:
            return self.error(404, "RepoNotFound" if there is None else "RevisionNotFound")
        commit, files = there[revision]
        if question == "revision":
            return httpx2.Response(
                200, json={"id": repo, "sha": commit, "siblings": [{"rfilename": name} for name in files]}
            )
        oids = {name: hashlib.sha1(data).hexdigest() for name, data in files.items()}
        tree = [{"type": "file", "path": name, "size": len(files[name]), "oid": oid} for name, oid in oids.items()]
        return httpx2.Response(200, json=tree)

    def file(self, kind, repo, commit, file, method):
        if repo in self.gated:
            return self.error(403, "GatedRepo")
        data = self.revisions[kind, repo][commit][1][file]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
        return httpx2.Response(200, headers=headers, content=data)

    def error(self, status, code):
        return httpx2.Response(status, headers={"X-Error-Code": code})


@pytest.fixture
def hub_server(tmp_path_factory, monkeypatch):
    """A hub with nothing on it, and nothing downloaded before."""
    server = HubServer()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub")))
    huggingface_hub.set_client_factory(lambda: httpx2.Client(transport=httpx2.MockTransport(server.answer)))
    yield server
    server.down = RuntimeError("a test asked the hub without hub_server")


@pytest.fixture(scope="session")
def finished():
    """finished(folder, stage, **results): writes what a stage leaves behind that is done, its results untrained."""

    def finished(folder, stage, **results):
        with Checkpoints(folder / stage / "result") as checkpoints:
            checkpoints.save(3, results, {})
        (folder / stage / "summary.json").write_text("{}")

    return finished


@pytest.fixture(scope="session")
def workdir(tmp_path_factory, finished, policy, reference, scalar):
    """A run of TINY sizes on characters, as if it were done: sft is `reference`, ppo is `policy`."""
    folder = tmp_path_factory.mktemp("runs") / "demo"
    tokenizer = char.CharTokenizer("\n ./:DELOPRSTUabcdehimnrst")  # with UNK, EOS and PAD as many ids as TINY has
    config = configs.Config(model=TINY, data=sources.Config(response_length=9))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(configs.tree(config)))
    tokenizer.save(folder / "text")
    finished(folder, "sft", policy=reference)
    finished(folder, "reward", reward=scalar)
    finished(folder, "ppo", policy=policy, value=scalar)
    return folder
