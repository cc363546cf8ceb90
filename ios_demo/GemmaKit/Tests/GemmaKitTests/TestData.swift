import Foundation
import XCTest

@testable import GemmaKit

/// The folder `tests/data` of the repository.
let data = URL(fileURLWithPath: #filePath).pathComponents.dropLast(5).reduce(URL(fileURLWithPath: "/")) {
    $1 == "/" ? $0 : $0.appendingPathComponent($1)
}.appendingPathComponent("tests/data")
let tiny = data.appendingPathComponent("tiny")

func json(_ path: URL) throws -> JSONFields { try JSONFields.parse(file: path.lastPathComponent, Data(contentsOf: path)) }

func vectors() throws -> JSONFields { try json(data.appendingPathComponent("phone_vectors.json")) }

func tinyTokenizer() throws -> Tokenizer { try Tokenizer(Data(contentsOf: tiny.appendingPathComponent("tokenizer.gtok"))) }

func tinyVoice() throws -> Voice {
    let format = try ChatFormat(Data(contentsOf: tiny.appendingPathComponent("chat.json")))
    return Voice(tokenizer: try tinyTokenizer(), format: format, bosToken: 2, stopTokens: [1, 5])
}

extension JSONFields {
    func ints() throws -> [Int] { try list { try $0.count() } }
}

extension Array where Element == String {
    /// Scalar by scalar.
    var scalars: [[UInt32]] { map { $0.unicodeScalars.map(\.value) } }
}

/// A session without a model: it follows a function from the tokens so far to the next token.
final class ScriptedSession: Session {
    let contextLength: Int
    private let script: ([Int]) -> Int
    private(set) var tokens: [Int] = []
    private(set) var fed: [[Int]] = []  // by call

    init(contextLength: Int = 4096, _ script: @escaping ([Int]) -> Int) {
        self.contextLength = contextLength
        self.script = script
    }

    /// Says these replies, one after the other, each ended by `<end_of_turn>`.
    static func saying(_ replies: String..., tokenizer: Tokenizer) throws -> ScriptedSession {
        var said = try replies.flatMap { try tokenizer.encode($0) + [5] }
        return ScriptedSession { _ in said.removeFirst() }
    }

    var position: Int { tokens.count }

    func prefill(_ new: [Int]) throws -> [Float] {
        try checkRoom(position, new.count, contextLength)
        fed.append(new)
        tokens += new
        var logits = [Float](repeating: 0, count: 400)
        logits[script(tokens)] = 1
        return logits
    }

    func score(_ tokens: [Int]) throws -> [[Float]] { try tokens.map { try prefill([$0]) } }

    func reset() {
        tokens = []
    }
}

/// The Python runtime's session of the tiny bundle, behind two named pipes.
final class BridgeEngine: Engine {
    let givesEveryRow = true
    private let vocabSize: Int
    private let questions: FileHandle
    private let answers: FileHandle

    init(vocabSize: Int) throws {
        self.vocabSize = vocabSize
        guard let folder = ProcessInfo.processInfo.environment["GEMMA_BRIDGE"] else {
            throw XCTSkip("no bridge to the Python runtime is named, so no real model answers")
        }
        questions = try XCTUnwrap(FileHandle(forWritingAtPath: folder + "/questions"))
        answers = try XCTUnwrap(FileHandle(forReadingAtPath: folder + "/answers"))
    }

    func run(_ tokens: [Int], position: Int, rows: Int) throws -> [[Float]] {
        let line = ([position, rows] + tokens).map(String.init).joined(separator: " ") + "\n"
        try questions.write(contentsOf: Data(line.utf8))
        var answer = Data()
        while answer.last != UInt8(ascii: "\n") {
            let part = answers.availableData  // what is there: read(upToCount:) waits for all of it
            if part.isEmpty { throw GemmaError.session("the bridge ended") }
            answer += part
        }
        let bytes = try XCTUnwrap(Data(base64Encoded: answer.dropLast()))
        let floats = bytes.withUnsafeBytes { Array($0.bindMemory(to: Float.self)) }
        return (0..<rows).map { Array(floats[$0 * vocabSize..<($0 + 1) * vocabSize]) }
    }
}
