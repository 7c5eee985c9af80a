"""The algorithms that judge a completion against the others of its prompt; the policy is a table of logits."""

import dataclasses
import json
import subprocess
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax import fields, viz
from rlhf_jax.algorithms import POLICY, policy
from rlhf_jax.training import sharding
from rlhf_jax.viz import trace, verify
from tests.support import assert_close, assert_trees_close, error

IDS, B, R, PAD = 7, 8, 4, 0  # of the rollout `drawn`
SGD = optax.sgd(1.0)  # its step is the gradient
GROUPED = [name for name, each in POLICY.items() if hasattr(each.Config, "scale")]
REDUCTIONS = ("token", "sequence", "constant")
LENGTHS = np.array([4, 1, 3, 2, 4, 2, 1, 3])  # of two groups of four
PAIRS = {"online_dpo": {"group": 2, "loss": "ipo"}}  # of means over tokens


def config(name, **changes):
    sizes = {"batch": B, "group": 4, "epochs": 1, "lr": 0.1, "temperature": 0.7, "missing_eos_penalty": 0.5}
    alone = name in ("ppo", "policy_gradient", "reinforce_pp")
    return POLICY[name].Config(**(sizes | {"group": 1} if alone else sizes) | changes)


def begin(drawn, section, tx=SGD):
    table, other, _, _ = drawn
    return policy.init(table, jax.random.key(1), config=section, tx=tx).replace(reference=other)


def learn(drawn, name, section, rollout=None, **parts):
    """(state, numbers) after one update."""
    _, _, apply, found = drawn
    step = partial(policy.step, POLICY[name], config=section, apply=apply, tx=SGD, **parts)
    return sharding.jit(step, sharding.mesh())(begin(drawn, section), found if rollout is None else rollout)


def gradient(drawn, name, section, rollout=None, **parts):
    return drawn[0] - learn(drawn, name, section, rollout, **parts)[0].policy


# Advantages


def test_rloo_by_hand(drawn):
    """Scores 3 and 1 of two completions without KL: the other's score is the baseline, for every token alike."""
    section = config("rloo", group=2, kl="off")
    rollout = drawn[3].replace(score_B=jnp.array([3.0, 1, 0, 0, 2, 2, 5, 1]), eos_B=jnp.ones(B, bool))
    done = POLICY["rloo"].estimate(rollout, 0.0, config=section)
    assert_close(done.advantages_BR[:, 0], [2, -2, 0, 0, 0, 0, 4, -4])
    assert_close(done.advantages_BR, done.advantages_BR[:, :1] * rollout.mask_BR)


def test_the_kl_of_the_reward_is_that_of_the_whole_completion(drawn):
    rollout = drawn[3]
    done = POLICY["rloo"].estimate(rollout, 0.5, config=config("rloo"))
    score_B = jnp.where(rollout.eos_B, rollout.score_B, -0.5)
    total_B = score_B - 0.5 * jnp.sum(rollout.kl_BR, axis=1)
    assert_close(done.returns_BR, total_B[:, None] * rollout.mask_BR)
    assert_close(jnp.sum(done.rewards_BR, axis=1), total_B)
    others_B = (total_B.reshape(2, 4).sum(axis=1).repeat(4) - total_B) / 3
    assert_close(done.advantages_BR[:, 0], total_B - others_B)


def test_groups_without_spread_are_counted(drawn):
    rollout = drawn[3].replace(score_B=jnp.array([0.1] * 4 + [1, 2, 3, 4]), eos_B=jnp.ones(B, bool))
    state, numbers = learn(drawn, "grpo", config("grpo", kl="off"), rollout)
    assert numbers["groups_equal"] == 0.5
    alone = learn(drawn, "grpo", config("grpo", kl="off"), rollout.replace(score_B=jnp.full(B, 0.1)))[0]
    np.testing.assert_array_equal(alone.policy, drawn[0])  # not a rounding error of a step
    assert (state.policy != drawn[0]).any()


# The loss


