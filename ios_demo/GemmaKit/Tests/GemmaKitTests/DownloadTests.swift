import Foundation
import XCTest

@testable import GemmaKit

#if canImport(FoundationNetworking)
import FoundationNetworking
#endif

/// Downloads from `tests/data/download_server.py`, a hub whose repositories' names say what goes wrong.
final class DownloadTests: XCTestCase {
    private let root = FileManager.default.temporaryDirectory.appendingPathComponent(UUID().uuidString)
    private let owner = "o" + UUID().uuidString.replacingOccurrences(of: "-", with: "")
    private var origin = ""

    override func setUpWithError() throws {
        guard let port = ProcessInfo.processInfo.environment["GEMMA_DOWNLOADS"] else {
            throw XCTSkip("there is no Python to serve downloads")
        }
        origin = "http://127.0.0.1:\(port)"
        try library().prepare()
    }

    override func tearDownWithError() throws {
        try? FileManager.default.removeItem(at: root)
    }

    private func library(freeBytes: (@Sendable () -> Double)? = nil) -> BundleLibrary {
        BundleLibrary(
            folder: root.appendingPathComponent("Documents"), support: root.appendingPathComponent("Support"),
            compiled: root.appendingPathComponent("compiled"), freeBytes: freeBytes)
    }

    private func address(_ fault: String) -> HubAddress { HubAddress(repository: "\(owner)/\(fault)", revision: nil) }

    private func download(_ library: BundleLibrary? = nil) -> HubDownload {
        HubDownload(
            library ?? self.library(), isMeteredAllowed: true, origin: origin, plainHosts: ["127.0.0.1", "localhost"],
            timeout: 5, pause: 0.001)
    }

    private func run(
        _ fault: String, onProgress: @escaping @Sendable (DownloadProgress) -> Void = { _ in }
    ) async throws -> URL {
        try await download().run(address(fault), onProgress: onProgress)
    }

    private func refusal(_ fault: String, _ download: HubDownload? = nil) async -> String {
        var message = ""
        do {
            _ = try await (download ?? self.download()).run(address(fault))
            XCTFail("\(fault) was not refused")
        } catch {
            message = (error as? GemmaError)?.message ?? "\(error)"
        }
        XCTAssertEqual(library().bundles(), [], fault)
        let files = FileManager.default.enumerator(atPath: root.path)?.allObjects as? [String] ?? []
        XCTAssertFalse(files.contains { $0.contains("evil") }, fault)
        return message
    }

    private func assertRefused(_ fault: String, _ expected: String, _ download: HubDownload? = nil) async {
        let message = await refusal(fault, download)
        XCTAssertTrue(message.contains(expected), "\(fault): \(message)")
    }

    private func assertWhole(_ bundle: URL) throws {
        _ = try ModelBundle.open(bundle)  // reads all of it
        _ = try library().open(bundle) { _ in XCTFail("it was checked when it came in") }
        let files = try FileManager.default.contentsOfDirectory(atPath: bundle.path)
        XCTAssertEqual(Set(files), Set(try FileManager.default.contentsOfDirectory(atPath: tiny.path)))
        XCTAssertEqual(library().bundles(), [bundle])
        XCTAssertEqual(library().unfinished(), [])
    }

    /// The requests for a file: what each wanted.
    private func requests(_ fault: String, _ name: String = "model.onnx.data") throws -> [[String: String?]] {
        let log = try Data(contentsOf: XCTUnwrap(URL(string: "\(origin)/log/\(owner)/\(fault)")))
        return try JSONDecoder().decode([[String: String?]].self, from: log).filter { $0["name"] == name }
    }

    private func ranges(_ fault: String) throws -> [String?] { try requests(fault).map { $0["Range"] ?? nil } }

    func testABundleIsDownloadedWholeFromOneCommitAndTellsNothingOfThePhone() async throws {
        let progress = Seen<DownloadProgress>()
        let bundle = try await run("whole") { progress.add($0) }
        XCTAssertEqual(bundle.lastPathComponent, "whole")
        try assertWhole(bundle)
        let total = try ModelBundle.open(bundle).manifest.files.values.reduce(0) { $0 + $1.bytes }
        let done = progress.all.map(\.doneBytes)
        XCTAssertEqual(done, done.sorted())
        XCTAssertEqual(progress.all.last, DownloadProgress(doneBytes: total, totalBytes: total))
        let request = try XCTUnwrap(requests("whole").first)
        XCTAssertEqual(try requests("whole", "manifest.json").map { $0["revision"] }, ["main"])
        XCTAssertEqual(request["revision"], String(repeating: "c0ffee", count: 6) + "cafe")
        XCTAssertEqual(request["User-Agent"], "gemma-demo")
        XCTAssertEqual(request["Accept-Language"], "*")
        for name in ["Cookie", "Authorization"] { XCTAssertNil(request[name] ?? nil, name) }
        let second = try await run("whole")
        XCTAssertEqual(second.lastPathComponent, "whole 2")
    }

    func testACutConnectionGoesOnWhereItEnded() async throws {
        try assertWhole(await run("cut"))
        XCTAssertEqual(try ranges("cut"), [nil, "bytes=100000-", "bytes=200000-"])
        XCTAssertTrue(try requests("cut").dropFirst().allSatisfy { ($0["If-Range"] ?? nil)?.hasPrefix("\"") == true })
    }

    func testAChangedFileAnotherRangeAWeakVersionAndARefusedRangeStartItAgain() async throws {
        let expected: [String: [String?]] = [
            "changed": [nil, "bytes=100000-"], "lying": [nil, "bytes=100000-", nil], "weak": [nil, nil],
            "rangeless": [nil, "bytes=100000-", nil],
        ]
        for (fault, wanted) in expected {
            let bundle = try await run(fault)
            try assertWhole(bundle)
            try library().delete(bundle)
            XCTAssertEqual(try ranges(fault), wanted, fault)
        }
    }

