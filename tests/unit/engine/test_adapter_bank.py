"""A version has a place while sessions hold it; steps of several adapters run together as if alone."""

from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from splitlearn.config import BatchingConfig, CompileMode, SessionConfig
from splitlearn.engine.adapter_bank import AdapterBank
from splitlearn.engine.decode_graphs import DecodeGraph
from splitlearn.engine.engine import Engine
from splitlearn.engine.run import Run
from splitlearn.engine.trunk_state import BARE, AdapterVersion
from splitlearn.errors import AdapterError
from splitlearn.model import lora_bank
from splitlearn.model.lora import LoraSlots
from splitlearn.model.plan import SplitPlan
from splitlearn.model.segments import TrunkSegment
from splitlearn.testing.tiny import tiny_config
from splitlearn.vocabulary import LoraSettings, Precision, RunSettings, StepKey, Versions
from splitlearn.wire.messages import (
    AdapterMessage,
    AnswerMessage,
    CloseMessage,
    ForkMessage,
    OpenRun,
    OpenSession,
    OptimizerStep,
    StepMessage,
)

ME, WAIT_S, HIDDEN = b"me", 20, 32
ROOMY = 1 << 24
Q_AND_DOWN = LoraSettings(r=4, alpha=8.0, target_modules=("q_proj", "down_proj"))
ADAPTERS = {
    "small": LoraSettings(r=2, alpha=8.0, target_modules=("q_proj", "up_proj")),
    "all": LoraSettings(r=5, alpha=2.0, target_modules=("all-linear",), use_rslora=True),
    "dora": replace(Q_AND_DOWN, use_dora=True),
}


@pytest.fixture(scope="module")
def whole() -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config("llama")).eval()


def trunk_of(whole: PreTrainedModel) -> TrunkSegment:
    return TrunkSegment.of_whole(whole, SplitPlan(6, 2, 2)).eval()


def random_like(weights: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.3 * torch.randn(weight.shape, generator=generator) for name, weight in weights.items()}


# ---------------------------------------------------------------- places


class Bank(AdapterBank):
    """A bank with its slots at hand."""

    def __init__(self, whole: PreTrainedModel, budget_bytes: int = ROOMY) -> None:
        self.slots = LoraSlots(trunk_of(whole).causal_lm)
        super().__init__(self.slots, budget_bytes)

    def version(self, slot: str, settings: LoraSettings = Q_AND_DOWN) -> AdapterVersion:
        first = self.slots.add(slot, settings, seed=0)
        return AdapterVersion("notes", slot, 1, random_like(first, 1))

    def admitted(self, *versions: AdapterVersion) -> tuple[int, ...]:
        for version in versions:
            self.admit(version)
        return self.places(versions, even_one=True)


def newer(version: AdapterVersion) -> AdapterVersion:
    return replace(
        version, number=version.number + 1, weights=random_like(version.weights, version.number + 1)
    )


def test_each_version_has_a_place_of_its_own_and_the_bare_trunk_the_first(whole) -> None:
    bank = Bank(whole)
    first = bank.version("slot1")
    second = newer(first)
    places = bank.admitted(BARE, first, second, bank.version("slot2"))
    assert places[0] == 0
    assert sorted(places) == [0, 1, 2, 3]
    assert bank.admitted(second, first) == (places[2], places[1]), "it keeps its place"


def test_one_adapter_alone_is_bound_and_costs_the_bank_nothing(whole) -> None:
    bank = Bank(whole)
    version = bank.version("slot1")
    bank.admit(version)
    assert bank.places([version, version], even_one=False) == ()
    assert bank.places([BARE], even_one=False) == (0,)
    assert bank.bytes == 0
    assert len(set(bank.places([version, BARE], even_one=False))) == 2
    assert bank.bytes > 0


def test_a_place_is_free_again_once_nobody_holds_its_version(whole) -> None:
    """A run that is trained publishes a version a step: what is let go makes room for the next."""
    bank = Bank(whole)
    held = bank.version("slot1")
    bank.admitted(held)
    bytes, generation = bank.bytes, bank.generation
    for _ in range(20):
        held = newer(held)
        bank.admitted(held)
        bank.keep([held, BARE])
    assert (bank.bytes, bank.generation) == (bytes, generation)
    assert bank.mixes(held)
    bank.keep([])
    assert not bank.mixes(held)


