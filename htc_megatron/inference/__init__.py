"""Use an exported model: compress each image once, answer many questions.

answer.py      questions to answers, images from pixels or from a store
likelihood.py  how likely given answers are
store.py       images' keys and values on disk
compress.py    image files into a store
"""

from htc_megatron.inference.answer import answer, ask, load, require_export
from htc_megatron.inference.compress import compress_into, image_files
from htc_megatron.inference.likelihood import Likelihood, likelihoods
from htc_megatron.inference.store import ImageStore

__all__ = [
    "ImageStore",
    "Likelihood",
    "answer",
    "ask",
    "compress_into",
    "image_files",
    "likelihoods",
    "load",
    "require_export",
]
