"""Um per pixel: which source wins, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from histrata.errors import SlideError
from histrata.slides.mpp import Evidence, choose_mpp, ome_scale, resolution_mpp

SLIDE = Path("a/slide.svs")


def same(value: float) -> tuple[float, float]:
    return (value, value)


def test_sources_win_in_their_order():
    full = Evidence(vendor=same(0.5), ome=same(0.51), resolution=same(0.52), objective=20, spots=same(0.53))
    assert choose_mpp(SLIDE, 0.49, full).source == "sheet"
    assert choose_mpp(SLIDE, None, full).source == "vendor"
    rest = Evidence(ome=same(0.51), resolution=same(0.52), objective=20)
    assert choose_mpp(SLIDE, None, rest).source == "ome"
    assert choose_mpp(SLIDE, None, Evidence(resolution=same(0.52), objective=20)).value == 0.52
    assert choose_mpp(SLIDE, None, Evidence(objective=20, spots=same(0.53))).source == "objective"
    assert choose_mpp(SLIDE, None, Evidence(spots=same(0.53))).source == "spots"
    chosen = choose_mpp(SLIDE, None, full)
    assert list(chosen.candidates.items()) == [
        ("vendor", 0.5), ("ome", 0.51), ("resolution", 0.52), ("objective", 0.5), ("spots", 0.53)
    ]  # fmt: skip
    assert chosen.warnings == ()
    assert "spots" in choose_mpp(SLIDE, 0.5, full).candidates


def test_objective_alone_is_accepted_with_a_warning():
    chosen = choose_mpp(SLIDE, None, Evidence(objective=40))
    assert (chosen.value, chosen.source) == (0.25, "objective")
    assert "objective alone" in chosen.warnings[0]


@pytest.mark.parametrize(
    ("evidence", "told"),
    [
        (Evidence(), "does not say how many um"),
        (Evidence(vendor=same(0.00499)), "slides have 0.05 to 5"),
        (Evidence(vendor=same(25_400 / 72)), "slides have 0.05 to 5"),
        (Evidence(resolution=same(25_400 / 72)), "default of image programs"),
        (Evidence(resolution=same(1e4 / 28)), "default of image programs"),
        (Evidence(vendor=same(4.99), objective=20), "20x objective"),
        (Evidence(vendor=same(0.5), objective=40), "40x objective"),
        (Evidence(vendor=same(0.0999), objective=20), "20x objective"),
        (Evidence(vendor=same(0.249), objective=20), "20x objective"),
        (Evidence(vendor=same(0.751), objective=20), "20x objective"),
        (Evidence(ome=(0.5, 0.52)), "differ by more than 2 %"),
        (Evidence(vendor=same(4.99), resolution=same(0.499)), "resolution says 0.499"),
        (Evidence(objective=1), "slides have 0.05 to 5"),
        (Evidence(vendor=same(4.99), spots=same(0.499)), "the spacing of its spots says 0.499"),
        (Evidence(ome=same(0.25), spots=same(1.0)), "the spacing of its spots says 1"),
        (Evidence(objective=40, spots=same(1.0)), "the spacing of its spots says 1"),
        (Evidence(spots=(0.5, 0.52)), "differ by more than 2 %"),
        (Evidence(spots=same(7.0)), "slides have 0.05 to 5"),
    ],
)
def test_what_cannot_be_right_is_refused_and_the_sheet_mends_it(evidence, told):
    with pytest.raises(SlideError, match="`mpp` column of the slide sheet") as caught:
        choose_mpp(SLIDE, None, evidence)
    assert told in str(caught.value)
    assert "slide.svs" in str(caught.value)
    mended = choose_mpp(SLIDE, 0.5, evidence)
    assert (mended.value, mended.source) == (0.5, "sheet")


def test_default_dpi_gives_way_to_the_objective():
    chosen = choose_mpp(SLIDE, None, Evidence(resolution=same(25_400 / 72), objective=20))
    assert chosen.source == "objective"
    assert chosen.candidates["resolution"] == pytest.approx(352.78, abs=0.01)


@pytest.mark.parametrize("value", [0.25, 0.5, 0.75])
def test_up_to_half_off_the_objective_is_believed(value):
    assert choose_mpp(SLIDE, None, Evidence(vendor=same(value), objective=20)).value == value


def test_spots_alone_are_accepted_with_a_warning_and_go_before_a_default_dpi():
    chosen = choose_mpp(SLIDE, None, Evidence(resolution=same(25_400 / 72), spots=(0.687, 0.689)))
    assert (chosen.value, chosen.source) == (pytest.approx(0.688), "spots")
    (warning,) = chosen.warnings
    assert "derived from the spacing of the spots alone" in warning


@pytest.mark.parametrize("sheet", [None, 0.5])
def test_spots_that_contradict_less_than_several_times_are_a_warning(sheet):
    file = None if sheet else same(0.5)
    assert choose_mpp(SLIDE, sheet, Evidence(vendor=file, spots=(0.45, 0.56))).warnings == ()
    (warning,) = choose_mpp(SLIDE, sheet, Evidence(vendor=file, spots=same(0.6))).warnings
    assert warning == "0.5 um per pixel were used, though the spacing of the spots says 0.6."
    (warning,) = choose_mpp(SLIDE, sheet, Evidence(vendor=file, spots=(0.5, 1.0))).warnings
    assert warning.endswith("says 0.5 in x and 1 in y.")


def test_the_sheet_goes_before_spots_that_contradict_it_many_times():
    chosen = choose_mpp(SLIDE, 0.5, Evidence(spots=same(4.0)))
    assert (chosen.value, chosen.source) == (0.5, "sheet")
    assert "spacing of the spots says 4" in chosen.warnings[0]


def test_sheet_that_contradicts_a_plausible_file_is_used_with_a_warning():
    chosen = choose_mpp(SLIDE, 0.25, Evidence(vendor=same(0.5)))
    assert chosen.value == 0.25
    assert "the vendor says 0.5" in chosen.warnings[0]
    for wrong in (Evidence(vendor=same(4.99e-3)), Evidence(vendor=same(4.99), objective=20)):
        assert choose_mpp(SLIDE, 0.499, wrong).warnings == ()


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_sheet_value_must_be_a_positive_number(value):
    with pytest.raises(SlideError, match="not a positive number"):
        choose_mpp(SLIDE, value, Evidence(vendor=same(0.5)))


@given(st.floats(0.06, 4.9), st.floats(0.99, 1.009))
def test_any_plausible_file_value_is_taken_as_it_is(value, ratio):
    chosen = choose_mpp(SLIDE, None, Evidence(vendor=(value, value * ratio)))
    assert chosen.value == pytest.approx(value * (1 + ratio) / 2)


def test_resolution_units():
    assert resolution_mpp(20_000, 20_000, "cm") == (0.5, 0.5)
    assert resolution_mpp(25_400, 50_800, "inch") == (1.0, 0.5)
    assert resolution_mpp(2, 2, "µm") == (0.5, 0.5)
    assert resolution_mpp(1, 1, "") is None
    assert resolution_mpp(0, 0, "cm") is None
    assert resolution_mpp(math.inf, 1, "cm") is None


OME = """<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">
<Instrument ID="Instrument:0"><Objective ID="Objective:0" NominalMagnification="20.0"/></Instrument>
<Image ID="Image:0"><Pixels SizeX="64" SizeY="32" PhysicalSizeX="9" PhysicalSizeY="9"/></Image>
<Image ID="Image:1"><Pixels SizeX="640" SizeY="320" {sizes}/></Image></OME>"""


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ('PhysicalSizeX="0.5" PhysicalSizeY="0.25"', (0.5, 0.25)),
        ('PhysicalSizeX="500" PhysicalSizeXUnit="nm"', (0.5, 0.5)),
        ('PhysicalSizeX="0.0005" PhysicalSizeXUnit="mm"', (0.5, 0.5)),
        ('PhysicalSizeX="0.5" PhysicalSizeXUnit="\u03bcm"', (0.5, 0.5)),
        ('PhysicalSizeX="1" PhysicalSizeXUnit="pixel"', None),
        ('PhysicalSizeX="0"', None),
        ("", None),
    ],
)
def test_ome_scale_of_the_image_that_is_the_slide(sizes, expected):
    scale, power = ome_scale(OME.format(sizes=sizes), 640, 320)
    assert scale == (pytest.approx(expected) if expected else None)
    assert power == 20


def test_ome_that_is_no_xml_says_nothing():
    assert ome_scale("", 1, 1) == (None, None)
    assert ome_scale("<OME", 1, 1) == (None, None)
