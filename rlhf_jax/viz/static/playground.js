// The playground: both policies of a run write side by side with the same noise. Fills <section id="playground"> where
// the server has a run; elsewhere, as on a static host, the section stays hidden.

const LETTERS = ["A", "B"];

// Text

// Characters that cannot be seen, or that move the others (controls, bidi, lone surrogates), as escapes.
export function visible(text, keep = "\n") {
  return text.replace(/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Cs}\p{Co}\p{Cn}]/gu, (character) =>
    keep.includes(character) ? character : `\\u{${character.codePointAt(0).toString(16)}}`);
}

// A token: its spaces and line ends can be seen.
function tokenText(token) {
  return token.special || visible(token.text, "").replaceAll("\\u{a}", "\u23ce").replaceAll(" ", "\u2423");
}

export const signed = (value, digits = 3) => `${value < 0 ? "\u2212" : "+"}${Math.abs(value).toFixed(digits)}`;
const minus = (value, digits = 3) => value.toFixed(digits).replace("-", "\u2212");
const probability = (logp) => {
  const p = Math.exp(logp);
  return p >= 0.001 ? p.toFixed(3) : p.toExponential(1).replace("-", "\u2212");
};

// {subreddit, title, post} of a TL;DR query, or null.
export function parts(prompt) {
  const found = /^SUBREDDIT: r\/(.*?)\n\nTITLE: (.*?)\n\nPOST: (.*)\n\nTL;DR:$/s.exec(prompt);
  return found && { subreddit: found[1], title: found[2], post: found[3] };
}

// The pieces of a text that its words split it into: [text, word or null]. Python counts characters, not UTF-16 units.
function marked(text, words) {
  const characters = [...text];
  const pieces = [];
  let end = 0;
  for (const word of words) {
    pieces.push([characters.slice(end, word.start).join(""), null]);
    pieces.push([characters.slice(word.start, word.end).join(""), word]);
    end = word.end;
  }
  return [...pieces, [characters.slice(end).join(""), null]].filter(([piece]) => piece);
}

// The page

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "on") for (const [event, listener] of Object.entries(value)) made.addEventListener(event, listener);
    else if (key in made && typeof value !== "string") made[key] = value;
    else if (value !== null) made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

let count = 0;
function field(label, control, hint = "") {
  control.id = `pg-${++count}`;
  const parts = [element("label", { for: control.id }, label), control];
  if (hint) {
    const note = element("small", { id: `${control.id}-hint` }, hint);
    control.setAttribute("aria-describedby", note.id);
    parts.push(note);
  }
  return element("div", { class: "pg-field" }, ...parts);
}

const number = (value, min, max, step) =>
  element("input", { type: "number", value: String(value), min: String(min), max: String(max), step: String(step) });

async function post(path, values, signal) {
  const response = await fetch(path, {
    method: "POST", signal, headers: { "Content-Type": "application/json" }, body: JSON.stringify(values),
  });
  if (response.ok) return response;
  let message = `${response.status} ${response.statusText}`;
  try {
    message = (await response.json()).error;
  } catch { /* the status says it */ }
  throw new Error(message);
}

// The events of a response, as they come.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n\n");
    rest = lines.pop();
    for (const line of lines) yield JSON.parse(line.slice("data: ".length));
  }
}

// How texts are sampled: a row of controls, and their values.
function sampling(info) {
  const controls = {
    temperature: number(info.temperature, 0, 100, "any"),
    top_k: number(0, 0, 1e6, 1),
    top_p: number(1, 0.01, 1, "any"),
    max_tokens: number(info.response_length, 1, info.context, 1),
    seed: number(0, 0, 2 ** 32 - 1, 1),
  };
  const labels = { top_k: "top-k", top_p: "top-p", max_tokens: "tokens, at most" };
  const hints = { temperature: "0: likeliest", top_k: "0: all", top_p: "1: all" };
  const next = element("button", { type: "button", class: "pg-quiet" }, "next seed");
  const another = () => { controls.seed.value = String((Number(controls.seed.value) + 1) % 2 ** 32); };
  next.addEventListener("click", another);
  const fields = Object.entries(controls).map(([name, control]) => field(labels[name] ?? name, control, hints[name]));
  const row = element("fieldset", { class: "pg-settings" }, element("legend", {}, "Sampling"), ...fields, next);
  const values = () =>
    Object.fromEntries(Object.entries(controls).map(([name, control]) => [name, Number(control.value)]));
  return { row, values, another };
}

