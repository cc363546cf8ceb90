import Foundation

#if os(iOS) || GEMMA_STUBS
@preconcurrency import Darwin
import os

/// Peak memory of this process in bytes, as the system counts it against the app's limit.
public func peakResidentBytes() -> Double { Double(taskMemory().ledger_phys_footprint_peak) }

/// Memory of this process in bytes, as the system counts it against the app's limit.
public func residentBytes() -> Double { Double(taskMemory().phys_footprint) }

/// Bytes that this process may still use.
public func availableBytes() -> Double { Double(os_proc_available_memory()) }

private func taskMemory() -> task_vm_info_data_t {
    var info = task_vm_info_data_t()
    var count = mach_msg_type_number_t(MemoryLayout<task_vm_info_data_t>.size / MemoryLayout<integer_t>.size)
    let status = withUnsafeMutablePointer(to: &info) { pointer in
        pointer.withMemoryRebound(to: integer_t.self, capacity: Int(count)) {
            task_info(mach_task_self_, task_flavor_t(TASK_VM_INFO), $0, &count)
        }
    }
    return status == KERN_SUCCESS ? info : task_vm_info_data_t()
}
#else
/// Peak resident memory of this process in bytes.
public func peakResidentBytes() -> Double {
    var usage = rusage()
    #if canImport(Darwin)
    getrusage(RUSAGE_SELF, &usage)
    return Double(usage.ru_maxrss)
    #else
    getrusage(__rusage_who_t(RUSAGE_SELF.rawValue), &usage)
    return Double(usage.ru_maxrss) * 1024  // Linux reports KiB
    #endif
}

/// The peak: these systems have no limit for an app to look at.
public func residentBytes() -> Double { peakResidentBytes() }

/// Half of the device's memory: the system and other apps use the rest.
public func availableBytes() -> Double { Double(ProcessInfo.processInfo.physicalMemory) / 2 }
#endif
