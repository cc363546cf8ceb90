// What the app uses of Core AI (iOS 27), for a type check on Linux. Each declaration quotes its page, below
// https://developer.apple.com/documentation/coreai/. Where a page doesn't say whether a type can be copied, it can't here.
// Not in the stubs: that views must not outlive their arrays, which Swift 6.0 can't express.
@_exported import Darwin

// aimodel: struct AIModel
public struct AIModel {
    // aimodel/init(contentsof:options:)
    public init(contentsOf modelURL: URL, options: SpecializationOptions = .default) async throws { fatalError() }
    // aimodel/loadfunction(named:)
    public func loadFunction(named functionName: String) throws -> InferenceFunction? { fatalError() }
}

// specializationoptions: struct SpecializationOptions
public struct SpecializationOptions: Sendable {
    public static let `default` = Self()  // specializationoptions/default
    public static let cpuOnly = Self()  // specializationoptions/cpuonly
    // specializationoptions/init(preferredcomputeunitkind:)
    public init(preferredComputeUnitKind: ComputeUnitKind) {}
    private init() {}
}

// computeunitkind: enum ComputeUnitKind
public enum ComputeUnitKind: Sendable, Equatable { case cpu, gpu, neuralEngine }

// inferencefunction: struct InferenceFunction; "This type is Sendable"
public struct InferenceFunction: Sendable {
    public let descriptor: InferenceFunctionDescriptor  // inferencefunction/descriptor

    // inferencefunction/run(inputs:states:outputviews:)-mqfb
    public func run(
        inputs: [String: NDArray], states: consuming MutableViews = MutableViews(),
        outputViews: consuming MutableViews = MutableViews()
    ) async throws -> Outputs { fatalError() }

    // inferencefunction/mutableviews: struct MutableViews
    public struct MutableViews: ~Copyable {
        public init() {}
        // inferencefunction/mutableviews/insert(_:for:)-1b2yx
        public mutating func insert(
            _ value: inout some InferenceValue.MutableViewRepresentable & ~Copyable, for name: String
        ) {}
    }

    // inferencefunction/outputs: struct Outputs
    public struct Outputs: ~Copyable {
        public mutating func remove(_ name: String) -> InferenceValue? { fatalError() }  // inferencefunction/outputs/remove(_:)
    }
}

// inferencefunctiondescriptor: struct InferenceFunctionDescriptor
public struct InferenceFunctionDescriptor: Sendable {
    public var inputNames: [String] { fatalError() }  // inferencefunctiondescriptor/inputnames
    public var outputNames: [String] { fatalError() }  // inferencefunctiondescriptor/outputnames
    public var stateNames: [String] { fatalError() }  // inferencefunctiondescriptor/statenames
    // inferencefunctiondescriptor/inputdescriptor(of:)
    public func inputDescriptor(of inputName: String) -> InferenceValue.Descriptor? { fatalError() }
    // inferencefunctiondescriptor/outputdescriptor(of:)
    public func outputDescriptor(of outputName: String) -> InferenceValue.Descriptor? { fatalError() }
    // inferencefunctiondescriptor/statedescriptor(of:)
    public func stateDescriptor(of stateName: String) -> InferenceValue.Descriptor? { fatalError() }
}

// inferencevalue: struct InferenceValue
public struct InferenceValue: ~Copyable {
    // inferencevalue/ndarray: "Accessing this property consumes the value"
    public var ndArray: NDArray? { consuming get { fatalError() } }

    // inferencevalue/descriptor: enum Descriptor
    public enum Descriptor: Sendable {
        case image(ImageDescriptor)  // inferencevalue/descriptor/image(_:)
        case ndArray(NDArrayDescriptor)  // inferencevalue/descriptor/ndarray(_:)
    }

    // inferencevalue/mutableviewrepresentable: protocol MutableViewRepresentable : ~Copyable
    public protocol MutableViewRepresentable: ~Copyable {}
}

public struct ImageDescriptor: Sendable {}

// ndarraydescriptor: struct NDArrayDescriptor
public struct NDArrayDescriptor: Sendable {
    public var shape: [Int] { fatalError() }  // ndarraydescriptor/shape
    public var scalarType: NDArray.ScalarType { fatalError() }  // ndarraydescriptor/scalartype
}

// ndarray: struct NDArray
public struct NDArray: InferenceValue.MutableViewRepresentable {
    public init(descriptor: consuming NDArrayDescriptor) {}  // ndarray/init(descriptor:)
    public var scalarType: ScalarType { fatalError() }  // ndarray/scalartype-swift.property
    // ndarray/interleavelayout-swift.property
    public var interleaveLayout: InterleaveLayout? { fatalError() }
    // ndarray/view(as:)
    public func view<T: BitwiseCopyable>(as type: T.Type = T.self) -> View<T> { fatalError() }
    // ndarray/mutableview(as:)
    public mutating func mutableView<T: BitwiseCopyable>(as type: T.Type = T.self) -> MutableView<T> { fatalError() }

    // ndarray/scalartype-swift.enum: enum ScalarType
    public enum ScalarType: Sendable, Equatable { case float16, float32, int32, uint16 }
    // ndarray/interleavelayout-swift.struct: struct InterleaveLayout
    public struct InterleaveLayout {}

    // ndarray/view: struct View<Element> where Element : BitwiseCopyable
    public struct View<Element: BitwiseCopyable>: ~Copyable {
        // ndarray/view/withunsafepointer(_:)
        public func withUnsafePointer<R, E: Error>(
            _ body: (UnsafePointer<Element>, Span<Int>, Span<Int>) throws(E) -> R
        ) throws(E) -> R { fatalError() }
    }

    // ndarray/mutableview: struct MutableView<Element> where Element : BitwiseCopyable
    public struct MutableView<Element: BitwiseCopyable>: ~Copyable {
        // ndarray/mutableview/copyelements(fromcontentsof:)
        public mutating func copyElements(fromContentsOf collection: some Collection<Element>) {}
    }
}

// Swift has this since 6.2.
public struct Span<Element>: Sendable where Element: Sendable {
    public var count: Int { fatalError() }
    public subscript(position: Int) -> Element { fatalError() }
}
