"""One member of five sends a million times its gradient: which cohorts still learn."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from splitlearn import AutoSplitModelForCausalLM, CohortSettings, TrunkServer
from splitlearn.client.training import plan_run
from splitlearn.engine.ledger import read, rounds
from splitlearn.errors import SettingError
from splitlearn.testing import lively_model, tiny_whole
from splitlearn.vocabulary import OptimizerSettings

pytestmark = pytest.mark.timeout(300)

MEMBERS, ROUNDS, RATE, WAIT_S = 5, 10, 5.0, 60
FALSE, HONEST, ENORMOUS = 4, 1.0, 1e6
PRETRAINED = 60
SGD = OptimizerSettings("sgd", learning_rate=RATE)
LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrunkServer]:
    folder = lively_model("llama", tmp_path_factory.mktemp("model"))
    pretrain(folder)
    sessions = {"session_tokens": 64, "kv_budget_bytes": 1 << 24}
    state_dir = tmp_path_factory.mktemp("state")
    how = {"dtype": "float32", "sessions": sessions, "state_dir": state_dir}
    with TrunkServer(folder, port=0, device="cpu", **how) as server:
        server.folder = folder
        yield server


def pretrain(folder: Path) -> None:
    """Until it is better than no answer at all, which is what a broken trunk makes of it."""
    whole = tiny_whole(folder).train()
    optimizer = torch.optim.AdamW(whole.parameters(), lr=1e-2)
    for step in range(PRETRAINED):
        whole(batch(-1 - step), labels=batch(-1 - step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    whole.save_pretrained(folder)


def batch(seed: int, rows: int = 4) -> Tensor:
    """Everybody's text is of one kind: each token is the one before and three."""
    draw = torch.Generator().manual_seed(seed)
    first = torch.randint(3, 128, (rows, 1), generator=draw)
    return 3 + (first + 3 * torch.arange(12)) % 125


@contextmanager
def members(server: TrunkServer, run: str, cohort: CohortSettings) -> Iterator[list[Any]]:
    with ExitStack() as stack:
        splits = []
        for number in range(MEMBERS):
            split = AutoSplitModelForCausalLM.from_pretrained(
                server.folder,
                trunk=server.address,
                dtype="float32",
                lora=LORA,
                freeze=("bottom", "top"),
                run=run,
                cohort=cohort,
                member=f"m{number}",
            )
            stack.callback(split.close)
            plan_run(split.trunk, SGD)
            splits.append(split.train())
        yield splits


def held_out_loss(split: Any) -> float:
    ids = batch(10_000, rows=16)
    with torch.no_grad():
        loss = split.eval()(ids, labels=ids, use_cache=False).loss
    split.train()
    return float(loss)


def work(split: Any, number: int, scale: float) -> None:
    for step in range(ROUNDS):
        ids = batch(100 * number + step)
        split(ids, labels=ids, use_cache=False).loss.backward()
        asked = scale if number == FALSE else HONEST
        split.trunk.step(scale=asked, learning_rate=RATE, weight=float(ids.numel()))


def losses(server: TrunkServer, scale: float = ENORMOUS, **how: Any) -> tuple[float, float]:
    """Held out, before and after; of the false member's gradients the server is given this multiple."""
    cohort = CohortSettings("sync", members=MEMBERS, **how)
    with members(server, f"{cohort.aggregation}-{scale:g}".replace("+", ""), cohort) as splits:
        before = held_out_loss(splits[0])
        with ThreadPoolExecutor(MEMBERS) as threads:
            futures = [threads.submit(work, split, number, scale) for number, split in enumerate(splits)]
            for done in futures:
                done.result(WAIT_S)
        return before, held_out_loss(splits[0])


@pytest.mark.parametrize("aggregation", ["median", "trimmed_mean", "krum"])
def test_a_cohort_that_expects_a_false_member_learns_beside_it(server, aggregation):
    before, after = losses(server, aggregation=aggregation, byzantine=1)
    assert after < before - 0.03


def test_the_ledger_on_the_disk_names_whose_gradients_were_cut_short(server):
    losses(server, aggregation="norm_clip", member_norm=0.5)
    closed = list(rounds(read(server._hall.runs.ledger("norm_clip-1e06"))))
    assert len(closed) == ROUNDS
    for each in closed:
        through = {part.member: part.let_through for part in each.parts}
        assert through.pop(f"m{FALSE}") < 1e-4
        assert min(through.values()) > 0.1


def test_the_mean_of_such_a_cohort_forgets_what_the_model_knew(server):
    before, after = losses(server)
    assert not after < before + 0.5


def test_the_mean_learns_as_well_where_nobody_is_false(server):
    before, after = losses(server, HONEST)
    assert after < before - 0.03


def test_a_cohort_that_would_protect_from_nobody_is_not_opened(server):
    few = CohortSettings("async", members=MEMBERS, aggregation="median", byzantine=1)
    with members(server, "few", few) as splits, pytest.raises(SettingError, match="use rule 'sync'"):
        _ = splits[0].trunk.run
