// The identities of viz/verify.py that concern a policy's iteration, recomputed in the browser when a file is opened.

import { inReward, pairLosses } from "./chain.js";
import { advantages, count, kl, losses, masked, policy, policy_gradient, vmap } from "./math.js";
import { at, get, has } from "./trace.js";

const CLOSE = 1e-5, SCORED = 1e-4, COARSE = 0.1;

// Every claim of an iteration: {identity, array, actual, expected, tolerance}.
function* claims(file, manifest) {
  const config = file.config, stage = file.stage, algorithm = manifest.stages[stage].algorithm;
  if (algorithm === "dpo") {
    yield* ofPairs(file);
    return;
  }
  const { pad_id, eos_id, eos_ids = [eos_id] } = manifest.tokenizer;
  const x = (name) => get(file, name).data;
  const scored = manifest.config.model.dtype === "float32" ? SCORED : COARSE;
  const mask = x("rollout.mask_BR"), [B, R] = get(file, "rollout.mask_BR").shape, P = get(file, "rollout.prompt_BP").shape[1];
  const rows = [...Array(B).keys()];
  const each = (f) => Float64Array.from(mask, (m, i) => (m ? f(i) : 0));
  const per_row = (array) => rows.map((b) => masked.sum(array.subarray(b * R, b * R + R), mask.subarray(b * R, b * R + R)));
  const length = rows.map((b) => count(mask.subarray(b * R, b * R + R)));
  const logged = (identity, name, expected) => ({
    identity, array: `numbers ${stage}/${name}`, actual: [file.numbers[`${stage}/${name}`]], expected: [expected], tolerance: CLOSE,
  });
  const claim = (identity, array, expected, tolerance = CLOSE, actual = x(array)) => ({ identity, array, actual, expected, tolerance });

  yield claim("response", "rollout.mask_BR", mask.map((_, i) => (i % R < length[Math.floor(i / R)] ? 1 : 0)));
  const response = x("rollout.response_BR"), eos = x("rollout.eos_B");
  yield claim("response", "rollout.response_BR", response.map((id, i) => (mask[i] ? id : pad_id)));
  yield claim("response", "rollout.eos_B", rows.map((b) => (eos_ids.includes(response[b * R + Math.max(length[b] - 1, 0)]) ? 1 : 0)));
  const prompt_mask = x("rollout.prompt_mask_BP");
  yield claim("prompt", "rollout.prompt_BP", x("rollout.prompt_BP").map((id, i) => (prompt_mask[i] ? id : pad_id)));
  const logp = x("rollout.logp_BR"), logp_ref = x("rollout.logp_ref_BR");
  const k1 = each((i) => kl.k1(logp[i], logp_ref[i]));
  const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;
  yield logged("kl", "kl", mean(per_row(k1)));
  yield logged("kl", "kl_k2", mean(per_row(each((i) => kl.k2(logp[i], logp_ref[i])))));
  yield logged("kl", "kl_k3", mean(per_row(each((i) => kl.k3(logp[i], logp_ref[i])))));
  yield logged("kl", "kl_exact", mean(per_row(x("rollout.kl_exact_BR"))));
  yield logged("kl", "entropy", masked.mean(x("rollout.entropy_BR"), mask));

  if (has(file, "look.rows_B")) {
    const shown = x("look.rows_B");
    yield claim("target", "look.position_R", [...Array(R).keys()].map((t) => P - 1 + t));
    const logit = x("look.policy_logit_BR"), total = x("look.policy_logsumexp_BR");
    const of = (f) => Float64Array.from(logit, (_, j) => (mask[shown[Math.floor(j / R)] * R + (j % R)] ? f(j) : 0));
    const recorded = of((j) => logp[shown[Math.floor(j / R)] * R + (j % R)]);
    yield claim("logprob", "rollout.logp_BR", of((j) => logit[j] - total[j]), scored, recorded);
  }

  const beta = inReward(config) ? file.numbers[`${stage}/kl_coef`] : 0, score = x("rollout.score_B");
  const final = Float64Array.from(score, (s, b) => policy.final_score(s, eos[b], config.missing_eos, config.missing_eos_penalty));
  yield logged("score", "score_final", mean([...final]));
  const raw = x("rollout.raw_advantages_BR"), returns = x("rollout.returns_BR");
  let rewards = null;
  if (has(file, "rollout.rewards_BR")) {
    rewards = vmap((s, k, m) => advantages.shape_rewards(s, k, m, beta), R, final, k1, mask);
    if (config.whiten_rewards) rewards = masked.whiten(rewards, mask, false);
    yield claim("rewards", "rollout.rewards_BR", rewards);
    rewards = x("rollout.rewards_BR");
  }
  if (algorithm === "ppo") {
    const values = x("rollout.values_BR");
    yield claim("gae", "rollout.raw_advantages_BR", vmap((r, v, m) => advantages.gae(r, v, m, config.gamma, config.lam)[0], R, rewards, values, mask));
    yield claim("returns", "rollout.returns_BR", each((i) => raw[i] + values[i]));
  } else if ("scale" in config) {
    const sums = per_row(k1), totals = rows.map((b) => final[b] - beta * sums[b]);
    yield claim("returns", "rollout.returns_BR", each((i) => totals[Math.floor(i / R)]));
    const of = advantages.group(totals, config.group, config.baseline, config.scale);
    yield claim("group", "rollout.raw_advantages_BR", each((i) => of[Math.floor(i / R)]));
  } else if (algorithm === "online_dpo" || algorithm === "best_of_n") {
    yield claim("returns", "rollout.returns_BR", each((i) => final[Math.floor(i / R)]));
    const of = algorithm === "online_dpo" ? rows.map((b) => Math.sign(final[b] - final[b ^ 1])) : kept(final, config.ended === false ? null : eos, length, config.group);
    yield claim("group", "rollout.raw_advantages_BR", each((i) => of[Math.floor(i / R)]));
  } else if ("reward_to_go" in config) {
    const per_token = each((i) => final[Math.floor(i / R)] - beta * k1[i]);
    const to_go = config.reward_to_go;
    yield claim("returns", "rollout.returns_BR", to_go ? vmap((r, m) => advantages.discounted_returns(r, m, config.gamma), R, rewards, mask) : per_token);
    const sums = per_row(k1);
    const totals = to_go ? rows.map((b) => final[b] - beta * sums[b]) : per_row(per_token).map((s, b) => s / Math.max(length[b], 1));
    const baseline = policy_gradient.baseline(totals, config.baseline);
    yield claim("baseline", "rollout.raw_advantages_BR", each((i) => returns[i] - baseline[Math.floor(i / R)]));
  }
  const whitens = config.whiten_advantages && !["online_dpo", "best_of_n"].includes(algorithm); // which have no scale
  yield claim("whitening", "rollout.advantages_BR", whitens ? masked.whiten(raw, mask) : raw, 1e-4);
  yield* update(file, algorithm, { B, R, mask, logp, logged, claim, scored });
}

