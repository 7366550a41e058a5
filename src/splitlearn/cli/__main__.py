"""`python -m splitlearn.cli` is `splitlearn`: how a command starts another as its own process."""

from splitlearn.cli.main import main

main()
