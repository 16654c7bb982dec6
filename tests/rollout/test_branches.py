"""Open sequences: a search tree over the pages of the cache."""

import pytest
from tiny_models import tiny

from posttrain.rollout import SamplingParams

SOME = SamplingParams(max_tokens=6, ignore_eos=True, temperature=0)


def test_growing_piece_by_piece(engine):
    [[whole]] = engine.generate([[7] * 21], SamplingParams(max_tokens=18, ignore_eos=True, temperature=0))
    sequence = engine.open([7] * 21)
    pieces = [engine.grow([sequence], SOME)[0] for _ in range(3)]
    assert [token for piece in pieces for token in piece.token_ids] == whole.token_ids
    assert [logprob for piece in pieces for logprob in piece.logprobs] == whole.logprobs
    assert engine.stats.prefill_tokens == 0  # what was computed was found again
    engine.close(sequence)


def test_forks_share_pages_and_part(engine):
    root = engine.open([7] * 21)
    engine.grow([root], SOME)
    held = engine.pages_held
    twins = [engine.fork(root) for _ in range(3)]
    assert engine.pages_held == held
    for token, twin in enumerate(twins, 10):
        engine.append(twin, [token])
    grown = engine.grow([root, *twins], SOME)
    for token, twin, completion in zip((10, 11, 12), twins, grown[1:], strict=True):
        prompt = [*root.tokens[:27], token]
        assert twin.tokens == prompt + completion.token_ids
        assert [[completion]] == engine.generate([prompt], SOME)
    for one in (root, *twins):
        engine.close(one)


def test_forks_of_what_ended_early_share_nothing_to_come(engine):
    root = engine.open(list(range(2, 12)))
    [ended] = engine.grow([root], SamplingParams(max_tokens=100, seed=3))
    assert ended.finish_reason == "stop" and len(ended.token_ids) < 60
    assert len(root.pages) == -(-root.computed // 8)
    prompt, twin = root.tokens.copy(), engine.fork(root)
    grown = engine.grow([root, twin], SamplingParams(max_tokens=40, seed=5, ignore_eos=True))
    assert grown[0].token_ids != grown[1].token_ids
    for completion, scores in zip(grown, engine.score([prompt], [grown])[0], strict=True):
        assert completion.logprobs == pytest.approx(scores, abs=1e-5)
    for one in (root, twin):
        engine.close(one)


def test_idle_sequences_give_way(make_engine):
    engine = make_engine(memory=6 * 4096)
    root = engine.open([7] * 21)
    [first] = engine.grow([root], SOME)
    [[other]] = engine.generate([[9] * 40], SOME)
    assert len(other.token_ids) == 6
    assert root.pages == [] and root.computed == 0
    [[expected]] = engine.generate([root.tokens], SOME)
    assert engine.grow([root], SOME) == [expected]
    engine.release()
    assert engine.pages_held == 0 and first.token_ids == root.tokens[21:27]
    engine.grow([root], SOME)
    engine.close(root)


def test_complete_sequences_give_way_to_those_that_grow(make_engine):
    engine, roomy = make_engine(memory=33 * 4096, max_tokens_per_step=64), make_engine()
    prompts = [[n] * 80 for n in range(5, 9)]
    grown = []
    for one in (engine, roomy):
        sequences = [one.open(prompt) for prompt in prompts]
        grown.append(one.grow(sequences, SOME))
        for sequence in sequences:
            one.close(sequence)
    assert grown[0] == grown[1]


def test_what_fails_leaves_sequences_as_they_were(engine, monkeypatch):
    root = engine.open([7] * 21)
    engine.grow([root], SOME)
    tokens = root.tokens.copy()
    run = engine._runner.run
    monkeypatch.setattr(engine._runner, "run", lambda step: run(step) * float("nan"))
    with pytest.raises(ValueError, match="no distribution"):
        engine.grow([root], SOME)
    monkeypatch.undo()
    assert root.tokens == tokens
    assert engine.grow([root], SOME) == engine.generate([tokens], SOME)[0]
    engine.close(root)


def test_errors(engine):
    root = engine.open("root")
    with pytest.raises(ValueError, match="grow takes each sequence once and n=1"):
        engine.grow([root, root], SOME)
    with pytest.raises(ValueError, match="grow takes each sequence once and n=1"):
        engine.grow([root], SamplingParams(n=2))
    with pytest.raises(ValueError, match="the sequence has 304 tokens, more than the 256 of the context"):
        engine.append(root, "x" * 300)
    engine.append(root, "!")
    engine.close(root)
    for use in (engine.close, engine.fork, lambda one: engine.grow([one], SOME)):
        with pytest.raises(ValueError, match="the sequence isn't open"):
            use(root)


def test_other_models_grow_and_fork_too(make_engine, tokenizer):
    plain = make_engine(tiny("llama", vocab_size=len(tokenizer), max_position_embeddings=256))
    root = plain.open([7] * 21)
    pieces = [plain.grow([root], SOME)[0] for _ in range(2)]
    [[whole]] = plain.generate([[7] * 21], SamplingParams(max_tokens=12, ignore_eos=True, temperature=0))
    assert [token for piece in pieces for token in piece.token_ids] == whole.token_ids
    twin = plain.fork(root)
    [grown] = plain.grow([twin], SOME)
    assert [[grown]] == plain.generate([root.tokens], SOME)
    for one in (root, twin):
        plain.close(one)
