#if canImport(ExecuTorch)
import ExecuTorch
import Foundation

/// An ExecuTorch Module with one method, `forward(tokens, start)`; the program holds the caches.
public final class ExecutorchEngine: Engine {
    public let givesEveryRow = false

    private let module: Module

    public init(_ bundle: ModelBundle, graph name: String) throws {
        module = Module(filePath: bundle.directory.appendingPathComponent(try bundle.graph(name).file).path)
        do {
            try module.load("forward")
        } catch {
            throw GemmaError.session("ExecuTorch can't load the program: \(error.localizedDescription); copy the bundle again")
        }
    }

    public func run(_ tokens: [Int], position: Int, rows: Int) throws -> [[Float]] {
        let ids = Tensor<Int64>(tokens.map(Int64.init), shape: [1, tokens.count])
        let start = Tensor<Int64>([Int64(position)], shape: [1])
        do {
            guard let logits: Tensor<Float> = try module.forward([ids, start]).first?.tensor() else {
                throw GemmaError.session("the program returns no logits; export the model again")
            }
            return [logits.scalars()]
        } catch let error as GemmaError {
            throw error
        } catch {
            throw GemmaError.session("ExecuTorch can't run the program: \(error.localizedDescription); start a new chat")
        }
    }
}
#endif
