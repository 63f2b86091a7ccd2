"""The tokenizer of an export: a sentencepiece model turned into transformers' form, or a transformers folder, with `<voco>`.

sentencepiece and transformers differ in small ways (who adds the leading space, who collapses spaces), so the normaliser is
built from the model file's own fields, and the result must spell a set of probes exactly as sentencepiece does.
"""

from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from htc_megatron.config import ConfigError

SPACE = "\u2581"
VOCO_TOKEN = "<voco>"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # ModelProto.SentencePiece.Type
PROBES = (
    "USER: What shape is in the image? ASSISTANT:",
    "yes",
    "Two  spaces, a\ttab,\na line and 3.14%; naïve café ½ ﬁne",
    " led by a space, ended by one ",
    "漢字 кириллица 🙂 <voco>",
    "runs of spaces:" + " " * 3 + "3," + " " * 7 + "7",
    "x" * 40 + ' don\'t (stop) [here] {now} "quote" ...',
    "a literal </s> is text",
)
CONTROL_PROBE = PROBES[-1]  # transformers' unigram model has no piece that text cannot reach


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """BPE merges of a sentencepiece vocabulary: a pair is merged the earlier, the higher the merged piece's score."""
    rank = {piece: i for i, piece in enumerate(sorted(scores, key=scores.get, reverse=True))}
    found = []
    for piece in rank:
        parts = [(piece[:i], piece[i:]) for i in range(1, len(piece)) if piece[:i] in rank and piece[i:] in rank]
        found += sorted(parts, key=lambda pair: (rank[pair[0]], rank[pair[1]]))
    return found


def convert_sentencepiece(path: str | Path) -> PreTrainedTokenizerFast:
    """A transformers tokenizer that gives the ids sentencepiece gives. BPE and unigram models; others raise ConfigError.

    One difference remains: with a unigram model a literal control piece in a text ("</s>") becomes that piece.
    """
    try:
        reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"tokenizer {path}: not a sentencepiece model: {error}") from None
    proto = sentencepiece_model_pb2.ModelProto.FromString(reference.serialized_model_proto())
    trainer, spec, pieces = proto.trainer_spec, proto.normalizer_spec, list(proto.pieces)
    unknown = pieces[trainer.unk_id].piece
    if trainer.model_type == trainer.BPE:
        ids = {p.piece: i for i, p in enumerate(pieces)}
        scores = {p.piece: p.score for p in pieces if p.type == NORMAL}
        model = models.BPE(ids, _merges(scores), unk_token=unknown, fuse_unk=True, byte_fallback=trainer.byte_fallback)
    elif trainer.model_type == trainer.UNIGRAM:
        model = models.Unigram([(p.piece, p.score) for p in pieces], unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback)
    else:
        raise ConfigError(f"tokenizer {path}: a sentencepiece model of type bpe or unigram can be exported, this one is neither")

    tokenizer = Tokenizer(model)
    steps = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip()]
    steps += [normalizers.Prepend(SPACE)] if spec.add_dummy_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    parts = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else parts)
    tokenizer.add_tokens([AddedToken(p.piece, normalized=False) for p in pieces if p.type == USER_DEFINED])

    special = {"unk_token": unknown}
    for name, index in (("bos_token", reference.bos_id()), ("eos_token", reference.eos_id()), ("pad_token", reference.pad_id())):
        if index >= 0:
            special[name] = pieces[index].piece
    converted = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, padding_side="left", **special)
    for probe in PROBES:
        if trainer.model_type == trainer.UNIGRAM and probe == CONTROL_PROBE:
            continue
        ours = converted(probe, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        wanted = reference.encode(probe)
        if ours != wanted:
            raise ConfigError(f"tokenizer {path}: its transformers form spells {probe!r} as {ours}, sentencepiece as {wanted}")
    return converted


def load_folder(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a transformers folder in its self-contained form, which needs no class of its own to be loaded."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise ConfigError(f"tokenizer {path}: transformers cannot load it: {str(error).splitlines()[0]}") from None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ConfigError(f"tokenizer {path}: it runs on Python code of its own; wanted one with a tokenizer.json")
    plain = PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, padding_side="left", **tokenizer.special_tokens_map
    )
    for probe in PROBES:
        ours, wanted = (t(probe, add_special_tokens=False, split_special_tokens=True)["input_ids"] for t in (plain, tokenizer))
        if ours != wanted:
            raise ConfigError(f"tokenizer {path}: its self-contained form spells {probe!r} as {ours}, the folder's own as {wanted}")
    return plain


def open_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """A sentencepiece model or a folder in transformers' self-contained form. Raises ConfigError where there is neither."""
    path = Path(path)
    if str(path) in ("", ".") or not path.exists():
        raise ConfigError(f"tokenizer {str(path)!r} does not exist; wanted a sentencepiece .model file or a transformers tokenizer folder")
    return load_folder(path) if path.is_dir() else convert_sentencepiece(path)


def export_tokenizer(path: str | Path, voco_token_id: int, vocab_size: int) -> PreTrainedTokenizerFast:
    """The tokenizer at `path` with `<voco>` at its id, padding on the left. Raises ConfigError where the ids do not fit the model."""
    tokenizer = open_tokenizer(path)
    if VOCO_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"extra_special_tokens": [VOCO_TOKEN]})
    seen = tokenizer.convert_tokens_to_ids(VOCO_TOKEN)
    if seen != voco_token_id:
        raise ConfigError(f"tokenizer {path}: {VOCO_TOKEN} gets id {seen}, but the model has it at {voco_token_id}")
    if len(tokenizer) > vocab_size:
        raise ConfigError(f"tokenizer {path} has {len(tokenizer)} tokens, but the model's vocabulary ends at {vocab_size}")
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"tokenizer {path} has no end-of-sequence token, which every answer ends with")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer
