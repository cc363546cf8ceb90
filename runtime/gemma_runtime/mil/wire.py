"""Protocol Buffers' wire format, as far as a Core ML model needs it: no schema, no package.

https://protobuf.dev/programming-guides/encoding/
"""

from collections.abc import Iterator

_VARINT, _EIGHT_BYTES, _BYTES, _FOUR_BYTES = 0, 1, 2, 5
_MAX_VARINT_BYTES = 10


class Damaged(ValueError):
    """The bytes are no message, or hold something else where a field is expected."""


class Message:
    """A message's fields by number. One that is absent has the default of its kind."""

    __slots__ = ("_fields",)

    def __init__(self, data: bytes) -> None:
        """Raises Damaged for bytes that are no message."""
        self._fields = _split(data)

    def __contains__(self, field: int) -> bool:
        return field in self._fields

    def number(self, field: int) -> int:
        value = self._last(field, 0)
        if not isinstance(value, int):
            raise Damaged(f"field {field} is no number")
        return value

    def data(self, field: int) -> bytes:
        value = self._last(field, b"")
        if not isinstance(value, bytes):
            raise Damaged(f"field {field} is a number")
        return value

    def text(self, field: int) -> str:
        return _decoded(self.data(field), field)

    def texts(self, field: int) -> list[str]:
        """A repeated field of texts."""
        return [_decoded(value, field) for value in self.every(field)]

    def message(self, field: int) -> "Message":
        return Message(self.data(field))

    def every(self, field: int) -> Iterator[bytes]:
        """Each value of a repeated field of bytes, texts or messages."""
        for value in self._fields.get(field, ()):
            if not isinstance(value, bytes):
                raise Damaged(f"field {field} is a number")
            yield value

    def messages(self, field: int) -> Iterator["Message"]:
        return map(Message, self.every(field))

    def numbers(self, field: int) -> list[int]:
        """A repeated field of whole numbers, packed or not."""
        found: list[int] = []
        for value in self._fields.get(field, ()):
            found += [value] if isinstance(value, int) else _varints(value)
        return found

    def mapping(self, field: int) -> dict[str, bytes]:
        """A map from text to messages."""
        return {entry.text(1): entry.data(2) for entry in self.messages(field)}

    def _last(self, field: int, default: int | bytes) -> int | bytes:
        return self._fields[field][-1] if field in self._fields else default


def _decoded(data: bytes, field: int) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise Damaged(f"field {field} is no text") from error


def _split(data: bytes) -> dict[int, list[int | bytes]]:
    fields: dict[int, list[int | bytes]] = {}
    place, end = 0, len(data)
    value: int | bytes
    while place < end:
        tag, place = _varint(data, place)
        kind = tag & 7
        if kind == _VARINT:
            value, place = _varint(data, place)
        else:
            length = 4 if kind == _FOUR_BYTES else 8
            if kind == _BYTES:
                length, place = _varint(data, place)
            elif kind not in (_EIGHT_BYTES, _FOUR_BYTES):
                raise Damaged(f"no wire type {kind}")
            if length > end - place:
                raise Damaged(f"{length} bytes expected where {end - place} are left")
            value = data[place : place + length]
            place += length
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """A number of seven bits per byte, and the place behind it."""
    value = shift = 0
    for byte in data[place : place + _MAX_VARINT_BYTES]:
        value |= (byte & 0x7F) << shift
        place += 1
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, place
        shift += 7
    raise Damaged("a number has no end")


def _varints(data: bytes) -> list[int]:
    found, place = [], 0
    while place < len(data):
        value, place = _varint(data, place)
        found.append(value)
    return found
