"""What the library's `generate` can do, a split model does too, with the whole model's words."""

import copy
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast, TextIteratorStreamer
from transformers.cache_utils import DynamicCache, QuantizedLayer

from splitlearn.testing.pair import Pair, lively_model, served_pair
from splitlearn.testing.tiny import VOCABULARY, tiny_whole

DEADLINE_S = 60.0
IDS = torch.randint(4, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS)
MASK[1, :4] = 0


@pytest.fixture(scope="module", params=["llama", "mistral", "gpt2"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with served_pair(lively_model(request.param, tmp_path_factory.mktemp("model"))) as pair:
        yield pair


def write(model: PreTrainedModel, **how: Any) -> Any:
    """A text of 12 tokens after two padded rows, the same each time."""
    asked: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 12}
    if "inputs_embeds" not in how:
        asked["input_ids"] = IDS
    torch.manual_seed(3)
    return model.generate(**(asked | {"attention_mask": MASK} | how))


ONE_ROW = {"input_ids": IDS[:1], "attention_mask": MASK[:1]}
WAYS: dict[str, dict[str, Any]] = {
    "several samples of a prompt": {"do_sample": True, "num_return_sequences": 3},
    "sampled beams": {"do_sample": True, "num_beams": 3, "num_return_sequences": 2},
    "top-k and temperature": {"do_sample": True, "top_k": 5, "temperature": 1.7},
    "penalties": {"min_new_tokens": 5, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "an end token": {"eos_token_id": list(range(64)), "min_new_tokens": 3},
    "a prompt read in chunks": {"prefill_chunk_size": 5},
    "one row in chunks": ONE_ROW | {"prefill_chunk_size": 5},
    "prompt lookup": ONE_ROW | {"prompt_lookup_num_tokens": 3},
    "no cache": {"use_cache": False},
    "the dynamic cache by name": {"cache_implementation": "dynamic"},
}


@pytest.mark.parametrize("how", WAYS.values(), ids=list(WAYS))
def test_a_text_is_the_whole_models_text(pair: Pair, how: dict[str, Any]) -> None:
    assert torch.equal(write(pair.split, **how), write(pair.whole, **how))


def test_the_ways_of_writing_are_not_all_one() -> None:
    """Else the test above would compare one text with itself."""
    assert len(WAYS) == len({str(how) for how in WAYS.values()})


@pytest.mark.parametrize("seed", [0, 5], ids=["the same model", "another model"])
def test_an_assistant_model_on_the_clients_side_helps(pair: Pair, tmp_path: Any, seed: int) -> None:
    """Its candidates are checked by the split model: taken, or cropped off the session."""
    family = pair.whole.config.model_type
    assistant = tiny_whole(lively_model(family, tmp_path, seed))
    steps = pair.split.trunk.transport.traffic.messages
    written = write(pair.split, **ONE_ROW, assistant_model=assistant)
    steps = pair.split.trunk.transport.traffic.messages - steps
    assert torch.equal(written, write(pair.whole, **ONE_ROW))
    if seed == 0:
        assert steps < 2 * 12, "with an assistant that is always right, a step gives several tokens"


def test_a_split_model_can_be_the_assistant(pair: Pair) -> None:
    written = write(pair.whole, **ONE_ROW, assistant_model=pair.split)
    assert torch.equal(written, write(pair.whole, **ONE_ROW))


def test_embeddings_in_place_of_tokens_give_the_whole_models_text(pair: Pair) -> None:
    texts = [
        write(model, inputs_embeds=model.get_input_embeddings()(IDS)) for model in (pair.split, pair.whole)
    ]
    assert torch.equal(*texts)
    assert texts[0].shape == (2, 12)


def test_scores_and_logits_come_with_the_text_bit_for_bit(pair: Pair) -> None:
    asked = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "num_beams": 3}
    split, whole = (write(model, **asked) for model in (pair.split, pair.whole))
    assert torch.equal(split.sequences_scores, whole.sequences_scores)
    for name in ("scores", "logits"):
        assert torch.equal(torch.stack(split[name]), torch.stack(whole[name]))


# ---------------------------------------------------------------- streaming


class Heard:
    """A streamer that notes what it is given, and when: how many steps the engine had run."""

    def __init__(self, pair: Pair) -> None:
        self.tokens: list[int] = []
        self.batches: list[int] = []
        self.ended = False
        self._pair = pair

    def put(self, value: Tensor) -> None:
        self.tokens.extend(value.flatten().tolist())
        self.batches.append(self._pair.engine.ran.batches)

    def end(self) -> None:
        self.ended = True


def test_a_streamer_hears_each_token_as_it_is_made(pair: Pair) -> None:
    heard = Heard(pair)
    written = write(pair.split, **ONE_ROW, streamer=heard)
    assert heard.tokens == written[0].tolist()
    assert heard.ended
    # The prompt comes before any step; each token after one step more.
    assert [later - heard.batches[0] for later in heard.batches] == list(range(13))


def test_a_text_can_be_read_from_another_thread_while_it_is_written(pair: Pair) -> None:
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(VOCABULARY)}, "w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=DEADLINE_S)
    with ThreadPoolExecutor(1) as threads:
        written = threads.submit(write, pair.split, **ONE_ROW, streamer=streamer)
        said = "".join(streamer)
    assert said.split() == tokenizer.decode(written.result()[0, 12:]).split()
    assert len(said.split()) == 12


