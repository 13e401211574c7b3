"""Conversations as they are kept -> messages as chat templates take them.

OpenAI's `role` and `content` (a text or its parts) with `tool_calls`, or the older `function_call`; and
ShareGPT's `from` and `value`. What has no place in a message is refused with its reason, never left out.
"""

import json
from collections.abc import Sequence

from qlora.cells import Unusable, as_text, check, is_text
from qlora.thoughts import ANSWER, THINK

ROLES = ("system", "developer", "user", "assistant", "tool")  # a role stands unchanged in the prompt
MEANS = {"developer": "system", "function": "tool"}  # OpenAI's new word, and its old one
SHAREGPT = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "assistant"), "assistant"),
    **dict.fromkeys(("observation", "tool", "function", "function_response"), "tool"),
    **{"system": "system", "developer": "system", "function_call": "function_call"},
}
TALKS = ("messages", "conversations")  # columns that hold whole conversations
TEXT_PARTS = ("text", "input_text", "output_text")
MEDIA = ("image", "images", "audio", "audios", "video", "videos")  # of a message, or columns of a row
REASONING = ("reasoning_content", "reasoning", "thinking")  # where a reply's thoughts stand beside it
NO_LIST = "messages that are no list of {role, content}"


def turns(value, role: str, column: str) -> list:
    """A prompt or a reply: text, or already a list of {role, content} (TRL takes both)."""
    return value if isinstance(value, list) else [{"role": role, "content": as_text(value, column)}]


def messages_of(talk, tools=None) -> list[dict]:
    """The messages of [{role, content}, ...], [{from, value}, ...], or such a list as JSON; or Unusable.

    `tools`: OpenAI's list of functions. They are kept in the first message, under "tools", so that every part
    of a conversation that begins with it has them; control_tokens.written() gives them to the chat template.
    """
    try:
        talk = json.loads(talk) if isinstance(talk, str) else talk
        tools = tools or talk[0].get("tools")
        messages = [message_of(turn) for turn in talk]
    except (TypeError, LookupError, AttributeError, RecursionError, json.JSONDecodeError):
        raise Unusable(NO_LIST) from None
    check_turns(messages)
    return with_tools(messages, tools) if has_any(tools) else messages


def message_of(turn: dict) -> dict:
    """{"from": "human", "value": "Hi"} -> {"role": "user", "content": "Hi"}

    A reply may have `tool_calls`, a tool's result a `tool_call_id` and a `name`.
    """
    if turn.get("from") is not None and turn.get("role") is None:
        turn = from_sharegpt(turn)
    role, content, calls = turn["role"], turn.get("content"), turn.get("tool_calls")
    if not calls and turn.get("function_call"):
        calls = [turn["function_call"]]
    for key in MEDIA:
        check(not turn.get(key), f"a message with {key}, which can't be trained on")
    role = MEANS.get(role, role) if isinstance(role, str) else role
    message = {"role": role, "content": "" if calls and content is None else text_of(content)}
    if role == "assistant":
        check(turn.get("weight") in (None, 1), "a reply with a weight, which would be learned like others")
        thoughts = next((turn[key] for key in REASONING if turn.get(key)), None)
        if thoughts and ANSWER not in message["content"]:
            check(is_text(thoughts), "thoughts that are no text")
            message["content"] = f"{THINK}\n{thoughts.strip()}\n{ANSWER}\n\n{message['content']}"
    if role == "tool":
        message |= {k: as_text(turn[k], k) for k in ("tool_call_id", "name") if turn.get(k)}
    if calls:
        check(role == "assistant", "tool calls of another role than assistant")
        message["tool_calls"] = calls_of(calls)
    return message


def from_sharegpt(turn: dict) -> dict:
    """{"from": "gpt", "value": "Hi"} -> {"role": "assistant", "content": "Hi"}

    The value of a function_call is JSON: a call, or a list of them.
    """
    who, value = turn["from"], turn.get("value")
    role = SHAREGPT.get(who, who) if isinstance(who, str) else who
    if role != "function_call":
        return {**turn, "role": role, "content": value}
    calls = from_json(value, "tool calls")
    return {**turn, "role": "assistant", "tool_calls": calls if isinstance(calls, list) else [calls]}


