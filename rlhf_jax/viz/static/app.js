// The page: opens a trace, proves it, keeps one cursor (iteration, rollout, token) for all views, and the knobs.

import { chain, knobs, pass, priced } from "./chain.js";
import { fmt, h, p } from "./dom.js";
import { panel } from "./panel.js";
import { hasRollouts, names, open, policyStage, read, TraceError } from "./trace.js";
import { telling } from "./tour.js";
import * as unipo from "./unipo.js";
import { verify } from "./verify.js";
import { views } from "./views.js";

const $ = (id) => document.getElementById(id);
const FOLDER = "trace";

export const app = {
  manifest: null, stage: "", iters: [], file: null, knobs: {}, recorded: {}, order: [], read: null,
  cursor: { iter: 0, rollout: 0, token: 0, epoch: 0 },
  check: { identities: 0, error: 0, breach: "" },
  updates: new Map(),

  get row() {
    return this.order[this.cursor.rollout];
  },
  get length() {
    const { mask, R } = this.chain;
    let n = 0;
    while (n < R && mask[this.row * R + n]) n++;
    return n;
  },
  // The index of a token of the selected rollout in the arrays [B, R].
  index(t = this.cursor.token) {
    return this.row * this.chain.R + t;
  },
  get whatIf() {
    return Object.keys(this.recorded).some((name) => this.knobs[name] !== this.recorded[name]);
  },

  // Moves the cursor; the file is read first if it is of another iteration. Of several moves, the last one counts.
  async go(change) {
    if (!this.iters.length) return;
    const iter = Math.max(0, Math.min(this.iters.length - 1, change.iter ?? this.cursor.iter));
    Object.assign(this.cursor, change, { iter });
    const moved = this.file?.name !== this.iters[iter];
    try {
      if (moved && !(await this.load())) return;
    } catch (error) {
      fail(error);
      return;
    }
    this.clamp();
    this.show(moved ? { cursor: true, file: true } : { cursor: true });
  },
  clamp() {
    const { cursor } = this;
    cursor.rollout = Math.max(0, Math.min(this.order.length - 1, cursor.rollout));
    cursor.token = Math.max(0, Math.min(Math.max(this.length - 1, 0), cursor.token));
    cursor.epoch = Math.max(0, Math.min(this.epochs - 1, cursor.epoch));
  },
  get epochs() {
    return this.file.arrays["update.rows_B"]?.shape[0] ?? 1;
  },
  // Whether the file of the cursor's iteration is there; not if the cursor has moved on while it was read.
  async load() {
    const name = this.iters[this.cursor.iter], file = await this.read(name);
    if (name !== this.iters[this.cursor.iter]) return false;
    this.file = file;
    const kept = this.whatIf ? this.knobs : {};
    this.recorded = knobs(file, this.manifest);
    this.knobs = { ...this.recorded, ...kept };
    this.check = this.manifest.foreign ? { identities: 0, error: 0, breach: "" } : verify(file, this.manifest);
    const shown = [...(file.arrays["look.rows_B"]?.data ?? [])], B = file.arrays["rollout.mask_BR"].shape[0];
    this.order = [...shown, ...[...Array(B).keys()].filter((b) => !shown.includes(b))];
    this.laid = {};
    this.passes = {};
    this.chain = chain(file, this.manifest, this.knobs);
    return true;
  },
  // Moves knobs. Only what depends on them is computed again: a slider does this at every step.
  set(change) {
    const changed = Object.keys(change).filter((name) => this.knobs[name] !== change[name]);
    Object.assign(this.knobs, change);
    this.passes = {};
    if (changed.some((name) => name !== "eps" && name !== "clipping")) this.chain = chain(this.file, this.manifest, this.knobs);
    this.show({ knobs: true });
  },
  pass(e = this.cursor.epoch) {
    const laid = (this.laid[e] ??= pass(this.file, e));
    return laid && (this.passes[e] ??= priced(laid, this.chain, this.knobs));
  },
  // Updates the bar and the views that can be seen; the others follow when they come into sight. what: {file, cursor,
  // knobs}, with true for each that has changed, and no other. Views of what was recorded do not depend on knobs.
  show(what) {
    bar();
    panel($("panel"), this);
    for (const [element, view] of this.updates) {
      view.due = { ...view.due, ...what };
      if (view.visible) flush(element);
    }
    clearTimeout(this.timer);
    this.timer = setTimeout(() => {
      [...this.updates.keys()].forEach(flush);
      keepHash();
    }, 120);
  },
};

