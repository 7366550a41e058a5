"""What a run is opened with, and its steps, arrive as they were sent and are checked on arrival."""

import contextlib
import math
from dataclasses import replace

import pytest
import torch
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from splitlearn.config import WireLimits
from splitlearn.errors import CorruptFrame, FrameError, MessageError, SplitLearnError
from splitlearn.vocabulary import (
    CohortSettings,
    Fate,
    LoraSettings,
    Merged,
    OptimizerSettings,
    Phase,
    Precision,
    Role,
    RunSettings,
    ShareSettings,
    StepKey,
    TapeSettings,
    Timings,
    Versions,
)
from splitlearn.wire.adapters import adapter_from_parts, adapter_to_parts
from splitlearn.wire.frames import DTYPE_IDS, FrameFormat, encode_frame
from splitlearn.wire.generated import splitlearn_pb2 as pb
from splitlearn.wire.messages import (
    AdapterMessage,
    AnswerMessage,
    MemberFacts,
    OpenRun,
    OptimizerStep,
    RunFacts,
    RunStepMessage,
)
from splitlearn.wire.runs import (
    MAX_ACCUMULATION,
    MAX_TARGETS,
    facts_from_proto,
    facts_to_proto,
    open_run_from_proto,
    open_run_to_proto,
    run_name,
)
from splitlearn.wire.steps import answer_from_proto, answer_to_proto, run_step_from_proto, run_step_to_proto

HIDDEN = 8
RAW = FrameFormat()
LIMITS = WireLimits(max_rows=16, max_tokens=64)

LORA = LoraSettings(
    r=3,
    alpha=0.1,
    dropout=0.05,
    target_modules=("mlp.down_proj", "q_proj"),
    exclude_modules=("layers.2.mlp.down_proj",),
    use_rslora=True,
    use_dora=True,
    rank_pattern={"q_proj": 7, "layers.3.q_proj": 1},
    alpha_pattern={"q_proj": 1e-3},
)
OPTIMIZER = OptimizerSettings("sgd", 1 / 3, 1e-17, 0.8, 0.999, 1e-9, 0.7)
EVERYTHING = OpenRun(
    "notes-of_2026.07",
    RunSettings(
        lora=LORA,
        optimizer=OPTIMIZER,
        tape=TapeSettings(recompute=True, checkpoint_every=3),
        precision=Precision("float32", "bfloat16", "float16"),
        seed=2**64 - 1,
        accumulation=16,
        allow_download=False,
        share=ShareSettings("fedavg", every=500, proximal=1 / 3),
    ),
    start_from="letters",
)
COHORT = CohortSettings(
    "quorum", 9, 7, 1 / 3, True, 4, 0.7, 3, 1e-3, "examples", 1 / 7, "krum", 1e-9, 2, 2**53 - 1.0, 1 / 9
)
SHARED = replace(
    EVERYTHING, name="shared", settings=replace(EVERYTHING.settings, cohort=COHORT), member="ward-3"
)

# ---------------------------------------------------------------- opening a run


def opened(asked: OpenRun) -> pb.OpenRunRequest:
    return pb.OpenRunRequest.FromString(open_run_to_proto(asked, b"client").SerializeToString())


@pytest.mark.parametrize(
    "asked",
    [EVERYTHING, SHARED, OpenRun("a"), OpenRun("bare", RunSettings(lora=LoraSettings(r=0)))],
    ids=lambda a: a.name,
)
def test_every_setting_of_a_run_arrives_to_the_last_bit(asked):
    assert open_run_from_proto(opened(asked)) == asked
    assert opened(asked).client == b"client"


def test_a_cohort_that_names_no_aggregation_takes_the_mean():
    older = opened(SHARED)
    for figure in ("aggregation", "member_norm", "byzantine", "max_weight", "max_rate"):
        older.cohort.ClearField(figure)
    mean = replace(COHORT, aggregation="mean", member_norm=0.0, byzantine=0, max_weight=0.0, max_rate=0.0)
    assert open_run_from_proto(older).settings.cohort == mean


@pytest.mark.parametrize("figure", ["clip_norm", "member_norm", "max_weight", "max_rate"])
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_a_cohorts_figures_are_finite_and_none_below_zero(figure, value):
    wrong = opened(SHARED)
    setattr(wrong.cohort, figure, value)
    with pytest.raises(MessageError, match="finite numbers"):
        open_run_from_proto(wrong)


