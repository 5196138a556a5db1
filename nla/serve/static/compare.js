// Compare: two texts, pairs or adapters at aligned tokens: what is said of one only.

import { h, labelled, put } from "./dom.js";
import { Reading, claimsOf } from "./reading.js";
import { sampling, source } from "./state.js";
import { TokenView, nameOf } from "./tokens.js";

/** Longest texts that are aligned as a whole: the table has the product of their lengths. */
const MOST = 2048;

/** Pairs of indexes of two lists: a longest common subsequence, and between its members those that stand alone on both sides. */
export function aligned(a, b) {
  const n = Math.min(a.length, MOST);
  const m = Math.min(b.length, MOST);
  const width = m + 1;
  const best = new Uint16Array((n + 1) * width);
  for (let i = n - 1; i >= 0; i -= 1) {
    for (let j = m - 1; j >= 0; j -= 1) {
      best[i * width + j] = a[i] === b[j] ? best[(i + 1) * width + j + 1] + 1
        : Math.max(best[(i + 1) * width + j], best[i * width + j + 1]);
    }
  }
  const pairs = [];
  let [i, j, fromA, fromB] = [0, 0, 0, 0];
  const replaced = () => {
    if (i - fromA === j - fromB) for (let k = 0; k < i - fromA; k += 1) pairs.push([fromA + k, fromB + k]);
  };
  while (i < n && j < m) {
    if (a[i] === b[j]) {
      replaced();
      pairs.push([i, j]);
      i += 1; j += 1; fromA = i; fromB = j;
    } else if (best[(i + 1) * width + j] >= best[i * width + j + 1]) i += 1;
    else j += 1;
  }
  [i, j] = [n, m];
  replaced();
  return pairs;
}

export function open(app, root) {
  const { state } = app;
  const second = h("div", { class: "text" });
  const panel = h("div");
  let reading = null;
  let tokens = null;
  let toB = new Map();
  let toA = new Map();
  let chosenB = null;

  const text = h("textarea", { id: "text_b", rows: 4, value: state.text_b, placeholder: state.kind === "text" ? "the same text" : "the same chat" });
  const options = (known, now, none) => [none !== null && h("option", { value: "", selected: now === "" }, none),
    known.map((name) => h("option", { value: name, selected: now === name }, name))];
  const pair = h("select", {}, options(app.pairs.map((one) => one.name), state.pair_b, "the same pair"));
  const adapter = h("select", {}, options(app.pairNow().target_adapters, state.adapter_b, "no adapter"));
  const go = h("button", { type: "button", class: "main", click: () => {
    app.set({ text_b: text.value, pair_b: pair.value, adapter_b: adapter.value, compared: true });
    begin();
  } }, "Compare");
  put(root, h("h2", {}, "Compare with"), labelled("Second text", text),
    h("div", { class: "row" }, app.pairs.length > 1 && labelled("Pair", pair), app.pairNow().target_adapters.length > 0 && labelled("Adapter", adapter), go),
    second, panel);

  async function begin() {
    reading?.stop();
    const mine = new Reading(source(state, "b"), sampling(state));
    reading = mine;
    await app.tried(async () => {
      await mine.tokenize();
      if (reading !== mine) return;
      const pairs = aligned(app.reading.tokens.map((token) => token.token_id), mine.tokens.map((token) => token.token_id));
      toB = new Map(pairs);
      toA = new Map(pairs.map(([a, b]) => [b, a]));
      tokens = new TokenView(second, mine, { picked: (position) => { chosenB = position; app.pick(toA.get(position) ?? null); }, label: "Tokens of the second text",
        decorate: (position, element) => element.classList.toggle("apart", differs(toA.get(position), position)) });
      app.tokens.refreshAll();
      update();
      const near = toB.get(state.token) ?? mine.tokens.length - 1;
      await mine.explain(mine.tokens.map((_, index) => index), near, (position, done) => {
        tokens.refresh(position);
        if (!done) return;
        if (toA.has(position)) app.tokens.refresh(toA.get(position));
        app.progress(mine.results.size, mine.wanted, "of the second text");
        update();
      });
      app.progress(0, 0);
      app.say("The second text is explained.");
    });
  }

  /** Claims of two aligned tokens: of the first only, of both, of the second only. */
  function sides(a, b) {
    const [left, right] = [app.reading.results.get(a), reading?.results.get(b)];
    if (!left || !right) return null;
    const [ofA, ofB] = [claimsOf(left), claimsOf(right)];
    const [keysA, keysB] = [ofA, ofB].map((claims) => new Set(claims.map((claim) => claim.key)));
    return {
      onlyA: ofA.filter((claim) => !keysB.has(claim.key)), both: ofA.filter((claim) => keysB.has(claim.key)),
      onlyB: ofB.filter((claim) => !keysA.has(claim.key)), nA: left.samples.length, nB: right.samples.length,
    };
  }

  /** Whether what most samples say of one is said of the other by none. */
  function differs(a, b) {
    if (a === undefined || b === undefined) return true;
    const found = sides(a, b);
    return found !== null && (found.onlyA.some((claim) => claim.n * 2 > found.nA) || found.onlyB.some((claim) => claim.n * 2 > found.nB));
  }

  function update() {
    if (!tokens) return;
    const b = state.token === null ? chosenB : toB.get(state.token) ?? null;
    tokens.choose(b);
    const list = (title, claims, n) => h("section", { class: "arm" }, h("h3", {}, title),
      claims.length ? h("ul", { class: "claims" }, claims.map((claim) => h("li", {}, claim.text, h("span", { class: "figures" }, ` ${claim.n} of ${n}`)))) : h("p", { class: "hint" }, "nothing"));
    if (state.token === null && b === null) {
      put(panel, h("p", { class: "hint" }, "Choose a token in one of the texts. Outlined tokens differ: most samples claim of one what none claims of the other."));
    } else if (state.token === null || b === null) {
      put(panel, h("p", { class: "hint" }, "This token has no counterpart in the other text."));
    } else {
      const found = sides(state.token, b);
      put(panel, h("h2", {}, h("code", {}, nameOf(app.reading.tokens[state.token])), " and ", h("code", {}, nameOf(reading.tokens[b]))),
        found ? h("div", { class: "columns" }, list("Of the first only", found.onlyA, found.nA), list("Of both", found.both, found.nA), list("Of the second only", found.onlyB, found.nB))
          : h("p", { class: "hint" }, "Not both are explained yet."));
    }
  }

  queueMicrotask(() => { if (state.compared) begin(); });
  return {
    update() { tokens?.refreshAll(); update(); },
    picked: update,
    decorate: (position, element) => element.classList.toggle("apart", tokens !== null && differs(position, toB.get(position))),
    close: () => reading?.stop(),
    stop: () => reading?.stop(),
  };
}
