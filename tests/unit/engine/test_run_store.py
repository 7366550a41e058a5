"""A checkpoint is written whole or not at all, and read only if it is what was written."""

import errno
import json
import os
import resource
import signal
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from splitlearn.engine import checkpoint
from splitlearn.engine.checkpoint import OPTIMIZER, WEIGHTS, RunSnapshot, RunStore
from splitlearn.engine.checkpoint_note import NOTE
from splitlearn.engine.disk_budget import DiskBudget
from splitlearn.errors import CheckpointError, ResourceExhausted
from splitlearn.vocabulary import LoraSettings, OptimizerSettings, Precision, RunSettings, TapeSettings

EVERYTHING = RunSettings(
    lora=LoraSettings(
        r=3,
        alpha=0.1,
        dropout=0.05,
        target_modules=("q_proj", "mlp.down_proj"),
        exclude_modules=("layers.2.mlp.down_proj",),
        use_rslora=True,
        use_dora=True,
        rank_pattern={"q_proj": 7},
        alpha_pattern={"layers.3.q_proj": 1e-3},
    ),
    optimizer=OptimizerSettings("sgd", 1 / 3, 1e-17, 0.8, 0.99, 1e-9, 0.7),
    tape=TapeSettings(recompute=True, checkpoint_every=3),
    precision=Precision("float32", "bfloat16", "float16"),
    seed=2**64 - 1,
    accumulation=16,
    allow_download=False,
)


def snapshot(
    step: int = 3, name: str = "notes", settings: RunSettings = EVERYTHING, value: float = 1.0
) -> RunSnapshot:
    weights = {"layers.2.q_proj.lora_A.weight": torch.full((3, 4), value), "b": torch.randn(2)}
    optimizer = {"b|step": torch.tensor(5.0), "b|exp_avg": torch.tensor([1e-38, float("inf")])}
    return RunSnapshot(name, step, step - 1, 1, settings, weights, optimizer)


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore(tmp_path / "runs")


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[int], Path]:
    return lambda step=3, name="notes": tmp_path / "runs" / name / f"step-{step:08d}"


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# ---------------------------------------------------------------- there and back


@pytest.mark.parametrize("settings", [EVERYTHING, RunSettings(), RunSettings(lora=LoraSettings(r=0))])
def test_all_that_a_run_is_comes_back(store, settings):
    written = snapshot(settings=settings)
    store.write(written)
    read = store.read("notes", 3)
    for plain in ("name", "step", "version", "skipped", "settings"):
        assert getattr(read, plain) == getattr(written, plain)
    assert same(read.weights, written.weights)
    assert same(read.optimizer, written.optimizer)


def test_a_run_without_weights_has_a_checkpoint_too(store):
    store.write(RunSnapshot("bare", 1, 0, 0, RunSettings(lora=LoraSettings(r=0)), {}, {}))
    read = store.read("bare", 1)
    assert (read.weights, read.optimizer) == ({}, {})


def test_checkpoints_are_listed_by_run_and_oldest_first(store):
    assert (store.names(), store.steps("notes"), store.bytes("notes")) == ([], (), 0)
    for step in (12, 3):
        store.write(snapshot(step))
    store.write(snapshot(1, "letters"))
    assert store.names() == ["letters", "notes"]
    assert store.steps("notes") == (3, 12)
    assert store.steps("letters") == (1,)


def test_the_same_step_written_again_is_the_newer_one(store):
    for value in (1.0, 2.0):
        store.write(snapshot(value=value))
    assert store.read("notes", 3).weights["layers.2.q_proj.lora_A.weight"].eq(2).all()
    assert store.steps("notes") == (3,)


def test_nothing_but_safetensors_and_json_is_written(store, folder):
    store.write(snapshot())
    assert {file.name for file in folder().iterdir()} == {WEIGHTS, OPTIMIZER, NOTE}
    assert store.bytes("notes") == sum(file.stat().st_size for file in folder().iterdir())


# ---------------------------------------------------------------- what is not whole


def test_a_step_that_was_never_saved_is_refused_with_those_that_were(store):
    with pytest.raises(CheckpointError, match="it has none"):
        store.read("notes", 3)
    store.write(snapshot(3))
    store.write(snapshot(6))
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 4 here; it has \[3, 6\]"):
        store.read("notes", 4)


