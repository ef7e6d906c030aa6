"""Make the demo's tokenizer.json from the demo's chats: `python scripts/make_demo_tokenizer.py [OUTPUT]`.

Byte-level BPE, the same bytes on every run. Needs only `tokenizers` and the standard library.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

DEMO = Path(__file__).resolve().parent.parent / "src" / "chatloss" / "assets" / "demo"
VOCABULARY_SIZE = 4096  # an upper bound: the demo's text has fewer pairs that occur twice
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Added but not special: a model must write these itself, and decoding must show them.
MARKERS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
# Words with their marks (Devanagari vowel signs are \p{M}), digits one by one, then punctuation, then whitespace.
SPLIT = r"[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def demo_texts() -> Iterator[str]:
    """Every string that a template renders from the chats, and the words of the templates themselves."""
    for line in (DEMO / "chats.jsonl").read_text(encoding="utf-8").splitlines():
        chat = json.loads(line)
        for tool in chat.get("tools", []):
            yield json.dumps(tool, ensure_ascii=False)
        for message in chat["messages"]:
            yield message["role"] + "\n"
            yield "\n" + message.get("reasoning_content", "") + "\n"
            yield from re.split("|".join(map(re.escape, MARKERS)), message["content"] or "")
            for call in message.get("tool_calls", []):
                function = call["function"]
                arguments = function["arguments"]
                if not isinstance(arguments, str):
                    arguments = json.dumps(arguments, ensure_ascii=False)
                yield f'\n{{"name": "{function["name"]}", "arguments": {arguments}}}\n'
    yield "You can call these functions:\n"
    yield "Today is Monday. Today is Tuesday. Today is Wednesday.\n\n"


def make_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE - len(MARKERS),
        min_frequency=2,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(demo_texts(), trainer)
    tokenizer.add_tokens([AddedToken(marker, special=False, normalized=False) for marker in MARKERS])
    return tokenizer


if __name__ == "__main__":
    output = Path(sys.argv[1]) if len(sys.argv) > 1 else DEMO / "tokenizer" / "tokenizer.json"
    tokenizer = make_tokenizer()
    output.write_text(tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")
    print(f"{output}: {tokenizer.get_vocab_size()} tokens", file=sys.stderr)
