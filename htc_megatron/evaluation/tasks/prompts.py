"""The instructions of LLaVA-1.5's published evaluation, each on a line of its own behind the question."""

SHORT = "Answer the question using a single word or phrase."
