"""Linkers by name and parameters, as users write them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import pytest

from kvlink_core.errors import ConfigError, UnknownLinkerError
from kvlink_core.linking import get_linker, linker_names, register_linker, unregister_linker
from kvlink_core.linking.cacheblend import CacheBlend
from kvlink_core.linking.epic import Epic
from kvlink_core.linking.full import Full
from kvlink_core.linking.link_tokens import LinkTokensLinker
from kvlink_core.linking.reposition import Reposition


@pytest.mark.parametrize(
    ("spec", "linker"),
    [
        ("full", Full()),
        ("epic", Epic(16)),
        ("epic:k=50", Epic(50)),
        ("cacheblend", CacheBlend(0.15, 1)),
        ("cacheblend:ratio=0.15", CacheBlend()),
        ("cacheblend:layer=3,ratio=1", CacheBlend(1.0, 3)),
        ("cacheblend:ratio=1e-1", CacheBlend(0.1)),
        ("link-tokens:k=2", LinkTokensLinker(2)),
    ],
)
def test_parameters(spec: str, linker: object) -> None:
    assert get_linker(spec) == linker


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("epic:", "not of the form name:parameter=value"),
        ("epic:k", "not of the form"),
        ("epic:k=1,k=2", "not of the form"),
        ("epic:k=1,", "not of the form"),
        ("epic:j=1", r"linker 'epic' has no parameter 'j'; there is k \(default 16\)\."),
        ("cacheblend:share=1", r"there is ratio \(default 0.15\), layer \(default 1\)"),
        ("reposition:k=1", "linker 'reposition' has no parameter 'k'; it has none"),
        ("epic:k=", "k must be a whole number"),
        ("epic:k=1.5", "k must be a whole number"),
        ("epic:k=-1", "k is a number of tokens from 0 up, not -1"),
        ("cacheblend:ratio=most", "ratio must be a number"),
        ("cacheblend:ratio=1.01", "ratio is a share from 0 to 1, not 1.01"),
        ("cacheblend:ratio=-0.1", "ratio is a share"),
        ("cacheblend:ratio=nan", "ratio is a share"),
        ("cacheblend:layer=0", "layer must be 1 or more"),
    ],
)
def test_parameters_that_cannot_be(spec: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        get_linker(spec)
    assert caught.value.param == "linker"


@pytest.mark.parametrize("name", ["", "Epic", "epic ", "epic:k=1:k=2", "k=1", ":", "link_tokens"])
def test_unknown_names_are_answered_with_those_there_are(name: str) -> None:
    with pytest.raises((UnknownLinkerError, ConfigError)) as caught:
        get_linker(name)
    if isinstance(caught.value, UnknownLinkerError):
        assert all(known in str(caught.value) for known in linker_names())


@dataclass(frozen=True)
class Another(Reposition):
    share: float = 0.5
    name: ClassVar[str] = "another"


@pytest.fixture
def another() -> Iterator[type]:
    register_linker(Another)
    yield Another
    unregister_linker("another")


def test_registered_linkers_are_there_like_any_other(another: type) -> None:
    assert "another" in linker_names()
    assert get_linker("another:share=0.25") == another(0.25)
    with pytest.raises(ConfigError, match="there is a linker 'another' already"):
        register_linker(another)


def test_unregistered_linkers_are_gone() -> None:
    register_linker(Another)
    unregister_linker("another")
    assert "another" not in linker_names()
    for forget in (get_linker, unregister_linker):
        with pytest.raises(UnknownLinkerError, match="unknown linker 'another'"):
            forget("another")


def test_linkers_that_could_not_be_selected_are_not_registered() -> None:
    for name in ("", "a:b", "a,b", "a b", "k=1"):
        with pytest.raises(ConfigError, match="must be a word"):
            register_linker(type("Odd", (Another,), {"name": name}))

    @dataclass(frozen=True)
    class Needy(Reposition):
        label: str = "x"
        name: ClassVar[str] = "needy"

    with pytest.raises(ConfigError, match="'label' of linker 'needy' needs a whole or real number"):
        register_linker(Needy)
    assert "needy" not in linker_names()
