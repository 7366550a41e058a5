"""What a simulation's file says is checked before anything starts, and each fault has its line and field."""

from pathlib import Path

import pytest

from splitlearn.cli.simulate import EXAMPLE
from splitlearn.cli.simulation.config_file import read_simulation
from splitlearn.config import ServerConfig
from splitlearn.errors import SettingError
from splitlearn.vocabulary import CohortSettings

WHOLE = """\
model: demo
data: demo
output: out
clients: 3
train: {max_steps: 4}
"""


def read(folder: Path, text: str):
    file = folder / "simulation.yaml"
    file.write_text(text)
    return read_simulation(file)


def test_the_example_says_what_it_shows():
    told = read_simulation(EXAMPLE)
    assert told.cohort_settings == CohortSettings(
        "quorum", 3, quorum=2, timeout_s=20.0, carry_late=True, clip_norm=1.0
    )
    assert [told.steps_of(client) for client in (1, 2, 3, 4)] == [8, 8, 8, 4]
    assert [told.factor_of(client) for client in (1, 2, 3)] == [1.0, 1.0, 3.0]
    assert (told.dealing.clients, told.dealing.alpha, told.dealing.min_examples) == (4, 0.5, 2)


def test_what_is_left_out_has_a_default(tmp_path):
    told = read(tmp_path, WHOLE)
    assert told.cohort_settings == CohortSettings("sync", 3)
    assert told.dealing.scheme == "iid"
    assert (told.train.accumulation, told.dealing.held_out) == (1, 0.1)


@pytest.mark.parametrize(
    ("added", "line", "words"),
    [
        ("cohort: {rule: synk}", 6, "cohort.rule: 'synk' cannot be: input should be 'sync'"),
        ("cohort:\n  quorumm: 2", 7, "cohort.quorumm: there is no such setting: did you mean quorum"),
        ("partition: {clients: 3}", 6, "partition: clients stands above"),
        (
            "stragglers:\n  - {client: 1, factor: 2}\n  - {factor: 2}",
            8,
            "stragglers.1.client: it is not there",
        ),
        ("faults:\n  kill:\n    - {client: 0, at_step: 1}", 8, "faults.kill.0.client: 0 cannot be"),
        ("faults: {kill: [{client: 1, at: 1}]}", 6, "faults.kill.0.at: there is no such setting"),
        ("partition: 3", 6, "partition: 3 cannot be"),
        ("deadline: 3", 6, "deadline: there is no such setting: did you mean deadline_s"),
    ],
)
def test_a_fault_has_its_line_and_its_field_and_says_what_to_do(tmp_path, added, line, words):
    with pytest.raises(SettingError) as refused:
        read(tmp_path, WHOLE + added + "\n")
    assert f"simulation.yaml:{line}: {words}" in refused.value.message


def test_all_faults_are_told_at_once(tmp_path):
    with pytest.raises(SettingError) as refused:
        read(tmp_path, "model: demo\nclients: many\ntrain: {max_steps: 4, output: x}\n")
    for words in (
        "clients: 'many' cannot be",
        "train: each client is given its own output",
        "data: it is not",
    ):
        assert words in refused.value.message


@pytest.mark.parametrize(
    ("added", "words"),
    [
        ("cohort: {quorum: 2}", "cohort.quorum has no effect with the rule sync"),
        ("cohort: {rule: quorum, quorum: 4}", "a quorum of 4 in a cohort of 3"),
        ("partition: {scheme: dirichlet}", "scheme dirichlet needs an alpha"),
        ("faults: {kill: [{client: 1, at_step: 4}]}", "faults.kill.0.at_step: 4 never comes before"),
        ("faults: {add: [{at_step: 4}]}", "faults.add.0.at_step: 4 never comes before"),
        ("faults: {kill: [{client: 4, at_step: 1}]}", "there is no client 4 of 3"),
        ("stragglers: [{client: 1, factor: 2}, {client: 1, factor: 3}]", "client 1 is there twice"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(tmp_path, added, words):
    with pytest.raises(SettingError) as refused:
        read(tmp_path, WHOLE + added + "\n")
    assert words in refused.value.message


def test_who_measures_the_bare_model_is_not_killed_for_good(tmp_path):
    kill = "faults: {kill: [{client: 1, at_step: 1, back_after_s: null}, {client: 2, at_step: 1}]}"
    assert read(tmp_path, WHOLE + kill).first_who_stays == 2
    assert read(tmp_path, WHOLE).first_who_stays == 1


@pytest.mark.parametrize("text", ["", "3", "a: [", "- a"])
def test_what_is_no_list_of_settings_is_refused(tmp_path, text):
    with pytest.raises(SettingError, match=r"simulation\.yaml"):
        read(tmp_path, text)


def test_settings_within_settings_are_told_with_their_whole_name():
    with pytest.raises(SettingError, match=r"batching\.wait_s = 3"):
        ServerConfig(model="m", batching={"wait_s": 3})
