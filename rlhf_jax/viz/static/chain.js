// From log-probs to losses: everything that follows from the recorded arrays of an iteration and the knobs.

import { advantages, clip, kl, losses, masked, policy, policy_gradient, vmap } from "./math.js";
import { at, get, has } from "./trace.js";

// The recorded hyper-parameters of a file, as knobs.
export function knobs(file, manifest) {
  const config = file.config;
  return {
    beta: file.numbers[`${file.stage}/kl_coef`] ?? config.kl_coef ?? 0,
    gamma: config.gamma,
    lam: config.lam ?? 1,
    eps: config.clip ?? 0.2,
    clipping: config.clip !== undefined,
  };
}

// Whether the KL is penalized in the reward of each token; traces of before there was a choice have it there.
export const inReward = (config) => (config.kl ?? "reward") === "reward";

// The sum [B] of each row of a flat [B, R] array.
const perRow = (array, mask, R) =>
  Array.from({ length: mask.length / R }, (_, b) => masked.sum(array.subarray(b * R, b * R + R), mask.subarray(b * R, b * R + R)));

// Arrays [B, R] of an iteration under the knobs; `recorded` says whether they are those of the run.
export function chain(file, manifest, k) {
  const algorithm = manifest.stages[file.stage].algorithm, config = file.config;
  const x = (name) => (has(file, name) ? get(file, name).data : null);
  const mask = x("rollout.mask_BR"), [B, R] = get(file, "rollout.mask_BR").shape;
  const logp = x("rollout.logp_BR"), logp_ref = x("rollout.logp_ref_BR"), eos = x("rollout.eos_B"), score = x("rollout.score_B");
  const each = (f) => Float64Array.from(mask, (m, i) => (m ? f(i) : 0));
  const k1 = each((i) => (logp_ref ? kl.k1(logp[i], logp_ref[i]) : 0));
  const final = score && Float64Array.from(score, (v, b) => policy.final_score(v, eos[b], config.missing_eos, config.missing_eos_penalty));
  const beta = inReward(config) ? k.beta : 0;
  let rewards = final && vmap((v, k_R, m) => advantages.shape_rewards(v, k_R, m, beta), R, final, k1, mask);
  if (manifest.foreign) rewards = x("rollout.rewards_BR"); // how it was made is not known
  if (rewards && config.whiten_rewards) rewards = masked.whiten(rewards, mask, false);
  const values = x("rollout.values_BR");
  let raw = null, returns = null, deltas = null;
  if (algorithm === "ppo" && values && rewards) {
    deltas = vmap((r, v, m) => advantages.deltas(r, v, m, k.gamma), R, rewards, values, mask);
    raw = vmap((r, v, m) => advantages.gae(r, v, m, k.gamma, k.lam)[0], R, rewards, values, mask);
    returns = each((i) => raw[i] + values[i]);
  } else if (rewards && "scale" in config) {
    const sums = perRow(k1, mask, R), totals = Array.from(final, (v, b) => v - beta * sums[b]);
    const of = advantages.group(totals, config.group, config.baseline, config.scale);
    returns = each((i) => totals[Math.floor(i / R)]);
    raw = each((i) => of[Math.floor(i / R)]);
  } else if (rewards && "reward_to_go" in config) {
    const to_go = config.reward_to_go;
    returns = to_go ? vmap((r, m) => advantages.discounted_returns(r, m, k.gamma), R, rewards, mask) : each((i) => final[Math.floor(i / R)] - beta * k1[i]);
    const sums = perRow(to_go ? k1 : returns, mask, R), length = perRow(mask, mask, R);
    const totals = Array.from(final, (v, b) => (to_go ? v - beta * sums[b] : sums[b] / Math.max(length[b], 1)));
    const baseline = policy_gradient.baseline(totals, config.baseline);
    raw = each((i) => returns[i] - baseline[Math.floor(i / R)]);
  } else {
    raw = x("rollout.raw_advantages_BR") ?? x("rollout.advantages_BR");
    returns = x("rollout.returns_BR");
  }
  const white = raw && config.whiten_advantages ? masked.whiten(raw, mask) : raw;
  // A policy gradient that takes one step a rollout has no ratio in its loss, nor has fine-tuning on the best: -A log p.
  const plain = algorithm === "best_of_n" || (algorithm === "policy_gradient" && !(config.epochs > 1 && config.importance));
  const pairs = algorithm === "online_dpo" ? config : null;
  return { B, R, mask, logp, logp_ref, eos, score, final, k1, rewards, values, deltas, raw, returns, white, algorithm, plain, pairs, high: config.clip_high,
    group: config.group > 1 ? config.group : B };
}

