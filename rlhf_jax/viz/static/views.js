// The article: one view a section. `build(element, app)` makes it and returns update({cursor, file, knobs}).

import { averaged, logRatios, objectives } from "./chain.js";
import {
  axes, barCell, barRange, button, chart, check, code, dataTable, extent, fmt, h, heading, nats, p, par, path, percent, s, scale,
  select, signed, slider,
} from "./dom.js";
import { advantages, count, importance, kl, masked } from "./math.js";
import { word } from "./panel.js";
import { stageViews, taken } from "./stages.js";
import { tour } from "./tour.js";
import { at, get, has, token, TraceError } from "./trace.js";

const need = (array, name) => {
  if (!array) throw new TraceError(`This view needs ${name}, which this run did not record.`);
  return array;
};

// A strip of the tokens of the selected rollout; left and right move along it.
function strip(app, label, decorate = () => {}) {
  const element = h("div", { class: "strip", role: "group", "aria-label": label });
  return {
    element,
    update() {
      while (element.children.length > app.length) element.lastChild.remove();
      for (let t = 0; t < app.length; t++) {
        const b = element.children[t] ?? element.appendChild(h("button", { type: "button", onclick: () => app.go({ token: t }) }));
        const on = t === app.cursor.token, text = word(app, t);
        if (b.textContent !== text) b.textContent = text;
        b.className = `token${on ? " on" : ""}${text === "EOS" ? " special" : ""}`;
        b.setAttribute("aria-pressed", on);
        b.tabIndex = on ? 0 : -1;
        decorate(b, t);
      }
    },
  };
}

// A table with a row for each token of the rollout. Columns: {head, cls(t), value(t), range, text(t)} draw bars; with
// {head, draw(svg, t, width), width} they draw what they like.
function tokenTable(app, caption, columns) {
  const body = h("tbody"), cells = [];
  let last = -1;
  const table = h("table", {}, h("caption", { text: caption }),
    h("thead", {}, h("tr", {}, h("th", { scope: "col", class: "text", text: "token" }), columns.map((c) => h("th", { scope: "col", text: c.head })))), body);
  const element = h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": caption }, table);
  return {
    element,
    heads(texts) {
      texts.forEach((text, i) => (table.tHead.rows[0].cells[i + 1].textContent = text));
    },
    update() {
      while (cells.length > app.length) {
        cells.pop();
        body.lastChild.remove();
      }
      while (cells.length < app.length) {
        const t = cells.length;
        const made = columns.map((c) => (c.draw ? drawCell(c.width, c.narrow) : barCell(c.width)));
        made.forEach((m, j) => m.cell.setAttribute("data-head", columns[j].head)); // shown where the table is stacked
        cells.push(made);
        body.append(h("tr", {}, h("th", { scope: "row" }, h("button", { type: "button", class: "token", tabindex: -1, onclick: () => app.go({ token: t }) })), made.map((m) => m.cell)));
      }
      const ranges = columns.map((c) => (c.draw ? null : c.range?.() ?? barRange(cells.map((_, t) => c.value(t)))));
      cells.forEach((made, t) => {
        const row = body.rows[t];
        row.className = t === app.cursor.token ? "on" : "";
        const b = row.cells[0].firstChild, text = word(app, t);
        if (b.textContent !== text) b.textContent = text;
        columns.forEach((c, j) => {
          if (c.draw) c.draw(made[j].svg, t, made[j].width);
          else made[j].set(c.value(t), ranges[j], c.cls(t), c.text?.(t) ?? fmt(c.value(t)));
        });
      });
      if (last !== app.cursor.token) reveal(element, body.rows[(last = app.cursor.token)]);
    },
  };
}

// Scrolls a long table, and nothing but it, to a row.
function reveal(box, row) {
  if (!row || box.scrollHeight <= box.clientHeight) return;
  const top = row.offsetTop - 40, bottom = row.offsetTop + row.offsetHeight;
  if (top < box.scrollTop) box.scrollTop = top;
  else if (bottom > box.scrollTop + box.clientHeight) box.scrollTop = bottom - box.clientHeight;
}

function drawCell(full, narrow = full) {
  const width = innerWidth < 600 ? narrow : full;
  const svg = s("svg", { width, height: 18, "aria-hidden": "true" });
  return { svg, width, cell: h("td", {}, svg) };
}

const bySign = (x) => (x < 0 ? "ref" : "policy");
const eq = () => h("div", { class: "eq" });

const intro = {
  id: "intro",
  build(el, app) {
    const title = h("h1"), lead = p();
    const start = button("Take the tour: what to notice", () => tour(app, start));
    el.append(title, lead, h("p", {}, start), h("p", { class: "note" },
      "Every number on this page was recorded by the trainer, or is recomputed from what it recorded.", app.iters.length ? " Keys: ← → move the token, [ ] the rollout, comma and full stop the iteration. A slider turns the badge above into “what-if”; “as recorded” brings the run back." : ""));
    return ({ file }) => {
      if (!file) return;
      const { algorithm } = app.manifest.stages[app.stage], name = TITLES[algorithm] ?? TITLES[app.stage] ?? algorithm.replace("unipo ", "").toUpperCase();
      if (!app.iters.length) {
        title.textContent = `What ${algorithm === "preference" ? "the reward model learned" : `${name} did`}`;
        lead.textContent = algorithm === "dpo" ? "DPO learns from pairs of texts that exist already: it samples none. The views of rollouts (tokens, KL, values, ratios, clip, sampling) do not apply, and are left out."
          : "This trace has no iteration of reinforcement learning: the views of rollouts (tokens, KL, values, ratios, clip, sampling) are left out. What is recorded is below.";
        return;
      }
      title.textContent = `What ${algorithm === "policy_gradient" ? "the policy gradient" : name} did to one text`;
      lead.textContent = `A policy wrote this text in iteration ${app.file.step}, one of ${app.chain.B} of its batch. Follow one token through the whole update: what it cost, what it was worth, and how far the update could move it.`;
    };
  },
};

// 1. The run

