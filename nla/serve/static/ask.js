// Ask: which tokens' explanations say a word, how many of their samples do, and whether the text says it too.

import { h, put, settled, svg } from "./dom.js";
import { card, nameOf } from "./tokens.js";

/** The 95 % interval of a share by Wilson: k of n samples. */
export function wilson(k, n) {
  const z = 1.959963984540054;
  const share = k / n;
  const middle = (share + z * z / (2 * n)) / (1 + z * z / n);
  const half = (z / (1 + z * z / n)) * Math.sqrt((share * (1 - share)) / n + (z * z) / (4 * n * n));
  return [Math.max(0, middle - half), Math.min(1, middle + half)];
}

const escaped = (text) => text.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&");

/** What finds any of the words that commas divide, each from its beginning to its end; null: none is given. */
export function wordsIn(text) {
  const words = text.split(",").map((word) => word.trim()).filter(Boolean);
  if (!words.length) return null;
  return new RegExp(`(?<![\\p{L}\\p{N}_])(?:${words.map(escaped).join("|")})(?![\\p{L}\\p{N}_])`, "iu");
}

export function open(app, root) {
  let words = wordsIn(app.state.word);
  let said = false;
  let found = new Map();
  const strip = h("div", { class: "strip" });
  put(app.above, strip);
  const box = h("input", { type: "search", id: "word", value: app.state.word, placeholder: "cat, dog", autocomplete: "off",
    input: settled(() => {
      words = wordsIn(box.value);
      app.set({ word: box.value });
      app.tokens.refreshAll();
      update();
    }, 150) });
  const summary = h("p", { role: "status", class: "hint" });
  const list = h("ol", { class: "matches" });
  const pinned = h("div");
  put(root, h("label", { class: "field" }, h("span", {}, "Explanations that say"), box,
    h("small", {}, "one of these words; commas divide them")), summary, list, pinned);

  /** How many samples of a token say it. */
  const count = (result) => result.samples.filter((sample) => words.test(sample.text)).length;

  function update() {
    const { reading, state } = app;
    const explained = [...reading.results].sort(([a], [b]) => a - b);  // they come nearest first
    found = new Map(words ? explained.map(([position, result]) => [position, count(result)]) : []);
    said = words !== null && words.test(reading.text);
    const hits = [...found].filter(([, k]) => k > 0).sort(([a, k], [b, l]) =>
      l / reading.results.get(b).samples.length - k / reading.results.get(a).samples.length || a - b);
    put(summary, words === null ? "Type a word." : `${hits.length} of ${reading.results.size} explained tokens say it. ${said
      ? "The text says it, too." : hits.length ? "Thought and not said: the text does not say it." : ""}`);
    put(list, hits.slice(0, 100).map(([position, k]) => {
      const result = reading.results.get(position);
      return h("li", {}, h("button", { type: "button", class: "link", click: () => app.pick(position) }, nameOf(result)),
        ` ${k} of ${result.samples.length} samples `, h("span", { class: `token ${result.trust.level}` }, result.trust.level),
        !said && h("span", { class: "unsaid" }, " not said"));
    }));
    drawStrip();
    app.tokens.refreshAll();
    put(pinned, state.token !== null && card(reading, state.token));
  }

  function drawStrip() {
    const { reading, state } = app;
    const n = reading.tokens.length;
    if (!words || !n) return put(strip);
    const height = 48;
    const bars = [];
    for (const [position, k] of found) {
      const total = reading.results.get(position).samples.length;
      const [low, high] = wilson(k, total).map((share) => height * (1 - share));
      const top = height * (1 - k / total);
      bars.push(svg("rect", { class: "bar", x: position + 0.15, y: top, width: 0.7, height: height - top }),
        svg("line", { class: "interval", x1: position + 0.5, x2: position + 0.5, y1: low, y2: high }));
    }
    if (state.token !== null) bars.push(svg("rect", { class: "here", x: state.token, y: height, width: 1, height: 3 }));
    const drawing = svg("svg", { viewBox: `0 0 ${n} ${height + 3}`, preserveAspectRatio: "none", role: "img",
      "aria-label": `Share of samples that say it, token by token, with 95 % intervals; ${[...found.values()].filter((k) => k > 0).length} tokens say it`,
      click: (event) => {
        const { left, width } = drawing.getBoundingClientRect();
        app.pick(Math.min(n - 1, Math.max(0, Math.floor(((event.clientX - left) / width) * n))));
      } }, ...bars);
    drawing.style.maxWidth = `${n * 28}px`;
    put(strip, h("div", { class: "legend" }, "Share of samples that say it, by token, with 95 % intervals"), drawing);
  }

  update();
  return {
    update,
    picked: update,
    decorate(position, element) {
      const k = found.get(position);
      element.classList.toggle("match", k > 0);
      element.classList.toggle("faded", words !== null && !(k > 0));
      if (k > 0) {
        element.setAttribute("aria-label", `${element.getAttribute("aria-label")}; ${k} samples say it${said ? "" : ", the text does not"}`);
      }
    },
    close: () => put(app.above),
  };
}
