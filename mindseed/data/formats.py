"""Kinds of files and how each becomes undecoded rows: JSON lines (plain, gzip, zstd), parquet, plain text.

Reading has two halves, so that the dear one can run in worker processes. `payloads` walks a file and hands out
undecoded lines, in constant memory; `parse` turns one of them into a row.

A bad line is an event, not an accident: `parse` raises `BadRow` with a reason, and whoever reads decides whether to
skip, count or stop. A bad file (empty, binary, truncated archive) is a `UserError` at once.
"""
from __future__ import annotations

import gzip
import io
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Callable, Iterator

from mindseed.base.errors import UserError
from mindseed.base.extras import install
from mindseed.base.files import parse_json

MAX_LINE_BYTES = 64 << 20          # a longer line is no row but a mistake, and would break the constant memory
TEXT_PIECE_BYTES = 16 << 10        # .txt files are cut into documents of about this size, at blank lines
DOCUMENT_END = b"<|endoftext|>"    # alone on a line of a .txt file, it ends a document


class BadRow(Exception):
    """One row that cannot be used; the message is the reason, without the place."""


def suffix_of(path: Path) -> str | None:
    """The suffix that says how a file is read, e.g. ".jsonl.gz"; None if it is of no known kind."""
    return next((suffix for suffix in FORMATS if path.name.lower().endswith(suffix)), None)


def format_of(path: Path) -> Format:
    if suffix := suffix_of(path):
        return FORMATS[suffix]
    hint = "; write one object per line: jq -c '.[]' FILE.json > FILE.jsonl" if path.suffix == ".json" else ""
    raise UserError(f"{path}: only {', '.join(FORMATS)} files are read{hint}")


def check(path: Path) -> None:
    """Look at the beginning of a file; raises UserError if it is empty, binary or not what its name says."""
    kind = format_of(path)
    try:
        if path.stat().st_size == 0:
            raise UserError(f"{path} is empty")
        if kind.open is None:
            return
        with _damage_named(path, 1), kind.open(path) as file:
            head = file.read(1 << 16)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    if not head.strip():
        raise UserError(f"{path} is empty")
    if head[:2] == b"\x1f\x8b" or head[:4] == b"\x28\xb5\x2f\xfd":
        raise UserError(f"{path} is compressed: name it .jsonl.gz or .jsonl.zst")
    if b"\0" in head:
        raise UserError(f"{path} is a binary file (or UTF-16 text); JSON lines or text in UTF-8 is expected")


def payloads(path: Path) -> Iterator[tuple[int, Any]]:
    """(line, payload) of every row of a file, undecoded: bytes, or for parquet a dictionary. Blank lines are no rows.

    A payload may be a BadRow, which `parse` raises. A damaged archive is a UserError that names the line reached.
    """
    return format_of(path).payloads(path)


def parse(path: Path, payload: Any) -> dict[str, Any]:
    """The row in a payload; raises BadRow with the reason."""
    if isinstance(payload, BadRow):
        raise payload
    if isinstance(payload, dict):
        return payload
    try:
        text = payload.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRow(f"invalid UTF-8 at byte {error.start} (Chinese in GBK? iconv -f GB18030 -t UTF-8)") from None
    if format_of(path).plain:
        return {"text": text}
    try:
        row = parse_json(text)
    except ValueError as error:
        raise BadRow(f"corrupt JSON ({error})") from None
    if not isinstance(row, dict):
        raise BadRow(f"the line holds {json_type(row)}, not an object")
    return row


def json_type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number",
             float: "a number", type(None): "null"}
    return names.get(type(value), type(value).__name__)


@dataclass(frozen=True)
class Format:
    payloads: Callable[[Path], Iterator[tuple[int, Any]]]
    open: Callable[[Path], BinaryIO] | None       # None: not a stream of bytes
    plain: bool = False                           # text itself, not JSON


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    line = 0
    with format_of(path).open(path) as file:
        while True:
            line += 1
            with _damage_named(path, line):
                data = file.readline(MAX_LINE_BYTES)
                whole = len(data) < MAX_LINE_BYTES or data.endswith(b"\n")
                while not whole:                                              # skip what remains of the line
                    rest = file.readline(MAX_LINE_BYTES)
                    whole = not rest or rest.endswith(b"\n")
                    data = None
            if data is None:
                yield line, BadRow(f"the line is longer than {MAX_LINE_BYTES >> 20} MiB")
                continue
            if not data:
                return
            if line == 1:
                data = data.removeprefix(b"\xef\xbb\xbf")                     # byte order mark
            if data.strip():
                yield line, data


