"""The text form of reductions, interventions and grids."""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from decimal import Decimal
from itertools import product
from pathlib import Path

import pytest

from laserlm.errors import LaserError, MatrixError, SpecError
from laserlm.reductions import GROUPS, Components, Grid, Intervention, Layers, Reduction, Size, from_rate, short_form

FORM = "write LAYERS.MATRIX@SIZE"
SIZE_FORM = "write a kept fraction such as 0.01 or a rank such as r40"
OPTIONS = "':bottom', ':reference' and ':splitK' (K from 1) are known"


def spec_error(read: Callable[[str], object], text: str) -> str:
    """Return the message with which ``read`` refuses ``text``."""
    with pytest.raises(SpecError) as caught:
        read(text)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("27.fc_in@0.01", "27.fc_in@0.01"),
        ("27.fc_in@0.010", "27.fc_in@0.01"),
        ("27.fc_in@.5", "27.fc_in@0.5"),
        ("27.fc_in@1e-2", "27.fc_in@0.01"),
        ("27.fc_in@25E-4", "27.fc_in@0.0025"),
        ("27.fc_in@1.0", "27.fc_in@1"),
        ("27.fc_in@1.", "27.fc_in@1"),
        ("27.fc_in@0", "27.fc_in@0"),
        ("27.fc_in@0.00", "27.fc_in@0"),
        ("27.fc_in@0e3", "27.fc_in@0"),
        ("27.fc_in@r40", "27.fc_in@r40"),
        ("27.fc_in@r040", "27.fc_in@r40"),
        ("27.fc_in@r0", "27.fc_in@r0"),
        ("027.fc_in@r1", "27.fc_in@r1"),
        ("5-5.mlp@0.1", "5.mlp@0.1"),
        ("05-7.mlp@0.1", "5-7.mlp@0.1"),
        ("all.fc_out@0.50", "all.fc_out@0.5"),
        ("top4.all@0.25", "top4.all@0.25"),
        ("top04.all@0.25", "top4.all@0.25"),
        ("  3.attn@0.1 ", "3.attn@0.1"),
        ("3.fc_in@0.1:bottom", "3.fc_in@0.1:bottom"),
        ("3.fc_in@0.10:reference", "3.fc_in@0.1:reference"),
        ("encoder.3.fc_in@0.10", "encoder.3.fc_in@0.1"),
        ("vision.tower.0-2.attn@r1", "vision.tower.0-2.attn@r1"),
        ("0.experts.2.fc_in@0.1", "0.experts.2.fc_in@0.1"),
        ("0.cross_q_proj@0.1", "0.cross_q_proj@0.1"),
        ("27.fc_in@drop3", "27.fc_in@drop3"),
        ("27.fc_in@drop0-0", "27.fc_in@drop0"),
        ("27.fc_in@drop17-20,03,0", "27.fc_in@drop0,3,17-20"),
        ("27.fc_in@drop2,1,0,4,5-6", "27.fc_in@drop0-2,4-6"),
        ("encoder.all.mlp@drop1,0:split2", "encoder.all.mlp@drop0-1:split2"),
        ("27.fc_in@scale3=0.40", "27.fc_in@scale3=0.4"),
        ("27.fc_in@scale7=-.5,17-20=1.250,3=4E1,21=1.25", "27.fc_in@scale3=40,7=-0.5,17-21=1.25"),
        ("27.fc_in@scale3=0,4=-0.0,5=2", "27.fc_in@scale3-4=0,5=2"),
        ("27.fc_in@scale3=0,4=0", "27.fc_in@drop3-4"),
    ],
)
def test_equal_reductions_print_one_canonical_text(text: str, canonical: str) -> None:
    assert str(Reduction.parse(text)) == canonical
    assert Reduction.parse(text) == Reduction.parse(canonical)
    assert hash(Reduction.parse(text)) == hash(Reduction.parse(canonical))
    assert str(Grid.parse(text)) == canonical


