import Foundation
import XCTest

@testable import GemmaKit

func toolVectors() throws -> JSONFields { try json(data.appendingPathComponent("tool_vectors.json")) }

func toolFormats() throws -> [String: ChatFormat] { try toolVectors().of("formats").map { try ChatFormat($0) } }

/// Checks tools against the results of the Python runtime.
final class ToolsTests: XCTestCase {
    func testNumbersAreWrittenAsPythonWritesThem() throws {
        _ = try toolVectors().of("numbers").list { vector in
            let text = try vector.of("json").string()
            XCTAssertEqual(try parseJSON(text).pythonJSON(), try vector.of("python").string(), text)
        }
    }

    func testToolsAreWrittenIntoTheDocumentedPromptAsPythonDoes() throws {
        guard case .prompt(let prompt)? = try toolFormats()["gemma2"]?.tools else { return XCTFail("it has no prompt") }
        _ = try toolVectors().of("prompts").list { vector in
            let turns = withoutTools([Message(.user, "in")], try Tools(vector.of("tools").string()), prompt)
            XCTAssertEqual(Array(turns[0].content.utf8), Array(try vector.of("text").string().utf8))
        }
    }

    func testChatsWithToolsGivePythonsIdsAlsoWhereNamesOfControlTokensAreInToolsCallsAndResults() throws {
        let (formats, tiny, gemma4) = (try toolFormats(), try tinyTokenizer(), try gemma4Codec().tokenizer)
        let checked: [Void] = try toolVectors().of("chats").list { vector in
            let name = try vector.of("format").string()
            let plain = try XCTUnwrap(formats[name])
            let format = try vector.of("thinking").boolean() ? XCTUnwrap(plain.thinking) : plain
            let turns = try vector.of("messages").list(message)
            let tools = try Tools(vector.of("tools").string())
            let ids = try encodeChat(name == "gemma4" ? gemma4 : tiny, format, turns, tools: tools)
            XCTAssertEqual(ids, try vector.of("ids").list { try $0.count() }, vector.value.write())
        }
        XCTAssertGreaterThan(checked.count, 90)
    }

    func testTheCallsInRepliesAreThoseThatPythonFinds() throws {
        let formats = try toolFormats()
        _ = try toolVectors().of("replies").list { vector in
            let text = try vector.of("text").string()
            let found = findCalls(text, ["f", "g"], formats[try vector.of("format").string()]?.tools?.marks)
            XCTAssertEqual(Array(found.text.utf8), Array(try vector.of("rest").string().utf8), text)
            let calls = try vector.of("calls").list { "\(try $0.of("name").string()) \(try $0.of("arguments").string())" }
            XCTAssertEqual(found.calls.map { "\($0.name) \(JSON.object($0.arguments).pythonJSON())" }, calls, text)
        }
    }
}

/// A turn of the vectors, where calls and results are JSON values.
private func message(_ json: JSONFields) throws -> Message {
    let role = try XCTUnwrap(Role(rawValue: json.of("role").string()))
    if role == .tool {
        let call = ToolCall(name: try json.of("name").string(), arguments: JSONObject([]))
        return resultTurn(call, try json.of("result").value)
    }
    let calls = try json.orNil("calls")?.list { call in
        guard case .object(let arguments) = try call.of("arguments").value else { throw call.wrong("an object") }
        return ToolCall(name: try call.of("name").string(), arguments: arguments)
    }
    return Message(
        role, try json.of("content").string(), toolCalls: calls ?? [], thought: try json.orNil("thought")?.string() ?? "")
}
