"""Copies and pickles of models under enable(): the first have our ops until disable(), the second are the originals."""

import copy
import gc
import pickle
import subprocess
import sys
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from lora_models import filled, lora
from peft import get_peft_model
from tiny_models import VOCABULARY, tiny

import posttrain
from posttrain.integrations import counters
from posttrain.integrations.counting import forget
from posttrain.integrations.models import attach, detach
from posttrain.models.causal_lm import decoder
from posttrain.models.prepare import is_prepared, prepare

IDS = torch.randint(3, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def fresh():
    """Counters from nothing, and no model with hooks afterwards."""
    forget()
    yield
    detach()


def classes(module):
    return [type(part) for part in module.modules()]


def state(module):
    """All that modules hold besides tensors, by name."""
    return [sorted(name for name in part.__dict__ if name.startswith("_posttrain")) for part in module.modules()]


@pytest.mark.parametrize("frozen", [False, True], ids=["", "gc.freeze"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "cohere"])
def test_nothing_is_left_of_us(name, frozen):
    plain, model = tiny(name), tiny(name)
    attach(model)
    if frozen:
        gc.freeze()
    try:
        copied = copy.deepcopy(model)
        parts = (model, copied, copy.deepcopy(decoder(copied)), copy.deepcopy(decoder(model).layers[1]))
        assert is_prepared(copied) and copied.config._attn_implementation == "posttrain"
        expected = tiny(name, torch.float64)(IDS).logits.float()
        for each in (model, copied):
            torch.testing.assert_close(each(IDS).logits, expected)
        assert [n for what, n in counters().items() if what.endswith("passed")] == ([] if name == "cohere" else [2])
        detach()
    finally:
        gc.unfreeze()
    likes = (plain, plain, decoder(plain), decoder(plain).layers[1])
    for part, like in zip(parts, likes, strict=True):
        assert classes(part) == classes(like)
        assert not any(map(any, state(part)))
    for part in parts[:3]:
        assert part.config._attn_implementation == plain.config._attn_implementation
    for each in (model, copied):
        assert torch.equal(each(IDS).logits, plain(IDS).logits)


def test_copies_of_what_the_script_has_prepared_itself_keep_our_ops():
    model = tiny("llama")
    prepare(model)
    before = classes(model)
    attach(model)
    copied = copy.deepcopy(model)
    detach()
    for each in (model, copied):
        assert classes(each) == before and is_prepared(each)
        assert each.config._attn_implementation == "posttrain"


def test_copies_of_adapted_models():
    torch.manual_seed(0)
    model = filled(get_peft_model(tiny("llama"), lora()))
    before, expected = classes(model), model(IDS).logits
    attach(model)
    copied = copy.deepcopy(model)
    torch.testing.assert_close(copied(IDS).logits, expected)
    detach()
    assert classes(copied) == before
    assert torch.equal(copied(IDS).logits, expected)


LOADER = """
import sys
sys.modules["posttrain"] = None  # importing it is an error from here on
import torch
source, out = sys.argv[1:]
ids, models = torch.load(source, weights_only=False)
assert not [name for name in sys.modules if name.startswith("posttrain.")]
described = [sorted({type(part).__qualname__ for part in model.modules()}) for model in models]
attentions = [model.config._attn_implementation for model in models]
with torch.no_grad():
    torch.save([described, attentions, [model(ids).logits for model in models]], out)
"""


def test_whole_models_load_where_there_is_no_posttrain(tmp_path):
    torch.manual_seed(0)
    plain = [tiny("llama"), tiny("gemma2"), tiny("granite"), filled(get_peft_model(tiny("qwen3"), lora()))]
    models = copy.deepcopy(plain)
    for model in models[:-1]:
        attach(model)
    posttrain.patch(models[-1])
    for model in models:
        model(IDS)
    torch.save((IDS, models), tmp_path / "models.pt")
    arguments = [str(tmp_path / name) for name in ("models.pt", "found.pt")]
    run = subprocess.run([sys.executable, "-c", LOADER, *arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    described, attentions, logits = torch.load(tmp_path / "found.pt")
    assert described == [sorted({type(part).__qualname__ for part in model.modules()}) for model in plain]
    assert attentions == [model.config._attn_implementation for model in plain] == ["sdpa", "eager", "sdpa", "sdpa"]
    for found, model in zip(logits, plain, strict=True):
        torch.testing.assert_close(found, model(IDS).logits)


def test_a_pickle_is_prepared_anew():
    model = tiny("llama")
    attach(model)
    loaded = pickle.loads(pickle.dumps(model))
    assert not is_prepared(loaded) and classes(loaded) == classes(tiny("llama"))
    assert is_prepared(model) and model.config._attn_implementation == "posttrain"
    attach(loaded)
    assert is_prepared(loaded) and counters() == {"model prepared": 2}


def test_what_another_process_is_sent_names_nothing_of_ours():
    model = tiny("llama")
    attach(model)
    model(IDS)
    sent = bytes(ForkingPickler.dumps(model))
    assert b"LlamaDecoderLayer" in sent and b"posttrain" not in sent
