"""hidden_states, head and token_logprobs against the stock model's logits; sequences never see each other."""

import pytest
import torch
from tiny_models import FAMILIES, OTHERS, alone, batch_of, randomised, tiny
from tolerance import assert_true_to

from posttrain.data import PackedBatch
from posttrain.models import ModelError, head, hidden_states, prepare, token_logprobs
from posttrain.ops.layout import PackedLayout

LENGTHS = [9, 3, 17, 1, 6]
families = pytest.mark.parametrize("family", FAMILIES)
everyone = pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])


def mamba():
    """An architecture whose tokens meet in a state, not in attention."""
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    config = MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4, pad_token_id=0)
    return randomised(MambaForCausalLM(config)).eval()


def logprobs_of(
    logits: torch.Tensor, batch: PackedBatch, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probability, entropy) of the targets, from the logits `[T, V]`."""
    distribution = torch.distributions.Categorical(logits=logits[batch.rows] / temperature)
    return distribution.log_prob(batch.targets), distribution.entropy()


@everyone
def test_log_probabilities_are_those_of_the_stock_logits(family):
    batch = batch_of(LENGTHS)
    with torch.no_grad():
        _, logits = alone(tiny(family, torch.float64), batch)
        model = tiny(family)
        prepare(model)
        ours = token_logprobs(model, batch, temperature=0.7, need_entropy=True)
    logprob, entropy = logprobs_of(logits, batch, 0.7)
    assert_true_to(ours.logprob, logprob)
    assert_true_to(ours.entropy, entropy)


@families
def test_gradients_reach_every_parameter_and_are_right(family):
    batch = batch_of(LENGTHS)
    exact = tiny(family, torch.float64)
    logprob, _ = logprobs_of(alone(exact, batch)[1], batch)
    truth = torch.autograd.grad(logprob.mean(), list(exact.parameters()))
    model = tiny(family)
    prepare(model)
    ours = torch.autograd.grad(token_logprobs(model, batch).logprob.mean(), list(model.parameters()))
    for mine, true in zip(ours, truth, strict=True):
        assert_true_to(mine, true)


@everyone
def test_the_language_head_is_never_run(family):
    model = tiny(family)
    prepare(model)

    def refuse(*_):
        raise AssertionError("the language head ran")

    model.get_output_embeddings().register_forward_pre_hook(refuse)
    token_logprobs(model, batch_of(LENGTHS), need_entropy=True)


@everyone
def test_other_sequences_change_no_bit(family):
    batch = batch_of(LENGTHS)
    model = tiny(family)
    prepare(model)
    assert model.config._attn_implementation == "posttrain"
    changed_is_alone(model, batch)


def changed_is_alone(model, batch: PackedBatch) -> None:
    """Changing the tokens 12 to 28 (the third sequence) changes the hidden states of no others."""
    with torch.no_grad():
        before = hidden_states(model, batch)
        batch.input_ids[12:29] = 3 + (batch.input_ids[12:29] + 1) % 90
        after = hidden_states(model, batch)
    assert torch.equal(before[:12], after[:12]) and torch.equal(before[29:], after[29:])
    assert (before[12:29] != after[12:29]).any(-1).all()


@pytest.mark.parametrize("training", [False, True])
def test_an_architecture_that_cannot_pack_is_padded(training):
    batch = batch_of(LENGTHS)
    model = mamba().train(training)
    report = prepare(model)
    assert "padded" in report.kept["attention"] and "MambaForCausalLM is not one of" in report.kept["modules"]
    assert report.replaced == {} and model.training is training
    with torch.no_grad():
        hidden, logits = alone(mamba().train(training), batch)
        torch.testing.assert_close(hidden_states(model, batch), hidden)
        torch.testing.assert_close(token_logprobs(model, batch).logprob, logprobs_of(logits, batch)[0])
    changed_is_alone(model, batch)


def test_a_model_that_was_not_prepared_is_padded():
    batch = batch_of(LENGTHS)
    with torch.no_grad():
        assert_true_to(hidden_states(tiny("llama"), batch), alone(tiny("llama", torch.float64), batch)[0])
    changed_is_alone(tiny("llama"), batch)


def test_the_trial_leaves_modes_and_random_numbers_alone():
    model = tiny("cohere").train()
    model.model.layers[0].eval()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    prepare(model)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def mixtral(**options):
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    shape = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = MixtralConfig(**shape, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, **options)
    return randomised(MixtralForCausalLM(config)).eval()


def test_experts():
    batch = batch_of(LENGTHS)
    model = mixtral()
    with torch.no_grad():
        hidden, logits = alone(model, batch)
        assert "attention" in prepare(model).replaced
        torch.testing.assert_close(hidden_states(model, batch), hidden)
        torch.testing.assert_close(token_logprobs(model, batch).logprob, logprobs_of(logits, batch)[0])


def test_windows_of_unknown_architectures_are_not_trusted():
    kept = prepare(mixtral(sliding_window=4)).kept
    assert kept["attention"] == "MixtralForCausalLM mixes tokens by more than full attention, so sequences are padded"


def test_an_unknown_head_is_an_error_and_hidden_states_work():
    from transformers import RecurrentGemmaConfig, RecurrentGemmaForCausalLM

    batch = batch_of(LENGTHS)
    config = RecurrentGemmaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        lru_width=32,
        logits_soft_cap=1.0,
        pad_token_id=0,
    )
    model = randomised(RecurrentGemmaForCausalLM(config)).eval()
    report = prepare(model)
    problem = "RecurrentGemmaForCausalLM doesn't compute its logits as we know it"
    assert report.kept["language head"] == problem
    with torch.no_grad():
        assert hidden_states(model, batch).shape == (36, 32)
    with pytest.raises(ModelError, match=problem):
        token_logprobs(model, batch)


@pytest.mark.parametrize(
    ("family", "options", "softcap", "scale", "has_bias"),
    [
        ("gemma2", {}, 3.0, 1.0, False),
        ("llama", {}, None, 1.0, False),
        ("cohere", {}, None, 0.25, False),
        ("granite", {}, None, 0.25, False),
    ],
)
def test_heads(family, options, softcap, scale, has_bias):
    model = tiny(family, **options)
    found = head(model)
    assert found.weight is model.get_output_embeddings().weight
    assert (found.softcap, found.logit_scale, found.bias is not None, found.lora) == (softcap, scale, has_bias, None)


def test_a_tied_head_is_the_embedding():
    model = tiny("qwen2")
    assert head(model).weight is model.model.embed_tokens.weight


def test_a_head_with_a_bias():
    from transformers import PhiConfig, PhiForCausalLM

    batch = batch_of(LENGTHS)
    config = PhiConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
    )
    model = randomised(PhiForCausalLM(config)).eval()
    with torch.no_grad():
        _, logits = alone(model.double(), batch)
        model.float()
        prepare(model)
        assert head(model).bias is model.lm_head.bias
        assert_true_to(token_logprobs(model, batch).logprob, logprobs_of(logits, batch)[0])


def test_an_empty_sequence_changes_nothing():
    model = tiny("llama")
    whole = batch_of([5, 4])
    holed = PackedBatch(
        whole.input_ids, PackedLayout.from_lengths([5, 0, 4]), whole.rows, whole.targets, whole.sequence, 3
    )
    padded = hidden_states(model, holed)
    torch.testing.assert_close(padded, hidden_states(model, whole))
    prepare(model)
    assert torch.equal(hidden_states(model, holed), hidden_states(model, whole))


def test_attention_dropout_is_refused():
    model = tiny("llama", attention_dropout=0.1).train()
    prepare(model)
    with pytest.raises(ValueError, match=r"set attention_dropout to 0, not 0\.1"):
        hidden_states(model, batch_of(LENGTHS))
    hidden_states(model.eval(), batch_of(LENGTHS))


def test_a_layout_is_for_one_row():
    model = tiny("llama")
    prepare(model)
    ids = torch.ones(2, 5, dtype=torch.long)
    with pytest.raises(ValueError, match=r"one row of tokens; got queries \[2, 4, 5, 16\]"):
        model.model(input_ids=ids, use_cache=False, layout=PackedLayout.from_lengths([5]))


def test_padding_a_forest_is_refused():
    forest = PackedLayout(
        torch.tensor([4, 4, 3, 4], dtype=torch.int32), torch.tensor([0, 1, 2, 2], dtype=torch.int32), (0, 2, 3, 4)
    )
    batch = PackedBatch(torch.tensor([5, 6, 7, 8]), forest, torch.tensor([0]), torch.tensor([6]), torch.tensor([0]), 1)
    with pytest.raises(ValueError, match="LlamaModel runs padded, and then segments can't share a prompt"):
        hidden_states(tiny("llama"), batch)


@families
def test_a_shared_prompt_gives_what_two_copies_give(family):
    """A forest: a prompt of 2 tokens with two completions, against the two whole sequences."""
    ids = torch.randint(3, 97, (9,), generator=torch.Generator().manual_seed(5))
    until = torch.tensor([9, 9, 6, 6, 6, 6, 9, 9, 9], dtype=torch.int32)
    positions = torch.tensor([0, 1, 2, 3, 4, 5, 2, 3, 4], dtype=torch.int32)
    nothing = torch.empty(0, dtype=torch.int64)
    batch = PackedBatch(ids, PackedLayout(until, positions, (0, 2, 6, 9)), nothing, nothing, nothing, 2)
    model = tiny(family)
    prepare(model)
    with torch.no_grad():
        forest = hidden_states(model, batch)
        first, second = (
            model.model(input_ids=row[None], use_cache=False).last_hidden_state[0]
            for row in (ids[:6], torch.cat([ids[:2], ids[6:]]))
        )
    torch.testing.assert_close(forest[:6], first)
    torch.testing.assert_close(forest[6:], second[2:])


def gpt2(**options):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=97, n_positions=16, n_embd=32, n_layer=2, n_head=4, attn_pdrop=0.0, **options)
    return randomised(GPT2LMHeadModel(config)).eval()


def opt():
    from transformers import OPTConfig, OPTForCausalLM

    shape = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 2}
    torch.manual_seed(0)
    config = OPTConfig(vocab_size=97, max_position_embeddings=16, num_attention_heads=4, **shape)
    return randomised(OPTForCausalLM(config)).eval()


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize(("build", "name"), [(gpt2, "GPT2LMHeadModel"), (opt, "OPTForCausalLM")])
def test_more_tokens_than_learned_positions_are_an_error(build, name, attention):
    model = build()
    report = prepare(model, attention=attention)
    assert ("attention" in report.replaced) is attention
    with torch.no_grad():
        longest = batch_of([16, 5, 16])
        assert_true_to(hidden_states(model, longest), alone(build().double(), longest)[0])
    with pytest.raises(ModelError, match=f"a sequence has 17 tokens, and {name} knows 16 positions"):
        hidden_states(model, batch_of([16, 5, 17]))
