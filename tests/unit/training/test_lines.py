import json

import pytest

from splitlearn.errors import DataError, SettingError
from splitlearn.training.lines import Chat, Completion, Document, Text, read_examples, read_lines

CHAT = [{"role": "user", "content": "When?"}, {"role": "assistant", "content": "At two."}]
GOOD = {"text": "A good line."}


def test_each_line_is_one_example_of_its_kind(write):
    file = write(GOOD, {"prompt": "When? ", "completion": "At two."}, {"messages": CHAT})
    assert read_examples(file) == [
        Text(f"{file}:1", "A good line."),
        Completion(f"{file}:2", "When? ", "At two."),
        Chat(f"{file}:3", CHAT),
    ]


def test_files_are_read_in_their_order(write):
    files = [write({"text": name}, name=name) for name in ("b.jsonl", "a.json")]
    assert [example.text for example in read_examples(files)] == ["b.jsonl", "a.json"]


def test_a_plain_file_is_one_document(write):
    file = write("First line.", "", "Third line.", name="notes.txt")
    assert read_examples(str(file)) == [Document(str(file), "First line.\n\nThird line.")]


def test_blank_lines_are_passed_over_but_counted(write):
    file = write("", GOOD, "   ", GOOD, "")
    assert [example.where for example in read_examples(file)] == [f"{file}:2", f"{file}:4"]


def test_other_keys_are_not_read(write):
    assert read_examples(write(GOOD | {"id": 7}))[0].text == GOOD["text"]


def test_the_template_sees_all_of_a_message(write):
    messages = [CHAT[0], CHAT[1] | {"reasoning_content": "The rules say so."}]
    assert read_examples(write({"messages": messages}))[0].messages == messages


def test_a_line_ends_at_a_line_feed_alone(write):
    """Other separators of Unicode may stand in a JSON text as they are."""
    text = "one\u2028two\x85three"
    assert read_examples(write(json.dumps({"text": text}, ensure_ascii=False)))[0].text == text


def test_windows_line_ends_and_byte_order_mark_are_taken(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": "two"}\r\n')
    assert [example.text for example in read_examples(file)] == ["one", "two"]


def message(**keys: object) -> dict:
    return {"messages": [CHAT[0], keys]}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": "not closed"', "not JSON"),
        ("just words", "not JSON"),
        ("[" * 100_000, "cannot be read"),
        ('["text"]', "a list, not an object"),
        ('"text"', "a text, not an object"),
        ("null", "null, not an object"),
        ({}, "no example in it"),
        ({"question": "When?"}, "no example in it"),
        ({"prompt": "When?"}, "prompt alone"),
        ({"completion": "At two."}, "completion alone"),
        ({"text": "a", "prompt": "b", "completion": "c"}, "text and prompt and completion"),
        ({"text": "a", "messages": CHAT}, "text and messages"),
        ({"text": 7}, "text is a number"),
        ({"text": None}, "text is null"),
        ({"text": ["a"]}, "text is a list"),
        ({"text": ""}, "text is empty"),
        ({"text": " \n "}, "text is empty"),
        ('{"text": "half \\ud83d"}', "half a character"),
        ({"prompt": "", "completion": "a"}, "prompt is empty"),
        ({"prompt": "a", "completion": True}, "completion is true or false"),
        ({"messages": "When?"}, "messages is a text"),
        ({"messages": []}, "does not end with an assistant's answer"),
        ({"messages": CHAT[:1]}, "does not end with an assistant's answer"),
        ({"messages": CHAT[1:]}, "does not end with an assistant's answer"),
        ({"messages": [*CHAT, CHAT[0]]}, "does not end with an assistant's answer"),
        ({"messages": ["When?"]}, r"messages\[0\] is a text"),
        (message(content="At two."), r"messages\[1\] has no role"),
        (message(role="assistant"), r"messages\[1\] has no content"),
        (message(role="assistant", content=None), r"messages\[1\]\.content is null"),
        (message(role="assistant", content=" "), r"messages\[1\]\.content is empty"),
        (message(role=1, content="At two."), r"messages\[1\]\.role is a number"),
    ],
)
def test_a_bad_line_is_named_by_file_and_line(write, line, said):
    file = write(GOOD, GOOD, line, GOOD)
    with pytest.raises(DataError, match=said) as caught:
        read_examples(file)
    assert str(caught.value).startswith(f"{file}:3: ")


def test_so_is_one_that_is_not_utf_8(tmp_path):
    lines, plain = tmp_path / "data.jsonl", tmp_path / "data.txt"
    for file in (lines, plain):
        file.write_bytes(b'{"text": "one"}\n{"text": "caf\xe9"}\n')
        with pytest.raises(DataError, match=f"^{file}:2: .* save the file as UTF-8"):
            read_examples(file)


def test_what_is_wrong_is_said_without_the_text(write):
    with pytest.raises(DataError) as caught:
        read_examples(write('{"text": "the secret", "completion": "the secret"}'))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("data.csv", "is not read"),
        ("data", "is not read"),
        ("absent.jsonl", "cannot be read"),
        ("empty.jsonl", "is empty"),
        ("empty.txt", "is empty"),
    ],
)
def test_a_file_that_is_none_is_named(tmp_path, name, said):
    file = tmp_path / name
    if not name.startswith("absent"):
        file.write_text("\n")
    with pytest.raises(DataError, match=f"^{file}: .*{said}"):
        read_examples(file)


def test_no_file_is_an_error():
    with pytest.raises(DataError, match="no file"):
        read_examples([])


def test_a_caller_may_take_it_for_a_setting():
    assert issubclass(DataError, SettingError)


def test_a_line_is_kept_as_it_stands_in_its_file(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"text" : "one", "site": 1}\r\n\n {"text": "\xc3\xa9"}')
    first, second = read_lines(file)
    assert (first.written, first.record["site"], first.where) == (
        b'{"text" : "one", "site": 1}\r',
        1,
        f"{file}:1",
    )
    assert (second.written, second.example) == (' {"text": "é"}'.encode(), Text(f"{file}:3", "é"))


def test_a_plain_file_has_no_lines_to_tell_apart(write):
    with pytest.raises(DataError, match=r"write an example a line, as \.jsonl"):
        read_lines(write("First line.", name="notes.txt"))
