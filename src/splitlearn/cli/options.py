"""What several verbs ask for, in the same words; a setting's words are its own, from config.py."""

from __future__ import annotations

import re
from typing import Annotated, Any

import typer

from splitlearn.config import ClientConfig, CodecName, DTypeName, ServerConfig, SessionConfig, Settings

_ADDRESS = re.compile(r"(\[[^\]]+\]|[^:\s]+):(\d{1,5})")


def setting(settings: type[Settings], name: str, *flags: str, **how: Any) -> Any:
    """An option that says of itself what the setting says of itself."""
    return typer.Option(*flags, help=settings.model_fields[name].description, **how)


def default_of(settings: type[Settings], name: str) -> Any:
    return settings.model_fields[name].default


def parse_address(written: str) -> str:
    """Raises ValueError for what is not HOST:PORT."""
    found = _ADDRESS.fullmatch(written)
    if not found or not 0 < int(found[2]) < 1 << 16:
        raise typer.BadParameter(f"{written!r} is not HOST:PORT, as `splitlearn serve` prints it")
    return written


Model = Annotated[str, typer.Argument(metavar="MODEL", help="Folder or hub id of the model.")]

Trunk = Annotated[
    str,
    typer.Option(
        parser=parse_address, metavar="HOST:PORT", help="The trunk server, as `splitlearn serve` prints it."
    ),
]

BottomLayers = Annotated[int, setting(ServerConfig, "bottom_layers", min=1)]
TopLayers = Annotated[int, setting(ServerConfig, "top_layers", min=0)]
AcceptLabelLeak = Annotated[bool, setting(ServerConfig, "accept_label_leak", "--accept-label-leak")]

OwnBottomLayers = Annotated[
    int | None,
    typer.Option(
        "--bottom-layers", min=1, help="Layers below the trunk that run here.", show_default="server's"
    ),
]
OwnTopLayers = Annotated[
    int | None,
    typer.Option(
        "--top-layers", min=0, help="Layers above the trunk that run here.", show_default="server's"
    ),
]

OwnDType = Annotated[DTypeName, typer.Option("--dtype", help="Precision of the weights that are here.")]
Codec = Annotated[CodecName, setting(ClientConfig, "codec")]
OwnDevice = Annotated[
    str, typer.Option("--device", help="Where bottom and top run, for example `cpu` or `cuda`.")
]

MaxNewTokens = Annotated[int, typer.Option(min=1, help="Stop after so many tokens at the latest.")]
Temperature = Annotated[
    float, typer.Option(min=0, help="0 takes the likeliest token each time; above 0 samples.")
]
TopP = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="Sample from the likeliest tokens of this total probability."),
]
Seed = Annotated[int | None, typer.Option(help="The same seed samples the same text.")]

BOTTOM_LAYERS: int = default_of(ServerConfig, "bottom_layers")
TOP_LAYERS: int = default_of(ServerConfig, "top_layers")
SESSION_TOKENS: int = default_of(SessionConfig, "session_tokens")