// A list of the run's prompts; `use` gets the one that is selected.
function examples(prompts, use) {
  if (!prompts.length) return null;
  const options = prompts.map((prompt, i) =>
    element("option", { value: String(i) }, visible((parts(prompt)?.post ?? prompt).slice(0, 60).replaceAll("\n", " "), "")));
  const list = element("select", {}, element("option", { value: "" }, "choose ..."), ...options);
  list.addEventListener("change", () => { if (list.value) use(prompts[Number(list.value)]); });
  return field("a prompt the run was compared on", list);
}

// Two columns of tokens, which fill while both policies write.
class Comparison {
  constructor(info, fork) {
    this.info = info;
    this.fork = fork;
    this.note = element("p", { class: "pg-note" });
    this.columns = element("div", { class: "pg-columns" });
    this.detail = element("div", { class: "pg-detail", role: "region", "aria-label": "the token that was clicked" });
    this.root = element("div", {}, this.note, this.columns, this.detail);
  }

  clear() {
    this.tokens = this.info.sides.map(() => []);
    this.sums = this.info.sides.map(() => 0);
    this.note.textContent = "";
    this.detail.replaceChildren();
    this.sides = this.info.sides.map((side) => {
      const strip = element("div", { class: "pg-strip", role: "group", "aria-label": `tokens, ${side.name}` });
      strip.addEventListener("keydown", (event) => this.move(event, strip));
      const numbers = element("dl", { class: "pg-numbers" });
      const text = element("p", { class: "pg-text" });
      const title = element("h3", {}, `${side.name} `, element("small", {}, side.stage));
      return { root: element("div", { class: "pg-side" }, title, strip, numbers, text), strip, numbers, text };
    });
    this.columns.replaceChildren(...this.sides.map((side) => side.root));
  }

  move(event, strip) {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const buttons = [...strip.children];
    const to = buttons[buttons.indexOf(document.activeElement) + step];
    if (!step || !to) return;
    event.preventDefault();
    this.focus(strip, to);
  }

  focus(strip, button) {
    for (const other of strip.children) other.tabIndex = other === button ? 0 : -1;
    button.focus();
    button.click();
  }

  start(event) {
    this.max = event.max_tokens;
    const cut = event.note ? `${event.note}. ` : "";
    this.note.textContent = `${cut}${event.tokens} ${event.tokens === 1 ? "token" : "tokens"} to read, at most ${event.max_tokens} to write.`;
  }

  token(event) {
    event.rows.forEach((token, b) => {
      if (!token) return;
      this.tokens[b].push(token);
      const two = token.logp.length === 2;
      const ratio = two ? token.logp[1] - token.logp[0] : 0;
      this.sums[b] += ratio;
      token.sum = this.sums[b];
      const place = this.tokens[b].length - 1;
      const label = two ? `${tokenText(token)}, log-ratio ${signed(ratio)}` : tokenText(token);
      const button = element("button", { type: "button", class: "pg-token", "aria-label": label, title: label });
      button.textContent = tokenText(token);
      button.tabIndex = place ? -1 : 0;
      if (token.special) button.classList.add("pg-special");
      if (token.forced) button.classList.add("pg-forced");
      button.style.setProperty("--share", `${Math.round(Math.min(Math.abs(ratio) / 0.8, 1) * 45)}%`);
      if (ratio) button.classList.add(ratio > 0 ? "pg-more" : "pg-less");
      button.addEventListener("click", () => this.show(b, place));
      this.sides[b].strip.append(button);
      this.numbers(b, {});
    });
  }

