"""The causal-LM loss without logits against the model's own, and transformers' Trainer with and without it."""

import pytest
import torch
from tiny_models import FAMILIES, OTHERS, tiny
from tolerance import assert_as_good_as
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother

import posttrain
from posttrain.integrations import counters
from posttrain.integrations.causal_loss import loss_only, replace_loss, restore_loss
from posttrain.integrations.counting import forget
from posttrain.models import prepare

WHOLE = "loss by linear_logprob"


def fired() -> dict[str, int]:
    """The counters without the self-check, which is there only at the first batch of a process."""
    return {what: count for what, count in counters().items() if not what.startswith("self-check")}


@pytest.fixture(autouse=True)
def nothing_counted():
    forget()


def batch(**extra):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 97, (3, 11), generator=generator)
    labels = ids.masked_fill(torch.rand(3, 11, generator=generator) < 0.3, -100)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels.masked_fill(mask == 0, -100), **extra}


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model, loss, truth, true_loss):
    torch.testing.assert_close(loss, true_loss.float())
    found, expected = gradients(model, loss), gradients(truth, true_loss)
    assert found.keys() == expected.keys() and found
    for name in found:
        torch.testing.assert_close(found[name], expected[name], msg=lambda text, name=name: f"{name}: {text}")


def without_logits(model, inputs, *smoothing):
    if not hasattr(model, "_posttrain_prepared"):
        prepare(model)
    replace_loss(model)
    with loss_only(model, *smoothing):
        output = model(**inputs)
    restore_loss(model)
    assert output.logits is None
    assert fired() == {WHOLE: 1}
    return output.loss


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_loss_and_gradients_of_every_family(family):
    model, truth = tiny(family), tiny(family, torch.float64)
    inputs = {name: x[::2] for name, x in batch().items()} if family == "gemma2" else batch()  # see test_shared_prefix
    assert_same(model, without_logits(model, inputs), truth, truth(**inputs).loss)


def shifted():
    return {"shift_labels": torch.nn.functional.pad(batch()["labels"], (0, 1), value=-100)[:, 1:].contiguous()}


WAYS = {
    "items": {"num_items_in_batch": 40},
    "items in a tensor": {"num_items_in_batch": torch.tensor(40)},
    "shifted by the caller": shifted(),
    "another ignore_index": {"ignore_index": 0, "labels": batch()["labels"].clamp(min=0)},
    "float mask": {"attention_mask": batch()["attention_mask"].float()},
}


@pytest.mark.parametrize("way", WAYS)
def test_arguments_of_the_loss(way):
    model, truth, inputs = tiny("llama"), tiny("llama", torch.float64), batch(**WAYS[way])
    assert_same(model, without_logits(model, inputs), truth, truth(**inputs).loss)


def test_no_label_gives_what_transformers_gives():
    nothing = batch(labels=torch.full((3, 11), -100))
    assert without_logits(tiny("llama"), nothing).isnan() and tiny("llama")(**nothing).loss.isnan()


@pytest.mark.parametrize("items", [None, 40, torch.tensor(40)])
@pytest.mark.parametrize("family", ["llama", "cohere", "bias"])
def test_label_smoothing(family, items):
    def model_of(dtype):
        model = tiny("llama" if family == "bias" else family)
        if family == "bias":
            torch.manual_seed(1)
            model.lm_head = nn.Linear(64, 97)
        return model.to(dtype)

    model, truth, inputs = model_of(torch.float32), model_of(torch.float64), batch()
    labels = inputs.pop("labels")
    smoother = LabelSmoother(epsilon=0.1)
    expected = smoother(truth(**inputs), labels, shift_labels=True, num_items_in_batch=items)
    assert_same(model, without_logits(model, batch(), smoother, items), truth, expected)


