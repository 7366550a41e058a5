import pytest

from splitlearn.errors import DataError
from splitlearn.training.classes import Classes, classes_by, one_class
from splitlearn.training.lines import read_lines


def lines_with(write, *labels: object):
    return read_lines(write(*({"text": "A line.", "label": label} for label in labels)))


def test_the_value_of_the_field_is_the_class(write):
    lines = lines_with(write, "late", "broken", "late")
    assert classes_by("label", lines) == Classes(("broken", "late"), (1, 0, 1))


def test_numbers_go_by_their_size_and_before_words(write):
    lines = lines_with(write, "none", 10, "9", -1.5, True, 10)
    assert classes_by("label", lines).names == ("-1.5", "9", "10", "none", "true")


def test_counts_leave_out_what_is_not_there(write):
    classes = classes_by("label", lines_with(write, "late", "broken", "late", "lost"))
    assert classes.counts([0, 2, 3]) == {"late": 2, "lost": 1}


def test_one_class_has_all(write):
    assert one_class(lines_with(write, 1, 2)).counts([0, 1]) == {"examples": 2}


def test_a_line_without_the_field_is_named_with_the_fields_that_it_has(write):
    file = write({"text": "One.", "site": "A"}, {"text": "Two.", "ward": 3, "year": 1})
    with pytest.raises(DataError, match=r"data\.jsonl:2: .*no `site`.*`ward`, `year`.*`length`") as caught:
        classes_by("site", read_lines(file))
    assert "Two" not in caught.value.message


def test_lines_of_text_alone_are_told_what_needs_no_field(write):
    with pytest.raises(DataError, match=r"none besides its text.*`length`, which needs none"):
        classes_by("label", read_lines(write({"text": "One."})))


@pytest.mark.parametrize("value", [None, ["a"], {"a": 1}, "", "  ", "\ud800"])
def test_what_names_no_class_is_refused(write, value):
    with pytest.raises(DataError, match=r"data\.jsonl:1: `label` "):
        classes_by("label", lines_with(write, value))


def test_by_length_the_shortest_quarter_is_the_first_class(write):
    lines = read_lines(write(*({"text": "x" * n} for n in (1, 2, 30, 40, 500, 600, 7000, 8000))))
    classes = classes_by("length", lines)
    assert classes.of_example == (0, 0, 1, 1, 2, 2, 3, 3)
    assert classes.names[0] == "1 to 2 characters"


def test_equal_lengths_are_of_one_class(write):
    lines = read_lines(write(*({"text": "x" * n} for n in (5, 5, 5, 5, 5, 5, 5, 9))))
    assert classes_by("length", lines) == Classes(("5 characters", "9 characters"), (0,) * 7 + (1,))


def test_the_length_is_that_of_all_texts_of_an_example(write):
    chat = [{"role": "user", "content": "four"}, {"role": "assistant", "content": "sixsix"}]
    file = write({"messages": chat}, {"prompt": "abc", "completion": "de"}, {"text": "x"})
    assert classes_by("length", read_lines(file)).names == ("1 characters", "5 characters", "10 characters")


def test_a_field_of_that_name_goes_first(write):
    lines = read_lines(write({"text": "One.", "length": "long"}, {"text": "Two, longer.", "length": "short"}))
    assert classes_by("length", lines).names == ("long", "short")
