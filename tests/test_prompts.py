"""Prompts: tasks from a user's files, judged by right answers or by TRL's reward functions."""

import json
import pickle
import sys
from fractions import Fraction
from pathlib import Path
from pydoc import locate

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_cli import run

from lit_rl import jsonl
from lit_rl.checks import ConfigurationError
from lit_rl.datamodules import Prompts
from lit_rl.datamodules.prompts import Right
from lit_rl.task import Verdict

SUMS = [
    {"question": f"What is {a} + {b}?", "answer": f"{a} and {b} are\n#### {a + b}"} for a in range(5) for b in range(4)
]
MINE = """
def vowels(prompts, completions, question, **kwargs):
    assert isinstance(prompts, list) and question == prompts
    return [sum(c in "aeiou" for c in text) / max(1, len(text)) for text in completions]

def short(completions, **kwargs):
    return [-0.01 * len(text) for text in completions]

def of_digits(completions, **kwargs):
    return [float(len(text)) if text.isdigit() else None for text in completions]

async def later(**kwargs):
    return [0.0]
"""


def written(name, records):
    Path(name).write_text("".join(json.dumps(record) + "\n" for record in records))
    return name


@pytest.fixture
def mine(monkeypatch):
    Path("mine.py").write_text(MINE)
    monkeypatch.syspath_prepend(".")


def judged(answer, response):
    (task,) = Prompts(written("one.jsonl", [{"prompt": "?", "answer": answer}]), answer="answer").tasks("train")
    return task.score(response)


@pytest.mark.parametrize(
    ("answer", "response"),
    [
        (72, "<answer>72</answer>"),
        ("She has 40 + 32.\n#### 72", "so <answer> **72.** </answer> it is"),
        ("72", "first \\boxed{70}, no: \\boxed{72}"),
        ("72", "\\boxed{70} <answer>72</answer>"),
        ("1,234", "<answer>1234.0</answer>"),
        (0.5, "\\boxed{\\frac{1}{2}}"),
        ("\\frac{1}{2}", "$$\\boxed{\\dfrac{2}{4}}$$"),
        ("$18", "<answer>18</answer>"),
        ("18%", "\\boxed{18\\%}"),
        ("-3", "<answer>\u22123</answer>"),
        ("x^{2}", "\\boxed{x^{2}}"),
        ("Paris", "<think>\\boxed{Rome}</think> <answer>  paris </answer>"),
        (True, "<answer>true</answer>"),
    ],
)
def test_what_is_right(answer, response):
    assert judged(answer, response) == Verdict(True, 1.0, judged(answer, response).answer)


@pytest.mark.parametrize(
    ("answer", "response", "reason"),
    [
        ("72", "72", "no <answer>...</answer> block"),
        ("72", "<answer>73</answer> \\boxed{72}", "wrong answer"),
        ("72", "<answer>720</answer>", "wrong answer"),
        ("72", "<answer>72 or 73</answer>", "wrong answer"),
        ("72", "\\boxed{72", "no <answer>...</answer> block"),
        ("72", "<think> \\boxed{72}", "the thinking never ended"),
        ("72", "<answer></answer>", "an empty answer"),
        ("1/3", "<answer>0.333333333333</answer>", "wrong answer"),
        ("1", "<answer>__import__('os').getpid() * 0 + 1</answer>", "wrong answer"),
        ("1", f"<answer>{'9' * 5000}</answer>", "wrong answer"),
        ("x", f"<answer>{'x' * 30000}</answer>", "the answer has 30000 characters: the limit is 20000"),
    ],
)
def test_what_is_wrong(answer, response, reason):
    verdict = judged(answer, response)
    assert (verdict.correct, verdict.score, verdict.valid, verdict.reason) == (False, 0.0, True, reason)


def forms(x):
    yield from (
        f"{x}",
        f"{2 * x.numerator}/{2 * x.denominator}",
        f"\\frac{{{x.numerator}}}{{{x.denominator}}}",
        f"${x}$",
    )
    if x.denominator in (1, 2, 4, 5, 10):
        yield f"{float(x)}"
    if x.denominator == 1:
        yield f"{x.numerator:,}"


FRACTIONS = st.fractions(-10_000, 10_000, max_denominator=12)


@given(FRACTIONS, FRACTIONS)
def test_numbers_are_compared_exactly_in_all_their_forms(a, b):
    for x, y in (a, a), (a, b), (a, a + Fraction(1, 10**9)):
        for given_ in forms(y):
            right = Right(f"{x}")(f"<answer>{given_}</answer>")
            assert right.correct == (x == Fraction(y)), (x, given_)
            assert right.answer == str(y), "votes are counted over one form"


def test_prompts_end_with_how_to_answer_unless_told_otherwise():
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 1 + 1?"}]
    file = written("chat.jsonl", [{"prompt": chat, "answer": 2}])
    (task,) = Prompts(file, answer="answer").tasks("train")
    assert task.prompt[0] == chat[0]
    assert task.prompt[1]["content"] == "What is 1 + 1?\nEnd with <answer>the answer</answer>."
    (task,) = Prompts(file, answer="answer", hint="Box it.").tasks("train")
    assert task.prompt[1]["content"] == "What is 1 + 1?\nBox it."
    (task,) = Prompts(file, answer="answer", hint="").tasks("train")
    assert task.prompt == chat


