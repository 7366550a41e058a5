import io

import pytest
import torch

from splitlearn.cli.generation import ClockedStreamer, pace_of, sampling
from splitlearn.errors import SettingError


def test_pace_is_counted_after_the_first_token():
    pace = pace_of(10.0, [12.0, 12.5, 13.0])
    assert pace.time_to_first_token_s == 2.0
    assert pace.tokens_per_s == 2.0


def test_a_lone_token_has_its_own_pace():
    assert pace_of(10.0, [10.5]).tokens_per_s == 2.0


def test_the_likeliest_token_unless_there_is_a_temperature():
    assert sampling(0.0, None, None) == {"do_sample": False}
    assert sampling(0.7, None, None) == {"do_sample": True, "temperature": 0.7}
    assert sampling(0.7, 0.9, None)["top_p"] == 0.9


def test_top_p_without_a_temperature_would_do_nothing():
    with pytest.raises(SettingError, match="--temperature"):
        sampling(0.0, 0.9, None)


def test_the_same_seed_draws_the_same():
    drawn = []
    for _ in range(2):
        sampling(1.0, None, 5)
        drawn.append(torch.rand(1))
    assert torch.equal(*drawn)


class Letters:
    """A tokenizer of letters."""

    def decode(self, ids, **how):
        return "".join(map(chr, ids))


def test_the_prompt_is_neither_shown_nor_timed():
    shown = io.StringIO()
    streamer = ClockedStreamer(Letters(), shown)
    for word in ("prompt ", "a ", "b"):
        streamer.put(torch.tensor([list(map(ord, word))]))
    streamer.end()
    assert shown.getvalue() == "a b\n"
    assert len(streamer.came_at) == 2
