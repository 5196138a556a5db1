"""The hub: a pair's folder down and up again. Tokens come from the environment or the login, and are never passed."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from nla.errors import ConfigError, HubError
from nla.formats.card import card
from nla.formats.native import CARD_FILE, write_atomic

if TYPE_CHECKING:
    from nla.autoencoder import NLA

_FILES = ["*.json", "*.safetensors", "*.md", "*.txt", "*.jinja", "*.model", "*.yaml"]


def download(name: str, revision: str | None = None, patterns: list[str] | None = None) -> Path:
    """The folder of a repository's files on this machine, downloaded if need be.

    Args:
        revision: branch, tag or commit; None: main.
        patterns: file names; None: all that pairs and models consist of, never code or pickles.

    Raises:
        HubError: there is no such repository or revision, it is gated or private, or the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download

    with hub_errors(name, revision):
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns or _FILES))


def push(
    pair: NLA, repo_id: str, private: bool = False, revision: str | None = None, commit_message: str | None = None
) -> str:
    """What ``NLA.push_to_hub`` promises; returns the commit's address."""
    from huggingface_hub import HfApi

    refuse_local(pair)
    message = commit_message or f"Pair for {pair.config.target} at {pair.config.point}"
    with tempfile.TemporaryDirectory() as folder, hub_errors(repo_id, revision):
        pair.save_pretrained(folder)
        write_atomic(Path(folder) / CARD_FILE, card(pair.metrics, pair.config, repo_id, local=False))
        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message, revision=revision)
    return str(commit.commit_url)


def refuse_local(pair: NLA) -> None:
    """Refuse to publish a pair that refers to folders of this machine.

    Raises:
        ConfigError: its target or other weights are local.
    """
    local = {**pair.weight_folders} | ({"target": pair.target_folder} if pair.target_folder else {})
    if local:
        raise ConfigError(
            f"a pair whose {', '.join(local)} lie in folders of this machine ({', '.join(map(str, local.values()))})",
            "a target on the hub, and weights on the hub",
            "publish these models first, load the pair's parts by their hub ids, and save it again",
        )


@contextlib.contextmanager
def hub_errors(name: str, revision: str | None) -> Iterator[None]:
    """The hub's errors as typed ones that say what to do.

    Raises:
        HubError: see :func:`download`.
    """
    from huggingface_hub import errors

    login = "log in with `hf auth login` or set HF_TOKEN"
    try:
        yield
    except errors.GatedRepoError as error:
        raise HubError(
            f"{name!r}, whose files are gated",
            "a token of an account that has been let in",
            f"accept its terms on its page on the hub, then {login}",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"no repository {name!r} on the hub, or not for you",
            "a public one, or one that your token opens",
            f"check the name; if it is private, {login}",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(
            f"{name!r} without a revision {revision!r}", "one of its branches, tags or commits", "check the revision"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise HubError(
            f"{name!r}, which is not on this machine, and a hub that cannot be reached",
            "a network, or a copy that was downloaded before",
            "connect, or give a folder",
        ) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "unknown"
        fix = f"{login} with a token that may write there" if status in (401, 403) else "try again later"
        raise HubError(f"status {status} from the hub for {name!r}", "a request that it grants", fix) from error
    except errors.HFValidationError as error:
        raise HubError(f"the name {name!r} ({error})", "a hub id such as 'someone/pair'", "correct the name") from error