def test_trl_functions_get_what_trl_gives_them(mine):
    data = Prompts(
        written("sums.jsonl", SUMS), prompt="question", rewards=["mine.vowels", "mine.short", "mine.of_digits"]
    )
    score = pickle.loads(pickle.dumps(data.tasks("train")[3])).score
    by_function = Prompts("sums.jsonl", prompt="question", rewards=[locate("mine.vowels")]).tasks("train")[3]
    assert by_function.score("aeb").score == 2 / 3
    assert score("aeb").parts == {"vowels": 2 / 3, "short": -0.03}
    assert score("12").parts == {"vowels": 0, "short": -0.02, "of_digits": 2.0}
    assert score("12").score == 1.98
    data = Prompts("sums.jsonl", prompt="question", rewards=["mine.of_digits"])
    assert not data.tasks("train")[0].score("one").valid, "a function that does not apply does not say that it is wrong"


def test_functions_of_trl_itself():
    chat = [{"prompt": [{"role": "user", "content": "Think."}]}]
    (task,) = Prompts(written("chat.jsonl", chat), rewards=["trl.rewards.think_format_reward"]).tasks("train")
    assert task.score("<think>\nso\n</think>\nyes").score == 1.0
    assert task.score("yes").score == 0.0


def test_held_out_records_are_not_trained_on():
    train, test = written("train.jsonl", SUMS), written("test.jsonl", SUMS[::4])
    data = Prompts(train, test, prompt="question", answer="answer")
    questions = [{task.text() for task in data.tasks(split)} for split in ("train", "validation", "test")]
    assert list(map(len, questions)) == [15, 5, 0]
    assert not questions[0] & questions[1]
    assert {task.family for task in data.tasks("train")} == {"train"}
    by_answer = Prompts(train, prompt="question", answer="answer", family="answer").tasks("train")
    assert [task.family for task in by_answer] == [record["answer"] for record in SUMS]
    assert len({task.key() for split in ("train", "validation") for task in data.tasks(split)}) == 20


def test_parquet_holds_what_json_lines_do():
    import pyarrow
    from pyarrow.parquet import write_table

    write_table(pyarrow.Table.from_pylist(SUMS), "sums.parquet")
    assert list(jsonl.records("sums.parquet")) == list(jsonl.records(written("sums.jsonl", SUMS))) == SUMS


def test_without_pyarrow_parquet_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ConfigurationError, match=r"to read x\.parquet, install pyarrow, or give it as JSON lines"):
        list(jsonl.records("x.parquet"))


@pytest.mark.parametrize(
    ("records", "settings", "message"),
    [
        (
            [{"question": "?", "answer": 1}],
            {},
            "record 1 of r.jsonl has no 'prompt', but question, answer: name the field",
        ),
        ([{"prompt": "?", "answer": 1}, {"prompt": "?"}], {}, "record 2 of r.jsonl has no 'answer', but prompt"),
        ([{"prompt": "?", "answer": None}], {}, "record 1 of r.jsonl has no 'answer'"),
        (
            [{"prompt": "?", "answer": "#### "}],
            {},
            "record 1 of r.jsonl has no right answer in 'answer': an empty answer",
        ),
        ([{"prompt": 3, "answer": 1}], {}, "record 1 of r.jsonl has no prompt in 'prompt': expected text, or messages"),
        ([{"prompt": [{"role": "assistant", "content": "?"}], "answer": 1}], {}, "messages that end with a user's"),
        (
            [{"prompt": "?", "answer": 1, "s": [2]}],
            {"response": "s"},
            "record 1 of r.jsonl has no worked solution in 's'",
        ),
        ([["?", 1]], {}, "record 1 of r.jsonl has no 'prompt', but list"),
        ([], {}, "train is r.jsonl: it must be a file with records: this one is empty"),
        ([], {"answer": None}, "answer is None: it must be the field of the right answer, or left out for `rewards`"),
        ([], {"rewards": ["mine.vowels"]}, "answer is answer: it must be left out where there are `rewards`"),
        (
            [],
            {"answer": None, "rewards": ["mine.vowel"]},
            "rewards is mine.vowel: it must be a function that can be imported",
        ),
        ([], {"answer": None, "rewards": ["mine.later"]}, "rewards is mine.later: it must be an ordinary function"),
        (
            [],
            {"answer": None, "rewards": ["mine.vowels"], "unlabelled": True},
            "unlabelled is True: it must be false where",
        ),
        ([], {"validation": "v.jsonl"}, "validation is v.jsonl: it must be a file"),
    ],
)
def test_bad_files_and_settings(records, settings, message, mine):
    with pytest.raises(ConfigurationError, match=message):
        Prompts(written("r.jsonl", records), **{"answer": "answer", **settings}).tasks("train")


