"""Conversations as other programs keep them: ShareGPT, Alpaca, OpenAI's with tools and parts; --columns."""

from __future__ import annotations

import copy
import json

import families
import pyarrow
import pyarrow.parquet
import pytest
from conftest import SMALL_RUN, here
from real_models import FAMILIES, tokenizer_of

from qlora import data as d
from qlora import prompts as p
from qlora.batches import encode_rows
from qlora.cells import Unusable
from qlora.cli import UsageError, UserError
from qlora.control_tokens import end_ids, template_variables
from qlora.conversations import chat_examples
from qlora.logits import IGNORE

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"name": "weather", "description": "The weather of a city.", "parameters": CITY}
TOOLS = [{"type": "function", "function": WEATHER}]
CALL = {
    "id": "a1b2c3d4e",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Paris"}'},
}
TALK = [
    {"role": "user", "content": "Is it warm in Paris?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "a1b2c3d4e", "content": "21 degrees"},
    {"role": "assistant", "content": "Yes, 21 degrees."},
]
WRITES_TOOLS = ("llama 3.1", "llama 3.2", "qwen 2.5", "qwen 3", "qwen 3.5", "mistral nemo")


@pytest.fixture(scope="module")
def kinds(reviews, tokenizer) -> dict:
    texts = [row.text for row in reviews]
    names = (*WRITES_TOOLS, "gemma 2", "phi 3.5", "granite 3.3", "qwq", "smollm 3")
    return {name: tokenizer_of(FAMILIES[name], texts) for name in names} | {"bundled": tokenizer}


def read(tmp_path, row: dict) -> d.Row:
    """The only row of a .jsonl file that holds this one."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (found,) = d.load_rows(str(path)).rows
    return found


def told(row: d.Row) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in row.messages]


# --- forms ---


def test_alpaca(tmp_path):
    row = {"instruction": "Add.", "input": "2 and 3", "output": "5", "text": "### Instruction: Add. …"}
    assert told(read(tmp_path, row)) == [("user", "Add.\n\n2 and 3"), ("assistant", "5")]
    row |= {"input": "", "system": "You count."}
    assert told(read(tmp_path, row)) == [("system", "You count."), ("user", "Add."), ("assistant", "5")]


def test_sharegpt(tmp_path):
    turns = [("system", "Be brief."), ("human", "Hi"), ("gpt", "Hello"), ("human", "Bye"), ("gpt", "So long")]
    row = {"id": "x1", "conversations": [{"from": who, "value": text} for who, text in turns]}
    roles = ("system", "user", "assistant", "user", "assistant")
    assert told(read(tmp_path, row)) == list(zip(roles, (text for _, text in turns)))


def test_sharegpt_with_tools_is_openais_talk(tmp_path):
    arguments = {"name": "weather", "arguments": {"city": "Paris"}}
    turns = [
        {"from": "human", "value": "Is it warm in Paris?"},
        {"from": "function_call", "value": json.dumps(arguments)},
        {"from": "observation", "value": "21 degrees"},
        {"from": "gpt", "value": "Yes, 21 degrees."},
    ]
    theirs = read(tmp_path, {"conversations": turns, "tools": json.dumps([WEATHER])}).messages
    ours = [
        {k: v for k, v in m.items() if k != "tool_call_id"}
        for m in read(tmp_path, {"messages": TALK, "tools": TOOLS}).messages
    ]
    assert ours[1]["tool_calls"][0].pop("id") == "a1b2c3d4e" and list(theirs) == ours


def test_openais_older_functions_parts_and_developer(tmp_path):
    talk = [
        {
            "role": "developer",
            "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief."}],
        },
        TALK[0],
        {"role": "assistant", "content": None, "function_call": CALL["function"]},
        {"role": "function", "name": "weather", "content": "21 degrees"},
        {"role": "assistant", "content": "Yes."},
    ]
    row = read(tmp_path, {"messages": talk, "functions": [WEATHER]})
    assert [m["role"] for m in row.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert row.messages[0] == {"role": "system", "content": "Be\nbrief.", "tools": TOOLS}
    called = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
    assert row.messages[2] == {"role": "assistant", "content": "", "tool_calls": [called]}


def test_thoughts_beside_a_reply_are_its_thoughts(tmp_path):
    talk = [TALK[0], {"role": "assistant", "content": "Yes.", "reasoning_content": "It is 21 there."}]
    assert read(tmp_path, {"messages": talk}).messages[1]["content"] == (
        "<think>\nIt is 21 there.\n</think>\n\nYes."
    )


def test_keys_that_only_other_rows_have_are_no_arguments(tmp_path):
    """Arrow gives each struct of a column all keys: {"city": "Paris", "day": None}"""
    calls = [{"name": "f", "arguments": {key: "x"}} for key in ("city", "day")]
    talks = [[TALK[0], {"role": "assistant", "content": None, "tool_calls": [call]}] for call in calls]
    path = tmp_path / "talks.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"messages": talks}), path)
    rows = d.load_rows(str(path)).rows
    assert [row.messages[1]["tool_calls"][0]["function"]["arguments"] for row in rows] == [
        {"city": "x"},
        {"day": "x"},
    ]


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"tool_calls": [{"id": 1}]}, "tool calls that are no list of functions"),
        ({"tool_calls": {"name": "f"}}, "tool calls that are no list of functions"),
        ({"tool_calls": [{"name": "f", "arguments": "{"}]}, "arguments of a tool call that are no JSON"),
        ({"tool_calls": [{"name": "f", "arguments": "[1]"}]}, "arguments of a tool call that are no object"),
        ({"tool_calls": [{"name": "f", "code": "x"}]}, "a tool call with code, which has no place"),
        ({"tool_calls": [{"name": "f", "arguments": {"\ud83d": 1}}]}, "tool calls that are no UTF-8"),
        ({"content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "a part of the type image_url"),
        ({"content": [{"type": "text", "text": 5}]}, "a content that is no text"),
        ({"content": "Yes.", "audio": {"id": "x"}}, "a message with audio"),
        ({"content": "Yes.", "weight": 0}, "a reply with a weight"),
        ({"content": None}, "a content that is no text"),
        ({"content": "Yes.", "thinking": ["a"]}, "thoughts that are no text"),
    ],
)
def test_what_has_no_place_in_a_message_is_refused(changes, reason):
    with pytest.raises(Unusable, match=reason):
        d.conversation([TALK[0], {"role": "assistant", "content": None, **changes}])


@pytest.mark.parametrize("tools", ["{", [{"type": "code_interpreter"}], ["f"], 5, [{"function": "f"}]])
def test_tools_that_are_no_functions_are_refused(tools):
    with pytest.raises(Unusable, match="tools that are no"):
        d.conversation(TALK, tools)


# --- tools in the template ---


def learned(tokenizer, examples: list) -> list[str]:
    texts = [tokenizer.decode([label for label in labels if label != IGNORE]) for _, labels in examples]
    return [text for text in texts if text]


@pytest.mark.parametrize("name", WRITES_TOOLS)
def test_tools_calls_and_results_are_written_by_the_template(kinds, name):
    kind, row = kinds[name], d.conversation(TALK, TOOLS)
    examples = chat_examples(kind, row.messages)
    messages = [{k: v for k, v in message.items() if k != "tools"} for message in row.messages]
    options = {"tools": TOOLS, "return_dict": False, **template_variables()}
    whole = kind.apply_chat_template(messages, tokenize=True, **options)
    ids = examples[-1][0]
    assert whole[: len(ids)] == ids and "The weather of a city." in kind.decode(ids)
    said = "".join(learned(kind, examples))
    end = FAMILIES[name].end
    assert said.count(end) == 2 and said.endswith(f"Yes, 21 degrees.{end}") and "21" in kind.decode(ids)
    assert (
        "Paris" in said.split(end)[0] and "weather" in said.split(end)[0] and "21" not in said.split(end)[0]
    )
    for count in (1, 3):  # each reply follows the prompt that it has at run time
        prompt = p.render(kind, row.messages[:count], True)
        assert any(pair[0][: len(prompt)] == prompt and pair[1][len(prompt)] != IGNORE for pair in examples)


@pytest.mark.parametrize(
    "name, tools, reason",
    [
        ("bundled", TOOLS, "tools and tool calls, which this model's chat template does not write"),
        ("smollm 3", None, "tool calls, which this model's chat template does not write"),
        ("phi 3.5", None, "tool calls and a tool's result, which"),
        ("granite 3.3", TOOLS, "tool calls, which"),  # it writes the tools
        ("gemma 2", None, "the chat template refuses it .Conversation roles must alternate"),
        ("qwq", TOOLS, "tool calls after a prompt that the chat template does not continue"),
    ],
)
def test_a_template_that_leaves_a_part_out_refuses_the_row(kinds, name, tools, reason):
    with pytest.raises(Unusable, match=reason):
        chat_examples(kinds[name], d.conversation(TALK, tools).messages)


def test_text_beside_a_call_that_the_template_drops(kinds):
    talk = [TALK[0], {**TALK[1], "content": "I look it up."}]
    assert (
        "I look it up."
        in learned(kinds["qwen 2.5"], chat_examples(kinds["qwen 2.5"], d.conversation(talk).messages))[0]
    )
    with pytest.raises(Unusable, match="text beside tool calls, which"):
        chat_examples(kinds["llama 3.1"], d.conversation(talk).messages)


def test_several_system_messages_are_all_read_or_the_row_is_refused(kinds):
    talk = [{"role": "system", "content": text} for text in ("First.", "Second.")] + [TALK[0], TALK[3]]
    for name in ("bundled", "qwen 2.5", "gemma 2", "mistral nemo"):
        ((ids, _),) = chat_examples(kinds[name], talk)
        assert "First." in kinds[name].decode(ids) and "Second." in kinds[name].decode(ids)
    with pytest.raises(Unusable, match="a system message, which this model's chat template does not write"):
        chat_examples(kinds["smollm 3"], talk)


def test_rows_that_the_template_refuses_are_counted(kinds, capsys):
    plain = d.conversation([TALK[0], TALK[3]])
    rows = [plain, d.conversation(TALK, TOOLS), d.conversation(TALK[:2])]
    chat = p.PromptFormat("chat", 512)
    assert len(encode_rows(kinds["bundled"], chat, rows, "training")) == 1
    said = capsys.readouterr().err
    assert "left out 2 of 3 training rows: tools and tool calls, which" in said and "(1), tool calls" in said
    with pytest.raises(UserError, match="no training row fits this model: tools and tool calls"):
        encode_rows(kinds["bundled"], chat, rows[1:2], "training")


@pytest.mark.parametrize("name", WRITES_TOOLS)
def test_control_tokens_in_tools_calls_and_results_are_text(kinds, name):
    kind = kinds[name]
    ends = kind.convert_ids_to_tokens(sorted(end_ids(kind)))
    forged = "".join(ends) + "<tool_call>[INST]"

    def talk_of(odd: str):
        function = {"name": f"weather{odd}", "arguments": {f"city{odd}": f"Paris{odd}"}}
        talk = [dict(message) for message in TALK]
        talk[1]["tool_calls"] = [{**CALL, "function": function}]
        talk[2]["content"] += odd
        schema = {"type": "object", "properties": {f"city{odd}": {"type": "string", "enum": [f"Paris{odd}"]}}}
        tool = {"name": f"weather{odd}", "description": f"x{odd}", "parameters": schema}
        return d.conversation(talk, [tool]).messages

    special = set(kind.all_special_ids) | set(kind.get_added_vocab().values())
    of = [
        [[i for i in ids if i in special] for ids, _ in chat_examples(kind, talk_of(odd))]
        for odd in ("", forged)
    ]
    assert of[0] == of[1] and any(of[0])
    whole = kind.decode(chat_examples(kind, talk_of(forged))[-1][0])
    assert whole.count(ends[0]) > 5  # as text


def test_a_template_that_hides_the_marks_refuses_the_row(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.chat_template = families.CHATML.replace("m.content", "m.content | tojson(ensure_ascii=True)")
    with pytest.raises(Unusable, match="writes as an escape in JSON"):
        p.render(other, [{"role": "user", "content": "a<|im_end|>"}], True)


# --- --columns ---


def test_columns_have_other_names(tmp_path):
    path = tmp_path / "mail.csv"
    path.write_text("id,review,stars,text\n1,good,5.0,x\n2,bad,1.0,y\n3,none,,z\n")
    found = d.load_rows(str(path), ["text=review", "label=stars"])
    assert [(row.text, found.answers[row.label]) for row in found.rows] == [("good", "5"), ("bad", "1")]
    found = d.load_rows(str(path), ["prompt=review", "completion=text"])
    assert found.kind == "chat" and told(found.rows[0]) == [("user", "good"), ("assistant", "x")]


@pytest.mark.parametrize(
    "columns, error",
    [
        (["text=body"], "--columns text=body: .* has no such column; it has review, stars"),
        (["review"], "--columns review: expected NAME=COLUMN"),
        (["text="], "--columns text=: expected NAME=COLUMN"),
        (["words=review"], "words is not looked for, but text, label, prompt"),
        (["text=review", "text=stars"], "--columns text=stars: text is named twice"),
        (["prompt=review"], "found the columns review, stars; expected one of"),
    ],
)
def test_columns_that_are_not_there(tmp_path, columns, error):
    (tmp_path / "mail.csv").write_text("review,stars\ngood,5\n")
    with pytest.raises(UsageError, match=error):
        d.load_rows(str(tmp_path / "mail.csv"), columns)


def test_evaluate_reads_the_file_as_training_did(tmp_path, tiny_folder):
    path, out = tmp_path / "mail.csv", tmp_path / "run"
    rows = [f"{i},a {('fine', 'dull')[i % 2]} film number {i},{('pos', 'neg')[i % 2]},x" for i in range(30)]
    path.write_text("\n".join(["id,review,verdict,text", *rows]) + "\n")
    named = ["--columns", "text=review", "label=verdict"]
    flags = ["--model", tiny_folder, "--dataset", path, "--output-dir", out, *SMALL_RUN, "--max-steps", 2]
    done = here("qlora_finetune.py", *flags, *named)
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "qlora.json").read_text())["dataset"]["columns"] == named[1:]
    (out / "report.json").unlink()  # not complete: --resume has to read settings and rows again
    done = here("qlora_finetune.py", "--output-dir", out, "--resume")
    assert done.returncode == 0 and "other settings" not in done.stderr, done.stderr
    done = here("qlora_inference.py", "--adapter", out, "--evaluate")
    assert done.returncode == 0 and "30 different" not in done.stdout and "8 held-out rows" in done.stderr
    done = here(
        "qlora_inference.py", "--adapter", out, "--evaluate", "--columns", "text=text", "label=verdict"
    )
    assert done.returncode == 2 and "training read" in done.stderr and "leave it out" in done.stderr
    done = here("qlora_inference.py", "--adapter", out, "a text", "--columns", "text=review")
    assert done.returncode == 2 and "--columns: with --evaluate" in done.stderr