const TITLES = {
  pretrain: "pretraining", sft: "fine-tuning", reward: "reward model", rl: "reinforcement learning", ppo: "PPO",
  policy_gradient: "policy gradient", reinforce_pp: "REINFORCE++", rloo: "RLOO", grpo: "GRPO", dr_grpo: "Dr. GRPO", dapo: "DAPO",
  online_dpo: "online DPO", best_of_n: "best-of-n", dpo: "DPO",
};
const FACTS = [
  ["loss", "loss"], ["perplexity", "perplexity"], ["accuracy", "accuracy"], ["score", "score"], ["reward", "reward"],
  ["gold", "gold score"], ["kl_exact", "exact KL"], ["win_rate", "win rate"],
];
const tiny = (x) => (Math.abs(x) < 1e-6 ? 0 : x); // rounding, as of a KL before the first update
const TARGETS = { pretrain: "sft", sft: "sft", reward: "reward" };

const map = {
  id: "map",
  build(el, app) {
    const list = h("ol", { class: "map" });
    el.append(heading("map", "The run", "pipeline.Stages, stages.rl.rl"), p("Each stage starts from the one before it. The numbers are those of the stage’s held-out rows after its last step."),
      h("figure", {}, list, h("figcaption", { text: "Arrows say what is handed on. A stage leads to its own section." })));
    return ({ file }) => {
      if (!file) return;
      const { config, stages: recorded } = app.manifest, summaryOf = (name) => recorded[name]?.summary ?? {};
      const others = ["pretrain", "sft", "reward"].filter((name) => !recorded[name] && taken(app, name) && (name !== "reward" || config.reward.kind === "learned"));
      const stages = [...others.map((name) => [name, null]), ...Object.entries(recorded)];
      list.replaceChildren(...stages.map(([name, about], i) => {
        const summary = summaryOf(name), facts = [];
        for (const [key, title] of FACTS) {
          const after = tiny(summary[`${name}/${key}`]);
          const before = tiny( summary[`${name}/${key}_sft`] ?? summary[`${name}/${key}_before`]);
          if (typeof after !== "number") continue;
          facts.push(typeof before === "number" && before !== after ? `${title} ${fmt(before)} → ${fmt(after)}` : `${title} ${key === "win_rate" ? percent(after) : fmt(after)}`);
        }
        const target = TARGETS[name] ?? "samples";
        const edge = { reward: "the score, and where values start", sft: "policy and reference", pretrain: "policy" }[name];
        return h("li", {},
          h("a", { class: "stage", href: `#${target}`, onclick: (event) => jump(event, target) },
            h("b", { text: TITLES[name] ?? name }), h("span", { class: "edge", text: about ? `${about.steps} steps` : `taken from ${taken(app, name)}` }), facts.slice(0, 4).map((f) => h("span", { class: "edge n", text: f })),
            edge && i < stages.length - 1 ? h("span", { class: "edge", text: `hands on: ${edge}` }) : null),
          i < stages.length - 1 ? h("span", { class: "arrow", "aria-hidden": "true", text: "→" }) : null);
      }));
    };
  },
};

function jump(event, id) {
  event.preventDefault();
  const title = document.getElementById(`${id}-title`);
  title?.scrollIntoView();
  title?.setAttribute("tabindex", "-1");
  title?.focus({ preventScroll: true });
}

// 2. Tokens

const tokens = {
  id: "tokens",
  rollouts: true,
  build(el, app) {
    let wrong = "no";
    const prompt = h("div", { class: "prompt", tabindex: 0, role: "region", "aria-label": "prompt of the rollout" }), pads = h("div", { class: "pads", role: "img" });
    const maskNote = h("p", { class: "note" }), top = h("div"), formula = eq();
    const words = strip(app, "response tokens", (b, t) => {
      const i = app.index(t), share = Math.max(-1, Math.min(1, app.chain.k1[i] / 0.8));
      b.style.background = t === app.cursor.token ? "" : `color-mix(in srgb, var(${share > 0 ? "--policy" : "--ref"}) ${Math.round(Math.abs(share) * 38)}%, transparent)`;
      b.title = `log p ${fmt(app.chain.logp[i])}${app.chain.logp_ref ? `, ${signed(app.chain.k1[i])} nats to the reference` : ""}`;
      if (lost(wrong, t, app.length)) b.className += " lost";
    });
    const choose = select("mask", [["no", "as trained"], ["early", "wrong: one to the left"], ["late", "wrong: one to the right"], ["eos", "wrong: without EOS"]], "no", (value) => {
      wrong = value;
      draw();
    });
    el.append(heading("tokens", "Tokens, masks and the shift by one", "ops.logprobs.before, ops.logprobs.gather, generate.generate"),
      p("The state is everything to the left of a token; the action is the token. The model’s output at position ", code("t"), " scores the token at ", code("t + 1"), ", so the first token of the response is scored at the last token of the prompt."),
      h("figure", {}, prompt, words.element, h("figcaption", { text: "Shaded by how much more (blue) or less (orange) likely the policy makes the token than the reference does. ␣ is a space that belongs to the token." })),
      formula,
      p("Prompts are padded on the left and responses on the right, so that they meet where generation starts. The loss counts response tokens, EOS among them, and nothing else."),
      h("figure", {}, h("div", { class: "controls" }, choose.element), pads, h("figcaption", { text: "One square a column: light is padding, grey the prompt, blue the response; an orange foot marks what the loss counts." }), maskNote),
      h("h3", { text: "What else it could have said" }), h("figure", {}, top));

    function draw() {
      const { file, chain: c, manifest } = app, b = app.row;
      const prompts = get(file, "rollout.prompt_BP"), P = prompts.shape[1], real = get(file, "rollout.prompt_mask_BP").data.subarray(b * P, b * P + P);
      prompt.textContent = [...prompts.data.subarray(b * P, b * P + P)].filter((_, i) => real[i]).map((id) => token(file, manifest.tokenizer, id).replace(/^␣/, " ").replaceAll("⏎", "\n")).join("");
      words.update();
      const n = app.length, t = app.cursor.token, i = app.index();
      const isCounted = (j) => (wrong === "early" ? j >= -1 && j < n - 1 : wrong === "late" ? j >= 1 && j < n + 1 : wrong === "eos" ? j >= 0 && j < n - 1 : j >= 0 && j < n);
      pads.replaceChildren(...Array.from({ length: P + c.R }, (_, col) => {
        const j = col - P, kind = col < P ? (real[col] ? "p" : "") : j < n ? "r" : "";
        return h("i", { class: `${kind}${isCounted(j) ? " loss" : ""}${j === t ? " on" : ""}` });
      }));
      pads.setAttribute("aria-label", `${count(real)} prompt tokens after ${P - count(real)} of padding, ${n} response tokens before ${c.R - n} of padding`);
      maskNote.textContent = MASKS[wrong](app, n);
      const position = P - 1 + t;
      formula.textContent = `position ${position} reads “${t ? word(app, t - 1) : "the end of the prompt"}” and scores position ${position + 1}, “${word(app)}”\nlog p = log softmax(logits)[${position}, id ${get(file, "rollout.response_BR").data[i]}] = ${nats(c.logp[i])}${c.logp_ref ? `     reference: ${nats(c.logp_ref[i])}` : ""}`;
      likely(top, app);
    }
    return ({ cursor, file }) => (cursor || file) && draw();
  },
};

