// UNIPO's JSON (docs/canonical_schema.json of poloclub/unipo) as a trace of ours, as far as its fields go.

import { SCHEMA, TraceError } from "./trace.js";

const TOKENS = {
  old_log_probs: "rollout.logp_BR", ref_log_probs: "rollout.logp_ref_BR", values: "rollout.values_BR", rewards: "rollout.rewards_BR",
  advantages: "rollout.advantages_BR", returns: "rollout.returns_BR",
};

// {manifest, files: {name: file}}. What a log lacks is left out, and the views that need it say so.
export function convert(log) {
  const header = log?.header, entries = log?.entries;
  if (!header?.algorithm || !Array.isArray(entries)) throw new TraceError("expected UNIPO's fields header.algorithm and entries");
  const hparams = header.hparams ?? {}, eps = Array.isArray(hparams.clip_eps) ? hparams.clip_eps[0] : hparams.clip_eps;
  const algorithm = String(header.algorithm).toLowerCase();
  const config = { clip: eps ?? 0.2, gamma: hparams.gamma ?? 1, lam: hparams.gae_lambda ?? 1, kl_coef: hparams.kl_coef ?? 0, missing_eos: "subtract", missing_eos_penalty: 0, whiten_advantages: false, temperature: 1 };
  const files = {}, about = {};
  for (const entry of entries) {
    const rows = (entry.prompts ?? []).flatMap((group) => group.responses.map((response) => ({ prompt: group.prompt, response })));
    const usable = rows.filter(({ response }) => response.tokens?.ids?.length && (response.tokens.log_probs ?? response.tokens.old_log_probs));
    if (!usable.length) continue;
    const name = `${algorithm}_iter_${String(entry.step).padStart(6, "0")}`;
    files[name] = iteration(name, algorithm, entry, usable, config);
    about[name] = { stage: algorithm, kind: "iter", step: entry.step };
  }
  if (!Object.keys(files).length) throw new TraceError("no step has responses with tokens and their log-probs");
  const manifest = {
    schema: SCHEMA, title: `${header.model_name ?? "a run"}, ${header.algorithm}`, foreign: true, files: about, seed: null, config: { model: { dtype: "float16" }, evaluation: {} },
    tokenizer: { eos_id: -1, pad_id: -2, vocab_size: 2 ** 31 }, stages: { [algorithm]: { algorithm: `unipo ${algorithm}`, steps: entries.length, summary: {} } },
  };
  return { manifest, files };
}

function iteration(name, stage, entry, rows, config) {
  const B = rows.length, R = Math.max(...rows.map(({ response }) => response.tokens.ids.length)), strings = { 0: "" };
  const prompts = rows.map(({ prompt }) => prompt), arrays = {};
  const put = (key, type, shape, data) => (arrays[key] = { data: type.from(data), shape });
  const flat = (f) => rows.flatMap(({ response }) => Array.from({ length: R }, (_, t) => (t < response.tokens.ids.length ? f(response.tokens, t) : 0)));
  put("rollout.mask_BR", Uint8Array, [B, R], flat(() => 1));
  put("rollout.response_BR", Int32Array, [B, R], rows.flatMap(({ response: { tokens } }) => Array.from({ length: R }, (_, t) => (t < tokens.ids.length ? tokens.ids[t] : -2))));
  rows.forEach(({ response: { tokens } }) => tokens.ids.forEach((id, t) => (strings[id] = tokens.strings?.[t] ?? `id ${id}`)));
  // A prompt is one text here: one column, whose string is the whole prompt.
  put("rollout.prompt_BP", Int32Array, [B, 1], prompts.map((text, b) => {
    strings[-10 - b] = text ?? "";
    return -10 - b;
  }));
  put("rollout.prompt_mask_BP", Uint8Array, [B, 1], prompts.map(() => 1));
  put("rollout.eos_B", Uint8Array, [B], prompts.map(() => 1));
  put("rollout.score_B", Float32Array, [B], rows.map(({ response }) => response.reward ?? 0));
  for (const [field, key] of Object.entries(TOKENS)) {
    const source = field === "old_log_probs" ? (t) => t.old_log_probs ?? t.log_probs : (t) => t[field];
    if (rows.every(({ response }) => Array.isArray(source(response.tokens)))) put(key, Float32Array, [B, R], flat((tokens, t) => source(tokens)[t]));
  }
  if (rows.every(({ response: { tokens } }) => tokens.log_probs && tokens.old_log_probs)) {
    put("update.rows_B", Int32Array, [1, 1, B], [...Array(B).keys()]);
    put("update.logp_BR", Float32Array, [1, 1, B, R], flat((tokens, t) => tokens.log_probs[t]));
    put("update.ratio_BR", Float32Array, [1, 1, B, R], rows.flatMap(({ response: { tokens } }) => Array.from({ length: R }, (_, t) => (t < tokens.ids.length ? Math.exp(tokens.log_probs[t] - tokens.old_log_probs[t]) : 1))));
  }
  const numbers = Object.fromEntries(Object.entries(entry.metrics ?? {}).map(([key, value]) => [`${stage}/${key}`, value]));
  return { name, stage, kind: "iter", step: entry.step, numbers: { [`${stage}/kl_coef`]: config.kl_coef, ...numbers }, strings, samples: [], config, arrays };
}
