"""Bearer tokens, of which the server and its clients may share a file."""

from pathlib import Path


def checked(token: str) -> str:
    """Without the line's end that a token made from a file has. Raises ValueError, which does not
    show it, for one that no header can have: an HTTP client would put it into the log."""
    token = token.strip()
    if not token:
        raise ValueError("token: nothing but space; leave it out for none")
    if not (token.isascii() and token.isprintable()):
        raise ValueError("token or token_file: a character of it can be in no HTTP header")
    return token


def read_tokens(file: str | Path) -> list[str]:
    """A line each, at least one. Raises OSError or ValueError naming the file; see `checked`."""
    try:
        tokens = Path(file).read_text(encoding="utf-8").split()
    except OSError as error:
        raise OSError(f"token_file: {str(file)!r}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"token_file: {str(file)!r}: no text in UTF-8") from error
    if not tokens:
        raise ValueError(f"token_file: no token in {file}")
    return [checked(token) for token in tokens]
