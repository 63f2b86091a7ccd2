"""The table of weights as a page for people; WEIGHTS.md beside this file is what it gives, and a test holds it to that."""

from htc_megatron.weights.families import CLIP, LLAMA, LLAVA, LLAVA_LLAMA
from htc_megatron.weights.table import TABLE, hf_names

HEAD = """\
# Weights

Made from the table in `table.py` by `python tools/convert.py table`. A checkpoint stores each weight once, whole, under its
global name; tensor parallelism cuts it by its rule; the export has the tensors on the right. `{i}` counts layers.

Sizes: H, F, V hidden size, MLP width and vocabulary of the backbone, QKV its fused heads; h, f of the tower and the Q-Former, P its
positions (patches and CLS), p its patch; M queries; A, D width and output of the anchors' projector, q its input (MGVQ's flat latents,
or chosen features); C, c rows and columns of the codebook.

| weight | shape | rule | in the export |
| --- | --- | --- | --- |
"""
FAMILIES = """
What other families call the export's tensors, by prefix (`families.py`):

| family | in its files | in the export |
| --- | --- | --- |
"""


def listing() -> str:
    """Markdown, with a line for every row of the table and of the families."""
    rows = []
    for name, shape, rule, hf, *_ in TABLE:
        theirs = ", ".join(f"`{x}`" for x in hf_names(name, hf)) or "row `voco_token_id` of the embedding"
        rows.append(f"| `{name}` | {shape} | {rule} | {theirs} |")
    families = [
        f"| {family.title} | `{theirs}` | `{ours}` |" for family in (LLAMA, LLAVA, LLAVA_LLAMA, CLIP) for theirs, ours in family.rows
    ]
    return HEAD + "\n".join(rows) + "\n" + FAMILIES + "\n".join(families) + "\n"
