from itertools import chain

import pytest

from splitlearn.bench.load import Load
from splitlearn.bench.texts import Texts
from splitlearn.errors import SettingError


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_each_session_belongs_to_one_process(processes):
    load = Load(sessions=20, processes=processes, prompt_tokens=4)
    shares = [load.prompts_of(number) for number in range(processes)]
    assert sorted(chain(*shares)) == sorted(load.prompts)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_prompts_differ_in_length_so_that_batches_are_as_uneven_as_real_ones():
    assert Load(sessions=5, prompt_tokens=3).prompts == [3, 4, 5, 3, 4]


@pytest.mark.parametrize("asked", [{"sessions": 0}, {"seconds": 0.0}, {"prompt_tokens": 0}])
def test_a_load_of_nothing_is_refused(asked):
    with pytest.raises(SettingError, match="above 0"):
        Load(**asked)


def test_a_text_without_room_behind_its_prompt_is_refused():
    with pytest.raises(SettingError, match="raise the text tokens"):
        Load(prompt_tokens=16, text_tokens=31)
    assert Load(prompt_tokens=16, text_tokens=32)


@pytest.mark.parametrize("asked", [{"sessions": ()}, {"sessions": (1, 0)}, {"new_tokens": 1}, {"rounds": 0}])
def test_texts_of_nothing_are_refused(asked):
    with pytest.raises(SettingError):
        Texts(**asked)
