"""load: a prepared model and its tokenizer, or one line that says what is wrong."""

import json
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import batch_of, tiny
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from posttrain.models import ModelError, add_lora, load, prepare, token_logprobs


@pytest.fixture
def folder(tmp_path):
    """A model and its tokenizer, saved by transformers."""
    tiny("llama").save_pretrained(tmp_path / "model")
    words = {f"w{i}": i for i in range(97)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")), eos_token="w2")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_model_and_tokenizer_come_prepared(folder):
    batch = batch_of([5, 7])
    model, tokenizer = load(folder)
    expected = tiny("llama")
    prepare(expected)
    assert torch.equal(token_logprobs(model, batch).logprob, token_logprobs(expected, batch).logprob)
    assert model.config._attn_implementation == "posttrain" and prepare(model).replaced["rms_norm"] == 5
    assert tokenizer.convert_tokens_to_ids("w42") == 42
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16], ids=str)
def test_dtype(folder, dtype):
    model, _ = load(str(folder), dtype=dtype, device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model.save_pretrained(folder)
    assert load(folder, dtype="auto")[0].dtype == torch.bfloat16
    assert load(folder)[0].dtype == torch.float32


def test_other_attention(folder):
    model, _ = load(folder, attn_implementation="eager")
    assert model.config._attn_implementation == "eager" and prepare(model, attention=False).replaced["rope"] == 2


def test_an_adapter_folder_brings_its_model(folder, tmp_path):
    batch = batch_of([5, 7])
    model, _ = load(folder)
    model = add_lora(model, r=2, alpha=4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    model.save_pretrained(tmp_path / "adapter")
    back, tokenizer = load(tmp_path / "adapter")
    assert torch.equal(token_logprobs(back, batch).logprob, token_logprobs(model, batch).logprob)
    assert all(("lora_" in name) == p.requires_grad for name, p in back.named_parameters())
    assert tokenizer.convert_tokens_to_ids("w42") == 42


def adapter_of(folder, where, base=None):
    """A new adapter for the model in `folder`, saved to `where`; `base` is what it names as its model."""
    add_lora(load(folder)[0], r=2, alpha=4).save_pretrained(where)
    settings = json.loads((where / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(base or folder)
    (where / "adapter_config.json").write_text(json.dumps(settings))
    return where


def test_an_adapter_folder_may_have_a_tokenizer_of_its_own(folder, tmp_path):
    adapter = adapter_of(folder, tmp_path / "adapter")
    words = {f"v{i}": i for i in range(97)}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="v0"))).save_pretrained(adapter)
    assert load(adapter)[1].convert_tokens_to_ids("v42") == 42


def test_an_adapter_that_names_its_model_by_a_relative_path(folder, tmp_path, monkeypatch):
    adapter = adapter_of(folder, tmp_path / "adapter", "./model")
    monkeypatch.chdir(tmp_path)
    assert load(adapter)[1].convert_tokens_to_ids("w42") == 42
    monkeypatch.chdir(adapter)
    expected = f"the adapter in {adapter} is for the model ./model, looked up from {adapter}: no such folder: ./model"
    assert error_of(adapter) == expected


def test_a_path_from_home(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert load("~/model")[1].convert_tokens_to_ids("w42") == 42


def error_of(path, **options) -> str:
    with pytest.raises(ModelError) as caught:
        load(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_no_such_folder(tmp_path):
    assert error_of(tmp_path / "missing") == f"no such folder: {tmp_path / 'missing'}"
    assert error_of("./missing") == "no such folder: ./missing"
    assert error_of("runs/sft/model") == "no such folder: runs/sft/model"


def test_a_folder_without_a_model(tmp_path):
    assert error_of(tmp_path) == f"no model in {tmp_path}: the folder has no config.json"


def test_a_file(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert error_of(tmp_path / "model.safetensors").endswith(
        "model.safetensors is a file; a model is a folder or a hub id"
    )


def test_a_broken_config(folder):
    (folder / "config.json").write_text("{")
    assert error_of(folder).startswith(f"can't load {folder}: ")


def test_an_unknown_model_type(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "nonesuch"}))
    message = error_of(folder)
    assert message.startswith(f"can't load {folder}: ") and "nonesuch" in message


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    assert "model.safetensors" in error_of(folder)


def test_broken_weights(folder):
    (folder / "model.safetensors").write_bytes(b"nothing")
    assert error_of(folder).startswith(f"can't load {folder}: ")


def test_missing_weights(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert error_of(folder) == f"can't load {folder}: the checkpoint lacks 1 weights, model.norm.weight among them"


def test_weights_of_another_shape(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(3)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert error_of(folder).startswith(f"can't load {folder}: ")


def test_pickled_weights_are_not_opened(folder):
    (folder / "model.safetensors").unlink()
    torch.save(tiny("llama").state_dict(), folder / "pytorch_model.bin")
    assert error_of(folder).startswith(f"can't load {folder}: ")


@pytest.fixture
def no_hub(monkeypatch):
    """Nobody listens at the model hub's address."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")


def test_a_hub_that_is_out_of_reach(no_hub, caplog):
    start = time.monotonic()
    assert error_of("nobody/nothing").startswith(
        "can't load nobody/nothing: no such folder, no whole copy on this machine, and http://127.0.0.1:9 is out of "
        "reach ("
    )
    assert time.monotonic() - start < 5 and "Retrying" not in caplog.text


def test_a_copy_on_this_machine_needs_no_hub(folder, tmp_path, no_hub, monkeypatch):
    copy = tmp_path / "hub" / "models--somebody--something"
    (copy / "refs").mkdir(parents=True)
    (copy / "refs" / "main").write_text("0123")
    (copy / "snapshots").mkdir()
    folder.rename(copy / "snapshots" / "0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert load("somebody/something")[1].convert_tokens_to_ids("w42") == 42


def test_no_hub_id():
    assert error_of("no such id").startswith("can't load no such id: ")


def test_no_tokenizer(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "llama")
    assert error_of(tmp_path / "llama").startswith(f"can't load {tmp_path / 'llama'}: ")
    for family in ("qwen3", "gemma2"):  # of these transformers makes a tokenizer without words
        tiny(family).save_pretrained(tmp_path / family)
        assert error_of(tmp_path / family) == f"no tokenizer in {tmp_path / family}: it has no vocabulary"


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"base_model_name_or_path": null}'])
def test_a_broken_adapter(tmp_path, content):
    (tmp_path / "adapter_config.json").write_text(content)
    assert error_of(tmp_path).startswith(f"{tmp_path / 'adapter_config.json'} names no base_model_name_or_path (")


@pytest.mark.parametrize("dtype", ["float", "int8", "bf16", "nn"])
def test_bad_dtypes(folder, dtype):
    if dtype == "float":
        assert load(folder, dtype="float")[0].dtype == torch.float32
    else:
        assert error_of(folder, dtype=dtype).endswith(f"such as 'bfloat16', got {dtype!r}")


def test_nested_statistics_without_4_bits(folder):
    with pytest.raises(ModelError, match="use_bnb_nested_quant is for 4-bit weights: set load_in_4bit too"):
        load(folder, use_bnb_nested_quant=True)


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, posttrain.models; print(*({'transformers', 'peft', 'datasets'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
