// All the maths of the page: pure functions of numbers and arrays, named as in the Python package.
// Arrays of a batch are flat, [B, R] row by row; `mask` is 1 on response tokens. tests/viz/test_math.py compares each
// function with its Python counterpart.

const range = (n) => Array.from({ length: n }, (_, i) => i);
const map2 = (x, y, f) => Float64Array.from(x, (value, i) => f(value, y[i]));

const sum = (x) => x.reduce((a, b) => a + b, 0);

// The standard deviation (ddof 1); 1 where all numbers are equal.
const spread = (x) => {
  if (x.every((value) => value === x[0])) return 1;
  const apart = x.map((value) => value - x[0]), mean = sum(apart) / x.length;
  return Math.sqrt(sum(apart.map((value) => (value - mean) ** 2)) / Math.max(x.length - 1, 1));
};

// ops/masked.py
export const masked = {
  sum: (x, mask) => x.reduce((total, value, i) => (mask[i] ? total + value : total), 0),
  mean: (x, mask) => masked.sum(x, mask) / Math.max(count(mask), 1),
  var: (x, mask) => {
    const centre = masked.mean(x, mask);
    return masked.mean(Float64Array.from(x, (value) => (value - centre) ** 2), mask);
  },
  whiten: (x, mask, shift_mean = true) => {
    const centre = masked.mean(x, mask), scale = 1 / Math.sqrt(masked.var(x, mask) + 1e-8);
    return map2(x, mask, (value, m) => (m ? (value - centre) * scale + (shift_mean ? 0 : centre) : 0));
  },
  // Weights of the rows of a minibatch, from their numbers of tokens.
  row_weights: (tokens_B, reduction, length) => {
    const share = tokens_B.reduce((a, b) => a + b, 0) / tokens_B.length;
    return Float64Array.from(tokens_B, (n) => ({ token: 1, sequence: share / Math.max(n, 1), constant: share / length })[reduction]);
  },
};

export const count = (mask) => mask.reduce((n, m) => n + (m ? 1 : 0), 0);

// ops/logprobs.py
export const logprobs = {
  before: (x, n) => x.slice(x.length - n - 1, x.length - 1),
  logsumexp: (logits) => {
    const top = logits.reduce((a, b) => Math.max(a, b), -Infinity);
    return top === -Infinity ? top : top + Math.log(logits.reduce((total, x) => total + Math.exp(x - top), 0));
  },
  gather: (logits, target, temperature = 1) => {
    const scaled = Array.from(logits, (x) => x / temperature);
    return scaled[target] - logprobs.logsumexp(scaled);
  },
};

// ops/kl.py, of numbers
export const kl = {
  k1: (logp, logp_ref) => logp - logp_ref,
  k2: (logp, logp_ref) => (logp - logp_ref) ** 2 / 2,
  k3: (logp, logp_ref) => Math.expm1(logp_ref - logp) - (logp_ref - logp),
};

// ops/advantages.py, of one response
export const advantages = {
  shape_rewards: (score, kl_R, mask_R, kl_coef) => {
    const last = Array.from(mask_R).lastIndexOf(1);
    return Float64Array.from(mask_R, (m, t) => (m ? -kl_coef * kl_R[t] : 0) + (t === last ? score : 0));
  },
  discounted_returns: (rewards_R, mask_R, gamma) => {
    const returns_R = new Float64Array(rewards_R.length);
    let later = 0;
    for (let t = rewards_R.length - 1; t >= 0; t--) if (mask_R[t]) returns_R[t] = later = rewards_R[t] + gamma * later;
    return returns_R;
  },
  deltas: (rewards_R, values_R, mask_R, gamma) => {
    const deltas_R = new Float64Array(rewards_R.length);
    let next = 0;
    for (let t = rewards_R.length - 1; t >= 0; t--) {
      if (!mask_R[t]) continue;
      deltas_R[t] = rewards_R[t] + gamma * next - values_R[t];
      next = values_R[t];
    }
    return deltas_R;
  },
  gae: (rewards_R, values_R, mask_R, gamma, lam) => {
    const deltas_R = advantages.deltas(rewards_R, values_R, mask_R, gamma);
    const advantages_R = new Float64Array(rewards_R.length);
    let later = 0;
    for (let t = rewards_R.length - 1; t >= 0; t--) {
      if (mask_R[t]) advantages_R[t] = later = deltas_R[t] + gamma * lam * later;
    }
    return [advantages_R, map2(advantages_R, range(rewards_R.length), (a, t) => (mask_R[t] ? a + values_R[t] : 0))];
  },
  // Scores of the completions of some prompts, each prompt's O next to each other.
  group: (scores_B, O, baseline, scale) => {
    const all = Array.from(scores_B), zero = all[0];
    const std = { none: () => 1, group_std: spread, batch_std: () => spread(all) }[scale];
    return Float64Array.from(all, (score, i) => {
      const scores_O = all.slice(i - (i % O), i - (i % O) + O);
      const mean = (x) => zero + sum(x.map((s) => s - zero)) / x.length; // exact where all are equal
      const from = {
        none: () => 0, mean: () => mean(scores_O), batch_mean: () => mean(all),
        leave_one_out: () => zero + (sum(scores_O.map((s) => s - zero)) - (score - zero)) / Math.max(O - 1, 1),
      }[baseline]();
      return (score - from) / std(scores_O);
    });
  },
};

