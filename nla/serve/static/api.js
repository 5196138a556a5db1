// The server's routes: JSON in, JSON or events out; a refusal is an error that says what to do.

export class Refusal extends Error {
  constructor({ got, expected, fix }) {
    super(`Got ${got}; expected ${expected}. What to do: ${fix}.`);
  }
}

async function answer(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal({ got: "no answer", expected: "the server", fix: "see whether nla serve still runs" });
  }
  if (response.ok) return response;
  const said = await response.json().catch(() => null);
  throw new Refusal(said?.got ? said : {
    got: `status ${response.status}`, expected: "an answer", fix: "see what nla serve says",
  });
}

export const get = async (path) => (await answer(path, {})).json();

const posted = (path, body, signal) => answer(path, {
  method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body), signal,
});

export const post = async (path, body, signal) => (await posted(path, body, signal)).json();

export const postForText = async (path, body) => (await posted(path, body)).text();

/** The transcripts in a file. */
export const transcripts = async (file) =>
  (await answer(`/page/transcripts?name=${encodeURIComponent(file.name)}`, { method: "POST", body: file })).json();

/** The events of a route that streams, as they come. */
export async function* events(path, body, signal) {
  const response = await posted(path, { ...body, stream: true }, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const blocks = (waiting + value).split("\n\n");
      waiting = blocks.pop();
      for (const block of blocks) {
        const data = block.replace(/^data: /, "");
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.kind === "error") throw new Refusal(event);
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
  throw new Refusal({ got: "a stream that ended early", expected: "its last event", fix: "ask again" });
}
