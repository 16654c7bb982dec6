"""What is asked may make no sense, and what is called may fail: clear errors, nothing lost, nothing leaked."""

from copy import deepcopy
from itertools import chain

import pytest
import torch
from tiny_models import tiny

from posttrain.models import prepare
from posttrain.rollout import Engine, SamplingParams
from posttrain.rollout.scheduler import Scheduler

SHORT = SamplingParams(max_tokens=6, ignore_eos=True, seed=0)


def test_empty_prompts(make_engine, tokenizer):
    engine = make_engine()
    with pytest.raises(ValueError, match="prompt 1 has no tokens, and the tokenizer no beginning-of-sequence token"):
        engine.generate(["a", ""], SHORT)
    assert engine.generate([], SHORT) == []


def test_beginning_of_sequence(make_engine, tokenizer, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "bos_token_id", 7, raising=False)
    engine = make_engine()
    assert engine.generate([""], SHORT) == engine.generate([[7]], SHORT)


@pytest.mark.parametrize(
    ("prompts", "problem"),
    [
        ("text", r"prompts must be a list of prompts, got str; for one prompt, \[prompt\]"),
        ([1, 2], "prompts must be a list of prompts, got list"),
        ([{"role": "user", "content": "hi"}], "prompts must be a list of prompts, got list"),
        ([[1], [1, 999]], "prompt 1 has the token 999; the model has 0 to 257"),
        ([[1], ["a"]], "prompt 1 must be a text, a list of token ids or a list of messages"),
        ([[1], None], "prompt 1 must be a text"),
        ([[1], [5] * 257], "prompt 1 has 257 tokens, more than the 256 of the context"),
        ([[{"content": 3}]], "the chat template rejects prompt 0"),
        ([[1], "a\ud800"], "prompt 1 holds half of a surrogate pair, which no tokenizer can read"),
        ([[{"role": "user", "content": "\udc00"}]], "message 0 of prompt 0 holds half of a surrogate pair"),
    ],
)
def test_prompts_that_cannot_be_used(prompts, problem, engine):
    with pytest.raises(ValueError, match=problem):
        engine.generate(prompts, SHORT)
    assert engine.finished == {}


def test_tokens_that_the_model_lacks(make_engine):
    """The model's embedding decides, whether it has fewer rows than the tokenizer has tokens or more."""
    small, padded = (tiny("llama", vocab_size=size, bos_token_id=None, eos_token_id=1) for size in (97, 400))
    prepare(small)
    prepare(padded)
    engine = make_engine(small)
    for prompt in ([250], "\n", [{"role": "user", "content": "\n"}]):
        with pytest.raises(ValueError, match=r"prompt 1 has the token \d+; the model has 0 to 96"):
            engine.generate([[5], prompt], SHORT)
    branch = engine.open([5])
    with pytest.raises(ValueError, match=r"what is appended has the token \d+; the model has 0 to 96"):
        engine.append(branch, "\n")
    engine.close(branch)
    [[completion]] = make_engine(padded).generate([[5, 399]], SHORT)
    assert len(completion.token_ids) == 6


def test_kinds_of_prompts(engine, tokenizer):
    text = "a prompt"
    chat = [{"role": "user", "content": "hi"}]
    ids = tokenizer(text)["input_ids"]
    chat_ids = tokenizer("user:hi<eos>")["input_ids"]
    results = engine.generate([text, ids, torch.tensor(ids), chat, chat_ids], SHORT)
    assert results[0] == results[1] == results[2]
    assert results[3] == results[4]


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"n": -1}, r"n must be an integer of at least 0, below 2\^63, got -1"),
        ({"max_tokens": 2.5}, "max_tokens must be an integer"),
        ({"temperature": -0.1}, "temperature must be 0, or finite and at least 1e-06, got -0.1"),
        ({"temperature": float("nan")}, "temperature must be .* got nan"),
        ({"temperature": 1e-39}, "temperature must be .* got 1e-39"),
        ({"temperature": "1"}, "temperature must be a number, got '1'"),
        ({"top_p": None}, "top_p must be a number, got None"),
        ({"min_p": 1j}, "min_p must be a number, got 1j"),
        ({"top_k": 2**63}, "top_k must be an integer .* got 9223372036854775808"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"min_p": 1.5}, r"min_p must be in \[0, 1\]"),
        ({"stop": [""]}, "stop must be texts that aren't empty"),
        ({"stop": 5}, r"stop must be texts that aren't empty, got \(5,\)"),
        ({"seed": "a"}, "seed must be an integer from .* or None, got 'a'"),
        ({"seed": 2**63}, r"seed must be an integer from -2\^63 to 2\^63 - 1 or None, got 9223372036854775808"),
    ],
)
def test_params_that_make_no_sense(values, problem):
    with pytest.raises(ValueError, match=problem):
        SamplingParams(**values)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"memory": 0}, "memory must be bytes, or a share"),
        ({"memory": 1.5}, "memory must be bytes, or a share"),
        ({"page_size": 12}, "page_size must be a power of two of at least 8, got 12"),
        ({"max_sequences": 0}, "max_sequences must be at least 1"),
        ({"max_tokens_per_step": 0}, "max_tokens_per_step must be at least 1"),
        ({"context_length": -1}, "context_length must be at least 1"),
    ],
)
def test_engines_that_make_no_sense(options, problem, model, tokenizer):
    with pytest.raises(ValueError, match=problem):
        Engine(model, tokenizer, **options)


