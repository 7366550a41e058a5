import pytest

from splitlearn.cli.chat import Conversation, common_length


@pytest.mark.parametrize(
    ("first", "second", "length"),
    [([], [1], 0), ([1, 2, 3], [1, 2, 4], 2), ([1, 2], [1, 2, 3], 2), ([1, 2, 3], [1], 1), ([9], [1], 0)],
)
def test_tokens_shared_from_the_start(first, second, length):
    assert common_length(first, second) == length


class Cache:
    def __init__(self, *, slides: bool = False):
        self.slides, self.cropped = slides, 0

    def crop(self, tokens):
        if self.slides:
            raise RuntimeError("the window has passed")
        self.cropped = tokens


def conversation_that_holds(ids, cache):
    conversation = Conversation(None, None, None, {})
    conversation._held_ids, conversation._cache = ids, cache
    return conversation


def test_the_cache_is_cut_back_to_what_is_still_said():
    cache = Cache()
    conversation_that_holds([1, 2, 3, 4], cache)._forget_what_differs([1, 2, 9, 9, 9])
    assert cache.cropped == -2


def test_a_cache_that_goes_on_is_left_as_it_is():
    cache = Cache()
    conversation_that_holds([1, 2], cache)._forget_what_differs([1, 2, 3])
    assert cache.cropped == 0


def test_one_token_is_always_left_to_run():
    cache = Cache()
    conversation_that_holds([1, 2], cache)._forget_what_differs([1, 2])
    assert cache.cropped == -1


def test_a_window_that_has_passed_starts_over():
    conversation = conversation_that_holds([1, 2, 3], Cache(slides=True))
    conversation._forget_what_differs([1, 9, 9])
    assert conversation._cache is None