const lost = (wrong, t, n) => ((wrong === "early" || wrong === "eos") && t === n - 1) || (wrong === "late" && t === 0);
const MASKS = {
  no: (app, n) => `${n} tokens count. The last one, “${word(app, n - 1)}”, gets the score.`,
  early: (app, n) => `Lost: “${word(app, n - 1)}”, the token that gets the score. Counted instead: the last token of the prompt, which nobody sampled.`,
  late: (app) => `Lost: “${word(app, 0)}”, the first decision of the policy. Counted instead: padding after the end.`,
  eos: (app, n) => `Lost: “${word(app, n - 1)}”. The policy is never rewarded for ending, and the score lands on a token that does not exist.`,
};

// The likeliest tokens of policy and reference at the selected token.
function likely(root, app) {
  const { file, manifest } = app;
  const rows = has(file, "look.rows_B") ? [...get(file, "look.rows_B").data] : [], j = rows.indexOf(app.row);
  if (j < 0) {
    root.replaceChildren(h("p", { class: "note", text: `Likeliest tokens are recorded for ${rows.length} rollouts of each batch; this one is not among them.` }));
    return;
  }
  const chosen = get(file, "rollout.response_BR").data[app.index()];
  const side = (name, title, cls, logp) => {
    const ids = at(get(file, `look.${name}_top_ids_BR`), j, app.cursor.token).data, top = at(get(file, `look.${name}_top_logp_BR`), j, app.cursor.token).data;
    const rowsOf = [...ids].map((id, n) => [id, Math.exp(top[n])]);
    if (!ids.includes(chosen)) rowsOf.push([chosen, Math.exp(logp)]);
    return h("table", {}, h("caption", { text: title }), h("thead", {}, h("tr", {}, h("th", { scope: "col", class: "text", text: "token" }), h("th", { scope: "col", text: "probability" }))),
      h("tbody", {}, rowsOf.map(([id, prob]) => {
        const cell = barCell(90);
        cell.set(prob, [0, 1], cls, percent(prob));
        return h("tr", { class: id === chosen ? "on" : null }, h("th", { scope: "row", class: "n", text: token(file, manifest.tokenizer, id) + (id === chosen ? "  ← sampled" : "") }), cell.cell);
      })));
  };
  root.replaceChildren(h("div", { class: "two" },
    side("policy", "policy", "policy", app.chain.logp[app.index()]), side("reference", "reference", "ref", app.chain.logp_ref[app.index()])));
}

// 3. KL and reward shaping

const klView = {
  id: "kl",
  rollouts: true,
  build(el, app) {
    let estimator = "k1";
    const { config } = app.file, mode = config.kl ?? "reward", inside = mode === "reward";
    const of = (t) => kl[estimator](app.chain.logp[app.index(t)], app.chain.logp_ref[app.index(t)]);
    // In the loss, the penalty is that of the policy of the pass, not of the one that sampled.
    const penalty = (t) => (inside ? app.chain.k1 : need(app.pass()?.penalty, "the KL in the loss"))[app.index(t)];
    const cost = (t) => -app.knobs.beta * penalty(t);
    const score = (t) => (t === app.length - 1 ? app.chain.final[app.row] : 0);
    const table = tokenTable(app, "Each token’s KL, what it costs, and the reward", [
      { head: "KL, nats", value: (t) => of(t), cls: (t) => bySign(of(t)), width: 60 },
      mode === "off" ? null : { head: inside ? "−β KL" : `−β ${mode} in the loss`, value: cost, cls: (t) => bySign(cost(t)), width: 60 },
      { head: "score", value: score, cls: () => "reward", width: 46, text: (t) => (t === app.length - 1 ? fmt(score(t)) : "") },
      { head: "reward r", value: (t) => app.chain.rewards[app.index(t)], cls: (t) => bySign(app.chain.rewards[app.index(t)]), width: 46 },
    ].filter(Boolean));
    const beta = slider("β", { min: 0, max: 0.5, step: 0.005, value: app.recorded.beta, digits: 3 }, (v) => app.set({ beta: v }));
    const which = select("estimator", [["k1", "k1 = log p − log p_ref"], ["k2", "k2 = k1² / 2"], ["k3", "k3 = exp(−k1) − 1 + k1"]], "k1", (v) => {
      estimator = v;
      table.update();
    });
    const formula = eq(), total = h("p", { class: "note" });
    const lead = inside ? "Each token pays for being likelier than under the reference, and is paid for being less likely; the score arrives with the last token. Costs and score have their own columns, because a score of 1 and a cost of .01 cannot share a scale."
      : mode === "off" ? "The reward is the score alone, and it arrives with the last token. This run has no KL penalty: KL to the reference is measured, and costs nothing."
      : `The reward is the score alone, and it arrives with the last token. This run’s KL penalty is a term of the loss of each token, β ${mode}.`;
    el.append(heading("kl", "The KL penalty and the reward", "ops.kl.k1, ops.advantages.shape_rewards, algorithms.policy.final_score"), p(lead),
      formula, h("figure", {}, h("div", { class: "controls" }, mode === "off" ? null : beta.element, which.element), table.element,
        h("figcaption", { text: `Blue is positive, orange negative. ${inside ? "The penalty in the reward is always k1; k2 and k3 are lower-variance estimates of the same KL." : "k1, k2 and k3 estimate the same KL."}` })), total);
    const parts = Object.keys(app.file.arrays).filter((name) => name.startsWith("components."));
    return () => {
      const { chain: c, knobs: { beta: now } } = app, i = app.index(), t = app.cursor.token, last = t === app.length - 1, b = app.row;
      need(c.logp_ref, "log-probs of the reference");
      need(c.rewards, "rewards");
      if (app.manifest.foreign) need(null, "the rule that made the rewards");
      beta.set(now);
      table.update();
      formula.textContent = inside
        ? `r = −β (log p − log p_ref)${last ? " + score" : ""}\n  = −${fmt(now)} × (${nats(c.logp[i])} − ${par(c.logp_ref[i], nats)})${last ? ` + ${par(c.final[b])}` : ""} = ${fmt(c.rewards[i])}`
        : `${last ? `r = score = ${fmt(c.rewards[i])}` : "r = 0: the score arrives with the last token"}${mode === "off" ? "" : `\nloss + β ${mode} = loss + ${fmt(now)} × ${fmt(penalty(t))} = loss + ${fmt(-cost(t))}`}`;
      const here = c.mask.subarray(b * c.R, b * c.R + c.R), sum = masked.sum(c.k1.subarray(b * c.R, b * c.R + c.R), here);
      const dropped = c.final[b] !== c.score[b] ? ` (the model gave ${fmt(c.score[b])}; the text has no EOS)` : "";
      const made = parts.length > 1 ? ` = ${parts.map((name) => `${name.replace(/^components\.(reward_)?/, "").replace(/_B$/, "")} ${fmt(get(app.file, name).data[b])}`).join(" + ")}` : "";
      const paid = mode === "off" ? 0 : [...Array(app.length).keys()].reduce((x, j) => x - cost(j), 0);
      total.textContent = `This rollout: score ${fmt(c.final[b])}${dropped}${made}, KL ${fmt(sum)} nats, ` + (inside
        ? `which cost ${fmt(now * sum)}; total ${fmt(c.final[b] - now * sum)}, the number that is maximized.`
        : mode === "off" ? "which cost nothing." : `to which the loss of its ${app.length} tokens adds ${fmt(paid)}.`);
    };
  },
};

