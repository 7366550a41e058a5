"""A member's ends and their average arrive to the last bit, in as many parts as they take."""

import pytest
import torch

from splitlearn.errors import MessageError
from splitlearn.vocabulary import StepKey
from splitlearn.wire.adapters import AdapterAssembly
from splitlearn.wire.averages import average_from_parts, average_to_parts, given_from, given_to_parts
from splitlearn.wire.generated import splitlearn_pb2 as pb
from splitlearn.wire.messages import AveragedEnds, GivenEnds

WEIGHTS = {f"layer.{number}.lora_A.weight": torch.randn(4, 30) for number in range(5)}
RESIDUAL = {
    "layer.0": (torch.randn(6, 3), torch.randn(3, 30)),
    "layer.3": (torch.ones(6, 1), torch.ones(1, 30)),
}
PART, MAX = 700, 1 << 20


def over_the_wire(parts):
    return [pb.AdapterPart.FromString(part.SerializeToString()) for part in parts]


def test_what_a_member_gives_arrives():
    given = GivenEnds(7, 1 / 3, 2**64 - 1, WEIGHTS)
    key = StepKey(run=2**48 - 1, incarnation=3)
    parts = over_the_wire(given_to_parts("notes", key, b"client", given, PART))
    assert len(parts) > 3
    assembly = AdapterAssembly(MAX)
    (adapter,) = [found for part in parts if (found := assembly.add(part)) is not None]
    head = parts[0].given
    found = given_from(adapter, head)
    assert (head.run, head.incarnation, parts[0].client) == (key.run, key.incarnation, b"client")
    assert (found.number, found.weight, found.frozen) == (7, 1 / 3, 2**64 - 1)
    assert {name: each.tolist() for name, each in found.weights.items()} == {
        name: each.tolist() for name, each in WEIGHTS.items()
    }


@pytest.mark.parametrize("since_start", [False, True])
def test_an_average_arrives_with_its_residuals(since_start):
    average = AveragedEnds(3, 2**40, 5, 1e-17, WEIGHTS, RESIDUAL, since_start)
    found = average_from_parts(over_the_wire(average_to_parts("notes", average, PART)), MAX)
    assert (found.number, found.due, found.members, found.aggregation_residual) == (3, 2**40, 5, 1e-17)
    assert found.since_start == since_start
    assert found.weights.keys() == WEIGHTS.keys()
    for module, factors in RESIDUAL.items():
        assert all(torch.equal(*pair) for pair in zip(found.residual[module], factors, strict=True))


def test_half_an_average_is_refused():
    average = AveragedEnds(3, 4, 5, 0.0, WEIGHTS, RESIDUAL)
    parts = over_the_wire(average_to_parts("notes", average, PART))
    with pytest.raises(MessageError, match="last part"):
        average_from_parts(parts[:-1], MAX)
    (whole,) = over_the_wire(average_to_parts("notes", average, MAX))
    kept = [each for each in whole.weights if not each.name.endswith("residual_down")]
    del whole.weights[:]
    whole.weights.extend(kept)
    with pytest.raises(MessageError, match="without"):
        average_from_parts([whole], MAX)
