"""Use an exported model: compress each image once, answer many questions."""

from htc_megatron.inference.answer import answer, ask, load

__all__ = ["answer", "ask", "load"]