// 4. Values and advantages

const ESTIMATES = {
  ppo: "Was this token better than the value model expected? δ compares one step: the reward, plus the next value, against this value. The advantage adds up later δ, each step discounted by γλ: with λ = 0 it trusts the value model alone, with λ = 1 the rest of the episode alone.",
  online_dpo: "Of two completions of a prompt, the one with the higher score is the better: its tokens have +1, those of the other −1. There is no value model, and no size of the difference.",
  best_of_n: "Of the completions of a prompt, the best is kept (of those that ended, where “ended” is set): its tokens weigh the same, those of the others nothing. There is no value model.",
  group: "A completion is one action: all of its tokens have one return, and one advantage over the other completions of the prompt.",
  policy_gradient: "A token’s return is what came after it; the baseline is what the other rollouts got. Their difference is the advantage.",
};
const BASELINES = { mean: "mean of the group", leave_one_out: "mean of the others", batch_mean: "mean of the batch" };

// The advantage of a completion of a group, with its numbers.
function ofGroup(app, b) {
  const { chain: c, file: { config } } = app, A = c.raw[b * c.R], R = c.returns[b * c.R], { baseline, scale: by } = config;
  if (!baseline) return `A = ${signed(A)}: this completion has the score ${fmt(R)}`;
  const totals = Array.from({ length: c.B }, (_, row) => c.returns[row * c.R]);
  const over = advantages.group(totals, config.group, baseline, "none")[b], spread = by === "none" ? 1 : over / A;
  const [words, numbers] = baseline === "none" ? ["R", fmt(R)] : [`R − ${BASELINES[baseline]}`, `${fmt(R)} − ${par(R - over)}`];
  if (by === "none") return `A = ${words} = ${numbers} = ${signed(A)}`;
  return `A = (${words}) / std of the ${by === "group_std" ? "group" : "batch"}${A ? ` = (${numbers}) / ${fmt(spread)}` : ""} = ${signed(A)}`;
}

// The completions of the selected rollout's prompt: click one to follow it.
function groupTable(app) {
  const G = app.file.config.group, body = h("tbody"), caption = `The ${G} completions of this prompt`;
  const head = ["completion", "tokens", "return R", "advantage A"].map((text, i) => h("th", { scope: "col", class: i ? null : "text", text }));
  return {
    element: h("div", { class: "scroll wide", tabindex: 0, role: "region", "aria-label": caption }, h("table", {}, h("caption", { text: caption }), h("thead", {}, h("tr", {}, head)), body)),
    update() {
      const { chain: c, file, manifest } = app, first = app.row - (app.row % G), ids = get(file, "rollout.response_BR").data;
      body.replaceChildren(...Array.from({ length: G }, (_, n) => first + n).map((b) => {
        const words = [...ids.subarray(b * c.R, b * c.R + c.R)].filter((_, t) => c.mask[b * c.R + t]).map((id) => token(file, manifest.tokenizer, id));
        const open = h("button", { type: "button", class: "token long", text: words.join("").replaceAll("␣", " ").replace(/EOS$/, " EOS").trim(), onclick: () => app.go({ rollout: app.order.indexOf(b), token: 0 }) });
        return h("tr", { class: b === app.row ? "on" : null }, h("th", { scope: "row" }, open), [words.length, c.returns[b * c.R], c.raw[b * c.R]].map((x, i) => h("td", { class: "n", text: i ? signed(x) : `${x}` })));
      }));
    },
  };
}

