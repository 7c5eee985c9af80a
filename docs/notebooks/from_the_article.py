# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # RLHF from the article, in order
#
# A language model is a policy, a reward model is learned from preferences, and the policy learns from it. Each idea is
# here as its formula, as the library's function on real arrays, and as a picture. At the end there is a trained
# summarizer. All texts are generated from a seed, so nothing is downloaded.
#
# Sizes are for 2 CPU cores. `RLHF_JAX_SMALL=1` in the environment makes them tiny, to check that every cell runs.

# %%
# On Colab, or where the package is not installed yet: set SOURCE to the address or the folder of the repository.
import importlib.util

SOURCE = "../.."
if importlib.util.find_spec("rlhf_jax") is None:
    import subprocess
    import sys

    subprocess.run([sys.executable, "-m", "pip", "install", "-q", SOURCE], check=True)

# %%
import dataclasses
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from absl import logging

import rlhf_jax
from rlhf_jax import config as configs
from rlhf_jax import pipeline
from rlhf_jax.configs import pg_tweets, ppo_summarize
from rlhf_jax.evaluate.interval import paired_gain
from rlhf_jax.models import heads
from rlhf_jax.ops import advantages, importance, kl, logprobs, losses, masked
from rlhf_jax.report import metrics
from rlhf_jax.rewards import gold, sentiment

logging.set_verbosity(logging.FATAL)  # checkpoints say how they are read
SMALL = bool(os.environ.get("RLHF_JAX_SMALL"))
RUNS = Path(os.environ.get("RLHF_JAX_RUNS", "runs/notebook"))


def changed(config, **sections):
    """The config with other fields in its sections."""
    sections = {name: dataclasses.replace(getattr(config, name), **fields) for name, fields in sections.items()}
    return dataclasses.replace(config, **sections)


# %% [markdown]
# ## 1. A language model
#
# A small GPT-2 reads characters and learns to write tweets from random weights; then it is fine-tuned on happy ones.
# The loss of both is the cross-entropy, in nats a character:
#
# $$L = -\frac{1}{|T|}\sum_t \log \pi(y_t \mid y_{<t})$$

# %%
tweets = configs.parse(pg_tweets.get_config("made").to_dict())
tweets = changed(tweets, pretrain={"steps": 400, "eval_every": 200}, sft={"steps": 150, "eval_every": 50})
tweets = changed(tweets, policy_gradient={"steps": 100})
if SMALL:
    tweets = changed(tweets, pretrain={"steps": 6, "eval_every": 3}, sft={"steps": 4, "eval_every": 2})
    tweets = changed(tweets, policy_gradient={"steps": 3, "eval_every": 1}, evaluation={"prompts": 32, "batch": 32})
    tweets = changed(tweets, model={"layers": 1, "heads": 1, "head_size": 16, "width": 16})

for stage in ("pretrain", "sft"):
    pipeline.run(tweets, RUNS / "tweets", only=stage)

rows = metrics.read(RUNS / "tweets" / "pretrain" / "metrics.jsonl")
steps, nats = zip(*[(row["step"], row["pretrain/loss"]) for row in rows if "pretrain/loss" in row], strict=True)
plt.figure(figsize=(7, 2.8))
plt.plot(steps, nats)
plt.xlabel("step")
plt.ylabel("nats a character")
plt.title("Pretraining")
plt.show()

# %%
writer = rlhf_jax.load(RUNS / "tweets", stage="sft")
texts = writer.generate("", n=16, seed=1)
for text in texts[:5]:
    print(repr(text))

# %% [markdown]
# ## 2. It is a policy
#
# The state is the text so far, the action is the next token. The logits give a probability for each token:
#
# $$\pi(y_t \mid y_{<t}) = \mathrm{softmax}(\mathrm{logits}_t)[y_t]$$

# %%
tokenizer, apply = writer.tokenizer, writer.apply.policy
ids = [[tokenizer.eos_id] + tokenizer.encode(text) for text in texts if text][:8]  # EOS stands before every text
T = max(map(len, ids))
tokens_BT = np.array([[tokenizer.pad_id] * (T - len(row)) + row for row in ids])  # padded on the left
mask_BT = tokens_BT != tokenizer.pad_id

