"""Whether Python and the packages are ones that splitlearn runs with; nothing of them is loaded."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

from splitlearn.cli.checks import Check, failed, ok

OLDEST_PYTHON = (3, 11)
PACKAGES = ("torch", "transformers", "safetensors", "grpcio", "protobuf", "pydantic")


def package_checks() -> Iterator[Check]:
    yield check_python()
    yield from map(check_package, PACKAGES)


def check_python() -> Check:
    found = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < OLDEST_PYTHON:
        return failed("python", found, "install 3.11 or newer")
    return ok("python", found)


def check_package(package: str) -> Check:
    wanted, found = wanted_of(package), installed(package)
    if found is None:
        return failed(package, "not installed", f'pip install "{wanted}"')
    if not wanted.specifier.contains(found, prereleases=True):
        return failed(package, f"{found}, supported is {wanted.specifier}", f'pip install "{wanted}"')
    return ok(package, found)


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def wanted_of(package: str) -> Requirement:
    """What the installed splitlearn says of a package that it needs."""
    needed = (Requirement(line) for line in requires("splitlearn") or ())
    mine = (each for each in needed if each.name == package and each.marker is None)
    return next(mine, Requirement(package))
