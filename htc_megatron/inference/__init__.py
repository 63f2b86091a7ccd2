"""Use an exported model: compress each image once, answer many questions.

answer.py        questions to answers, images from pixels or from a store
conversation.py  turn after turn from one cache
likelihood.py    how likely given answers are
store.py         images' keys and values on disk
compress.py      image files into a store
onednn.py        fp32 products on CPU
"""

from htc_megatron.inference.answer import answer, ask, load, require_export
from htc_megatron.inference.compress import compress_into, image_files, read_image
from htc_megatron.inference.conversation import Conversation
from htc_megatron.inference.likelihood import Likelihood, likelihoods
from htc_megatron.inference.store import ImageStore

__all__ = [
    "Conversation",
    "ImageStore",
    "Likelihood",
    "answer",
    "ask",
    "compress_into",
    "image_files",
    "likelihoods",
    "load",
    "read_image",
    "require_export",
]
