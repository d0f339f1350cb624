import json
import re
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Ge, Lt
from hypothesis import given
from hypothesis import strategies as st

from sparsegate.models.gates import HierarchicalGate
from sparsegate.models.translation import BlockConfig, DenseBlock, MixtureBlock, NoBlock
from sparsegate.recipes.small import small_4xlstm
from sparsegate.recipes.small_translation import small_translation_lstm
from sparsegate.training.config import RunConfig
from sparsegate.training.overrides import (
    from_json,
    options,
    paths_after,
    read_config,
    replace_by_path,
    to_json,
)


@dataclass(frozen=True, kw_only=True)
class Oak:
    kind: Literal["oak"] = "oak"
    height: Annotated[float, Ge(0)] = field(default=1.0, metadata={"doc": "in metres"})
    acorns: int = 7


@dataclass(frozen=True, kw_only=True)
class Fir:
    kind: Literal["fir"] = "fir"
    height: Annotated[float, Ge(0)] = 2.0
    rings: tuple[int, ...] = ()
    cones: int = 3
    max_cones: int = 9

    def __post_init__(self) -> None:
        if self.cones > self.max_cones:
            raise ValueError(f"cones ({self.cones}) must not exceed max_cones ({self.max_cones})")


@dataclass(frozen=True, kw_only=True)
class Wood:
    name: str
    tree: Oak | Fir
    second: Fir = Fir()
    share: Annotated[float, Ge(0), Lt(1)] = 0.5
    limit: int | None = None
    wet: bool = False
    season: Literal["spring", "autumn"] = "spring"
    folder: Path = Path("woods")


WOOD = Wood(name="w", tree=Oak())


def woods() -> st.SearchStrategy[Wood]:
    height, count = st.floats(0, 1e300), st.integers(0, 10**12)
    oaks = st.builds(Oak, height=height, acorns=count)
    firs = st.builds(Fir, height=height, rings=st.lists(count).map(tuple), cones=st.integers(0, 9))
    return st.builds(
        Wood,
        name=st.text(st.characters(codec="utf-8")),
        tree=oaks | firs,
        second=firs,
        share=st.floats(0, 1, exclude_max=True),
        limit=st.none() | count,
        wet=st.booleans(),
        season=st.sampled_from(["spring", "autumn"]),
    )


@given(woods())
def test_from_json_inverts_to_json(wood: Wood):
    assert from_json(Wood, json.loads(json.dumps(to_json(wood), allow_nan=False))) == wood


@given(woods(), woods())
def test_a_configuration_takes_all_values_of_another_as_text(wood: Wood, other: Wood):
    if "none" in (other.name.lower(), wood.name.lower()):
        return
    texts = {
        option.path: ",".join(map(str, value)) if isinstance(value := option.value, tuple) else str(value)
        for option in options(other)
    }
    assert replace_by_path(wood, texts) == other


@pytest.mark.parametrize(
    ("path", "text", "change"),
    [
        ("name", "5", {"name": "5"}),
        ("limit", "64", {"limit": 64}),
        ("limit", "None", {"limit": None}),
        ("share", "5e-2", {"share": 0.05}),
        ("wet", "true", {"wet": True}),
        ("season", "autumn", {"season": "autumn"}),
        ("folder", "a/b", {"folder": Path("a/b")}),
        ("tree.acorns", "8", {"tree": Oak(acorns=8)}),
        ("second.rings", "1, 2", {"second": Fir(rings=(1, 2))}),
        ("second.rings", "", {"second": Fir(rings=())}),
        ("tree.kind", "fir", {"tree": Fir(height=1.0)}),
    ],
)
def test_text_is_read_as_the_type_of_its_field(path: str, text: str, change: dict[str, Any]):
    assert replace_by_path(WOOD, {path: text}) == replace(WOOD, **change)


def test_values_that_are_no_text_keep_their_type():
    assert replace_by_path(WOOD, {"share": 0.25, "second.rings": (3,), "limit": None}) == replace(
        WOOD, share=0.25, second=Fir(rings=(3,))
    )