def test_a_line_that_is_not_json_is_named():
    Path("r.jsonl").write_text('{"prompt": "?", "answer": 1}\n{"prompt": \n')
    with pytest.raises(ConfigurationError, match=r"line 2 of r\.jsonl is not JSON"):
        Prompts("r.jsonl", answer="answer").tasks("train")


def test_files_that_are_not_utf8_are_named_and_those_that_say_so_first_are_read():
    Path("r.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "\xc3\xa9", "answer": 1}\n')
    assert next(jsonl.records("r.jsonl")) == {"prompt": "é", "answer": 1}
    Path("r.jsonl").write_bytes(b'{"prompt": "?", "answer": 1}\n{"prompt": "\xe9", "answer": 1}\n')
    with pytest.raises(ConfigurationError, match=r"line 2 of r\.jsonl is not JSON: 'utf-8' codec"):
        Prompts("r.jsonl", answer="answer").tasks("train")


def test_a_record_of_another_file_is_another_task():
    """Or a checkpoint's unfinished responses, and demonstrations by a task's id, would be taken for those of another prompt."""
    one, other = (
        Prompts(written("r.jsonl", records), prompt="question", answer="answer").tasks("train")
        for records in (SUMS, SUMS[1:])
    )
    assert [task.key() for task in other] == [task.key() for task in one][1:]
    assert len({task.key() for task in one}) == len(SUMS)


SHORT = ("--trainer.max_steps", 2, "--trainer.enable_progress_bar", "false", "--data.prompt", "question")


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_a_split_without_a_file_is_refused(command, capsys):
    files = ("--data.train", written("train.jsonl", SUMS), "--data.answer", "answer", "--data.prompt", "question")
    code, _ = run(capsys, command, "--config", "grpo", "--config", "tiny", "--data", "Prompts", *files, "--run", "r")
    split = "validation" if command == "validate" else "test"
    assert code == f"lit-rl: {split} is None: it must be a file of records, to {command}"


def test_the_command_line_trains_by_functions_of_ones_own(mine, capsys):
    files = ("--data.train", written("train.jsonl", SUMS), "--data.rewards", "[mine.vowels, mine.short]")
    code, text = run(
        capsys, "fit", "--config", "grpo", "--config", "tiny", "--data", "Prompts", *files, *SHORT, "--run", "r"
    )
    assert code == 0, text
    rows = jsonl.read(Path("r/completions.jsonl"))
    assert len(rows) == 2 * 8 * 8
    for row in rows:
        text = row["response"]
        assert row["reward"] == pytest.approx(
            sum(c in "aeiou" for c in text) / max(1, len(text)) - 0.01 * len(text), abs=1e-6
        )
    for step, row in enumerate(row for row in jsonl.read(Path("r/metrics.jsonl")) if "loss" in row):
        texts = [one["response"] for one in rows if one["step"] == step]
        assert row["score/short"] == pytest.approx(-0.01 * sum(map(len, texts)) / len(texts), abs=1e-6)
        assert row["score/short"] + row["score/vowels"] == pytest.approx(row["reward/train"], abs=1e-6)


def test_prompts_without_answers_are_voted_on(capsys):
    """Labels of validation are read, those of training never."""
    files = ("--data.train", written("train.jsonl", [{"question": f"{n}?", "answer": {}} for n in range(16)]))
    files += ("--data.validation", written("v.jsonl", SUMS[:4]), "--data.answer", "answer", "--data.unlabelled", "true")
    words = (
        "--config",
        "ttrl",
        "--config",
        "tiny",
        "--data",
        "Prompts",
        *files,
        *SHORT,
        "--trainer.val_check_interval",
        1,
    )
    code, text = run(
        capsys, "fit", *words, "--data.batch_size", 4, "--trainer.callbacks.labelled", "false", "--run", "r"
    )
    assert code == 0, text
    rows = [row for row in jsonl.read(Path("r/metrics.jsonl")) if "vote/majority_ratio" in row]
    assert len(rows) == 2
    assert not any("vote/label_accuracy" in row for row in rows)
    (task, *_) = Prompts("train.jsonl", prompt="question", unlabelled=True).tasks("train")
    assert task.score("<answer>1/2</answer>").answer == task.score("\\boxed{0.5}").answer == "1/2"
    assert not task.score("<answer>1</answer>").correct


def test_the_command_line_learns_worked_solutions_and_evaluates_them(capsys):
    records = [{**record, "solution": f"<answer>{record['answer'][-1]}</answer>"} for record in SUMS]
    files = ("--data.train", written("train.jsonl", records), "--data.validation", written("v.jsonl", records[:4]))
    fields = ("--data.answer", "answer", "--data.response", "solution", "--data.batch_size", 8)
    short = ("--trainer.val_check_interval", 1, *SHORT)
    code, text = run(
        capsys, "fit", "--config", "sft", "--config", "tiny", "--data", "Prompts", *files, *fields, *short, "--run", "r"
    )
    assert code == 0, text
    assert len(jsonl.read(Path("r/evaluations.jsonl"))) == 2
