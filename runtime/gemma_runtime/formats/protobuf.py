"""Reads Protocol Buffers' wire format without a schema, as far as we need it: no groups.

https://protobuf.dev/programming-guides/encoding/
"""

from collections.abc import Iterator

_VARINT, _EIGHT_BYTES, _BYTES, _FOUR_BYTES = 0, 1, 2, 5
_MAX_VARINT_BYTES = 10


class Damaged(ValueError):
    """The bytes are not a valid message, or a field has the wrong type."""


class ProtoMessage:
    """A message's fields by number. A missing field reads as 0, b"" or an empty message."""

    __slots__ = ("_fields",)

    def __init__(self, data: bytes) -> None:
        """Raises Damaged if the bytes are not a message."""
        self._fields = _split(data)

    def __contains__(self, field: int) -> bool:
        return field in self._fields

    def number(self, field: int) -> int:
        value = self._last(field, 0)
        if not isinstance(value, int):
            raise Damaged(f"field {field} is not a number")
        return value

    def data(self, field: int) -> bytes:
        value = self._last(field, b"")
        if not isinstance(value, bytes):
            raise Damaged(f"field {field} is a number, expected bytes")
        return value

    def text(self, field: int) -> str:
        return _decoded(self.data(field), field)

    def texts(self, field: int) -> list[str]:
        """A repeated field of strings."""
        return [_decoded(value, field) for value in self.every(field)]

    def message(self, field: int) -> "ProtoMessage":
        return ProtoMessage(self.data(field))

    def every(self, field: int) -> Iterator[bytes]:
        """The values of a repeated field of bytes, strings or messages."""
        for value in self._fields.get(field, ()):
            if not isinstance(value, bytes):
                raise Damaged(f"field {field} is a number, expected bytes")
            yield value

    def messages(self, field: int) -> Iterator["ProtoMessage"]:
        return map(ProtoMessage, self.every(field))

    def numbers(self, field: int) -> list[int]:
        """A repeated field of integers, packed or not."""
        numbers: list[int] = []
        for value in self._fields.get(field, ()):
            numbers += [value] if isinstance(value, int) else _varints(value)
        return numbers

    def mapping(self, field: int) -> dict[str, bytes]:
        """A map from strings to serialized messages."""
        return {entry.text(1): entry.data(2) for entry in self.messages(field)}

    def _last(self, field: int, default: int | bytes) -> int | bytes:
        return self._fields[field][-1] if field in self._fields else default


def _decoded(data: bytes, field: int) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise Damaged(f"field {field} is not a UTF-8 string") from error


def _split(data: bytes) -> dict[int, list[int | bytes]]:
    fields: dict[int, list[int | bytes]] = {}
    offset, end = 0, len(data)
    value: int | bytes
    while offset < end:
        tag, offset = _varint(data, offset)
        kind = tag & 7
        if kind == _VARINT:
            value, offset = _varint(data, offset)
        else:
            length = 4 if kind == _FOUR_BYTES else 8
            if kind == _BYTES:
                length, offset = _varint(data, offset)
            elif kind not in (_EIGHT_BYTES, _FOUR_BYTES):
                raise Damaged(f"wire type {kind} is unknown")
            if length > end - offset:
                raise Damaged(f"a field has {length} bytes, but only {end - offset} are left")
            value = data[offset : offset + length]
            offset += length
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def _varint(data: bytes, offset: int) -> tuple[int, int]:
    """A number of seven bits per byte, and the offset behind it."""
    value = shift = 0
    for byte in data[offset : offset + _MAX_VARINT_BYTES]:
        value |= (byte & 0x7F) << shift
        offset += 1
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, offset
        shift += 7
    raise Damaged("a varint does not end")


def _varints(data: bytes) -> list[int]:
    values, offset = [], 0
    while offset < len(data):
        value, offset = _varint(data, offset)
        values.append(value)
    return values