@pytest.mark.parametrize("name", [name for name in POLICY if name != "ppo"])
def test_a_first_epoch_is_on_policy(name, drawn):
    """invariant 5; PPO's, which needs values, is in test_ppo.py."""
    _, numbers = learn(drawn, name, config(name, **PAIRS.get(name, {})))
    assert numbers.get("clip_fraction", 0) == 0
    assert_close([numbers["ratio"], numbers["approx_kl"]], [1, 0], atol=1e-5)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_gradient_of_each_reduction_by_hand(reduction, drawn):
    """On policy: minus the mean of A grad log p, with the weight that the reduction gives each token."""
    table, _, _, rollout = drawn
    section = config("rloo", reduction=reduction, kl="off")
    done = POLICY["rloo"].estimate(rollout, 0.0, config=section)
    weight_B = {"token": 1 / 20, "sequence": 1 / LENGTHS / B, "constant": 1 / (B * 5)}[reduction] * jnp.ones(B)
    expected = np.zeros((IDS, IDS))
    for row, column in np.argwhere(np.array(rollout.mask_BR)):
        before, token = int(rollout.tokens_BT[row, column]), int(rollout.response_BR[row, column])
        slope = (np.eye(IDS)[token] - np.array(jax.nn.softmax(table[before] / 0.7))) / 0.7
        expected[before] -= float(weight_B[row] * done.advantages_BR[row, column]) * slope
    assert_close(gradient(drawn, "rloo", section, length=5), expected)


@pytest.mark.parametrize(("reduction", "kl"), [("token", "off"), ("sequence", "exact"), ("constant", "k3")])
def test_microbatches_and_padding_change_nothing(reduction, kl, drawn):
    """invariant 8, at unequal lengths; padding columns, of prompt and response, in the constant reduction too."""
    section = config("rloo", group=2, reduction=reduction, kl=kl, entropy_coef=0.3, max_grad_norm=0.0)
    expected = gradient(drawn, "rloo", section, length=R)
    assert float(jnp.abs(expected).max()) > 1e-2
    assert_close(gradient(drawn, "rloo", dataclasses.replace(section, microbatches=4), length=R), expected, atol=1e-6)
    wider = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 3))) if x.shape == (B, R) else x, drawn[3])
    left = {"prompt_BP": PAD, "prompt_mask_BP": False}
    wider = wider.replace(
        **{key: jnp.pad(getattr(wider, key), ((0, 0), (2, 0)), constant_values=x) for key, x in left.items()}
    )
    assert_close(gradient(drawn, "rloo", section, wider, length=R), expected, atol=1e-6)


def test_a_group_stays_together(drawn):
    """In a shuffled epoch, in a minibatch and in a microbatch of prompts that are read at two widths."""
    section = config("rloo", group=2, minibatches=2, microbatches=2, widths=2, epochs=3)
    left = ((0, 0), (3, 0))
    rollout = drawn[3].replace(
        **{key: jnp.pad(getattr(drawn[3], key), left) for key in ("prompt_BP", "prompt_mask_BP")}
    )
    _, numbers = learn(drawn, "rloo", section, rollout, record=True)
    rows = np.asarray(numbers["record"]["update"]["rows_B"]).reshape(-1, 2)
    np.testing.assert_array_equal(rows[:, 1], rows[:, 0] + 1)
    assert (rows[:, 0] % 2 == 0).all() and len(set(map(tuple, rows[:, 0].reshape(3, -1)))) > 1
    logp = numbers["record"]["update"]["logp_BR"][0, 0]
    first = rows.reshape(3, 2, -1)[0, 0]
    assert_close(jnp.where(rollout.mask_BR[first], logp - rollout.logp_BR[first], 0), 0, atol=1e-5)


# KL in the loss, and the entropy bonus


@pytest.mark.parametrize("kl", ["k2", "k3", "exact"])
def test_a_kl_in_the_loss_adds_its_gradient(kl, drawn):
    table, other, apply, rollout = drawn
    inputs = (rollout.tokens_BT, rollout.attend_BT, R)

    def penalty(table):
        sides = [apply.policy.hidden(each, *inputs) for each in (table, other)]
        compared = apply.policy.compare(table, sides[0], other, sides[1], rollout.response_BR, temperature=0.7)
        k1_BR = apply.policy.logprobs(table, *inputs, temperature=0.7) - compared[0]
        each = {"k2": k1_BR**2 / 2, "k3": jnp.exp(-k1_BR) - 1 + k1_BR, "exact": compared[1]}[kl]
        return jnp.sum(each * rollout.mask_BR) / 20

    off, on = (config("dr_grpo", reduction="token", kl_coef=0.3, kl=each) for each in ("off", kl))
    added = gradient(drawn, "dr_grpo", on) - gradient(drawn, "dr_grpo", off)
    assert_close(added, 0.3 * jax.grad(penalty)(table), atol=2e-6)
    numbers = learn(drawn, "dr_grpo", on)[1]
    assert_close(numbers["kl_loss"], penalty(table), atol=1e-5)
    total = jnp.mean(policy.scored(rollout, on)) - 0.3 * numbers["kl_exact" if kl == "exact" else f"kl_{kl}"]
    assert_close(numbers["score_total"], total, atol=1e-5)