def test_fields_of_one_section_change_together():
    both = replace_by_path(WOOD, {"second.cones": "20", "second.max_cones": "30"})
    assert (both.second.cones, both.second.max_cones) == (20, 30)


def test_a_new_kind_may_bring_its_fields():
    changed = replace_by_path(WOOD, {"tree.cones": "2", "tree.kind": "fir", "tree.height": "9"})
    assert changed.tree == Fir(cones=2, height=9.0)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("naem", "x", "naem: no such field; did you mean name?"),
        ("tree.acorn", "1", "tree.acorn: no such field; did you mean tree.acorns?"),
        ("acorns", "1", "acorns: no such field; did you mean tree.acorns?"),
        ("tree.zzzz", "1", "tree.zzzz: no such field"),
        ("tree.cones", "1", "tree.cones: no such field; did you mean second.cones?"),
        ("second.kind", "oak", "second.kind: no such field; did you mean tree.kind?"),
        ("share", "x", "share (x) should be a valid number"),
        ("share", "1", "share (1) should be less than 1"),
        ("share", "nan", "share (nan) should be a finite number"),
        ("tree.height", "-1", "tree.height (-1) should be greater than or equal to 0"),
        ("tree.acorns", "2.5", "tree.acorns (2.5) should be a valid integer"),
        ("tree.acorns", True, "tree.acorns (True) should be a valid integer"),
        ("second.rings", "1,x", "second.rings (1,x) should be a valid integer"),
        ("second.cones", "10", "second.cones (10) must not exceed max_cones (9)"),
        ("season", "summer", "season (summer) should be 'spring' or 'autumn'"),
        ("wet", "perhaps", "wet (perhaps) should be a valid boolean"),
        ("tree.kind", "elm", "tree.kind ('elm') should be one of oak, fir"),
    ],
)
def test_what_cannot_be_changed_is_refused_in_one_line(path: str, value: object, message: str):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        replace_by_path(WOOD, {path: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"naem": "x"}, "naem: no such field; did you mean name?"),
        ({"tree": {"kind": "oak", "acorn": 1}}, "tree.acorn: no such field; did you mean tree.acorns?"),
        ({"tree": {"kind": "oak", "acorns": "1"}}, "tree.acorns ('1') should be a valid integer"),
        ({"tree": {"kind": "oak", "acorns": True}}, "tree.acorns (True) should be a valid integer"),
        ({"tree": {"kind": "oak", "acorns": 1.5}}, "tree.acorns (1.5) should be a valid integer"),
        ({"tree": {"acorns": 1}}, "tree.kind (None) should be one of oak, fir"),
        ({"tree": {"kind": "elm"}}, "tree.kind ('elm') should be one of oak, fir"),
        ({"tree": [1]}, "tree ([1]) should be a JSON object"),
        ({"second": {"cones": 10}}, "second.cones (10) must not exceed max_cones (9)"),
        ({"share": 1}, "share (1) should be less than 1"),
        ({"limit": "none"}, "limit ('none') should be a valid integer"),
        ({"name": None}, "name (None) should be a valid string"),
    ],
)
def test_json_that_does_not_fit_is_refused_in_one_line(change: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        from_json(Wood, to_json(WOOD) | change)


def test_a_missing_field_without_default_is_refused():
    with pytest.raises(ValueError, match="^name: is missing"):
        from_json(Wood, {"tree": {"kind": "oak"}})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.dictionaries(st.sampled_from([*to_json(WOOD), "naem"]), JSON, max_size=3),
    st.dictionaries(st.sampled_from([*to_json(WOOD.second)]), JSON, max_size=3),
)
def test_any_other_json_is_refused_or_is_a_wood(outer: dict[str, Any], inner: dict[str, Any]):
    data = to_json(WOOD) | {"tree": inner} | outer
    try:
        wood = from_json(Wood, data)
    except ValueError as refused:
        assert len(str(refused)) < 300
    else:
        assert isinstance(wood, Wood)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b"[1]", b"NaN", b"[" * 100_000, b'{"name": 1}', b'{"a": 1, "a": 1}']
)
def test_a_broken_file_is_refused_by_name(tmp_path: Path, content: bytes):
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{file}: "):
        read_config(Wood, file)


