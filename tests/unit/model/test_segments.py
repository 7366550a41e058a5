import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache

from splitlearn.config import AttentionName
from splitlearn.errors import SplitPlanError
from splitlearn.model.checkpoint import Checkpoint
from splitlearn.model.plan import SplitPlan
from splitlearn.model.segments import TrunkSegment, client_class
from splitlearn.model.skeleton import decoder_of, layers_of
from splitlearn.model.stand_in import PassedLayer, RemoteLayer
from splitlearn.model.weights import load_client, load_trunk
from splitlearn.testing.tiny import PROVEN, UNLISTED, VARIANTS, tiny_config, tiny_whole

PLAN = SplitPlan(6, bottom_layers=2, top_layers=2)


@pytest.fixture(scope="module")
def split_of(folder_of, in_process) -> Callable:
    """The whole model, the client's model and its trunk, from one folder."""

    def split(family: str, plan: SplitPlan = PLAN, attention: AttentionName = "auto"):
        folder: Path = folder_of(family)
        checkpoint = Checkpoint.open(folder)
        trunk = in_process(load_trunk(checkpoint, plan, attention=attention))
        how = {} if attention == "auto" else {"attn_implementation": attention}
        return tiny_whole(folder, **how), load_client(checkpoint, plan, lambda: trunk, **how), trunk

    return split


@torch.inference_mode()
@pytest.mark.parametrize("family", [*PROVEN, *VARIANTS, *UNLISTED])
def test_split_model_gives_the_logits_of_the_whole_model_bit_for_bit(
    loaded_of, in_process, family: str, ids: Tensor, left_padded: Tensor
):
    loaded = loaded_of(family)
    whole, trunk = loaded.whole, in_process(loaded.trunk)
    client = load_client(loaded.checkpoint, PLAN, lambda: trunk)
    assert torch.equal(client(ids, use_cache=False).logits, whole(ids, use_cache=False).logits)

    trunk.told = {"attention_mask": left_padded}
    padded = {"attention_mask": left_padded, "use_cache": False}
    counts = left_padded.bool()
    assert torch.equal(client(ids, **padded).logits[counts], whole(ids, **padded).logits[counts])


@torch.inference_mode()
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "bloom"])
def test_other_layers_give_other_logits(loaded_of, in_process, family: str, ids: Tensor):
    """The equality above is no accident of small numbers."""
    loaded = loaded_of(family)
    whole, wrong = loaded.whole, in_process(load_trunk(loaded.checkpoint, SplitPlan(6, 1, 3)))
    client = load_client(loaded.checkpoint, PLAN, lambda: wrong)
    assert not torch.allclose(client(ids, use_cache=False).logits, whole(ids, use_cache=False).logits)


@torch.inference_mode()
@pytest.mark.parametrize("plan", [SplitPlan(6, 1, 1), SplitPlan(6, 4, 1), SplitPlan(6, 1, 0, True)], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "opt", "gpt_oss"])
def test_the_cut_may_lie_anywhere(split_of, family: str, plan: SplitPlan, ids: Tensor):
    whole, client, _ = split_of(family, plan)
    assert torch.equal(client(ids, use_cache=False).logits, whole(ids, use_cache=False).logits)


def test_eager_attention_can_be_asked_for(split_of, ids: Tensor):
    whole, client, trunk = split_of("llama", attention="eager")
    assert (trunk.segment.attention, client.config._attn_implementation) == ("eager", "eager")
    assert torch.equal(client(ids, use_cache=False).logits, whole(ids, use_cache=False).logits)


@torch.inference_mode()
@pytest.mark.parametrize("family", [*PROVEN, *VARIANTS])
def test_a_session_alone_is_the_whole_model_bit_for_bit(loaded_of, family: str, ids: Tensor):
    """Prompt and new tokens with a cache, longer than any sliding window here."""
    whole, trunk = loaded_of(family).whole, loaded_of(family).trunk
    its_cache, our_cache = DynamicCache(config=whole.config), DynamicCache(config=trunk.config)
    with states_at_cuts(whole) as seen:
        for tokens in (ids[:1, :9], ids[:1, 9:10], ids[:1, 10:11], ids[:1, 11:12]):
            whole(tokens, past_key_values=its_cache)
            ours = trunk(seen["lower"], past_key_values=our_cache)
            assert torch.equal(ours, seen["upper"])


@contextmanager
def states_at_cuts(whole: nn.Module) -> Iterator[dict[str, Tensor]]:
    """The states at the lower and the upper cut of the last call."""
    seen: dict[str, Tensor] = {}
    layers = layers_of(decoder_of(whole))
    with ExitStack() as hooks:
        for name, index in (("lower", PLAN.bottom[-1]), ("upper", PLAN.trunk[-1])):

            def keep(layer, args, output, name=name) -> None:
                seen[name] = output[0] if isinstance(output, tuple) else output

            hooks.enter_context(layers[index].register_forward_hook(keep))
        yield seen


