import Foundation

/// A zip file of any size (zip64), opened by its directory at the end. Entries are stored or deflated.
final class Zip {
    struct Entry: Equatable {
        let name: String
        let isDeflated: Bool
        let isEncrypted: Bool
        let packedBytes: Int
        let bytes: Int
        let offset: Int  // of its local header
    }

    let entries: [String: Entry]
    private let file: FileHandle
    private let length: Int

    init(_ path: URL) throws {
        do {
            file = try FileHandle(forReadingFrom: path)
            length = Int(try file.seekToEnd())
        } catch {
            throw GemmaError.bundle("\(path.lastPathComponent) can't be read; choose it again")
        }
        var entries: [String: Entry] = [:]
        for entry in try readDirectory(file, length) {
            guard entries.updateValue(entry, forKey: entry.name) == nil else {
                throw damagedZip("it has \"\(entry.name)\" twice")
            }
        }
        self.entries = entries
    }

    deinit { try? file.close() }

    /// Unpacks an entry, piece by piece; throws a bundle error if it is damaged or has other than its stated size.
    func unpack(_ entry: Entry, write: @escaping (Data) throws -> Void) throws {
        guard !entry.isEncrypted else {
            throw GemmaError.bundle("the zip file is encrypted; zip the bundle's folder without a password")
        }
        var left = entry.packedBytes
        var at = try dataOffset(entry)
        let read = { [file] () throws -> [UInt8] in
            try Task.checkCancellation()
            let block = try readBytes(file, at, min(left, 1 << 18))
            at += block.count
            left -= block.count
            return block
        }
        var written = 0
        let checked = { (bytes: [UInt8]) throws in
            written += bytes.count
            guard written <= entry.bytes else { throw damagedZip("\(entry.name) is larger than it says") }
            try write(Data(bytes))
        }
        if entry.isDeflated {
            var inflate = Inflate(read: read, write: checked)
            try inflate.run()
        } else {
            while left > 0 { try checked(read()) }
        }
        guard written == entry.bytes else { throw damagedZip("\(entry.name) is smaller than it says") }
    }

    private func dataOffset(_ entry: Entry) throws -> Int {
        var header = Fields(try readBytes(file, entry.offset, 30))
        guard header.number(4) == 0x0403_4B50 else { throw damagedZip("\(entry.name) has no header") }
        header.skip(22)
        return entry.offset + 30 + header.number(2) + header.number(2)
    }
}

/// Reads numbers in sequence, little-endian; 0 past the end.
private struct Fields {
    private let bytes: [UInt8]
    private var at = 0

    init(_ bytes: [UInt8]) {
        self.bytes = bytes
    }

    var isAtEnd: Bool { at >= bytes.count }

    mutating func number(_ size: Int) -> Int {
        defer { at += size }
        var number: UInt64 = 0
        for index in (0..<size).reversed() {
            number <<= 8
            if at + index < bytes.count { number |= UInt64(bytes[at + index]) }
        }
        return Int(clamping: number)
    }

    mutating func skip(_ count: Int) {
        at += count
    }

    mutating func take(_ count: Int) -> [UInt8] {
        defer { at += count }
        return Array(bytes.dropFirst(at).prefix(count))
    }
}

/// Exactly `count` bytes; throws a bundle error if they are not all there.
private func readBytes(_ file: FileHandle, _ offset: Int, _ count: Int) throws -> [UInt8] {
    guard offset >= 0, count >= 0 else { throw damagedZip("it points outside of itself") }
    let bytes: Data?
    do {
        try file.seek(toOffset: UInt64(offset))
        bytes = count == 0 ? Data() : try file.read(upToCount: count)
    } catch {
        throw damagedZip("it can't be read: \(error.localizedDescription)")
    }
    guard let bytes, bytes.count == count else { throw damagedZip("it ends too early") }
    return Array(bytes)
}

private func readDirectory(_ file: FileHandle, _ length: Int) throws -> [Zip.Entry] {
    let (offset, size, count) = try findDirectory(file, length)
    guard offset <= length, size <= length - offset else { throw damagedZip("its directory is outside of it") }
    var fields = Fields(try readBytes(file, offset, size))
    var entries: [Zip.Entry] = []
    while !fields.isAtEnd { entries.append(try readEntry(&fields)) }
    guard entries.count == count else { throw damagedZip("its directory has \(entries.count) of \(count) entries") }
    return entries
}

/// Where the directory is, its bytes and its number of entries.
private func findDirectory(_ file: FileHandle, _ length: Int) throws -> (offset: Int, size: Int, count: Int) {
    let tailLength = min(length, 22 + 0xFFFF)  // the last record may end in a comment
    let tail = try readBytes(file, length - tailLength, tailLength)
    let mark: [UInt8] = [0x50, 0x4B, 5, 6]
    guard tail.count >= 22, let start = (0...tail.count - 22).last(where: { tail[$0..<$0 + 4].elementsEqual(mark) }) else {
        throw GemmaError.bundle("the file is not a zip file; zip the bundle's folder, or choose the folder itself")
    }
    var end = Fields(Array(tail[start...]))
    end.skip(10)
    let (count, size, offset) = (end.number(2), end.number(4), end.number(4))
    guard count == 0xFFFF || size == 0xFFFF_FFFF || offset == 0xFFFF_FFFF else { return (offset, size, count) }
    var locator = Fields(try readBytes(file, length - tailLength + start - 20, 20))
    guard locator.number(4) == 0x0706_4B50 else { throw damagedZip("its large directory is missing") }
    locator.skip(4)
    var large = Fields(try readBytes(file, locator.number(8), 56))
    guard large.number(4) == 0x0606_4B50 else { throw damagedZip("its large directory is missing") }
    large.skip(28)
    let (largeCount, largeSize, largeOffset) = (large.number(8), large.number(8), large.number(8))
    return (largeOffset, largeSize, largeCount)
}

private func readEntry(_ fields: inout Fields) throws -> Zip.Entry {
    guard fields.number(4) == 0x0201_4B50 else { throw damagedZip("its directory has an entry that is none") }
    fields.skip(4)
    let (flags, method) = (fields.number(2), fields.number(2))
    fields.skip(8)
    var (packed, bytes) = (fields.number(4), fields.number(4))
    let (nameLength, extraLength, commentLength) = (fields.number(2), fields.number(2), fields.number(2))
    fields.skip(8)
    var offset = fields.number(4)
    guard let name = String(bytes: fields.take(nameLength), encoding: .utf8) else {
        throw damagedZip("a name in it is not UTF-8")
    }
    var extra = Fields(fields.take(extraLength))
    fields.skip(commentLength)
    while !extra.isAtEnd {
        let (kind, length) = (extra.number(2), extra.number(2))
        var large = Fields(extra.take(length))
        guard kind == 1 else { continue }  // zip64: what doesn't fit into 32 bits
        if bytes == 0xFFFF_FFFF { bytes = large.number(8) }
        if packed == 0xFFFF_FFFF { packed = large.number(8) }
        if offset == 0xFFFF_FFFF { offset = large.number(8) }
    }
    guard method == 0 || method == 8 else {
        throw GemmaError.bundle("the zip file packs \(name) by method \(method); zip the folder with `zip -0`")
    }
    return Zip.Entry(
        name: name, isDeflated: method == 8, isEncrypted: flags & 1 != 0, packedBytes: packed, bytes: bytes, offset: offset)
}
