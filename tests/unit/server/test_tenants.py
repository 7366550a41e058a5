"""Two clients of one server try every way to each other's adapters, runs, sessions and errors: none is one.

Whatever one is refused, its owner is given: each test has both.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor

from splitlearn import TrunkServer
from splitlearn.client.calls import list_runs
from splitlearn.client.grpc_transport import GrpcTransport
from splitlearn.config import ClientConfig
from splitlearn.errors import (
    AdapterError,
    KvBudgetExceeded,
    MessageError,
    ResourceExhausted,
    RunLost,
    SessionLost,
    SplitLearnError,
    TrunkFailed,
)
from splitlearn.testing import tiny_model
from splitlearn.testing.pair import meeting
from splitlearn.vocabulary import CohortSettings, LoraSettings, Phase, RunSettings, StepKey, Versions
from splitlearn.wire.frames import FrameFormat
from splitlearn.wire.messages import (
    AdapterMessage,
    CloseMessage,
    ForkMessage,
    OpenRun,
    OpenSession,
    OptimizerStep,
    RunFacts,
    RunStepMessage,
    StepMessage,
)

HIDDEN, LAYERS = 32, 2
LORA = LoraSettings(r=2, alpha=4.0, target_modules=("q_proj",))
SECRET, NOWHERE = "patients", "nowhere"
WAIT_S = 20.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture
def server(folder: Path, tmp_path: Path) -> Iterator[TrunkServer]:
    with TrunkServer(
        folder,
        port=0,
        device="cpu",
        state_dir=tmp_path,
        sessions={"session_tokens": 32, "kv_budget_bytes": 1 << 16, "lease_s": WAIT_S},
        runs={"max_runs": 2, "max_adapters": 3},
    ) as running:
        yield running


class Tenant:
    """One client with a connection of its own."""

    def __init__(self, server: TrunkServer) -> None:
        self.wire = GrpcTransport(server.address, server._identity, ClientConfig(), FrameFormat())

    def generate(self, adapter: str = "", session: int = 7) -> Tensor:
        """The first step of a session, which is closed again."""
        try:
            return self.begin(adapter, session)
        finally:
            self.wire.close_session(CloseMessage(session))

    def begin(self, adapter: str = "", session: int = 7, rows: int = 1) -> Tensor:
        opening = OpenSession(Versions(adapter))
        return self.step(1, session, rows=rows, open=opening)

    def step(self, number: int, session: int = 7, tokens: int = 3, rows: int = 1, **how: Any) -> Tensor:
        message = StepMessage(StepKey(session=session, step=number), activation(tokens, rows), **how)
        answer = self.wire.step(replace(message, deadline_s=WAIT_S))
        assert answer.activation_BTD is not None
        return answer.activation_BTD

    def open_run(self, name: str = SECRET, **how: Any) -> RunFacts:
        return self.wire.open_run(OpenRun(name, RunSettings(lora=LORA), **how))

    def train(self, run: RunFacts, phase: Phase, **how: Any) -> Any:
        key = StepKey(run=run.number, incarnation=run.incarnation, step=run.step + 1, phase=phase)
        has_tensor = phase in (Phase.FORWARD, Phase.BACKWARD, Phase.EVALUATE)
        tensor = activation(3) if has_tensor else None
        return self.wire.run_step(RunStepMessage(key, tensor, deadline_s=WAIT_S, **how))

    def load(self, name: str = SECRET, seed: int = 0) -> None:
        self.wire.load_adapter(adapter(name, seed))


@pytest.fixture
def clinic(server: TrunkServer) -> Iterator[Tenant]:
    with connected(server) as tenant:
        yield tenant


@pytest.fixture
def bank(server: TrunkServer) -> Iterator[Tenant]:
    with connected(server) as tenant:
        yield tenant


@contextmanager
def connected(server: TrunkServer) -> Iterator[Tenant]:
    tenant = Tenant(server)
    try:
        yield tenant
    finally:
        tenant.wire.close()


def activation(tokens: int, rows: int = 1) -> Tensor:
    return torch.randn(rows, tokens, HIDDEN, generator=torch.Generator().manual_seed(tokens))


def adapter(name: str, seed: int) -> AdapterMessage:
    draw = torch.Generator().manual_seed(seed)
    module = "model.layers.{}.self_attn.q_proj.lora_{}.weight"
    weights = {
        module.format(layer, side): torch.randn(*shape, generator=draw)
        for layer in (2, 3)
        for side, shape in (("A", (2, HIDDEN)), ("B", (HIDDEN, 2)))
    }
    return AdapterMessage(name, 1, LORA, weights)


def refusal(ask: Callable[..., object], *args: Any, **how: Any) -> SplitLearnError:
    with pytest.raises(SplitLearnError) as refused:
        ask(*args, **how)
    return refused.value


def same_but_for_the_name(one: SplitLearnError, other: SplitLearnError) -> bool:
    """Nobody learns from an error that somebody else has what was named."""
    as_nowhere = one.message.replace(SECRET, NOWHERE)
    return (type(one), as_nowhere, one.facts) == (type(other), other.message, other.facts)


# ---------------------------------------------------------------- adapters


def test_two_clients_name_their_adapters_alike_and_each_generates_with_its_own(clinic, bank):
    clinic.load(SECRET, seed=1)
    before = clinic.generate(SECRET)
    bank.load(SECRET, seed=2)
    theirs = bank.generate(SECRET)
    assert torch.equal(clinic.generate(SECRET), before)
    assert not torch.allclose(theirs, before)
    with pytest.raises(MessageError, match="loaded already"):
        clinic.load(SECRET)


def test_another_clients_adapter_is_answered_like_one_that_is_not_there(clinic, bank):
    clinic.load()
    there, not_there = refusal(bank.generate, SECRET), refusal(bank.generate, NOWHERE)
    assert isinstance(there, AdapterError)
    assert same_but_for_the_name(there, not_there)
    clinic.generate(SECRET)


def test_nobody_unloads_another_clients_adapter(clinic, bank):
    clinic.load()
    there = refusal(bank.wire.unload_adapter, SECRET)
    assert same_but_for_the_name(there, refusal(bank.wire.unload_adapter, NOWHERE))
    clinic.generate(SECRET)
    clinic.wire.unload_adapter(SECRET)
    assert isinstance(refusal(clinic.generate, SECRET), AdapterError)


def test_no_run_begins_with_another_clients_adapter(clinic, bank):
    clinic.load()
    there = refusal(bank.open_run, "run", start_from=SECRET)
    assert same_but_for_the_name(there, refusal(bank.open_run, "run", start_from=NOWHERE))
    clinic.open_run("run", start_from=SECRET)


def test_a_session_does_not_move_to_another_clients_adapter(clinic, bank):
    clinic.load()
    clinic.begin(SECRET)
    moved = clinic.wire.export_session(7, LAYERS)
    there = refusal(bank.wire.import_session, 8, moved)
    elsewhere = replace(moved, head=replace(moved.head, adapter=Versions(NOWHERE, 1)))
    assert isinstance(there, AdapterError)
    assert same_but_for_the_name(there, refusal(bank.wire.import_session, 8, elsewhere))
    clinic.wire.import_session(8, moved)
    assert torch.equal(clinic.step(1, 8), clinic.step(2, 7))


# ---------------------------------------------------------------- runs


def test_nobody_generates_with_another_clients_run(clinic, bank):
    clinic.open_run()
    there, not_there = refusal(bank.generate, SECRET), refusal(bank.generate, NOWHERE)
    assert isinstance(there, AdapterError)
    assert same_but_for_the_name(there, not_there)
    clinic.generate(SECRET)


def test_nobody_downloads_another_clients_adapter(clinic, bank):
    clinic.open_run()
    there, not_there = (refusal(bank.wire.download_adapter, name) for name in (SECRET, NOWHERE))
    assert isinstance(there, RunLost)
    assert same_but_for_the_name(there, not_there)
    assert clinic.wire.download_adapter(SECRET).weights


def test_nobody_saves_another_clients_run(clinic, bank):
    run = clinic.open_run()
    at = StepKey(run=run.number, incarnation=run.incarnation)
    there = refusal(bank.wire.save_run, SECRET, at, ())
    unknown = refusal(bank.wire.save_run, SECRET, replace(at, run=run.number ^ 2), ())
    assert isinstance(there, RunLost)
    assert (there.message, there.facts) == (unknown.message, unknown.facts)
    assert clinic.wire.save_run(SECRET, at, ()).checkpoints == (0,)


def test_nobody_does_steps_of_another_clients_run_though_its_number_is_listed(clinic, bank):
    clinic.open_run()
    listed = bank.wire.run_facts(SECRET)
    steps = {phase: {} for phase in Phase} | {Phase.OPTIMIZER_STEP: {"optimizer": OptimizerStep(1.0, 0.1)}}
    clinic.train(listed, Phase.FORWARD)
    for phase, how in steps.items():
        there = refusal(bank.train, listed, phase, **how)
        unknown = refusal(bank.train, replace(listed, number=listed.number ^ 2), phase, **how)
        assert isinstance(there, RunLost)
        assert (there.message, there.facts) == (unknown.message, unknown.facts)
    answers = {
        phase: clinic.train(listed, phase, **how)
        for phase, how in steps.items()
        if how == {} and phase is not Phase.ENDS
    }
    assert answers[Phase.BACKWARD].activation_BTD is not None, "its tape is there"
    assert clinic.train(listed, Phase.OPTIMIZER_STEP, **steps[Phase.OPTIMIZER_STEP]).versions.version == 1


def test_who_takes_a_run_over_by_its_name_has_it_and_who_had_it_no_longer_does(clinic, bank):
    """Until there are credentials, a run's name is what it takes."""
    clinic.open_run()
    bank.wire.join_run(SECRET)
    bank.generate(SECRET)
    assert isinstance(refusal(clinic.generate, SECRET), AdapterError)


