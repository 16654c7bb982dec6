"""attn_implementation="posttrain" as transformers and TRL call it: the results of "sdpa", without its masks."""

import pytest
import torch
import transformers
from tiny_models import FAMILIES, batch_of, randomised, tiny
from tolerance import assert_as_good_as, assert_true_to
from torch import Tensor

from posttrain.models import attention, hidden_states, mask, prepare
from posttrain.ops.layout import PackedLayout

LENGTHS = [9, 3, 17, 1, 6]
families = pytest.mark.parametrize("family", FAMILIES)


def ids_of(*shape: int) -> Tensor:
    return torch.randint(3, 97, shape, generator=torch.Generator().manual_seed(3))


def padding(kind: str) -> Tensor:
    real = torch.ones(3, 12, dtype=torch.long)
    real[0, slice(None, 4) if kind == "left" else slice(8, None)] = 0
    if kind == "holes":
        real[1, [0, 4, 5]] = 0
    return real


def packed_inputs(**options) -> dict[str, Tensor]:
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    return {"input_ids": ids_of(1, sum(LENGTHS)), "position_ids": positions, "use_cache": False, **options}


INPUTS = {
    "packed": packed_inputs(),
    "packed rows": {
        **packed_inputs(),
        "input_ids": ids_of(2, 36),
        "position_ids": packed_inputs()["position_ids"].expand(2, -1),
    },
    "rows": {"input_ids": ids_of(3, 12), "use_cache": False},
    **{
        kind: {"input_ids": ids_of(3, 12), "attention_mask": padding(kind), "use_cache": False}
        for kind in ("left", "right", "holes")
    },
}


def states_and_gradients(model, inputs) -> list[Tensor]:
    """Hidden states of the real tokens, and the gradients of a random mean of them."""
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    hidden = model.base_model(**inputs).last_hidden_state[real]
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(7)).to(hidden.dtype) / len(hidden)
    parameters = [p for name, p in model.named_parameters() if not name.startswith("lm_head")]
    return [hidden.detach(), *torch.autograd.grad((hidden * weights).sum(), parameters)]


def assert_same(model, stock, inputs) -> None:
    """`model`, with our attention, gives what `stock` gives with the attention it has."""
    model.set_attn_implementation("posttrain")
    for ours, true in zip(states_and_gradients(model, inputs), states_and_gradients(stock, inputs), strict=True):
        torch.testing.assert_close(ours, true, check_dtype=False)


