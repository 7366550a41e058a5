"""The privacy boundary, read from the protocol itself."""

import hashlib
from pathlib import Path

from google.protobuf.descriptor import FieldDescriptor

from splitlearn import errors
from splitlearn.vocabulary import CodecId, Phase, Role
from splitlearn.wire import generated
from splitlearn.wire.frames import DTYPES
from splitlearn.wire.generated import splitlearn_pb2 as pb
from splitlearn.wire.status import CLASSES

FORBIDDEN = ("token", "label", "logit", "input_id", "text", "prompt", "target_id", "vocab")
LENGTHS = {"Limits.max_tokens", "Limits.session_tokens"}
CLOSED = {Role: pb.Role, Phase: pb.Phase, CodecId: pb.Codec}


def fields() -> list[FieldDescriptor]:
    return [field for message in pb.DESCRIPTOR.message_types_by_name.values() for field in message.fields]


def test_no_field_has_a_place_for_a_token_a_label_or_a_logit():
    suspicious = {
        f"{field.containing_type.name}.{field.name}"
        for field in fields()
        if any(word in field.name for word in FORBIDDEN)
    }
    assert suspicious == LENGTHS, "a limit in tokens is a length; anything else needs a decision record"


def test_tensors_travel_in_frames_alone():
    """Bytes elsewhere are ids, pieces of whole messages, and a codec's scales."""
    raw = {f"{f.containing_type.name}.{f.name}" for f in fields() if f.type == FieldDescriptor.TYPE_BYTES}
    ids = {name for name in raw if name.endswith(".client")} | {"Hello.lane_of", "Welcome.ticket"}
    assert raw - ids == {"Frame.data", "Chunk.data", "CodecParameters.scales", "Step.trace_id"}


def test_the_closed_lists_of_the_protocol_are_those_of_the_vocabulary():
    for ours, theirs in CLOSED.items():
        assert {member.name: member.value for member in ours} == dict(theirs.items())
    assert set(DTYPES) == set(pb.DType.values()) - {pb.DTYPE_UNSPECIFIED}


def test_every_error_of_the_protocol_is_a_class_of_ours():
    assert set(CLASSES) == set(pb.ErrorCode.values()) - {pb.ERROR_UNSPECIFIED}
    assert all(issubclass(kind, errors.SplitLearnError) for kind in CLASSES.values())


def test_the_generated_code_is_of_the_proto_beside_it():
    folder = Path(generated.__file__).parent
    proto = (folder / "splitlearn.proto").read_bytes()
    recorded = (folder / "splitlearn.proto.sha256").read_text().split()[0]
    assert hashlib.sha256(proto).hexdigest() == recorded, "run `make proto`"
