// Views of the run as a whole and of the stages before reinforcement learning.

import {
  axes, barCell, button, chart, dataTable, extent, fmt, h, heading, p, par, path, percent, s, select, signed, slider,
} from "./dom.js";
import { evaluate, logprobs, losses, masked, sampling, sigmoid, softplus } from "./math.js";
import { at, get, has, names, token, TraceError, visible } from "./trace.js";

// Reads a file of another stage once; the view shows a line until it is there.
function later(element, app, name, ready) {
  const note = h("p", { class: "note", text: "reading…" });
  element.append(note);
  app.read(name).then((file) => {
    note.remove();
    ready(file);
  }).catch((error) => {
    note.textContent = error instanceof TraceError ? error.message : `The page has a fault: ${error.message}`;
    if (!(error instanceof TraceError)) throw error;
  });
}
const absent = (what, how) => h("p", { class: "note", text: `${what} ${how}` });
// The folder of another run that a stage of this one is taken from, or "".
export const taken = (app, name) => app.manifest.config?.[name]?.from ?? "";
// The name of a reward that is a function, or "".
const ofFunction = (app) => (["learned", undefined].includes(app.manifest.config?.reward?.kind) ? "" : app.manifest.config.reward.kind);
const elsewhere = (app, name) => `The ${name === "sft" ? "fine-tuned policy" : "reward model"} of this run is that of ${taken(app, name)}, whose own page shows it.`;
const stageOf = (app, algorithm) => Object.keys(app.manifest.stages).filter((n) => app.manifest.stages[n].algorithm === algorithm).at(-1);
// The stage that learned from pairs: a reward model, or DPO, whose policy is its own.
const pairStage = (app) => stageOf(app, "preference") ?? stageOf(app, "dpo");
const HOW = "This trace has none: record the run with --config.trace.every=10.";

// 8. Curves

const CHOICES = [
  ["score", "score"], ["reward", "reward"], ["gold", "gold score"], ["score_total", "total: score − β KL"], ["kl", "KL, nats a text"], ["kl_exact", "exact KL"],
  ["entropy", "entropy, nats a token"], ["length", "length, tokens"], ["eos_rate", "share that end"], ["clip_fraction", "clipped tokens"],
  ["approx_kl", "approx KL of the update"], ["ess", "effective sample size"], ["policy_loss", "policy loss"], ["value_loss", "value loss"],
  ["dpo_loss", "loss of a pair"], ["accuracy", "accuracy on pairs"], ["margin", "margin of a pair"], ["loss", "loss"],
  ["explained_variance", "explained variance of the value"], ["distinct2", "distinct word pairs"], ["repeat_rate", "texts that repeat a word"], ["policy_grad_norm", "gradient norm"], ["lr", "learning rate"],
];