def text_of(content) -> str:
    """'Hi' -> 'Hi', [{"type": "text", "text": "Hi"}, {"type": "text", "text": "you"}] -> 'Hi\\nyou'"""
    if isinstance(content, list) and content and all(isinstance(part, dict) for part in content):
        for part in content:
            kind = part.get("type", "text")
            check(
                kind in TEXT_PARTS, f"a part of the type {str(kind)[:40]}, where only text can be trained on"
            )
            check(is_text(part.get("text")), "a content that is no text")
        return "\n".join(part["text"] for part in content)
    check(is_text(content), "a content that is no text")
    return content


def calls_of(calls) -> list[dict]:
    """[{"name": "f", "arguments": '{"a": 1}'}] ->
    [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]

    Chat templates take the arguments as an object; OpenAI's API writes them as JSON.
    """
    found = []
    calls = from_json(calls, "tool calls")
    check(isinstance(calls, list), "tool calls that are no list of functions")
    for call in calls:
        function = call.get("function") or call if isinstance(call, dict) else {}
        named = isinstance(function, dict) and is_text(function.get("name"))
        check(named, "tool calls that are no list of functions")
        known = ("name", "arguments", "parameters", "id", "type", "index", "function")
        other = next((key for key in function if key not in known and function[key] is not None), None)
        check(other is None, f"a tool call with {str(other)[:40]}, which has no place in a message")
        arguments = function.get("arguments", function.get("parameters"))
        arguments = {} if arguments in (None, "") else from_json(arguments, "arguments of a tool call")
        check(isinstance(arguments, dict), "arguments of a tool call that are no object")
        call = {"id": as_text(call["id"], "id")} if call.get("id") else {}
        function = {"name": function["name"], "arguments": arguments}
        found.append({**call, "type": "function", "function": function})
    check(is_text(written_out(found, "arguments of a tool call")), "tool calls that are no UTF-8")
    return found


def with_tools(messages: list[dict], tools) -> list[dict]:
    """The messages, their first with {"tools": [{"type": "function", "function": {"name": "f", …}}]}."""
    tools, found = from_json(tools, "tools"), []
    for tool in [tools] if isinstance(tools, dict) else tools if isinstance(tools, list) else [None]:
        function = tool.get("function") or tool if isinstance(tool, dict) else {}
        named = isinstance(function, dict) and is_text(function.get("name"))
        check(named, "tools that are no list of functions")
        found.append({"type": "function", "function": function})
    check(is_text(written_out(found, "tools")), "tools that are no UTF-8")
    return [{**messages[0], "tools": found}, *messages[1:]]


def has_any(tools) -> bool:
    """Many datasets write [] or "[]" where a row has no tools."""
    return bool(tools) and not (isinstance(tools, str) and tools.strip() in ("", "[]", "{}", "null"))


def from_json(value, what: str):
    """A value, or what a text says in JSON. Raises Unusable."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        raise Unusable(f"{what} that are no JSON") from None


def written_out(value, what: str) -> str:
    """As JSON; raises Unusable for what JSON has no word for (dates and bytes of a parquet file)."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        raise Unusable(f"{what} that can't be written as JSON") from None


def check_turns(messages: Sequence[dict]) -> None:
    """Raise Unusable for a conversation from which nothing can be learned."""
    roles = [m["role"] for m in messages]
    found = ", ".join(dict.fromkeys(str(role)[:20] for role in roles[:20])) or "none"
    check("assistant" in roles, f"no reply (role assistant; found {found})")
    check(all(role in ROLES for role in roles), f"a role other than {', '.join(ROLES)} (found {found})")
    check("user" in roles[: roles.index("assistant")], "a reply before the user's first message")
    replies = [m for m in messages if m["role"] == "assistant"]
    check(all(m["content"].strip() or "tool_calls" in m for m in replies), "an empty reply")