// The weights [B] of the kept completion of each prompt, the best of those with EOS, or of all where eos is null: their
// mean over the tokens is 1.
function kept(score, eos, length, O) {
  const best = Array.from(score, (_, b) => {
    const first = b - (b % O), ended = [...Array(O).keys()].map((o) => first + o).filter((i) => !eos || eos[i]);
    return ended.reduce((top, i) => (top < 0 || score[i] > score[top] ? i : top), -1) === b;
  });
  const tokens = (of) => length.reduce((n, l, b) => n + (of(b) ? l : 0), 0);
  return best.map((is) => (is ? tokens(() => true) / Math.max(tokens((b) => best[b]), 1) : 0));
}

function* update(file, algorithm, { B, R, mask, logp, logged, claim, scored }) {
  const config = file.config, x = (name) => get(file, name).data;
  const all = get(file, "update.rows_B"), [E, M] = all.shape;
  const advantage = x("rollout.advantages_BR"), means = {};
  const push = (name, value) => (means[name] ??= []).push(value);
  for (let e = 0; e < E; e++) {
    yield claim("permutation", "update.rows_B", [...Array(at(all, e).data.length).keys()], 0, [...at(all, e).data].sort((a, b) => a - b));
    for (let m = 0; m < M; m++) {
      const rows = at(all, e, m).data, n = rows.length * R;
      const source = Int32Array.from({ length: n }, (_, j) => rows[Math.floor(j / R)] * R + (j % R));
      const here = Float64Array.from(source, (i) => mask[i]);
      const part = (name) => at(get(file, name), e, m).data;
      const named = (identity, name, expected, tolerance) => claim(identity, `${name}[${e}, ${m}]`, expected, tolerance, part(name));
      const now = part("update.logp_BR"), ratio = part("update.ratio_BR");
      yield named("ratio", "update.ratio_BR", now.map((l, j) => (here[j] ? Math.exp(l - logp[source[j]]) : 1)));
      if (e + m === 0) yield named("first ratio", "update.ratio_BR", new Float64Array(n).fill(1), scored);
      push("ratio", masked.mean(ratio, here));
      push("ratio_square", masked.mean(ratio.map((r) => r * r), here));
      push("approx_kl", masked.mean(Float64Array.from(ratio, (r, j) => r - 1 - (now[j] - logp[source[j]])), here));
      const A = Float64Array.from(source, (i) => advantage[i]);
      const tokens = Array.from(rows, (_, j) => count(here.subarray(j * R, j * R + R)));
      const weight = masked.row_weights(tokens, config.reduction ?? "token", R);
      const weighed = (values) => masked.mean(Float64Array.from(values, (v, j) => weight[Math.floor(j / R)] * v), here);
      const inside = (name) => Float64Array.from(part(name), (v, j) => (here[j] ? v : 0));
      if (has(file, "update.policy_loss_BR")) {
        const token = Array.from(ratio, (r, j) => losses.ppo_policy(Math.log(r), 0, A[j], config.clip, config.clip_high || config.clip));
        yield named("policy loss", "update.policy_loss_BR", token.map((t) => t.loss));
        push("policy_loss", weighed(part("update.policy_loss_BR")));
      } else if (algorithm === "online_dpo") {
        const whole = new Float64Array(B * R);
        source.forEach((i, j) => (whole[i] = now[j]));
        const of = pairLosses(whole, { B, R, mask, logp_ref: x("rollout.logp_ref_BR"), raw: advantage, pairs: config });
        const expected = Float64Array.from(source, (i, j) => (here[j] ? of[Math.floor(i / R)] : 0));
        yield claim("pair loss", `update.pair_loss_BR[${e}, ${m}]`, expected, CLOSE, inside("update.pair_loss_BR"));
        push("policy_loss", weighed(expected));
      } else {
        const weighted = config.epochs > 1 && config.importance;
        push("policy_loss", weighed(Float64Array.from(A, (a, j) => -a * (weighted ? ratio[j] : now[j]))));
      }
      if (has(file, "update.kl_loss_BR") && ["k2", "k3"].includes(config.kl)) {
        const reference = x("rollout.logp_ref_BR");
        const expected = Float64Array.from(now, (l, j) => (here[j] ? kl[config.kl](l, reference[source[j]]) : 0));
        yield claim("KL loss", `update.kl_loss_BR[${e}, ${m}]`, expected, CLOSE, inside("update.kl_loss_BR"));
      }
      for (const term of ["kl_loss", "entropy_bonus"]) if (has(file, `update.${term}_BR`)) push(term, weighed(inside(`update.${term}_BR`)));
      if (algorithm === "ppo") {
        const value = part("update.values_BR"), old = x("rollout.values_BR"), returns = x("rollout.returns_BR");
        const square = Float64Array.from(value, (v, j) =>
          here[j] ? losses.ppo_value(v, old[source[j]], returns[source[j]], config.value_clip).square : 0);
        const recorded = Float64Array.from(part("update.value_square_BR"), (s, j) => (here[j] ? s : 0));
        yield claim("value loss", `update.value_square_BR[${e}, ${m}]`, square, CLOSE, recorded);
        push("value_loss", masked.mean(recorded, here) / 2);
      }
    }
  }
  for (const [name, values] of Object.entries(means)) {
    if (has(file, `minibatch.${name}`)) yield claim(name === "approx_kl" ? "approx KL" : "minibatch", `minibatch.${name}`, values);
  }
  for (const name of ["policy_loss", "value_loss", "approx_kl", "ratio"]) {
    if (has(file, `minibatch.${name}`) && `${file.stage}/${name}` in file.numbers) {
      const values = x(`minibatch.${name}`);
      yield logged("logged", name, values.reduce((a, b) => a + b, 0) / values.length);
    }
  }
}