const curves = {
  id: "curves",
  build(el, app) {
    el.append(heading("curves", "The run as curves", "report.plots.rl, alarms.outside"), p(app.iters.length ? "What the policy gained, and what it paid. When the learned score goes on rising while the true (gold) score falls, the policy has learned to please the reward model instead of the reader. Click a curve, or use the iteration slider, to go to the nearest recorded iteration." : "What the stage gained, and what it paid."));
    const [name] = names(app.manifest, app.stage, "end");
    if (!name) {
      el.append(absent("Curves are written when the stage has ended.", ""));
      return () => {};
    }
    const figure = h("figure");
    el.append(figure);
    let redraw = () => {};
    later(figure, app, name, (end) => {
      const stage = app.stage, steps = end.curves.step;
      const series = (key) => (end.curves[`${stage}/${key}`] ?? []).map((v) => (typeof v === "number" ? v : NaN));
      const known = CHOICES.filter(([key]) => [...series(key), ...series(`eval_${key}`)].some(Number.isFinite));
      const first = ["score", "reward", "gold", "kl", "entropy", "clip_fraction"], others = ["dpo_loss", "accuracy", "margin"];
      const shown = new Set([...first, ...(app.iters.length ? [] : others)].filter((key) => known.some(([k]) => k === key)));
      if (!shown.size) known.slice(0, 4).forEach(([key]) => shown.add(key));
      const picks = h("div", { class: "controls", role: "group", "aria-label": "curves" }, known.map(([key, title]) => button(title, (event) => {
        if (!shown.delete(key)) shown.add(key);
        event.target.setAttribute("aria-pressed", shown.has(key));
        make();
      }, { "aria-pressed": shown.has(key) })));
      const plots = h("div", { class: "two" }), alarms = h("p", { class: "note" });
      const twin = dataTable("curves", ["iteration", ...known.map(([, title]) => title)], () => steps.map((step, i) => [`${step}`, ...known.map(([key]) => series(key)[i])]));
      figure.append(picks, plots, alarms, twin.element);
      let charts = [];
      const make = () => {
        charts = known.filter(([key]) => shown.has(key)).map(([key, title]) => chart("", 150, (svg, width) => {
          const points = steps.map((step, i) => [step, series(key)[i]]).filter(([, v]) => Number.isFinite(v));
          const evaluated = (end.curves[`${stage}/eval_${key}`] ?? []).map((v, i) => [steps[i], v]).filter(([, v]) => typeof v === "number");
          const { x, y } = axes(svg, width, 150, extent([steps], 0.01), extent([points.map(([, v]) => v), evaluated.map(([, v]) => v)], 0.1), { yt: title, xt: "iteration", yn: 3, top: 22 });
          const cls = /kl|clip/i.test(key) ? "s-ref" : /value|explained/.test(key) ? "s-value" : /score|reward|gold/.test(key) ? "s-reward" : "s-policy";
          svg.append(s("path", { class: `line ${cls}`, d: path(points.map(([a, b]) => [x(a), y(b)])) }));
          for (const [a, b] of evaluated) svg.append(s("circle", { class: `hollow ${cls}`, cx: x(a), cy: y(b), r: 3.5 }));
          if (app.file) svg.append(s("line", { class: "cursor", x1: x(app.file.step), x2: x(app.file.step), y1: 22, y2: 114 }));
          if (app.file) svg.onclick = (event) => {
            const step = steps.reduce((best, v) => (Math.abs(x(v) - event.offsetX) < Math.abs(x(best) - event.offsetX) ? v : best), steps[0]);
            const at = app.iters.map((n) => app.manifest.files[n].step);
            app.go({ iter: at.indexOf(at.reduce((best, v) => (Math.abs(v - step) < Math.abs(best - step) ? v : best), at[0])) });
          };
          if (app.file) svg.classList.add("hit");
          const line = points.length ? points : evaluated;
          svg.setAttribute("aria-label", `${title} from ${fmt(line[0][1])} to ${fmt(line.at(-1)[1])} over ${steps.at(-1)} iterations`);
        }));
        plots.replaceChildren(...charts.map((c) => c.svg));
        charts.forEach((c) => c.redraw());
      };
      make();
      redraw = () => charts.forEach((c) => c.redraw());
      alarms.textContent = `Circles: evaluations on held-out prompts. ${hacking(series)}`;
    });
    return ({ cursor, file }) => (cursor || file) && redraw();
  },
};

// Signs of a hacked reward, from the recorded curves alone.
function hacking(series) {
  const half = (key) => {
    const v = series(key).filter(Number.isFinite), n = Math.floor(v.length / 2);
    return v.length > 5 ? [evaluate.mean(v.slice(0, n)), evaluate.mean(v.slice(n))] : null;
  };
  const score = half("score") ?? half("reward"), gold = half("gold"), entropy = half("entropy"), distinct = half("distinct2"), out = [];
  if (score && gold && score[1] > score[0] && gold[1] < gold[0]) out.push(`from the first half to the second the score rose ${fmt(score[0])} → ${fmt(score[1])} while gold fell ${fmt(gold[0])} → ${fmt(gold[1])}`);
  if (entropy && entropy[1] < 0.5 * entropy[0]) out.push(`entropy halved, ${fmt(entropy[0])} → ${fmt(entropy[1])} nats`);
  if (distinct && distinct[1] < 0.7 * distinct[0]) out.push(`distinct word pairs fell ${fmt(distinct[0])} → ${fmt(distinct[1])}`);
  if (series("alarms").some((v) => v > 0)) out.push("the trainer’s own limit has tripped");
  if (!score && !entropy && !distinct) return "";
  return out.length ? `Alarm: ${out.join("; ")}.` : `No alarm: ${gold ? "score and gold rise together" : "score, entropy and diversity"}${entropy ? `, entropy ${fmt(entropy[0])} → ${fmt(entropy[1])} nats` : ""}.`;
}

// 9. Before and after

