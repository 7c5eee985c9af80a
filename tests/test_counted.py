"""What an iteration of PPO costs, as far as it can be counted: work, arrays, memory and compilations, no seconds."""

import dataclasses
from functools import cache

import jax
import pytest

from rlhf_jax.algorithms import ppo, rloo
from rlhf_jax.commands import benchmark
from rlhf_jax.models import decoder

# The vocabulary is a prime and no other size a multiple of it; heads are many, so that attention weights would show.
MODEL = decoder.Config(layers=2, heads=8, head_size=4, width=32, vocab_size=97, context=32)
SHAPE = benchmark.Shape("counted", MODEL, prompt=24, response=8, algorithm=ppo.Config(batch=8))
CHUNK = 16  # tokens projected on the vocabulary at a time, of the 64 of a rollout


def shape(**algorithm):
    return dataclasses.replace(SHAPE, algorithm=dataclasses.replace(SHAPE.algorithm, **algorithm))


@cache
def update(batch, microbatches=1):
    """The compiled update."""
    return compiled(benchmark.Timed(shape(batch=batch, microbatches=microbatches), CHUNK), "update")


def compiled(timed, program):
    function, args = timed.programs()[program]
    return function.lower(*args).compile()


def temp_bytes(batch, microbatches=1):
    return update(batch, microbatches).memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    ("phase", "programs", "passes"),
    [("score", ("judge", "reward"), 1), ("update", ("update",), SHAPE.algorithm.epochs)],
)
def test_the_work_is_that_of_the_products(phase, programs, passes):
    """XLA counts a loop once, and norms, GELU, the masked half of the scores and Adam too: a sixth of a model as narrow
    as this one. A last layer for all tokens would be a fifth more, a projection of the prompt in the update 29%."""
    lowered = (function.lower(*args) for function, args in map(benchmark.Timed(SHAPE).programs().get, programs))
    counted = sum(program.cost_analysis()["flops"] for program in lowered)
    flops = benchmark.flops(SHAPE)[phase] / passes
    assert 1.1 * flops < counted < 1.25 * flops


def test_no_array_has_the_vocabulary_for_all_tokens(most_tokens):
    """Rollout and update project 16 of the 64 response tokens at a time, none of the prompts'."""
    timed = benchmark.Timed(SHAPE, CHUNK)
    state, prompts = jax.eval_shape(timed.begin, jax.random.key(0))

    @jax.jit
    def collect(state, prompts):
        return timed.iteration.collect(state, prompts, timed.reward, (), None)[0]

    for program in collect.lower(state, prompts).compile(), update(SHAPE.algorithm.batch):
        assert most_tokens(program.as_text(), MODEL) == CHUNK


def test_memory_grows_with_the_batch_and_not_with_its_square():
    """An update keeps for its gradients, in each of two models: about 25 floats a token, a layer and an entry of the
    width. Were the last layer computed for all tokens it would be 31, and 37 were attention weights kept."""
    first, second = ((temp_bytes(2 * batch) - temp_bytes(batch)) / batch for batch in (8, 16))
    assert second == pytest.approx(first, rel=0.05)
    tokens = SHAPE.prompt + SHAPE.response
    floats = first / 4 / (2 * tokens * MODEL.layers * MODEL.width)
    assert 20 < floats < 28


def test_memory_does_not_grow_with_the_number_of_microbatches():
    assert temp_bytes(32, microbatches=4) < 1.1 * temp_bytes(8)


def test_each_program_compiles_once(compilations):
    timed = benchmark.Timed(SHAPE, CHUNK)
    state, prompts = timed.begin(jax.random.key(0))
    with compilations() as names:
        for _ in range(3):
            scored, *_ = timed.iteration.collect(state, prompts, timed.reward, (), None)
            state, _ = timed.learn(state, scored)
    assert sorted(names) == ["judge", "sample", "score", "step"]
    assert int(state.step) == 3


def test_a_group_reads_its_prompt_once():
    """Four completions a prompt: three quarters of the prefill's products are left out of sampling."""

    def counted(group):
        config = rloo.Config(batch=8, group=group)
        grouped = dataclasses.replace(SHAPE, algorithm=config)
        function, args = benchmark.Timed(grouped).programs()["draw"]
        return function.lower(*args).cost_analysis()["flops"], benchmark.flops(grouped)["prefill"]

    (two, prefill), (four, less) = counted(2), counted(4)
    assert less == prefill / 2
    assert 1.1 * less < two - four < 1.25 * less
