"""Vocabularies as packages ship them (tiktoken ranks, SentencePiece models, GGUF) to `tokenizers.Tokenizer`."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


@dataclass(frozen=True, slots=True)
class Piece:
    """One entry of a SentencePiece vocabulary; `kind` is one of the constants above."""

    text: str
    score: float
    kind: int


def byte_alphabet() -> dict[int, str]:
    """GPT-2's printable character for every byte."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def tiktoken_ranks(path: Path) -> dict[bytes, int]:
    """Token bytes to rank, from a file with lines `base64 rank`."""
    lines = (line.split() for line in path.read_bytes().splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def merges_from_ranks(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Every split of every token into two tokens, in the order in which tiktoken would merge them."""
    merges: list[tuple[bytes, bytes]] = []
    for token, _ in sorted(ranks.items(), key=lambda item: item[1]):
        splits = ((token[:at], token[at:]) for at in range(1, len(token)))
        found = [(left, right) for left, right in splits if left in ranks and right in ranks]
        merges += sorted(found, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return merges


def byte_level_model(ranks: Mapping[bytes, int], low_specials: Sequence[str] = ()) -> BPE:
    """A byte-level BPE model whose ids are the ranks, moved up by the specials that come before them."""
    alphabet = byte_alphabet()

    def visible(token: bytes) -> str:
        return "".join(alphabet[byte] for byte in token)

    vocab = {text: index for index, text in enumerate(low_specials)}
    vocab |= {visible(token): rank + len(low_specials) for token, rank in ranks.items()}
    merges = [(visible(left), visible(right)) for left, right in merges_from_ranks(ranks)]
    return BPE(vocab, merges, fuse_unk=False, byte_fallback=False, ignore_merges=True)


def byte_level(
    model: BPE,
    pattern: str | None,
    added: Iterable[AddedToken],
    *,
    bos: str | None = None,
    nfc: bool = False,
    digits: bool = False,
) -> Tokenizer:
    """A byte-level tokenizer: split by `pattern` (None: GPT-2's own), BPE, `bos` put first by the post-processor."""
    tokenizer = Tokenizer(model)
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    splits: list[pre_tokenizers.PreTokenizer] = []
    if digits:
        splits.append(pre_tokenizers.Digits(individual_digits=True))
    if pattern is not None:
        splits.append(pre_tokenizers.Split(Regex(pattern), behavior="isolated"))
    splits.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(list(added))
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    if bos is not None:
        tokenizer.post_processor = processors.Sequence(
            [processors.ByteLevel(trim_offsets=False), put_first(tokenizer, bos)]
        )
    return tokenizer


def put_first(tokenizer: Tokenizer, bos: str) -> processors.TemplateProcessing:
    """The post-processor that puts `bos` before a text when special tokens are asked for."""
    ids = [(bos, tokenizer.token_to_id(bos))]
    return processors.TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A {bos} $B:1", special_tokens=ids)


def special(*texts: str, rstrip: bool = False) -> list[AddedToken]:
    """Special added tokens, matched in the raw text."""
    return [AddedToken(text, special=True, normalized=False, rstrip=rstrip) for text in texts]


def ordinary(*texts: str, rstrip: bool = False) -> list[AddedToken]:
    """Added tokens that are text all the same: kept when special tokens are skipped."""
    return [AddedToken(text, special=False, normalized=False, rstrip=rstrip) for text in texts]


def sentencepiece_pieces(path: Path) -> list[Piece]:
    """The vocabulary of a SentencePiece model file."""
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(str(path))

    def kind(index: int) -> int:
        if model.is_unknown(index):
            return UNKNOWN
        if model.is_control(index):
            return CONTROL
        return BYTE if model.is_byte(index) else UNUSED if model.is_unused(index) else NORMAL

    size = model.get_piece_size()
    return [Piece(model.id_to_piece(i), model.get_score(i), kind(i)) for i in range(size)]


def sentencepiece_bpe(
    pieces: Sequence[Piece], added: Sequence[AddedToken], *, bos: str | None, legacy: bool
) -> Tokenizer:
    """A SentencePiece BPE vocabulary with byte fallback.

    With `legacy` the normaliser prepends `▁` to every stretch between added tokens, as raw SentencePiece does;
    without, Metaspace does so at the start of the text only. Both are in use with the same vocabulary.
    """
    vocab = {piece.text: index for index, piece in enumerate(pieces)}
    merges = merges_from_scores(pieces, vocab)
    tokenizer = Tokenizer(BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_tokens(list(added))
    if bos is not None:
        tokenizer.post_processor = put_first(tokenizer, bos)
    return tokenizer


def merges_from_scores(pieces: Sequence[Piece], vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """Every split of every ordinary piece into two, in the order in which SentencePiece would merge them."""
    mergeable = {piece.text for piece in pieces if piece.kind == NORMAL}
    merges: list[tuple[str, str]] = []
    for piece in sorted(pieces, key=lambda piece: -piece.score):
        if piece.kind == NORMAL:
            text = piece.text
            splits = ((text[:at], text[at:]) for at in range(1, len(text)))
            found = [(left, right) for left, right in splits if left in mergeable and right in mergeable]
            merges += sorted(found, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    return merges