const samplesView = {
  id: "samples",
  build(el, app) {
    el.append(heading("samples", "Before and after", "stages.measure.compare, evaluate.win_rate.win_rate"), p("The same held-out prompts, completed by the policy before this stage and by the policy after it. Sort by the gain to see what it learned, and by the loss to see what it broke."));
    const [name] = names(app.manifest, app.stage, "end"), evals = names(app.manifest, app.stage, "eval");
    if (!name) {
      el.append(absent("Samples are written when the stage has ended.", ""));
      return () => {};
    }
    const figure = h("figure");
    el.append(figure);
    later(figure, app, name, (end) => {
      const rows = pairsOf(end.samples);
      if (!rows.length) {
        figure.append(absent("This stage has no texts of two policies to compare.", ""));
        return;
      }
      const keys = ["gold", "score", "reward"].filter((key) => rows.every((r) => Number.isFinite(r.before[key]) && Number.isFinite(r.after[key])));
      let key = keys[0], order = "gain", shown = 4, query = "";
      const gain = (r) => r.after[key] - r.before[key];
      const list = h("div"), note = h("p", { class: "note" });
      const more = button("four more", () => {
        shown += 4;
        draw();
      });
      const search = h("input", { type: "search", size: 14 });
      search.addEventListener("input", () => {
        query = search.value.toLowerCase();
        draw();
      });
      const by = select("sorted by", [["gain", "largest gain"], ["loss", "largest loss"], ["same", "least change"], ["", "as recorded"]], order, (v) => {
        order = v;
        draw();
      });
      const on = select("measured by", keys.map((k) => [k, k === "gold" ? "gold score" : k]), key, (v) => {
        key = v;
        draw();
      });
      const spread = chart("", 170, (svg, width) => {
        const [lo, hi] = extent([rows.map((r) => r.before[key]), rows.map((r) => r.after[key])], 0.06);
        const { x, y } = axes(svg, width, 170, [lo, hi], [lo, hi], { xt: `${key} before`, yt: `${key} after` });
        svg.append(s("line", { class: "s-dim dash", x1: x(lo), y1: y(lo), x2: x(hi), y2: y(hi) }));
        for (const r of rows) svg.append(s("circle", { class: gain(r) < 0 ? "ref faint" : "policy faint", cx: x(r.before[key]), cy: y(r.after[key]), r: 3 }));
      });
      const twin = dataTable("held-out prompts", ["row", "before", "after", "gain"], () => rows.map((r, i) => [`${i + 1}`, r.before[key], r.after[key], gain(r)]));
      figure.append(note, spread.svg, h("p", { class: "legend" }, h("span", { class: "policy", text: "better or equal" }), h("span", { class: "ref", text: "worse; below the dashed line" })), h("div", { class: "controls" }, by.element, on.element, h("label", {}, "containing ", search)), list, more, twin.element);
      function draw() {
        const summary = end.summary, rate = evaluate.win_rate(rows.map((r) => r.after[key]), rows.map((r) => r.before[key]));
        const ci = summary[`${end.stage}/win_rate_ci95`], same = Math.abs(rate - summary[`${end.stage}/win_rate`]) < 1e-9;
        note.textContent = `${rows.length} held-out prompts: after wins ${percent(rate)} by ${key}${same && ci ? ` (95% interval ${percent(ci[0])} to ${percent(ci[1])})` : ""}; mean ${fmt(evaluate.mean(rows.map((r) => r.before[key])))} → ${fmt(evaluate.mean(rows.map((r) => r.after[key])))}.`;
        const found = rows.filter((r) => !query || [r.prompt, r.before.completion, r.after.completion].some((text) => text.toLowerCase().includes(query)));
        if (order === "gain") found.sort((a, b) => gain(b) - gain(a));
        if (order === "loss") found.sort((a, b) => gain(a) - gain(b));
        if (order === "same") found.sort((a, b) => Math.abs(gain(a)) - Math.abs(gain(b)));
        const numbers = (side) => ["score", "reward", "gold", "kl"].filter((k) => Number.isFinite(side[k])).map((k) => `${k} ${fmt(side[k])}`).join("  ");
        const side = (title, cls, value) => h("div", {}, h("h3", { class: cls, text: title }), h("p", { class: "n", text: visible(value.completion) }), h("p", { class: "note n", text: numbers(value) }));
        list.replaceChildren(...found.slice(0, shown).map((r, n) => h("div", { class: "sample" }, r.prompt ? h("div", { class: "prompt", tabindex: 0, role: "region", "aria-label": `prompt of sample ${n + 1}`, text: visible(r.prompt, "\n") }) : null,
          h("div", { class: "two" }, side("before", "ref", r.before), side(`after (${gain(r) < 0 ? "worse" : "gain"} ${signed(gain(r))})`, "policy", r.after)))));
        if (!found.length) list.textContent = "No sample contains this text.";
        more.hidden = shown >= found.length;
        spread.label(`${key} of ${rows.length} prompts before and after`);
        spread.redraw();
        twin.refill();
      }
      draw();
    });
    if (evals.length && app.iters.length) probes(el, app, evals);
    return () => {};
  },
};