def _text_pieces(path: Path) -> Iterator[tuple[int, bytes]]:
    """A text file as documents of about TEXT_PIECE_BYTES: cut at the first blank line after that size, at any line
    end after twice, and inside a line (never inside a character) after four times that size."""
    piece, first, line, whole = bytearray(), 1, 0, True
    with open(path, "rb") as file:
        if file.read(3) != b"\xef\xbb\xbf":
            file.seek(0)
        while data := file.readline(TEXT_PIECE_BYTES):
            line += whole
            whole = data.endswith(b"\n")
            first = first if piece else line
            ends = data.strip() == DOCUMENT_END
            piece += b"" if ends else data
            size = len(piece)
            if size > TEXT_PIECE_BYTES:
                ends |= whole and not data.strip() or whole and size > 2 * TEXT_PIECE_BYTES
            rest = b""
            if not ends and size > 4 * TEXT_PIECE_BYTES:
                cut = _character_end(piece)
                rest, piece, ends = piece[cut:], piece[:cut], True
            if ends:
                if piece.strip():
                    yield first, bytes(piece)
                piece, first = bytearray(rest), line
        if piece.strip():
            yield first, bytes(piece)


def _character_end(data: bytearray) -> int:
    """The length of `data` without a UTF-8 character that its end may have cut."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte < 0x80:
            return len(data)
        if byte >= 0xC0:
            needed = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(data) - back if back < needed else len(data)
    return len(data)


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: reading parquet needs pyarrow: {install('pyarrow')}") from None
    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 18) as file:
            line = 0
            for group in range(file.metadata.num_row_groups):
                for batch in file.iter_batches(_rows_at_once(file, group), row_groups=[group]):
                    for at in range(0, batch.num_rows, 16):
                        for row in batch.slice(at, 16).to_pylist():
                            line += 1
                            yield line, _without_nulls(row)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a readable parquet file: {error}") from None


def _rows_at_once(file: Any, group: int) -> int:
    """So many rows that about a megabyte is decoded at a time. The metadata count a text that many rows share once, so
    a few rows are looked at as well."""
    about = file.metadata.row_group(group)
    first = next(file.iter_batches(8, row_groups=[group]), None)
    decoded = first.nbytes / first.num_rows if first is not None and first.num_rows else 0
    row_bytes = max(1, decoded, about.total_byte_size / max(1, about.num_rows))
    return min(1024, 1 + int((1 << 20) / row_bytes))


def _without_nulls(value: Any) -> Any:
    """Columns must exist in every row, so an absent key comes back as null: take those out again."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _open_gzip(path: Path) -> BinaryIO:
    return io.BufferedReader(gzip.open(path, "rb"), 1 << 18)


def _open_zstd(path: Path) -> BinaryIO:
    try:
        import zstandard
    except ImportError:
        raise UserError(f"{path}: reading .zst needs zstandard: {install('zstandard')}") from None
    return io.BufferedReader(_ZstdReader(path, zstandard.ZstdDecompressor), 1 << 18)


class _ZstdReader(io.RawIOBase):
    """Frames of zstd one after another; unlike the library's own reader it notices a truncated file."""

    def __init__(self, path: Path, decompressor: Callable) -> None:
        self.file, self.new = open(path, "rb"), decompressor
        self.frame, self.left, self.ready = None, b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self.ready:
            data = self.left or self.file.read(1 << 17)
            if not data:
                if self.frame is not None:
                    raise EOFError("the last frame is incomplete")
                return 0
            self.frame = self.frame or self.new().decompressobj()
            self.left = b""
            try:
                self.ready = self.frame.decompress(data)
            except Exception as error:                    # zstandard.ZstdError: not importable without the extra
                raise zlib.error(str(error)) from None
            if self.frame.eof:
                self.left, self.frame = self.frame.unused_data, None
        n = min(len(buffer), len(self.ready))
        buffer[:n], self.ready = self.ready[:n], self.ready[n:]
        return n

    def close(self) -> None:
        self.file.close()
        super().close()


class _damage_named:
    """Turns what a damaged archive raises into a UserError with file and line."""

    def __init__(self, path: Path, line: int) -> None:
        self.path, self.line = path, line

    def __enter__(self) -> None: ...

    def __exit__(self, kind, error, trace) -> None:
        if isinstance(error, (EOFError, zlib.error, gzip.BadGzipFile)):
            raise UserError(f"{self.path}:{self.line}: the compressed file is truncated or damaged ({error}); "
                            "fetch it again") from None


FORMATS: dict[str, Format] = {
    ".jsonl": Format(_json_lines, lambda path: open(path, "rb")),
    ".jsonl.gz": Format(_json_lines, _open_gzip),
    ".jsonl.zst": Format(_json_lines, _open_zstd),
    ".parquet": Format(_parquet_rows, None),
    ".txt": Format(_text_pieces, lambda path: open(path, "rb"), plain=True),
}
