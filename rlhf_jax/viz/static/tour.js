// An optional tour. Each stop goes to a view, moves the cursor to a telling place of the recorded iteration, and says
// what to notice there, in this run's numbers. A stop that the run has nothing for is left out.

import { button, fmt, h, nats, percent } from "./dom.js";
import { word } from "./panel.js";

// The places {rollout, token} of the rollouts that are listed first, whose likeliest tokens are recorded too.
function* places(app) {
  const { chain: c, order, file } = app, shown = file.arrays["look.rows_B"]?.data.length ?? order.length;
  for (let rollout = 0; rollout < shown; rollout++) {
    for (let token = 0; token < c.R && c.mask[order[rollout] * c.R + token]; token++) yield { rollout, token };
  }
}

// The place where f(index in [B, R]) is the largest, or null where it is above 0 nowhere.
function most(app, f) {
  let best = null, value = 0;
  for (const place of places(app)) {
    const here = f(app.order[place.rollout] * app.chain.R + place.token);
    if (here > value) [best, value] = [place, here];
  }
  return best;
}

// Where a reader starts who has not chosen: the token that the update has moved the most.
export const telling = (app) => most(app, (i) => Math.abs(Math.log(app.pass()?.ratio[i] ?? 1))) ?? { rollout: 0, token: 0 };

const p = (logp) => percent(Math.exp(logp));

// Each stop: {view, place(app): a change of the cursor, or null for no stop, text(app), ready(element)}.
const STOPS = [
  {
    view: "map",
    place: (app) => (facts(app).length ? {} : null),
    text: (app) => `Begin with what the run gained and what it paid, on prompts it never trained on: ${facts(app).join("; ")}. The rest of the page shows how, for one token.`,
  },
  {
    view: "tokens",
    place: (app) => (app.chain.logp_ref ? telling(app) : null),
    text: (app, i) => `Of the first rollouts listed, this iteration moved “${word(app)}” the most. When it was written, the policy gave it ${p(app.chain.logp[i])} and the reference ${p(app.chain.logp_ref[i])}. Below are the tokens that were likelier.`,
  },
  {
    view: "kl",
    place: (app) => (app.chain.rewards && app.chain.logp_ref && !app.manifest.foreign ? { token: 1e6 } : null),
    text: (app, i) => `Only the last token, “${word(app)}”, gets the score: ${fmt(app.chain.final[app.row])}. ${app.length - 1} tokens before it wait for what it will say about them. Compare their column of costs: the line below the table adds them up.`,
  },
  {
    view: "gae",
    place: (app) => (app.chain.raw ? most(app, (i) => Math.abs(app.chain.raw[i] - (app.chain.deltas?.[i] ?? 0))) : null),
    text: (app, i) => (app.chain.deltas
      ? `Before “${word(app)}” the value model expected ${fmt(app.chain.values[i])}; the return is ${fmt(app.chain.returns[i])}, so its advantage is ${fmt(app.chain.raw[i])}. Press “TD: λ = 0”: each advantage becomes its δ, here ${fmt(app.chain.deltas[i])}, as if nothing after the next token counted. No token of these rollouts changes more.`
      : `The largest advantage of these rollouts, ${fmt(app.chain.raw[i])} at a return of ${fmt(app.chain.returns[i])}. There is no value model: it comes from comparing whole completions.`),
  },
  {
    view: "ratio",
    place: (app) => (app.pass(0) && app.epochs > 1 ? { epoch: 99, ...telling(app) } : null),
    text: (app, i) => `In the first epoch the ratio of “${word(app)}” is ${fmt(app.pass(0).ratio[i])}; by epoch ${app.epochs} it is ${fmt(app.pass().ratio[i])}. The histogram has all tokens: most have hardly moved.`,
  },
  {
    view: "clip",
    place: (app) => (app.pass(0) && app.knobs.clipping ? most(app, (i) => (app.pass().clipped[i] ? Math.abs(app.chain.white[i]) : 0)) ?? telling(app) : null),
    text: (app, i) => (app.pass().clipped[i]
      ? `Why is “${word(app)}” clipped? Its advantage is ${fmt(app.chain.white[i])} and its ratio ${fmt(app.pass().ratio[i])}: it has already moved as its advantage wants, and further than ε = ${fmt(app.knobs.eps)}. The ring is on the flat part. An ε above ${fmt(Math.abs(app.pass().ratio[i] - 1))} would let it go on: drag the slider.`
      : `No token of these rollouts is clipped in this iteration. The one that moved the most, “${word(app)}”, has the ratio ${fmt(app.pass().ratio[i])}. Other iterations may have gone further: try the slider at the top.`),
  },
  {
    view: "algorithms",
    place: (app) => (app.chain.final && app.chain.logp_ref ? {} : null),
    text: (app) => `The row of “${word(app)}”: six algorithms, the same rollout. Look down a column: where all tokens of the text have one weight, nothing says which of them was to blame.`,
  },
  {
    view: "curves",
    place: () => ({}),
    text: (app) => `${app.file ? `The line stands at iteration ${app.file.step}. ` : ""}A score that rises while gold falls, or an entropy that falls to nothing, is a policy that has learned to please its reward.`,
  },
  {
    view: "samples",
    place: () => ({}),
    text: () => "Now sorted by the largest loss: texts that were better before. An average hides them.",
    ready: (element) => {
      const sorted = element.querySelector("select");
      if (!sorted) return;
      sorted.value = "loss";
      sorted.dispatchEvent(new Event("change"));
    },
  },
  {
    view: "reward",
    place: () => ({}),
    text: () => "The ring is on the held-out pair with the largest loss: there the reward model agrees least with the label. Read both texts. Which of the two is right?",
    ready: (element) => [...element.querySelectorAll("button")].find((b) => b.textContent === "the worst pair")?.click(),
  },
  {
    view: "playground",
    place: () => ({}),
    text: () => "Your turn: let both policies write, and click the first token at which they part.",
  },
];

