"""A server says what it is, serves the whole protocol, and stops in order."""

import socket
from contextlib import contextmanager

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from splitlearn import TrunkServer
from splitlearn.client.calls import describe
from splitlearn.client.grpc_errors import error_of
from splitlearn.client.grpc_transport import GrpcTransport
from splitlearn.config import ClientConfig
from splitlearn.errors import (
    MessageError,
    ProtocolMismatch,
    ResourceExhausted,
    SettingError,
    SplitLearnError,
    SplitPlanError,
    TrunkUnreachable,
)
from splitlearn.server.service import TrunkService
from splitlearn.testing.tiny import tiny_model
from splitlearn.wire.frames import FrameFormat
from splitlearn.wire.generated import splitlearn_pb2 as pb
from splitlearn.wire.generated import splitlearn_pb2_grpc as rpc
from splitlearn.wire.handshake import ModelIdentity

DEADLINE_S = 20
SETTINGS = {"port": 0, "sessions": {"kv_budget_bytes": 1 << 20, "session_tokens": 64}, "max_streams": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def server(folder):
    with TrunkServer(folder, **SETTINGS) as running:
        yield running


@contextmanager
def stub(server):
    with grpc.insecure_channel(server.address) as channel:
        yield rpc.TrunkStub(channel)


def identity_of(server) -> ModelIdentity:
    facts = describe(server.address, DEADLINE_S)
    hashes = (facts.config_hash, facts.weights_hash)
    return ModelIdentity(*hashes, facts.bottom_layers, facts.trunk_layers, facts.top_layers)


def refusal(server, *messages: pb.ClientMessage) -> SplitLearnError:
    """What a stream of these messages ends with."""
    with stub(server) as trunk, pytest.raises(grpc.RpcError) as ended:
        for _ in trunk.Steps(iter(messages), timeout=DEADLINE_S):
            pass
    return error_of(ended.value, server.address)


def test_a_server_describes_itself(server):
    facts = describe(server.address, DEADLINE_S)
    assert (facts.bottom_layers, facts.trunk_layers, facts.top_layers) == (2, 2, 2)
    assert (facts.model_type, facts.hidden_size, facts.session_tokens) == ("llama", 32, 64)
    assert facts.kv_bytes_free == facts.kv_bytes_total > 0
    assert facts.batched
    assert (facts.attention, facts.attention_reason) == (
        "sdpa",
        "flash-attention: it needs a CUDA device, this is cpu",
    )
    assert not facts.draining


def test_every_call_of_the_protocol_is_served():
    calls = [method.name for method in pb.DESCRIPTOR.services_by_name["Trunk"].methods]
    assert [name for name in calls if getattr(TrunkService, name) is getattr(rpc.TrunkServicer, name)] == []


def test_a_stream_begins_with_a_hello(server):
    assert isinstance(refusal(server, pb.ClientMessage(step=pb.Step())), MessageError)
    assert isinstance(refusal(server, pb.ClientMessage()), MessageError)


def test_a_client_of_another_protocol_is_told_so(server):
    hello = pb.ClientMessage(hello=pb.Hello(protocol=99, client=b"x" * 16))
    assert isinstance(refusal(server, hello), ProtocolMismatch)


def test_streams_beyond_the_limit_are_refused_until_one_ends(server):
    identity = identity_of(server)

    def connect() -> GrpcTransport:
        return GrpcTransport(server.address, identity, ClientConfig(), FrameFormat())

    first, second = connect(), connect()
    with pytest.raises(ResourceExhausted, match="2 streams"):
        connect()
    first.close()
    third = connect()
    second.close()
    third.close()


def test_health_is_served_under_the_service_s_name_and_the_server_s(server):
    with grpc.insecure_channel(server.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "splitlearn.v1.Trunk"):
            reply = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=DEADLINE_S)
            assert reply.status == health_pb2.HealthCheckResponse.SERVING


def test_a_port_that_is_taken_is_a_setting_error(folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        server = TrunkServer(folder, **(SETTINGS | {"port": taken.getsockname()[1]}))
        with pytest.raises(SettingError, match="is the port taken"):
            server.start()


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"colour": "red"}, SettingError),
        ({"port": "many"}, SettingError),
        ({"device": "cuda:77"}, SettingError),
        ({"bottom_layers": 4}, SplitPlanError),
        ({"top_layers": 0}, SplitPlanError),
        ({"sessions": {"kv_budget_bytes": 10}}, SettingError),
    ],
)
def test_a_setting_that_cannot_be_is_refused_before_anything_listens(folder, settings, kind):
    with pytest.raises(kind):
        TrunkServer(folder, **(SETTINGS | settings)).start()


def test_a_stopped_server_is_gone(folder):
    with TrunkServer(folder, **SETTINGS) as server:
        address = server.address
    with pytest.raises(TrunkUnreachable, match="splitlearn serve"):
        describe(address, DEADLINE_S)
