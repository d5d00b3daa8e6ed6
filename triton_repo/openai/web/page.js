"use strict";

const MEANINGS = {
  trusted: "Drafted and trusted: the target never judged it.",
  accepted: "Drafted and judged: the target chose it too.",
  typical: "Drafted and judged: not the target’s choice, but typical of it.",
  corrected: "The target’s choice in place of what was drafted.",
  target: "The target’s choice where nothing was drafted.",
};
const NAMES = { trusted: "trusted", accepted: "kept", typical: "typical", corrected: "corrected", target: "target’s own" };
const MOST_BRANCHES = 6;
// Beside its tiers every bundle has these, for comparison.
const METHODS = ["autoregressive", "speculative"];
const TITLES = { autoregressive: "plain decoding" };

const $ = (id) => document.getElementById(id);
let key = "";
let models = new Map();
let running = null;
// What was asked, and each lane's answers.
let turns = [];

function element(tag, className = "", text = "") {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text) made.textContent = text;
  return made;
}

function percent(share, digits = 0) {
  return `${(100 * share).toFixed(digits)}\u00a0%`; // never on two lines
}

// --- the server ------------------------------------------------------------------------------------------------------

class Refusal extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function ask(path, options = {}) {
  const headers = { ...(options.body && { "Content-Type": "application/json" }), ...(key && { Authorization: `Bearer ${key}` }) };
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  const said = await response.json().catch(() => null);
  throw new Refusal(response.status, said?.error?.message ?? `the server answered with status ${response.status}`);
}

/** The events of a stream, as objects. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (held + value).split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.slice("data: ".length);
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function loadModels() {
  for (const line of document.querySelectorAll("main > .failed")) line.remove();
  try {
    const listed = (await (await ask("v1/models")).json()).data;
    const name = listed[0].id;
    const others = METHODS.map(async (method) => (await ask(`v1/models/${encodeURIComponent(`${name}:${method}`)}`)).json());
    const more = (await Promise.allSettled(others)).filter((each) => each.status === "fulfilled").map((each) => each.value);
    models = new Map([...listed.slice(1), ...more].map((entry) => [entry.ssv.tier, entry]));
    $("model").textContent = name;
    $("key-form").hidden = true;
    showTiers();
    $("settings").hidden = false;
  } catch (error) {
    if (error.status === 401) {
      $("key-form").hidden = false;
      if (key) $("key-note").textContent = "The server does not know this key.";
      $("key").focus();
    } else {
      $("conversation").append(element("p", "failed", `The models cannot be read: ${error.message}`));
    }
  }
}

/** What is promised of a tier's text. */
function promise(lossless, bound) {
  if (lossless) return "lossless: plain decoding’s text";
  return bound === null || bound === undefined ? "no bound on divergence" : `divergence at most ${percent(bound, 1)}`;
}

// --- settings --------------------------------------------------------------------------------------------------------

function showTiers() {
  const [fieldset, beside] = [$("tiers"), $("beside")];
  for (const label of fieldset.querySelectorAll("label")) label.remove();
  beside.length = 1;
  for (const [tier, entry] of models) {
    const title = TITLES[tier] ?? tier;
    const label = element("label", "", title);
    const radio = element("input");
    Object.assign(radio, { type: "radio", name: "tier", value: tier, checked: fieldset.children.length === 1 });
    label.title = promise(entry.ssv.lossless, entry.ssv.divergence_bound);
    label.append(radio);
    fieldset.append(label);
    beside.append(new Option(title, tier));
  }
}

function asked(tier, messages) {
  const body = { model: models.get(tier).id, messages, stream: true, ssv_fates: true };
  const numbers = { max_tokens: "max-tokens", temperature: "temperature", seed: "seed" };
  for (const [name, id] of Object.entries(numbers)) {
    if ($(id).value !== "") body[name] = Number($(id).value);
  }
  return JSON.stringify(body);
}

// --- an answer -------------------------------------------------------------------------------------------------------

class Answer {
  constructor(tier, place) {
    Object.assign(this, { tier, text: "", tokens: [], counts: {}, firstAt: null, lastAt: null, early: 0, passes: 0 });
    this.decoder = new TextDecoder();
    this.card = element("article", "answer");
    const heading = element("h2", "", TITLES[tier] ?? tier);
    const { lossless, divergence_bound: bound } = models.get(tier).ssv;
    this.promise = element("span", "", promise(lossless, bound));
    heading.append(this.promise);
    this.output = element("div", "text");
    this.output.tabIndex = 0;
    this.output.setAttribute("role", "group");
    this.output.setAttribute("aria-label", `Answer of ${TITLES[tier] ?? tier}; arrow keys go from token to token`);
    this.waits = element("span", "waits", "waits for the other answer");
    this.output.append(this.waits);
    this.figures = element("dl", "figures");
    this.shares = element("div", "shares");
    this.shares.setAttribute("aria-hidden", "true");
    this.counted = element("ul", "counts");
    this.card.append(heading, this.output, this.figures, this.shares, this.counted);
    place.append(this.card);
    this.output.answer = this;
  }

