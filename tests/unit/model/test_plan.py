import subprocess
import sys
from types import SimpleNamespace

import pytest

from splitlearn.errors import SplitPlanError
from splitlearn.model.plan import SplitPlan


def test_parts_cover_all_layers_in_order():
    plan = SplitPlan(6, bottom_layers=2, top_layers=1)
    assert [*plan.bottom, *plan.trunk, *plan.top] == list(range(6))
    assert (plan.bottom, plan.trunk, plan.top) == (range(2), range(2, 5), range(5, 6))
    assert str(plan) == "2/3/1"


def test_plan_is_made_for_a_configuration():
    assert SplitPlan.for_config(SimpleNamespace(num_hidden_layers=30)) == SplitPlan(30, 2, 2)


@pytest.mark.parametrize(
    ("bottom", "top", "reason"),
    [
        (0, 2, "tokens in another spelling"),
        (2, 0, "accept_label_leak"),
        (2, -1, "0 or more"),
        (3, 3, "leave no trunk in a model of 6"),
        (5, 4, "leave no trunk in a model of 6"),
    ],
)
def test_plan_that_would_leak_or_leaves_no_trunk_is_refused(bottom: int, top: int, reason: str):
    with pytest.raises(SplitPlanError, match=reason):
        SplitPlan(6, bottom, top)


def test_no_top_layers_can_be_accepted():
    plan = SplitPlan(6, 2, 0, accept_label_leak=True)
    assert plan.trunk == range(2, 6)
    assert not plan.top


def test_a_plan_needs_neither_torch_nor_transformers():
    code = "import sys, splitlearn.model.plan; print({'torch', 'transformers'} & {*sys.modules})"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"
