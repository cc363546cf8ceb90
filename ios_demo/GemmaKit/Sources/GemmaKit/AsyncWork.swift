import Dispatch
import Foundation

/// Waits for asynchronous work, for engines whose runtime is asynchronous: `Engine.run` is not.
///
/// Must not be called on a thread of Swift's pool: the work may need that thread. `ModelActor` has a thread of its own.
func waitFor<T: Sendable>(_ work: @escaping @Sendable () async throws -> T) throws -> T {
    let outcome = Outcome<T>()
    // Detached: the work neither runs on the caller's actor, which waits here, nor ends half done when a reply is stopped.
    Task.detached(priority: .userInitiated) { outcome.set(await Result.of(work)) }
    return try outcome.wait().get()
}

private final class Outcome<T: Sendable>: @unchecked Sendable {
    private let isThere = DispatchSemaphore(value: 0)
    private var result: Result<T, any Error> = .failure(CancellationError())

    func set(_ result: Result<T, any Error>) {
        self.result = result
        isThere.signal()
    }

    func wait() -> Result<T, any Error> {
        isThere.wait()
        return result
    }
}

extension Result where Failure == any Error, Success: Sendable {
    fileprivate static func of(_ work: @Sendable () async throws -> Success) async -> Self {
        do { return .success(try await work()) } catch { return .failure(error) }
    }
}

/// Runs an actor on a thread that Swift's pool doesn't count, so that it may compute and wait for long.
public final class OwnThread: SerialExecutor {
    let queue: DispatchQueue

    public init(_ name: String) {
        queue = DispatchQueue(label: name, qos: .userInitiated)
    }

    public func enqueue(_ job: consuming ExecutorJob) {
        let job = UnownedJob(job)
        queue.async { job.runSynchronously(on: self.asUnownedSerialExecutor()) }
    }

    public func asUnownedSerialExecutor() -> UnownedSerialExecutor { UnownedSerialExecutor(ordinary: self) }
}
