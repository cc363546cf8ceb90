import ExecuTorch
import Foundation
import GemmaKit

/// ExecuTorch's version, the one that Package.swift names.
public let executorchVersion = "1.5.1"

/// Opens bundles for ExecuTorch, and those that GemmaKit runs itself.
@Sendable
public func openWithExecutorch(_ bundle: ModelBundle, graph: String, units: ComputeUnits) async throws -> any Engine {
    guard bundle.manifest.target == "executorch" else {
        return try await openEngine(bundle, graph: graph, units: units)
    }
    try checkRuntime(bundle.manifest, "ExecuTorch", executorchVersion)
    return try ExecutorchEngine(bundle, graph: graph)
}

/// An ExecuTorch Module with one method, `forward(tokens, start)`; the program holds the caches.
public final class ExecutorchEngine: Engine, @unchecked Sendable {
    public let givesEveryRow = false
    public let runtime = "ExecuTorch \(executorchVersion)"

    private let module: Module

    public init(_ bundle: ModelBundle, graph name: String) throws {
        let path = bundle.directory.appendingPathComponent(try bundle.graph(name).file).path
        module = Module(filePath: path, loadMode: .mmap)  // the default reads the whole file into memory
        do {
            try module.load("forward")
        } catch {
            throw GemmaError.session("ExecuTorch can't load the program: \(error.localizedDescription); copy the bundle again")
        }
    }

    public func run(_ tokens: [Int], position: Int, rows: Int) throws -> [[Float]] {
        try runtimeCall("ExecuTorch can't run the program") { [try logits(tokens, position)] }
    }

    private func logits(_ tokens: [Int], _ position: Int) throws -> [Float] {
        let ids = Tensor<Int64>(tokens.map(Int64.init), shape: [1, tokens.count])
        let start = Tensor<Int64>([Int64(position)], shape: [1])
        guard let logits: Tensor<Float> = try module.forward([ids, start]).first?.tensor() else {
            throw GemmaError.session("the program returns no logits; export the model again")
        }
        return logits.scalars()
    }
}