def test_where_a_run_stands_arrives():
    share = ShareSettings("ffa", 7, 1e-17)
    settings = RunSettings(lora=LORA, optimizer=OPTIMIZER, seed=2**64 - 1, allow_download=False, share=share)
    facts = RunFacts("notes", 2**48 - 1, 3, "open", 12, 11, settings, (4, 8, 12), 2**40, (1, 2**64 - 1, 7))
    assert [facts.digest_of(step) for step in (4, 8, 9)] == [1, 2**64 - 1, 0]
    assert facts_from_proto(pb.RunReply.FromString(facts_to_proto(facts).SerializeToString())) == facts


def test_where_each_member_stands_arrives():
    merged = Merged(Fate.MERGED, round=9, staleness=2, members=3)
    members = (
        MemberFacts("a", "active", 2, 7, 41.5, merged, version=0),
        MemberFacts("b", "left", 1, 3, 0.0, Merged(Fate.DROPPED), version=None),
        MemberFacts("c", "lapsed"),
    )
    facts = RunFacts("notes", members=members, member="a", active_members=1, known_members=3)
    arrived = facts_from_proto(pb.RunReply.FromString(facts_to_proto(facts).SerializeToString()))
    assert (arrived.members, arrived.own) == (members, members[0])
    assert (arrived.active_members, arrived.known_members) == (1, 3)


@pytest.mark.parametrize("name", ["a", "0", "Notes-of_2026.07", "run-" + "0" * 16, "a..b", "x" * 64])
def test_a_name_that_a_folder_may_have_is_taken(name):
    assert run_name(name) == name


NO_NAMES = [
    "",
    ".",
    "..",
    "../notes",
    "..\\notes",
    "a/b",
    "/etc",
    "a\\b",
    ".hidden",
    "-r",
    "_a",
    "a b",
    "a\n",
    "a\0b",
    "C:notes",
    "~",
    "$HOME",
    "nötes",
    "\u0661",
    "x" * 65,
    "x" * 100_000,
]


@pytest.mark.parametrize("name", NO_NAMES, ids=lambda name: ascii(name[:20]))
def test_a_name_that_leaves_its_folder_or_hides_in_it_is_refused(name):
    with pytest.raises(MessageError, match="no name for a run") as refused:
        open_run_from_proto(opened(replace(EVERYTHING, name=name)))
    assert len(refused.value.message) < 400


WRONG = {
    "no accumulation": lambda p: setattr(p, "accumulation", 0),
    "an accumulation without end": lambda p: setattr(p, "accumulation", MAX_ACCUMULATION + 1),
    "more targets than any model has": lambda p: p.lora.target_modules.extend(["x"] * MAX_TARGETS),
    "more exclusions": lambda p: p.lora.exclude_modules.extend(["x"] * MAX_TARGETS),
    "more ranks": lambda p: p.lora.rank_pattern.update({str(each): 1 for each in range(MAX_TARGETS + 1)}),
    "more alphas": lambda p: p.lora.alpha_pattern.update({str(each): 1.0 for each in range(MAX_TARGETS + 1)}),
    "a dtype of a later version": lambda p: setattr(p.precision, "autocast", 50),
} | {
    f"{field} of {value}": lambda p, field=field, value=value: setattr(p.optimizer, field, value)
    for field in ("learning_rate", "weight_decay", "beta1", "beta2", "epsilon", "momentum")
    for value in (math.nan, math.inf, -1.0)
}


@pytest.mark.parametrize("what", WRONG)
def test_a_run_is_not_opened_with_what_no_run_has(what):
    proto = opened(EVERYTHING)
    open_run_from_proto(proto)
    WRONG[what](proto)
    with pytest.raises(MessageError):
        open_run_from_proto(proto)


@given(st.binary(max_size=200))
def test_whatever_bytes_ask_to_open_a_run_are_opened_or_refused(noise):
    try:
        proto = pb.OpenRunRequest.FromString(noise)
    except DecodeError:
        return
    with contextlib.suppress(SplitLearnError):
        open_run_from_proto(proto)


# ---------------------------------------------------------------- a run's steps

MASK = torch.tensor([[True, True, False], [True, True, True]])
POSITIONS = torch.tensor([[0, 1, 1], [0, 1, 2]])


def key(phase: Phase) -> StepKey:
    return StepKey(run=2**48 - 1, incarnation=2, step=3, microbatch=5, phase=phase)


