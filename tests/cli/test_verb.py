"""Options that are fields of a configuration."""

import re
from argparse import BooleanOptionalAction, Namespace
from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest
from annotated_types import Ge

from sparsegate.cli.verb import Parser, Verb, parse, with_flags


@dataclass(frozen=True, kw_only=True)
class Pot:
    kind: Literal["pot"] = "pot"
    num_plants: Annotated[int, Ge(1)] = field(default=3, metadata={"doc": "plants in it, 100% alive"})


@dataclass(frozen=True, kw_only=True)
class Bed:
    kind: Literal["bed"] = "bed"
    rows: tuple[int, ...] = (1, 2)


@dataclass(frozen=True, kw_only=True)
class Greenhouse:
    kind: Literal["greenhouse"] = "greenhouse"
    num_panes: int
    under_it: Pot | Bed = Pot()


@dataclass(frozen=True, kw_only=True)
class Garden:
    place: Pot | Bed | Greenhouse = field(default=Pot(), metadata={"doc": "where it grows"})
    seed: int = 1


def add_arguments(parser: Parser) -> None:
    parser.add_argument("name")
    parser.add_argument("--water", type=int, default=0)
    parser.add_argument("--quick", action="store_true")


def config(args: Namespace) -> Garden | None:
    if args.name is None:
        return None
    if args.name != "balcony":
        raise ValueError(f"{args.name}: no such garden")
    return Garden()


def sow(parser: Parser) -> None:
    parser.add_argument("packet")
    parser.add_argument("--depth", type=int, dest="depth_cm")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--is-deep", action=BooleanOptionalAction)


SOW = Verb(example="sparsegate sow", add_arguments=sow, run=lambda args: 0)
GROW = Verb(
    example="sparsegate grow balcony --seed 3", add_arguments=add_arguments, run=lambda args: 0, config=config
)


def grow(line: str) -> Namespace:
    return parse(GROW, line.split(), name="grow", summary="Grow a garden.")


@pytest.mark.parametrize(
    "line",
    [
        "balcony --place.num-plants 64 --seed 3 --water 2",
        "--place.num-plants 64 --seed 3 --water 2 balcony",
        "--seed=3 --water=2 --place.num-plants=64 -- balcony",
        "--place.num_plants 64 --seed 1 balcony --water 2 --seed 3",
    ],
)
def test_options_of_the_verb_and_of_the_configuration_stand_in_any_order(line: str):
    args = grow(line)
    assert args.config == Garden(place=Pot(num_plants=64), seed=3)
    assert (args.name, args.water, args.quick) == ("balcony", 2, False)


def test_a_section_changes_its_kind_and_fields_at_once():
    assert grow("balcony --place.rows 4,5 --place.kind bed").config == Garden(place=Bed(rows=(4, 5)))


def test_a_section_becomes_one_that_has_no_defaults_and_has_sections_of_its_own():
    line = "balcony --place.under-it.rows 7,8 --place.under-it.kind bed --place.kind greenhouse"
    garden = Garden(place=Greenhouse(num_panes=40, under_it=Bed(rows=(7, 8))))
    assert grow(f"{line} --place.num-panes 40").config == garden
    with pytest.raises(ValueError, match=r"^place.num_panes: is missing; it has no default$"):
        grow(line)


def test_a_negative_number_is_a_value():
    assert grow("balcony --seed -3 --quick").config.seed == -3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "balcony --place.num-plant 4",
            "--place.num-plant: no such option; did you mean --place.num-plants?",
        ),
        ("balcony --num-plants 4", "--num-plants: no such option; did you mean --place.num-plants?"),
        ("balcony --qick", "--qick: no such option; did you mean --quick?"),
        ("balcony --place.rows 4", "--place.rows: no such option; did you mean --place.kind?"),
        ("balcony --seed", "--seed: needs a value after it"),
        ("balcony --seed --quick", "--seed: needs a value after it"),
        ("balcony --seed x", "seed (x) should be a valid integer"),
        ("balcony --place.num-plants 0", "place.num_plants (0) should be greater than or equal to 1"),
        ("balcony --place.kind bde", "place.kind ('bde') should be one of pot, bed, greenhouse"),
        ("balcony --place.kind", "--place.kind: needs a value after it"),
        ("balcony --plaec.kind bed", "--plaec.kind: no such option; did you mean --place.kind?"),
        (
            "balcony --place.kind bed --place.under-it.kind pot",
            "--place.under-it.kind: no such option; did you mean --place.kind?",
        ),
        ("roof --seed 3", "roof: no such garden"),
        ("--seed 3", "the following arguments are required: name; see sparsegate grow --help"),
        ("balcony roof", "unrecognized arguments: roof; see sparsegate grow --help"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(line: str, message: str):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        grow(line)


def help_of(line: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit):
        grow(line)
    return " ".join(capsys.readouterr().out.split())


def test_help_lists_the_fields_of_what_was_named(capsys: pytest.CaptureFixture[str]):
    text = help_of("balcony --help", capsys)
    assert "example: sparsegate grow balcony --seed 3" in text
    assert "--place.kind pot|bed|greenhouse where it grows [pot]" in text
    assert "--place.num-plants int plants in it, 100% alive [3]" in text
    assert "--seed int [1]" in text


def test_help_without_a_name_tells_how_to_see_the_fields(capsys: pytest.CaptureFixture[str]):
    text = help_of("--help", capsys)
    assert "--place" not in text
    assert "Give --help after the name" in text


def test_help_of_what_does_not_exist_is_an_error():
    with pytest.raises(ValueError, match="roof: no such garden"):
        grow("roof --help")


@pytest.mark.parametrize(
    ("of_the_library", "told"),
    [
        ("depth_cm (-1) must be at least 0", "--depth (-1) must be at least 0"),
        ("line 3: a stone; a greater depth_cm goes on", "line 3: a stone; a greater --depth goes on"),
        ("seeds (0) must be at least 1", "--seeds (0) must be at least 1"),
        ("there are no seeds (at all)", "there are no seeds (at all)"),
        ("a packet of 3 with seeds (4)", "a packet of 3 with --seeds (4)"),
        ("packet (x) is empty", "packet (x) is empty"),
        ("seeds: none is left", "--seeds: none is left"),
        ("sow (a).txt: No such file", "sow (a).txt: No such file"),
        ("texts/seeds (2).txt: No such file", "texts/seeds (2).txt: No such file"),
        ("there is no field 'depth_cm'", "there is no field 'depth_cm'"),
        ("bed.json: depth_cm (3) is damaged", "bed.json: depth_cm (3) is damaged"),
        ("its call raised ValueError: depth_cm (3)", "its call raised ValueError: depth_cm (3)"),
        ("the user's depth_cm: not a bed", "the user's depth_cm: not a bed"),
        ("every depth_cm, flat", "every --depth, flat"),
        ("is_deep (3) is no depth", "--is-deep (3) is no depth"),
        ("a/depth_cm: No such file", "a/depth_cm: No such file"),
        ("depth_cm.txt: No such file", "depth_cm.txt: No such file"),
        ("bed.depth_cm (3), soil_depth_cm", "bed.depth_cm (3), soil_depth_cm"),
    ],
)
def test_messages_name_options_instead_of_arguments(of_the_library: str, told: str):
    assert with_flags(of_the_library, SOW, ["the user's depth_cm", "--seeds", "3"]) == told