  // The numbers below a strip: what is known now.
  numbers(b, end) {
    const rows = [["tokens", String(this.tokens[b].length) + (end.ended === false ? ", cut: no EOS" : "")]];
    if (this.info.sides.length === 2) {
      rows.push(["log-ratio so far", `${signed(this.sums[b])} nats`]);
      const exact = this.tokens[b].reduce((sum, token) => sum + token.kl, 0);
      rows.push(["exact KL so far", `${exact.toFixed(3)} nats`]);
    }
    const score = this.info.reward === "sentiment" ? "VADER" : "score";
    if ("score" in end) rows.push([score, signed(end.score)]);
    if ("vader" in end && this.info.reward !== "sentiment") rows.push(["VADER", signed(end.vader)]);
    for (const [name, value] of Object.entries(end.parts ?? {})) rows.push([name, signed(value)]);
    for (const [name, value] of Object.entries(end.rouge ?? {})) rows.push([name.replace("rouge", "ROUGE-"), value.toFixed(3)]);
    if (end.no_score) rows.push(["no score", end.no_score]);
    const cells = rows.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, visible(value, ""))]);
    this.sides[b].numbers.replaceChildren(...cells);
  }

  end(event) {
    event.rows.forEach((row, b) => {
      this.numbers(b, row);
      this.sides[b].text.replaceChildren(...prose(row));
    });
    const tokens = Math.max(...event.rows.map((row) => row.tokens));
    const [first, second] = this.tokens;
    let same = 0;
    if (second) while (same < first.length && same < second.length && first[same].id === second[same].id) same += 1;
    for (const side of second ? this.sides : []) side.strip.children[same]?.classList.add("pg-part");
    const equal = second && same === first.length && same === second.length;
    const apart = !second ? "" : equal ? " The two texts are the same." : ` The two texts part at token ${same + 1}.`;
    const pace = event.seconds > 0 ? `, ${Math.round(tokens / event.seconds)} tokens a second on each side` : "";
    this.note.textContent += ` ${event.seconds.toFixed(2)} s${pace}.${apart}`;
  }

  // What both policies find likely at a place of side b.
  show(b, place) {
    const token = this.tokens[b][place];
    for (const side of this.sides) for (const other of side.strip.children) other.removeAttribute("aria-pressed");
    this.sides[b].strip.children[place].setAttribute("aria-pressed", "true");
    const { sides } = this.info;
    const title = element("h4", {}, `Token ${place + 1} of the ${sides[b].name} text: `, element("code", {}, tokenText(token)));
    const says = sides.map((side, m) => `${side.name} ${probability(token.logp[m])} (log ${minus(token.logp[m])})`);
    let line = `Its probability: ${says.join(", ")}.`;
    if (sides.length === 2) {
      const ratio = token.logp[1] - token.logp[0];
      line += ` Log-ratio ${signed(ratio)}, running sum ${signed(token.sum)} nats; exact KL here ${token.kl.toFixed(3)}.`;
    }
    const tables = sides.map((side, m) => this.table(b, place, side, token.best[m], token.id));
    const hint = element("p", { class: "pg-hint" }, "Choose a token to fork: both policies continue from there.");
    this.detail.replaceChildren(title, element("p", {}, line), element("div", { class: "pg-columns" }, ...tables), hint);
  }

  table(b, place, side, best, chosen) {
    const rows = best.map((candidate, i) => {
      const name = tokenText(candidate);
      const button = element("button", { type: "button", class: "pg-token" }, name);
      button.setAttribute("aria-label", `fork with ${name}`);
      if (candidate.id === chosen) button.classList.add("pg-chosen");
      const before = this.tokens[b].slice(0, place).map((token) => token.id);
      button.addEventListener("click", () => this.fork([...before, candidate.id]));
      const cells = [String(i + 1), button, probability(candidate.logp), minus(candidate.logp)];
      return element("tr", {}, ...cells.map((cell) => element("td", {}, cell)));
    });
    const head = ["rank", "token", "probability", "log-prob"].map((name) => element("th", { scope: "col" }, name));
    const caption = element("caption", {}, `likeliest, ${side.name}`);
    return element("table", {}, caption, element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...rows));
  }
}

// A text, with the words that VADER counts marked by their valence.
function prose(row) {
  if (!row.text) return [element("em", {}, "no text")];
  if (!row.words) return [visible(row.text)];
  return marked(row.text, row.words).map(([piece, word]) => {
    if (!word) return document.createTextNode(visible(piece));
    const about = `in the lexicon ${signed(word.own, 1)}, counted ${signed(word.counted, 2)}`;
    const value = element("sup", {}, signed(word.own, 1));
    const side = (word.own || word.counted) > 0 ? "pg-more" : "pg-less";
    return element("mark", { class: `pg-word ${side}`, title: about }, visible(piece), value);
  });
}

