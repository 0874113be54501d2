"""From what is typed to a checkpoint folder, and every way that can fail."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import huggingface_hub
import huggingface_hub.errors as hub_errors
import pytest

from svdprune.exporter.source import ALIASES, locate, shipped_folder
from svdprune.runtime.errors import UserError


def hub_error(kind: type[Exception]) -> Exception:
    answered = issubclass(kind, hub_errors.HfHubHTTPError)
    return kind("refused", response=Mock(headers={}, request=Mock())) if answered else kind("refused")


def test_the_shipped_model_is_found_by_name() -> None:
    source = locate("mini-llava")
    assert source.checkpoint.folder == shipped_folder()
    assert source.checkpoint.config["model_type"] == "llava"


def test_a_folder_is_taken_as_it_is(tiny_llava: Path) -> None:
    source = locate(str(tiny_llava))
    assert (source.id, source.revision) == (tiny_llava.name, None)


@pytest.mark.parametrize(
    ("typed", "meant"), [("mini-lava", "mini-llava"), ("lava", "llava"), ("minillava", "mini-llava")]
)
def test_near_misses_are_suggested(typed: str, meant: str) -> None:
    with pytest.raises(UserError, match=f"no model '{typed}': did you mean.*{meant}"):
        locate(typed)


def test_a_name_like_nothing_lists_what_there_is() -> None:
    with pytest.raises(UserError, match="known names are mini-llava, llava"):
        locate("zzzzzz")


def test_a_path_that_is_not_there_is_not_taken_for_a_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Mock(side_effect=AssertionError))
    with pytest.raises(UserError, match="no folder at"):
        locate("./models/none")


def test_an_alias_is_fetched_by_its_hub_id(tiny_llava: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch = Mock(return_value=str(tiny_llava))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    source = locate("llava", revision="main")
    assert fetch.call_args.args == (ALIASES["llava"],)
    assert fetch.call_args.kwargs["revision"] == "main"
    assert "*.safetensors" in fetch.call_args.kwargs["allow_patterns"]
    assert (source.id, source.revision) == (ALIASES["llava"], tiny_llava.name)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (hub_errors.LocalEntryNotFoundError, "hub cannot be reached for owner/name"),
        (hub_errors.OfflineModeIsEnabled, "hub cannot be reached for owner/name"),
        (hub_errors.HfHubHTTPError, "hub cannot be reached for owner/name"),
        (hub_errors.RepositoryNotFoundError, "hub has no model owner/name"),
        (hub_errors.GatedRepoError, "wants its licence accepted"),
        (hub_errors.RevisionNotFoundError, "no revision 'v9'"),
    ],
)
def test_what_the_hub_says_becomes_one_sentence(
    kind: type[Exception], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Mock(side_effect=hub_error(kind)))
    with pytest.raises(UserError, match=said):
        locate("owner/name", revision="v9")


def test_a_hub_that_is_offline_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="hub cannot be reached"):
        locate("no-such-owner/no-such-name")