@pytest.mark.parametrize("family", ["llama", "gpt2", "granite", "mixtral", "gemma3_text"])
def test_gradients_are_the_same_with_checkpointing(folder_of, family: str):
    trunk = load_trunk(Checkpoint.open(folder_of(family)), PLAN)
    for module in trunk.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    trunk.train()
    plain = _gradients(trunk)
    trunk.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed = _gradients(trunk)
    assert len(plain) == 1 + len(list(trunk.parameters()))
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in plain[:1])
    torch.testing.assert_close(checkpointed, plain)


def _gradients(trunk: TrunkSegment) -> list[Tensor | None]:
    trunk.zero_grad()
    hidden = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    trunk(hidden).pow(2).mean().backward()
    return [hidden.grad, *(each.grad for each in trunk.parameters())]


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "gemma2"])
def test_every_gradient_of_a_split_model_is_the_whole_models(split_of, family: str, ids: Tensor):
    whole, client, trunk = split_of(family)
    for model in (whole, client):
        model(ids, labels=ids, use_cache=False).loss.backward()
    split = dict(client.named_parameters()) | dict(trunk.segment.causal_lm.named_parameters())
    for name, parameter in whole.named_parameters():
        assert torch.equal(split[name].grad, parameter.grad), name


def test_parameters_keep_the_whole_models_names(split_of):
    whole, client, trunk = split_of("llama")
    names = {name for name, _ in whole.named_parameters()}
    ours = {name for name, _ in client.named_parameters()}
    theirs = {name for name, _ in trunk.segment.causal_lm.named_parameters()}
    assert ours | theirs == names
    assert not ours & theirs
    assert all(name.startswith(("model.layers.2.", "model.layers.3.")) for name in theirs)


def test_the_clients_model_is_the_librarys_class(split_of):
    whole, client, trunk = split_of("llama")
    assert isinstance(client, type(whole))
    assert type(client).__name__ == "LlamaForCausalLM"
    assert type(client).__module__ == type(whole).__module__
    layers = layers_of(decoder_of(client))
    assert len(layers) == 6
    assert isinstance(layers[2], RemoteLayer)
    assert layers[2].remote is trunk
    assert isinstance(layers[3], PassedLayer)
    assert not client.training


def test_a_trunk_says_what_its_layers_are(loaded_of):
    trunk = loaded_of("gemma3_text").trunk
    assert trunk.layer_types == ["full_attention", "sliding_attention"]
    assert trunk.sliding_window == [None, 8]
    assert (trunk.num_layers, trunk.hidden_size, trunk.max_positions) == (2, 32, 256)
    assert (trunk.config.num_hidden_layers, trunk.config.layer_types) == (2, trunk.layer_types)
    assert (trunk.dtype, trunk.device.type, trunk.batched) == (torch.float32, "cpu", True)
    assert not trunk.training

    assert loaded_of("mistral").trunk.sliding_window == [8, 8]
    assert loaded_of("bloom").trunk.max_positions is None
    assert not loaded_of("bloom").trunk.batched


def test_layers_count_from_zero_in_the_trunks_own_cache(loaded_of):
    trunk = loaded_of("llama").trunk
    assert list(trunk.layers._modules) == ["2", "3"]
    assert [layer.self_attn.layer_idx for layer in trunk.layers] == [0, 1]


def test_a_trunk_of_a_model_in_memory_shares_its_weights(ids: Tensor):
    whole = AutoModelForCausalLM.from_config(tiny_config("llama")).eval()
    trunk = TrunkSegment.of_whole(whole, PLAN)
    whole_names = dict(whole.named_parameters())
    assert all(each is whole_names[name] for name, each in trunk.causal_lm.named_parameters())
    assert len(whole.model.layers) == 6
    assert [layer.self_attn.layer_idx for layer in whole.model.layers] == list(range(6))


@torch.inference_mode()
def test_a_copied_trunk_runs_by_itself(loaded_of):
    trunk = loaded_of("llama").trunk
    hidden = torch.randn(1, 3, 32)
    copied = copy.deepcopy(trunk)
    assert torch.equal(copied(hidden), trunk(hidden))


def test_a_plan_for_another_model_is_refused():
    whole = AutoModelForCausalLM.from_config(tiny_config("llama"))
    with pytest.raises(SplitPlanError, match="for 8 layers, the model has 6"):
        TrunkSegment.of_whole(whole, SplitPlan(8, 2, 2))


def test_a_remote_with_tensors_of_its_own_is_a_mistake():
    whole_class = type(AutoModelForCausalLM.from_config(tiny_config("llama")))
    with pytest.raises(TypeError, match="holds tensors"):
        client_class(whole_class, PLAN, lambda: nn.Linear(2, 2))(tiny_config("llama"))