def test_nothing_to_draw(engine):
    assert engine.generate(["a", "b"], SamplingParams(n=0)) == [[], []]
    assert engine.finished == {0: [], 1: []}
    [[one, two]] = engine.generate(["a"], SamplingParams(n=2, max_tokens=0))
    assert one == two and (one.token_ids, one.text, one.logprobs, one.finish_reason) == ([], "", [], "length")
    with pytest.raises(ValueError, match="params must be one for all or one for each of the 2 prompts, got 1"):
        engine.generate(["a", "b"], [SHORT])


def test_the_end_of_the_context(engine):
    [[at_end], [near_end]] = engine.generate([[5] * 256, [5] * 253], SamplingParams(max_tokens=50, ignore_eos=True))
    assert (at_end.token_ids, at_end.finish_reason) == ([], "length")
    assert (len(near_end.token_ids), near_end.finish_reason) == (3, "length")


def test_a_cache_that_is_too_small(make_engine):
    engine = make_engine(memory=3 * 4096)  # three pages of eight tokens
    with pytest.raises(ValueError, match="prompt 0 has 24 tokens, and the cache holds 24: give the engine more memory"):
        engine.generate([[5] * 24], SHORT)
    [[completion]] = engine.generate([[5] * 22], SHORT)
    assert len(completion.token_ids) == 2


def test_duplicates_are_computed_once(engine):
    results = engine.generate([[9] * 40] * 5, SHORT)
    assert all(result == results[0] for result in results)
    assert engine.stats.prefill_tokens == 40 + 4 * 8  # all but the page that has the last token


def test_end_of_sequence(engine, tokenizer):
    end = tokenizer.eos_token_id
    params = SamplingParams(n=8, max_tokens=250, temperature=3.0, seed=4)
    completions = [c for row in engine.generate(["a", "b"], params) for c in row]
    assert {c.finish_reason for c in completions} >= {"stop"}
    for completion in completions:
        assert (end == completion.token_ids[-1]) == (completion.finish_reason == "stop")
        assert end not in completion.token_ids[:-1]
        assert completion.text == tokenizer.decode(completion.token_ids, skip_special_tokens=True)
    beyond = engine.generate(["a", "b"], SamplingParams(n=8, max_tokens=250, temperature=3.0, seed=4, ignore_eos=True))
    for completion, longer in zip(completions, chain(*beyond), strict=True):
        assert longer.token_ids[: len(completion.token_ids)] == completion.token_ids


def test_stop_texts_span_tokens(engine):
    [[whole]] = engine.generate(["abc"], SamplingParams(max_tokens=40, ignore_eos=True, seed=0))
    letters = whole.text
    place = next(i for i in range(3, 30) if letters[i : i + 3].isascii() and letters.index(letters[i : i + 3]) == i)
    stop = letters[place : place + 3]
    params = SamplingParams(max_tokens=40, ignore_eos=True, seed=0, stop=["never", stop])
    [[stopped]] = engine.generate(["abc"], params)
    assert stopped.text == letters[:place] and stopped.finish_reason == "stop"
    assert whole.token_ids[: len(stopped.token_ids)] == stopped.token_ids
    pieces = list(engine.stream(["abc"], params))
    assert "".join(piece.text for piece in pieces) == letters[:place]
    assert pieces[-1].completion == stopped


def test_streaming_is_generating(engine):
    params = SamplingParams(n=2, max_tokens=20, seed=3)
    prompts = ["ab", "a longer prompt"]
    expected = engine.generate(prompts, params)
    parts = {(i, j): ["", [], []] for i in range(2) for j in range(2)}
    for piece in engine.stream(prompts, params):
        part = parts[piece.prompt, piece.sample]
        part[0] += piece.text
        part[1] += piece.token_ids
        part[2] += piece.logprobs
        if piece.completion is not None:
            assert piece.completion == expected[piece.prompt][piece.sample]
            assert part == [piece.completion.text, piece.completion.token_ids, piece.completion.logprobs]
    [empty] = engine.stream(["a"], SamplingParams(max_tokens=0))
    assert empty.token_ids == [] and empty.completion.finish_reason == "length"


