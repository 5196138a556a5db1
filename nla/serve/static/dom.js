// Elements from plain values. All text goes in as text, never as markup.

const UNUSUAL = /(?!\u200d)[\p{Cc}\p{Cf}\p{Co}\p{Cn}\p{Cs}\p{Zl}\p{Zp}]/gu;

/** A text in which what could hide or turn text around is written in letters; as nla/views/pages.py has it. */
export function spelledOut(text) {
  return String(text).replace(UNUSUAL, (letter) => {
    if (letter === "\n" || letter === "\t") return letter;
    const code = letter.codePointAt(0);
    const digits = code.toString(16);
    if (letter === "\r") return "\\r";
    if (code < 256) return `\\x${digits.padStart(2, "0")}`;
    return code < 65536 ? `\\u${digits.padStart(4, "0")}` : `\\U${digits.padStart(8, "0")}`;
  });
}

/** An element. Functions among the attributes listen, true sets a bare one, false and null leave it out. */
export function h(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(key, value);
    else if (key === "value") element.value = value;
    else if (value === true) element.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(key, spelledOut(value));
  }
  put(element, ...children);
  return element;
}

/** Replaces what is in an element. */
export function put(element, ...children) {
  element.replaceChildren(
    ...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false)
      .map((child) => (child instanceof Node ? child : document.createTextNode(spelledOut(child)))),
  );
}

/** An element of a drawing. */
export function svg(name, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(key, value);
    else element.setAttribute(key, value);
  }
  element.replaceChildren(...children);
  return element;
}

/** A control with its label before it. */
export function labelled(text, control, hint = "") {
  return h("label", { class: "field" }, h("span", {}, text), control, hint && h("small", {}, hint));
}

export function figure(value, sign = false) {
  if (value === null || value === undefined) return "–";
  return `${sign && value >= 0 ? "+" : value < 0 ? "−" : ""}${Math.abs(value).toFixed(2)}`;
}

/** A function that runs `work` once, `wait_ms` after the last of several calls. */
export function settled(work, wait_ms) {
  let timer = 0;
  return (...values) => {
    clearTimeout(timer);
    timer = setTimeout(() => work(...values), wait_ms);
  };
}

/** Runs `work` at most once in `wait_ms`, the last call always. */
export function paced(work, wait_ms) {
  let timer = 0;
  return () => {
    if (!timer) timer = setTimeout(() => { timer = 0; work(); }, wait_ms);
  };
}