STEPS = {
    Phase.FORWARD: RunStepMessage(
        key(Phase.FORWARD),
        torch.randn(2, 3, HIDDEN),
        mask_columns_BT=MASK,
        positions_BT=POSITIONS,
        want_input_gradient=False,
        seed=2**64 - 1,
        acked_through=5,
        deadline_s=60.0,
    ),
    Phase.BACKWARD: RunStepMessage(
        key(Phase.BACKWARD), torch.randn(2, 3, HIDDEN, dtype=torch.bfloat16), loss_scale=65536.0
    ),
    Phase.GRADIENT_NORMS: RunStepMessage(key(Phase.GRADIENT_NORMS), deadline_s=9.0),
    Phase.OPTIMIZER_STEP: RunStepMessage(
        key(Phase.OPTIMIZER_STEP),
        optimizer=OptimizerStep(1 / 3, 5e-5 / 7, skip=True),
        ends={"top.lora_A.weight": torch.randn(2, 3)},
    ),
    Phase.ENDS: RunStepMessage(
        key(Phase.ENDS), ends={"top.lora_A.weight": torch.randn(2, 3), "top.lora_magnitude": torch.ones(3)}
    ),
    Phase.EVALUATE: RunStepMessage(
        key(Phase.EVALUATE), torch.randn(2, 3, HIDDEN), mask_columns_BT=MASK, want_input_gradient=False
    ),
}


def sent(step: RunStepMessage) -> pb.Step:
    return pb.Step.FromString(run_step_to_proto(step, RAW).SerializeToString())


def received(proto: pb.Step) -> RunStepMessage:
    return run_step_from_proto(proto, HIDDEN, LIMITS)


@pytest.mark.parametrize("phase", Phase)
def test_every_field_of_a_step_arrives_in_every_phase(phase):
    step = STEPS[phase]
    arrived = received(sent(step))
    for tensor in ("tensor_BTD", "mask_columns_BT", "positions_BT"):
        there, here = getattr(arrived, tensor), getattr(step, tensor)
        assert (there is None) == (here is None)
        assert here is None or (torch.equal(there, here) and there.dtype == here.dtype)
    assert arrived.ends.keys() == step.ends.keys()
    assert all(torch.equal(arrived.ends[name], each) for name, each in step.ends.items())
    for plain in (
        "ends_version",
        "key",
        "want_input_gradient",
        "loss_scale",
        "seed",
        "optimizer",
        "deadline_s",
    ):
        assert getattr(arrived, plain) == getattr(step, plain)


END = "top.lora_A.weight"
WRONG_ENDS = {
    "another name": ({"top.weight": torch.ones(2)}, MessageError),
    "a path for a name": ({"../lora_A": torch.ones(2)}, MessageError),
    "half precision": ({END: torch.ones(2, 2).half()}, FrameError),
    "whole numbers": ({END: torch.ones(2, 2, dtype=torch.int32)}, FrameError),
    "three dimensions": ({END: torch.ones(2, 2, 2)}, FrameError),
}


@pytest.mark.parametrize("case", WRONG_ENDS)
def test_ends_that_no_adapter_has_are_refused(case):
    ends, error = WRONG_ENDS[case]
    with pytest.raises(error):
        received(sent(RunStepMessage(key(Phase.ENDS), ends=ends)))


def test_an_end_that_comes_twice_or_as_a_gradient_in_a_weights_place_is_refused():
    twice = sent(RunStepMessage(key(Phase.ENDS), ends={END: torch.ones(2)}))
    twice.ends.add().CopyFrom(twice.ends[0])
    with pytest.raises(MessageError, match="twice"):
        received(twice)
    gradient = sent(RunStepMessage(key(Phase.OPTIMIZER_STEP), ends={END: torch.ones(2)}))
    gradient.key.phase = pb.ENDS
    with pytest.raises(FrameError, match="gradient"):
        received(gradient)


def test_version_0_of_the_ends_is_told_from_none():
    for version in (None, 0, 7):
        step = RunStepMessage(key(Phase.FORWARD), torch.randn(1, 2, HIDDEN), ends_version=version)
        assert received(sent(step)).ends_version == version


def test_an_optimizer_step_that_says_nothing_does_not_arrive_as_one_of_scale_0():
    """Which would drop the gradients in silence; without it the engine refuses the step."""
    assert received(sent(RunStepMessage(key(Phase.OPTIMIZER_STEP)))).optimizer is None


def frame(tensor: torch.Tensor, role: Role) -> pb.Frame:
    return encode_frame(tensor, role, RAW)