// ops/losses.py, of one token or one pair
export const losses = {
  bradley_terry: (chosen, rejected) => softplus(rejected - chosen),
  // Of the difference h of the two log-ratios, in nats.
  dpo: (h, beta, kind, smoothing) => {
    if (kind === "ipo") return (h - 1 / (2 * beta)) ** 2;
    if (kind === "hinge") return Math.max(1 - beta * h, 0);
    const right = (1 - smoothing) * softplus(-beta * h), swapped = smoothing * softplus(beta * h);
    return kind === "robust" ? (right - swapped) / (1 - 2 * smoothing) : right + swapped;
  },
  policy_gradient: (logp, advantage) => -advantage * logp,
  ppo_policy: (logp, logp_old, advantage, low, high = low) => {
    const ratio = Math.exp(logp - logp_old);
    const plain = -advantage * ratio, clipped = -advantage * clip(ratio, 1 - low, 1 + high);
    return { ratio, loss: Math.max(plain, clipped), clipped: clipped > plain };
  },
  ppo_value: (value, value_old, ret, eps) => {
    const plain = (value - ret) ** 2, clipped = (clip(value, value_old - eps, value_old + eps) - ret) ** 2;
    return { square: Math.max(plain, clipped), clipped: clipped > plain };
  },
};

export const clip = (x, low, high) => Math.min(Math.max(x, low), high);
export const softplus = (x) => Math.max(x, 0) + Math.log1p(Math.exp(-Math.abs(x)));
export const sigmoid = (x) => Math.exp(-softplus(-x));

// ops/importance.py
export const importance = {
  effective_sample_size: (log_weight, mask) => {
    const top = log_weight.reduce((most, w, i) => (mask[i] ? Math.max(most, w) : most), -Infinity);
    if (top === -Infinity) return 0;
    const weight = map2(log_weight, mask, (w, m) => (m ? Math.exp(w - top) : 0));
    const square = weight.reduce((total, w) => total + w * w, 0);
    return weight.reduce((total, w) => total + w, 0) ** 2 / (count(mask) * square);
  },
};

// algorithms/policy.py and algorithms/policy_gradient.py
export const policy = {
  final_score: (score, eos, missing_eos, penalty) => (eos ? score : missing_eos === "replace" ? -penalty : score - penalty),
};
export const policy_gradient = {
  baseline: (returns_B, kind) => {
    const total = returns_B.reduce((a, b) => a + b, 0), B = returns_B.length;
    const one = { none: () => 0, mean: () => total / B, leave_one_out: (r) => (total - r) / Math.max(B - 1, 1) }[kind];
    return Float64Array.from(returns_B, one);
  },
};

// ops/sampling.py
export const sampling = {
  top_k: (logits, k) => {
    if (k === 0 || k >= logits.length) return Array.from(logits);
    const least = Array.from(logits).sort((a, b) => b - a)[k - 1];
    return Array.from(logits, (x) => (x < least ? -Infinity : x));
  },
  top_p: (logits, p) => {
    if (p === 1) return Array.from(logits);
    const order = range(logits.length).sort((a, b) => logits[b] - logits[a]);
    const total = logprobs.logsumexp(logits), kept = Array(logits.length).fill(-Infinity);
    let before = 0;
    for (const i of order) {
      if (before >= p) break;
      kept[i] = logits[i];
      before += Math.exp(logits[i] - total);
    }
    return kept;
  },
};

// evaluate/interval.py: mean of paired differences; evaluate/win_rate.py: a tie is half a win
export const evaluate = {
  mean: (x) => x.reduce((a, b) => a + b, 0) / x.length,
  win_rate: (after, before) => evaluate.mean(Array.from(after, (a, i) => (a > before[i] ? 1 : a === before[i] ? 0.5 : 0))),
};

// One row [R] of a flat [B, R] array.
export const row = (x, r, R) => x.subarray(r * R, (r + 1) * R);

// f(row of each array) over the rows of a batch: a flat array. The last array is [B, R]; one of B numbers gives its own.
export const vmap = (f, R, ...arrays) => {
  const size = arrays.at(-1).length, out = new Float64Array(size);
  for (let b = 0; b < size / R; b++) out.set(f(...arrays.map((x) => (x.length === size ? row(x, b, R) : x[b]))), b * R);
  return out;
};