// A step of DPO on a batch of pairs.
function* ofPairs(file) {
  const { config: { beta, loss, smoothing }, stage } = file, x = (name) => get(file, name).data;
  const h = Float64Array.from(x("update.chosen_B"), (c, i) => c - x("batch.chosen_ref_B")[i] - x("update.rejected_B")[i] + x("batch.rejected_ref_B")[i]);
  const mean = (f) => h.reduce((sum, v, i) => sum + f(v, i), 0) / h.length;
  const expected = {
    dpo_loss: mean((v) => losses.dpo(v, beta, loss, smoothing)), margin: beta * mean((v) => v), accuracy: mean((v) => (v > 0 ? 1 : v === 0 ? 0.5 : 0)),
    chosen_logp: mean((_, i) => x("update.chosen_B")[i]),
  };
  for (const [name, value] of Object.entries(expected)) {
    const array = `${stage}/${name}`;
    yield { identity: name, array: `numbers ${array}`, actual: [file.numbers[array]], expected: [value], tolerance: CLOSE };
  }
}

// {identities, error, breach}: how many identities were checked, the largest error, the first breach in words or "".
export function verify(file, manifest) {
  const identities = new Set();
  let worst = 0, breach = "";
  for (const { identity, array, actual, expected, tolerance } of claims(file, manifest)) {
    identities.add(identity);
    let scale = 1, error = 0, index = 0;
    if (actual.length !== expected.length) {
      breach ||= `${file.name}: ${array}: ${identity}: ${actual.length} numbers, expected ${expected.length}`;
      continue;
    }
    for (let i = 0; i < actual.length; i++) {
      const d = Math.abs(actual[i] - expected[i]);
      if (!(d <= error)) [error, index] = [Number.isNaN(d) ? Infinity : d, i];
      if (Math.abs(expected[i]) > scale) scale = Math.abs(expected[i]);
    }
    if (error <= tolerance * scale) worst = Math.max(worst, error);
    else breach ||= `${file.name}: ${array}: index ${index}: ${identity}: recorded ${+actual[index].toPrecision(9)}, recomputed ${+expected[index].toPrecision(9)}`;
  }
  return { identities: identities.size, error: worst, breach };
}
