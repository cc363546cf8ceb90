import Foundation

extension Digest {
    mutating func update(_ data: Data) {
        data.withUnsafeBytes { update($0) }
    }
}

#if canImport(CryptoKit)
import CryptoKit

/// SHA-256.
struct Digest {
    private var hash = SHA256()

    mutating func update(_ bytes: UnsafeRawBufferPointer) {
        hash.update(bufferPointer: bytes)
    }

    mutating func finish() -> String {
        hash.finalize().map { String(format: "%02x", $0) }.joined()
    }
}
#else
/// SHA-256 by FIPS 180-4, for systems without CryptoKit.
struct Digest {
    private var state: [UInt32] = [
        0x6a09_e667, 0xbb67_ae85, 0x3c6e_f372, 0xa54f_f53a, 0x510e_527f, 0x9b05_688c, 0x1f83_d9ab, 0x5be0_cd19,
    ]
    private var pending: [UInt8] = []
    private var length: UInt64 = 0  // bytes

    mutating func update(_ bytes: UnsafeRawBufferPointer) {
        length += UInt64(bytes.count)
        pending += bytes
        var start = 0
        while pending.count - start >= 64 {
            add(pending[start..<start + 64])
            start += 64
        }
        pending.removeFirst(start)
    }

    mutating func finish() -> String {
        let bits = length * 8
        pending.append(0x80)
        while pending.count % 64 != 56 { pending.append(0) }
        pending += (0..<8).map { UInt8(truncatingIfNeeded: bits >> (56 - 8 * UInt64($0))) }
        for start in stride(from: 0, to: pending.count, by: 64) { add(pending[start..<start + 64]) }
        return state.map { String(format: "%08x", $0) }.joined()
    }

    private mutating func add(_ block: ArraySlice<UInt8>) {
        var words = [UInt32](repeating: 0, count: 64)
        for (index, byte) in block.enumerated() { words[index / 4] = words[index / 4] << 8 | UInt32(byte) }
        for index in 16..<64 {
            let (early, late) = (words[index - 15], words[index - 2])
            let first = rotated(early, 7) ^ rotated(early, 18) ^ (early >> 3)
            let second = rotated(late, 17) ^ rotated(late, 19) ^ (late >> 10)
            words[index] = words[index - 16] &+ first &+ words[index - 7] &+ second
        }
        var now = state
        for index in 0..<64 {
            let first = rotated(now[4], 6) ^ rotated(now[4], 11) ^ rotated(now[4], 25)
            let choice = (now[4] & now[5]) ^ (~now[4] & now[6])
            let sum = now[7] &+ first &+ choice &+ constants[index] &+ words[index]
            let second = rotated(now[0], 2) ^ rotated(now[0], 13) ^ rotated(now[0], 22)
            let majority = (now[0] & now[1]) ^ (now[0] & now[2]) ^ (now[1] & now[2])
            now = [sum &+ second &+ majority, now[0], now[1], now[2], now[3] &+ sum, now[4], now[5], now[6]]
        }
        for index in 0..<8 { state[index] = state[index] &+ now[index] }
    }
}

private func rotated(_ word: UInt32, _ bits: UInt32) -> UInt32 { word >> bits | word << (32 - bits) }

/// The first 32 bits of the fractions of the cube roots of the first 64 primes.
private let constants: [UInt32] = (2...311).filter(isPrime).map { prime in
    let target = UInt64(prime)
    var low: UInt64 = 0
    var high: UInt64 = 7 << 32
    while high - low > 1 {  // the largest root with root³ ≤ prime · 2^96
        let middle = (low + high) / 2
        if cubeIsAtMost(middle, target) { low = middle } else { high = middle }
    }
    return UInt32(truncatingIfNeeded: low)
}

private func isPrime(_ number: Int) -> Bool { !(2..<number).contains { number % $0 == 0 } }

/// Whether (root / 2^32)³ ≤ prime, in integers: root < 2^35, so root² and root³ need 70 and 105 bits.
private func cubeIsAtMost(_ root: UInt64, _ prime: UInt64) -> Bool {
    let square = root.multipliedFullWidth(by: root)
    let low = square.low.multipliedFullWidth(by: root)
    let (high, carry) = (square.high &* root).addingReportingOverflow(low.high)
    // root³ = high · 2^64 + low.low; prime · 2^96 = (prime << 32) · 2^64
    return !carry && (high < prime << 32 || (high == prime << 32 && low.low == 0))
}
#endif
