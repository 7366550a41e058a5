from splitlearn.bench.batches import TOGETHER_S, Answered, steps_per_batch


def answers(*batches: tuple[float, int, list[int]]) -> list[Answered]:
    """Batches as (when, device time, sessions); their answers come a moment apart."""
    return [
        Answered(at_s + number * 1e-3, session, device_us)
        for at_s, device_us, sessions in batches
        for number, session in enumerate(sessions)
    ]


def test_answers_that_name_one_device_time_were_one_batch():
    assert steps_per_batch(answers((0.0, 900, [1, 2, 3]), (0.1, 800, [4]))) == 2.0


def test_a_session_has_one_step_in_a_batch():
    assert steps_per_batch(answers((0.0, 900, [1, 2]), (0.1, 900, [1, 2]))) == 2.0


def test_answers_far_apart_were_two_batches_though_they_took_the_same_time():
    assert steps_per_batch(answers((0.0, 900, [1, 2]), (2 * TOGETHER_S, 900, [3, 4]))) == 2.0


def test_the_order_in_which_processes_tell_does_not_matter():
    told = answers((0.0, 900, [1, 2, 3]), (0.1, 900, [1, 2, 3]), (0.2, 700, [2]))
    assert steps_per_batch(reversed(told)) == steps_per_batch(told) == 7 / 3


def test_without_answers_there_are_no_batches():
    assert steps_per_batch([]) == 0.0