// A form that writes with both policies: `request()` gives what to send but the settings.
function writer(info, state, inputs, request, label) {
  const how = sampling(info);
  const write = element("button", { type: "submit" }, label);
  const stop = element("button", { type: "button", class: "pg-quiet", disabled: true }, "stop");
  const status = element("p", { class: "pg-status", role: "status" });
  let running = null;

  async function run(forced = []) {
    running?.abort();
    const mine = new AbortController();
    running = mine;
    stop.disabled = false;
    status.textContent = "writing ...";
    comparison.clear();
    try {
      const values = { ...request(), settings: how.values() };
      if (forced.length) values.forced = forced;
      for await (const event of events(await post("api/generate", values, mine.signal))) {
        if (event.event === "error") throw new Error(event.message);
        comparison[event.event](event);
      }
      status.textContent = "done";
    } catch (error) {
      if (running === mine) status.textContent = mine.signal.aborted ? "stopped" : visible(error.message);
    } finally {
      if (running === mine) {
        running = null;
        stop.disabled = true;
      }
    }
  }

  const comparison = new Comparison(info, (forced) => run(forced));
  stop.addEventListener("click", () => running?.abort());
  const buttons = element("div", { class: "pg-buttons" }, write, stop, status);
  const form = element("form", {}, ...inputs, how.row, buttons);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    run();
  });
  write.disabled = !state.authorized;
  return element("div", {}, form, comparison.root);
}

// The inputs of a post, and what they are as a request.
function postInputs(state, reference) {
  const subreddit = element("input", { type: "text", value: "advice", maxlength: "100" });
  const title = element("input", { type: "text", maxlength: "1000" });
  const text = element("textarea", { rows: "6", required: true });
  const summary = element("textarea", { rows: "2" });
  const use = (prompt) => {
    const found = parts(prompt);
    if (!found) return;
    [subreddit.value, title.value, text.value] = [found.subreddit, found.title, found.post];
  };
  const inputs = [
    examples(state.prompts.filter(parts), use),
    element("div", { class: "pg-pair" }, field("subreddit, after r/", subreddit), field("title", title)),
    field("post", text, "A post that is too long is cut as in training."),
    reference ? field("a reference summary, for ROUGE (optional)", summary) : null,
  ].filter(Boolean);
  const request = () => {
    const values = { subreddit: subreddit.value, title: title.value, post: text.value, recipe: true };
    return reference && summary.value.trim() ? { ...values, reference: summary.value } : values;
  };
  return { inputs, request };
}

function promptInputs(info, state, recipe) {
  const write = info.task === "write";
  const text = element("textarea", { rows: write ? "2" : "7" });
  const hints = recipe
    ? ["A vote needs one: rows of preferences have prompts.", "A prompt that is too long is cut as in training."]
    : ["May be empty. The policies go on from here.", "The policies read it as it is."];
  const hint = hints[write ? 0 : 1];
  text.required = recipe;
  const list = examples(state.prompts, (prompt) => { text.value = prompt; });
  const inputs = [list, field(write ? "beginning" : "prompt", text, hint)].filter(Boolean);
  return { inputs, request: () => ({ prompt: text.value, recipe: recipe && !write }) };
}

function voteTab(info, state) {
  const { inputs, request } = info.task === "summarize" ? postInputs(state, false) : promptInputs(info, state, true);
  const how = sampling(info);
  const status = element("p", { class: "pg-status", role: "status" });
  const shown = element("div", { class: "pg-columns" });
  const total = element("p", { class: "pg-note" }, `${info.votes} votes so far.`);
  const write = element("button", { type: "submit", disabled: !state.authorized }, "Write two");
  const choices = element("div", { class: "pg-buttons" });

  function reveal(result, texts) {
    const columns = result.rows.map((row, i) => {
      const title = element("h3", {}, `${LETTERS[i]}: `, nameOf(info, row.stage));
      const score = "score" in row ? element("p", { class: "pg-note" }, `score ${signed(row.score)}`) : null;
      return element("div", { class: "pg-side" }, title, element("p", { class: "pg-text" }, visible(texts[i]) || "no text"), score);
    });
    shown.replaceChildren(...columns);
    choices.replaceChildren();
    const saved = result.saved ? `Saved in ${result.saved}, which --config.data.preferences= reads.` : "Nothing was saved.";
    status.textContent = `${visible(saved)} The next two are written with another seed.`;
    how.another();
    total.textContent = `${result.votes} votes so far.`;
  }

  async function choose(pair, choice) {
    try {
      reveal(await (await post("api/vote", { id: pair.id, choice })).json(), pair.texts);
    } catch (error) {
      status.textContent = visible(error.message);
    }
  }

  async function run() {
    status.textContent = "writing ...";
    shown.replaceChildren();
    choices.replaceChildren();
    write.disabled = true;
    try {
      const pair = await (await post("api/duel", { ...request(), settings: how.values() })).json();
      shown.replaceChildren(...pair.texts.map((text, i) =>
        element("div", { class: "pg-side" }, element("h3", {}, LETTERS[i]), element("p", { class: "pg-text" }, visible(text) || "no text"))));
      const same = pair.texts[0] === pair.texts[1];
      const answers = [["A is better", 0], ["B is better", 1], ["neither: only show me", -1]].slice(same ? 2 : 0);
      choices.replaceChildren(...answers.map(([label, choice]) =>
        element("button", { type: "button", on: { click: () => choose(pair, choice) } }, same ? "show me, and go on" : label)));
      status.textContent = visible(`${same ? "The two texts are the same, so there is nothing to choose." : "Which is better?"} ${pair.note}`);
    } catch (error) {
      status.textContent = visible(error.message);
    } finally {
      write.disabled = false;
    }
  }

  const form = element("form", {}, ...inputs, how.row, element("div", { class: "pg-buttons" }, write));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    run();
  });
  return element("div", {}, total, form, shown, choices, status);
}

