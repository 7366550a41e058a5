"""What is learned is written in capitals, so that a case and its labels can be compared at sight."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from splitlearn.errors import DataError, SettingError
from splitlearn.training.lines import Chat, Completion, Document, Text
from splitlearn.training.tokens import IGNORED, learned, tokenize

ENOUGH = 500
HERE = "data.jsonl:7"
ASKS = "{% if add_generation_prompt %}<assistant> {% endif %}"
PLAIN_TEMPLATE = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}{{ '\n' }}{% endfor %}" + ASKS
MARKING_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}</s>{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '\n' }}{% endfor %}" + ASKS
)


def chat(*contents: str) -> Chat:
    roles = ["user", "assistant"] * len(contents)
    turns = zip(roles, contents, strict=False)
    return Chat(HERE, [{"role": role, "content": content} for role, content in turns])


def only(example, tokenizer, max_tokens=ENOUGH):
    (one,) = tokenize([example], tokenizer, max_tokens).examples
    assert len(one["input_ids"]) == len(one["labels"])
    assert all(label in (IGNORED, token) for token, label in zip(*one.values(), strict=True))
    return one


def whole_text(example, tokenizer) -> str:
    return "".join(tokenizer.convert_ids_to_tokens(example["input_ids"]))


def learned_text(example, tokenizer) -> str:
    labels = [label for label in example["labels"] if label != IGNORED]
    return "".join(tokenizer.convert_ids_to_tokens(labels))


@pytest.mark.parametrize("ends", [False, True])
def test_all_of_a_text_is_learned_and_its_end(tokenizer_of, ends):
    tokenizer = tokenizer_of(ends=ends)
    one = only(Text(HERE, "HELLO"), tokenizer)
    assert whole_text(one, tokenizer) == "<s>HELLO</s>"
    assert learned_text(one, tokenizer) == "HELLO</s>"


@pytest.mark.parametrize("begins", [False, True])
def test_the_first_token_is_never_learned(tokenizer_of, begins):
    """Nothing predicts it: counted as learned it would make the mean loss too small."""
    one = only(Text(HERE, "HELLO"), tokenizer_of(begins=begins))
    assert one["labels"][0] == IGNORED
    assert learned(one) == len(one["input_ids"]) - 1


@pytest.mark.parametrize("ends", [False, True])
def test_of_prompt_and_completion_only_the_completion_is_learned(tokenizer_of, ends):
    tokenizer = tokenizer_of(ends=ends)
    one = only(Completion(HERE, "when? ", "AT TWO"), tokenizer)
    assert whole_text(one, tokenizer) == "<s>when? AT TWO</s>"
    assert learned_text(one, tokenizer) == "AT TWO</s>"


def test_an_end_that_the_text_has_is_not_put_twice(tokenizer_of):
    tokenizer = tokenizer_of()
    one = only(Completion(HERE, "when? ", "AT TWO</s>"), tokenizer)
    assert whole_text(one, tokenizer) == "<s>when? AT TWO</s>"


def test_a_tokenizer_without_an_end_puts_none(tokenizer_of):
    tokenizer = tokenizer_of(eos_token=None)
    assert whole_text(only(Text(HERE, "HELLO"), tokenizer), tokenizer) == "<s>HELLO"


@pytest.fixture
def pairs():
    """Writes "ab" as one token, wherever it stands."""
    vocabulary = {"<unk>": 0, "</s>": 1, "a": 2, "b": 3, "ab": 4, "c": 5}
    merging = Tokenizer(models.BPE(vocabulary, [("a", "b")], unk_token="<unk>"))
    merging.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=merging, eos_token="</s>", unk_token="<unk>")


def test_a_prompt_has_the_tokens_that_generation_will_see(pairs):
    """Not the one that prompt and completion would share."""
    assert pairs("cab")["input_ids"] == [5, 4]
    assert only(Completion(HERE, "ca", "b"), pairs) == {
        "input_ids": [5, 2, 3, 1],
        "labels": [IGNORED, IGNORED, 3, 1],
    }


def test_a_completion_has_the_tokens_that_it_has_in_the_text(pairs):
    assert only(Completion(HERE, "c", "ab"), pairs)["input_ids"] == [5, 4, 1]


def test_of_a_chat_all_marked_turns_are_learned(tokenizer_of):
    tokenizer = tokenizer_of(MARKING_TEMPLATE)
    one = only(chat("when?", "AT TWO", "and then?", "AT SIX"), tokenizer)
    assert whole_text(one, tokenizer) == (
        "<user> when?\n<assistant> AT TWO</s>\n<user> and then?\n<assistant> AT SIX</s>\n"
    )
    assert learned_text(one, tokenizer) == "AT TWO</s>AT SIX</s>"


def test_of_a_chat_without_marks_the_last_answer_is_learned(tokenizer_of):
    tokenizer = tokenizer_of(PLAIN_TEMPLATE)
    one = only(chat("when?", "at two", "and then?", "AT SIX"), tokenizer)
    assert whole_text(one, tokenizer) == (
        "<user> when?\n<assistant> at two\n<user> and then?\n<assistant> AT SIX\n</s>"
    )
    assert learned_text(one, tokenizer) == "AT SIX\n</s>"


def test_a_marking_template_that_writes_no_end_gets_one_at_the_last(tokenizer_of):
    tokenizer = tokenizer_of(MARKING_TEMPLATE.replace("</s>", ""))
    one = only(chat("when?", "AT TWO"), tokenizer)
    assert learned_text(one, tokenizer) == "AT TWO</s>"
    assert whole_text(one, tokenizer).endswith("AT TWO\n</s>")


def test_the_template_alone_says_how_a_chat_begins(tokenizer_of):
    one = only(chat("when?", "AT TWO"), tokenizer_of(PLAIN_TEMPLATE, begins=True, ends=True))
    tokens = tokenizer_of().convert_ids_to_tokens(one["input_ids"])
    assert (tokens[0], tokens.count("</s>")) == ("<", 1)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "has none: take the instruct model, or give prompt and completion"),
        ("{{ raise_exception('roles must alternate') }}", "refuses these messages .roles must alternate"),
        ("{{ messages[0].tools[0] }}", "refuses these messages"),
        (
            "{{ messages | length }}" + PLAIN_TEMPLATE,
            "writes these messages otherwise once they are answered",
        ),
        (MARKING_TEMPLATE.replace("== 'assistant'", "== 'nobody'"), "marks no token"),
    ],
)
def test_a_template_that_does_not_fit_is_named_with_the_line(tokenizer_of, template, said):
    with pytest.raises(DataError, match=f"^{HERE}: .*{said}"):
        tokenize([chat("when?", "AT TWO")], tokenizer_of(template), ENOUGH)


def test_what_is_longer_is_cut_at_its_end(tokenizer_of):
    tokenizer = tokenizer_of()
    done = tokenize([Text(HERE, "HELLO"), Text(HERE, "HI")], tokenizer, 4)
    assert [whole_text(each, tokenizer) for each in done.examples] == ["<s>HEL", "<s>HI</s>"]
    assert (done.truncated, done.dropped) == (1, 0)


@pytest.mark.parametrize(("max_tokens", "kept"), [(7, 0), (8, 1)])
def test_what_has_nothing_left_to_learn_is_dropped_and_counted(tokenizer_of, max_tokens, kept):
    prompt_of_seven = Completion(HERE, "when? ", "AT TWO")
    done = tokenize([prompt_of_seven, Text(HERE, "HI")], tokenizer_of(), max_tokens)
    assert len(done.examples) == 1 + kept
    assert (done.truncated, done.dropped) == (kept, 1 - kept)


def test_a_document_is_cut_into_blocks_that_miss_nothing(tokenizer_of):
    tokenizer = tokenizer_of()
    done = tokenize([Document("notes.txt", "ABCDEFGH")], tokenizer, 4)
    assert [whole_text(each, tokenizer) for each in done.examples] == ["<s>ABC", "DEFG", "H</s>"]
    assert [each["labels"][0] for each in done.examples] == [IGNORED] * 3
    assert (done.truncated, done.dropped) == (0, 0)


def test_a_lone_last_token_of_a_document_is_dropped_and_counted(tokenizer_of):
    done = tokenize([Document("notes.txt", "ABCDEFG")], tokenizer_of(), 4)
    assert [len(each["input_ids"]) for each in done.examples] == [4, 4]
    assert done.dropped == 1


def test_one_token_is_too_few(tokenizer_of):
    with pytest.raises(SettingError, match="max_tokens = 1"):
        tokenize([Text(HERE, "HELLO")], tokenizer_of(), 1)
