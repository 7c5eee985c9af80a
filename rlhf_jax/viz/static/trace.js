// Reads a trace: manifest.json and its gzipped JSON files. Every file is checked against the manifest's sha256.

export const SCHEMA = 1;
const TYPES = { float32: Float32Array, int32: Int32Array, uint8: Uint8Array };

export class TraceError extends Error {}

// The manifest in a folder; TraceError says what is wrong.
export async function open(folder) {
  const answer = await fetch(`${folder}/manifest.json`).catch(() => null);
  if (!answer || !answer.ok) {
    throw new TraceError(`No trace here: ${folder}/manifest.json is missing. A run records one with --config.trace.every=10.`);
  }
  let manifest;
  try {
    manifest = await answer.json();
  } catch {
    throw new TraceError(`${folder}/manifest.json is damaged: it is not JSON.`);
  }
  if (manifest.schema !== SCHEMA) {
    throw new TraceError(`${folder}/manifest.json: expected a trace of schema version ${SCHEMA}, got ${manifest.schema}.`);
  }
  return manifest;
}

// A file of the trace, decoded; see `decode`.
export async function read(folder, manifest, name) {
  const answer = await fetch(`${folder}/${name}`).catch(() => null);
  if (!answer || !answer.ok) throw new TraceError(`${name}: missing, but manifest.json lists it.`);
  let data = new Uint8Array(await answer.arrayBuffer());
  const zipped = data[0] === 0x1f && data[1] === 0x8b; // a host may have unzipped it already
  if (zipped && globalThis.crypto?.subtle) {
    const digest = hex(await crypto.subtle.digest("SHA-256", data));
    const expected = manifest.files[name].sha256;
    if (digest !== expected) {
      throw new TraceError(`${name}: damaged: sha256 ${digest.slice(0, 12)}…, manifest.json has ${expected.slice(0, 12)}….`);
    }
  }
  try {
    if (zipped) data = await gunzip(data);
    return decode(name, JSON.parse(new TextDecoder().decode(data)));
  } catch (error) {
    throw new TraceError(`${name}: damaged (${error.message}).`);
  }
}

async function gunzip(data) {
  const stream = new Blob([data]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// The JSON of a file, with its arrays as typed arrays: file.arrays["rollout.logp_BR"] = {data, shape}.
export function decode(name, record) {
  const arrays = {};
  for (const [key, { dtype, shape, b64 }] of Object.entries(record.arrays)) {
    if (!(dtype in TYPES)) throw new Error(`${key}: dtype ${dtype}`);
    const bytes = Uint8Array.from(atob(b64), (c) => c.charCodeAt(0));
    const data = new TYPES[dtype](bytes.buffer);
    if (data.length !== shape.reduce((a, b) => a * b, 1)) throw new Error(`${key}: ${data.length} numbers of ${shape}`);
    arrays[key] = { data, shape };
  }
  return { ...record, name, arrays };
}

export const has = (file, name) => name in file.arrays;

export function get(file, name) {
  if (!has(file, name)) throw new TraceError(`${file.name}: the array ${name} was not recorded.`);
  return file.arrays[name];
}

// The part [i] or [i, j] of the leading axes of an array: {data, shape}.
export function at({ data, shape }, ...index) {
  let size = data.length, start = 0;
  index.forEach((i, axis) => {
    size /= shape[axis];
    start += i * size;
  });
  return { data: data.subarray(start, start + size), shape: shape.slice(index.length) };
}

// Names of the files of a kind, by step.
export function names(manifest, stage, kind) {
  const found = Object.keys(manifest.files).filter((n) => manifest.files[n].stage === stage && manifest.files[n].kind === kind);
  return found.sort((a, b) => manifest.files[a].step - manifest.files[b].step);
}

// The last stage: the one whose algorithm is no other stage's.
export const policyStage = (manifest) =>
  Object.keys(manifest.stages).filter((s) => !["supervised", "preference"].includes(manifest.stages[s].algorithm)).at(-1);

// Whether a stage samples: DPO learns from pairs, fine-tuning and the reward model from rows.
export const hasRollouts = (manifest, stage) => !["dpo", "supervised", "preference"].includes(manifest.stages[stage].algorithm);

const hex = (buffer) => Array.from(new Uint8Array(buffer), (b) => b.toString(16).padStart(2, "0")).join("");

// A text with what cannot be seen made visible: control and bidirectional characters, lone bytes (surrogateescape).
// Characters in `keep` stay.
export function visible(text, keep = "") {
  let out = "";
  for (const c of text) {
    const code = c.codePointAt(0);
    if (keep.includes(c)) out += c;
    else if (code >= 0xdc80 && code <= 0xdcff) out += `\\x${(code - 0xdc00).toString(16)}`;
    else if (c === "\n") out += "⏎";
    else if (code < 0x20 || (code >= 0x7f && code < 0xa0) || HIDDEN.test(c)) out += `\\u{${code.toString(16)}}`;
    else out += c;
  }
  return out;
}
const HIDDEN = /[\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]/u;

// The text of an id of a file, as it is shown: a leading space is an open box, EOS and PAD have names.
export function token(file, tokenizer, id) {
  if ((tokenizer.eos_ids ?? [tokenizer.eos_id]).includes(id)) return "EOS";
  if (id === tokenizer.pad_id) return "PAD";
  const text = visible(file.strings[id] ?? `id ${id}`);
  return text.startsWith(" ") ? `␣${text.slice(1)}` : text || "∅";
}
