"""What the server says of itself, to whoever asks."""

from __future__ import annotations

from splitlearn import __version__
from splitlearn.engine.engine import Engine
from splitlearn.model import devices
from splitlearn.vocabulary import Precision
from splitlearn.wire.dtypes import dtype_name
from splitlearn.wire.handshake import FEATURES, NATIVE_BFLOAT16, PROTOCOL, ModelIdentity
from splitlearn.wire.messages import TrunkFacts


def facts_of(engine: Engine, identity: ModelIdentity, *, draining: bool = False) -> TrunkFacts:
    trunk = engine.trunk
    return TrunkFacts(
        protocol=PROTOCOL,
        software=f"splitlearn/{__version__}",
        features=FEATURES | ({NATIVE_BFLOAT16} if devices.has_bfloat16(trunk.device) else set()),
        model_type=trunk.config.model_type,
        hidden_size=trunk.hidden_size,
        bottom_layers=identity.bottom_layers,
        trunk_layers=identity.trunk_layers,
        top_layers=identity.top_layers,
        config_hash=identity.config_hash,
        weights_hash=identity.weights_hash,
        precision=Precision(weights=dtype_name(trunk.dtype)),
        device=str(trunk.device),
        attention=trunk.attention,
        attention_reason=trunk.attention_reason,
        batched=trunk.batched,
        batched_reason=trunk.batched_reason,
        session_tokens=engine.kv.slot_tokens,
        max_positions=trunk.max_positions or 0,
        lease_s=engine.lease_s,
        kv_bytes_total=engine.kv.total_bytes,
        kv_bytes_free=engine.kv.free_bytes,
        sessions=engine.open_sessions,
        draining=draining,
    )