const gae = {
  id: "gae",
  rollouts: true,
  build(el, app) {
    const ppo = app.chain.algorithm === "ppo", grouped = app.file.config.group > 1;
    let range = [0, 1];
    const track = (svg, t, width) => {
      const c = app.chain, i = app.index(t), x = scale(...range, 8, width - 8), v = c.values?.[i] ?? 0, r = c.returns[i];
      svg.replaceChildren(s("line", { class: "axis", x1: x(0), x2: x(0), y1: 0, y2: 18 }),
        s("line", { class: r < v ? "s-ref" : "s-policy", x1: x(v), x2: x(r), y1: 9, y2: 9, "stroke-width": 4 }),
        c.values ? s("circle", { class: "value", cx: x(v), cy: 9, r: 4 }) : "", s("rect", { class: "reward", x: x(r) - 2, y: 2, width: 4, height: 14 }));
    };
    const col = (head, array, width = 66) => ({ head, value: (t) => app.chain[array][app.index(t)], cls: (t) => bySign(app.chain[array][app.index(t)]), width });
    const columns = [{ head: ppo ? "V ● to return ▮" : "0 to return ▮", draw: track, width: 150, narrow: 54 }];
    if (ppo) columns.push(col("δ", "deltas", 56));
    columns.push(col("advantage A", "raw"), col(app.file.config.whiten_advantages ? "whitened" : "as used", "white"));
    const table = tokenTable(app, ppo ? "Value before each token, return, and advantage" : "Return and advantage of each token", columns);
    const others = grouped ? groupTable(app) : "";
    const gamma = slider("γ", { min: 0.5, max: 1, step: 0.01, value: app.recorded.gamma }, (v) => app.set({ gamma: v }));
    const lam = !ppo ? null : slider("λ", { min: 0, max: 1, step: 0.01, value: app.recorded.lam }, (v) => app.set({ lam: v }));
    const presets = !ppo ? null : h("span", { class: "presets" }, button("TD: λ = 0", () => app.set({ lam: 0 })), button("Monte-Carlo: λ = 1", () => app.set({ lam: 1 })), button("as recorded", () => app.set({ lam: app.recorded.lam, gamma: app.recorded.gamma })));
    const formula = eq(), note = h("p", { class: "note" });
    el.append(heading("gae", ppo ? "Values and advantages" : "Returns and advantages", ppo ? "ops.advantages.gae, ops.masked.whiten, rollout.value" : grouped ? "ops.advantages.group" : "ops.advantages.discounted_returns, algorithms.policy_gradient.baseline"),
      p(ESTIMATES[app.chain.algorithm] ?? (grouped ? ESTIMATES.group : ESTIMATES.policy_gradient)),
      formula, h("figure", {}, ppo || !grouped ? h("div", { class: "controls" }, gamma.element, lam?.element, presets) : null, table.element,
        h("figcaption", {}, h("span", { class: "legend" }, ppo ? h("span", { class: "value", text: "value before the token" }) : null, h("span", { class: "reward", text: ppo ? "return = advantage + value" : "return" }), h("span", { class: "policy", text: ppo ? "better than expected" : "positive" }), h("span", { class: "ref", text: ppo ? "worse" : "negative" })))), note, others && h("figure", {}, others.element));
    return () => {
      const { chain: c, knobs: k } = app, i = app.index(), t = app.cursor.token, last = t === app.length - 1, b = app.row;
      need(c.returns, "returns");
      const part = (x) => x.subarray(b * c.R, b * c.R + app.length);
      range = extent([part(c.returns), c.values ? part(c.values) : [0]], 0.06, 0);
      gamma.set(k.gamma);
      lam?.set(k.lam);
      table.update();
      if (ppo) {
        const next = last ? 0 : c.values[i + 1], later = last ? 0 : c.raw[i + 1];
        formula.textContent = `δ = r + γ V′ − V = ${fmt(c.rewards[i])} + ${fmt(k.gamma)} × ${par(next)} − ${par(c.values[i])} = ${signed(c.deltas[i])}\nA = δ + γ λ A′   = ${fmt(c.deltas[i])} + ${fmt(k.gamma)} × ${fmt(k.lam)} × ${par(later)} = ${signed(c.raw[i])}\nreturn = A + V   = ${fmt(c.raw[i])} + ${par(c.values[i])} = ${fmt(c.returns[i])}`;
      } else if (grouped) {
        others.update();
        formula.textContent = ofGroup(app, b);
      }
      else formula.textContent = `A = return − baseline = ${fmt(c.returns[i])} − ${par(c.returns[i] - c.raw[i])} = ${signed(c.raw[i])}`;
      const mean = masked.mean(c.raw, c.mask), std = Math.sqrt(masked.var(c.raw, c.mask));
      note.textContent = app.file.config.whiten_advantages ? `Whitened over the ${count(c.mask)} tokens of the batch: (A − ${par(mean)}) / ${fmt(std)}.` : "This run does not whiten its advantages.";
    };
  },
};

// 5. Ratios

const clipOf = (app) => (app.knobs.clipping ? app.knobs.eps : 0);

const passSelect = (app) => select("epoch", Array.from({ length: app.epochs }, (_, e) => [e, `${e + 1} of ${app.epochs}`]), app.cursor.epoch, (v) => app.go({ epoch: Number(v) }));