def test_every_combination_of_the_parts_of_a_reduction_round_trips() -> None:
    stacks = ["", "encoder.", "vision.tower."]
    layers = ["0", "27", "3-11", "all", "top2"]
    matrices = ["q_proj", "fc_in", "attn", "mlp", "all", "experts.0.fc_up"]
    sizes = ["0", "0.0025", "0.75", "1", "r0", "r40"]
    options = ["", ":bottom", ":reference", ":split4", ":bottom:split2"]
    kept = list(product(sizes, options)) + list(product(["drop3", "drop0,3,17-20", "scale3=0.4,17-20=-1.25"], ["", ":split4"]))
    texts = [f"{s}{lay}.{m}@{z}{o}" for s, lay, m, (z, o) in product(stacks, layers, matrices, kept)]
    read = [Reduction.parse(text) for text in texts]
    assert [str(r) for r in read] == texts
    assert len(set(read)) == len(texts) == 3 * 5 * 6 * (6 * 5 + 3 * 2)


def test_each_part_of_the_text_lands_in_its_field() -> None:
    assert Reduction.parse("encoder.20-27.fc_up@0.075:bottom") == Reduction(
        layers=Layers(first=20, last=27), matrix="fc_up", size=Size(rho=Decimal("0.075")), keep="bottom", stack="encoder"
    )
    assert Reduction.parse("top4.all@r5:reference") == Reduction(
        layers=Layers(top=4), matrix="all", size=Size(rank=5), method="reference"
    )
    assert Reduction.parse("3.fc_in@0.1:split4") == Reduction(
        layers=Layers(first=3, last=3), matrix="fc_in", size=Size(rho=Decimal("0.1")), split=4
    )
    assert str(Reduction.parse("3.fc_in@0.1:split1")) == "3.fc_in@0.1"
    assert Reduction.parse("all.qkv@1") == Reduction(layers=Layers(), matrix="qkv", size=Size(rho=Decimal(1)))


def test_without_options_the_largest_values_of_the_exact_decomposition_are_kept() -> None:
    reduction = Reduction.parse("3.fc_in@0.1")
    assert (reduction.keep, reduction.method, reduction.stack) == ("top", "exact", "")


def test_a_different_keep_method_stack_or_kind_of_size_is_a_different_reduction() -> None:
    texts = ["3.fc_in@0.1", "3.fc_in@0.1:bottom", "3.fc_in@0.1:reference", "decoder.3.fc_in@0.1", "3.fc_in@r1", "3.fc_in@1"]
    assert len({Reduction.parse(t) for t in texts}) == len(texts)


