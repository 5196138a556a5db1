"""``nla serve``: requests over HTTP in; explanations, activations and continuations out, as JSON and as events."""
