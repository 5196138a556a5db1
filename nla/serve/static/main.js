// The page: what is asked, the text with its tokens, and the view beside it.

import { Refusal, get, transcripts } from "./api.js";
import * as ask from "./ask.js";
import * as compare from "./compare.js";
import { h, paced, put, settled } from "./dom.js";
import * as edit from "./edit.js";
import * as read from "./read.js";
import { Reading } from "./reading.js";
import { ROLES, VIEWS, fromFragment, sampling, source, toFragment } from "./state.js";
import { TokenView } from "./tokens.js";

const at = (id) => document.getElementById(id);
const MODULES = { read, ask, edit, compare };

const app = {
  state: fromFragment(location.hash),
  pairs: [],
  reading: null,
  tokens: null,
  view: null,
  above: at("above"),

  pairNow: () => app.pairs.find((pair) => pair.name === app.state.pair) ?? app.pairs[0],
  link: () => location.origin + location.pathname + toFragment(app.state),

  set(changes) {
    Object.assign(app.state, changes);
    remember();
  },

  say: (text) => put(at("said"), text),

  fail(text) {
    put(at("failed"), text);
    at("failed").hidden = !text;
    if (text) at("failed").scrollIntoView({ block: "nearest" });
  },

  /** What work gives; undefined if it was refused, which is shown, or given up. */
  async tried(work) {
    try {
      const result = await work();
      return result;
    } catch (error) {
      if (error.name === "AbortError") return undefined;
      app.fail(error instanceof Refusal ? error.message : `The page itself failed: ${error.message}`);
      return undefined;
    }
  },

  /** How much of what is wanted is there; 0 of 0 hides it. */
  progress(n, total, of = "of the text") {
    at("progress").hidden = total === 0;
    at("stop").hidden = total === 0;
    at("bar").max = total || 1;
    at("bar").value = n;
    put(at("count"), `${n} of ${total} tokens ${of} explained`);
  },

  async copy(text, name) {
    try {
      await navigator.clipboard.writeText(text);
      app.say(`Copied ${name}.`);
    } catch { // no permission, or an address without TLS
      const box = h("textarea", { rows: 6, readonly: true, "aria-label": `${name}, to copy`, value: text });
      put(at("copied"), box);
      box.select();
      app.say(`This browser does not let the page copy: ${name} is selected below.`);
    }
  },

  pick(position) {
    app.set({ token: position });
    app.tokens.choose(position);
    app.view.picked();
    if (position !== null && !app.reading.results.has(position)) explain();
  },
};

const remember = settled(() => history.replaceState(null, "", toFragment(app.state)), 200);

async function explain() {
  const { reading, state } = app;
  const all = reading.tokens.map((_, index) => index);
  const positions = state.which === "all" ? all : state.token === null ? [] : [state.token];
  const near = state.token ?? all.length - 1;
  const redraw = paced(() => app.reading === reading && app.view.update(), 120);
  let told = 0;
  const stream = {};
  app.stream = stream;
  const done = await app.tried(async () => {
    const work = reading.explain(positions, near, (position, finished) => {
      app.tokens.refresh(position);
      if (finished || position === state.token) redraw();
      app.progress(reading.results.size, reading.wanted);
      const quarter = Math.floor((4 * reading.results.size) / reading.wanted);
      if (quarter > told) {
        told = quarter;
        app.say(`${reading.results.size} of ${reading.wanted} tokens explained.`);
      }
    });
    if (reading.wanted > reading.results.size) {
      app.progress(reading.results.size, reading.wanted);
      app.say("Waiting for the model.");
    }
    await work;
    return true;
  });
  if (app.stream !== stream) return;
  app.progress(0, 0);
  if (done && positions.length) app.say(`${reading.results.size} of ${all.length} tokens explained.`);
  app.tokens.refreshAll();
  app.view.update();
}

async function begin() {
  app.reading?.stop();
  app.view?.close?.();
  app.fail("");
  app.say("Reading the text.");
  const reading = new Reading(source(app.state), sampling(app.state));
  app.reading = reading;
  app.tokens = null;
  at("result").hidden = true;
  const read_ = await app.tried(async () => {
    await reading.tokenize();
    return true;
  });
  if (app.reading !== reading) return;
  if (!read_) {
    app.reading = null;
    app.say("");
    return;
  }
  if (app.state.token !== null && app.state.token >= reading.tokens.length) app.state.token = null;
  app.set({ shown: true });
  at("result").hidden = false;
  app.tokens = new TokenView(at("tokens"), reading, {
    picked: app.pick, decorate: (position, element) => app.view?.decorate(position, element), label: "Tokens of the text",
  });
  app.say(`${reading.tokens.length} tokens.`);
  openView();
  await explain();
}

function openView() {
  for (const name of VIEWS) {
    if (name === app.state.view) at(`to-${name}`).setAttribute("aria-current", "page");
    else at(`to-${name}`).removeAttribute("aria-current");
  }
  if (!app.tokens) return;
  app.view?.close?.();
  put(app.above);
  put(at("panel"));
  const quiet = { update() {}, picked() {}, decorate() {} };
  app.view = quiet;
  app.tokens.choose(app.state.token);
  app.tokens.refreshAll();
  app.view = MODULES[app.state.view].open(app, at("panel"));
  app.tokens.refreshAll();
}

// What is asked