@pytest.mark.parametrize(
    ("text", "named", "next_step"),
    [
        ("", "''", FORM),
        ("27", "'27'", FORM),
        ("27.fc_in", "'27.fc_in'", FORM),
        ("27.fc_in@", "'27.fc_in@'", FORM),
        ("@0.1", "'@0.1'", FORM),
        ("fc_in@0.1", "'fc_in@0.1'", FORM),
        (".fc_in@0.1", "'.fc_in@0.1'", FORM),
        ("27.@0.1", "'27.@0.1'", FORM),
        ("27@0.1", "'27@0.1'", FORM),
        ("27.fc-in@0.1", "'27.fc-in@0.1'", FORM),
        ("27. fc_in@0.1", "'27. fc_in@0.1'", FORM),
        ("-1.fc_in@0.1", "'-1.fc_in@0.1'", FORM),
        ("3-.fc_in@0.1", "'3-.fc_in@0.1'", FORM),
        ("top.fc_in@0.1", "'top.fc_in@0.1'", FORM),
        ("topx.fc_in@0.1", "'topx.fc_in@0.1'", FORM),
        ("last.fc_in@0.1", "'last.fc_in@0.1'", FORM),
        ("top0.fc_in@0.1", "'top0'", "write top1"),
        ("27-20.fc_in@0.1", "'27-20'", "write 20-27"),
        ("27.fc_in@x", "'x'", SIZE_FORM),
        ("27.fc_in@1%", "'1%'", SIZE_FORM),
        ("27.fc_in@r", "'r'", SIZE_FORM),
        ("27.fc_in@r-1", "'r-1'", SIZE_FORM),
        ("27.fc_in@r4.5", "'r4.5'", SIZE_FORM),
        ("27.fc_in@R40", "'R40'", SIZE_FORM),
        ("27.fc_in@0,1e", "'1e'", SIZE_FORM),
        ("27.fc_in@0.1,", "''", SIZE_FORM),
        ("27.fc_in@0.1@0.2", "'0.1@0.2'", SIZE_FORM),
        ("27.fc_in@drop", "''", "write numbers and ranges such as drop0,3,17-20"),
        ("27.fc_in@drop1,", "''", "write numbers and ranges such as drop0,3,17-20"),
        ("27.fc_in@drop-1", "'-1'", "write numbers and ranges such as drop0,3,17-20"),
        ("27.fc_in@drop1.5", "'1.5'", "write numbers and ranges such as drop0,3,17-20"),
        ("27.fc_in@drop3-1", "'3-1'", "write 1-3"),
        ("27.fc_in@drop3,3", "component 3 is listed twice", "list each component once"),
        ("27.fc_in@drop1-4,3", "component 3 is listed twice", "list each component once"),
        ("27.fc_in@0.5,drop3", "mixes kept sizes with 'drop'", "joined by '+'"),
        ("27.fc_in@drop3:bottom", "27.fc_in@drop3:bottom", "leave out ':bottom' and ':reference'"),
        ("27.fc_in@drop3:reference", "27.fc_in@drop3:reference", "leave out ':bottom' and ':reference'"),
        ("27.fc_in@scale", "''", "such as scale3=0.4"),
        ("27.fc_in@scale3", "'3'", "such as scale3=0.4"),
        ("27.fc_in@scale3=", "'3='", "such as scale3=0.4"),
        ("27.fc_in@scale3=x", "'3=x'", "such as scale3=0.4"),
        ("27.fc_in@scalex=2", "'x'", "write numbers and ranges"),
        ("27.fc_in@scale3=nan", "NaN", "from -1000 to 1000"),
        ("27.fc_in@scale3=1001", "1001", "from -1000 to 1000"),
        ("27.fc_in@scale3=1E-19", "1E-19", "18 decimal places"),
        ("27.fc_in@scale3=1.0", "component 3 has the strength 1", "leave it out"),
        ("27.fc_in@scale3=2,1-4=0.5", "component 3 is listed twice", "list each component once"),
        ("27.fc_in@0.5,scale3=2", "mixes kept sizes with 'scale'", "joined by '+'"),
        ("27.fc_in@scale3=2:bottom", "27.fc_in@scale3=2:bottom", "leave out ':bottom' and ':reference'"),
        ("27.fc_in@0.1:", "'27.fc_in@0.1:'", OPTIONS),
        ("27.fc_in@0.1:top", "'27.fc_in@0.1:top'", OPTIONS),
        ("27.fc_in@0.1:Bottom", "'27.fc_in@0.1:Bottom'", OPTIONS),
        ("27.fc_in@0.1:bottom:bottom", "'27.fc_in@0.1:bottom:bottom'", OPTIONS),
        ("27.fc_in@-0.01", "-0.01", "from 0 to 1"),
        ("27.fc_in@1.01", "1.01", "from 0 to 1"),
        ("27.fc_in@40", "40", "from 0 to 1"),
        ("27.fc_in@nan", "NaN", "from 0 to 1"),
        ("27.fc_in@snan", "sNaN", "from 0 to 1"),
        ("27.fc_in@inf", "Infinity", "from 0 to 1"),
        ("27.fc_in@-inf", "-Infinity", "from 0 to 1"),
    ],
)
@pytest.mark.parametrize("read", [Reduction.parse, Grid.parse], ids=["reduction", "grid"])
def test_malformed_text_is_refused_naming_the_input_and_the_next_step(
    read: Callable[[str], object], text: str, named: str, next_step: str
) -> None:
    message = spec_error(read, text)
    assert named in message
    assert next_step in message