// One pass of the update, laid back on the rows of the batch: the new log-probs, ratios and values [B, R]. Tokens that
// the pass did not use (of other minibatches) have used 0.
export function pass(file, e) {
  if (!has(file, "update.rows_B")) return null;
  const { data: mask, shape: [B, R] } = get(file, "rollout.mask_BR");
  const [, M] = get(file, "update.rows_B").shape;
  const now = new Float64Array(B * R), ratio = new Float64Array(B * R).fill(1), used = new Uint8Array(B * R);
  const value = has(file, "update.values_BR") ? new Float64Array(B * R) : null;
  const penalty = has(file, "update.kl_loss_BR") ? new Float64Array(B * R) : null; // the KL in the loss, before β
  for (let m = 0; m < M; m++) {
    const rows = at(get(file, "update.rows_B"), e, m).data, l = at(get(file, "update.logp_BR"), e, m).data;
    const r = at(get(file, "update.ratio_BR"), e, m).data, v = value && at(get(file, "update.values_BR"), e, m).data;
    const x = penalty && at(get(file, "update.kl_loss_BR"), e, m).data;
    rows.forEach((b, j) => {
      for (let t = 0; t < R; t++) {
        if (!mask[b * R + t]) continue;
        const [to, from] = [b * R + t, j * R + t];
        now[to] = l[from];
        ratio[to] = r[from];
        used[to] = 1;
        if (value) value[to] = v[from];
        if (penalty) penalty[to] = x[from];
      }
    });
  }
  return { now, ratio, used, value, penalty };
}

// The same pass with the losses [B, R] of its tokens, which the knobs change.
export function priced(laid, c, k) {
  const { mask } = c, { now, ratio } = laid, [low, high] = k.clipping ? [k.eps, c.high || k.eps] : [Infinity, Infinity];
  const token = (i) => losses.ppo_policy(Math.log(ratio[i]), 0, c.white[i], low, high);
  const unweighted = c.plain && !k.clipping, ofPairs = c.pairs && pairLosses(now, c);
  const of = (i) => (ofPairs ? ofPairs[Math.floor(i / c.R)] : unweighted ? losses.policy_gradient(now[i], c.white[i]) : token(i).loss);
  const loss = Float64Array.from(mask, (m, i) => (m ? of(i) : 0));
  const clipped = Uint8Array.from(mask, (m, i) => (m && !ofPairs && token(i).clipped ? 1 : 0));
  return { ...laid, loss, clipped };
}

// Whether DPO's log-ratio of a completion is a mean over its tokens, and not their sum.
export const averaged = (pairs) => pairs.total === "mean" || (pairs.total === "auto" && pairs.loss === "ipo");

// The log-ratio [B] of each completion, as `averaged` has it.
export function logRatios(now, { R, mask, logp_ref, pairs }) {
  const sums = perRow(Float64Array.from(mask, (m, i) => (m ? now[i] - logp_ref[i] : 0)), mask, R);
  const lengths = perRow(mask, mask, R);
  return sums.map((sum, b) => (averaged(pairs) ? sum / Math.max(lengths[b], 1) : sum));
}

// The loss [B] of each completion's pair, rows 2q and 2q + 1; 0 where the two are equally good.
export function pairLosses(now, c) {
  const { B, R, raw, pairs } = c, gain = logRatios(now, c);
  return Array.from({ length: B }, (_, b) => {
    const sign = raw[b * R], h = sign * (gain[b] - gain[b ^ 1]);
    return sign ? losses.dpo(h, pairs.beta, pairs.loss, pairs.smoothing) : 0;
  });
}

// What each algorithm would give every token to maximize, from the same rollout. Where it has one completion a prompt,
// the whole batch stands in for the group.
export function objectives(c, ps, k, high) {
  const { R, mask, k1, final } = c;
  const length = perRow(mask, mask, R), sums = perRow(k1, mask, R);
  const totals = Array.from(final, (v, b) => v - k.beta * sums[b]);
  const now = ps ? ps.now : c.logp, ratio = ps ? ps.ratio : new Float64Array(mask.length).fill(1);
  const grouped = (scores, baseline, scale) => advantages.group(scores, c.group, baseline, scale);
  const rloo = grouped(totals, "leave_one_out", "none"), grpo = grouped(final, "mean", "group_std"), dr = grouped(final, "mean", "none");
  const surrogate = (A, i, lo, hi) => Math.min(A * ratio[i], A * clip(ratio[i], 1 - lo, 1 + hi));
  const k3 = (i) => kl.k3(now[i], c.logp_ref[i]);
  const of = {
    REINFORCE: (i, b) => totals[b] * now[i],
    RLOO: (i, b) => rloo[b] * now[i],
    GRPO: (i, b) => surrogate(grpo[b], i, k.eps, k.eps) - k.beta * k3(i),
    "Dr. GRPO": (i, b) => surrogate(dr[b], i, k.eps, k.eps),
    "clip-higher": (i, b) => surrogate(grpo[b], i, k.eps, high),
    PPO: (i) => surrogate(c.white ? c.white[i] : 0, i, k.eps, k.eps),
  };
  const out = {};
  for (const [name, f] of Object.entries(of)) {
    out[name] = Float64Array.from(mask, (m, i) => (m ? f(i, Math.floor(i / R)) : 0));
  }
  return { of: out, totals, rloo, grpo, dr, length };
}
