"""Splits: nobody on both sides, everybody held out once, whatever the order of rows."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from histrata.errors import HistrataError, LeakError
from histrata.folds import (
    Fold,
    assert_no_leak,
    join_subjects,
    make_folds,
    make_patient_folds,
    make_serial_folds,
    make_validation,
)

SHEET = pd.DataFrame(
    {
        "slide_id": ["B4", "C2", "C3", "D1", "E1", "F1"],
        "patient_id": ["B", "C", "C", "D", "E", "F"],
        "image": ["i1", "i2", "i3", "i4", "i4", "i5"],
    }
)


def slides(draw_rows):
    return pd.DataFrame(
        [(f"s{i}", f"p{patient}", f"i{image}") for i, (patient, image) in enumerate(draw_rows)],
        columns=["slide_id", "patient_id", "image"],
    )


rows = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 30)), min_size=4, max_size=30)


@settings(max_examples=60, deadline=None)
@given(rows, st.sampled_from(["leave-one-patient-out", "grouped-k-fold"]), st.integers(0, 3), st.randoms())
def test_slide_folds_hold_out_each_once_and_do_not_depend_on_row_order(rows, scheme, seed, random):
    table = slides(rows)
    subject = join_subjects(table)
    if len(set(subject.values())) < 2:
        with pytest.raises(HistrataError, match="at least 2"):
            make_folds(table, scheme, k=3, seed=seed)
        return
    folds = make_folds(table, scheme, k=3, seed=seed)
    assert sorted(s for fold in folds for s in fold.test) == sorted(table["slide_id"])
    patient_of = table.set_index("slide_id")["patient_id"]
    image_of = table.set_index("slide_id")["image"]
    for fold in folds:
        assert fold.train
        assert fold.test
        assert sorted(fold.train + fold.test) == sorted(table["slide_id"])
        for key in (patient_of, image_of):
            assert not set(key[list(fold.train)]) & set(key[list(fold.test)])
    order = list(range(len(table)))
    random.shuffle(order)
    assert make_folds(table.iloc[order], scheme, k=3, seed=seed) == folds


@settings(max_examples=60, deadline=None)
@given(st.lists(st.booleans(), min_size=4, max_size=40), st.integers(2, 6), st.integers(0, 3), st.randoms())
def test_patient_folds_are_balanced_and_do_not_depend_on_row_order(events, k, seed, random):
    table = pd.DataFrame({"patient_id": [f"p{i}" for i in range(len(events))], "event": np.array(events, float)})
    if sum(events) < 2:
        with pytest.raises(HistrataError, match="observed event"):
            make_patient_folds(table, k, seed)
        return
    folds = make_patient_folds(table, k, seed)
    event = table.set_index("patient_id")["event"]
    assert len(folds) == min(k, sum(events))
    assert sorted(p for fold in folds for p in fold.test) == sorted(table["patient_id"])
    sizes = [len(fold.test) for fold in folds]
    observed = [int(event[list(fold.test)].sum()) for fold in folds]
    assert max(sizes) - min(sizes) <= 1
    assert max(observed) - min(observed) <= 1
    assert min(observed) >= 1
    order = list(range(len(table)))
    random.shuffle(order)
    assert make_patient_folds(table.iloc[order], k, seed) == folds


def test_leave_one_patient_out_names_folds_after_subjects():
    folds = make_folds(SHEET)
    # D and E share the image i4.
    assert [(f.name, f.test) for f in folds] == [
        ("B", ("B4",)), ("C", ("C2", "C3")), ("D", ("D1", "E1")), ("F", ("F1",)),
    ]  # fmt: skip


def test_patients_that_share_an_image_through_others_are_one_subject():
    table = slides([(0, 0), (0, 1), (1, 1), (1, 2), (2, 2), (3, 3)])
    assert join_subjects(table) == {"p0": "p0", "p1": "p0", "p2": "p0", "p3": "p3"}


def test_patient_folds_keep_a_subject_together():
    table = pd.DataFrame(
        {
            "patient_id": list("abcdefgh"),
            "event": [1, 0, 1, 1, 0, 1, 0, 0],
            "subject_id": ["a", "a", "c", "d", "e", "f", "f", "h"],
        }
    )
    for fold in make_patient_folds(table, k=4):
        assert ("a" in fold.test) == ("b" in fold.test)
        assert ("f" in fold.test) == ("g" in fold.test)


def test_another_seed_deals_otherwise_and_the_global_state_is_not_touched():
    table = pd.DataFrame({"patient_id": [f"p{i}" for i in range(40)], "event": [0, 1] * 20})
    np.random.seed(1)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    first = make_patient_folds(table, seed=0)
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002
    assert first == make_patient_folds(table, seed=0)
    assert first != make_patient_folds(table, seed=1)


def test_leaks_are_refused():
    subject_of = {"s1": "p1", "s2": "p1", "s3": "p2"}
    assert_no_leak(Fold("good", ("s1", "s2"), ("s3",)), subject_of)
    with pytest.raises(LeakError, match="'p1'"):
        assert_no_leak(Fold("patient", ("s1", "s3"), ("s2",)), subject_of)
    with pytest.raises(LeakError, match="both"):
        assert_no_leak(Fold("slide", ("s1", "s3"), ("s3",)), subject_of)
    with pytest.raises(LeakError, match="'s9'"):
        assert_no_leak(Fold("unknown", ("s1",), ("s9",)), subject_of)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.assign(patient_id="one"), "1 subject"),
        (lambda t: t.assign(image="one"), "1 subject"),
        (lambda t: pd.concat([t, t.head(1)]), "more than one row"),
        (lambda t: t.assign(patient_id=[None, *"CCDEF"]), "'patient_id' is empty"),
        (lambda t: t.drop(columns="image"), "no column 'image'"),
    ],
)
def test_tables_that_cannot_be_split(change, says):
    with pytest.raises(HistrataError, match=says):
        make_folds(change(SHEET))


def test_bad_parameters():
    with pytest.raises(HistrataError, match="'random'"):
        make_folds(SHEET, "random")
    with pytest.raises(HistrataError, match="2 or more"):
        make_folds(SHEET, "grouped-k-fold", k=1)
    patients = pd.DataFrame({"patient_id": list("abc"), "event": [1, 2, 0]})
    with pytest.raises(HistrataError, match="'b'"):
        make_patient_folds(patients)
    with pytest.raises(HistrataError, match="more than one row"):
        make_patient_folds(patients.assign(patient_id="a", event=1))


# --- folds of a user's table --------------------------------------------------------------------


def given_folds(tmp_path, text):
    path = tmp_path / "folds.tsv"
    path.write_text(text)
    return str(path)


def test_folds_of_a_table_hold_out_what_it_says(tmp_path, caplog):
    text = "fold\tpatient_id\nsecond\tB\nfirst\tC\nfirst\tF\nfirst\tnobody\n"
    folds = make_folds(SHEET, given_folds(tmp_path, text))
    assert folds == [
        Fold("first", ("B4", "D1", "E1"), ("C2", "C3", "F1")),
        Fold("second", ("C2", "C3", "D1", "E1", "F1"), ("B4",)),
    ]
    assert "1 patient_id(s) have no measured slide, such as 'nobody'" in caplog.text
    by_slide = "fold\tslide_id\nfirst\tC2\nsecond\tB4\nfirst\tF1\nfirst\tC3\n"
    assert make_folds(SHEET.iloc[::-1], given_folds(tmp_path, by_slide)) == folds
    (tmp_path / "folds.csv").write_text(text.replace("\t", ","))
    assert make_folds(SHEET, tmp_path / "folds.csv") == folds


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("fold\tslide_id\na\tC2\n", "has subject 'C'"),
        ("fold\tpatient_id\na\tD\n", "has subject 'D'"),
    ],
)
def test_a_table_that_parts_a_subject_leaks(tmp_path, text, says):
    with pytest.raises(LeakError, match=says):
        make_folds(SHEET, given_folds(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not a table of folds"),
        ("fold,patient_id\na,B\n", r"found the columns fold,patient_id; a table of folds has"),
        ("fold\tpatient\na\tB\n", "one of patient_id and slide_id"),
        ("fold\tpatient_id\tslide_id\na\tB\tB4\n", "one of patient_id and slide_id"),
        ("fold\tpatient_id\n", "has no rows"),
        ("fold\tpatient_id\n\tB\n", r"folds\.tsv, row 2, column fold: found ''"),
        ("fold\tpatient_id\n../up\tB\n", r"row 2, column fold: found '\.\./up'"),
        ("fold\tpatient_id\na\tB\nb\tB\n", r"row 3: slide 'B4' is held out by fold 'b' and, .* by fold 'a'"),
        ("fold\tpatient_id\na\tB\na\tB\n", r"row 3: slide 'B4' is held out by fold 'a' and"),
        ("fold\tpatient_id\na\tnobody\n", "fold 'a' holds out no measured slide"),
        ("fold\tpatient_id\n" + "".join(f"a\t{p}\n" for p in "BCDEF"), "holds out every measured slide"),
    ],
)
def test_tables_that_are_not_of_folds(tmp_path, text, says):
    with pytest.raises(HistrataError, match=says):
        make_folds(SHEET, given_folds(tmp_path, text))


# --- splits within a fold -----------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(rows, st.integers(0, 5), st.randoms())
def test_validation_sets_one_training_subject_apart(rows, seed, random):
    table = slides(rows)
    subject = join_subjects(table)
    if len(set(subject.values())) < 2:
        return
    subject_of = {row.slide_id: subject[row.patient_id] for row in table.itertuples()}
    order = list(range(len(table)))
    random.shuffle(order)
    for fold in make_folds(table, seed=seed):
        inner = make_validation(fold, table, seed)
        if len(set(subject.values())) == 2:
            assert inner is None
            continue
        assert sorted(inner.train + inner.test) == sorted(fold.train)
        sides = [{subject_of[s] for s in side} for side in (inner.train, inner.test, fold.test)]
        assert len(sides[1]) == 1
        assert not sides[0] & sides[1]
        assert not (sides[0] | sides[1]) & sides[2]
        assert make_validation(fold, table.iloc[order], seed) == inner


def test_another_seed_validates_on_another_subject():
    table = slides([(i, i) for i in range(9)])
    (fold, *_) = make_folds(table)
    assert len({make_validation(fold, table, seed).test for seed in range(20)}) > 4


def test_serial_folds_leave_the_other_slides_of_the_subject_in_training():
    folds = {fold.name: fold for fold in make_folds(SHEET)}
    assert make_serial_folds(folds["B"], SHEET) == []
    assert make_serial_folds(folds["C"], SHEET) == [
        Fold("C2", ("B4", "C3", "D1", "E1", "F1"), ("C2",)),
        Fold("C3", ("B4", "C2", "D1", "E1", "F1"), ("C3",)),
    ]
    # Patients that share an image are one subject.
    assert [fold.name for fold in make_serial_folds(folds["D"], SHEET)] == ["D1", "E1"]
