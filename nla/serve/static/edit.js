// Edit and steer: a changed explanation, how far its reconstruction moves, and what the target then writes.

import { events, post } from "./api.js";
import { figure, h, labelled, put, settled } from "./dom.js";
import { source } from "./state.js";
import { nameOf } from "./tokens.js";

export function open(app, root) {
  const { state } = app;
  let scoring = new AbortController();
  let writing = new AbortController();
  let of = null; // the token whose explanation is in the boxes
  let original = "";

  const close = () => { scoring.abort(); writing.abort(); };

  function update() {
    const result = app.reading.results.get(state.token);
    if (state.token === null || !result) {
      of = null;
      put(root, h("p", { class: "hint" }, state.token === null ? "Choose a token in the text to edit what its activation holds."
        : "This token is not explained yet."));
      return;
    }
    if (of !== state.token) draw(result);
  }

  function draw(result) {
    close();
    of = state.token;
    original = result.description;
    const sentences = result.samples.find((sample) => sample.text === original)?.claims ?? [original];
    const edited = state.edit === null ? sentences : state.edit.split("\n");
    const boxes = h("div", { class: "claims-edit" });
    const figures = h("p", { role: "status", class: "figures" });
    const columns = h("div", { class: "columns" });

    const text = () => [...boxes.querySelectorAll("textarea")].map((box) => box.value.trim()).filter(Boolean).join("\n");
    const changed = () => text() !== sentences.join("\n");
    /** As the encoder writes it: sentences one after another. */
    const written = () => text().replaceAll("\n", " ");

    const measured = settled(async () => {
      scoring.abort();
      scoring = new AbortController();
      if (!written()) return put(figures, "Nothing is claimed.");
      const asked = { ...source(state), position: of };
      const { signal } = scoring;
      const scores = await app.tried(() => Promise.all([
        post("/score", { ...asked, description: original }, signal),
        post("/score", { ...asked, description: written(), before: original }, signal),
      ]));
      if (!scores || signal.aborted) return;
      const [was, now] = scores;
      put(figures, `Cosine to the activation: ${figure(was.cosine_similarity)} as explained, ${figure(now.cosine_similarity)} as edited. `,
        `Cosine of the two reconstructions: ${figure(now.moved)}. Margin ${figure(now.margin, true)}.`);
    }, 350);

    const typed = () => {
      app.set({ edit: changed() ? text() : null, continued: false });
      measured();
    };
    const row = (claim, index) => {
      const box = h("textarea", { rows: 2, "aria-label": `claim ${index + 1}`, value: claim, input: typed });
      const line = h("div", { class: "claim-row" }, box, h("button", { type: "button", "aria-label": `remove claim ${index + 1}`,
        click: () => { line.remove(); typed(); } }, "×"));
      return line;
    };
    put(boxes, edited.map(row));

    const strength = h("input", { type: "range", id: "strength", min: 0, max: 4, step: 0.25, value: state.strength });
    const stated = h("output", { for: "strength" }, figure(state.strength));
    strength.addEventListener("input", () => {
      app.set({ strength: Number(strength.value), continued: false });
      put(stated, figure(state.strength));
      strength.setAttribute("aria-valuetext", `${figure(state.strength)} lengths of the activation`);
    });
    const length = h("input", { type: "number", min: 1, max: 512, value: state.length,
      change: () => length.validity.valid && app.set({ length: Number(length.value) }) });
    const go = h("button", { type: "button", class: "main", click: () => continued() }, "Continue the text");

    async function continued() {
      writing.abort();
      writing = new AbortController();
      const { signal } = writing;
      if (!changed()) return app.fail("Nothing is edited: change a claim first.");
      app.fail("");
      app.set({ continued: true });
      const steer = { position: of, strength: state.strength, edit: { before: original, after: written() } };
      const arms = [["As it is", null, "without any steering"], ["Steered", steer, "towards the edited explanation"],
        ["Control", { ...steer, control: state.seed }, `a random direction of equal norm, seed ${state.seed}`]];
      put(columns, arms.map(([name, , about]) => h("section", { class: "arm" }, h("h3", {}, name), h("small", {}, about), h("p", { class: "written" }, "…"))));
      const outs = [...columns.querySelectorAll(".written")];
      app.say("The target continues the text.");
      const texts = await app.tried(() => Promise.all(arms.map(async ([, steered], index) => {
        const body = { ...source(state), completion_tokens: state.length, temperature: 0, seed: state.seed, ...(steered && { steer: steered }) };
        let whole = "";
        for await (const event of events("/completion", body, signal)) {
          if (signal.aborted) return whole;
          if (event.kind === "start") continue;
          whole = event.kind === "result" ? event.completion : event.text;
          put(outs[index], whole || "…");
        }
        put(outs[index], whole || h("i", {}, "nothing"));
        return whole;
      })));
      if (!texts || signal.aborted) return;
      const [plain, steered, control] = texts;
      app.say(steered === plain ? "Steering changed nothing." : control === plain
        ? "Steering changed the continuation; the control did not." : "Steering changed the continuation, and so did the control.");
    }

    put(root, h("h2", {}, "Edit what ", h("code", {}, nameOf(app.reading.tokens[of])), " holds"),
      h("p", { class: "hint" }, "Change, remove or add a claim; the reconstruction follows."), boxes,
      h("div", { class: "row" }, h("button", { type: "button", click: () => { boxes.append(row("", boxes.childElementCount)); boxes.lastChild.querySelector("textarea").focus(); } }, "Add a claim"),
        h("button", { type: "button", click: () => { app.set({ edit: null, continued: false }); of = null; update(); } }, "Undo all")),
      figures,
      h("div", { class: "row" }, labelled("Strength", h("span", { class: "slider" }, strength, stated), "lengths of the activation"),
        labelled("Tokens", length), h("span", { class: "figures" }, `seed ${state.seed}`)),
      go, columns);
    measured();
    if (state.continued && changed()) continued();
  }

  update();
  return {
    update,
    picked: () => {
      if (of === state.token) return;
      app.set({ edit: null, continued: false });
      update();
    },
    decorate() {},
    close,
    stop: close,
  };
}