@pytest.mark.parametrize("name", ["policy_gradient", "dapo"])
def test_an_entropy_bonus_raises_the_entropy(name, drawn):
    plain, bonus = (config(name, entropy_coef=coef, kl_coef=0.0) for coef in (0.0, 2.0))
    gained = gradient(drawn, name, plain) - gradient(drawn, name, bonus)  # what the bonus adds to the step

    def entropy(table):
        _, _, apply, rollout = drawn
        hidden = apply.policy.hidden(table, rollout.tokens_BT, rollout.attend_BT, R)
        of_tokens = apply.policy.compare(table, hidden, table, hidden, rollout.response_BR, temperature=0.7)[2]
        return jnp.sum(of_tokens * rollout.mask_BR) / 20

    assert_close(gained, 2 * jax.grad(entropy)(drawn[0]), atol=2e-6)
    assert_close(learn(drawn, name, bonus)[1]["entropy_bonus"], entropy(drawn[0]), atol=1e-5)


@pytest.mark.parametrize(("name", "microbatches"), [("rloo", 1), ("rloo", 4), ("best_of_n", 2)])
def test_other_texts_add_the_gradient_of_their_cross_entropy(name, microbatches, drawn):
    """PPO-ptx: a mean over the tokens of all texts beside the minibatch, of unequal lengths, left-padded or not."""
    table, _, apply, rollout = drawn
    texts_BT = jax.random.randint(jax.random.key(5), (B, 6), 1, IDS)
    real_BT = (jnp.arange(6) >= jnp.arange(B)[:, None] % 4) & (jnp.arange(6) < 6 - jnp.arange(B)[:, None] // 4)
    mixed = rollout.replace(mix_BT=jnp.where(real_BT, texts_BT, PAD), mix_mask_BT=real_BT)

    def cross_entropy(table):
        logp_BT = jax.nn.log_softmax(table[texts_BT[:, :-1]])
        nats = [-logp_BT[b, t, texts_BT[b, t + 1]] for b in range(B) for t in range(5) if real_BT[b, t : t + 2].all()]
        assert len(nats) == sum(int(row.sum()) - 1 for row in real_BT)
        return jnp.mean(jnp.stack(nats))

    parts = {"group": 2, "microbatches": microbatches, "max_grad_norm": 0.0}
    plain, ptx = (config(name, ptx_coef=coef, **parts) for coef in (0.0, 3.0))
    added = gradient(drawn, name, ptx, mixed) - gradient(drawn, name, plain, rollout)
    assert_close(added, 3 * jax.grad(cross_entropy)(table), atol=3e-6)
    assert_close(learn(drawn, name, ptx, mixed)[1]["ptx_loss"], cross_entropy(table), atol=1e-5)


# What is refused, and what has no effect


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("rloo", {"group": 1}, "group: expected at least 2, got 1"),
        ("grpo", {"batch": 6}, "batch: expected a multiple of group x minibatches x microbatches = 4, got 6"),
        (
            "grpo",
            {"batch": 8, "minibatches": 4},
            "batch: expected a multiple of group x minibatches x microbatches = 16, got 8",
        ),
        ("dapo", {"clip": 0.3, "clip_high": 0.2}, "clip_high: expected 0, or at least clip = 0.3, got 0.2"),
        ("reinforce_pp", {"clip_high": 0.1}, "clip_high: expected 0, or at least clip = 0.2, got 0.1"),
        ("grpo", {"baseline": "median"}, "baseline: expected none or mean or leave_one_out or batch_mean, got"),
        ("rloo", {"kl": "k1"}, "kl: expected reward or k2 or k3 or exact or off, got 'k1'"),
    ],
)
def test_what_cannot_be_is_refused(name, changes, message):
    assert error(fields.check, config(name, **changes)).startswith(message)


def test_fields_without_effect():
    found = fields.unused(config("dr_grpo", epochs=1))
    assert found == dict.fromkeys(("kl_coef", "kl_target", "kl_horizon"), "kl is off") | {
        "gamma": "a completion is one action, with one advantage",
        **dict.fromkeys(("clip", "clip_high"), found["clip"]),
    }
    assert "kl_coef" not in fields.unused(config("grpo"))
    assert {"clip", "clip_high"} <= fields.unused(config("reinforce_pp", epochs=1)).keys()
    assert not {"clip", "clip_high"} & fields.unused(config("reinforce_pp", epochs=1, minibatches=2)).keys()


# The trace