# ---------------------------------------------------------------- several texts at once


def steps_of(model: PreTrainedModel, ids_BT: Tensor) -> Iterator[Tensor]:
    """The logits of one token after another, each when it is asked for."""
    cache = DynamicCache(config=model.config)
    for token_B1 in ids_BT.split(1, dim=1):
        yield read(model, cache, token_B1)


def test_two_texts_stepped_by_turns_do_not_disturb_each_other(pair: Pair) -> None:
    by_turns = list(
        zip(steps_of(pair.split, IDS[:1]), steps_of(pair.split, IDS[1:].repeat(2, 1)), strict=True)
    )
    for text, ids_BT in enumerate((IDS[:1], IDS[1:].repeat(2, 1))):
        alone = torch.cat(list(steps_of(pair.whole, ids_BT)))
        assert torch.equal(torch.cat([logits[text] for logits in by_turns]), alone)


def test_four_threads_get_the_texts_that_they_get_in_turn(pair: Pair) -> None:
    jobs: list[dict[str, Any]] = [
        ONE_ROW,
        {"input_ids": IDS[1:, 4:], "attention_mask": MASK[1:, 4:]},
        {},
        ONE_ROW | {"num_beams": 2},
    ]
    in_turn = [write(pair.whole, **job) for job in jobs]
    start = threading.Barrier(len(jobs), timeout=DEADLINE_S)

    def write_at_once(job: dict[str, Any]) -> Tensor:
        start.wait()
        return write(pair.split, **job)

    with ThreadPoolExecutor(len(jobs)) as threads:
        at_once = list(threads.map(write_at_once, jobs, timeout=DEADLINE_S))
    for one, other in zip(at_once, in_turn, strict=True):
        assert torch.equal(one, other)


# ---------------------------------------------------------------- caches


def read(model: PreTrainedModel, cache: DynamicCache, ids_BT: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids_BT, past_key_values=cache, use_cache=True).logits


def continued(model: PreTrainedModel) -> Tensor:
    first = write(model, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, IDS[:, :3]], dim=1)
    mask = torch.cat([MASK, torch.ones(2, ids.shape[1] - MASK.shape[1], dtype=torch.long)], dim=1)
    return write(model, input_ids=ids, attention_mask=mask, past_key_values=first.past_key_values)


def begun_without_a_config(model: PreTrainedModel) -> Tensor:
    return write(model, **ONE_ROW, past_key_values=DynamicCache())


