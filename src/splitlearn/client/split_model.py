"""The client's model: the library's own class, its trunk somewhere else."""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Collection
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn

import torch
from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from splitlearn.client import adapter_files, saved_session
from splitlearn.client.call_context import watch
from splitlearn.client.calls import describe
from splitlearn.client.decode_graphs import ClientGraphs, takes_positions
from splitlearn.client.grpc_transport import GrpcTransport
from splitlearn.client.member_key import client_key
from splitlearn.client.remote_trunk import RemoteTrunk
from splitlearn.client.training import prepare_training, share_run
from splitlearn.client.transport import Transport
from splitlearn.config import ClientConfig
from splitlearn.errors import SettingError, SplitMismatch, UnsupportedCall
from splitlearn.model.attention import FLASH
from splitlearn.model.checkpoint import Checkpoint
from splitlearn.model.devices import compile_mode
from splitlearn.model.families import family_of
from splitlearn.model.masks import FORMS, with_slot_masks
from splitlearn.model.plan import SplitPlan
from splitlearn.model.skeleton import decoder_of
from splitlearn.model.weights import fingerprint, load_client, resolve_dtype
from splitlearn.vocabulary import PERSONAL, CodecId, CohortSettings, ShareSettings, TapeSettings
from splitlearn.wire.frames import FrameFormat
from splitlearn.wire.handshake import ModelIdentity

SAFE_LAYERS = 2
"""Layers that a client keeps on each side unless it was told otherwise by its own user."""


class AutoSplitModelForCausalLM:
    """Loads bottom and top of a causal LM and connects them to a trunk. Not to be instantiated."""

    def __init__(self) -> None:
        raise TypeError("use AutoSplitModelForCausalLM.from_pretrained(path, trunk='host:port')")

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        trunk: str,
        bottom_layers: int | None = None,
        top_layers: int | None = None,
        accept_label_leak: bool = False,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "cpu",
        attn_implementation: str | None = None,
        hub_token: str | None = None,
        revision: str | None = None,
        config: ClientConfig | None = None,
        lora: LoraConfig | str | Path | None = None,
        run: str | None = None,
        freeze: Collection[str] = (),
        full: Collection[str] = (),
        seed: int = 0,
        tape: TapeSettings | None = None,
        allow_download: bool = True,
        cohort: CohortSettings | None = None,
        member: str | None = None,
        member_key: str | Path | None = None,
        share: str | ShareSettings = PERSONAL,
        **settings: Any,
    ) -> PreTrainedModel:
        """The library's own causal LM, whose middle layers run on the trunk server.

        Args:
            path: folder or hub id; of a hub id only the files with bottom or top tensors are fetched.
            trunk: `host:port` of the server.
            bottom_layers, top_layers: the cut; by default the server's, which must leave at least two
                layers on each side of it here.
            accept_label_leak: allow no top layer, where the gradient gives labels away.
            dtype: of the client's weights; "auto" keeps the checkpoint's.
            device: where bottom and top run.
            attn_implementation: as in the library.
            hub_token, revision: for a private hub repository, or one of its revisions.
            config: deadlines, codec, limits; `settings` are its fields by name.
            lora: PEFT's LoraConfig, or the folder of a PEFT adapter to go on from: the model is to be
                trained, bottom, trunk and top alike. The run on the trunk opens at the first training step.
            run: the run's name, which joins it where it is open already; by default a name of its own.
            freeze: which of "bottom", "trunk", "top" are not trained.
            full: which of "bottom" and "top" are trained in all their weights, in place of an adapter.
            seed: of the adapter's first weights and of dropout.
            tape: what the trunk keeps of a forward until its gradient comes: all of it by default.
            allow_download: whether the trunk's part of the adapter may be fetched from the server.
            cohort: who trains the run together, by which rule; by default this client alone.
            share: what the members do with the adapters of their bottoms and tops, a rule's name or
                ShareSettings; all but "personal" show them to the server.
            member: what this client is called in the cohort.
            member_key: a file with the secret by which the server knows this member again, made where there
                is none; without it a member is known as long as this object lives.

        Raises:
            TrunkUnreachable, NotATrunk, ProtocolMismatch, ModelMismatch, SplitMismatch: the server is not
                the one that is wanted.
            UnsupportedModel, CheckpointError, SplitPlanError, SettingError: the model cannot be loaded so.
            AdapterError: the LoRA settings cannot be used across the wire, or fit no layer.
        """
        client_config = _config_of(config, settings)
        checkpoint = Checkpoint.open(str(path), token=hub_token, revision=revision)
        plan = _plan(checkpoint, trunk, bottom_layers, top_layers, accept_label_leak, client_config)
        weights_dtype = resolve_dtype(dtype, checkpoint)
        transport = GrpcTransport(
            trunk,
            _identity(checkpoint, plan),
            client_config,
            FrameFormat(CodecId[client_config.codec.upper()]),
            client_key(member_key),
        )
        try:
            model = connect(
                checkpoint, plan, transport, client_config, weights_dtype, device, attn_implementation
            )
            prepare_training(model, lora, run, freeze, seed, tape, full=full, allow_download=allow_download)
            share_run(model, cohort, member, share)
            return model
        except BaseException:
            transport.close()
            raise


