"""PEFT's LoRA layers after prepare: the numbers of PEFT, our ops, and PEFT's code where the ops don't fit."""

import copy
import filecmp

import pytest
import torch
from lora_models import LENGTHS, filled, lora, stock, target_logprobs
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from tiny_models import FAMILIES, alone, batch_of, tiny
from tolerance import assert_as_good_as, assert_true_to

from posttrain.models import add_lora, hidden_states, prepare, restore, token_logprobs
from posttrain.ops.layout import PackedLayout

BATCH = batch_of(LENGTHS)
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


def prepared(config: LoraConfig, family="llama", dtype=torch.float32):
    """(prepared model, its report) with adapters that PEFT put in first."""
    model = stock(family, config, dtype)
    return model, prepare(model)


def logprobs_and_slopes(model, logprobs):
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [logprobs.detach(), *torch.autograd.grad(logprobs.mean(), parameters)]


def assert_equals_peft(config, family="llama"):
    exact = stock(family, config)
    truth = logprobs_and_slopes(exact, target_logprobs(exact, BATCH))
    model, report = prepared(config, family)
    ours = logprobs_and_slopes(model, token_logprobs(model, BATCH).logprob)
    for mine, true in zip(ours, truth, strict=True):
        assert_true_to(mine, true)
    return report


@pytest.mark.parametrize("family", FAMILIES)
def test_the_report_counts_the_ops(family):
    _, report = prepared(lora(), family)
    expected = (
        {"lora_linear": 8, "lora_mlp": 2} if family == "phi3" else {"lora_linear": 14, "lora_mlp": 2, "lora_qkv": 2}
    )
    assert {kind: count for kind, count in report.replaced.items() if kind.startswith("lora")} == expected
    assert not any("lora" in name for name in report.kept)


@pytest.mark.parametrize(
    ("targets", "groups"),
    [
        (["q_proj", "v_proj"], {"lora_qkv": 2, "lora_linear": 4}),
        (["gate_proj"], {"lora_mlp": 2, "lora_linear": 2}),
        (["o_proj", "down_proj"], {"lora_mlp": 2, "lora_linear": 4}),
    ],
    ids=str,
)
def test_some_layers_of_a_group_are_enough(targets, groups):
    report = assert_equals_peft(lora(target_modules=targets))
    assert {kind: count for kind, count in report.replaced.items() if kind.startswith("lora")} == groups


@pytest.mark.parametrize(
    "options", [{"use_rslora": True}, {"use_dora": True}, {"rank_pattern": {"k_proj": 1}, "r": 13}], ids=str
)
def test_variants_that_the_ops_compute(options):
    report = assert_equals_peft(lora(**options))
    assert report.replaced["lora_linear"] == 14 and ("lora_qkv" in report.replaced) == ("use_dora" not in options)


def test_ops_are_called_and_pefts_layers_are_not(monkeypatch):
    from peft.tuners.lora import Linear

    model, _ = prepared(lora())
    foreign = get_peft_model(prepared_base(), lora(target_modules=ATTENTION[:3] + MLP))
    monkeypatch.setattr(Linear, "forward", lambda *_: pytest.fail("PEFT's code ran"))
    token_logprobs(model, BATCH)
    token_logprobs(foreign, BATCH)


def prepared_base(family="llama", dtype=torch.float32):
    model = tiny(family).to(dtype)
    prepare(model)
    return model


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_adapters_that_peft_adds_after_prepare(family):
    exact = stock(family, lora())
    model = prepared_base(family)
    torch.manual_seed(1)
    model = filled(get_peft_model(model, lora()))
    truth = logprobs_and_slopes(exact, target_logprobs(exact, BATCH))
    for counted in (0, 8 if family == "phi3" else 14):
        ours = logprobs_and_slopes(model, token_logprobs(model, BATCH).logprob)
        assert all(map(lambda mine, true: assert_true_to(mine, true) is None, ours, truth))
        assert sum("LoraLinear" in str(type(m).__mro__) for m in model.modules()) == counted
        prepare(model)


