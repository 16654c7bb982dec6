"""prepare: the same model, faster. Truth is the stock model in float64."""

import copy
import filecmp
import inspect
import pickle

import pytest
import torch
from tiny_models import FAMILIES, alone, batch_of, tiny
from tolerance import assert_as_good_as, assert_true_to
from torch import Tensor

from posttrain.models import ModelError, hidden_states, prepare, restore
from posttrain.models.prepare import is_prepared

LENGTHS = [9, 3, 17, 1, 6]
families = pytest.mark.parametrize("family", FAMILIES)

COUNTS = {
    "llama": {"rms_norm": 5, "swiglu": 2, "residual + norm": 2},
    "qwen2": {"rms_norm": 5, "swiglu": 2, "residual + norm": 2},
    "qwen3": {"rms_norm": 9, "swiglu": 2, "residual + norm": 2},
    "mistral": {"rms_norm": 5, "swiglu": 2, "residual + norm": 2},
    "gemma2": {"rms_norm": 9, "geglu": 2, "residual + norm": 2},
    "gemma3": {"rms_norm": 13, "geglu": 2, "residual + norm": 2},
    "phi3": {"rms_norm": 5, "swiglu": 2, "residual + norm": 2},
    "olmo2": {"rms_norm": 9, "swiglu": 2},
}


def with_gradients(model, hidden: Tensor) -> list[Tensor]:
    """Hidden states and the gradient of a random mean of them in every parameter they depend on."""
    generator = torch.Generator().manual_seed(7)
    weights = torch.randn(hidden.shape, generator=generator).to(hidden.dtype) / len(hidden)
    parameters = [p for name, p in model.named_parameters() if not name.startswith("lm_head")]
    return [hidden.detach(), *torch.autograd.grad((hidden * weights).sum(), parameters)]


@families
def test_same_hidden_states_and_gradients(family):
    batch = batch_of(LENGTHS)
    exact = tiny(family, torch.float64)
    truth = with_gradients(exact, alone(exact, batch)[0])
    model = tiny(family)
    prepare(model)
    for run in (hidden_states, lambda model, batch: alone(model, batch)[0]):
        for ours, true in zip(with_gradients(model, run(model, batch)), truth, strict=True):
            assert_true_to(ours, true)


@families
def test_bfloat16_is_as_good_as_stock(family):
    batch = batch_of(LENGTHS)
    model = tiny(family, torch.bfloat16)
    peer = with_gradients(model, alone(model, batch)[0])
    wide = copy.deepcopy(model).float()
    reference = with_gradients(wide, alone(wide, batch)[0])
    prepare(model)
    ours = with_gradients(model, hidden_states(model, batch))
    for mine, stock, truth in zip(ours, peer, reference, strict=True):
        assert_as_good_as(mine, stock, truth)


@families
def test_autocast_is_as_good_as_stock(family):
    batch = batch_of(LENGTHS)
    model = tiny(family)
    reference = alone(model, batch)[0].detach()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        peer = alone(model, batch)[0]
        prepare(model)
        ours = hidden_states(model, batch)
    assert ours.dtype == peer.dtype
    assert_as_good_as(ours.bfloat16(), peer.bfloat16(), reference)


@families
def test_the_report_counts_what_was_replaced(family):
    report = prepare(tiny(family))
    assert report.replaced == {**COUNTS[family], "rope": 2, "attention": 2}
    assert set(report.kept) == ({"residual + norm"} if family == "olmo2" else set())
    assert str(report).startswith(f"{report.architecture}: replaced attention (2), ")


@families
def test_checkpoints_are_byte_for_byte_the_same(family, tmp_path):
    model = tiny(family)
    model.save_pretrained(tmp_path / "before")
    keys = list(model.state_dict())
    prepare(model)
    model.save_pretrained(tmp_path / "after")
    assert list(model.state_dict()) == keys
    names = sorted(path.name for path in (tmp_path / "before").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "after").iterdir())
    same, *_ = filecmp.cmpfiles(tmp_path / "before", tmp_path / "after", names, shallow=False)
    assert sorted(same) == names


