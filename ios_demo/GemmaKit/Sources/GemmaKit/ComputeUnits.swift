/// Where Core ML may run a model, and what Core AI prefers.
public enum ComputeUnits: String, CaseIterable, Codable, Sendable {
    case automatic  // where the bundle's layout is fast
    case all
    case cpuOnly = "cpu_only"
    case cpuAndNeuralEngine = "cpu_and_neural_engine"
    case cpuAndGPU = "cpu_and_gpu"

    /// What is used for a graph: as chosen, or else the Neural Engine for layouts that write caches by a matrix, and the
    /// GPU for the others.
    public func used(for graph: Graph) -> ComputeUnits {
        guard self == .automatic else { return self }
        return graph.inputs.contains { $0.role == .write } ? .cpuAndNeuralEngine : .cpuAndGPU
    }

    public var title: String {
        switch self {
        case .automatic: "As the bundle says"
        case .all: "All"
        case .cpuOnly: "CPU only"
        case .cpuAndNeuralEngine: "CPU and Neural Engine"
        case .cpuAndGPU: "CPU and GPU"
        }
    }
}