function flush(element) {
  const view = app.updates.get(element);
  const what = view.due;
  if (!Object.keys(what).length) return;
  view.due = {};
  view.update(what);
}

const seen = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    const view = app.updates.get(target);
    view.visible = isIntersecting;
    if (isIntersecting) flush(target);
  }
});

// On a narrow screen the token's panel would cover the playground.
new IntersectionObserver(([{ isIntersecting }]) => document.body.classList.toggle("playing", isIntersecting), { rootMargin: "-50% 0px" }).observe($("playground"));

// The bar

function bar() {
  const { cursor, file, check } = app;
  $("iter").value = cursor.iter;
  $("iter-is").textContent = file.step;
  $("token").max = Math.max(app.length - 1, 0);
  $("token").value = cursor.token;
  $("token-is").textContent = `${cursor.token + 1} of ${app.length}`;
  $("rollout").value = cursor.rollout;
  const badge = $("badge");
  const text = check.breach ? "does not match: see the banner"
    : app.whatIf ? "what-if: tokens, values and ratios are frozen from the run"
    : app.manifest.foreign ? "a log of another trainer: shown as it is, not proved"
    : `matches the trainer: ${check.identities} identities, max |d| ${fmt(check.error)}`;
  if (badge.textContent !== text) badge.textContent = text;
  badge.className = `badge ${check.breach ? "bad" : app.whatIf ? "what" : ""}`;
  $("reset").hidden = !app.whatIf;
  banner(check.breach ? `The trace does not hold: ${check.breach}` : "");
}

function banner(text) {
  $("banner").textContent = text;
  $("banner").hidden = !text;
}

function listRollouts() {
  const { file, chain: c, order } = app;
  const shown = file.arrays["look.rows_B"]?.data.length ?? 0;
  const kinds = (n) => (n >= shown ? "" : n < shown - 4 || shown < 16 ? ", random" : n < shown - 2 ? ", best" : ", worst");
  const labels = order.map((b, n) => `${n + 1} of ${order.length}${kinds(n)}${c.score ? `: ${fmt(c.score[b])}` : ""}`);
  $("rollout").replaceChildren(...labels.map((text, n) => h("option", { value: n, text })));
}

function keepHash() {
  const { cursor, file } = app;
  const parts = { iter: file.step, rollout: cursor.rollout + 1, token: cursor.token + 1 };
  if (cursor.epoch < app.epochs - 1) parts.epoch = cursor.epoch + 1;
  for (const name of Object.keys(app.recorded)) if (app.knobs[name] !== app.recorded[name]) parts[name] = app.knobs[name];
  const hash = `#${new URLSearchParams(parts)}`;
  if (location.hash !== hash) history.replaceState(null, "", hash);
}

// The place in the list of the iteration that the address names, or -1.
function named() {
  const step = Number(new URLSearchParams(location.hash.slice(1)).get("iter"));
  return app.iters.findIndex((name) => app.manifest.files[name].step === step);
}