function options(select, names, now, none = null) {
  put(select, none !== null && h("option", { value: "" }, none), names.map((name) => h("option", { value: name }, name)));
  select.value = now;
  if (select.selectedIndex < 0) select.selectedIndex = 0;
}

function drawMessages() {
  put(at("messages"), app.state.messages.map((message, index) => {
    const role = h("select", { "aria-label": `role of message ${index + 1}`, change: () => { message.role = role.value; } },
      ROLES.map((name) => h("option", { value: name, selected: name === message.role }, name)));
    const content = h("textarea", { rows: 2, "aria-label": `message ${index + 1}`, value: message.content,
      input: () => { message.content = content.value; } });
    return h("div", { class: "message" }, role, content, h("button", { type: "button", "aria-label": `remove message ${index + 1}`,
      disabled: app.state.messages.length === 1, click: () => { app.state.messages.splice(index, 1); drawMessages(); } }, "×"));
  }));
}

function drawForm() {
  const { state } = app;
  const pair = app.pairNow();
  options(at("pair"), app.pairs.map((one) => one.name), pair.name);
  options(at("adapter"), pair.target_adapters, state.adapter, "none");
  at("adapter-field").hidden = pair.target_adapters.length === 0;
  put(at("about"), `${pair.name}: ${pair.target} at ${pair.point}, ${pair.context} tokens at most`);
  put(at("doubts"), pair.doubts.map((doubt) => h("p", { class: "warn" }, doubt)));
  if (!pair.chat) state.kind = "text";
  at("kind-chat").disabled = !pair.chat;
  at("no-chat").hidden = pair.chat;
  at(`kind-${state.kind}`).checked = true;
  at("text-field").hidden = state.kind !== "text";
  at("chat-field").hidden = state.kind !== "chat";
  at("text").value = state.text;
  drawMessages();
  for (const name of ["samples", "temperature", "seed"]) at(name).value = state[name];
  at("which").value = state.which;
}

function takeForm() {
  const { state } = app;
  const before = JSON.stringify([source(state), sampling(state)]);
  state.text = at("text").value;
  for (const name of ["samples", "temperature", "seed"]) state[name] = Number(at(name).value);
  state.which = at("which").value;
  if (JSON.stringify([source(state), sampling(state)]) !== before) {
    Object.assign(state, { token: null, edit: null, continued: false });
  }
}

async function take(file) {
  app.fail("");
  if (/\.(txt|md)$/i.test(file.name)) {
    app.set({ kind: "text", text: await file.text() });
    drawForm();
    app.say(`Opened ${file.name}.`);
    return;
  }
  const found = await app.tried(() => transcripts(file));
  if (!found) return;
  const chosen = h("select", { id: "transcript", change: () => show(found.transcripts[chosen.selectedIndex]) },
    found.transcripts.map((one) => h("option", {}, `${one.id} (${one.messages.length} messages)`)));
  put(at("opened"), found.transcripts.length > 1 && h("label", { class: "field" }, h("span", {}, "Conversation"), chosen),
    found.remarks.map((remark) => h("p", { class: "hint" }, remark)));
  show(found.transcripts[0]);
  app.say(`Opened ${file.name}: ${found.transcripts.length} conversation${found.transcripts.length === 1 ? "" : "s"}.`);
}

function show(transcript) {
  if (app.pairNow().chat) app.set({ kind: "chat", messages: transcript.messages });
  else app.set({ kind: "text", text: transcript.messages.map((message) => message.content).join("\n") });
  drawForm();
}

function listen() {
  at("source").addEventListener("submit", (event) => {
    event.preventDefault();
    takeForm();
    begin();
  });
  at("stop").addEventListener("click", () => {
    app.reading?.stop();
    app.view?.stop?.();
    app.progress(0, 0);
    app.say("Stopped.");
  });
  for (const kind of ["text", "chat"]) {
    at(`kind-${kind}`).addEventListener("change", () => {
      app.state.text = at("text").value;
      app.state.kind = kind;
      drawForm();
    });
  }
  at("pair").addEventListener("change", () => {
    takeForm();
    Object.assign(app.state, { pair: at("pair").value, adapter: "", token: null, edit: null });
    drawForm();
  });
  at("adapter").addEventListener("change", () => { Object.assign(app.state, { adapter: at("adapter").value, edit: null }); });
  at("add").addEventListener("click", () => {
    const last = app.state.messages.at(-1);
    app.state.messages.push({ role: last?.role === "user" ? "assistant" : "user", content: "" });
    drawMessages();
    at("messages").lastChild.querySelector("textarea").focus();
  });
  at("file").addEventListener("change", () => {
    const [file] = at("file").files;
    if (file) take(file);
    at("file").value = "";
  });
  for (const name of ["dragover", "dragleave", "drop"]) {
    document.addEventListener(name, (event) => {
      event.preventDefault();
      document.body.classList.toggle("dropping", name === "dragover");
      if (name === "drop" && event.dataTransfer.files.length) take(event.dataTransfer.files[0]);
    });
  }
  for (const name of VIEWS) {
    at(`to-${name}`).addEventListener("click", () => {
      app.set({ view: name });
      openView();
    });
  }
  window.addEventListener("hashchange", () => {
    app.state = fromFragment(location.hash);
    start();
  });
}

function start() {
  drawForm();
  openView();
  if (app.state.shown) begin();
}

listen();
await app.tried(async () => { app.pairs = (await get("/pairs")).pairs; });
if (app.pairs.length) start();
document.body.dataset.ready = "yes";