def test_a_stream_that_is_left(engine):
    stream = engine.stream(["a", "b"], SHORT)
    next(stream)
    assert engine.pages_held > 0
    with pytest.raises(ValueError, match="the engine is generating: close its stream first"):
        engine.release()
    stream.close()
    assert engine.pages_held == 0
    assert len(engine.generate(["a"], SHORT)[0]) == 1


@pytest.mark.parametrize("error", [RuntimeError("no reward"), KeyboardInterrupt()])
def test_what_is_done_survives(error, engine):
    prompts = [[5], [6], [7]]
    params = [SamplingParams(max_tokens=m, ignore_eos=True, seed=0) for m in (2, 30, 12)]
    seen = []

    def on_finish(index, completions):
        seen.append(index)
        if index == 2:
            raise error

    with pytest.raises(type(error)):
        engine.generate(prompts, params, on_finish=on_finish)
    assert seen == [0, 2] and list(engine.finished) == [0, 2]
    assert engine.pages_held == 0
    results = engine.generate(prompts, params)
    assert [results[0], results[2]] == list(engine.finished[i] for i in (0, 2))


def test_a_forward_that_fails(make_engine, monkeypatch):
    engine = make_engine(keep_prefixes=True)
    run = engine._runner.run
    monkeypatch.setattr(engine._runner, "run", lambda step: run(step) * float("nan"))
    with pytest.raises(ValueError, match=r"no distribution .* for prompt 0 after 20 tokens"):
        engine.generate([[5] * 20], SHORT)
    monkeypatch.undo()
    assert engine.generate([[5] * 20], SHORT) == make_engine().generate([[5] * 20], SHORT)
    assert engine.stats.shared_tokens == 0  # what the failed call had filed is forgotten


def test_weights_without_a_number(make_engine):
    model = tiny("llama")
    prepare(model)
    torch.nn.init.constant_(model.model.norm.weight, float("nan"))
    with pytest.raises(ValueError, match="no distribution"):
        make_engine(model).generate([[5]], SHORT)