# ---------------------------------------------------------------- sessions


def test_another_clients_session_is_not_there_under_its_number(clinic, bank):
    written = clinic.begin()
    asks = {
        "its next step": lambda: bank.step(2),
        "its kept answer": lambda: bank.step(1),
        "a fork of it": lambda: bank.wire.fork(ForkMessage(7, 9, at_step=1)),
        "all of it": lambda: bank.wire.export_session(7, LAYERS),
    }
    for what, ask in asks.items():
        assert isinstance(refusal(ask), SessionLost), what
    bank.wire.close_session(CloseMessage(7))
    bank.generate("", session=11)
    assert torch.equal(clinic.step(1), written), "its own kept answer"
    clinic.wire.fork(ForkMessage(7, 9, at_step=1))
    assert clinic.wire.export_session(7, LAYERS).head.length == 3
    assert torch.equal(clinic.step(1, 9), clinic.step(2))


def test_what_a_session_leaves_in_its_slots_does_not_reach_the_next_client(clinic, bank):
    alone = bank.generate()
    for session in range(1, 5):
        clinic.begin("", session, rows=2)
        clinic.step(2, session, tokens=9, rows=2)
    for session in range(1, 5):
        clinic.wire.close_session(CloseMessage(session))
    clinic.generate("", 99)
    assert torch.equal(bank.generate(), alone)