@pytest.mark.parametrize("text", ["27.fc_in@0.1+", "+27.fc_in@0.1", "27.fc_in@0.1++28.fc_in@0.1", "27.fc_in@0.1+what"])
def test_every_part_of_an_intervention_must_be_a_reduction(text: str) -> None:
    assert FORM in spec_error(Intervention.parse, text)


def test_a_spec_error_is_a_laser_error_and_a_value_error() -> None:
    assert issubclass(SpecError, LaserError)
    assert issubclass(SpecError, ValueError)


def test_a_reduction_has_one_size() -> None:
    message = spec_error(Reduction.parse, "27.fc_in@0.1,0.2,0.3")
    assert "'27.fc_in@0.1,0.2,0.3' has 3 sizes" in message


@pytest.mark.parametrize("text", ["3.fc_in@0.1:bottom:reference", "3.fc_in@r2:reference:bottom"])
def test_the_randomised_decomposition_has_no_bottom(text: str) -> None:
    message = spec_error(Reduction.parse, text)
    assert "3.fc_in@" in message
    assert "leave out ':reference'" in message


@pytest.mark.parametrize(
    "text", ["3.fc_in@0.1:split0", "3.fc_in@0.1:split", "3.fc_in@0.1:split2:split3", "3.fc_in@0.1:split-1"]
)
def test_a_malformed_split_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match="splitK"):
        Reduction.parse(text)


def test_the_randomised_decomposition_has_no_blocks_of_rows() -> None:
    with pytest.raises(SpecError, match="leave out one"):
        Reduction.parse("3.fc_in@0.1:reference:split2")


def test_a_grid_refuses_the_bottom_of_the_randomised_decomposition() -> None:
    assert "leave out ':reference'" in spec_error(Grid.parse, "3.fc_in@0.1:bottom:reference")


def test_minus_zero_prints_as_zero() -> None:
    assert str(Reduction.parse("3.fc_in@-0")) == str(Reduction.parse("3.fc_in@0"))


@pytest.mark.parametrize("text", ["3.fc_in@r²", "3.fc_in@r" + "9" * 5000], ids=["superscript", "5000 digits"])
def test_a_rank_that_is_no_number_is_a_laser_error(text: str) -> None:
    with pytest.raises(LaserError, match="rank such as r40"):
        Reduction.parse(text)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ({}, "either a fraction or a rank"),
        ({"rho": Decimal("0.5"), "rank": 3}, "either a fraction or a rank"),
        ({"rank": -1}, "rank -1 is negative"),
        ({"rho": Decimal("1.000001")}, "rho 1.000001 is out of range"),
    ],
)
def test_a_size_made_by_hand_is_checked_as_text_is(size: dict[str, object], expected: str) -> None:
    with pytest.raises(SpecError, match=expected):
        Size(**size)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "blocks", "layers"),
    [
        ("0", 1, [0]),
        ("27", 28, [27]),
        ("2-4", 5, [2, 3, 4]),
        ("all", 3, [0, 1, 2]),
        ("top1", 3, [2]),
        ("top2", 12, [10, 11]),
        ("top3", 3, [0, 1, 2]),
    ],
)
def test_layers_of_a_stack(text: str, blocks: int, layers: list[int]) -> None:
    assert list(Layers.parse(text).indices(blocks)) == layers


@pytest.mark.parametrize(
    ("text", "blocks", "expected"),
    [
        ("28", 28, "no layer 28: this model's layers are 0 to 27"),
        ("20-40", 28, "no layer 40: this model's layers are 0 to 27"),
        ("top5", 4, "top5 selects more blocks than the 4 of this model; write top4"),
    ],
)
def test_a_layer_that_the_stack_lacks_is_named(text: str, blocks: int, expected: str) -> None:
    with pytest.raises(MatrixError) as caught:
        Layers.parse(text).indices(blocks)
    assert expected in str(caught.value)