const ratioView = {
  id: "ratio",
  rollouts: true,
  build(el, app) {
    need(app.pass(0), "the passes of the update");
    let range = [0.5, 1.5], band = 0;
    const dots = (svg, t, width) => {
      const x = scale(...range.map(Math.log), 8, width - 8), i = app.index(t), inside = (v) => x(Math.log(Math.max(range[0], Math.min(range[1], v))));
      const e = clipOf(app);
      svg.replaceChildren(s("rect", { class: "band", x: inside(1 - e), width: Math.max(inside(1 + e) - inside(1 - e), 0), y: 0, height: 18 }), s("line", { class: "zero", x1: x(0), x2: x(0), y1: 0, y2: 18 }));
      for (let e = 0; e < app.epochs; e++) {
        const r = app.pass(e).ratio[i];
        svg.append(s("circle", { class: e === app.cursor.epoch ? "policy" : "hollow s-policy", cx: inside(r), cy: 9, r: 3.5 }));
      }
    };
    const epoch = passSelect(app);
    const table = tokenTable(app, "Ratio of each token in each epoch", [
      { head: "ratio, log scale", draw: dots, width: 190, narrow: 104 },
      { head: "new log p − old", range: () => span(app, (e, i) => app.pass(e).now[i] - app.chain.logp[i], Math.log1p(app.knobs.eps)), value: (t) => app.pass().now[app.index(t)] - app.chain.logp[app.index(t)], cls: (t) => bySign(app.pass().now[app.index(t)] - app.chain.logp[app.index(t)]), width: 70 },
      { head: "ratio", range: () => span(app, (e, i) => app.pass(e).ratio[i] - 1, app.knobs.eps), value: (t) => app.pass().ratio[app.index(t)] - 1, cls: (t) => bySign(app.pass().ratio[app.index(t)] - 1), width: 60, text: (t) => fmt(app.pass().ratio[app.index(t)]) },
    ]);
    const hist = chart("", 150, (svg, width) => {
      const c = app.chain, all = [];
      for (let e = 0; e < app.epochs; e++) all.push(Float64Array.from(app.pass(e).ratio).filter((_, i) => c.mask[i]));
      const [lo, hi] = extent(all, 0.02, 1 - app.knobs.eps, 1 + app.knobs.eps), bins = 41;
      const counts = all.map((r) => {
        const n = Array(bins).fill(0);
        r.forEach((v) => n[Math.min(bins - 1, Math.floor(((v - lo) / (hi - lo)) * bins))]++);
        return n;
      });
      const most = Math.max(...counts.flat());
      const { x, y } = axes(svg, width, 150, [lo, hi], [0, Math.log1p(most)], { xt: "ratio", yt: "tokens, log scale", yticks: [0, 1, 10, 100, 1e3, 1e4, 1e5].filter((n) => n <= most).map(Math.log1p), yf: (v) => (v ? `${Math.round(Math.expm1(v))}` : "") });
      svg.insertBefore(s("rect", { class: "band", x: x(1 - clipOf(app)), width: x(1 + clipOf(app)) - x(1 - clipOf(app)), y: 22, height: 92 }), svg.firstChild);
      counts.forEach((n, e) => svg.append(s("path", { class: `line ${e === app.cursor.epoch ? "s-policy" : "thin s-dim"}`, d: path(n.map((v, b) => [x(lo + ((b + 0.5) / bins) * (hi - lo)), y(Math.log1p(v))])) })));
    });
    const formula = eq(), note = h("p", { class: "note" });
    el.append(heading("ratio", "The importance ratio", "ops.losses.ppo_policy, ops.importance.effective_sample_size"),
      p("The rollout is used for several passes, but only the first sees the policy that wrote it. From then on each token is weighted by how much likelier the policy has become: the ratio. In the very first minibatch it is 1, to rounding; that is a check of sampler against learner."),
      formula, h("figure", {}, h("div", { class: "controls" }, epoch.element), table.element, h("figcaption", { text: `${app.recorded.clipping ? "The band is 1 ± ε. " : ""}Filled: the chosen epoch; hollow: the others.` })),
      h("figure", {}, hist.svg, h("figcaption", { text: "All tokens of the batch; blue is the chosen epoch." }),
        dataTable("ratios by epoch", ["epoch", "least", "mean", "largest", "effective sample size"], () => stats()).element), note);
    function stats() {
      return Array.from({ length: app.epochs }, (_, e) => {
        const ps = app.pass(e), used = [...ps.ratio].filter((_, i) => app.chain.mask[i]);
        return [`${e + 1}`, Math.min(...used), masked.mean(ps.ratio, app.chain.mask), Math.max(...used), ess(app, ps)];
      });
    }
    return ({ cursor, file }) => {
      const i = app.index(), ps = app.pass();
      epoch.set(app.cursor.epoch);
      const all = Array.from({ length: app.epochs }, (_, e) => app.pass(e).ratio.subarray(app.row * app.chain.R, app.row * app.chain.R + app.length));
      const [lo, hi] = extent(all, 0, 1 - app.knobs.eps, 1 + app.knobs.eps), far = Math.min(Math.max(hi, 1 / Math.max(lo, 0.05)) * 1.05, 20);
      range = [1 / far, far];
      table.update();
      hist.label(`Distribution of the ratios of all tokens, by epoch`);
      if (cursor || file || clipOf(app) !== band) hist.redraw();
      band = clipOf(app);
      formula.textContent = `ratio = exp(new log p − old log p) = exp(${nats(ps.now[i])} − ${par(app.chain.logp[i], nats)}) = ${fmt(ps.ratio[i])}`;
      note.textContent = `Effective sample size in epoch ${app.cursor.epoch + 1}: ${percent(ess(app, ps))} of the tokens. It falls as ratios spread: few tokens then carry the whole gradient.`;
    };
  },
};
// A symmetric range that holds f(epoch, i) of the rollout's tokens in all epochs, and at least +-least.
function span(app, f, least) {
  let most = least;
  for (let e = 0; e < app.epochs; e++) for (let t = 0; t < app.length; t++) most = Math.max(most, Math.abs(f(e, app.index(t))));
  return [-most, most];
}
const ess = (app, ps) => importance.effective_sample_size(Float64Array.from(ps.now, (l, i) => (app.chain.mask[i] ? l - app.chain.logp[i] : 0)), app.chain.mask);

// 6. The clip

const GROUPED = ["rloo", "grpo", "dr_grpo", "dapo", "reinforce_pp"]; // their loss is that of algorithms/group.py

const UNCLIPPED = {
  policy_gradient: "A policy gradient takes its step and throws the rollout away, so that nothing has moved yet: it needs no clip.",
  best_of_n: "What was kept is a text to imitate: the loss is −log p of its tokens, and it needs neither ratio nor clip.",
};

// Online DPO: the loss is that of a pair, and all of its tokens share it.
function pairView(el, app) {
  const epoch = passSelect(app), formula = eq(), { beta, loss, smoothing } = app.chain.pairs, sign = (t) => app.chain.white[app.index(t)];
  const gain = (t) => app.pass().now[app.index(t)] - app.chain.logp_ref[app.index(t)];
  const table = tokenTable(app, "What each token adds to the log-ratio of its completion", [
    { head: "better (+1) or worse (−1)", value: sign, cls: (t) => bySign(sign(t)), width: 56 },
    { head: "new log p − log p_ref", value: gain, cls: (t) => bySign(gain(t)), width: 80 },
  ]);
  el.append(heading("clip", "The loss of a pair", "ops.losses.dpo, algorithms.online_dpo.loss"),
    p("This run has no clip. Of two completions of a prompt, the better one’s log-ratio to the reference is to rise above that of the worse one; the difference h is what the loss reads. All tokens of the pair share it."),
    formula, h("figure", {}, h("div", { class: "controls" }, epoch.element), table.element));
  return () => {
    const { chain: c } = app, ps = app.pass(), b = app.row, i = app.index();
    epoch.set(app.cursor.epoch);
    table.update();
    const ratio = logRatios(ps.now, c), over = averaged(c.pairs) ? "mean" : "Σ";
    const [better, worse] = sign(0) > 0 ? [b, b ^ 1] : [b ^ 1, b];
    const h = ratio[better] - ratio[worse], of = loss === "sigmoid" && !smoothing ? `−log σ(β h) = −log σ(${fmt(beta)} × ${par(h, nats)})` : loss === "ipo" ? "(h − 1 / (2 β))²" : loss === "hinge" ? "max(1 − β h, 0)" : `${loss}(β h)`;
    formula.textContent = sign(0) === 0 ? "The two completions have the same score: the pair has no loss."
      : `h = ${over} log-ratio of the better − ${over} of the worse = ${nats(ratio[better])} − ${par(ratio[worse], nats)} = ${nats(h)}\nloss = ${of} = ${fmt(ps.loss[i])}     (β = ${fmt(beta)})`;
  };
}

