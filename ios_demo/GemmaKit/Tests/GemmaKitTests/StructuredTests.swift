import Foundation
import XCTest

@testable import GemmaKit

/// Runs the cases that Kotlin and Swift share.
final class StructuredTests: XCTestCase {
    private func each(_ name: String, _ check: (JSONFields) throws -> Void) throws {
        _ = try json(data.appendingPathComponent("schema_cases.json")).of(name).list(check)
    }

    func testJSONIsParsedStrictlyAndSurvivesARoundTrip() throws {
        try each("parse") { item in
            let text = try item.of("text").string()
            guard try item.of("ok").boolean() else {
                XCTAssertThrowsError(try parseJSON(text), text) { XCTAssertTrue($0 is GemmaError) }
                return
            }
            let value = try parseJSON(text)
            XCTAssertEqual(try parseJSON(value.write()), value)
        }
    }

    func testJSONIsExtractedFromTheTextAroundIt() throws {
        try each("extract") { item in
            let expected = try item.orNil("json").map { try parseJSON($0.string()) }
            XCTAssertEqual(extractJSON(try item.of("text").string()), expected)
        }
    }

    func testValidationReportsThePathOfEachViolation() throws {
        try each("validate") { group in
            let schema = try Schema(group.of("schema").value)
            _ = try group.of("cases").list { item in
                let paths = Set(schema.validate(try item.of("json").value).map(\.path)).sorted()
                let expected = try item.of("paths").list { try $0.string() }
                XCTAssertEqual(paths, expected)
            }
        }
    }

    func testASchemaWithAnUnsupportedKeywordOrAWrongValueIsRefusedByName() throws {
        try each("refuse") { item in
            let name = try item.of("names").string()
            XCTAssertThrowsError(try Schema(item.of("schema").value)) { error in
                XCTAssertTrue((error as? GemmaError)?.message.contains(name) == true, "\(error)")
            }
        }
    }

    func testTheExampleSchemaIsValid() throws {
        let schema = try Schema(exampleSchema)
        XCTAssertEqual(schema.validate(try parseJSON(#"{"answer": "yes", "confidence": 0.5}"#)), [])
        XCTAssertEqual(try Schema(schema.description).description, schema.description)
    }

    func testAnyTextEitherParsesOrThrows() throws {
        var random = SeededRandom(state: 3)
        let letters = Array("{}[]\",:0123.eE+-truefalsn\\u\0 😀")
        for _ in 0..<10_000 {
            let length = Int.random(in: 0..<24, using: &random)
            let text = String((0..<length).map { _ in letters.randomElement(using: &random) ?? " " })
            do { _ = try parseJSON(text) } catch is GemmaError {}
        }
        XCTAssertThrowsError(try parseJSON(String(repeating: "[", count: 1_000_000)))
    }

    func testStringsAreComparedByUnicodeScalars() throws {
        let value = try parseJSON("{\"\u{E9}\": 1, \"e\u{301}\": 2}")
        XCTAssertEqual(try Schema(#"{"required": ["e\#u{301}"]}"#).validate(value), [])
        XCTAssertFalse(try Schema("{\"enum\": [\"\u{E9}\"]}").validate(.string("e\u{301}")).isEmpty)
    }
}

final class MeasureTests: XCTestCase {
    func testLatencyFollowsTheClock() {
        var now: UInt64 = 0
        var meter = LatencyMeter { now }
        meter.startLoad()
        now += 2_000_000_000
        meter.loaded()
        XCTAssertNil(meter.latency.tokensPerSecond)
        meter.start()
        now += 500_000_000
        meter.token()
        for _ in 0..<19 {
            now += 100_000_000
            meter.token()
        }
        now += 300_000_000
        meter.token()
        let latency = meter.latency
        XCTAssertEqual([latency.loadMs, latency.firstTokenMs], [2000, 500])
        XCTAssertEqual(latency.tokensPerSecond ?? 0, 1000 * 20 / 2200, accuracy: 1e-6)
        XCTAssertEqual(latency.tokenP95Ms ?? 0, 110, accuracy: 1e-6)
        XCTAssertEqual(latency.tokens, 21)
    }

    func testTheDigestIsSHA256() {
        var digest = Digest()
        digest.update(Data("abc".utf8))
        XCTAssertEqual(digest.finish(), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
    }
}