// Rows of samples.jsonl of either task as {prompt, before, after}, each side {completion, score, gold, ...}.
function pairsOf(samples) {
  return samples.map((row) => {
    const nested = Object.keys(row).filter((k) => row[k] && typeof row[k] === "object");
    if (nested.length === 2) return { prompt: row.prompt ?? "", before: row[nested[0]], after: row[nested[1]] };
    if (typeof row.sft !== "string" || typeof row.rl !== "string") return null;
    const numbers = (end) => Object.fromEntries(Object.entries(row).filter(([k, v]) => k.endsWith(end) && typeof v === "number").map(([k, v]) => [k.slice(0, -end.length), v]));
    return { prompt: row.prompt ?? "", before: { completion: row.sft, ...numbers("_sft") }, after: { completion: row.rl, ...numbers("_rl") } };
  }).filter(Boolean);
}

// One held-out prompt through the run, each token shaded by its log-prob change against the reference.
function probes(el, app, evals) {
  const figure = h("figure"), out = h("div");
  const steps = evals.map((name) => app.manifest.files[name].step);
  let row = 0, part = "probes";
  const cache = new Map();
  const text = select("text", [["probes", "each policy's own"], ["crossed", "the first policy's, scored by each"]], part, (v) => {
    part = v;
    draw();
  });
  const which = slider("prompt", { min: 1, max: 1, step: 1, value: 1, digits: 0 }, (v) => {
    row = v - 1;
    draw();
  });
  figure.append(h("div", { class: "controls" }, which.element, text.element), out, h("figcaption", { text: "One held-out prompt, completed with the same noise at each evaluation. Blue: likelier than under the reference, orange: less likely. Iteration 0 is the policy before reinforcement learning." }));
  el.append(h("h3", { text: "One prompt through the run" }), figure);
  function draw() {
    const lines = steps.map((step, n) => {
      const file = cache.get(n);
      if (!file) return null;
      const array = (name) => at(get(file, `${part}.${name}`), row).data;
      const ids = array("response_NR"), mask = array("mask_NR"), logp = array("logp_NR"), ref = array("logp_ref_NR");
      const own = part === "probes" ? (file.samples[row] ?? {}) : {};
      const spans = [...ids].map((id, t) => [id, t]).filter(([, t]) => mask[t]).map(([id, t]) => {
        const d = logp[t] - ref[t], share = Math.max(-1, Math.min(1, d / 0.8));
        const span = h("span", { class: "token", text: token(file, app.manifest.tokenizer, id), title: `${signed(d)} nats` });
        span.style.background = `color-mix(in srgb, var(${share > 0 ? "--policy" : "--ref"}) ${Math.round(Math.abs(share) * 38)}%, transparent)`;
        return span;
      });
      const about = ["score", "gold", "kl"].filter((k) => Number.isFinite(own[k])).map((k) => `${k} ${fmt(own[k])}`).join("  ");
      return h("div", { class: "sample" }, h("div", { class: "note n", text: `iteration ${step}  ${about}` }), h("div", { class: "strip" }, spans));
    });
    const first = cache.get(0) ?? [...cache.values()][0], prompt = first?.samples[row]?.prompt;
    out.replaceChildren(prompt ? h("div", { class: "prompt", tabindex: 0, role: "region", "aria-label": "prompt through the run", text: visible(prompt, "\n") }) : "", ...lines.filter(Boolean));
  }
  evals.forEach((name, n) => app.read(name).then((file) => {
    cache.set(n, file);
    text.element.hidden = ![...cache.values()].every((each) => each.arrays["crossed.logp_NR"]);
    which.input.max = Math.min(file.samples.length, get(file, "probes.mask_NR").shape[0]);
    draw();
  }).catch((error) => out.append(h("p", { class: "note", text: error.message }))));
}

// 10. The reward model

