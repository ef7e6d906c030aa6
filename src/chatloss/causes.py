"""Every cause that an audit knows: how bad it is, what is counted, what it means, and what settles it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from chatloss.chat import ROLES

__all__ = ["CAUSES", "REFUSALS", "Cause"]


@dataclass(frozen=True, slots=True)
class Cause:
    """A kind of finding. `unit` is what is counted: turn, message, conversation, row or input row."""

    severity: str
    unit: str
    text: str
    remedy: str


_LOOK = "look at the example: a heuristic, which can be wrong"
CAUSES: Mapping[str, Cause] = {
    # Without turns
    "no_turns": Cause("warning", "conversation", "there is no answer, so nothing can be trained",
                      "drop these rows, or name the role to train with --role"),
    "nothing_trained": Cause("warning", "conversation", "there are answers, and none of them is trained",
                             "drop these rows, or see what switches their turns off"),
    "ends_without_answer": Cause("info", "conversation", "the messages after the last answer are in no row",
                                 "nothing to do, unless an answer is missing"),
    # Roles
    "unknown_role": Cause("warning", "message", "a role that templates rarely know",
                          f"rename it to one of {', '.join(ROLES)}"),
    "assistant_first": Cause("info", "conversation", "the chat begins with an answer to nothing",
                             "fine for a greeting; else put the question before it"),
    "users_in_a_row": Cause("info", "message", "two user messages in a row", "join them if they are one question"),
    "answers_in_a_row": Cause("warning", "message", "two answers in a row: nothing prompts the second",
                              "join them, or keep one of them"),
    "system_inside": Cause("warning", "message", "a system message after the first message",
                           "move it to the front: many templates drop or refuse it elsewhere"),
    # Tools
    "result_without_call": Cause("warning", "message", "a tool result that no call asked for",
                                 "put the call before it, or give both the same tool_call_id"),
    "call_without_result": Cause("warning", "message", "a call that is followed by no result",
                                 "put the tool's result behind it"),
    "unknown_tool": Cause("warning", "message", "a call of a tool that the row does not offer",
                          "add it to tools, or drop the row"),
    "broken_arguments": Cause("warning", "message", "tool arguments that are not a JSON object",
                              "mend them: the model would learn to write broken calls"),
    # Answers
    "empty_answer": Cause("warning", "turn", "an answer without text, reasoning or call: it trains silence",
                          "drop it, or train: false on that message"),
    "inline_think": Cause("info", "turn", "an answer holds its reasoning inline as <think>…</think>",
                          "fine if the template keeps it; else move it to reasoning_content"),
    "unclosed_think": Cause("warning", "turn", "<think> is never closed, so the answer is all reasoning",
                            "close it, or drop the row"),
    "reasoning_twice": Cause("warning", "turn", "reasoning both in its own field and inline",
                             "keep one of them"),
    "cut": Cause("warning", "turn", "an answer was cut off by a length limit (finish_reason)",
                 "drop it: the model would learn to stop in mid-sentence"),
    "maybe_cut": Cause("warning", "turn", "an answer seems to end in mid-sentence or inside a code block", _LOOK),
    "repeats": Cause("warning", "turn", "an answer seems to go round in circles", _LOOK),
    "role_label": Cause("warning", "turn", "an answer begins with a role label", "remove the label"),
    "foreign_control": Cause("warning", "message", "text holds a control token of another model family",
                             "remove it: it is trained as plain text"),
    "mojibake": Cause("warning", "message", "text was decoded with the wrong encoding", "decode the source as UTF-8"),
    # Template and policy: an error where the policy refuses
    "off_prompt": Cause("error", "turn", "inference would never show this prompt before this answer",
                        "--off-prompt drop|keep|splice"),
    "altered": Cause("error", "turn", "the template changes the answer", "--altered drop|keep"),
    "altered_reasoning": Cause("error", "turn", "the template drops the reasoning of an answer",
                               "a template that renders reasoning_content, or --altered drop|keep"),
    "altered_content": Cause("error", "turn", "the template drops or changes the text of an answer",
                             "--altered drop|keep, or a template that keeps it"),
    "altered_calls": Cause("error", "turn", "the template drops or changes a tool call",
                           "--altered drop|keep, or a template that keeps it"),
    "unrenderable": Cause("error", "turn", "the template refuses the messages up to an answer",
                          "--unrenderable drop, or mend what it complains about"),
    "unrenderable_order": Cause("error", "turn", "the template refuses this order of roles",
                                "join neighbouring messages of one role and begin with a user, or --unrenderable drop"),
    "unrenderable_system": Cause("error", "turn", "the template takes no system message",
                                 "put its text into the first user message, or --unrenderable drop"),
    "unrenderable_role": Cause("error", "turn", "the template knows no such role",
                               "give the message another role, or --unrenderable drop"),
    "unrenderable_parallel": Cause("error", "turn", "the template takes one tool call in an answer and no more",
                                   "give each call an answer and a result of its own, or --unrenderable drop"),
    "unrenderable_ids": Cause("error", "turn", "the template asks for tool call ids that the data does not have",
                              "give each call an id of nine letters or digits and its result the same tool_call_id, "
                              "or --unrenderable drop"),
    "unrenderable_tokenizer": Cause("error", "turn", "the template needs a special token that the tokenizer lacks",
                                    "give the tokenizer that the template belongs to"),
    "control_tokens": Cause("error", "message", "text holds a control token of this tokenizer or template",
                            "remove it, or --control-tokens literal|parity"),
    "missing_stop": Cause("warning", "turn", "an answer is rendered without a stop, so the model never learns to end",
                          "--missing-stop append"),
    "too_long": Cause("warning", "turn", "a turn does not fit into max_length and is lost",
                      "a longer --max-length, or --overflow window"),
    "one_row": Cause("error", "conversation", "one row cannot hold all turns as inference shows them",
                     "--row-format auto, or --unlawful keep"),
    "lost_answer": Cause("error", "turn", "a turn of a preference pair's answer is trained nowhere",
                         "drop the pair, or settle the turn with its own flag"),
    "other_prompt": Cause("error", "conversation", "the answers of a preference pair follow different prompt ids",
                          "mend the pair"),
    "tie": Cause("error", "conversation", "the answers of a preference pair have the same tokens",
                 "drop the pair: it prefers nothing"),
    "split": Cause("info", "turn", "a turn has a row of its own: later in the chat it is rendered differently",
                   "nothing to do"),
    "stop_appended": Cause("info", "turn", "the template writes no stop behind the last answer; one is appended",
                           "nothing to do, or --missing-stop leave|error"),
    "trimmed": Cause("info", "turn", "the template strips whitespace at the ends of an answer", "nothing to do"),
    "untrained_row": Cause("warning", "row", "a row in which nothing is trained", "drop its turns from the data"),
    "double_bos": Cause("warning", "row", "a row begins with BOS twice", "take BOS out of the template or the text"),
    # The stream
    "no_marker": Cause("error", "input row", "a text in which the markers do not show what to train", ""),
    "text_rows": Cause("error", "input row", "a row without messages, and nothing says what to train in it",
                       "--response-template TEXT, and perhaps --instruction-template TEXT"),
    "duplicate_conversation": Cause("warning", "conversation", "a conversation that came before", "drop the copies"),
    "duplicate_answer": Cause("info", "turn", "an answer that came before", "nothing to do if that is meant"),
    "too_many_rejects": Cause("error", "input row", "more rows are rejected than --max-rejects allows", "mend them"),
    "rejected_field": Cause("warning", "input row", "a row with a field that is missing or of the wrong type", ""),
    "rejected_json": Cause("warning", "input row", "a row that is not JSON", ""),
    "rejected_encoding": Cause("warning", "input row", "a row that is not UTF-8", ""),
    "rejected_media": Cause("warning", "input row", "a row with images, audio or video, not to be trained yet", ""),
    "rejected_tie": Cause("warning", "input row", "a pair that prefers nothing", ""),
    "rejected_unreadable": Cause("warning", "input row", "the rest of a file that cannot be read", ""),
}
# What templates say when they refuse, and which cause that is.
REFUSALS = (
    (r"tool.?call ids?\b", "unrenderable_ids"),
    (r"alternat|no element -?\d|no messages|after role|no user|user query|must (?:start|begin)|beginning|"
     r"first message|last message", "unrenderable_order"),
    (r"system\b.{0,30}\bnot\b|\bno system\b|\bnot\b.{0,30}\bsystem\b", "unrenderable_system"),
    (r"'\w+_token' is undefined", "unrenderable_tokenizer"),
    (r"\broles?\b", "unrenderable_role"),
    (r"single tool.?call|one tool.?call", "unrenderable_parallel"),
)