def test_bfloat16_with_float32_adapters():
    config = lora()
    wide, half, ours = (stock("llama", config, torch.float32) for _ in range(3))
    for model in (half, ours):
        for name, parameter in model.named_parameters():
            if "lora_" not in name:
                parameter.data = parameter.data.bfloat16()
    for narrow, exact in zip(half.parameters(), wide.parameters(), strict=True):
        exact.data.copy_(narrow.data)
    reference = logprobs_and_slopes(wide, target_logprobs(wide, BATCH).float())
    peer = logprobs_and_slopes(half, target_logprobs(half, BATCH).float())
    prepare(ours)
    mine = logprobs_and_slopes(ours, token_logprobs(ours, BATCH).logprob)
    for result, theirs, truth in zip(mine, peer, reference, strict=True):
        assert_as_good_as(result.bfloat16(), theirs.bfloat16(), truth)


@pytest.mark.parametrize("key_heads", [1, 4])
def test_activations_of_a_decoder_layer(key_heads):
    """At most 0.6 of what PEFT's layers keep: the normed states, the gated ones and x A^T are made again."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=97,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=key_heads,
    )
    model = get_peft_model(LlamaForCausalLM(config), lora(r=2, init_lora_weights=False))
    body = model.get_base_model().model
    x = torch.randn(1, 256, 128, requires_grad=True)
    positions = torch.arange(256)[None]
    inputs = {"position_embeddings": body.rotary_emb(x, positions), "position_ids": positions}

    def kept(**options) -> int:
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            output = body.layers[0](x, **inputs, **options)
        assert output.grad_fn is not None
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
        return sum(size for address, size in sizes.items() if address not in weights)

    peft = kept()
    prepare(model)
    assert kept(layout=PackedLayout.from_lengths([256])) <= 0.6 * peft


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"lora_bias": True}, "its adapter has a bias"),
        ({"use_dora": True, "lora_dropout": 0.1}, "dropout with DoRA"),
        ({"target_modules": ["embed_tokens"]}, "there is no op for a Embedding of PEFT"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["up_proj"]}, "a ModulesToSaveWrapper of PEFT"),
    ],
    ids=str,
)
def test_what_the_ops_dont_compute_stays_pefts_and_is_named(options, reason):
    report = assert_equals_peft(lora(**options)) if "lora_dropout" not in options else prepared(lora(**options))[1]
    (name,) = [name for name, why in report.kept.items() if reason in why]
    assert name.startswith("model.")
    assert name in str(report)


def test_an_unknown_variant_is_named():
    _, report = prepared(lora(target_modules=["o_proj"], alora_invocation_tokens=[5]))
    assert report.kept == {"model.layers.0.self_attn.o_proj and 1 more": "ALoraLinearVariant is another formula"}


def test_other_tuners_stay():
    config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    exact = get_peft_model(tiny("llama"), config).double()
    model = get_peft_model(tiny("llama"), config)
    report = prepare(model)
    assert "there is no op for a Linear of PEFT" in set(report.kept.values())
    assert_true_to(token_logprobs(model, BATCH).logprob, target_logprobs(exact, BATCH))


def test_gpt2s_transposed_layers_stay():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=97, n_positions=64, n_embd=32, n_layer=1, n_head=2, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0
    )
    model = get_peft_model(GPT2LMHeadModel(config).eval(), lora(target_modules=["c_attn"], fan_in_fan_out=True))
    expected = alone(model, BATCH)[0]
    report = prepare(model)
    assert report.kept["transformer.h.0.attn.c_attn"] == "its base is a Conv1D"
    torch.testing.assert_close(hidden_states(model, BATCH), expected)


def test_a_model_of_an_unknown_family():
    model = filled(get_peft_model(tiny("gpt_neox"), lora(target_modules=["dense_h_to_4h"])))
    exact = copy.deepcopy(model).double()
    report = prepare(model)
    assert report.replaced["lora_linear"] == 2 and "not one of" in report.kept["modules"]
    assert_true_to(token_logprobs(model, BATCH).logprob, target_logprobs(exact, BATCH))


@pytest.fixture
def several():
    """(prepared model in float32, the stock one in float64), each with adapters "default" and "second"."""
    models = []
    for dtype in (torch.float32, torch.float64):
        model = stock("llama", lora(), dtype)
        torch.manual_seed(5)
        model.add_adapter("second", lora(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"]))
        models.append(filled(model).to(dtype))
    prepare(models[0])
    return models


@pytest.mark.parametrize("active", ["default", "second", ["default", "second"]], ids=str)
def test_switching_adapters(several, active):
    results = []
    for model in several:
        model.base_model.set_adapter(active)
        logprobs = token_logprobs(model, BATCH).logprob if model is several[0] else target_logprobs(model, BATCH)
        results.append(logprobs_and_slopes(model, logprobs))
    for mine, true in zip(*results, strict=True):
        assert_true_to(mine, true)


def test_adapters_off_is_exactly_the_base(several):
    model = several[0]
    base = prepared_base()
    with model.disable_adapter():
        assert torch.equal(token_logprobs(model, BATCH).logprob, token_logprobs(base, BATCH).logprob)
    assert not torch.equal(token_logprobs(model, BATCH).logprob, token_logprobs(base, BATCH).logprob)


def test_each_row_of_a_batch_with_its_own_adapter(several):
    model, exact = several
    ids = torch.randint(3, 97, (3, 6), generator=torch.Generator().manual_seed(3))
    names = ["default", "__base__", "second"]
    for each in several:
        each.eval()
    with torch.no_grad():
        logits = model(input_ids=ids, adapter_names=names, use_cache=False).logits
        assert_true_to(logits, exact(input_ids=ids, adapter_names=names, use_cache=False).logits)


def test_merging_and_unmerging(several):
    model, exact = several
    truth = target_logprobs(exact, BATCH).detach()
    weight = model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight
    before = weight.clone()
    with torch.no_grad():
        model.merge_adapter()
        assert not torch.equal(weight, before)
        torch.testing.assert_close(token_logprobs(model, BATCH).logprob, truth.float())
        model.unmerge_adapter()
        torch.testing.assert_close(weight, before)
        torch.testing.assert_close(token_logprobs(model, BATCH).logprob, truth.float())
        merged = model.merge_and_unload()
        assert not any("lora" in name for name in merged.state_dict())
        torch.testing.assert_close(token_logprobs(merged, BATCH).logprob, truth.float())


def test_a_merged_adapter_that_is_switched_off(several):
    model, exact = several
    model.merge_adapter()
    with torch.no_grad(), model.disable_adapter(), exact.disable_adapter():
        torch.testing.assert_close(token_logprobs(model, BATCH).logprob, target_logprobs(exact, BATCH).float())


def test_restore_gives_pefts_layers_back(several):
    model = several[0]
    restore(model)
    other = stock("llama", lora(), torch.float32)
    assert {type(m) for m in model.modules()} == {type(m) for m in other.modules()}
    with torch.no_grad():
        torch.testing.assert_close(target_logprobs(model, BATCH), target_logprobs(several[1], BATCH).float())


def test_files_are_byte_for_byte_pefts(tmp_path):
    model = prepared_base()
    torch.manual_seed(1)
    ours = filled(add_lora(model, r=4, alpha=12, target_modules=["q_proj"]))
    ours.save_pretrained(tmp_path / "ours")
    theirs = stock("llama", lora(target_modules=["q_proj"]), torch.float32)
    theirs.save_pretrained(tmp_path / "theirs")
    names = ["adapter_config.json", "adapter_model.safetensors"]
    assert filecmp.cmpfiles(tmp_path / "ours", tmp_path / "theirs", names, shallow=False)[0] == names
    back = PeftModel.from_pretrained(tiny("llama"), str(tmp_path / "ours"))
    torch.testing.assert_close(target_logprobs(back, BATCH), token_logprobs(ours, BATCH).logprob)


@pytest.mark.parametrize(
    ("path", "family", "config"),
    [
        ("mlp.up_proj", "llama", lora()),
        ("mlp.up_proj.lora_A.default", "llama", lora()),
        ("mlp.down_proj.base_layer", "llama", lora()),
        ("self_attn.k_proj.lora_B.default", "llama", lora()),
        ("self_attn.o_proj.lora_dropout.default", "llama", lora()),
        ("self_attn", "llama", lora()),
        ("mlp", "llama", lora()),
        ("input_layernorm", "llama", lora()),
        ("post_attention_layernorm", "llama", lora()),
        ("pre_feedforward_layernorm", "gemma2", lora()),
        ("mlp", "llama", None),
        ("input_layernorm", "llama", None),
        ("post_attention_layernorm", "llama", None),
        ("post_attention_layernorm", "phi3", None),
        ("pre_feedforward_layernorm", "gemma2", None),
    ],
    ids=lambda value: value if isinstance(value, str) else "lora" if value else "plain",
)
def test_hooks_see_and_change_what_they_do_without_prepare(path, family, config):
    model, exact = (tiny(family) if config is None else stock(family, config, torch.float32) for _ in range(2))
    exact.double()
    prepare(model)
    seen = {model: [], exact: []}

    def watch(each):
        base = each if config is None else each.get_base_model()
        module = base.model.layers[0].get_submodule(path)
        module.register_forward_pre_hook(lambda _, *inputs: before(each, *inputs), with_kwargs=True)
        module.register_forward_hook(lambda *call: after(each, call[-1]))

    def before(each, inputs, kwargs):
        assert len(inputs) == 1 or "hidden_states" in kwargs
        x = inputs[0] if inputs else kwargs["hidden_states"]
        seen[each].append(x.detach())
        return ((1.5 * x,), kwargs) if inputs else ((), {**kwargs, "hidden_states": 1.5 * x})

    def after(each, output):
        y, *rest = output if isinstance(output, tuple) else (output,)
        seen[each].append(y.detach())
        return (0.5 * y, *rest) if isinstance(output, tuple) else 0.5 * y

    watch(model)
    watch(exact)
    assert_true_to(token_logprobs(model, BATCH).logprob, target_logprobs(exact, BATCH))
    assert len(seen[model]) == 2
    for i, ours in enumerate(seen[model]):
        assert_true_to(ours, torch.cat(seen[exact][i::2], 1))


def test_autocast_is_as_good_as_peft():
    model = stock("llama", lora(), torch.float32)
    reference = alone(model, BATCH)[0].detach()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        peer = alone(model, BATCH)[0]
        prepare(model)
        ours = hidden_states(model, BATCH)
    assert ours.dtype == peer.dtype
    assert_as_good_as(ours.bfloat16(), peer.bfloat16(), reference)


def test_dropout():
    """Off in evaluation; in training by torch's generator, also where activations are made again."""
    model, report = prepared(lora(lora_dropout=0.5))
    model.eval()
    assert report.replaced["lora_qkv"] == report.replaced["lora_mlp"] == 2
    exact = stock("llama", lora())
    assert_true_to(token_logprobs(model, BATCH).logprob, target_logprobs(exact, BATCH))

    model.train()
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(logprobs_and_slopes(model, token_logprobs(model, BATCH).logprob))
    assert all(map(torch.equal, runs[0], runs[1]))
    assert not torch.equal(runs[0][0], runs[2][0])
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(1)
    again = logprobs_and_slopes(model, token_logprobs(model, BATCH).logprob)
    assert all(map(torch.equal, runs[0], again))


def test_dropout_is_of_the_adapter_only_and_keeps_the_mean():
    model, _ = prepared(lora(target_modules=["o_proj"], lora_dropout=0.5, init_lora_weights=False))
    model.eval()
    layer = model.get_base_model().model.layers[0].self_attn.o_proj
    x = torch.randn(4, 64)
    base, whole = layer.base_layer(x), layer(x)
    layer.train()
    torch.manual_seed(0)
    draws = torch.stack([layer(x) for _ in range(400)]).detach()
    errors = ((draws - whole) * (whole - base)).mean((1, 2))  # along what the adapter adds
    assert errors.mean().abs() <= 3 * errors.std() / 20
    with torch.no_grad():
        layer.lora_B["default"].weight.zero_()
    assert torch.equal(layer(x), base)


def test_a_copy_has_its_own_adapters():
    model, _ = prepared(lora())
    clone = copy.deepcopy(model)
    assert torch.equal(token_logprobs(clone, BATCH).logprob, token_logprobs(model, BATCH).logprob)
    with torch.no_grad():
        for name, parameter in clone.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    assert not torch.equal(token_logprobs(clone, BATCH).logprob, token_logprobs(model, BATCH).logprob)
