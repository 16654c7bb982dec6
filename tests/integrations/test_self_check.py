"""The first batch by our ops and by the originals: what passes, what a wrong op does, and how often it's looked at."""

import copy

import pytest
import torch
from lora_models import filled, lora
from peft import get_peft_model
from tiny_models import FAMILIES, VOCABULARY, tiny

import posttrain
from posttrain.integrations import counters
from posttrain.integrations.counting import forget
from posttrain.integrations.models import attach, detach
from posttrain.integrations.self_check import forget_heads
from posttrain.integrations.shared_prefix import shared_where_possible
from posttrain.models import families
from posttrain.models.causal_lm import decoder


def batch(same: int = 20) -> torch.Tensor:
    """Three sequences of 40 tokens that begin with the same ones."""
    ids = torch.randint(3, VOCABULARY, (3, 40), generator=torch.Generator().manual_seed(0))
    ids[:, :same] = ids[0, :same]
    return ids


@pytest.fixture(autouse=True)
def fresh():
    """Counters from nothing, and no model with hooks afterwards."""
    forget()
    yield
    detach()


def passed() -> list[int]:
    return [n for what, n in counters().items() if what.startswith("self-check") and what.endswith("passed")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_pass_once(family, dtype):
    model = tiny(family, dtype)
    attach(model)
    for _ in range(2):
        decoder(model)(batch())
    assert passed() == [1]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_checked_again_with_adapters_and_in_another_dtype():
    model = tiny("llama")
    attach(model)
    model(batch())
    wrapped = filled(get_peft_model(model, lora()))
    attach(wrapped)
    wrapped(batch())
    assert passed() == [2]
    with torch.autocast("cpu", torch.bfloat16):
        wrapped(batch())
    assert passed() == [3]


def test_padding_and_training_mode():
    model = tiny("qwen3").train()
    attach(model)
    mask = torch.ones(3, 40, dtype=torch.int64)
    mask[1, :30] = 0
    model(batch(), attention_mask=mask)
    assert passed() == [1]
    assert all(module.training for module in model.modules())


def test_copies_are_looked_at_too():
    model = tiny("llama")
    expected = model(batch()).logits
    attach(model)
    model(batch())
    copied = copy.deepcopy(model)
    for _ in range(2):
        torch.testing.assert_close(copied(batch()).logits, expected)
    assert passed() == [2]
    posttrain.unpatch(copied)
    assert list(map(type, copied.modules())) == list(map(type, tiny("llama").modules()))


def test_a_patched_model_is_looked_at():
    model = tiny("llama")
    posttrain.patch(model)
    model(batch())
    assert passed() == [1]
    posttrain.unpatch(model)
    assert type(decoder(model)) is type(decoder(tiny("llama")))


def test_disable_leaves_the_check_of_a_model_that_was_patched():
    model = tiny("llama")
    posttrain.patch(model)
    patched = list(map(type, model.modules()))
    attach(model)
    detach()
    assert list(map(type, model.modules())) == patched
    model(batch())
    assert passed() == [1]


@pytest.mark.parametrize("given", ["adapter_names", "alora_offsets"])
def test_a_forward_with_adapters_by_row_is_left_out_and_the_next_one_looked_at(given):
    options = {"target_modules": ["q_proj", "up_proj"]}
    if given == "alora_offsets":
        options = {"target_modules": ["q_proj"], "alora_invocation_tokens": [5, 6]}
    ids = batch()
    ids[1, 30:32] = torch.tensor([5, 6])
    torch.manual_seed(0)
    model = get_peft_model(tiny("llama"), lora(**options), adapter_name="a")
    model.add_adapter("b", lora(**options))
    filled(model).eval()
    by_row = {"adapter_names": ["a", "b", "__base__"]} if given == "adapter_names" else {}
    expected, plain = model(ids, **by_row).logits, model.get_base_model()(ids).logits
    assert not torch.allclose(expected, plain)
    posttrain.patch(model)
    reason = f"PEFT's layers get {given} for each row of the batch"
    for _ in range(2):
        torch.testing.assert_close(model(ids, **by_row).logits, expected)
    assert counters() == {f"self-check of layers left out: {reason}": 2}
    forget()
    with shared_where_possible(model):
        torch.testing.assert_close(model(ids, **by_row).logits, expected)
    assert counters()[f"batch left as it is: {reason}"] == 1
    torch.testing.assert_close(model.get_base_model()(ids).logits, plain)
    assert passed() == [1]
    with posttrain.shared_prefix(model), pytest.raises(ValueError, match=reason):  # after which PEFT's hooks stay
        model(ids, **by_row)


def test_a_head_is_looked_at_again_with_an_adapter_and_by_another_caller():
    from posttrain.integrations.causal_loss import loss_only
    from posttrain.integrations.trl_logprob import LanguageHead

    forget_heads()
    for rank in (0, 2, 4):
        model = tiny("llama")
        if rank:
            model = filled(get_peft_model(model, lora(target_modules=["lm_head"], r=rank))).get_base_model()
        attach(model)
        for _ in range(2):
            with loss_only(model):
                model(input_ids=batch(), labels=batch())
    assert counters()["self-check of the language head passed"] == 3
    from trl.kernels import ChunkedLogProbFunction

    hidden, targets = torch.randn(9, 64), torch.arange(9)
    LanguageHead(ChunkedLogProbFunction.apply).apply(hidden, tiny("llama").lm_head.weight, None, targets, 1.0, 32768)
    assert counters()["self-check of the language head passed"] == 4


def wrong(gate, up):
    return torch.nn.functional.silu(gate) * up * 1.001


def test_a_wrong_op_raises_with_numbers_and_the_original_stays(monkeypatch):
    expected = tiny("llama")(batch()).logits
    model = tiny("llama")
    attach(model)
    mlp = type(model.model.layers[0].mlp)
    monkeypatch.setattr(mlp, "gated", staticmethod(wrong))
    message = (
        r"layers of LlamaModel in torch.float32.*hidden states are up to \d.* from the truth, and \d.* are allowed"
    )
    for _ in range(2):  # it doesn't pass by being tried again
        with pytest.raises(ValueError, match=message):
            model(batch())
    assert counters()["self-check of the layers of LlamaModel failed"] == 2
    detach()
    assert not isinstance(model.model.layers[0].mlp, families.Fused)
    assert torch.equal(model(batch()).logits, expected)


def test_a_wrong_gradient_raises(monkeypatch):
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return 1.01 * gradient

    model = tiny("llama")
    attach(model)
    right = families.swiglu
    monkeypatch.setattr(type(model.model.layers[0].mlp), "gated", staticmethod(lambda g, u: Double.apply(right(g, u))))
    with pytest.raises(ValueError, match="gradients are up to"):
        model(batch())


def looked_at(monkeypatch) -> list[int]:
    """The layers that are looked at from here on."""
    from posttrain.integrations import layer_check

    layers, compared = [], layer_check._compared
    monkeypatch.setattr(
        layer_check, "_compared", lambda body, at, *rest: layers.append(at) or compared(body, at, *rest)
    )
    return layers


KINDS = ["full_attention", "full_attention", "sliding_attention", "sliding_attention"]


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_one_layer_of_each_kind_is_looked_at(family, monkeypatch):
    layers = looked_at(monkeypatch)
    model = tiny(family, num_hidden_layers=4, layer_types=KINDS)
    attach(model)
    model(batch())
    assert layers == [0, 2] and passed() == [1]
    wrapped = filled(get_peft_model(model, lora(target_modules=["q_proj", "up_proj"], layers_to_transform=[1, 3])))
    attach(wrapped)
    for _ in range(2):
        wrapped(batch())
    assert layers == [0, 2, 1, 3] and passed() == [2]


def test_what_is_wrong_in_a_later_layer_raises(monkeypatch):
    from posttrain.models import attention

    right = attention.packed_attention
    monkeypatch.setattr(attention, "packed_attention", lambda *qkv, window, **rest: right(*qkv, **rest))
    model = tiny("qwen3", num_hidden_layers=4, layer_types=KINDS)
    attach(model)
    with pytest.raises(ValueError, match=r"layers of Qwen3Model.* layer 2 \(sliding_attention\): hidden states are up"):
        model(batch())


def test_quantized_layers_are_left_out_and_said(capsys):
    model = tiny("llama")
    attach(model)
    for layer in model.model.layers:
        layer.mlp.codes = torch.nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
    model(batch())
    reason = "weights are quantized in another way than 4 bits of bitsandbytes"
    assert counters()[f"self-check of layers left out: {reason}"] == 1
    assert f"self-check of LlamaModel's layers is left out: {reason}" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere"])
def test_the_language_head_passes_once(family, dtype):
    from posttrain.integrations.causal_loss import loss_only

    model = tiny(family, dtype)
    attach(model)
    for _ in range(2):
        with loss_only(model):
            model(input_ids=batch(), labels=batch())
    assert counters()["self-check of the language head passed"] == 1


@pytest.mark.parametrize("library", ["transformers", "trl"])
def test_a_wrong_language_head_raises(library, monkeypatch):
    right = posttrain.ops.linear_logprob

    def off(*arguments, **options):
        result = right(*arguments, **options)
        return result._replace(logprob=result.logprob + 1e-3)

    forget_heads()
    if library == "transformers":
        from posttrain.integrations.causal_loss import loss_only

        monkeypatch.setattr("posttrain.integrations.causal_loss.linear_logprob", off)
        model = tiny("llama")
        attach(model)
        for _ in range(2):
            with loss_only(model), pytest.raises(ValueError, match=r"language head.*log-probabilities are up to 0.001"):
                model(input_ids=batch(), labels=batch())
        return
    from trl.kernels import ChunkedLogProbFunction

    from posttrain.integrations.trl_logprob import LanguageHead

    monkeypatch.setattr("posttrain.integrations.trl_logprob.linear_logprob", off)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*shape, generator=generator) for shape in ((9, 16), (57, 16)))
    with pytest.raises(ValueError, match=r"language head.*log-probabilities are up to 0.001"):
        LanguageHead(ChunkedLogProbFunction.apply).apply(hidden, weight, None, torch.arange(9), 1.0, 32768)