const reward = {
  id: "reward",
  build(el, app) {
    const dpo = app.manifest.stages[pairStage(app)]?.algorithm === "dpo", other = dpo && app.manifest.config.dpo.loss !== "sigmoid" ? ` (This run’s own loss is ${app.manifest.config.dpo.loss}.)` : "";
    const curveOf = "−log σ(chosen − rejected), which is large where the rejected text scores higher, at the left, and falls towards 0 at the right.";
    if (dpo) el.append(heading("reward", "The policy as its own reward model", "ops.losses.dpo, stages.preference, evaluate.accuracy.accuracy"), p(`DPO has no reward model. The reward of a text is β times its log-ratio, how much likelier the policy makes it than the reference does; and the loss of a pair is ${curveOf}${other}`));
    else el.append(heading("reward", "The reward model", "ops.losses.bradley_terry, models.heads.ScalarModel.score, evaluate.accuracy.accuracy"), p(`The reward model gives a text one number. It is trained on pairs: the loss of a pair is ${curveOf}`));
    const stage = pairStage(app), evals = stage ? names(app.manifest, stage, "eval") : [];
    if (!evals.length) {
      el.append(taken(app, "reward") ? absent(elsewhere(app, "reward"), "") : ofFunction(app) ? absent(`The reward of this run is a function (${ofFunction(app)}), not a trained model.`, "") : absent("The reward model of this run was not recorded.", HOW));
      return () => {};
    }
    const figure = h("figure"), formula = h("div", { class: "eq" });
    el.append(formula, figure);
    later(figure, app, evals.at(-1), (file) => {
      const chosen = get(file, "pairs.chosen_N").data, rejected = get(file, "pairs.rejected_N").data, N = chosen.length;
      const long = has(file, "pairs.tokens_chosen_N") ? Array.from(get(file, "pairs.tokens_chosen_N").data, (n, i) => n - get(file, "pairs.tokens_rejected_N").data[i]) : null;
      const margin = Float64Array.from(chosen, (c, i) => c - rejected[i]);
      let pick = margin.indexOf(Math.min(...margin)), moved = null;
      const loss = Array.from(margin, (m) => softplus(-m));
      const [lo, hi] = extent([margin], 0.03, -6, 6), most = softplus(-lo);
      const curve = chart("", 240, (svg, width) => {
        const { x, y } = axes(svg, width, 240, [lo, hi], [-0.15, most], { xt: "margin: chosen − rejected", yt: "loss, nats" });
        svg.append(s("path", { class: "line s-dim", d: path(Array.from({ length: 121 }, (_, i) => lo + ((hi - lo) * i) / 120).map((m) => [x(m), y(softplus(-m))])), id: "loss-curve" }));
        margin.forEach((m, i) => svg.append(s("circle", { class: m < 0 ? "bad faint" : "reward faint", cx: x(m), cy: y(loss[i]), r: 3 })));
        const m = moved ?? margin[pick];
        svg.append(s("circle", { class: "pick", cx: x(m), cy: y(softplus(-m)), r: 7 }));
        // A click selects the nearest pair; the ring of the selected one can be dragged, as with the slider.
        svg.onpointerdown = (event) => {
          const near = (v) => Math.abs(x(v) - event.offsetX);
          if (near(moved ?? margin[pick]) < 12) {
            svg.setPointerCapture(event.pointerId);
            svg.onpointermove = ({ offsetX }) => {
              moved = Math.max(lo, Math.min(hi, lo + ((offsetX - x(lo)) / (x(hi) - x(lo))) * (hi - lo)));
              draw();
            };
          } else go(margin.reduce((best, v, i) => (near(v) < near(margin[best]) ? i : best), 0));
        };
        svg.onpointerup = svg.onpointercancel = () => (svg.onpointermove = null);
        svg.classList.add("hit");
      });
      const bins = (n, x, f) => Array.from({ length: n }, (_, b) => {
        const inside = x.map((v, i) => [v, i]).filter(([v]) => Math.min(n - 1, Math.floor(v * n)) === b).map(([, i]) => i);
        return inside.length ? f(inside) : null;
      }).filter(Boolean);
      const confident = Array.from(margin, (m) => Math.max(sigmoid(m), 1 - sigmoid(m)));
      const calibration = bins(5, confident.map((c) => Math.min((c - 0.5) * 2, 0.9999)), (inside) => ({
        n: inside.length, says: evaluate.mean(inside.map((i) => confident[i])), is: evaluate.mean(inside.map((i) => (margin[i] > 0 ? 1 : margin[i] === 0 ? 0.5 : 0))),
      }));
      const calibrated = chart("", 200, (svg, width) => {
        const { x, y } = axes(svg, width, 200, [0.48, 1.02], [0, 1.02], { xt: "says: σ(|margin|)", yt: "is right", yf: percent, xf: (v) => percent(v), left: 58, xn: 3 });
        svg.append(s("line", { class: "s-dim dash", x1: x(0.5), y1: y(0.5), x2: x(1), y2: y(1) }), s("path", { class: "line s-reward", d: path(calibration.map((b) => [x(b.says), y(b.is)])) }));
        for (const b of calibration) svg.append(s("circle", { class: "reward", cx: x(b.says), cy: y(b.is), r: Math.min(3 + Math.sqrt(b.n) / 2, 10) }));
      });
      const byLength = chart("", 200, (svg, width) => {
        if (!long) return;
        const { x, y } = axes(svg, width, 200, extent([long], 0.05), extent([margin], 0.05), { xt: "chosen is longer by, tokens", yt: "margin" });
        margin.forEach((m, i) => svg.append(s("circle", { class: m < 0 ? "bad faint" : "reward faint", cx: x(long[i]), cy: y(m), r: 2.5 })));
      });
      const drag = slider("move the margin", { min: Math.floor(lo), max: Math.ceil(hi), step: 0.05, value: 0 }, (v) => {
        moved = v;
        draw();
      });
      const text = h("div", { class: "two" }), twin = dataTable("pairs", ["pair", "chosen", "rejected", "margin", "loss"], () => Array.from(margin, (m, i) => [`${i + 1}`, chosen[i], rejected[i], m, loss[i]]));
      const right = margin.reduce((n, m) => n + (m > 0 ? 1 : m === 0 ? 0.5 : 0), 0), bias = long && correlation(long, margin);
      figure.append(h("div", { class: "controls" }, drag.element, button("the worst pair", () => go(margin.indexOf(Math.min(...margin)))), button("the surest pair", () => go(margin.indexOf(Math.max(...margin)))), button("the closest pair", () => go(margin.reduce((b, m, i) => (Math.abs(m) < Math.abs(margin[b]) ? i : b), 0)))),
        curve.svg, text, twin.element, h("figcaption", { text: `Every held-out pair, the selected one in the ring; drag the ring to ask what another margin would cost. ${N} pairs: ${percent(right / N)} have the chosen text above the rejected one; mean loss ${fmt(evaluate.mean(loss))} nats (a coin has ${fmt(Math.log(2))}).` }),
        h("div", { class: "two" }, h("div", {}, h("h3", { text: "Does it know how sure it is?" }), calibrated.svg, dataTable("calibration", ["pairs", "says", "is right"], () => calibration.map((b) => [`${b.n}`, b.says, b.is])).element),
          h("div", {}, h("h3", { text: "Does it like length?" }), long ? byLength.svg : null, h("p", { class: "note", text: long ? `Correlation of margin and difference of length: ${signed(bias)}.` : "Lengths were not recorded." }))));
      calibrated.label("Calibration: how often the model is right, by how sure it is");
      if (long) byLength.label(`Margins by difference of length, correlation ${signed(bias)}`);
      function go(i) {
        pick = i;
        moved = null;
        draw();
      }
      function draw() {
        const m = moved ?? margin[pick], pair = file.samples[pick];
        drag.set(m);
        curve.label(`Loss of each pair by its margin; the selected pair has margin ${fmt(m)} and loss ${fmt(softplus(-m))}`);
        curve.redraw();
        formula.textContent = moved === null
          ? `loss of pair ${pick + 1} = −log σ(chosen − rejected)\n  = −log σ(${fmt(chosen[pick])} − ${par(rejected[pick])}) = −log σ(${fmt(m)}) = ${fmt(losses.bradley_terry(chosen[pick], rejected[pick]))}`
          : `what-if: −log σ(${fmt(m)}) = ${fmt(softplus(-m))}; its slope ${fmt(-sigmoid(-m))} is how hard the pair pulls`;
        const side = (title, cls, body, score) => h("div", {}, h("h3", { class: cls, text: `${title}, ${fmt(score)}` }), h("p", { class: "n", text: visible(body) }));
        text.replaceChildren(...(pair ? [side("chosen", "reward", pair.chosen, chosen[pick]), side("rejected", "ref", pair.rejected, rejected[pick])] : []));
      }
      draw();
    });
    return () => {};
  },
};