  async run(messages, signal) {
    this.waits.remove();
    this.output.setAttribute("aria-busy", "true");
    this.askedAt = performance.now();
    try {
      const response = await ask("v1/chat/completions", { method: "POST", body: asked(this.tier, messages), signal });
      for await (const event of events(response)) {
        if (event.error) throw new Refusal(0, event.error.message);
        const choice = event.choices[0];
        this.text += choice.delta.content ?? "";
        this.take(choice.ssv_fates ?? []);
        if (event.ssv) this.close(event.ssv);
      }
    } catch (error) {
      const said = error.name === "AbortError" ? "Stopped." : `No answer: ${error.message}`;
      const line = element("p", "failed", said);
      line.setAttribute("role", "alert");
      this.card.append(line);
      if (error.status === 401) $("key-form").hidden = false;
      return false;
    } finally {
      this.output.removeAttribute("aria-busy");
    }
    return true;
  }

  take(fates) {
    if (!fates.length) return;
    const now = performance.now();
    if (this.firstAt === null) [this.firstAt, this.early] = [now, fates.length];
    this.lastAt = now;
    const last = this.tokens.at(-1)?.span.getBoundingClientRect();
    const isSeen = !last || (last.top < window.innerHeight && last.bottom > 0);
    const added = document.createDocumentFragment();
    for (const fate of fates) {
      const span = element("span", `token ${fate.fate}`);
      if (fate.bytes === null) {
        span.textContent = ` ${fate.token}`;
        span.classList.add("special");
      } else {
        span.textContent = this.decoder.decode(new Uint8Array(fate.bytes), { stream: true });
        if (span.textContent === "") span.classList.add("part");
        if (span.textContent.startsWith("\n")) span.classList.add("line");
      }
      span.dataset.index = this.tokens.length;
      this.tokens.push({ fate, span });
      this.counts[fate.fate] = (this.counts[fate.fate] ?? 0) + 1;
      this.passes = fate.pass;
      added.append(span);
    }
    this.output.append(added);
    this.show();
    if (isSeen) this.tokens.at(-1).span.scrollIntoView({ block: "nearest" });
  }

  /** Takes what the server discloses at the end: it has counted the passes. */
  close(disclosed) {
    this.passes = disclosed.target_passes;
    const withdrawn = disclosed.withdrawn_tier ? `${disclosed.withdrawn_tier} is withdrawn, decoded by ${disclosed.tier}; ` : "";
    this.promise.textContent = withdrawn + promise(disclosed.lossless, disclosed.divergence_bound);
    this.show();
  }

  get speed() {
    const seconds = (this.lastAt - this.firstAt) / 1000;
    return seconds > 0 ? (this.tokens.length - this.early) / seconds : null;
  }

  show() {
    const total = this.tokens.length;
    // The prompt's own pass gives the first token.
    const saved = Math.max(total - 1 - this.passes, 0);
    const figures = [
      ["tokens/s", this.speed === null ? "–" : this.speed.toFixed(0)],
      ["first token", this.firstAt === null ? "–" : `${(this.firstAt - this.askedAt).toFixed(0)} ms`],
      ["tokens", total],
      ["passes of the target", this.passes],
      ["passes saved", total > 1 ? `${saved} (${percent(saved / (total - 1))})` : "0"],
    ];
    this.figures.replaceChildren(...figures.map(([name, value]) => {
      const pair = element("div");
      pair.append(element("dt", "", name), element("dd", "", String(value)));
      return pair;
    }));
    const present = Object.keys(MEANINGS).filter((fate) => this.counts[fate]);
    if (present.includes("typical")) $("legend").classList.add("typical");
    this.counted.replaceChildren(...present.map((fate) => {
      const item = element("li");
      item.append(element("span", `token ${fate}`, NAMES[fate]), ` ${this.counts[fate]} (${percent(this.counts[fate] / total)})`);
      return item;
    }));
    this.shares.replaceChildren(...present.map((fate) => {
      const share = element("span", fate);
      share.style.width = `${(100 * this.counts[fate]) / total}%`;
      return share;
    }));
  }

  summary() {
    const speed = this.speed === null ? "" : `, ${this.speed.toFixed(0)} tokens a second`;
    return `${TITLES[this.tier] ?? this.tier}: ${this.tokens.length} tokens in ${this.passes} passes${speed}.`;
  }
}

/** Where the tokens of two answers part; null where they are the same. */
function parting(first, second) {
  const length = Math.max(first.tokens.length, second.tokens.length);
  for (let i = 0; i < length; i++) {
    if (first.tokens[i]?.fate.token !== second.tokens[i]?.fate.token) return i;
  }
  return null;
}

// --- the conversation ------------------------------------------------------------------------------------------------

function history(lane, message) {
  const before = turns.flatMap((turn) => {
    const said = turn.answers[lane]?.text || turn.answers[0].text;
    return [{ role: "user", content: turn.message }, { role: "assistant", content: said }];
  });
  return [...before, { role: "user", content: message }];
}