# ---------------------------------------------------------------- errors


def test_a_step_that_fails_in_a_joint_batch_is_its_own_clients_error_alone(server, clinic, bank):
    clinic.begin()
    bank.begin()
    bank.wire.fork(ForkMessage(7, 9, at_step=1))
    expected = bank.step(1, 9, tokens=1)
    bank.wire.close_session(CloseMessage(9))
    engine, batches = server.engine, []
    run = engine._runner.run
    (broken,) = [s.slots[0] for id, s in engine._sessions._sessions.items() if id[0] == clinic.wire._client]

    def breaks(plan, *args, **kwargs):
        batches.append(len(plan.steps))
        if broken in plan.slots:
            raise RuntimeError(f"the secret of slot {broken}")
        return run(plan, *args, **kwargs)

    engine._runner.run = breaks
    found: dict[str, Any] = {}

    def ask(name: str, tenant: Tenant) -> None:
        try:
            found[name] = tenant.step(2, tokens=1)
        except SplitLearnError as error:
            found[name] = error

    with meeting(engine, 2):
        asking = [Thread(target=ask, args=each) for each in (("clinic", clinic), ("bank", bank))]
        for each in asking:
            each.start()
        for each in asking:
            each.join(WAIT_S)
    assert max(batches) == 2, "they ran together first"
    torch.testing.assert_close(found["bank"], expected, atol=1e-6, rtol=1e-5)
    assert isinstance(found["clinic"], TrunkFailed)
    assert "secret" not in found["clinic"].message
    bank.step(3)
    assert isinstance(refusal(clinic.step, 3), SessionLost)


def test_who_finds_no_room_is_told_totals_and_nothing_of_others(clinic, bank):
    clinic.open_run(SECRET)
    clinic.open_run(f"{SECRET}-2")
    for number in range(3):
        clinic.load(f"{SECRET}-{number}")
    clinic.begin("", rows=6)
    refused = [
        refusal(bank.open_run, "run"),
        refusal(bank.load, "mine"),
        refusal(bank.begin, "", rows=30),
    ]
    assert [type(each) for each in refused] == [ResourceExhausted, ResourceExhausted, KvBudgetExceeded]
    for each in refused:
        assert SECRET not in each.message
        assert clinic.wire._client.hex() not in each.message
    assert [each.facts for each in refused[:2]] == [
        {"runs": 2, "max_runs": 2},
        {"adapters": 3, "max_adapters": 3},
    ]
    assert refused[2].facts.keys() == {"wanted_bytes", "free_bytes", "total_bytes"}


def test_a_runs_members_are_told_to_members_and_to_others_only_how_many_they_are(server, clinic, bank):
    cohort = RunSettings(lora=LORA, cohort=CohortSettings("async", members=2))
    clinic.wire.open_run(OpenRun(SECRET, cohort, member="ward-3"))
    (member,) = clinic.wire.run_facts(SECRET).members
    assert (member.name, member.state, member.last, member.version) == ("ward-3", "active", None, None)
    stranger = bank.wire.run_facts(SECRET)
    assert (stranger.members, stranger.number, stranger.incarnation) == ((), 0, 0)
    assert (stranger.active_members, stranger.known_members) == (1, 1)
    (listed,) = list_runs(server.address, WAIT_S)
    assert (listed.members, listed.known_members, listed.settings.cohort.rule) == ((), 1, "async")
    with pytest.raises(MessageError, match="is trained by 1 of its members") as refused:
        bank.wire.close_run(SECRET)
    assert "ward-3" not in refused.value.message
