"""Targets on a hub: only what is needed is downloaded, a copy loads without a network, and refusals say what to do."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import huggingface_hub.constants as hub_constants
import pytest
import torch

from nla.errors import AccessError, TargetError
from nla.models.load import load_target, load_truncated
from nla.storage.hub import fetch_file
from nla.text.tokens import load_tokenizer
from tests.helpers.targets import IDS, POINT, activations_of, files_of, saved
from tests.helpers.tiny import make_model, make_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A target of four blocks in many files."""
    return saved(tmp_path / "target")


class Hub(NamedTuple):
    """A hub on this machine."""

    asked: list[str]
    """Files that were sent."""

    commit: str


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A server that answers as the hub does: "some/model" is ``folder``, others are gated, private or not there."""
    found = Hub([], "c0ffee" * 6 + "abcd")

    class Answer(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(b"")

        def do_GET(self) -> None:
            self.answer(None)

        def answer(self, body: bytes | None) -> None:
            repository, _, rest = self.path.lstrip("/").removeprefix("api/models/").partition("/resolve/")
            revision, _, file = rest.partition("/")
            refusal = {"some/gated": (403, "GatedRepo"), "some/nothing": (401, "RepoNotFound")}.get(repository)
            if refusal is None and revision not in ("main", found.commit):
                refusal = (404, "RevisionNotFound")
            if refusal is None and not (folder / file).is_file():
                refusal = (404, "EntryNotFound")
            self.send_response(*(refusal or (200,)))
            if refusal:
                self.send_header("X-Error-Code", refusal[1])
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            content = (folder / file).read_bytes()
            self.send_header("X-Repo-Commit", found.commit)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body is None:
                found.asked.append(file)
                self.wfile.write(content)

        def log_message(self, *args) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(hub_constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(
        hub_constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        hub_constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
    yield found
    server.shutdown()
    server.server_close()


def test_from_the_hub_only_the_files_that_are_needed_are_downloaded(hub: Hub, folder: Path) -> None:
    files = files_of(folder)
    view = load_truncated("some/model", "resid_post.0", device="cpu")
    assert torch.equal(view(input_ids=IDS).last_hidden_state, activations_of(make_model("llama"), 0))
    low = {file for name, file in files.items() if name.startswith(("model.embed_tokens", "model.layers.0."))}
    assert {name for name in hub.asked if name.endswith(".safetensors")} == low < set(files.values())
    assert view.name_or_path == "some/model" and view.config._commit_hash == hub.commit


@pytest.mark.parametrize(
    ("name", "revision", "error", "message"),
    [
        ("some/gated", None, AccessError, "gated.*HF_TOKEN"),
        ("some/nothing", None, AccessError, "HF_TOKEN"),
        ("some/model", "v9", TargetError, "revision 'v9'"),
    ],
)
def test_what_the_hub_refuses_is_said_with_what_to_do(hub: Hub, name, revision, error, message) -> None:
    with pytest.raises(error, match=message):
        load_target(name, revision=revision)


def test_without_a_network_and_a_copy_there_is_no_target(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(TargetError, match="cannot be reached"):
        load_target("some/model")


def test_a_model_of_one_file_that_was_downloaded_before_loads_without_a_network(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    make_model("llama").save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    view = load_truncated("some/model", POINT, device="cpu")
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    again = load_truncated("some/model", POINT, device="cpu")
    assert torch.equal(again(input_ids=IDS).last_hidden_state, view(input_ids=IDS).last_hidden_state)
    for noted in Path(hub_constants.HF_HUB_CACHE).glob("*/.no_exist/*/*"):
        noted.unlink()  # a copy that another tool made has no such notes
    assert load_truncated("some/model", POINT, device="cpu").name_or_path == "some/model"


def test_weights_that_were_not_downloaded_before_are_asked_of_the_hub(hub: Hub, monkeypatch) -> None:
    load_truncated("some/model", "resid_post.0", device="cpu")
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(TargetError, match="cannot be reached"):
        load_truncated("some/model", "resid_post.3", device="cpu")


@pytest.mark.parametrize(("name", "error"), [("some/nothing", AccessError), ("some/gated", AccessError)])
def test_a_tokenizer_that_is_not_there_is_said_with_what_to_do(hub: Hub, name: str, error: type) -> None:
    with pytest.raises(error, match="HF_TOKEN"):
        load_tokenizer(name)


def test_a_tokenizer_of_no_known_name_without_a_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    for name in ("typo", "./typo"):
        with pytest.raises(TargetError):
            load_tokenizer(name)


def test_a_hub_that_does_not_answer_is_asked_once_a_file(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    view = load_truncated("some/model", POINT, device="cpu")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        fetch_file("some/model", None, file)
    monkeypatch.setattr(hub_constants, "ENDPOINT", "http://127.0.0.1:1")  # nobody listens there
    template = hub_constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(hub_constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: pytest.fail("waited to ask again"))
    with pytest.raises(TargetError, match="cannot be reached"):
        load_target("some/other")
    again = load_truncated("some/model", POINT, device="cpu")
    assert torch.equal(again(input_ids=IDS).last_hidden_state, view(input_ids=IDS).last_hidden_state)
    assert load_tokenizer("some/model", hub.commit)("the cat")["input_ids"] == make_tokenizer()("the cat")["input_ids"]