@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 3), st.binary(max_size=4)), min_size=1, max_size=4),
)
def test_a_damaged_file_is_refused_in_one_line_or_is_a_wood(damages: list[tuple[float, int, bytes]]):
    content = json.dumps(to_json(WOOD), indent=2).encode()
    for where, length, replacement in damages:
        first = int(where * len(content))
        content = content[:first] + replacement + content[first + length :]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "config.json")
        file.write_bytes(content)
        try:
            wood = read_config(Wood, file)
        except ValueError as refused:
            assert str(refused).startswith(f"{file}: ")
            assert "\n" not in str(refused)
        else:
            assert from_json(Wood, to_json(wood)) == wood


def test_options_tell_path_type_value_and_meaning():
    (height,) = (option for option in options(WOOD) if option.path == "tree.height")
    assert (height.type, height.value, height.doc) == ("float", 1.0, "in metres")
    assert [option.type for option in options(WOOD) if option.path in ("tree.kind", "limit", "season")] == [
        "oak|fir",
        "int|none",
        "spring|autumn",
    ]


def test_every_field_of_a_run_says_what_it_means():
    from sparsegate.recipes.registry import RECIPES

    for recipe in RECIPES.values():
        run = recipe()
        assert [option.path for option in options(run) if not option.doc] == []
        assert from_json(RunConfig, to_json(run)) == run


def test_sections_within_sections_become_of_another_kind_with_their_fields():
    run = replace_by_path(
        small_4xlstm(),
        {
            "model.gate.num_groups": "3",
            "model.kind": "mixture",
            "model.gate.kind": "hierarchical",
            "model.num_experts": "6",
            "model.k": "4",
            "model.hidden": "8",
        },
    )
    assert run.model.gate == HierarchicalGate(num_groups=3)
    assert from_json(RunConfig, to_json(run)) == run
    with pytest.raises(ValueError, match=r"^model.gate.num-groups \(4\) must divide model.num-exp"):
        replace_by_path(run, {"model.gate.num_groups": "4"})
    with pytest.raises(ValueError, match=r"^model.gate.jitter: no such field"):
        replace_by_path(run, {"model.gate.jitter": "0.1"})


MIXTURE = MixtureBlock(
    num_experts=8, k=4, hidden=16, gate=HierarchicalGate(num_groups=4, primary="balanced", most_groups=3)
)
BLOCKS: tuple[BlockConfig, ...] = (NoBlock(), DenseBlock(hidden=16), MIXTURE)


@pytest.mark.parametrize("before", BLOCKS)
@pytest.mark.parametrize("after", BLOCKS)
def test_a_block_of_any_kind_becomes_one_of_any_other(before: BlockConfig, after: BlockConfig):
    run = small_translation_lstm()
    run = replace(run, model=replace(run.model, encoder_block=before))
    with_after = replace(run, model=replace(run.model, encoder_block=after))
    prefix = "model.encoder_block."
    # As text, and the innermost first: the order is of no concern.
    changes = {
        option.path: str(option.value)
        for option in reversed(list(options(with_after)))
        if option.path.startswith(prefix)
    }
    assert replace_by_path(run, changes) == with_after
    assert set(changes) == {path for path in paths_after(run, changes) if path.startswith(prefix)}


def test_a_model_of_another_kind_has_the_sections_that_it_needs():
    model = small_translation_lstm().model
    all_options = options(small_translation_lstm())
    changes = {
        each.path: "none" if each.value == () else str(each.value)
        for each in all_options
        if each.path.startswith("model.")
    }
    changes["batches.kind"] = "parallel"
    assert replace_by_path(small_4xlstm(), changes).model == model
    del changes["model.encoder_block.kind"]
    with pytest.raises(ValueError, match=r"^model.encoder_block: is missing; it has no default$"):
        replace_by_path(small_4xlstm(), changes)
