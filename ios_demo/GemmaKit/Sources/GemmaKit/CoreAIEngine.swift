#if canImport(CoreAI)
import CoreAI
import Foundation

/// Core AI with the caches as arrays of this engine, which every run changes in place. Runs must not overlap, so each
/// conversation has its own engine.
@available(iOS 27, macOS 27, *)
public final class CoreAIEngine: Engine, @unchecked Sendable {
    public let givesEveryRow = false
    public let computeUnits: ComputeUnits?
    public let runtime = partOfSystem("Core AI")

    private let manifest: Manifest
    private let tables: [TensorRole: EmbeddingTable]
    private let prefill: Function
    private let decode: Function
    private let caches: Caches

    /// Specializes the asset for this device unless the system has done so before, and loads its two functions.
    public init(_ bundle: ModelBundle, units: ComputeUnits) async throws {
        manifest = bundle.manifest
        let graph = try bundle.graph("decode")
        tables = try openTables(bundle, graph)
        computeUnits = units.used(for: graph)
        let asset = bundle.directory.appendingPathComponent(graph.file).deletingLastPathComponent()
        do {
            let model = try await AIModel(contentsOf: asset, options: units.used(for: graph).coreAI)
            prefill = try Function(model, "prefill", bundle.graph("prefill"))
            decode = try Function(model, "decode", graph)
            caches = try Caches(decode)
        } catch let error as GemmaError {
            throw error
        } catch {
            // A beta's assets are for the version that wrote them.
            throw GemmaError.session(
                "Core AI can't load the model: \(error.localizedDescription); copy the bundle again, or export it with the "
                    + "coreai-core of this system's version")
        }
    }

    public func run(_ tokens: [Int], position: Int, rows: Int) throws -> [[Float]] {
        try runtimeCall("Core AI can't run the model") {
            [try waitFor { [self] in try await logits(tokens, position) }]
        }
    }

    private func logits(_ tokens: [Int], _ position: Int) async throws -> [Float] {
        let isSingle = tokens.count == 1
        let function = isSingle ? decode : prefill
        let chunk = CoreMLInputs(position: position, count: tokens.count, length: isSingle ? 1 : manifest.prefillLength)
        var inputs: [String: NDArray] = [:]
        for spec in function.graph.inputs {
            let value = try chunk.value(of: spec, tokens: tokens, manifest: manifest, tables: tables)
            inputs[spec.name] = try function.array(spec, value)
        }
        return try await caches.run(function, inputs)
    }
}

/// A function of the asset, whose names, shapes and types are those of the manifest: Core AI takes them on trust.
@available(iOS 27, macOS 27, *)
private struct Function {
    let graph: Graph
    let inference: InferenceFunction

    init(_ model: AIModel, _ name: String, _ graph: Graph) throws {
        guard let found = try model.loadFunction(named: name) else { throw unlike(name, "is missing") }
        (self.graph, inference) = (graph, found)
        let descriptor = found.descriptor
        try check(graph.inputs, name, descriptor.inputNames, descriptor.inputDescriptor(of:))
        try check(graph.outputs, name, descriptor.outputNames, descriptor.outputDescriptor(of:))
        try check(graph.states, name, descriptor.stateNames, descriptor.stateDescriptor(of:))
    }

    private func check(
        _ specs: [TensorSpec], _ name: String, _ names: [String], _ describe: (String) -> InferenceValue.Descriptor?
    ) throws {
        guard Set(names) == Set(specs.map(\.name)) else {
            throw unlike(name, "has \(names.sorted().joined(separator: ", "))")
        }
        for spec in specs {
            let found = try array(describe(spec.name), spec.name)
            guard found.shape == spec.shape.compactMap({ $0 }), scalarName(found.scalarType) == spec.dtype else {
                throw unlike(name, "has \(spec.name) of \(found.shape)")
            }
        }
    }