// What the map says of the last stage.
function facts(app) {
  const summary = app.manifest.stages[app.stage].summary ?? {}, value = (key) => summary[`${app.stage}/${key}`];
  const change = (key, title) => {
    const before = value(`${key}_sft`) ?? value(`${key}_before`);
    return Number.isFinite(before) && Number.isFinite(value(key)) ? `${title} ${fmt(before)} → ${fmt(value(key))}` : null;
  };
  return [
    change("gold", "gold score") ?? change("score", "score") ?? change("reward", "reward"),
    Number.isFinite(value("kl_exact")) ? `exact KL to the reference ${nats(value("kl_exact"))} nats` : null,
  ].filter(Boolean);
}

// A view that has more than its text: one that lacks its arrays says so instead.
const filled = (id) => {
  const element = document.getElementById(id);
  return element && !element.hidden && Boolean(element.querySelector("figure, form"));
};

let end = () => {};

export function tour(app, opener) {
  end();
  const root = document.getElementById("tour");
  const stops = STOPS.filter((stop) => filled(stop.view) && stop.place(app));
  const title = h("h2"), text = h("p", { "aria-live": "polite" });
  const back = button("back", () => open(at - 1)), next = button("next", () => (at + 1 < stops.length ? open(at + 1) : end()));
  let at = 0;
  end = () => {
    root.hidden = true;
    document.querySelector(".toured")?.classList.remove("toured");
    opener.focus({ preventScroll: true });
    end = () => {};
  };
  async function open(n) {
    at = n;
    const stop = stops[at], element = document.getElementById(stop.view);
    if (app.whatIf) app.set({ ...app.recorded });
    await app.go(stop.place(app) ?? {});
    stop.ready?.(element);
    document.querySelector(".toured")?.classList.remove("toured");
    element.classList.add("toured");
    title.textContent = `Tour, ${at + 1} of ${stops.length}: ${element.querySelector("h2").firstChild.textContent.trim()}`;
    text.textContent = stop.text(app, app.file && app.index());
    back.disabled = at === 0;
    next.textContent = at + 1 < stops.length ? "next" : "end";
    element.scrollIntoView();
  }
  root.replaceChildren(title, text, h("div", { class: "controls" }, back, next, button("end the tour", () => end())));
  root.onkeydown = (event) => event.key === "Escape" && end();
  root.hidden = false;
  open(0);
  next.focus({ preventScroll: true });
}