@pytest.mark.parametrize("bursts", [True, False], ids=["burst", "steps"])
def test_what_is_done_when_a_sequence_has_no_distribution(bursts, model, make_engine):
    """One token's embedding is infinite, and one prompt draws it; the others get done in the same burst or before."""
    prompts = [f"ab{i}" for i in range(9)]
    params = [
        SamplingParams(max_tokens=10 + i // 8, seed=1, ignore_eos=True, logprobs=int(not bursts)) for i in range(9)
    ]
    whole = make_engine().generate(prompts, params)
    drawn = [completion.token_ids for [completion] in whole]
    failing, place = next(
        (i, place)
        for i in range(2, 8)
        for place, token in enumerate(drawn[i][3:9], 3)
        if sum(tokens.count(token) for tokens in drawn) == 1
    )
    model = deepcopy(model)
    with torch.no_grad():
        model.get_input_embeddings().weight[drawn[failing][place]] = torch.inf
    engine = make_engine(model)
    with pytest.raises(
        ValueError, match=f"no distribution .* for prompt {failing} after {len('ab0') + place + 1} tokens"
    ):
        engine.generate(prompts, params)
    assert engine.finished == ({i: whole[i] for i in range(9) if i != failing} if bursts else {})


def test_no_distribution_in_the_step_in_which_others_get_done(engine, monkeypatch):
    run = engine._runner.run
    half = torch.tensor([[1.0], [torch.nan]])
    monkeypatch.setattr(engine._runner, "run", lambda step: run(step) * half)
    params = SamplingParams(max_tokens=1, ignore_eos=True)
    with pytest.raises(ValueError, match=r"no distribution .* for prompt 1 after 1 tokens"):
        engine.generate([[5], [6]], params)
    assert list(engine.finished) == [0]
    seen = []
    with pytest.raises(ValueError, match="no distribution"):
        for piece in engine.stream([[5], [6]], params):
            seen.append(piece.prompt)
    assert seen == [0]


def test_prefixes_that_are_kept(make_engine):
    engine = make_engine(keep_prefixes=True)
    [[first]] = engine.generate([[5] * 30], SHORT)
    [[again]] = engine.generate([[5] * 30], SHORT)
    assert again == first and engine.stats.shared_tokens == 24
    engine.release()
    assert engine.generate([[5] * 30], SHORT) == [[first]] and engine.stats.shared_tokens == 0


def test_a_burst_waits_for_samples_that_share_a_page(make_engine):
    prompts = [[5], [6] * 5]
    params = [SamplingParams(n=n, max_tokens=8, ignore_eos=True, seed=0) for n in (2, 1)]
    crowded = make_engine(max_sequences=2, max_tokens_per_step=2)
    assert crowded.generate(prompts, params) == make_engine().generate(prompts, params)


def test_steps_without_a_change_are_bursts(engine, monkeypatch):
    calls, next_step = [], Scheduler.next_step
    monkeypatch.setattr(Scheduler, "next_step", lambda self: calls.append(1) or next_step(self))
    engine.generate([[5] * 9, [6] * 11], SamplingParams(n=1, max_tokens=20, ignore_eos=True))
    assert len(calls) == 1 and engine.stats.batch_sizes == [(20, 2)]
    engine.generate([[5] * 9], SamplingParams(n=2, max_tokens=20, ignore_eos=True))
    assert len(calls) == 1 + 2  # samples get pages of their own in the second step


@pytest.mark.parametrize("name", ["take", "drop", "hold"])
@pytest.mark.parametrize("call", [1, 4])
def test_an_interrupt_while_pages_are_counted(make_engine, monkeypatch, name, call):
    engine = make_engine()
    params = SamplingParams(n=3, max_tokens=12, ignore_eos=True, seed=0)
    expected = engine.generate([[5] * 9, [6] * 11], params)
    root = engine.open([7] * 21)
    engine.grow([root], SamplingParams(max_tokens=2))
    count, original = 0, getattr(engine._pool, name)

    def interrupted(*arguments):
        nonlocal count
        count += 1
        if count == call:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(engine._pool, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.generate([[5] * 9, [6] * 11], params)
    assert engine.pages_held == 0
    assert engine.generate([[5] * 9, [6] * 11], params) == expected
    engine.grow([root], SamplingParams(max_tokens=2))
    engine.close(root)


def test_an_interrupt_while_tidying_up(engine, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(engine._pool, "forget", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.generate([[5] * 9], SHORT)
    assert engine.pages_held == 0 and engine.generate([[5] * 9], SHORT)


def test_a_callback_may_generate(engine):
    params = SamplingParams(max_tokens=4, seed=0)
    expected = engine.generate([[5] * 3, [6] * 4], params)

    def again(index, completions):
        engine.generate([[9] * 4], params)

    assert engine.generate([[5] * 3, [6] * 4], params, on_finish=again) == expected

    def fails(index, completions):
        engine.generate([[9] * 4], params)
        raise RuntimeError(index)

    with pytest.raises(RuntimeError, match="0"):
        engine.generate([[5] * 3, [6] * 4], params, on_finish=fails)
    assert engine.finished == {0: expected[0]}


def test_prompts_are_counted_once(make_engine):
    engine = make_engine(memory=16 * 4096)
    engine.generate([[n, *[5] * 19] for n in range(2, 18)], SamplingParams(max_tokens=30, ignore_eos=True, seed=0))
    assert engine.stats.preempted > 0
    assert engine.stats.prompt_tokens == 16 * 20
    engine = make_engine(max_sequences=3)
    engine.generate([[5] * 20, [6] * 9], SamplingParams(n=4, max_tokens=5, ignore_eos=True))
    assert (engine.stats.prompt_tokens, engine.stats.shared_tokens) == (4 * 29, 3 * 29)
    assert engine.stats.metrics["rollout/shared_prefix_rate"] == 3 / 4


def test_nothing_stays_after_release(make_engine, tokenizer):
    plain = make_engine(tiny("llama", vocab_size=len(tokenizer), max_position_embeddings=256))
    stream = plain.stream([[5] * 10, [6] * 10], SamplingParams(max_tokens=6, ignore_eos=True))
    next(stream)
    stream.close()
    assert not plain._runner._caches
    paged = make_engine()
    paged.generate([[5] * 10], SamplingParams(max_tokens=3))
    paged.release()
    assert paged._runner.compiled is None


def test_generate_gives_the_text_that_stream_gives(engine):
    params = SamplingParams(n=20, max_tokens=5, ignore_eos=True, seed=0, stop=["zzzzzz"])
    [whole] = engine.generate(["ab"], params)
    streamed = {piece.sample: piece.completion for piece in engine.stream(["ab"], params) if piece.completion}
    assert whole == [streamed[sample] for sample in range(20)]
