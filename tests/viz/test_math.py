"""The page's JavaScript maths against the Python functions of the same names, on random arrays and edge cases."""

import itertools
import json
import re
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest

import rlhf_jax.viz
from rlhf_jax.algorithms import policy, policy_gradient
from rlhf_jax.evaluate import win_rate
from rlhf_jax.ops import advantages, importance, kl, logprobs, losses, masked, sampling

MATH = Path(rlhf_jax.viz.__file__).parent / "static" / "math.js"
NODE = """
import * as math from %s;
let text = "";
for await (const part of process.stdin) text += part;
const plain = (x) => ArrayBuffer.isView(x) || Array.isArray(x) ? Array.from(x, plain)
  : typeof x === "number" && !Number.isFinite(x) ? String(x)
  : x && typeof x === "object" ? Object.fromEntries(Object.entries(x).map(([k, v]) => [k, plain(v)])) : x;
const called = JSON.parse(text).map(([name, args]) => name.split(".").reduce((part, key) => part[key], math)(...args));
console.log(JSON.stringify(plain(called)));
"""


def in_node(node, calls):
    """The results of [(name, arguments)] in Node; arrays become lists, and numbers that are not finite texts."""
    program = [node, "--input-type=module", "-e", NODE % json.dumps(MATH.as_uri())]
    text = json.dumps([[name, [_plain(x) for x in args]] for name, args in calls])
    done = subprocess.run(program, input=text, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return [_numbers(each) for each in json.loads(done.stdout)]


def _plain(x):
    return np.asarray(x).tolist() if isinstance(x, np.ndarray | np.generic) else x


def _numbers(x):
    if isinstance(x, str):
        return float(x.replace("Infinity", "inf"))
    return [_numbers(each) for each in x] if isinstance(x, list) else x


rng = np.random.default_rng(0)
R, B = 9, 4
X, Y, Z = rng.normal(size=(3, R)) * 3
MASKS = {"some": (np.arange(R) < 6).astype(int), "all": np.ones(R, int), "none": np.zeros(R, int)}
SCORES = rng.normal(size=B)
LOGITS = rng.normal(size=12) * 4


@pytest.fixture(scope="module")
def cases():
    """[(name in math.js, its arguments, the Python result)], in float64 as JavaScript's numbers are."""
    with jax.enable_x64(True):
        return _cases()


def _cases():
    cases = []
    for mask in MASKS.values():
        cases += [
            ("masked.sum", (X, mask), masked.sum(X, mask)),
            ("masked.mean", (X, mask), masked.mean(X, mask)),
            ("masked.var", (X, mask), masked.var(X, mask)),
            ("masked.whiten", (X, mask), masked.whiten(X, mask)),
            ("masked.whiten", (X, mask, False), masked.whiten(X, mask, shift_mean=False)),
            ("advantages.shape_rewards", (1.5, X, mask, 0.1), advantages.shape_rewards(1.5, X, mask, kl_coef=0.1)),
            ("advantages.discounted_returns", (X, mask, 0.9), advantages.discounted_returns(X, mask, gamma=0.9)),
            ("importance.effective_sample_size", (X, mask), importance.effective_sample_size(X, mask)),
        ]
        for gamma, lam in ((1, 1), (1, 0), (0.9, 0.95), (0, 0)):
            expected = advantages.gae(X, Y, mask, gamma=gamma, lam=lam)
            cases.append(("advantages.gae", (X, Y, mask, gamma, lam), np.stack(expected)))
        expected = advantages.gae(X, Y, mask, gamma=0.9, lam=0)[0]
        cases.append(("advantages.deltas", (X, Y, mask, 0.9), expected))
    skipped = np.array([1, 0, 1, 1, 0, 1, 0, 0, 0])  # a tool's output between the tokens
    expected = advantages.gae(X, Y, skipped, gamma=0.9, lam=0.8)
    cases.append(("advantages.gae", (X, Y, skipped, 0.9, 0.8), np.stack(expected)))
    for p, q in ((X[0], Y[0]), (-3.0, -3.0), (-40.0, -0.1), (-1e-9, -2e-9)):
        cases += [(f"kl.{name}", (p, q), getattr(kl, name)(p, q)) for name in ("k1", "k2", "k3")]
    for chosen, rejected in ((1.0, -2.0), (-6.0, 6.0), (6.0, -6.0), (300.0, -300.0), (-300.0, 300.0), (0.0, 0.0)):
        cases.append(("losses.bradley_terry", (chosen, rejected), losses.bradley_terry(chosen, rejected)))
    tokens = ((-1.0, -1.0, 2.0), (-0.5, -1.0, 2.0), (-2.0, -1.0, -1.5), (-0.5, -1.0, -1.5), (-1.0, -1.0, 0.0))
    for new, old, advantage in tokens:
        arrays = (np.array([x]) for x in (new, old, advantage))
        loss, aux = losses.ppo_policy(*arrays, np.ones(1), clip=0.2)
        expected = {"ratio": aux["tokens"]["ratio"][0], "loss": loss, "clipped": bool(aux["clip_fraction"])}
        cases.append(("losses.ppo_policy", (new, old, advantage, 0.2), expected))
        expected = losses.policy_gradient(np.array([new]), np.array([advantage]), np.ones(1))
        cases.append(("losses.policy_gradient", (new, advantage), expected))
    for value, old, ret in ((1.0, 0.0, 2.0), (0.1, 0.0, 2.0), (-3.0, 0.5, 0.4), (0.0, 0.0, 0.0)):
        arrays = (np.array([x]) for x in (value, old, ret))
        _, aux = losses.ppo_value(*arrays, np.ones(1), clip=0.2)
        expected = {"square": aux["tokens"]["square"][0], "clipped": bool(aux["clip_fraction"])}
        cases.append(("losses.ppo_value", (value, old, ret, 0.2), expected))
    for temperature in (1, 0.5):
        expected = logprobs.gather(LOGITS, np.int32(3), temperature=temperature)
        cases.append(("logprobs.gather", (LOGITS, 3, temperature), expected))
    cases.append(("logprobs.gather", ([1000.0, -1000.0], 1), logprobs.gather(np.array([1000.0, -1000.0]), np.int32(1))))
    cases.append(("logprobs.before", (X, 4), logprobs.before(X[None], 4)[0]))
    for kind in ("none", "mean", "leave_one_out"):
        cases.append(("policy_gradient.baseline", (SCORES, kind), policy_gradient.baseline(SCORES, kind)))
        cases.append(("policy_gradient.baseline", ([2.0], kind), policy_gradient.baseline(np.array([2.0]), kind)))
        for scale in ("none", "group_std"):
            for scores in (SCORES, np.full(3, 0.1)):
                expected = advantages.group(scores[None], baseline=kind, scale=scale)[0]
                cases.append(("advantages.group", (scores, len(scores), kind, scale), expected))
    for kind, scale in itertools.product(advantages.BASELINES, advantages.SCALES):
        for scores in (np.concatenate([SCORES, [0.1, 0.1]]), np.full(6, 0.1)):
            expected = advantages.group(scores.reshape(3, 2), baseline=kind, scale=scale).reshape(-1)
            cases.append(("advantages.group", (scores, 2, kind, scale), expected))
    for kind, smoothing, h in itertools.product(losses.DPO, (0.0, 0.2), (-3.0, 0.0, 6.0)):
        if smoothing == 0 or kind in losses.SMOOTHED:
            expected = losses.dpo(h, 0.0, 0.0, 0.0, beta=0.5, kind=kind, smoothing=smoothing)
            cases.append(("losses.dpo", (h, 0.5, kind, smoothing), expected))
    lengths = np.array([[1, 1, 0], [1, 1, 1], [0, 0, 0]])
    for kind in masked.REDUCTIONS:
        cases.append(("masked.row_weights", ([2, 3, 0], kind, 5), masked.row_weights(lengths, kind, length=5)))
    for eos, missing in ((1, "replace"), (0, "replace"), (0, "subtract")):
        expected = policy.final_score(np.float64(3), np.array(eos), missing_eos=missing, penalty=0.5)
        cases.append(("policy.final_score", (3.0, eos, missing, 0.5), expected))
    for k in (0, 1, 5, 12, 99):
        cases.append(("sampling.top_k", (LOGITS, k), sampling.top_k(LOGITS, k)))
    for p in (0.05, 0.5, 0.9, 1):
        cases.append(("sampling.top_p", (LOGITS, p), sampling.top_p(LOGITS, p)))
    ties = np.array([1.0, 2.0, 2.0]), np.array([1.0, 1.0, 3.0])
    cases.append(("evaluate.win_rate", ties, win_rate.win_rate(*ties)[0]))
    rewards, masks = rng.normal(size=(B, R)), rng.integers(0, 2, (B, R))
    return cases + [("masked.sum", (rewards.reshape(-1), masks.reshape(-1)), masked.sum(rewards, masks))]


def test_javascript_is_python(cases, node):
    """To 1e-6 of the largest number, in one process of Node."""
    results = in_node(node, [(name, args) for name, args, _ in cases])
    assert len(results) >= 100
    for (name, args, expected), result in zip(cases, results, strict=True):
        if isinstance(expected, dict):
            assert result.keys() == expected.keys()
            expected, result = ([float(each[key]) for key in sorted(expected)] for each in (expected, result))
        expected = np.asarray(expected, np.float64)
        assert np.shape(result) == expected.shape, name
        finite = np.isfinite(expected)
        np.testing.assert_array_equal(np.isfinite(result), finite, err_msg=f"{name}{args}")
        scale = max(1.0, np.abs(expected[finite]).max(initial=0))
        difference = np.abs(np.asarray(result, np.float64)[finite] - expected[finite]).max(initial=0)
        assert difference <= 1e-6 * scale, f"{name}{args}"


def test_every_function_is_compared(cases):
    text, compared = MATH.read_text(encoding="utf-8"), {name for name, *_ in cases}
    for group in ("masked", "logprobs", "kl", "advantages", "losses", "importance", "policy", "sampling"):
        body = text.split(f"export const {group} = {{")[1].split("\n};")[0]
        names = set(re.findall(r"^  (\w+): ", body, flags=re.MULTILINE))
        assert names and {f"{group}.{name}" for name in names} - compared <= {"logprobs.logsumexp"}