function correlation(x, y) {
  const ones = new Uint8Array(x.length).fill(1), mx = masked.mean(x, ones), my = masked.mean(y, ones);
  const product = Float64Array.from(x, (v, i) => (v - mx) * (y[i] - my));
  return masked.mean(product, ones) / (Math.sqrt(masked.var(x, ones) * masked.var(y, ones)) || 1);
}

// 11. Preference pairs

const pairs = {
  id: "pairs",
  build(el, app) {
    el.append(heading("pairs", "Be the labeller", "tasks.prompts, data.batches.encode_pairs"), p("A label is one click. Choose which text is the better summary before you see what the label says and what the reward model thinks; then see how often you agree."));
    const stage = pairStage(app), evals = stage ? names(app.manifest, stage, "eval") : [];
    if (!evals.length) {
      el.append(taken(app, "reward") ? absent(elsewhere(app, "reward"), "") : absent("This run has no preference pairs.", ""));
      return () => {};
    }
    const figure = h("figure");
    el.append(figure);
    later(figure, app, evals.at(-1), (file) => {
      const done = { n: 0, label: 0, model: 0 };
      let i = 0;
      const body = h("div"), tally = h("p", { class: "note", role: "status" });
      figure.append(body, tally);
      // Which side the chosen text stands on follows from the pair's place, so that it cannot be guessed from the page.
      const flipped = (n) => ((n * 2654435761) >>> 16) % 2 === 1;
      function ask() {
        const pair = file.samples[i % file.samples.length], sides = flipped(i) ? ["rejected", "chosen"] : ["chosen", "rejected"];
        body.replaceChildren(h("div", { class: "prompt", tabindex: 0, role: "region", "aria-label": "prompt of the pair", text: visible(pair.prompt, "\n") }),
          h("div", { class: "two" }, sides.map((side, n) => h("button", { type: "button", class: "choice", onclick: () => reveal(pair, sides, n), text: `${"AB"[n]}: ${visible(pair[side])}` }))));
      }
      function reveal(pair, sides, mine) {
        const label = sides.indexOf("chosen"), model = pair[`score_${sides[0]}`] > pair[`score_${sides[1]}`] ? 0 : 1;
        done.n += 1;
        done.label += mine === label ? 1 : 0;
        done.model += mine === model ? 1 : 0;
        const next = button("next pair", () => {
          i += 1;
          ask();
          body.querySelector(".choice").focus();
        });
        body.append(h("p", { class: "n", text: `You chose ${"AB"[mine]}; the label is ${"AB"[label]}; the reward model prefers ${"AB"[model]} (${fmt(pair[`score_${sides[0]}`])} against ${fmt(pair[`score_${sides[1]}`])}).` }), next);
        body.querySelectorAll(".choice").forEach((b) => (b.disabled = true));
        next.focus();
        tally.textContent = `${done.n} labelled: you agree with the label in ${done.label}, with the reward model in ${done.model}.`;
      }
      ask();
    });
    return () => {};
  },
};