GOOD = torch.zeros(2, 3, HIDDEN)
MALFORMED = {
    "a gradient in a forward's place": (
        Phase.FORWARD,
        lambda p: p.activation.CopyFrom(frame(GOOD, Role.GRADIENT)),
        FrameError,
    ),
    "a gradient in an evaluation's place": (
        Phase.EVALUATE,
        lambda p: p.activation.CopyFrom(frame(GOOD, Role.GRADIENT)),
        FrameError,
    ),
    "an activation in a backward's place": (
        Phase.BACKWARD,
        lambda p: p.activation.CopyFrom(frame(GOOD, Role.ACTIVATION)),
        FrameError,
    ),
    "weights in a forward's place": (
        Phase.FORWARD,
        lambda p: p.activation.CopyFrom(frame(GOOD, Role.WEIGHT)),
        FrameError,
    ),
    "no activation": (Phase.FORWARD, lambda p: p.ClearField("activation"), FrameError),
    "no gradient": (Phase.BACKWARD, lambda p: p.ClearField("activation"), FrameError),
    "an activation in whole numbers": (
        Phase.FORWARD,
        lambda p: p.activation.CopyFrom(frame(GOOD.long(), Role.ACTIVATION)),
        FrameError,
    ),
    "another hidden size": (
        Phase.FORWARD,
        lambda p: p.activation.CopyFrom(frame(torch.zeros(2, 3, 9), Role.ACTIVATION)),
        FrameError,
    ),
    "too many rows": (
        Phase.FORWARD,
        lambda p: p.activation.CopyFrom(frame(torch.zeros(17, 1, HIDDEN), Role.ACTIVATION)),
        FrameError,
    ),
    "bytes that changed": (Phase.BACKWARD, lambda p: setattr(p.activation, "checksum", 1), CorruptFrame),
    "a mask without an activation": (
        Phase.OPTIMIZER_STEP,
        lambda p: p.mask_columns.CopyFrom(frame(MASK, Role.MASK_COLUMNS)),
        FrameError,
    ),
    "a negative position": (
        Phase.FORWARD,
        lambda p: p.positions.CopyFrom(frame(torch.full((2, 3), -1, dtype=torch.int32), Role.POSITIONS)),
        MessageError,
    ),
    "both a session and a run": (Phase.FORWARD, lambda p: setattr(p.key, "session", 1), MessageError),
    "a phase of a later version": (Phase.FORWARD, lambda p: setattr(p.key, "phase", 50), MessageError),
    "a deadline that is no number": (
        Phase.GRADIENT_NORMS,
        lambda p: setattr(p, "deadline_s", math.nan),
        MessageError,
    ),
} | {
    f"{what} of {value}": (phase, lambda p, set_=set_, value=value: set_(p, value), MessageError)
    for what, phase, set_ in (
        ("a loss scale", Phase.BACKWARD, lambda p, value: setattr(p, "loss_scale", value)),
        ("a gradient scale", Phase.OPTIMIZER_STEP, lambda p, v: setattr(p.optimizer, "gradient_scale", v)),
        ("a learning rate", Phase.OPTIMIZER_STEP, lambda p, v: setattr(p.optimizer, "learning_rate", v)),
    )
    for value in (math.nan, math.inf, -math.inf, -1.0)
}


@pytest.mark.parametrize("what", MALFORMED)
def test_a_step_that_is_malformed_is_refused(what):
    phase, change, kind = MALFORMED[what]
    proto = sent(STEPS[phase])
    received(proto)
    change(proto)
    with pytest.raises(kind):
        received(proto)


# ---------------------------------------------------------------- whatever else arrives

SMALL = st.integers(0, 20)
ANY_FLOAT = st.one_of(st.floats(width=32), st.sampled_from([0.0, 1.0]))
FRAMES = st.builds(
    pb.Frame,
    dtype=st.sampled_from([*DTYPE_IDS.values(), 0, 77]),
    shape=st.lists(st.one_of(SMALL, st.integers(0, 2**32 - 1)), max_size=5),
    data=st.binary(max_size=64),
    checksum=st.integers(0, 2**64 - 1),
    role=SMALL,
    codec=st.integers(0, 3),
)
KEYS = st.builds(
    pb.StepKey,
    run=st.integers(0, 2**64 - 1),
    session=st.integers(0, 2),
    step=st.integers(0, 2**64 - 1),
    microbatch=SMALL,
    phase=st.integers(0, 6),
)
NOISE = st.builds(
    pb.Step,
    key=KEYS,
    activation=FRAMES | st.just(frame(GOOD, Role.ACTIVATION)) | st.just(frame(GOOD, Role.GRADIENT)),
    mask_columns=st.none() | FRAMES,
    positions=st.none() | FRAMES,
    loss_scale=ANY_FLOAT,
    deadline_s=ANY_FLOAT,
    seed=st.integers(0, 2**64 - 1),
    optimizer=st.none()
    | st.builds(pb.OptimizerStep, gradient_scale=st.floats(), learning_rate=st.floats(), skip=st.booleans()),
)


