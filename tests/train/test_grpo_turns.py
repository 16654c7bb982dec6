"""Rollouts of several turns: what the environment says is continued, token by token, and never trained on."""

import pytest
from transformers import AutoTokenizer

from posttrain.data.prompts import Prompt
from posttrain.rollout import Completion, SamplingParams
from posttrain.train.config import ConfigError
from posttrain.train.environment import Environment
from posttrain.train.grpo import GRPOConfig, GRPOTrainer
from posttrain.train.sampler import Sampler

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def tokenizer(model_dir):
    found = AutoTokenizer.from_pretrained(model_dir)
    found.chat_template = TEMPLATE
    return found


class Script:
    """In place of an engine: says the same words each time, and notes what it is asked to continue."""

    def __init__(self, tokenizer, *turns: str) -> None:
        self.tokenizer, self.turns = tokenizer, list(turns)
        self.asked: list[list[str]] = []
        self.seeds: list[int] = []

    def __enter__(self) -> "Script":
        return self

    def __exit__(self, *_) -> None:
        pass

    def generate(self, prompts, params) -> list[list[Completion]]:
        self.asked.append([self.tokenizer.decode(prompt) for prompt in prompts])
        self.seeds.append(params.seed)
        text = self.turns[min(len(self.asked), len(self.turns)) - 1]
        ids = self.tokenizer(text)["input_ids"] + [self.tokenizer.eos_token_id]
        reason = "stop" if len(ids) <= params.max_tokens else "length"
        ids = ids[: params.max_tokens]
        return [[Completion(ids, text, [-0.5] * len(ids), reason)] * params.n for _ in prompts]


def sampled(tokenizer, script: Script, prompt, environment, max_tokens=100, count=1, context=None):
    params = SamplingParams(max_tokens=max_tokens)
    sampler = Sampler(None, tokenizer, params, Environment(environment, tokenizer), context)
    sampler._engine = script
    ids = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else tokenizer("<chat>")["input_ids"]
    return sampler([Prompt(prompt, ids, {"right": 4}, "row")], count, "0 0")


def drawn_and_said(tokenizer, sample) -> tuple[str, str]:
    parts = ["", ""]
    for token, drawn in zip(sample.token_ids, sample.drawn, strict=True):
        parts[not drawn] += tokenizer.decode([token])
    return parts[0], parts[1]


def test_a_text_environment(tokenizer):
    seen = []

    def environment(prompt, completion, right):
        seen.append((prompt, completion, right))
        return " Sure? " if len(seen) == 1 else None

    script = Script(tokenizer, "3", "4")
    (sample,) = sampled(tokenizer, script, "2 + 2 = ", environment)
    assert seen == [("2 + 2 = ", "3", 4), ("2 + 2 = ", "3 Sure? 4", 4)]
    assert script.asked == [["2 + 2 = "], ["2 + 2 = 3<eos> Sure? "]]
    assert drawn_and_said(tokenizer, sample) == ("3<eos>4<eos>", " Sure? ")
    assert sample.content == "3 Sure? 4" and not sample.truncated
    assert sample.logprobs == [-0.5] * 4
    example = sample.example(0, left_out=False)
    assert tokenizer.decode(example.input_ids[example.loss_mask]) == "3<eos>4<eos>"
    assert example.num_targets == len(sample.logprobs)
    assert sample.example(0, left_out=True).num_targets == 0


def test_messages_are_rendered_behind_the_tokens_that_were_drawn(tokenizer):
    def environment(prompt, completion, right):
        return [{"role": "tool", "content": "7"}] if len(completion) == 1 else None

    script = Script(tokenizer, "call", "so 7")
    (sample,) = sampled(tokenizer, script, [{"role": "user", "content": "?"}], environment)
    assert script.asked[1] == ["<chat>call<eos>\n<tool>7<eos>\n<assistant>"]
    assert sample.content == [
        {"role": "assistant", "content": "call"},
        {"role": "tool", "content": "7"},
        {"role": "assistant", "content": "so 7"},
    ]
    assert drawn_and_said(tokenizer, sample) == ("call<eos>so 7<eos>", "\n<tool>7<eos>\n<assistant>")