@pytest.mark.parametrize("text", ["", "-1", "3-", "1-2-3", "top", "topmost", "3.5", "ALL"])
def test_malformed_layers_name_the_input_and_the_next_step(text: str) -> None:
    message = spec_error(Layers.parse, text)
    assert repr(text) in message
    assert "write 27, 20-27, all or top4" in message


def test_the_groups_are_attention_and_mlp_without_overlap() -> None:
    assert GROUPS["attn"] == {"q_proj", "k_proj", "v_proj", "out_proj"}
    assert GROUPS["mlp"] == {"fc_in", "fc_up", "fc_out"}


def test_an_intervention_prints_its_reductions_by_stack_layer_and_matrix() -> None:
    text = "10.fc_in@0.1+encoder.0.q_proj@r3+2.mlp@0.1+3.fc_out@0.1+all.fc_in@0.1+3.fc_in@0.5"
    assert str(Intervention.parse(text)) == (
        "all.fc_in@0.1+2.mlp@0.1+3.fc_in@0.5+3.fc_out@0.1+10.fc_in@0.1+encoder.0.q_proj@r3"
    )


def test_the_order_in_which_reductions_are_joined_does_not_matter() -> None:
    forward = Intervention.parse("26.fc_in@0.1+27.fc_out@.5 + 3.attn@r2:bottom")
    backward = Intervention.parse("3.attn@r02:bottom+27.fc_out@0.50+26.fc_in@1e-1")
    assert forward == backward
    assert hash(forward) == hash(backward)
    assert str(forward) == str(backward) == "3.attn@r2:bottom+26.fc_in@0.1+27.fc_out@0.5"


def test_a_repeated_reduction_counts_once_and_two_sizes_of_one_matrix_stay_two() -> None:
    assert str(Intervention.parse("3.fc_in@0.5+3.fc_in@0.50+3-3.fc_in@5e-1")) == "3.fc_in@0.5"
    assert len(Intervention.parse("3.fc_in@0.5+3.fc_in@0.1").reductions) == 2


def test_an_intervention_round_trips_through_its_text() -> None:
    intervention = Intervention.parse("top2.attn@0+27.fc_in@0.01:reference+encoder.all.fc_out@r7:bottom")
    assert Intervention.parse(str(intervention)) == intervention


@pytest.mark.parametrize("text", ["", "  ", [], ["", " "]])
def test_empty_text_is_the_unchanged_model(text: str | list[str]) -> None:
    assert Intervention.parse(text) == Intervention()
    assert not Intervention.parse(text)
    assert str(Intervention.parse(text)) == ""


def test_an_intervention_is_read_from_texts_a_reduction_or_itself() -> None:
    expected = Intervention.parse("2.fc_in@0.1+3.fc_in@0.1")
    assert Intervention.parse(["3.fc_in@0.1", "", "2.fc_in@.1"]) == expected
    assert Intervention.parse(["3.fc_in@0.1+2.fc_in@.1"]) == expected
    assert Intervention.parse(expected) is expected
    assert str(Intervention.parse(Reduction.parse("2.fc_in@.1"))) == "2.fc_in@0.1"
    assert expected


def test_the_paper_grid_is_table_5() -> None:
    grid = Grid.parse("paper")
    assert [(str(part[0].layers), part[0].matrix) for part in grid.parts] == [("all", "fc_in"), ("all", "fc_out")]
    for part in grid.parts:
        assert [str(reduction.size) for reduction in part] == ["0.9", "0.8", "0.6", "0.4", "0.2", "0.1", "0.05", "0.01"]


def test_the_mlp_grid_has_the_sizes_of_the_paper_for_the_whole_group() -> None:
    (part,) = Grid.parse("mlp").parts
    assert {(str(reduction.layers), reduction.matrix) for reduction in part} == {("all", "mlp")}
    assert [reduction.size for reduction in part] == [reduction.size for reduction in Grid.parse("paper").parts[0]]


