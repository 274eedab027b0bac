"""Plain texts of data files, as they stand there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tunesmith.data.files import read_file
from tunesmith.errors import UserError


def read_texts(files: str | Sequence[str], option: str) -> list[str]:
    """The texts of files: the whole of a text file, each row's `text` of others. `option` names them in errors.

    Raises UserError for a file that is missing, of no known kind, without `text`, or where all are empty.
    """
    texts: list[str] = []
    for file in [files] if isinstance(files, str) else files:
        path = Path(file).expanduser()
        if not path.is_file():
            raise UserError(f"`{option}`: there is no file {file}")
        for rows in read_file(path).values():
            for index in range(len(rows)):
                text = rows[index].get("text")
                if not isinstance(text, str):
                    raise UserError(f"`{option}`: {rows.place(index)} has no `text`, which is what is read")
                texts.append(text)
    if not any(text.strip() for text in texts):
        raise UserError(f"`{option}`: there is no text in {files if isinstance(files, str) else ', '.join(files)}")
    return texts
