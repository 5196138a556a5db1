// Read: what the chosen token's activation holds, and the whole as a file or on the clipboard.

import { postForText } from "./api.js";
import { figure, h, put, spelledOut } from "./dom.js";
import { claimsOf } from "./reading.js";
import { card, nameOf } from "./tokens.js";

export function open(app, root) {
  const pinned = h("div", { id: "pinned" });
  const counts = h("p", { class: "legend" });
  put(root, counts, pinned, h("div", { class: "row" },
    h("button", { type: "button", click: () => save(app) }, "Save as one HTML"),
    h("button", { type: "button", click: () => app.copy(asJson(app), "JSON") }, "Copy as JSON"),
    h("button", { type: "button", click: () => app.copy(asMarkdown(app), "Markdown") }, "Copy as Markdown"),
    h("button", { type: "button", click: () => app.copy(app.link(), "the link") }, "Copy link")));

  function update() {
    const { reading, state } = app;
    const levels = [...reading.results.values()].map((result) => result.trust.level);
    put(counts, "Trust: ", ["high", "medium", "low"].map((level) =>
      [h("span", { class: `token ${level}` }, level), ` ${levels.filter((one) => one === level).length} `]));
    put(pinned, state.token === null
      ? h("p", { class: "hint" }, "Choose a token in the text, by click or Enter, to see what its activation holds.")
      : card(reading, state.token));
  }
  update();
  return { update, picked: update, decorate() {} };
}

const explained = ({ reading }) => [...reading.results.keys()].sort((a, b) => a - b).map((position) => reading.results.get(position));

async function save(app) {
  const { reading } = app;
  const pair = app.pairNow();
  const results = explained(app);
  const title = `${pair.name} at ${pair.point}`;
  const html = await app.tried(() => postForText("/page/html", { title, text: reading.text, results, remarks: pair.doubts }));
  if (html === undefined) return;
  const link = h("a", { href: URL.createObjectURL(new Blob([html], { type: "text/html" })), download: "explanations.html" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  app.say(`Saved ${results.length} explained tokens as explanations.html.`);
}

function asJson(app) {
  const pair = app.pairNow();
  const { source, sampling, text } = app.reading;
  return JSON.stringify({ ...source, ...sampling, pair: pair.name, point: pair.point, read: text, results: explained(app) }, null, 2);
}

/** A text that no Markdown reader takes for markup. */
const plain = (text) => spelledOut(text).replaceAll("\n", "⏎").replace(/[\\`*_{}[\]<>#|~!&]/g, "\\$&");

function asMarkdown(app) {
  const pair = app.pairNow();
  const rows = explained(app).map((result) => {
    const { trust, samples } = result;
    const claims = claimsOf(result).map((claim) => `${plain(claim.text)} (${claim.n} of ${samples.length})`).join("<br>");
    return `| ${result.position} | ${plain(nameOf(result))} | ${trust.level} | ${figure(trust.cosine)} | ${figure(trust.agreement)} | ${figure(trust.margin, true)} | ${claims} |`;
  });
  return [`# ${plain(pair.name)} at ${plain(pair.point)}`, "", "| token | text | trust | cosine | agreement | margin | claims |",
    "|---|---|---|---|---|---|---|", ...rows, ""].join("\n");
}
