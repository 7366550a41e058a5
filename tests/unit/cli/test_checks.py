from splitlearn.cli.checks import failed, ok, print_checks, skipped, warning


def test_a_check_is_one_line_with_its_mend(capsys):
    assert not print_checks([ok("python", "3.11"), failed("trunk", "nobody\nanswers " * 20, "start it")])
    first, second = capsys.readouterr().out.splitlines()
    assert first.split() == ["ok", "python", "3.11"]
    assert second.startswith("failed")
    assert second.endswith(": start it")


def test_only_a_failed_check_fails(capsys):
    assert print_checks([ok("a", "b"), warning("c", "d", "e"), skipped("f", "g")])
