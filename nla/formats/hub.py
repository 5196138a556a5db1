"""The hub: a pair's folder down and up again. Tokens come from the environment or the login, and are never passed."""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nla.config import NLAConfig, resolve
from nla.errors import AccessError, ConfigError, HubError
from nla.formats.card import card, renewed
from nla.formats.native import CARD_FILE, CONFIG_FILE, METRICS_FILE, read_json

if TYPE_CHECKING:
    from nla.autoencoder import NLA

log = logging.getLogger(__name__)

_LOGIN = "log in with `hf auth login` or set HF_TOKEN"
_TIMEOUT_S = 10.0
_FILES = ["*.json", "*.safetensors", "*.md", "*.txt", "*.jinja", "*.model", "*.yaml"]


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


def push(
    pair: NLA, repo_id: str, private: bool = False, revision: str | None = None, commit_message: str | None = None
) -> str:
    """What ``NLA.push_to_hub`` promises; returns the commit's address."""
    _refuse_local(pair.weight_folders | ({"target": pair.target_folder} if pair.target_folder else {}))
    with tempfile.TemporaryDirectory() as folder:
        old = _loaded_from(pair) / CARD_FILE if pair.origin else None
        if old is not None and old.is_file():
            shutil.copyfile(old, Path(folder) / CARD_FILE)
        pair.save_pretrained(folder)
        return push_folder(Path(folder), repo_id, private, revision, commit_message)


def push_folder(
    folder: Path,
    repo_id: str,
    private: bool = False,
    revision: str | None = None,
    commit_message: str | None = None,
) -> str:
    """Publish the files that a saved pair consists of, checked but not loaded; returns the commit's address.

    Of its card the header and what stands between the marks of the generated part are made anew, and the rest is kept.

    Raises:
        ConfigError, WeightsError: it is no whole pair; or the target or other weights lie in a folder of this machine.
        HubError, AccessError: the hub refuses, or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    from nla.formats.pair import check_files, manifest

    config = NLAConfig.load(folder)
    check_files(config, folder)
    _refuse_local(_local_parts(config, folder))
    metrics = read_json(folder / METRICS_FILE) if (folder / METRICS_FILE).is_file() else {}
    old = (folder / CARD_FILE).read_text(encoding="utf-8") if (folder / CARD_FILE).is_file() else ""
    text = renewed(old, card(metrics, config, repo_id, local=False))
    contents: dict[str, str | bytes] = {name: str(folder / name) for name in (*manifest(config), CONFIG_FILE)}
    contents |= {METRICS_FILE: str(folder / METRICS_FILE) if (folder / METRICS_FILE).is_file() else b"{}"}
    operations = [CommitOperationAdd(name, data) for name, data in (contents | {CARD_FILE: text.encode()}).items()]
    message = commit_message or f"Pair for {config.target} at {config.point}"
    with hub_errors(repo_id, revision):
        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.create_commit(repo_id, operations, commit_message=message, revision=revision)
    return str(commit.commit_url)


def place_of(source: str | Path) -> str:
    """A folder's absolute path; a hub id as it is."""
    folder = Path(source).expanduser()
    return str(folder.resolve()) if folder.is_dir() else str(source)


def _loaded_from(pair: NLA) -> Path:
    """The folder that a pair was loaded from; of one on the hub, a folder with its card."""
    name, revision = pair.origin or ("", None)
    return Path(name) if Path(name).is_absolute() else download(name, revision, [CARD_FILE])


def _local_parts(config: NLAConfig, folder: Path) -> dict[str, Path]:
    """What a saved pair refers to in folders of this machine, by role."""
    from nla.formats.separate import is_local

    sources = {"target": config.target}
    for role, weights in (("encoder", config.encoder_weights), ("decoder", config.decoder_weights)):
        sources |= {} if weights is None else {role: weights.source}
    found = {role: Path(resolve(source, folder)) for role, source in sources.items()}
    return {role: place for role, place in found.items() if is_local(sources[role]) or place.is_dir()}


def _refuse_local(places: Mapping[str, Path]) -> None:
    """Refuse to publish a pair that refers to folders of this machine.

    Raises:
        ConfigError: its target or other weights are local.
    """
    if places:
        raise ConfigError(
            f"a pair whose {', '.join(places)} lie in folders of this machine ({', '.join(map(str, places.values()))})",
            "a target on the hub, and weights on the hub",
            "publish these models first, load the pair's parts by their hub ids, and save it again",
        )


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
            f"{name!r}, which is not on this machine, and a hub that cannot be reached",
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
