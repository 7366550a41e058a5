"""A session in one file: the server's keys and values, the client's own, and what they belong to."""

from __future__ import annotations

import json
import os
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from splitlearn.client.own_layers import OwnLayer, put_back, take_out
from splitlearn.client.remote_cache import RemoteCacheLayer, held_session, with_session
from splitlearn.client.remote_trunk import RemoteTrunk
from splitlearn.client.sent import require_in_step
from splitlearn.client.session import ClientSession
from splitlearn.disk import sync
from splitlearn.errors import AdapterError, CheckpointError, ModelMismatch, SettingError, SplitMismatch
from splitlearn.vocabulary import Precision, Versions
from splitlearn.wire.codecs import RawCodec
from splitlearn.wire.dtypes import dtype_name
from splitlearn.wire.handshake import ModelIdentity
from splitlearn.wire.messages import SessionHead
from splitlearn.wire.sessions import MovedSession

# B rows   H key/value heads   L tokens held   E head size

FORMAT = 1
NOTE, VISIBLE = "splitlearn", "visible"
FOR_ITS_OWNER = 0o600


@dataclass(frozen=True, slots=True)
class SavedSession:
    """What the file holds; `dtype` is that of the client's weights."""

    moved: MovedSession
    own: dict[int, OwnLayer]
    dtype: str


def export_session(model: PreTrainedModel, trunk: RemoteTrunk, cache: Cache, path: Path) -> None:
    """Write down all that this cache holds, here and on the server; it stays as it is."""
    session = held_session(cache, trunk.layers, trunk.transport)
    require_in_step(cache, trunk.layers, session.length)
    moved = session.export(len(trunk.layers))
    write(SavedSession(moved, take_out(cache, trunk.layers), dtype_name(model.dtype)), path, trunk.layers)


def import_session(model: PreTrainedModel, trunk: RemoteTrunk, path: Path) -> DynamicCache:
    """A cache that goes on where the one in this file stood."""
    saved = read(path, trunk.layers)
    _require_fitting(saved, path, model, trunk)
    try:
        session = ClientSession.imported(trunk.transport, saved.moved)
    except ModelMismatch as error:
        raise error.advised(f"{path} was exported from that other one") from None
    cache = put_back(model, trunk.layers, saved.own)
    return with_session(cache, trunk.layers, RemoteCacheLayer(trunk.transport, session.opening, session))


def _require_fitting(saved: SavedSession, path: Path, model: PreTrainedModel, trunk: RemoteTrunk) -> None:
    """What only this side can see; the server looks at the rest."""
    if saved.dtype != dtype_name(model.dtype):
        raise SettingError(
            f"{path} was exported from a client in {saved.dtype}, this one computes in "
            f"{dtype_name(model.dtype)}: load the model with dtype={saved.dtype!r}"
        )
    adapter, planned = saved.moved.head.adapter.adapter, trunk.planned
    ours = planned.name if planned is not None and planned.settings.lora.r else ""
    if adapter != ours:
        raise AdapterError(
            f"{path} was generated with {f'run {adapter}' if adapter else 'no adapter'}, this model has "
            f"{f'run {ours}' if ours else 'none'}: load the model as it was loaded then"
        )


# ---------------------------------------------------------------- the file


def write(saved: SavedSession, path: Path, trunk: range) -> None:
    """Whole or not at all, and for its owner's eyes: its keys and values tell the text."""
    tensors = _tensors(saved, trunk)
    session = _note(saved)
    note = {"format": FORMAT, "digest": _digest(tensors, session), "session": session}
    unfinished = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    try:
        os.close(os.open(unfinished, os.O_CREAT | os.O_EXCL | os.O_WRONLY, FOR_ITS_OWNER))
        save_file(tensors, unfinished, {NOTE: json.dumps(note)})
        unfinished.chmod(FOR_ITS_OWNER)
        sync(unfinished)
        unfinished.rename(path)
        sync(path.parent)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path} cannot be written: {why}") from None
    finally:
        unfinished.unlink(missing_ok=True)


