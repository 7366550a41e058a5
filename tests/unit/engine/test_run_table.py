"""A run opens once under its name, and one that cannot be trained leaves nothing in the trunk."""

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from splitlearn.config import RunConfig
from splitlearn.engine.adapter_table import AdapterTable
from splitlearn.engine.run import Run
from splitlearn.engine.run_table import RunTable
from splitlearn.engine.tape import Tape
from splitlearn.engine.trunk_state import TrunkState
from splitlearn.errors import (
    AdapterError,
    CheckpointError,
    MessageError,
    ResourceExhausted,
    RunLost,
    RunTakenOver,
    SettingError,
)
from splitlearn.model.plan import SplitPlan
from splitlearn.model.segments import TrunkSegment
from splitlearn.testing.tiny import tiny_config
from splitlearn.vocabulary import (
    LoraSettings,
    OptimizerSettings,
    Precision,
    RunSettings,
    StepKey,
    TapeSettings,
)
from splitlearn.wire.messages import OpenRun

ME, YOU = b"me", b"you"
LORA = LoraSettings(r=4, target_modules=("q_proj", "v_proj"))


@pytest.fixture(scope="module")
def whole() -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(tiny_config("llama")).eval()


class Table(RunTable):
    """A table with its trunk at hand."""

    def __init__(self, whole: PreTrainedModel, **config) -> None:
        self.trunk = TrunkSegment.of_whole(whole, SplitPlan(6, 2, 2)).eval()
        state = TrunkState(self.trunk)
        super().__init__(state, Tape(1 << 20), RunConfig(**config), AdapterTable(state, 4))

    def adapters(self) -> set[str]:
        return {name for name, _ in self.trunk.named_parameters() if "lora_" in name}


@pytest.fixture
def table(whole) -> Table:
    return Table(whole)


def asked(name: str = "notes", **settings) -> OpenRun:
    return OpenRun(name, RunSettings(**({"lora": LORA} | settings)))


def test_a_run_is_found_by_its_name_and_by_its_steps(table):
    run = table.open(ME, asked()).run
    assert table.named("notes") is run
    assert table.find(ME, StepKey(run=run.owner.number, incarnation=1)).run is run
    assert (run.facts().step, run.facts().version, run.facts().state) == (0, 0, "open")
    assert run.owner.number != table.open(ME, asked("other")).number != 0


def test_a_name_that_is_taken_is_refused(table):
    table.open(ME, asked())
    before = table.adapters()
    with pytest.raises(MessageError, match="join it"):
        table.open(YOU, asked())
    assert (len(table), table.adapters()) == (1, before)


def test_no_more_runs_open_than_the_server_allows(whole):
    table = Table(whole, max_runs=2)
    for name in ("one", "two"):
        table.open(ME, asked(name))
    with pytest.raises(ResourceExhausted, match="allows 2") as refused:
        table.open(ME, asked("three"))
    assert refused.value.facts == {"runs": 2, "max_runs": 2}
    table.close("one")
    table.open(ME, asked("three"))


def test_first_weights_are_the_seeds_whoever_was_there_before(table, whole):
    table.open(ME, asked("other", seed=1))
    table.close("other")
    table.open(ME, asked("another", seed=2))
    weights = table.open(ME, asked(seed=5)).run.current.weights
    expected = Table(whole).open(ME, asked(seed=5)).run.current.weights
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