// 12. Fine-tuning

const sft = {
  id: "sft",
  build(el, app) {
    el.append(heading("sft", "Fine-tuning: the next token", "algorithms.supervised.loss, ops.losses.cross_entropy"), p("Before any reward, the model learns to continue text: it is charged −log p for each token that stands in the data. The same held-out text is scored at each evaluation of the run."));
    const stage = stageOf(app, "supervised"), evals = stage ? names(app.manifest, stage, "eval") : [];
    if (!evals.length) {
      el.append(taken(app, "sft") ? absent(elsewhere(app, "sft"), "") : absent("This run has no fine-tuning, or did not record it.", stage ? HOW : ""));
      return () => {};
    }
    const figure = h("figure"), formula = h("div", { class: "eq" });
    el.append(formula, figure);
    later(figure, app, evals.at(-1), (last) => {
      const N = get(last, "shown.mask_NT").shape[0];
      let row = 0, t = -1, file = last;
      const text = h("div", { class: "strip", role: "group", "aria-label": "tokens of a held-out text" }), note = h("p", { class: "note" });
      const which = slider("text", { min: 1, max: N, step: 1, value: 1, digits: 0 }, (v) => {
        row = v - 1;
        t = -1;
        draw();
      });
      // This strip has tokens of its own: arrows move along it, not along the rollout.
      text.addEventListener("keydown", (event) => {
        const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key], tokens = line();
        if (!by) return;
        event.preventDefault();
        event.stopPropagation();
        if (tokens[t + by]?.real) t += by;
        draw();
        text.querySelector(".on")?.focus();
      });
      const when = select("after step", evals.map((name) => [name, `${app.manifest.files[name].step}`]), evals.at(-1), (name) => app.read(name).then((f) => {
        file = f;
        draw();
      }));
      figure.append(h("div", { class: "controls" }, which.element, when.element), text, h("figcaption", { text: "Orange: the tokens that the loss counts, darker where the model was surprised. Click one." }), note,
        dataTable("tokens of the text", ["token", "log p", "counts"], () => line().filter((o) => o.real).map((o) => [o.word, o.logp, o.counts ? "yes" : "no"])).element);
      function line() {
        const part = (name) => (has(file, `shown.${name}`) ? [...at(get(file, `shown.${name}`), row).data] : []);
        const ids = has(file, "shown.prompt_NP") ? [...part("prompt_NP"), ...part("response_NR")] : part("tokens_NT");
        const real = has(file, "shown.prompt_NP") ? [...part("prompt_mask_NP"), ...part("response_mask_NR")] : part("mask_NT");
        const logp = part("logp_NT"), counts = part("mask_NT"), shift = ids.length - logp.length;
        return ids.map((id, i) => ({ word: token(file, app.manifest.tokenizer, id), real: real[i], logp: logp[i - shift], counts: counts[i - shift] }));
      }
      function draw() {
        const tokens = line(), counted = tokens.filter((o) => o.counts);
        if (t < 0) t = tokens.findIndex((o) => o.counts);
        text.replaceChildren(...tokens.map((o, i) => [o, i]).filter(([o]) => o.real).map(([o, i]) => {
          const b = h("button", { type: "button", class: `token${i === t ? " on" : ""}${o.counts ? "" : " dim"}`, text: o.word, title: o.counts ? `log p ${fmt(o.logp)}` : "not in the loss", onclick: () => {
            t = i;
            draw();
            text.querySelector(".on")?.focus();
          } });
          if (o.counts && i !== t) b.style.background = `color-mix(in srgb, var(--ref) ${Math.round(Math.min(-o.logp / 4, 1) * 45)}%, transparent)`;
          return b;
        }));
        const o = tokens[t], mean = -evaluate.mean(counted.map((c) => c.logp));
        formula.textContent = o?.counts ? `loss of “${o.word}” = −log p = ${fmt(-o.logp)} nats: the model gave it ${percent(Math.exp(o.logp))}\nloss of the text = mean over its ${counted.length} counted tokens = ${fmt(mean)}` : `“${o?.word ?? ""}” is not in the loss: it belongs to the prompt`;
        note.textContent = `After step ${file.step}: held-out loss ${fmt(file.numbers[`${file.stage}/eval_loss`])} nats a token, perplexity ${fmt(Math.exp(file.numbers[`${file.stage}/eval_loss`]))}.`;
      }
      draw();
    });
    return () => {};
  },
};