@families
def test_restore_undoes_everything(family):
    batch = batch_of(LENGTHS)
    model = tiny(family)
    before, classes, state = alone(model, batch)[0], [type(m) for m in model.modules()], set(vars(model))
    attention = model.config._attn_implementation
    prepare(model)
    assert [type(m) for m in model.modules()] != classes and model.config._attn_implementation == "posttrain"
    restore(model)
    assert [type(m) for m in model.modules()] == classes and model.config._attn_implementation == attention
    assert set(vars(model)) == state
    assert torch.equal(alone(model, batch)[0], before)


def test_other_models_are_untouched():
    from transformers.models.llama import modeling_llama

    source = inspect.getsource(modeling_llama.apply_rotary_pos_emb)
    rotary, forwards = modeling_llama.apply_rotary_pos_emb, {}
    classes = (modeling_llama.LlamaRMSNorm, modeling_llama.LlamaAttention, modeling_llama.LlamaDecoderLayer)
    forwards = {cls: cls.forward for cls in classes}
    other = tiny("llama")
    before = [type(m) for m in other.modules()]
    prepare(tiny("llama"))
    assert modeling_llama.apply_rotary_pos_emb is rotary
    assert inspect.getsource(modeling_llama.apply_rotary_pos_emb) == source
    assert all(cls.forward is forward for cls, forward in forwards.items())
    assert [type(m) for m in other.modules()] == before and other.config._attn_implementation == "sdpa"


def test_twice_is_once():
    batch = batch_of(LENGTHS)
    model = tiny("llama")
    first = prepare(model)
    hidden, classes = hidden_states(model, batch), [type(m) for m in model.modules()]
    assert prepare(model) == first
    assert [type(m) for m in model.modules()] == classes
    assert torch.equal(hidden_states(model, batch), hidden)
    restore(model)
    assert model.config._attn_implementation == "sdpa"


def test_a_copy_is_prepared_too():
    batch = batch_of(LENGTHS)
    model = tiny("qwen3")
    prepare(model)
    clone = copy.deepcopy(model)
    assert torch.equal(hidden_states(clone, batch), hidden_states(model, batch))
    with torch.no_grad():
        clone.model.norm.weight.mul_(2)
    torch.testing.assert_close(hidden_states(clone, batch), 2 * hidden_states(model, batch))


def test_modules_whose_forward_another_library_has_replaced_are_named():
    model = tiny("llama")
    mlps = [layer.mlp for layer in model.model.layers]
    for count, mlp in enumerate(mlps, 1):
        mlp.forward = lambda x: x
        report = prepare(model)
        assert report.replaced.get("swiglu", 0) == 2 - count and report.replaced["rms_norm"] == 5
        assert report.kept["swiglu"] == f"another library has replaced the forward of {count} of 2 LlamaMLP modules"
    for mlp in mlps:
        del mlp.forward
    assert prepare(model).replaced["swiglu"] == 2


def test_a_pickle_holds_the_original():
    model = tiny("llama")
    prepare(model)
    loaded = pickle.loads(pickle.dumps(model))
    assert list(map(type, loaded.modules())) == list(map(type, tiny("llama").modules()))
    assert loaded.config._attn_implementation == "sdpa" and not is_prepared(loaded)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


@families
def test_activation_checkpointing_recomputes_and_changes_no_bit(family):
    batch = batch_of(LENGTHS)
    model = tiny(family).train()
    prepare(model)
    calls = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    plain = with_gradients(model, hidden_states(model, batch))
    assert len(calls) == 1
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again = with_gradients(model, hidden_states(model, batch))
    assert len(calls) == 3
    assert all(map(torch.equal, plain, again))


