"""What several verbs ask for, in the same words; a setting's words are its own, from config.py."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, TypeVar

import typer

from splitlearn.config import ClientConfig, CodecName, DTypeName, ServerConfig, SessionConfig, Settings

Verb = TypeVar("Verb", bound=Callable[..., Any])
_ADDRESS = re.compile(r"(\[[^\]]+\]|[^:\s]+):(\d{1,5})")


def setting(settings: type[Settings], name: str, *flags: str, **how: Any) -> Any:
    """An option that says of itself what the setting says of itself."""
    return typer.Option(*flags, help=settings.model_fields[name].description, **how)


def with_options_of(settings: type[Settings]) -> Callable[[Verb], Verb]:
    """Give a verb an option for each of the settings, in their order; its `**told` receives them.

    A group's settings are options of their own, behind its name: `grouped` puts them together again.
    """
    options = list(_parameters_of(settings))

    def add(verb: Verb) -> Verb:
        signature = inspect.signature(verb, eval_str=True)
        kept = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
        whole = signature.replace(parameters=[*kept, *options])
        verb.__signature__ = whole  # type: ignore[attr-defined]
        verb.__annotations__ = {name: each.annotation for name, each in whole.parameters.items()}
        return verb

    return add


def _parameters_of(settings: type[Settings], prefix: str = "") -> Iterator[inspect.Parameter]:
    for name, field in settings.model_fields.items():
        if group := _group_of(field.annotation):
            yield from _parameters_of(group, f"{prefix}{name}_")
            continue
        yield inspect.Parameter(
            prefix + name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.is_required() else field.default,
            annotation=Annotated[field.annotation, setting(settings, name)],
        )


def grouped(settings: type[Settings], told: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """What the options of these settings were told, as the settings take it: a group's in a dict."""
    return {
        name: grouped(group, told, f"{prefix}{name}_")
        if (group := _group_of(field.annotation))
        else told[prefix + name]
        for name, field in settings.model_fields.items()
    }


def _group_of(kind: Any) -> type[Settings] | None:
    return kind if inspect.isclass(kind) and issubclass(kind, Settings) else None


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
