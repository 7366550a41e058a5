"""A training whose processes were killed and begun again ends with the adapter of the undisturbed one."""

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from splitlearn.testing import lively_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SEED, SAVE_STEPS, AT_ONCE_S = 1, 5, 10
Disturb = Callable[..., Any]


@pytest.fixture(scope="module")
def kill_resume() -> Iterator[ModuleType]:
    """The benchmark with ten seeds a kind; here it is one."""
    if not BENCHMARKS.is_dir():
        pytest.skip("benchmarks/ is not here")
    with pytest.MonkeyPatch.context() as patch:
        # As long as processes are started: they import it from there, too.
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module("kill_resume")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lively_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def disturb(kill_resume: ModuleType, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Disturb:
    """Kill one kind of process, at a moment that is drawn or given, and resume."""
    context, undisturbed = kill_resume.zygote(), {}

    def disturb(kind: str, moment: Any = None, *, evaluates: bool = False) -> Any:
        training = kill_resume.Training(model, SEED, evaluates)
        if training not in undisturbed:
            folder = tmp_path_factory.mktemp("undisturbed")
            undisturbed[training] = kill_resume.undisturbed(context, training, folder)
        run = undisturbed[training]
        moment = moment or kill_resume.draw(run, kind, SEED)
        return kill_resume.disturbed(
            context, training, tmp_path_factory.mktemp(kind), kind, moment, run.adapter
        )

    return disturb


@pytest.mark.parametrize("kind", ["client", "server", "both"])
def test_a_killed_run_ends_as_the_undisturbed_one_bit_for_bit(disturb, kind):
    outcome = disturb(kind)
    assert outcome.equal
    assert outcome.steps_done - outcome.resumed_from <= SAVE_STEPS
    if kind == "server":
        assert outcome.error == "TrunkUnreachable"
        assert outcome.error_s < AT_ONCE_S


def test_a_run_begun_anew_takes_nothing_over_from_the_open_run_of_its_name(disturb, kill_resume):
    outcome = disturb("client", kill_resume.Moment(step=3, later_s=0.0, in_save=False))
    assert outcome.refused.startswith("SettingError")
    assert outcome.equal  # begun anew under another name


def test_an_evaluation_before_the_save_does_not_change_what_a_resumed_run_drops(disturb, kill_resume):
    moment = kill_resume.Moment(step=12, later_s=0.0, in_save=False)
    assert disturb("client", moment, evaluates=True).equal