    /// An input's array, in the layout that Core AI prefers.
    func array(_ spec: TensorSpec, _ value: CoreMLValue) throws -> NDArray {
        var array = NDArray(descriptor: try self.array(inference.descriptor.inputDescriptor(of: spec.name), spec.name))
        switch value {
        case .integers(let values):
            var view = array.mutableView(as: Int32.self)
            view.copyElements(fromContentsOf: values.map(Int32.init))
        case .halves(let rows):
            var view = array.mutableView(as: Float16.self)
            view.copyElements(fromContentsOf: rows.joined().map { Float16($0) })
        }
        return array
    }

    /// A cache without tokens. Zeros, because what is masked is still multiplied, and NaN times 0 is NaN.
    func emptyState(_ spec: TensorSpec) throws -> NDArray {
        var array = NDArray(descriptor: try self.array(inference.descriptor.stateDescriptor(of: spec.name), spec.name))
        var view = array.mutableView(as: Float16.self)
        view.copyElements(fromContentsOf: repeatElement(Float16(0), count: spec.shape.reduce(1) { $0 * ($1 ?? 1) }))
        return array
    }

    private func array(_ descriptor: InferenceValue.Descriptor?, _ name: String) throws -> NDArrayDescriptor {
        guard case .ndArray(let found)? = descriptor else { throw unlike(name, "is no array") }
        return found
    }
}

/// The caches of the model: one, or one for each kind of layers.
@available(iOS 27, macOS 27, *)
private final class Caches: @unchecked Sendable {
    private let names: [String]
    private var first: NDArray
    private var second: NDArray  // not used if there is only one

    init(_ function: Function) throws {
        let states = function.graph.states
        guard let first = states.first, states.count <= 2, states.allSatisfy({ $0.dtype == "float16" }) else {
            throw unlike("manifest.json", "has \(states.count) caches, expected one or two of float16")
        }
        names = states.map(\.name)
        self.first = try function.emptyState(first)
        second = try function.emptyState(states.count == 2 ? states[1] : first)
    }

    /// The logits after the last token. Views are made where they are used: they must not outlive the arrays.
    func run(_ function: Function, _ inputs: [String: NDArray]) async throws -> [Float] {
        let name = try function.graph.tensor(.logits).name
        guard names.count == 2 else {
            var states = InferenceFunction.MutableViews()
            states.insert(&first, for: names[0])
            var outputs = try await function.inference.run(inputs: inputs, states: consume states)
            return try floats(outputs.remove(name))
        }
        var states = InferenceFunction.MutableViews()
        states.insert(&first, for: names[0])
        states.insert(&second, for: names[1])
        var outputs = try await function.inference.run(inputs: inputs, states: consume states)
        return try floats(outputs.remove(name))
    }
}

/// The values of an array with one dimension that is longer than 1.
@available(iOS 27, macOS 27, *)
private func floats(_ output: consuming InferenceValue?) throws -> [Float] {
    guard let output, let array = output.ndArray, array.scalarType == .float16, array.interleaveLayout == nil else {
        throw unlike("the model", "returns no logits that this app can read")
    }
    return array.view(as: Float16.self).withUnsafePointer { values, shape, strides in
        let long = (0..<shape.count).first { shape[$0] > 1 } ?? 0
        return (0..<shape[long]).map { Float(values[$0 * strides[long]]) }
    }
}

@available(iOS 27, macOS 27, *)
private func scalarName(_ type: NDArray.ScalarType) -> String? {
    switch type {
    case .float16: "float16"
    case .int32: "int32"
    default: nil
    }
}

private func unlike(_ name: String, _ what: String) -> GemmaError {
    .session("the asset is not the one of manifest.json: \(name) \(what); copy the bundle again, or export it again")
}

@available(iOS 27, macOS 27, *)
extension ComputeUnits {
    /// Core AI can be kept on the CPU; of the other units it takes a preference, and may use all.
    fileprivate var coreAI: SpecializationOptions {
        switch self {
        case .automatic, .all: .default
        case .cpuOnly: .cpuOnly
        case .cpuAndNeuralEngine: SpecializationOptions(preferredComputeUnitKind: .neuralEngine)
        case .cpuAndGPU: SpecializationOptions(preferredComputeUnitKind: .gpu)
        }
    }
}
#endif
