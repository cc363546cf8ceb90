/// Numbers of at least 0 and below 1 for a `Sampler`: for a seed those of `gemma_runtime`, and so the same tokens.
///
/// It is numpy's PCG64, PCG XSL RR 128/64 after a SeedSequence: https://www.pcg-random.org, NEP 19.
public struct SeededNoise {
    private let increment: Wide
    private var state: Wide

    public init(seed: UInt64) {
        let words = seedWords(seed)
        increment = Wide(high: words[2] << 1 | words[3] >> 63, low: words[3] << 1 | 1)
        state = (increment + Wide(high: words[0], low: words[1])) * multiplier + increment
    }

    public mutating func next() -> Double {
        state = state * multiplier + increment
        let (mixed, turn) = (state.high ^ state.low, state.high >> 58)
        let bits = mixed >> turn | mixed << (64 - turn & 63)
        return Double(bits >> 11) * 0x1p-53
    }
}

/// An unsigned integer of 128 bits; sums and products wrap around.
private struct Wide {
    let high: UInt64
    let low: UInt64

    static func + (a: Wide, b: Wide) -> Wide {
        let (low, carries) = a.low.addingReportingOverflow(b.low)
        return Wide(high: a.high &+ b.high &+ (carries ? 1 : 0), low: low)
    }

    static func * (a: Wide, b: Wide) -> Wide {
        let product = a.low.multipliedFullWidth(by: b.low)
        return Wide(high: product.high &+ a.high &* b.low &+ a.low &* b.high, low: product.low)
    }
}

private let multiplier = Wide(high: 0x2360_ED05_1FC6_5DA4, low: 0x4385_DF64_9FCC_F645)

/// Four words of 64 bits from a seed.
private func seedWords(_ seed: UInt64) -> [UInt64] {
    var constant: UInt32 = 0x43B0_D7E5
    func hashed(_ word: UInt32) -> UInt32 {
        var value = word ^ constant
        constant = constant &* 0x931E_8875
        value = value &* constant
        return value ^ value >> 16
    }
    func mixed(_ x: UInt32, _ y: UInt32) -> UInt32 {
        let value = x &* 0xCA01_F9DD &- y &* 0x4973_F715
        return value ^ value >> 16
    }
    var pool = [UInt32(truncatingIfNeeded: seed), UInt32(truncatingIfNeeded: seed >> 32), 0, 0].map(hashed)
    for source in pool.indices {
        for target in pool.indices where source != target {
            pool[target] = mixed(pool[target], hashed(pool[source]))
        }
    }
    constant = 0x8B51_F9DD
    let halves = (0..<8).map { index in
        var value = pool[index % 4] ^ constant
        constant = constant &* 0x58F3_8DED
        value = value &* constant
        return UInt64(value ^ value >> 16)
    }
    return (0..<4).map { halves[2 * $0] | halves[2 * $0 + 1] << 32 }
}
