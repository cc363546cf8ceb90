import Foundation

public let schemaVersion = 2

public enum AttentionKind: String, CaseIterable, Sendable {
    case local, global
}

/// One layer's KV cache: keys and values, each (1, kvHeads, slots, headDim).
public struct LayerCache: Equatable, Sendable {
    public let kind: AttentionKind
    public let window: Int?  // tokens a query attends to, itself included; nil on global layers
    public let slots: Int
    public let kvHeads: Int
    public let headDim: Int
    public var source: Int? = nil  // the layer whose cache it reads; nil: it has one of its own

    /// Elements of keys and values together, 0 if it reads another layer's; a Double, because a damaged manifest could
    /// overflow an integer.
    var elements: Double { source == nil ? 2 * Double(kvHeads) * Double(slots) * Double(headDim) : 0 }

    /// How many tokens a full ring of ONNX Runtime drops at once, so that the rest moves up.
    var ringStep: Int { slots - (window ?? slots) + 1 }
}

/// Rotary embedding: angle = position / factor · base^(-2i / headDim). Only the first of the head's pairs turn if
/// `rotated`, their share, is below 1.
public struct Rope: Equatable, Sendable {
    public let base: Double
    public let factor: Double
    public var rotated: Double = 1

    /// The angles at a position, one for each pair of a head.
    func angles(at position: Int, headDim: Int) -> [Double] {
        let turning = Int(rotated * Double(headDim) / 2)
        return (0..<headDim / 2).map { pair in
            pair < turning ? Double(position) / factor * pow(base, -2 * Double(pair) / Double(headDim)) : 0
        }
    }
}

/// The purpose of a tensor, as in `gemma_runtime/manifest.py`. Engines look tensors up by role, not by name.
public enum TensorRole: String, CaseIterable, Sendable {
    case tokens, start, positions, total, wanted, last, embeddings, hidden
    case perLayer = "per_layer"
    case cos, sin, mask, slots, write
    case keys, values, cache
    case logits
}

public struct TensorSpec: Equatable, Sendable {
    public let name: String
    public let dtype: String
    public let shape: [Int?]  // a size of nil varies from call to call
    public let role: TensorRole
    public let kind: AttentionKind?  // the kind of layers it is for; nil if it is for all or for none
    public let layer: Int?  // the index of its layer; nil if it belongs to no single layer
}

/// A program of the artifact.
public struct Graph: Equatable, Sendable {
    public let file: String
    public let inputs: [TensorSpec]
    public let outputs: [TensorSpec]
    public let states: [TensorSpec]  // caches

    /// The input or output with a role; throws a bundle error if there is none.
    public func tensor(_ role: TensorRole) throws -> TensorSpec {
        guard let tensor = (inputs + outputs).first(where: { $0.role == role }) else {
            throw GemmaError.bundle("\(file) has no tensor with the role \(role.rawValue); export the model again")
        }
        return tensor
    }

    /// Each state with the output that returns it; throws a bundle error if an output is missing.
    public func returnedCaches() throws -> [(past: TensorSpec, present: TensorSpec)] {
        try states.map { state in
            let same = { (spec: TensorSpec) in spec.role == state.role && spec.kind == state.kind && spec.layer == state.layer }
            guard let output = outputs.first(where: same) else {
                throw GemmaError.bundle("\(file) has no output for the cache \(state.name); export the model again")
            }
            return (state, output)
        }
    }
}

public struct BundleFile: Equatable, Sendable {
    public let sha256: String
    public let bytes: Int
}

/// Everything a device needs to know to run a bundle; written by the exporter.
public struct Manifest: Equatable, Sendable {
    public let modelID: String
    public let target: String
    public let minRuntimeVersion: String
    public let recipe: String
    public let codesDigest: String
    public let vocabSize: Int
    public let contextLength: Int
    public let prefillLength: Int
    public let stopTokens: Set<Int>
    public let sampling: Sampling?  // how the checkpoint's authors sample; nil if they don't say
    public let layers: [LayerCache]
    public let cacheDtype: String
    public let graphs: [String: [Graph]]  // the parts of each graph, in the order in which they run
    public let files: [String: BundleFile]
    public let roles: [String: String]
    public let ropes: [String: Rope]  // by kind of attention

    /// Bytes of all key and value caches.
    public var cacheBytes: Double { cacheBytes(.local) + cacheBytes(.global) }

    /// Bytes of the caches of one kind of layer.
    public func cacheBytes(_ kind: AttentionKind) -> Double {
        layers.filter { $0.kind == kind }.reduce(0) { $0 + $1.elements } * (cacheWidths[cacheDtype] ?? 0)
    }

    /// The files that the runtime loads: all files without a role.
    public var artifact: [String: BundleFile] {
        let sidecars = Set(roles.values)
        return files.filter { !sidecars.contains($0.key) }
    }

    public var artifactBytes: Int { artifact.values.reduce(0) { $0 + $1.bytes } }

    /// A digest of the artifact's files; it names what is cached for this artifact.
    public var artifactDigest: String {
        var digest = Digest()
        for (name, file) in artifact.sorted(by: { $0.key < $1.key }) { digest.update(Data("\(name) \(file.sha256)\n".utf8)) }
        return digest.finish()
    }

    /// Throws a bundle error for an unknown schema version and for a missing or mistyped field.
    public static func parse(_ data: Data) throws -> Manifest {
        try readManifest(JSONFields.parse(file: "manifest.json", data))
    }
}