def forked(model: PreTrainedModel) -> Tensor:
    """Two different continuations of one prompt, and then the prompt's own."""
    prefix = DynamicCache(config=model.config)
    read(model, prefix, IDS[:1])
    forks = [copy.deepcopy(prefix) for _ in range(2)]
    texts = [
        write(
            model,
            input_ids=torch.cat([IDS[:1], torch.full((1, 2), token)], dim=1),
            attention_mask=torch.ones(1, 14, dtype=torch.long),
            past_key_values=cache,
        )
        for token, cache in zip((5, 6, 7), (*forks, prefix), strict=True)
    ]
    assert not torch.equal(texts[0][:, 14:], texts[1][:, 14:])
    return torch.cat(texts)


def forked_before_its_first_step(model: PreTrainedModel) -> Tensor:
    empty = DynamicCache(config=model.config)
    copied = copy.deepcopy(empty)
    return torch.cat([read(model, empty, IDS), read(model, copied, IDS.flip(0))])


def forked_with_a_crop_and_rows_that_wait(model: PreTrainedModel) -> Tensor:
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    read(model, cache, IDS)
    cache.crop(-3)
    cache.batch_select_indices(torch.tensor([1, 1, 0]))
    copied = copy.deepcopy(cache)
    return torch.cat([read(model, each, torch.tensor([[9], [8], [7]])) for each in (copied, cache)])


def repeated(model: PreTrainedModel) -> Tensor:
    cache = DynamicCache(config=model.config)
    read(model, cache, IDS)
    cache.batch_repeat_interleave(3)
    return read(model, cache, torch.arange(10, 16)[:, None])


def selected(model: PreTrainedModel) -> Tensor:
    cache = DynamicCache(config=model.config)
    read(model, cache, IDS)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0, 0]))
    first = read(model, cache, torch.arange(10, 13)[:, None])
    cache.batch_select_indices(torch.tensor([False, True, True]))
    return torch.cat([first, read(model, cache, torch.arange(20, 22)[:, None])])


def cropped(model: PreTrainedModel) -> Tensor:
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    read(model, cache, IDS)
    cache.crop(-5)
    first = read(model, cache, IDS[:, :2] + 1)
    cache.crop(-1)
    return torch.cat([first, read(model, cache, IDS[:, :2] + 2)])


def reset(model: PreTrainedModel) -> Tensor:
    cache = DynamicCache(config=model.config)
    read(model, cache, IDS[:1])
    cache.reset()
    assert cache.get_seq_length() == 0
    return read(model, cache, IDS)


def begun_in_inference_mode(model: PreTrainedModel) -> Tensor:
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(IDS, attention_mask=MASK, past_key_values=cache, use_cache=True)
    mask = torch.cat([MASK, torch.ones(2, 1, dtype=torch.long)], dim=1)
    ids = torch.cat([IDS, IDS[:, :1]], dim=1)
    return write(model, input_ids=ids, attention_mask=mask, past_key_values=cache)


USES = (
    continued,
    begun_without_a_config,
    begun_in_inference_mode,
    forked,
    forked_before_its_first_step,
    forked_with_a_crop_and_rows_that_wait,
    repeated,
    selected,
    cropped,
    reset,
)


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
def test_a_cache_that_was(pair: Pair, use: Callable[[PreTrainedModel], Tensor]) -> None:
    """... continued, forked and so on gives what the whole model's gives, bit for bit."""
    assert torch.equal(use(pair.split), use(pair.whole))


class Lossless(QuantizedLayer):
    """A quantised layer whose codes are the values themselves."""

    def _quantize(self, tensor: Tensor, axis: int) -> Tensor:
        return tensor

    def _dequantize(self, codes: Tensor) -> Tensor:
        return codes


def test_a_quantised_cache_quantises_bottom_and_top(pair: Pair) -> None:
    layers = [Lossless(residual_length=4) for _ in range(pair.whole.config.num_hidden_layers)]
    cache = DynamicCache()
    cache.layers = layers
    assert torch.equal(write(pair.split, **ONE_ROW, past_key_values=cache), write(pair.whole, **ONE_ROW))