REFUSED = {
    "an unknown optimizer": (asked(optimizer=OptimizerSettings("lion")), SettingError),
    "a beta that no optimizer takes": (asked(optimizer=OptimizerSettings(beta1=1.5)), SettingError),
    "another one": (asked(optimizer=OptimizerSettings("adamw_torch", beta2=1.0)), SettingError),
    "a rank of its own that is none": (
        asked(lora=LoraSettings(r=4, rank_pattern={"q_proj": 0})),
        AdapterError,
    ),
    "no target": (asked(lora=LoraSettings(r=4)), AdapterError),
    "a target that is not here": (asked(lora=LoraSettings(r=4, target_modules=("lm_head",))), AdapterError),
    "an expression": (asked(lora=LoraSettings(r=4, target_modules=("(a+)+",))), AdapterError),
    "autocast to no half precision": (asked(precision=Precision(autocast="float64")), SettingError),
    "autocast to float32": (asked(precision=Precision(autocast="float32")), SettingError),
    "weights in another dtype": (asked(precision=Precision(weights="bfloat16")), SettingError),
    "an adapter that is not loaded": (
        OpenRun("notes", RunSettings(lora=LORA), start_from="none"),
        AdapterError,
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_run_that_cannot_be_trained_is_refused_and_leaves_nothing(table, what):
    wrong, kind = REFUSED[what]
    with pytest.raises(kind):
        table.open(ME, wrong)
    assert (len(table), table.adapters()) == (0, set())
    table.open(ME, asked())


def test_a_family_that_cannot_recompute_layers_refuses_to(whole):
    table = Table(whole)
    table.trunk.causal_lm.__class__ = type("Other", (type(table.trunk.causal_lm),), {})
    type(table.trunk.causal_lm).supports_gradient_checkpointing = False
    with pytest.raises(SettingError, match="checkpoint_every"):
        table.open(ME, asked(tape=TapeSettings(checkpoint_every=1)))
    table.open(ME, asked(tape=TapeSettings(recompute=True)))


def test_a_closed_run_leaves_nothing_and_its_name_is_free(table):
    table.open(ME, asked("other"))
    before = table.adapters()
    table.open(ME, asked())
    table.close("notes")
    assert table.adapters() == before
    with pytest.raises(RunLost):
        table.close("notes")
    table.open(ME, asked())


def test_generation_is_given_the_runs_weights_as_they_are(table):
    run = table.open(ME, asked()).run
    assert table.adapter(ME, "notes") is run.current
    with pytest.raises(AdapterError, match="no adapter 'other'"):
        table.adapter(ME, "other")


def test_a_restore_that_fails_halfway_breaks_a_run_that_was_open_and_leaves_no_new_one(table, monkeypatch):
    snapshot = table.open(ME, asked()).run.snapshot()
    with monkeypatch.context() as full:
        full.setattr(Run, "_published", no_memory)
        with pytest.raises(torch.OutOfMemoryError):
            table.restore(YOU, snapshot)
    assert table.named("notes").facts().state == "broken"
    table.close("notes")
    monkeypatch.setattr(torch.optim.Optimizer, "load_state_dict", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        table.restore(YOU, snapshot)
    assert (len(table), table.adapters()) == (0, set())


def test_a_run_whose_optimizer_has_no_room_leaves_nothing(table, monkeypatch):
    monkeypatch.setattr(Run, "_published", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        table.open(ME, asked())
    assert (len(table), table.adapters()) == (0, set())


def no_memory(*_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_who_is_fenced_off_is_told_that_the_run_is_somebody_elses(table):
    run = table.open(ME, asked()).run
    table.join(YOU, "notes")
    with pytest.raises(RunTakenOver, match=r"incarnation 2.*Let this training end"):
        table.find(ME, StepKey(run=run.owner.number, incarnation=1))
    assert table.find(YOU, StepKey(run=run.owner.number, incarnation=2)).run is run


@pytest.mark.parametrize("is_open", [True, False])
def test_a_snapshot_that_does_not_fit_is_refused_and_leaves_what_was(table, is_open):
    run = table.open(ME, asked()).run
    snapshot = run.snapshot()
    table.close("notes")
    torn = type(snapshot)(**{name: getattr(snapshot, name) for name in snapshot.__slots__} | {"weights": {}})
    if is_open:
        run = table.open(ME, asked()).run
    before = table.adapters()
    with pytest.raises(CheckpointError):
        table.restore(YOU, torn)
    assert (len(table), table.adapters()) == (int(is_open), before)
