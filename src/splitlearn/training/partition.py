"""Who gets which examples in a simulation: several ways to deal them out, each example to one client.

A scheme gives each client's examples by their index, sorted. The same arguments give the same, in every
version of Python: of `random.Random` only `random` promises that, so that nothing else of it is used.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, chain, pairwise
from typing import TypeVar

from splitlearn.errors import DataError, SettingError

Each = TypeVar("Each")
Draw = Callable[[], float]
"""From 0 up to, not including, 1."""
Parts = list[list[int]]
SMALLEST_ALPHA, LARGEST_ALPHA = 1e-6, 1e6
"""Beyond them a client has all of a class, or everyone the same."""
AT_LEAST = 2
"""One to learn from and one to hold out."""
SHARDS_EACH = 2


def iid(examples: int, clients: int, seed: int) -> Parts:
    """Everyone's examples are drawn alike; their numbers differ by one at most.

    Raises:
        DataError: there are more clients than examples.
        SettingError: there is no client.
    """
    _require_enough(examples, clients, at_least=1)
    order = _shuffled(range(examples), random.Random(seed).random)
    return [sorted(order[client::clients]) for client in range(clients)]


def dirichlet(
    classes: Sequence[int], clients: int, alpha: float, seed: int, at_least: int = AT_LEAST
) -> Parts:
    """Each class is shared out as a Dirichlet draw over the clients says, so that mixtures and sizes differ.

    Hsu, Qi and Brown 2019 (arXiv:1909.06335) brought in the draw, of classes for each client; to draw for
    each class over the clients is of Yurochkin et al. 2019 (arXiv:1905.12022). Who would have fewer
    examples than `at_least` is given some by whoever has most.

    Args:
        classes: of each example.
        alpha: how alike the clients are: 100 is nearly `iid`, 0.1 gives most of a class to one or two.
        at_least: examples that everyone has.

    Raises:
        DataError: there are too few examples for that.
        SettingError: alpha is not from 1e-6 to 1e6, or there is no client.
    """
    if not SMALLEST_ALPHA <= alpha <= LARGEST_ALPHA:
        raise SettingError(
            f"alpha = {alpha} cannot be drawn with: name one from {SMALLEST_ALPHA:g} to {LARGEST_ALPHA:g}"
        )
    _require_enough(len(classes), clients, at_least)
    draw = random.Random(seed).random
    parts: Parts = [[] for _ in range(clients)]
    for members in _by_class(classes):
        shares = _dirichlet_draw(alpha, clients, draw)
        for part, got in zip(parts, _shared_out(_shuffled(members, draw), shares, draw), strict=True):
            part += got
    _give_to_the_poor(parts, at_least)
    return [sorted(part) for part in parts]


def shard(classes: Sequence[int], clients: int, seed: int, shards_each: int = SHARDS_EACH) -> Parts:
    """Sorted by class, cut in equal shards, and so many shards dealt to everyone: few classes each.

    As McMahan et al. 2017 (arXiv:1602.05629) have it, with two shards a client.

    Raises:
        DataError: there are fewer examples than shards.
        SettingError: there is no client, or no shard for it.
    """
    if shards_each < 1:
        raise SettingError(f"{shards_each} shards for each client are none: name at least 1")
    _require_enough(len(classes), clients, at_least=shards_each)
    draw = random.Random(seed).random
    in_order = [index for members in _by_class(classes) for index in _shuffled(members, draw)]
    shards = _shuffled(_cut(in_order, clients * shards_each), draw)
    return [sorted(chain(*shards[client::clients])) for client in range(clients)]


def field(classes: Sequence[int], clients: int | None, seed: int) -> Parts:
    """Everyone has whole classes: a client a class, or all classes dealt to so many clients in turn.

    Args:
        clients: None makes a client of each class, in the classes' order.

    Raises:
        DataError: there are more clients than classes.
        SettingError: there is no client.
    """
    groups = _by_class(classes)
    if clients is None:
        return groups
    _require_clients(clients)
    if len(groups) < clients:
        raise DataError(
            f"{len(groups)} values are too few for {clients} clients, who have at least one each: "
            "name fewer clients, or another field"
        )
    order = _shuffled(groups, random.Random(seed).random)
    return [sorted(chain(*order[client::clients])) for client in range(clients)]


def _require_enough(examples: int, clients: int, at_least: int) -> None:
    _require_clients(clients)
    if examples < clients * at_least:
        raise DataError(
            f"{examples} examples are too few for {clients} clients with at least {at_least} each: "
            "name fewer clients, ask for less, or add examples"
        )


def _require_clients(clients: int) -> None:
    if clients < 1:
        raise SettingError(f"{clients} clients hold nothing: name at least 1")


def _by_class(classes: Sequence[int]) -> Parts:
    """The examples of each class that there is, in the classes' order."""
    members: dict[int, list[int]] = {}
    for index, each in enumerate(classes):
        members.setdefault(each, []).append(index)
    return [members[each] for each in sorted(members)]


def _shuffled(items: Iterable[Each], draw: Draw) -> list[Each]:
    drawn = [(draw(), place, item) for place, item in enumerate(items)]
    return [item for _, _, item in sorted(drawn, key=lambda each: each[:2])]


def _cut(items: Sequence[int], pieces: int) -> Parts:
    bounds = [len(items) * piece // pieces for piece in range(pieces + 1)]
    return _between(items, bounds)


def _shared_out(items: Sequence[int], shares: Sequence[float], draw: Draw) -> Parts:
    """Everyone's count is the share's, up or down to a whole number, and on average exactly it."""
    offset = draw()
    ends = [math.floor(len(items) * reached + offset) for reached in accumulate(shares)]
    # The shares' sum may miss 1 by a rounding.
    return _between(items, [0, *(min(end, len(items)) for end in ends[:-1]), len(items)])


def _between(items: Sequence[int], bounds: Sequence[int]) -> Parts:
    return [list(items[start:end]) for start, end in pairwise(bounds)]


def _dirichlet_draw(alpha: float, clients: int, draw: Draw) -> list[float]:
    """Shares that add up to 1."""
    logs = [_log_gamma_draw(alpha, draw) for _ in range(clients)]
    # Their logarithms: with a small alpha the draws themselves would all round to 0.
    largest = max(logs)
    weights = [math.exp(each - largest) for each in logs]
    total = sum(weights)
    return [weight / total for weight in weights]


def _log_gamma_draw(shape: float, draw: Draw) -> float:
    """The logarithm of a draw of Gamma(shape, 1), after Marsaglia and Tsang 2000.

    Of the shape one larger, where their method holds for all, and brought down by a power of a uniform draw.
    """
    d = shape + 2 / 3
    while True:
        x = math.sqrt(-2 * math.log(1 - draw())) * math.cos(2 * math.pi * draw())
        v = (1 + x / math.sqrt(9 * d)) ** 3
        if v > 0 and math.log(1 - draw()) < x * x / 2 + d * (1 - v + math.log(v)):
            return math.log(d * v) + math.log(1 - draw()) / shape


def _give_to_the_poor(parts: Parts, at_least: int) -> None:
    for part in parts:
        while len(part) < at_least:
            part.append(max(parts, key=len).pop())
