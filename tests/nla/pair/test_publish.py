"""A pair on the hub: up, down and refused, against a hub on loopback; and its model card."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
import yaml

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))
import parity_pairs as pairs  # type: ignore[import-not-found]
from huggingface_hub import constants, hf_api

from nla import NLA
from nla.cli import main
from nla.config import WeightsConfig
from nla.errors import AccessError, ConfigError, HubError, StorageError
from nla.formats import kitft
from nla.pair.card import ABSENT, card, renewed
from nla.pair.folder import MANIFEST
from nla.pair.publish import push_folder
from tests.helpers.hub_server import Hub
from tests.helpers.tiny import TEXTS, make_model, make_pair, make_tokenizer


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on loopback that holds the target "someone/target"; what is downloaded lands in a folder of the test."""
    server = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    for client in (hf_api.api, transformers.utils.hub.hf_api()):  # made once a process, with the address of that time
        monkeypatch.setattr(client, "endpoint", server.address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_environment")
    make_model().save_pretrained(tmp_path / "target")
    make_tokenizer().save_pretrained(tmp_path / "target")
    server.put("someone/target", tmp_path / "target")
    yield server
    server.server.shutdown()
    server.server.server_close()


def test_a_pair_goes_up_and_comes_down_the_same(hub: Hub) -> None:
    pair = make_pair(scale=0.3, target="someone/target")
    address = pair.push_to_hub("me/pair", private=True)
    assert address.startswith(f"{hub.address}/me/pair/commit/")
    assert hub.created[0].get("private") is True or hub.created[0].get("visibility") == "private", hub.created
    assert hub.tokens - {None} == {"Bearer hf_of_the_environment"}
    again = NLA.from_pretrained("me/pair", device="cpu")
    acts = again.read(TEXTS[0])
    assert torch.equal(acts.vectors, pair.read(TEXTS[0]).vectors)
    assert torch.equal(again.reconstruct(["the cat."]), pair.reconstruct(["the cat."]))


def test_a_revision_is_a_branch_of_its_own(hub: Hub) -> None:
    pair = make_pair(scale=0.3, target="someone/target")
    pair.push_to_hub("me/pair")
    pair.metrics = {"data": "other texts"}
    pair.push_to_hub("me/pair", revision="second", commit_message="again")
    assert NLA.from_pretrained("me/pair", device="cpu").metrics == {}
    assert NLA.from_pretrained("me/pair", revision="second", device="cpu").metrics == {"data": "other texts"}
    with pytest.raises(HubError, match=r"without a revision 'third'.*check the revision"):
        NLA.from_pretrained("me/pair", revision="third")


def test_what_is_published_has_a_card_with_the_hubs_header_and_no_path_of_this_machine(
    hub: Hub, tmp_path: Path
) -> None:
    make_pair(target="someone/target").push_to_hub("me/pair")
    files = hub.repositories["me/pair"]["main"]
    _, header, text = files["README.md"].decode().split("---\n", 2)
    found = yaml.safe_load(header)
    assert (found["base_model"], found["library_name"]) == ("someone/target", "nla")
    assert "license" not in found
    assert 'NLA.from_pretrained("me/pair")' in text
    assert not any(str(tmp_path).encode() in data for data in files.values())


def test_whole_models_on_the_hub_are_pinned_and_their_weights_fetched_at_first_use(hub: Hub, tmp_path: Path) -> None:
    folders = pairs.full_pair(tmp_path / "full", "llama")
    commits = {name: hub.put(f"someone/{name}", folder) for name, folder in folders._asdict().items()}
    nla = kitft.load("someone/av", "someone/ar", "someone/target")
    nla.save_pretrained(tmp_path / "pair")
    assert nla.config.encoder_weights == WeightsConfig(source="someone/av", revision=commits["av"])

    def fetched() -> set[str]:
        weights = [path for path in hub.asked if path.startswith("GET") and path.endswith("/model.safetensors")]
        return {path.split("/")[2] for path in weights}

    assert fetched() == set()
    hub.put("someone/ar", folders.av)  # a later version of the repository is not what was imported
    hub.repositories["someone/ar"]["old"] = {str(p.name): p.read_bytes() for p in folders.ar.iterdir()}
    again = NLA.from_pretrained(tmp_path / "pair", device="cpu")
    local = kitft.load(folders.av, folders.ar, folders.target)
    assert torch.equal(again.reconstruct(["the cat."]), local.reconstruct(["the cat."]))
    assert fetched() == {"ar"}
    acts = again.read("the cat sat.")
    assert again.explain(acts, 1, max_new_tokens=4).texts == local.explain(acts, 1, max_new_tokens=4).texts
    again.push_to_hub("me/imported")
    assert set(hub.repositories["me/imported"]["main"]) >= {"nla_config.json", "decoder/head.safetensors"}
    with pytest.raises(ConfigError, match="encoder, decoder, target lie in folders"):
        local.push_to_hub("me/local")


def test_the_target_of_an_import_is_pinned_to_its_commit_if_the_hub_says_it(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = pairs.full_pair(tmp_path / "full", "llama")
    commit = hub.put("someone/base", folders.target)
    assert kitft.load(folders.av, folders.ar).config.target_revision == commit
    assert kitft.load(folders.av, folders.ar, target_revision="main").config.target_revision == commit
    assert kitft.load(folders.av, folders.ar, folders.target).config.target_revision is None
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert kitft.load(folders.av, folders.ar).config.target_revision is None
    assert kitft.load(folders.av, folders.ar, target_revision="v1").config.target_revision == "v1"


CARD = """---
license: mit
base_model: someone/old
tags:
- mine
- interpretability
---
Words of my own, before.

<!-- card -->
# Figures of yesterday
<!-- /card -->

<!-- transfer -->
## Transfer to a fine-tune
Verdict: read with care.
<!-- /transfer -->
"""


def check_card(text: str) -> None:
    """Header and generated part are new, all else is :data:`CARD`'s."""
    _, header, body = text.split("---\n", 2)
    found = yaml.safe_load(header)
    assert (found["license"], found["base_model"], found["library_name"]) == ("mit", "someone/target", "nla")
    assert found["tags"] == ["interpretability", "natural-language-autoencoder", "mine"]
    before, _, after = CARD.split("---\n", 2)[2].partition("<!-- card -->\n# Figures of yesterday\n<!-- /card -->")
    assert body.startswith(before) and body.endswith(after) and "yesterday" not in body
    assert 'NLA.from_pretrained("me/pair")' in body and "Trained on: four texts" in body


def test_a_folder_is_published_as_it_lies_there_with_its_card_and_without_its_target(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = make_pair(scale=0.3, target="someone/target")
    pair.metrics = {"data": "four texts"}
    pair.save_pretrained(tmp_path / "pair")
    (tmp_path / "pair" / "README.md").write_text(CARD)
    (tmp_path / "pair" / "notes.json").write_text('"of this machine"')
    assert main.main(["push", str(tmp_path / "pair"), "me/pair", "--private"]) == 0
    capsys.readouterr()
    assert not any("someone/target" in path for path in hub.asked)
    files = hub.repositories["me/pair"]["main"]
    check_card(files["README.md"].decode())
    assert set(files) == {*MANIFEST, "nla_config.json", "metrics.json", "README.md"}
    (tmp_path / "pair" / "decoder" / "head.safetensors").write_bytes(b"another")
    assert main.main(["push", str(tmp_path / "pair"), "me/pair"]) == 2
    assert "head.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["folder", "hub"])
def test_a_loaded_pair_is_published_with_the_card_that_it_was_loaded_with(
    hub: Hub, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_pair(scale=0.3, target="someone/target").save_pretrained(tmp_path / "pair")
    (tmp_path / "pair" / "README.md").write_text(CARD)
    if kind == "hub":
        hub.put("me/first", tmp_path / "pair")
    monkeypatch.chdir(tmp_path)
    pair = NLA.from_pretrained("pair" if kind == "folder" else "me/first", device="cpu")
    pair.metrics = {"data": "four texts"}
    monkeypatch.chdir("/")
    pair.push_to_hub("me/pair")
    check_card(hub.repositories["me/pair"]["main"]["README.md"].decode())


def test_a_card_that_somebody_wrote_anew_keeps_its_body(tmp_path: Path) -> None:
    new = card({}, make_pair(target="someone/target").config, "me/pair", local=False)
    assert renewed("", new) == new
    header, body = new.split("---\n", 2)[1], "# My pair\n\n---\nbelow a line\n"
    found = renewed(body, new).split("---\n", 2)
    assert yaml.safe_load(found[1]) == yaml.safe_load(header) and found[2] == body
    with pytest.raises(ConfigError, match="header"):
        renewed(f"---\n: [\n---\n{body}", new)


def test_a_pair_with_a_local_target_is_not_published(hub: Hub, tmp_path: Path) -> None:
    pair = make_pair(target=str(tmp_path / "target"))
    with pytest.raises(ConfigError, match=r"target lie in folders of this machine.*publish"):
        pair.push_to_hub("me/pair")
    pair.save_pretrained(tmp_path / "pair")
    with pytest.raises(ConfigError, match=r"target lie in folders of this machine.*publish"):
        push_folder(tmp_path / "pair", "me/pair")
    assert hub.created == []


@pytest.mark.parametrize(
    "name, named",
    [
        ("someone/gated", r"gated.*accept its terms.*hf auth login"),
        ("someone/missing", r"no repository.*check the name.*HF_TOKEN"),
        ("someone/else", r"no repository"),
    ],
)
def test_a_repository_that_is_gated_or_missing_is_refused_with_what_to_do(hub: Hub, name: str, named: str) -> None:
    with pytest.raises(AccessError, match=named) as caught:
        NLA.from_pretrained(name)
    assert "hf_of_the_environment" not in str(caught.value)


def test_a_gated_target_of_a_pair_is_refused_with_what_to_do(hub: Hub) -> None:
    make_pair(target="someone/gated").push_to_hub("me/pair")
    with pytest.raises(AccessError, match="someone/gated"):
        NLA.from_pretrained("me/pair")


@pytest.mark.parametrize("status, named", [(403, "may write"), (401, "may write|log in"), (400, "try again")])
def test_a_hub_that_refuses_to_be_written_to_is_an_error_that_says_so(hub: Hub, status: int, named: str) -> None:
    pair, hub.refuses = make_pair(target="someone/target"), status
    with pytest.raises(HubError, match=named):
        pair.push_to_hub("me/pair")


def test_a_hub_that_is_down_is_a_typed_error(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = make_pair(target="someone/target")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(hf_api.api, "endpoint", "http://127.0.0.1:9")
    with pytest.raises(HubError, match=r"cannot be reached.*connect"):
        pair.push_to_hub("me/pair")


def test_a_hub_that_cannot_be_reached_is_no_missing_pair(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"cannot be reached"):
        NLA.from_pretrained("someone/pair")


def test_a_name_that_is_none_is_refused(hub: Hub) -> None:
    with pytest.raises(HubError, match=r"correct the name"):
        make_pair(target="someone/target").push_to_hub("a/b/c")
    with pytest.raises(ConfigError, match="no pair"):
        NLA.from_pretrained("a/b/c")
    assert not issubclass(HubError, StorageError)


# The card

METRICS = {
    "recipe": "couplets",
    "joint": {
        "fve/global": 0.7123,
        "fve/newline": 0.8851,
        "difference/joint_minus_warm/global": 0.1573,
        "difference/truthful_minus_encoder/global": 0.0671,
    },
}


def rows_of(text: str) -> dict[str, str]:
    """The cells of all tables by their first column."""
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    return {row[0]: row[1] for row in cells}


def test_the_card_says_what_metrics_hold_and_invents_nothing() -> None:
    text = card(METRICS, make_pair().config)
    rows = rows_of(text)
    assert (rows["FVE"], rows["FVE in newline"]) == ("0.712", "0.885")
    assert rows["the decoder without an explanation"] == ABSENT
    assert [value for name, value in rows.items() if name.startswith("FVE of")] == ["0.157", "0.067"]
    assert "`resid_post.1`" in text
    assert "E|h − h̄|²" in text
    assert "Trained on: not recorded. Recipe: `couplets`" in text
    assert "0.7" not in card({}, make_pair().config)
    assert set(rows_of(card({}, make_pair().config)).values()) == {"value", "---", "FVE", ABSENT}


def test_the_card_prefers_a_score_with_its_intervals_and_baselines() -> None:
    pair = make_pair()
    acts = pair.read(TEXTS, strata=lambda number, spans: ["words"] * len(spans))
    pair.fit_baselines(acts)
    found = pair.score(acts, pair.reconstruct(pair.explain(acts, samples=1)), n_boot=50)
    rows = rows_of(card({"score": found.to_json(), "data": "four texts"}, pair.config))
    assert rows["FVE"] == f"{found.fve.value:.3f} [{found.fve.low:.3f}, {found.fve.high:.3f}]"
    assert rows["the decoder without an explanation"].startswith(f"{found.baselines['empty'].value:.3f}")
    assert "FVE in words" in rows


def test_the_card_reads_the_key_that_version_0_3_gave_the_baselines() -> None:
    figure = {"value": -0.25, "low": None, "high": None}
    score = {"n": 4, "fve": figure, "cosine": figure, "by_stratum": {}}
    for key in ("baselines", "rocks"):
        rows = rows_of(card({"score": {**score, key: {"empty": figure}}}, make_pair().config))
        assert rows["the decoder without an explanation"] == "-0.250"


def test_a_saved_folders_card_names_a_base_model_on_the_hub_and_no_folder(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "target")
    for target in (str(tmp_path / "target"), "someone/target"):
        make_pair(target=target).save_pretrained(tmp_path / "pair")
        header = yaml.safe_load((tmp_path / "pair" / "README.md").read_text().split("---\n")[1])
        assert header.pop("base_model", None) == (target if target == "someone/target" else None)
        assert header == {"library_name": "nla", "tags": ["interpretability", "natural-language-autoencoder"]}
        (tmp_path / "pair" / "README.md").unlink()


def test_a_card_may_hold_whatever_yaml_its_writer_chose() -> None:
    new = card({}, make_pair(target="someone/target").config, "me/pair", local=False)
    header = "2024: year\nlicense: mit\ndate: 2024-01-02\ntags: custom\n"
    renewed_header = yaml.safe_load(renewed(f"---\n{header}---\n# Mine\n", new).split("---\n", 2)[1])
    fresh = yaml.safe_load(new.split("---\n", 2)[1])
    assert renewed_header == yaml.safe_load(header) | fresh | {"tags": [*fresh["tags"], "custom"]}
