"""Configurations as dataclasses: values and errors that their annotations give, for reading and for checking."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from common.errors import UsageError
from common.files.json_types import Between, Each, ListOf, Matching, OneOf
from common.typed_config import check_fields, read_mapping


@dataclass(frozen=True)
class Part:
    """A nested mapping."""

    weight: float
    name: str | None = None


@dataclass(frozen=True)
class Example:
    """One field for each kind of annotation."""

    model: str
    part: Part = field(default_factory=lambda: Part(1.0))
    folder: Path | None = None
    seeds: Annotated[tuple[int, ...], ListOf(int, least=1)] = (42,)
    share: Annotated[float, Between(0, 1, numbers=True, above=True)] = 0.5
    keep: Literal["all", "scores"] = "all"
    jobs: Literal["in_process"] | Annotated[int, Between(1)] = 1
    entries: tuple[str | Part, ...] = ()
    limits: Annotated[Mapping[str, int], Each(int)] = field(default_factory=dict)
    pattern: Annotated[str, Matching("(?s).*", "a regular expression")] | None = None
    dtype: Annotated[str, OneOf(("float32", "bfloat16"))] = "float32"
    debug: bool = False
    rest: Any = None


def test_values_get_the_types_of_their_annotations() -> None:
    """Lists become tuples, mappings dataclasses, texts paths and whole numbers floats; the rest is at its default."""
    document = {
        "model": "m", "part": {"weight": 2}, "folder": "~/x", "seeds": [1, 2], "share": 1, "jobs": "in_process",
        "entries": ["a", {"weight": 3, "name": "b"}], "limits": {"mmlu": 5, 3: 1}, "rest": [{"any": "thing"}],
    }  # fmt: skip
    assert read_mapping(Example, document) == Example(
        "m", Part(2.0), Path.home() / "x", (1, 2), 1.0, "all", "in_process", ("a", Part(3.0, "b")), {"mmlu": 5, "3": 1},
        rest=[{"any": "thing"}],
    )  # fmt: skip
    assert type(read_mapping(Example, document).share) is float
    assert read_mapping(Example, {"model": "m"}) == Example("m")


@pytest.mark.parametrize(
    ("document", "sentence"),
    [
        ({}, "f.yaml: model is missing."),
        (None, "f.yaml: its content must be an object, found None."),
        ({"modle": "m"}, "f.yaml: there is no key 'modle'. Did you mean 'model'?"),
        ({"model": "m", "part": {"wieght": 1}}, "f.yaml: there is no key 'part.wieght'. Did you mean 'weight'?"),
        ({"model": "m", "part": {"weight": True}}, "f.yaml: part.weight must be a number, found True."),
        ({"model": "m", "seeds": []}, "f.yaml: seeds must be a list with at least 1 entry, found []."),
        ({"model": "m", "seeds": [1, "2"]}, "f.yaml: seeds[1] must be a whole number, found '2'."),
        ({"model": "m", "share": 0}, "f.yaml: share must be a number above 0 and at most 1, found 0."),
        ({"model": "m", "share": float("nan")}, "f.yaml: share must be a number above 0 and at most 1, found nan."),
        ({"model": "m", "keep": "al"}, "f.yaml: keep must be one of all, scores, found 'al'. Did you mean 'all'?"),
        ({"model": "m", "jobs": 0}, "f.yaml: jobs must be in_process or a whole number from 1, found 0."),
        ({"model": "m", "entries": [3]}, "f.yaml: entries[0] must be text or an object, found 3."),
        ({"model": "m", "limits": {"a": None}}, "f.yaml: limits.a must be a whole number, found None."),
        ({"model": "m", "debug": 1}, "f.yaml: debug must be true or false, found 1."),
        ({"model": "m", "debug": None}, "f.yaml: debug must be true or false, found None."),
    ],
)  # fmt: skip
def test_an_error_names_file_key_expected_and_found(document: object, sentence: str) -> None:
    """Each mistake is one sentence; an unknown key or word also names the nearest one."""
    with pytest.raises(UsageError) as caught:
        read_mapping(Example, document, "f.yaml")
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"dtype": "float33"}, "--dtype must be one of float32, bfloat16, found 'float33'. Did you mean 'float32'?"),
        ({"share": 1.5}, "--share must be a number above 0 and at most 1, found 1.5."),
        ({"pattern": 3}, "--relax_include must be a regular expression, found 3."),
        ({"seeds": (True,)}, "--seeds[0] must be a whole number, found True."),
    ],
)
def test_fields_of_an_object_are_checked_by_the_same_annotations(changes: dict[str, Any], sentence: str) -> None:
    """A dataclass made in Python is checked as a file is, by the names of its flags."""
    check_fields(Example("m"))
    with pytest.raises(UsageError) as caught:
        check_fields(replace(Example("m"), **changes), {"pattern": "relax_include"})
    assert str(caught.value) == sentence
