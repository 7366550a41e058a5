import pytest
import typer

from splitlearn.cli.serve import is_loopback, require_loopback


@pytest.mark.parametrize("host", ["127.0.0.1", "127.3.2.1", "localhost", "::1", "[::1]"])
def test_this_machine_alone(host):
    assert is_loopback(host)
    require_loopback(host, insecure=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", ""])
def test_other_machines_need_to_be_let_in_by_name(host):
    with pytest.raises(typer.BadParameter, match="--insecure"):
        require_loopback(host, insecure=False)
    require_loopback(host, insecure=True)