async function readHash() {
  const parts = new URLSearchParams(location.hash.slice(1)), cursor = {}, at = named();
  if (at >= 0) cursor.iter = at;
  for (const name of ["rollout", "token", "epoch"]) {
    const value = Number.parseInt(parts.get(name), 10);
    if (value > 0) cursor[name] = value - 1;
  }
  await app.go(cursor);
  const change = {};
  for (const name of Object.keys(app.recorded)) {
    if (!parts.has(name)) continue;
    const text = parts.get(name);
    if (typeof app.recorded[name] === "boolean") change[name] = text === "true";
    else if (Number.isFinite(Number(text))) change[name] = Math.max(0, Number(text));
  }
  if (Object.keys(change).length) app.set(change);
}

// Keys: arrows move the token, [ and ] the rollout, comma and full stop the iteration.
const KEYS = {
  ArrowLeft: () => app.go({ token: app.cursor.token - 1 }),
  ArrowRight: () => app.go({ token: app.cursor.token + 1 }),
  "[": () => app.go({ rollout: app.cursor.rollout - 1 }),
  "]": () => app.go({ rollout: app.cursor.rollout + 1 }),
  ",": () => app.go({ iter: app.cursor.iter - 1 }),
  ".": () => app.go({ iter: app.cursor.iter + 1 }),
};

function wire() {
  $("iter").addEventListener("input", (event) => app.go({ iter: Number(event.target.value) }));
  $("rollout").addEventListener("change", (event) => app.go({ rollout: Number(event.target.value) }));
  $("token").addEventListener("input", (event) => app.go({ token: Number(event.target.value) }));
  $("reset").addEventListener("click", () => app.set({ ...app.recorded }));
  addEventListener("hashchange", () => app.iters.length && location.hash.includes("=") && readHash().catch(fail));
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
    if (!(event.key in KEYS) || event.target.closest(".scroll:focus, #playground")) return;
    if (!app.iters.length) return;
    event.preventDefault();
    const strip = event.target.closest(".strip");
    KEYS[event.key]().then(() => {
      if (!strip) return;
      flush(strip.closest("section"));
      strip.querySelector(".on")?.focus();
    });
  });
}

// Opening a trace or a file of UNIPO

async function start(manifest, reader, title) {
  app.manifest = manifest;
  app.stage = policyStage(manifest) ?? Object.keys(manifest.stages).at(-1);
  if (!app.stage) throw new TraceError("This trace has no recorded step yet.");
  app.iters = hasRollouts(manifest, app.stage) ? names(manifest, app.stage, "iter") : [];
  app.read = remembering(reader);
  app.file = null;
  app.knobs = app.recorded = {};
  $("run").textContent = title;
  for (const element of app.updates.keys()) seen.unobserve(element);
  app.updates.clear();
  const rollouts = app.iters.length > 0;
  let unread = null;
  cursorIsThere(rollouts);
  if (rollouts) {
    $("iter").max = app.iters.length - 1;
    // The second recorded iteration, as the policy is still learning there, and its last epoch.
    app.cursor = { iter: named() >= 0 ? named() : Math.min(1, app.iters.length - 1), rollout: 0, token: 0, epoch: 99 };
    unread = await loadNearest();
    app.clamp();
    Object.assign(app.cursor, telling(app));
  } else await withoutRollouts();
  for (const view of views) {
    const element = $(view.id);
    element.replaceChildren();
    element.hidden = !rollouts && Boolean(view.rollouts);
    if (element.hidden) continue;
    try {
      const update = view.build(element, app);
      if (update) {
        app.updates.set(element, { update: (what) => guarded(element, () => update(what)), due: { file: true }, visible: false });
        seen.observe(element);
      }
    } catch (error) {
      element.append(missing(error));
    }
  }
  files();
  if (rollouts) {
    wireRollouts();
    if (unread) app.show({ cursor: true, file: true });
    else await readHash();
    if (unread) fail(unread);
  }
  document.documentElement.dataset.ready = "true";
}

function cursorIsThere(yes) {
  for (const part of document.querySelectorAll("header label, #panel")) part.hidden = !yes;
}