hidden_BTD = apply.hidden(writer.params, tokens_BT, mask_BT)
logits_BTV = apply.logits(writer.params, hidden_BTD)
first_V = jax.nn.softmax(logits_BTV[0, -min(map(len, ids))])
likely = np.argsort(-first_V)[:12]
plt.figure(figsize=(7, 2.8))
plt.bar([repr(tokenizer.decode([i]))[1:-1] or "end" for i in likely], np.asarray(first_V)[likely])
plt.title("The twelve likeliest next characters at one place")
plt.show()

# %% [markdown]
# ## 3. Log-probs, and the shift by one
#
# The output at position t scores the token at t + 1. `logprobs.before` is the only function that shifts.

# %%
R = T - 1
shifted_BRV = logprobs.before(logits_BTV, R)
logp_BR = logprobs.gather(shifted_BRV, tokens_BT[:, -R:])
response_BR = jnp.asarray(logprobs.predicted(mask_BT))
assert np.allclose(
    jnp.where(response_BR, logp_BR - apply.logprobs(writer.params, tokens_BT, mask_BT, R), 0), 0, atol=1e-4
)
print(f"loss: {losses.cross_entropy(logp_BR, response_BR):.3f} nats a character")

shown = np.asarray(response_BR[0])
plt.figure(figsize=(7, 2.8))
plt.bar(range(shown.sum()), np.exp(np.asarray(logp_BR[0])[shown]))
plt.xticks(range(shown.sum()), list(tokenizer.decode(ids[0][1:])))
plt.ylabel("probability of the character")
plt.title("What the policy thought of its own text")
plt.show()

# %% [markdown]
# ## 4. A reward model and its loss
#
# The same decoder with one number at the last token. People say which of two texts is better (Bradley-Terry):
#
# $$L = -\log \sigma(r_{chosen} - r_{rejected})$$
#
# Here VADER says which of two tweets is happier, and a few gradient steps teach a reward model to agree.

