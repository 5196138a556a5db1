// A text whose tokens are explained: what is known of each, and the stream that brings more.

import { events, post } from "./api.js";

/** Most tokens of one request. */
const MOST = 512;

export class Reading {
  constructor(source, sampling) {
    this.source = source;
    this.sampling = sampling;
    this.tokens = [];
    this.letters = [];
    this.results = new Map();
    this.writing = new Map();
    this.wanted = 0;
    this.stopped = new AbortController();
  }

  async tokenize() {
    const { text, tokens } = await post("/tokenize", this.source, this.stopped.signal);
    this.text = text;
    this.letters = Array.from(text); // the server counts characters, JavaScript halves of some
    this.tokens = tokens;
  }

  /** Explains tokens that have not been, the nearest to `near` first. `heard` is told the token of each event. */
  async explain(positions, near, heard) {
    this.stopped.abort();
    this.stopped = new AbortController();
    const { signal } = this.stopped;
    const left = positions.filter((position) => !this.results.has(position))
      .sort((a, b) => Math.abs(a - near) - Math.abs(b - near)).slice(0, MOST);
    this.wanted = this.results.size + left.length;
    this.writing.clear();
    if (!left.length) return;
    const body = { ...this.source, ...this.sampling, positions: left, near };
    for await (const event of events("/explain", body, signal)) {
      if (signal.aborted) return;
      if (event.kind === "text" && event.sample === 0) this.writing.set(event.position, event.text);
      if (event.kind === "result") {
        this.writing.delete(event.position);
        this.results.set(event.position, event);
      }
      if (event.kind !== "start") heard(event.position, event.kind === "result");
    }
  }

  stop() {
    this.stopped.abort();
  }
}

export const normalised = (claim) =>
  claim.toLowerCase().split(/\s+/).join(" ").replace(/^[^\p{L}\p{N}_]+|[^\p{L}\p{N}_]+$/gu, "");

/** What the samples claim, each with the number that do: first what most do. As nla/views/tokens.py has it. */
export function claimsOf(result) {
  const found = new Map();
  for (const sample of result.samples) {
    const own = new Set();
    for (const claim of sample.claims) {
      const key = normalised(claim);
      if (own.has(key)) continue;
      own.add(key);
      const entry = found.get(key) ?? { key, text: claim, n: 0 };
      entry.n += 1;
      found.set(key, entry);
    }
  }
  return [...found.values()].sort((a, b) => b.n - a.n);
}
