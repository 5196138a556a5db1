// What the page shows, as one object, and as the fragment of its address: a link holds the whole view.

export const VIEWS = ["read", "ask", "edit", "compare"];
export const ROLES = ["user", "assistant", "system", "tool"];

const integer = (least, most) => (text) => {
  const value = /^\d{1,16}$/.test(text) ? Number(text) : NaN;
  return value >= least && value <= most ? value : undefined;
};
const decimal = (least, most) => (text) => {
  const value = text.trim() === "" ? NaN : Number(text);
  return value >= least && value <= most ? value : undefined;
};
const among = (...known) => (text) => (known.includes(text) ? text : undefined);
const any = (text) => text;

function messages(text) {
  try {
    const value = JSON.parse(text);
    if (!Array.isArray(value) || !value.length) return undefined;
    if (!value.every((one) => ROLES.includes(one?.role) && typeof one.content === "string")) return undefined;
    return value.map(({ role, content }) => ({ role, content }));
  } catch {
    return undefined;
  }
}

/** Of each field its first value, and how it is read; undefined: what the link says is not taken. */
const FIELDS = {
  view: ["read", among(...VIEWS)],
  kind: ["text", among("text", "chat")],
  text: ["", any],
  messages: [[{ role: "user", content: "" }], messages],
  pair: ["", any],
  adapter: ["", any],
  samples: [4, integer(1, 16)],
  temperature: [1, decimal(0, 5)],
  seed: [0, integer(0, Number.MAX_SAFE_INTEGER)],
  which: ["all", among("all", "chosen")],
  token: [null, integer(0, 1e6)],
  word: ["", any],
  edit: [null, any],
  strength: [1, decimal(0, 4)],
  length: [24, integer(1, 512)],
  text_b: ["", any],
  pair_b: ["", any],
  adapter_b: ["", any],
  compared: [false, (text) => text === "1"],
  shown: [false, (text) => text === "1"],
  continued: [false, (text) => text === "1"],
};

export function fresh() {
  return Object.fromEntries(Object.entries(FIELDS).map(([name, [first]]) => [name, structuredClone(first)]));
}

export function fromFragment(fragment) {
  const state = fresh();
  for (const [name, text] of new URLSearchParams(fragment.replace(/^#/, ""))) {
    const value = Object.hasOwn(FIELDS, name) ? FIELDS[name][1](text) : undefined;
    if (value !== undefined) state[name] = value;
  }
  return state;
}

export function toFragment(state) {
  const said = new URLSearchParams();
  for (const [name, [first]] of Object.entries(FIELDS)) {
    const value = state[name];
    if (JSON.stringify(value) === JSON.stringify(first)) continue;
    said.set(name, name === "messages" ? JSON.stringify(value) : value === true ? "1" : String(value));
  }
  return `#${said}`;
}

/** What requests say of the text or chat; `side` b is that which it is compared with. */
export function source(state, side = "a") {
  const read = side === "a" || (!state.text_b && state.kind === "chat")
    ? state.kind === "text" ? { text: state.text } : { messages: state.messages }
    : { text: state.text_b || state.text };
  const pair = side === "a" ? state.pair : state.pair_b || state.pair;
  const adapter = side === "a" ? state.adapter : state.adapter_b;
  return { ...read, ...(pair && { pair }), ...(adapter && { target_adapter: adapter }) };
}

export const sampling = ({ samples, temperature, seed }) => ({ samples, temperature, seed });