async function send(message) {
  const tiers = [document.querySelector("input[name=tier]:checked").value, $("beside").value].filter(Boolean);
  const asking = element("p", "asked", message);
  const answers = element("div", "answers");
  $("conversation").append(asking, answers);
  $("legend").open = false;
  const made = tiers.map((tier) => new Answer(tier, answers));
  asking.scrollIntoView({ block: "start" });
  running = new AbortController();
  showRunning(true);
  let complete = true;
  // One after the other, so that neither takes the other's time.
  for (const [lane, answer] of made.entries()) {
    if (complete) complete = await answer.run(history(lane, message), running.signal);
    else answer.card.remove();
  }
  if (made.length === 2 && complete) {
    const at = parting(...made);
    const same = at === null ? "Both texts are the same, token for token." : `The texts differ from token ${at + 1} on.`;
    $("conversation").append(element("p", "same", same));
  }
  if (made[0].text) turns.push({ message, answers: made });
  $("said").textContent = made.filter((answer) => answer.tokens.length).map((answer) => answer.summary()).join(" ");
  showRunning(false);
}

function showRunning(is) {
  if (!is) running = null;
  $("send").hidden = is;
  $("stop").hidden = !is;
  $("anew").disabled = is;
}

// --- what stands behind a token --------------------------------------------------------------------------------------

let current = null;

function branch(tokens) {
  const item = element("li");
  item.append(...tokens.map((token) => element("code", "", token.replaceAll("\n", "↵") || "▫")));
  return item;
}

function showTip(span) {
  const answer = span.closest(".text")?.answer;
  if (!answer || span === current) return;
  hideTip();
  const { fate } = answer.tokens[Number(span.dataset.index)];
  const tip = $("tip");
  const where = fate.pass === 0 ? "With the prompt." : `Pass ${fate.pass} of the target.`;
  const risk = fate.risk === null ? "" : ` The draft gave it a risk of ${percent(fate.risk, 1)}.`;
  tip.replaceChildren(element("p", "", MEANINGS[fate.fate]), element("p", "note", where + risk));
  if (fate.dropped.length) {
    const list = element("ul");
    list.append(...fate.dropped.slice(0, MOST_BRANCHES).map(branch));
    if (fate.dropped.length > MOST_BRANCHES) list.append(element("li", "", `${fate.dropped.length - MOST_BRANCHES} more`));
    tip.append(element("p", "", "Drafted in vain in its place:"), list);
  }
  tip.hidden = false;
  const box = span.getClientRects()[0] ?? span.getBoundingClientRect();
  const left = Math.min(Math.max(box.left, 8), document.documentElement.clientWidth - tip.offsetWidth - 8);
  const fits = box.top > tip.offsetHeight + 12;
  tip.style.left = `${left + window.scrollX}px`;
  tip.style.top = `${(fits ? box.top - tip.offsetHeight - 6 : box.bottom + 6) + window.scrollY}px`;
  span.classList.add("current");
  current = span;
}

function hideTip() {
  current?.classList.remove("current");
  current = null;
  $("tip").hidden = true;
}

function go(answer, key) {
  const last = answer.tokens.length - 1;
  const at = current !== null && answer.output.contains(current) ? Number(current.dataset.index) : -1;
  const next = { ArrowRight: Math.min(at + 1, last), ArrowLeft: Math.max(at - 1, 0), Home: 0, End: last }[key];
  showTip(answer.tokens[next].span);
  $("said").textContent = `${answer.tokens[next].fate.token} ${$("tip").innerText}`;
}

// --- what happens ----------------------------------------------------------------------------------------------------

$("conversation").addEventListener("pointerover", (event) => {
  const span = event.target.closest(".text .token");
  if (span) showTip(span);
  else hideTip();
});
$("conversation").addEventListener("click", (event) => {
  const span = event.target.closest(".text .token");
  if (span) showTip(span);
});
$("conversation").addEventListener("pointerleave", hideTip);
$("conversation").addEventListener("focusout", hideTip);
document.addEventListener("scroll", hideTip, { passive: true });
document.addEventListener("keydown", (event) => {
  const answer = event.target.answer;
  if (event.key === "Escape") hideTip();
  if (!answer?.tokens.length || !["ArrowRight", "ArrowLeft", "Home", "End"].includes(event.key)) return;
  event.preventDefault();
  go(answer, event.key);
});
$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const message = $("message").value.trim();
  if (!message || running || !models.size) return;
  $("message").value = "";
  send(message);
});
$("message").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("composer").requestSubmit();
});
$("stop").addEventListener("click", () => running?.abort());
$("anew").addEventListener("click", () => {
  turns = [];
  hideTip();
  $("conversation").replaceChildren();
  $("message").focus();
});
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = $("key").value.trim();
  loadModels();
});
$("settings").addEventListener("submit", (event) => event.preventDefault());
loadModels();