const clipView = {
  id: "clip",
  rollouts: true,
  build(el, app) {
    need(app.pass(0), "the passes of the update");
    if (app.chain.pairs) return pairView(el, app);
    const epoch = passSelect(app), H = 250;
    let shown = "";
    const eps = slider("ε", { min: 0.01, max: 0.5, step: 0.005, value: app.recorded.eps, digits: 3 }, (v) => app.set({ eps: v }));
    const plain = check("no clip (vanilla policy gradient)", (on) => app.set({ clipping: !on }), !app.recorded.clipping);
    // Axes hold every ratio of the iteration, whatever the knobs: a slider moves the band, the curve and clipped tokens.
    const panelOf = (sign) => {
      let x, y, band, curve, ring, dots = [], range = [0, 1];
      const view = chart("", H, (svg, width) => {
        const c = app.chain, R = app.pass().ratio;
        dots = [];
        for (let i = 0; i < R.length; i++) if (c.mask[i] && c.white[i] * sign > 0) dots.push({ i, circle: s("circle") });
        range = extent([dots.map(({ i }) => R[i])], 0.04, 1 - app.recorded.eps * 1.5, 1 + app.recorded.eps * 1.5);
        ({ x, y } = axes(svg, width, H, range, extent([sign > 0 ? range : range.map((r) => -r)], 0.04), { xt: "ratio", yt: "objective / |A|", left: 50, xn: Math.max(2, Math.floor(width / 80)) }));
        [band, curve, ring] = [s("rect", { class: "band", y: 22, height: H - 58 }), s("path", { class: "line thin s-dim" }), s("circle", { class: "pick", r: 7 })];
        svg.insertBefore(band, svg.firstChild);
        svg.append(curve, ...dots.map(({ circle }) => circle), ring, s("text", { x: width - 10, y: 12, "text-anchor": "end", text: sign > 0 ? "A > 0: make it likelier" : "A < 0: make it less likely" }));
        view.move();
      });
      view.move = () => {
        if (!x) return;
        const c = app.chain, ps = app.pass(), R = ps.ratio, e = app.knobs.clipping ? app.knobs.eps : Infinity, [lo, hi] = range;
        const objective = (r) => (sign > 0 ? Math.min(r, 1 + e) : -Math.max(r, 1 - e));
        const inside = (r) => x(Math.max(lo, Math.min(hi, r)));
        band.setAttribute("x", inside(1 - e));
        band.setAttribute("width", Number.isFinite(e) ? inside(1 + e) - inside(1 - e) : 0);
        const bends = Number.isFinite(e) ? [1 - e, 1 + e].filter((r) => r > lo && r < hi) : [];
        curve.setAttribute("d", path([lo, ...bends, hi].map((r) => [x(r), y(objective(r))])));
        for (const { i, circle } of dots) {
          const cls = ps.clipped[i] ? "bad" : `hollow ${sign > 0 ? "s-policy" : "s-ref"} faint`, at = `${x(R[i]).toFixed(1)},${y(objective(R[i])).toFixed(1)}`;
          if (circle.at === at && circle.cls === cls) continue;
          [circle.at, circle.cls] = [at, cls];
          const [cx, cy] = at.split(",");
          circle.setAttribute("class", cls);
          circle.setAttribute("cx", cx);
          circle.setAttribute("cy", cy);
          circle.setAttribute("r", ps.clipped[i] ? 4 : 3);
        }
        const here = app.index(), mine = c.white[here] * sign > 0;
        ring.setAttribute("visibility", mine ? "visible" : "hidden");
        if (mine) {
          ring.setAttribute("cx", x(R[here]));
          ring.setAttribute("cy", y(objective(R[here])));
        }
      };
      return view;
    };
    const up = panelOf(1), down = panelOf(-1);
    const A = (t) => app.chain.white[app.index(t)], loss = (t) => app.pass().loss[app.index(t)];
    const table = tokenTable(app, "Loss of each token of this rollout", [
      { head: "A", value: A, cls: (t) => bySign(A(t)), width: 64 },
      { head: "ratio", range: () => span(app, (e, i) => app.pass(e).ratio[i] - 1, app.knobs.eps), value: (t) => app.pass().ratio[app.index(t)] - 1, cls: (t) => bySign(app.pass().ratio[app.index(t)] - 1), width: 56, text: (t) => fmt(app.pass().ratio[app.index(t)]) },
      { head: "loss", value: loss, cls: (t) => (app.pass().clipped[app.index(t)] ? "bad" : "dimmed"), width: 80, text: (t) => fmt(loss(t)) + (app.pass().clipped[app.index(t)] ? " clipped" : "") },
    ]);
    table.element.classList.add("noted");
    const formula = eq(), note = h("p", { class: "note" });
    const twin = dataTable("every token that is clipped", ["rollout", "token", "A", "ratio", "loss"], () => {
      const ps = app.pass(), c = app.chain;
      return app.order.flatMap((b, n) => [...Array(c.R).keys()].filter((t) => ps.clipped[b * c.R + t]).map((t) => [`${n + 1}`, `${t + 1}`, c.white[b * c.R + t], ps.ratio[b * c.R + t], ps.loss[b * c.R + t]]));
    });
    el.append(heading("clip", "The clip", `ops.losses.ppo_policy, algorithms.${GROUPED.includes(app.chain.algorithm) ? "group" : app.chain.algorithm.replace("unipo ", "")}.loss`),
      p(app.recorded.clipping ? "The update takes the worse of two objectives: the weighted one, and the same with the ratio held within 1 ± ε. A token that has already moved far enough in the direction its advantage wants lies on the flat part: it pushes no gradient. A token that moved the wrong way is never clipped."
        : `${UNCLIPPED[app.chain.algorithm] ?? "This update has no clip."} Uncheck “no clip” to see what a clip would do to the same tokens.`),
      formula, h("figure", {}, h("div", { class: "controls" }, eps.element, epoch.element, plain.element), h("div", { class: "two" }, up.svg, down.svg),
        h("figcaption", {}, "Every token of the batch at its ratio, on the curve of its advantage’s sign. Filled red: clipped. The ring is the selected token."), twin.element),
      h("figure", {}, table.element), note);
    return () => {
      const { chain: c, knobs: k } = app, ps = app.pass(), i = app.index(), e = k.eps;
      epoch.set(app.cursor.epoch);
      eps.set(k.eps);
      eps.element.hidden = !k.clipping;
      plain.input.checked = !k.clipping;
      const n = ps.clipped.reduce((a, b) => a + b, 0), all = count(c.mask);
      up.label(`Tokens with positive advantage on the clipped objective; ${n} of ${all} tokens of the batch are clipped`);
      down.label(`Tokens with negative advantage on the clipped objective`);
      // Other knobs change the advantages, and so which tokens are in which panel.
      const drawn = `${app.file.name} ${app.cursor.epoch} ${k.beta} ${k.gamma} ${k.lam}`;
      if (drawn !== shown) {
        shown = drawn;
        up.redraw();
        down.redraw();
      } else {
        up.move();
        down.move();
      }
      table.update();
      twin.refill();
      const clipped = Math.min(Math.max(ps.ratio[i], 1 - e), 1 + e);
      formula.textContent = k.clipping
        ? `loss = max(−A ratio, −A clip(ratio, ${fmt(1 - e)}, ${fmt(1 + e)}))\n     = max(−${par(c.white[i])} × ${fmt(ps.ratio[i])}, −${par(c.white[i])} × ${fmt(clipped)}) = ${fmt(ps.loss[i])}${ps.clipped[i] ? "\n     the clipped term is the larger: no gradient" : ""}`
        : c.plain ? `loss = −A log p = −${par(c.white[i])} × ${par(ps.now[i], nats)} = ${fmt(ps.loss[i])}     (one step a rollout: the ratio is 1)`
        : `loss = −A ratio = −${par(c.white[i])} × ${fmt(ps.ratio[i])} = ${fmt(ps.loss[i])}`;
      note.textContent = `In epoch ${app.cursor.epoch + 1}, ${n} of ${all} tokens are clipped: ${percent(n / all)}. Mean loss of a token: ${fmt(masked.mean(ps.loss, c.mask))}.`;
    };
  },
};