def test_it_grows_in_powers_of_two_and_says_that_its_memory_is_another(whole) -> None:
    bank = Bank(whole)
    version = bank.version("slot1")
    sizes, generations = [], set()
    held = []
    for _ in range(9):
        held.append(version := newer(version))
        bank.admitted(*held)
        sizes.append(bank.bytes)
        generations.add(bank.generation)
    assert {size // sizes[0] for size in sizes} == {1, 2, 4}
    assert len(generations) == 3
    wider = bank.version("slot2", replace(Q_AND_DOWN, r=5))
    bank.admitted(*held, wider)
    assert bank.bytes == 2 * sizes[-1], "rank 5 is padded to 8"
    assert bank.generation not in generations


def test_what_does_not_fit_the_budget_has_no_place_until_others_are_gone(whole) -> None:
    roomy = Bank(whole)
    roomy.admitted(roomy.version("slot1"))
    bank = Bank(whole, roomy.bytes)
    held = [bank.version("slot1")]
    while len(held) < 4:
        held.append(newer(held[-1]))
    for version in held:
        bank.admit(version)
    assert [bank.mixes(version) for version in held] == [True, True, True, False]
    with pytest.raises(RuntimeError, match="side by side"):
        bank.places(held, even_one=True)
    assert bank.places(held[3:], even_one=True) == ()
    bank.keep(held[1:])
    bank.admit(held[3])
    assert len(set(bank.places(held[1:], even_one=True))) == 3
    assert bank.bytes <= roomy.bytes


def test_what_was_large_does_not_keep_its_room_from_others(whole) -> None:
    budget = Bank(whole)
    budget.admitted(budget.version("slot1", replace(Q_AND_DOWN, r=16)))
    bank = Bank(whole, budget.bytes)
    large = bank.version("slot1", replace(Q_AND_DOWN, r=16))
    bank.admitted(large)
    bank.keep([])
    many = [bank.version(f"slot{number}") for number in range(2, 9)]
    assert sorted(bank.admitted(*many)) == [1, 2, 3, 4, 5, 6, 7]


def test_more_than_plain_lora_has_no_place(whole) -> None:
    bank = Bank(whole)
    version = bank.version("slot1", ADAPTERS["dora"])
    assert bank.admitted(version) == ()
    assert not bank.mixes(version)


def test_an_adapter_that_was_unloaded_is_not_mixed_any_more(whole) -> None:
    bank = Bank(whole)
    version = bank.version("slot1")
    bank.admitted(version)
    bank.slots.remove("slot1")
    assert not bank.mixes(version)


def test_without_memory_adapters_run_apart_from_then_on(whole, monkeypatch) -> None:
    bank = Bank(whole)
    first, second = bank.version("slot1"), bank.version("slot2")
    bank.admit(first)
    bank.admit(second)

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(lora_bank.BankedLayer, "__init__", full)
    with pytest.raises(RuntimeError, match="side by side"):
        bank.places([first, second], even_one=False)
    monkeypatch.undo()
    assert bank.admitted(first) == ()
    assert not bank.mixes(first)
    assert bank.mixes(BARE)


# ---------------------------------------------------------------- batches


@contextmanager
def running(whole: PreTrainedModel, compile: CompileMode) -> Iterator[Engine]:
    sessions = SessionConfig(kv_budget_bytes=1 << 20, session_tokens=64)
    engine = Engine(trunk_of(whole), BatchingConfig(), sessions, compile=compile)
    engine.start()
    try:
        for seed, name in enumerate(ADAPTERS):
            engine.runs.load_adapter(ME, message(whole, name, seed)).result(WAIT_S)
        yield engine
    finally:
        engine.stop()


@pytest.fixture(params=["off", "default"])
def engine(whole, request) -> Iterator[Engine]:
    with running(whole, request.param) as engine:
        yield engine


def message(whole: PreTrainedModel, name: str, seed: int) -> AdapterMessage:
    settings = ADAPTERS[name]
    first = LoraSlots(trunk_of(whole).causal_lm).add("slot", settings, seed=0)
    return AdapterMessage(name, 1, settings, random_like(first, seed))


def alone(whole: PreTrainedModel, name: str, text_BTD: Tensor) -> Tensor:
    """What PEFT gives on a trunk with this adapter alone."""
    if not name:
        return alone_with(whole, None, {}, text_BTD)
    told = message(whole, name, list(ADAPTERS).index(name))
    return alone_with(whole, told.lora, told.weights, text_BTD)


def alone_with(
    whole: PreTrainedModel, settings: LoraSettings | None, weights: Mapping[str, Tensor], text_BTD: Tensor
) -> Tensor:
    trunk = trunk_of(whole)
    slots = LoraSlots(trunk.causal_lm)
    if settings is not None:
        slots.add("slot", settings, seed=0)
        slots.bind("slot", weights)
    with torch.inference_mode():
        return trunk(text_BTD, position_ids=torch.arange(text_BTD.shape[1])[None])


class Texts:
    """Sessions that read their texts side by side, a step of each in every batch."""

    def __init__(self, engine: Engine, adapters: list[str]) -> None:
        self.engine = engine
        self.adapters: dict[int, str] = {}
        self.texts: dict[int, Tensor] = {}
        self.read: dict[int, int] = {}
        self.next: dict[int, int] = {}
        for adapter in adapters:
            self.add(adapter)

    def add(self, adapter: str) -> int:
        number = len(self.adapters) + 1
        self.adapters[number], self.texts[number] = adapter, tokens(12 + number % 2, number)
        self.read[number], self.next[number] = 0, 1
        return number

    def step(self, count: int) -> dict[int, Tensor]:
        """The next tokens of all of them, none of which runs before all wait."""
        futures: dict[int, Future[AnswerMessage]] = {}
        self.engine._queue.ask(lambda: [futures.update(self._submitted(count))]).result(WAIT_S)
        return {number: self._answer(future) for number, future in futures.items()}

    def _submitted(self, count: int) -> Iterator[tuple[int, Future[AnswerMessage]]]:
        for number, adapter in self.adapters.items():
            start, step = self.read[number], self.next[number]
            opening = OpenSession(adapter=Versions(adapter)) if step == 1 else None
            piece = self.texts[number][:, start : start + count]
            asked = StepMessage(StepKey(session=number, step=step), piece, open=opening)
            self.read[number], self.next[number] = start + count, step + 1
            yield number, self.engine.submit(ME, asked)

    def _answer(self, future: Future[AnswerMessage]) -> Tensor:
        answer = future.result(WAIT_S)
        if answer.error is not None:
            raise answer.error
        return answer.activation_BTD


def tokens(count: int, seed: int) -> Tensor:
    return torch.randn(1, count, HIDDEN, generator=torch.Generator().manual_seed(seed))


def apart(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def read_to_the_end(texts: Texts) -> dict[int, Tensor]:
    """Prompts of different length one by one, then everybody's tokens together."""
    read: dict[int, list[Tensor]] = {number: [] for number in texts.adapters}
    for count in (4, 1, 1, 2, 1, 1):
        for number, part in texts.step(count).items():
            read[number].append(part)
    return {number: torch.cat(parts, 1) for number, parts in read.items()}


def test_sessions_of_different_adapters_share_their_batches_and_get_their_own(engine, whole) -> None:
    names = ["small", "", "all", "small", "all", ""]
    texts = Texts(engine, names)
    read = read_to_the_end(texts)
    assert engine.ran.mixed == 6
    for number, name in texts.adapters.items():
        ours, text = read[number], texts.texts[number]
        others = {"small": "all", "all": "", "": "small"}[name]
        count = ours.shape[1]
        assert apart(ours, alone(whole, name, text)[:, :count]) <= 1e-5
        assert apart(ours, alone(whole, others, text)[:, :count]) > 1e-3, "the adapter makes it"
    if engine.graphs is not None:
        assert engine.graphs.banked_first_steps.proven
        assert not engine.graphs.banked_first_steps.failed


def test_rows_with_each_others_places_get_each_others_results(engine, whole, monkeypatch) -> None:
    """The control of the equality above."""
    honest = AdapterBank.places
    monkeypatch.setattr(AdapterBank, "places", lambda *args, **how: honest(*args, **how)[::-1])
    texts = Texts(engine, ["small", "all"])
    read = read_to_the_end(texts)
    for number, name in texts.adapters.items():
        assert apart(read[number], alone(whole, name, texts.texts[number])[:, :10]) > 1e-3


def test_what_cannot_be_mixed_runs_beside_the_others_in_batches_of_its_own(engine, whole) -> None:
    texts = Texts(engine, ["dora", "small", "dora", "all"])
    read = read_to_the_end(texts)
    assert engine.ran.shared == 2 * engine.ran.mixed > 0
    for number, name in texts.adapters.items():
        assert apart(read[number], alone(whole, name, texts.texts[number])[:, :10]) <= 1e-5


def test_an_adapter_that_is_unloaded_costs_its_own_sessions_only(engine, whole) -> None:
    texts = Texts(engine, ["small", "all", ""])
    texts.step(4)
    engine.runs.unload_adapter(ME, "small").result(WAIT_S)
    with pytest.raises(AdapterError, match="unloaded"):
        texts.step(1)
    del texts.adapters[1]
    read = texts.step(1)
    for number, name in texts.adapters.items():
        assert apart(read[number], alone(whole, name, texts.texts[number])[:, 5:6]) <= 1e-5


def test_places_go_with_their_last_session(engine, whole) -> None:
    texts = Texts(engine, ["small", "all", ""])
    texts.step(4)
    engine.fork(ME, ForkMessage(1, 9, incarnation=0, at_step=1)).result(WAIT_S)
    for number in (1, 2):
        engine.close(ME, CloseMessage(number, 0)).result(WAIT_S)
    small, all_ = (engine._runs.adapter(ME, name) for name in ("small", "all"))
    engine._queue.ask(lambda: None).result(WAIT_S)
    asked = StepMessage(StepKey(session=3, step=2), tokens(1, 3))
    engine.submit(ME, asked).result(WAIT_S)
    assert (engine.bank.mixes(small), engine.bank.mixes(all_)) == (True, False)
    engine.close(ME, CloseMessage(9, 0)).result(WAIT_S)
    engine.submit(ME, replace(asked, key=StepKey(session=3, step=3))).result(WAIT_S)
    assert not engine.bank.mixes(small)


def test_sessions_keep_the_version_that_they_began_with_while_its_run_is_trained(engine, whole) -> None:
    settings = RunSettings(lora=ADAPTERS["all"])
    engine.runs.open(ME, OpenRun("run", settings)).result(WAIT_S)

    def train(run: Run) -> AdapterVersion:
        gradients = random_like(run.masters, seed=run.owner.next_step)
        run.owner.contribution.add(list(gradients.values()), 1.0)
        run.apply(OptimizerStep(1.0, 0.1))
        return run.current

    texts, began = Texts(engine, [""]), {}
    for _ in range(3):
        version = engine.runs.do("run", train).result(WAIT_S)
        began[texts.add("run")] = version
        read = texts.step(1)
        before = engine.ran.mixed
        for number, held in began.items():
            text = texts.texts[number][:, : texts.read[number]]
            assert apart(read[number], alone_with(whole, settings.lora, held.weights, text)[:, -1:]) <= 1e-5
    texts.step(1)
    assert engine.ran.mixed == before + 1
    assert len(engine.bank._places) == 3
    for number in began:
        engine.close(ME, CloseMessage(number, 0)).result(WAIT_S)
    texts.adapters = {1: ""}
    texts.step(1)
    assert not engine.bank._places


def test_autocast_is_not_mixed_with_none(engine, whole) -> None:
    texts = Texts(engine, ["small", "all"])
    texts.step(4)
    for session in engine._sessions._sessions.values():
        if session.id[1] == 2:
            session.precision = Precision(autocast="bfloat16")
    before = engine.ran.mixed
    texts.step(1)
    assert engine.ran.mixed == before


def test_a_banked_step_that_is_wrong_is_noticed_and_bare_ones_stay_fast(whole, monkeypatch) -> None:
    honest = DecodeGraph.run

    def wrong(self: DecodeGraph, *args: object) -> Tensor:
        out = honest(self, *args)
        return out if self._bank is None else out.roll(1, dims=-1)

    monkeypatch.setattr(DecodeGraph, "run", wrong)
    with running(whole, "default") as engine:
        texts = Texts(engine, ["small", "all"])
        read = read_to_the_end(texts)
        for number, name in texts.adapters.items():
            assert apart(read[number], alone(whole, name, texts.texts[number])[:, :10]) <= 1e-5
        assert engine.graphs.banked_first_steps.failed
        assert not engine.graphs._banked
        assert not engine.graphs.first_steps.failed


def test_in_steady_state_adapters_come_and_go_and_nothing_is_recorded(whole) -> None:
    with running(whole, "default") as engine:
        Texts(engine, ["", ""]).step(1)
        bare = engine.graphs.recorded
        assert (bare, engine.bank.bytes) == (1, 0), "without adapters there is no bank"
        recorded = []
        for names in (["small", "all"], ["all", ""], ["", "small"], ["all", "small"]):
            texts = Texts(engine, names)
            for number in texts.adapters:
                engine.close(ME, CloseMessage(number, 0)).result(WAIT_S)
            for _ in range(4):
                texts.step(1)
            recorded.append(engine.graphs.recorded)
        assert recorded[0] == bare + 1
        assert recorded == recorded[:1] * 4
        older = list(engine.graphs._banked.values())
        engine.runs.load_adapter(ME, replace(message(whole, "all", 7), name="wide")).result(WAIT_S)
        texts = Texts(engine, ["all", "small", "wide", ""])
        for number in texts.adapters:
            engine.close(ME, CloseMessage(number, 0)).result(WAIT_S)
        engine._queue.ask(lambda: engine.bank._reshape(replace(engine.bank._shape, places=8))).result(WAIT_S)
        texts.step(1)
        assert engine.graphs.recorded == recorded[0] + 1
        assert not set(older) & set(engine.graphs._banked.values()), "what read the older memory is gone"
