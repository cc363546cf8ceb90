import Foundation
import XCTest

@testable import GemmaKit

private let isOwn = DispatchSpecificKey<Bool>()

final class AsyncWorkTests: XCTestCase {
    /// Waits on its own thread for work in Swift's pool, as an engine of Core AI does.
    private actor Waiting {
        private let thread = OwnThread("test")

        init() { thread.queue.setSpecific(key: isOwn, value: true) }

        nonisolated var unownedExecutor: UnownedSerialExecutor { thread.asUnownedSerialExecutor() }

        func answer(_ number: Int) throws -> Int {
            try waitFor {
                try await Task.sleep(nanoseconds: 5_000_000)
                return number * 2
            }
        }

        func whereItRuns() throws -> (actor: Bool?, work: Bool?) {
            (DispatchQueue.getSpecific(key: isOwn), try waitFor { DispatchQueue.getSpecific(key: isOwn) })
        }
    }

    /// Swift's pool has as many threads as processors on Apple's systems, so an actor that waits there can stop its own work.
    /// On Linux the pool grows, so this checks where they run, and the next test that waiting ends.
    func testAnActorWithAThreadOfItsOwnWaitsThereForWorkInSwiftsPool() async throws {
        let found = try await Waiting().whereItRuns()
        XCTAssertEqual(found.actor, true)
        XCTAssertNil(found.work)
    }

    func testMoreActorsThanProcessorsCanWaitAtOnce() async throws {
        let count = 4 * ProcessInfo.processInfo.activeProcessorCount
        let actors = (0..<count).map { _ in Waiting() }
        let answers = try await withThrowingTaskGroup(of: Int.self) { group in
            for (number, actor) in actors.enumerated() { group.addTask { try await actor.answer(number) } }
            return try await group.reduce(into: Set<Int>()) { $0.insert($1) }
        }
        XCTAssertEqual(answers, Set((0..<count).map { $0 * 2 }))
    }

    func testAnErrorOfTheWorkIsThrownWhereItIsWaitedFor() async throws {
        let work: @Sendable () async throws -> Int = { throw GemmaError.session("broken") }
        XCTAssertThrowsError(try waitFor(work)) { XCTAssertEqual($0 as? GemmaError, .session("broken")) }
    }

    /// A reply that is stopped ends between two runs of the model, never within one, which would leave half a chunk in the caches.
    func testAStoppedTaskStillWaitsForItsWork() async throws {
        let task = Task {
            withUnsafeCurrentTask { $0?.cancel() }
            return try await Waiting().answer(21)
        }
        let answer = try await task.value
        XCTAssertEqual(answer, 42)
    }

    func testWithoutCoreAIItsBundlesAreRefusedWithWhatHelps() async throws {
        let content = try JSONSerialization.jsonObject(with: Data(contentsOf: tiny.appendingPathComponent("manifest.json")))
        var fields = try XCTUnwrap(content as? [String: Any])
        var target = try XCTUnwrap(fields["target"] as? [String: Any])
        target["name"] = "coreai"
        fields["target"] = target
        let manifest = try Manifest.parse(try JSONSerialization.data(withJSONObject: fields))
        do {
            _ = try await openEngine(ModelBundle(directory: tiny, manifest: manifest), graph: "decode", units: .automatic)
            XCTFail("it was opened")
        } catch {
            let message = (error as? GemmaError)?.message ?? ""
            XCTAssertTrue(message.hasPrefix("the bundle is for Core AI"), message)
            XCTAssertTrue(message.contains("--target coreml"), message)
        }
    }
}