@pytest.fixture
def no_dense_masks(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a dense mask was made")

    monkeypatch.setattr(mask, "sdpa_mask", refuse)
    monkeypatch.setattr(transformers.masking_utils, "sdpa_mask", refuse)


@families
@pytest.mark.parametrize("kind", INPUTS)
def test_hidden_states_and_gradients_are_those_of_sdpa(family, kind):
    exact = torch.float32 if family == "gemma2" else torch.float64  # "eager" makes NaN of padding in float64
    assert_same(tiny(family), tiny(family, exact), INPUTS[kind])


@families
def test_autocast_is_as_good_as_sdpa(family):
    model, inputs = tiny(family), INPUTS["packed"]
    true = model.base_model(**inputs).last_hidden_state.detach()
    with torch.autocast("cpu", torch.bfloat16):
        peer = model.base_model(**inputs).last_hidden_state
        model.set_attn_implementation("posttrain")
        ours = model.base_model(**inputs).last_hidden_state
    assert ours.dtype == peer.dtype
    assert_as_good_as(ours.bfloat16(), peer.bfloat16(), true)


@families
def test_no_dense_mask_is_made(family, no_dense_masks):
    model = tiny(family)
    prepare(model)
    hidden_states(model, batch_of(LENGTHS))
    for inputs in INPUTS.values():
        model.model(**inputs)
    model.set_attn_implementation("eager")
    with pytest.raises(AssertionError, match="a dense mask was made"):
        model.model(**INPUTS["packed"])


@pytest.mark.parametrize(("family", "kinds_of_layers"), [("llama", 1), ("mistral", 1), ("gemma3", 2)])
def test_a_layout_is_made_once_for_each_kind_of_layer(family, kinds_of_layers, monkeypatch):
    made = []
    build = PackedLayout.from_lengths
    monkeypatch.setattr(PackedLayout, "from_lengths", lambda *args: made.append(args[0]) or build(*args))
    mixed = {"layer_types": ["sliding_attention", "full_attention"] * 2} if kinds_of_layers == 2 else {}
    model = tiny(family, num_hidden_layers=4, **mixed)
    model.set_attn_implementation("posttrain")
    model.model(**INPUTS["packed"])
    assert made == [LENGTHS] * kinds_of_layers
    model.model(**INPUTS["packed"], layout=PackedLayout.from_forest(LENGTHS, [-1] * 5))
    assert len(made) == kinds_of_layers


@families
def test_a_layout_as_keyword(family):
    """A prompt of 5 tokens with two completions, against two whole sequences with "sdpa"."""
    exact, model = tiny(family, torch.float64), tiny(family)
    model.set_attn_implementation("posttrain")
    ids = ids_of(1, 12)
    layout = PackedLayout.from_forest([5, 4, 3], [-1, 0, 0])
    with torch.no_grad():
        forest = model.model(
            input_ids=ids, position_ids=layout.positions[None].long(), use_cache=False, layout=layout
        ).last_hidden_state[0]
        first, second = (
            exact.model(input_ids=row, use_cache=False).last_hidden_state[0]
            for row in (ids[:, :9], torch.cat([ids[:, :5], ids[:, 9:]], 1))
        )
    assert_true_to(forest, torch.cat([first, second[5:]]))


@families
def test_a_layout_without_its_positions_is_refused(family):
    model = tiny(family)
    model.set_attn_implementation("posttrain")
    with pytest.raises(
        ValueError, match=r"9 tokens run on from 0, and those of .*4\(3, 2\)\) restart; give position_ids"
    ):
        model(ids_of(1, 9), use_cache=False, layout=PackedLayout.from_forest([4, 3, 2], [-1, 0, 0]))
    model(ids_of(1, 9), use_cache=False, layout=PackedLayout.from_forest([4, 5], [-1, 0]))


def test_what_a_mask_tells_is_known_without_waiting_for_a_device():
    answers = iter([True, False])  # a token sees the one before it, and not the next one

    def sees(row, head, query, key):
        return torch.tensor(next(answers)).expand(3, 11)

    layout, _ = mask.PackedMask(3, 12, sees, padding("holes").bool(), None, "meta").packing
    assert layout.positions.is_meta and layout.segment_ends == (8, 17, 29) and not layout.consecutive


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_checkpointed_layers_ask_the_same_mask(family):
    model = tiny(family).train()
    model.set_attn_implementation("posttrain")
    plain = [states_and_gradients(model, INPUTS[kind]) for kind in ("packed", "holes")]
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again = [states_and_gradients(model, INPUTS[kind]) for kind in ("packed", "holes")]
    assert all(torch.equal(a, b) for x, y in zip(plain, again, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma2", "gemma3"])
@pytest.mark.parametrize("cache", ["dynamic", "static", None])
def test_generation(family, cache):
    """Prompts, padded on the left, that are longer than the window; also with a cache of fixed size and without one."""
    real = torch.ones(3, 9, dtype=torch.long)
    real[0, :5] = real[1, :1] = 0
    options = {"attention_mask": real, "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    options |= {"output_logits": True, "return_dict_in_generate": True, "use_cache": cache is not None}
    options |= {"cache_implementation": "static"} if cache == "static" else {}
    model = tiny(family)
    before = model.generate(ids_of(3, 9), **options)
    model.set_attn_implementation("posttrain")
    after = model.generate(ids_of(3, 9), **options)
    assert torch.equal(before.sequences, after.sequences)
    torch.testing.assert_close(torch.stack(after.logits), torch.stack(before.logits))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_prompt_in_two_parts(family):
    """Several queries after a cache, longer together than the window."""
    model, exact = tiny(family), tiny(family, torch.float64)
    model.set_attn_implementation("posttrain")
    ids = ids_of(2, 11)
    with torch.no_grad():
        start = model(ids[:, :6], use_cache=True)
        rest = model(ids[:, 6:], past_key_values=start.past_key_values)
        assert_true_to(torch.cat([start.logits, rest.logits], 1), exact(ids, use_cache=False).logits)


def test_the_padding_free_batches_of_trl(no_dense_masks, monkeypatch):
    trainer = pytest.importorskip("trl.trainer.sft_trainer")
    rows = [{"input_ids": ids_of(length).tolist()} for length in LENGTHS]
    batch = trainer.DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(rows)
    ours = tiny("gemma3")
    ours.set_attn_implementation("posttrain")
    loss = ours(**batch, use_cache=False).loss
    gradients = torch.autograd.grad(loss, list(ours.parameters()))
    monkeypatch.undo()
    exact = tiny("gemma3", torch.float64)
    truth = exact(**batch, use_cache=False).loss
    assert_true_to(loss, truth.double())
    for mine, true in zip(gradients, torch.autograd.grad(truth, list(exact.parameters())), strict=True):
        assert_true_to(mine, true)


def test_the_flattened_batches_of_transformers():
    batch = transformers.DataCollatorWithFlattening()([{"input_ids": ids_of(length).tolist()} for length in LENGTHS])
    model = tiny("mistral")
    model.set_attn_implementation("posttrain")
    ours = model(**batch, use_cache=False).logits
    assert_true_to(ours, tiny("mistral", torch.float64)(**batch, use_cache=False).logits)


def gpt_oss(dtype: torch.dtype = torch.float32):
    """Sinks, and windows in every second layer."""
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=2,
        num_experts_per_tok=1,
        sliding_window=4,
        pad_token_id=0,
        eos_token_id=2,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    return randomised(transformers.GptOssForCausalLM(config)).to(dtype).eval()


@pytest.mark.parametrize("kind", ["packed", "holes"])
def test_sinks(kind):
    assert_same(gpt_oss(), gpt_oss(torch.float64), INPUTS[kind])


def test_generation_with_sinks():
    model = gpt_oss()
    options = {"attention_mask": padding("left"), "max_new_tokens": 6, "do_sample": False}
    before = model.generate(ids_of(3, 12), **options)
    model.set_attn_implementation("posttrain")
    assert torch.equal(model.generate(ids_of(3, 12), **options), before)


def test_compiled_models_use_the_masks_of_sdpa():
    model, exact = (tiny("mistral", dtype, num_hidden_layers=1) for dtype in (torch.float32, torch.float64))
    model.set_attn_implementation("posttrain")
    compiled = torch.compile(model.model, backend="eager")
    with torch.no_grad():
        ours = compiled(**INPUTS["packed"]).last_hidden_state
        assert_true_to(ours, exact.model(**INPUTS["packed"]).last_hidden_state)


def posttrain_model(**options):
    model = tiny("llama", **options)
    model.set_attn_implementation("posttrain")
    return model


def test_attention_weights_are_refused():
    for options in ({"use_cache": False}, {}):
        with pytest.raises(ValueError, match="has no output_attentions; use attn_implementation='eager'"):
            posttrain_model()(ids_of(1, 5), output_attentions=True, **options)
    with pytest.raises(ValueError, match="has no output_attentions"):
        posttrain_model().generate(ids_of(1, 5), output_attentions=True, return_dict_in_generate=True)
    model = tiny("llama", attn_implementation="eager", output_attentions=True)
    model.set_attn_implementation("posttrain")
    with pytest.raises(ValueError, match="output_attentions"):
        model(ids_of(1, 5))


@pytest.mark.parametrize("shape", [(1, 4), (1, 7), (2, 5)], ids=str)
def test_padding_masks_of_another_size_are_refused(shape):
    mask = torch.ones(shape)
    mask[:, 0] = 0
    message = rf"of 1 rows of 5 tokens must be \[1, 5\], got \[{shape[0]}, {shape[1]}\]"
    with pytest.raises(ValueError, match=message):
        posttrain_model()(ids_of(1, 5), attention_mask=mask)
    if shape[1] != 5:
        message = f"attention_mask is for {shape[1]} tokens in a row, and there are 5"
    with pytest.raises(ValueError, match=message):
        posttrain_model()(ids_of(1, 5), attention_mask=mask, use_cache=False)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_masks_of_four_dimensions_are_refused(dtype):
    own = torch.ones(1, 1, 5, 5).tril().to(dtype)
    for options in ({"use_cache": False}, {}):
        with pytest.raises(ValueError, match=r"no masks of four dimensions, got \[1, 1, 5, 5\] torch.* give a PackedL"):
            posttrain_model()(ids_of(1, 5), attention_mask=own, **options)


def test_masks_of_a_models_own_are_refused():
    from transformers.masking_utils import create_bidirectional_mask, create_causal_mask

    model = posttrain_model()
    inputs = {"config": model.config, "inputs_embeds": torch.zeros(1, 5, 64), "attention_mask": None}
    own = {"past_key_values": None, "or_mask_function": lambda row, head, query, key: key < 3}
    with pytest.raises(ValueError, match="no masks of a model's own; use attn_implementation='sdpa'"):
        create_causal_mask(**inputs, **own)
    q = torch.randn(1, 4, 5, 16)
    layer = model.model.layers[0].self_attn
    with pytest.raises(ValueError, match="is causal, and this model lets tokens see later ones"):
        attention.attention(layer, q, q, q, create_bidirectional_mask(**inputs))
    blocks = create_causal_mask(**inputs, past_key_values=None, block_sequence_ids=torch.tensor([[-1, 0, 0, -1, -1]]))
    with pytest.raises(ValueError, match="is causal, and this model lets tokens see later ones"):
        attention.attention(layer, q, q, q, blocks)
    with pytest.raises(ValueError, match="is causal, LlamaAttention isn't"):
        attention.attention(layer, q, q, q, None, is_causal=False)


def test_dropout_is_refused():
    model = posttrain_model(attention_dropout=0.1).train()
    for kind in ("packed", "left"):
        with pytest.raises(ValueError, match=r"attention_dropout to 0, not 0\.1, or use attn_implementation='sdpa'"):
            model(**INPUTS[kind])


def test_a_bias_by_position_is_refused():
    q = torch.randn(1, 4, 5, 16)
    layout = PackedLayout.from_lengths([5])
    with pytest.raises(ValueError, match="no bias by position"):
        attention.attention(torch.nn.Module(), q, q, q, None, layout=layout, position_bias=torch.zeros(1, 4, 5, 5))


def test_chunked_attention():
    """Chunks, of which the first starts after the padding, as in Llama 4."""
    from transformers.masking_utils import create_chunked_causal_mask

    config = tiny("llama").config
    config.attention_chunk_size = 4
    inputs = {"config": config, "inputs_embeds": torch.zeros(3, 12, 64), "past_key_values": None}
    inputs["attention_mask"] = padding("left")
    config._attn_implementation = "sdpa"
    dense = create_chunked_causal_mask(**inputs)
    config._attn_implementation = "posttrain"
    layout, index = create_chunked_causal_mask(**inputs).packing
    seen = dense.new_zeros(36, 36)
    for row in range(3):
        seen[row * 12 :][:12, row * 12 :][:, :12] = dense[row, 0]
    drawn = [[mark == "#" for mark in line] for line in layout.draw().splitlines()]
    assert torch.equal(seen[index][:, index], torch.tensor(drawn))
