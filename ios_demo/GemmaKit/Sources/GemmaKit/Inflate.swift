/// Unpacks a raw DEFLATE stream (RFC 1951) piece by piece, with 64 KB of output at a time.
struct Inflate {
    private var bits: Bits
    private var window = [UInt8](repeating: 0, count: 2 * windowSize)
    private var end = 0  // of the output in the window
    private var flushed = 0
    private let write: ([UInt8]) throws -> Void

    /// `read` returns the next bytes of the packed data, nothing at its end.
    init(read: @escaping () throws -> [UInt8], write: @escaping ([UInt8]) throws -> Void) {
        bits = Bits(read: read)
        self.write = write
    }

    /// Unpacks to the end of the stream; throws a bundle error if it is damaged.
    mutating func run() throws {
        var isLast = false
        while !isLast {
            isLast = try bits.take(1) == 1
            switch try bits.take(2) {
            case 0: try copyStored()
            case 1: try unpack(fixedLiterals, fixedDistances)
            case 2:
                let (literals, distances) = try readCodes()
                try unpack(literals, distances)
            default: throw damagedZip("a block has an unknown kind")
            }
        }
        try flush()
    }

    private mutating func copyStored() throws {
        bits.skipToByte()
        let count = try bits.take(16)
        guard try bits.take(16) == ~count & 0xFFFF else { throw damagedZip("a stored block has a wrong length") }
        for _ in 0..<count { try put(UInt8(bits.take(8))) }
    }

    private mutating func unpack(_ literals: Huffman, _ distances: Huffman) throws {
        while true {
            let symbol = try bits.decode(literals)
            if symbol < 256 {
                try put(UInt8(symbol))
            } else if symbol == 256 {
                return
            } else {
                guard symbol < 286 else { throw damagedZip("a length is unknown") }
                let length = lengthBases[symbol - 257] + (try bits.take(lengthBits[symbol - 257]))
                let code = try bits.decode(distances)
                guard code < 30 else { throw damagedZip("a distance is unknown") }
                try copy(length, from: distanceBases[code] + (try bits.take(distanceBits[code])))
            }
        }
    }

    private mutating func put(_ byte: UInt8) throws {
        if end == window.count { try slide() }
        window[end] = byte
        end += 1
    }

    private mutating func copy(_ length: Int, from distance: Int) throws {
        guard distance <= end else { throw damagedZip("it refers to data before its beginning") }
        for _ in 0..<length { try put(window[end - distance]) }
    }

    /// Writes what is new, and keeps the last 32 KB, which later data may refer to.
    private mutating func slide() throws {
        try flush()
        window.withUnsafeMutableBufferPointer { buffer in
            for index in 0..<windowSize { buffer[index] = buffer[windowSize + index] }
        }
        end = windowSize
        flushed = windowSize
    }

    private mutating func flush() throws {
        if flushed < end { try write(Array(window[flushed..<end])) }
        flushed = end
    }

    private mutating func readCodes() throws -> (Huffman, Huffman) {
        let (literals, distances, count) = (try bits.take(5) + 257, try bits.take(5) + 1, try bits.take(4) + 4)
        var lengths = [Int](repeating: 0, count: 19)
        for index in 0..<count { lengths[lengthOrder[index]] = try bits.take(3) }
        let codes = try Huffman(lengths)
        var all: [Int] = []
        while all.count < literals + distances {
            let symbol = try bits.decode(codes)
            switch symbol {
            case 0...15: all.append(symbol)
            case 16:
                guard let last = all.last else { throw damagedZip("it repeats a length before the first") }
                all += [Int](repeating: last, count: 3 + (try bits.take(2)))
            case 17: all += [Int](repeating: 0, count: 3 + (try bits.take(3)))
            default: all += [Int](repeating: 0, count: 11 + (try bits.take(7)))
            }
        }
        guard all.count == literals + distances else { throw damagedZip("it has too many lengths of codes") }
        return (try Huffman(Array(all[..<literals])), try Huffman(Array(all[literals...])))
    }
}

func damagedZip(_ what: String) -> GemmaError {
    .bundle("the zip file is damaged: \(what); zip the bundle's folder again")
}

private let windowSize = 1 << 15
private let lengthOrder = [16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15]
private let lengthBits = [0, 0, 0, 0, 0, 0, 0, 0] + (1...5).flatMap { [$0, $0, $0, $0] } + [0]
private let lengthBases = bases(from: 3, Array(lengthBits.dropLast())) + [258]
private let distanceBits = [0, 0] + (0...13).flatMap { [$0, $0] }
private let distanceBases = bases(from: 1, distanceBits)
private let fixedLiterals = fixedCodes(
    [Int](repeating: 8, count: 144) + [Int](repeating: 9, count: 112) + [Int](repeating: 7, count: 24)
        + [Int](repeating: 8, count: 8))
private let fixedDistances = fixedCodes([Int](repeating: 5, count: 32))

private func bases(from first: Int, _ bits: [Int]) -> [Int] {
    bits.dropLast().reduce(into: [first]) { bases, count in bases.append((bases.last ?? first) + 1 << count) }
}

private func fixedCodes(_ lengths: [Int]) -> Huffman {
    guard let codes = try? Huffman(lengths) else { fatalError("the fixed codes of RFC 1951 are complete") }
    return codes
}

/// Canonical codes: `counts` of codes by length, and the symbols in the order of their codes.
private struct Huffman {
    let counts: [Int]
    let symbols: [Int]

    init(_ lengths: [Int]) throws {
        var counts = [Int](repeating: 0, count: 16)
        for length in lengths { counts[length] += 1 }
        counts[0] = 0
        var left = 1  // codes that are not taken
        for length in 1...15 {
            left = 2 * left - counts[length]
            guard left >= 0 else { throw damagedZip("its codes are ambiguous") }
        }
        self.counts = counts
        symbols = lengths.indices.filter { lengths[$0] > 0 }
            .sorted { lengths[$0] != lengths[$1] ? lengths[$0] < lengths[$1] : $0 < $1 }
    }
}

/// Reads bits from the lowest of each byte on.
private struct Bits {
    private let read: () throws -> [UInt8]
    private var block: [UInt8] = []
    private var at = 0
    private var held = 0
    private var count = 0  // bits that are held

    init(read: @escaping () throws -> [UInt8]) {
        self.read = read
    }

    mutating func take(_ wanted: Int) throws -> Int {
        while count < wanted {
            held |= Int(try nextByte()) << count
            count += 8
        }
        defer {
            held >>= wanted
            count -= wanted
        }
        return held & (1 << wanted - 1)
    }

    mutating func skipToByte() {
        held >>= count % 8
        count -= count % 8
    }

    mutating func decode(_ codes: Huffman) throws -> Int {
        var (code, first, index) = (0, 0, 0)
        for length in 1...15 {
            code |= try take(1)
            let count = codes.counts[length]
            if code - first < count { return codes.symbols[index + code - first] }
            index += count
            first = (first + count) << 1
            code <<= 1
        }
        throw damagedZip("it has an unknown code")
    }

    private mutating func nextByte() throws -> UInt8 {
        if at == block.count {
            block = try read()
            at = 0
            guard !block.isEmpty else { throw damagedZip("its data ends too early") }
        }
        at += 1
        return block[at - 1]
    }
}
