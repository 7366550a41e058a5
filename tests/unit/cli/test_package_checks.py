import pytest

from splitlearn.cli import package_checks
from splitlearn.cli.checks import Outcome
from splitlearn.cli.package_checks import PACKAGES, check_package, check_python, wanted_of


def test_this_machine_passes():
    assert check_python().outcome is Outcome.OK
    assert {check_package(name).outcome for name in PACKAGES} == {Outcome.OK}


def test_the_supported_range_is_the_packages_own():
    assert "5.17" in str(wanted_of("transformers").specifier)
    assert "<6" in str(wanted_of("transformers").specifier)


@pytest.mark.parametrize(("version", "found"), [("4.57.0", "4.57.0, supported is"), (None, "not installed")])
def test_a_package_that_does_not_fit_fails_with_its_mend(monkeypatch, version, found):
    monkeypatch.setattr(package_checks, "installed", lambda package: version)
    check = check_package("transformers")
    assert check.outcome is Outcome.FAILED
    assert found in check.found
    assert check.mend.startswith('pip install "transformers')