    func testADownloadThatWasStoppedIsListedAndGoesOn() async throws {
        let error = try await stop("stalled")
        XCTAssertTrue(error is CancellationError, "\(error)")
        XCTAssertEqual(library().bundles(), [])
        library().clean()  // as the app's next start does
        let unfinished = try XCTUnwrap(library().unfinished().first)
        XCTAssertEqual(unfinished.address, "hub:\(owner)/stalled")
        XCTAssertGreaterThan(unfinished.bytes, 300_000)
        _ = try await stop("stalled", after: 400_000)
        XCTAssertEqual(try ranges("stalled").map { $0?.hasPrefix("bytes=") ?? false }, [false, true])
        XCTAssertEqual(try requests("stalled", "goldens.json").count, 1, "whole files are not downloaded again")
        try library().discard(unfinished)
        XCTAssertEqual(library().unfinished(), [])
    }

    /// Starts a download whose connection brings nothing any more, and cancels it; returns its error.
    private func stop(_ fault: String, after bytes: Int = 300_000) async throws -> any Error {
        let (download, address) = (download(), address(fault))
        let progress = Seen<DownloadProgress>()
        let task = Task { try await download.run(address) { progress.add($0) } }
        for _ in 0..<5000 where (progress.all.last?.doneBytes ?? 0) < bytes { try await Task.sleep(for: .milliseconds(1)) }
        task.cancel()
        let started = Date()
        let result = await task.result
        XCTAssertLessThan(Date().timeIntervalSince(started), 2)
        do {
            _ = try result.get()
        } catch { return error }
        throw GemmaError.session("it was not stopped")
    }

    func testABusyServerIsAskedAgainAndOneThatAlwaysFailsEndsTheDownload() async throws {
        let bundle = try await run("busy")
        try assertWhole(bundle)
        try library().delete(bundle)
        await assertRefused("failing", "was interrupted")
        XCTAssertEqual(try requests("failing").count, 5)
    }

    func testAlteredLargerAndSmallerFilesAreRefused() async throws {
        await assertRefused("altered", "model.onnx.data arrived altered")
        await assertRefused("longer", "model.onnx.data has 262404 bytes, the manifest says 262400")
        await assertRefused("shorter", "model.onnx.data has 262399 bytes")
        await assertRefused("flood", "model.onnx.data has more bytes")
        await assertRefused("compressed", "compressed")
        await assertRefused("endless", "16777216 bytes")
        await assertRefused("many", "more than 1000 files")
        await assertRefused("case", "differ only in case")
    }

    func testRedirectsLeadToOtherHostsNeverToHttpOrToFiles() async throws {
        let bundle = try await run("elsewhere")
        try assertWhole(bundle)
        try library().delete(bundle)
        XCTAssertEqual(try requests("elsewhere").count, 2)
        await assertRefused("plain", "http://127.0.0.2, which is not encrypted")
        await assertRefused("local-file", "file://")
        await assertRefused("loop", "more than 10 times")
        let app = HubDownload(
            library(), isMeteredAllowed: false, origin: origin, plainHosts: [], timeout: 5, pause: 0.001)
        await assertRefused("whole", "not encrypted", app)
    }

    func testNoNameLeavesTheBundlesFolderOrTakesTheManifestsPlace() async throws {
        for fault in ["escape", "absolute", "backslash", "manifest", "long"] {
            await assertRefused(fault, "not a file inside of a bundle")
        }
    }

    func testABundleThatDoesNotFitIsRefusedBeforeItsFilesAreAskedFor() async throws {
        await assertRefused("vast", "are still to come")
        await assertRefused("whole", "0.00 GB are free", download(library { 100_000 }))
        XCTAssertEqual(try requests("vast").count + requests("whole").count, 0)
    }

    func testWhatIsNotThereAndWhatIsGatedIsSaid() async throws {
        await assertRefused("gated", "private or gated")
        do {
            _ = try await download().run(HubAddress(repository: "\(owner)/whole", revision: "v9"))
            XCTFail("there is no v9")
        } catch let error as GemmaError {
            XCTAssertTrue(error.message.contains("hub:\(owner)/whole@v9, or its manifest.json,"), error.message)
        }
    }

    func testAddressesMeanWhatTheyMeanToGemmaRuntime() throws {
        _ = try json(data.appendingPathComponent("hub_names.json")).list { vector in
            let text = try vector.of("text").string()
            for given in [text, "hub:\(text)", " \(text)\n"] {
                if let repository = try vector.orNil("repository")?.string() {
                    let revision = try vector.orNil("revision")?.string()
                    XCTAssertEqual(try HubAddress(given), HubAddress(repository: repository, revision: revision))
                } else {
                    XCTAssertThrowsError(try HubAddress(given), given) { error in
                        XCTAssertTrue((error as? GemmaError)?.message.contains("hub:OWNER/NAME") == true, "\(error)")
                    }
                }
            }
        }
        let address = try HubAddress("a/b@refs/pr/1")
        XCTAssertEqual(try HubAddress(address.description), address)
        let url = address.url(hub, at: "refs/pr/1", "x/a b?.bin")
        XCTAssertEqual(url?.absoluteString, "\(hub)/a/b/resolve/refs%2Fpr%2F1/x/a%20b%3F.bin")
    }
}

/// What a callback was called with, from any thread.
private final class Seen<Value>: @unchecked Sendable {
    private let lock = NSLock()
    private var values: [Value] = []

    var all: [Value] { lock.withLock { values } }

    func add(_ value: Value) { lock.withLock { values.append(value) } }
}
