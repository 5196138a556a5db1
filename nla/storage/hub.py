"""The hub: files and folders down. Tokens come from the environment or the login, and are never passed."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nla.errors import AccessError, HubError, TargetError
from nla.storage.files import folder_of
from nla.storage.schema import shown

log = logging.getLogger(__name__)

_LOGIN = "log in with `hf auth login` or set HF_TOKEN"
_TIMEOUT_S = 10.0
_LONGEST_ID = 200
_NAME = r"[\w-][\w.-]*"
_FILES = ["*.json", "*.safetensors", "*.md", "*.txt", "*.jinja", "*.model", "*.yaml"]


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a repository that somebody owns, such as "someone/model"."""
    return len(name) <= _LONGEST_ID and re.fullmatch(rf"{_NAME}/[\w.-]+", name) is not None


def download(name: str, revision: str | None = None, patterns: list[str] | None = None) -> Path:
    """The folder of a repository's files on this machine, downloaded if need be.

    Args:
        revision: branch, tag or commit; None: main.
        patterns: file names; None: all that pairs and models consist of, never code or pickles.

    Raises:
        AccessError: there is no such repository, or it is gated or private and no token opens it.
        HubError: there is no such revision, or the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download

    with hub_errors(name, revision):
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns or _FILES))


def commit_of(name: str, revision: str | None = None) -> str | None:
    """The commit that a repository's revision is now; None where the hub does not say, such as without a network."""
    from huggingface_hub import HfApi

    try:
        with hub_errors(name, revision):
            return HfApi().model_info(name, revision=revision, timeout=_TIMEOUT_S).sha
    except (HubError, AccessError) as error:
        log.info("%s is not pinned to a commit: %s", name, error)
        return None


def fetch_file(source: str, revision: str | None, name: str, optional: bool = False) -> Path | None:
    """A file of a folder or hub repository, downloaded if need be; None if there is no such file.

    Args:
        optional: without the hub, a copy that was downloaded before and lacks the file is one that has none.

    Raises:
        TargetError, AccessError: there is no such source, or it cannot be reached.
    """
    folder = folder_of(source)
    if folder is not None:
        return folder / name if os.path.isfile(folder / name) else None
    if not is_hub_id(source) and re.fullmatch(_NAME, source) is None:
        raise TargetError(
            f"no target {shown(source)}", "a folder, or a hub id such as 'someone/model'", "check the name"
        )
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        copy = try_to_load_from_cache(source, name, revision=revision)
        silent = not isinstance(copy, str) and not answers(source, name, revision)
        return Path(hf_hub_download(source, name, revision=revision, local_files_only=silent))
    except RepositoryNotFoundError as error:  # a gated one is a kind of it
        raise access_error(source, error) from error
    except LocalEntryNotFoundError as error:
        noted = try_to_load_from_cache(source, name, revision=revision)  # a marker, not None: the hub had no such file
        copied = optional and try_to_load_from_cache(source, "config.json", revision=revision) is not None
        if noted is not None or copied:
            return None
        raise TargetError(
            f"{source!r} at revision {revision or 'main'!r}, not on this machine, and a hub that cannot be reached",
            "a network, or a copy of this revision that was downloaded before",
            "connect, or give the target's folder",
        ) from error
    except EntryNotFoundError:
        return None
    except (OSError, ValueError) as error:  # the hub's other errors are kinds of these
        raise TargetError(
            f"{source!r} at revision {revision or 'main'!r}, which the hub does not give ({error})",
            "a hub id and one of its revisions",
            "check both, and the network",
        ) from error


def answers(source: str, name: str, revision: str | None) -> bool:
    """Whether the hub answers one request for a file, whatever it says; huggingface_hub would ask for half a minute."""
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_url

    client: Any = errors.HfHubHTTPError.__bases__[0]
    try:
        get_hf_file_metadata(hf_hub_url(source, name, revision=revision), timeout=_TIMEOUT_S)
    except errors.HfHubHTTPError:
        return True
    except (client, ConnectionError):
        return False
    return True


def place_of(source: str | Path) -> str:
    """A folder's absolute path; a hub id as it is."""
    folder = folder_of(source)
    return str(source) if folder is None else str(folder.resolve())


def access_error(name: str, error: Exception) -> AccessError:
    """What to raise of a repository that is gated, private or missing: the hub tells the last two apart for nobody."""
    from huggingface_hub.errors import GatedRepoError

    if isinstance(error, GatedRepoError):
        return AccessError(
            f"{name!r}, whose files are gated",
            "a token of an account that has been let in",
            f"accept its terms on its page on the hub, then {_LOGIN}",
        )
    return AccessError(
        f"no repository {name!r} on the hub, or not for you",
        "a public one, or one that your token opens",
        f"check the name; if it is private, {_LOGIN}",
    )


@contextlib.contextmanager
def hub_errors(name: str, revision: str | None) -> Iterator[None]:
    """The hub's errors as typed ones that say what to do.

    Raises:
        AccessError: the repository is gated, private or missing.
        HubError: the hub refuses for another reason, or cannot be reached.
    """
    from huggingface_hub import errors

    client: Any = errors.HfHubHTTPError.__bases__[0]  # the base of all errors of the hub's HTTP client, whichever it is
    try:
        yield
    except errors.RepositoryNotFoundError as error:  # a gated one is a kind of it
        raise access_error(name, error) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(
            f"{name!r} without a revision {revision!r}", "one of its branches, tags or commits", "check the revision"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise HubError(
            f"{name!r} at revision {revision or 'main'!r}, not on this machine, and a hub that cannot be reached",
            "a network, or a copy that was downloaded before",
            "connect, or give a folder",
        ) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "unknown"
        fix = f"{_LOGIN} with a token that may write there" if status in (401, 403) else "try again later"
        raise HubError(f"status {status} from the hub for {name!r}", "a request that it grants", fix) from error
    except errors.HFValidationError as error:
        raise HubError(f"the name {name!r} ({error})", "a hub id such as 'someone/pair'", "correct the name") from error
    except (client, ConnectionError) as error:
        got = f"a hub that cannot be reached for {name!r} ({type(error).__name__}: {error})"
        raise HubError(got, "a network, and a hub that answers", "connect, and run it again") from error
