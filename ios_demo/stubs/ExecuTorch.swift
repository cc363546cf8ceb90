// What the app uses of ExecuTorch 1.5's Swift API, for a type check on Linux; written after ExecuTorchModule.h,
// ExecuTorch+Module.swift and ExecuTorch+Tensor.swift.
@_exported import Darwin

public protocol Scalar {}
extension Int64: Scalar {}
extension Float: Scalar {}

public protocol ValueConvertible {
    func asValue() -> Value
}

public final class Tensor<T: Scalar>: ValueConvertible {
    public init(_ scalars: [T], shape: [Int] = [], strides: [Int] = [], dimensionOrder: [Int] = []) {}
    public func scalars() -> [T] { fatalError() }
    public func asValue() -> Value { fatalError() }
}

open class Value: NSObject {
    public func tensor<T: Scalar>() -> Tensor<T>? { fatalError() }
}

public enum ModuleLoadMode: Int, Sendable {
    case file, mmap, mmapUseMlock, mmapUseMlockIgnoreErrors
}

open class Module: NSObject {
    public init(filePath: String, loadMode: ModuleLoadMode) {}
    public convenience init(filePath: String) { fatalError() }
    public func load(_ method: String) throws {}
    public func forward(_ inputs: [ValueConvertible]) throws -> [Value] { fatalError() }
}
