"""Writes the Python code of splitlearn.proto: messages, their types, and the gRPC stubs.

`make proto` calls it after each change of the .proto file, with the generator of
constraints/proto.txt.
"""

import argparse
import hashlib
import sys
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

SOURCES = Path(__file__).resolve().parent.parent / "src"
PROTO = "splitlearn/wire/generated/splitlearn.proto"


def generate(output: Path) -> None:
    # From src on, so that generated code imports itself as splitlearn.wire.generated.
    status = protoc.main(
        [
            "protoc",
            f"-I{SOURCES}",
            f"-I{files('grpc_tools') / '_proto'}",
            f"--python_out={output}",
            f"--pyi_out={output}",
            f"--grpc_python_out={output}",
            PROTO,
        ]
    )
    if status != 0:
        sys.exit(f"protoc refused {PROTO}: its message stands above")
    # A test compares it: who changes the .proto file and forgets this program is told so.
    digest = hashlib.sha256((SOURCES / PROTO).read_bytes()).hexdigest()
    (output / f"{PROTO}.sha256").write_text(f"{digest}  {Path(PROTO).name}\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=SOURCES, help="folder to write below")
    generate(parser.parse_args().output)
