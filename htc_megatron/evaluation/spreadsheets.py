"""Tables with tabs between their cells, and .xlsx files."""

import csv
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from htc_megatron.config import ConfigError

LONGEST = 1 << 30  # characters of a cell; an image is one


def read_tsv(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Records of a file with a head line, each with the number of its last line. Raises ConfigError where a column or cell is missing."""
    before = csv.field_size_limit(LONGEST)
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.reader(file, "excel-tab")
            head = next(reader, [])
            if lacking := [column for column in columns if column not in head]:
                raise ConfigError(f"{path} has no column {lacking[0]!r}, wanted {', '.join(columns)}")
            for cells in reader:
                if len(cells) != len(head):
                    raise ConfigError(f"{path}: line {reader.line_num}: {len(cells)} cells, wanted {len(head)}")
                yield reader.line_num, dict(zip(head, cells, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    finally:
        csv.field_size_limit(before)


def require_openpyxl(what: str) -> None:
    """Raises ConfigError where the package that writes .xlsx files, which `what` needs, is not installed."""
    if find_spec("openpyxl") is None:
        raise ConfigError(f"{what} needs openpyxl, which is not installed: pip install -c constraints.txt -e '.[evaluation]'")


def write_xlsx(rows: Sequence[Sequence[str | int | None]], path: Path) -> Path:
    """A workbook of one sheet, text as text even where it looks like a formula. Needs openpyxl."""
    from openpyxl import Workbook
    from openpyxl.cell import Cell, WriteOnlyCell
    from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE

    book = Workbook(write_only=True)
    sheet = book.create_sheet()

    def cell(value: str | int | None) -> Cell | int | None:
        if not isinstance(value, str):
            return value
        made = WriteOnlyCell(sheet, ILLEGAL_CHARACTERS_RE.sub("", value))
        made.data_type = "s"
        return made

    for row in rows:
        sheet.append([cell(value) for value in row])
    book.save(path)
    return path
