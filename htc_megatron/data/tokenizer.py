"""One small interface over sentencepiece `.model` files and folders that transformers.AutoTokenizer loads, plus `<voco>`.

`<voco>` takes the id behind the base vocabulary (32000 for LLaMA's 32,000 pieces), or the id it has in a folder that already
names it. Text never becomes a special token: a user's literal "</s>" or "<voco>" is spelled out.
"""

import hashlib
from abc import ABC, abstractmethod
from pathlib import Path

import sentencepiece

from htc_megatron.config import ConfigError, ModelConfig

VOCO_TOKEN = "<voco>"
FOLDER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")  # what decides a folder's tokens


class Tokenizer(ABC):
    """Text to ids and back.

    bos_token_id: int, or None where the vocabulary has none (Qwen2). eos_token_id: int. voco_token_id: int.
    knows_voco: whether its own files name <voco>; else the id is the first one behind its vocabulary.
    vocab_size: rows of the embedding table that it needs, the voco row included.
    fingerprint: sha256 of the files that decide the ids.
    """

    bos_token_id: int | None
    eos_token_id: int
    voco_token_id: int
    knows_voco: bool
    vocab_size: int
    fingerprint: str

    def _finish(self, path: Path) -> None:
        if self.eos_token_id is None or self.eos_token_id < 0:
            raise ConfigError(f"tokenizer {path}: it has no end-of-sequence token, which every answer ends with")
        self._special = {self.eos_token_id, self.voco_token_id} | ({self.bos_token_id} - {None})
        pieces = self._tokens("a")
        self._writes_space = bool(pieces) and pieces[0].startswith("\u2581")

    def encode(self, text: str) -> list[int]:
        """Ids of a piece of a sequence, without bos and eos.

        One leading space is dropped where the tokenizer writes one by itself (sentencepiece's dummy prefix), so " yes" gives the
        ids it has in the middle of a text for either kind. Raises ValueError where the text cannot be spelled out.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"the text holds a lone surrogate at character {error.start}, which is not valid Unicode") from None
        if self._writes_space and text.startswith(" "):
            text = text[1:]
        ids = self._ids(text)
        if not self._special.isdisjoint(ids):
            raise ValueError(f"the tokenizer turns plain text into a special token: {text[:80]!r}")
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of ids; bos, eos, voco and placeholders (negative ids) are left out."""
        return self._text([i for i in ids if i >= 0 and i not in self._special])

    @abstractmethod
    def _ids(self, text: str) -> list[int]: ...

    @abstractmethod
    def _tokens(self, text: str) -> list[str]: ...

    @abstractmethod
    def _text(self, ids: list[int]) -> str: ...


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece `.model` file. Control pieces are never matched in text by sentencepiece itself."""

    def __init__(self, path: Path):
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise ConfigError(f"tokenizer {path}: not a sentencepiece model: {error}") from None
        base = self.processor.get_piece_size()
        known = self.processor.piece_to_id(VOCO_TOKEN)
        self.knows_voco = self.processor.id_to_piece(known) == VOCO_TOKEN
        self.voco_token_id = known if self.knows_voco else base
        self.vocab_size = max(base, self.voco_token_id + 1)
        self.bos_token_id = self.processor.bos_id() if self.processor.bos_id() >= 0 else None
        self.eos_token_id = self.processor.eos_id()
        self.fingerprint = _sha256([path])
        self._finish(path)

    def _ids(self, text: str) -> list[int]:
        return self.processor.encode(text)

    def _tokens(self, text: str) -> list[str]:
        return self.processor.encode(text, out_type=str)

    def _text(self, ids: list[int]) -> str:
        return self.processor.decode(ids)


class FolderTokenizer(Tokenizer):
    """A folder written by a transformers tokenizer's save_pretrained."""

    def __init__(self, path: Path):
        from transformers import AutoTokenizer  # seconds to import, and a sentencepiece model does not need it

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        except (ValueError, OSError, KeyError) as error:
            raise ConfigError(f"tokenizer {path}: transformers cannot load it: {str(error).splitlines()[0]}") from None
        base = len(self.tokenizer)
        words = self.tokenizer.get_vocab()
        self.knows_voco = VOCO_TOKEN in words
        self.voco_token_id = words.get(VOCO_TOKEN, base)
        self.vocab_size = max(base, self.voco_token_id + 1)
        self.bos_token_id = self.tokenizer.bos_token_id
        self.eos_token_id = self.tokenizer.eos_token_id
        files = [path / name for name in FOLDER_FILES if (path / name).is_file()]
        self.fingerprint = _sha256(files[:1] if files and files[0].name.startswith("tokenizer.") else files)
        self._finish(path)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def _tokens(self, text: str) -> list[str]:
        return self.tokenizer.convert_ids_to_tokens(self._ids(text))

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Tokenizer at path. Raises ConfigError where there is none."""
    path = Path(path)
    if str(path) in ("", ".") or not path.exists():
        raise ConfigError(f"tokenizer: {str(path)!r} does not exist; wanted a sentencepiece .model file or a transformers tokenizer folder")
    return FolderTokenizer(path) if path.is_dir() else SentencePieceTokenizer(path)


def check_tokenizer(vocab_size: int, voco_token_id: int, model: ModelConfig, source: str) -> None:
    """Refuse a vocabulary that is not the model's. source: what to name in the sentence. Raises ConfigError."""
    if voco_token_id != model.method.voco_token_id:
        raise ConfigError(
            f"model.method.voco_token_id is {model.method.voco_token_id}, but {source} has <voco> at id {voco_token_id}: set it to that"
        )
    if vocab_size > model.backbone.vocab_size:  # fewer are right: imported vocabularies have spare rows (Qwen2.5, llava-hf)
        raise ConfigError(
            f"model.backbone.vocab_size is {model.backbone.vocab_size}, but {source} has {vocab_size} tokens with <voco>: set it to that"
        )


def _sha256(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()
