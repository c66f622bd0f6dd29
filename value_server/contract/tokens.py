"""Bearer tokens in a file, which the server and its clients may share."""

from pathlib import Path


def read_tokens(file: str | Path) -> list[str]:
    """A line each, at least one. Raises OSError or ValueError that names the file."""
    try:
        tokens = Path(file).read_text(encoding="utf-8").split()
    except OSError as error:
        raise OSError(f"token_file: {str(file)!r}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"token_file: {str(file)!r}: no text in UTF-8") from error
    if not tokens:
        raise ValueError(f"token_file: no token in {file}")
    return tokens
