// The selected token's numbers, put into the formulas: beside the article, or at the foot of a narrow screen.

import { inReward } from "./chain.js";
import { fmt, h, nats, par, signed } from "./dom.js";
import { token } from "./trace.js";

let details = null;

export function panel(root, app) {
  if (!details || details.parentElement?.parentElement !== root) {
    details = h("details", { open: innerWidth > 960 }, h("summary", {}, h("span"), h("small")), h("dl"), h("div", { class: "eq" }));
    const step = (text, label, by) => h("button", { type: "button", text, "aria-label": label, onclick: () => app.go({ token: app.cursor.token + by }) });
    root.replaceChildren(h("div", { class: "f" }, step("‹", "the token before", -1), details, step("›", "the next token", 1)));
  }
  const { chain: c, cursor, knobs: k } = app, i = app.index(), last = cursor.token === app.length - 1;
  const [summary, dl, eq] = details.children;
  summary.firstChild.textContent = `Token ${cursor.token + 1}: ${word(app)} `;
  summary.lastChild.textContent = `rollout ${cursor.rollout + 1}, iteration ${app.file.step}`;
  const ps = app.pass();
  const entries = [
    ["log p", c.logp[i]], ["log p ref", c.logp_ref?.[i]], ["KL (k1)", c.logp_ref && c.k1[i]], ["reward", c.rewards?.[i]],
    ["value", c.values?.[i]], ["delta", c.deltas?.[i]], ["advantage", c.raw?.[i]], ["whitened", c.white?.[i]], ["return", c.returns?.[i]],
    [`ratio, epoch ${cursor.epoch + 1}`, ps?.ratio[i]], [c.pairs ? "loss of the pair" : "loss of the token", ps?.loss[i]],
  ].filter(([, v]) => v !== undefined && v !== null);
  dl.replaceChildren(...entries.flatMap(([name, value]) => [h("dt", { text: name }), h("dd", { text: fmt(value) })]));
  const lines = [];
  if (c.logp_ref) lines.push(`KL = ${nats(c.logp[i])} − ${par(c.logp_ref[i], nats)} = ${nats(c.k1[i])}`);
  if (c.rewards && c.logp_ref && !app.manifest.foreign) lines.push(!inReward(app.file.config) ? `r = ${last ? "score" : "0 before the last token"}${last ? ` = ${fmt(c.rewards[i])}` : ""}` : `r = −${fmt(k.beta)} × ${par(c.k1[i])}${last ? ` + ${par(c.final[app.row])}` : ""} = ${fmt(c.rewards[i])}`);
  if (c.deltas) {
    const next = last ? 0 : c.values[i + 1], later = last ? 0 : c.raw[i + 1];
    lines.push(`δ = r + γ V′ − V\n  = ${fmt(c.rewards[i])} + ${fmt(k.gamma)} × ${par(next)} − ${par(c.values[i])}\n  = ${signed(c.deltas[i])}`);
    lines.push(`A = δ + γ λ A′\n  = ${fmt(c.deltas[i])} + ${fmt(k.gamma * k.lam)} × ${par(later)}\n  = ${signed(c.raw[i])}`);
  }
  if (ps) {
    lines.push(`ratio = exp(${nats(ps.now[i])} − ${par(c.logp[i], nats)})\n      = ${fmt(ps.ratio[i])}`);
    lines.push(`loss = ${fmt(ps.loss[i])}${ps.clipped[i] ? ", clipped: no gradient" : ""}`);
  }
  eq.textContent = lines.join("\n");
}

export const word = (app, t = app.cursor.token) =>
  token(app.file, app.manifest.tokenizer, app.file.arrays["rollout.response_BR"].data[app.index(t)]);
