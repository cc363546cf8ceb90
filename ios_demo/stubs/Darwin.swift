// What the app uses of Apple's C library and of Foundation's parts that Linux lacks, for a type check on Linux.
@_exported import Foundation
import FoundationNetworking

public typealias integer_t = Int32
public typealias kern_return_t = Int32
public typealias mach_port_t = UInt32
public typealias mach_msg_type_number_t = UInt32
public typealias task_flavor_t = UInt32
public typealias task_info_t = UnsafeMutablePointer<integer_t>

public struct task_vm_info_data_t {
    public var phys_footprint: UInt64 = 0
    public var ledger_phys_footprint_peak: Int64 = 0

    public init() {}
}

public let TASK_VM_INFO: Int32 = 22
public let KERN_SUCCESS: kern_return_t = 0
public var mach_task_self_: mach_port_t = 0

public func task_info(
    _ task: mach_port_t, _ flavor: task_flavor_t, _ info: task_info_t!, _ count: UnsafeMutablePointer<mach_msg_type_number_t>!
) -> kern_return_t { fatalError() }

extension ProcessInfo {
    public enum ThermalState: Int, Sendable {
        case nominal, fair, serious, critical
    }

    public var thermalState: ThermalState { fatalError() }
    public var isLowPowerModeEnabled: Bool { fatalError() }
}

extension URL {
    public func startAccessingSecurityScopedResource() -> Bool { fatalError() }
    public func stopAccessingSecurityScopedResource() {}
}

public func autoreleasepool<T>(invoking work: () throws -> T) rethrows -> T { try work() }

extension URLSessionConfiguration {
    public var allowsExpensiveNetworkAccess: Bool {
        get { fatalError() }
        set {}
    }
    public var allowsConstrainedNetworkAccess: Bool {
        get { fatalError() }
        set {}
    }
}

extension URLError {
    public enum NetworkUnavailableReason: Int, Sendable { case cellular, expensive, constrained }

    public var networkUnavailableReason: NetworkUnavailableReason? { fatalError() }
}