def test_token_ids_are_taken_as_they_are(tokenizer):
    tokens = tokenizer("xyz")["input_ids"]

    def environment(prompt, completion, right):
        return tokens if completion == "a" else None

    (sample,) = sampled(tokenizer, Script(tokenizer, "a", "b"), "p", environment)
    assert [t for t, drawn in zip(sample.token_ids, sample.drawn, strict=True) if not drawn] == tokens
    assert sample.content == "axyzb"


@pytest.mark.parametrize(
    ("limit", "content", "tokens"), [(2, "ab", 2), (4, "abcd", 4), (6, "abcdab", 6)], ids=["turn", "answer", "second"]
)
def test_all_turns_have_one_budget(tokenizer, limit, content, tokens):
    """Each turn is `ab` and an end: 3 tokens; the environment says 2."""
    script = Script(tokenizer, "ab")
    (sample,) = sampled(tokenizer, script, "p", lambda prompt, completion, right: "cd", max_tokens=limit)
    assert sample.truncated and len(sample.token_ids) == tokens
    assert len(script.asked) == (2 if limit == 6 else 1)
    assert sample.content.startswith(content[:2])


def test_a_completion_ends_where_the_context_does(tokenizer):
    """A prompt of a token and a turn of 3; then the environment takes the 2 that are left, or leaves one."""
    for context, tokens in ((6, 5), (7, 6)):
        script = Script(tokenizer, "ab")
        (sample,) = sampled(tokenizer, script, "p", lambda prompt, completion, right: "cd", context=context)
        assert sample.truncated and len(sample.token_ids) == tokens


def test_equal_completions_are_continued_with_different_seeds(tokenizer):
    script = Script(tokenizer, "a")
    sampled(tokenizer, script, "p", lambda prompt, completion, right: "?" if completion == "a" else None, count=3)
    assert [len(prompts) for prompts in script.asked] == [1, 1, 1, 1]  # three alike, each in a call of its own
    assert len(set(script.seeds)) == 4


def test_what_an_environment_may_return(tokenizer):
    with pytest.raises(ConfigError, match="must return None, a text, token ids or messages, got 3"):
        sampled(tokenizer, Script(tokenizer, "a"), "p", lambda prompt, completion, right: 3)
    with pytest.raises(ConfigError, match="environment nowhere_to_be_found:f: No module"):
        Environment("nowhere_to_be_found:f", tokenizer)
    tokenizer.chat_template = "{{ messages | length }}"
    with pytest.raises(ConfigError, match="differently once it goes on"):
        Environment(lambda **_: [{"role": "user", "content": "?"}], tokenizer).answer("p", "c", {})


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([999999], "token 999999 is not in the vocabulary"),
        ([-5], "token -5 is not in the vocabulary"),
        ("\ud800", "surrogate pair"),
        ([{"role": "tool"}], r"answer has no content in message 1 \(tool\)"),
        (RuntimeError("broken"), "the environment raised RuntimeError: broken"),
    ],
)
def test_a_broken_environment_is_named_with_the_sample(tokenizer, answer, message):
    def environment(**_):
        if isinstance(answer, Exception):
            raise answer
        return answer

    with pytest.raises(ConfigError, match=rf"{message}.*; prompt 'p', completion 'c'"):
        Environment(environment, tokenizer).answer("p", "c", {})


def test_a_run_with_an_environment(model_dir, tokenizer, tmp_path):
    """A random policy ends half of its first turns before the limit; the environment asks for a second."""

    def environment(prompt, completion, **columns):
        return "Go on: " if "Go on" not in completion else None

    def reward(prompts, completions, completion_ids, **columns):
        return [float(len(text)) for text in completions]

    run = GRPOTrainer(
        str(model_dir),
        reward,
        GRPOConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=16,
            num_generations=8,
            max_completion_length=200,
            max_steps=2,
            logging_steps=1,
            use_cpu=True,
            gradient_checkpointing=False,
        ),
        [{"prompt": f"Question {n}? "} for n in range(2)],
        environment=environment,
    )
    run.train()
    rollouts = run._loop.source._generation.rollouts
    said = [tokenizer.decode(r.example.input_ids[~r.example.loss_mask]) for r in rollouts]
    assert sum(text.endswith("? Go on: ") for text in said) >= 4
    assert all(len(r.sampling_logprob) == r.example.num_targets for r in rollouts)
    assert run.log_history[0]["sampling/sampling_logp_difference/max"] < 1e-5