// Opens the iteration of the cursor, or the nearest one whose file can be read: then returns the error of the first.
async function loadNearest() {
  const wanted = app.cursor.iter, order = [...app.iters.keys()].sort((a, b) => Math.abs(a - wanted) - Math.abs(b - wanted));
  let unread = null;
  for (const iter of order) {
    app.cursor.iter = iter;
    try {
      await app.load();
      return unread;
    } catch (error) {
      if (!(error instanceof TraceError)) throw error;
      unread ??= error;
    }
  }
  throw unread;
}

// The bar of a run without rollouts: DPO's last step is proved here; fine-tuning and reward model, by the command.
async function withoutRollouts() {
  const name = names(app.manifest, app.stage, "iter").at(-1), { algorithm } = app.manifest.stages[app.stage];
  const check = algorithm === "dpo" && name ? verify(await app.read(name), app.manifest) : null;
  $("badge").textContent = !check ? "recorded by the trainer; python -m rlhf_jax.viz verify proves it"
    : check.breach ? "does not match: see the banner" : `matches the trainer: ${check.identities} identities, max |d| ${fmt(check.error)}`;
  $("badge").className = `badge ${check?.breach ? "bad" : ""}`;
  banner(check?.breach ? `The trace does not hold: ${check.breach}` : "");
}

// The reader, with the last files at hand.
function remembering(reader, most = 12) {
  const kept = new Map();
  return async (name) => {
    const file = kept.get(name) ?? (await reader(name));
    kept.delete(name);
    kept.set(name, file);
    if (kept.size > most) kept.delete(kept.keys().next().value);
    return file;
  };
}

function wireRollouts() {
  const show = app.show;
  if (!app.listed) {
    app.listed = true;
    app.show = function (what) {
      if (what.file) listRollouts();
      show.call(app, what);
    };
  }
  listRollouts();
}

// A view that lacks an array says so in its place; the rest of the page goes on.
function guarded(element, f) {
  try {
    f();
  } catch (error) {
    if (!(error instanceof TraceError)) throw error;
    element.replaceChildren(missing(error));
  }
}
function missing(error) {
  if (!(error instanceof TraceError)) throw error;
  return h("p", { class: "note", text: error.message });
}

function files() {
  const element = $("files");
  element.replaceChildren(h("h2", { id: "files-title", text: "Another run" }));
  const input = h("input", { type: "file", accept: ".json,application/json" });
  input.addEventListener("change", async () => {
    try {
      const opened = unipo.convert(JSON.parse(await input.files[0].text()));
      history.replaceState(null, "", "#");
      await start(opened.manifest, async (name) => opened.files[name], input.files[0].name);
    } catch (error) {
      fail(error instanceof SyntaxError ? new TraceError(`${input.files[0].name}: not JSON (${error.message})`) : error);
    }
  });
  element.append(
    p("A log in UNIPO's JSON (poloclub.github.io/unipo), of whichever trainer, opens here as far as its fields go. Nothing leaves this machine."),
    h("label", {}, "Open a UNIPO file ", input),
  );
  if (app.manifest.command) element.append(p("This run was made by ", h("code", { text: app.manifest.command }), "."));
}

function fail(error) {
  if (!(error instanceof TraceError)) {
    banner(`The page has a fault: ${error.message}`);
    throw error;
  }
  banner(error.message);
  files_only();
}
function files_only() {
  if (!app.manifest) {
    app.manifest = { files: {} };
    cursorIsThere(false);
    files();
  }
}

async function playground() {
  if ("static" in document.documentElement.dataset) return; // exported files have no server
  const answer = await fetch("api/info").catch(() => null);
  if (!answer?.ok || !answer.headers.get("content-type")?.includes("json")) return;
  await import("./playground.js"); // fills its section and shows it
}

wire();
try {
  const manifest = await open(FOLDER);
  await start(manifest, (name) => read(FOLDER, manifest, name), manifest.title ?? `seed ${manifest.seed}`);
} catch (error) {
  fail(error);
}
playground().catch((error) => banner(`The playground did not start: ${error.message}`));