@families
def test_generate_with_a_cache_gives_the_same_tokens(family):
    model = tiny(family)
    ids = torch.randint(3, 97, (2, 7), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 9, "do_sample": False, "output_logits": True}
    before = model.generate(ids, return_dict_in_generate=True, **options)
    prepare(model)
    after = model.generate(ids, return_dict_in_generate=True, **options)
    assert torch.equal(before.sequences, after.sequences)
    torch.testing.assert_close(torch.stack(after.logits), torch.stack(before.logits))


@families
def test_padded_batches_give_the_same(family):
    model = tiny(family)
    ids = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, 8:] = 0
    run = lambda: model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[mask.bool()]  # noqa: E731
    before = run()
    prepare(model)
    torch.testing.assert_close(run(), before)


def test_partial_rotary_embeddings_are_partial():
    assert tiny("phi3").model.rotary_emb.inv_freq.shape == (4,)  # of 8 pairs


def test_an_unknown_activation_stays():
    batch = batch_of(LENGTHS)
    exact = tiny("llama", torch.float64, hidden_act="relu")
    model = tiny("llama", hidden_act="relu")
    report = prepare(model)
    assert report.kept == {"mlp": "there is no op for the activation 'relu'"} and "swiglu" not in report.replaced
    assert_true_to(hidden_states(model, batch), alone(exact, batch)[0])


def test_somebody_elses_norm_stays():
    class Norm(torch.nn.Module):
        def forward(self, x):
            return 2 * x

    batch = batch_of(LENGTHS)
    model, exact = tiny("llama"), tiny("llama", torch.float64)
    model.model.layers[0].post_attention_layernorm = Norm()
    exact.model.layers[0].post_attention_layernorm = Norm()
    report = prepare(model)
    assert report.replaced["residual + norm"] == 1 and report.replaced["rms_norm"] == 4
    assert report.kept == {"residual + norm": "post_attention_layernorm is a Norm, which takes no residual"}
    assert_true_to(hidden_states(model, batch), alone(exact, batch)[0])


def test_exact_gelu():
    batch = batch_of(LENGTHS)
    model = tiny("llama", hidden_act="gelu")
    assert prepare(model).replaced["geglu"] == 2
    assert_true_to(hidden_states(model, batch), alone(tiny("llama", torch.float64, hidden_act="gelu"), batch)[0])


def test_attention_can_stay():
    batch = batch_of(LENGTHS)
    model = tiny("llama")
    report = prepare(model, attention=False)
    assert "attention" not in report.replaced and model.config._attn_implementation == "sdpa"
    assert_true_to(hidden_states(model, batch), alone(tiny("llama", torch.float64), batch)[0])


def test_residual_dropout_of_phi3_is_applied():
    batch = batch_of(LENGTHS)
    model = tiny("phi3", resid_pdrop=0.5).train()
    torch.manual_seed(0)
    stock = model(input_ids=batch.input_ids[None, :9], use_cache=False, output_hidden_states=True).hidden_states[-1]
    prepare(model)
    torch.manual_seed(0)
    ours = model(input_ids=batch.input_ids[None, :9], use_cache=False, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(ours, stock)


def test_what_is_no_causal_lm_is_an_error():
    with pytest.raises(ModelError, match="Linear is not a causal language model of transformers"):
        prepare(torch.nn.Linear(2, 2))
    with pytest.raises(ModelError, match="LlamaModel is not a causal language model"):
        prepare(tiny("llama").model)


def test_the_text_part_of_a_model_with_images_is_replaced_and_padded():
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = Gemma3Config(
        text_config={**text, **heads, "sliding_window": 4},
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        image_token_id=1,
        boi_token_id=1,
        eoi_token_id=1,
    )
    batch = batch_of(LENGTHS)
    model = Gemma3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        before = alone(model, batch)[0]
        report = prepare(model)
        assert report.replaced["rope"] == 2 and "padded" in report.kept["attention"]
        torch.testing.assert_close(hidden_states(model, batch), before)