# %%
scalar = heads.ScalarModel(writer.config)
reward_params = scalar.init(jax.random.key(0), writer.params)
happy_B = np.array(sentiment.compound([tokenizer.decode(row) for row in ids]))
order = np.argsort(-happy_B)
better, worse = order[: len(order) // 2], order[::-1][: len(order) // 2]


@jax.jit
def preference_loss(params):
    score_B = scalar.score(params, tokens_BT, mask_BT)
    return losses.bradley_terry(score_B[better], score_B[worse]).mean()


curve = []
for _ in range(5 if SMALL else 30):
    value, gradient = jax.value_and_grad(preference_loss)(reward_params)
    reward_params = jax.tree.map(lambda p, g: p - 0.05 * g, reward_params, gradient)
    curve.append(float(value))
plt.figure(figsize=(7, 2.8))
plt.plot(curve)
plt.axhline(np.log(2), color="grey", linestyle=":")
plt.title("The preference loss; the dotted line is a coin's, log 2")
plt.xlabel("gradient step")
plt.show()

# %% [markdown]
# ## 5. The reward of a token
#
# The score stands on the last token, and each token pays for its distance from the reference:
#
# $$r_t = -\beta\,(\log \pi_t - \log \pi^{ref}_t) + [t = last]\; score$$
#
# As reference we take the policy before its fine-tuning on happy tweets.

# %%
before = rlhf_jax.load(RUNS / "tweets", stage="pretrain")
logp_ref_BR = apply.logprobs(before.params, tokens_BT, mask_BT, R)
kl_BR = jnp.where(response_BR, kl.k1(logp_BR, logp_ref_BR), 0)
shape = jax.vmap(lambda score, kl_R, mask_R: advantages.shape_rewards(score, kl_R, mask_R, kl_coef=0.1))
rewards_BR = shape(jnp.asarray(happy_B, jnp.float32), kl_BR, response_BR)
plt.figure(figsize=(7, 2.8))
plt.bar(range(shown.sum()), np.asarray(rewards_BR[0])[shown])
plt.xticks(range(shown.sum()), list(tokenizer.decode(ids[0][1:])))
plt.title("The reward of each character: minus its KL, and the score on the last")
plt.show()

# %% [markdown]
# ## 6. Values and advantages (GAE)
#
# A value is what is expected from a place onwards. An advantage says how much better a token did:
#
# $$\delta_t = r_t + \gamma V_{t+1} - V_t \qquad A_t = \delta_t + \gamma\lambda A_{t+1}$$

# %%
values_BR = jnp.where(response_BR, rewards_BR.sum() / response_BR.sum(), 0.0)  # a constant: no value model yet
plt.figure(figsize=(7, 2.8))
for lam, label in ((1.0, "lambda 1: return - value"), (0.95, "lambda .95"), (0.0, "lambda 0: TD error")):
    gae = jax.vmap(lambda r, v, m, lam=lam: advantages.gae(r, v, m, gamma=1.0, lam=lam))
    advantage_BR, return_BR = gae(rewards_BR, values_BR, response_BR)
    plt.plot(np.asarray(advantage_BR[0])[shown], label=label)
plt.legend()
plt.title("Advantages of one text")
plt.xlabel("character")
plt.show()
white_BR = masked.whiten(advantage_BR, response_BR)
print(f"whitened: mean {masked.mean(white_BR, response_BR):.1e}, variance {masked.var(white_BR, response_BR):.4f}")

# %% [markdown]
# ## 7. KL, and why there is a penalty
#
# Three estimates need only the sampled tokens; the exact KL sums over the vocabulary. `k1` may be negative.
# Without a penalty the policy finds texts that score well and say nothing: reward hacking.

# %%
exact_BR = kl.exact(
    shifted_BRV, logprobs.before(apply.logits(before.params, apply.hidden(before.params, tokens_BT, mask_BT)), R)
)
for name, estimate_BR in {
    "k1": kl_BR,
    "k2": kl.k2(logp_BR, logp_ref_BR),
    "k3": kl.k3(logp_BR, logp_ref_BR),
    "exact": exact_BR,
}.items():
    each_B = masked.sum(estimate_BR, response_BR, axis=1)
    print(f"{name:6} {each_B.mean():6.2f} nats a text, from {each_B.min():6.2f} to {each_B.max():6.2f}")
hack = "love love love love love"
print(f"VADER scores {hack!r} with {sentiment.compound([hack])[0]:.2f}, the best text above with {happy_B.max():.2f}")

# %% [markdown]
# ## 8. Happy tweets: policy gradient
#
# $$\nabla J = \mathbb{E}\left[\sum_t A_t \nabla \log \pi(y_t \mid y_{<t})\right]$$
#
# The reward is VADER's score. The run stops moving away from the reference at a few nats.

# %%
summary = pipeline.run(tweets, RUNS / "tweets")
rows = metrics.read(RUNS / "tweets" / "rl" / "metrics.jsonl")
figure, axes = plt.subplots(1, 2, figsize=(9, 3))
for axis, name in zip(axes, ("reward", "kl_exact"), strict=True):
    pairs = [(row["step"], row[f"rl/{name}"]) for row in rows if row.get(f"rl/{name}") is not None]
    axis.plot(*zip(*pairs, strict=True))
    axis.set_title(name)
    axis.set_xlabel("iteration")
plt.show()

# %%
happy = rlhf_jax.load(RUNS / "tweets")
pairs = list(zip(writer.generate("", n=32, seed=2), happy.generate("", n=32, seed=2), strict=True))
for old, new in pairs[:5]:
    print(f"{old!r:40} -> {new!r}")
gain, (low, high) = paired_gain(*[sentiment.compound(list(side)) for side in list(zip(*pairs, strict=True))[::-1]])
print(f"mean VADER of 32 samples: {gain:+.2f} ({low:+.2f} to {high:+.2f})")

# %% [markdown]
# ## 9. Importance sampling
#
# A rollout may be used again when its tokens are weighted by $w_t = \pi_{new} / \pi_{old}$. The effective sample size
# says how much of it is left:
#
# $$ESS = \frac{(\sum w)^2}{n \sum w^2}$$

# %%
new_BR = apply.logprobs(happy.params, tokens_BT, mask_BT, R)
weight = np.asarray(jnp.exp(new_BR - logp_BR))[np.asarray(response_BR)]
share = importance.effective_sample_size(jnp.where(response_BR, new_BR - logp_BR, 0), response_BR)
plt.figure(figsize=(7, 2.8))
plt.hist(weight, bins=np.linspace(0, max(2, weight.max()), 40), log=True)
plt.title(f"Weights of the old texts under the new policy: effective share {share:.2f}")
plt.xlabel("w")
plt.show()

# %% [markdown]
# ## 10. The clip
#
# $$L = \frac{1}{|T|} \sum_t \max\left(-A_t w_t,\; -A_t\, \mathrm{clip}(w_t, 1 - \epsilon, 1 + \epsilon)\right)$$
#
# On the flat part of the curve a token has no gradient: it has moved far enough.

# %%
sign_B = jnp.where(jnp.asarray(happy_B) >= happy_B.mean(), 1.0, -1.0)
A_BR = sign_B[:, None] * jnp.ones(new_BR.shape)
value, aux = losses.ppo_policy(new_BR, logp_BR, A_BR, response_BR, clip=0.2)
plt.figure(figsize=(7, 2.8))
for sign, color in ((1, "tab:blue"), (-1, "tab:red")):
    chosen = np.asarray(response_BR & (sign == A_BR))
    plt.scatter(
        np.asarray(aux["tokens"]["ratio"])[chosen],
        np.asarray(aux["tokens"]["loss"])[chosen],
        s=8,
        color=color,
        label=f"A = {sign:+d}",
    )
plt.xlim(0, 2)
plt.ylim(-1.6, 2.2)
plt.legend()
plt.ylabel("loss")
plt.title(f"The clipped loss of every token; clipped: {aux['clip_fraction']:.2f}")
plt.xlabel("w")
plt.show()

# %% [markdown]
# ## 11. Summarization
#
# All of it together: fine-tuning on summaries by writers of mixed skill, a reward model from noisy preferences, and PPO
# with a value model. The posts are made from hidden records, so the true reward of every summary is known.

# %%
summaries = configs.parse(ppo_summarize.get_config("tiny").to_dict())
if SMALL:
    world = {"world_sft": 64, "world_preferences": 32, "world_prompts": 32, "world_held_out": 16}
    summaries = changed(summaries, data=world, text={"vocab_size": 300}, sft={"steps": 4, "batch": 8, "eval_every": 2})
    summaries = changed(summaries, reward={"steps": 4, "batch": 8}, ppo={"steps": 2, "batch": 8, "epochs": 1})
    summaries = changed(summaries, data={"prompt_length": 256, "response_length": 64}, trace={"every": 0})
    summaries = changed(summaries, model={"layers": 1, "heads": 1, "head_size": 16, "width": 16, "context": 320})
    summaries = changed(summaries, evaluation={"prompts": 16, "batch": 16})
summary = pipeline.run(summaries, RUNS / "summaries")
print(
    {
        name: round(value, 3)
        for name, value in summary.items()
        if name.endswith("gold_gain") or name == "ppo/eval_kl_exact"
    }
)

# %%
from rlhf_jax.data import world as worlds

rows = [row for row, _ in zip(worlds.generate("prompts", "validation", seed=99), range(32), strict=False)]
answers = {}
for stage in ("sft", "ppo"):
    model = rlhf_jax.load(RUNS / "summaries", stage=stage)
    answers[stage] = model.generate([row["prompt"] for row in rows], temperature=0.7, seed=3)
print(rows[0]["prompt"], *(f"\n{stage}: {texts[0]}" for stage, texts in answers.items()))
scores = {stage: gold.of_rows(rows, texts) for stage, texts in answers.items()}
gain, (low, high) = paired_gain(scores["ppo"], scores["sft"])
before_gold, after_gold = np.mean(scores["sft"]), np.mean(scores["ppo"])
print(f"true reward of 32 new posts: {before_gold:.2f} -> {after_gold:.2f}, {gain:+.2f} ({low:+.2f} to {high:+.2f})")

# %%
plt.figure(figsize=(7, 2.8))
plt.scatter(scores["sft"], scores["ppo"], alpha=0.5)
plt.plot([-1, 1], [-1, 1], color="grey", linestyle=":")
plt.xlabel("true reward before PPO")
plt.ylabel("after")
plt.title("Each point is a new post; above the line PPO is better")
plt.show()
