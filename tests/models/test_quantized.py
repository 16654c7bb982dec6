"""Models in 4 bits: the numbers of their dequantised twins, and bitsandbytes' files. LoRA over them."""

import copy
import filecmp
import json

import pytest
import torch
from lora_models import LENGTHS, filled, lora, target_logprobs
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, batch_of, tiny
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tolerance import assert_true_to
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from posttrain.models import (
    ModelError,
    add_adapter,
    add_lora,
    dequantize,
    load,
    load_adapter,
    prepare,
    restore,
    token_logprobs,
)
from posttrain.models.quantized import NF4Linear, quantize, unpack

BATCH = batch_of(LENGTHS)
nested = pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])


def saved(model, folder):
    """`model` and a tokenizer of its size, in `folder`."""
    model.save_pretrained(folder)
    words = {f"w{i}": i for i in range(97)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")), eos_token="w2")
    tokenizer.save_pretrained(folder)
    return folder


WIDE = {"intermediate_size": 128}  # on a CPU bitsandbytes 0.50 misreads rows that aren't whole blocks of 64


@pytest.fixture
def folder(tmp_path):
    return saved(tiny("llama", **WIDE), tmp_path / "model")


def in_4_bits(family="llama", nested=False, **overrides):
    model = tiny(family, **overrides)
    quantize(model, nested=nested)
    return model


def layers(model, kind) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


def adapted(model):
    torch.manual_seed(1)
    return filled(add_lora(model, r=4, alpha=12))


def twin(model):
    """The model with its weights in full, in float64."""
    exact = copy.deepcopy(model)
    dequantize(exact)
    restore(exact)
    return exact.double()


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_and_gradients_of_adapters(family):
    model = in_4_bits(family)
    head = model.get_output_embeddings()
    assert type(head) is torch.nn.Linear and layers(model, NF4Linear) == (8 if family == "phi3" else 14)
    prepare(model)
    model = adapted(model)
    exact = twin(model)
    assert layers(exact, NF4Linear) == 0
    truth, ours = target_logprobs(exact, BATCH), token_logprobs(model, BATCH).logprob
    assert_true_to(ours, truth)
    pairs = [[p for p in each.parameters() if p.requires_grad] for each in (model, exact)]
    slopes = [torch.autograd.grad(y.mean(), p) for y, p in zip((ours, truth), pairs, strict=True)]
    for mine, true in zip(*slopes, strict=True):
        assert_true_to(mine, true)


def test_the_ops_take_the_packed_weights(monkeypatch):
    model = in_4_bits()
    prepare(model)
    model = adapted(model)
    assert prepare(model).replaced["lora_qkv"] == prepare(model).replaced["lora_mlp"] == 2
    monkeypatch.setattr(NF4Linear, "forward", lambda *_: pytest.fail("a layer ran by itself"))
    token_logprobs(model, BATCH)


def test_without_adapters():
    model = in_4_bits("qwen2")
    exact = twin(model)
    assert_true_to(target_logprobs(model, BATCH), target_logprobs(exact, BATCH))
    prepare(model)
    assert_true_to(token_logprobs(model, BATCH).logprob, target_logprobs(exact, BATCH))


def test_switched_off_it_is_exactly_the_base():
    model = in_4_bits()
    prepare(model)
    expected = token_logprobs(model, BATCH).logprob
    model = adapted(model)
    with model.disable_adapter():
        assert torch.equal(token_logprobs(model, BATCH).logprob, expected)


@pytest.mark.parametrize("when", ["after", "never"])
def test_layers_that_peft_puts_in_by_itself(when):
    """PEFT takes an NF4Linear for any linear layer, prepared or not."""
    torch.manual_seed(1)
    model = filled(get_peft_model(in_4_bits(), lora()))
    exact = twin(model)
    if when == "after":
        assert prepare(model).replaced["lora_linear"] == 14
    with torch.no_grad():
        assert_true_to(target_logprobs(model, BATCH), target_logprobs(exact, BATCH))


def test_dora():
    model = in_4_bits()
    prepare(model)
    torch.manual_seed(1)
    model = filled(add_adapter(model, lora(use_dora=True)))
    exact = in_4_bits()
    dequantize(exact)
    torch.manual_seed(1)
    exact = filled(get_peft_model(exact, lora(use_dora=True))).double()
    assert prepare(model).replaced["lora_linear"] == 14
    truth, ours = target_logprobs(exact, BATCH), token_logprobs(model, BATCH).logprob
    assert_true_to(ours, truth)
    pairs = [[p for p in each.parameters() if p.requires_grad] for each in (model, exact)]
    slopes = [torch.autograd.grad(y.mean(), p) for y, p in zip((ours, truth), pairs, strict=True)]
    for mine, true in zip(*slopes, strict=True):
        assert_true_to(mine, true)


@pytest.mark.parametrize("start", ["orthogonal", "pissa_niter_4", "olora"])
def test_starts_that_need_the_weights_in_full(start):
    with pytest.raises(ModelError, match=f"init_lora_weights='{start}' needs weights in full precision"):
        add_adapter(in_4_bits(), lora(init_lora_weights=start))


def test_merging_needs_the_weights_in_full():
    model = adapted(in_4_bits())
    prepare(model)
    expected = token_logprobs(model, BATCH).logprob
    with pytest.raises(ModelError, match=r"can't be merged into 4-bit weights; call posttrain.models.dequantize"):
        model.merge_and_unload()
    dequantize(model)
    merged = model.merge_and_unload()
    assert not hasattr(merged.config, "quantization_config")
    torch.testing.assert_close(token_logprobs(merged, BATCH).logprob, expected)


def test_dequantising_gives_the_dtype_of_the_model(tmp_path):
    folder = saved(in_4_bits(dtype=torch.bfloat16), tmp_path / "bfloat16")
    model = adapted(load(folder, dtype="float32")[0])
    assert {m.matrix.dtype for m in model.modules() if isinstance(m, NF4Linear)} == {torch.bfloat16}
    expected = token_logprobs(model, BATCH).logprob
    dequantize(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    torch.testing.assert_close(token_logprobs(model.merge_and_unload(), BATCH).logprob, expected)


@pytest.mark.parametrize("dtype", [torch.float32, "auto"], ids=str)
def test_loading_writes_no_weights_in_full(dtype, tmp_path, monkeypatch):
    """What stands for the matrices is in the dtype that is loaded, and so isn't converted, which would fill it."""
    folder = saved(in_4_bits(dtype=torch.bfloat16), tmp_path / "model")
    before = {}

    def without_matrices(tensors, dtype):
        names = list(unpack(tensors, dtype))
        before.update({name: tensors[name] for name in names})
        return {}

    monkeypatch.setattr("posttrain.models.quantized.unpack", without_matrices)
    after = load(folder, dtype=dtype)[0].state_dict()
    assert len(before) == 14 and all(after[name].data_ptr() == tensor.data_ptr() for name, tensor in before.items())


@nested
def test_a_copy_and_a_state_dict(nested):
    model = in_4_bits(nested=nested)
    expected = target_logprobs(model, BATCH)
    clone = copy.deepcopy(model)
    other = in_4_bits(nested=nested)
    with torch.no_grad():
        for module in (*model.modules(), *other.modules()):
            if isinstance(module, NF4Linear):
                module.weight.fill_(0x77)
    assert torch.equal(target_logprobs(clone, BATCH), expected)
    assert not torch.equal(target_logprobs(other, BATCH), expected)
    other.load_state_dict(clone.state_dict())
    assert torch.equal(target_logprobs(other, BATCH), expected)


@nested
def test_loading(folder, tmp_path, nested):
    model, tokenizer = load(folder, load_in_4bit=True, use_bnb_nested_quant=nested)
    assert layers(model, NF4Linear) == 14 and model.config._attn_implementation == "posttrain"
    prepare(expected := in_4_bits(nested=nested, **WIDE))
    logprobs = token_logprobs(model, BATCH).logprob
    assert torch.equal(logprobs, token_logprobs(expected, BATCH).logprob)

    model.save_pretrained(tmp_path / "again")
    tokenizer.save_pretrained(tmp_path / "again")
    for options in ({}, {"load_in_4bit": True}):
        back, _ = load(tmp_path / "again", **options)
        assert layers(back, NF4Linear) == 14 and back.name_or_path == str(tmp_path / "again")
        assert torch.equal(token_logprobs(back, BATCH).logprob, logprobs)


def test_bfloat16(folder):
    model, _ = load(folder, dtype="bfloat16", load_in_4bit=True)
    wide, _ = load(folder, load_in_4bit=True)
    assert token_logprobs(model, BATCH).logprob.isfinite().all() and model.dtype == torch.bfloat16
    assert [m.matrix.dtype for m in model.modules() if isinstance(m, NF4Linear)] == [torch.bfloat16] * 14
    assert {m.matrix.dtype for m in wide.modules() if isinstance(m, NF4Linear)} == {torch.float32}


def test_an_adapter_over_4_bits(folder, tmp_path):
    model = adapted(load(folder, load_in_4bit=True)[0])
    model.save_pretrained(tmp_path / "adapter")
    back, _ = load(tmp_path / "adapter", load_in_4bit=True)
    assert layers(back, NF4Linear) == 14
    assert torch.equal(token_logprobs(back, BATCH).logprob, token_logprobs(model, BATCH).logprob)
    full, _ = load(tmp_path / "adapter")
    assert layers(full, NF4Linear) == 0
    full.merge_and_unload()


def test_a_checkpoint_in_several_files(folder, tmp_path):
    model, tokenizer = load(folder, load_in_4bit=True)
    model.save_pretrained(tmp_path / "parts", max_shard_size="40KB")
    tokenizer.save_pretrained(tmp_path / "parts")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    back, _ = load(tmp_path / "parts")
    assert torch.equal(token_logprobs(back, BATCH).logprob, token_logprobs(model, BATCH).logprob)


def changed(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_broken_checkpoints_are_one_line(tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    folder = saved(in_4_bits(), tmp_path / "model")
    with pytest.raises(ModelError, match=f"can't load .*'{name}' lacks absmax"):
        load(changed(folder, lambda weights: weights.pop(f"{name}.absmax")))
    folder = saved(in_4_bits(), tmp_path / "other")
    with pytest.raises(ModelError, match=r"the checkpoint lacks 1 weights, model\.norm\.weight among them"):
        load(changed(folder, lambda weights: weights.pop("model.norm.weight")))


def test_other_quantisations_are_named(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="can't load"):
        load(folder, load_in_4bit=True)


def test_a_model_without_linear_layers_is_an_error(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2)
    with pytest.raises(ModelError, match="GPT2LMHeadModel has no linear layers to hold in 4 bits"):
        load(saved(GPT2LMHeadModel(config), tmp_path / "gpt2"), load_in_4bit=True)


@pytest.fixture
def bitsandbytes_model(folder, tmp_path, request):
    """transformers' own way to 4 bits."""
    pytest.importorskip("bitsandbytes", reason="compares with bitsandbytes, which is optional")
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=getattr(request, "param", False),
        bnb_4bit_compute_dtype=torch.float32,
    )
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)


@pytest.mark.parametrize("bitsandbytes_model", [False, True], ids=["plain", "nested"], indirect=True)
def test_files_are_byte_for_byte_those_of_bitsandbytes(folder, tmp_path, bitsandbytes_model):
    theirs = bitsandbytes_model
    nested = theirs.config.quantization_config.bnb_4bit_use_double_quant
    ours, tokenizer = load(folder, load_in_4bit=True, use_bnb_nested_quant=nested)
    for name, model in (("ours", ours), ("theirs", theirs)):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    assert filecmp.cmp(*(tmp_path / name / "model.safetensors" for name in ("ours", "theirs")), shallow=False)
    expected = token_logprobs(ours, BATCH).logprob
    for name in ("ours", "theirs"):
        assert torch.equal(token_logprobs(load(tmp_path / name)[0], BATCH).logprob, expected)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    assert type(back.model.layers[0].mlp.up_proj).__module__.startswith("bitsandbytes")
    prepare(back)
    assert torch.equal(token_logprobs(back, BATCH).logprob, expected)


def test_models_of_bitsandbytes_run_our_ops(folder, bitsandbytes_model, tmp_path):
    from peft.tuners.lora.bnb import Linear4bit

    torch.manual_seed(1)
    model = filled(get_peft_model(bitsandbytes_model, lora()))
    prepare(ours := adapted(load(folder, load_in_4bit=True)[0]))
    assert layers(model, Linear4bit) == 14
    report = prepare(model)
    assert (report.replaced["lora_linear"], report.replaced["lora_qkv"], report.replaced["lora_mlp"]) == (14, 2, 2)
    results = []
    for each in (model, ours):
        logprobs = token_logprobs(each, BATCH).logprob
        results.append(
            [logprobs, *torch.autograd.grad(logprobs.mean(), [p for p in each.parameters() if p.requires_grad])]
        )
        with each.disable_adapter():
            results[-1].append(token_logprobs(each, BATCH).logprob)
    assert all(map(torch.equal, *results))

    model.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    assert filecmp.cmp(*(tmp_path / name / "adapter_model.safetensors" for name in ("ours", "theirs")), shallow=False)
    back = load_adapter(load(folder, load_in_4bit=True)[0], tmp_path / "theirs")
    assert torch.equal(token_logprobs(back, BATCH).logprob, results[0][0])


def test_dequantising_is_for_our_layers_only(bitsandbytes_model):
    with pytest.raises(ModelError, match="LlamaForCausalLM has no NF4Linear layers"):
        dequantize(bitsandbytes_model)
    assert bitsandbytes_model.config.quantization_config.load_in_4bit


@pytest.mark.filterwarnings("ignore:(Merge|Unmerge) lora module to 4-bit")
def test_merging_in_bitsandbytes_is_pefts(bitsandbytes_model):
    models = [copy.deepcopy(bitsandbytes_model), bitsandbytes_model]
    for i, model in enumerate(models):
        torch.manual_seed(1)
        models[i] = filled(get_peft_model(model, lora()))
    stock, ours = models
    prepare(ours)
    before = token_logprobs(ours, BATCH).logprob
    for model in models:
        model.merge_adapter()
    assert not torch.equal(token_logprobs(ours, BATCH).logprob, before)
    pairs = zip(*(dict(model.named_modules()).items() for model in models), strict=True)
    for (name, theirs), (_, mine) in pairs:
        if name.endswith("base_layer"):
            assert torch.equal(mine.weight, theirs.weight)
            assert torch.equal(mine.weight.quant_state.absmax, theirs.weight.quant_state.absmax)
    logprobs = token_logprobs(ours, BATCH).logprob
    stock.enable_input_require_grads()  # bitsandbytes' inference on the CPU rounds to half precision
    torch.testing.assert_close(logprobs, target_logprobs(stock, BATCH))
    with ours.disable_adapter():
        assert not torch.equal(token_logprobs(ours, BATCH).logprob, logprobs)


def test_weights_that_bitsandbytes_has_repacked_stay_its_own(bitsandbytes_model):
    model = bitsandbytes_model
    expected = target_logprobs(model, BATCH)
    layer = model.model.layers[0].mlp.up_proj
    layer.weight.quant_state.packing_format_for_cpu = True
    report = prepare(model)
    assert report.kept == {
        "model.layers.0.mlp.up_proj": "bitsandbytes has repacked its weight for inference on the CPU"
    }
    assert report.replaced["nf4_linear"] == 13
    layer.weight.quant_state.packing_format_for_cpu = False
    torch.testing.assert_close(token_logprobs(model, BATCH).logprob, expected)


def test_fp4_stays_bitsandbytes(folder, tmp_path):
    pytest.importorskip("bitsandbytes", reason="compares with bitsandbytes, which is optional")
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    report = prepare(model)
    assert "nf4_linear" not in report.replaced
    assert report.kept == {"model.layers.0.self_attn.q_proj and 13 more": "its weight is not in NF4"}
    saved(model, tmp_path / "fp4")
    with pytest.raises(ModelError, match=r"load_in_4bit: .* is quantised already \(bitsandbytes\)"):
        load(tmp_path / "fp4", load_in_4bit=True)