// 13. Sampling

const samplingView = {
  id: "sampling",
  rollouts: true,
  build(el, app) {
    let temperature = 1, k = 0, top = 1;
    const note = h("p", { class: "note" }), body = h("tbody"), formula = h("div", { class: "eq" });
    const table = h("table", {}, h("caption", { text: "Likeliest tokens of the policy at the selected token" }), h("thead", {}, h("tr", {}, ["token", "recorded", "now"].map((text, i) => h("th", { scope: "col", class: i ? null : "text", text })))), body);
    const knob = (label, options, set) => slider(label, options, (v) => {
      set(v);
      draw();
    }).element;
    el.append(heading("sampling", "Sampling", "ops.sampling.draw, top_k, top_p"), p("A token is drawn from softmax(logits / temperature). Training always samples all of it, because the update differentiates that distribution; top-k and top-p are for use. Only the likeliest tokens are recorded here: what is left of them is shown relative to each other."),
      formula, h("figure", {}, h("div", { class: "controls" }, knob("temperature", { min: 0.1, max: 2, step: 0.05, value: 1 }, (v) => (temperature = v)), knob("top-k", { min: 0, max: 8, step: 1, value: 0, digits: 0 }, (v) => (k = v)), knob("top-p", { min: 0.05, max: 1, step: 0.01, value: 1 }, (v) => (top = v))), h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "likeliest tokens" }, table)), note);
    function draw() {
      const { file, manifest } = app, rows = has(file, "look.rows_B") ? [...get(file, "look.rows_B").data] : [], j = rows.indexOf(app.row);
      if (j < 0) {
        body.replaceChildren();
        formula.textContent = "";
        note.textContent = `Likeliest tokens are recorded for ${rows.length} rollouts of a batch; this one is not among them.`;
        return;
      }
      const ids = at(get(file, "look.policy_top_ids_BR"), j, app.cursor.token).data, logp = [...at(get(file, "look.policy_top_logp_BR"), j, app.cursor.token).data];
      const kept = sampling.top_p(sampling.top_k(logp.map((l) => l / temperature), k), top), total = logprobs.logsumexp(kept);
      body.replaceChildren(...[...ids].map((id, n) => {
        const before = barCell(80), now = barCell(80);
        before.set(Math.exp(logp[n]), [0, 1], "dimmed", percent(Math.exp(logp[n])));
        now.set(Math.exp(kept[n] - total), [0, 1], "policy", kept[n] === -Infinity ? "never" : percent(Math.exp(kept[n] - total)));
        return h("tr", {}, h("th", { scope: "row", class: "n", text: token(file, manifest.tokenizer, id) }), before.cell, now.cell);
      }));
      const mass = logp.reduce((sum, l) => sum + Math.exp(l), 0);
      formula.textContent = `p = exp(logit / T) / Σ exp(logit / T), over the ${kept.filter((x) => x > -Infinity).length} tokens that top-k = ${k || "all"} and top-p = ${fmt(top)} leave of these ${ids.length}`;
      note.textContent = `Together they have ${percent(mass)} of the policy’s probability. Temperature, top-k and top-p here are what-if: the run sampled at temperature ${fmt(app.file.config.temperature)} from the full distribution.`;
    }
    return draw;
  },
};

export const stageViews = [curves, samplesView, reward, pairs, sft, samplingView];