private func readManifest(_ json: JSONFields) throws -> Manifest {
    try checkSchema(json.of("schema_version").integer())
    if try json.orNil("kind") != nil {
        throw GemmaError.bundle("the bundle gives vectors of texts; this app needs one that generates text")
    }
    let manifest = Manifest(
        modelID: try json.of("model").of("id").string(),
        target: try json.of("target").of("name").string(),
        minRuntimeVersion: try json.of("target").of("min_runtime_version").string(),
        recipe: try json.of("quantization").of("recipe").string(),
        codesDigest: try json.of("quantization").of("codes_digest").string(),
        vocabSize: try atLeastOne(json.of("vocab_size")),
        contextLength: try atLeastOne(json.of("context_length")),
        prefillLength: try atLeastOne(json.of("prefill_length")),
        stopTokens: Set(try json.of("stop_tokens").list { try $0.count() }),
        sampling: try json.orNil("sampling").map(readSampling),
        layers: try readLayers(json.of("layers"), contextLength: json.of("context_length").count()),
        cacheDtype: try readCacheDtype(json.of("cache_dtype")),
        graphs: try json.of("graphs").map(readParts),
        files: try readFiles(json.of("files")),
        roles: try json.of("roles").map { try $0.string() },
        ropes: try json.of("ropes").map(readRope)
    )
    for kind in Set(manifest.layers.map(\.kind.rawValue)).sorted() where manifest.ropes[kind] == nil {
        throw GemmaError.bundle("manifest.json is not valid: no rope for \(kind) layers; export the model again")
    }
    return manifest
}

func readSampling(_ json: JSONFields) throws -> Sampling {
    try Sampling(
        temperature: json.of("temperature").double(),
        topK: json.of("top_k").count(),
        topP: json.of("top_p").double(),
        minP: json.of("min_p").double(),
        repetitionPenalty: json.of("repetition_penalty").double()
    )
}

private func checkSchema(_ version: Int) throws {
    guard version != schemaVersion else { return }
    let action = version > schemaVersion ? "update the app" : "export the model again"
    throw GemmaError.bundle("manifest.json has schema version \(version), this app reads \(schemaVersion); \(action)")
}

private func atLeastOne(_ field: JSONFields) throws -> Int {
    let number = try field.count()
    guard number > 0 else { throw field.wrong("at least 1") }
    return number
}

private let cacheWidths: [String: Double] = ["float32": 4, "float16": 2, "int8": 1]  // bytes

private func readCacheDtype(_ field: JSONFields) throws -> String {
    let dtype = try field.string()
    guard cacheWidths[dtype] != nil else { throw field.wrong("float32 or float16 or int8") }
    return dtype
}

/// A cache holds the window of its layer, or the whole context. A layer reads the cache of one before it that is of its
/// shape and has a cache of its own.
private func readLayers(_ field: JSONFields, contextLength: Int) throws -> [LayerCache] {
    let layers = try field.list(readLayer)
    for (index, layer) in layers.enumerated() {
        guard layer.slots >= min(layer.window ?? contextLength, contextLength), layer.window != 0 else {
            throw field.wrong("layer \(index) to have slots for its window or the context, not \(layer.slots)")
        }
        guard let source = layer.source else { continue }
        var own = layer
        own.source = nil
        guard source < index, layers[source] == own else {
            throw field.wrong("layer \(index) to read the cache of an earlier layer like it, not of layer \(source)")
        }
    }
    return layers
}

private func readLayer(_ json: JSONFields) throws -> LayerCache {
    LayerCache(
        kind: try oneOf(json.of("kind")),
        window: try json.orNil("window")?.count(),
        slots: try json.of("slots").count(),
        kvHeads: try json.of("kv_heads").count(),
        headDim: try json.of("head_dim").count(),
        source: try json.orNil("source")?.count()
    )
}

private func readRope(_ json: JSONFields) throws -> Rope {
    let rotated = try json.orNil("rotated")
    if let rotated, !(0...1).contains(try rotated.double()) { throw rotated.wrong("a share from 0 to 1") }
    return Rope(
        base: try json.of("base").double(),
        factor: try json.of("factor").double(),
        rotated: try rotated?.double() ?? 1
    )
}

private let mostBytes = 9_007_199_254_740_992.0  // 2^53: as many as a double counts

private func readFiles(_ field: JSONFields) throws -> [String: BundleFile] {
    let files = try field.map { file in
        let bytes = try file.of("bytes")
        guard try bytes.integer() >= 0 else { throw bytes.wrong("at least 0") }
        return BundleFile(sha256: try file.of("sha256").string(), bytes: try bytes.integer())
    }
    guard files.values.reduce(0.0, { $0 + Double($1.bytes) }) <= mostBytes else {
        throw field.wrong("fewer bytes in all files")
    }
    return files
}

private func readParts(_ json: JSONFields) throws -> [Graph] {
    let parts = try json.list(readGraph)
    guard !parts.isEmpty else { throw json.wrong("at least one part") }
    return parts
}

private func readGraph(_ json: JSONFields) throws -> Graph {
    Graph(
        file: try json.of("file").string(),
        inputs: try json.of("inputs").list(readTensor),
        outputs: try json.of("outputs").list(readTensor),
        states: try json.of("states").list(readTensor)
    )
}

private func readTensor(_ json: JSONFields) throws -> TensorSpec {
    TensorSpec(
        name: try json.of("name").string(),
        dtype: try json.of("dtype").string(),
        shape: try json.of("shape").list { size in
            if case .string = size.value { return nil }
            return try size.count()
        },
        role: try oneOf(json.of("role")),
        kind: try json.orNil("kind").map { try oneOf($0) },
        layer: try json.orNil("layer")?.count()
    )
}

private func oneOf<T: RawRepresentable & CaseIterable>(_ field: JSONFields) throws -> T where T.RawValue == String {
    guard let value = T(rawValue: try field.string()) else {
        throw field.wrong(T.allCases.map(\.rawValue).joined(separator: " or "))
    }
    return value
}