def connect(
    checkpoint: Checkpoint,
    plan: SplitPlan,
    transport: Transport,
    config: ClientConfig,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """Bottom and top of this checkpoint around whatever trunk the transport reaches."""
    remote = RemoteTrunk(transport, plan.trunk, config)
    model = load_client(
        checkpoint, plan, lambda: remote, dtype=dtype, device=device, attn_implementation=attn_implementation
    )
    _warn_of_other_attention(model.config._attn_implementation, transport.agreement.attention)
    max_positions = transport.agreement.max_positions or None

    def trains() -> bool:
        return remote.planned is not None

    context = watch(decoder_of(model), model.config, max_positions, trains)
    remote.listen_to(context)
    mode = compile_mode(config.compile, model.device)
    if mode != "off" and _can_be_graphed(model):
        decoder_of(model).config = with_slot_masks(model.config)
        model.__dict__["decode_graphs"] = ClientGraphs(
            model, context, plan.trunk, remote.exchange, max_positions, compiled=mode == "max"
        )
    model.__class__ = _split_class(type(model))
    model.__dict__["trunk"] = remote
    weakref.finalize(model, transport.abandon)
    return model


class SplitModel:
    """What a split model has beyond the library's class: `trunk`, and refusals of what would go wrong."""

    trunk: RemoteTrunk
    decode_graphs: ClientGraphs | None = None
    """The client's decode steps at fixed shapes; None where they are off, or not known for this family."""

    def save_pretrained(self, *args: Any, **kwargs: Any) -> NoReturn:
        """The folder would load again with random trunk layers."""
        raise UnsupportedCall(
            "this model has no trunk to save: the folder would load again with random layers in its place. "
            "Copy the model's own folder, or `splitlearn slice` it"
        )

    def adapter_weights(self) -> dict[str, Tensor]:
        """The whole model's adapter as it is now, by the names in a PEFT file less its prefix.

        Of a part that is trained in full, all its weights are in it.

        Raises:
            UnsupportedCall: the model is not trained; AccessDenied: the run keeps the trunk's part.
        """
        return adapter_files.adapter_weights(self, self.trunk)

    def save_adapter(self, folder: str | Path) -> None:
        """Write one PEFT folder for the whole model; the trunk's part is fetched.

        A part that is trained in full is in it, too, under PEFT's `modules_to_save`.

        Raises:
            UnsupportedCall: the model is not trained; AccessDenied: the run keeps the trunk's part.
        """
        adapter_files.save_adapter(self, self.trunk, Path(folder))

    def export_session(self, cache: Cache, path: str | Path) -> None:
        """Write what a cache holds, the server's part fetched, into one file that `import_session` reads.

        The cache stays as it is. The file is as private as the text: only its owner may read it.

        Raises:
            UnsupportedCall: the cache holds no text of this model, or is of a kind that is not supported.
            SessionLost: the server no longer holds the session; CheckpointError: the file cannot be written.
        """
        saved_session.export_session(self, self.trunk, cache, Path(path))

    def import_session(self, path: str | Path) -> DynamicCache:
        """The cache in a file of `export_session`, its trunk's part held by this model's server from now on.

        Raises:
            CheckpointError: the file is torn, was changed, or is a newer version's.
            ModelMismatch, SettingError, AdapterError: it is of another model or cut, dtype, or adapter.
            SessionTooLong, KvBudgetExceeded, ResourceExhausted: the server has no room for it.
        """
        return saved_session.import_session(self, self.trunk, Path(path))

    def close(self) -> None:
        """End the connection; open sessions on the server are freed."""
        self.trunk.end()
        self.trunk.transport.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise UnsupportedCall("a split model holds a connection and cannot be copied: load it a second time")

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        """`generate_batch` would page keys and values that are not here, and give empty texts."""
        raise UnsupportedCall(
            "generate_batch pages the trunk's keys and values, which are not here: use generate"
        )

    def _replicate_for_data_parallel(self) -> NoReturn:
        raise UnsupportedCall("DataParallel would copy the connection: run one process a device instead")


def _warn_of_other_attention(here: str, there: str) -> None:
    """Versions of the library choose differently for some families, and sdpa leaves soft caps out.

    Flash-attention is chosen where it computes what the family asks for, so it differs in last bits only.
    """
    if here != there and FLASH not in (here, there):
        warnings.warn(
            f"the trunk attends with {there}, this side with {here}: the text may differ from the whole "
            f"model's. Give attn_implementation={there!r} here, or start the server with --attention {here}",
            stacklevel=3,
        )


def _split_class(cut_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    names_of = tuple(inspect.signature(cut_class.forward).parameters)[1:]

    @wraps(cut_class.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.decode_graphs is not None and self.trunk.planned is None and not self.training:
            answer = self.decode_graphs.step(dict(zip(names_of, args, strict=False)) | kwargs)
            if answer is not None:
                return answer
        return cut_class.forward(self, *args, **kwargs)

    names = {"__module__": cut_class.__module__, "__qualname__": cut_class.__qualname__, "forward": forward}
    return type(cut_class.__name__, (SplitModel, cut_class), names)


def _can_be_graphed(model: PreTrainedModel) -> bool:
    """Whether this family's masks and positions are known at fixed shapes."""
    known = model.config._attn_implementation in FORMS and family_of(model.config).batched
    return known and takes_positions(model)


def _config_of(config: ClientConfig | None, settings: dict[str, Any]) -> ClientConfig:
    if config is not None and settings:
        raise SettingError(f"give config= or {', '.join(settings)}, not both")
    return config or ClientConfig(**settings)


def _plan(
    checkpoint: Checkpoint,
    address: str,
    bottom_layers: int | None,
    top_layers: int | None,
    accept_label_leak: bool,
    config: ClientConfig,
) -> SplitPlan:
    """The cut that the user named, or the server's where it is no less private than the default."""
    if bottom_layers is None or top_layers is None:
        facts = describe(address, config.connect_s)
        for side, named, served in (
            ("bottom", bottom_layers, facts.bottom_layers),
            ("top", top_layers, facts.top_layers),
        ):
            if named is None and served < SAFE_LAYERS:
                raise SplitMismatch(
                    f"the server leaves {served} {side} layers here, fewer than the default of "
                    f"{SAFE_LAYERS}: more of the text can be read from what is sent. "
                    f"Pass {side}_layers={served} to accept that"
                )
        bottom_layers = facts.bottom_layers if bottom_layers is None else bottom_layers
        top_layers = facts.top_layers if top_layers is None else top_layers
    return SplitPlan.for_config(checkpoint.config, bottom_layers, top_layers, accept_label_leak)


def _identity(checkpoint: Checkpoint, plan: SplitPlan) -> ModelIdentity:
    ours = fingerprint(checkpoint, plan)
    sizes = (len(plan.bottom), len(plan.trunk), len(plan.top))
    return ModelIdentity.of(ours.config_hash, ours.weights_hash, *sizes)