@pytest.mark.parametrize("file", [WEIGHTS, OPTIMIZER, NOTE])
@pytest.mark.parametrize("left", [0, 1, 40, -1])
def test_a_torn_file_is_refused(store, folder, file, left):
    store.write(snapshot())
    content = (folder() / file).read_bytes()
    (folder() / file).write_bytes(content[:left])
    with pytest.raises(CheckpointError, match="go back to an older one"):
        store.read("notes", 3)


@pytest.mark.parametrize("file", [WEIGHTS, OPTIMIZER])
@pytest.mark.parametrize("place", [0, 9, 60, -1])
def test_a_changed_byte_is_refused(store, folder, file, place):
    store.write(snapshot())
    content = bytearray((folder() / file).read_bytes())
    content[place] ^= 1
    (folder() / file).write_bytes(content)
    with pytest.raises(CheckpointError, match="go back to an older one"):
        store.read("notes", 3)


CHANGES = {
    "another step": (b'"step": 3', b'"step": 8'),
    "another version": (b'"version": 2', b'"version": 9'),
    "another rate": (b'"beta1": 0.8', b'"beta1": 0.1'),
    "another accumulation": (b'"accumulation": 16', b'"accumulation": 61'),
    "a setting less": (b'"seed"', b'"sead"'),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_figure_in_the_note_is_refused(store, folder, what):
    store.write(snapshot())
    content = (folder() / NOTE).read_bytes()
    was, became = CHANGES[what]
    assert content.count(was) == 1
    (folder() / NOTE).write_bytes(content.replace(was, became))
    with pytest.raises(CheckpointError, match="go back to an older one"):
        store.read("notes", 3)


@pytest.mark.parametrize("file", [WEIGHTS, OPTIMIZER])
def test_a_checkpoint_that_lacks_a_file_is_torn_not_absent(store, folder, file):
    store.write(snapshot())
    (folder() / file).unlink()
    with pytest.raises(CheckpointError, match="go back to an older one"):
        store.read("notes", 3)


def test_files_of_another_step_are_not_taken_for_these(store, folder):
    store.write(snapshot(3))
    store.write(snapshot(6, value=2.0))
    (folder(3) / WEIGHTS).write_bytes((folder(6) / WEIGHTS).read_bytes())
    with pytest.raises(CheckpointError, match="changed"):
        store.read("notes", 3)


def test_a_newer_versions_checkpoint_is_refused_with_the_mend(store, folder):
    store.write(snapshot())
    note = json.loads((folder() / NOTE).read_text())
    (folder() / NOTE).write_text(json.dumps(note | {"format": 99, "settings": "of another kind"}))
    with pytest.raises(CheckpointError, match="update this one"):
        store.read("notes", 3)


def test_a_checkpoint_without_its_note_is_not_listed(store, folder):
    store.write(snapshot(3))
    store.write(snapshot(6))
    (folder(6) / NOTE).unlink()
    assert store.steps("notes") == (3,)
    with pytest.raises(CheckpointError):
        store.read("notes", 6)


# ---------------------------------------------------------------- which of a name and step


def test_a_checkpoint_is_told_from_another_of_its_name_and_step(store):
    store.write(snapshot(3))
    (first,) = store.digests("notes").values()
    assert store.read("notes", 3, first).step == 3
    store.write(snapshot(3, value=2.0))
    (second,) = store.digests("notes").values()
    assert 0 not in (first, second)
    assert first != second
    with pytest.raises(
        CheckpointError, match=r"step 3 of run notes was not saved with this.*another run name"
    ):
        store.read("notes", 3, first)
    assert store.read("notes", 3, second).step == store.read("notes", 3).step == 3


def test_digests_are_those_of_the_listed_steps_and_a_torn_one_has_none(store, folder):
    for step in (6, 3):
        store.write(snapshot(step))
    (folder(3) / NOTE).write_bytes(b"{")
    assert tuple(store.digests("notes")) == store.steps("notes") == (3, 6)
    assert store.digests("notes")[3] == 0


# ---------------------------------------------------------------- on the disk before going on


def test_all_that_a_checkpoint_is_made_of_is_on_the_disk_before_it_counts(
    tmp_path, store, folder, monkeypatch
):
    done: list[tuple[str, Path]] = []
    fsync, rename = os.fsync, Path.rename

    def noted_fsync(handle: int) -> None:
        done.append(("sync", Path(os.readlink(f"/proc/self/fd/{handle}"))))
        fsync(handle)

    def noted_rename(source: Path, target: Path) -> Path:
        done.append(("rename", source))
        return rename(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "rename", noted_rename)
    store.write(snapshot())
    (named,) = [place for place, (what, _) in enumerate(done) if what == "rename"]
    unfinished = done[named][1]
    before = {path for _, path in done[:named]}
    assert before == {
        *(unfinished / name for name in (WEIGHTS, OPTIMIZER, NOTE)),
        unfinished,
        folder().parent,
        tmp_path / "runs",
        tmp_path,
    }
    assert done[named + 1 :] == [("sync", folder().parent)]


# ---------------------------------------------------------------- writes that fail


def no_room(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("slip", ["save_file", "sync"])
@pytest.mark.parametrize("step", [3, 6])
def test_a_full_disk_is_said_and_leaves_the_former_checkpoint(store, folder, monkeypatch, slip, step):
    store.write(snapshot(3))
    before = store.read("notes", 3)
    with monkeypatch.context() as full:
        full.setattr(checkpoint, slip, no_room)
        with pytest.raises(CheckpointError, match=r"No space left.*--state-dir"):
            store.write(snapshot(step, value=2.0))
    assert store.steps("notes") == (3,)
    assert same(store.read("notes", 3).weights, before.weights)
    assert [each.name for each in folder().parent.iterdir()] == [folder().name], "nothing half written stays"
    store.write(snapshot(step, value=2.0))
    assert step in store.steps("notes")


def test_a_write_that_fails_at_its_last_moment_leaves_the_former_of_the_same_step(store, monkeypatch):
    store.write(snapshot())
    with monkeypatch.context() as broken:
        broken.setattr(Path, "rename", no_room)
        with pytest.raises(CheckpointError, match="could not be saved"):
            store.write(snapshot(value=2.0))
    assert store.steps("notes") == (3,)
    assert store.read("notes", 3).weights["layers.2.q_proj.lora_A.weight"].eq(1).all()


def test_a_former_checkpoint_comes_back_where_only_the_last_rename_fails(store, folder, monkeypatch):
    store.write(snapshot())
    rename = Path.rename
    with monkeypatch.context() as broken:
        broken.setattr(
            Path, "rename", lambda self, to: no_room() if self.name in unfinished(self) else rename(self, to)
        )
        with pytest.raises(CheckpointError, match="could not be saved"):
            store.write(snapshot(value=2.0))
    assert store.read("notes", 3).weights["layers.2.q_proj.lora_A.weight"].eq(1).all()
    assert [each.name for each in folder().parent.iterdir()] == [folder().name]


def unfinished(path: Path) -> set[str]:
    """Of the names beside it, those of writes that have not ended."""
    found = {each.name for each in path.parent.glob("unfinished-*")}
    return {name for name in found if not name.endswith("-former")}


def test_what_took_the_place_of_another_leaves_nothing_of_it(store, folder):
    for value in (1.0, 2.0):
        store.write(snapshot(value=value))
    assert [each.name for each in folder().parent.iterdir()] == [folder().name]


# ---------------------------------------------------------------- a server that was killed


def killed_at_rename(store: RunStore, number: int, monkeypatch, value: float = 2.0) -> None:
    """A save of step 3 that ends before its so-manieth rename, with nothing cleared up."""
    rename, renames = Path.rename, []

    def killed(self: Path, to: Path) -> Path:
        renames.append(to)
        if len(renames) >= number:
            raise KeyboardInterrupt
        return rename(self, to)

    with monkeypatch.context() as dies:
        dies.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            store.write(snapshot(value=value))


def test_a_run_that_was_killed_in_its_first_save_is_listed_and_can_be_deleted(store, tmp_path, monkeypatch):
    killed_at_rename(store, 1, monkeypatch)
    assert (store.names(), store.has("notes"), store.steps("notes")) == (["notes"], True, ())
    assert store.delete("notes") > 0
    assert (store.names(), store.has("notes"), on_disk(tmp_path)) == ([], False, 0)


def test_a_server_that_starts_clears_up_what_was_never_finished(store, folder, tmp_path, monkeypatch):
    store.write(snapshot(6, "letters"))
    before = on_disk(tmp_path)
    killed_at_rename(store, 1, monkeypatch)
    assert on_disk(tmp_path) > before
    store.clear_up()
    assert (store.names(), on_disk(tmp_path)) == (["letters"], before)
    assert not folder().parent.exists()
    assert store.read("letters", 6).step == 6


def test_a_checkpoint_that_was_put_aside_comes_back(store, folder, monkeypatch):
    store.write(snapshot())
    killed_at_rename(store, 2, monkeypatch)
    assert store.steps("notes") == (), "or it would not have been killed between the two"
    store.clear_up()
    assert store.read("notes", 3).weights["layers.2.q_proj.lora_A.weight"].eq(1).all()
    assert [each.name for each in folder().parent.iterdir()] == [folder().name]


def test_what_another_server_writes_at_this_moment_is_left_alone(store, folder, monkeypatch):
    """Two servers of one model have one folder."""
    write_files = checkpoint._write_files

    def meanwhile(*args: object) -> None:
        write_files(*args)
        RunStore(folder().parents[1]).clear_up()

    store.write(snapshot())
    monkeypatch.setattr(checkpoint, "_write_files", meanwhile)
    store.write(snapshot(value=2.0))
    assert store.read("notes", 3).weights["layers.2.q_proj.lora_A.weight"].eq(2).all()


def test_there_is_nothing_to_clear_up_before_the_first_save(store):
    store.clear_up()
    assert store.names() == []


@contextmanager
def files_no_larger_than(size: int):
    """The system refuses to write more, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_what_safetensors_itself_cannot_write_is_said_too(store):
    store.write(snapshot(3))
    large = RunSnapshot("notes", 6, 5, 0, EVERYTHING, {"b": torch.ones(1 << 16)}, {})
    with files_no_larger_than(1 << 14), pytest.raises(CheckpointError, match="--state-dir"):
        store.write(large)
    assert store.steps("notes") == (3,)


# ---------------------------------------------------------------- all runs together


def on_disk(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def large(step: int, name: str = "notes") -> RunSnapshot:
    return RunSnapshot(name, step, step, 0, EVERYTHING, {"b": torch.ones(1 << 14)}, {})


def test_all_runs_together_stay_within_the_budget_and_what_was_saved_stays(tmp_path):
    RunStore(tmp_path / "runs").write(large(1, "letters"))
    limit = int(2.5 * on_disk(tmp_path))
    store = RunStore(tmp_path / "runs", DiskBudget(tmp_path, limit))
    store.write(large(3))
    before = on_disk(tmp_path)
    with pytest.raises(ResourceExhausted, match=r"step 6 of run notes.*--delete.*--disk-budget") as refused:
        store.write(large(6))
    facts = refused.value.facts
    assert facts["wanted_bytes"] > facts["free_bytes"] == limit - before
    assert facts["total_bytes"] == limit
    assert (store.names(), store.steps("notes"), on_disk(tmp_path)) == (["letters", "notes"], (3,), before)
    assert store.read("notes", 3).step == 3
    store.delete("letters")
    store.write(large(6))
    assert store.steps("notes") == (3, 6)


def test_what_lies_outside_this_models_folder_is_named(tmp_path):
    store = RunStore(tmp_path / "ours" / "runs", DiskBudget(tmp_path, 150_000))
    RunStore(tmp_path / "theirs" / "runs").write(large(1))
    theirs = on_disk(tmp_path)
    store.write(large(1))
    with pytest.raises(ResourceExhausted) as refused:
        store.write(large(2))
    assert (
        f"{theirs:,} bytes of what is taken are not this model's ({theirs:,} in theirs, in the server's"
        in (refused.value.message)
    )
    assert refused.value.facts["elsewhere_bytes"] == theirs
    store = RunStore(tmp_path / "theirs" / "runs", DiskBudget(tmp_path / "theirs", 1))
    with pytest.raises(ResourceExhausted, match=r"--disk-budget$"):
        store.write(large(2))


@pytest.mark.parametrize("settings", [EVERYTHING, RunSettings()])
def test_what_a_save_is_thought_to_take_is_at_least_what_it_takes(tmp_path, settings):
    weights = {f"layers.{layer}.q_proj.lora_A.weight": torch.zeros(1) for layer in range(500)}
    whole = RunSnapshot(
        "notes", 3, 2, 0, settings, weights, {f"{name}|exp_avg": each for name, each in weights.items()}
    )
    assert checkpoint._bytes_of(whole) >= _written(tmp_path, whole)
    assert checkpoint._bytes_of(snapshot()) >= _written(tmp_path / "small", snapshot())


def _written(folder: Path, whole: RunSnapshot) -> int:
    RunStore(folder).write(whole)
    return on_disk(folder)


def test_two_saves_at_once_do_not_take_the_same_room(tmp_path):
    """The one that is being written counts at what it will take, not at what is there of it yet."""
    needed = checkpoint._bytes_of(snapshot())
    budget = DiskBudget(tmp_path, int(1.5 * needed))
    with (
        budget.reserved(tmp_path / "runs" / "letters" / "unfinished-0", needed, "step 1 of run letters"),
        pytest.raises(ResourceExhausted),
    ):
        RunStore(tmp_path / "runs", budget).write(snapshot())
    RunStore(tmp_path / "runs", budget).write(snapshot())


def test_a_write_that_fails_gives_its_room_back(tmp_path, monkeypatch):
    store = RunStore(tmp_path / "runs", DiskBudget(tmp_path, int(1.5 * checkpoint._bytes_of(snapshot()))))
    with monkeypatch.context() as full:
        full.setattr(checkpoint, "save_file", no_room)
        with pytest.raises(CheckpointError):
            store.write(snapshot())
    store.write(snapshot())


# ---------------------------------------------------------------- letting go


def test_what_a_write_left_behind_is_never_listed_and_goes_with_older_steps(store, folder, monkeypatch):
    for step in (3, 6, 9):
        store.write(snapshot(step))
    monkeypatch.setattr(checkpoint.secrets, "token_hex", lambda *_: "0" * 16)
    unfinished = folder().with_name("unfinished-" + "0" * 16)
    monkeypatch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        store.write(snapshot(12))
    assert unfinished.is_dir()
    assert store.steps("notes") == (3, 6, 9)
    store.forget_before("notes", 6)
    assert store.steps("notes") == (6, 9)
    assert not unfinished.exists()
    assert store.read("notes", 6).step == 6


def test_forgetting_before_nothing_forgets_nothing(store):
    store.write(snapshot(3))
    store.forget_before("notes", 0)
    store.forget_before("letters", 9)
    assert store.steps("notes") == (3,)


def test_only_what_neither_side_goes_back_to_is_let_go(store):
    for step in (3, 6, 9, 12):
        store.write(snapshot(step))
    store.forget_before("notes", 99)
    assert store.steps("notes") == (3, 6, 9, 12), "there is no step 99: it is no common one"
    store.forget_before("notes", 9, kept=(3, 9))
    assert store.steps("notes") == (3, 9, 12)


def test_a_deleted_run_leaves_nothing_and_says_what_it_freed(store, folder):
    for step in (3, 6):
        store.write(snapshot(step))
    store.write(snapshot(1, "letters"))
    held = store.bytes("notes")
    assert held > 0
    assert store.delete("notes") == held
    assert store.names() == ["letters"]
    assert not folder().parent.exists()
    assert store.delete("notes") == 0


def test_a_folder_that_goes_while_it_is_counted_is_no_error(tmp_path, monkeypatch):
    """A cohort's checkpoints come and go while others ask what is on the disk."""
    for step in (1, 2):
        (tmp_path / "notes" / f"step-{step:08d}").mkdir(parents=True)
        (tmp_path / "notes" / f"step-{step:08d}" / "run.json").write_text("{}")
    scandir = os.scandir

    def gone(folder):
        if str(folder).endswith("step-00000001"):
            raise FileNotFoundError(folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", gone)
    assert RunStore(tmp_path).bytes("notes") == 2
