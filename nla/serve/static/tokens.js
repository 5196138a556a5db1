// The token view: a text or chat with its tokens marked by trust, for pointer and keyboard.

import { figure, h, put, spelledOut } from "./dom.js";
import { claimsOf } from "./reading.js";

const CONTENT = ["content", "reasoning", "calls"];

const spaces = (text) => text.replaceAll(" ", "␣").replaceAll("\t", "⇥");
const oneLine = (text) => spelledOut(text).replaceAll("\n", "⏎");

/** What stands for a token, and the line breaks after it. */
function shown(token) {
  const inner = token.replace(/\n+$/, "");
  const body = /[^ \t]/.test(inner) ? inner : spaces(inner);
  const breaks = token.length - inner.length;
  return [body.replaceAll("\n", "⏎\n") + "⏎".repeat(breaks), "\n".repeat(breaks)];
}

/** A token in one line. */
export function nameOf(token) {
  const text = token.token.replace(/^ +| +$/g, "") || spaces(token.token) || "∅";
  return oneLine(text) + (token.fragment_count > 1 ? ` ${token.fragment_index + 1}/${token.fragment_count}` : "");
}

export function tipOf(result) {
  const [first] = claimsOf(result);
  return `${oneLine(first ? first.text : "nothing")} (${result.trust.level} trust)`;
}

export class TokenView {
  /** `picked` hears of the token that is chosen; `decorate` may mark an element further. */
  constructor(root, reading, { picked, decorate = () => {}, label = "Tokens" }) {
    Object.assign(this, { root, reading, picked, decorate, label });
    this.elements = [];
    this.chosen = null;
    this.draw();
  }

  draw() {
    const { tokens, letters } = this.reading;
    const groups = [];
    let last = 0;
    this.elements = [];
    tokens.forEach((token, index) => {
      let group = groups.at(-1);
      if (!group || group.message !== token.message_index) {
        group = { message: token.message_index, role: token.role, parts: [] };
        groups.push(group);
      }
      const from = Math.max(token.start, last);
      const text = letters.slice(from, Math.max(token.end, last)).join("");
      const lead = /[^ ]/.test(text) ? text.match(/^ */)[0] : "";
      const [body, after] = shown(text.slice(lead.length));
      const again = token.fragment_count > 1 ? `${token.fragment_index + 1}/${token.fragment_count}`
        : token.end > token.start ? "″" : "∅";
      const element = h("span", { class: "token", role: "button", tabindex: "-1", "data-position": index }, body || again);
      this.elements.push(element);
      group.parts.push(letters.slice(last, from).join("") + lead, element, after);
      last = Math.max(token.end, last);
    });
    groups.at(-1)?.parts.push(letters.slice(last).join(""));
    const bubbles = groups.map(({ role, parts }) => role
      ? h("div", { class: `bubble ${["user", "assistant", "system", "tool"].includes(role) ? role : ""}`, role: "group", "aria-label": role },
        h("div", { class: "role" }, role), h("p", { class: "passage" }, parts))
      : h("p", { class: "passage" }, parts));
    const list = h("div", { role: "group", "aria-label": `${this.label}; arrow keys go from token to token` }, bubbles);
    list.addEventListener("click", (event) => this.#clicked(event));
    list.addEventListener("keydown", (event) => this.#pressed(event));
    put(this.root, list);
    this.elements.forEach((_, index) => this.refresh(index));
    this.#focusable(0);
  }

  /** Shows what is known of a token now. */
  refresh(position) {
    const element = this.elements[position];
    const token = this.reading.tokens[position];
    if (!element) return;
    const result = this.reading.results.get(position);
    const writing = this.reading.writing.get(position);
    const template = token.section && !CONTENT.includes(token.section) ? " template" : "";
    element.className = `token ${result ? result.trust.level : "unjudged"}${template}${writing ? " writing" : ""}`;
    const tip = result ? tipOf(result) : writing ? `${oneLine(writing)} …` : "not explained yet";
    element.dataset.tip = tip;
    element.setAttribute("aria-label", `${nameOf(token)}: ${tip}`);
    element.setAttribute("aria-pressed", String(position === this.chosen));
    this.decorate(position, element);
  }

  refreshAll() {
    this.elements.forEach((_, position) => this.refresh(position));
  }

  /** Marks the chosen token; null: none. */
  choose(position) {
    const before = this.chosen;
    this.chosen = position;
    for (const one of [before, position]) if (one !== null) this.refresh(one);
    if (position !== null) this.#focusable(position);
  }

  #focusable(position) {
    this.elements.forEach((element, index) => { element.tabIndex = index === position ? 0 : -1; });
  }

  #clicked(event) {
    const element = event.target.closest?.(".token");
    if (element) this.picked(Number(element.dataset.position));
  }

  #pressed(event) {
    const here = event.target.closest?.(".token");
    if (!here) return;
    const position = Number(here.dataset.position);
    const to = { ArrowRight: position + 1, ArrowDown: position + 1, ArrowLeft: position - 1, ArrowUp: position - 1,
      Home: 0, End: this.elements.length - 1 }[event.key];
    if (event.key === "Enter" || event.key === " ") this.picked(position);
    else if (to === undefined) return;
    else if (this.elements[to]) {
      this.#focusable(to);
      this.elements[to].focus();
    }
    event.preventDefault();
  }
}

/** What is known of a token: claims with the samples that make them, and each sample. */
export function card(reading, position) {
  const token = reading.tokens[position];
  const result = reading.results.get(position);
  if (!result) {
    const writing = reading.writing.get(position);
    return h("div", { class: "card unjudged" }, h("div", { class: "head" }, h("code", {}, nameOf(token)),
      h("span", { class: "figures" }, ` token ${position}`)), h("p", {}, writing ? `${writing} …` : "Not explained yet."));
  }
  const { trust, samples } = result;
  const n = samples.length;
  const claims = claimsOf(result);
  return h("div", { class: `card ${trust.level}` },
    h("div", { class: "head" }, h("code", {}, nameOf(token)), " ", h("span", { class: `token ${trust.level}` }, trust.level),
      h("span", { class: "figures" }, ` token ${position}, cosine ${figure(trust.cosine)}, agreement ${figure(trust.agreement)}, margin ${figure(trust.margin, true)}`)),
    h("ul", { class: "claims" }, claims.length ? claims.map((claim) => h("li", { class: claim.n === n ? "agreed" : null }, claim.text,
      n > 1 && h("span", { class: "figures" }, ` ${claim.n} of ${n}`))) : h("li", {}, h("i", {}, "nothing"))),
    h("details", { open: n <= 4 }, h("summary", {}, `${n} sample${n === 1 ? "" : "s"}`), h("ol", {}, samples.map((sample) =>
      h("li", {}, sample.text || h("i", {}, "nothing"), !sample.complete && h("i", {}, " not a whole explanation"),
        h("span", { class: "figures" }, ` cosine ${figure(sample.cosine)}`))))));
}