@cache
def manifest(name):
    return {"config": {"model": {"dtype": "float32"}}, "stages": {name: {"algorithm": name}}}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *(
            (name, {})
            for name in ("rloo", "grpo", "dapo", "reinforce_pp", "policy_gradient", "online_dpo", "best_of_n")
        ),
        ("online_dpo", {"loss": "sigmoid"}),
        ("best_of_n", {"ended": False, "missing_eos": "subtract", "missing_eos_penalty": 0.0}),
    ],
)
def test_the_verifiers_recompute_each_part(name, changes, drawn, node):
    """What a loss hands out, in Python and in the page; and both find a breach of an advantage."""
    section = config(name, epochs=2, kl_coef=0.2, entropy_coef=0.1, **PAIRS.get(name, {}) | changes)
    best = drawn[3].replace(score_B=drawn[3].score_B + 9 * ~drawn[3].eos_B.astype(bool))  # did not end
    _, numbers = learn(drawn, name, section, best if "ended" in changes else None, record=True)
    recorded = numbers.pop("record")
    rollout = {key: value for key, value in vars(recorded["rollout"]).items() if value is not None}
    record = {"rollout": rollout, "update": recorded["update"], "minibatch": recorded["minibatch"]}
    arrays = {f"{part}.{key}": np.asarray(x) for part, found in record.items() for key, x in found.items()}
    logged = {f"{name}/{key}": float(value) for key, value in numbers.items()}
    more = {"config": dataclasses.asdict(section)}
    file = trace.File("file", name, "iter", 1, logged, arrays, {}, [], more)

    def breaches(file):
        results = {}
        for claim in [*verify._estimates(file, name), *verify._update(file, name, manifest(name))]:
            verify._check(file, claim, results.setdefault(claim.identity, verify.Result(claim.identity)))
        return {key: each.breach for key, each in results.items() if each.breach}, results.keys()

    found, identities = breaches(file)
    assert found == {}
    in_groups = name in (*GROUPED, "online_dpo", "best_of_n")
    assert ("group" in identities) == in_groups and ("pair loss" in identities) == (name == "online_dpo")
    assert ("KL loss" in identities) == (section.kl == "k3")
    arrays["rollout.response_BR"] = ended(arrays["rollout.response_BR"], rollout["mask_BR"], rollout["eos_B"])
    whole = _in_page(file, name)
    arrays["rollout.raw_advantages_BR"] = arrays["rollout.raw_advantages_BR"] + 0.1
    assert "group" in breaches(file)[0] or "baseline" in breaches(file)[0]
    right, wrong = verified(node, [whole, _in_page(file, name)])
    assert right["breach"] == "" and right["identities"] >= 10
    assert wrong["breach"].startswith("file: rollout.raw_advantages_BR: index ")


def ended(response_BR, mask_BR, eos_B):
    """Completions whose last token is EOS, id 1, where eos_B has it, and no token before."""
    response_BR, last_B = np.where(response_BR == 1, 2, response_BR), np.asarray(mask_BR).sum(axis=1) - 1
    response_BR[np.arange(B), last_B] = np.where(eos_B, 1, response_BR[np.arange(B), last_B])
    return response_BR


def _in_page(file, name):
    """(file, manifest) as the page has them, but for its arrays, which are lists."""
    kinds = {"f": "float32", "i": "int32", "u": "int32", "b": "uint8"}
    arrays = {
        key: {
            "dtype": kinds[x.dtype.kind],
            "shape": x.shape,
            "data": x.reshape(-1).astype(kinds[x.dtype.kind]).tolist(),
        }
        for key, x in file.arrays.items()
    }
    about = {"name": file.name, "stage": name, "step": 1, "numbers": file.numbers, "config": file.more["config"]}
    return about | {"arrays": arrays}, manifest(name) | {"tokenizer": {"pad_id": PAD, "eos_id": 1}}


PAGE = """
import { verify } from %s;
const types = { float32: Float32Array, int32: Int32Array, uint8: Uint8Array };
let text = "";
for await (const part of process.stdin) text += part;
const typed = ({ dtype, shape, data }) => ({ shape, data: new types[dtype](data) });
console.log(JSON.stringify(JSON.parse(text).map(([file, manifest]) => {
  file.arrays = Object.fromEntries(Object.entries(file.arrays).map(([name, array]) => [name, typed(array)]));
  return verify(file, manifest);
})));
"""


def verified(node, files):
    """What the page's verifier finds in each (file, manifest): {"identities", "error", "breach"}."""
    script = (Path(viz.__file__).parent / "static" / "verify.js").as_uri()
    program = [node, "--input-type=module", "-e", PAGE % json.dumps(script)]
    done = subprocess.run(program, input=json.dumps(files), text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_microbatches_keep_rows_in_their_order(drawn):
    """Bit for bit the same arrays, of groups of two in slices of two and of four rows."""
    one, two = (
        learn(drawn, "rloo", config("rloo", group=2, microbatches=m), record=True)[1]["record"]["update"]
        for m in (1, 2)
    )
    assert_trees_close(one, two, atol=1e-6)