def test_the_fine_grid_has_fifteen_sizes_for_every_matrix() -> None:
    (part,) = Grid.parse("fine").parts
    sizes = [".9", ".75", ".6", ".5", ".4", ".25", ".1", ".075", ".05", ".025", ".02", ".015", ".01", ".005", ".0025"]
    assert {(str(reduction.layers), reduction.matrix) for reduction in part} == {("all", "all")}
    assert [reduction.size.rho for reduction in part] == [Decimal(s) for s in sizes]


@pytest.mark.parametrize("name", ["paper", "mlp", "fine"])
def test_a_named_grid_equals_its_text(name: str) -> None:
    grid = Grid.parse(name)
    assert Grid.parse(str(grid)) == grid
    assert Grid.parse(grid) is grid


def test_a_grid_keeps_its_parts_and_sizes_in_the_order_written() -> None:
    grid = Grid.parse("29.mlp@r5,0.50+27-28.attn@.05:bottom")
    assert [[str(reduction.size) for reduction in part] for part in grid.parts] == [["r5", "0.5"], ["0.05"]]
    assert [[reduction.keep for reduction in part] for part in grid.parts] == [["top", "top"], ["bottom"]]
    assert str(grid) == "29.mlp@r5,0.5+27-28.attn@0.05:bottom"


def test_a_misspelt_grid_name_gets_the_names_there_are() -> None:
    message = spec_error(Grid.parse, "papper")
    assert all(name in message for name in ("'papper'", "paper", "mlp", "fine"))


@pytest.mark.parametrize(
    ("rate", "rho"),
    [
        (0, "1"),
        (1, "0.9"),
        (9, "0.1"),
        (9.5, "0.05"),
        (9.9, "0.01"),
        ("9.95", "0.005"),
        (9.975, "0.0025"),
        (10, "0"),
        (4.0, "0.6"),
    ],
)
def test_a_published_rate_is_ten_times_the_share_removed(rate: float | str, rho: str) -> None:
    assert from_rate("fc_in", 27, rate) == Reduction.parse(f"27.fc_in@{rho}")
    assert str(from_rate("fc_in", 27, rate)) == f"27.fc_in@{rho}"


@pytest.mark.parametrize("rate", [-0.1, 10.1, "11", float("inf")])
def test_a_rate_beyond_0_to_10_is_refused(rate: float | str) -> None:
    with pytest.raises(SpecError) as caught:
        from_rate("fc_in", 27, rate)
    assert f"rate {rate} is out of range" in str(caught.value)
    assert "0 (keep all) to 10 (keep nothing)" in str(caught.value)


@pytest.mark.parametrize("rate", ["high", "", float("nan")])
def test_a_rate_that_is_no_number_is_a_spec_error(rate: float | str) -> None:
    with pytest.raises(SpecError, match="rate"):
        from_rate("fc_in", 27, rate)


@pytest.mark.parametrize(("lname", "lnum"), [("fc_in", -1), ("fc in", 27)])
def test_a_converted_reduction_can_be_read_back(lname: str, lnum: int) -> None:
    try:
        reduction = from_rate(lname, lnum, 9)
    except SpecError:
        return
    assert Reduction.parse(str(reduction)) == reduction


def test_a_fraction_that_would_take_gigabytes_to_print_is_refused() -> None:
    with pytest.raises(SpecError, match="too small"):
        Size.parse("1e-999999999")
    assert str(Size.parse("1e-18")) == "0.000000000000000001"
    assert str(Size.parse("0e-999999999")) == "0"


def test_components_are_numbers_or_ranges_however_many() -> None:
    components = Components.of([20, 3, 0, 17, 18, 19])
    assert components == Components.parse("0,3,17-20") == Components(((17, 20), (3, 3), (0, 0)))
    assert components.numbers == [0, 3, 17, 18, 19, 20]
    assert (len(components), components.last) == (6, 20)
    assert len(Components.parse("0-999999998")) == 999_999_999  # no list of them is made
    with pytest.raises(SpecError, match="no component is listed"):
        Components.of([])


