// What the app uses of Core ML (iOS 18), for a type check on Linux. check_coreml.py compares the lines that name a
// selector or a case with PyObjC's metadata, which is generated from Apple's headers.
@_exported import Darwin

public enum MLComputeUnits: Int, Sendable {
    case cpuOnly = 0  // MLComputeUnitsCPUOnly
    case cpuAndGPU = 1  // MLComputeUnitsCPUAndGPU
    case all = 2  // MLComputeUnitsAll
    case cpuAndNeuralEngine = 3  // MLComputeUnitsCPUAndNeuralEngine
}

public enum MLMultiArrayDataType: Int, Sendable {
    case double = 65600  // MLMultiArrayDataTypeDouble
    case float32 = 65568  // MLMultiArrayDataTypeFloat32
    case float16 = 65552  // MLMultiArrayDataTypeFloat16
    case int32 = 131104  // MLMultiArrayDataTypeInt32
}

open class MLMultiArray: NSObject {
    public init(shape: [NSNumber], dataType: MLMultiArrayDataType) throws {}  // [MLMultiArray initWithShape:dataType:error:]
    public convenience init<S: MLShapedArrayProtocol>(_ shapedArray: S) { fatalError() }
    public var dataType: MLMultiArrayDataType { fatalError() }
}

public protocol MLShapedArrayScalar {}
extension Float16: MLShapedArrayScalar {}
extension Float: MLShapedArrayScalar {}
extension Double: MLShapedArrayScalar {}
extension Int32: MLShapedArrayScalar {}

public protocol MLShapedArrayProtocol {
    associatedtype Scalar: MLShapedArrayScalar
    var scalars: [Scalar] { get }
}

public struct MLShapedArray<Scalar: MLShapedArrayScalar>: MLShapedArrayProtocol {
    public init<S: Sequence>(scalars: S, shape: [Int]) where S.Element == Scalar {}
    public init(_ multiArray: MLMultiArray) {}
    public var scalars: [Scalar] { fatalError() }
}

open class MLFeatureValue: NSObject {
    public convenience init(multiArray: MLMultiArray) { fatalError() }
    public var multiArrayValue: MLMultiArray? { fatalError() }
}

public protocol MLFeatureProvider: AnyObject {
    var featureNames: Set<String> { get }
    func featureValue(for featureName: String) -> MLFeatureValue?
}

open class MLDictionaryFeatureProvider: NSObject, MLFeatureProvider {
    public init(dictionary: [String: Any]) throws {}  // [MLDictionaryFeatureProvider initWithDictionary:error:]
    public var featureNames: Set<String> { fatalError() }
    public func featureValue(for featureName: String) -> MLFeatureValue? { fatalError() }
}

open class MLModelConfiguration: NSObject {
    public var computeUnits: MLComputeUnits = .all
    public var functionName: String?
}

public final class MLState: NSObject {
    override private init() {}
}

open class MLModel: NSObject {
    // [MLModel modelWithContentsOfURL:configuration:error:]
    public convenience init(contentsOf url: URL, configuration: MLModelConfiguration) throws { fatalError() }
    public func makeState() -> MLState { fatalError() }
    // [MLModel predictionFromFeatures:usingState:error:]
    public func prediction(from input: any MLFeatureProvider, using state: MLState) throws -> any MLFeatureProvider {
        fatalError()
    }
    // [MLModel compileModelAtURL:completionHandler:]
    public class func compileModel(at modelURL: URL) async throws -> URL { fatalError() }
}