const nameOf = (info, stage) => info.sides.find((side) => side.stage === stage)?.name ?? stage;

// Buttons that show one of the panels each.
function tabs(panels) {
  const list = element("div", { class: "pg-tabs", role: "tablist", "aria-label": "playground" });
  const buttons = panels.map(([name, panel], i) => {
    const tab = element("button", { type: "button", role: "tab", id: `pg-tab-${i}`, "aria-controls": `pg-panel-${i}` }, name);
    Object.entries({ role: "tabpanel", id: `pg-panel-${i}`, "aria-labelledby": tab.id }).forEach((pair) => panel.setAttribute(...pair));
    tab.addEventListener("click", () => select(i));
    return tab;
  });
  function select(i, focus = false) {
    buttons.forEach((tab, j) => {
      tab.setAttribute("aria-selected", String(i === j));
      tab.tabIndex = i === j ? 0 : -1;
      panels[j][1].hidden = i !== j;
    });
    if (focus) buttons[i].focus();
  }
  list.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step) select((buttons.indexOf(document.activeElement) + step + buttons.length) % buttons.length, true);
  });
  list.append(...buttons);
  select(0);
  return [list, ...panels.map(([, panel]) => panel)];
}

async function start(section) {
  let state;
  try {
    const response = await fetch("api/info");
    if (!response.ok) return;
    state = await response.json();
  } catch {
    return; // a static host
  }
  const info = state.run;
  if (!info) return;
  if (!document.querySelector('link[href="playground.css"]')) {
    document.head.append(element("link", { rel: "stylesheet", href: "playground.css" }));
  }
  section.hidden = false;
  const title = element("h2", {}, "Playground ", element("small", {}, "generate.stream"));
  if (info.missing) {
    section.replaceChildren(title, element("p", {}, visible(info.missing)));
    return;
  }
  state.prompts = (await (await fetch("api/examples")).json()).prompts;
  const names = info.sides.map((side) => `${side.name} (${side.stage})`);
  const intro = names.length === 2
    ? `Two policies of this run, ${names[0]} and ${names[1]}, write with the same Gumbel noise: they part only where they disagree. `
      + "Blue: the second finds the token more likely than the first; orange: less."
    : `The policy of this run: ${names[0]}.`;
  const valence = info.reward === "sentiment" || info.task === "write"
    ? " Underlined words are those that VADER counts, each with its valence in the lexicon." : "";
  const locked = state.authorized ? null
    : element("p", { class: "pg-locked" }, "To write, open the URL that the command has printed: it has the token of this launch.");
  const prompts = promptInputs(info, state, false);
  const panels = [["Playground", writer(info, state, prompts.inputs, prompts.request, "Write")]];
  if (info.task === "summarize") {
    const summary = postInputs(state, true);
    panels.unshift(["Summarize", writer(info, state, summary.inputs, summary.request, "Summarize")]);
  }
  if (info.task === "write") panels[0][0] = "Stories";
  if (names.length === 2) panels.push(["Vote", voteTab(info, state)]);
  section.replaceChildren(...[title, element("p", {}, intro + valence), locked, ...tabs(panels)].filter(Boolean));
}

const section = globalThis.document?.getElementById("playground");
if (section) start(section);