def test_an_adapter_on_the_head():
    from peft import LoraConfig, get_peft_model

    def adapted(dtype):
        config = LoraConfig(r=4, target_modules=["lm_head", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        torch.manual_seed(0)
        return get_peft_model(tiny("llama", dtype), config).to(dtype)

    model, truth = adapted(torch.float32), adapted(torch.float64)
    prepare(model)
    replace_loss(model.get_base_model())
    with loss_only(model.get_base_model()):
        output = model(**batch())
    assert output.logits is None and fired() == {WHOLE: 1}
    assert_same(model, output.loss, truth, truth(**batch()).loss)


def test_autocast():
    model, truth = tiny("llama"), tiny("llama")
    with torch.autocast("cpu", torch.bfloat16):
        loss = without_logits(model, batch())
        theirs = truth(**batch()).loss
    assert loss.dtype == theirs.dtype == torch.float32
    exact = tiny("llama", torch.float64)(**batch()).loss.float()
    assert_as_good_as(loss.bfloat16(), theirs.bfloat16(), exact)


def own_loss(logits, labels, **kwargs):
    return logits.float().mean()


LEFT = {
    "its own loss": (lambda model: setattr(model, "loss_function", own_loss), {}, "has a loss of its own"),
    "some logits": (lambda model: None, {"logits_to_keep": 11}, "asks for logits"),
    "a tuple": (lambda model: None, {"return_dict": False}, "asks for logits"),
    "another head": (lambda model: setattr(model, "lm_head", nn.Sequential(model.lm_head)), {}, "is a Sequential"),
}


@pytest.mark.parametrize("what", LEFT)
def test_what_is_left_to_transformers(what, capsys):
    change, extra, reason = LEFT[what]
    model = tiny("llama")
    change(model)
    inputs = batch(**extra)
    if what == "some logits":
        inputs["labels"] = inputs["labels"][:, -11:]
    expected = model(**inputs)
    replace_loss(model)
    for _ in range(2):
        with loss_only(model):
            output = model(**inputs)
        assert torch.equal(output[0], expected[0]) and torch.equal(output[1], expected[1])
    (said,) = fired()
    assert said.startswith("loss left to transformers") and reason in said
    assert capsys.readouterr().out.count(reason) == 1


@pytest.mark.parametrize("family", ["gemma2", "llama"])
def test_label_smoothing_from_logits(family):
    """Of capped logits, and where the model has a loss of its own, which label smoothing takes the place of."""
    model, inputs = tiny(family), batch()
    if family == "llama":
        model.loss_function = own_loss
    smoother = LabelSmoother(epsilon=0.1)
    expected = smoother(model(**inputs), inputs["labels"], shift_labels=True)
    replace_loss(model)
    with loss_only(model, smoother):
        assert torch.equal(model(**inputs).loss, expected)


def test_without_the_wish_nothing_changes():
    model = tiny("llama")
    expected = model(**batch())
    cls = type(model)
    replace_loss(model)
    output = model(**batch())
    assert torch.equal(output.logits, expected.logits) and torch.equal(output.loss, expected.loss)
    assert counters() == {} and type(model).__name__ == cls.__name__
    restore_loss(model)
    assert type(model) is cls


def mean_logit(prediction):
    real = prediction.label_ids != -100
    return {"mean": float(prediction.predictions[real].mean())}


class OwnLoss(Trainer):
    """Needs logits in evaluation, too."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        loss = loss + outputs.logits[inputs["labels"] != -100].square().mean()
        return (loss, outputs) if return_outputs else loss


def given(outputs, labels, num_items_in_batch=None):
    return outputs.logits[labels != -100].square().sum() / num_items_in_batch


TRAINERS = {
    "plain": (Trainer, {}, {}),
    "accumulated": (Trainer, {"gradient_accumulation_steps": 2}, {}),
    "smoothed": (Trainer, {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 2}, {}),
    "checkpointed": (Trainer, {"gradient_checkpointing": True}, {}),
    "noisy": (Trainer, {"neftune_noise_alpha": 5.0}, {}),
    "metrics": (Trainer, {}, {"compute_metrics": mean_logit}),
    "own loss": (OwnLoss, {}, {}),
    "given loss": (Trainer, {}, {"compute_loss_func": given}),
}


def trained(case, model_dir, folder, rows):
    """The gradient norms and losses of the steps, and what the evaluation gave."""
    cls, options, extras = TRAINERS[case]
    torch.manual_seed(0)
    common = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 3, "per_device_train_batch_size": 2}
    common |= {"logging_steps": 1, "report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    trainer = cls(
        model=AutoModelForCausalLM.from_pretrained(model_dir, dtype="float32"),
        args=TrainingArguments(output_dir=str(folder), **common, **options),
        train_dataset=rows,
        eval_dataset=rows[:2],
        data_collator=collate,
        **extras,
    )
    trainer.train()
    log = [{name: entry[name] for name in ("loss", "grad_norm")} for entry in trainer.state.log_history[:3]]
    evaluation = {name: value for name, value in trainer.evaluate().items() if "second" not in name}
    return log, {name: value for name, value in evaluation.items() if "runtime" not in name}, trainer


def collate(rows):
    length = max(len(row["input_ids"]) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
        mask[i, : len(row["input_ids"])] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", TRAINERS)
def test_trainer(case, model_dir, tmp_path):
    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": torch.randint(3, 90, (n,), generator=generator).tolist()} for n in (9, 4, 12, 7, 5, 8)]
    expected, their_evaluation, _ = trained(case, model_dir, tmp_path / "theirs", rows)
    before = Trainer.compute_loss, Trainer.prediction_step
    posttrain.enable()
    try:
        found, evaluation, trainer = trained(case, model_dir, tmp_path / "ours", rows)
        fired = counters()
    finally:
        posttrain.disable()
    for one, other in zip([*found, evaluation], [*expected, their_evaluation], strict=True):
        assert one.keys() == other.keys()
        assert all(abs(one[name] - other[name]) <= 1e-4 for name in one)
    micro_batches = 5 if "accumulated" in case or "smoothed" in case else 3
    steps = {"own loss": 0, "given loss": 0, "metrics": 3}.get(case, micro_batches + 1)
    assert fired.get(WHOLE, 0) == steps
    noise = "batch left as it is: NEFTune adds noise to every token, by the shape of the batch"
    assert {what: n for what, n in fired.items() if "left" in what} == ({noise: 3} if case == "noisy" else {})
    assert (Trainer.compute_loss, Trainer.prediction_step) == before
    assert "LossOnly" not in str(type(trainer.model).__mro__) and not hasattr(trainer.model, "_posttrain_loss_only")