def taken_or_refused(proto: pb.Step, checksum: bool = True) -> None:
    """What is taken is what the engine counts on."""
    try:
        step = run_step_from_proto(proto, HIDDEN, LIMITS, checksum=checksum)
    except SplitLearnError:
        return
    assert math.isfinite(step.loss_scale)
    assert step.loss_scale > 0
    if step.key.phase in (Phase.FORWARD, Phase.BACKWARD, Phase.EVALUATE):
        assert step.tensor_BTD.shape == (step.rows, step.tokens, HIDDEN)
        assert step.tensor_BTD.is_floating_point()
    for side in (step.mask_columns_BT, step.positions_BT):
        assert side is None or side.shape == (step.rows, step.tokens)


@settings(max_examples=150, deadline=None)
@given(NOISE, st.booleans())
def test_whatever_fields_a_step_has_it_is_taken_or_refused(proto, checksum):
    taken_or_refused(proto, checksum)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(Phase), st.data())
def test_a_step_whose_bytes_changed_is_taken_or_refused(phase, data):
    content = bytearray(run_step_to_proto(STEPS[phase], RAW).SerializeToString())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    try:
        proto = pb.Step.FromString(bytes(content))
    except DecodeError:
        return
    taken_or_refused(proto)


# ---------------------------------------------------------------- answers


def answered(answer: AnswerMessage, shape: tuple[int, int, int] | None) -> AnswerMessage:
    proto = pb.Answer.FromString(answer_to_proto(answer, RAW).SerializeToString())
    return answer_from_proto(proto, shape)


def test_norms_arrive_to_the_last_bit_with_those_that_are_absent():
    norms = torch.tensor([0.1, -1.0, 1e-38, math.inf])
    answer = AnswerMessage(key(Phase.GRADIENT_NORMS), norms=norms, versions=Versions("notes", 4))
    arrived = answered(answer, None)
    assert torch.equal(arrived.norms, norms)
    assert (arrived.key, arrived.versions, arrived.activation_BTD) == (answer.key, answer.versions, None)
    none = answered(AnswerMessage(key(Phase.GRADIENT_NORMS), norms=torch.zeros(0)), None)
    assert none.norms.shape == (0,)


def test_a_step_that_was_done_or_skipped_says_so():
    for stepped in (True, False):
        answer = AnswerMessage(key(Phase.OPTIMIZER_STEP), timings=Timings(1, 2, 3), stepped=stepped)
        assert answered(answer, None).stepped is stepped


def test_a_gradient_comes_back_as_one_and_an_activation_is_not_taken_for_it():
    gradient = torch.randn(2, 3, HIDDEN)
    backward = AnswerMessage(key(Phase.BACKWARD), gradient)
    assert torch.equal(answered(backward, (2, 3, HIDDEN)).activation_BTD, gradient)
    proto = answer_to_proto(AnswerMessage(key(Phase.FORWARD), gradient), RAW)
    proto.key.phase = Phase.BACKWARD.value
    with pytest.raises(FrameError, match="gradient"):
        answer_from_proto(proto, (2, 3, HIDDEN))


def test_a_weight_larger_than_a_part_goes_as_its_rows():
    weights = {"a.lora_A.weight": torch.randn(64, 100), "b.lora_magnitude_vector": torch.randn(9)}
    parts = list(adapter_to_parts(AdapterMessage("poet", 3, weights=weights), b"c" * 16, 4000))
    assert max(part.ByteSize() for part in parts) < 8000
    found = adapter_from_parts(parts, 1 << 20).weights
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weight) for name, weight in weights.items())


def test_rows_that_do_not_fit_each_other_are_refused():
    weights = {"a": torch.randn(8, 10), "b": torch.randn(8, 11)}
    [part] = adapter_to_parts(AdapterMessage("poet", weights=weights), b"c" * 16, 1 << 20)
    part.weights[1].name = "a"
    with pytest.raises(FrameError, match="do not fit"):
        adapter_from_parts([part], 1 << 20)