def test_a_list_of_components_needs_no_quotes_in_a_shell_or_an_address() -> None:
    text = str(Intervention.parse("27.fc_in@drop20,3,0,17-19+28.fc_up@drop5:split2"))
    assert text == "27.fc_in@drop0,3,17-20+28.fc_up@drop5:split2"
    assert set(text) <= {*string.ascii_letters, *string.digits, *"._@+:,-"}


def test_reductions_round_trip_through_a_file(tmp_path: Path) -> None:
    intervention = Intervention.parse("27.fc_in@drop0,3,17-20+28.fc_up@0.02:bottom")
    file = tmp_path / "a folder+" / "edit.json"
    intervention.write(file)
    assert json.loads(file.read_text()) == {
        "schema": "laserlm.reductions",
        "version": 1,
        "reductions": ["27.fc_in@drop0,3,17-20", "28.fc_up@0.02:bottom"],
    }
    assert Intervention.read(f"@{file}") == Intervention.read([f" @{file} "]) == intervention
    both = Intervention.read([f"@{file}", "3.mlp@0.1", ""])
    assert both == Intervention.parse(f"{intervention}+3.mlp@0.1")
    assert Intervention.read(intervention) is intervention
    assert Intervention.read("3.mlp@0.1+4.mlp@0.1") == Intervention.parse("3.mlp@0.1+4.mlp@0.1")


def test_text_that_strangers_send_reads_no_file(tmp_path: Path) -> None:
    Intervention.parse("3.mlp@0.1").write(tmp_path / "edit.json")
    assert FORM in spec_error(Intervention.parse, f"@{tmp_path / 'edit.json'}")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file"),
        ("27.fc_in@0.1", "cannot read the reductions in"),
        ("[]", 'has no entry "schema": "laserlm.reductions"'),
        ('{"reductions": ["3.mlp@0.1"]}', 'has no entry "schema": "laserlm.reductions"'),
        ('{"schema": "laserlm.reductions", "version": 2, "reductions": []}', "is of version 2; this laserlm reads version 1"),
        ('{"schema": "laserlm.reductions", "version": 1, "reductions": "3.mlp@0.1"}', "no list of texts"),
        ('{"schema": "laserlm.reductions", "version": 1, "reductions": [3]}', "no list of texts"),
        ('{"schema": "laserlm.reductions", "version": 1, "reductions": ["3.mlp@drop2-1"]}', "run backwards; write 1-2"),
        ('{"schema": "laserlm.reductions", "version": 1, "reductions": ["@edit.json"]}', FORM),
    ],
)
def test_a_missing_or_broken_file_is_one_error_that_names_it(content: str | None, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "edit.json"
    if content is not None:
        file.write_text(content)
    message = spec_error(Intervention.read, f"@{file}")
    assert str(file) in message
    assert reason in message


def test_a_table_shows_how_many_components_a_long_text_drops() -> None:
    text = "+".join(f"{layer}.{name}@drop{layer},{layer + 2}-{layer + 4}" for layer in range(30) for name in ("fc_in", "fc_up"))
    assert short_form(text) == short_form(Intervention.parse(text)) == "240 components of 60 matrices"
    assert short_form(f"{text}+0.fc_out@0.5") == "240 components of 60 matrices and 1 other reductions"
    assert short_form(text.replace("29.fc_in@", "28-29.fc_in@")) == "240 components of 60 selections"
    assert short_form("+".join(f"{layer}.mlp@0.1" for layer in range(30))) == "30 reductions"
    assert short_form("28.fc_up@drop0,3") == "28.fc_up@drop0,3"
    assert short_form(f"{text}+0.fc_out@scale3-4=0.5") == "242 strengths of 61 matrices"
    assert short_form(f"control: draw 1, {text}") == f"control: draw 1, {text}"