def read(path: Path, trunk: range) -> SavedSession:
    """Raises CheckpointError where the file is none of a session, torn, changed, or a newer version's."""
    try:
        with safe_open(path, "pt") as file:
            told = json.loads((file.metadata() or {})[NOTE])
            if int(told["format"]) > FORMAT:
                raise CheckpointError(f"{path} was written by a newer version of splitlearn: update this one")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if told["digest"] != _digest(tensors, told["session"]):
            raise CheckpointError(f"{path} was changed since it was written: export the session again")
        return _saved(told["session"], tensors, trunk)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is not there: give the file that export_session wrote") from None
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(
            f"{path} is no whole file of a session: give the file that export_session wrote, or export again"
        ) from None


def _tensors(saved: SavedSession, trunk: range) -> dict[str, Tensor]:
    """By the whole model's layers."""
    layers = {index: (layer.keys_BHLE, layer.values_BHLE) for index, layer in saved.own.items()}
    layers |= dict(zip(trunk, saved.moved.layers, strict=True))
    tensors = {VISIBLE: saved.moved.visible_BL.contiguous()}
    for index, (keys, values) in layers.items():
        tensors |= {f"{index}.keys": keys.contiguous(), f"{index}.values": values.contiguous()}
    return tensors


def _note(saved: SavedSession) -> dict[str, Any]:
    own = {
        str(index): {"seen": layer.seen, "is_sliding": layer.is_sliding, "records_past": layer.records_past}
        for index, layer in saved.own.items()
    }
    moved = saved.moved
    return {
        "model": asdict(moved.identity),
        "head": asdict(moved.head),
        "own": own,
        "dtype": saved.dtype,
    }


def _saved(told: dict[str, Any], tensors: dict[str, Tensor], trunk: range) -> SavedSession:
    identity = ModelIdentity(**told["model"])
    if (identity.bottom_layers, identity.trunk_layers) != (trunk.start, len(trunk)):
        raise SplitMismatch(
            f"the session was exported from a model cut {identity.split} (bottom/trunk/top), this one has "
            f"{trunk.start} bottom and {len(trunk)} trunk layers: load it with that cut"
        )
    head = SessionHead(
        **told["head"]
        | {
            "adapter": Versions(**told["head"]["adapter"]),
            "precision": Precision(**told["head"]["precision"]),
        }
    )
    own = {
        int(index): OwnLayer(tensors[f"{index}.keys"], tensors[f"{index}.values"], **fields)
        for index, fields in told["own"].items()
    }
    layers = tuple((tensors[f"{index}.keys"], tensors[f"{index}.values"]) for index in trunk)
    visible_BL = tensors[VISIBLE]
    _require_shapes(head, own, layers, visible_BL)
    return SavedSession(MovedSession(identity, head, layers, visible_BL), own, str(told["dtype"]))


def _require_shapes(
    head: SessionHead, own: dict[int, OwnLayer], layers: tuple[tuple[Tensor, Tensor], ...], visible_BL: Tensor
) -> None:
    """Raises ValueError where the tensors are not those of such a session."""
    held = [(each.keys_BHLE, each.values_BHLE) for each in own.values()]
    for keys, values in (*layers, *held):
        if keys.ndim != 4 or keys.shape[:3] != values.shape[:3] or 0 in (*keys.shape, *values.shape):
            raise ValueError("keys and values that do not belong together")
    whole = [*layers, *((each.keys_BHLE, each.values_BHLE) for each in own.values() if not each.is_sliding)]
    rows = all(len(keys) == head.rows for keys, _ in (*layers, *held))
    lengths = all(keys.shape[2] == head.length for keys, _ in whole)
    seen = all(each.seen == head.length for each in own.values())
    is_mask = visible_BL.dtype == torch.bool and visible_BL.shape == (head.rows, head.length)
    if not (rows and lengths and seen and is_mask):
        raise ValueError("tensors of another size than the session's")


def _digest(tensors: dict[str, Tensor], note: dict[str, Any]) -> str:
    total, raw = xxhash.xxh3_128(json.dumps(note, sort_keys=True).encode()), RawCodec()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {dtype_name(tensor.dtype)} {list(tensor.shape)}\n".encode())
        total.update(raw.encode_view(tensor))
    return total.hexdigest()