// 7. The same tokens under another algorithm

const FORMULAS = {
  REINFORCE: [["R"], [" log p", 1]],
  RLOO: [["(R − mean of the others’ R)", 1], [" log p"]],
  GRPO: [["min(ratio A, clip(ratio, 1 − ε, 1 + ε) A)", 1], [" − β k3", 1], [",  A = (s − mean s) / std s", 1]],
  "Dr. GRPO": [["min(ratio A, clip(ratio, 1 − ε, 1 + ε) A)"], [",  A = s − mean s", 1], [", and no 1 / length", 1]],
  "clip-higher": [["min(ratio A, clip(ratio, 1 − ε, "], ["1 + ε′", 1], [") A)"], [",  A as GRPO, a mean over tokens", 1]],
  PPO: [["min(ratio A, clip(ratio, 1 − ε, 1 + ε) A)"], [",  A by GAE: of each token", 1]],
};

const algorithms = {
  id: "algorithms",
  rollouts: true,
  build(el, app) {
    let high = 0.28, found = null;
    const names = Object.keys(FORMULAS), value = (name) => (t) => found.of[name][app.index(t)];
    const table = tokenTable(app, "What each algorithm maximizes for each token", names.map((name) => ({ head: name, value: value(name), cls: (t) => bySign(value(name)(t)), width: 34 })));
    table.element.classList.add("tight");
    const epoch = app.pass(0) && passSelect(app);
    const higher = slider("ε′ of clip-higher", { min: 0.2, max: 0.6, step: 0.01, value: high }, (v) => {
      high = v;
      draw();
    });
    const formulas = h("dl", { class: "formulas" });
    const note = h("p", { class: "note" }), here = h("p", { class: "note" });
    el.append(heading("algorithms", "The same tokens under another algorithm", "ops.losses.policy_gradient, ops.losses.ppo_policy, ops.advantages.group"),
      p("What-if: the tokens, log-probs and scores are those of this run, and only the objective changes. REINFORCE and RLOO spread one number over all tokens, weighted by log p; the others compare ratios. Only PPO tells the tokens of one text apart by their own advantage."),
      h("figure", {}, h("div", { class: "controls" }, epoch?.element, higher.element), table.element,
        here, h("figcaption", { text: "R: score minus the KL penalty; s: score. GRPO and RLOO compare completions of one prompt" + (app.file.config.group > 1 ? "." : "; here the batch stands in for that group, because this run sampled one completion a prompt.") + (app.chain.values ? "" : " It has no value model, so PPO’s column uses the advantages of the run.") })),
      formulas, note);
    formulas.replaceChildren(...names.flatMap((name) => [h("dt", { text: name }), h("dd", { class: "formula" }, FORMULAS[name].map(([text, differs]) => (differs ? h("mark", { text }) : text)))]));
    function draw() {
      need(app.chain.final, "scores");
      need(app.chain.logp_ref, "log-probs of the reference");
      found = objectives(app.chain, app.pass(), app.knobs, high);
      epoch?.set(app.cursor.epoch);
      table.update();
      const b = app.row, i = app.index(), { eps, beta } = app.knobs;
      here.textContent = `β = ${fmt(beta)}${(app.file.config.kl ?? "reward") === "off" ? ", which this run did not use" : ""}; ε = ${fmt(eps)}${app.recorded.clipping ? "" : ", which this run does not have"}.`;
      note.textContent = `This rollout: R = ${fmt(found.totals[b])}; RLOO’s advantage ${signed(found.rloo[b])}, GRPO’s ${signed(found.grpo[b])}, Dr. GRPO’s ${signed(found.dr[b])}; PPO’s for “${word(app)}” ${signed(app.chain.white[i])}. GRPO divides by this text’s ${found.length[b]} tokens, so a long bad text is punished less a token; Dr. GRPO does not.`;
    }
    return draw;
  },
};

export const views = [intro, map, tokens, klView, gae, ratioView, clipView, algorithms, ...stageViews];
