import Foundation
import XCTest

@testable import GemmaKit

final class MarkdownTests: XCTestCase {
    func testTextsHaveTheBlocksThatTheSharedCasesListWholeAndWhileTheyAreWritten() throws {
        let cases = try json(data.appendingPathComponent("markdown_cases.json")).of("cases").list { item -> String in
            let text = try item.of("text").string()
            let blocks = parseMarkdown(text, isWhole: try item.of("whole").boolean())
            let expected = try item.of("blocks").list(block)
            XCTAssertEqual(blocks, expected, text)
            XCTAssertEqual(blocks.map(\.text).scalars, expected.map(\.text).scalars, text)
            return text
        }
        XCTAssertGreaterThan(cases.count, 40)
    }

    private func block(_ json: JSONFields) throws -> MarkdownBlock {
        let spans = try json.of("spans").list { span in
            let parts = try span.list { try $0.string() }
            return MarkdownSpan(
                text: parts[1], isBold: parts[0].contains("b"), isItalic: parts[0].contains("i"), isCode: parts[0].contains("c"),
                link: parts[2].isEmpty ? nil : parts[2])
        }
        return MarkdownBlock(
            kind: try XCTUnwrap(MarkdownKind(rawValue: json.of("kind").string())), spans: spans,
            level: try json.orNil("level")?.count() ?? 0, depth: try json.orNil("depth")?.count() ?? 0,
            quote: try json.orNil("quote")?.count() ?? 0, marker: try json.orNil("marker")?.string() ?? "")
    }

    /// With a step that looks back over all that was read, 100,000 markers take minutes.
    func testLongTextsOfMarkersAloneAreReadInLinearTime() {
        let start = Date()
        let markers = [
            "*a ", "**a* ", "_a__*", "[", "[a](", "[a](b ", "![", "`", "`a``", "<", "https://", "| a ", "> ", "- ",
        ]
        for marker in markers {
            let text = String(repeating: marker, count: 100_000 / marker.utf8.count)
            XCTAssertFalse(parseMarkdown(text).isEmpty)
            XCTAssertLessThanOrEqual(parseMarkdown(text, isWhole: false).count, 1)
        }
        XCTAssertLessThan(Date().timeIntervalSince(start), 120)
    }
}
